"""Files are written whole or not at all; and what a killed process leaves is found again."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "is_leftover", "remove_leftovers", "write_text"]


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path in the same folder, made where it is missing, which replaces `path` when the block ends
    without error.

    At any moment `path` is the previous file or the new one, each whole; with `durable` also after a loss of power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.segadv{path.suffix}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether it is what an `atomic_write` leaves that was killed."""
    return re.fullmatch(r"\..+\.\d+\.\d+\.segadv(\.\w+)?", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if is_leftover(path) and path.is_file():
            path.unlink()
