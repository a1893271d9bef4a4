"""The command line: segadv demo | train | evaluate | reproduce | data | doctor.

`segadv doctor`, `--help` and `--version` need the base dependencies only: the other commands import what they
need when they run.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from . import __version__, build_info
from .checks import at_least, did_you_mean
from .comparison import PAPER_ARMS
from .data import DATASETS
from .evaluation import ATTACKS, EPS, ITERATIVE
from .models import MODELS, ModelConfig
from .ops import backends
from .recipes import ConfigFile, recipe_file, recipes
from .reproduce import SETTINGS, Evaluation
from .run_directory import RunDirectory, git_commit
from .train_config import flat
from .training import ARMS, TrainConfig

__all__ = ["main"]

_RESUMABLE = ("demo", "train", "evaluate", "reproduce", "data generate-streets")


def _printed(error: UnicodeError) -> tuple[str | bytes, int]:
    """Names of files may be any bytes, and are printed as those; what the terminal's encoding lacks as its number."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1  # one by one
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


_PRINTED = "segadv.printed"
codecs.register_error(_PRINTED, _printed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 2 after an error of the user, 130 after Ctrl-C or SIGTERM (from
    torchrun, say), 141 where the reader of its output left (`segadv doctor | head -3`).

    SEGADV_DEBUG=1 lets errors through with their traceback.
    """
    commands: dict[str, Callable[[Any], None]] = {
        "demo": _demo,
        "train": _train,
        "evaluate": _evaluate,
        "reproduce": _reproduce,
        "data": _data,
        "doctor": _doctor,
    }
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_PRINTED)
    command = None
    try:
        with _termination_interrupts():
            options = _arranged(sys.argv[1:] if argv is None else argv)
            arguments = _parser().parse_args(options).clone(with_meta=False)  # where values came from: files' names
            name = arguments.command
            command = f"data {arguments.data.kind}" if name == "data" else name
            _refuse_idle(options, arguments)
            _require_folder(arguments)
            commands[name](arguments[name])
            sys.stdout.flush()
    except KeyboardInterrupt:
        continues = "; the same command continues" if command in _RESUMABLE else ""
        print(f"\nsegadv: interrupted{continues}", file=sys.stderr)
        return 130
    except ArgumentError as error:
        # jsonargparse spreads its messages over several lines
        print(f"segadv: error: {' '.join(str(error).split())} (segadv --help tells more)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 141  # as a shell tells of SIGPIPE
        if os.environ.get("SEGADV_DEBUG") == "1":
            raise
        # of a worker of torch's DataLoader it comes with its traceback, the error itself last
        told = re.split(r"\n(?:\w+\.)*\w+(?:Error|Exception): ", str(error))[-1]
        print(f"segadv: error: {told if 'DataLoader worker' in str(error) else error}".rstrip(), file=sys.stderr)
        return 2
    return 0


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM is like Ctrl-C, unless somebody handles or ignores it."""
    main = threading.current_thread() is threading.main_thread()  # only there do signals arrive
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reader_left() -> bool:
    """Whether nobody reads the standard output any more; then nothing more is written to it."""
    output = select.poll()
    output.register(1, 0)
    if left := any(event & select.POLLERR for _, event in output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush when Python ends
    return left


def _arranged(argv: Sequence[str]) -> list[str]:
    """--config first, so that the options beside it override the file, whatever their order; - in names becomes _.

    Numbers may be written as elsewhere: 8/255, and 0,8/255 for [0, 0.0314].
    """
    if not argv or argv[0] not in ("train", "reproduce"):
        return list(argv)
    configs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    configs.add_argument("--config", action="append", default=[])
    found, options = configs.parse_known_args(argv[1:])
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


def _require_utf8(values: Iterable[object]) -> None:
    """Of what stands in config.yaml or a report, which are read and written in UTF-8."""
    for value in values:
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(
                f"names that are written to files must be UTF-8, got {value!r}; rename it, or set PYTHONUTF8=1 where "
                "the name is UTF-8 and the locale is not"
            )


def _refuse_idle(options: Sequence[str], arguments: Namespace) -> None:
    """Refuses options of what never takes place."""
    names = [option.partition("=")[0] for option in options]
    if arguments.command == "train" and not getattr(arguments.train.validation, "every", True):
        for name in names:
            if name.startswith("--validation.") and name != "--validation.every":
                raise ValueError(f"{name} has no effect without --validation.every, the steps between validations")
    if arguments.command == "reproduce" and "--evaluation.steps" in names:
        evaluation = arguments.reproduce[arguments.reproduce.setting].evaluation
        if not {*ITERATIVE} & {*getattr(evaluation, "stronger", ITERATIVE)}:
            raise ValueError(
                f"--evaluation.steps has no effect without {', '.join(ITERATIVE)} in --evaluation.stronger"
            )


def _require_folder(arguments: Namespace) -> None:
    """What the command writes to may be missing, but neither a file nor a name that a shell left empty."""
    own = arguments[arguments.command]
    name = "--out"
    if arguments.command == "reproduce":
        own = own[own.setting]
    if arguments.command == "data" and own.kind == "generate-streets":
        name, own = "dir", own["generate-streets"]
    out = own.get(name.removeprefix("--"))
    if out is not None and (not out or (os.path.lexists(out) and not Path(out).is_dir())):
        raise ValueError(f"{name} must be a folder, got {out!r}{', which is no folder' if out else ''}")


def _as_list(option: str, value: str) -> str:
    """What jsonargparse reads as a list."""
    if value.startswith("-"):
        return value
    name, inner = option.removeprefix("--"), value.removeprefix("[").removesuffix("]")
    parts = [str(number) for number in _numbers(name, inner)] if inner and name.endswith("eps") else inner.split(",")
    return f"[{','.join(parts)}]"


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


def _parser() -> ArgumentParser:
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
        "--attacks", default="fgsm,pgd,segpgd,cospgd", help=f"some of {', '.join(ATTACKS)}, with commas between them"
    )
    eps = ",".join(f"{value:g}" for value in EPS)
    evaluate.add_argument("--eps", default=eps, help="numbers in [0, 1], such as 0.03 or 8/255; 0 is clean")
    evaluate.add_argument(
        "--steps",
        type=str,
        default="100",
        help="number of steps of bim, pgd, segpgd, cospgd; 20,0.03:100 is 20, but 100 at eps 0.03",
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


def _numbers(name: str, value: str) -> list[float]:
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


def _demo(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .demo import run_demo

    run_demo(arguments.out, quick=arguments.quick, seed=arguments.seed, seeds=arguments.seeds)


def _train(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .comparison import describe, untrained
    from .data import open_dataset
    from .distributed import from_first, process_group, rank
    from .training import Trainer

    config, model_config = _configs(arguments)
    options = _effective(arguments)
    out = Path(arguments.out)
    dataset = open_dataset(arguments.dataset, arguments.data, "train")
    validation = open_dataset(arguments.dataset, arguments.data, "val") if config.validation.every else None
    description = describe(arguments.dataset, model_config, dataset.num_classes)
    with process_group(config.device):
        model = untrained(model_config, out / "last.pt", num_classes=dataset.num_classes, seed=config.seed)
        trainer = Trainer(config, model, dataset, validation_dataset=validation, description=description)
        with closing(RunDirectory(out)) as directory:  # no other run may write there, until the trainer's has ended
            if from_first(directory.prepare):
                trainer.load(directory.checkpoint)  # refuses another run's before anything is written
            from_first(lambda: _write_options(out / "config.yaml", options, model_config, directory))
            trainer.run(out)
        if rank() != 0:
            return
    pictures = directory.draw(f"trained with {config.arm}")
    drawn = f"; {', '.join(map(str, pictures))}" if pictures else ""
    print(f"{out / 'last.pt'}: {config.arm}, {trainer.steps_done} steps{drawn}")


def _write_options(path: Path, options: str, model: ModelConfig, directory: RunDirectory) -> None:
    """config.yaml; ValueError where the run began with other initial weights than these options name, or where the file
    is no run's."""
    from .writing import write_text

    there = path.exists()
    if there and not (directory.checkpoint.exists() or directory.run.exists()):
        if path.read_bytes() != options.encode():  # what a run killed at its start left is the same
            raise ValueError(f"{path} belongs to no run, and this one would overwrite it; give another output folder")
    elif there and directory.checkpoint.exists():
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
            differing = [name for name in ("pretrained", "backbone") if before[name] != getattr(model, name)]
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):  # not ours any more
            differing = []
        if differing:
            told = ", ".join(
                f"model.{name} {before[name]!r} there, {getattr(model, name)!r} here" for name in differing
            )
            raise ValueError(
                f"{directory.path} holds a run that began with other weights ({told}): give the same "
                "ones to continue it, or another output folder"
            )
    write_text(path, options, of_run=True)


def _configs(arguments: Namespace) -> tuple[TrainConfig, ModelConfig]:
    """What the options of `_add_training_options` say."""
    types = typing.get_type_hints(TrainConfig)
    values = {}
    for field in dataclasses.fields(TrainConfig):
        value = arguments.get(field.name, field.default)  # reproduce has no arm
        if dataclasses.is_dataclass(types[field.name]):
            value = _built(types[field.name], field.name, value)
        values[field.name] = value
    return TrainConfig(**values | {"crop": tuple(arguments.crop)}), _built(ModelConfig, "model", arguments.model)


def _built(kind: Any, name: str, value: Any) -> Any:
    if not isinstance(value, Namespace):
        first = dataclasses.fields(kind)[0].name
        raise ValueError(f"{name} consists of several options, such as {name}.{first}; got {value!r}")
    return kind(**vars(value))


def _effective(arguments: Namespace) -> str:
    """All options but those of the folder and of other files as YAML, for --config."""
    left_out = ("config", "out", "quick")
    options = {name: value for name, value in arguments.as_dict().items() if name not in left_out}
    _require_utf8(flat(options).values())
    options["crop"] = "{}x{}".format(*arguments.crop)
    plain = json.loads(json.dumps(options))  # tuples become lists
    text: str = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
    return text


def _evaluate(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .comparison import load_trained, whole_images
    from .data import open_dataset
    from .evaluation import EvaluationResult, evaluate
    from .masking import masking_checks
    from .report import require_report_folder, write_report
    from .training import resolve_device

    start = time.perf_counter()
    _require_utf8(_given(arguments))
    at_least(0, images=arguments.images, seed=arguments.seed, **{"check-images": arguments.check_images})
    at_least(1, **{"batch-size": arguments.batch_size})
    device = resolve_device(arguments.device)
    eps = _numbers("eps", arguments.eps)
    steps = _steps(arguments.steps, eps)
    attacks = [name.strip() for name in arguments.attacks.split(",")]
    if arguments.steps != "100" and {*attacks} <= {*ATTACKS} - {*ITERATIVE}:
        raise ValueError("steps has no effect without bim, pgd, segpgd or cospgd among the attacks")
    trained = [load_trained(path) for path in arguments.checkpoints]
    names = _arm_names(arguments.checkpoints, [config["arm"] for _, config in trained])
    models = {name: model.to(device) for name, (model, _) in zip(names, trained, strict=True)}
    descriptions = [config["description"] for _, config in trained]
    dataset = open_dataset(arguments.dataset or _dataset(descriptions), arguments.data, arguments.split)
    _check_classes(dataset, arguments.checkpoints, descriptions)
    out = Path(arguments.out)
    require_report_folder(out)

    def loader(images: int) -> Any:
        return whole_images(dataset, images=images, batch_size=arguments.batch_size)

    shared: dict[str, Any] = {"seed": arguments.seed, "records": out / "records"}
    results, checks, commit = {}, {}, git_commit()
    for arm, model in models.items():
        results[arm] = evaluate(model, loader(arguments.images), attacks, eps, steps=steps, progress=True, **shared)
        results[arm].run["git_commit"] = commit
        if checked := arguments.check_images:
            others = {name: other for name, other in models.items() if name != arm}
            few = loader(min(checked, arguments.images or checked))
            checks[arm] = masking_checks(model, few, sources=others, **shared)
        print(f"{arm}: attacked, after {(time.perf_counter() - start) / 60:.1f} minutes in all", flush=True)
    command = shlex.join(["segadv", "evaluate", *_given(arguments)])
    merged = EvaluationResult.merge(results)
    print(write_report(out, merged, checks, class_names=dataset.class_names, command=command))
    print(f"{out / 'report.md'}; {(time.perf_counter() - start) / 60:.1f} minutes on {device}")


def _dataset(descriptions: Sequence[dict[str, Any]]) -> str:
    """The kind of data set that the checkpoints were trained on."""
    names: list[str] = sorted({description["dataset"] for description in descriptions})
    if len(names) > 1:
        raise ValueError(f"the checkpoints were trained on different data sets ({', '.join(names)}): give --dataset")
    return names[0]


def _check_classes(dataset: Any, checkpoints: Sequence[str], descriptions: Sequence[dict[str, Any]]) -> None:
    for path, description in zip(checkpoints, descriptions, strict=True):
        if description["num_classes"] != dataset.num_classes:
            raise ValueError(
                f"{path} was trained on {description['num_classes']} classes ({description['dataset']}), "
                f"the data set has {dataset.num_classes}: give the --dataset that fits"
            )


def _arm_names(checkpoints: Sequence[str], arms: Sequence[str]) -> list[str]:
    """The arm of each checkpoint; beside one that is not unique the end of its folder's path that is."""
    folders = [Path(os.path.abspath(path)).parent.parts[1:] for path in checkpoints]
    names = list(arms)
    for depth in range(1, max(map(len, folders)) + 1):
        if len(set(names)) == len(names):
            break
        ends = ["/".join(parts[-depth:]) for parts in folders]
        names = [arm if arms.count(arm) == 1 else f"{arm} ({end})" for arm, end in zip(arms, ends, strict=True)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"checkpoints must be of different arms or lie in different folders; got {repeated}")
    return names


def _steps(value: str, eps: Sequence[float]) -> dict[float, int]:
    """ "20,0.03:100" -> eps: steps."""
    steps: dict[float, int] = {}
    seen: set[float | None] = set()
    for part in sorted(value.split(","), key=lambda part: ":" in part):  # first the number for all eps
        at, _, count = part.strip().rpartition(":")
        try:
            named = float(Fraction(at)) if at else None
            steps |= dict.fromkeys(eps if named is None else [named], int(count))
        except (ValueError, ArithmeticError):
            raise ValueError(f"steps must be like 100, or like 20,0.03:100 with eps 0.03, got {value!r}") from None
        if named in seen:
            raise ValueError(f"steps gives {f'eps {at}' if at else 'the number without an eps'} twice: {value!r}")
        seen.add(named)
    if unknown := [at for at in steps if at not in eps]:
        raise ValueError(f"steps names eps that are not evaluated: {unknown}")
    return steps


def _given(arguments: Namespace) -> list[str]:
    """The arguments of the command line that gives these."""
    values = {name: value for name, value in vars(arguments).items() if name != "checkpoints" and value != ""}
    return [*arguments.checkpoints, *(text for n, v in values.items() for text in (f"--{n.replace('_', '-')}", str(v)))]


def _reproduce(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    from .reproduce import reproduce

    setting = arguments.setting
    options = arguments[setting]
    _require_utf8([options.out])
    if options.quick:
        options.evaluation.images = options.evaluation.images or 2
        options.overhead_steps = min(options.overhead_steps, 2)
    config, model = _configs(options)
    reproduce(
        setting,
        config,
        model,
        dataset=options.dataset,
        data=options.data,
        out=options.out,
        options=_effective(options),
        arms=[arm.strip() for arm in options.arms.split(",")],
        evaluation=_built(Evaluation, "evaluation", options.evaluation),
        overhead_steps=options.overhead_steps,
        command=shlex.join(["segadv", "reproduce", setting, "--config", str(Path(options.out) / "config.yaml")])
        + f" --out {shlex.quote(options.out)}",
    )


def _data(arguments: Namespace) -> None:
    from .data import generate_streets

    if arguments.kind == "check":
        _check_data(arguments.check)
        return
    scenes = arguments["generate-streets"]
    generate_streets(scenes.dir, train=scenes.train, val=scenes.val, size=scenes.size, seed=scenes.seed)
    print(f"{scenes.dir}: {scenes.train} training and {scenes.val} validation images")


def _check_data(arguments: Namespace) -> None:
    _require("PIL")
    from .data import check_files, dataset_class
    from .data.check import format_checks

    kind = dataset_class(arguments.dataset)
    checks = check_files(kind, arguments.dir, [split.strip() for split in arguments.split.split(",")])
    print(format_checks(kind, checks), flush=True)
    if problems := sum(len(check.problems) for check in checks):
        raise ValueError(f"{problems} problem{'s' if problems > 1 else ''} in {arguments.dir}, listed above")


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
