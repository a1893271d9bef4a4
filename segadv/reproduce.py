"""The comparison of Wiens & Hammer 2022 (doi 10.5220/0010788400003122) on its own data sets, in one call.

Five arms are trained with a recipe, attacked with FGSM and BIM-10 (figures 3 and 4 of the paper) and timed (tables 1
and 2). The figures have no numbers in the paper's text: what it says of them in words is looked for in ours.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import distributed
from .checkpoints import whole_lines
from .checks import at_least, names_out_of
from .comparison import (
    PAPER_ARMS,
    SHOWN_EPS,
    attacked_positions,
    describe,
    examples,
    load_trained,
    measure_overhead,
    reference_overhead,
    untrained,
    whole_images,
)
from .data import open_dataset
from .evaluation import ATTACKS, EPS, ITERATIVE, PAPER_ATTACKS, WORST_CASES, EvaluationResult, evaluate
from .models import ModelConfig, build_model
from .recipes import recipe_file
from .records import model_hash
from .report import table
from .results import csv_text
from .run_directory import environment
from .train_config import flat
from .training import FREE_TO_CHANGE, TrainConfig, Trainer, resolve_device
from .writing import own_folder, write_text

__all__ = ["SETTINGS", "Claim", "Evaluation", "claims", "reproduce"]

SETTINGS = {"cityscapes": "cityscapes_pspnet50", "voc": "voc_pspnet50"}
"""setting -> recipe."""

_TITLES = {"cityscapes": ("Cityscapes", "table 1"), "voc": ("PASCAL VOC", "table 2")}
_NOT_MEASURED = "not all of it was measured"
_EQUAL = 0.02
"""Difference of mIoU that still counts as equal."""
_FREE = {*FREE_TO_CHANGE, "accumulation", "data", "arms", "evaluation", "overhead_steps", "quick"}
"""Options in which a command may differ from the one it continues; what a run allows, `Trainer.load` judges."""


@dataclass(frozen=True)
class Evaluation:
    """How the trained networks are attacked, beside FGSM and BIM-10 at the paper's eps.

    Args:
        stronger: further attacks, such as pgd, segpgd, cospgd; they add the worst cases for each image.
        steps: number of steps of these, where their names do not give one.
        images: number of images, the first of the validation split; 0: all.
        batch_size: images at once, as far as their sizes are equal.

    Raises:
        ValueError: a value outside its range.
    """

    stronger: tuple[str, ...] = ()
    steps: int = 100
    images: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.stronger, str):
            object.__setattr__(self, "stronger", (self.stronger,) if self.stronger else ())
        names_out_of(ATTACKS, **{"evaluation.stronger": self.stronger})
        at_least(0, **{"evaluation.images": self.images})
        at_least(1, **{"evaluation.steps": self.steps, "evaluation.batch_size": self.batch_size})

    @property
    def attacks(self) -> list[str]:
        """All of them."""
        return list(dict.fromkeys([*PAPER_ATTACKS, *self.stronger]))


@dataclass(frozen=True)
class Claim:
    """What the paper says in words, and what was measured.

    Attributes:
        text: the claim.
        holds: whether ours agrees; None where not all it needs was measured, or where ours differ by too little.
        finding: the figures.
    """

    text: str
    holds: bool | None
    finding: str


def reproduce(
    setting: str,
    config: TrainConfig,
    model: ModelConfig,
    *,
    dataset: str,
    data: str,
    out: str | Path,
    options: str,
    arms: Sequence[str] = PAPER_ARMS,
    evaluation: Evaluation = Evaluation(),
    overhead_steps: int = 25,
    command: str = "",
) -> dict[str, Any]:
    """Trains, attacks and times the arms, and writes the paper's figures and tables with ours beside them.

    Called again with the same `out`, it does what is missing. Several machines can share the arms: each trains its
    own into a folder; their ``<arm>/`` are then put into one, and the call with all arms writes the report.

    Writes to `out`: ``config.yaml`` (the options), ``<arm>/`` (what `Trainer.run` writes, evaluation.json, records/),
    ``overhead.json``, ``overhead.csv``, ``overhead.png``, ``curves.csv``, ``robustness.png``, ``qualitative.png``,
    ``results.json`` and ``report.md``, these of the arms that are evaluated so far.

    Args:
        setting: a key of `SETTINGS`.
        config: of the training; its arm is not looked at.
        model: the network.
        dataset, data: kind and folder of the data set.
        options: all options as YAML, for config.yaml and the comparison with the one that is there.
        arms: those to train and attack now.
        evaluation: further attacks, number of images.
        overhead_steps: timed steps of each arm.
        command: what repeats it, for the report.

    Returns:
        what ``results.json`` holds.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: `out` holds a run with other options, an unknown arm; else as `Trainer`.
    """
    out = Path(out)
    names_out_of(PAPER_ARMS, arms=arms)
    at_least(1, overhead_steps=overhead_steps)
    train, val = (open_dataset(dataset, data, split) for split in ("train", "val"))
    with distributed.process_group(config.device):
        distributed.from_first(lambda: _prepare(out, options))
        for arm in arms:
            say(f"training: {arm}")
            network = untrained(model, out / arm / "last.pt", num_classes=train.num_classes, seed=config.seed)
            trainer = Trainer(
                dataclasses.replace(config, arm=arm),
                network,
                train,
                validation_dataset=val if config.validation.every else None,
                description=describe(dataset, model, train.num_classes),
            )
            trainer.run(out / arm)
            del trainer, network
        # Only now: the arms' checkpoints have accepted them.
        distributed.from_first(lambda: _write_options(out, options))
        if not distributed.from_first(lambda: _is_measured(out / "overhead.json", overhead_steps)):
            say("overhead: steps of all arms in turn")
            rows = measure_overhead(
                {arm: dataclasses.replace(config, arm=arm) for arm in PAPER_ARMS},
                lambda: build_model(ModelConfig(model.name), num_classes=train.num_classes, seed=config.seed),
                train,
                overhead_steps,
            )
            measured = {
                "rows": rows,
                "steps": overhead_steps,
                "processes": distributed.world_size(),
                "attacked": len(attacked_positions(config)) / config.batch_size,
                "environment": environment(resolve_device(config.device)),
            }
            distributed.from_first(lambda: _write_json(out / "overhead.json", measured))
        first = distributed.rank() == 0
    # What follows needs one process, and may take longer than the others would wait for it
    return _attack_and_report(setting, config, val, out, arms, evaluation, command) if first else {}


def _is_measured(path: Path, steps: int) -> bool:
    """Whether so many steps were timed, wherever that was: who writes the report may have another machine."""
    if not path.exists():
        return False
    measured: int = json.loads(path.read_text(encoding="utf-8"))["steps"]
    return measured >= steps


def say(text: str) -> None:
    """A line on the standard output, from the first process."""
    if distributed.rank() == 0:
        print(text, flush=True)


def _prepare(out: Path, options: str) -> None:
    """Makes the folder with its config.yaml, or makes sure that it holds a run of the same options."""
    path = out / "config.yaml"
    if path.exists():
        try:
            here, there = yaml.safe_load(options), yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
        here, there = flat(here), flat(there) if isinstance(there, dict) else {}
        differing = [
            f"{key} {there.get(key)} there and {here.get(key)} here"
            for key in here | there
            if key.partition(".")[0] not in _FREE and there.get(key) != here.get(key)
        ]
        if differing:
            raise ValueError(
                f"out: {out} holds a run with other options ({', '.join(differing)}); choose another folder"
            )
    own_folder(out, path, "an earlier reproduction's")
    if not path.exists():
        _write_options(out, options)


def _write_options(out: Path, options: str) -> None:
    write_text(out / "config.yaml", options)


def _attack_and_report(
    setting: str,
    config: TrainConfig,
    val: Any,
    out: Path,
    arms: Sequence[str],
    evaluation: Evaluation,
    command: str,
) -> dict[str, Any]:
    from . import plots

    device = resolve_device(config.device)
    loader = whole_images(val, images=evaluation.images, batch_size=evaluation.batch_size)
    results, shown, redraw = {}, {}, False
    for arm in PAPER_ARMS:
        path = out / arm / "evaluation.json"
        if arm not in arms and not path.exists():
            continue
        network, _ = load_trained(out / arm / "last.pt")
        previous = EvaluationResult.from_json(path) if path.exists() else None
        arguments = {"evaluation": json.loads(json.dumps(dataclasses.asdict(evaluation))), "seed": config.seed}
        images = min(evaluation.images or len(val), len(val))
        wanted = arguments | {"model_sha256": model_hash(network), "images": images}
        attacks = {*evaluation.attacks, *(WORST_CASES if evaluation.stronger else ())}
        same = previous and {entry.attack for entry in previous.measurements} == attacks
        if previous and same and {name: previous.run.get(name) for name in wanted} == wanted:
            results[arm] = previous
        elif arm in arms:
            say(f"evaluation: {arm}")
            results[arm] = evaluate(
                network.to(device),
                loader,
                evaluation.attacks,
                EPS,
                steps=evaluation.steps,
                worst_case=bool(evaluation.stronger),
                seed=config.seed,
                records=out / arm / "records",
                progress=True,
            )
            results[arm].run.update(arguments)
            results[arm].to_json(path)
            redraw = True
        else:
            say(f"evaluation: {arm} has another one in {path}; it is left out until --arms names it")
            redraw = True  # the picture may show it
            continue
        if arm in ("basic", "fast-newton"):
            shown[arm] = network.to(device)
    data = {arm: result.run["data_sha256"][:16] for arm, result in results.items()}
    if len(set(data.values())) > 1:
        told = ", ".join(f"{arm} {digest}" for arm, digest in data.items())
        raise ValueError(
            f"out: the arms in {out} were evaluated on different images ({told}, SHA-256): name the one folder of data "
            "with --data, and remove evaluation.json of the arms that are to be evaluated on it anew"
        )
    curves = EvaluationResult.merge(results)
    curves.to_csv(out / "curves.csv")
    curves.plot(out / "robustness.png")
    overhead = json.loads((out / "overhead.json").read_text(encoding="utf-8"))
    write_text(out / "overhead.csv", csv_text(overhead["rows"]))
    references = reference_overhead(overhead["attacked"])
    plots.plot_overhead(overhead["rows"], out / "overhead.png", references=references)
    if shown and (redraw or not (out / "qualitative.png").exists()):
        samples = [val[index] for index in sorted({0, len(val) // 2})]
        plots.plot_qualitative(
            examples(shown, samples),
            out / "qualitative.png",
            attack="bim-10",
            eps=SHOWN_EPS,
            class_names=val.class_names,
            colors=val.colors,
        )
    found = claims(curves.rows)
    content = {
        "setting": setting,
        "recipe": SETTINGS[setting],
        "differs_from_recipe": _differences(setting, out),
        "options": yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")),
        "command": command,
        "curves": curves.rows,
        "claims": [dataclasses.asdict(claim) for claim in found],
        "overhead": overhead,
        "overhead_references": references,
        "step_ms_as_trained": {arm: _step_ms_as_trained(out / arm / "metrics.jsonl") for arm in results},
        "evaluations": curves.run,
        "environment": environment(device),
    }
    _write_json(out / "results.json", content)
    text = "\n".join(_report(content, list(results), evaluation, "qualitative.png" if shown else None)) + "\n"
    write_text(out / "report.md", text)
    print(text)
    print(f"In {out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def _step_ms_as_trained(path: Path) -> float:
    """Median of the time of a step in metrics.jsonl: with the loading of the data, as the machine went."""
    return round(float(statistics.median(1000 / line["steps_per_s"] for line in whole_lines(path))), 3)


def _differences(setting: str, out: Path) -> list[str]:
    """Where the options differ from the recipe, but for what changes no number."""
    recipe = flat(yaml.safe_load(recipe_file(SETTINGS[setting]).read_text(encoding="utf-8")))
    here = flat(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")))
    return [
        f"{key} {here[key]} instead of {value}"
        for key, value in recipe.items()
        if key.partition(".")[0] not in _FREE - {"accumulation"} and here[key] != value
    ]


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The paper's claims about its figures, looked for in the rows of the curves (arm, attack, eps, miou).

    It gives no figures for "small", "larger" and "equal": read here as eps 0.01 and 0.02, 0.03 and 0.04, and a
    difference of mIoU of at most 0.02, with which none is above the other either.
    """
    score = {(row["arm"], row["attack"], row["eps"]): row["miou"] for row in rows}

    def claim(
        text: str, attack: str, pairs: Sequence[tuple[tuple[str, float], tuple[str, float]]], equal: bool
    ) -> Claim:
        """`pairs`: (arm, eps) whose mIoU is above, or equal to, that of the other (arm, eps)."""
        told, contradicted, close = [], False, False
        for (arm, eps), (other, other_eps) in pairs:
            left, right = score.get((arm, attack, eps)), score.get((other, attack, other_eps))
            if left is None or right is None:
                return Claim(text, None, _NOT_MEASURED)
            level = abs(left - right) <= _EQUAL + 1e-9  # 0.52 - 0.5 is more than 0.02
            agrees = level if equal else left > right
            close |= level and not equal
            contradicted |= not agrees and not (level and not equal)
            what = f"{other} {right:.3f}" if other != arm else f"{right:.3f} at {other_eps:g}"
            mark = " (level)" if level and not equal else "" if agrees else " (no)"
            told.append(f"eps {eps:g}: {left:.3f}, {what}{mark}")
        return Claim(text, False if contradicted else None if close else True, "; ".join(told))

    found = [
        claim(
            f"under BIM-10, Fast Newton is above {other}",
            "bim-10",
            [(("fast-newton", eps), (other, eps)) for eps in EPS if eps > 0],
            False,
        )
        for other in ("random-fgsm", "fgsm", "basic")
    ]
    below = [(("fast-newton", eps), ("bim-3", eps)) for eps in (0.01, 0.02)]
    above = [(("fast-newton", eps), ("bim-3", eps)) for eps in (0.03, 0.04)]
    peaks = [(("fgsm", eps), ("fgsm", other)) for eps, other in ((0.0, 0.01), (0.03, 0.02), (0.03, 0.04))]
    return [
        *found,
        claim("under BIM-10, for small eps, Fast Newton is above bim-3", "bim-10", below, False),
        claim("under BIM-10, for larger eps, Fast Newton is equal to bim-3", "bim-10", above, True),
        claim("under FGSM, fgsm peaks at eps 0 and 0.03 (catastrophic overfitting)", "fgsm", peaks, False),
    ]


def _report(
    content: Mapping[str, Any], arms: Sequence[str], evaluation: Evaluation, qualitative: str | None
) -> list[str]:
    name, _ = _TITLES[content["setting"]]
    options = content["options"]
    rows = {(row["arm"], row["attack"], row["eps"]): row for row in content["curves"]}
    attacks = list(dict.fromkeys(row["attack"] for row in content["curves"]))

    def verdict(claim: Mapping[str, Any]) -> str:
        if claim["holds"] is None:
            return "not measured" if claim["finding"] == _NOT_MEASURED else "too close to tell"
        return "agrees" if claim["holds"] else "**does not agree**"

    missing = [arm for arm in PAPER_ARMS if arm not in arms]
    differs = content["differs_from_recipe"]
    run = content["evaluations"][arms[0]]
    lines = [
        f"# Wiens & Hammer 2022 on {name}, repeated",
        "",
        f"{options['model']['name']}, {options['steps']} steps of {options['batch_size']} samples, crops of "
        f"{options['crop']}, {options['precision']}; {run['images']} validation images, whole"
        + (" (the first of the split)." if evaluation.images else "."),
        f"One training of each arm, seed {options['seed']}.",
        "",
        f"Differs from the recipe {content['recipe']}: {', '.join(differs)}. What is below "
        "holds for this training, not for the paper's."
        if differs
        else f"Every number is that of the recipe {content['recipe']}.",
        *(["", f"Still missing: {', '.join(missing)}."] if missing else []),
        "",
        "## Figures 3 and 4: mIoU against eps",
        "",
        "![mIoU against eps](robustness.png)",
        "",
        *table(
            ["attack", "trained with", *(f"eps {eps:g}" for eps in EPS)],
            [
                [attack, arm, *(f"{rows[arm, attack, eps]['miou']:.3f}" for eps in EPS)]
                for attack in attacks
                for arm in arms
            ],
        ),
        "",
        'What the paper says of them. It gives no numbers in its text, nor for "small", "larger" and "equal": read '
        f"here as eps 0.01 and 0.02, 0.03 and 0.04, and a difference of at most {_EQUAL:g}, with which nothing is "
        "above or below either.",
        "",
        *table(
            ["claim", "ours", "figures"],
            [[claim["text"], verdict(claim), claim["finding"]] for claim in content["claims"]],
        ),
        "",
    ]
    if evaluation.stronger:
        iterative = [name for name in evaluation.stronger if name in ITERATIVE]
        lines += [
            *[f"Steps of {', '.join(iterative)}: {evaluation.steps}."] * bool(iterative),
            "The worst cases take, for each image, the outcome with the most wrong pixels, or that with the lowest "
            "mIoU, of an attack or of the clean image.",
            "",
        ]
    lines += _overhead_section(content, arms)
    if qualitative:
        lines += ["## Examples", "", f"![what BIM-10 does to images]({qualitative})", ""]
    return [
        *lines,
        "## To repeat it",
        "",
        *(["```bash", content["command"], "```", ""] if content["command"] else []),
        f"Data SHA-256 of the evaluation `{run['data_sha256'][:16]}`; {run['backend']} backend on {run['device']}; "
        + ", ".join(f"{name} {value}" for name, value in run["versions"].items())
        + ". Everything else is in results.json and <arm>/run.json.",
    ]


def _overhead_section(content: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    name, paper_table = _TITLES[content["setting"]]
    overhead = content["overhead"]
    device, processes = overhead["environment"]["device"], overhead["processes"]
    references = content["overhead_references"]
    return [
        "## Tables 1 and 2: additional training time",
        "",
        f"Steps of the arms in turn, a batch in memory, {overhead['attacked']:.0%} of it attacked, on {device}"
        + (f" ({processes} processes)" if processes > 1 else "")
        + "; medians. "
        + (
            f"The paper's {paper_table} is the one for {name}. "
            if len(references) > 1
            else "The paper's tables are for half of the samples attacked, and so not beside these. "
        )
        + "As trained: with the loading of data, each arm at its own time.",
        "",
        "![additional training time](overhead.png)",
        "",
        *table(
            ["trained with", "step", "here", *references, "step as trained"],
            [
                [
                    row["arm"],
                    f"{row['step_ms_p50']:.1f} ms",
                    f"{row['overhead_percent']:.2f} %" if row["arm"] != "basic" else "",
                    *(
                        f"{percent[row['arm']]:.2f} %" if row["arm"] in percent else ""
                        for percent in references.values()
                    ),
                    f"{content['step_ms_as_trained'][row['arm']]:.1f} ms" if row["arm"] in arms else "",
                ]
                for row in overhead["rows"]
            ],
        ),
        "",
    ]
