"""What the trainer costs beside the mathematics: `python -m benchmarks.trainer [--arm fast-newton] [--write]`.

The demo's network, batches of 16 x 3 x 128 x 256 cropped from images in memory, on the CPU. `Trainer.run` itself is
measured, by timers around what any loop has to do (attack, forward pass, loss, backward pass, optimiser) and
around reading the batch (crop, flip, collate; with workers other processes do it) and the checkpoint. What is left of
the time from one step to the next is the trainer: coins, seeds, choosing and moving samples, schedule,
metrics. The monitor's probe, which every hundredth step has by default, is an attack of its own and a row of its own.

Timers inside one run, because a difference of one percent between two loops drowns in the noise of a machine that
others use too. On the CPU a call returns when its work is done, so that the parts add up to the whole.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segadv import training
from segadv.models import small_pspnet
from segadv.training import TrainConfig, Trainer

from .cases import random_regions
from .measure import commit, machine
from .records import Where, destination, require_native_core, write_records

WARM_UP = 3
PART, SHARE = "part of a training step", "share of a training step"
TRAINER, READING, CHECKPOINT, PROBE = "the trainer", "reading the batch (no workers)", "a checkpoint", "a probe"


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Noise of the demo's size, in memory."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(length, 3, 160, 320, generator=generator)
        self.labels = random_regions(length, 19, (160, 320), generator=generator).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Timers:
    """Seconds per kind of work, of every step.

    A call inside another timed one counts with that one.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = {}
        self.inside = False
        self.began = time.perf_counter()

    def next_step(self) -> None:
        now = time.perf_counter()
        self.steps.append({**self.current, "whole": now - self.began})
        self.current, self.began = {}, now

    def around(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self.inside:
                return call(*arguments, **keywords)
            self.inside, begin = True, time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.inside = False
                self.current[kind] = self.current.get(kind, 0.0) + time.perf_counter() - begin

        return timed


WORK = ("attack", "forward", "loss", "backward", "optimiser")


def measure(config: TrainConfig) -> list[dict[str, float]]:
    """Seconds of every step after the warm-up: the kinds of `WORK`, batch, checkpoint, probe, whole."""
    timers = Timers()
    torch.manual_seed(0)
    trainer: Any = Trainer(config, small_pspnet(), Scenes(8 * config.batch_size))

    class TimedLoader(training.Loader):
        def __iter__(self) -> Iterator[Any]:
            batches = super().__iter__()
            advance = timers.around("batch", lambda: next(batches, None))
            timers.began = time.perf_counter()
            while (batch := advance()) is not None:
                yield batch
                timers.next_step()

    genuine = training.Loader, training.functional.cross_entropy, Tensor.backward
    training.Loader = TimedLoader  # type: ignore[misc]
    training.functional.cross_entropy = timers.around("loss", genuine[1])
    Tensor.backward = timers.around("backward", genuine[2])  # type: ignore[method-assign]
    if trainer.attack is not None:
        trainer.attack = timers.around("attack", trainer.attack)
    trainer._network = timers.around("forward", trainer._network)
    for name in ("step", "zero_grad"):
        setattr(trainer.optimizer, name, timers.around("optimiser", getattr(trainer.optimizer, name)))
    trainer.save = timers.around("checkpoint", trainer.save)
    trainer._take_probe = timers.around("probe", trainer._take_probe)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer.run(folder, progress=False)
    finally:
        training.Loader, training.functional.cross_entropy, Tensor.backward = genuine  # type: ignore[misc]
    return timers.steps[WARM_UP:]


def spread(values: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return float(p20), float(median), float(p80), float(values.mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arm", default="fast-newton")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--crop", type=int, nargs=2, default=[128, 256], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--write", metavar="CSV", nargs="?", const="", help="adds the rows to a file")
    options = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    require_native_core(cpu)
    path = destination("trainer", options.write, cpu, quick=False)
    config = TrainConfig(
        arm=options.arm,
        steps=options.steps + WARM_UP,
        batch_size=options.batch_size,
        crop=tuple(options.crop),
        device="cpu",
        monitor_every=10,
        checkpoint_every=10,
    )
    steps = measure(config)
    beside = ("batch", "checkpoint", "probe")
    kinds = {kind: np.array([step.get(kind, 0.0) for step in steps]) for kind in (*WORK, *beside)}
    work = sum(kinds[kind] for kind in WORK)
    rest = np.array([step["whole"] for step in steps]) - work - sum(kinds[kind] for kind in beside)

    size = f"{options.batch_size} x 3 x {options.crop[0]} x {options.crop[1]}"
    print(f"{options.arm}, {size}, float32, {len(steps)} steps, {torch.get_num_threads()} threads")
    print(f"{machine()}, commit {commit()}, torch {torch.__version__}")
    print(f"load of the machine {os.getloadavg()[0]:.1f}\n")
    rows = {kind: kinds[kind] for kind in WORK} | {"these together": work, TRAINER: rest, READING: kinds["batch"]}
    for name, kind in ((CHECKPOINT, "checkpoint"), (PROBE, "probe")):
        if (taken := kinds[kind] > 0).any():
            rows[name] = kinds[kind][taken]
    print(f"{'ms':34s}{'p20':>9s}{'median':>9s}{'p80':>9s}{'mean':>9s}")
    for name, seconds in rows.items():
        print(f"{name:34s}" + "".join(f"{1e3 * value:9.3f}" for value in spread(seconds)))

    print(f"\n{'percent of the work of the step':34s}{'p20':>9s}{'median':>9s}{'p80':>9s}{'mean':>9s}")
    for name, seconds in ((TRAINER, rest), ("and reading the batch", rest + kinds["batch"])):
        print(f"{name:34s}" + "".join(f"{value:9.2f}" for value in spread(100 * seconds / work)))
    for name, every in ((CHECKPOINT, TrainConfig.checkpoint_every), (PROBE, TrainConfig.monitor_every)):
        if name in rows:
            amortised = 100 * np.median(rows[name]) / np.median(work) / every
            print(f"{f'{name} every {every} steps':34s}{'':9s}{amortised:9.2f}")
    if path is not None:
        where = Where(f"small, {size}, 19 classes", torch.float32, cpu)
        records = [where.record(PART, name, options.arm, [1e3 * seconds], unit="ms") for name, seconds in rows.items()]
        share = where.record(SHARE, TRAINER, options.arm, [100 * rest / work], unit="%")
        write_records(path, [*records, share])
        print(f"\nin {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
