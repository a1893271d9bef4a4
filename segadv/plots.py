"""The figures: robustness curves, overhead, what an attack does to a prediction. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .data import CLASSES, COLORS
from .results import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_overhead", "plot_qualitative", "plot_robustness"]

# label, colour (Okabe & Ito's palette, which colour-blind readers tell apart), marker
_ARMS: dict[str, tuple[str, str, str]] = {
    "basic": ("basic", "#000000", "o"),
    "fgsm": ("FGSM", "#E69F00", "s"),
    "random-fgsm": ("random FGSM", "#56B4E9", "^"),
    "bim-3": ("BIM-3", "#009E73", "D"),
    "fast-newton": ("Fast Newton", "#D55E00", "v"),
}
_FURTHER = (("#0072B2", "p"), ("#CC79A7", "X"), ("#999999", "*"))
_REFERENCE_MARKERS = (("o", False), ("D", False), ("s", True))
_RC: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _style(arms: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """(label, colour, marker) of each arm: an arm looks the same in every figure."""
    further = [arm for arm in arms if arm not in _ARMS]
    return {arm: _ARMS[arm] for arm in arms if arm in _ARMS} | {
        arm: (arm, *_FURTHER[i % len(_FURTHER)]) for i, arm in enumerate(further)
    }


def _attack_title(attack: str) -> str:
    return {"fgsm": "FGSM", "bim-10": "BIM-10"}.get(attack, attack)


def plot_robustness(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """mIoU against eps, one panel per attack, one line per arm.

    Args:
        rows: dicts with attack, eps, miou and, where there are several models, arm.
        path: the PNG file to write.
    """
    from matplotlib import rc_context

    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    style = _style(list(dict.fromkeys(row.get("arm", "") for row in rows)))
    with rc_context(_RC):
        figure = _figure(5 * len(attacks), 4.4)
        axes = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
        for panel, attack in zip(axes, attacks, strict=True):
            for arm, (label, color, marker) in style.items():
                line = sorted(
                    (row["eps"], row["miou"]) for row in rows if row["attack"] == attack and row.get("arm", "") == arm
                )
                eps, miou = zip(*line, strict=True)
                panel.plot(eps, miou, color=color, marker=marker, ms=9, mec="w", lw=2.2, label=label)
            panel.set_title(f"attack: {_attack_title(attack)}")
            panel.set_xlabel("eps")
            panel.set_xticks(sorted({row["eps"] for row in rows}))
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("mIoU")
        if any(style):
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        _save(figure, path)


def plot_overhead(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Additional time of a training step in percent of the basic arm's median, with the spread p20 to p80.

    Args:
        rows: dicts with arm, step_ms_p20, step_ms_p50, step_ms_p80, overhead_percent; one arm is "basic".
        path: the PNG file to write.
        references: name of a source -> arm -> percent, drawn as markers beside the bars.
    """
    from matplotlib import rc_context

    basic = next(row["step_ms_p50"] for row in rows if row["arm"] == "basic")
    bars = [row for row in rows if row["arm"] != "basic"]
    style = _style([row["arm"] for row in bars])
    with rc_context(_RC):
        figure = _figure(8.5, 4.6)
        axes = figure.subplots()
        # A disturbed machine's spread must not squash everything else.
        top = 1.4 * max(
            [row["overhead_percent"] for row in bars] + [v for p in references.values() for v in p.values()]
        )
        for x, row in enumerate(bars):
            value = row["overhead_percent"]
            low, high = ((row[f"step_ms_{q}"] / basic - 1) * 100 for q in ("p20", "p80"))
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.bar(x - 0.2, value, width=0.4, color=style[row["arm"]][1])
            axes.errorbar(x - 0.2, value, spread, color="#333333", capsize=6, lw=1.5)
            axes.annotate(
                f"{value:.0f} %", (x - 0.2, min(max(value, high), top)), (0, 4), textcoords="offset points", ha="center"
            )
        for i, (source, percent) in enumerate(references.items()):
            known = [(x, percent[row["arm"]]) for x, row in enumerate(bars) if row["arm"] in percent]
            marker, filled = _REFERENCE_MARKERS[i % len(_REFERENCE_MARKERS)]
            axes.scatter(
                [x + 0.1 + 0.13 * i for x, _ in known],
                [value for _, value in known],
                marker=marker,
                s=70,
                facecolors="#0072B2" if filled else "w",
                edgecolors="#0072B2",
                linewidths=1.8,
                zorder=3,
                label=source,
            )
        axes.set_ylim(top=1.08 * top)
        axes.axhline(0, color="#333333", lw=1)
        axes.grid(False, axis="x")
        axes.set_xticks(range(len(bars)), [style[row["arm"]][0] for row in bars])
        axes.set_ylabel("additional training time in %")
        axes.set_title(
            f"a step of the basic arm takes {basic:.0f} ms; bars: medians measured here, whiskers p20 to p80"
        )
        figure.legend(loc="outside lower center", ncols=len(references))
        _save(figure, path)


def _painted(labels: Tensor) -> npt.NDArray[np.uint8]:
    """Labels [H, W] in Cityscapes' colours: uint8 [H, W, 3]; black where there is no class."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(COLORS)] = COLORS
    painted: npt.NDArray[np.uint8] = palette[labels.cpu().numpy()]
    return painted


def _pixels(image: Tensor) -> npt.NDArray[np.float32]:
    pixels: npt.NDArray[np.float32] = image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return pixels


def plot_qualitative(
    examples: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, attack: str, eps: float
) -> None:
    """One row per example: image, label, prediction, adversarial image, its prediction, perturbation x10.

    Args:
        examples: dicts with arm; image and adversarial, float [3, H, W] in [0, 1]; label, prediction and
            adversarial_prediction, uint8 [H, W] (255: no class).
        path: the PNG file to write.
        attack, eps: what made the adversarial images, for the titles.
    """
    from matplotlib import rc_context
    from matplotlib.patches import Patch

    titles = (
        "image",
        "label",
        "prediction",
        f"{_attack_title(attack)}, eps {eps:g}",
        "its prediction",
        "perturbation x10",
    )
    style = _style([example["arm"] for example in examples])
    height, width = examples[0]["label"].shape
    cell = 12 / len(titles)
    with rc_context(_RC):
        figure = _figure(12, cell * height / width * len(examples) + 1.1)
        cells = figure.subplots(len(examples), len(titles), squeeze=False)
        present: set[int] = set()
        for line, example in zip(cells, examples, strict=True):
            image, adversarial = example["image"], example["adversarial"]
            maps = [example[key] for key in ("label", "prediction", "adversarial_prediction")]
            label, prediction, adversarial_prediction = map(_painted, maps)
            present.update(value for values in maps for value in values.unique().tolist())
            perturbation = _pixels(0.5 + 10 * (adversarial - image))
            attacked = (_pixels(adversarial), adversarial_prediction, perturbation)
            for axes, picture in zip(line, (_pixels(image), label, prediction, *attacked), strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(style[example["arm"]][0])
        for axes, title in zip(cells[0], titles, strict=True):
            axes.set_title(title)
        patches = [
            Patch(facecolor="#{:02x}{:02x}{:02x}".format(*COLORS[i]), label=CLASSES[i])
            for i in sorted(present)
            if i < len(CLASSES)
        ] + [Patch(facecolor="k", label="not labelled")] * (255 in present)
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=10)
        _save(figure, path)
