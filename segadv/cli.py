"""The command line: segadv demo | train | evaluate | data | doctor.

`segadv doctor`, `--help` and `--version` need the base dependencies only: the other commands import what they
need when they run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import __version__, build_info
from .evaluation import ATTACKS, EPS
from .ops import backends
from .training import ARMS, TrainConfig

__all__ = ["main"]

_RESUMABLE = ("demo", "train", "evaluate", "data")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 after an error of the user, 130 after Ctrl-C.

    SEGADV_DEBUG=1 lets errors through with their traceback.
    """
    commands: dict[str, Callable[[Any], None]] = {
        "demo": _demo,
        "train": _train,
        "evaluate": _evaluate,
        "data": _data,
        "doctor": _doctor,
    }
    command = None
    try:
        arguments = _parser().parse_args(argv)
        command = arguments.command
        commands[command](arguments[command])
    except KeyboardInterrupt:
        continues = "; the same command continues" if command in _RESUMABLE else ""
        print(f"\nsegadv: interrupted{continues}", file=sys.stderr)
        return 130
    except ArgumentError as error:
        # jsonargparse spreads its messages over several lines
        print(f"segadv: error: {' '.join(str(error).split())} (segadv --help tells more)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("SEGADV_DEBUG") == "1":
            raise
        print(f"segadv: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="segadv",
        version=__version__,
        exit_on_error=False,
        description="Adversarial training and evaluation of semantic segmentation models.",
    )
    commands = parser.add_subcommands(dest="command")

    demo = _subparser("Generates data, trains the five arms, attacks and compares them, measures their overhead.")
    demo.add_argument("--out", required=True, help="folder for everything; a demo stopped there is continued")
    demo.add_argument(
        "--quick", action="store_true", help="a check that all works: the same code on so little that nothing is learnt"
    )
    demo.add_argument("--seed", type=int, default=0, help="of data, initialisation and training")
    demo.add_argument(
        "--seeds", type=int, default=1, help="trainings of every arm, with seed, seed + 1, ...: shows mean and range"
    )
    commands.add_subcommand("demo", demo, help="the whole comparison in one command")

    train = _subparser("Trains small_pspnet on the split 'train' of a folder in the layout of Cityscapes.")
    train.add_argument("--config", action="config", help="YAML file with any of the options below")
    train.add_argument("--data", required=True, help="folder with leftImg8bit/ and gtFine/")
    train.add_argument(
        "--out", required=True, help="folder for last.pt, metrics.jsonl, training.png; continues last.pt"
    )
    types = typing.get_type_hints(TrainConfig)
    explained = _explained(TrainConfig) | {
        "arm": f"training method: {', '.join(ARMS)}",
        "crop": "height x width of the training crops",
        "seed": "of the initialisation, the order of the data, augmentation, coins, dropout and attack",
    }
    for field in dataclasses.fields(TrainConfig):
        train.add_argument(
            "--" + field.name.replace("_", "-"),
            type=str if field.name == "crop" else types[field.name],
            default="{}x{}".format(*TrainConfig.crop) if field.name == "crop" else field.default,
            help=explained[field.name],
        )
    commands.add_subcommand("train", train, help="train one arm")

    evaluate = _subparser("Attacks trained models and writes a report: tables, pictures, gradient-masking checks.")
    evaluate.add_argument("checkpoints", nargs="+", help="last.pt of training runs; several are compared")
    evaluate.add_argument("--data", required=True, help="folder with leftImg8bit/ and gtFine/")
    evaluate.add_argument("--out", required=True, help="folder for report.md and all else; a stopped one is continued")
    evaluate.add_argument("--split", default="val", help="of the data")
    evaluate.add_argument("--attacks", default="fgsm,pgd,segpgd,cospgd", help=f"out of {', '.join(ATTACKS)}")
    eps = ",".join(f"{value:g}" for value in EPS)
    evaluate.add_argument("--eps", default=eps, help="numbers in [0, 1]; 0 is clean")
    evaluate.add_argument(
        "--steps",
        type=str,
        default="100",
        help="of bim, pgd, segpgd, cospgd; 20,0.03:100 is 20 steps, but 100 at eps 0.03",
    )
    evaluate.add_argument("--images", type=int, default=0, help="the first so many of the split; 0: all")
    evaluate.add_argument(
        "--check-images", type=int, default=8, help="so many of them for the gradient-masking checks; 0: no checks"
    )
    evaluate.add_argument("--batch-size", type=int, default=4, help="images at once")
    evaluate.add_argument("--seed", type=int, default=0, help="of the attacks' random starts")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    commands.add_subcommand("evaluate", evaluate, help="attack checkpoints and report")

    data = _subparser("Makes data.")
    commands.add_subcommand("data", data, help="generate street scenes")
    kinds = data.add_subcommands(dest="kind")
    streets = _subparser("Writes generated street scenes as PNG files in the layout of Cityscapes.")
    streets.add_argument("dir", help="folder; an interrupted one is completed")
    streets.add_argument("--train", type=int, default=200, help="number of training images")
    streets.add_argument("--val", type=int, default=48, help="number of validation images")
    streets.add_argument("--size", default="160x320", help="height x width")
    streets.add_argument("--seed", type=int, default=0, help="decides every pixel")
    kinds.add_subcommand("generate-streets", streets, help="write the scenes")

    doctor = _subparser("Tells what is compiled in, which backend runs on which device, and why another does not.")
    commands.add_subcommand("doctor", doctor, help="what runs here, and why")
    return parser


def _subparser(description: str) -> ArgumentParser:
    return ArgumentParser(description=description, exit_on_error=False)


def _explained(config: type) -> dict[str, str]:
    """The argument descriptions of a docstring."""
    arguments = (config.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


def _size(name: str, value: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)x(\d+)", value)):
        raise ValueError(f"{name} must be height x width, such as 160x320, got {value!r}")
    return int(match[1]), int(match[2])


def _numbers(name: str, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between them, got {value!r}") from None


def _demo(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .demo import run_demo

    run_demo(arguments.out, quick=arguments.quick, seed=arguments.seed, seeds=arguments.seeds)


def _train(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .data import NUM_CLASSES, Cityscapes
    from .models import ModelConfig, build_model
    from .plots import plot_training
    from .training import Trainer

    values = {field.name: arguments[field.name] for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{**values, "crop": _size("crop", arguments.crop)})
    model = build_model(ModelConfig(), num_classes=NUM_CLASSES, seed=config.seed)
    trainer = Trainer(config, model, Cityscapes(arguments.data, "train"))
    out = Path(arguments.out)
    trainer.run(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plot_training(lines, out / "training.png", title=f"trained with {config.arm}")
    print(f"{out / 'last.pt'}: {config.arm}, {trainer.steps_done} steps; {out / 'training.png'}")


def _evaluate(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from torch.utils.data import DataLoader, Subset

    from .data import Cityscapes
    from .evaluation import EvaluationResult, evaluate
    from .masking import masking_checks
    from .models import small_pspnet
    from .report import write_report
    from .training import _resolve_device, load_model

    start = time.perf_counter()
    for name, least in (("images", 0), ("check_images", 0), ("batch_size", 1), ("seed", 0)):
        if arguments[name] < least:
            raise ValueError(f"{name.replace('_', '-')} must be at least {least}, got {arguments[name]}")
    device = _resolve_device(arguments.device)
    eps = _numbers("eps", arguments.eps)
    steps = _steps(arguments.steps, eps)
    attacks = [name.strip() for name in arguments.attacks.split(",")]
    models = {name: load_model(path, small_pspnet()).to(device) for name, path in _arms(arguments.checkpoints).items()}
    dataset = Cityscapes(arguments.data, arguments.split)
    out = Path(arguments.out)

    def loader(images: int) -> DataLoader[Any]:
        return DataLoader(Subset(dataset, range(min(images, len(dataset)))), batch_size=arguments.batch_size)

    images = arguments.images or len(dataset)
    shared: dict[str, Any] = {"seed": arguments.seed, "records": out / "records"}
    results, checks = {}, {}
    for arm, model in models.items():
        results[arm] = evaluate(model, loader(images), attacks, eps, steps=steps, progress=True, **shared)
        if arguments.check_images:
            others = {name: other for name, other in models.items() if name != arm}
            checks[arm] = masking_checks(model, loader(min(images, arguments.check_images)), sources=others, **shared)
        print(f"{arm}: attacked, after {(time.perf_counter() - start) / 60:.1f} minutes in all", flush=True)
    command = shlex.join(["segadv", "evaluate", *_given(arguments)])
    print(write_report(out, EvaluationResult.merge(results), checks, command=command))
    print(f"{out / 'report.md'}; {(time.perf_counter() - start) / 60:.1f} minutes on {device}")


def _arms(checkpoints: Sequence[str]) -> dict[str, str]:
    """name -> path: the arm of each checkpoint; the folder's name beside it where that is not unique."""
    from .training import read_config

    arms = [read_config(path)["arm"] for path in checkpoints]
    names = [
        arm if arms.count(arm) == 1 else f"{arm} ({Path(path).parent.name})"
        for arm, path in zip(arms, checkpoints, strict=True)
    ]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"checkpoints must be of different arms or lie in folders of different names; got {repeated}")
    return dict(zip(names, checkpoints, strict=True))


def _steps(value: str, eps: Sequence[float]) -> dict[float, int]:
    """ "20,0.03:100" -> eps: steps."""
    steps: dict[float, int] = {}
    for part in value.split(","):
        at, _, count = part.strip().rpartition(":")
        try:
            steps |= dict.fromkeys([float(at)] if at else eps, int(count))
        except ValueError:
            raise ValueError(f"steps must be like 100, or like 20,0.03:100 with eps 0.03, got {value!r}") from None
    if unknown := [at for at in steps if at not in eps]:
        raise ValueError(f"steps names eps that are not evaluated: {unknown}")
    return steps


def _given(arguments: Namespace) -> list[str]:
    """The arguments of the command line that gives these."""
    values = {name: value for name, value in vars(arguments).items() if name != "checkpoints"}
    return [*arguments.checkpoints, *(text for n, v in values.items() for text in (f"--{n.replace('_', '-')}", str(v)))]


def _data(arguments: Namespace) -> None:
    from .data import generate_streets

    scenes = arguments["generate-streets"]
    size = _size("size", scenes.size)
    generate_streets(scenes.dir, train=scenes.train, val=scenes.val, size=size, seed=scenes.seed)
    print(f"{scenes.dir}: {scenes.train} training and {scenes.val} validation images")


def _doctor(arguments: Namespace) -> None:
    print(f"segadv {__version__}")
    for name, value in build_info().items():
        print(f"  {name}: {value}")
    print(backends.report())
    missing = _missing("PIL", "matplotlib", "tqdm")
    print(f"extra demo: {'missing ' + ', '.join(missing) if missing else 'installed'}")


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _require(*modules: str) -> None:
    if missing := _missing(*modules):
        raise ImportError(f"this command needs {', '.join(missing)}: pip install pillow matplotlib tqdm")
