"""Named shapes: what segmentation networks produce, after the settings of the usual data sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Logits [images, classes, own, own] and labels [images, size, size]."""

    name: str
    images: int
    classes: int
    own: int
    size: int

    @property
    def full_resolution_bytes(self) -> int:
        """One float32 buffer of logits at the labels' size."""
        return 4 * self.images * self.classes * self.size**2

    def tensors(
        self, *, full_resolution: bool, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Logits and uint8-range int64 labels with a void border of 2 %."""
        own = self.size if full_resolution else self.own
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        logits = torch.randn(self.images, self.classes, own, own, **options).to(dtype)
        labels = torch.randint(0, self.classes, (self.images, self.size, self.size), **options)
        labels[:, : max(1, self.size // 50)] = 255
        return logits, labels


# The CPU's sizes; a GPU takes the batch sizes of training (16, 16, 16).
CASES = {
    case.name: case
    for case in (
        Case("cityscapes19", images=2, classes=19, own=89, size=712),
        Case("voc21", images=16, classes=21, own=59, size=472),
        Case("ade150", images=1, classes=150, own=128, size=512),
    )
}
