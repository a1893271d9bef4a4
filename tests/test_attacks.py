"""The attacks against plain implementations of their own, and every guarantee over all of them."""

from __future__ import annotations

import copy
import datetime
import gc
import json
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import segadv
from segadv import functional
from segadv.attacks import (
    BIM,
    FGSM,
    NFGSM,
    PGD,
    Attack,
    AttackInfo,
    CheckpointFGSM,
    CosPGD,
    FastNewton,
    RandomFGSM,
    SegPGD,
    fast_newton_step,
)
from segadv.attacks.frozen import frozen, model_logits, unwrapped
from segadv.evaluation import evaluate

CLASSES = 4
IGNORE = 255
EPS = 0.03

# name: (class, arguments, forward passes, backward passes)
BUDGET = {"eps": EPS, "alpha": 0.012, "steps": 3}
ATTACKS: dict[str, tuple[type[Attack], dict[str, Any], int, int]] = {
    "fgsm": (FGSM, {"eps": EPS}, 1, 1),
    "random-fgsm": (RandomFGSM, {"eps": EPS}, 1, 1),
    "n-fgsm": (NFGSM, {"eps": EPS}, 1, 1),
    "checkpoint-fgsm": (CheckpointFGSM, {"eps": EPS}, 3, 1),
    "bim": (BIM, BUDGET, 3, 3),
    "bim-best": (BIM, {**BUDGET, "best": True}, 4, 3),
    "bim-targeted": (BIM, {**BUDGET, "targeted": True}, 3, 3),
    "bim-balanced": (BIM, {**BUDGET, "balanced": True, "best": True}, 4, 3),
    "pgd": (PGD, BUDGET, 3, 3),
    "pgd-restarts": (PGD, {**BUDGET, "restarts": 2}, 8, 6),
    "segpgd": (SegPGD, BUDGET, 3, 3),
    "cospgd": (CosPGD, BUDGET, 3, 3),
    "fast-newton": (FastNewton, {}, 1, 1),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


def make(name: str, model: nn.Module, **options: Any) -> Attack:
    kind, arguments, _, _ = ATTACKS[name]
    return kind(model, **{**arguments, **options})


def run(name: str, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The attack with the same random numbers in every call."""
    torch.manual_seed(7)
    return make(name, model, **options)(images, labels)


class Net(nn.Module):
    """Small logits, batch norm with random statistics, dropout; in train mode, float64."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(8, CLASSES, 3, stride=2, padding=1)
        self.to(dtype)
        with torch.no_grad():
            for value in (*self.parameters(), self.bn.running_mean):
                value.copy_(0.4 * torch.randn(value.shape, dtype=dtype))
            self.bn.running_var.copy_(0.5 + torch.rand(8, dtype=dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv2(self.dropout(torch.tanh(self.bn(self.conv1(images)))))


def sample(
    count: int = 3, size: tuple[int, int] = (9, 11), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Images that touch both ends of the box, labels with ignored pixels."""
    images = torch.rand(count, 3, *size, dtype=dtype).mul(1.04).sub(0.02).clamp(0, 1)
    labels = torch.randint(0, CLASSES, (count, *size))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    return images, labels


# --- plain implementations ----------------------------------------------------------------------------------


def plain_gain(logits: Tensor, labels: Tensor, *, align_corners: bool = False) -> Tensor:
    """[N] averaged gain, differentiable."""
    if logits.dim() == 4:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    valid = labels != IGNORE
    onehot = F.one_hot(labels.where(valid, 0), logits.shape[1]).movedim(-1, 1).bool()
    others = logits.masked_fill(onehot, -torch.inf).amax(1)
    margin = (logits.masked_fill(~onehot, 0).sum(1) - others).where(valid, 0)
    return margin.flatten(1).sum(1) / valid.flatten(1).sum(1) if labels.dim() > 1 else margin


def plain_loss(
    logits: Tensor, labels: Tensor, kind: str, step: int, steps: int, targeted: bool, balanced: bool = False
) -> Tensor:
    z = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    entropy = F.cross_entropy(z, labels, ignore_index=IGNORE, reduction="none")
    if kind == "segpgd":
        lam = step / (2 * steps)
        entropy = entropy * torch.where((z.argmax(1) == labels) ^ targeted, 1 - lam, lam)
    if kind == "cospgd":
        onehot = F.one_hot(labels.where(labels != IGNORE, 0), CLASSES).movedim(-1, 1).to(z.dtype)
        cosine = F.cosine_similarity(z.detach().softmax(1), onehot, dim=1)
        entropy = entropy * (1 - cosine if targeted else cosine)
    if balanced:
        return torch.stack(
            [
                torch.stack([values[own == label].mean() for label in own.unique() if label != IGNORE]).mean()
                for values, own in zip(entropy, labels, strict=True)
            ]
        )
    return entropy.sum((1, 2)) / (labels != IGNORE).sum((1, 2))


def plain_iterates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    kind: str = "cross_entropy",
    start: Tensor | None = None,
    eps: float,
    alpha: float,
    steps: int,
    targeted: bool = False,
    balanced: bool = False,
) -> list[Tensor]:
    model = copy.deepcopy(model).eval()
    x, iterates = (images if start is None else start), []
    for step in range(steps):
        x = x.detach().requires_grad_()
        loss = plain_loss(model(x), labels, kind, step, steps, targeted, balanced).sum()
        direction = torch.autograd.grad(loss, x)[0].sign() * (-1 if targeted else 1)
        x = (x + alpha * direction).clamp(images - eps, images + eps).clamp(0, 1).detach()
        iterates.append(x)
    return iterates


def plain_hits(model: nn.Module, x: Tensor, labels: Tensor, *, balanced: bool = False) -> Tensor:
    with torch.no_grad():
        z = F.interpolate(copy.deepcopy(model).eval()(x), labels.shape[1:], mode="bilinear")
    hits = (z.argmax(1) == labels) & (labels != IGNORE)
    if balanced:
        shares = [
            [right[own == label].double().mean() for label in own.unique() if label != IGNORE]
            for right, own in zip(hits, labels, strict=True)
        ]
        return torch.stack([torch.stack(of_image).mean() for of_image in shares])
    return hits.sum((1, 2))


def plain_start(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(images.shape, generator=generator, dtype=images.dtype) - 1
    return (images + EPS * noise).clamp(0, 1)


# --- what the attacks compute -------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_equals_the_plain_one(targeted: bool, balanced: bool) -> None:
    model, (images, labels) = Net(), sample()
    options: dict[str, Any] = {"targeted": targeted, "balanced": balanced}
    [expected] = plain_iterates(model, images, labels, eps=EPS, alpha=EPS, steps=1, **options)
    adversarial, info = FGSM(model, eps=EPS, **options)(images, labels, return_info=True)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-9)
    expected_loss = plain_loss(copy.deepcopy(model).eval()(images), labels, "cross_entropy", 0, 1, False, balanced)
    torch.testing.assert_close(info.loss, expected_loss.detach())
    torch.testing.assert_close(info.eps, torch.full((3,), EPS, dtype=torch.float64))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", [BIM, PGD, SegPGD, CosPGD])
def test_iterative_attacks_equal_the_plain_ones(kind: type[BIM], targeted: bool, balanced: bool) -> None:
    model, (images, labels) = Net(), sample()
    options: dict[str, Any] = {"eps": EPS, "alpha": 0.01, "steps": 5, "targeted": targeted, "balanced": balanced}
    start, random = None, {}
    if issubclass(kind, PGD):
        start = plain_start(images, torch.Generator().manual_seed(3))
        random = {"generator": torch.Generator().manual_seed(3)}
    *_, last, expected = plain_iterates(model, images, labels, kind=kind.loss, start=start, **options)
    adversarial, info = kind(model, **options, **random)(images, labels, return_info=True)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-9)
    with torch.no_grad():  # where the last gradient was taken
        loss = plain_loss(copy.deepcopy(model).eval()(last), labels, kind.loss, 4, 5, targeted, balanced)
    torch.testing.assert_close(info.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(info.eps, torch.full((3,), EPS, dtype=torch.float64))


def test_the_weight_of_a_rare_class_does_not_overflow_float16() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images).half()

    model, images, labels = Half(), torch.rand(1, 3, 600, 600), torch.zeros(1, 600, 600, dtype=torch.int64)
    labels[0, 300, 300] = 1  # its weight is 180000
    adversarial = FGSM(model, eps=EPS, balanced=True)(images, labels)
    expected = FGSM(model.conv, eps=EPS, balanced=True)(images, labels)
    torch.testing.assert_close(adversarial, expected)
    assert (adversarial != images).all(1)[0, 300, 300]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_best_takes_each_image_from_its_best_iterate(targeted: bool, balanced: bool) -> None:
    model, (images, labels) = Net(), sample(12)
    # Steps too large for the ball, so that the last iterate is often not the best one.
    options: dict[str, Any] = {"eps": 0.1, "alpha": 0.1, "steps": 6, "targeted": targeted, "balanced": balanced}
    iterates = torch.stack(plain_iterates(model, images, labels, **options))
    first_best = {}
    for judged_balanced in (False, True):
        hits = torch.stack([plain_hits(model, x, labels, balanced=judged_balanced) for x in iterates])
        score = (hits if targeted else -hits).double().round(decimals=9)
        first_best[judged_balanced] = torch.stack([(column == column.max()).nonzero()[0, 0] for column in score.T])
    chosen = first_best[balanced]
    assert len(set(chosen.tolist())) > 2
    assert not balanced or not torch.equal(chosen, first_best[False])
    adversarial = BIM(model, **options, best=True)(images, labels)
    torch.testing.assert_close(adversarial, iterates[chosen, torch.arange(12)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("shape", [(), (5, 4)], ids=["classification", "resampled"])
def test_more_classes_than_pixels_are_judged_without_matrices(
    shape: tuple[int, ...], targeted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand classes they would take most of the memory."""
    classes, pool = 30, nn.AdaptiveAvgPool2d(1 if not shape else 2)
    model = nn.Sequential(nn.Conv2d(3, classes, 3, padding=1), pool, *[nn.Flatten()] * (not shape)).double()
    images, labels = torch.rand(40, 3, 5, 4, dtype=torch.float64), torch.randint(0, classes, (40, *shape))
    with torch.no_grad():
        labels[:20] = (
            functional.argmax_labels(model(images[:20]), shape).long() if shape else model(images[:20]).argmax(1)
        )
    labels[::7] = IGNORE
    options: dict[str, Any] = {"eps": 0.4, "alpha": 0.1, "steps": 4, "restarts": 2, "best": True, "targeted": targeted}
    runs = [PGD(model, **options, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    expected = runs[0].outcomes(images, labels, [4])[0].diagonal(dim1=1, dim2=2).sum(1)
    assert expected.sum() not in (0, (labels != IGNORE).sum())
    monkeypatch.delattr(functional, "confusion_matrix")
    adversarial = runs[1](images, labels)
    monkeypatch.undo()
    matrices = functional.confusion_matrix(model(adversarial), labels, per_image=True)
    assert torch.equal(matrices.diagonal(dim1=1, dim2=2).sum(1), expected)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_the_score_is_the_same_with_matrices_and_without(align_corners: bool, targeted: bool) -> None:
    logits = torch.randn(6, 30, 3, 2, dtype=torch.float64)
    prediction = functional.argmax_labels(logits, (13, 11), align_corners=align_corners).long()
    labels = prediction.where(torch.rand(prediction.shape) < 0.5, torch.randint(0, 30, prediction.shape))
    ignored = int(prediction.flatten().mode().values)  # a class, predicted at pixels that do not count
    attack = BIM(nn.Identity(), best=True, ignore_index=ignored, align_corners=align_corners, targeted=targeted)
    judged = [attack._judged(logits, logits, labels, None, matrices=matrices) for matrices in (True, False)]
    assert torch.equal(judged[0].score, judged[1].score)
    right = ((prediction == labels) & (labels != ignored)).sum((1, 2))
    assert torch.equal(judged[0].score, right if targeted else (labels != ignored).sum((1, 2)) - right)


def test_the_first_of_many_classes_is_judged_as_the_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 30, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    turned = copy.deepcopy(model)
    with torch.no_grad():
        model[0].bias[0] += 1
        for ours, theirs in zip(turned.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs.flip(0))
    images, labels = torch.rand(20, 3, 5, 4, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    results = [
        BIM(net, eps=0.4, alpha=0.1, steps=4, best=True)(images, y)
        for net, y in ((model, labels), (turned, labels + 29))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("classes", [200, 256, 300])
def test_labels_of_any_type_are_judged_alike(classes: int) -> None:
    """PyTorch compares a uint8 label with 256 as with 0, and with -100 as with 156."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    images = torch.rand(256, 3, 2, 2, dtype=torch.float64)
    labels = model(images)[:, :256].argmax(1)
    ignore_index = 255 if classes > 200 else int(labels.mode().values) - 256
    options: dict[str, Any] = {"eps": 0.05, "alpha": 0.02, "steps": 1, "restarts": 5, "ignore_index": ignore_index}
    results = [
        PGD(model, **options, best=True, generator=torch.Generator().manual_seed(1))(images, labels.to(dtype))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("best", [False, True])
def test_restarts_keep_each_images_best_run(best: bool) -> None:
    model, (images, labels) = Net(), sample(8)
    options: dict[str, Any] = {"eps": EPS, "alpha": 0.012, "steps": 3}
    runs, generator = [], torch.Generator().manual_seed(1)
    for _ in range(4):
        iterates = plain_iterates(model, images, labels, start=plain_start(images, generator), **options)
        runs += iterates if best else iterates[-1:]
    hits = torch.stack([plain_hits(model, x, labels) for x in runs])
    chosen = torch.stack([(column == column.min()).nonzero()[0, 0] for column in hits.T])
    assert len(set(chosen.tolist())) > 1
    generator = torch.Generator().manual_seed(1)
    adversarial = PGD(model, **options, restarts=4, best=best, generator=generator)(images, labels)
    torch.testing.assert_close(adversarial, torch.stack(runs)[chosen, torch.arange(8)], rtol=0, atol=1e-9)


def test_random_start_is_uniform_in_the_ball_and_clipped_to_the_box() -> None:
    model, (images, labels) = Net(), sample(4, (24, 24))
    attack = PGD(model, eps=0.1, alpha=0.1, steps=1)
    torch.manual_seed(5)
    start = attack._start(images, labels)
    torch.manual_seed(5)
    assert torch.equal(start, attack._start(images, labels))
    assert not torch.equal(start, attack._start(images, labels))
    assert start.min() == 0
    assert start.max() == 1
    noise = (start - images)[(images > 0.1) & (images < 0.9)].sort().values
    uniform = torch.linspace(-0.1, 0.1, len(noise), dtype=noise.dtype)
    assert (noise - uniform).abs().max() < 0.01
    assert (start - images).abs().max() <= 0.1
    assert PGD(model, random_start=False)._start(images, labels) is images


def test_random_fgsm_draws_an_eps_for_each_image() -> None:
    model = nn.Conv2d(3, CLASSES, 1).double()
    images = torch.full((2000, 3, 1, 1), 0.5, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (2000, 1, 1))
    generator = torch.Generator().manual_seed(1)
    adversarial, info = RandomFGSM(model, eps=0.2, generator=generator)(images, labels, return_info=True)
    torch.testing.assert_close((adversarial - images).abs().amax((1, 2, 3)), info.eps)
    assert (info.eps.sort().values - torch.linspace(0, 0.2, 2000, dtype=torch.float64)).abs().max() < 0.01
    again = RandomFGSM(model, eps=0.2, generator=generator.manual_seed(1))(images, labels)
    assert torch.equal(adversarial, again)
    assert not torch.equal(adversarial, RandomFGSM(model, eps=0.2, generator=generator)(images, labels))
    torch.manual_seed(1)
    assert torch.equal(adversarial, RandomFGSM(model, eps=0.2)(images, labels))


@pytest.mark.parametrize("name", ["random-fgsm", "n-fgsm", "pgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_are_of_the_images_dtype_not_of_the_default_one(name: str, dtype: torch.dtype) -> None:
    model, (images, labels) = Net(dtype=dtype), sample(dtype=dtype)
    results = []
    try:
        for default in (torch.float32, torch.float64):
            torch.set_default_dtype(default)
            torch.manual_seed(7)
            results.append(make(name, model)(images, labels, return_info=True))
    finally:
        torch.set_default_dtype(torch.float32)
    (first, one), (second, other) = results
    assert torch.equal(first, second)
    assert one.eps.dtype is other.eps.dtype is dtype
    assert torch.equal(one.eps, other.eps)


def test_n_fgsm_equals_the_plain_one() -> None:
    model, (images, labels) = Net(), sample()
    adversarial, info = NFGSM(model, eps=EPS, generator=torch.Generator().manual_seed(5))(
        images, labels, return_info=True
    )
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(5), dtype=images.dtype) - 1
    x = (images + 2 * EPS * noise).clamp(0, 1).requires_grad_()
    loss = plain_loss(copy.deepcopy(model).eval()(x), labels, "cross_entropy", 0, 1, False)
    expected = (x + EPS * torch.autograd.grad(loss.sum(), x)[0].sign()).clamp(0, 1).detach()
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-9)
    assert (adversarial - images).abs().max() > 2 * EPS  # not projected
    torch.testing.assert_close(info.loss, loss.detach(), rtol=1e-9, atol=0)
    assert torch.equal(NFGSM(model, eps=EPS, noise=0)(images, labels), FGSM(model, eps=EPS)(images, labels))


def test_checkpoint_fgsm_takes_the_smallest_part_of_the_step_that_fools() -> None:
    model, (images, labels) = Net(), sample(60)
    model.eval()
    full = 0.06
    with torch.no_grad():
        prediction = F.interpolate(model(images), labels.shape[1:], mode="bilinear").argmax(1)
    share = torch.linspace(0.2, 1.0, 60).view(-1, 1, 1)  # of labels that the model gets right
    labels = torch.where((torch.rand(labels.shape) < share) & (labels != IGNORE), prediction, labels)
    x = images.clone().requires_grad_()
    loss = plain_loss(model(x), labels, "cross_entropy", 0, 1, False).sum()
    direction = torch.autograd.grad(loss, x)[0].sign()
    expected, chosen = [], []
    for i in range(len(images)):
        for k in (1, 2, 3, 4):
            candidate = (images[i] + k / 4 * full * direction[i]).clamp(0, 1)
            with torch.no_grad():
                fooled = plain_gain(model(candidate[None]), labels[i : i + 1])[0] < 0
            if fooled:
                break
        expected.append(candidate)
        chosen.append(k / 4 * full)
    assert len(set(chosen)) == 4, "not every part is the smallest for some image"
    adversarial, info = CheckpointFGSM(model, eps=full, checkpoints=4)(images, labels, return_info=True)
    torch.testing.assert_close(adversarial, torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(info.eps, torch.tensor(chosen, dtype=torch.float64))
    expected_loss = plain_loss(model(images), labels, "cross_entropy", 0, 1, False)
    torch.testing.assert_close(info.loss, expected_loss.detach())


def test_a_gain_of_zero_does_not_count_as_fooled() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    images, labels = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    attack = CheckpointFGSM(model, eps=1.0, checkpoints=2, bounds=(-1, 1))  # the first part leads to equal logits
    adversarial, info = attack(images, labels, return_info=True)
    assert (adversarial.item(), info.eps.item()) == (-0.5, 1.0)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("kind", [BIM, PGD, SegPGD, CosPGD])
def test_outcomes_of_one_run_are_those_of_shorter_ones(kind: type[BIM], best: bool) -> None:
    model, (images, labels) = Net(), sample(6)
    labels[labels != IGNORE] = 1  # which nothing but the attack takes away
    budget: dict[str, Any] = {"eps": 0.2, "alpha": 0.07, "best": best}
    judged = [3, 5, 6, 8]
    outcomes = run_with_seed(kind(model, steps=8, **budget).outcomes, images, labels, judged)
    assert outcomes.shape == (4, 6, CLASSES, CLASSES)
    for steps, outcome in zip(judged, outcomes, strict=True):
        if kind is SegPGD and steps < 8:
            continue  # lambda belongs to the long run
        adversarial = run_with_seed(kind(model, steps=steps, **budget), images, labels)
        for i in range(6):
            assert torch.equal(outcome[i], plain_confusion(model, adversarial[i : i + 1], labels[i : i + 1]))
    assert not torch.equal(outcomes[0], outcomes[-1])


def run_with_seed(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.manual_seed(7)
    return function(*arguments)


def plain_confusion(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.interpolate(copy.deepcopy(model).eval()(x), labels.shape[1:], mode="bilinear")
    valid = labels != IGNORE
    cells = labels[valid] * CLASSES + z.argmax(1)[valid]
    return torch.bincount(cells, minlength=CLASSES**2).view(CLASSES, CLASSES)


def test_outcomes_with_restarts_judge_each_images_best_run() -> None:
    model, (images, labels) = Net(), sample()
    attack = PGD(model, eps=EPS, alpha=0.012, steps=3, restarts=3)
    outcomes = run_with_seed(attack.outcomes, images, labels, [1, 3])
    adversarial = run_with_seed(attack, images, labels)
    assert all(
        torch.equal(outcomes[1, i], plain_confusion(model, adversarial[i : i + 1], labels[i : i + 1])) for i in range(3)
    )
    attack.steps = 8
    both = run_with_seed(attack.outcomes, images, labels, [1, 8])
    assert torch.equal(run_with_seed(attack.outcomes, images, labels, [1]), both[:1])
    assert not torch.equal(both[0], both[1])


def test_judging_costs_a_pass_at_the_last_step_alone() -> None:
    model, (images, labels) = Net(), sample()
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    for steps, expected in (([1, 2], 3), ([3], 4), ([1, 3], 4)):
        passes.clear()
        BIM(model, eps=0.01, steps=3).outcomes(images, labels, steps)
        assert len(passes) == expected


def test_noise_given_is_the_random_start() -> None:
    model, (images, labels) = Net(), sample()
    attack = PGD(model, eps=EPS, alpha=0.02, steps=2, generator=torch.Generator().manual_seed(3))
    drawn = attack.outcomes(images, labels, [2])
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(3), dtype=images.dtype) - 1
    assert torch.equal(attack.outcomes(images, labels, [2], noise=noise), drawn)
    for other in (BIM(model, steps=1, eps=0.0), PGD(model, restarts=2), PGD(model, random_start=False)):
        with pytest.raises(ValueError, match="noise must be None"):
            other.outcomes(images, labels, [1], noise=noise)
    for other in (noise[0], noise[:, :1], noise[..., :1]):
        with pytest.raises(ValueError, match=r"noise must be \[.*\] as the images, got \["):
            attack.outcomes(images, labels, [2], noise=other)
    with pytest.raises(ValueError, match=r"noise must be of the images' dtype and device, .*, got torch\.int64 on cpu"):
        attack.outcomes(images, labels, [2], noise=noise.long())
    with pytest.raises(TypeError, match="noise must be a tensor, got a list"):
        attack.outcomes(images, labels, [2], noise=noise.tolist())
    attack.generator.manual_seed(3)
    assert torch.equal(attack.outcomes(images, labels, np.array([2])), drawn)
    with pytest.raises(TypeError, match="float"):
        attack.outcomes(images, labels, [2.0])
    for steps in ([], [0], [3], [1, 3], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match=r"steps must be increasing numbers out of 1 \.\.\. 2, got "):
            attack.outcomes(images, labels, steps)


def test_input_gradient_serves_many_eps() -> None:
    model, (images, labels) = Net(), sample()
    for targeted in (False, True):
        gradient = FGSM(model, targeted=targeted).input_gradient(images, labels)
        for eps in (0.0, 0.01, 0.04):
            expected = FGSM(model, eps=eps, targeted=targeted)(images, labels)
            assert torch.equal(functional.sign_step(images, gradient, eps), expected)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "segpgd"])
def test_eps_and_alpha_per_image(name: str) -> None:
    model, (images, labels) = Net(), sample()
    sizes = torch.tensor([0.01, 0.0, 0.04], dtype=torch.float64)
    tensors = {"eps": sizes} if name == "fgsm" else {"eps": sizes, "alpha": sizes / 2}
    together, info = make(name, model, **tensors, **_no_noise(name))(images, labels, return_info=True)
    assert torch.equal(info.eps, sizes)
    for i, eps in enumerate(sizes.tolist()):
        numbers = {"eps": eps} if name == "fgsm" else {"eps": eps, "alpha": eps / 2}
        alone = make(name, model, **numbers, **_no_noise(name))(images[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


class Affine(nn.Module):
    """Logits that are affine in the images; class 2 never comes into play, so the margins are affine too."""

    def __init__(self, *, stride: int = 1, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1 if stride == 1 else 3, stride=stride, dtype=torch.float64)
        self.pooled = pooled
        with torch.no_grad():
            self.conv.bias.copy_(torch.tensor([1.0, 0.0, -1e4]))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.conv(images)
        return logits.mean((2, 3)) if self.pooled else logits


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_one_fast_newton_step_brings_an_affine_gain_to_zero(stride: int, align_corners: bool) -> None:
    model = Affine(stride=stride)
    images = torch.rand(5, 3, 13, 16, dtype=torch.float64)
    labels = torch.randint(0, 2, (5, 13, 16))
    labels[:3][torch.rand(3, 13, 16) < 0.6] = 0
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    adversarial, info = fast_newton_step(
        model, images, labels, bounds=(-1e3, 1e3), align_corners=align_corners, return_info=True
    )
    before = plain_gain(model(images), labels, align_corners=align_corners).detach()
    after = plain_gain(model(adversarial), labels, align_corners=align_corners)
    assert (before.abs() > 0.01).all()
    assert after.abs().max() < 1e-12
    torch.testing.assert_close(info.gain, before)
    torch.testing.assert_close(info.eps, info.gain / info.grad_norm)
    torch.testing.assert_close((adversarial - images).abs().amax((1, 2, 3)), info.eps.abs())


def test_fast_newton_classification_and_info() -> None:
    model, labels = Affine(pooled=True), torch.tensor([0, 1, 1, IGNORE])
    images = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    adversarial, info = FastNewton(model, bounds=(-1e3, 1e3))(images, labels, return_info=True)
    after = plain_gain(model(adversarial)[:, :, None, None], labels[:, None, None])
    assert after[:3].abs().max() < 1e-12
    leaf = images.clone().requires_grad_()
    [gradient] = torch.autograd.grad(plain_gain(model(leaf), labels).sum(), leaf)
    torch.testing.assert_close(info.grad_norm, gradient.abs().sum((1, 2, 3)))
    assert torch.equal(adversarial[3], images[3])
    assert isinstance(info, AttackInfo)
    assert [info.eps[3].item(), info.gain[3].item(), info.grad_norm[3].item()] == [0, 0, 0]


def test_fast_newton_literal_clamped_and_capped() -> None:
    model, images = Affine(), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    labels = torch.stack([torch.zeros(4, 4, dtype=torch.int64), torch.ones(4, 4, dtype=torch.int64)])
    assert (plain_gain(model(images), labels) * torch.tensor([1, -1]) > 0).all()
    wide = {"bounds": (-1e3, 1e3), "return_info": True}
    literal, info = fast_newton_step(model, images, labels, **wide)
    assert info.eps[0] > 0 > info.eps[1]
    clamped, clamped_info = fast_newton_step(model, images, labels, clamp_negative=True, **wide)
    assert torch.equal(clamped_info.eps, info.eps.clamp(min=0))
    assert torch.equal(clamped[0], literal[0])
    assert torch.equal(clamped[1], images[1])
    _, capped_info = fast_newton_step(model, images, labels, max_eps=1e-3, **wide)
    torch.testing.assert_close(capped_info.eps, torch.tensor([1e-3, -1e-3], dtype=torch.float64))
    assert torch.equal(capped_info.gain, info.gain)


def test_fast_newton_leaves_images_with_nan_logits_clean() -> None:
    model, (images, labels) = Net(), sample()

    def poisoned(logits: Tensor) -> Tensor:
        return logits + torch.tensor([0.0, torch.nan, 0.0]).view(-1, 1, 1, 1)

    expected = FastNewton(model)(images, labels)
    adversarial, info = FastNewton(model, output=poisoned)(images, labels, return_info=True)
    assert torch.equal(adversarial[1], images[1])
    assert torch.equal(adversarial[[0, 2]], expected[[0, 2]])
    assert info.eps[1] == 0
    assert info.gain.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "bim-best", "segpgd", "cospgd", "fast-newton"])
def test_a_batch_equals_single_images(name: str) -> None:
    model, (images, labels) = Net(), sample(4)
    labels[2, 1:] = IGNORE  # very different numbers of valid pixels
    together = run(name, model, images, labels, **_no_noise(name))
    for i in range(4):
        alone = run(name, model, images[i : i + 1], labels[i : i + 1], **_no_noise(name))
        assert torch.equal(together[i : i + 1], alone)


class Scaled(nn.Module):
    """The network for images in [-1, 2] instead of [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images + 1) / 3)


@every_attack
def test_every_option_reaches_every_pass(name: str) -> None:
    """The same attack in other units, with another ignored label, and resampled by the operations, not by the model."""
    model, (images, labels) = Net(), sample(150, (4, 6))
    with torch.no_grad():
        prediction = oracle.Resampled(copy.deepcopy(model).eval())(images).argmax(1)
    share = torch.linspace(0.2, 1.0, 150).view(-1, 1, 1)  # of labels that the model gets right
    labels = torch.where((torch.rand(labels.shape) < share) & (labels != IGNORE), prediction, labels)
    arguments = ATTACKS[name][1]
    torch.manual_seed(7)
    expected, info = make(name, oracle.Resampled(model))(images, labels, return_info=True)
    options = {"ignore_index": 7, "align_corners": True, "bounds": (-1, 2)}
    sizes = {key: 3 * value for key, value in arguments.items() if key in ("eps", "alpha")}
    torch.manual_seed(7)
    adversarial, other = make(name, Scaled(model), **options, **sizes)(
        3 * images - 1, labels.where(labels != IGNORE, 7), return_info=True
    )
    assert ((adversarial + 1) / 3 - expected).abs().max() < 1e-9
    torch.testing.assert_close(other.eps / 3, info.eps)
    assert (adversarial.min(), adversarial.max()) == (-1, 2)


def test_defaults_are_those_of_the_contract() -> None:
    model = nn.Identity()
    iterative = {
        "eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "targeted": False, "balanced": False, "best": False,
    }  # fmt: skip
    random = {**iterative, "random_start": True, "restarts": 1, "generator": None}
    own: dict[type[Attack], dict[str, Any]] = {
        FGSM: {"eps": 8 / 255, "targeted": False, "balanced": False},
        RandomFGSM: {"eps": 8 / 255, "generator": None},
        NFGSM: {"eps": 8 / 255, "noise": 2.0, "generator": None},
        CheckpointFGSM: {"eps": 8 / 255, "checkpoints": 3},
        BIM: iterative,
        PGD: random,
        SegPGD: random,
        CosPGD: random,
        FastNewton: {"clamp_negative": False, "max_eps": None},
    }
    shared = {"ignore_index": 255, "align_corners": False, "bounds": (0.0, 1.0), "bn": "eval", "output": None}
    for kind, expected in own.items():
        values = vars(kind(model))
        assert {key: values[key] for key in expected | shared} == expected | shared
        sizes = {key: 255.0 * value for key, value in expected.items() if key in ("eps", "alpha")}
        values = vars(kind(model, bounds=(-100, 155)))
        assert {key: values[key] for key in sizes} == pytest.approx(sizes), "of the width of the bounds"


def _no_noise(name: str) -> dict[str, Any]:
    kind = ATTACKS[name][0]
    return {"random_start": False} if issubclass(kind, PGD) else {"noise": 0.0} if kind is NFGSM else {}


def test_classification_and_label_types() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    images, labels = torch.rand(6, 3, 4, 4, dtype=torch.float64), torch.randint(0, 5, (6,))
    for name in ATTACKS:
        results = [
            run(name, model, images, labels.to(dtype)) for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        ]
        assert all(torch.equal(result, results[0]) for result in results)
        assert not torch.equal(results[0], images)


# --- guarantees, for every attack ---------------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_result_is_like_the_images_inside_box_and_ball(name: str, memory_format: torch.memory_format) -> None:
    model, (images, labels) = Net(dtype=torch.float32), sample(dtype=torch.float32)
    images = images.contiguous(memory_format=memory_format).requires_grad_()
    before = images.detach().clone(), labels.clone()
    adversarial = run(name, model, images, labels)
    assert adversarial.dtype == images.dtype
    assert adversarial.shape == images.shape
    assert adversarial.is_contiguous(memory_format=memory_format)
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if name != "fast-newton":
        radius = 3 * EPS if name == "n-fgsm" else EPS  # noise of 2 * EPS, and nothing is projected
        assert (adversarial - images).abs().max() <= radius + 1e-6
    assert not torch.equal(adversarial, images)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert images.requires_grad
    assert images.grad is None
    assert adversarial.data_ptr() != images.data_ptr()


class OwnNorm(nn.BatchNorm2d):
    """A norm layer with a buffer more, which counts in eval mode too."""

    def __init__(self) -> None:
        super().__init__(CLASSES, dtype=torch.float64)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class Writer(nn.Module):
    """Does all that can be done to buffers in every forward pass, in eval mode too; some of it leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("calls", "last", "by_data", "by_numpy", "by_storage", "removed"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("not_saved", torch.zeros(()), persistent=False)
        self.register_buffer("expanded", torch.zeros(()).expand(3))
        self.register_buffer("none", None)
        self.register_buffer("mean", torch.zeros(CLASSES, dtype=torch.float64))
        self.register_buffer("var", torch.ones(CLASSES, dtype=torch.float64))

    def train(self, mode: bool = True) -> Writer:
        raise AssertionError("an attack sets flags, it does not call train()")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.not_saved += 1
        self.last = self.last + 1
        self.by_data.data += 1
        self.by_numpy.numpy()[...] += 1
        self.by_storage.data = torch.ones(())
        self.none = torch.ones(())
        if hasattr(self, "removed"):
            del self.removed
        self.register_buffer("registered", torch.ones(()))
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


class Stateful(nn.Module):
    """Every kind of state that an attack could disturb, in mixed modes; raises in forward pass `fails`."""

    def __init__(self, *, fails: int = 0) -> None:
        super().__init__()
        self.body = Net()
        self.frozen_bn = nn.BatchNorm2d(CLASSES, dtype=torch.float64).eval()
        self.instance = nn.InstanceNorm2d(CLASSES, affine=True, track_running_stats=True, dtype=torch.float64)
        self.sync = nn.SyncBatchNorm(CLASSES, dtype=torch.float64)
        self.bn1d = nn.BatchNorm1d(CLASSES, momentum=None, dtype=torch.float64)
        self.plain = nn.BatchNorm2d(CLASSES, track_running_stats=False, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5).eval()
        self.writer = Writer()
        self.own_norm = OwnNorm()
        self.fails, self.passes = fails, 0
        self.body.conv1.weight.requires_grad_(False)
        self.frozen_bn.bias.requires_grad_(False)
        self.body.conv2.weight.grad = torch.randn_like(self.body.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for part in (self.body, self.frozen_bn, self.instance, self.plain, self.dropout, self.writer, self.own_norm):
            x = part(x)
        if not self.sync.training:
            x = self.sync(x)
        if self.passes == self.fails:
            raise ArithmeticError("the model fails")
        return self.bn1d(x.flatten(2)).view_as(x)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that has to be the same afterwards; objects by identity, values as copies."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "track": {name: getattr(module, "track_running_stats", None) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "objects": {name: id(t) for name, t in (*model.named_buffers(), *model.named_parameters())},
        "grad": {name: id(p.grad) for name, p in model.named_parameters() if p.grad is not None},
        "registered": {name: list(module._buffers.keys()) for name, module in model.named_modules()},
        "values": {name: t.clone() for name, t in (*model.named_buffers(), *model.named_parameters())},
        "grad_values": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, expected in before.items():
        if key.endswith("values"):
            assert expected.keys() == after[key].keys()
            for name, value in expected.items():
                assert torch.equal(value, after[key][name]), name
        else:
            assert expected == after[key], key


@every_attack
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_the_models_state_is_restored(name: str, bn: str) -> None:
    model, (images, labels) = Stateful(), sample()
    before = state(model)
    adversarial = run(name, model, images, labels, bn=bn)
    assert_same(before, state(model))
    assert model.passes == ATTACKS[name][2]
    assert torch.equal(adversarial, run(name, model, images, labels, bn=bn))  # nothing was left behind


@every_attack
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_the_models_state_is_restored_when_it_raises(name: str, bn: str) -> None:
    model, (images, labels) = Stateful(fails=ATTACKS[name][2]), sample()
    before = state(model)
    with pytest.raises(ArithmeticError, match="the model fails"):
        run(name, model, images, labels, bn=bn)
    assert_same(before, state(model))


@every_attack
def test_parameters_that_a_pass_replaces_require_gradients_as_before(name: str) -> None:
    class Offloaded(Net):
        """As Accelerate's hooks do it, which take a layer's weights from elsewhere for each pass."""

        def forward(self, images: Tensor) -> Tensor:
            for module in self.modules():
                for key, old in list(module._parameters.items()):
                    module._parameters[key] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            return super().forward(images)

    model, plain, (images, labels) = Offloaded(), Net(), sample()
    plain.load_state_dict(model.state_dict())
    model.bn.requires_grad_(False)
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert {*before.values()} == {False, True}
    assert torch.equal(run(name, model, images, labels), run(name, plain, images, labels))
    assert before == {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def test_parameters_that_a_pass_exchanges_or_replaces_by_anything_keep_their_flags() -> None:
    class Exchanging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, CLASSES, 1), nn.Conv2d(3, CLASSES, 1)
            self.kept = nn.ParameterDict({key: nn.Parameter(torch.ones(2)) for key in ("int", "none", "made", "last")})
            self.kept["computed"] = nn.Parameter(torch.ones(2), requires_grad=False)
            self.kept["complex"] = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)

        def forward(self, images: Tensor) -> Tensor:
            first, second, kept = self.first._parameters, self.second._parameters, self.kept._parameters
            first["weight"], second["weight"] = second["weight"], first["weight"]
            kept["int"] = torch.ones(2, dtype=torch.int8)
            kept["none"] = None
            with torch.inference_mode():
                kept["made"] = torch.ones(2)
            kept["computed"] = 2 * torch.ones(2, requires_grad=True)
            kept["complex"] = torch.ones(2, dtype=torch.complex64, requires_grad=True)
            result: Tensor = self.first(images) + self.second(images)
            return result

    model, (images, labels) = Exchanging().double(), sample()
    model.second.weight.requires_grad_(False)
    own = {parameter: parameter.requires_grad for parameter in model.parameters()}
    FGSM(model)(images, labels)
    assert model.second.weight.requires_grad
    assert not model.first.weight.requires_grad
    assert not model.kept._parameters["complex"].requires_grad
    assert own == {parameter: parameter.requires_grad for parameter in own}


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_norm_layers_see_the_statistics_asked_for_and_dropout_is_off(bn: str) -> None:
    model, (images, labels) = Net(), sample()
    labels[1].view(-1)[33:] = IGNORE  # through the statistics it has a part in the others' gradients all the same
    model.late_bn = nn.BatchNorm2d(CLASSES, dtype=torch.float64).eval()  # frozen by the caller: never the batch's
    model.register_forward_hook(lambda module, _, logits: module.late_bn(logits))
    plain = copy.deepcopy(model)
    plain.dropout.eval()
    plain.bn.train(bn == "train")
    leaf = images.clone().requires_grad_()
    # bn.train() writes running statistics, which is why it is a copy.
    [gradient] = torch.autograd.grad(plain_gain(plain(leaf), labels).sum(), leaf)
    norm = gradient.abs().sum((1, 2, 3))
    _, info = FastNewton(model, bn=bn)(images, labels, return_info=True)
    torch.testing.assert_close(info.grad_norm, norm)
    model.eval()  # a model in eval mode has no layer that would use the batch's statistics
    _, other = FastNewton(model, bn=bn)(images, labels, return_info=True)
    assert torch.allclose(other.grad_norm, norm) == (bn == "eval")


@pytest.mark.parametrize("kind", [FGSM, CosPGD])
def test_with_batch_statistics_the_gradient_is_that_of_the_sum_of_all_images_means(kind: type[FGSM | CosPGD]) -> None:
    model, (images, labels) = Net(), sample()
    labels[1].view(-1)[33:] = IGNORE
    plain = copy.deepcopy(model)
    plain.dropout.eval()
    leaf = images.clone().requires_grad_()
    losses = plain_loss(plain(leaf), labels, "cospgd" if kind is CosPGD else "ce", 0, 1, False)
    [expected] = torch.autograd.grad(losses.sum(), leaf)
    found = kind(model, bn="train").input_gradient(images, labels)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    root = (labels != IGNORE).sum((1, 2)).max().sqrt()  # of the most labelled pixels: what half precision holds
    assert root / 2**0.5 <= found.norm() / expected.norm() <= root * 2**0.5


class Counted(torch.autograd.Function):
    """x * weight that notes which gradients its backward is asked for."""

    asked: list[tuple[bool, ...]]

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        Counted.asked.append(tuple(ctx.needs_input_grad))
        return grad * ctx.saved_tensors[0], None


@every_attack
def test_number_of_passes_and_no_weight_gradients(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.grad_enabled: list[bool] = []

        def forward(self, images: Tensor) -> Tensor:
            self.grad_enabled.append(torch.is_grad_enabled())
            assert not any(p.requires_grad for p in self.parameters())
            assert not any(module.training for module in self.modules())
            return Counted.apply(self.net(images), self.weight)

    Counted.asked = []
    model, (images, labels) = Model(), sample()
    run(name, model, images, labels)
    _, _, forwards, backwards = ATTACKS[name]
    assert len(model.grad_enabled) == forwards
    assert sum(model.grad_enabled) == backwards  # a pass that only judges builds no graph
    assert Counted.asked == [(True, False)] * backwards


@every_attack
def test_under_no_grad_and_inference_mode(name: str) -> None:
    model, (images, labels) = Net(), sample()
    expected = run(name, model, images, labels)
    with torch.no_grad():
        assert torch.equal(run(name, model, images, labels), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        made_here = images.clone(), labels.clone()
        adversarial = run(name, model, *made_here)
        assert torch.equal(adversarial, expected)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(run(name, model, *made_here), expected)
    assert not adversarial.is_inference()  # may be trained on
    sum(p.sum() for p in model.parameters()).backward()


@every_attack
def test_under_autocast(name: str) -> None:
    model, (images, labels) = Net(dtype=torch.float32), sample(dtype=torch.float32)
    seen: list[Tensor] = []
    leaves: list[weakref.ref[Tensor]] = []
    model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.detach()))
    model.register_forward_pre_hook(lambda _module, inputs: leaves.append(weakref.ref(inputs[0])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = run(name, model, images, labels)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
        gc.collect()
        assert all(leaf() is None for leaf in leaves)  # autocast's cache would keep them
    assert {logits.dtype for logits in seen} == {torch.bfloat16}
    assert adversarial.dtype == torch.float32
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if name != "fast-newton":
        radius = 3 * EPS if name == "n-fgsm" else EPS  # noise of 2 * EPS, and nothing is projected
        assert (adversarial - images).abs().max() <= radius + 1e-6
        # The same attack but for the rounding of the network.
        agreement = (adversarial - run(name, model, images, labels)).abs() < 1e-3
        assert agreement.float().mean() > 0.6


@every_attack
def test_the_backward_runs_outside_of_autocast(name: str) -> None:
    model, (images, labels) = Net(dtype=torch.float32), sample(dtype=torch.float32)
    seen: list[bool] = []

    def look(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(lambda _grad: seen.append(torch.is_autocast_enabled("cpu")))

    model.register_forward_hook(look)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(name, model, images, labels)
    assert seen == [False] * ATTACKS[name][3]


def weight_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = functional.cross_entropy(model(images), labels)
    return list(torch.autograd.grad(loss, list(model.parameters())))


@every_attack
@pytest.mark.parametrize("first", ["attack", "forward"])
def test_an_attack_does_not_disturb_training_in_the_same_autocast_block(name: str, first: str) -> None:
    model, (images, labels) = Net(dtype=torch.float32, dropout=0.0), sample(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = weight_gradients(model, images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if first == "forward":
            clean_loss = functional.cross_entropy(model(images), labels)
        run(name, model, images, labels)
        gradients = weight_gradients(model, images, labels)
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)
    if first == "forward":  # a graph from before the attack is still good
        for gradient, other in zip(torch.autograd.grad(clean_loss, model.parameters()), expected, strict=True):
            assert torch.equal(gradient, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_neither_underflows_nor_overflows(dtype: torch.dtype) -> None:
    """float16 holds neither the gradient of a mean over 2^18 pixels nor, at a global feature, of a sum."""

    def halved(logits: Tensor) -> Tensor:
        return logits.to(dtype) + logits.mean((2, 3), keepdim=True).to(dtype)

    model = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([4.0, 0.0, -4.0]))
    images, labels = torch.rand(1, 3, 512, 512), torch.zeros(1, 512, 512, dtype=torch.uint8)
    labels[0, 100:200] = 1
    _, expected = FastNewton(model, output=lambda z: z + z.mean((2, 3), keepdim=True))(images, labels, return_info=True)
    _, info = FastNewton(model, output=halved)(images, labels, return_info=True)
    assert info.eps.abs() > 0
    for name in ("eps", "gain", "grad_norm"):
        torch.testing.assert_close(getattr(info, name), getattr(expected, name), rtol=0.01, atol=0)
    # Pixels that are classified with confidence have small gradients already before the mean.
    with torch.no_grad():
        model.bias[0] = 8.0
    gradient = FGSM(model, output=lambda z: z.to(dtype)).input_gradient(images, labels)
    agreement = gradient.sign() == FGSM(model).input_gradient(images, labels).sign()
    assert agreement.float().mean() > 0.99


@every_attack
def test_an_image_without_a_valid_pixel(name: str) -> None:
    model, (images, labels) = Net(), sample()
    labels[1] = IGNORE
    adversarial = run(name, model, images, labels)
    assert torch.equal(adversarial[1], images[1])
    assert not torch.equal(adversarial[0], images[0])
    assert adversarial.isfinite().all()
    labels[:] = IGNORE
    _, info = make(name, model)(images, labels, return_info=True)
    for value in (info.loss, info.gain, info.grad_norm):
        assert value is None or torch.equal(value, torch.zeros_like(value))


@every_attack
def test_an_empty_batch_does_not_run_the_model(name: str) -> None:
    model = Stateful(fails=1)
    images, labels = torch.rand(0, 3, 9, 11), torch.zeros(0, 9, 11, dtype=torch.uint8)
    adversarial, info = make(name, model)(images, labels, return_info=True)
    assert adversarial.shape == images.shape
    assert all(value.shape == (0,) for value in (info.eps, info.loss, info.gain, info.grad_norm))
    assert make(name, model).input_gradient(images, labels).shape == images.shape
    assert model.passes == 0


class NoWaiting(TorchDispatchMode):
    """Raises at whatever would wait for a GPU; does not look inside the operations of segadv."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        waits = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "unique",
            "bincount",
        )
        boolean_index = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for entry in args
            if isinstance(entry, (list, tuple))
            for index in entry
        )
        if boolean_index or name.removeprefix("aten::").split(".")[0] in waits:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@every_attack
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGADV_CHECK", raising=False)
    monkeypatch.setattr(segadv.attacks.base, "in_range", lambda *arguments: None)  # a look that only a CPU takes
    model, (images, labels) = Net(), sample()
    expected = run(name, model, images, labels)
    attack = make(name, model)
    torch.manual_seed(7)
    with NoWaiting():
        adversarial, _ = attack(images, labels, return_info=True)
        with pytest.raises(AssertionError, match="waits"):
            images.sum().item()
        with pytest.raises(AssertionError, match="waits"):
            images[images > 0.5]
    assert torch.equal(adversarial, expected)


@every_attack
def test_a_compiled_model_gives_the_same(name: str) -> None:
    torch._dynamo.reset()
    model, (images, labels) = Net(), sample()
    expected = run(name, model, images, labels, bn="train")
    compiled = torch.compile(model, backend="eager")
    before = state(compiled)
    assert torch.equal(run(name, compiled, images, labels, bn="train"), expected)
    assert_same(before, state(compiled))
    assert unwrapped(compiled) is compiled


class StaticMemory(nn.Module):
    """A model whose logits and input gradients lie in the same memory in every pass, as those of a network that is
    compiled to CUDA graphs: the next pass writes over them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.memory: dict[tuple[str, torch.Size], Tensor] = {}

    def keep(self, name: str, value: Tensor) -> Tensor:
        place = self.memory.setdefault((name, value.shape), torch.empty_like(value))
        return place.data.copy_(value)

    def forward(self, images: Tensor) -> Tensor:
        for place in self.memory.values():
            place.data.fill_(torch.nan)
        module = self

        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: Tensor, name: str) -> Tensor:
                ctx.name = name
                return module.keep(name, value) if name == "logits" else value.clone()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
                return (module.keep("gradient", grads[0]) if ctx.name == "images" else grads[0]), None

        logits: Tensor = Keep.apply(self.model(Keep.apply(images, "images")), "logits")
        return logits


@every_attack
def test_outputs_that_the_next_pass_writes_over(name: str) -> None:
    model, (images, labels) = Net(), sample()
    static = StaticMemory(model)
    adversarial, gradient = run(name, model, images, labels), make(name, model).input_gradient(images, labels)
    assert torch.equal(run(name, static, images, labels), adversarial)
    kept = make(name, static).input_gradient(images, labels)
    static(images)
    assert torch.equal(kept, gradient)


def test_repr_and_arguments_for_result_files() -> None:
    attack = PGD(nn.Identity(), eps=torch.tensor([0.1, 0.2]), alpha=0.1, generator=torch.Generator())
    assert repr(FGSM(nn.Identity(), eps=0.25)).startswith("FGSM(")
    assert "eps=0.25" in repr(FGSM(nn.Identity(), eps=0.25))
    arguments = json.loads(json.dumps(attack.arguments))
    assert arguments["attack"] == "PGD"
    assert arguments["eps"] == pytest.approx([0.1, 0.2])
    assert arguments["generator"] == "Generator"
    assert arguments["steps"] == 10
    assert arguments["output"] is None
    assert "model" not in arguments


def test_fast_newton_step_is_the_object_in_one_call() -> None:
    model, (images, labels) = Net(), sample(30)
    with torch.no_grad():
        prediction = oracle.Resampled(copy.deepcopy(model).eval())(images).flip(1).argmax(1)
    labels = torch.where(torch.rand(labels.shape) < torch.linspace(0, 1, 30).view(-1, 1, 1), prediction, labels)
    labels[:, 0] = 7
    labels[labels == IGNORE] = 7
    options: dict[str, Any] = {
        "ignore_index": 7,
        "align_corners": True,
        "bounds": (-0.1, 1.2),
        "clamp_negative": True,
        "max_eps": 0.05,
        "bn": "train",
        "output": lambda logits: logits.flip(1),  # a factor would change nothing
    }
    expected, info = FastNewton(model, **options)(images, labels, return_info=True)
    assert info.eps.min() == 0
    assert info.eps.max() == 0.05
    assert ((info.eps > 0) & (info.eps < 0.05)).any()
    assert torch.equal(fast_newton_step(model, images, labels, **options), expected)
    adversarial, other = fast_newton_step(model, images, labels, **options, return_info=True)
    assert torch.equal(adversarial, expected)
    for name in ("eps", "gain", "grad_norm"):
        assert torch.equal(getattr(other, name), getattr(info, name))


# --- model outputs ------------------------------------------------------------------------------------------


@dataclass
class SegmenterOutput:
    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda z: {"out": z, "aux": None}, None),
        (lambda z: OrderedDict(logits=z), None),
        (lambda z: {"out": None, "logits": z}, None),
        (lambda z: SegmenterOutput(None, z), None),
        (lambda z: SimpleNamespace(logits=z), None),
        (lambda z: (z, None), None),
        (lambda z: [z], None),
        (lambda z: {"masks": [None, z]}, lambda output: output["masks"][1]),
        (lambda z: (None, z), lambda output: output[1]),
    ],
)
def test_model_outputs(form: Callable[[Tensor], Any], output: Callable[[Any], Tensor] | None) -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Any:
            return form(self.net(images))

    net, (images, labels) = Net(), sample()
    expected = FGSM(net)(images, labels)
    assert torch.equal(FGSM(Shaped(), output=output)(images, labels), expected)


@pytest.mark.parametrize(
    ("result", "extract", "message"),
    [
        ({"masks": 1}, None, r"model: it returned a dict with the keys \['masks'\].*output="),
        ((1, 2), None, r"model: it returned a tuple of \['int', 'int'\]"),
        ((), None, "model: it returned a tuple"),
        ({"out": None, "logits": None}, None, r"model: it returned a dict with the keys \['out', 'logits'\]"),
        (None, None, "model: it returned a NoneType"),
        (SimpleNamespace(masks=1), None, "model: it returned a SimpleNamespace"),
        (
            torch.ones(1),
            lambda output: [output],
            r"output must return a tensor, the logits, got a list of \['Tensor'\]",
        ),
    ],
)
def test_a_model_output_that_is_not_understood(result: Any, extract: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model_logits(result, extract)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda m: FGSM(m, eps=8),
            ValueError,
            r"eps must be in \[0, 1\], .*, got 8\. eps .* units of the images: 8/255",
        ),
        (lambda m: FGSM(m, eps=-0.1), ValueError, r"eps must be in \[0, 1\], .*, got -0\.1"),
        (lambda m: FGSM(m, eps=float("nan")), ValueError, r"eps must be in \[0, 1\], .*, got nan"),
        (lambda m: FGSM(m, eps="8/255"), TypeError, r"eps must be a number, or a tensor \[N\], got a str"),
        (lambda m: RandomFGSM(m, eps=8), ValueError, r"eps must be in \[0, 1\], .*, got 8\."),
        (
            lambda m: FGSM(m, eps=2.5, bounds=(-1, 1)),
            ValueError,
            r"eps must be in \[0, 2\], .* = \(-1\.0, 1\.0\), got 2\.5",
        ),
        (lambda m: BIM(m, alpha=2), ValueError, r"alpha must be in \[0, 1\], .*, got 2\."),
        (lambda m: BIM(m, steps=0), ValueError, "steps must be a whole number of at least 1, got 0"),
        (lambda m: BIM(m, steps=2.0), TypeError, r"steps must be a whole number of at least 1, got 2\.0"),
        (lambda m: PGD(m, restarts=0), ValueError, "restarts must be a whole number of at least 1, got 0"),
        (
            lambda m: PGD(m, restarts=2, random_start=False),
            ValueError,
            "restarts must be 1 with random_start=False, .*, got 2",
        ),
        (lambda m: NFGSM(m, noise=-1), ValueError, "noise must be a finite number of at least 0, .*, got -1"),
        (lambda m: NFGSM(m, noise=math.inf), ValueError, "noise must be a finite number of at least 0, .*, got inf"),
        (lambda m: NFGSM(m, noise="2"), ValueError, "noise must be a finite number of at least 0, .*, got '2'"),
        (lambda m: NFGSM(m, noise=True), ValueError, "noise must be a finite number of at least 0, .*, got True"),
        (
            lambda m: CheckpointFGSM(m, checkpoints=0),
            ValueError,
            "checkpoints must be a whole number of at least 1, got 0",
        ),
        (lambda m: CheckpointFGSM(m, targeted=True), ValueError, "targeted must be False, .*, got True"),
        (lambda m: FastNewton(m, max_eps=8), ValueError, r"max_eps must be in \[0, 1\], .*, got 8\."),
        (lambda m: FastNewton(m, max_eps=torch.ones(1)), TypeError, "max_eps must be a number or None, got a Tensor"),
        (lambda m: FGSM(m, bn="batch"), ValueError, "bn must be one of eval, train; got 'batch'"),
        (
            lambda m: FGSM(m, bounds=(1.0, 0.0)),
            ValueError,
            r"bounds must be two numbers, \(low, high\) with low < high, got \(1.0, 0.0\)\.",
        ),
        (lambda m: FGSM(m, bounds=(-math.inf, 1)), ValueError, r"bounds must be finite .*, got \(-inf, 1\.0\)"),
        (lambda m: FGSM(m, bounds=(0, math.inf)), ValueError, r"bounds must be finite in an attack, got \(0.0, inf\)"),
        (
            lambda m: FGSM(m, bounds=None),
            ValueError,
            r"bounds must be two numbers, .*, got None\. For images that",
        ),
        (lambda m: FGSM(m, bounds=((0, 0), (1, 1))), ValueError, r"bounds must be .*, got \(\(0, 0\), \(1, 1\)\)\."),
        (lambda m: FGSM(m, bounds=(0, 1, 2)), ValueError, r"bounds must be two numbers, .*, got \(0, 1, 2\)"),
        (lambda m: FGSM(m, bounds=("0", "1")), ValueError, r"bounds must be two numbers, .*, got \('0', '1'\)"),
        (lambda m: FGSM(m, bounds=(False, True)), ValueError, r"bounds must be two numbers, .*, got \(False, True\)"),
        (lambda m: FGSM(m, bounds=(0, 10**400)), ValueError, "bounds must be two numbers, .*, got .*0000"),
        (lambda m: FGSM(m, output="out"), TypeError, "output must be a callable or None, got a str"),
        (
            lambda m: FGSM(lambda x: x),
            TypeError,
            "model must be an nn.Module, got a function; .* whose forward calls it",
        ),
        (
            lambda m: FGSM(nn.Identity),
            TypeError,
            "model must be an nn.Module, got the class Identity; give an",
        ),
    ],
)
def test_bad_arguments(build: Callable[[nn.Module], Attack], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(nn.Identity())


@every_attack
def test_every_attack_checks_what_all_have_in_common(name: str) -> None:
    for wrong in ({"bn": "batch"}, {"bounds": (1, 0)}, {"ignore_index": 0.5}, {"align_corners": 1}, {"output": "out"}):
        with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must be "):
            make(name, nn.Identity(), **wrong)


def test_a_cap_in_the_units_of_the_bounds() -> None:
    assert FastNewton(nn.Identity(), bounds=(0, 255), max_eps=8).max_eps == 8
    with pytest.raises(ValueError, match=r"max_eps must be in \[0, 2\], .*, got 3\."):
        FastNewton(nn.Identity(), bounds=(-1, 1), max_eps=3)


@pytest.mark.parametrize("kind", [BIM, PGD, SegPGD])
def test_steps_that_cannot_reach_the_ball_warn(kind: type[BIM]) -> None:
    with pytest.warns(UserWarning, match=r"steps \* alpha = 3 \* 0.01 < eps = 0.04") as record:
        kind(nn.Identity(), eps=0.04, alpha=0.01, steps=3)
    assert record[0].filename == __file__


def test_steps_that_just_reach_the_ball_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    BIM(nn.Identity(), eps=0.3, alpha=0.1, steps=3)
    BIM(nn.Identity(), eps=0.04, alpha=0.004, steps=10)
    small = torch.tensor([0.01, 0.02])  # those may be on a GPU, and are not looked at
    BIM(nn.Identity(), eps=0.04, alpha=small, steps=1)
    BIM(nn.Identity(), eps=small, alpha=0.001, steps=1)
    assert not recwarn.list


IMAGES, LABELS = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "images", "labels", "error", "message"),
    [
        ({}, IMAGES.bfloat16(), LABELS, ValueError, "images must be float32 .*, got bfloat16 .*; keep .* autocast"),
        ({}, IMAGES.half(), LABELS, ValueError, "images must be float32 .*, got float16 .*; keep images in float32"),
        ({}, IMAGES.byte(), LABELS, ValueError, r"images must be float32 or float64 .*, got uint8 .*; images.float"),
        ({}, IMAGES.numpy(), LABELS, TypeError, "images must be a tensor, got a ndarray"),
        ({}, IMAGES, [[0]], TypeError, "labels must be a tensor, got a list"),
        ({}, IMAGES, LABELS[:1], ValueError, r"labels must .* as images \[2, 3, 4, 4\], got \[1, 4, 4\]"),
        ({}, IMAGES, LABELS[:, ::2, ::2], ValueError, r"labels must .* the same N, H and W .*, got .2, 2, 2.\. Resize"),
        ({}, IMAGES, LABELS[:, 0, 0][:1], ValueError, r"labels must .* the same N as images .2, 3, 4, 4., got \[1\]"),
        ({}, IMAGES, LABELS.float(), ValueError, "labels must have one of the dtypes .*, got float32"),
        ({}, IMAGES, LABELS.to("meta"), ValueError, "labels must be on the images' device, cpu, got meta"),
        ({}, IMAGES, LABELS + 9, ValueError, r"labels must be class indices in \[0, 3\).*, got 9 at"),
        ({"eps": torch.ones(3)}, IMAGES, LABELS, ValueError, r"eps must be .* \[2\] on cpu, got float32 \[3\]"),
        ({"eps": torch.ones(2, device="meta")}, IMAGES, LABELS, ValueError, "eps must be .* on cpu, got .* on meta"),
        ({"eps": torch.ones(2, dtype=torch.int64)}, IMAGES, LABELS, ValueError, "eps must be .* floating.*, got int64"),
        ({"output": lambda z: z[:1]}, IMAGES, LABELS, ValueError, "output: it returned float32 .1, 3"),
        ({"output": lambda z: z.argmax(1)}, IMAGES, LABELS, ValueError, "output: it returned int64"),
        ({"output": lambda z: z.detach()}, IMAGES, LABELS, ValueError, "no gradient passes"),
        (
            {"output": lambda z: torch.ones_like(z, requires_grad=True)},
            IMAGES, LABELS, ValueError, "no gradient passes",
        ),
        ({"output": lambda z: z[:, :1]}, IMAGES, LABELS, ValueError, "at least 2 classes, got 1.*sigmoid"),
    ],
)  # fmt: skip
def test_bad_calls(options: dict[str, Any], images: Any, labels: Any, error: type[Exception], message: str) -> None:
    model = nn.Conv2d(3, 3, 1)
    with pytest.raises(error, match=message):
        FGSM(model, **options)(images, labels)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_batch_statistics_of_one_image_warn(recwarn: pytest.WarningsRecorder) -> None:
    images, labels = sample(1)
    pooled = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).double()
    with pytest.warns(UserWarning, match=r'bn should be "eval" with a batch of one image, got "train".*use bn="eval"'):
        FGSM(Net(), bn="train")(images, labels)
    for call in (
        PGD(Net(), bn="train"),
        FastNewton(Net(), bn="train").input_gradient,
        lambda x, y: segadv.fast_newton_step(Net(), x, y, bn="train"),
    ):
        with pytest.warns(UserWarning, match='use bn="eval"') as told:
            call(images, labels)
        assert told[0].filename == __file__
    with pytest.warns(UserWarning, match='use bn="eval"'), pytest.raises(ValueError, match="more than 1 value"):
        FGSM(pooled, bn="train")(images, labels)
    recwarn.clear()
    FGSM(pooled)(images, labels)
    FGSM(Net().eval(), bn="train")(images, labels)
    FGSM(Net(), bn="train")(*sample(2))
    assert not recwarn.list


class Checkpointing(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.net = Net(dtype=torch.float32, dropout=0)
        self.reentrant = reentrant

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(self.net, images, use_reentrant=self.reentrant)


@every_attack
def test_checkpointing_is_supported_unless_it_is_reentrant(name: str) -> None:
    images, labels = sample(dtype=torch.float32)
    model = Checkpointing(reentrant=False)
    assert torch.equal(run(name, model, images, labels), run(name, model.net, images, labels))
    model = Checkpointing(reentrant=True)
    with pytest.raises(ValueError, match=r"model: it uses reentrant checkpointing.*use_reentrant=False"):
        run(name, model, images, labels)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_errors_that_speak_of_checkpoints_stay_what_they_are() -> None:
    class Unequal(nn.Conv2d):
        calls = 0

        def block(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.sigmoid(x if self.calls % 2 else x[:, :2].double()).float()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, super().forward(x), use_reentrant=False)

    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        FGSM(Unequal(3, 3, 1))(IMAGES, LABELS)


def test_torch_func_inside_the_model_is_supported_and_around_the_attack_refused() -> None:
    net, (images, labels) = Net(dropout=0).eval(), sample()

    class Transformed(nn.Module):
        def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.net = net
            self.transformed = forward

        def forward(self, images: Tensor) -> Tensor:
            return self.transformed(images)

    weights = {name: value.detach() for name, value in (*net.named_parameters(), *net.named_buffers())}
    for forward in (
        lambda x: torch.func.functional_call(net, weights, (x,)),
        torch.func.vmap(lambda x: net(x[None])[0]),
    ):
        torch.testing.assert_close(FGSM(Transformed(forward))(images, labels), FGSM(net)(images, labels))
    for transform in (
        lambda: torch.func.grad(lambda x: FGSM(net)(x, labels).sum())(images),
        lambda: torch.func.vmap(lambda x, y: FGSM(net)(x[None], y[None]))(images, labels),
        lambda: torch.func.jvp(lambda x: FGSM(net)(x, labels), (images,), (images,)),
    ):
        with pytest.raises(
            ValueError, match=r"must be a plain tensor, got one inside of a torch\.func transform .* Call it outside"
        ):
            transform()


def test_alpha_and_generator_that_do_not_fit() -> None:
    model = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"alpha must be a number or .* \[2\] on cpu, got float32 \[1\]"):
        BIM(model, alpha=torch.ones(1))(IMAGES, LABELS)

    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    for kind in (RandomFGSM, NFGSM, PGD):
        with pytest.raises(ValueError, match="generator must be on the images' device, cpu, got cuda"):
            kind(model, generator=Elsewhere())(IMAGES, LABELS)

    a_generator = r"generator must be a torch\.Generator or None, got a "
    for seed in (3, np.array(3), torch.tensor(3)):  # arrays and tensors have a device, too
        with pytest.raises(TypeError, match=a_generator + type(seed).__name__):
            PGD(model, generator=seed)(IMAGES, LABELS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignore_index": None}, "ignore_index must be a whole number, got a NoneType"),
        ({"ignore_index": 255.0}, "ignore_index must be a whole number, got a float"),
        ({"ignore_index": True}, "ignore_index must be a whole number, got a bool"),
        ({"targeted": "yes"}, "targeted must be True or False, got 'yes'"),
        ({"balanced": 1}, "balanced must be True or False, got 1"),
        ({"align_corners": 1}, "align_corners must be True or False, got 1"),
    ],
)
def test_arguments_of_a_wrong_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FGSM(nn.Identity(), **arguments)


def test_arguments_become_plain_numbers() -> None:
    attack = NFGSM(nn.Identity(), bounds=[np.float32(0), 1], ignore_index=np.int64(7), noise=np.float32(1))  # type: ignore[arg-type]
    newton = FastNewton(nn.Identity(), max_eps=np.float32(0.5))  # type: ignore[arg-type]
    found = json.loads(json.dumps(attack.arguments | newton.arguments | {"ignore_index": attack.ignore_index}))
    assert (found["bounds"], found["ignore_index"], found["noise"], found["max_eps"]) == ([0.0, 1.0], 7, 1.0, 0.5)
    pgd = PGD(nn.Identity(), steps=np.int64(12), restarts=np.int64(2)).arguments
    checkpoints = CheckpointFGSM(nn.Identity(), checkpoints=np.int64(4)).arguments["checkpoints"]
    found = json.loads(json.dumps([pgd["steps"], pgd["restarts"], checkpoints]))
    assert found == [12, 2, 4]


@pytest.mark.parametrize("kind", [FGSM, BIM])
@pytest.mark.parametrize("value", [-0.1, 1.1, 8.0, float("inf"), float("nan")])
def test_sizes_in_a_tensor_or_changed_afterwards_are_checked_too(kind: type[FGSM] | type[BIM], value: float) -> None:
    attack = kind(nn.Conv2d(3, 3, 1), eps=0.05)
    message = r"eps must be in \[0, 1\], the width of bounds = \(0\.0, 1\.0\), got \S+\. eps is in"
    with pytest.raises(ValueError, match=message):
        kind(nn.Conv2d(3, 3, 1), eps=torch.tensor([0.1, value]))
    attack.eps = torch.tensor([value, 0.1])
    with pytest.raises(ValueError, match=message):
        attack(IMAGES, LABELS)
    attack.eps = value
    with pytest.raises(ValueError, match=message):
        attack(IMAGES, LABELS)


def test_what_an_attack_tells_is_the_callers() -> None:
    """Changing it changes neither the attack nor the tensor that it was given."""
    eps = torch.full((len(IMAGES),), 0.1)
    for attack in (FGSM(nn.Conv2d(3, 3, 1), eps=eps), BIM(nn.Conv2d(3, 3, 1), eps=eps, alpha=0.1)):
        _, info = attack(IMAGES, LABELS, return_info=True)
        info.eps.mul_(255)
        assert torch.equal(eps, torch.full_like(eps, 0.1))


@pytest.mark.parametrize("change", ["sub_", "no_grad"])
def test_a_model_that_changes_its_input_in_place_is_refused(change: str) -> None:
    class InPlace(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(change == "sub_"):
                x.sub_(0.5)
            return super().forward(x)

    with pytest.raises(ValueError, match="model: it changes its input in place"):
        FGSM(InPlace(3, 3, 1))(IMAGES.clone(), LABELS)


def test_a_model_that_changes_another_leaf_in_place_is_told_so() -> None:
    class Leaf(nn.Conv2d):
        leaf = torch.zeros(3, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            self.leaf.mul_(0.9)
            return super().forward(x)

    with pytest.raises(ValueError, match="Or it changes another tensor that requires a gradient"):
        FGSM(Leaf(3, 3, 1))(IMAGES, LABELS)


def test_an_attack_inside_of_cached_parametrizations_leaves_nothing_in_their_cache() -> None:
    """Weights that it computed, without a graph, would be what the caller's next forward pass trains."""
    model = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    with torch.nn.utils.parametrize.cached():
        before = model.weight
        FGSM(model)(IMAGES, LABELS)
        assert model.weight is before
        model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.nn.utils.parametrize.cached():
        FGSM(model)(IMAGES, LABELS)
        assert model.weight.requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the names of before parametrizations
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm, None])
def test_weights_that_a_hook_computes_are_those_of_the_caller_s_pass(hook: Any) -> None:
    """The attack's have no graph: a penalty on them would train nothing, and say nothing."""
    conv = nn.Conv2d(3, 3, 1)
    prune.l1_unstructured(conv, "weight", amount=2) if hook is None else hook(conv)
    (own,) = (parameter for name, parameter in conv.named_parameters() if name in ("weight_v", "weight_orig"))
    model = nn.Sequential(conv, nn.Conv2d(3, 5, 1))
    model(IMAGES)
    before = conv.weight
    FGSM(model)(IMAGES, LABELS)
    assert conv.weight is before
    model.append(nn.Linear(7, 7))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FGSM(model)(IMAGES, LABELS)
    assert conv.weight is before
    (grad,) = torch.autograd.grad(conv.weight.square().sum(), own)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_model_may_have_sparse_buffers(layout: str) -> None:
    class Scaling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if layout == "to_sparse":
                self.own.mul_(2)
            else:
                self.own.values().mul_(2)
            return super().forward(x)

    model = Scaling(3, 3, 1)
    model.register_buffer("own", getattr(torch.eye(3), layout)())
    FGSM(model)(IMAGES, LABELS)
    assert torch.equal(model.own.to_dense(), torch.eye(3))


VALUES = torch.arange(4.0)
BUFFERS = {
    "conjugated": lambda: torch.complex(VALUES, VALUES).conj(),
    "negated": lambda: torch.complex(VALUES, VALUES).conj().imag,
    "quantised": lambda: torch.quantize_per_tensor(VALUES, 0.5, 0, torch.qint8),
    "uint16": lambda: VALUES.to(torch.uint16),
    "float8": lambda: VALUES.to(torch.float8_e4m3fn),
    "bool": lambda: VALUES > 1,
    "empty": lambda: VALUES[:0],
    "expanded": lambda: VALUES.expand(2, 4),
    "one row": lambda: torch.arange(8.0).as_strided((1, 2, 3), (0, 1, 2)),
    "meta": lambda: VALUES.to("meta"),
    "mkldnn": lambda: VALUES.to_mkldnn(),
    "sub-class": lambda: torch.masked.masked_tensor(VALUES, VALUES > 1),
}


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|quantization|MaskedTensor)")
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_model_may_have_buffers_of_any_kind(kind: str) -> None:
    """The one that counts says that the others hinder nothing."""

    class Counts(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if kind in ("conjugated", "negated", "uint16", "bool", "empty", "one row"):
                self.own.copy_(torch.ones_like(self.own))
            return super().forward(x)

    model = Counts(3, 3, 1)
    model.register_buffer("own", BUFFERS[kind]())
    model.register_buffer("calls", torch.zeros(()))
    before = model.own
    FGSM(model)(IMAGES, LABELS)
    assert model.own is before
    assert model.calls == 0
    if kind in ("conjugated", "negated", "uint16", "bool", "empty", "one row"):
        assert torch.equal(model.own.resolve_conj(), BUFFERS[kind]().resolve_conj())


def test_a_frozen_script_module() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    model = torch.jit.freeze(torch.jit.script(network))
    assert torch.equal(FGSM(model)(IMAGES, LABELS), FGSM(network)(IMAGES, LABELS))


def test_parameters_that_a_caller_computed() -> None:
    """Their graph, the caller's, goes on being valid; functional_call does so in meta-learning."""

    class Attacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(FGSM(self.network)(x, LABELS))

    model = Attacks()
    computed = {name: 2 * value for name, value in model.named_parameters()}
    torch.func.functional_call(model, computed, (IMAGES,)).sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_a_buffer_that_is_turned_is_restored() -> None:
    class Turning(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.own.t_()
            return super().forward(x)

    model = Turning(3, 3, 1)
    model.register_buffer("own", torch.arange(4.0).view(2, 2))
    FGSM(model)(IMAGES, LABELS)
    assert torch.equal(model.own, torch.arange(4.0).view(2, 2))


@pytest.mark.parametrize("change", ["data", "dtype", "resize"])
def test_a_buffer_that_gets_other_memory_is_restored(change: str) -> None:
    class Replacing(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if change == "resize":
                self.own.resize_(5).fill_(1)
            else:
                self.own.data = torch.ones(5 if change == "data" else 2, dtype=torch.float64)
            return super().forward(x)

    model = Replacing(3, 3, 1)
    model.register_buffer("own", torch.tensor([3.0, 4.0]))
    before, address = model.own, model.own.data_ptr()
    FGSM(model)(IMAGES, LABELS)
    assert model.own is before
    assert (model.own.tolist(), model.own.dtype) == ([3.0, 4.0], torch.float32)
    assert change == "resize" or model.own.data_ptr() == address


def test_statistics_that_a_norm_layer_writes_in_eval_mode_are_restored() -> None:
    class Adapting(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Adapting(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FGSM(model)(IMAGES, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bn", ["eval", "train"])
@pytest.mark.parametrize("how", ["writes", "trains"])
def test_statistics_that_a_model_writes_into_its_norm_layers_are_restored(how: str, bn: str) -> None:
    class Adapting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.variances = [self.norm.running_var]

        def forward(self, x: Tensor) -> Tensor:
            if how == "writes":
                self.variances[0].mul_(2)
            return nn.functional.relu(self.norm.train(how == "trains")(self.conv(x)))

    model = Adapting()
    before = state(model)
    run("fgsm", model, IMAGES, LABELS, bn=bn)
    assert_same(before, state(model))


def test_statistics_that_are_no_buffers_are_a_models_own() -> None:
    """Such a layer only looks like PyTorch's, which keep theirs in buffers."""

    class Norm(nn.Module):
        def __init__(self, **attributes: Any) -> None:
            super().__init__()
            self.track_running_stats = True
            vars(self).update(attributes)

        def forward(self, x: Tensor) -> Tensor:
            return x - vars(self).get("running_mean", 0)

    for attributes in ({"running_mean": torch.full((3, 1, 1), 0.5)}, {}):
        norm = Norm(**attributes)
        before = dict(vars(norm))
        FGSM(nn.Sequential(norm, nn.Conv2d(3, 3, 1)), bn="train")(IMAGES, LABELS)
        assert vars(norm) == before


@pytest.mark.parametrize(("own", "side", "align_corners"), [(1, 320, False), (3, 528, True)])
def test_a_logit_of_more_pixels_than_float16_can_count(own: int, side: int, align_corners: bool) -> None:
    class Coarse(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.adaptive_avg_pool2d(x, own)).half()

    torch.manual_seed(0)
    model, images = Coarse(3, 3, 1), torch.rand(1, 3, side, side)
    labels = torch.zeros(1, side, side, dtype=torch.uint8)
    adversarial, info = FastNewton(model, align_corners=align_corners)(images, labels, return_info=True)
    assert info.grad_norm.item() > 0
    torch.testing.assert_close(info.eps, info.gain / info.grad_norm)
    assert not torch.equal(adversarial, images)


def test_a_buffer_that_a_forward_pass_registers_is_removed() -> None:
    class Registers(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("seen", x.detach())
            return super().forward(x)

    model = Registers(3, 3, 1)
    FGSM(model)(IMAGES, LABELS)
    assert not list(model.buffers())


def test_a_module_that_watches_its_attributes_sees_its_training_flag_change() -> None:
    seen: list[bool] = []

    class Watching(nn.Conv2d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training":
                seen.append(value)
            super().__setattr__(name, value)

    model = Watching(3, 3, 1)
    seen.clear()
    FGSM(model)(IMAGES, LABELS)
    assert seen == [False, True]


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_buffers_of_a_script_module_are_restored(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = torch.jit.script(network) if kind == "script" else torch.jit.trace(network, IMAGES)  # always trains
    before = {key: value for key, value in state(model).items() if key in ("values", "training")}
    FGSM(model)(IMAGES, LABELS)
    assert_same(before, state(model))
    if kind == "script":
        with pytest.raises(ValueError, match=r'bn must be "eval" with a ScriptModule, .*, got "train"'):
            FGSM(model, bn="train")(IMAGES, LABELS)
        assert_same(before, state(model))


def test_a_buffer_that_a_script_module_sets_anew_is_restored() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.detach().sum()
            return self.conv(x)

    model = torch.jit.script(Remembers())
    FGSM(model)(IMAGES, LABELS)
    assert model.seen == 0


def test_a_buffer_that_a_pending_backward_needs_stays_valid() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("scale", torch.full((3, 1, 1), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.scale

    model = Scaled()
    pending = model(IMAGES).sum()
    FGSM(model)(IMAGES, LABELS)
    pending.backward()
    assert model.conv.weight.grad is not None


@pytest.mark.parametrize("kind", [NFGSM, PGD])
def test_an_ignore_index_that_the_labels_type_cannot_hold_is_no_label(kind: type[NFGSM] | type[PGD]) -> None:
    attack = kind(nn.Conv2d(3, 200, 1), ignore_index=-100)
    found = []
    for dtype in (torch.uint8, torch.int64):
        torch.manual_seed(0)
        found.append(attack(IMAGES, torch.full(LABELS.shape, 156, dtype=dtype)))  # -100 modulo 256
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [NFGSM, PGD])
@pytest.mark.parametrize("ignore_index", [0, 255])
def test_the_least_and_the_largest_label_of_a_type_can_be_ignored(kind: Any, ignore_index: int) -> None:
    labels = torch.full(LABELS.shape, ignore_index, dtype=torch.uint8)
    labels[1] = 1
    adversarial = kind(nn.Conv2d(3, 3, 1), ignore_index=ignore_index)(IMAGES, labels)
    assert torch.equal(adversarial[0], IMAGES[0])
    assert not torch.equal(adversarial[1], IMAGES[1])


@pytest.mark.parametrize("kind", [FGSM, NFGSM, BIM, PGD, FastNewton])
def test_an_empty_batch_is_judged_and_attacked(kind: Any) -> None:
    attack = kind(nn.Conv2d(3, 3, 1))
    images, labels = IMAGES[:0], LABELS[:0]
    assert attack(images, labels).shape == images.shape
    if isinstance(attack, BIM):
        assert attack.outcomes(images, labels, [1, 10]).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0)])
@pytest.mark.parametrize("check", ["0", "1"])
def test_images_clearly_outside_their_bounds_are_refused(
    check: str, bounds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised ones, say, of which most would be clipped. What a cubic kernel adds is let through, and clipped."""
    monkeypatch.setenv("SEGADV_CHECK", check)
    attack = FGSM(nn.Conv2d(3, 3, 1), bounds=bounds)
    width = bounds[1] - bounds[0]
    for factor, fits in ((0, True), (0.09, True), (0.11, False), (math.nan, False)):
        for value in (bounds[0] - factor * width, bounds[1] + factor * width):
            images = IMAGES.clone()
            images[1, 1, 1, 1] = value
            if fits:
                low, high = attack(images, LABELS).aminmax()
                assert bounds[0] <= low <= high <= bounds[1]
                continue
            message = r"pixels must be in \[.*, found .*segadv.models.wrap"
            if math.isnan(value):
                message = r"a pixel is NaN, the first one at \[1, 1, 1, 1\]"
            with pytest.raises(ValueError, match=f"images: {message}"):
                attack(images, LABELS)


def test_images_on_a_gpu_are_looked_at_in_the_first_call_with_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that can wait. A stand-in for the images; on a GPU, tests/test_gpu.py."""
    look = segadv.attacks.base._looks_at
    state = {"is_current_stream_capturing": False, "get_sync_debug_mode": 0}
    for name in state:
        monkeypatch.setattr(torch.cuda, name, lambda name=name: state[name])
    monkeypatch.delenv("SEGADV_CHECK", raising=False)
    images: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    model, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="pixels must be in"):
        FGSM(model)(IMAGES + 2, LABELS)
    assert look(images, model)
    for name, value in (("is_current_stream_capturing", True), ("get_sync_debug_mode", 2)):
        with monkeypatch.context() as patch:
            patch.setitem(state, name, value)
            assert not look(images, model)
    FGSM(model)(IMAGES, LABELS)
    assert not look(images, model)
    assert look(images, other)
    assert look(IMAGES, model)
    monkeypatch.setenv("SEGADV_CHECK", "1")
    assert look(images, model)


@pytest.mark.parametrize(
    ("kind", "name", "value", "error"),
    [
        (BIM, "steps", 0, ValueError),
        (BIM, "steps", 2.5, TypeError),
        (PGD, "restarts", 0, ValueError),
        (FGSM, "eps", 8, ValueError),
        (FGSM, "bn", "foo", ValueError),
        (FGSM, "ignore_index", None, TypeError),
        (FastNewton, "max_eps", 8.0, ValueError),
        (NFGSM, "noise", -1.0, ValueError),
        (CheckpointFGSM, "checkpoints", 0, ValueError),
        (FGSM, "bounds", (0.5, 0.5), ValueError),
    ],
)
def test_arguments_set_later_are_checked_in_the_call(kind: Any, name: str, value: Any, error: type[Exception]) -> None:
    attack = kind(nn.Conv2d(3, 3, 1))
    attack(IMAGES, LABELS)
    setattr(attack, name, value)
    with pytest.raises(error, match=name):
        attack(IMAGES, LABELS)


def test_float64_images_for_a_float32_model_are_named() -> None:
    for layer in (nn.Conv2d(3, 3, 1), nn.Linear(4, 4)):  # one speaks of double, the other of Double
        with pytest.raises(ValueError, match=r"images must be of a dtype that the model takes, got float64; images.fl"):
            FGSM(layer)(IMAGES.double(), LABELS)

    class Mixed(nn.Conv2d):  # then it is not the images' precision, and others would not help
        def forward(self, images: Tensor) -> Tensor:
            return F.conv2d(images, self.weight.float())

    with pytest.raises(RuntimeError, match="scalar type Double"):
        FGSM(Mixed(3, 3, 1).double())(IMAGES.double(), LABELS)

    class Double(nn.Conv2d):  # nor where they are in float32 already
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.double())

    with pytest.raises(RuntimeError, match="double"):
        FGSM(Double(3, 3, 1))(IMAGES, LABELS)

    class Converting(nn.Conv2d):  # nor with an error of another kind
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float())

    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
        FGSM(Converting(4, 3, 1))(IMAGES.double(), LABELS)


def test_a_model_without_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet; show the model a batch"):
        FGSM(nn.Sequential(nn.LazyConv2d(3, 1)))(IMAGES, LABELS)


@pytest.mark.parametrize("kind", [FGSM, NFGSM, PGD])
def test_labels_that_do_not_fit_are_refused_before_the_model_runs(kind: Any) -> None:
    model = nn.Conv2d(3, 3, 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"labels must be \[N, H, W\], got \[2, 1, 4, 4\]; labels\.squeeze\(1\) con"):
        kind(model)(IMAGES, LABELS[:, None])
    with pytest.raises(ValueError, match=r"labels must have one of the dtypes .*, got float32; labels\.long\(\) conv"):
        kind(model)(IMAGES, LABELS.float())


def test_alphas_that_do_not_fit_are_refused_before_the_model_runs() -> None:
    model = nn.Conv2d(3, 3, 1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"alpha must be a number or a floating point \[2\] on cpu, got float32 \[3\]"):
        BIM(model, alpha=torch.zeros(3))(IMAGES, LABELS)


def test_logits_without_a_batch_are_named_as_the_models() -> None:
    with pytest.raises(ValueError, match=r"model: it returned float32 \[3\] for images \[3, 1\]; floating"):
        FGSM(nn.Flatten(0))(torch.rand(3, 1), torch.zeros(3, dtype=torch.int64))


def test_a_model_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"'weight' was made under torch\.inference_mode"):
        FGSM(model)(IMAGES, LABELS)


# --- distributed --------------------------------------------------------------------------------------------


def _distributed(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    torch.manual_seed(0)
    net = Net(dropout=0.0)
    model = DistributedDataParallel(net)
    buckets: list[int] = []

    def all_reduce(_, bucket):  # type: ignore[no-untyped-def]  # DDP wants no string annotations
        buckets.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda future: future.value()[0] / 2)

    model.register_comm_hook(None, all_reduce)
    torch.manual_seed(rank)
    images, labels = sample()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = {"eps": EPS, "alpha": 0.01, "steps": 3}
    for attack in (FastNewton(model), BIM(model, **budget, best=True), SegPGD(model, **budget, restarts=2)):
        # Only one process attacks: any collective in it would meet none on the other side.
        adversarial = attack(images, labels) if rank == 0 else images
        assert not buckets
        optimizer.zero_grad()
        functional.cross_entropy(model(adversarial), labels).backward()
        optimizer.step()
        assert len(buckets) == 1
        buckets.clear()
        if rank == 0:
            assert not torch.equal(adversarial, images)
            assert not torch.equal(adversarial, attack(images, labels))  # the weights have moved
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = [torch.empty_like(flat), torch.empty_like(flat)]
    dist.all_gather(both, flat)
    assert torch.equal(both[0], both[1])
    outer = nn.Sequential(model)
    with pytest.raises(ValueError, match="'0' is a DistributedDataParallel"), frozen(outer):
        pass
    assert unwrapped(torch.compile(model, backend="eager")) is net

    # fully_shard gathers the weights in every pass: all processes attack
    torch.manual_seed(0)
    plain = Net(dtype=torch.float32, dropout=0)
    sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (2,)))
    torch.manual_seed(rank)
    images, labels = sample(dtype=torch.float32)
    rows, *found = (
        evaluate(model, [(images, labels)], ["fgsm"], eps=(0.0, 0.03), sharded=True).rows
        for model in (plain, sharded, sharded)  # whose weights lie in parts at first, and then as a pass left them
    )
    assert found == [rows, rows]
    adversarial, expected = (SegPGD(model, **budget, random_start=False)(images, labels) for model in (sharded, plain))
    assert torch.equal(adversarial, expected)
    functional.cross_entropy(sharded(adversarial), labels).backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())
    with pytest.raises(ValueError, match="fully_shard"):
        FGSM(FullyShardedDataParallel(Net(dtype=torch.float32), device_id=torch.device("cpu")))(images, labels)
    dist.barrier()
    os._exit(0)  # a thread of gloo that wants the interpreter while that ends would abort the process


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_attacks_go_around_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_distributed, (str(tmp_path / "store"),), nprocs=2)


def _sharded(rank: int, store: str) -> None:
    """Whatever is a model's first pass, and whatever its last before the training's, that has the same gradients."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(rank)
    images, labels = sample(dtype=torch.float32)

    def attacked(attack: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
        return lambda model: attack(model)(images, labels)

    uses = [
        attacked(FGSM),
        attacked(CheckpointFGSM),
        attacked(partial(BIM, steps=2, best=True)),
        attacked(partial(SegPGD, steps=2, restarts=2)),
        lambda model: evaluate(model, [(images, labels)], ["fgsm"], eps=(0.0, 0.03), sharded=True),
    ]
    policies: list[dict[str, Any]] = [
        {},
        {"reshard_after_forward": False},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ]
    for policy, weights in [*((policy, torch.float32) for policy in policies), (policies[-1], torch.bfloat16)]:

        def gradients(use: Callable[[nn.Module], None] | None, policy=policy, weights=weights) -> list[Tensor]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 5, 1)).to(weights)
            for part in (model[0], model[3], model):  # the last one has the norm layer's
                fully_shard(part, mesh=mesh, **policy)
            if use is not None:
                use(model)
            assert all(parameter.requires_grad for parameter in model.parameters())
            functional.cross_entropy(model(images), labels).backward()
            return [parameter.grad.full_tensor() for parameter in model.parameters()]

        expected = gradients(None)
        for use in uses:
            assert all(map(torch.equal, gradients(use), expected))
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_attacks_leave_no_trace_in_fully_sharded_models(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, (str(tmp_path / "store"),), nprocs=2)
