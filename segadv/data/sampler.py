"""The order of training samples: it depends on the seed, not on workers or global state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..checks import at_least

__all__ = ["EpochSampler"]

PERMUTATION, AUGMENTATION, COINS, STEP = range(4)
"""First words of the keys of `seeded` that a training uses: a stream for every purpose."""


def seeded(seed: int, *key: int) -> np.random.Generator:
    """The stream of random numbers that belongs to a seed and a key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for `Augmented`: a permutation per epoch, the incomplete batch dropped.

    Args:
        length: number of samples of the data set.
        batch_size: samples per batch, at most `length`.
        seed: with the epoch it decides the permutation.
        start_step: first batch to give: a resumed run gets the tail of the uninterrupted run's batches.
        steps: number of batches of the whole run, counted from step 0.
        rank, processes: give the share of one of several processes, which together get the batches that a single
            one would get.
        accumulation: parts of a batch. Process r gets, part after part, the r-th slice of each, so that the parts
            are made of the same samples for any number of processes.

    Step s belongs to epoch ``s // batches_per_epoch``. Give it to a DataLoader as its `batch_sampler`.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        steps: int,
        rank: int = 0,
        processes: int = 1,
        accumulation: int = 1,
    ) -> None:
        at_least(1, batch_size=batch_size, processes=processes, accumulation=accumulation)
        at_least(0, rank=rank)
        if rank >= processes:
            raise ValueError(f"rank must be less than processes, got {rank} and {processes}")
        if batch_size % (processes * accumulation):
            raise ValueError(
                f"batch_size must be divisible by processes x accumulation = {processes} x {accumulation}, "
                f"got {batch_size}"
            )
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
        size = batch_size // (processes * accumulation)
        starts = [(part * processes + rank) * size for part in range(accumulation)]
        self.positions = [start + i for start in starts for i in range(size)]

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutation_epoch = -1
        for step in range(self.start_step, self.steps):
            epoch, batch = divmod(step, self.batches_per_epoch)
            if epoch != permutation_epoch:
                permutation = seeded(self.seed, PERMUTATION, epoch).permutation(self.length).tolist()
                permutation_epoch = epoch
            start = batch * self.batch_size
            yield [(epoch, permutation[start + position]) for position in self.positions]
