"""The report of an evaluation: tables and pictures in one folder, and a `report.md` that shows them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .masking import Check
from .results import EvaluationResult, Measurement, csv_text, miou_difference
from .writing import write_text

__all__ = ["require_report_folder", "write_report"]

_USUAL_EPS = 0.03  # the eps of the papers, and nearly the field's 8/255
_PIPE, _ESCAPED = r"(\\*)\|", r"\1\1\\|"
_OF_THE_MODEL = ("align_corners", "output", "model_sha256")
"""What the arguments of equal attacks on two models may differ in."""


def write_report(
    folder: str | os.PathLike[str],
    result: EvaluationResult,
    checks: Mapping[str, Sequence[Check]] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    command: str | None = None,
) -> str:
    """Writes ``curves.csv``, ``details.csv``, ``results.json``, pictures and ``report.md``, and returns its text.

    ``checks.csv``, where there are checks, holds ``arm,check,passed,finding``; passed is True, False, or empty where
    it could not be checked. The pictures: ``robustness.png``, mIoU against eps; ``per_class.png``; and ``steps.png``,
    mIoU against the number of steps, where attacks were judged on their way.

    Args:
        folder: made where it does not exist.
        result: of one model, as `segadv.evaluation.evaluate` gives it, or of several, after `EvaluationResult.merge`.
        checks: name in the report -> what `segadv.masking.masking_checks` returned; None: no checks were made. A single
            model is named after its class. The report says which models could not be checked.
        class_names: those of the data set, for ``per_class.png``; None: numbers.
        command: the command that repeats it, for the reader.

    Raises:
        TypeError: a result that is no `EvaluationResult`.
        ValueError: the models were put under different attacks, eps or steps, on different images, or have different
            numbers of classes; class_names of another number; checks of a model that is not in the result.
    """
    if not isinstance(result, EvaluationResult):
        raise TypeError(
            f"result must be an EvaluationResult, got a {type(result).__name__}; those of several models become one by "
            "EvaluationResult.merge({name: result, ...})"
        )
    if "model_sha256" in result.run:  # not merged yet
        result = EvaluationResult.merge({result.run["model"]: result})
    checks = checks or {}
    arms = list(dict.fromkeys(entry.arm for entry in result.measurements))
    if unknown := [name for name in checks if name not in arms]:
        raise ValueError(f"checks must be of models in the result, {', '.join(arms)}; got {', '.join(unknown)}")
    _check_alike(result)
    classes = len(result.measurements[0].confusion)
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names must be as many as the models' classes, {classes}, got {len(class_names)}")
    out = Path(folder)
    (out / "report.md").unlink(missing_ok=True)  # it stands for the whole, and comes last
    result.to_csv(out / "curves.csv")
    result.to_details_csv(out / "details.csv")
    result.to_json(out / "results.json")
    found = [
        {"arm": arm, "check": check.name, "passed": check.passed, "finding": check.finding}
        for arm in arms
        for check in checks.get(arm, ())
    ]
    if found:
        write_text(out / "checks.csv", csv_text(found))
    else:
        (out / "checks.csv").unlink(missing_ok=True)
    result.plot(out / "robustness.png")
    shown = _shown_eps(result)
    (out / "steps.png").unlink(missing_ok=True)
    with_steps = _with_steps(result, shown)
    if with_steps:
        plots.plot_steps([entry.row for entry in result.measurements], out / "steps.png", eps=shown)
    _plot_per_class(result, shown, out / "per_class.png", class_names)
    text = "\n".join(_lines(result, checks, shown, with_steps, command)) + "\n"
    write_text(out / "report.md", text)
    return text


def require_report_folder(folder: str | os.PathLike[str]) -> None:
    """ValueError where a folder holds files of something else than a report, such as a training run."""
    out = Path(folder)
    report, results = out / "report.md", out / "results.json"
    holds = ""
    if (out / "run.json").exists() or (out / "last.pt").exists():
        holds = "a training run"
    elif results.exists():
        try:
            EvaluationResult.from_json(results)
        except ValueError:
            holds = f"a {results.name} of something else"
    elif report.exists():
        holds = f"a {report.name} of something else"
    if holds:
        raise ValueError(f"out: {out} holds {holds}; give a folder of its own, such as {out / 'report'}")


def _check_alike(result: EvaluationResult) -> None:
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for entry in result.measurements:
        seen.setdefault(entry.arm, set()).add((entry.attack, entry.eps, entry.steps, len(entry.confusion)))
    for arm in seen:
        run = result.run.get(arm, {})
        # the batches, for which random numbers are drawn one by one, are part of what a seed means
        same = ("data_sha256", "images", "batch_size", "seed", "ignore_index")
        seen[arm].update((name, run.get(name)) for name in same)
        seen[arm].update(
            (name, *(f"{key} {value}" for key, value in attack.items() if key not in _OF_THE_MODEL))
            for name, attacks in run.get("attacks", {}).items()
            for attack in attacks
        )
    first, *others = seen
    if other := next((arm for arm in others if seen[arm] != seen[first]), None):
        raise ValueError(
            f"result: {first!r} and {other!r} were evaluated under different attacks, eps, steps, seeds or other "
            "arguments, on different images or in other batches, or on different numbers of classes; a report is for "
            "models that were evaluated alike"
        )


def _shown_eps(result: EvaluationResult) -> float:
    """The eps that pictures at one eps show: with most steps, of those the one nearest to 0.03."""
    steps = _steps_together(result)
    return min(steps, key=lambda eps: (-steps[eps], abs(eps - _USUAL_EPS)))


def _steps_together(result: EvaluationResult) -> Counter[float]:
    """eps -> sum over the attacks, some of which have the same number at every eps."""
    steps: Counter[float] = Counter()
    for entry in result.final:
        steps[entry.eps] += entry.steps
    return steps


def _with_steps(result: EvaluationResult, eps: float) -> bool:
    seen = [(entry.arm, entry.attack) for entry in result.measurements if entry.eps == eps]
    return len(set(seen)) < len(seen)


def _strongest(result: EvaluationResult) -> str:
    """The worst case by mIoU, or where it was not taken the attack that leaves least mIoU over all models and eps."""
    left: dict[str, float] = {}
    for entry in result.final:
        left[entry.attack] = left.get(entry.attack, 0.0) + entry.row["miou"]
    return "worst-case-miou" if "worst-case-miou" in left else min(left, key=lambda attack: left[attack])


def _plot_per_class(result: EvaluationResult, shown: float, path: Path, class_names: Sequence[str] | None) -> None:
    tables: dict[str, dict[str, list[float | None]]] = {}
    attack = _strongest(result)
    for entry in result.final:
        if entry.attack == attack and entry.eps in (0.0, shown):
            title = (
                f"IoU under attack: {plots.attack_title(attack)}, eps {shown:g}" if entry.eps else "IoU of clean images"
            )
            tables.setdefault(title, {})[entry.arm] = entry.row["class_iou"]
    plots.plot_per_class(tables, path, class_names=class_names)


def _lines(
    result: EvaluationResult,
    checks: Mapping[str, Sequence[Check]],
    shown: float,
    with_steps: bool,
    command: str | None,
) -> list[str]:
    arms = list(dict.fromkeys(entry.arm for entry in result.final))
    attacks = list(dict.fromkeys(entry.attack for entry in result.final))
    eps = sorted({entry.eps for entry in result.final})
    final = {(entry.arm, entry.attack, entry.eps): entry for entry in result.final}
    strongest = by_pixels = _strongest(result)
    title = plots.attack_title(strongest)
    if strongest == "worst-case-miou":
        by_pixels, title = "worst-case", "the worst for each image"
    counts = {value: _steps(final[arms[0], strongest, value]) for value in eps if value}
    at_steps = {value: f", {count}" if len({*counts.values()}) > 1 else "" for value, count in counts.items()}
    differ = len({count for value, count in _steps_together(result).items() if value}) > 1
    titles = [plots.attack_title(name) for name in attacks]
    if shown:  # where it is 0, the only eps, no attack takes a step
        counted = zip(titles, (final[arms[0], name, shown] for name in attacks), strict=True)
        titles = [
            title if title.endswith(f"-{entry.steps}") else f"{title}, {_steps(entry)}" for title, entry in counted
        ]
    run = result.run[arms[0]]
    lines = [
        "# Robustness report",
        "",
        f"{run['images']} image{'s' * (run['images'] != 1)}. mIoU comes from one confusion matrix over all pixels; "
        "beside it stand the mean of the images' own mIoU and pixel accuracy."
        + (
            " The worst for each image is the outcome of an attack, or of the clean image, with the lowest mIoU of "
            "that image; for pixel accuracy it is the one with the most wrong pixels. mIoU of all images together can "
            "be lower under a single attack."
            if strongest == "worst-case-miou"
            else ""
        ),
        "",
        _masking_in_a_sentence(arms, checks),
        "",
        f"## mIoU / mIoU per image / pixel accuracy: {title}",
        "",
        *table(
            ["trained with", *("clean" if value == 0 else f"eps {value:g}{at_steps[value]}" for value in eps)],
            [
                [arm, *(_three(final[arm, strongest, value], final[arm, by_pixels, value]) for value in eps)]
                for arm in arms
            ],
        ),
        "",
        f"## mIoU at eps {shown:g}, attack by attack",
        "",
        *table(
            ["trained with", *titles],
            [[arm, *(_with_error(final[arm, name, shown]) for name in attacks)] for arm in arms],
        ),
        "",
        *_errors([final[arm, strongest, shown] for arm in arms], plots.attack_title(strongest)),
        "![mIoU against eps](robustness.png)",
        "",
        *(
            ["The attacks have different numbers of steps at different eps, so the curves may bend.", ""]
            if differ
            else []
        ),
    ]
    if with_steps:
        lines += [
            f"## More steps, eps {shown:g}",
            "",
            "Each line is one run, judged on its way by what the attack has then (those of `evaluate` each image's "
            "best iterate so far). BIM, PGD and CosPGD would give the same with fewer steps; SegPGD's weights depend "
            "on the number of all steps, so its line shows its longest run on the way. Curves that still fall at the "
            "end call for more steps.",
            "",
            "![mIoU against the number of steps](steps.png)",
            "",
        ]
    lines += ["## Classes", "", "![IoU of the classes](per_class.png)", ""]
    if any(checks.values()):
        lines += _masking_section(arms, checks)
    return [*lines, *_how_to_repeat(result, arms, command)]


def _masking_in_a_sentence(arms: Sequence[str], checks: Mapping[str, Sequence[Check]]) -> str:
    failed = [f"{arm} ({check.name})" for arm in arms for check in checks.get(arm, ()) if check.passed is False]
    unchecked = [arm for arm in arms if all(check.passed is None for check in checks.get(arm, ()))]
    if failed:
        told = f"FAILED gradient masking checks: {', '.join(failed)}."
    elif len(unchecked) == len(arms):
        told = f"Gradient masking {'could not be' if any(checks.values()) else 'was not'} looked for."
    else:
        told = "No sign of gradient masking was found."
    if unchecked and len(unchecked) < len(arms):
        told += f" It was not looked for in {', '.join(unchecked)}."
    return told


def _masking_section(arms: Sequence[str], checks: Mapping[str, Sequence[Check]]) -> list[str]:
    verdict = {True: "pass", False: "**FAIL**", None: "not checked"}
    return [
        "## Signs of gradient masking",
        "",
        "Accuracy is pixel accuracy on a few of the images.",
        "",
        *table(
            ["trained with", "check", "", "figures"],
            [[arm, check.name, verdict[check.passed], check.finding] for arm in arms for check in checks.get(arm, ())],
        ),
        "",
        "A failed check is a reason to doubt the figures above: gradients may lead the attacks astray, or the "
        "network hardly looks at the image (what is left at eps 0.5 may be the accuracy of one class everywhere). "
        "Passing all of them proves nothing.",
        "",
    ]


def _how_to_repeat(result: EvaluationResult, arms: Sequence[str], command: str | None) -> list[str]:
    run = result.run[arms[0]]
    return [
        "## To repeat it",
        "",
        *(["```bash", command, "```", ""] if command else []),
        f"Seed {run['seed']}; data SHA-256 `{run['data_sha256'][:16]}`; {run['backend']} backend on {run['device']}; "
        + ", ".join(f"{name} {value}" for name, value in run["versions"].items())
        + ". All attack arguments are in results.json.",
        "",
        *table(
            ["trained with", "model", "SHA-256"],
            [[arm, result.run[arm]["model"], f"`{result.run[arm]['model_sha256'][:16]}`"] for arm in arms],
        ),
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(re.sub(_PIPE, _ESCAPED, ' '.join(cell.split())) for cell in cells)} |"

    return [row(cells) for cells in (header, ["---"] * len(header), *rows)]


def _three(entry: Measurement, by_pixels: Measurement) -> str:
    row = entry.row
    return f"{row['miou']:.3f} / {row['image_miou']:.3f} / {by_pixels.row['pixel_accuracy']:.3f}"


def _with_error(entry: Measurement) -> str:
    row = entry.row
    return f"{row['miou']:.3f}" + ("" if row["miou_error"] is None else f" ± {row['miou_error']:.3f}")


def _errors(entries: Sequence[Measurement], title: str) -> list[str]:
    """What is to be said of those of models under one attack; nothing where there is one image."""
    best = max(entries, key=lambda entry: entry.row["miou"])
    if best.row["miou_error"] is None:
        return []
    lines = [
        "± is the standard error over the choice of the images (a jackknife); it says nothing about other trainings."
    ]
    others = {entry.arm: miou_difference(entry, best) for entry in entries if entry is not best}
    if others:
        told = "; ".join(f"{arm} {difference:.3f} ± {error:.3f}" for arm, (difference, error) in others.items())
        lines += ["", f"mIoU under {title}, less that of {best.arm} on the same images: {told}."]
    return [*lines, ""]


def _steps(entry: Measurement) -> str:
    return "1 step" if entry.steps == 1 else f"{entry.steps} steps"
