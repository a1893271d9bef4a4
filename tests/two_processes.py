"""What test_distributed.py has done by two processes: python -m torch.distributed.run ... two_processes.py OUT NAME

Every process writes what it found to OUT/NAME.<rank>.pt. Without NAME all scenarios run one after the other, so that
the processes have to be started only once.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from segadv import distributed
from segadv.data import EpochSampler
from segadv.evaluation import evaluate
from segadv.training import Trainer, Validation

sys.path.insert(0, str(Path(__file__).parent))
from test_training import CLASSES, SAMPLES, Squares, config


def network(dtype: torch.dtype = torch.float64, norm: str = "group") -> nn.Module:
    torch.manual_seed(3)
    layer = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), layer, nn.ReLU(), nn.Conv2d(8, CLASSES, 1)).to(dtype)


def trainer(dtype: torch.dtype = torch.float64, norm: str = "group", on_read: Any = None, **changes: Any) -> Trainer:
    settings = config(**{"arm": "fast-newton", "monitor_every": 6, **changes})
    data = Squares(dtype, on_read=on_read)
    return Trainer(settings, network(dtype, norm), data, validation_dataset=data, description={"dataset": "squares"})


def outcome(found: Trainer) -> dict[str, Any]:
    momenta = [state["momentum_buffer"] for state in found.optimizer.state_dict()["state"].values()]
    return {"steps_done": found.steps_done, "weights": dict(found.model.state_dict()), "momenta": momenta}


def trained(out: Path, dtype: torch.dtype = torch.float64, norm: str = "group", **changes: Any) -> dict[str, Any]:
    found = trainer(dtype, norm, **changes)
    found.run(out, progress=False)
    return outcome(found)


# --- scenarios: folder -> what this process found -------------------------------------------------------------


VALIDATION = Validation(every=7, images=5, attacks=("fgsm", "bim-10"), eps=(0.0, 0.02, 0.04), batch_size=2)


def float64(out: Path) -> dict[str, Any]:
    return trained(out, validation=VALIDATION)


def float32(out: Path) -> dict[str, Any]:
    return trained(out, torch.float32, arm="basic")


def accumulated(out: Path) -> dict[str, Any]:
    return trained(out, accumulation=2)


def batch_norm(out: Path) -> dict[str, Any]:
    return trained(out, torch.float32, "batch")


def one_all_void(out: Path) -> dict[str, Any]:
    """Given batches: the second process has no labelled pixel, then fewer than the first, then none has one."""
    found = trainer(arm="basic")
    losses = []
    for images, labels in void_batches():
        share = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
        losses.append(found.step(images[share], labels[share], []).loss)
    return outcome(found) | {"losses": losses}


def void_batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for void in (slice(2, 4), slice(1, 3), slice(0, 4)):
        images = torch.rand(4, 3, 16, 24, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, (4, 16, 24), generator=generator)
        labels[void] = 255
        labels[3, 5:] = 255
        yield images, labels


def random_numbers(out: Path) -> dict[str, Any]:
    found = trainer(arm="random-fgsm")
    images, labels = next(void_batches())
    return {"eps": found.step(images[:2], labels[:2], [0, 1]).eps}


def collectives(out: Path) -> dict[str, Any]:
    """Names of what is communicated in the attack, and in a step, after DDP has arranged its buckets."""
    found: dict[str, Any] = {}
    for accumulation in (1, 2):
        for arm in ("basic", "bim-3"):
            tried = trainer(arm=arm, accumulation=accumulation)
            images, labels = next(void_batches())
            # the first process attacks three images, the second one none
            chosen = [0, 1, 3] if distributed.rank() == 0 else []
            for _ in range(2):
                tried.step(images, labels, chosen)
            found[f"{arm}, {accumulation}"] = communicated(lambda: tried.step(images, labels, chosen))  # noqa: B023
    found["attack"] = communicated(lambda: tried.attack(images[:1], labels[:1]))
    with_buffers = distributed.averaging_gradients(network(norm="batch"))
    for _ in range(3):
        found["with buffers"] = communicated(lambda: with_buffers(images).sum().backward())
    return found


def communicated(work: Callable[[], Any]) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
        time.sleep(0.2)  # gloo's thread notes an operation after it has handed over the result
    return Counter(event.name for event in profiled.events() if event.name.startswith("gloo:"))


def shares(out: Path) -> list[list[tuple[int, int]]]:
    options: dict[str, Any] = {"batch_size": 4, "seed": 7, "steps": 6, "accumulation": 2}
    sampler = EpochSampler(SAMPLES, **options, rank=distributed.rank(), processes=distributed.world_size())
    return list(sampler)


def validated(out: Path) -> list[Any]:
    """Five images in three batches, then one batch: the second process has none."""
    model, data = network(), Squares(torch.float64)
    found = []
    for batches in ([[0, 1], [2, 3], [4]], [[0, 1, 2]]):
        own = batches[distributed.rank() :: distributed.world_size()]
        loader = [(data.images[indices], data.labels[indices]) for indices in own]
        result = evaluate(model, loader, ["fgsm", "segpgd"], [0.0, 0.03], steps=4, sharded=True)
        also = {"batch_size": result.run["batch_size"]}
        found.append(
            [
                entry.row | also | {"confusion": entry.confusion.tolist(), "without_each": entry.without_each.tolist()}
                for entry in result.measurements
            ]
        )
    return found


def interrupted(out: Path) -> dict[str, Any]:
    """Ctrl-C in the second process only, while the fifth step's data are read; both stop after the seventh step."""
    reads = Counter[int]()

    def press(index: int) -> None:
        reads["all"] += 1  # type: ignore[index]
        if distributed.rank() == 1 and reads["all"] == 2 * 4 + 1:  # type: ignore[index]
            signal.raise_signal(signal.SIGINT)

    stopped = trainer(torch.float32, "batch", on_read=press, checkpoint_every=100)
    try:
        stopped.run(out, progress=False)
        raised = False
    except KeyboardInterrupt:
        raised = True
    handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return {"raised": raised, "stopped_after": stopped.steps_done, "handler": handler} | trained(
        out, torch.float32, "batch"
    )


def interrupted_at_the_end(out: Path) -> dict[str, Any]:
    """Ctrl-C in the second process only, in the last step, after which nobody tells of it any more."""
    stopped = trainer(torch.float32, "batch")
    genuine = stopped.step_in_place

    def step(*arguments: Any) -> Any:
        if distributed.rank() == 1 and stopped.steps_done == stopped.config.steps - 1:
            signal.raise_signal(signal.SIGINT)
        return genuine(*arguments)

    stopped.step_in_place = step  # type: ignore[method-assign]
    try:
        stopped.run(out, progress=False)
        raised = False
    except KeyboardInterrupt:
        raised = True
    shared = (out / "model.safetensors").exists()
    distributed.gather(None)  # looked in both, before one goes on
    return {"raised": raised, "shared": shared} | trained(out, torch.float32, "batch")


def full_disk(out: Path) -> dict[str, Any]:
    """The first process cannot replace the second checkpoint."""
    filled = trainer(checkpoint_every=4)
    replace, replaced = os.replace, []

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("last.pt"):
            replaced.append(target)
            if len(replaced) == 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    os.replace = failing
    try:
        filled.run(out, progress=False)
        message = ""
    except OSError as error:
        message = str(error)
    finally:
        os.replace = replace
    distributed.gather(0)
    return {"message": message, "checkpoint": torch.load(out / "last.pt")["steps_done"], "files": os.listdir(out)}


def only_the_first_writes(out: Path) -> list[str]:
    opened = []
    with recorded_opens(opened):
        trained(out, steps=6, validation=VALIDATION, workers=1)
    return opened


@contextmanager
def recorded_opens(names: list[str]) -> Iterator[None]:
    genuine = builtins.open, os.replace, Path.unlink, Path.mkdir, Path.write_text

    def recorded(call: Any) -> Any:
        def wrapper(path: Any, *arguments: Any, **keywords: Any) -> Any:
            mode = arguments[0] if call is genuine[0] and arguments else keywords.get("mode", "r")
            if not isinstance(path, int) and (call is not genuine[0] or mode != "r"):  # no pipes
                names.append(str(path))
            return call(path, *arguments, **keywords)

        return wrapper

    builtins.open, os.replace, Path.unlink, Path.mkdir, Path.write_text = map(recorded, genuine)
    try:
        yield
    finally:
        builtins.open, os.replace, Path.unlink, Path.mkdir, Path.write_text = genuine


def refused(out: Path) -> dict[str, Any]:
    messages = {}
    for name, changes in (("batch", {"batch_size": 6, "accumulation": 2}), ("device", {"device": "cuda"})):
        try:
            trainer(**changes)
        except ValueError as error:
            messages[name] = str(error)
    # OUT/one is the folder of a run of a single process that was stopped after four steps
    elsewhere = trainer()
    try:
        elsewhere.run(out.parent / "one", progress=False)
    except ValueError as error:
        messages["processes"] = str(error)
    messages["steps_done"] = elsewhere.steps_done
    return messages | trained(out.parent / "one", allow_other_split=True)


def early_stop(out: Path) -> dict[str, Any]:
    """Only the first process's probes fall; the conclusion is drawn by both."""
    from segadv import training

    accuracies = iter([0.8, 0.7, 0.1])
    genuine = training.probe

    def probe(*arguments: Any, **keywords: Any) -> dict[str, float]:
        return genuine(*arguments, **keywords) | {"pgd_accuracy": next(accuracies) if distributed.rank() == 0 else 0.8}

    training.probe = probe
    try:
        stopped = trainer(arm="rs-fgsm", monitor_every=3)
        stopped.run(out, progress=False)
    finally:
        training.probe = genuine
    return outcome(stopped) | {"stopped_at": stopped.stopped_at}


SCENARIOS = [
    float64, float32, accumulated, batch_norm, one_all_void, random_numbers, collectives, shares, validated,
    interrupted, interrupted_at_the_end, full_disk, only_the_first_writes, refused, early_stop,
]  # fmt: skip


# --- of their own: runs that end badly ------------------------------------------------------------------------


def killed(out: Path) -> dict[str, Any]:
    """As float64, but the second process is killed in its sixth step where OUT/kill says so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first one's message is wanted, even if torchrun is faster
    found = trainer(validation=VALIDATION)
    if (out.parent / "kill").exists() and distributed.rank() == 1:
        genuine = found.step_in_place

        def step(*arguments: Any) -> Any:
            if found.steps_done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*arguments)

        found.step_in_place = step  # type: ignore[method-assign]
    found.run(out, progress=False)
    return outcome(found)


def main(out: Path, *names: str) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("cpu"):
        for scenario in [globals()[name] for name in names] or SCENARIOS:
            found = scenario(out / scenario.__name__)
            torch.save(found, out / f"{scenario.__name__}.{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    distributed.leave(0)
