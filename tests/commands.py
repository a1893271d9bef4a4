"""The command line called in this process, and what it leaves in files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from segadv.cli import main
from segadv.demo import DemoSizes

TINY = DemoSizes(
    train_images=4,
    val_images=2,
    image_size=(64, 64),
    crop=(32, 32),
    batch_size=4,
    steps=4,
    learning_rate=0.05,
    overhead_steps=1,
)


def run(command: str) -> int:
    return main(command.split())


def failure(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message that a wrong use ends with."""
    capsys.readouterr()
    assert run(command) == 2
    _, start, message = capsys.readouterr().err.partition("segadv: error: ")
    assert start
    assert "segadv: error" not in message
    return message


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def drawn(path: Path) -> bool:
    """Whether it opens as a picture that is not blank."""
    from PIL import Image

    with Image.open(path) as image:
        return image.width >= 700 and len(image.convert("RGB").getcolors(1 << 24)) > 20
