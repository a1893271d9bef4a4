"""One command that measures a GPU: `python -m benchmarks.device [--only PART ...]`.

Every part runs in a process of its own, ends within eight minutes and loses nothing when another fails. Rows go to
benchmarks/results/<gpu>.csv after every measurement, and with them a Markdown table beside it. Outputs are compared
with eager PyTorch in float32 before anything is timed. `--dry-run` goes through everything at tiny sizes, on the CPU
where there is no GPU; its figures mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import segadv
from segadv import functional as F
from segadv import models
from segadv.ops import backends, library

from .cases import CASES, Case, random_regions
from .measure import (
    Samples,
    check_close,
    copy_milliseconds,
    device_name,
    driver_version,
    host_milliseconds,
    package_version,
    peak_bytes_on_device,
    slug,
    times_on_device,
)
from .ops import (
    segadv_newton_step,
    segadv_sign_step,
    upsampled,
    usual_averaged_gain,
    usual_confusion_matrix,
    usual_cross_entropy,
    usual_gain_sum,
    usual_loss_sum,
    usual_newton_step,
    usual_sign_step,
    value_and_gradient,
)
from .records import PEAK_MEMORY, Record, Where, median, percent_over, read_records, write_records

ROOT = Path(__file__).parents[1]
PART_SECONDS = 480  # when a part's process is ended
BUDGET_SECONDS = 400  # when a part begins no further measurement

Call = Callable[[], Any]

# What belongs to a measurement's time, in rows of their own: "<operation>, <name>".
EXTRA_MEMORY = "memory beyond the results"
BANDWIDTH = "bandwidth"
OF_COPY = "bandwidth by that of a copy"
OVER_BARE = "over the bare pass"
BELONGING = (PEAK_MEMORY, EXTRA_MEMORY, BANDWIDTH, OF_COPY, OVER_BARE)
ENQUEUEING = "enqueueing"


# --- operations ---------------------------------------------------------------------------------------------------


def usual_argmax_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return upsampled(logits, size).argmax(1).byte()


def usual_l1_norm(grad: Tensor) -> Tensor:
    return grad.float().abs().flatten(1).sum(1)


@dataclass(frozen=True)
class Operation:
    """Modes: "forward"; "forward + backward" and "backward", through autograd; "one pass", where ours gives value
    and gradient, and the usual code is differentiated."""

    ours: Callable[..., Any]
    usual: Callable[..., Tensor]
    modes: tuple[str, ...] = ("forward",)
    has_max: bool = False  # `usual` takes by_max


def _loss_and_grad(loss: str) -> Operation:
    options = {"step": 2, "steps": 4} if loss == "segpgd" else {}
    return Operation(partial(F.loss_and_grad, loss=loss, **options), partial(usual_loss_sum, loss=loss), ("one pass",))


AUTOGRAD = ("forward", "forward + backward")
OPERATIONS = {
    "gain_and_grad": Operation(F.gain_and_grad, usual_gain_sum, ("one pass",), has_max=True),
    "averaged_gain": Operation(F.averaged_gain, usual_averaged_gain, (*AUTOGRAD, "backward"), has_max=True),
    "cross_entropy": Operation(F.cross_entropy, usual_cross_entropy, AUTOGRAD),
    **{f"loss_and_grad, {loss}": _loss_and_grad(loss) for loss in ("cross_entropy", "segpgd", "cospgd")},
    "confusion_matrix": Operation(F.confusion_matrix, usual_confusion_matrix),
    "argmax_labels": Operation(F.argmax_labels, usual_argmax_labels),
    "newton_step": Operation(segadv_newton_step, usual_newton_step),
    "sign_step": Operation(segadv_sign_step, usual_sign_step),
    "l1_norm": Operation(F.l1_norm, usual_l1_norm),
}
PIXEL_SPACE = ("newton_step", "sign_step", "l1_norm")


def arguments_of(
    operation: str, case: Case, dtype: torch.dtype, device: torch.device, *, full_resolution: bool
) -> tuple[Any, ...]:
    if operation not in PIXEL_SPACE:
        logits, labels = case.tensors(full_resolution=full_resolution, dtype=dtype, device=device)
        return logits, tuple(labels.shape[-2:]) if operation == "argmax_labels" else labels
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.images, 3, case.size, case.size)
    images = torch.rand(shape, generator=generator, device=device)
    grad = torch.randn(shape, generator=generator, device=device)
    if operation == "l1_norm":
        return (grad.to(dtype),)
    if operation == "newton_step":  # eps near 0.01
        return images, grad, 0.01 * grad.abs().sum((1, 2, 3))
    return images, grad, (images + 0.02 * torch.rand_like(images) - 0.01).clamp_(0, 1)


def fewest_bytes(operation: str, mode: str, arguments: tuple[Any, ...]) -> int:
    """What the operation must read and write at least once, per-image results left out."""
    first = arguments[0].nbytes
    if operation in PIXEL_SPACE:
        inputs = sum(t.nbytes for t in arguments if t.dim() == 4)
        return inputs if operation == "l1_norm" else inputs + first
    if operation == "argmax_labels":
        return first + arguments[0].shape[0] * math.prod(arguments[1])  # one byte per prediction
    labels: Tensor = arguments[1]
    if mode == "forward":
        return first + labels.nbytes
    if mode == "backward":  # the gradient; of each pixel the label and the runner-up
        return first + labels.nbytes + labels.numel()
    return 2 * first + labels.nbytes


def under(backend: str, function: Callable[..., Any], *arguments: Any) -> Any:
    with segadv.backend(backend):
        return function(*arguments)


def our_backends(device: torch.device) -> list[str]:
    """Those that can run; the reference is eager PyTorch, which is measured as one writes it."""
    return [
        name
        for name, module in backends.BACKENDS.items()
        if name != "reference" and module.unavailable(device.type) is None
    ]


def bind(function: Callable[..., Any], mode: str, arguments: tuple[Any, ...], *, is_ours: bool) -> Call:
    if mode == "forward" or (mode == "one pass" and is_ours):
        return partial(function, *arguments)
    leaf = arguments[0].detach().requires_grad_()
    if mode == "backward":
        value = function(leaf, *arguments[1:]).sum()
        return partial(torch.autograd.grad, value, leaf, retain_graph=True)
    return partial(value_and_gradient, function, leaf, *arguments[1:])


def outcome(result: Any) -> list[Tensor]:
    """Results of all providers in one form: values, or (sum of the values, gradient)."""
    if isinstance(result, Tensor):
        return [result]
    if len(result) == 3:  # per-image sums, n_valid, gradient
        return [result[0].sum(), result[2]]
    return list(result)


def check(result: Any, expected: list[Tensor], dtype: torch.dtype) -> None:
    allowed = 5e-3 if dtype is torch.float32 else 5e-2
    for ours, truth in zip(outcome(result), expected, strict=True):
        check_close("against eager in float32", ours, truth, tolerance=allowed)


def providers_of(
    run: Run, operation: str, mode: str, arguments: tuple[Any, ...], dtype: torch.dtype, *, compiled: bool
) -> dict[str, Call]:
    """Provider -> call, warm; one that fails, or does not fit into the memory, is left out and says why."""
    entry = OPERATIONS[operation]
    usual = {"eager": entry.usual}
    if entry.has_max:
        usual["eager, max"] = partial(entry.usual, by_max=True)
    functions: dict[str, Callable[..., Any]] = {name: partial(under, name, entry.ours) for name in run.backends}
    functions |= usual
    if compiled:
        torch._dynamo.reset()  # otherwise the limit of recompilations would silently make it eager
        for name, function in usual.items():
            functions[name.replace("eager", "compile")] = torch.compile(function, dynamic=False)
    wide = tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)
    expected = outcome(bind(list(usual.values())[-1], mode, wide, is_ours=False)())
    calls = {}
    for name, function in functions.items():
        try:
            call = bind(function, mode, arguments, is_ours=name in run.backends)
            result = call()
            # Eager's own rounding in bfloat16 is not ours to judge.
            if name in run.backends or dtype is torch.float32:
                check(result, expected, dtype)
            del result
            call()
            calls[name] = call
        except torch.OutOfMemoryError as error:
            print(f"  {name}: left out, it does not fit into the memory: {str(error).splitlines()[0]}")
        except Exception:
            run.failed.append(f"{operation}, {mode}: {name}")
            traceback.print_exc()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return calls


def measure_operation(
    run: Run, operation: str, mode: str, case: Case, dtype: torch.dtype, *, full_resolution: bool, compiled: bool
) -> None:
    arguments = arguments_of(operation, case, dtype, run.device, full_resolution=full_resolution)
    calls = providers_of(run, operation, mode, arguments, dtype, compiled=compiled)
    times = times_on_device(calls, run.device, **run.effort)
    name = operation if full_resolution or operation in PIXEL_SPACE else f"upsample + {operation}"
    bytes_moved = fewest_bytes(operation, mode, arguments)
    where = run.where(case.name, dtype)
    for provider, call in calls.items():
        run.add([
            where.record(name, provider, mode, [times[provider]], unit="ms"),
            *memory_on_device(where, name, provider, mode, call),
            *run.bandwidth(where, name, provider, mode, times[provider], bytes_moved),
        ])  # fmt: skip


def memory_on_device(where: Where, operation: str, provider: str, mode: str, call: Call) -> list[Record]:
    """At the peak of one call, and how much of it is not the returned tensors."""
    peak, extra = (np.array([found / 1e6]) for found in peak_bytes_on_device(call, where.device))
    return [
        where.record(f"{operation}, {PEAK_MEMORY}", provider, mode, [peak], unit="MB"),
        where.record(f"{operation}, {EXTRA_MEMORY}", provider, mode, [extra], unit="MB"),
    ]


def measure_operations(
    run: Run,
    case: Case,
    operations: Iterable[str],
    *,
    full_resolution: bool,
    compiled: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    for dtype, operation in product(dtypes, operations):
        if operation in PIXEL_SPACE and (full_resolution or (operation != "l1_norm" and dtype is torch.bfloat16)):
            continue  # without logits there is but one resolution; images are never in half precision
        for mode in OPERATIONS[operation].modes:
            if mode == "backward" and (compiled or not full_resolution):
                continue  # upsampled, it only scales the gradient that the forward has found
            what = "full resolution" if full_resolution else "upsampled"
            run.attempt(
                f"{case.name}, {what}: {operation}, {mode}, {str(dtype)[6:]}",
                partial(
                    measure_operation, run, operation, mode, case, dtype,
                    full_resolution=full_resolution, compiled=compiled,
                ),
            )  # fmt: skip


# --- parts --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One part on its way: where it runs, until when, and what it has found."""

    device: torch.device
    path: Path
    dry: bool = False
    until: float = field(default_factory=lambda: time.monotonic() + BUDGET_SECONDS)
    copies: dict[float, float] = field(default_factory=dict)  # bytes moved -> GB/s
    rows: list[Record] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    device_failed: bool = False  # nothing runs there any more

    @property
    def backends(self) -> list[str]:
        return our_backends(self.device)

    @property
    def effort(self) -> dict[str, Any]:
        return {"rounds": 2} if self.dry else {}

    @property
    def cases(self) -> dict[str, Case]:
        """All with the batch size of training; noise is a case for the CPU."""
        changes = {"images": 2, "own": 8, "size": 32} if self.dry else {"images": 16}
        return {name: replace(case, **changes) for name, case in CASES.items() if not case.noise}

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def where(self, case: str, dtype: torch.dtype) -> Where:
        return Where(case, dtype, self.device, ("triton",))

    def measure_copies(self) -> None:
        for mebibytes in (64, 256, 1024):
            size = mebibytes << (10 if self.dry else 20)
            where, name = self.where(f"{mebibytes} MiB", torch.float32), ("copy", "torch", "forward")
            times = copy_milliseconds(self.device, size)
            self.copies[2 * size] = 2 * size / float(median(times)) / 1e6
            self.add([where.record(*name, [times], unit="ms"), *self.bandwidth(where, *name, times, 2 * size)])

    def bandwidth(
        self, where: Where, operation: str, provider: str, mode: str, milliseconds: Samples, fewest_bytes: float
    ) -> list[Record]:
        """The fewest bytes that the operation must move, by its time; also as a fraction of the copy bandwidth: that of
        the copy of most like size, as the last of what is written may still be in the cache, not in memory."""
        alike = min(self.copies, key=lambda moved: abs(math.log(moved / max(fewest_bytes, 1))), default=None)
        copy = math.nan if alike is None else self.copies[alike]

        def row(what: str, unit: str, of: float) -> Record:
            def statistic(ms: Samples) -> Samples:
                return fewest_bytes / median(ms) / 1e6 / of

            return where.record(f"{operation}, {what}", provider, mode, [milliseconds], unit=unit, statistic=statistic)

        return [row(BANDWIDTH, "GB/s", 1.0), row(OF_COPY, "", copy)]

    def attempt(self, what: str, measurement: Call) -> None:
        """One measurement; its failure is written down and does not touch the others, unless it was the device's."""
        if self.seconds_left < 0 or self.device_failed:
            self.left_out.append(f"{what}: {'the device had failed' if self.device_failed else 'the time was up'}")
            return
        print(f"\n{what}", flush=True)
        try:
            measurement()
        except Exception:
            self.failed.append(what)
            traceback.print_exc()
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except Exception:  # an illegal address, say, of which every later call in this process tells again
            self.device_failed = True
            self.failed.append(f"{what}: the device, which takes nothing more in this process")
            traceback.print_exc()
        sys.stderr.flush()

    def add(self, rows: Sequence[Record]) -> None:
        """Of one measurement: its time, and what belongs to it."""
        self.rows += rows
        write_records(self.path, rows)
        time, *others = rows
        rest = "".join(
            f"  {row.operation.removeprefix(f'{time.operation}, ')} {row.p50:g} {row.unit}" for row in others
        )
        print(f"  {time.provider:13s} {time.p50:10.4f} ms [{time.p20:.4f}, {time.p80:.4f}]{rest}", flush=True)


def part_machine(run: Run) -> None:
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {package_version('triton')}")
    print(f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}, cuDNN {torch.backends.cudnn.version()}")
    if run.device.type == "cuda":
        p = torch.cuda.get_device_properties(run.device)
        print(f"{device_name(run.device)}, driver {driver_version()}, compute capability {p.major}.{p.minor}")
        print(
            f"{p.multi_processor_count} multiprocessors, L2 {p.L2_cache_size / 2**20:.0f} MiB, "
            f"memory {p.total_memory / 2**30:.1f} GiB, {torch.cuda.device_count()} visible"
        )
    print(f"{os.cpu_count()} CPU cores\n{segadv.build_info()}\n{backends.report()}")
    for name, module in backends.BACKENDS.items():
        if reason := module.unavailable(run.device.type):
            run.left_out.append(f"{name}: {reason}")


def part_tests(run: Run) -> None:
    """The GPU tests, and the operations' contract tests on the backends that run there.

    Side by side, because the kernels' compilation, on the CPU, takes most of the time.
    """
    pytest = [
        sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "--continue-on-collection-errors",
        "-o", "addopts=--strict-markers", *(["--collect-only", "-qq"] if run.dry else []),
    ]  # fmt: skip
    contract = [f"tests/test_{name}.py" for name in ("margin", "cross_entropy", "step", "confusion", "library")]
    gpu, opcheck = "tests/test_gpu.py", "tests/test_library.py"
    on_gpu = run.backends if run.device.type == "cuda" else ["none"]
    # as the tests name them; on a GPU's machine the native backend's tests on the CPU show nothing new
    ours = ["native-on-gpu" if name == "native" and run.device.type == "cuda" else name for name in run.backends]
    dtypes = [f"torch.{name}" for name in ("float32", "bfloat16", "float16", "float64")]
    margins = ("neighbours or wider_rows", "begins_anywhere or gradcheck", "any_strides or alike")
    arms = ("basic", "newton", "segpgd")  # those of the trainings, by a word that pytest's -k takes
    shards = [
        ["tests/test_triton.py", "-k", "not kernels_compile"],
        *([gpu, "-k", f"training and not compile and {name}"] for name in on_gpu),
        # compiling takes minutes for each
        *([gpu, "-k", f"training and compile and {name} and {arm}"] for name in on_gpu for arm in arms),
        *([gpu, "-k", f"not (compile or training) and {name}"] for name in on_gpu),
        *([gpu, "-k", what] for what in ("compile_fullgraph", "cuda_graphs")),
        *([opcheck, "-k", f"opcheck and {name}"] for name in ours),
        *([*contract, "-k", f"({' or '.join(ours)}) and {dtype} and not opcheck"] for dtype in dtypes),
        *([file, "-k", f"({' or '.join(ours)}) and not ({' or '.join(dtypes)} or opcheck)"] for file in contract[1:]),
        # of these tests Triton compiles five hundred kernels
        *([contract[0], "-k", f"({' or '.join(ours)}) and ({names})"] for names in margins),
        [
            contract[0],
            "-k",
            f"({' or '.join(ours)}) and not ({' or '.join(margins)} or {' or '.join(dtypes)} or opcheck)",
        ],
    ]
    commands = {f"pytest {shlex.join(shard)}": [*pytest, *shard] for shard in shards}
    # Inductor would start a process for each core in each of them.
    _side_by_side(run, commands, "tests", {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"})


def _side_by_side(run: Run, commands: Mapping[str, list[str]], name: str, environment: Mapping[str, str]) -> None:
    """Runs all commands at once, until the time is up; what is still running then has failed: it may hang. What each
    prints goes into a file beside the rows as soon as it has ended, and the end of it to the screen."""
    whole = run.path.with_name(f"{run.path.stem}-{name}.log")
    whole.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, whole.open("w") as everything:
        running: dict[subprocess.Popen[bytes], tuple[str, Path]] = {}
        for i, (what, command) in enumerate(commands.items()):
            log = Path(scratch) / str(i)
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
                )
            running[process] = what, log

        def keep(process: subprocess.Popen[bytes]) -> None:
            what, log = running.pop(process)
            text = log.read_text(errors="replace")
            everything.write(f"\n{what}\n{text}\n")
            everything.flush()
            end = "\n".join(line[:200] for line in text.splitlines()[-15:])
            print(f"\n{what}\n{end}", flush=True)

        for process in _ended(running, run.seconds_left):
            if process.returncode:
                run.failed.append(f"{running[process][0]}: exit status {process.returncode}")
            keep(process)
        run.failed += [f"{what}: stopped, the time was up" for what, _ in running.values()]
        for process in running:
            process.send_signal(signal.SIGINT)  # upon which pytest reports what it has
        for process in _ended(running, 20):
            keep(process)
        for process in list(running):
            process.kill()
            process.wait()
            keep(process)
    print(f"\nall of it: {whole}", flush=True)


def _ended(processes: Iterable[subprocess.Popen[bytes]], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """Those that end within that time, as they do."""
    until = time.monotonic() + seconds
    running = list(processes)
    while running:
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            yield process
        if time.monotonic() > until:
            break
        time.sleep(0.1)


def every_walk(device: torch.device) -> None:
    """All operations once on small inputs, along every way that the CUDA kernels walk over the pixels."""
    sizes = [(19, (8, 12), (8, 12)), (19, (5, 7), (5, 7)), (70, (5, 7), (5, 7)), (19, (4, 5), (32, 43)),
             (19, (4, 5), (17, 20)), (19, (5, 4), (7, 9)), (19, (9, 11), (4, 5)), (19, (1, 1), (6, 1))]  # fmt: skip
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    layouts = (torch.contiguous_format, torch.channels_last)
    for (classes, own, size), dtype, layout in product(sizes, dtypes, layouts):
        z = torch.randn(3, classes, *own, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = torch.randint(0, classes, (3, *size), device=device)
        y[0, :2] = 255
        for value in (
            F.pixel_margin(z, y),
            F.averaged_gain(z, y),
            F.cross_entropy(z, y, reduction="none"),
            F.cross_entropy(z, y, reduction="image"),
            F.segpgd_loss(z, y, 1, 4),
            F.cospgd_loss(z, y),
        ):
            torch.autograd.grad(value.sum(), z)
        F.gain_and_grad(z, y)
        for loss in ("cross_entropy", "segpgd", "cospgd"):
            F.loss_and_grad(z, y, loss=loss, **({"step": 1, "steps": 4} if loss == "segpgd" else {}))
        F.confusion_matrix(z, y, per_image=True)
        F.argmax_labels(z, size)
    for shape, dtype in product(((3, 3, 40, 52), (3, 1, 7, 11)), (torch.float32, torch.float64)):
        images, grad = torch.rand(2, *shape, dtype=dtype, device=device)
        F.l1_norm(grad)
        F.newton_step(images, grad, images.new_ones(len(images)))
        F.sign_step(images, grad, 0.1, origin=images, eps=0.05)
    if device.type == "cuda":
        torch.cuda.synchronize()


def part_sanitizer(run: Run) -> None:
    """NVIDIA's compute-sanitizer over the CUDA kernels alone, each tensor in memory of its own."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    code = "import torch; from benchmarks.device import every_walk, under; "
    code += f"under('native', every_walk, torch.device('{run.device}'))"
    plain = [sys.executable, "-c", code]
    if "native" not in run.backends:
        run.left_out.append("compute-sanitizer: the CUDA kernels are missing")
        return
    if run.dry or program is None:
        run.left_out.append("compute-sanitizer: it needs a GPU and the program; the walk runs without")
        subprocess.run(plain, cwd=ROOT, check=True, timeout=run.seconds_left)
        return
    ours = ["--kernel-name", "kns=segadv"]
    options = {
        "memcheck": [*ours, "--report-api-errors", "no"],  # calls of PyTorch's that fail and are meant to
        "racecheck": ours,
        "synccheck": ours,
        "initcheck": [],  # it has to see who initialises the memory: PyTorch's kernels
    }
    commands = {
        f"compute-sanitizer --tool {tool}": [program, "--tool", tool, *chosen, "--error-exitcode", "9", *plain]
        for tool, chosen in options.items()
    }
    _side_by_side(run, commands, "sanitizer", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def part_launch(run: Run) -> None:
    """The CPU's time to enqueue one call on tensors so small that the GPU keeps up."""
    case = Case("small", images=2, classes=5, own=8, size=16)
    for operation, entry in OPERATIONS.items():
        for mode in entry.modes:
            run.attempt(f"{ENQUEUEING} {operation}, {mode}", partial(_measure_launch, run, operation, mode, case))


def _measure_launch(run: Run, operation: str, mode: str, case: Case) -> None:
    arguments = arguments_of(operation, case, torch.float32, run.device, full_resolution=False)
    calls = providers_of(run, operation, mode, arguments, torch.float32, compiled=False)
    where = run.where(case.name, torch.float32)
    for provider, milliseconds in host_milliseconds(calls, run.device, rounds=2 if run.dry else 30).items():
        run.add([where.record(f"{ENQUEUEING} {operation}", provider, mode, [milliseconds], unit="ms")])


def part_full_resolution(run: Run) -> None:
    for name in ("cityscapes19", "voc21", "ade150"):
        measure_operations(run, run.cases[name], OPERATIONS, full_resolution=True)
        case = replace(run.cases[name], name=f"{name}, channels_last", channels_last=True)
        operations = ("gain_and_grad", "averaged_gain", "loss_and_grad, cross_entropy", "confusion_matrix")
        measure_operations(run, case, operations, full_resolution=True)


def part_compile(run: Run) -> None:
    """torch.compile beside the others, on one case; compiling takes most of the time, so what matters most is first."""
    first = ("gain_and_grad", "cross_entropy", "averaged_gain", "newton_step", "sign_step")
    rest = [operation for operation in OPERATIONS if operation not in first]
    for operations, dtype, full in product((first, rest), (torch.float32, torch.bfloat16), (False, True)):
        measure_operations(
            run, run.cases["cityscapes19"], operations, full_resolution=full, compiled=True, dtypes=(dtype,)
        )


# --- glue: what an attack costs beyond its forward and backward pass ----------------------------------------------


def pspnet50() -> tuple[str, nn.Module]:
    """The paper's network, without weights to load; the package's small one where timm does not import."""
    try:
        return "pspnet50", models.pspnet50(19)
    except ImportError as error:
        print(f"  the small network takes the place of pspnet50: {error!r}")
        return "small_pspnet", models.small_pspnet(19)


def segformer_b0() -> tuple[str, nn.Module]:
    from .overhead import segformer_b0 as built

    return "segformer-b0", built(19)


def part_glue(run: Run) -> None:
    for network in (pspnet50, segformer_b0):
        run.attempt(f"fast_newton_step, {network.__name__}", partial(_measure_glue, run, network))


def _measure_glue(run: Run, network: Callable[[], tuple[str, nn.Module]]) -> None:
    name, model = network()
    model = model.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for count in (2,) if run.dry else (16, 8, 4):
        try:
            return _measure_glue_of(run, name, model, count)
        except torch.OutOfMemoryError as error:
            print(f"  {count} images do not fit into the memory: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()


def _right_backends(run: Run, name: str, model: nn.Module, side: int) -> list[str]:
    """Those whose adversarial images are the reference backend's; of two images, in float64, as in `overhead.check`."""
    from .overhead import check_same_images

    images = torch.rand(2, 3, side, side, dtype=torch.float64, device=run.device)
    labels = random_regions(2, 19, (side, side), device=run.device)
    right = []
    torch.backends.cudnn.benchmark = False
    model.double()
    try:
        with segadv.backend("reference"):
            expected = segadv.fast_newton_step(model, images, labels)
        for backend in run.backends:
            try:
                with segadv.backend(backend):
                    found = segadv.fast_newton_step(model, images, labels)
                check_same_images(f"{name}, {backend} against reference", found, expected, images)
                right.append(backend)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                run.failed.append(f"{name}: {backend}")
                traceback.print_exc()
    finally:
        model.float()
        torch.backends.cudnn.benchmark = True
    return right


def _measure_glue_of(run: Run, name: str, model: nn.Module, count: int) -> None:
    side = 64 if run.dry else 712
    names = _right_backends(run, name, model, side)
    images = torch.rand(count, 3, side, side, device=run.device).contiguous(memory_format=torch.channels_last)
    labels = random_regions(count, 19, (side, side), device=run.device)
    labels[:, : side // 50] = 255
    autocast = partial(torch.autocast, run.device.type, dtype=torch.bfloat16)

    def logits_of(leaf: Tensor) -> Tensor:
        with autocast():
            return segadv.attacks.frozen.model_logits(model(leaf))

    outgoing = torch.randn_like(logits_of(images))

    def bare() -> Tensor:
        leaf = images.detach().requires_grad_()
        return torch.autograd.grad(logits_of(leaf), leaf, outgoing)[0]

    def total(backend: str) -> Tensor:
        with segadv.backend(backend), autocast():
            adversarial: Tensor = segadv.fast_newton_step(model, images, labels)
        return adversarial

    calls: dict[str, Call] = {"bare": bare, **{backend: partial(total, backend) for backend in names}}
    for call in (*calls.values(), *calls.values()):
        call()
    effort = run.effort or {"rounds": 25, "seconds": max(5.0, run.seconds_left / 3), "head_start_ms": 60.0}
    times = times_on_device(calls, run.device, **effort)
    where = run.where(f"{name}, {count} x 3 x {side} x {side}, logits {list(outgoing.shape[1:])}", torch.bfloat16)
    operation, mode = "fast_newton_step", "autocast"
    for provider, call in calls.items():
        samples = times[provider], times["bare"]
        over_bare = where.record(f"{operation}, {OVER_BARE}", provider, mode, samples, unit="%", statistic=percent_over)
        run.add([
            where.record(operation, provider, mode, samples[:1], unit="ms"),
            *memory_on_device(where, operation, provider, mode, call),
            *[over_bare] * (provider != "bare"),
        ])  # fmt: skip


# --- tune: the lines of triton_kernels/configs.py -----------------------------------------------------------------

# kernel -> the fields of its Config that it reads
TUNED_FIELDS = {
    "pixels": ("block", "unroll"),
    "channels_last": ("block", "classes"),
    "pixels_up": ("num_warps", "block", "rows", "unroll"),
    "gradient_up": ("block", "num_warps", "rows", "classes"),
    "step": ("block", "num_warps"),
}


def part_tune(run: Run) -> None:
    from segadv.ops.triton_kernels import configs

    if "triton" not in run.backends:
        print(f"nothing to tune: {backends.BACKENDS['triton'].unavailable(run.device.type)}")
        return
    key: Any = "interpreted"
    if torch.version.hip is not None:
        key = torch.cuda.get_device_properties(run.device).gcnArchName.split(":")[0]
    elif run.device.type == "cuda":
        key = torch.cuda.get_device_capability(run.device)
    found: dict[str, Any] = {}

    def tune(kernel: str, seconds: float) -> None:
        found[kernel] = _tuned(run, kernel, key, time.monotonic() + seconds)

    kernels = list(configs._DEFAULT)
    for done, kernel in enumerate(kernels):
        run.attempt(f"tuning {kernel}", partial(tune, kernel, run.seconds_left / (len(kernels) - done)))
    print(f"\nfor _TUNED in segadv/ops/triton_kernels/configs.py:\n    {key!r}: {{")
    for kernel, config in found.items():
        if config != configs._DEFAULT[kernel]:
            values = {f.name: getattr(config, f.name) for f in fields(config)}
            wanted = {n: v for n, v in values.items() if v != 1}
            print(f'        "{kernel}": Config({", ".join(f"{n}={v}" for n, v in wanted.items())}),')
    print("    },", flush=True)


def _tuned(run: Run, kernel: str, key: Any, until: float) -> Any:
    """The fastest Config within reach: one field after the other is doubled or halved as long as that is faster."""
    from segadv.ops.triton_kernels import configs

    table: dict[Any, Any] = configs._INTERPRETED if configs.INTERPRETED else configs._TUNED.setdefault(key, {})
    start = configs.config(kernel, run.device)
    calls = _tuning_calls(run, kernel)
    with segadv.backend("triton"):
        expected = [outcome(call()) for call in calls]

        def time_of(config: Any) -> float:
            """Geometric mean of the calls' medians; infinite where a kernel does not compile or errs."""
            table[kernel] = config
            configs._of_device.cache_clear()
            medians = []
            try:
                for call, truth in zip(calls, expected, strict=True):
                    check(call(), truth, torch.float32)
                    effort = run.effort or {"rounds": 10, "seconds": 0.5}
                    medians.append(np.median(times_on_device({"": call}, run.device, **effort)[""]))
            except Exception as error:
                print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                return math.inf
            print(f"  {config}: {'  '.join(f'{ms:.4f}' for ms in medians)} ms", flush=True)
            return math.exp(float(np.mean(np.log(medians))))

        try:
            best, best_time = start, time_of(start)
            for name, factor in product(TUNED_FIELDS[kernel], (2.0, 0.5)):
                while time.monotonic() < until:
                    value = int(getattr(best, name) * factor)
                    if value < 1 or (name == "num_warps" and value > 16):
                        break
                    candidate = replace(best, **{name: value})
                    seconds = time_of(candidate)
                    if seconds > 0.99 * best_time:
                        break
                    best, best_time = candidate, seconds
        finally:
            table[kernel] = start
            configs._of_device.cache_clear()
    print(f"  best: {best}")
    return best


def _tuning_calls(run: Run, kernel: str) -> list[Call]:
    """What a kernel mostly does: few and many classes, with and without exponentials."""
    device = run.device
    calls: list[Call] = []
    if kernel == "step":
        case = run.cases["cityscapes19"]
        for operation in ("newton_step", "sign_step"):
            arguments = arguments_of(operation, case, torch.float32, device, full_resolution=True)
            calls.append(partial(OPERATIONS[operation].ours, *arguments))
        return calls
    full = kernel in ("pixels", "channels_last")
    for name, dtype in (("cityscapes19", torch.float32), ("cityscapes19", torch.bfloat16), ("ade150", torch.float32)):
        case = run.cases[name]
        if full and name == "ade150":
            case = replace(case, images=max(1, case.images // 4))
        case = replace(case, channels_last=kernel == "channels_last")
        z, y = case.tensors(full_resolution=full, dtype=dtype, device=device)
        if full:
            calls += [partial(F.gain_and_grad, z, y), partial(F.loss_and_grad, z, y)]
        elif kernel == "pixels_up":
            calls += [partial(F.averaged_gain, z, y), partial(F.cross_entropy, z, y, reduction="image")]
        else:  # gradient_up: the backward operations alone
            with segadv.backend("triton"):
                runner_up = library.averaged_gain(z, y, 255, False)[2]
                plain = (None, "cross_entropy", 0.0, False)
                _, _, _, shift, scale, _ = library.cross_entropy(z, y, *plain, 255, False, False, True)
            one = torch.ones((), device=device).expand(y.shape)
            layout = (list(z.shape), False, dtype)
            calls.append(partial(library.margin_backward, one, y, runner_up, *layout, 255, False))
            saved = (shift, scale, None, None)
            calls.append(partial(library.cross_entropy_backward, one, z, y, *saved, 255, False))
    return calls


# --- tables and processes -----------------------------------------------------------------------------------------


def measurements(records: Iterable[Record]) -> dict[tuple[str, str, str, str], dict[str, dict[str, Record]]]:
    """(case, dtype, operation, mode) -> provider -> its time under "", and what belongs to it under its name."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Record]]] = {}
    for record in sorted(records, key=lambda record: (record.case, record.dtype, record.operation, record.mode)):
        operation, what = record.operation, ""
        for name in BELONGING:
            if operation.endswith(f", {name}"):
                operation, what = operation.removesuffix(f", {name}"), name
        key = record.case, record.dtype, operation, record.mode
        found.setdefault(key, {}).setdefault(record.provider, {})[what] = record
    return found


def markdown(records: Iterable[Record]) -> str:
    """What is to be compared under one another."""
    lines = [
        "| operation | mode | case | dtype | provider | ms p50 [p20, p80] "
        "| GB/s | of copy | MB extra | x ours | over bare |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (case, dtype, operation, mode), providers in measurements(records).items():
        ours = [providers[name][""].p50 for name in providers if name in backends.BACKENDS]
        for provider, found in sorted(providers.items(), key=lambda item: item[1][""].p50):
            time, over_bare = found[""], found.get(OVER_BARE)
            shown = ((BANDWIDTH, ".1f"), (OF_COPY, ".3f"), (EXTRA_MEMORY, ".2f"))
            cells = [f"{found[name].p50:{digits}}" if name in found else "" for name, digits in shown]
            cells.append(f"{time.p50 / min(ours):.2f}" if ours and min(ours) > 0 else "")
            cells.append(f"{over_bare.p50:+.2f} % [{over_bare.low:+.2f}, {over_bare.high:+.2f}]" if over_bare else "")
            lines.append(
                f"| {operation} | {mode} | {case} | {dtype} | {provider} | {time.p50} [{time.p20}, {time.p80}] "
                f"| {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def _operations_of(name: str, run: Run) -> None:
    measure_operations(run, run.cases[name], OPERATIONS, full_resolution=False)


PARTS: Mapping[str, Callable[[Run], None]] = {
    "machine": part_machine,
    "tests": part_tests,
    "sanitizer": part_sanitizer,
    "launch": part_launch,
    "operations-cityscapes19": partial(_operations_of, "cityscapes19"),
    "operations-voc21": partial(_operations_of, "voc21"),
    "operations-ade150": partial(_operations_of, "ade150"),
    "full-resolution": part_full_resolution,
    "compile": part_compile,
    "glue": part_glue,
    "tune": part_tune,
}


LEFT_OUT, FAILED = 3, 4
"""Exit statuses of a part, beside 0. The worse is the larger, and neither is Python's own."""


def run_here(part: str, device: torch.device, path: Path, *, dry: bool) -> int:
    run = Run(device, path, dry)
    print(f"\n=== {part}: {device_name(device)}; segadv backends: {', '.join(run.backends) or 'none'}", flush=True)
    begin = time.monotonic()
    if part not in ("tests", "sanitizer"):
        run.attempt("copy bandwidth", run.measure_copies)
    run.attempt(part, partial(PARTS[part], run))
    if run.rows:
        print(f"\n{markdown(run.rows)}")
    for title, names in (("failed", run.failed), ("left out", run.left_out)):
        if names:
            print(f"\n{title}:\n  " + "\n  ".join(names))
    counts = f"{len(run.failed)} failed, {len(run.left_out)} left out"
    print(f"=== {part}: {time.monotonic() - begin:.0f} s, {counts}", flush=True)
    return FAILED if run.failed else LEFT_OUT if run.left_out else 0


def run_apart(part: str, directory: Path, *, dry: bool) -> tuple[int, str]:
    """The part in a process of its own; its exit status, and in words what went wrong, if anything."""
    command = [sys.executable, "-m", "benchmarks.device", "--here", "--only", part, "--results", str(directory)]
    process = subprocess.Popen([*command, *(["--dry-run"] if dry else [])], cwd=ROOT, process_group=0)
    try:
        status = process.wait(PART_SECONDS)
    except subprocess.TimeoutExpired:
        return FAILED, f"ended after {PART_SECONDS} s"
    finally:  # what it has started, too: it would disturb the next part
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, {0: "ok", LEFT_OUT: "something was left out", FAILED: "failed"}.get(status, f"exit status {status}")


def install_native_core() -> None:
    """What the tests need, built without a network, for this GPU alone; nothing where it is there already."""
    if importlib.util.find_spec("_segadv_native") is not None:
        return
    print("the compiled core is missing: pip install", flush=True)
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "."]
    environment = dict(os.environ)
    if torch.cuda.is_available() and torch.version.cuda:
        environment.setdefault("CUDAARCHS", "{}{}-real".format(*torch.cuda.get_device_capability()))
        environment.setdefault("SEGADV_CUDA", "ON")
    for kernels in dict.fromkeys([environment.get("SEGADV_CUDA", "AUTO"), "AUTO"]):
        environment["SEGADV_CUDA"] = kernels
        with contextlib.suppress(subprocess.TimeoutExpired):
            if subprocess.run(install, cwd=ROOT, check=False, timeout=PART_SECONDS, env=environment).returncode == 0:
                return
        print(f"the installation failed, with SEGADV_CUDA={kernels}", flush=True)
    print("what does not need the compiled core goes on", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIRECTORY")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; figures mean nothing and are not kept")
    parser.add_argument("--here", action="store_true", help="in this process, one part after the other")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.dry_run):
        sys.exit("benchmarks.device measures a GPU and torch sees none; --dry-run shows that it would run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = f"{slug(device_name(device))}.csv"
    if options.here:
        return max(run_here(part, device, options.results / file, dry=options.dry_run) for part in options.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_apart takes along what runs
    install_native_core()
    if "tests" in options.only:  # once, before all of them look for it
        build = "import sys; sys.path.insert(0, 'tests'); import emulated; emulated.load()"  # it imports segadv, too
        subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=False)
    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) if options.dry_run else options.results.resolve()
        for part in options.only:
            outcomes[part] = run_apart(part, directory, dry=options.dry_run)
            # Here, so that it is also written after a part that was ended.
            if rows := read_records(directory / file):
                (directory / file).with_suffix(".md").write_text(markdown(rows) + "\n")
        if not options.dry_run:
            print(f"\n{directory / file}\n\n{markdown(rows)}\n")
    print("\n".join(f"{part}: {told}" for part, (_, told) in outcomes.items()))
    return 0 if all(status in (0, LEFT_OUT) for status, _ in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
