"""Augmentation of training samples: it depends on (seed, epoch, index), not on workers or global state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from .files import IGNORE_INDEX
from .sampler import at_least, seeded

__all__ = ["Augmentation", "Augmented"]

_AUGMENTATION = 1  # first word of the spawn key: one stream per purpose; 0 belongs to the sampler


@dataclass(frozen=True)
class Augmentation:
    """How a training sample is changed at random before its crop is taken.

    Args:
        flip: mirror left and right with probability 1/2.
        scale: lowest and highest factor of the size.
        rotation: largest angle in degrees, to either side.
        blur: largest standard deviation of a Gaussian blur of the crop, in pixels; half of the samples are blurred.
    """

    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    blur: float = 0.0


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Random horizontal flip and random crop of another data set's samples.

    Args:
        dataset: ``dataset[index]`` is (image float32 [3, H, W], label uint8 [H, W]).
        crop: (h, w) of what comes out. An image smaller than that lies at a random place among zeros, its
            label among `IGNORE_INDEX`.
        seed: with the epoch and the index it decides everything random about a sample.
        augmentation: what happens before the crop is taken.

    ``augmented[epoch, index]`` is (image float32 [3, h, w], label uint8 [h, w], index).
    """

    def __init__(
        self,
        dataset: Dataset[tuple[torch.Tensor, torch.Tensor]],
        *,
        crop: tuple[int, int],
        seed: int,
        augmentation: Augmentation = Augmentation(),
    ) -> None:
        height, width = crop
        at_least(1, crop_height=height, crop_width=width)
        at_least(0, seed=seed)
        self.dataset = dataset
        self.crop = (height, width)
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        epoch, index = key
        image, label = self.dataset[index]
        generator = seeded(self.seed, _AUGMENTATION, epoch, index)
        flip = generator.random() < 0.5
        inside, outside = [], []
        for size, crop in zip(label.shape, self.crop, strict=True):
            surplus = size - crop
            offset = int(generator.integers(min(surplus, 0), max(surplus, 0), endpoint=True))
            length = min(size, crop)
            inside.append(slice(max(offset, 0), max(offset, 0) + length))
            outside.append(slice(max(-offset, 0), max(-offset, 0) + length))
        cropped_image = image.new_zeros(image.shape[0], *self.crop)
        cropped_label = label.new_full(self.crop, IGNORE_INDEX)
        image, label = image[:, *inside], label[*inside]
        if flip:
            image, label = image.flip(-1), label.flip(-1)
        cropped_image[:, *outside] = image
        cropped_label[*outside] = label
        return cropped_image, cropped_label, index
