"""The options of the commands: what there is to give, how it is written, and what it comes to."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

from . import __version__
from .checks import did_you_mean
from .comparison import PAPER_ARMS
from .data import DATASETS
from .evaluation import ATTACKS, EPS, ITERATIVE
from .models import MODELS, ModelConfig
from .recipes import ConfigFile, recipe_file, recipes
from .reproduce import SETTINGS, Evaluation
from .train_config import flat
from .training import ARMS, TrainConfig

__all__ = ["arranged", "built", "configs", "effective", "numbers", "parser", "require_utf8"]


# --- what there is ----------------------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    """Tells of a mistyped option which one is meant, and writes types as a reader would."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        if type(ex) is KeyError:  # jsonargparse's own, on the way to a message: it names the subcommand only
            message = "an option's file, or its {...}, holds a key that is no option"
        unknown = re.fullmatch(r"unrecognized arguments: --([\w.-]+).*", message, flags=re.IGNORECASE | re.DOTALL)
        if unknown and "did you mean" not in message:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            usual = {"lr": "learning_rate", "wd": "weight_decay", "epochs": "steps", "bs": "batch_size"}
            meant = f"--{usual.get(unknown[1], unknown[1])}"
            message += did_you_mean(meant, known)
        if missing := re.fullmatch(r"the following arguments are required: ([\w., -]+)", message):
            names = [name.rpartition(".")[2] for name in missing[1].split(", ")]
            told = (name if name in ("checkpoints", "dir") else f"--{name}" for name in names)
            message = f"the following arguments are required: {', '.join(told)}"
        message = re.sub(r"a <class '(?:\w+\.)*(\w+)'>", r"a value of type \1", message)
        message = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)
        message = re.sub(r"a value of type tuple|a tuple with 2 elements", "a list, such as [0.5, 2]", message)
        super().error(message, ex)


def parser() -> ArgumentParser:
    parser = _Parser(
        allow_abbrev=False,
        prog="segadv",
        version=__version__,
        exit_on_error=False,
        description="Adversarial training and evaluation of semantic segmentation models.",
    )
    commands = parser.add_subcommands(dest="command")

    demo = _subparser(
        "Generates data, trains the paper's five arms, attacks and compares them, measures what training costs."
    )
    demo.add_argument("--out", required=True, help="folder for everything; a demo that was stopped there continues")
    demo.add_argument(
        "--quick",
        action="store_true",
        help="check that everything works: the same code on so little data that nothing is learnt",
    )
    demo.add_argument("--seed", type=int, default=0, help="of data, initialisation and training")
    demo.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="trainings of every arm, with seed, seed + 1, ...; above 1 mean and range are shown",
    )
    commands.add_subcommand("demo", demo, help="the whole comparison in one command")

    train = _subparser(
        "Trains with one method, the arm, on the split 'train' of a data set. Options come from --config and from the "
        "command line, which overrides the file; their names may be written with - instead of _."
    )
    _add_training_options(train)
    commands.add_subcommand("train", train, help="train one arm")

    evaluate = _subparser("Attacks trained models and writes a report: tables, pictures, gradient-masking checks.")
    evaluate.add_argument(
        "checkpoints", nargs="+", help="last.pt or model.safetensors of training runs; several are compared"
    )
    evaluate.add_argument("--data", required=True, help="folder of the data set")
    evaluate.add_argument(
        "--dataset", default="", help=f"kind of data set: {', '.join(DATASETS)}; unless given, that of the training"
    )
    evaluate.add_argument("--out", required=True, help="folder of the report; a stopped evaluation continues")
    evaluate.add_argument("--split", default="val", help="of the data set")
    evaluate.add_argument(
        "--attacks",
        default="fgsm,pgd,segpgd,cospgd,cospgd-balanced",
        help=f"some of {', '.join(ATTACKS)}, with commas between them",
    )
    eps = ",".join(f"{value:g}" for value in EPS)
    evaluate.add_argument("--eps", default=eps, help="numbers in [0, 1], such as 0.03 or 8/255; 0 is clean")
    evaluate.add_argument(
        "--steps",
        type=str,
        default="100",
        help=f"number of steps of {', '.join(ITERATIVE)}; 20,0.03:100 is 20, but 100 at eps 0.03",
    )
    evaluate.add_argument("--images", type=int, default=0, help="number of images, the first of the split; 0: all")
    evaluate.add_argument(
        "--check-images", type=int, default=8, help="how many of them the gradient-masking checks use; 0: no checks"
    )
    evaluate.add_argument("--batch-size", type=int, default=4, help="images at once")
    evaluate.add_argument("--seed", type=int, default=0, help="of the attacks' random starts")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    commands.add_subcommand("evaluate", evaluate, help="attack checkpoints and report")

    reproduce = _subparser(
        "Repeats the comparison of Wiens & Hammer 2022: trains its five arms, attacks them with FGSM and BIM-10, times "
        "their steps, and writes its figures and tables beside ours. A command that was stopped continues."
    )
    commands.add_subcommand("reproduce", reproduce, help="the paper's comparison on its data sets")
    settings = reproduce.add_subcommands(dest="setting")
    for name in SETTINGS:
        settings.add_subcommand(name, _reproduce_parser(name), help=f"with the recipe {SETTINGS[name]}")

    data = _subparser("Generates or checks data.")
    commands.add_subcommand("data", data, help="generate street scenes, check a data set")
    kinds = data.add_subcommands(dest="kind")
    streets = _subparser("Writes generated street scenes as PNG files in the layout of Cityscapes.")
    streets.add_argument("dir", help="folder; an incomplete one is completed")
    streets.add_argument("--train", type=int, default=200, help="number of training images")
    streets.add_argument("--val", type=int, default=48, help="number of validation images")
    streets.add_argument("--size", type=HeightxWidth, default="160x320", help="height x width")
    streets.add_argument("--seed", type=int, default=0, help="decides every pixel of the scenes")
    kinds.add_subcommand("generate-streets", streets, help="write the scenes")

    check = _subparser(
        "Reads all files of a data set and lists every problem with its file and remedy; then the exit code is 2."
    )
    check.add_argument("dir", help="folder of the data set")
    check.add_argument("--dataset", default="cityscapes", help=f"one of {', '.join(DATASETS)}")
    check.add_argument("--split", default="train,val", help="one or several, with commas between them")
    kinds.add_subcommand("check", check, help="check numbers, sizes, files and label values")

    doctor = _subparser("Shows what is compiled in, which backend runs on which device, and why another does not.")
    commands.add_subcommand("doctor", doctor, help="what runs here, and why")
    return parser


def _subparser(description: str, **options: Any) -> ArgumentParser:
    return _Parser(description=description, exit_on_error=False, allow_abbrev=False, **options)


def _reproduce_parser(setting: str) -> ArgumentParser:
    recipe = SETTINGS[setting]
    parser = _subparser(
        f"Trains with the recipe {recipe} unless options say otherwise; their names may have - instead of _.",
        default_config_files=[str(recipe_file(recipe))],
    )
    _add_training_options(parser, without={"arm"})
    every = ",".join(PAPER_ARMS)
    parser.add_argument("--arms", type=str, default=every, help="arms to train now, with commas between them")
    parser.add_class_arguments(Evaluation, "evaluation")
    parser.add_argument("--overhead_steps", type=int, default=25, help="number of steps timed for each arm")
    parser.add_argument(
        "--quick", action="store_true", help="--config quick, few images and steps: checks only that everything works"
    )
    _explain(parser, {"evaluation": Evaluation}, {})
    return parser


def _add_training_options(parser: ArgumentParser, *, without: Collection[str] = ()) -> None:
    """--config, --data, --out, and every field of TrainConfig and ModelConfig."""
    parser.add_argument(
        "--config", action=ConfigFile, help=f"YAML file, or the name of a recipe: {', '.join(recipes())}"
    )
    parser.add_argument("--dataset", default="cityscapes", help=f"kind of data set: {', '.join(DATASETS)}")
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--out", required=True, help="folder for the run; a run that was stopped there continues")
    parser.add_argument("--crop", type=HeightxWidth, default="{}x{}".format(*TrainConfig.crop))
    parser.add_class_arguments(TrainConfig, skip={"crop", *without})
    parser.add_class_arguments(ModelConfig, "model")
    nested = {name: kind for name, kind in typing.get_type_hints(TrainConfig).items() if dataclasses.is_dataclass(kind)}
    texts = {
        "arm": f"training method: {', '.join(ARMS)}",
        "crop": "height x width of the training crops, such as 128x256",
        "seed": "of initialisation, order of the data, augmentation, choice of attacked samples, dropout and attack",
        "workers": "processes that load data; 0 loads in the training process",
        "model.name": f"network: {', '.join(MODELS)}",
    }
    _explain(parser, {"training": TrainConfig, "model": ModelConfig, **nested}, _explained(TrainConfig) | texts)


def _explain(parser: ArgumentParser, groups: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """The help of options that come from dataclasses: prefix -> class; `texts` takes the place of a docstring's."""
    explained = {f"{name}.{field}": text for name, kind in groups.items() for field, text in _explained(kind).items()}
    explained |= texts
    titles = {str(kind): name for name, kind in groups.items()}
    for action in parser._actions:
        action.help = explained.get(action.dest, action.help)
    for group in parser._action_groups:
        group.title = titles.get(group.title or "", group.title)


def _explained(config: type) -> dict[str, str]:
    """The argument descriptions of a docstring."""
    docstring = inspect.getdoc(config) or ""  # __doc__ is indented until Python 3.12 only
    arguments = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in entries}


class HeightxWidth(tuple[int, int]):
    """(height, width), written as 160x320."""


def _parsed_size(value: Any) -> HeightxWidth:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)x(\d+)", value)):
        return HeightxWidth((int(match[1]), int(match[2])))
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        return HeightxWidth(value)
    raise ValueError(f"must be height x width, such as 160x320, got {value!r}")


register_type(
    HeightxWidth,
    serializer="{0[0]}x{0[1]}".format,
    deserializer=_parsed_size,
    deserializer_exceptions=(ValueError, TypeError),
)


# --- how it is written -------------------------------------------------------------------------------------------


def arranged(argv: Sequence[str]) -> list[str]:
    """--config first, so that the options beside it override the file, whatever their order; - in names becomes _.

    Numbers may be written as elsewhere: 8/255, and 0,8/255 for [0, 0.0314].
    """
    if not argv or argv[0] not in ("train", "reproduce"):
        return list(argv)
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    found, options = files.parse_known_args(argv[1:])
    if argv[0] == "reproduce" and "--quick" in options:
        found.config.append("quick")
    names = [re.sub(r"^--[^=]*", lambda name: "--" + name[0][2:].replace("-", "_"), option) for option in options]
    for i, option in enumerate(names):
        name, given, value = option.partition("=")
        if name in ("--validation.eps", "--validation.attacks", "--evaluation.stronger", "--augmentation.scale"):
            if given:
                names[i] = f"{name}={_as_list(name, value)}"
            elif i + 1 < len(names):
                names[i + 1] = _as_list(name, names[i + 1])
        elif name == "--eps" and given:
            names[i] = f"--eps={_eps(value)}"
        elif name == "--eps" and i + 1 < len(names):
            names[i + 1] = str(_eps(names[i + 1]))
    # behind the setting that reproduce has
    at = 0 if argv[0] == "train" or not names or names[0].startswith("-") else 1
    return [argv[0], *names[:at], *(f"--config={name}" for name in found.config), *names[at:]]


def _as_list(option: str, value: str) -> str:
    """What jsonargparse reads as a list."""
    if value.startswith("-"):
        return value
    name, inner = option.removeprefix("--"), value.removeprefix("[").removesuffix("]")
    parts = [str(number) for number in numbers(name, inner)] if inner and name.endswith("eps") else inner.split(",")
    return f"[{','.join(parts)}]"


def numbers(name: str, value: str) -> list[float]:
    try:
        return [float(Fraction(part)) for part in value.split(",")]
    except (ValueError, ArithmeticError):
        raise ValueError(
            f"{name} must be numbers with commas between them, such as 0,0.01,8/255, got {value!r}"
        ) from None


def _eps(value: str) -> float:
    try:
        return float(Fraction(value))
    except (ValueError, ArithmeticError):
        raise ValueError(f"eps must be a number, such as 0.03 or 8/255, got {value!r}") from None


# --- what it comes to --------------------------------------------------------------------------------------------


def configs(arguments: Namespace) -> tuple[TrainConfig, ModelConfig]:
    """What the options of `_add_training_options` say."""
    types = typing.get_type_hints(TrainConfig)
    values = {}
    for field in dataclasses.fields(TrainConfig):
        value = arguments.get(field.name, field.default)  # reproduce has no arm
        if dataclasses.is_dataclass(types[field.name]):
            value = built(types[field.name], field.name, value)
        values[field.name] = value
    return TrainConfig(**values | {"crop": tuple(arguments.crop)}), built(ModelConfig, "model", arguments.model)


def built(kind: Any, name: str, value: Any) -> Any:
    if not isinstance(value, Namespace):
        first = dataclasses.fields(kind)[0].name
        raise ValueError(f"{name} consists of several options, such as {name}.{first}; got {value!r}")
    return kind(**vars(value))


def effective(arguments: Namespace) -> str:
    """All options but those of the folder and of other files as YAML, for --config."""
    left_out = ("config", "out", "quick")
    options = {name: value for name, value in arguments.as_dict().items() if name not in left_out}
    require_utf8(flat(options).values())
    options["crop"] = "{}x{}".format(*arguments.crop)
    plain = json.loads(json.dumps(options))  # tuples become lists
    text: str = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
    return text


def require_utf8(values: Iterable[object]) -> None:
    """Of what stands in config.yaml or a report, which are read and written in UTF-8."""
    for value in values:
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(
                f"names that are written to files must be UTF-8, got {value!r}; rename it, or set PYTHONUTF8=1 where "
                "the name is UTF-8 and the locale is not"
            )
