"""The figures: curves over eps, steps and training, IoU of classes, overhead, what an attack does. Needs matplotlib."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .data import CLASSES, COLORS
from .writing import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T", int, float)

__all__ = ["plot_overhead", "plot_per_class", "plot_qualitative", "plot_robustness", "plot_steps", "plot_training"]

# label, colour (Okabe & Ito's palette, which colour-blind readers tell apart), marker
_ARMS: dict[str, tuple[str, str, str]] = {
    "basic": ("basic", "#000000", "o"),
    "fgsm": ("FGSM", "#E69F00", "s"),
    "random-fgsm": ("random FGSM", "#56B4E9", "^"),
    "bim-3": ("BIM-3", "#009E73", "D"),
    "fast-newton": ("Fast Newton", "#D55E00", "v"),
    "segpgd-3": ("SegPGD-3", "#0072B2", "p"),
    "pgd-3": ("PGD-3", "#CC79A7", "X"),
    "segpgd-7": ("SegPGD-7", "#0072B2", "*"),
    "pgd-7": ("PGD-7", "#CC79A7", "P"),
    "rs-fgsm": ("RS-FGSM", "#999999", "<"),
    "n-fgsm": ("N-FGSM", "#999999", ">"),
    "kim": ("Kim et al.", "#666666", "h"),
}
# of arms with other names; as many colours as have no factor in common with the number of markers: 15 pairs
_FURTHER_COLORS = ("#0072B2", "#CC79A7", "#999999", "#E69F00", "#009E73")
_FURTHER_MARKERS = ("d", "H", "8")
_ATTACKS = {
    "fgsm": "FGSM",
    "bim": "BIM",
    "bim-10": "BIM-10",
    "pgd": "PGD",
    "segpgd": "SegPGD",
    "cospgd": "CosPGD",
    "cospgd-balanced": "CosPGD, balanced",
    **{f"pgd-{steps}": f"PGD-{steps}" for steps in (10, 20, 40, 100)},
    **{f"segpgd-{steps}": f"SegPGD-{steps}" for steps in (10, 20, 40, 100)},
    "worst-case": "worst per image, by pixels",
    "worst-case-miou": "worst per image, by mIoU",
}
_COLUMNS = 3
_LINE = 0.22  # about its height, in inches
_UNLABELLED = (255, 255, 255)  # no class has it; black is VOC's background
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
    "text.parse_math": False,  # a name may have a $
}


def _settings() -> Any:
    """Those of all figures, while they are drawn."""
    from matplotlib import rc_context

    return rc_context(_RC)


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
        arm: (arm, _FURTHER_COLORS[i % len(_FURTHER_COLORS)], _FURTHER_MARKERS[i % len(_FURTHER_MARKERS)])
        for i, arm in enumerate(further)
    }


def attack_title(attack: str) -> str:
    """An attack's name for readers."""
    return _ATTACKS.get(attack, attack)


def _panels(figure: Figure, count: int) -> list[Any]:
    """Axes in rows of three, with one scale for y; those that are too many are taken away."""
    columns = min(count, _COLUMNS)
    axes: list[Any] = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=True).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def _panel_size(count: int) -> tuple[float, float]:
    return 5.0 * min(count, _COLUMNS), 0.6 + 3.8 * -(-count // _COLUMNS)


def _wrapped(label: str, room: float, size: float = 12) -> str:
    """In lines of at most so many inches."""
    columns = max(1, len(label))
    while True:
        lines = textwrap.wrap(label, columns) or [""]
        if columns == 1 or _width(lines, size) <= room:
            return "\n".join(lines)
        columns -= 1


def _width(lines: Iterable[str], size: float = 12) -> float:
    """Of the widest one, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    figure = _figure(1, 1)
    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=size)
    widths: list[float] = [renderer.get_text_width_height_descent(line, font, False)[0] for line in lines]
    return max(widths) / figure.dpi


def _legend(figure: Figure, entries: Sequence[tuple[str, Any]], *, most: int = 6, size: float = 12) -> None:
    """(label, handle) below everything, in as many columns as the figure is wide enough for; it becomes higher."""
    if not any(label for label, _ in entries):  # a single line without a name
        return
    width, height = figure.get_size_inches()
    labels = [_wrapped(label, width - 1, size) for label, _ in entries]
    widest = _width([line for label in labels for line in label.split("\n")], size)
    columns = max(1, min(len(labels), most, int(width / (0.8 + widest))))
    lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(height + _LINE * max(0, -(-lines // columns) - 1))
    labels = [f" {label}" if label.startswith("_") else label for label in labels]  # which matplotlib leaves out
    handles = [handle for _, handle in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=size)


def plot_robustness(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """mIoU against eps, one panel per attack, one line per arm: of several seeds the mean, in a band from the least
    to the greatest.

    Args:
        rows: dicts with attack, eps, miou and, where there are several models, arm; those that agree in arm, attack
            and eps are of different seeds.
        path: the PNG file to write.
    """
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    style = _style(list(dict.fromkeys(row.get("arm", "") for row in rows)))
    with _settings():
        figure = _figure(*_panel_size(len(attacks)))
        axes = _panels(figure, len(attacks))
        handles: dict[str, Any] = {}  # of all arms, each of which may miss in some panels
        for panel, attack in zip(axes, attacks, strict=True):
            for arm, (label, color, marker) in style.items():
                line: dict[float, list[float]] = {}
                for row in rows:
                    if row["attack"] == attack and row.get("arm", "") == arm:
                        line.setdefault(row["eps"], []).append(row["miou"])
                if not line:  # another attack was made on this arm
                    continue
                eps = sorted(line)
                if max(map(len, line.values())) > 1:
                    low, high = ([edge(line[x]) for x in eps] for edge in (min, max))
                    panel.fill_between(eps, low, high, color=color, alpha=0.18, lw=0)
                mean = [float(np.mean(line[x])) for x in eps]
                (handles[label],) = panel.plot(eps, mean, color=color, marker=marker, ms=9, mec="w", lw=2.2)
            panel.set_title(f"attack: {attack_title(attack)}")
            panel.set_xlabel("eps")
            ticks = _apart(sorted({row["eps"] for row in rows}))
            panel.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
        for panel in axes[::_COLUMNS]:
            panel.set_ylabel("mIoU")
        axes[0].set_ylim(0, 1.08 * axes[0].get_ylim()[1])  # of all; room for markers
        _legend(figure, list(handles.items()))
        _save(figure, path)


def _apart(ticks: Sequence[T], place: Callable[[T], float] = float) -> list[T]:
    """Without those whose labels would lie on that of the one before."""
    kept = [ticks[0]]
    for tick in ticks[1:]:
        if place(tick) - place(kept[-1]) > 0.07 * (place(ticks[-1]) - place(ticks[0])):
            kept.append(tick)
    return kept


def plot_steps(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, eps: float) -> None:
    """mIoU against the number of steps at one eps, one panel per attack, one line per arm.

    Args:
        rows: dicts with arm, attack, eps, steps, miou; attacks that were seen at one number of steps only are
            left out.
        path: the PNG file to write.

    Raises:
        ValueError: no attack has several numbers of steps at this eps.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["eps"] == eps:
            lines.setdefault(row["attack"], {}).setdefault(row["arm"], []).append((row["steps"], row["miou"]))
    lines = {attack: arms for attack, arms in lines.items() if max(map(len, arms.values())) > 1}
    if not lines:
        raise ValueError(f"eps: no attack was judged after several numbers of steps at {eps:g}")
    style = _style(list(dict.fromkeys(arm for arms in lines.values() for arm in arms)))
    counts = {steps for arms in lines.values() for line in arms.values() for steps, _ in line}
    ticks = _apart(sorted(counts, reverse=True), lambda steps: -math.log(steps))  # the last one has a label
    with _settings():
        figure = _figure(*_panel_size(len(lines)))
        axes = _panels(figure, len(lines))
        handles: dict[str, Any] = {}
        for panel, (attack, arms) in zip(axes, lines.items(), strict=True):
            for arm, line in arms.items():
                label, color, marker = style[arm]
                steps, miou = zip(*sorted(line), strict=True)
                (handles[label],) = panel.plot(steps, miou, color=color, marker=marker, ms=9, mec="w", lw=2.2)
            panel.set_title(f"attack: {attack_title(attack)}, eps {eps:g}")
            panel.set_xscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_xlabel("steps")
        for panel in axes[::_COLUMNS]:
            panel.set_ylabel("mIoU")
        axes[0].set_ylim(0, 1.08 * axes[0].get_ylim()[1])  # of all; room for markers
        _legend(figure, list(handles.items()))
        _save(figure, path)


def plot_per_class(
    tables: Mapping[str, Mapping[str, Sequence[float | None]]],
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """IoU of the classes: one table of coloured cells below the other, one row per arm, one column per class.

    Args:
        tables: title -> arm -> IoU of each class, None where it is absent. Classes absent from everything are
            left out.
        path: the PNG file to write.
        class_names: those of the data set; None: numbers.
    """
    count = len(next(iter(next(iter(tables.values())).values())))
    names = class_names or [str(i) for i in range(count)]
    shown = [i for i in range(count) if any(row[i] is not None for table in tables.values() for row in table.values())]
    with _settings():
        style = _style(list(next(iter(tables.values()))))
        labels = {arm: _wrapped(label, 4) for arm, (label, _, _) in style.items()}
        below = _width([names[i] for i in shown]) * math.sqrt(0.5)
        left = _width([line for label in labels.values() for line in label.split("\n")])
        wide = max(0.68 * len(shown), 1.05 * _width(tables, 13))  # of the cells, and of the titles
        high = sum(max(0.42, _LINE * (label.count("\n") + 1)) for label in labels.values())
        figure = _figure(0.9 + left + wide, max(1.0, 0.6 + below) + len(tables) * (0.9 + high))
        axes = figure.subplots(len(tables), 1, squeeze=False, sharex=True)[:, 0]
        for panel, (title, table) in zip(axes, tables.items(), strict=True):
            cells = np.array([[np.nan if row[i] is None else row[i] for i in shown] for row in table.values()], float)
            panel.imshow(cells, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            for y, x in np.argwhere(~np.isnan(cells)):
                value = cells[y, x]
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=10, color="wk"[int(value > 0.6)])
            panel.set_yticks(range(len(table)), [labels[arm] for arm in table])
            panel.set_title(title)
            panel.tick_params(length=0)
            panel.grid(False)
            panel.spines[:].set_visible(False)
        axes[-1].set_xticks(range(len(shown)), [names[i] for i in shown], rotation=45, ha="right")
        _save(figure, path)


def plot_training(lines: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """How a training went: loss, and where there were probes their accuracy, agreement of gradients, Fast Newton's eps.

    Args:
        lines: those of metrics.jsonl, with step and loss; those of a probe with what `segadv.monitor.probe` finds.
        path: the PNG file to write.
        title: above all.
    """
    probes = [line for line in lines if "pgd_accuracy" in line]
    with _settings():
        figure = _figure(11, 7) if probes else _figure(7, 4)
        panels = figure.subplots(2, 2, sharex=True) if probes else figure.subplots(1, 1, squeeze=False)
        loss = panels[0, 0]
        style = {"color": "#000000", "lw": 1.8, "marker": "o" if len(lines) == 1 else ""}
        loss.plot([line["step"] for line in lines], [line["loss"] for line in lines], **style)
        loss.set_title("training loss")
        loss.set_ylim(0, 1.08 * loss.get_ylim()[1])
        if probes:
            _plot_probes(probes, *panels.flatten()[1:])
        for panel in panels[-1]:
            panel.set_xlabel("step")
        figure.suptitle(title)
        _save(figure, path)


def _plot_probes(probes: Sequence[Mapping[str, Any]], accuracy: Any, cosine: Any, newton: Any) -> None:
    at = [line["step"] for line in probes]

    def values(name: str) -> list[float]:
        return [line[name] for line in probes]

    accuracy.plot(at, values("fgsm_accuracy"), color="#E69F00", marker="s", lw=2.2, label="FGSM")
    accuracy.plot(at, values("pgd_accuracy"), color="#0072B2", marker="o", lw=2.2, label="PGD-10")
    accuracy.set_title("pixel accuracy on training images")
    accuracy.set_ylim(0, 1.03)
    accuracy.legend(loc="best")
    cosine.plot(at, values("gradient_cosine"), color="#009E73", marker="o", lw=2.2)
    cosine.set_title("cosine of gradients at an image and beside it")
    cosine.set_ylim(min([0.0, *values("gradient_cosine")]), 1.03)
    newton.fill_between(
        at, values("newton_eps_p10"), values("newton_eps_p90"), color="#D55E00", alpha=0.25, lw=0, label="10-90 %"
    )
    newton.plot(at, values("newton_eps_median"), color="#D55E00", marker="v", lw=2.2, label="median")
    newton.axhline(0, color="#333333", lw=1)
    newton.set_title("eps of a Fast Newton step")
    newton.legend(loc="best")
    share = newton.twinx()
    share.plot(at, values("newton_share_negative_gain"), color="#999999", marker=".", lw=1.5, ls=":")
    share.set_ylim(0, 1.03)
    share.set_ylabel("share with negative gain (dotted)")
    share.grid(False)


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
    basic = next(row["step_ms_p50"] for row in rows if row["arm"] == "basic")
    bars = [row for row in rows if row["arm"] != "basic"]
    style = _style([row["arm"] for row in bars])
    with _settings():
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
            f"a step of the basic arm takes {basic:.0f} ms\nbars: medians measured here, whiskers p20 to p80"
        )
        figure.legend(loc="outside lower center", ncols=len(references))
        _save(figure, path)


def _painted(labels: Tensor, colors: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    """Labels [H, W] in the classes' colours: uint8 [H, W, 3]; where there is no class as `_UNLABELLED`."""
    palette = np.full((256, 3), _UNLABELLED, np.uint8)
    palette[: len(colors)] = colors
    painted: npt.NDArray[np.uint8] = palette[labels.cpu().numpy()]
    return painted


def _hexadecimal(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _pixels(image: Tensor) -> npt.NDArray[np.float32]:
    pixels: npt.NDArray[np.float32] = image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return pixels


def plot_qualitative(
    examples: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    attack: str,
    eps: float,
    class_names: Sequence[str] = CLASSES,
    colors: Sequence[tuple[int, int, int]] = COLORS,
) -> None:
    """One row per example: image, label, prediction, adversarial image, its prediction, perturbation x10.

    Args:
        examples: dicts with arm; image and adversarial, float [3, H, W] in [0, 1]; label, prediction and
            adversarial_prediction, uint8 [H, W] (255: no class).
        path: the PNG file to write.
        attack, eps: what made the adversarial images, for the titles.
        class_names, colors: of the data set; the colours are RGB, 0 to 255.
    """
    from matplotlib.patches import Patch

    titles = (
        "image",
        "label",
        "prediction",
        f"{attack_title(attack)}, eps {eps:g}",
        "its prediction",
        "perturbation x10",
    )
    style = _style([example["arm"] for example in examples])
    height, width = examples[0]["label"].shape
    cell = 12 / len(titles)
    with _settings():
        figure = _figure(12, cell * height / width * len(examples) + 1.1)
        cells = figure.subplots(len(examples), len(titles), squeeze=False)
        present: set[int] = set()
        for line, example in zip(cells, examples, strict=True):
            image, adversarial = example["image"], example["adversarial"]
            maps = [example[key] for key in ("label", "prediction", "adversarial_prediction")]
            label, prediction, adversarial_prediction = (_painted(values, colors) for values in maps)
            present.update(value for values in maps for value in values.unique().tolist())
            perturbation = _pixels(0.5 + 10 * (adversarial - image))
            attacked = (_pixels(adversarial), adversarial_prediction, perturbation)
            for axes, picture in zip(line, (_pixels(image), label, prediction, *attacked), strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(_wrapped(style[example["arm"]][0], max(0.5, cell * height / width)))
        for axes, title in zip(cells[0], titles, strict=True):
            axes.set_title(title)
        patches = [
            Patch(facecolor=_hexadecimal(colors[i]), label=class_names[i])
            for i in sorted(present)
            if i < len(class_names)
        ] + [Patch(facecolor=_hexadecimal(_UNLABELLED), edgecolor="#999999", label="not labelled")] * (255 in present)
        _legend(figure, [(str(patch.get_label()), patch) for patch in patches], most=8, size=10)
        _save(figure, path)
