"""What adversarial training costs: `python -m benchmarks.overhead [--models ...] [--write]`.

The time of whole training steps, with the data in memory and the images to be attacked in front, where segadv's
trainer has them, of every arm and in three ways of writing them:

* conventional: eager PyTorch as in public trainers. Logits are resampled to the labels' size, the loss is
  `F.cross_entropy`, the margin is gather and scatter; the attack calls `.backward()`, which computes the weights'
  gradients too and throws them away (`zero_grad`), and takes the whole batch, of which the chosen images are kept.
  A trainer that splits its batch before the attack saves that last part at p = 0.5; p = 1 is the same for both.
* efficient eager: the same losses and steps; the attack takes the chosen images only and `torch.autograd.grad` with
  respect to them only.
* segadv: the package's attacks and its cross-entropy.

All three attack in eval mode, so that their adversarial images can be compared, and they are compared, with the
losses and the weights' gradients, before anything is timed. The learning rate is 0: the optimiser does its work, and
every step sees the same weights.

Steps of all arms and columns follow one another in every round, in an order drawn anew for every round, so that a
drift of the machine hits all alike. An overhead is the ratio of two medians of the same column, less one; its 95 %
interval is a bootstrap over rounds. In rounds of their own, which add nothing to these times, the parts of a step are
timed. Passes are counted in batches, and the cost model is derived from them: forward, input gradient and weight
gradient cost the same.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segadv import functional as F
from segadv.attacks.frozen import model_logits
from segadv.comparison import PAPER_OVERHEAD
from segadv.compat import import_torchvision
from segadv.evaluation import seed_generators
from segadv.models import ModelConfig, build_model
from segadv.training import ARMS as TRAINING_ARMS
from segadv.writing import atomic_write

from .cases import random_regions
from .measure import Samples, check_close, in_rounds, milliseconds_of, peak_memory, synchronize
from .ops import usual_cross_entropy, usual_gain_sum, usual_loss_sum, usual_newton_step, usual_sign_step
from .records import (
    Record,
    Where,
    destination,
    median,
    percent_over,
    read_records,
    require_native_core,
    write_records,
)

CONVENTIONAL, EFFICIENT, OURS = "conventional", "efficient eager", "segadv"
COLUMNS = (CONVENTIONAL, EFFICIENT, OURS)
ARMS = ("fgsm", "random-fgsm", "fast-newton", "bim-3", "pgd-3", "segpgd-3")
SHARES = (0.5, 1.0)
EPS, STEPS = 0.03, 3  # the steps of segadv.training.ARMS; usual_sign_step has the same eps, and alpha = eps / 3
PHASES = ("attack forward", "attack backward", "attack glue", "forward", "loss", "backward", "optimiser")
COST_MODEL = "cost model"

Mark = Callable[[str], None]
Loss = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[[Loss, Tensor, Tensor], tuple[Tensor, Tensor]]


# --- networks -----------------------------------------------------------------------------------------------------


def segformer_b0(num_classes: int) -> nn.Module:
    """Hugging Face's, with random weights; its logits are at a quarter of the size."""
    with suppress(ImportError):
        import_torchvision()  # transformers imports it where it is installed
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SegformerForSemanticSegmentation(SegformerConfig(num_labels=num_classes))


@dataclass(frozen=True)
class Model:
    """A network and the batch it is trained with: (images, height, width)."""

    name: str
    build: Callable[[int], nn.Module]
    classes: int
    cpu: tuple[int, int, int]
    cuda: tuple[int, int, int]
    quick: tuple[int, int, int] = (2, 32, 64)

    def size(self, device: torch.device, *, quick: bool) -> tuple[int, int, int]:
        return self.quick if quick else self.cuda if device.type == "cuda" else self.cpu

    def case(self, device: torch.device, *, quick: bool) -> str:
        images, height, width = self.size(device, quick=quick)
        return f"{self.name}, {images} x 3 x {height} x {width}, {self.classes} classes"


def _built(name: str) -> Callable[[int], nn.Module]:
    return lambda num_classes: build_model(ModelConfig(name=name), num_classes=num_classes, seed=0)


MODELS = {
    model.name: model
    for model in (
        Model("small", _built("small_pspnet"), 19, cpu=(8, 256, 512), cuda=(8, 256, 512)),
        Model("pspnet50", _built("pspnet50"), 19, cpu=(2, 192, 192), cuda=(16, 712, 712)),
        Model("segformer-b0", segformer_b0, 150, cpu=(4, 256, 256), cuda=(16, 512, 512)),
    )
}


# --- a training step, in three columns ----------------------------------------------------------------------------


def usual_segpgd_losses(steps: int) -> list[Loss]:
    """Of every step."""
    return [partial(usual_loss_sum, loss="segpgd", lam=step / (2 * steps)) for step in range(steps)]


def usual_attack(arm: str, gradient: Gradient, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Adversarial images of an arm in eager PyTorch. `gradient` gives a loss and its gradient for given images."""
    if arm == "fast-newton":
        gain, grad = gradient(partial(usual_gain_sum, by_max=True), images, labels)
        return usual_newton_step(images, grad, gain)
    uniform = partial(torch.rand, generator=generator, device=images.device, dtype=images.dtype)
    if arm in ("fgsm", "random-fgsm"):
        size = EPS if arm == "fgsm" else EPS * uniform((len(images), 1, 1, 1))
        _, grad = gradient(usual_cross_entropy, images, labels)
        return (images + size * grad.sign()).clamp(0, 1)
    start = images if arm == "bim-3" else (images + EPS * (2 * uniform(images.shape) - 1)).clamp(0, 1)
    losses: list[Loss] = [usual_cross_entropy] * STEPS
    if arm == "segpgd-3":
        losses = usual_segpgd_losses(STEPS)
    return usual_iterations(losses, gradient, start, images, labels)


def usual_iterations(
    losses: Sequence[Loss], gradient: Gradient, start: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """BIM and its relatives: a step of 0.01 up each of the losses, in the ball of radius 0.03 around the images."""
    x = start
    for loss in losses:
        _, grad = gradient(loss, x, labels)
        x = usual_sign_step(x, grad, images)
    return x


def _unmarked(phase: str) -> None:
    pass


class Training:
    """One network, one batch and one optimiser; `step` is a training step of any column and arm."""

    def __init__(self, model: Model, device: torch.device, *, quick: bool = False) -> None:
        cuda = device.type == "cuda"
        layout = torch.channels_last if cuda else torch.contiguous_format
        count, height, width = model.size(device, quick=quick)
        self.device = device
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.model = model.build(model.classes).to(device, memory_format=layout)  # type: ignore[call-overload]
        random_numbers = torch.Generator().manual_seed(0)
        images = torch.rand(count, 3, height, width, generator=random_numbers)
        labels = random_regions(count, model.classes, (height, width), generator=random_numbers)
        labels[:, : max(1, height // 50)] = 255
        self.images, self.labels = images.to(device, memory_format=layout), labels.to(device)
        self.batches = {share: self.images.clone() for share in SHARES}
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True if cuda else None
        )
        self.generator = torch.Generator(device)
        self.attacks = {arm: TRAINING_ARMS[arm](self.model, EPS, self.generator) for arm in ARMS}
        self.losses = {CONVENTIONAL: usual_cross_entropy, EFFICIENT: usual_cross_entropy, OURS: F.cross_entropy}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """The network's weights are afterwards the same, to the bit."""
        before, self.dtype = self.dtype, torch.float64
        self.model.double()
        try:
            yield
        finally:
            self.model.float()
            self.dtype = before

    def _value(self, loss: Loss, leaf: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return loss(model_logits(self.model(leaf)), labels)

    def _conventional_gradient(self, loss: Loss, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.detach().clone().requires_grad_()
        value = self._value(loss, leaf, labels)
        value.sum().backward()
        assert leaf.grad is not None
        self.model.zero_grad()
        return value.detach(), leaf.grad

    def _efficient_gradient(self, loss: Loss, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        value = self._value(loss, leaf, labels)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def attack(self, column: str, arm: str, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images; the model is in train mode before and after."""
        self.generator.manual_seed(0)
        if column == OURS:
            with self._autocast():
                attack = self.attacks[arm]
                assert attack is not None
                return attack(images, labels)
        gradient = self._conventional_gradient if column == CONVENTIONAL else self._efficient_gradient
        self.model.eval()
        adversarial = usual_attack(arm, gradient, images, labels, self.generator)
        self.model.train()
        return adversarial

    def chosen(self, share: float) -> int:
        """Exactly that share of the batch: its first images."""
        return round(share * len(self.images))

    def with_adversarial(self, column: str, arm: str, share: float) -> Tensor:
        """The batch with the chosen images attacked, as a trainer writes them into it: in place of the clean ones.

        The next step needs the clean ones again: they are kept, and the batch is one of its own for every share.
        """
        chosen, batch = self.chosen(share), self.batches[share]
        attacked = slice(None) if column == CONVENTIONAL else slice(chosen)
        adversarial = self.attack(column, arm, self.images[attacked], self.labels[attacked])
        batch[:chosen].copy_(adversarial[:chosen])
        return batch

    def loss_and_weight_gradients(self, column: str, images: Tensor, mark: Mark = _unmarked) -> Tensor:
        """The training step's loss, detached, on the batch's first images; gradients are in the parameters' .grad."""
        mark("forward")
        seed_generators(self.device, 0)  # for dropout; torch.manual_seed takes a millisecond, which a GPU hides in arms
        with self._autocast():
            logits = model_logits(self.model(images))
            mark("loss")
            loss = self.losses[column](logits, self.labels[: len(images)])
        if mark is not _unmarked:
            logits.register_hook(lambda grad: mark("backward"))
        loss.backward()
        return loss.detach()

    def step(self, column: str, arm: str, share: float, mark: Mark = _unmarked) -> Tensor:
        """A whole training step; its loss. With the arm "basic" nothing is attacked."""
        self.model.train()
        images = self.images
        if arm != "basic":
            mark("attack glue")
            images = self.with_adversarial(column, arm, share)
        loss = self.loss_and_weight_gradients(column, images, mark)
        mark("optimiser")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    @contextmanager
    def observed(self, before: Callable[[Tensor], None], after: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Calls before(images) and after(images, logits) around every forward pass of the network."""
        handles = [
            self.model.register_forward_pre_hook(lambda module, inputs: before(inputs[0])),
            self.model.register_forward_hook(lambda module, inputs, output: after(inputs[0], model_logits(output))),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# --- equal before timed -------------------------------------------------------------------------------------------


def check_same_images(name: str, ours: Tensor, expected: Tensor, clean: Tensor) -> None:
    """RuntimeError where fewer than 99.99 % of the elements agree, to 1e-3 of the image's largest change.

    Not all can: a rounding difference flips the sign of a gradient that is nearly 0.
    """
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        raise RuntimeError(f"{name}: {ours.dtype} {list(ours.shape)}, expected {expected.dtype} {list(expected.shape)}")
    largest = (expected - clean).abs().flatten(1).amax(1).view(-1, *[1] * (clean.dim() - 1))
    agree = ((ours - expected).abs() <= 1e-3 * largest + 1e-6).double().mean().item()
    if not agree >= 0.9999:
        raise RuntimeError(f"{name}: only {agree:.3%} of the adversarial images' elements agree, 99.99 % are needed")


def check(training: Training, arms: Sequence[str], columns: Sequence[str]) -> None:
    """Every column gives the same adversarial images, loss and weight gradients, or RuntimeError.

    Of two images in float64, whatever is timed: the columns round at different places, and after three steps one sign
    in ten is another one in float32 (PSPNet50), one in four in bfloat16.
    """
    training.model.train()
    images, labels = training.images[:2].double(), training.labels[:2]
    with training.in_float64():
        for arm in arms:
            expected = training.attack(EFFICIENT, arm, images, labels)
            for column in columns:
                adversarial = training.attack(column, arm, images, labels)
                check_same_images(f"{arm}, {column} against {EFFICIENT}", adversarial, expected, images)
        results = {}
        for column in {EFFICIENT: None, **dict.fromkeys(columns)}:
            training.optimizer.zero_grad()
            for arm in arms[:1]:
                training.attack(column, arm, images, labels)  # has to leave no gradients behind
            loss = training.loss_and_weight_gradients(column, images)
            gradients = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
            results[column] = loss, torch.cat(gradients)
        for column in columns:
            pairs = zip(("loss", "weight gradients"), results[column], results[EFFICIENT], strict=True)
            for what, ours, expected in pairs:
                check_close(f"{what}, {column} against {EFFICIENT}", ours, expected, tolerance=1e-6)
        training.optimizer.zero_grad()


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is measured. share is 0 for the arm "basic"."""

    column: str
    arm: str
    share: float

    @property
    def mode(self) -> str:
        return self.arm if self.arm == "basic" else f"{self.arm}, p = {self.share:g}"


def steps_of(columns: Sequence[str], arms: Sequence[str], shares: Sequence[float]) -> list[Step]:
    steps = [Step(column, "basic", 0.0) for column in columns]
    return steps + [Step(column, arm, share) for column in columns for arm in arms for share in shares]


class Passes:
    """Passes of one step in batches: forward, gradient of the activations, and of the weights."""

    def __init__(self, training: Training) -> None:
        self.forward = self.backward = self.weights = 0.0
        self._training = training
        self._batches = 0.0  # of the backward pass that is running

    def count(self, step: Step) -> Passes:
        training = self._training
        parameter = next(p for p in training.model.parameters() if p.requires_grad)
        handle = parameter.register_hook(self._weights)
        try:
            with training.observed(self._before, self._after):
                training.step(step.column, step.arm, step.share)
        finally:
            handle.remove()
        return self

    @property
    def cost(self) -> float:
        return self.forward + self.backward + self.weights

    def _before(self, images: Tensor) -> None:
        self.forward += len(images) / len(self._training.images)

    def _after(self, images: Tensor, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self._batches = len(grad) / len(self._training.images)
        self.backward += self._batches

    def _weights(self, grad: Tensor) -> None:
        self.weights += self._batches


class Clock:
    """Marks when the parts of a step begin. On a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def mark(self, phase: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Of every phase, up to the last mark; on a GPU after a synchronisation."""
        total = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in pairwise(self._marks):
            if isinstance(begin, torch.cuda.Event):
                total[phase] += begin.elapsed_time(end)
            else:
                total[phase] += 1e3 * (end - begin)  # type: ignore[operator]
        return total


def phases_of(training: Training, step: Step) -> dict[str, float]:
    """Milliseconds of every phase of one step. What is neither the network's forward nor its backward is glue."""
    clock = Clock(training.device)

    def before(images: Tensor) -> None:
        if images.requires_grad:  # those of an attack
            images.register_hook(lambda grad: clock.mark("attack glue"))
            clock.mark("attack forward")

    def after(images: Tensor, logits: Tensor) -> None:
        if images.requires_grad:
            clock.mark("attack glue")
            logits.register_hook(lambda grad: clock.mark("attack backward"))

    with training.observed(before, after):
        training.step(step.column, step.arm, step.share, clock.mark)
        clock.mark("end")
    synchronize(training.device)
    return clock.milliseconds()


def measured(training: Training, where: Where, steps: Sequence[Step], *, rounds: int) -> Iterator[list[Record]]:
    """All rows of one network, first those of the times of steps; steps begin with the basic ones."""
    for step in steps:
        training.step(step.column, step.arm, step.share)  # warm
    calls = {step: partial(training.step, step.column, step.arm, step.share) for step in steps}
    # A GPU is often there for minutes only, and nothing is kept before the rounds are done.
    seconds = 240 if training.device.type == "cuda" else math.inf
    times = milliseconds_of(calls, training.device, rounds=rounds, seconds=seconds)
    basic = {step.column: times[step] for step in steps if step.arm == "basic"}
    records: list[Record] = []
    for step in steps:
        add = partial(_add, records, where, step)
        add("training step", times[step], unit="ms")
        if step.arm != "basic":
            add("overhead", times[step], basic[step.column], unit="%", statistic=percent_over)
        if CONVENTIONAL in basic and step.column != CONVENTIONAL:
            add("over conventional basic", times[step], basic[CONVENTIONAL], unit="%", statistic=percent_over)
        if step.arm == "fast-newton" and (fgsm := times.get(Step(step.column, "fgsm", step.share))) is not None:
            add(NEWTON_OVER_FGSM, times[step], fgsm, basic[step.column], unit="points", statistic=points_between)
    yield records

    phases = in_rounds(partial(phases_of, training), steps, rounds=max(2, rounds // 2))
    clean_cost = Passes(training).count(steps[0]).cost
    records = []
    for step in steps:
        add = partial(_add, records, where, step)
        parts = {phase: np.array([found[phase] for found in phases[step]]) for phase in PHASES}
        for phase, values in parts.items():
            if values.any():
                add(f"part: {phase}", values, unit="ms")
        attack = sum(parts[phase] for phase in PHASES[:3])
        if step.arm != "basic":
            add(GLUE_SHARE, 100 * parts["attack glue"] / attack, unit="%")
        add(LOSS_SHARE, 100 * parts["loss"] / sum(parts.values()), unit="%")
        passes = Passes(training).count(step)
        for name in ("forward", "backward", "weights"):
            add(f"passes: {name}", np.array([getattr(passes, name)]), unit="batches")
        if step.arm != "basic":
            add(COST_MODEL, np.array([100 * (passes.cost / clean_cost - 1)]), unit="%")
        add("peak memory", np.array([peak_memory(calls[step], training.device) / 1e6]), unit="MB")
    yield records


def _add(
    records: list[Record],
    where: Where,
    step: Step,
    operation: str,
    *samples: Samples,
    unit: str,
    statistic: Callable[..., Samples] = median,
) -> None:
    records.append(where.record(operation, step.column, step.mode, samples, unit=unit, statistic=statistic))


NEWTON_OVER_FGSM = "overhead beyond that of fgsm"
GLUE_SHARE = "glue in the attack"
LOSS_SHARE = "loss in the step"


def points_between(ours: Samples, theirs: Samples, basic: Samples) -> Samples:
    """Difference of two overheads, in percentage points."""
    return percent_over(ours, basic) - percent_over(theirs, basic)


# --- what is shown ------------------------------------------------------------------------------------------------


class Table:
    """Rows of one network by what they measure."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {(record.operation, record.provider, record.mode): record for record in records}

    def get(self, operation: str, column: str, mode: str) -> Record | None:
        return self.records.get((operation, column, mode))

    def modes(self) -> list[str]:
        """Of the arms, not of basic, in the order of ARMS, the lower share first."""
        found = {mode for _, _, mode in self.records if mode != "basic"}
        return sorted(found, key=lambda mode: (mode.partition(" p = ")[2], ARMS.index(mode.partition(",")[0])))

    def columns(self) -> list[str]:
        return [column for column in COLUMNS if self.get("training step", column, "basic")]


def shown(record: Record | None, digits: int = 1) -> str:
    """Value and interval."""
    if record is None:
        return "-"
    if record.rounds < 2:
        return f"{record.p50:.{digits}f} {record.unit}"
    return f"{record.p50:.{digits}f} [{record.low:.{digits}f}, {record.high:.{digits}f}] {record.unit}"


def paper_values(case: str, mode: str) -> dict[str, float]:
    """The paper's two columns, for its network and p = 0.5."""
    arm, _, share = mode.partition(", p = ")
    sources = PAPER_OVERHEAD.items() if share == "0.5" and case.startswith("pspnet50,") else ()
    return {source: values[arm] for source, values in sources if source.startswith("paper") and arm in values}


def report(case: str, records: Sequence[Record]) -> str:
    """The tables of one network."""
    table = Table(records)
    columns = table.columns()
    width = 30
    lines = [f"\n{case}", f"{'step of basic training':24s}"]
    for column in columns:
        lines[-1] += f"{shown(table.get('training step', column, 'basic')):>{width}s}"
    lines += ["", f"{'additional time':24s}" + "".join(f"{column:>{width}s}" for column in columns)]
    lines[-1] += f"{COST_MODEL:>12s}{'paper, Cityscapes, VOC':>26s}"
    for mode in table.modes():
        line = f"{mode:24s}" + "".join(f"{shown(table.get('overhead', column, mode)):>{width}s}" for column in columns)
        model = table.get(COST_MODEL, columns[-1], mode)
        line += f"{'' if model is None else f'{model.p50:.1f} %':>12s}"
        lines.append(line + f"{', '.join(f'{value:.2f} %' for value in paper_values(case, mode).values()):>26s}")
    lines += ["", f"{'over conventional basic':24s}" + "".join(f"{column:>{width}s}" for column in columns)]
    for mode in ("basic", *table.modes()):
        records_of = [
            table.get("overhead" if column == CONVENTIONAL else "over conventional basic", column, mode)
            for column in columns
        ]
        lines.append(f"{mode:24s}" + "".join(f"{shown(record):>{width}s}" for record in records_of))
    if newton := [mode for mode in table.modes() if table.get(NEWTON_OVER_FGSM, columns[-1], mode)]:
        lines += ["", f"{'fast-newton less fgsm':24s}" + "".join(f"{column:>{width}s}" for column in columns)]
        for mode in newton:
            found = "".join(f"{shown(table.get(NEWTON_OVER_FGSM, column, mode)):>{width}s}" for column in columns)
            lines.append(f"{mode.partition(', ')[2]:24s}{found}")
    for column in columns:
        titles = [*PHASES, GLUE_SHARE, LOSS_SHARE, "peak memory"]
        lines += ["", f"{column}: parts of a step in ms, passes in batches (forward, backward, weights)"]
        lines.append(f"{'':24s}" + "".join(f"{title:>20s}" for title in titles) + f"{'passes':>20s}")
        for mode in ("basic", *table.modes()):
            cells = []
            for title in titles:
                found = table.get(f"part: {title}" if title in PHASES else title, column, mode)
                cells.append(
                    "-" if found is None else f"{found.p50:.1f}{'' if found.unit == 'ms' else ' ' + found.unit}"
                )
            passes = [table.get(f"passes: {name}", column, mode) for name in ("forward", "backward", "weights")]
            counted = ", ".join("-" if found is None else f"{found.p50:g}" for found in passes)
            lines.append(f"{mode:24s}" + "".join(f"{cell:>20s}" for cell in cells) + f"{counted:>20s}")
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Overheads with their intervals: a row of panels for every network, a panel for every share."""
    from matplotlib.figure import Figure

    ours = {record.case for record in records if record.operation == "training step"}
    records = [record for record in records if record.case in ours]  # a file may hold rows of other benchmarks too
    cases: dict[str, list[Record]] = {}
    for record in [record for record in records if record.thp == 0] or records:
        cases.setdefault(record.case, []).append(record)
    tables = {case: Table(of_case) for case, of_case in cases.items()}
    shares = sorted({mode.partition(" p = ")[2] for table in tables.values() for mode in table.modes()})
    colors = dict(zip(COLUMNS, ("#999999", "#56B4E9", "#D55E00"), strict=True))
    figure = Figure(figsize=(6.5 * len(shares), 0.6 + 3.8 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), len(shares), squeeze=False)
    handles: dict[str, object] = {}
    for (case, table), row in zip(tables.items(), panels, strict=True):
        for share, axes in zip(shares, row, strict=True):
            modes = [mode for mode in table.modes() if mode.endswith(f"p = {share}")]
            for place, column in enumerate(table.columns()):
                for x, mode in enumerate(modes):
                    found, model = table.get("overhead", column, mode), table.get(COST_MODEL, column, mode)
                    if found is None or model is None:
                        continue
                    at = x + 0.27 * (place - 1)
                    spread = [[max(found.p50 - found.low, 0)], [max(found.high - found.p50, 0)]]
                    handles[column] = axes.bar(at, found.p50, width=0.25, color=colors[column])
                    axes.errorbar(at, found.p50, spread, color="#333333", capsize=3, lw=1.2)
                    (line,) = axes.plot([at - 0.13, at + 0.13], [model.p50] * 2, color="k", lw=1.6, ls=(0, (2, 1)))
                    handles["counted passes (cost model)"] = line
            for x, mode in enumerate(modes):
                for (source, value), marker in zip(paper_values(case, mode).items(), "oD", strict=False):
                    handles[source] = axes.scatter(
                        x + 0.46,
                        value,
                        marker=marker,
                        s=45,
                        facecolors="w",
                        edgecolors="#0072B2",
                        linewidths=1.6,
                        zorder=3,
                    )
            axes.set_xticks(range(len(modes)), [mode.partition(",")[0] for mode in modes], rotation=20)
            axes.set_title(f"{case}\np = {share}", fontsize=10)
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("additional time of a step in %")
    handles = {name: handles[name] for name in sorted(handles, key=lambda name: name not in COLUMNS)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


# --- command line -------------------------------------------------------------------------------------------------


def measure(model: Model, path: Path | None, options: argparse.Namespace) -> None:
    """One network, from its weights to its report."""
    device = options.device
    training = Training(model, device, quick=options.quick)
    where = Where(model.case(device, quick=options.quick), training.dtype, device, ("timm", "transformers"))
    torch.backends.cudnn.benchmark = False  # the check runs everything once, and in float64
    check(training, options.arms, options.columns)
    torch.backends.cudnn.benchmark = True
    steps = steps_of(options.columns, options.arms, options.shares)
    records = []
    for found in measured(training, where, steps, rounds=3 if options.quick else options.rounds):
        records += found
        if path is not None:  # at once: what comes after may be cut off
            write_records(path, found)
    print(report(where.case, records), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=list(SHARES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--write", metavar="CSV", nargs="?", const="", help="adds the rows to a file, and draws it beside it as a PNG"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds: its figures mean nothing")
    options = parser.parse_args(arguments)
    require_native_core(options.device)
    device = options.device
    path = destination("overhead", options.write, device, quick=options.quick)
    failed = []
    for name in options.models:
        try:
            measure(MODELS[name], path, options)
        # Told, and the exit status is 1; the next network may fit into the memory, or do without a package.
        except Exception:
            failed.append(name)
            traceback.print_exc()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if path is not None and path.exists():
        print(f"\nin {path}")
        try:
            plot(read_records(path), path.with_suffix(".png"))
        except ImportError as error:
            print(f"no picture of them: {error}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
