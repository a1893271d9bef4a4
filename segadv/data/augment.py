"""Augmentation and order of training samples: they depend on the seed, not on workers or global state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .cityscapes import IGNORE_INDEX

__all__ = ["Augmented", "EpochSampler"]

# first word of a SeedSequence's spawn key: one stream per purpose
_PERMUTATION, _AUGMENTATION = 0, 1


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _at_least(minimum: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Random horizontal flip and random crop of another data set's samples.

    Args:
        dataset: ``dataset[index]`` is (image float32 [3, H, W], label uint8 [H, W]).
        crop: (h, w) of what comes out. An image smaller than that lies at a random place among zeros, its
            label among `IGNORE_INDEX`.
        seed: with the epoch and the index it decides everything random about a sample.

    ``augmented[epoch, index]`` is (image float32 [3, h, w], label uint8 [h, w], index).
    """

    def __init__(
        self, dataset: Dataset[tuple[torch.Tensor, torch.Tensor]], *, crop: tuple[int, int], seed: int
    ) -> None:
        height, width = crop
        _at_least(1, crop_height=height, crop_width=width)
        _at_least(0, seed=seed)
        self.dataset = dataset
        self.crop = (height, width)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        epoch, index = key
        image, label = self.dataset[index]
        generator = _generator(self.seed, _AUGMENTATION, epoch, index)
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


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for `Augmented`: a permutation per epoch, the incomplete batch dropped.

    Args:
        length: number of samples of the data set.
        batch_size: samples per batch, at most `length`.
        seed: with the epoch it decides the permutation.
        start_step: first batch to give: a resumed run gets the tail of the uninterrupted run's batches.
        steps: number of batches of the whole run, counted from step 0.

    Step s belongs to epoch ``s // batches_per_epoch``. Give it to a DataLoader as its `batch_sampler`.
    """

    def __init__(self, length: int, *, batch_size: int, seed: int, start_step: int = 0, steps: int) -> None:
        _at_least(1, batch_size=batch_size)
        _at_least(0, seed=seed, start_step=start_step)
        if length < batch_size:
            raise ValueError(f"batch_size must be at most the data set's length {length}, got {batch_size}")
        _at_least(start_step, steps=steps)
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.steps = steps
        self.batches_per_epoch = length // batch_size

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutation_epoch = -1
        for step in range(self.start_step, self.steps):
            epoch, batch = divmod(step, self.batches_per_epoch)
            if epoch != permutation_epoch:
                permutation = _generator(self.seed, _PERMUTATION, epoch).permutation(self.length).tolist()
                permutation_epoch = epoch
            start = batch * self.batch_size
            yield [(epoch, index) for index in permutation[start : start + self.batch_size]]
