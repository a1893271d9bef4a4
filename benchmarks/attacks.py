"""What attacks cost: `python -m benchmarks.attacks [--images 16] [--size 128 256] [--rounds 15]`.

The demo's network, 16 x 3 x 128 x 256 in float32. The bare pass is a forward and an input gradient from a given
gradient of the logits: what no attack can do without. An attack's step is measured as the difference between a run of
three steps and one of one step, halved, in the same rounds; the attacks' single runs stand beside it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from segadv.attacks import BIM, FGSM, PGD, Attack, CosPGD, FastNewton, SegPGD
from segadv.attacks.base import frozen
from segadv.evaluation import evaluate
from segadv.models import small_pspnet

from .measure import commit, interleaved, machine

BUDGET = {"eps": 0.03, "alpha": 0.03}


def bare_pass(model: nn.Module, images: Tensor, logits_grad: Tensor) -> Tensor:
    with frozen(model):
        leaf = images.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf), leaf, logits_grad)
    return grad


class Passes(nn.Module):
    """Counts forward passes and those that were differentiated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = small_pspnet().eval()
    images = torch.rand(options.images, 3, *options.size)
    labels = torch.randint(0, 19, (options.images, *options.size)).to(torch.uint8)
    logits_grad = torch.randn_like(model(images).detach())

    attacks: dict[str, Attack] = {"FGSM": FGSM(model, eps=0.03), "FastNewton": FastNewton(model)}
    for kind in (BIM, PGD, SegPGD, CosPGD):
        for steps in (1, 3):
            attacks[f"{kind.__name__}, {steps} steps"] = kind(model, steps=steps, **BUDGET)
    calls = {"bare pass": lambda: bare_pass(model, images, logits_grad)}
    calls |= {name: lambda attack=attack: attack(images, labels) for name, attack in attacks.items()}
    timings = interleaved(calls, rounds=options.rounds)
    bare = timings["bare pass"].p50

    size = "x".join(map(str, images.shape))
    print(
        f"{size}, float32, {torch.get_num_threads()} threads, {machine()}, commit {commit()}, torch {torch.__version__}"
    )
    print(f"{'':20s}{'median':>10s}{'p20':>10s}{'p80':>10s}{'against the bare pass':>24s}")
    for name, timing in timings.items():
        print(
            f"{name:20s}{timing.p50:>7.1f} ms{timing.p20:>7.1f} ms{timing.p80:>7.1f} ms"
            f"{100 * (timing.p50 / bare - 1):>+22.1f} %"
        )
    step = {
        kind: (timings[f"{kind}, 3 steps"].p50 - timings[f"{kind}, 1 steps"].p50) / 2
        for kind in ("BIM", "PGD", "SegPGD", "CosPGD")
    }
    print("\none more step of")
    for kind, milliseconds in step.items():
        print(
            f"  {kind:18s}{milliseconds:>7.1f} ms{100 * (milliseconds / bare - 1):>+7.1f} % against the bare pass"
            f"{100 * (milliseconds / step['PGD'] - 1):>+7.1f} % against a step of PGD"
        )

    counted = Passes(model)
    evaluate(counted, [(images, labels)], ["fgsm"], [0.0, 0.01, 0.02, 0.03, 0.04])
    print(f"\nFGSM at 5 eps, 0 among them: {counted.backwards} backward and {counted.forwards} forward passes")
    counted.forwards = counted.backwards = 0
    evaluate(counted, [(images, labels)], ["fgsm"], [0.01, 0.02, 0.03, 0.04, 0.05])
    print(f"FGSM at 5 eps above 0: {counted.backwards} backward and {counted.forwards} forward passes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
