"""The main job in one call: data generated, five arms trained, attacked and compared, overhead measured.

It repeats the comparison of Wiens & Hammer 2022 (doi 10.5220/0010788400003122) at a size for a laptop's CPU:
figures 3 and 4 (mIoU against eps) and tables 1 and 2 (additional training time).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import __version__, build_info
from .checks import at_least
from .comparison import PAPER_ARMS, PAPER_OVERHEAD, SHOWN_EPS, describe, examples, measure_overhead
from .data import NUM_CLASSES, Cityscapes, generate_streets
from .evaluation import EPS, PAPER_ATTACKS, EvaluationResult, evaluate
from .models import ModelConfig, build_model
from .results import csv_text, read_rows
from .run_directory import git_commit, processor_name
from .training import TrainConfig, Trainer
from .writing import own_folder, write_text

__all__ = ["FULL", "QUICK", "DemoSizes", "run_demo"]

_MEANINGFUL_STEPS = 100


@dataclass(frozen=True)
class DemoSizes:
    """How much the demo does.

    Args:
        train_images, val_images: number of generated scenes.
        image_size: (height, width) of the scenes; evaluation takes them whole.
        crop: (height, width) of the training crops.
        batch_size: samples per training step.
        steps: training steps of each arm.
        learning_rate: of the first step; ten times the paper's, because there are so few steps.
        overhead_steps: timed steps of each arm.
    """

    train_images: int
    val_images: int
    image_size: tuple[int, int]
    crop: tuple[int, int]
    batch_size: int
    steps: int
    learning_rate: float
    overhead_steps: int


_NETWORK = ModelConfig("small_pspnet")
_DESCRIPTION = describe("cityscapes", _NETWORK, NUM_CLASSES)

FULL = DemoSizes(
    train_images=200,
    val_images=48,
    image_size=(160, 320),
    crop=(128, 256),
    batch_size=16,
    steps=400,
    learning_rate=0.1,
    overhead_steps=25,
)
QUICK = DemoSizes(
    train_images=24,
    val_images=8,
    image_size=(80, 160),
    crop=(64, 128),
    batch_size=8,
    steps=20,
    learning_rate=0.1,
    overhead_steps=5,
)


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    seeds: int = 1,
    sizes: DemoSizes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generates data, trains all arms, evaluates them, measures their overhead, draws and prints the result.

    All arms of a seed start from the same weights and see the same data in the same order. Called again with the
    same arguments, it continues where it stopped; with more `seeds`, it adds to what is there, and with fewer it shows
    those, the trainings of the others staying for the next call.

    Several seeds share the scenes, which are those of the first: they differ in initialisation, order of the data,
    augmentation, dropout, coins and random attacks. So their range is that of training, not of data.

    Writes to `out`: ``data/`` (the scenes), ``<arm>/`` (checkpoint, metrics, evaluation), ``curves.csv``,
    ``overhead.csv``, ``results.json`` (all that is needed to repeat it), ``robustness.png``,
    ``overhead.png``, ``qualitative.png``. With several seeds the arms of the further ones are in
    ``seed-<seed>/``, the rows of the curves end with their seed, and ``robustness.png`` and the printed table show
    mean and range; overhead and ``qualitative.png`` are those of the first.

    Args:
        out: a folder that is new, empty, or holds a demo of the same arguments.
        quick: `QUICK` instead of `FULL`: the same work on less.
        seed: of data, initialisation and training.
        seeds: number of trainings of every arm, with seed, seed + 1, ...
        sizes: replaces both.
        progress: shows progress bars.

    Returns:
        what ``results.json`` holds.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: `out` holds a demo of other arguments, `seeds` is not positive, or `seed` is none.
    """
    at_least(1, seeds=seeds)
    out = Path(out)
    sizes = sizes or (QUICK if quick else FULL)
    for which in (seed, seed + seeds - 1):
        _config("basic", sizes, which)  # raises where it is no seed
    record = _Record(out, {"segadv": __version__, "seed": seed, **dataclasses.asdict(sizes)})
    print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items()), flush=True)

    with record.stage("data"):
        print(f"data: {sizes.train_images} + {sizes.val_images} street scenes in {out / 'data'}", flush=True)
        root = generate_streets(
            out / "data", train=sizes.train_images, val=sizes.val_images, size=sizes.image_size, seed=seed
        )
        train, val = (_InMemory(Cityscapes(root, split)) for split in ("train", "val"))

    configs = {arm: _config(arm, sizes, seed) for arm in PAPER_ARMS}
    models, curves = _train_and_evaluate(out, configs, train, val, record, progress=progress)
    rows = curves.rows
    if seeds > 1:
        rows = [row | {"seed": seed} for row in rows]
        for further in range(seed + 1, seed + seeds):
            of_seed = {arm: _config(arm, sizes, further) for arm in PAPER_ARMS}
            folder = out / f"seed-{further}"
            _, result = _train_and_evaluate(folder, of_seed, train, val, record, f", seed {further}", progress=progress)
            rows += [row | {"seed": further} for row in result.rows]
    write_text(out / "curves.csv", csv_text(rows))

    if not (out / "overhead.csv").exists():
        with record.stage("overhead"):
            print("overhead: steps of all arms in turn", flush=True)
            measured = measure_overhead(configs, lambda: _initial_model(seed), train, sizes.overhead_steps)
            write_text(out / "overhead.csv", csv_text(measured))
    overhead = read_rows(out / "overhead.csv")

    with record.stage("figures"):
        from . import plots

        plots.plot_robustness(rows, out / "robustness.png")
        plots.plot_overhead(overhead, out / "overhead.png", references=PAPER_OVERHEAD)
        samples = [val[index] for index in sorted({0, len(val) // 2})]
        shown = examples({arm: models[arm] for arm in ("basic", "fast-newton")}, samples)
        plots.plot_qualitative(shown, out / "qualitative.png", attack="bim-10", eps=SHOWN_EPS)
    record.finish(
        train={arm: dataclasses.asdict(config) for arm, config in configs.items()},
        evaluation={"attacks": PAPER_ATTACKS, "eps": EPS},
        curves=rows,
        overhead=overhead,
        overhead_references=PAPER_OVERHEAD,
        **({"seeds": list(range(seed, seed + seeds))} if seeds > 1 else {}),
    )
    print(_report(rows, overhead, record.content["seconds"], sizes.steps))
    print(f"\nIn {out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
    return record.content


def _config(arm: str, sizes: DemoSizes, seed: int) -> TrainConfig:
    return TrainConfig(
        arm=arm,
        steps=sizes.steps,
        batch_size=sizes.batch_size,
        crop=sizes.crop,
        learning_rate=sizes.learning_rate,
        seed=seed,
        channels_last=True,
        checkpoint_every=25,
    )


def _train_and_evaluate(
    folder: Path,
    configs: Mapping[str, TrainConfig],
    train: _InMemory,
    val: _InMemory,
    record: _Record,
    suffix: str = "",
    *,
    progress: bool,
) -> tuple[dict[str, nn.Module], EvaluationResult]:
    """The arms' models and how they stand the attacks; `suffix` is for the names of the stages."""
    models, results = {}, {}
    for arm, config in configs.items():
        with record.stage(f"train {arm}{suffix}"):
            print(f"training: {arm}{suffix}", flush=True)
            trainer = Trainer(config, _initial_model(config.seed), train, description=_DESCRIPTION)
            trainer.run(folder / arm, progress=progress)
            models[arm] = trainer.model
    for arm, model in models.items():
        evaluation = folder / arm / "evaluation.json"
        if not evaluation.exists():
            with record.stage(f"evaluate {arm}{suffix}"):
                print(f"evaluation: {arm}{suffix}", flush=True)
                loader = DataLoader(val, batch_size=min(8, len(val)))
                evaluate(model, loader, PAPER_ATTACKS, EPS, worst_case=False, progress=progress).to_json(evaluation)
        results[arm] = EvaluationResult.from_json(evaluation)
    return models, EvaluationResult.merge(results)


def _initial_model(seed: int) -> nn.Module:
    return build_model(_NETWORK, num_classes=NUM_CLASSES, seed=seed)


class _Record:
    """results.json: the arguments of the demo in a folder, how far it got, and in the end what came out."""

    def __init__(self, out: Path, arguments: Mapping[str, Any]) -> None:
        self.path = out / "results.json"
        arguments = json.loads(json.dumps(arguments))  # tuples become lists, as in the file
        self.content: dict[str, Any] = {"arguments": arguments, "finished": False, "seconds": {}}
        if self.path.exists():
            self.content |= self._previous()
        found = self.content["arguments"]
        if differing := [key for key in arguments if found.get(key) != arguments[key]]:
            told = ", ".join(f"{key} {found.get(key)} there and {arguments[key]} here" for key in differing)
            raise ValueError(f"out: the demo in {out} has other arguments ({told}); choose another folder")
        if not (out / "overhead.csv").exists():  # they are of the machine that times the steps
            self.content |= {"machine": _machine(), "build_info": build_info(), "git_commit": git_commit()}
        own_folder(out, self.path, "an earlier demo's")
        self._write()

    def _previous(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(content["arguments"], dict) and isinstance(content["seconds"], dict):
                return content
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self.path} is no record of a demo; choose another folder")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to the stage's: an interrupted one is made of several."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.content["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)
            self._write()

    def finish(self, **results: Any) -> None:
        kept = ("arguments", "finished", "seconds", "machine", "build_info", "git_commit")
        self.content = {name: self.content.get(name) for name in kept} | results | {"finished": True}
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")


def _machine() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class _InMemory(Dataset[tuple[Tensor, Tensor]]):
    """A data set read once, for all arms."""

    def __init__(self, dataset: Cityscapes) -> None:
        self.samples = [dataset[i] for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


def _report(
    curves: Sequence[Mapping[str, Any]],
    overhead: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    steps: int,
) -> str:
    """The tables, and what they say about BIM-10 at eps 0.03; of several seeds mean and range."""
    scores: dict[tuple[str, str, float], list[float]] = {}
    for row in curves:
        scores.setdefault((row["arm"], row["attack"], row["eps"]), []).append(row["miou"])
    score = {key: sum(values) / len(values) for key, values in scores.items()}
    seeds = len(next(iter(scores.values())))
    columns = [("fgsm", 0.0), *((attack, eps) for attack in PAPER_ATTACKS for eps in (0.01, SHOWN_EPS))]
    titles = [f"{attack} {eps:g}" if eps else "clean" for attack, eps in columns]
    lines = ["", f"{'mIoU':<14}" + "".join(f"{title:>13}" for title in titles)]
    for arm in PAPER_ARMS:
        lines.append(f"{arm:<14}" + "".join(f"{score[arm, *column]:>13.3f}" for column in columns))
        if seeds > 1:
            ranges = ((min(scores[arm, *column]), max(scores[arm, *column])) for column in columns)
            lines.append(" " * 14 + "".join(f"{f'{low:.3f}-{high:.3f}':>13}" for low, high in ranges))
    if seeds > 1:
        lines += ["", f"mIoU: mean, and below it the range, of {seeds} trainings on the same scenes."]

    lines += [
        "",
        f"{'overhead':<14}{'step':>13}{'here':>9}" + "".join(f"{source:>20}" for source in PAPER_OVERHEAD),
    ]
    for row in overhead:
        percents = [source.get(row["arm"], 0.0) for source in PAPER_OVERHEAD.values()]
        cells = "".join(f"{percent:>18.2f} %" for percent in percents)
        lines.append(f"{row['arm']:<14}{row['step_ms_p50']:>10.1f} ms{row['overhead_percent']:>7.2f} %{cells}")

    if steps < _MEANINGFUL_STEPS:
        lines += ["", f"{steps} steps train nothing: this was a check that all works, its figures mean nothing."]
        return "\n".join([*lines, f"Time: {sum(seconds.values()) / 60:.1f} minutes."])
    robust = {arm: score[arm, "bim-10", SHOWN_EPS] for arm in PAPER_ARMS}
    ranking = sorted(robust, key=lambda arm: robust[arm], reverse=True)
    rivals = ("random-fgsm", "fgsm", "basic")
    not_below = [arm for arm in rivals if robust[arm] >= robust["fast-newton"]]
    lines += [
        "",
        f"BIM-10, eps {SHOWN_EPS:g}: " + " > ".join(f"{arm} {robust[arm]:.3f}" for arm in ranking),
        f"The paper finds fast-newton above {', '.join(rivals)} there; "
        + (f"here it is not above {', '.join(not_below)}." if not_below else "so it is here."),
        *_overlapping(scores, rivals),
        f"Time: {sum(seconds.values()) / 60:.1f} minutes.",
    ]
    return "\n".join(lines)


def _overlapping(scores: Mapping[tuple[str, str, float], Sequence[float]], rivals: Sequence[str]) -> list[str]:
    """Which arms the seeds do not tell from fast-newton; nothing with one seed."""
    ours = scores["fast-newton", "bim-10", SHOWN_EPS]
    if len(ours) == 1:
        return []
    theirs = {arm: scores[arm, "bim-10", SHOWN_EPS] for arm in rivals}
    same = [arm for arm, values in theirs.items() if min(values) <= max(ours) and min(ours) <= max(values)]
    return [
        f"These are means; the range of fast-newton overlaps that of {', '.join(same) if same else 'none of them'}."
    ]
