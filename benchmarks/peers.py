"""segadv beside other packages: `python -m benchmarks.peers [--only ...] [--write]`.

In every comparison all have the same network with the same weights, the same inputs and the same number of steps.
What they return is compared with eager PyTorch before anything is timed, with the tolerances below; who differs is
named and not timed (where segadv differs, nobody is), and the exit status is 1. The attacks are compared in float64:
in float32, or with a GPU's TF32, rounding turns the sign of small gradients, and every step adds to that. Then all are
timed in the same rounds, in an order drawn anew for each. A ratio is that of two medians, its 95 % interval is a
bootstrap over rounds.

| comparison | peers | what is done | equal means |
|---|---|---|---|
| fgsm | torchattacks | one step, eps 0.03 | 99.99 % of the elements of the adversarial images, to 1e-3 of the change |
| pgd | torchattacks | `--steps` steps of 0.01, eps 0.03, no random start | likewise |
| segpgd, cospgd | cospgd's functions, in a loop | likewise | likewise |
| jaccard | torchmetrics | mIoU of logits at an eighth of the labels' size, 2 % of the pixels void | mIoU to 1e-4 |
| segformer | transformers' own loss | forward, loss and backward of SegFormer-B0 | loss and weight gradients to 1e-3 |

torchattacks and cospgd do not resample: their network has the bilinear upsampling inside, ours returns its own
small logits. torchattacks knows no ignored pixels, so the attacks' labels have none. Random starts are left out
because every package draws its own. The attacked network is in eval mode and no weight of it needs a gradient, whoever
attacks. "eager" is the same attack in plain PyTorch with `torch.autograd.grad`; "compile" is that with torch.compile of
the network, and of upsampling and loss (all in one, Inductor of torch 2.13 gave a gradient of 0 on the CPU); "segadv,
compile" is the package's attack on the compiled network.

    pip install -c constraints.txt ".[peers]"
    pip install --no-deps torchattacks

The second line apart, because torchattacks 3.5.1 asks for requests 2.25 and torchvision, and imports neither.
A package that is missing is left out, and named.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from segadv import functional as F
from segadv.attacks import BIM, FGSM, PGD, Attack, CosPGD, SegPGD
from segadv.compat import import_torchvision
from segadv.models import ModelConfig, build_model
from segadv.results import miou

from .cases import CASES, Case, random_regions
from .measure import Samples, check_close, milliseconds_of
from .ops import predicted, upsampled, usual_confusion_matrix, usual_cross_entropy, usual_loss_sum
from .overhead import (
    Gradient,
    Loss,
    check_same_images,
    segformer_b0,
    shown,
    usual_attack,
    usual_iterations,
    usual_segpgd_losses,
)
from .records import Record, Where, destination, median, require_native_core, write_records

EPS, ALPHA = 0.03, 0.01  # usual_attack and usual_iterations have them too
CLASSES = 19
Result = tuple[Tensor, ...]
Call = Callable[[], Result]


class MissingPackageError(Exception):
    """A package that is not installed; its text says how to install it."""


def package(name: str, install: str) -> ModuleType:
    with suppress(ImportError):
        import_torchvision()  # torchmetrics imports it where it is installed
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{name} is left out, it does not import ({error}): {install}") from error


@dataclass(frozen=True)
class Comparison:
    """Providers that claim the same results; one is "eager", one "segadv"."""

    operation: str
    case: str
    calls: Mapping[str, Call]
    check: Callable[[str, Result, Result], None]
    """(provider, its results, eager's): RuntimeError where they differ."""
    checking: Callable[[], AbstractContextManager[None]] = nullcontext
    """In which the calls are made whose results are compared."""
    missing: Sequence[str] = ()
    differing: Sequence[str] = ()

    def checked(self) -> Comparison:
        """Without the providers whose results are not eager's; they are named in `differing`. Without all, where ours
        is among them: there is nothing then to compare their times with."""
        calls, differing = dict(self.calls), []
        with self.checking():
            expected = self.calls["eager"]()
            for provider, call in self.calls.items():
                try:
                    self.check(f"{self.operation}, {provider} against eager", call(), expected)
                except RuntimeError as error:
                    differing.append(f"not timed, its results differ: {error}")
                    del calls[provider]
        return replace(self, calls=calls if "segadv" in calls else {}, differing=differing)


def with_peers(calls: dict[str, Call], peers: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], list[str]]:
    """The calls and those of the peers that are installed, and what is to be said of the others."""
    missing = []
    for name, build in peers.items():
        try:
            calls[name] = build()
        except MissingPackageError as error:
            missing.append(str(error))
    return calls, missing


# --- attacks ------------------------------------------------------------------------------------------------------


class FullResolution(nn.Module):
    """A network whose logits have the images' size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.network(images), images.shape[-2:])


@dataclass
class Attacks:
    """The small network in eval mode without weight gradients, images and labels without void."""

    network: nn.Module
    images: Tensor
    labels: Tensor
    steps: int

    @classmethod
    def on(cls, device: torch.device, *, quick: bool, steps: int) -> Attacks:
        count, height, width = (2, 32, 64) if quick else (4, 256, 512)
        numbers = torch.Generator().manual_seed(0)
        network = build_model(ModelConfig(name="small_pspnet"), num_classes=CLASSES, seed=0)
        return cls(
            network.to(device).eval().requires_grad_(False),
            torch.rand(count, 3, height, width, generator=numbers).to(device),
            random_regions(count, CLASSES, (height, width), generator=numbers).to(device),
            steps,
        )

    @property
    def case(self) -> str:
        return f"small, {' x '.join(map(str, self.images.shape))}, {CLASSES} classes"

    def check(self, provider: str, ours: Result, expected: Result) -> None:
        check_same_images(provider, ours[0], expected[0], self.images)

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Network and images; the weights are afterwards the same, to the bit."""
        images, self.images = self.images, self.images.double()
        self.network.double()
        try:
            yield
        finally:
            self.network.float()
            self.images = images

    def gradient_of(self, network: nn.Module, wrap: Callable[[Loss], Loss] = lambda loss: loss) -> Gradient:
        def gradient(loss: Loss, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            leaf = images.detach().requires_grad_()
            value = wrap(loss)(network(leaf), labels)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

        return gradient

    def fgsm(self, *, compiled: bool) -> Comparison:
        def eager(gradient: Gradient) -> Result:
            return (usual_attack("fgsm", gradient, self.images, self.labels, torch.Generator(self.images.device)),)

        calls = self._calls(eager, lambda network: FGSM(network, eps=EPS), compiled=compiled)
        return self._comparison("fgsm", calls, {"torchattacks": lambda: self._torchattacks("FGSM", eps=EPS)})

    def pgd(self, *, compiled: bool) -> Comparison:
        def eager(gradient: Gradient) -> Result:
            losses = [usual_cross_entropy] * self.steps
            return (usual_iterations(losses, gradient, self.images, self.images, self.labels),)

        calls = self._calls(
            eager, lambda network: BIM(network, eps=EPS, alpha=ALPHA, steps=self.steps), compiled=compiled
        )
        options: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": self.steps, "random_start": False}
        return self._comparison("pgd", calls, {"torchattacks": lambda: self._torchattacks("PGD", **options)})

    def segpgd(self, *, compiled: bool) -> Comparison:
        def eager(gradient: Gradient) -> Result:
            losses = usual_segpgd_losses(self.steps)
            return (usual_iterations(losses, gradient, self.images, self.images, self.labels),)

        calls = self._calls(eager, partial(self._random_start_off, SegPGD), compiled=False)
        return self._comparison("segpgd", calls, {"cospgd": lambda: self._cospgd(segpgd=True)})

    def cospgd(self, *, compiled: bool) -> Comparison:
        def eager(gradient: Gradient) -> Result:
            losses = [partial(usual_loss_sum, loss="cospgd")] * self.steps
            return (usual_iterations(losses, gradient, self.images, self.images, self.labels),)

        calls = self._calls(eager, partial(self._random_start_off, CosPGD), compiled=False)
        return self._comparison("cospgd", calls, {"cospgd": lambda: self._cospgd(segpgd=False)})

    def _random_start_off(self, kind: type[PGD], network: nn.Module) -> Attack:
        return kind(network, eps=EPS, alpha=ALPHA, steps=self.steps, random_start=False)

    def _calls(
        self, eager: Callable[[Gradient], Result], build: Callable[[nn.Module], Attack], *, compiled: bool
    ) -> dict[str, Call]:
        def ours(attack: Attack) -> Result:
            return (attack(self.images, self.labels),)

        calls: dict[str, Call] = {
            "eager": partial(eager, self.gradient_of(self.network)),
            "segadv": partial(ours, build(self.network)),
        }
        if compiled:
            network = torch.compile(self.network, dynamic=False)
            wrap = cache(partial(torch.compile, dynamic=False))
            calls["compile"] = partial(eager, self.gradient_of(network, wrap))
            calls["segadv, compile"] = partial(ours, build(network))
        return calls

    def _comparison(
        self, operation: str, calls: dict[str, Call], peers: Mapping[str, Callable[[], Call]]
    ) -> Comparison:
        calls, missing = with_peers(calls, peers)
        return Comparison(operation, self.case, calls, self.check, self.in_float64, missing)

    def _torchattacks(self, name: str, **options: Any) -> Call:
        torchattacks = package("torchattacks", "pip install scipy; pip install --no-deps torchattacks")
        attack = getattr(torchattacks, name)(FullResolution(self.network).eval(), **options)
        return lambda: (attack(self.images, self.labels),)

    def _cospgd(self, *, segpgd: bool) -> Call:
        functions = package("cospgd", "pip install cospgd").functions
        network = FullResolution(self.network).eval()

        def attack() -> Result:
            x = self.images
            for step in range(self.steps):
                x = x.detach().requires_grad_()
                logits = network(x)
                loss = TF.cross_entropy(logits, self.labels, reduction="none")
                if segpgd:
                    loss = functions.segpgd_scale(logits, self.labels, loss, step, self.steps)
                else:
                    loss = functions.cospgd_scale(logits, self.labels, loss, num_classes=CLASSES).mean()
                loss.backward()
                x = functions.step_inf(x, EPS, x.grad, self.images, ALPHA, targeted=False)
            return (x,)

        return attack


# --- metric and loss ----------------------------------------------------------------------------------------------


def jaccard(device: torch.device, *, quick: bool) -> Comparison:
    """One update with logits at an eighth of the labels' size, and the mIoU."""
    case = Case("quick", images=2, classes=CLASSES, own=8, size=64) if quick else CASES["cityscapes19"]
    logits, labels = case.tensors(full_resolution=False, device=device)

    def ours(confusion_matrix: Callable[[Tensor, Tensor], Tensor]) -> Result:
        return (torch.tensor(miou(confusion_matrix(logits, labels))),)

    def torchmetrics() -> Call:
        module = package("torchmetrics.classification", "pip install torchmetrics")
        # As fast as its documentation offers: class indices, nothing looked at.
        metric = module.MulticlassJaccardIndex(num_classes=case.classes, ignore_index=255, validate_args=False)
        metric = metric.to(device)

        def update() -> Result:
            metric.reset()
            metric.update(predicted(upsampled(logits, labels.shape[-2:])), labels)
            return (metric.compute().cpu(),)

        return update

    def check(provider: str, found: Result, expected: Result) -> None:
        check_close(provider, found[0], expected[0], tolerance=1e-4)

    calls: dict[str, Call] = {
        "eager": partial(ours, usual_confusion_matrix),
        "segadv": partial(ours, F.confusion_matrix),
    }
    calls, missing = with_peers(calls, {"torchmetrics": torchmetrics})
    own = f"{case.images} x {case.classes} x {case.own} x {case.own}"
    return Comparison("jaccard", f"{own} -> {case.size}", calls, check, missing=missing)


def segformer(device: torch.device, *, quick: bool) -> Comparison:
    """Forward, loss and backward, with dropout, in train mode."""
    count, side, classes = (2, 64, 150) if quick else (4, 256, 150)
    try:
        network = segformer_b0(classes).to(device).train()
    except ImportError as error:
        left_out = [f"segformer is left out: {error}"]
        return Comparison("segformer", "", {}, lambda *results: None, missing=left_out)
    numbers = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=numbers).to(device)
    labels = random_regions(count, classes, (side, side), generator=numbers).to(device)
    labels[:, : side // 32] = 255

    def trained(loss_of: Callable[[], Tensor]) -> Result:
        torch.manual_seed(0)  # dropout
        network.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    def check(provider: str, found: Result, expected: Result) -> None:
        for name, ours, theirs in zip(("loss", "weight gradients"), found, expected, strict=True):
            check_close(f"{provider}, {name}", ours, theirs, tolerance=1e-3)

    calls: dict[str, Call] = {
        "eager": lambda: trained(lambda: usual_cross_entropy(network(images).logits, labels)),
        "transformers": lambda: trained(lambda: network(pixel_values=images, labels=labels).loss),
        "segadv": lambda: trained(lambda: F.cross_entropy(network(images).logits, labels)),
    }
    return Comparison("segformer", f"segformer-b0, {count} x 3 x {side} x {side}, {classes} classes", calls, check)


# --- command line -------------------------------------------------------------------------------------------------

COMPARISONS = ("fgsm", "pgd", "segpgd", "cospgd", "jaccard", "segformer")


def comparison(name: str, device: torch.device, *, quick: bool, steps: int, compiled: bool) -> Comparison:
    if name in ("jaccard", "segformer"):
        return {"jaccard": jaccard, "segformer": segformer}[name](device, quick=quick)
    built: Comparison = getattr(Attacks.on(device, quick=quick, steps=steps), name)(compiled=compiled)
    return built


def measured(compared: Comparison, mode: str, device: torch.device, *, rounds: int) -> list[Record]:
    """Time, ratio to ours and peak memory of every provider of a `checked` comparison."""
    for call in compared.calls.values():
        call()
    times = milliseconds_of(compared.calls, device, rounds=rounds)
    packages = ("torchattacks", "cospgd", "torchmetrics", "transformers")
    where = Where(compared.case, torch.float32, device, packages)
    records = []
    for provider, call in compared.calls.items():
        records += where.time_and_memory(compared.operation, provider, mode, times[provider], call)
        by_ours = times[provider], times["segadv"]
        name = f"{compared.operation}, time by segadv's"
        records.append(where.record(name, provider, mode, by_ours, unit="x", statistic=ratio))
    return records


def ratio(theirs: Samples, ours: Samples) -> Samples:
    """Of the medians over the last axis."""
    return median(theirs) / median(ours)


def report(compared: Comparison, mode: str, records: Sequence[Record]) -> str:
    lines = [f"\n{compared.operation}{mode and ', ' + mode}: {compared.case}"]
    for provider in compared.calls:
        time, memory, by_ours = (record for record in records if record.provider == provider)
        lines.append(f"  {provider:18s}{shown(time):>30s}{shown(by_ours, 2):>28s}   peak {memory.p50:8.1f} MB")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--steps", type=int, default=3, help="of the iterative attacks")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--write", metavar="CSV", nargs="?", const="", help="adds the rows to a file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds: its figures mean nothing")
    options = parser.parse_args(arguments)
    require_native_core(options.device)
    path = destination("peers", options.write, options.device, quick=options.quick)
    missing: list[str] = []
    differing: list[str] = []
    for name in options.only:
        compared = comparison(
            name, options.device, quick=options.quick, steps=options.steps, compiled=not options.no_compile
        )
        missing += compared.missing
        if compared.calls:
            compared = compared.checked()
        differing += compared.differing
        if not compared.calls:
            continue
        mode = f"{options.steps} steps" if name in ("pgd", "segpgd", "cospgd") else ""
        records = measured(compared, mode, options.device, rounds=3 if options.quick else options.rounds)
        print(report(compared, mode, records), flush=True)
        if path is not None:
            write_records(path, records)
    for line in dict.fromkeys(missing + differing):
        print(f"\n{line}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
