"""What an evaluation measures, and its files: metrics from confusion matrices, results as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .writing import write_text

__all__ = [
    "EvaluationResult",
    "Measurement",
    "class_iou",
    "csv_text",
    "miou",
    "miou_difference",
    "overlap",
    "pixel_accuracy",
    "read_rows",
]


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class: float64 [..., C], NaN for a class in neither labels nor predictions.

    IoU_c = M_cc / (sum_k M_kc + sum_k M_ck - M_cc).

    Args:
        confusion: [..., C, C] counts, row = label, column = prediction.
    """
    intersection, union = overlap(confusion).unbind(-2)
    return intersection.double() / union


def overlap(confusion: Tensor) -> Tensor:
    """[..., C, C] -> [..., 2, C]: the classes' intersections of labels and predictions, and their unions."""
    intersection = confusion.diagonal(dim1=-2, dim2=-1)
    return torch.stack((intersection, confusion.sum(-2) + confusion.sum(-1) - intersection), -2)


def miou(confusion: Tensor) -> float:
    """Mean of `class_iou` over the classes in labels or predictions, in [0, 1]; 0 where there is none."""
    iou = class_iou(confusion)
    present = iou[~iou.isnan()]
    return present.mean().item() if len(present) else 0.0


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are predicted correctly, in [0, 1]; 0 where there is none."""
    total = confusion.sum().item()
    return confusion.diagonal().sum().item() / total if total else 0.0


def wrong_pixels(confusion: Tensor) -> Tensor:
    """Number of counted pixels that are predicted wrongly: [..., C, C] -> int64 [...]."""
    return confusion.sum((-2, -1)) - confusion.diagonal(dim1=-2, dim2=-1).sum(-1)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV text with a header; floats with the digits that give them back exactly. Keys that a row does not
    have are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of curves.csv or overhead.csv: words in the columns arm and attack, numbers in the others."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key in ("arm", "attack") else float(value) for key, value in row.items()} for row in rows]


@dataclass(frozen=True)
class Measurement:
    """A model under one attack.

    Attributes:
        arm: name of the model; "" before `EvaluationResult.merge`.
        attack: its name, "worst-case" or "worst-case-miou".
        eps: 0 is the clean prediction.
        steps: of the attack; 0 where eps is 0. For a worst case the largest of the attacks' numbers.
        confusion: int64 [C, C] over all pixels of the set, row = label, column = prediction.
        miou_of_each: float64 [N], the mIoU of each image with a labelled pixel, in their order, over the classes in its
            labels or predictions.
        without_each: float64 [N], the mIoU of the set without the first of these images, without the second, and so on.
    """

    arm: str
    attack: str
    eps: float
    steps: int
    confusion: Tensor
    miou_of_each: Tensor
    without_each: Tensor

    @property
    def image_miou(self) -> float:
        """Mean of `miou_of_each`."""
        return self.miou_of_each.mean().item()

    @property
    def row(self) -> dict[str, Any]:
        """Its numbers: miou and pixel_accuracy over all pixels; miou_error, the standard error of miou over the choice
        of the images (a jackknife), None for one labelled image; class_iou with None for classes that are absent."""
        iou = class_iou(self.confusion).tolist()
        return {
            "arm": self.arm,
            "attack": self.attack,
            "eps": self.eps,
            "steps": self.steps,
            "miou": miou(self.confusion),
            "miou_error": _jackknife(self.without_each),
            "image_miou": self.image_miou,
            "pixel_accuracy": pixel_accuracy(self.confusion),
            "class_iou": [None if math.isnan(value) else value for value in iou],
        }


def _jackknife(without_each: Tensor) -> float | None:
    """Standard error of a statistic of N images whose values without each of them these are: [N]."""
    count = len(without_each)
    if count < 2:
        return None
    return math.sqrt((count - 1) * without_each.var(correction=0).item())


def miou_difference(first: Measurement, second: Measurement) -> tuple[float, float | None]:
    """The first's mIoU less the second's, and the standard error of that over the choice of the images.

    Both are of the same images, in the same order: what makes some of them hard for both cancels. The error says
    nothing about other trainings of the same network.

    Source: the jackknife (Quenouille 1956; Tukey 1958): sqrt((N - 1) / N * sum_i (d_i - mean d)^2), d_i the difference
    without image i; None for one image.

    Raises:
        ValueError: measurements of different numbers of images, or of images with different labels.
    """
    if len(first.without_each) != len(second.without_each):
        counts = f"{len(first.without_each)} and {len(second.without_each)}"
        raise ValueError(f"first and second must be of the same images, got {counts} of them")
    labels = [entry.confusion.sum(1) for entry in (first, second)]
    if not torch.equal(*(pixels[pixels > 0] for pixels in labels)):  # one may have further classes
        raise ValueError("first and second must be of the same images, got ones with other labels")
    difference = miou(first.confusion) - miou(second.confusion)
    return difference, _jackknife(first.without_each - second.without_each)


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        measurements: one `Measurement` for every attack, eps and number of steps that was looked at.
        run: what is needed to repeat it: hashes of model and data, arguments of the attacks, seed, versions.
            After `merge`: arm -> run.
    """

    measurements: list[Measurement]
    run: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The curves as a table."""
        rows = [[row.get("arm", ""), row["attack"], f"{row['eps']:g}"] for row in self.rows]
        lines = [["arm", "attack", "eps", "mIoU", "pixel accuracy"]]
        for texts, row in zip(rows, self.rows, strict=True):
            lines.append([*texts, f"{row['miou']:.4f}", f"{row['pixel_accuracy']:.4f}"])
        first = 0 if any(line[0] for line in lines[1:]) else 1
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(map(str.ljust, line[first:], widths[first:])).rstrip() for line in lines)
        return "\n".join([f"{type(self).__name__}:", *table])

    @property
    def final(self) -> list[Measurement]:
        """Of each arm, attack and eps the measurement after all steps."""
        last = {(entry.arm, entry.attack, entry.eps): entry for entry in self.measurements}
        return list(last.values())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The curves over eps: one dict per attack and eps with attack, eps, miou, pixel_accuracy; after `merge`
        with arm in front."""
        names = ("arm", "attack", "eps", "miou", "pixel_accuracy")
        return [
            {name: value for name, value in entry.row.items() if name in names and (name != "arm" or entry.arm)}
            for entry in self.final
        ]

    @property
    def confusion(self) -> list[Tensor]:
        """The int64 [C, C] matrix behind each of `rows`."""
        return [entry.confusion for entry in self.final]

    @staticmethod
    def merge(results: Mapping[str, EvaluationResult]) -> EvaluationResult:
        """One result of several models: arm name -> result of one model, be it from a report, under another name.

        Raises:
            ValueError: a result that is of several models itself.
        """
        measurements, runs = [], {}
        for name, result in results.items():
            arm, *others = dict.fromkeys(entry.arm for entry in result.measurements) or [""]
            if others:
                raise ValueError(f"results: {name!r} must be of one model, got one of {', '.join([arm, *others])}")
            measurements += [replace(entry, arm=name) for entry in result.measurements]
            runs[name] = result.run[arm] if arm else result.run
        return EvaluationResult(measurements, runs)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `rows` under the header ``attack,eps,miou,pixel_accuracy`` (``arm,...`` after `merge`)."""
        write_text(path, csv_text(self.rows))

    def to_details_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all numbers of all measurements, also those on the way: ``arm,attack,eps,steps,miou,miou_error,
        image_miou,pixel_accuracy,iou_0,iou_1,...``; an absent class's cell is empty."""
        rows = []
        for entry in self.measurements:
            row = entry.row
            iou = row.pop("class_iou")
            rows.append(row | {f"iou_{i}": value for i, value in enumerate(iou)})
        write_text(path, csv_text(rows))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `run`, `rows` and all measurements; `from_json` gives the same result back."""
        measurements = [
            entry.row | {name: getattr(entry, name).tolist() for name in ("confusion", "miou_of_each", "without_each")}
            for entry in self.measurements
        ]
        content = {"run": self.run, "rows": self.rows, "measurements": measurements}
        write_text(path, json.dumps(content, allow_nan=False))

    @staticmethod
    def from_json(path: str | os.PathLike[str]) -> EvaluationResult:
        """The result that `to_json` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        names = ("arm", "attack", "eps", "steps")
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            measurements = [
                Measurement(
                    **{name: entry[name] for name in names},
                    confusion=torch.tensor(entry["confusion"], device="cpu"),
                    miou_of_each=torch.tensor(entry["miou_of_each"], dtype=torch.float64, device="cpu"),
                    without_each=torch.tensor(entry["without_each"], dtype=torch.float64, device="cpu"),
                )
                for entry in content["measurements"]
            ]
            return EvaluationResult(measurements, content["run"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is no result of an evaluation by this version of segadv") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws mIoU against eps, one panel per attack, one line per arm. Needs matplotlib."""
        from .plots import plot_robustness

        plot_robustness(self.rows, path)
