"""The order of training samples: it depends on the seed, not on workers or global state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EpochSampler"]

_PERMUTATION = 0  # first word of the spawn key: one stream per purpose


def seeded(seed: int, *key: int) -> np.random.Generator:
    """The stream of random numbers that belongs to a seed and a key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def at_least(minimum: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


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
        at_least(1, batch_size=batch_size)
        at_least(0, seed=seed, start_step=start_step)
        if length < batch_size:
            raise ValueError(f"batch_size must be at most the data set's length {length}, got {batch_size}")
        at_least(start_step, steps=steps)
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
                permutation = seeded(self.seed, _PERMUTATION, epoch).permutation(self.length).tolist()
                permutation_epoch = epoch
            start = batch * self.batch_size
            yield [(epoch, index) for index in permutation[start : start + self.batch_size]]
