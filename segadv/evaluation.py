"""Robustness curves: mIoU and pixel accuracy against eps, from one confusion matrix over the whole set.

The evaluation of Wiens & Hammer 2022 (doi 10.5220/0010788400003122): FGSM and BIM with 10 steps of 0.004,
both on the cross-entropy, over eps 0, 0.01, 0.02, 0.03, 0.04.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .attacks import BIM, FGSM
from .attacks.base import frozen, model_logits, unwrapped

__all__ = ["ATTACKS", "EPS", "EvaluationResult", "class_iou", "evaluate", "miou", "pixel_accuracy"]

EPS = (0.0, 0.01, 0.02, 0.03, 0.04)

AttackFactory = Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]
"""(model, eps) -> attack; attack(images [N, 3, H, W], labels [N, H, W]) -> adversarial images."""

Sweep = Callable[[Tensor, Tensor], Iterator[Tensor]]
"""(images, labels) -> the adversarial images of one eps after the other."""


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class: float64 [C], NaN for a class in neither labels nor predictions.

    Args:
        confusion: [C, C] counts, row = label, column = prediction.
    """
    counts = confusion.double()
    intersection = counts.diagonal()
    return intersection / (counts.sum(0) + counts.sum(1) - intersection)


def miou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes in labels or predictions, in [0, 1]; 0 where there is none."""
    iou = class_iou(confusion)
    present = iou[~iou.isnan()]
    return present.mean().item() if len(present) else 0.0


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are predicted correctly, in [0, 1]; 0 where there is none."""
    total = confusion.sum().item()
    return confusion.diagonal().sum().item() / total if total else 0.0


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the same folder, which replaces `path` when the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as CSV text with a header; floats with the digits that give them back exactly."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        rows: one dict per attack and eps: attack, eps, miou, pixel_accuracy; after `merge` with arm in front.
        confusion: per row the int64 [C, C] matrix (row = label, column = prediction) behind its numbers;
            ``class_iou(result.confusion[i])`` are those of the classes.
    """

    rows: list[dict[str, Any]]
    confusion: list[Tensor]

    @staticmethod
    def merge(results: Mapping[str, EvaluationResult]) -> EvaluationResult:
        """One result of several models: arm name -> result."""
        return EvaluationResult(
            [{"arm": arm, **row} for arm, result in results.items() for row in result.rows],
            [matrix for result in results.values() for matrix in result.confusion],
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows under the header ``attack,eps,miou,pixel_accuracy`` (``arm,...`` after `merge`)."""
        with atomic_write(path) as temporary:
            temporary.write_text(csv_text(self.rows), encoding="utf-8")

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes rows and confusion matrices; `from_json` gives the same result back."""
        content = {"rows": self.rows, "confusion": [matrix.tolist() for matrix in self.confusion]}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    @staticmethod
    def from_json(path: str | os.PathLike[str]) -> EvaluationResult:
        """The result that `to_json` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return EvaluationResult(content["rows"], [torch.tensor(matrix) for matrix in content["confusion"]])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws mIoU against eps, one panel per attack, one line per arm. Needs matplotlib."""
        from .plots import plot_robustness

        plot_robustness(self.rows, path)


def _sweep(factory: AttackFactory, model: nn.Module, eps: Sequence[float]) -> Sweep:
    attacks = [factory(model, value) for value in eps]

    def sweep(images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        for attack in attacks:
            yield attack(images, labels)

    return sweep


def _fgsm_sweep(model: nn.Module, eps: Sequence[float], **options: Any) -> Sweep:
    """FGSM's gradient does not depend on eps: one serves all."""
    attack = FGSM(model, **options)

    def sweep(images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        gradient = attack.input_gradient(images, labels)
        for value in eps:
            yield functional.sign_step(images, gradient, value)

    return sweep


def _bim_10_sweep(model: nn.Module, eps: Sequence[float], **options: Any) -> Sweep:
    return _sweep(lambda model, value: BIM(model, eps=value, alpha=0.004, steps=10, **options), model, eps)


ATTACKS: dict[str, Callable[..., Sweep]] = {"fgsm": _fgsm_sweep, "bim-10": _bim_10_sweep}
"""The attacks that `evaluate` knows by name."""


class _Counter:
    """Collects the confusion matrices of a model's predictions."""

    def __init__(self, model: nn.Module, ignore_index: int, align_corners: bool) -> None:
        self.model = unwrapped(model)
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
        self.ignored = f"ignore_index={ignore_index}"
        self.matrices: list[Tensor] = []
        self.invalid: list[Tensor] = []

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor) -> None:
        matrix = functional.confusion_matrix(model_logits(self.model(images)), labels, **self.options)
        self.matrices.append(matrix)
        self.invalid.append(matrix.invalid)  # type: ignore[attr-defined]

    def total(self) -> Tensor:
        """int64 [C, C] on the CPU. Bad labels are looked at only here: on a GPU that waits for all work."""
        if not self.matrices:
            raise ValueError("loader gave no batch")
        if invalid := int(torch.stack(self.invalid).sum()):
            raise ValueError(f"labels must be classes of the model or {self.ignored}; {invalid} pixels are neither")
        matrix = torch.stack(self.matrices).sum(0).cpu()
        if not matrix.any():
            raise ValueError(f"loader gave no pixel whose label is other than {self.ignored}")
        return matrix


def _checked_eps(eps: Sequence[float]) -> list[float]:
    values = [float(value) for value in eps]
    if not values or not all(math.isfinite(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"eps must be numbers in [0, 1], the unit of the images (8/255, not 8), got {eps}")
    if len(set(values)) < len(values):
        raise ValueError(f"eps must not repeat a number, got {eps}")
    return values


def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    attacks: Sequence[str] | Mapping[str, AttackFactory] = ("fgsm", "bim-10"),
    eps: Sequence[float] = EPS,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    progress: bool = False,
) -> EvaluationResult:
    """mIoU and pixel accuracy of a model under attacks, over a range of eps.

    Images are taken whole, as the loader gives them. All pixels of the set go into one confusion matrix per
    attack and eps. eps = 0 is the clean prediction; it is counted once and serves all attacks.

    Args:
        model: takes images in [0, 1]; runs in eval mode where its parameters are, and is left as it was.
        loader: batches whose first two entries are images [N, 3, H, W] in [0, 1] and labels [N, H, W].
        attacks: names out of "fgsm" (one gradient serves all eps) and "bim-10" (10 steps, alpha 0.004, no
            random start), or a mapping from names to factories: ``factory(model, eps)`` gives the attack, and
            ``attack(images, labels)`` the adversarial images.
        eps: the sizes of the perturbation, in the images' unit.
        ignore_index: label of the pixels that count nowhere.
        align_corners: how logits of another size than the labels are resampled.
        progress: shows a progress bar over the batches where stderr is a terminal; needs tqdm.

    Returns:
        An `EvaluationResult` with one row per attack and eps, in the given order. mIoU is the mean over the
        classes that occur in labels or predictions.

    Raises:
        ValueError: an unknown attack, eps outside [0, 1], a loader without a batch or without a labelled
            pixel, labels that are neither a class nor `ignore_index`.
    """
    values = _checked_eps(eps)
    options = {"ignore_index": ignore_index, "align_corners": align_corners}
    positive = [value for value in values if value > 0]
    sweeps: dict[str, Sweep] = {}
    if isinstance(attacks, Mapping):
        sweeps = {name: _sweep(factory, model, positive) for name, factory in attacks.items()}
    else:
        names = [attacks] if isinstance(attacks, str) else attacks
        if unknown := [name for name in names if name not in ATTACKS]:
            raise ValueError(
                f"attacks must be names out of {', '.join(ATTACKS)} or a mapping to factories, got {unknown}"
            )
        sweeps = {name: ATTACKS[name](model, positive, **options) for name in names}
    if not sweeps:
        raise ValueError("attacks must name at least one attack")

    parameter = next(model.parameters(), None)
    counters = {
        key: _Counter(model, ignore_index, align_corners)
        for key in [("clean", 0.0), *((name, value) for name in sweeps for value in positive)]
    }
    batches: Iterable[Sequence[Tensor]] = loader
    if progress:
        from tqdm import tqdm

        batches = tqdm(loader, desc="evaluate", unit="batch", disable=None)  # None: on a terminal only
    with frozen(model):
        for images, labels, *_ in batches:
            if parameter is not None:
                images, labels = images.to(parameter.device), labels.to(parameter.device)
            if 0.0 in values:
                counters["clean", 0.0].add(images, labels)
            for name, sweep in sweeps.items() if positive else ():
                for value, adversarial in zip(positive, sweep(images, labels), strict=True):
                    counters[name, value].add(adversarial, labels)

    rows, confusion = [], []
    for name in sweeps:
        for value in values:
            matrix = counters[name if value > 0 else "clean", value].total()
            rows.append({"attack": name, "eps": value, "miou": miou(matrix), "pixel_accuracy": pixel_accuracy(matrix)})
            confusion.append(matrix)
    return EvaluationResult(rows, confusion)
