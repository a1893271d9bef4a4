"""Measuring: interleaved rounds, percentiles, peak memory, and rows that say where they come from.

On the CPU by the clock; on a GPU by events, every call from an L2 cache that holds nothing of it.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import segadv
from segadv.results import csv_text, write_text
from segadv.run_directory import processor_name

KEY = ("operation", "provider", "mode", "case", "dtype", "device", "threads", "thp")
"""The columns that tell measurements apart."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and bytes at its peak beyond what was there before."""

    p20: float
    p50: float
    p80: float
    peak_bytes: float
    extra_bytes: float = float("nan")  # the peak beyond the returned tensors, too; on a GPU only


@dataclass(frozen=True)
class Row:
    """One keyed measurement, a line of benchmarks/results/*.csv."""

    operation: str
    provider: str
    mode: str
    case: str
    dtype: str
    device: str
    threads: int
    thp: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    peak_mb: float
    commit: str
    torch: str
    machine: str


@dataclass(frozen=True)
class DeviceRow(Row):
    """A measurement on a GPU, a line of benchmarks/results/<gpu>.csv."""

    gb_per_s: float  # the fewest bytes that the operation must move, by the median time
    of_copy: float  # the same as a fraction of the copy bandwidth measured in the same run
    extra_mb: float
    note: str


def interleaved(providers: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Times every provider once in every round, so that a machine's drift hits all alike, in an order drawn anew for
    each: what one leaves behind, such as free memory to be cleared, meets another one every time."""
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    for call in providers.values():
        for _ in range(warmup):
            call()
    order = list(providers)
    shuffle = random.Random(0).shuffle
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                call = providers[name]
                begin = time.perf_counter()
                result = call()
                milliseconds[name].append(1e3 * (time.perf_counter() - begin))
                del result
    finally:
        gc.enable()
    return {
        name: Timing(*(float(x) for x in np.percentile(values, [20, 50, 80])), peak_bytes(providers[name]))
        for name, values in milliseconds.items()
    }


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
    """That of the clone, marked where its code, not its rows, tables and pictures, differs from it.

    A copy of the files without their history does not know it: SEGADV_COMMIT says it then.
    """
    name = _output("git", "rev-parse", "--short=10", "HEAD")
    made = (":(top,exclude)benchmarks/results", ":(top,exclude)*.md", ":(top,exclude)docs/*.png")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *made)
    return name + "-dirty" * bool(changed) if name else os.environ.get("SEGADV_COMMIT") or "unknown"


def _output(*command: str) -> str:
    """The first line that a program prints; empty where it fails or is not there."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return result.stdout.strip().partition("\n")[0] if result.returncode == 0 else ""


def row(operation: str, provider: str, mode: str, case: str, dtype: torch.dtype, timing: Timing) -> Row:
    return Row(
        operation=operation,
        provider=provider,
        mode=mode,
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        threads=torch.get_num_threads(),
        thp=int(os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"),
        ms_p20=round(timing.p20, 3),
        ms_p50=round(timing.p50, 3),
        ms_p80=round(timing.p80, 3),
        peak_mb=round(timing.peak_bytes / 1e6, 1),
        commit=commit(),
        torch=torch.__version__,
        machine=machine(),
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows, all of one class, to a CSV file; a row of the same key is replaced."""
    new = [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    if not new:
        return
    table = {tuple(row[name] for name in KEY): row for row in read_rows(path) + new}
    write_text(path, csv_text([table[key] for key in sorted(table)]))


# --- on a GPU -----------------------------------------------------------------------------------------------------


def times_on_device(
    providers: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 30,
    seconds: float = 2.0,
    head_start_ms: float = 2.0,
) -> dict[str, list[float]]:
    """Milliseconds of every provider in every round; all are warm, what they read is not in the GPU's L2 cache.

    Args:
        rounds: at most; after five of them `seconds` may end it earlier.
        head_start_ms: how long the GPU is kept waiting before a call, so that the time it takes to enqueue the
            call's kernels is not in the result. What the call itself waits for is.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    begin = time.perf_counter()
    order = list(providers.items())
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 5 and time.perf_counter() - begin > seconds:
                break
            shuffle(order)
            if device.type == "cpu":  # a dry run
                for name, call in order:
                    start = time.perf_counter()
                    call()
                    milliseconds[name].append(1e3 * (time.perf_counter() - start))
                continue
            spans = {}
            for name, call in order:
                # Read, not written: lines to be written back would cost the call bandwidth.
                _larger_than_l2(device).sum()
                torch.cuda._sleep(int(2e6 * head_start_ms))  # in cycles, of about 2 GHz
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                result = call()
                last.record()
                del result
                spans[name] = first, last
            torch.cuda.synchronize(device)
            for name, (first, last) in spans.items():
                milliseconds[name].append(first.elapsed_time(last))
    finally:
        gc.enable()
    return milliseconds


@cache
def _larger_than_l2(device: torch.device) -> Tensor:
    size = max(256 << 20, 5 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.zeros(size // 4, device=device)


def timing_on_device(milliseconds: list[float], call: Callable[[], object], device: torch.device) -> Timing:
    """Percentiles, and the peak of the device's memory in one more call."""
    p20, p50, p80 = (float(x) for x in np.percentile(milliseconds, [20, 50, 80]))
    if device.type == "cpu":
        return Timing(p20, p50, p80, float("nan"))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    del result
    return Timing(p20, p50, p80, peak, peak - kept)


def host_milliseconds(call: Callable[[], object], device: torch.device, *, batches: int = 30) -> list[float]:
    """Time of the CPU to enqueue one call, the mean of each batch of ten: so few that no queue is full."""
    milliseconds = []
    for _ in range(batches):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(10):
            call()
        milliseconds.append(1e2 * (time.perf_counter() - begin))
    return milliseconds


def copy_timing(device: torch.device, size: int) -> Timing:
    """Copying a buffer of so many bytes, which moves twice as many."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    call()
    return timing_on_device(times_on_device({"copy": call}, device)["copy"], call, device)


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_slug(device: torch.device) -> str:
    """Its name in file names: cpu, nvidia-h100."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


@cache
def driver_version() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def device_row(
    operation: str,
    provider: str,
    mode: str,
    case: str,
    dtype: torch.dtype,
    timing: Timing,
    device: torch.device,
    *,
    fewest_bytes: float = float("nan"),
    copy: float = float("nan"),
    note: str = "",
) -> DeviceRow:
    """A row of a GPU; `copy` is the copy bandwidth in GB/s, `fewest_bytes` what the operation must move."""
    gb_per_s = fewest_bytes / timing.p50 / 1e6
    values = asdict(row(operation, provider, mode, case, dtype, timing)) | {
        "device": device.type,
        "threads": 0,
        "thp": 0,
        "ms_p20": round(timing.p20, 4),
        "ms_p50": round(timing.p50, 4),
        "ms_p80": round(timing.p80, 4),
        "machine": f"{device_name(device)}, driver {driver_version()}, CUDA {torch.version.cuda}, "
        f"triton {package_version('triton')}",
    }
    return DeviceRow(
        **values,
        gb_per_s=round(gb_per_s, 1),
        of_copy=round(gb_per_s / copy, 3),
        extra_mb=round(timing.extra_bytes / 1e6, 2),
        note=note,
    )
