"""What attacks cost: `python -m benchmarks.attacks [--images 16] [--size 128 256] [--rounds 15] [--write]`.

The demo's network, 16 x 3 x 128 x 256 in float32. The bare pass is a forward and an input gradient from a given
gradient of the logits: what no attack can do without. An attack's step is measured as the difference between a run of
three steps and one of one step, halved, in the same rounds; the attacks' single runs stand beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from segadv.attacks import BIM, FGSM, PGD, Attack, CosPGD, FastNewton, SegPGD
from segadv.attacks.frozen import frozen
from segadv.models import small_pspnet

from .cases import random_regions
from .measure import Samples, commit, machine, milliseconds_of
from .ops import CPU
from .records import Record, Where, destination, median, percent_over, require_native_core, write_records

BUDGET: dict[str, Any] = {"eps": 0.03, "alpha": 0.03}
ITERATIVE: dict[str, Callable[..., Attack]] = {
    **{kind.__name__: kind for kind in (BIM, PGD, SegPGD, CosPGD)},
    "CosPGD, balanced": partial(CosPGD, balanced=True),
}

RUN, OVER_BARE = "attack", "attack, over the bare pass"
STEP, STEP_OVER_BARE, STEP_OVER_PGD = "further step", "further step, over the bare pass", "further step, over PGD's"


def bare_pass(model: nn.Module, images: Tensor, logits_grad: Tensor) -> Tensor:
    with frozen(model):
        leaf = images.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf), leaf, logits_grad)
    return grad


def further_step(three: Samples, one: Samples) -> Samples:
    """Time of one more step, from runs of three and of one."""
    return (median(three) - median(one)) / 2


def further_step_over(three: Samples, one: Samples, base: Samples) -> Samples:
    return 100 * (further_step(three, one) / median(base) - 1)


def further_step_over_step(three: Samples, one: Samples, base_three: Samples, base_one: Samples) -> Samples:
    return 100 * (further_step(three, one) / further_step(base_three, base_one) - 1)


def measured(images: int, size: tuple[int, int], rounds: int) -> list[Record]:
    torch.manual_seed(0)
    model = small_pspnet().eval()
    batch = torch.rand(images, 3, *size)
    labels = random_regions(images, 19, size).to(torch.uint8)
    logits_grad = torch.randn_like(model(batch).detach())
    attacks: dict[tuple[str, int], Attack] = {("FGSM", 1): FGSM(model, eps=0.03), ("FastNewton", 1): FastNewton(model)}
    attacks |= {
        (name, steps): kind(model, steps=steps, **BUDGET) for name, kind in ITERATIVE.items() for steps in (1, 3)
    }
    calls: dict[tuple[str, int], Any] = {("bare pass", 0): partial(bare_pass, model, batch, logits_grad)}
    calls |= {key: partial(attack, batch, labels) for key, attack in attacks.items()}
    for call in (*calls.values(), *calls.values()):
        call()
    times = milliseconds_of(calls, CPU, rounds=rounds)
    bare = times["bare pass", 0]

    where = Where(f"small, {images} x 3 x {size[0]} x {size[1]}", torch.float32, CPU)
    rows = [where.record(RUN, "bare pass", "", [bare], unit="ms")]
    for name, steps in attacks:
        own, mode = times[name, steps], f"{steps} step{'s' * (steps > 1)}"
        rows.append(where.record(RUN, name, mode, [own], unit="ms"))
        rows.append(where.record(OVER_BARE, name, mode, [own, bare], unit="%", statistic=percent_over))
    pgd = times["PGD", 3], times["PGD", 1]
    for name in ITERATIVE:
        runs = times[name, 3], times[name, 1]
        rows += [
            where.record(STEP, name, "", runs, unit="ms", statistic=further_step),
            where.record(STEP_OVER_BARE, name, "", [*runs, bare], unit="%", statistic=further_step_over),
            where.record(STEP_OVER_PGD, name, "", [*runs, *pgd], unit="%", statistic=further_step_over_step),
        ]
    return rows


def shown(rows: list[Record]) -> str:
    lines = [f"{'':54s}{'median':>16s}{'p20':>10s}{'p80':>10s}{'95 % interval':>22s}"]
    for row in rows:
        name = ", ".join(part for part in (row.operation, row.provider, row.mode) if part)
        spread = f"{row.p20:>10.1f}{row.p80:>10.1f}{f'{row.low:.1f} to {row.high:.1f}':>22s}"
        lines.append(f"{name:54s}{row.p50:>8.1f} {row.unit:<7s}{spread}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", metavar="CSV", nargs="?", const="")
    options = parser.parse_args(arguments)
    require_native_core(CPU)
    path = destination("attacks", options.write, CPU, quick=False)
    rows = measured(options.images, tuple(options.size), options.rounds)
    print(
        f"{rows[0].case}, float32, {torch.get_num_threads()} threads, {machine()}, commit {commit()}, "
        f"torch {torch.__version__}\n{shown(rows)}"
    )
    if path:
        write_records(path, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
