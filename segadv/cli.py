"""The command line: segadv demo | train | evaluate | reproduce | data | doctor.

`segadv doctor`, `--help` and `--version` need the base dependencies only: what the others need besides is imported
where it is used.
"""

from __future__ import annotations

import codecs
import importlib.util
import io
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace

from . import __version__, build_info
from .checks import at_least
from .comparison import describe, load_trained, untrained, whole_images
from .data import check_files, dataset_class, generate_streets, open_dataset
from .data.check import format_checks
from .demo import run_demo
from .distributed import from_first, process_group, rank
from .evaluation import ATTACKS, ITERATIVE, EvaluationResult, evaluate
from .masking import masking_checks
from .models import ModelConfig
from .ops import backends
from .options import arranged, built, configs, effective, numbers, parser, require_utf8
from .report import require_report_folder, write_report
from .reproduce import Evaluation, reproduce
from .run_directory import RunDirectory, git_commit
from .training import Trainer, resolve_device
from .writing import write_text

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
            options = arranged(sys.argv[1:] if argv is None else argv)
            arguments = parser().parse_args(options).clone(with_meta=False)  # where values came from: files' names
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


def _demo(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    run_demo(arguments.out, quick=arguments.quick, seed=arguments.seed, seeds=arguments.seeds)


def _train(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    config, model_config = configs(arguments)
    options = effective(arguments)
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


def _evaluate(arguments: Namespace) -> None:
    _require("PIL", "matplotlib", "tqdm")
    start = time.perf_counter()
    require_utf8(_given(arguments))
    at_least(0, images=arguments.images, seed=arguments.seed, **{"check-images": arguments.check_images})
    at_least(1, **{"batch-size": arguments.batch_size})
    device = resolve_device(arguments.device)
    eps = numbers("eps", arguments.eps)
    steps = _steps(arguments.steps, eps)
    attacks = [name.strip() for name in arguments.attacks.split(",")]
    if arguments.steps != "100" and {*attacks} <= {*ATTACKS} - {*ITERATIVE}:
        raise ValueError(f"steps has no effect without one of {', '.join(ITERATIVE)} among the attacks")
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
    setting = arguments.setting
    options = arguments[setting]
    require_utf8([options.out])
    if options.quick:
        options.evaluation.images = options.evaluation.images or 2
        options.overhead_steps = min(options.overhead_steps, 2)
    config, model = configs(options)
    reproduce(
        setting,
        config,
        model,
        dataset=options.dataset,
        data=options.data,
        out=options.out,
        options=effective(options),
        arms=[arm.strip() for arm in options.arms.split(",")],
        evaluation=built(Evaluation, "evaluation", options.evaluation),
        overhead_steps=options.overhead_steps,
        command=shlex.join(["segadv", "reproduce", setting, "--config", str(Path(options.out) / "config.yaml")])
        + f" --out {shlex.quote(options.out)}",
    )


def _data(arguments: Namespace) -> None:
    if arguments.kind == "check":
        _check_data(arguments.check)
        return
    scenes = arguments["generate-streets"]
    generate_streets(scenes.dir, train=scenes.train, val=scenes.val, size=scenes.size, seed=scenes.seed)
    print(f"{scenes.dir}: {scenes.train} training and {scenes.val} validation images")


def _check_data(arguments: Namespace) -> None:
    _require("PIL")
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
