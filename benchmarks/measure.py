"""Measuring: interleaved rounds, percentiles, peak memory, and rows that say where they come from."""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import segadv


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and bytes at its peak beyond what was there before."""

    p20: float
    p50: float
    p80: float
    peak_bytes: float


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


def interleaved(providers: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Times every provider once in every round, so that a machine's drift hits all alike."""
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    for call in providers.values():
        for _ in range(warmup):
            call()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in providers.items():
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
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {segadv.build_info().get('instruction_set', 'no native core')}"


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return result.stdout.strip() or "unknown"


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


_KEY = ("operation", "provider", "mode", "case", "dtype", "device", "threads", "thp")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file; a row of the same key is replaced."""
    names = [field.name for field in fields(Row)]
    table: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for old in csv.DictReader(file):
                table[tuple(old[name] for name in _KEY)] = old
    for new in rows:
        values = {name: str(value) for name, value in asdict(new).items()}
        table[tuple(values[name] for name in _KEY)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))
    temporary.replace(path)
