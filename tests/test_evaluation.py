"""Evaluation: the metric against torchmetrics, the work it takes, and its files."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from segadv import evaluation, functional
from segadv.attacks import BIM, FGSM
from segadv.evaluation import EvaluationResult, class_iou, evaluate, miou, pixel_accuracy
from segadv.models import small_pspnet

CLASSES = 19


class Counting(nn.Module):
    """A small network that counts its forward passes and those of them that were differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(CLASSES)
        self.forwards = 0
        self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.dropout(self.norm(self.conv(images)))
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


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


def test_fgsm_takes_one_gradient_for_all_eps_and_clean_is_shared(
    model: Counting, loader: list[tuple[Tensor, Tensor]]
) -> None:
    batches = len(loader)
    evaluate(model, loader, ["fgsm"], [0, 0.01, 0.02, 0.03, 0.04])
    assert model.backwards == batches
    assert model.forwards == batches * 6  # clean, gradient, four adversarial

    model.forwards = model.backwards = 0
    result = evaluate(model, loader, ["fgsm", "bim-10"], [0, 0.01, 0.02, 0.03, 0.04])
    assert model.backwards == batches * (1 + 4 * 10)
    assert model.forwards == batches * (6 + 4 * 11)
    assert result.rows[0] == {**result.rows[5], "attack": "fgsm"}


def test_shared_gradient_is_fgsm(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    eps = [0.0, 0.005, 0.03]
    shared = evaluate(model, loader, ["fgsm"], eps)
    single = evaluate(model, loader, {"fgsm": lambda network, value: FGSM(network, eps=value)}, eps)
    assert shared.rows == single.rows
    assert shared.rows[2]["pixel_accuracy"] < shared.rows[0]["pixel_accuracy"]


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


def test_rows_are_in_the_given_order_and_repeatable(model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, ["bim-10", "fgsm"], [0.02, 0.0, 0.01])
    assert [(row["attack"], row["eps"]) for row in result.rows] == [
        (attack, eps) for attack in ("bim-10", "fgsm") for eps in (0.02, 0.0, 0.01)
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
        ({"attacks": ["fgms"]}, r"attacks must be names out of fgsm, bim-10.*\['fgms'\]"),
        ({"attacks": []}, "attacks must name at least one"),
        ({"eps": []}, "eps must be numbers in"),
        ({"eps": [8.0]}, r"8/255, not 8.*\[8.0\]"),
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
    ],
)
def test_bad_arguments(model: Counting, loader: list[tuple[Tensor, Tensor]], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, **{"loader": loader, **arguments})


def test_invalid_labels_that_a_gpu_only_counts_raise_at_the_end(
    model: Counting, loader: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = functional.confusion_matrix

    def counting(*args, **kwargs):
        matrix = genuine(*args, **kwargs)
        matrix.invalid = torch.tensor(2)
        return matrix

    monkeypatch.setattr(functional, "confusion_matrix", counting)
    with pytest.raises(ValueError, match="6 pixels are neither"):
        evaluate(model, loader, eps=[0.0])
    assert model.forwards == len(loader), "looked at before the end"


def test_files(tmp_path, model: Counting, loader: list[tuple[Tensor, Tensor]]) -> None:
    result = evaluate(model, loader, eps=[0.0, 0.02])
    result.to_csv(tmp_path / "single.csv")
    assert (tmp_path / "single.csv").read_text().splitlines()[0] == "attack,eps,miou,pixel_accuracy"

    result.to_json(tmp_path / "result.json")
    back = EvaluationResult.from_json(tmp_path / "result.json")
    assert back.rows == result.rows
    assert all(map(torch.equal, back.confusion, result.confusion))

    merged = EvaluationResult.merge({"basic": result, "fast-newton": back})
    merged.to_csv(tmp_path / "curves.csv")
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["arm", "attack", "eps", "miou", "pixel_accuracy"]
    assert [row["arm"] for row in rows] == ["basic"] * 4 + ["fast-newton"] * 4
    assert [float(row["miou"]) for row in rows] == [row["miou"] for row in merged.rows]
    assert len(merged.confusion) == 8


def test_interrupted_write_leaves_the_previous_file(tmp_path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("previous")

    def write_half() -> None:
        with evaluation.atomic_write(path) as temporary:
            temporary.write_text("hal")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "previous"

    with path.open() as reader:
        with evaluation.atomic_write(path) as temporary:
            temporary.write_text("whole")
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
