"""Measuring: rounds in random order, peak memory, and the names of what was measured where.

On the CPU by the clock; kernels of a GPU by events, every call from an L2 cache that holds nothing of it.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import segadv
from segadv.run_directory import processor_name

Samples = npt.NDArray[np.float64]
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def check_close(name: str, ours: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """RuntimeError where the relative difference, in the 2-norm of all elements, is larger than the tolerance.

    As vectors, not element by element: where two classes nearly tie, rounding moves a gradient to the other one.
    """
    if ours.shape != expected.shape:
        raise RuntimeError(f"{name}: {list(ours.shape)}, expected {list(expected.shape)}")
    dtype = torch.promote_types(ours.dtype, expected.dtype)
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float64
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    difference = (norm(ours.to(dtype) - expected.to(dtype)) / norm(expected.to(dtype)).clamp(min=1e-30)).item()
    if not difference <= tolerance:
        raise RuntimeError(f"{name}: it differs by {difference:.2e} of its size, {tolerance:.0e} is allowed")


def in_rounds(
    measure: Callable[[K], T], keys: Sequence[K], *, rounds: int, seconds: float = math.inf
) -> dict[K, list[T]]:
    """Measures every key once in every round, so that a machine's drift hits all alike, in an order drawn anew for
    each: what one leaves behind, such as free memory to be cleared, meets another one every time.

    After five rounds `seconds` may end it earlier.
    """
    order = list(keys)
    results: dict[K, list[T]] = {key: [] for key in keys}
    shuffle = random.Random(0).shuffle
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 5 and time.perf_counter() - begin > seconds:
                break
            shuffle(order)
            for key in order:
                results[key].append(measure(key))
    finally:
        gc.enable()
    return results


def milliseconds_of(
    calls: Mapping[K, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = math.inf,
) -> dict[K, Samples]:
    """Time of every call in every round [rounds, or as many as `in_rounds` allows]; on a GPU until it is idle again."""

    def measure(key: K) -> float:
        synchronize(device)
        begin = time.perf_counter()
        result = calls[key]()
        synchronize(device)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        del result
        return milliseconds

    found = in_rounds(measure, list(calls), rounds=rounds, seconds=seconds)
    return {key: np.array(values) for key, values in found.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Bytes at the peak of a call beyond those before it: resident memory on the CPU, PyTorch's own on a GPU."""
    return peak_bytes(call) if device.type == "cpu" else peak_bytes_on_device(call, device)[0]


def peak_bytes(call: Callable[[], object]) -> float:
    """Peak of the resident memory during a call beyond that before it, the results included; NaN off Linux."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free inside the process must not hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return float(max(peak, 0))


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """What the native core does to large outputs, for floors that are allocated the same way."""
    page = 2 << 20
    begin = (tensor.data_ptr() + page - 1) // page * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 14)
    return tensor


def machine() -> str:
    return f"{processor_name()}, {os.cpu_count()} cores, {segadv.build_info().get('instruction_set', 'no native core')}"


@cache
def commit() -> str:
    """That of the clone, marked where what is measured differs from it: code, not rows, tables and pictures, or the
    compiled core, which may be of other sources.

    A copy of the files without their history does not know it: SEGADV_COMMIT says it then.
    """
    name = _output("git", "rev-parse", "--short=10", "HEAD")
    made = (":(top,exclude)benchmarks/results", ":(top,exclude)*.md", ":(top,exclude)docs/*.png")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *made)
    code = [f":(top){folder}" for folder in ("segadv", "csrc", "benchmarks")]
    changed = changed or _output("git", "ls-files", "--others", "--exclude-standard", "--", *code, *made)  # and new
    name, changed = name or os.environ.get("SEGADV_COMMIT") or "unknown", bool(name and changed)
    built_from = segadv.build_info().get("sources")
    return name + "-dirty" * (changed or built_from not in (None, sources()))


def sources() -> str:
    """The digest of what the clone's core is compiled from, as CMakeLists.txt puts it into the core."""
    root = Path(__file__).parents[1]
    paths = [root / "CMakeLists.txt", *(path for path in (root / "csrc").rglob("*") if path.is_file())]
    lines = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return hashlib.sha256("".join(f"{name} {lines[name]}\n" for name in sorted(lines)).encode()).hexdigest()


def _output(*command: str) -> str:
    """The first line that a program prints; empty where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return result.stdout.strip().partition("\n")[0] if result.returncode == 0 else ""


# --- on a GPU -----------------------------------------------------------------------------------------------------


def times_on_device(
    calls: Mapping[K, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 30,
    seconds: float = 2.0,
    head_start_ms: float = 2.0,
) -> dict[K, Samples]:
    """Milliseconds of every call in every round; all are warm, what they read is not in the GPU's L2 cache.

    Args:
        rounds: at most; after five of them `seconds` may end it earlier.
        head_start_ms: how long the GPU is kept waiting before a call, so that the time it takes to enqueue the
            call's kernels is not in the result. What the call itself waits for is.
    """
    if device.type == "cpu":  # a dry run
        return milliseconds_of(calls, device, rounds=rounds)
    for call in calls.values():
        call()  # what the call takes its memory from may have been given back since it was warm

    def measure(key: K) -> float:
        # Read, not written: lines to be written back would cost the call bandwidth.
        _larger_than_l2(device).sum()
        torch.cuda._sleep(int(2e6 * head_start_ms))  # in cycles, of about 2 GHz
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = calls[key]()
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last)

    measured = in_rounds(measure, list(calls), rounds=rounds, seconds=seconds)
    return {key: np.array(values) for key, values in measured.items()}


@cache
def _larger_than_l2(device: torch.device) -> Tensor:
    size = max(256 << 20, 5 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.zeros(size // 4, device=device)


def peak_bytes_on_device(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Bytes at the peak of a call beyond those before it: all of them, and without the returned tensors."""
    if device.type == "cpu":  # a dry run
        return math.nan, math.nan
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return float(peak), float(peak - kept)


def host_milliseconds(
    calls: Mapping[K, Callable[[], object]], device: torch.device, *, rounds: int
) -> dict[K, Samples]:
    """Time of the CPU to enqueue one call, the mean of ten in every round: so few that no queue is full. A call that
    waits for the GPU, such as eager's bincount, waits here too."""

    def measure(key: K) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(10):
            calls[key]()
        return 1e2 * (time.perf_counter() - begin)

    return {key: np.array(values) for key, values in in_rounds(measure, list(calls), rounds=rounds).items()}


def copy_milliseconds(device: torch.device, size: int) -> Samples:
    """Copying a buffer of so many bytes, which moves twice as many."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    call()
    return times_on_device({"copy": call}, device)["copy"]


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # it may come under another name: pytorch-triton
        if find_spec(name) is None:
            return "not installed"
        found: str = getattr(import_module(name), "__version__", "unknown")
        return found


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def slug(name: str) -> str:
    """A device's name in file names: cpu, nvidia-h100."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def driver_version() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
