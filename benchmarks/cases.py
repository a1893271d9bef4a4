"""Named shapes: what segmentation networks produce, after the settings of the usual data sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as TF
from torch import Tensor


def regions(field: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [N, *size]: where which class of a coarse field of random numbers [N, C, h, w] is the largest."""
    # One image after the other: all classes at the labels' size take much memory.
    each = [TF.interpolate(one[None], size, mode="bilinear", align_corners=True).argmax(1) for one in field]
    return torch.cat(each)


def random_regions(
    images: int,
    classes: int,
    size: tuple[int, int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Labels [images, *size], int64, in regions of about 64 pixels, as those of photographs are."""
    coarse = [max(side // 64, 2) for side in size]
    return regions(torch.randn(images, classes, *coarse, generator=generator, device=device), size)


@dataclass(frozen=True)
class Case:
    """Logits [images, classes, own, own] and labels [images, size, size]."""

    name: str
    images: int
    classes: int
    own: int
    size: int
    noise: bool = False
    channels_last: bool = False

    def tensors(
        self, *, full_resolution: bool, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Logits and uint8-range int64 labels with a void border of 2 %.

        As of a trained network: smooth logits and labels in regions, of which the largest logit gets three of four
        right. Of 19 classes four can then be the label, the largest or the runner-up in a block of the CPU's walk
        (csrc/cpu/up_tiles.h), as many as with the demo's trained networks. Its worst case is `noise`: every logit and
        every label for itself.
        """
        own = self.size if full_resolution else self.own
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        logits = torch.randn(self.images, self.classes, own, own, **options)
        if self.noise:
            labels = torch.randint(0, self.classes, (self.images, self.size, self.size), **options)
        else:
            coarse = max(self.own // 8, 2)
            field, other = torch.randn(2, self.images, self.classes, coarse, coarse, **options)
            labels = regions(field + 0.25 * other, (self.size, self.size))
            logits *= 0.2
            for one, z in zip(field, logits, strict=True):
                z += 4 * TF.interpolate(one[None], (own, own), mode="bilinear", align_corners=True)[0]
        labels[:, : max(1, self.size // 50)] = 255
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return logits.to(dtype, memory_format=layout), labels


# The CPU's sizes; a GPU takes the batch sizes of training (16, 16, 16).
CASES = {
    case.name: case
    for case in (
        Case("cityscapes19", images=2, classes=19, own=89, size=712),
        Case("voc21", images=16, classes=21, own=59, size=472),
        Case("ade150", images=1, classes=150, own=128, size=512),
        Case("noise19", images=2, classes=19, own=89, size=712, noise=True),
    )
}
