"""Evaluation: the metric against torchmetrics, the work it takes, and its files."""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import enum
import functools
import itertools
import json
import math
import operator
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_attacks import StaticMemory
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from segadv import backend, evaluation, functional, records, results, writing
from segadv.attacks import BIM, FGSM, PGD, Attack, CosPGD, FastNewton, SegPGD
from segadv.evaluation import EvaluationResult, Measurement, class_iou, evaluate, miou, pixel_accuracy
from segadv.models import small_pspnet, wrap

CLASSES = 19


class Counts:
    forwards = backwards = 0


class Counting(nn.Module):
    """A small network that counts its forward passes and those of them that were differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(CLASSES)
        self.counts = Counts()  # numbers among its own attributes would make it another model after each pass

    forwards = property(lambda self: self.counts.forwards, lambda self, value: setattr(self.counts, "forwards", value))
    backwards = property(lambda self: self.counts.backwards, lambda self, v: setattr(self.counts, "backwards", v))

    def forward(self, images: Tensor) -> Tensor:
        self.counts.forwards += 1
        logits: Tensor = self.dropout(self.norm(self.conv(images)))
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.counts.backwards += 1


@pytest.fixture
def model() -> Counting:
    torch.manual_seed(0)
    return Counting()


@pytest.fixture
def loader(model: Counting) -> list[tuple[Tensor, Tensor]]:
    """Batches of unequal size and difficulty, with ignored pixels and classes that no label has."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for count, noise, highest in ((3, 0.1, 17), (1, 0.9, 3), (2, 0.4, 12)):
        images = torch.rand(count, 3, 12, 16, generator=generator)
        with torch.no_grad():
            labels = model.eval()(images).argmax(1).byte()
        random = torch.randint(0, highest, labels.shape, generator=generator, dtype=torch.uint8)
        labels = torch.where(torch.rand(labels.shape, generator=generator) < noise, random, labels)
        labels[(labels >= highest) | (torch.rand(labels.shape, generator=generator) < 0.2)] = 255
        batches.append((images, labels))
    model.forwards = 0
    return batches


def test_hand_examples() -> None:
    # class 2 occurs nowhere, class 3 only as a prediction
    confusion = torch.tensor([[3, 1, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = class_iou(confusion)
    assert iou.dtype == torch.float64
    assert iou[[0, 1, 3]].tolist() == pytest.approx([3 / 4, 2 / 5, 0.0], rel=1e-15)
    assert iou[2].isnan()
    assert miou(confusion) == pytest.approx((3 / 4 + 2 / 5) / 3, rel=1e-15)
    assert pixel_accuracy(confusion) == 5 / 8
    assert miou(torch.eye(3, dtype=torch.int64)) == pixel_accuracy(torch.eye(3, dtype=torch.int64)) == 1.0
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    assert miou(nothing) == pixel_accuracy(nothing) == 0.0


def test_counts_beyond_float32_are_exact() -> None:
    large = 2**24 + 1
    assert class_iou(torch.tensor([[large, 0], [0, 1]])).tolist() == [1.0, 1.0]
    assert class_iou(torch.tensor([[large, 1], [0, 1]]))[0].item() == large / (large + 1)


def test_agrees_with_torchmetrics_over_the_pooled_set(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, ["fgsm"], [0.0, 0.02])
    model.eval()
    attack = FGSM(model, eps=0.02)
    for row, confusion, perturb in zip(
        result.rows, result.confusion, (lambda images, labels: images, attack), strict=True
    ):
        jaccard = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255)
        accuracy = MulticlassAccuracy(CLASSES, average="micro", ignore_index=255)
        single = []
        with torch.no_grad():
            for images, labels in loader:
                prediction = model(perturb(images, labels)).argmax(1)
                jaccard.update(prediction, labels.long())
                accuracy.update(prediction, labels.long())
                single.append(MulticlassJaccardIndex(CLASSES, ignore_index=255)(prediction, labels.long()).item())
        expected = jaccard.compute()
        present = ~class_iou(confusion).isnan()
        torch.testing.assert_close(class_iou(confusion)[present].float(), expected[present])
        assert row["miou"] == pytest.approx(expected[present].mean().item(), abs=1e-6)
        assert row["pixel_accuracy"] == pytest.approx(accuracy.compute().item(), abs=1e-6)
        assert row["miou"] != pytest.approx(sum(single) / len(single), abs=1e-3), "a mean over batches"


def test_low_resolution_logits_are_resampled() -> None:
    torch.manual_seed(0)
    network = small_pspnet()
    images = torch.rand(2, 3, 40, 64)
    labels = torch.randint(0, CLASSES, (2, 40, 64))
    result = evaluate(network, [(images, labels)], ["fgsm"], [0.0])
    with torch.no_grad():
        logits = network.eval()(images)
    full = nn.functional.interpolate(logits, size=(40, 64), mode="bilinear", align_corners=False)
    assert result.rows[0]["pixel_accuracy"] == pytest.approx(
        (full.argmax(1) == labels).double().mean().item(), abs=2e-3
    )


@pytest.mark.parametrize("name", evaluation.ATTACKS)
def test_ignore_index_and_align_corners_reach_the_attacks(
    name: str, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    model.conv.stride = (2, 2)
    model, loader = model.double(), in_double(loader)
    expected = evaluate(oracle.Resampled(model), loader, [name], [0.0, 0.02], steps=4)
    other = [(images, labels.where(labels != 255, 200)) for images, labels in loader]
    result = evaluate(model, other, [name], [0.0, 0.02], steps=4, ignore_index=200, align_corners=True)
    assert all(torch.equal(one, two) for one, two in zip(result.confusion, expected.confusion, strict=True))
    assert all(a["ignore_index"] == 200 and a["align_corners"] for a in result.run["attacks"][name])


def test_a_model_whose_next_pass_writes_over_its_outputs(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    measure = partial(evaluate, loader=loader, attacks=list(evaluation.ATTACKS), eps=(0, 0.02, 0.04), steps=3)
    expected, got = measure(model), measure(StaticMemory(model))
    assert len(expected.confusion) == len(got.confusion) > 1
    assert all(torch.equal(one, other) for one, other in zip(got.confusion, expected.confusion, strict=True))


def test_fgsm_takes_one_gradient_for_all_eps_and_clean_is_shared(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    batches = len(loader)
    evaluate(model, loader, ["fgsm"], [0, 0.01, 0.02, 0.03, 0.04])
    assert model.backwards == batches
    assert model.forwards == batches * 5  # the gradient's, which is the clean prediction, and four adversarial

    model.forwards = model.backwards = 0
    result = evaluate(model, loader, ["fgsm", "bim-10"], [0, 0.01, 0.02, 0.03, 0.04])
    assert model.backwards == batches * (1 + 10)  # the four eps in one batch
    assert model.forwards == batches * (5 + 11)
    assert result.rows[0] == {**result.rows[5], "attack": "fgsm"}

    model.forwards = model.backwards = 0
    evaluate(model, loader, ["fgsm"], [0.01, 0.02])  # without the clean images in the curve
    assert (model.forwards, model.backwards) == (batches * 3, batches)


def test_shared_gradient_is_fgsm(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    eps = [0.03, 0.0, 0.005]
    shared = evaluate(model, loader, ["fgsm"], eps)
    single = evaluate(model, loader, {"fgsm": lambda network, value: FGSM(network, eps=value)}, eps)
    assert shared.rows == single.rows
    assert shared.rows[0]["pixel_accuracy"] < shared.rows[1]["pixel_accuracy"]


def test_bim_10_is_the_papers(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    eps = [0.01, 0.04]
    result = evaluate(model, loader, ["bim-10"], eps)
    for row, confusion, value in zip(result.rows, result.confusion, eps, strict=True):
        attack = BIM(model, eps=value, alpha=0.004, steps=10)
        expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
        for images, labels in loader:
            adversarial = attack(images, labels)
            with torch.no_grad():
                prediction = model.eval()(adversarial).argmax(1)
            valid = labels != 255
            expected.index_put_((labels[valid].long(), prediction[valid]), torch.tensor(1), accumulate=True)
        assert torch.equal(confusion, expected)
        assert row["eps"] == value
    assert [entry.steps for entry in result.measurements] == [10, 10]


def test_rows_are_in_the_given_order_and_repeatable(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, ["bim-10", "fgsm"], [0.02, 0.0, 0.01])
    assert [(row["attack"], row["eps"]) for row in result.rows] == [
        (attack, eps) for attack in ("bim-10", "fgsm", "worst-case", "worst-case-miou") for eps in (0.02, 0.0, 0.01)
    ]
    assert list(result.rows[0]) == ["attack", "eps", "miou", "pixel_accuracy"]
    assert evaluate(model, loader, ["bim-10", "fgsm"], [0.02, 0.0, 0.01]).rows == result.rows


def test_model_is_left_as_it_was(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    model.train()
    model.dropout.eval()
    model.conv.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, loader, eps=[0.0, 0.01])
    assert (model.training, model.dropout.training, model.norm.training) == (True, False, True)
    assert [parameter.requires_grad for parameter in model.conv.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_factories_get_the_model_and_eps(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    made = []

    def factory(network: nn.Module, eps: float):
        made.append((network, eps))
        return lambda images, labels: (images + eps * labels.eq(0).unsqueeze(1)).clamp(0, 1)

    result = evaluate(model, loader, {"own": factory}, [0.0, 0.5])
    assert made == [(model, 0.5)]
    assert [row["attack"] for row in result.rows] == ["own", "own"]
    assert result.rows[0]["miou"] != result.rows[1]["miou"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": ["fgms"]}, r"attacks must be names out of fgsm, bim-10.*\['fgms'\], did you mean 'fgsm'\?"),
        ({"attacks": []}, "attacks must name at least one"),
        ({"eps": []}, "eps must be numbers in"),
        ({"eps": [8.0]}, r"8/255, not 8.*\[8.0\]"),
        ({"eps": [0.1, 8.0]}, r"8/255, not 8.*\[0.1, 8.0\]"),
        ({"eps": [-0.1]}, "eps must be numbers in"),
        ({"eps": [math.nan]}, "eps must be numbers in"),
        ({"eps": [0.1, 0.1]}, "eps must not repeat"),
        ({"loader": []}, "loader gave no batch"),
        (
            {"loader": [(torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), 255))], "eps": [0.0]},
            "loader gave no pixel whose label is other than ignore_index=255",
        ),
        (
            {"loader": [(torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), 19))], "eps": [0.0]},
            "19",
        ),
        ({"loader": [(torch.rand(2, 3, 8, 8), torch.zeros(8, 8))]}, r"same N as images \[2, 3, 8, 8\], got \[8, 8\]"),
        ({"loader": [(torch.rand(3, 8, 8), torch.zeros(8, 8))]}, r"same N as images \[3, 8, 8\], got \[8, 8\]"),
        ({"loader": [(torch.rand(2, 3, 8, 8), torch.tensor(1))]}, r"same N as images \[2, 3, 8, 8\], got \[\]"),
        ({"loader": [(torch.tensor(1.0), torch.ones(1))]}, r"same N as images \[\], got \[1\]"),
    ],
)
def test_bad_arguments(model: Counting, loader: list[tuple[Tensor, Tensor]], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, **{"loader": loader, **arguments})


def test_attacks_and_eps_of_other_types(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    for given in ([FGSM(model)], [FGSM(model), "fgsm"]):
        with pytest.raises(TypeError, match=r"attacks must be names, or a mapping .*, got \[FGSM"):
            evaluate(model, loader, given, [0.1])  # type: ignore[arg-type]
    expected = evaluate(model, loader, "fgsm", [0.0, 0.25]).rows
    assert evaluate(model, loader, "fgsm", torch.tensor([0.0, 0.25])).rows == expected  # type: ignore[arg-type]
    assert evaluate(model, loader, "fgsm", np.array([0.0, 0.25], np.float32)).rows == expected  # type: ignore[arg-type]


def test_invalid_labels_that_a_gpu_only_counts_raise_after_the_first_attack(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = functional.confusion_matrix

    def counting(*args, **kwargs):
        matrix = genuine(*args, **kwargs)
        matrix.invalid = torch.tensor(2)
        return matrix

    monkeypatch.setattr(functional, "confusion_matrix", counting)
    with pytest.raises(ValueError, match="2 pixels are neither"):
        evaluate(model, loader, eps=[0.0])
    assert model.forwards == 1


def test_files(tmp_path, model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, eps=[0.0, 0.02])
    result.to_csv(tmp_path / "single.csv")
    assert (tmp_path / "single.csv").read_text().splitlines()[0] == "attack,eps,miou,pixel_accuracy"

    result.to_json(tmp_path / "result.json")
    back = EvaluationResult.from_json(tmp_path / "result.json")
    assert back.rows == result.rows
    assert all(map(torch.equal, back.confusion, result.confusion))
    assert [entry.row for entry in back.measurements] == [entry.row for entry in result.measurements]

    merged = EvaluationResult.merge({"basic": result, "fast-newton": back})
    merged.to_csv(tmp_path / "curves.csv")
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["arm", "attack", "eps", "miou", "pixel_accuracy"]
    assert [row["arm"] for row in rows] == ["basic"] * 8 + ["fast-newton"] * 8
    assert [float(row["miou"]) for row in rows] == [row["miou"] for row in merged.rows]
    assert len(merged.confusion) == 16


@pytest.mark.parametrize("method", ["to_csv", "to_details_csv", "to_json"])
def test_a_full_disk_leaves_the_previous_result(
    method: str, tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, path = evaluate(model, loader, ["fgsm"], [0.0]), tmp_path / "result"
    getattr(result, method)(path)
    before = path.read_bytes()

    def full(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"could not be written: No space left on device; free some space there$"):
        getattr(result, method)(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["curves.csv", "curves"])
def test_interrupted_write_leaves_the_previous_file(name: str, tmp_path) -> None:
    path = tmp_path / name
    path.write_text("previous")

    def write_half() -> None:
        with writing.atomic_write(path) as temporary:
            temporary.write_text("hal")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "previous"

    with path.open() as reader:
        with writing.atomic_write(path) as temporary:
            temporary.write_text("whole")
            assert f".{os.getpid()}.{threading.get_ident()}." in temporary.name, "that of another writer, too"
            assert writing.is_leftover(temporary)
            assert not writing.is_leftover(temporary.with_name(temporary.name[1:]))
        assert reader.read() == "previous", "written in place"
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_plots_are_drawn(tmp_path, model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    result = evaluate(model, loader, eps=[0.0, 0.02])
    for name, drawn in (("one", result), ("two", EvaluationResult.merge({"basic": result, "mine": result}))):
        drawn.plot(tmp_path / f"{name}.png")
        with image_module.open(tmp_path / f"{name}.png") as image:
            assert image.width >= 800
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


# --- worst case, steps, shared work -------------------------------------------------------------------------

STRONG = {
    "bim": BIM, "pgd": PGD, "segpgd": SegPGD, "cospgd": CosPGD, "cospgd-balanced": partial(CosPGD, balanced=True),
}  # fmt: skip


def plain_confusion(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        prediction = model.eval()(image[None])[0].argmax(0)
    valid = label != 255
    return torch.bincount(label[valid].long() * CLASSES + prediction[valid], minlength=CLASSES**2).view(CLASSES, -1)


def without_each(matrices: list[Tensor]) -> list[float]:
    """mIoU of all images but one."""
    return [plain_miou(torch.stack(matrices[:i] + matrices[i + 1 :]).sum(0)) for i in range(len(matrices))]


def jackknife(values: Any) -> float:
    deviations = values - values.mean()
    return float(math.sqrt((len(values) - 1) / len(values) * (deviations**2).sum()))


def plain_miou(confusion: Tensor) -> float:
    values = []
    for c in range(len(confusion)):
        union = confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]
        if union:
            values.append((confusion[c, c].double() / union).item())
    return sum(values) / len(values)


def in_double(loader: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(images.double(), labels) for images, labels in loader]


def test_worst_case_takes_each_image_from_its_worst_attack(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """Two attacks, each of which leaves some images as they are."""

    def on(parity: int):
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            some = (images.mean((1, 2, 3)) * 1e4).long() % 2 == parity
            return torch.where(some.view(-1, 1, 1, 1), 1 - images, images)

        return lambda network, eps: attack

    result = evaluate(model, loader, {"even": on(0), "odd": on(1)}, [0.5])
    expected, mious = {"even": [], "odd": [], "worst-case": [], "worst-case-miou": []}, {}
    for images, labels in loader:
        for image, label in zip(images, labels, strict=True):
            outcomes = [
                plain_confusion(model, on(parity)(model, 0.5)(image[None], label)[0], label) for parity in (0, 1)
            ]
            wrong = [(matrix.sum() - matrix.trace()).item() for matrix in outcomes]
            chosen = outcomes[int(np.argmax(wrong))], min(outcomes, key=plain_miou)
            for name, matrix in zip(expected, [*outcomes, *chosen], strict=True):
                expected[name].append(matrix)
    assert [entry.attack for entry in result.measurements] == list(expected)
    for entry in result.measurements:
        assert torch.equal(entry.confusion, torch.stack(expected[entry.attack]).sum(0))
        mious[entry.attack] = sum(map(plain_miou, expected[entry.attack])) / len(expected[entry.attack])
        assert entry.image_miou == pytest.approx(mious[entry.attack], rel=1e-12)
        assert entry.miou_of_each.tolist() == pytest.approx([plain_miou(matrix) for matrix in expected[entry.attack]])
    without = {name: without_each(matrices) for name, matrices in expected.items()}
    for entry in result.measurements:
        assert entry.without_each.tolist() == pytest.approx(without[entry.attack], rel=1e-12)
        assert entry.row["miou_error"] == pytest.approx(jackknife(np.array(without[entry.attack])), rel=1e-9)
    even, odd, worst, worst_by_miou = result.measurements
    difference, error = results.miou_difference(even, odd)
    assert difference == pytest.approx(even.row["miou"] - odd.row["miou"], rel=1e-12)
    assert error == pytest.approx(jackknife(np.subtract(without["even"], without["odd"])), rel=1e-9)
    assert results.miou_difference(worst, worst) == (0, 0)
    accuracy = {row["attack"]: row["pixel_accuracy"] for row in result.rows}
    assert accuracy["worst-case"] < min(accuracy["even"], accuracy["odd"])
    assert worst_by_miou.image_miou < min(even.image_miou, odd.image_miou)
    assert {e.attack for e in evaluate(model, loader, ["fgsm"], [0.1]).measurements} == {"fgsm"}
    two = evaluate(model, loader, ["fgsm", "bim-10"], [0.04], worst_case=False)
    assert [row["attack"] for row in two.rows] == ["fgsm", "bim-10"]
    on_the_way = evaluate(model, loader, ["bim", "fgsm"], [0.04], steps=4)
    steps = [(entry.attack, entry.steps) for entry in on_the_way.measurements]
    assert steps == [("bim", 3), ("bim", 4), ("fgsm", 1), ("worst-case", 4), ("worst-case-miou", 4)]


def test_an_image_without_a_label_counts_in_no_mean(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    images, labels = loader[0]
    void = torch.full_like(labels[:1], 255)
    with_void = [(torch.cat([images, images[:1]]), torch.cat([labels, void]))]
    names = {"attacks": ["fgsm", "pgd"], "eps": [0.0, 0.02], "steps": 3}
    plain, other = evaluate(model, loader[:1], **names), evaluate(model, with_void, **names)
    assert [entry.image_miou for entry in plain.measurements][:2] == [e.image_miou for e in other.measurements][:2]
    assert all(math.isfinite(entry.image_miou) for entry in other.measurements)
    for entry, same in zip(other.measurements[:2], plain.measurements, strict=False):
        assert torch.equal(entry.without_each, same.without_each)
    (one,) = evaluate(
        model, [(images[:1], labels[:1]), (images[:2], torch.cat([void, void]))], "fgsm", [0.0]
    ).measurements
    assert one.without_each.tolist() == pytest.approx([0], abs=1e-15)
    assert one.row["miou_error"] is None
    with pytest.raises(ValueError, match="first and second must be of the same images, got 3 and 1 of them"):
        results.miou_difference(plain.measurements[0], one)
    (others,) = evaluate(model, [(images, labels.clamp(min=1))], "fgsm", [0.0]).measurements
    with pytest.raises(ValueError, match="first and second must be of the same images, got ones with other labels"):
        results.miou_difference(plain.measurements[0], others)


@pytest.mark.parametrize("seed", range(40))
def test_the_miou_without_each_image_is_that_of_the_others(seed: int) -> None:
    """Few counts, so that many a class is in one image only, or in none."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (7, 12, 12), generator=generator)
    counts *= torch.rand(counts.shape, generator=generator) < 0.1 * torch.rand(7, 1, 1, generator=generator)
    tally = evaluation._Tally()
    for batch in counts.split([3, 1, 3]):
        tally.add("fgsm", 0.1, 1, batch)
    labelled = [matrix for matrix in counts if matrix.any()]
    if labelled:
        entry = tally.measurement("fgsm", ("fgsm", 0.1, 1))
        assert entry.without_each.tolist() == pytest.approx(without_each(labelled) if labelled[1:] else [0], abs=1e-14)
        assert entry.image_miou == pytest.approx(sum(map(plain_miou, labelled)) / len(labelled), abs=1e-14)


def test_the_error_of_a_mean_is_that_of_a_mean() -> None:
    """Where the labels hold one class and are as many in all images, mIoU is half the mean share of right pixels."""
    right = [3, 7, 8, 2, 9]
    labels = torch.zeros(5, 1, 10, dtype=torch.int64)
    predicted = torch.stack([(torch.arange(10) >= count).long() for count in right]).view(5, 1, 10)
    images = nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    loader = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    for count, batches in ((5, loader), (2, loader[:1])):
        (entry,) = evaluate(nn.Identity(), batches, ["fgsm"], [0.0]).measurements
        assert entry.row["miou"] == pytest.approx(np.mean(right[:count]) / 20, rel=1e-12)
        error = np.std(right[:count], ddof=1) / math.sqrt(count) / 20
        assert entry.row["miou_error"] == pytest.approx(error, rel=1e-12)
    (one,) = evaluate(nn.Identity(), [(images[:1], labels[:1])], ["fgsm"], [0.0]).measurements
    assert one.row["miou_error"] is None
    assert results.miou_difference(one, one) == (0, None)


def test_every_image_with_a_label_counts_in_the_mean() -> None:
    """By hand: the images are the logits. One is right everywhere, one has a single labelled pixel, one no label."""
    predicted = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]], [[2, 1, 1, 2]], [[0, 0, 0, 0]]])
    labels = torch.tensor([[[0, 1, 1, 2]], [[255, 1, 255, 255]], [[2, 2, 1, 1]], [[255] * 4]])
    images = nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    (entry,) = evaluate(nn.Identity(), [(images, labels)], ["fgsm"], [0.0]).measurements
    assert entry.image_miou == pytest.approx((1 + 0 + 1 / 3) / 3, rel=1e-15)
    assert entry.confusion.tolist() == [[1, 0, 0], [1, 3, 1], [0, 1, 2]]


def test_a_model_that_is_wrong_everywhere_is_evaluated() -> None:
    images = torch.eye(3)[:2].T.view(1, 3, 1, 2)
    (row,) = evaluate(nn.Identity(), [(images, torch.tensor([[[1, 2]]]))], ["fgsm"], [0.0]).rows
    assert (row["miou"], row["pixel_accuracy"]) == (0, 0)


def test_the_worst_case_is_never_better_than_the_clean_image(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """It is in every ball."""

    def helpful(network: nn.Module, eps: float) -> Any:
        attack = FGSM(network, eps=eps, targeted=True)
        return lambda images, labels: attack(images, labels)

    result = evaluate(model, loader, {"helpful": helpful, "kind": helpful}, [0.0, 0.05])
    accuracy = {(row["attack"], row["eps"]): row["pixel_accuracy"] for row in result.rows}
    assert accuracy["helpful", 0.05] > accuracy["helpful", 0.0] >= accuracy["worst-case", 0.05]
    left = {(entry.attack, entry.eps): entry.miou_of_each for entry in result.measurements}
    assert (left["helpful", 0.0] < left["helpful", 0.05]).any()
    expected = torch.minimum(left["helpful", 0.0], left["helpful", 0.05])
    assert torch.equal(left["worst-case-miou", 0.05], expected)


@pytest.mark.parametrize("clean", [[0, 0], [0, 1]])
def test_of_equally_bad_attacks_the_first_is_the_worst_case(clean: list[int]) -> None:
    """Each turns one of two pixels, into another class; the clean image may be as bad."""
    labels = torch.zeros(1, 1, 2, dtype=torch.uint8)
    images = torch.eye(3)[clean].T.view(1, 3, 1, 2)

    def turning(into: int) -> Any:
        turned = torch.eye(3)[[0, into]].T.view(1, 3, 1, 2)
        return lambda model, eps: lambda images, labels: turned

    first, second, worst, worst_by_miou = evaluate(
        nn.Identity(), [(images, labels)], {"a": turning(2), "b": turning(1)}, [1.0]
    ).confusion
    assert torch.equal(worst, first)
    assert torch.equal(worst_by_miou, first)
    assert not torch.equal(worst, second)


def predicting(labels: Tensor, **outcomes: Tensor) -> dict[str, Measurement]:
    """What is measured of attacks, by name, after which these classes are predicted, of three."""

    def images_of(classes: Tensor) -> Tensor:
        return torch.eye(3)[classes.long() % 3].movedim(3, 1)

    def becoming(made: Tensor) -> Any:
        return lambda model, eps: lambda images, labels: made[: len(images)]

    attacks = {name: becoming(images_of(classes)) for name, classes in outcomes.items()}
    evaluated = evaluate(nn.Identity(), [(images_of(labels), labels)], attacks, [1.0])
    return {entry.attack: entry for entry in evaluated.measurements}


def test_the_worst_case_is_chosen_by_pixels_and_by_miou() -> None:
    """One attack turns more pixels, the other a whole class; the third image has no label, and counts nowhere."""
    labels = torch.zeros(3, 2, 4, dtype=torch.uint8)
    labels[:, 1, 3] = 1
    labels[2] = 255
    many, rare = labels.clone(), labels.clone()
    many[:2, 0, :2] = 1  # IoU 5/7 and 1/3
    rare[:2, 1, 3] = 0  # IoU 7/8 and 0
    entries = predicting(labels, many=many, rare=rare)
    assert torch.equal(entries["worst-case"].confusion, torch.tensor([[10, 4, 0], [0, 2, 0], [0, 0, 0]]))
    assert torch.equal(entries["worst-case-miou"].confusion, torch.tensor([[14, 0, 0], [2, 0, 0], [0, 0, 0]]))
    assert entries["worst-case"].miou_of_each.tolist() == pytest.approx([(5 / 7 + 1 / 3) / 2] * 2)
    assert entries["worst-case-miou"].miou_of_each.tolist() == pytest.approx([7 / 16] * 2)


def test_a_class_that_does_not_occur_counts_in_the_worst_case_where_it_is_predicted() -> None:
    labels = torch.zeros(1, 2, 4, dtype=torch.uint8)
    labels[:, 1, 3] = 1
    one, absent = labels.clone(), labels.clone()
    one[:, 0, 0] = 1  # IoU 6/7 and 1/2
    absent[:, 0, 0] = 2  # IoU 6/7, 1 and 0
    entries = predicting(labels, one=one, absent=absent)
    assert torch.equal(entries["worst-case-miou"].confusion, entries["absent"].confusion)
    assert entries["worst-case-miou"].miou_of_each.tolist() == pytest.approx([13 / 21])


@pytest.mark.parametrize("name", STRONG)
def test_steps_on_the_way_are_shorter_runs(name: str, model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    """One run of 6 steps tells about 3, 5 and 6; SegPGD's lambda belongs to the 6."""
    model, loader = model.double(), in_double(loader)
    model.forwards = 0
    long = evaluate(model, loader, [name], [0.02], steps=6)
    assert [entry.steps for entry in long.measurements] == [3, 5, 6]
    assert model.forwards == len(loader) * (1 + 7)  # clean, and the run
    for entry in long.measurements:
        short = evaluate(model, loader, [name], [0.02], steps=entry.steps).measurements[-1]
        if name != "segpgd" or entry.steps == 6:
            assert torch.equal(entry.confusion, short.confusion)
        wrong = entry.confusion.sum() - entry.confusion.trace()
        assert wrong <= long.measurements[-1].confusion.sum() - long.measurements[-1].confusion.trace()
    assert [row["eps"] for row in long.rows] == [0.02]
    assert torch.equal(long.confusion[0], long.measurements[-1].confusion)


@pytest.mark.parametrize(
    ("name", "kind", "steps", "best"),
    [
        *((name, name, 4, True) for name in STRONG),
        *((f"{kind}-{steps}", kind, steps, False) for kind in ("pgd", "segpgd") for steps in (10, 20, 40, 100)),
    ],
)
def test_named_attacks_are_the_packages(
    name: str, kind: str, steps: int, best: bool, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """By hand: the noise of a batch from its seed, alpha = eps / 3, the best iterate, or the last one of as many steps
    as the name says."""
    model, loader = model.double(), in_double(loader)
    result = evaluate(model, loader, [name], [0.02], steps=4, seed=9)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for index, (images, labels) in enumerate(loader):
        seed = int(np.random.SeedSequence(9, spawn_key=(index,)).generate_state(1)[0])
        attack = STRONG[kind](model, eps=0.02, alpha=0.02 / 3, steps=steps, best=best)
        if kind != "bim":
            attack.generator = torch.Generator().manual_seed(seed)
        adversarial = attack(images, labels)
        expected += sum(plain_confusion(model, x, y) for x, y in zip(adversarial, labels, strict=True))
    assert torch.equal(result.confusion[0], expected)
    assert result.measurements[-1].steps == steps
    assert len(result.measurements) == 1 or best
    assert result.run["attacks"][name][0]["alpha"] == pytest.approx(0.02 / 3)
    if best:  # after more steps the start makes no difference
        again = evaluate(model, loader, [name], [0.02], steps=4, seed=10)
        assert torch.equal(again.confusion[0], expected) == (name == "bim")


def test_stacked_eps_give_what_single_ones_give(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loader = model.double(), in_double(loader)
    arguments = {"attacks": ["pgd", "segpgd"], "eps": [0.01, 0.02, 0.05], "steps": {0.01: 4, 0.02: 3, 0.05: 4}}
    model.forwards = 0
    stacked = evaluate(model, loader, **arguments)
    assert model.forwards == len(loader) * (1 + 2 * (5 + 4))
    monkeypatch.setattr(evaluation, "_CPU_PIXELS", 1)
    model.forwards = 0
    single = evaluate(model, loader, **arguments)
    assert model.forwards == len(loader) * (1 + 2 * (5 + 5 + 4))
    assert single.rows == stacked.rows
    monkeypatch.setattr(evaluation, "_CPU_PIXELS", max(labels.numel() for _, labels in loader))
    model.forwards = 0
    assert evaluate(model, loader, **arguments).rows == stacked.rows
    assert model.forwards == 3 + 2 * (14 + 9 + 14), "of the batches of 3, 1 and 2 images only that of 1 fits twice"
    assert [(entry.eps, entry.steps) for entry in stacked.measurements[:5]] == [
        (0.01, 3), (0.01, 4), (0.02, 3), (0.05, 3), (0.05, 4)
    ]  # fmt: skip


def test_eps_are_stacked_as_far_as_memory_allows(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"attacks": ["pgd"], "eps": [0.01, 0.02, 0.03, 0.04, 0.05], "steps": 3}
    expected = evaluate(model, loader, **arguments)
    genuine, sizes = PGD._outcomes, []
    failed: list[weakref.ref[Tensor]] = []

    def small_memory(self: PGD, images: Tensor, *args: Any, noise: Tensor, **kwargs: Any) -> Any:
        sizes.append(len(images))
        assert not any(ref() is not None for ref in failed), "what did not fit takes the memory of what may"
        if len(images) > room:
            failed.append(weakref.ref(noise))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(self, images, *args, noise=noise, **kwargs)

    monkeypatch.setattr(PGD, "_outcomes", small_memory)
    room = 6
    assert evaluate(model, loader, **arguments).rows == expected.rows
    assert sizes[:6] == [15, 6, 9, 3, 6, 5]  # the batches have 3, 1 and 2 images
    room = 2
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, loader, **arguments)


def test_a_model_that_draws_random_numbers_is_repeated(loader: list[tuple[Tensor, Tensor]]) -> None:
    class Random(Counting):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(images), 0.5)

    model, names = Random(), ["fgsm", "bim", "pgd"]
    state = torch.get_rng_state()
    first = evaluate(model, loader, names, [0.0, 0.03], steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert evaluate(model, loader, names, [0.0, 0.03], steps=3).rows == first.rows
    assert evaluate(model, loader, names, [0.0, 0.03], steps=3, seed=1).rows != first.rows


def test_attacks_of_the_caller_are_seeded_and_judged_on_their_way(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    def factory(network: nn.Module, eps: float) -> PGD:
        return PGD(network, eps=eps, alpha=eps / 2, steps=4, restarts=2)

    state = torch.get_rng_state()
    first = evaluate(model, loader, {"mine": factory}, [0.03])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert evaluate(model, loader, {"mine": factory}, [0.03]).rows == first.rows
    assert evaluate(model, loader, {"mine": factory}, [0.03], seed=1).rows != first.rows
    assert [entry.steps for entry in first.measurements] == [3, 4]


def careless(network: nn.Module, eps: float) -> Any:
    """Makes void a class, perturbs in place, leaves the model in train mode and what it gives on the graph."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        network.train()
        labels[labels == 255] = 0
        delta = torch.zeros_like(images, requires_grad=True)
        loss = nn.functional.cross_entropy(network(images + delta), labels.long())
        delta.data += eps * torch.autograd.grad(loss, delta)[0].sign()
        result = (images + delta).clamp(0, 1)
        images.zero_()
        network.requires_grad_()
        return result

    return attack


def test_what_an_attack_of_the_caller_does_ends_with_it(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    def fgsm(network: nn.Module, eps: float) -> FGSM:
        return FGSM(network, eps=eps)

    before = [(images.clone(), labels.clone()) for images, labels in loader]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.conv.weight.requires_grad_(False)
    expected = evaluate(model, loader, {"fgsm": fgsm}, [0.0, 0.03])
    result = evaluate(model, loader, {"mine": careless, "fgsm": fgsm}, [0.0, 0.03], records=tmp_path)
    assert [row for row in result.rows if row["attack"] == "fgsm"] == expected.rows
    mine = next(entry for entry in result.measurements if entry.attack == "mine")
    assert mine.confusion.sum() == expected.confusion[0].sum(), "void pixels were counted"
    assert all(map(torch.equal, itertools.chain(*loader), itertools.chain(*before)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["conv.weight"]
    assert evaluate(model, loader, {"fgsm": fgsm}, [0.0, 0.03], records=tmp_path).rows == expected.rows


def test_no_graph_of_an_attack_of_the_caller_is_kept(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    kept: list[Any] = []

    def factory(network: nn.Module, eps: float) -> Any:
        def attack(images: Tensor, labels: Tensor) -> Tensor:
            assert not any(given() is not None for given in kept), "what an earlier batch gave is still there"
            given = images * torch.ones((), requires_grad=True)
            kept.append(weakref.ref(given))
            return given

        return attack

    evaluate(model, loader, {"mine": factory}, [0.03])
    assert len(kept) == len(loader)


@pytest.mark.parametrize("kind", [PGD, FGSM])
def test_bounds_that_lead_out_of_the_ball_are_told(
    kind: type[FGSM] | type[PGD], tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    def factory(network: nn.Module, eps: float) -> Attack:
        return kind(network, eps=eps, bounds=(0.05, 0.95))

    for _ in range(2):  # such outcomes are not recorded
        with pytest.warns(UserWarning, match=r"attack 'narrow' at eps 0.03 moved pixels by up to 0\.0[45]"):
            evaluate(model, loader, {"narrow": factory}, [0.03], records=tmp_path)


def test_one_batch_that_leaves_the_ball_is_told_and_alone_not_recorded(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """Where it is neither the first nor the last."""

    def factory(network: nn.Module, eps: float) -> FGSM:
        return FGSM(network, eps=eps, bounds=(0.1, 0.9))

    inside = [(images * 0.5 + 0.25, labels) for images, labels in loader]
    near_the_edge = torch.full_like(loader[1][0], 0.05), loader[1][1]
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"attack 'narrow' at eps 0.03 moved pixels by up to 0\.05: out of the ball"
        ):
            evaluate(model, [inside[0], near_the_edge, inside[2]], {"narrow": factory}, [0.03], records=tmp_path)
        assert len(list(tmp_path.glob("narrow-*"))) == 2


def test_batch_statistics_in_an_attack_of_the_caller(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """There are none of the evaluated model; another one's depend on flags that no record tells of."""

    def factory(attacked: nn.Module | None) -> Any:
        return lambda network, eps: FGSM(attacked or wrap(network), eps=eps, bn="train")

    with pytest.raises(ValueError, match=r"attacks\['mine'\] must have bn=\"eval\", as evaluate .*, got \"train\""):
        evaluate(model, loader, {"mine": factory(None)}, [0.03])
    source = copy.deepcopy(model)
    rows = []
    for mode in (True, False):
        source.train(mode)
        rows.append(evaluate(model, loader, {"mine": factory(source)}, [0.03], records=tmp_path).rows)
        assert rows[-1] == evaluate(model, loader, {"mine": factory(source)}, [0.03]).rows
    assert rows[0] != rows[1]


@pytest.mark.parametrize(("steps", "expected"), [(np.int64(5), 5), ("auto", 1), (None, 1), (0, 1), (torch.ones(2), 1)])
def test_steps_of_an_attack_of_the_caller(
    steps: Any, expected: int, tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    class Mine:
        def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
            return images

    Mine.steps = steps  # type: ignore[attr-defined]
    result = evaluate(model, loader, {"mine": lambda network, eps: Mine()}, [0.03])
    assert [entry.steps for entry in result.measurements] == [expected]
    result.to_json(tmp_path / "results.json")
    result = evaluate(model, loader, {"mine": lambda network, eps: lambda images, labels: images}, [0.03])
    assert [entry.steps for entry in result.measurements] == [1]


@pytest.mark.parametrize("factor", [255, -1, float("nan")])
def test_images_outside_of_0_and_1_are_refused(
    factor: float, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """Attacks would clip them, and what that does would be taken for the attack."""
    changed = [loader[0], (factor * loader[1][0], loader[1][1])]
    message = r"pixels must be in \[0, 1\], found .*wrap" if factor == factor else "a pixel is NaN"
    with pytest.raises(ValueError, match=f"batch 1 of the loader: {message}"):
        evaluate(model, changed, ["fgsm"], [0.0, 0.03])


def test_factories_are_needed(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    for given, told in ((FGSM, "the class FGSM"), (FGSM(model), "a FGSM"), (0.03, "a float")):
        with pytest.raises(TypeError, match=rf"attacks\['mine'\] must be a factory, lambda model, eps: .*, got {told}"):
            evaluate(model, loader, {"mine": given}, [0.03])  # type: ignore[dict-item]


def test_a_batch_without_images_changes_nothing(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    images, labels = loader[0]
    own = {"fgsm": lambda network, eps: FGSM(network, eps=eps), "mine": lambda network, eps: lambda x, y: x}
    for attacks in (["fgsm", "bim"], own):
        expected = evaluate(model, loader, attacks, [0.0, 0.03], steps=3).rows  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = [(images[:0], labels[:0]), *loader, (images[:0], labels[:0])]
            assert evaluate(model, batches, attacks, [0.0, 0.03], steps=3).rows == expected  # type: ignore[arg-type]


def test_a_folder_for_results_is_made(tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    evaluate(model, loader, ["fgsm"], [0.03]).to_csv(tmp_path / "new" / "folder" / "curves.csv")
    assert (tmp_path / "new" / "folder" / "curves.csv").exists()


def test_labels_of_another_size_are_refused(model: Counting) -> None:
    images = torch.rand(2, 3, 8, 12)
    for shape in ((2, 4, 6), (1, 8, 12)):
        with pytest.raises(
            ValueError, match=rf"labels must have the same N, H and W as .*, got \[{shape[0]}, .*\. Resize"
        ):
            evaluate(model, [(images, torch.zeros(shape, dtype=torch.uint8))], eps=[0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": ["pgd"], "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"attacks": ["pgd"], "eps": [0.0, 0.1, 0.2], "steps": {0.1: 3}}, r"entry for every eps.*\[0.2\]"),
        ({"attacks": {"clean": None}}, "other names than clean"),
        ({"attacks": {"worst-case-miou": None, "mine": None}}, "other names than worst-case-miou"),
    ],
)
def test_bad_steps_and_names(model: Counting, loader: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader, **arguments)


# --- stopped and continued ----------------------------------------------------------------------------------


def stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judging fails after some calls."""
    genuine, seen = functional.confusion_matrix, []

    def confusion_matrix(*args: Any, **kwargs: Any) -> Tensor:
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(1)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(functional, "confusion_matrix", confusion_matrix)


ARGUMENTS: dict[str, Any] = {"attacks": ["fgsm", "pgd", "segpgd"], "eps": [0.0, 0.01, 0.03], "steps": 4}


@pytest.mark.parametrize("calls", [2, 5, 14, 25])
def test_stopped_evaluation_goes_on_to_the_same_result(
    calls: int, tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    expected = evaluate(model, loader, **ARGUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(calls, patch)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    done = sorted(path.name for path in tmp_path.iterdir())
    assert not any(name.startswith(".") for name in done), "a temporary file is left"
    model.forwards = 0
    result = evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    passes = {"fgsm": 3, "pgd": 5, "segpgd": 5}  # for each batch
    saved = sum(passes[name] for name in passes for _ in range(sum(d.startswith(name + "-0.01") for d in done)))
    assert model.forwards == len(loader) * sum(passes.values()) - saved
    assert (result.rows, result.run) == (expected.rows, expected.run)
    assert all(map(torch.equal, result.confusion, expected.confusion))

    model.forwards = 0
    assert evaluate(model, loader, **ARGUMENTS, records=tmp_path).rows == expected.rows
    assert model.forwards == 0, "there was nothing left to do"


def test_records_serve_only_what_they_belong_to(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    model.forwards = 0
    evaluate(model, loader, ["pgd"], [0.01], steps=4, records=tmp_path)
    assert model.forwards == len(loader), "only the clean prediction, which FGSM gave before, was to be made"

    def changed(**changes: Any) -> bool:
        model.forwards = 0
        arguments = {**ARGUMENTS, "attacks": ["pgd"], "eps": [0.01], **changes}
        data = arguments.pop("loader", loader)
        fresh = evaluate(model, data, **arguments)
        before, model.forwards = model.forwards, 0
        assert evaluate(model, data, **arguments, records=tmp_path).rows == fresh.rows
        return model.forwards >= before - len(data)  # the clean prediction may be found

    assert changed(seed=1)
    assert changed(steps=5)
    assert changed(eps=[0.02])
    assert changed(loader=[(images, labels.clamp(min=1)) for images, labels in loader])
    assert changed(loader=[(1 - images, labels) for images, labels in loader])
    assert changed(loader=loader[1:])  # the number of a batch decides its noise
    with torch.no_grad():
        model.conv.bias[0] += 1
    assert changed()
    with backend("reference"):
        assert changed()


def test_autocast_is_the_callers_and_part_of_the_records(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    kinds = set()
    model.norm.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    plain = evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    assert kinds == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    assert kinds == {torch.float32, torch.bfloat16}
    assert (plain.run["autocast"], half.run["autocast"]) == (None, "torch.bfloat16")
    assert half.rows != plain.rows
    for first, second in zip(half.rows, plain.rows, strict=True):
        assert first["pixel_accuracy"] == pytest.approx(second["pixel_accuracy"], abs=0.05)


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_another_precision_of_float32_has_records_of_its_own(
    kind: str, tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    setting = getattr(torch.backends.mkldnn, kind)
    before, forwards = setting.fp32_precision, []
    try:
        for precision in ("ieee", "bf16", "ieee"):
            model.forwards, setting.fp32_precision = 0, precision
            result = evaluate(model, loader, **ARGUMENTS, records=tmp_path)
            forwards.append(model.forwards)
            assert precision in result.run["float32"]
    finally:
        setting.fp32_precision = before
    assert forwards[0] == forwards[1] > 0 == forwards[2]


def test_damaged_records_are_made_anew_and_failing_writes_leave_nothing(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(model, loader, **ARGUMENTS, records=tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for i, (path, content) in enumerate(whole.items()):
        path.write_bytes([b"", content[: len(content) // 2], b"PK" + content[2:][::-1]][i % 3])
    assert evaluate(model, loader, **ARGUMENTS, records=tmp_path).rows == expected.rows
    assert {path: path.read_bytes() for path in tmp_path.iterdir()}.keys() == whole.keys()
    next(tmp_path.glob("pgd-0.03-*")).unlink()  # that of the smaller eps is there
    assert evaluate(model, loader, **ARGUMENTS, records=tmp_path).rows == expected.rows
    with np.load(next(iter(whole))) as content:
        assert content["outcomes"].dtype == np.int64

    def full(path: Any, **arrays: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match=r"could not be written: No space left on device; free some space there$"):
        evaluate(model, loader, **ARGUMENTS, seed=5, records=tmp_path / "disk" / "full")
    assert list((tmp_path / "disk" / "full").iterdir()) == []


def test_attacks_of_long_names_are_recorded(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    attacks = {"mine" * 80: lambda network, eps: FGSM(network, eps=eps)}
    first = evaluate(model, loader, attacks, [0.01], records=tmp_path)
    model.forwards = 0
    assert evaluate(model, loader, attacks, [0.01], records=tmp_path).rows == first.rows
    assert model.forwards == 0


def test_bad_labels_are_never_recorded(tmp_path: Path, model: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = functional.confusion_matrix

    def as_on_a_gpu(*args: Any, **kwargs: Any) -> Tensor:
        matrix = genuine(*args, **kwargs)
        matrix.invalid = torch.tensor(2)
        return matrix

    monkeypatch.setattr(functional, "confusion_matrix", as_on_a_gpu)
    batch = (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 pixels are neither"):
        evaluate(model, [batch, batch], ["fgsm"], records=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_model_is_called_by_its_own_class(loader: list[tuple[Tensor, Tensor]]) -> None:
    model = Counting()
    compiled = torch.compile(model, backend="eager")
    assert evaluate(compiled, loader, ["fgsm"], [0.0]).run["model"] == "Counting"


def test_model_hash_sees_every_weight_and_buffer(model: Counting) -> None:
    first = records.model_hash(model.eval())
    assert records.model_hash(model.train()) == first
    for tensor in (model.conv.weight, model.norm.running_var, model.norm.num_batches_tracked):
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        assert records.model_hash(model) != first
        with torch.no_grad():
            tensor.view(-1)[-1] -= 1
    assert records.content_hash(torch.zeros(2, 3)) != records.content_hash(torch.zeros(3, 2))
    turned = torch.arange(6).view(2, 3).T
    assert records.content_hash(turned) == records.content_hash(turned.contiguous())
    assert records.content_hash(torch.zeros(2)) != records.content_hash(torch.zeros(2, dtype=torch.int32))


def test_content_of_other_kinds_of_tensors() -> None:
    twice = [records.content_hash(TwoTensor(torch.zeros(2), torch.tensor([1.0, last]))) for last in (2, 2, 3)]
    assert twice[0] == twice[1] != twice[2]
    quantised = [torch.quantize_per_tensor(step * torch.ones(2), step, 0, torch.qint8) for step in (0.1, 0.1, 0.2)]
    hashes = [records.content_hash(each) for each in quantised]
    assert hashes[0] == hashes[1] != hashes[2]
    offloaded = torch.zeros(2, device="meta")
    assert records.content_hash(offloaded) != records.content_hash(offloaded), "nobody knows its values"


def test_offloaded_weights_are_evaluated_and_their_records_never_taken(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    offloaded, found = oracle.Offloaded(copy.deepcopy(model)), []
    expected = evaluate(model, loader, **ARGUMENTS).rows
    for _ in range(2):
        offloaded.model.forwards = 0
        assert evaluate(offloaded, loader, **ARGUMENTS, records=tmp_path).rows == expected
        found.append(offloaded.model.forwards)
    assert found[0] == found[1] > 0


class Scaled(nn.Module):
    """Prints neither its scale nor its code."""

    def __init__(self, scale: float | str) -> None:
        super().__init__()
        self.scale, self.calls = scale, 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledOtherwise(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return x * -self.scale


ScaledOtherwise.__name__ = ScaledOtherwise.__qualname__ = "Scaled"


def test_model_hash_sees_which_module_stands_there_again() -> None:
    buffers = nn.BatchNorm1d(1, affine=False), nn.BatchNorm1d(1, affine=False)
    buffers[1].running_mean.fill_(1)
    for one, two in ((Scaled(1.0), Scaled(2.0)), (nn.Linear(1, 1), nn.Linear(1, 1)), buffers):
        assert records.model_hash(nn.Sequential(one, two, one)) != records.model_hash(nn.Sequential(one, two, two))


@dataclasses.dataclass
class Settings:
    by: float


@pytest.mark.parametrize("name", ["scale", "_scale"])
@pytest.mark.parametrize(
    "kept",
    [
        float, int, np.float32, np.array, torch.tensor, lambda scale: (1, [scale]), lambda scale: {"by": scale},
        lambda scale: SimpleNamespace(by=scale), lambda scale: argparse.Namespace(by=scale), Settings,
        lambda scale: {int(scale)},
    ],
)  # fmt: skip
def test_records_of_a_model_with_another_attribute_are_never_taken(
    name: str, kept: Callable[[float], Any], tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    class Turning(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            scale = vars(self)[name]
            scale = scale["by"] if isinstance(scale, dict) else scale[1][0] if isinstance(scale, tuple) else scale
            scale = next(iter(scale)) if isinstance(scale, set) else getattr(scale, "by", scale)
            return super().forward(images) * torch.as_tensor(scale)

    turning, found = Turning(model), []
    for scale in (1.0, -1.0):
        setattr(turning, name, kept(scale))
        found.append(evaluate(turning, loader, ["fgsm"], [0.0], records=tmp_path).rows)
        assert found[-1] == evaluate(turning, loader, ["fgsm"], [0.0]).rows
    assert found[0] != found[1]


SIGN = 1


def signed(images: Tensor) -> Tensor:
    return images * SIGN


@pytest.mark.parametrize("where", ["class", "method", "static method", "property", "module", "pre-hook", "hook"])
def test_records_of_a_model_with_other_code_are_never_taken(
    where: str,
    tmp_path: Path,
    model: Counting,
    loader: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What changes between the two is neither printed, nor an attribute of the model, nor in its forward."""

    def turning(sign: int) -> nn.Module:
        class Turning(nn.Sequential):
            factor = sign if where == "class" else 1

            if sign == 1 or where not in ("method", "static method", "property"):
                turned = property(lambda self: 1)
                own = staticmethod(lambda images: images)

                def prepared(self, images: Tensor) -> Tensor:
                    return images
            else:
                turned = property(lambda self: -1 if where == "property" else 1)
                own = staticmethod(lambda images: -images if where == "static method" else images)

                def prepared(self, images: Tensor) -> Tensor:
                    return -images if where == "method" else images

            def forward(self, images: Tensor) -> Tensor:
                return super().forward(signed(self.own(self.prepared(images)))) * self.factor * self.turned

        made = Turning(model)
        if where == "pre-hook":
            made.register_forward_pre_hook(lambda module, inputs: (sign * inputs[0],))
        elif where == "hook":
            made.register_forward_hook(lambda module, inputs, output: sign * output)
        elif where == "module":
            monkeypatch.setitem(globals(), "SIGN", sign)
        return made

    found = []
    for sign in (1, -1):
        network = turning(sign)
        found.append(evaluate(network, loader, ["fgsm"], [0.0], records=tmp_path).rows)
        assert found[-1] == evaluate(network, loader, ["fgsm"], [0.0]).rows
    assert found[0] != found[1]


LEVELS = [4]
TABLE = {"levels": 4}
rounded = partial(torch.round, decimals=2)
turned = torch.sin
convolution = nn.Conv2d(1, 1, 1)


@dataclasses.dataclass
class Shift:
    by: float


shift = Shift(0.5)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Blocked(torch.autograd.Function):
    forward = Straight.forward

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient)


Blocked.__name__ = Blocked.__qualname__ = "Straight"


@functools.lru_cache
def levels() -> int:
    return 4


class Quantised(nn.Module):
    """What it depends on stands elsewhere in its file."""

    class Settings:
        levels = 4

    @functools.cached_property
    def levels(self) -> int:
        return 4

    @torch.no_grad()
    def counted(self) -> int:
        return self.levels + self.Settings.levels + TABLE["levels"] + LEVELS[0]

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, images: Tensor) -> Tensor:
        parts = [rounded(turned(signed(part)) + shift.by) + convolution.weight[0] for part in images]
        return Straight.apply(torch.stack(parts) * self.counted() * levels())


def other_levels() -> int:
    return 5


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("LEVELS", [5]), ("TABLE", {"levels": 5}), ("SIGN", -1), ("Straight", Blocked),
        ("levels", functools.lru_cache(functools.update_wrapper(other_levels, levels.__wrapped__, updated=()))),
        ("rounded", partial(torch.round, decimals=3)), ("turned", torch.cos), ("turned", math.cos), ("shift", Shift(0)),
        ("convolution", nn.Conv2d(1, 1, 1)),
    ],
)  # fmt: skip
def test_model_hash_sees_what_functions_name(name: str, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = records.model_hash(Quantised())
    monkeypatch.setitem(globals(), name, other)
    assert records.model_hash(Quantised()) != first


@pytest.mark.parametrize("changed", ["Settings.levels", "levels", "counted"])
def test_model_hash_sees_what_belongs_to_a_class(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = records.model_hash(Quantised())
    if changed == "Settings.levels":
        monkeypatch.setattr(Quantised.Settings, "levels", 5)
    elif changed == "levels":
        monkeypatch.setattr(Quantised.levels, "func", lambda self: 5)
    else:
        monkeypatch.setattr(Quantised, "counted", lambda self: 5)
    assert records.model_hash(Quantised()) != first


def test_model_hash_sees_the_names_of_arguments() -> None:
    def blend(source: Tensor, front: Tensor, back: Tensor) -> Tensor:
        return source * front + back

    def blend_otherwise(source: Tensor, back: Tensor, front: Tensor) -> Tensor:
        return source * back + front

    def blend_by_name(source: Tensor, *, front: Tensor, back: Tensor) -> Tensor:
        return source * front + back

    functions = (blend, blend_otherwise, blend_by_name)
    assert len({records.model_hash(wrap(nn.ReLU(), output=function)) for function in functions}) == 3


class Bound:
    __slots__ = "__weight"

    def __init__(self, weight: float) -> None:
        self.__weight = weight

    def times(self, output: Tensor) -> Tensor:
        return output * self.__weight


class Mode:
    """Its inner class is one of its own kind."""


class Fast(Mode):
    __qualname__ = "Mode.Fast"

    def __call__(self) -> None: ...


Mode.Fast = Fast  # type: ignore[attr-defined]


def sliced(part: slice) -> Callable[[Tensor], Tensor]:
    return lambda output: output[part]


IMAGE = torch.zeros(1, 2, 4, 4)


def holding(value: Any) -> nn.Module:
    model = nn.ReLU()
    object.__setattr__(model, "held", value)
    return model


@pytest.mark.parametrize(
    "hold",
    [
        lambda net: holding([net]),
        lambda net: holding({"net": (net,)}),
        holding,
        lambda net: wrap(nn.ReLU(), output=net.forward),
        lambda net: wrap(nn.ReLU(), output=partial(net)),
        lambda net: wrap(nn.ReLU(), output=lambda images: net(images)),
        lambda net: wrap(nn.ReLU(), output=Bound(net.weight.sum().item()).times),
        lambda net: wrap(nn.ReLU(), output=net.weight.sum().mul),
        lambda net: wrap(nn.ReLU(), output=sliced(slice(0, int(net.weight.sum() * 1e3)))),
        lambda net: holding([deque([range(int(net.weight.sum() * 1e3))]), Mode.Fast()]),  # type: ignore[attr-defined]
        lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
        lambda net: torch.jit.trace(nn.Sequential(net, nn.ReLU() if net.weight[0, 0, 0, 0] > 0 else nn.Tanh()), IMAGE),
        lambda net: nn.Sequential(torch.jit.freeze(torch.jit.trace(net.eval(), IMAGE))),
        lambda net: holding(torch.jit.trace(lambda images: net(images).sum(), IMAGE)),
    ],
)
def test_model_hash_sees_networks_that_are_not_registered_or_compiled(hold: Callable[[nn.Module], nn.Module]) -> None:
    one, other = (nn.Conv2d(2, 3, 1).requires_grad_(False) for _ in range(2))
    one.weight[0, 0, 0, 0], other.weight[0, 0, 0, 0] = 9, -9
    first = hold(one)
    assert records.model_hash(first) == records.model_hash(first) != records.model_hash(hold(other))


def test_records_are_not_those_of_another_frozen_model(tmp_path: Path) -> None:
    data = [(torch.rand(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)))]
    networks = [torch.jit.freeze(torch.jit.script(nn.Conv2d(3, 3, 1).eval())) for _ in range(2)]
    results = [evaluate(network, data, ["fgsm"], [0, 0.1], records=tmp_path) for network in networks]
    assert results[1].rows == evaluate(networks[1], data, ["fgsm"], [0, 0.1]).rows != results[0].rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation:UserWarning")
def test_model_hash_sees_packed_weights() -> None:
    def quantised(weight: float) -> nn.Module:
        layer = torch.ao.nn.quantized.Conv2d(1, 1, 1)
        packed = torch.quantize_per_tensor(torch.full((1, 1, 1, 1), weight), 1.0, 0, torch.qint8)
        layer.set_weight_bias(packed, torch.zeros(1))
        return layer

    assert (
        records.model_hash(quantised(2.0)) == records.model_hash(quantised(2.0)) != records.model_hash(quantised(3.0))
    )


def test_a_module_that_holds_itself_unregistered_has_a_hash() -> None:
    one, other = (nn.Sequential(nn.Conv2d(1, 1, 1)) for _ in range(2))
    for network in (one, other):
        object.__setattr__(network[0], "parent", [network, network[0].forward])
    assert records.model_hash(one) == records.model_hash(one) != records.model_hash(other)


def test_model_hash_is_that_of_equal_models() -> None:
    class Listed(nn.Module):
        def __init__(self, sizes: Any = [4, 8], rates: Any = (0.1, [0.2])) -> None:  # noqa: B006
            super().__init__()
            self.sizes, self.rates, self.again = sizes, rates, sizes

    models = [Listed(), Listed([4, 8], (0.1, [0.2])), copy.deepcopy(Listed())]
    assert len({records.model_hash(each) for each in models}) == 1
    assert records.model_hash(Listed([4, 9])) != records.model_hash(models[0])
    quantised = Quantised()
    first = records.model_hash(quantised)
    quantised(torch.rand(1, 3, 2, 2))
    assert records.model_hash(quantised) == first, "neither what is cached nor what a decorator found"


@dataclasses.dataclass(slots=True)
class Slotted:
    levels: int


class Level(enum.Enum):
    LOW = 4
    HIGH = 5


def test_model_hash_of_unusual_attributes_ends_soon() -> None:
    def held(value: Any) -> str:
        model = Scaled(1.0)
        model.value = value
        return records.model_hash(model)

    tuples: tuple[Any, ...] = (1,)
    for _ in range(64):
        tuples = (tuples, tuples)
    closures: set[Any] = set()
    closures.update([lambda: closures, lambda: (closures, 1), lambda: (closures, 2)])
    nameless = type("Nameless", (), {"__module__": None, "__call__": lambda self: 1})
    unusual = [
        10**5000, -(10**5000), tuples, closures, nameless(), Slotted(4), Slotted(5), Level.LOW, Level.HIGH,
        np.array([None, 1]), np.arange(4), np.arange(4.0), "0xff", "0xfe", [1], (1,), {1}, {1: 1},
    ]  # fmt: skip
    assert len({held(value) for value in unusual}) == len(unusual)
    assert held(np.zeros(10**7)) != held(np.ones(10**7))


@pytest.mark.parametrize("compile", [False, True])
def test_records_of_a_compiled_model_are_found_again(compile: bool, tmp_path: Path) -> None:
    """By another process."""
    code = f"""
import sys, torch
from segadv.evaluation import evaluate
torch.manual_seed(0)
model, calls = torch.nn.Conv2d(3, 2, 1), []
batch = [(torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))]
if {compile}:
    model = torch.compile(model, backend="eager")
for _ in range(2):
    evaluate(model, batch, ["fgsm"], [0.0, 0.1], records=sys.argv[1])
"""
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True)
        assert len([*tmp_path.iterdir()]) == 2


def test_model_hash_sees_the_names_of_parameters() -> None:
    def difference(*names: str) -> nn.Module:
        module = nn.Module()  # of "a" and "b", say
        for value, name in enumerate(names):
            module.register_parameter(name, nn.Parameter(torch.tensor(float(value))))
        return module

    assert records.model_hash(difference("a", "b")) != records.model_hash(difference("b", "a"))


def test_model_hash_is_that_of_before_the_first_pass_and_of_a_hook() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    first = records.model_hash(model)
    model.compile(backend="eager")
    model(torch.rand(1, 3, 4, 4, requires_grad=True))
    torch.compile(model, backend="eager")  # leaves a mark
    with model[1].register_full_backward_hook(lambda *_: None):
        assert records.model_hash(model) != first, "it may change gradients"
    assert records.model_hash(model) == first
    normed = nn.utils.spectral_norm(nn.Conv2d(3, 2, 1))
    first = records.model_hash(normed.eval())
    normed(torch.rand(1, 3, 4, 4))
    assert records.model_hash(normed) == first
    normed.bias_cache = {"cpu": torch.ones(3)}  # as timm's attention fills it
    hashes = set()
    for normed.mean in (torch.zeros(3), torch.ones(3), torch.ones(3)):
        normed.bias_cache["cpu"] += 1
        hashes.add(records.model_hash(normed))
    assert len(hashes) == 2, "an attribute beside those of a hook is seen, a cache is not"
    normed.mean = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    assert records.model_hash(normed) != records.model_hash(normed), "nobody knows its values"


def test_model_hash_ends_for_what_holds_itself_and_is_that_of_another_process() -> None:
    knots: list[Any] = [[1] for _ in range(12)]
    for knot in knots:
        knot.extend(knots)
    chain: list[Any] = []
    for _ in range(10_000):
        chain = [chain]
    tied, tied_again, other = (Scaled(value) for value in (1.0, 1.0, 1.0))
    tied.knots, tied_again.knots, other.knots = knots, copy.deepcopy(knots), [*copy.deepcopy(knots), 2]
    tied.chain = tied_again.chain = other.chain = chain
    hashes = [records.model_hash(each) for each in (tied, tied_again, other)]
    assert hashes[0] == hashes[1] != hashes[2]

    code = """
import torch
from segadv import records
class Model(torch.nn.Identity):
    def forward(self, images):
        return images if self.words & {"a", "b"} else None
model = Model()
model.words, model.f = {"a", "b", "c", ("d", "e")}, lambda: sorted(("d", "e"))
print(records.model_hash(model))
"""
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    printed = [
        subprocess.run([sys.executable, "-c", code], env=each, check=True, capture_output=True, text=True).stdout
        for each in environments
    ]
    assert printed[0] == printed[1] != ""


def test_model_hash_sees_buffers_that_are_not_saved_and_modules_without_parameters() -> None:
    def network(activation: nn.Module, scale: float, *, extra: object = None) -> nn.Module:
        made = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), activation)
        nn.init.ones_(made[0].weight)
        made.register_buffer("scale", torch.tensor(scale), persistent=False)
        made.extra = extra
        return made

    class Printed(nn.Identity):
        def extra_repr(self) -> str:
            return f"{object.__repr__(self)}"

    first = records.model_hash(network(nn.ReLU(), 1.0))
    assert records.model_hash(network(nn.ReLU(), 1.0)) == first
    assert records.model_hash(network(nn.Tanh(), 1.0)) != first
    assert records.model_hash(network(nn.ReLU(), 2.0)) != first
    scaled = [Scaled(1.0), Scaled(2.0), Scaled(1.0)]
    hashes = [records.model_hash(each) for each in scaled]
    assert hashes[0] == hashes[2] != hashes[1]
    scaled[0].calls = 5
    assert records.model_hash(scaled[0]) != hashes[0], "it may be a setting"
    assert records.model_hash(ScaledOtherwise(1.0)) != hashes[0]
    assert records.model_hash(Scaled("a")) != records.model_hash(Scaled("b"))
    assert records.model_hash(nn.MaxPool2d(2)) != records.model_hash(nn.MaxPool2d(3))
    assert records.model_hash(network(nn.Dropout(0.1), 1.0)) != records.model_hash(network(nn.Dropout(0.2), 1.0))
    assert records.model_hash(network(nn.Upsample(2), 1.0)) == records.model_hash(network(nn.Upsample(2), 1.0))
    resized = [network(nn.Upsample(2, mode="bilinear", align_corners=value), 1.0) for value in (False, True)]
    assert records.model_hash(resized[0]) != records.model_hash(resized[1])

    def entry(key: str) -> Any:
        return lambda output: output[key]

    def named(output: Any, *, key: str = "a") -> Any:
        return output[key]

    def other(output: Any, *, key: str = "b") -> Any:
        return output[key]

    other.__code__ = named.__code__
    key = ["a"]
    several = [lambda output: output[key[0]]]
    different = [None, entry("a"), entry("b"), lambda output: output["a"], lambda output: output["b"], named, other]
    different += [partial(named, key=name) for name in "ab"] + several

    class Entry:
        def __init__(self, key: str) -> None:
            self.key = key

        def __call__(self, output: Any) -> Any:
            return output[self.key]

        def taken(self, output: Any) -> Any:
            return output[self.key]

    different += [operator.itemgetter("a"), operator.itemgetter("b"), Entry("a"), Entry("b"), Entry("a").taken]
    different += [torch.tanh, torch.sigmoid, Entry("b").taken, partial(torch.add, 1), partial(torch.add, 2)]
    different += [lambda output: output[0], lambda output: output[1], lambda output: output.a, lambda output: output.b]
    different += [lambda output, key="a": output[key], lambda output, key="b": output[key]]
    hashes = [records.model_hash(wrap(nn.ReLU(), output=output)) for output in different]
    assert len({*hashes}) == len(different)
    assert records.model_hash(wrap(nn.ReLU(), output=entry("a"))) == hashes[1]
    assert records.model_hash(wrap(nn.ReLU(), output=Entry("a"))) in hashes

    def within(values: set[int]) -> Any:
        return lambda output: output in values

    sets = [within({0, 8}), within({8, 0}), within({0, 1}), lambda x: x in {0, 8}, lambda x: x in {0, 1}]
    of_sets = [records.model_hash(wrap(nn.ReLU(), output=output)) for output in sets]
    assert of_sets[0] == of_sets[1], "whatever the order in memory"
    assert len({*of_sets}) == 4
    key[0] = "b"
    assert records.model_hash(wrap(nn.ReLU(), output=several[0])) not in hashes

    def recursive(output: Any) -> Any:
        return recursive(output) if output is None else later

    records.model_hash(wrap(nn.ReLU(), output=recursive))  # ends, with a cell that is empty yet
    later = None
    printed = [network(Printed(), 1.0) for _ in range(2)]
    assert repr(printed[0]) != repr(printed[1])
    assert records.model_hash(printed[0]) == records.model_hash(printed[1])


@pytest.mark.parametrize(
    "arguments",
    [
        [{"max_eps": np.float32(0.001)}, {"max_eps": np.float32(0.9)}],
        [{"bounds": [0.0, 1.0]}, {"bounds": [0.08, 0.92]}],
        [{"output": lambda logits: logits}, {"output": lambda logits: -logits}],
    ],
)
def test_records_of_other_arguments_are_never_taken(
    arguments: list[dict[str, Any]], tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    found = []
    for options in arguments:

        def newton(model: nn.Module, eps: float, options: dict[str, Any] = options) -> FastNewton:
            return FastNewton(model, **options)

        fresh = evaluate(model, loader, {"newton": newton}, [1.0])  # a ball that no step leaves
        assert evaluate(model, loader, {"newton": newton}, [1.0], records=tmp_path).rows == fresh.rows
        found.append(fresh.rows)
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", [FGSM, BIM])
def test_records_of_an_attack_on_another_model_belong_to_that_model_as_well(
    kind: type[FGSM] | type[BIM], tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    found = []
    for source in (Counting(), Counting()):

        def factory(network: nn.Module, eps: float, source: nn.Module = source) -> Attack:
            return kind(source, eps=eps)

        fresh = evaluate(model, loader, {"from another": factory}, [0.03])
        seen = [(model(kind(source, eps=0.03)(images, labels)).argmax(1), labels) for images, labels in loader]
        right = sum(int((prediction == labels).sum()) for prediction, labels in seen)
        assert fresh.confusion[-1].diagonal().sum() == right, "of the evaluated model, not of that one"
        assert evaluate(model, loader, {"from another": factory}, [0.03], records=tmp_path).rows == fresh.rows
        found.append(fresh.rows)
    assert found[0] != found[1]


def test_records_of_a_named_attack_are_not_those_of_ones_own_with_other_options(
    tmp_path: Path, loader: list[tuple[Tensor, Tensor]]
) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(3, CLASSES, 3, stride=2, padding=1)
    named = evaluate(network, loader, ["fgsm", "bim-10"], [0.03], align_corners=True, records=tmp_path)
    for (arguments,) in named.run["attacks"].values():
        assert (arguments["align_corners"], arguments["ignore_index"]) == (True, 255)
    own = {"fgsm": lambda model, eps: FGSM(model, eps=eps)}
    fresh = evaluate(network, loader, own, [0.03], align_corners=True)
    assert evaluate(network, loader, own, [0.03], align_corners=True, records=tmp_path).rows == fresh.rows
    assert fresh.rows[-1]["miou"] != next(row for row in named.rows if row["attack"] == "fgsm")["miou"]
    namesake = {"bim-10": lambda model, eps: BIM(model, eps=eps, alpha=0.004, steps=10, align_corners=True)}
    judged = evaluate(network, loader, namesake, [0.03], align_corners=True, records=tmp_path).measurements
    assert [entry.steps for entry in judged] == [3, 5, 10], "it is judged on its way, the named one at its end"


def test_records_of_a_share_belong_to_the_number_that_decides_the_noise(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch of rank 1 of 2 is batch 1 of all, and has its noise."""
    whole = evaluate(model, loader, ["pgd"], [0.02], steps=3, records=tmp_path)
    alone = evaluate(model, loader[1:2], ["pgd"], [0.02], steps=3)
    monkeypatch.setattr(evaluation.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(evaluation.distributed, "rank", lambda: 1)
    monkeypatch.setattr(evaluation.distributed, "gather", lambda share: [share])
    model.forwards = 0
    found = evaluate(model, loader[1:2], ["pgd"], [0.02], steps=3, sharded=True, records=tmp_path)
    assert model.forwards == 0
    fresh = evaluate(model, loader[1:2], ["pgd"], [0.02], steps=3, sharded=True)
    assert found.rows == fresh.rows
    assert (whole.run["batch_size"], found.run["batch_size"]) == (3, 1)
    assert not torch.equal(fresh.confusion[0], alone.confusion[0])
    not_sharded = evaluate(model, loader[1:2], ["pgd"], [0.02], steps=3, records=tmp_path)
    assert torch.equal(not_sharded.confusion[0], alone.confusion[0]), (
        "the rank counts only where the loader gives a share"
    )


def in_batches_of(size: int, loader: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same samples in the same order."""
    images, labels = map(torch.cat, zip(*loader, strict=True))
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_hash_of_the_data_is_that_of_its_samples_in_their_order(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    def digest(data: list[tuple[Tensor, Tensor]]) -> str:
        found = evaluate(model, data, ["fgsm"], [0.0]).run["data_sha256"]
        assert isinstance(found, str)
        return found

    assert {digest(in_batches_of(size, loader)) for size in (1, 4, 6)} == {digest(loader)}
    images, labels = in_batches_of(6, loader)[0]
    relabelled, exchanged = labels.clone(), labels.clone()
    relabelled[5, 0, 0] = (labels[5, 0, 0].int() + 1) % 7
    exchanged[[0, 1]] = labels[[1, 0]]
    variants = [
        (images, labels), (images.flip(0), labels.flip(0)), (images, relabelled), (images, exchanged),
        (images, labels.long()), (images[:5], labels[:5]), (images.mT.contiguous(), labels.mT.contiguous()),
    ]  # fmt: skip
    assert len({digest([variant]) for variant in variants}) == len(variants)


def test_shares_are_put_together(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one after the other: the second process has those of both."""
    arguments: dict[str, Any] = {"attacks": ["fgsm", "pgd"], "eps": [0.0, 0.02], "steps": 3}
    whole = evaluate(model, loader, **arguments)
    shares: list[Any] = []
    monkeypatch.setattr(evaluation.distributed, "gather", lambda share: (shares.append(share), shares[:])[1])
    monkeypatch.setattr(evaluation.distributed, "world_size", lambda: 2)

    def together(batches: list[tuple[Tensor, Tensor]]) -> EvaluationResult:
        shares.clear()
        for rank in range(2):
            monkeypatch.setattr(evaluation.distributed, "rank", lambda rank=rank: rank)
            result = evaluate(model, batches[rank::2], **arguments, sharded=True)
        return result

    result = together(loader)
    assert all(map(torch.equal, result.confusion, whole.confusion))
    for entry, expected in zip(result.measurements, whole.measurements, strict=True):
        assert entry.miou_of_each.tolist() == pytest.approx(expected.miou_of_each.tolist(), rel=1e-12), "in order"
        assert entry.without_each.tolist() == pytest.approx(expected.without_each.tolist(), rel=1e-12)
    assert [result.run[key] for key in ("images", "batch_size", "data_sha256")] == [6, 3, whole.run["data_sha256"]]
    assert together([loader[1], loader[0], loader[2]]).run["batch_size"] == 3
    changed = [loader[0], (loader[1][0], loader[1][1].clamp(min=1)), loader[2]]
    assert len({together(data).run["data_sha256"] for data in (loader, changed, [*loader[:2], loader[0]])}) == 3
    genuine = evaluation._Judge.settle
    for at in range(2):

        def counting(self: evaluation._Judge, at: int = at) -> None:
            if evaluation.distributed.rank() == at and ("label", "clean", 0.0) in self._noted:
                self.note("label", "clean", 0.0, torch.tensor(2 if not self.found else 0))
            genuine(self)

        monkeypatch.setattr(evaluation._Judge, "settle", counting)
        with pytest.raises(ValueError, match="2 pixels are neither"):
            together(loader)


class Gentle(PGD):
    """Leaves the images as they are."""

    def __call__(self, images: Tensor, labels: Tensor, **options: Any) -> Any:
        return images


def test_a_sub_class_is_called_and_not_recorded(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    gentle = {"gentle": lambda model, eps: Gentle(model, eps=eps, alpha=eps, steps=3)}
    clean, attacked = evaluate(model, loader, gentle, [0.0, 0.1], records=tmp_path).rows
    assert attacked["miou"] == clean["miou"]
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["clean"] * len(loader)


@pytest.mark.parametrize("options", [{"ignore_index": 0}, {"align_corners": True}, {"output": "negated"}])
def test_an_attack_that_counts_otherwise_is_judged_like_the_others(
    options: dict[str, Any], model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    if options.get("output"):
        options = {"output": lambda logits: -logits}
    if options.get("align_corners"):  # matters where the logits are smaller
        model.conv.stride = (2, 2)
    if "ignore_index" in options:
        loader = [(images, labels.where(labels != 255, 0)) for images, labels in loader]
    model.train()

    def last(model: nn.Module, eps: float) -> Any:
        return BIM(model, eps=eps, alpha=eps, steps=1, **options)

    direct = {"attack": last}
    called = {"attack": lambda model, eps: lambda images, labels: last(model, eps)(images, labels)}
    ignore_index = 255 if options.get("ignore_index") is None else 18  # of the evaluation: another one
    first, second = (evaluate(model, loader, attacks, [0.1], ignore_index=ignore_index) for attacks in (direct, called))
    assert torch.equal(torch.stack(first.confusion), torch.stack(second.confusion))


def test_numbers_of_numpy_are_numbers(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    plain = evaluate(model, loader, ["pgd"], [0.1], steps=3, seed=3)
    arguments: Any = {
        "steps": np.int64(3),
        "seed": np.int64(3),
        "ignore_index": np.uint8(255),
    }
    assert evaluate(model, loader, ["pgd"], np.array([0.1]), **arguments).run == plain.run


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": 0.1}, TypeError, r"eps must be a sequence of numbers, such as \(0, 0\.01\), got 0\.1"),
        ({"eps": "0.1"}, TypeError, "eps must be a sequence of numbers"),
        ({"seed": -1}, ValueError, "seed must be a whole number of at least 0, got -1"),
        ({"seed": None}, TypeError, "seed must be a whole number of at least 0, got None"),
        ({"attacks": ["pgd"], "steps": True}, TypeError, "steps must be a whole number of at least 1, got True"),
        ({"ignore_index": 2.0}, TypeError, "ignore_index must be a whole number, got a float"),
        ({"align_corners": "False"}, TypeError, "align_corners must be True or False, got 'False'"),
        ({"worst_case": 1}, TypeError, "worst_case must be True or False, got 1"),
        ({"model": len}, TypeError, r"model must be an nn\.Module, got a builtin_function_or_method; for a function"),
        ({"loader": [{"images": 1, "labels": 2}]}, TypeError, r"a batch with the keys \['images', 'labels'\]; a tuple"),
        ({"loader": [("images", "labels")]}, TypeError, "a batch that begins with str and str; two tensors"),
        ({"loader": [(np.zeros((1, 3, 8, 8)), np.zeros((1, 8, 8)))]}, TypeError, "begins with ndarray and ndarray"),
    ],
)
def test_arguments_of_a_wrong_kind(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    model: Counting,
    loader: list[tuple[Tensor, Tensor]],
) -> None:
    with pytest.raises(error, match=message):
        evaluate(**({"model": model, "loader": loader, "attacks": ["fgsm"]} | arguments))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda images, labels: images[:, :1], r"attack 'mine' gave \[3, 1, 12, 16\] for images \[3, 3, 12, 16\]"),
        (lambda images, labels: None, r"attack 'mine' gave a NoneType for images"),
        (lambda images, labels: images / 0, "attack 'mine' at eps 0.1 gave pixels that are NaN or infinite"),
    ],
)
def test_an_attack_of_ones_own_has_to_give_images(
    attack: Any, message: str, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, loader, {"mine": lambda model, eps: attack}, [0.1])


def test_an_attack_that_leaves_box_or_ball_is_told_of(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.warns(UserWarning, match="attack 'mine' at eps") as told:
        evaluate(model, loader, {"mine": lambda model, eps: lambda images, labels: images + 2 * eps}, [0.1])
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert re.fullmatch(r"attack 'mine' at eps 0\.1 gave pixels in \[0\.\d+, 1\.19\d+\], outside of \[0, 1\]", texts[0])
    assert texts[1] == "attack 'mine' at eps 0.1 moved pixels by up to 0.2: out of the ball of that radius"
    assert {warning.filename for warning in told} == {__file__}
    with pytest.warns(UserWarning, match="moved pixels by up to 0.2: out of") as told:
        evaluate(model, loader, {"mine": lambda model, eps: lambda images, labels: images - 2 * eps}, [0.1])
    assert re.search(r" gave pixels in \[-0\.19\d+, 0\.[78]\d+\], outside of \[0, 1\]$", str(told[0].message))
    with pytest.warns(UserWarning, match=r"pixels in \[\d+, 2\d\d\], outside"):  # the negative of a byte is none
        evaluate(model, loader, {"mine": lambda model, eps: lambda images, labels: (255 * images).byte()}, [0.1])
    evaluate(model, loader, {"mine": lambda model, eps: lambda images, labels: images.double()}, [0.1])


@pytest.mark.parametrize("kind", [BIM, PGD])
def test_a_ball_of_another_radius_is_told_of(
    kind: type[BIM], tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """Also where the attack is one of the package's, which is judged on its way otherwise."""
    with pytest.warns(UserWarning, match="attack 'mine' at eps 0.09 moved pixels by up to 0.1"):
        evaluate(
            model, loader, {"mine": lambda model, eps: kind(model, eps=0.1, alpha=0.1, steps=2)}, [0.09, 0.1],
            records=tmp_path,
        )  # fmt: skip
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept, "those at eps 0.1"
    with pytest.warns(UserWarning, match="attack 'mine' at eps 0.09 moved pixels"):
        evaluate(
            model, loader, {"mine": lambda model, eps: kind(model, eps=0.1, alpha=0.1, steps=2)}, [0.09],
            records=tmp_path,
        )  # fmt: skip
    assert kept == [path for path in tmp_path.rglob("*") if path.is_file()]


def test_who_goes_on_with_records_is_told_as_well(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    wide = {"wide": lambda model, eps: FGSM(model, eps=2 * eps)}
    for _ in range(2):
        with pytest.warns(UserWarning, match="attack 'wide' at eps 0.1 moved pixels by up to 0.2: out of the ball"):
            evaluate(model, loader, wide, [0.1], records=tmp_path)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"clean"}


def test_images_that_are_no_numbers_are_not_recorded(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate(model, loader, {"own": lambda model, eps: lambda x, y: x / 0}, [0.1], records=tmp_path)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} <= {"clean"}


def test_inference_mode_and_images_made_there(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    @torch.inference_mode()
    def noise(images: Tensor, labels: Tensor) -> Tensor:
        return (images + 0.04 * torch.randn_like(images).sign()).clamp(0, 1)

    names = ["fgsm", "bim-10", "pgd"]
    own = {"noise": lambda model, eps: noise}
    expected = [evaluate(model, loader, attacks, [0.0, 0.04], steps=3).rows for attacks in (names, own)]
    with torch.inference_mode():
        made_there = [(images.clone(), labels.clone()) for images, labels in loader]
        assert [evaluate(model, made_there, attacks, [0.0, 0.04], steps=3).rows for attacks in (names, own)] == expected
    assert [evaluate(model, made_there, attacks, [0.0, 0.04], steps=3).rows for attacks in (names, own)] == expected


def test_results_of_different_attacks_and_classes_in_one(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    few = [(images, labels.clamp(max=4)) for images, labels in loader]
    pgd, fgsm = (evaluate(model, loader, [name], [0.0, 0.1], steps=4) for name in ("pgd", "fgsm"))
    both = evaluate(nn.Conv2d(3, 5, 1), few, ["fgsm", "pgd"], [0.0, 0.02], steps=4, worst_case=False)
    merged = EvaluationResult.merge({"a": fgsm, "b": pgd, "c": both})
    from segadv import plots, report

    shown: list[set[str]] = []
    save = plots._save
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: (
            shown.append({text.get_text() for text in figure.legends[0].get_texts()}),
            save(figure, path),
        ),
    )
    merged.plot(tmp_path / "curves.png")
    rows = [entry.row for entry in EvaluationResult.merge({"c": both, "b": pgd}).measurements]
    plots.plot_steps([row | {"eps": 0.1} for row in rows if row["eps"]], tmp_path / "steps.png", eps=0.1)
    assert shown == [{"a", "b", "c"}, {"b", "c"}]
    merged.to_details_csv(tmp_path / "details.csv")
    with open(tmp_path / "details.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert (written[-1]["iou_4"], written[-1]["iou_5"]) != ("", "0.0")
    assert [row["iou_18"] for row in written if row["arm"] == "c"] == [""] * len(both.measurements)
    with pytest.raises(ValueError, match="result: 'a' and 'b' were evaluated under different attacks, eps, steps"):
        report.write_report(tmp_path / "report", merged, {})
    assert not (tmp_path / "report").exists()


def test_results_of_one_model_each_are_merged_also_those_of_reports(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    from segadv import report

    first, second = (evaluate(model, data, ["fgsm"], [0.0, 0.1]) for data in (loader, loader[1:]))
    report.write_report(tmp_path / "one", first)
    again = EvaluationResult.from_json(tmp_path / "one" / "results.json")
    merged, expected = (EvaluationResult.merge({"a": result, "b": second}) for result in (again, first))
    assert (merged.rows, merged.run) == (expected.rows, expected.run)
    with pytest.raises(ValueError, match="result: 'a' and 'b' were evaluated under different attacks, eps, steps"):
        report.write_report(tmp_path / "both", merged)
    with pytest.raises(ValueError, match="results: 'c' must be of one model, got one of a, b"):
        EvaluationResult.merge({"c": merged})


def test_a_report_is_of_models_that_were_evaluated_alike(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    from segadv import report

    alike: dict[str, Any] = {"attacks": ["pgd"], "eps": [0.0, 0.1], "steps": 4}
    first = evaluate(model, loader, **alike)
    report._check_alike(EvaluationResult.merge({"a": first, "b": evaluate(Counting(), loader, **alike)}))
    corners = evaluate(model, loader, **alike, align_corners=True)
    report._check_alike(EvaluationResult.merge({"a": first, "b": corners}))
    transferred = {}
    for arm, source in (("a", nn.Conv2d(3, CLASSES, 1)), ("b", nn.Conv2d(3, CLASSES, 1))):
        attacks = {"pgd": lambda _, eps, source=source: PGD(source, eps=eps, alpha=eps / 2, steps=4)}
        transferred[arm] = evaluate(model, loader, attacks, [0.1])
    report._check_alike(EvaluationResult.merge(transferred))
    others: list[tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]] = [
        (loader, {"steps": 5}), (loader, {"seed": 1}), (loader[:2], {}), (loader[::-1], {}),
        (in_batches_of(1, loader), {}),
        (loader, {"attacks": {"pgd": lambda network, eps: PGD(network, eps=eps, alpha=eps / 2, steps=4)}}),
    ]  # fmt: skip
    for data, changes in others:
        merged = EvaluationResult.merge({"a": first, "b": evaluate(model, data, **alike | changes)})
        with pytest.raises(ValueError, match="result: 'a' and 'b' were evaluated under different attacks, eps, steps"):
            report.write_report(tmp_path, merged, {})
    merged = EvaluationResult.merge({"a": first, "b": first})
    merged.run["b"] = first.run | {"ignore_index": 0}
    with pytest.raises(ValueError, match="seeds or other arguments"):
        report.write_report(tmp_path, merged, {})
    for count in (2, CLASSES + 1):
        with pytest.raises(ValueError, match=f"as many as the models' classes, {CLASSES}, got {count}"):
            report.write_report(tmp_path, first, class_names=["road"] * count)
    assert list(tmp_path.iterdir()) == []


def test_arms_with_names_of_their_own_look_different() -> None:
    from segadv import plots

    looks = [look[1:] for look in plots._style([f"run {i}" for i in range(15)] + list(plots._ARMS)).values()]
    assert len(set(looks)) == len(looks)


def test_a_result_prints_its_curves(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, ["fgsm"], [0.0, 0.02])
    clean, attacked = result.rows
    assert repr(result).splitlines() == [
        "EvaluationResult:",
        "attack  eps   mIoU    pixel accuracy",
        f"fgsm    0     {clean['miou']:.4f}  {clean['pixel_accuracy']:.4f}",
        f"fgsm    0.02  {attacked['miou']:.4f}  {attacked['pixel_accuracy']:.4f}",
    ]
    assert repr(EvaluationResult.merge({"basic": result})).splitlines()[2].startswith("basic  fgsm    0     ")


def test_a_model_that_changes_its_input_in_place_is_refused() -> None:
    class InPlace(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.sub_(0.5))

    batch = (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="model: it changes its input in place"):
        evaluate(InPlace(3, 2, 1), [batch], ["fgsm"], eps=[0.0])


def test_a_model_without_shapes_is_told_what_it_needs() -> None:
    batch = (torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet; show the model a batch before"):
        evaluate(nn.Sequential(nn.LazyConv2d(2, 1)), [batch], ["fgsm"], eps=[0.1])


def test_the_default_device_does_not_matter(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    own = {"own": lambda network, eps: BIM(network, eps=eps, alpha=eps, steps=2)}
    for attacks in (["fgsm", "bim-10"], own):
        expected = evaluate(model, loader, attacks, [0.04])
        expected.to_json(tmp_path / "result.json")
        with torch.device("meta"):
            assert evaluate(model, loader, attacks, [0.04]).rows == expected.rows
            assert EvaluationResult.from_json(tmp_path / "result.json").rows == expected.rows


def test_every_flipped_bit_of_a_record_is_survived(tmp_path: Path) -> None:
    """Found damaged, or read right: where the flip is in what the format does not use."""
    path, matrices = tmp_path / "record.npz", torch.arange(8).view(1, 2, 2, 2)
    np.savez_compressed(path, outcomes=matrices.numpy())
    content = path.read_bytes()
    outcomes = []
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        outcomes.append(records._read(path))
    read = [found for found in outcomes if found is not None]
    assert all(torch.equal(found, matrices) for found in read)
    assert 0 < len(read) < len(outcomes) / 2
    for other in (matrices.double(), matrices[0]):
        np.savez_compressed(path, outcomes=other.numpy())
        assert records._read(path) is None

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    np.savez_compressed(path, outcomes=np.array([Payload()], dtype=object))
    assert records._read(path) is None
    assert not (tmp_path / "executed").exists()


def test_everything_to_repeat_it_is_in_the_files(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    result = evaluate(model, loader, ["pgd", "segpgd"], [0.0, 0.02], steps=4, seed=3)
    result.to_json(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    run = content["run"]
    assert run["model_sha256"] == records.model_hash(model)
    assert records.versions().keys() == {"segadv", "torch", "numpy", "python"}
    assert (run["seed"], run["images"], run["eps"], run["ignore_index"]) == (3, 6, [0.0, 0.02], 255)
    assert run["versions"]["torch"] == torch.__version__
    segpgd = run["attacks"]["segpgd"][0]
    assert (segpgd["attack"], segpgd["eps"], segpgd["steps"], segpgd["best"]) == ("SegPGD", 0.02, 4, True)
    last = content["measurements"][-1]
    assert last["class_iou"] == [None if math.isnan(v) else v for v in class_iou(result.confusion[-1]).tolist()]
    assert last["image_miou"] == result.measurements[-1].image_miou != last["miou"]
    absent = dataclasses.replace(result.measurements[-1], confusion=torch.tensor([[1, 0], [0, 0]]))
    assert absent.row["class_iou"] == [1.0, None]
    back = EvaluationResult.from_json(tmp_path / "result.json")
    assert back.run == result.run
    assert [entry.row for entry in back.measurements] == [entry.row for entry in result.measurements]
    odd = content | {"measurements": [last | {"confusion": {"a": 1}}]}
    for other in (json.dumps(odd), '{"rows": []}', "[1]", "3", '{"measurements": 3, "run": {}}', "{"):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match=r"other\.json is no result of an evaluation"):
            EvaluationResult.from_json(tmp_path / "other.json")

    result.to_details_csv(tmp_path / "details.csv")
    with open(tmp_path / "details.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:8] == [
        "arm", "attack", "eps", "steps", "miou", "miou_error", "image_miou", "pixel_accuracy"
    ]  # fmt: skip
    assert [(row["attack"], row["eps"], row["steps"]) for row in rows] == [
        (entry.attack, str(entry.eps), str(entry.steps)) for entry in result.measurements
    ]
    ious = class_iou(result.measurements[-1].confusion).tolist()
    assert [rows[-1][f"iou_{i}"] for i in range(CLASSES)] == ["" if math.isnan(v) else str(v) for v in ious]
    assert results.csv_text([{"a": 1}, {"b": 0.1}]) == "a,b\n1,\n,0.1\n"


def test_progress_bar_counts_passes(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.total, self.n = options["total"], 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, passes: int) -> None:
            self.n += passes

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    evaluate(model, loader, **ARGUMENTS, progress=True)
    assert bars[0].total == bars[0].n == len(loader) * (3 + 2 * 4 + 2 * 4)
    evaluate(model, iter(loader), **ARGUMENTS, progress=True)
    assert bars[1].total is None


def test_attacks_get_stronger_in_the_known_order() -> None:
    """On a network that has learnt something: clean >= FGSM >= PGD-20 >= SegPGD-20, CosPGD-20, up to 1 %."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 5, (16, 4, 6), generator=generator)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.rand(5, 3, generator=generator)[labels].movedim(3, 1)
    images = (0.25 + 0.5 * images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 5, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    result = evaluate(network, [(images, labels)], ["fgsm", "pgd", "segpgd", "cospgd"], [0.0, 0.03], steps=20)
    accuracy = {(row["attack"], row["eps"]): row["pixel_accuracy"] for row in result.rows}
    clean, fgsm, pgd, segpgd, cospgd, worst = (
        accuracy[name, eps]
        for name, eps in [("fgsm", 0.0)] + [(n, 0.03) for n in ("fgsm", "pgd", "segpgd", "cospgd", "worst-case")]
    )
    assert clean > 0.8
    assert fgsm < clean - 0.05
    assert pgd <= fgsm + 0.01
    assert segpgd <= pgd + 0.01
    assert cospgd <= pgd + 0.01
    assert worst <= min(fgsm, pgd, segpgd, cospgd)


def test_images_made_under_inference_mode_stay_as_they_are() -> None:
    class Shifting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.sub_(0.5)

    with torch.inference_mode():
        batch = torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
        before = batch[0].clone()
        evaluate(Shifting(), [batch], {"mine": lambda model, eps: lambda images, labels: images}, [0.0, 0.1])
    assert torch.equal(batch[0], before)


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
        lambda eye: torch.complex(eye, eye).conj(),
    ],
    ids=["sparse", "sparse_csr", "mkldnn", "conjugated"],
)
def test_buffers_of_any_kind_tell_models_apart(
    kind: Callable[[Tensor], Tensor], model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    hashes = []
    for size in (1.0, 1.0, 2.0):
        model.register_buffer("own", kind(size * torch.eye(3)))
        hashes.append(evaluate(model, loader, ["fgsm"], [0.0]).run["model_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_sparse_buffer_that_dense_would_not_fit_into_memory() -> None:
    first, other = ([torch.sparse_coo_tensor([[0], [7]], [value], (10**7, 10**6))] for value in (1.0, 2.0))
    assert records.content_hash(*first) == records.content_hash(*first) != records.content_hash(*other)


def test_entries_of_a_sparse_buffer_may_stand_in_any_order_and_twice() -> None:
    same = [([[0, 2]], [3.0, 1.0]), ([[2, 0]], [1.0, 3.0]), ([[0, 2, 0]], [1.0, 1.0, 2.0])]
    assert len({records.content_hash(torch.sparse_coo_tensor(*entries, (4,))) for entries in same}) == 1


# --- what must not be taken for robustness ------------------------------------------------------------------

PASSES: dict[str, Any] = {
    "fgsm": ["fgsm"], "bim-10": ["bim-10"], "bim": ["bim"], "pgd": ["pgd"], "segpgd": ["segpgd"], "cospgd": ["cospgd"],
    "restarts": {"restarts": lambda model, eps: PGD(model, eps=eps, alpha=eps, steps=2, restarts=2, best=True)},
    "mine": {"mine": lambda model, eps: lambda images, labels: (images + 0.9 * eps).clamp(0, 1)},
}  # fmt: skip


class Overflowing(Counting):
    """NaN for every image out of which an attack was made, or for the first pixel of all."""

    def __init__(self, value: float, *, everywhere: bool) -> None:
        super().__init__()
        self.value, self.everywhere = value, everywhere

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        first = torch.zeros_like(logits)
        first[:, 1, 0, 0] = self.value
        changed = torch.tensor(True) if self.everywhere else (images * 256).frac().any()
        return logits + torch.where(changed, first, torch.zeros_like(first))


@pytest.fixture
def bytes_loader(loader: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Pixels are multiples of 1/256, the first one is labelled."""
    for _, labels in loader:
        labels[:, 0, 0] = 2
    return [((images * 256).floor() / 256, labels) for images, labels in loader]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(
    value: float, tmp_path: Path, bytes_loader: list[tuple[Tensor, Tensor]]
) -> None:
    message = r"model: its logits are NaN or infinite at labelled pixels of 3 images, and nothing can be measured"
    for attacks in (["fgsm"], ["pgd"], PASSES["mine"]):
        with pytest.raises(ValueError, match=message):
            evaluate(Overflowing(value, everywhere=True), bytes_loader, attacks, [0.0, 0.1], records=tmp_path)
    assert not list(tmp_path.iterdir())
    void = [(images, labels.clone()) for images, labels in bytes_loader]
    for _, labels in void:
        labels[:, 0, 0] = 255
    evaluate(Overflowing(value, everywhere=True), void, ["fgsm", "pgd"], [0.0, 0.1], steps=3)  # where nothing counts
    twos = [(images, labels.where(labels != 255, 2)) for images, labels in bytes_loader]
    evaluate(Overflowing(value, everywhere=True), twos, ["fgsm", "pgd"], [0.0, 0.1], steps=3, ignore_index=2)
    evaluate(Overflowing(-math.inf, everywhere=True), bytes_loader, ["fgsm"], [0.0, 0.1])  # a class that is left out


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("sharded", [False, True])
def test_logits_that_are_no_numbers_under_an_attack_are_an_error(
    name: str, sharded: bool, tmp_path: Path, bytes_loader: list[tuple[Tensor, Tensor]]
) -> None:
    model, images = Overflowing(math.nan, everywhere=False), 6 if sharded else 3
    evaluate(model, bytes_loader, PASSES[name], [0.0])
    with pytest.raises(ValueError, match=rf"pixels of {images} images under attack '{name}' at eps 0.1, and nothing"):
        evaluate(model, bytes_loader, PASSES[name], [0.0, 0.1], steps=4, records=tmp_path, sharded=sharded)
    assert {path.name.partition("-0-")[0] for path in tmp_path.iterdir()} <= {"clean"}


@pytest.mark.parametrize("name", [name for name in PASSES if name != "mine"])
def test_attacks_that_find_no_gradient_are_told_of(
    name: str, tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    class Rounding(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            some = (images - images.detach()) * (images.mean((1, 2, 3)) > 0.5).view(-1, 1, 1, 1)
            return super().forward(images.detach() + some)  # no gradient for the other images

    loader = [(images, labels) for images, labels in loader if (images.mean((1, 2, 3)) <= 0.5).any()]
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    labels[(images.mean((1, 2, 3)) <= 0.5).nonzero()[0]] = 255  # an image with nothing to attack is no sign
    unmoved = int((images.mean((1, 2, 3)) <= 0.5).sum()) - 1
    assert unmoved > 0
    batch = [(images, labels)]
    told = rf"attack '{name}' left images where it began: {unmoved} at eps 0.01, {unmoved} at eps 0.02. Their gradients"
    for _ in range(2):  # not recorded: told again
        with pytest.warns(UserWarning, match=told):
            evaluate(Rounding(model), batch, PASSES[name], [0.0, 0.01, 0.02], steps=4, records=tmp_path)
    kept = len([*tmp_path.iterdir()])
    moved = images * 0.4 + 0.55
    with pytest.warns(UserWarning, match=told):
        evaluate(Rounding(model), [*batch, (moved, labels)], PASSES[name], [0.0, 0.01, 0.02], steps=4, records=tmp_path)
    assert len([*tmp_path.iterdir()]) == kept + 3, "all of the other batch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, batch, PASSES[name], [0.0, 0.01, 0.02], steps=4)


def last_only(images: Tensor) -> Tensor:
    """bool [N], whether the images have gone almost as far as they may."""
    return ((images * 256 - (images * 256).round()).abs() > 256 * 0.0009).flatten(1).any(1)


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("best", [False, True])
def test_logits_that_are_no_numbers_at_the_last_iterate_are_an_error(
    restarts: int, best: bool, bytes_loader: list[tuple[Tensor, Tensor]]
) -> None:
    class Late(Counting):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return torch.where(last_only(images).view(-1, 1, 1, 1), math.nan, logits)

    def attack(model: nn.Module, eps: float) -> BIM:
        options: dict[str, Any] = {"eps": eps, "alpha": eps / 4, "steps": 4, "best": best}
        return BIM(model, **options) if restarts == 1 else PGD(model, **options, restarts=2)

    for images, labels in bytes_loader:
        labels[:] = 2  # of which NaN is none: an iterate that is NaN is the worst
        images.clamp_(0.1, 0.9)
    loader = [((images * 256).floor() / 256, labels) for images, labels in bytes_loader]
    with pytest.raises(ValueError, match=r"its logits are NaN or infinite at labelled pixels of \d images under"):
        evaluate(Late(), loader, {"late": attack}, [0.001])
    with pytest.raises(ValueError, match=r"pixels of \d images under attack 'bim-10' at eps 0.001, and nothing"):
        evaluate(Late(), loader, ["bim-10"], [0.0005, 0.001])  # at the first eps all is well


def test_gradients_that_are_nan_are_told_of(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images) + (images * 0).sum(1, keepdim=True).sqrt()

    for attacks in (["fgsm"], ["bim"], {"fgsm": lambda network, eps: FGSM(network, eps=eps)}):
        with pytest.warns(UserWarning, match="left images where it began: 6 at eps 0.01. Their gradients are 0 or NaN"):
            evaluate(Root(), loader, attacks, [0.01], steps=3)


def test_attacks_that_have_nothing_to_do_are_not_told_of(loader: list[tuple[Tensor, Tensor]]) -> None:
    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([images[:, :1] * 0 + 300, images], 1)

    wrong = [(images, torch.ones_like(labels)) for images, labels in loader]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Sure(), wrong, ["fgsm", "cospgd", "segpgd"], [0.0, 0.03], steps=3)


def test_an_attack_that_stays_on_purpose_is_not_told_of(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    """Fast Newton, where the averaged gain is negative although some pixels are right."""
    mixed = []
    for images, _ in loader:
        prediction = model(images).argmax(1)
        labels = (prediction + 1) % CLASSES
        labels[:, 0] = prediction[:, 0]
        mixed.append((images, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newton = {"newton": lambda network, eps: FastNewton(network, clamp_negative=True)}
        result = evaluate(model, mixed, newton, [0.0, 0.03])
    accuracy = [row["pixel_accuracy"] for row in result.rows]
    assert accuracy == pytest.approx([1 / 12, 1 / 12])


def test_a_restart_that_moves_an_image_is_enough(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, runs = PGD._iterate, []

    for parity in (0, 1):

        def stuck(self: PGD, *args: Any, parity: int = parity, **options: Any) -> Any:
            run = genuine(self, *args, **options)
            runs.append(run)
            return run._replace(unmoved=run.unmoved | (len(runs) % 2 == parity))

        monkeypatch.setattr(PGD, "_iterate", stuck)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate(model, loader, PASSES["restarts"], [0.03])
    assert len(runs) == 2 * 2 * len(loader)


def test_targeted_attacks_are_refused(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    attacks = {"to": lambda network, eps: PGD(network, eps=eps, alpha=eps, targeted=True)}
    with pytest.raises(ValueError, match=r"attacks\['to'\] must not be targeted.*PGD\(model, eps=eps, targeted=True\)"):
        evaluate(model, loader, attacks, [0.01])


def test_images_out_of_the_box_are_refused(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    """However little: an attack would bring them back into it, farther than eps."""
    images, labels = loader[1]
    with pytest.raises(ValueError, match=r"batch 1 of the loader: pixels must be in \[0, 1\].*images.clamp\(0, 1\)"):
        evaluate(model, [loader[0], (images * 1.03, labels)], ["fgsm"], [0.01])
    evaluate(model, [(images.clamp(0.1) * (1 + 2e-7), labels)], ["fgsm"], [0.01])


class Centred(nn.Module):
    """What adds up to 1 over the classes, and may be negative."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True) + 1 / logits.shape[1]


class Larger(nn.Softmax):
    """What is positive, and adds up to something else."""

    def forward(self, logits: Tensor) -> Tensor:
        return 1.5 * super().forward(logits)


@pytest.mark.parametrize(
    ("final", "told"),
    [(nn.Softmax(1), True), (nn.LogSoftmax(1), False), (nn.Sigmoid(), False), (Centred(), False), (Larger(1), False)],
)
def test_probabilities_in_the_place_of_logits_are_told_of(
    final: nn.Module, told: bool, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(nn.Sequential(model, final), loader, ["fgsm"], [0.0, 0.01])
        evaluate(nn.Sequential(model, final), loader, ["bim"], [0.0])
    assert ["are they probabilities?" in str(each.message) for each in caught] == [True, True] * told
    assert all(each.filename == __file__ for each in caught)


def test_probabilities_are_told_of_again_where_there_are_records(
    tmp_path: Path, model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="are they probabilities?"):
            evaluate(nn.Sequential(model, nn.Softmax(1)), loader, ["fgsm"], [0.0, 0.01], records=tmp_path)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(
    ("by", "message"),
    [
        (math.nan, "attack 'mine' at eps 0.01 gave pixels that are NaN or infinite"),
        (1 / 512, r"model: its logits are NaN or infinite at labelled pixels of \d+ images under attack 'mine'"),
    ],
)
def test_what_is_no_number_in_one_share_is_an_error_in_all(
    at: int, by: float, message: str, bytes_loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loader = Overflowing(math.nan, everywhere=False), bytes_loader
    shares: list[Any] = []
    monkeypatch.setattr(evaluation.distributed, "gather", lambda share: (shares.append(share), shares[:])[1])
    monkeypatch.setattr(evaluation.distributed, "world_size", lambda: 2)
    broken = {"mine": lambda model, eps: lambda images, labels: images + by if rank == at else images}
    for _ in range(2):  # what the first of two processes lacks comes with the second time
        for rank in range(2):
            monkeypatch.setattr(evaluation.distributed, "rank", lambda rank=rank: rank)
            if rank < at and not shares:
                evaluate(model, loader[rank::2], broken, [0.01], sharded=True)
                continue
            with pytest.raises(ValueError, match=message):
                evaluate(model, loader[rank::2], broken, [0.01], sharded=True)
