"""Keyed rows of measurements: medians with bootstrap intervals, and where they come from."""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

import segadv
from segadv.ops import backends
from segadv.results import csv_text
from segadv.writing import write_text

from .measure import Samples, commit, device_name, driver_version, machine, package_version, peak_memory, slug

KEY = ("operation", "provider", "mode", "case", "dtype", "device", "threads", "thp")
"""The columns that tell measurements apart."""
PEAK_MEMORY = "peak memory"


@dataclass(frozen=True)
class Record:
    """One keyed measurement, a line of a CSV file.

    p20, p50 and p80 are of the rounds (p50 of an overhead is the ratio of the medians); low and high bound the
    95 % interval of p50. Figures that do not vary, such as counts, have p50 alone, the others NaN.
    """

    operation: str
    provider: str
    mode: str
    case: str
    dtype: str
    device: str
    threads: int
    thp: int
    p20: float
    p50: float
    p80: float
    low: float
    high: float
    unit: str
    rounds: int
    commit: str
    versions: str
    machine: str


def median(samples: Samples) -> Samples:
    """Over the last axis."""
    return np.asarray(np.median(samples, axis=-1))


def percent_over(samples: Samples, base: Samples) -> Samples:
    """100 * (median / median of the base - 1), over the last axis."""
    return 100 * (median(samples) / median(base) - 1)


def interval(statistic: Callable[..., Samples], *samples: Samples, resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile bootstrap (Efron 1979) of a statistic of one or more series measured in the same rounds.

    Whole rounds are drawn with replacement: what the series of a round share, such as a machine that is slow just
    then, stays shared. The rounds have to be independent of one another.

    Args:
        statistic: takes arrays [..., rounds], as many as there are samples, and gives [...].
        samples: arrays [rounds].
        resamples: number of draws.
    """
    rounds = len(samples[0])
    drawn = np.random.default_rng(0).integers(rounds, size=(resamples, rounds))
    values = statistic(*(np.asarray(series)[drawn] for series in samples))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Where:
    """What all rows of a run have in common."""

    case: str
    dtype: torch.dtype
    device: torch.device
    packages: tuple[str, ...] = ()
    """Whose versions matter, beside torch and segadv."""

    def record(
        self,
        operation: str,
        provider: str,
        mode: str,
        samples: Sequence[Samples],
        *,
        unit: str,
        statistic: Callable[..., Samples] = median,
    ) -> Record:
        """A row: the statistic of the samples [rounds], with its interval; of one figure the figure alone.

        With several samples, p20 and p80 are those of the statistic of each single round.
        """
        p20 = p80 = low = high = float("nan")
        value = float(statistic(*samples))
        if (rounds := len(samples[0])) > 1:
            p20, p80 = np.percentile(statistic(*(series[:, None] for series in samples)), [20, 80]).tolist()
            low, high = interval(statistic, *samples)
        cuda = self.device.type == "cuda"
        return Record(
            operation=operation,
            provider=provider,
            mode=mode,
            case=self.case,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            threads=0 if cuda else torch.get_num_threads(),
            thp=int(os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"),
            p20=round(p20, 4),
            p50=round(value, 4),
            p80=round(p80, 4),
            low=round(low, 4),
            high=round(high, 4),
            unit=unit,
            rounds=rounds,
            commit=commit(),
            versions=_versions(self.packages, self.device.type),
            machine=machine_of(self.device),
        )

    def time_and_memory(
        self, operation: str, provider: str, mode: str, milliseconds: Samples, call: Callable[[], object]
    ) -> list[Record]:
        """The rows of the times [rounds] and of the peak of the memory in five more calls, which may differ by a whole
        buffer: whether one is freed before the next is taken is chance where threads are."""
        megabytes = np.array([peak_memory(call, self.device) / 1e6 for _ in range(5)])
        return [
            self.record(operation, provider, mode, [milliseconds], unit="ms"),
            self.record(f"{operation}, {PEAK_MEMORY}", provider, mode, [megabytes], unit="MB"),
        ]


@cache
def _versions(packages: tuple[str, ...], device_type: str) -> str:
    """What the figures depend on beside the machine, the compilers of the kernels among it."""
    compiled = segadv.build_info()
    others = [f"{name} {package_version(name)}" for name in packages]
    if compiled["native"]:
        others += [compiled["compiler"]] + ([compiled["cuda"]] if device_type == "cuda" and compiled["cuda"] else [])
    return ", ".join(
        (f"torch {torch.__version__}, segadv {segadv.__version__}", *others, f"Python {platform.python_version()}")
    )


@cache
def machine_of(device: torch.device) -> str:
    """This machine, by what the device is."""
    return f"{device_name(device)}, driver {driver_version()}" if device.type == "cuda" else machine()


def read_records(path: Path) -> list[Record]:
    """The rows of a file, none where there is no file. ValueError: it has other columns."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    convert = {name: kinds[str(kind)] for name, kind in Record.__annotations__.items()}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(convert):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; {list(convert)} are needed")
        return [Record(**{name: convert[name](value) for name, value in row.items()}) for row in reader]


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Adds rows to a CSV file, sorted by key; a row of the same key replaces the old one."""
    rows = [asdict(record) for record in (*read_records(path), *records)]
    table = {tuple(row[name] for name in KEY): row for row in rows}
    if table:
        write_text(path, csv_text([table[key] for key in sorted(table)]))


def results_file(name: str, device: torch.device) -> Path:
    """Where the rows of a device go by default: <name>-cpu.csv, <name>-nvidia-h100.csv."""
    return Path(__file__).parent / "results" / f"{name}-{slug(device_name(device))}.csv"


def destination(name: str, write: str | None, device: torch.device, *, quick: bool) -> Path | None:
    """The file that --write names, by default that of the device; None without it."""
    if write is None:
        return None
    if quick and not write:
        sys.exit("--quick: its figures mean nothing and are not kept with the results; name another file: --write FILE")
    return Path(write) if write else results_file(name, device)


def require_native_core(device: torch.device) -> None:
    """Ends the program where calls on that device would not run on the compiled core: what is called segadv is it."""
    if not segadv.build_info()["native"] or (backends.requested() or "native") != "native":
        sys.exit("the benchmarks need the compiled core: pip install ., without SEGADV_BACKEND (see segadv doctor)")
    if reason := backends.BACKENDS["native"].unavailable(device.type):
        sys.exit(f"the benchmarks need the compiled core on {device}: {reason} (see segadv doctor)")
