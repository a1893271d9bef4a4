"""Batches for training and validation."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .files import opened

__all__ = ["Loader", "require_one_size", "stack"]


class Loader(DataLoader[Any]):
    """On the CPU, whatever the default device: its generator is there, and processes that it forks cannot use a GPU.

    It draws no random numbers from the global generator, and its processes leave Ctrl-C to the one that trains.
    """

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, generator=torch.Generator(), worker_init_fn=_ignore_interrupts, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        def reading() -> contextlib.AbstractContextManager[Any]:  # the device's takes time in every call of torch
            return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")

        with reading():
            batches = super().__iter__()
        while True:
            with reading():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def _ignore_interrupts(worker: int) -> None:
    """A process that loads data goes on until the training process ends, or ends it with SIGTERM: Ctrl-C, and the
    SIGTERM of torchrun, go to a whole group of processes, of which it is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)
    if torch.get_default_device().type != "cpu":  # from the script, where the process reads it
        torch.set_default_device("cpu")


def require_one_size(paths: Sequence[str | os.PathLike[str]]) -> None:
    """Before anything is read: ValueError for images of different sizes."""
    sizes = set()
    for path in paths:
        with contextlib.suppress(OSError), opened(path) as image:  # what cannot be read is told when it is read
            sizes.add(image.size[::-1])
    if len(sizes) > 1:
        raise ValueError(f"validation.batch_size must be 1 for images of different sizes, got {sorted(sizes)[:3]}")


def stack(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and labels [N, H, W] of one size."""
    if len(sizes := {tuple(label.shape) for _, label in samples}) > 1:
        raise ValueError(f"validation.batch_size must be 1 for images of different sizes, got {sorted(sizes)}")
    return torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples])
