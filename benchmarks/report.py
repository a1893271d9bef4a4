"""The tables and pictures of the documents, from the rows in results/: `python -m benchmarks.report [--check]`.

A document holds a table between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; everything between them is written
here. `--check` writes nothing, says what is out of step, and fails then. A table whose rows are missing is an error.
A picture carries the hash of the file that it was drawn from.

`--demo RESULTS_JSON` first makes results/demo.csv from what `segadv demo` wrote, `--robustness RESULTS_JSON ...`
results/robustness.csv from what `segadv evaluate` wrote about the same arms, trained once or several times,
`--robustness-longer` results/robustness-longer.csv from what it wrote about longer trainings, and `--segpgd`
results/segpgd.csv about PGD's and SegPGD's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from segadv import plots
from segadv.comparison import PAPER_ARMS
from segadv.results import EvaluationResult, csv_text
from segadv.training import TrainConfig
from segadv.writing import atomic_write, write_text

from . import attacks, device, overhead, peers, scaling, trainer
from .cases import CASES
from .measure import slug
from .ops import PIXEL_SPACE
from .records import PEAK_MEMORY, Record, machine_of, read_records

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
DOCUMENTS = (
    "README.md", "docs/evaluation.md", "benchmarks/README.md", f"{RESULTS}/cpu.md", f"{RESULTS}/overhead.md"
)  # fmt: skip

# Markers have lines of their own.
_BLOCK = re.compile(r"^(<!-- begin: ([\w-]+) -->\n)(.*?)^(<!-- end: \2 -->)$", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"^<!-- (?:begin|end):", re.MULTILINE)
_NAN = float("nan")
_NO_SPREAD: dict[str, Any] = {"p20": _NAN, "p80": _NAN, "low": _NAN, "high": _NAN}
THREADS = 2


class ReportError(Exception):
    """Rows are missing, or a document's markers make no sense."""


# --- cells --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Markdown; all columns but the first ones are aligned to the right."""
    rules = ["---" if i < text_columns else "---:" for i in range(len(header))]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def paragraph(text: str, *, bullet: str = "") -> str:
    indents = {"initial_indent": bullet, "subsequent_indent": " " * len(bullet)}
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False, **indents)


def three_digits(value: float) -> str:
    """As many digits as the measurements deserve: 305, 74.6, 4.8."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def with_interval(record: Record, digits: int = 1) -> str:
    return f"{record.p50:.{digits}f} [{record.low:.{digits}f}, {record.high:.{digits}f}]"


def provenance(machines: Iterable[str], versions: Iterable[str], commits: Iterable[str]) -> str:
    """Where and with what the rows of a table were measured."""
    told = [", ".join(sorted(set(values))) for values in (machines, versions)]
    return f"({told[0]}; {told[1]}; {named(commits)})"


def named(commits: Iterable[str]) -> str:
    different = sorted(set(commits))
    return f"commit{'s' * (len(different) > 1)} {', '.join(different)}"


def provenance_of(records: Sequence[Record]) -> str:
    threads = "threads {}".format(", ".join(str(count) for count in sorted({r.threads for r in records})))
    versions = [record.versions for record in records] + ([threads] if records[0].device == "cpu" else [])
    return provenance((r.machine for r in records), versions, (r.commit for r in records))


def records_in(path: Path) -> list[Record]:
    records = read_records(path)
    if not records:
        raise ReportError(f"{path.name}: no such file or no rows; measure first")
    return records


def comparable(records: Sequence[Record]) -> list[Record]:
    """The rows of a GPU, or of `THREADS` threads, with torch's own way of taking memory."""
    return [record for record in records if record.threads in (0, THREADS) and record.thp == 0]


def files(results: Path, name: str) -> list[Path]:
    """That of the CPU, which must be there, and those of GPUs."""
    first = results / f"{name}-cpu.csv"
    return [first, *sorted(path for path in results.glob(f"{name}-*.csv") if path != first)]


def one(records: Sequence[Record], **key: Any) -> Record:
    """The only row of these values."""
    found = [record for record in records if all(getattr(record, name) == value for name, value in key.items())]
    if len(found) != 1:
        raise ReportError(f"{len(found)} rows of {', '.join(f'{name} {value!r}' for name, value in key.items())}")
    return found[0]


def none_or_one(records: Sequence[Record], **key: Any) -> Record | None:
    """As `one`, but there may be none."""
    found = [record for record in records if all(getattr(record, name) == value for name, value in key.items())]
    return one(found, **key) if found else None


# --- operations on the CPU: cpu.csv -------------------------------------------------------------------------------

VALUE, BOTH = "forward", "forward + backward"

# What the README shows: (operation, mode, case)
_SHOWN = [
    *((f"upsample + {name}", BOTH, case) for name in ("averaged_gain", "cross_entropy")
      for case in ("cityscapes19", "ade150", "noise19")),
    ("upsample + confusion_matrix", VALUE, "cityscapes19"),
    ("averaged_gain", BOTH, "cityscapes19"),
    ("cross_entropy", BOTH, "cityscapes19"),
    ("confusion_matrix", VALUE, "cityscapes19"),
    ("newton_step", VALUE, "cityscapes19"),
    ("sign_step", VALUE, "cityscapes19"),
]  # fmt: skip


class Operations:
    """The rows of cpu.csv, or of another machine's: contiguous logits in float32, `THREADS` threads."""

    def __init__(self, results: Path, name: str = "cpu.csv") -> None:
        self.path = results / name
        self.records = {
            (record.operation, record.mode, record.case, record.provider, record.thp): record
            for record in records_in(self.path)
            if (record.dtype, record.threads) == ("float32", THREADS) and record.case in CASES
        }

    def get(self, operation: str, mode: str, case: str, provider: str, *, thp: int = 0) -> Record:
        """The time."""
        key = (operation, mode, case, provider, thp)
        if key not in self.records:
            raise ReportError(f"{self.path.name}: no row of {', '.join(key[:-1])}, THP_MEM_ALLOC_ENABLE={thp}")
        return self.records[key]

    def megabytes(self, time: Record) -> float:
        """The peak of the memory that belongs to a time."""
        name = f"{time.operation}, {PEAK_MEMORY}"
        return self.get(name, time.mode, time.case, time.provider, thp=time.thp).p50

    def eager(self, operation: str, mode: str, case: str, *, thp: int = 0) -> Record:
        return self._faster_way("eager", operation, mode, case, thp=thp)

    def compiled(self, operation: str, mode: str, case: str, *, thp: int = 0) -> Record:
        return self._faster_way("compile", operation, mode, case, thp=thp)

    def _faster_way(self, name: str, operation: str, mode: str, case: str, *, thp: int) -> Record:
        return min(self.ways(name, operation, mode, case, thp=thp), key=lambda record: record.p50)

    def ways(self, name: str, operation: str, mode: str, case: str, *, thp: int = 0) -> list[Record]:
        """Of writing it: the runner-up of the averaged gain is found with amax or with max."""
        providers = (name, f"{name}, max") if operation.endswith("averaged_gain") else (name,)
        return [self.get(operation, mode, case, provider, thp=thp) for provider in providers]

    def less_memory(self, operation: str, mode: str, case: str) -> float:
        """By how much ours takes less than the way of eager or torch.compile that takes least. Below a megabyte, which
        counts as one, a peak is as noisy as what else is in the process."""
        key = (operation, mode, case)
        least = min(self.megabytes(time) for name in ("eager", "compile") for time in self.ways(name, *key))
        return least / max(self.megabytes(self.get(*key, "segadv")), 1)

    def faster(self, operation: str, mode: str, case: str, *, thp: int = 0) -> float:
        """By how much ours is faster than the better of eager and torch.compile."""
        others = self.eager(operation, mode, case, thp=thp), self.compiled(operation, mode, case, thp=thp)
        return min(record.p50 for record in others) / self.get(operation, mode, case, "segadv", thp=thp).p50


def _title(operation: str, mode: str) -> str:
    if operation.endswith(("averaged_gain", "cross_entropy")):
        return f"{operation}, {'value and gradient' if mode == BOTH else 'value'}"
    return operation


def _shape(operation: str, case_name: str) -> str:
    case = CASES[case_name]
    if operation in PIXEL_SPACE:
        return f"{case.images} x 3 x {case.size}²"
    if operation.startswith("upsample"):
        return f"{case.images} x {case.classes} x {case.own}² → {case.size}²{', noise' * case.noise}"
    return f"{case.images} x {case.classes} x {case.size}²"


def operations(results: Path) -> str:
    measured = Operations(results)

    def cell(time: Record) -> str:
        memory = measured.megabytes(time)
        return f"{three_digits(time.p50)} ms, {three_digits(memory) if memory >= 0.1 else '< 0.1'} MB"

    lines, used = [], []
    for operation, mode, case in _SHOWN:
        key = (operation, mode, case)
        three = measured.eager(*key), measured.compiled(*key), measured.get(*key, "segadv")
        used += three
        ratio = measured.less_memory(*key)
        less = f"{three_digits(ratio)} x" if measured.megabytes(three[2]) >= 1 else f"> {math.floor(ratio)} x"
        cells = [_title(operation, mode), _shape(operation, case), *map(cell, three)]
        lines.append([*cells, f"{measured.faster(*key):.1f} x", less])
    header = ["operation", "logits → labels", "eager", "torch.compile", "segadv", "faster", "less memory"]
    notes = paragraph(f"{_operations_notes(measured)} {provenance_of(used)}")
    return f"{table(header, lines, text_columns=2)}\n\n{notes}"


def _operations_notes(measured: Operations) -> str:
    huge = [
        f"{measured.faster(operation, mode, case, thp=1):.1f} ({operation})"
        for operation, mode, case in _SHOWN
        if case == "cityscapes19"
    ]
    return (
        "Medians of interleaved rounds; memory is the peak beyond the inputs, results included, and less than a "
        "megabyte counts as one. *Faster* compares with the better of eager and `torch.compile`, each in the faster of "
        "two ways to write the averaged gain; *less memory* with whichever of all these ways takes least. "
        "Logits and labels are smooth, as a trained network's; in *noise* every one is a random number of its own, the "
        "worst case for margins and for counting. Part of eager's time is page faults of its large buffers: with "
        "`THP_MEM_ALLOC_ENABLE=1`, torch's switch for huge pages, on both sides the ratios at "
        f"{CASES['cityscapes19'].size}² are {', '.join(huge)}."
    )


def all_operations(results: Path) -> str:
    """Every row of cpu.csv, what is compared under one another."""
    measured = Operations(results)
    order = ("eager", "eager, max", "compile", "compile, max", "segadv", "segadv one pass", "floor")
    times = [record for record in measured.records.values() if record.unit == "ms"]
    lines = [
        [
            record.case, record.operation, "value" if record.mode == VALUE else "value and gradient",
            "yes" * record.thp, record.provider, f"{three_digits(record.p50)} {_spread(record)}",
            three_digits(measured.megabytes(record)),
        ]
        for record in sorted(
            times, key=lambda r: (list(CASES).index(r.case), r.operation, r.mode, r.thp, order.index(r.provider))
        )
    ]  # fmt: skip
    header = ["case", "operation", "mode", "huge pages", "provider", "ms, p50 [p20, p80]", "peak MB"]
    body = table(header, lines, text_columns=5)
    return f"{paragraph(_ways_and_floors(measured))}\n\n{body}\n\n{paragraph(provenance_of(times))}"


def _ways_and_floors(measured: Operations) -> str:
    def ms(operation: str, provider: str) -> float:
        return measured.get(operation, BOTH, "cityscapes19", provider).p50

    amax = [
        f"{three_digits(ms(name, 'eager'))} ms instead of {three_digits(ms(name, 'eager, max'))} ms"
        for name in ("upsample + averaged_gain", "averaged_gain")
    ]
    floors = [f"{ms(name, 'segadv') / ms(name, 'floor'):.1f} (`{name}`)" for name in ("averaged_gain", "cross_entropy")]
    return (
        "With `amax`, whose backward divides the gradient among ties, value and gradient of eager's averaged gain take "
        f"{amax[0]} with `max` on cityscapes19, resampled, and {amax[1]} at full resolution. There memory decides: "
        f"ours take {' and '.join(floors)} times the floor."
    )


_LAYOUTS = {  # title -> (dtype, what follows the name of a case)
    "float32": ("float32", ""),
    "float32, channels_last": ("float32", ", channels_last"),
    "bfloat16": ("bfloat16", ""),
    "bfloat16, channels_last": ("bfloat16", ", channels_last"),
}


def layouts(results: Path) -> str:
    """Logits as networks in channels_last and autocast leave them, of cpu.csv."""
    records = comparable(records_in(results / "cpu.csv"))
    lines, used = [], []
    for case in ("cityscapes19", "ade150"):
        for operation, mode in dict.fromkeys(key[:2] for key in _SHOWN if key[0] not in PIXEL_SPACE):
            cells = []
            for dtype, suffix in _LAYOUTS.values():
                key = {"operation": operation, "mode": mode, "case": case + suffix, "dtype": dtype}
                ways = ("eager", "eager, max") if operation.endswith("averaged_gain") else ("eager",)
                ours, *usual = (one(records, provider=name, **key) for name in ("segadv", *ways))
                used += [ours, *usual]
                ratio = min(way.p50 for way in usual) / ours.p50
                cells.append(f"{three_digits(ours.p50)} ms, {ratio:.1f} x")
            lines.append([_title(operation, mode), _shape(operation, case), *cells])
    notes = "Time of segadv, and by how much it is faster than eager code with the same logits."
    body = table(["operation", "logits → labels", *_LAYOUTS], lines, text_columns=2)
    return f"{body}\n\n{paragraph(f'{notes} {provenance_of(used)}')}"


def _spread(record: Record) -> str:
    return f"[{three_digits(record.p20)}, {three_digits(record.p80)}]"


def training_samples(results: Path) -> str:
    """Decoding and augmenting, of cpu.csv."""
    path = results / "cpu.csv"
    rows = [record for record in read_records(path) if record.operation in ("augment", "decode")]
    records = {record.provider: record for record in rows if record.thp == 0}
    titles = {
        "fused": "`Augmented`, one affine map, crop only",
        "v2": "torchvision v2, whole image",
        "v2, blur last": "the same, blur after the crop",
        "v2, crop first": "torchvision v2, cropped as early as can be",
        "decode": "decoding the PNG files",
        "decode + fused": "decoding and `Augmented`",
    }
    if missing := titles.keys() - records.keys():
        raise ReportError(f"{path.name}: no rows of {', '.join(sorted(missing))}; python -m benchmarks.data --write")
    fused = records["fused"].p50
    lines = []
    for name, title in titles.items():
        record = records[name]
        against = "" if "decode" in name else f"{record.p50 / fused:.1f} x"
        lines.append([title, f"{three_digits(record.p50)} {_spread(record)}", against])
    notes = paragraph(f"{records['fused'].case} pixels. {provenance_of(list(records.values()))}")
    return f"{table(['training sample', 'ms per image, p50 [p20, p80]', 'by `Augmented`'], lines)}\n\n{notes}"


# --- repeated on another machine: cpu-repeated.csv ----------------------------------------------------------------

_REPEATED = "cpu-repeated.csv"


def repeated(results: Path) -> str:
    """What the README shows of the operations, beside its ratios, and of Fast Newton's step."""
    first, second = Operations(results), Operations(results, _REPEATED)
    lines, used = [], []
    for operation, mode, case in _SHOWN:
        key = (operation, mode, case)
        three = second.eager(*key), second.compiled(*key), second.get(*key, "segadv")
        used += three
        times = [f"{three_digits(time.p50)} ms" for time in three]
        ratios = [f"{measured.faster(*key):.1f} x" for measured in (second, first)]
        lines.append([_title(operation, mode), _shape(operation, case), *times, *ratios])
    header = ["operation", "logits → labels", "eager", "torch.compile", "segadv", "faster", "faster in the README"]
    steps, glue = _repeated_steps(results), _repeated_steps(results, operation=overhead.GLUE_SHARE)
    notes = (
        paragraph(provenance_of(used)),
        paragraph(
            f"Fast Newton's training step: {_of_networks(results)}; of its attack {_each(glue)} are neither the "
            f"network's forward nor its backward pass. {provenance_of([*steps, *glue])}"
        ),
    )
    return "\n\n".join([table(header, lines, text_columns=2), *notes])


def _repeated_steps(results: Path, **key: str) -> list[Record]:
    """Fast Newton's over conventional basic training, or another row of its, on the networks of the headline."""
    records = comparable(records_in(results / _REPEATED))
    return [
        one([row for row in records if row.case.partition(",")[0] == network], **_NEWTON_OVER_CONVENTIONAL | key)
        for network in ("small", "segformer-b0")
    ]


def _each(rows: Sequence[Record]) -> str:
    return " and ".join(f"{with_interval(row)} % ({row.case.partition(',')[0]})" for row in rows)


def _of_networks(results: Path) -> str:
    over_fused = _repeated_steps(results, operation="overhead")
    return (
        f"{_each(_repeated_steps(results))} over conventional basic training, {_each(over_fused)} over basic training "
        "with the same fused loss"
    )


def repeated_in_a_sentence(results: Path) -> str:
    second = Operations(results, _REPEATED)
    fused = [key for key in _SHOWN if key[0].startswith("upsample") and key[2] == "cityscapes19"]
    times = ", ".join(f"{key[0]} {second.faster(*key):.1f} times" for key in fused)
    huge = [f"{second.faster(*key, thp=1):.1f}" for key in fused]
    ours = [second.get(*key, "segadv") for key in fused]
    steps = _repeated_steps(results)
    return paragraph(
        "Repeated [on another CPU](benchmarks/README.md#on-another-cpu): at "
        f"{CASES['cityscapes19'].size}² {times} as fast as with the better of eager and `torch.compile`, with huge "
        f"pages on both sides {', '.join(huge)} times ({_where(ours)}); Fast Newton's training step "
        f"{_of_networks(results)} ({_where(steps)})."
    )


def _where(records: Sequence[Record]) -> str:
    return f"{records[0].machine}; {named(record.commit for record in records)}"


# --- operations on a GPU: <gpu>.csv -------------------------------------------------------------------------------


def gpus(results: Path) -> str:
    """A table for every file that benchmarks.device has written: it is named after its rows' device."""
    blocks = []
    for path in sorted(results.glob("*.csv")):
        records = read_records(path)
        if records and records[0].device == "cuda" and path.stem == slug(_device_of(records[0])):
            blocks.append(_gpu(path, records))
    return "\n\n".join(blocks) or "No GPU has been measured yet."


def _device_of(record: Record) -> str:
    return record.machine.partition(", driver")[0]


def _gpu(path: Path, records: Sequence[Record]) -> str:
    lines = []
    for (case, dtype, operation, mode), providers in device.measurements(records).items():
        usual = {name: found for name, found in providers.items() if name.startswith(("eager", "compile"))}
        ours = [found for name, found in providers.items() if name in ("native", "triton")]
        if not usual or not ours or operation.startswith(device.ENQUEUEING):
            continue
        best = min(ours, key=lambda found: found[""].p50)
        cells = []
        for start in ("eager", "compile", "triton", "native"):
            times = [found[""].p50 for name, found in providers.items() if name.startswith(start)]
            cells.append(f"{min(times):.3f}" if times else "")
        ratio = min(found[""].p50 for found in usual.values()) / best[""].p50
        least = min(found[device.EXTRA_MEMORY].p50 for found in usual.values())
        lines.append([
            case, operation, mode, dtype, *cells, f"{ratio:.1f} x", f"{best[device.OF_COPY].p50:.2f}", f"{least:.1f}",
            f"{best[device.EXTRA_MEMORY].p50:.1f}",
        ])  # fmt: skip
    header = ["case", "operation", "mode", "dtype", "eager", "compile", "triton", "native", "faster", "of copy"]
    body = table([*header, "MB extra, usual", "MB extra, ours"], lines, text_columns=4)
    return (
        f"### {_device_of(records[0])}\n\nMilliseconds, p50; *faster*, *of copy* and *ours* are of the faster of "
        f"triton and native. {provenance_of(records)} All rows: [{path.stem}.md](results/{path.stem}.md).\n\n{body}"
    )


# --- training overhead: overhead-*.csv ----------------------------------------------------------------------------


def _by_case(path: Path) -> dict[str, list[Record]]:
    """In the order in which benchmarks.overhead knows the networks."""
    cases: dict[str, list[Record]] = {}
    for record in comparable(records_in(path)):
        cases.setdefault(record.case, []).append(record)
    if not cases:
        raise ReportError(f"{path.name}: no rows of {THREADS} threads")
    for case, records in cases.items():
        # Times are written first: parts of a former run may still be there.
        runs = {(record.commit, record.rounds) for record in records if record.operation == "training step"}
        commits = {record.commit for record in records}
        if len(runs) > 1 or len(commits) > 1:
            raise ReportError(
                f"{path.name}: {case} is of several runs, {sorted(runs)}, commits {sorted(commits)}; a "
                "percentage needs the basic step of its own"
            )
    networks = list(overhead.MODELS)
    return {case: cases[case] for case in sorted(cases, key=lambda case: networks.index(case.partition(",")[0]))}


def _over_other_basic_steps(cases: Mapping[str, Sequence[Record]]) -> str:
    """A sentence about the networks whose shares were measured in runs of their own: the basic steps are the last's."""
    told = []
    for case, records in cases.items():
        steps = [row for row in records if row.operation == "training step"]
        others = {row.mode.rpartition(", ")[2] for row in records if not _is_over_its_basic_step(row, steps)}
        told += [f"at {' and '.join(sorted(others))} on {case.partition(',')[0]}"] if others else []
    if not told:
        return ""
    return f"Percentages {', '.join(told)} are over the basic steps of their own run, which these are not. "


def _is_over_its_basic_step(record: Record, steps: Sequence[Record]) -> bool:
    """Whether an additional time is that of the steps which stand beside it; True of rows that are none."""
    over = {"overhead": record.provider, "over conventional basic": overhead.CONVENTIONAL}.get(record.operation)
    if over is None:
        return True
    step = none_or_one(steps, provider=record.provider, mode=record.mode)
    basic = none_or_one(steps, provider=over, mode="basic")
    if step is None or basic is None:
        return True
    return abs(record.p50 - 100 * (step.p50 / basic.p50 - 1)) < 0.01  # rows have four decimals


# What the README shows of the arms, which are all among the details.
_SHOWN_ARMS = ("fgsm", "fast-newton", "bim-3", "segpgd-3")


def training_overhead(results: Path) -> str:
    """p = 0.5, beside the paper: one table for a device. What a GPU's time did not suffice for may be missing there."""
    return "\n\n".join(filter(None, map(_overhead_on_a_device, files(results, "overhead"))))


def _overhead_on_a_device(path: Path) -> str:
    columns = {
        overhead.CONVENTIONAL: "conventional eager",
        overhead.EFFICIENT: "efficient eager",
        overhead.OURS: "segadv",
    }
    lines: list[list[str]] = []
    steps, glue, shown = [], [], []
    get = one if path.name == "overhead-cpu.csv" else none_or_one
    cases = _by_case(path)
    for case, records in cases.items():
        if not columns.keys() <= {record.provider for record in records}:
            continue  # measured for its parts alone, which are among the details
        network = case.partition(",")[0]
        key = {"operation": "overhead", "case": case}
        for arm in _SHOWN_ARMS:
            mode = f"{arm}, p = 0.5"
            over = [get(records, provider=column, mode=mode, **key) for column in columns]
            over.append(get(records, operation="over conventional basic", provider=overhead.OURS, mode=mode))
            if over == [None] * len(over):
                continue
            cells = ["" if record is None else f"{with_interval(record)} %" for record in over]
            passes = get(records, operation=overhead.COST_MODEL, provider=overhead.OURS, mode=mode)
            papers = [f"{value:.2f} %" for value in overhead.paper_values(case, mode).values()] or ["", ""]
            lines.append([network, arm, *cells, "" if passes is None else f"{passes.p50:.1f} %", *papers])
        basic = [one(records, operation="training step", provider=column, mode="basic") for column in columns]
        peaks = [get(records, operation=PEAK_MEMORY, provider=column, mode="basic") for column in columns]
        times = [three_digits(record.p50) for record in basic]
        told = f"{', '.join(times[:-1])} and {times[-1]} ms"
        if all(peaks):
            peak = [three_digits(record.p50) for record in peaks if record is not None]
            told += f", {', '.join(peak[:-1])} and {peak[-1]} MB"
        steps.append(f"{case}: {told} ({basic[0].rounds} rounds)")
        own = get(records, operation=overhead.GLUE_SHARE, provider=overhead.OURS, mode="fast-newton, p = 0.5")
        glue += [(network, own)] * (own is not None)
        shown += [record for record in records if record.mode == "basic" or record.mode.endswith("p = 0.5")]
    if not lines:
        return ""
    header = ["network", "arm", *columns.values(), "segadv over conventional basic", "cost model"]
    header += ["paper, Cityscapes", "paper, VOC"]
    shares = [f"{with_interval(record)} % on {network} ({record.rounds} rounds)" for network, record in glue]
    fewest = min(record.rounds for record in shown if record.rounds > 1)  # passes and memory are counted once
    of_glue = (
        "What is neither the network's forward nor its backward pass takes of Fast Newton's attack with segadv "
        f"{', '.join(shares)}. "
    )
    notes = paragraph(
        f"A basic step takes, and has at its peak, in these three columns, on {'; '.join(steps)}. "
        f"{_over_other_basic_steps(cases)}"
        f"{of_glue if glue else ''}Medians with 95 % intervals. {_few(fewest)}{provenance_of(shown)}"
    )
    return f"{table(header, lines, text_columns=2)}\n\n{notes}"


def _few(rounds: int) -> str:
    """What bootstrap intervals of a median are worth, simulated with normal times: of 3 rounds they hold it in 73 % of
    cases, of 4 and 7, which are the least of those with more, in 87 to 88 %, of 9 to 15 in 91 to 93 %."""
    held = 73 if rounds <= 3 else 87 if rounds < 9 else 91
    told = f"Of so few rounds such intervals hold the median less often, some in {held} % of cases only. "
    return told if rounds < 20 else ""


def headline(results: Path) -> str:
    """The fused operations, and Fast Newton with segadv against conventional basic training, where the loss is a
    visible part of a step."""
    cases = {case.partition(",")[0]: records for case, records in _by_case(results / "overhead-cpu.csv").items()}
    told, over_fused, pays = [], [], True
    for name, title in (("small", "a small PSPNet"), ("segformer-b0", "SegFormer-B0 with 150 classes")):
        found = one(cases.get(name, []), **_NEWTON_OVER_CONVENTIONAL)
        ends = sorted(round(abs(end)) for end in (found.low, found.high))
        if not found.low * found.high > 0:
            raise ReportError(f"{name}: whether it takes more or less time is not known: {with_interval(found)} %")
        direction = "less" if found.p50 < 0 else "more"
        pays &= found.high < 0
        told.append(f"{abs(found.p50):.0f} % {direction} time on {title} ({ends[0]} to {ends[1]} %)")
        own = one(cases[name], operation="overhead", provider=overhead.OURS, mode=_NEWTON_OVER_CONVENTIONAL["mode"])
        over_fused.append(f"{own.p50:.0f} %")
    large = one(cases.get("pspnet50", []), **_NEWTON_OVER_CONVENTIONAL)
    cpus_only = not any(map(_overhead_on_a_device, files(results, "overhead")[1:]))
    measured = Operations(results)
    gain, loss = ((f"upsample + {name}", BOTH, "cityscapes19") for name in ("averaged_gain", "cross_entropy"))
    faster = [f"{measured.faster(*key):.0f}" for key in (gain, loss)]
    less = [f"{measured.less_memory(*key):.0f}" for key in (gain, loss)]
    on_huge_pages = [f"{measured.faster(*key, thp=1):.0f}" for key in (gain, loss)]
    points = (
        f"**Operations** ({_short_machine(measured.get(*gain, 'segadv'))}): "
        "value and gradient of the averaged gain (an image's mean margin between the logit of the right class and "
        f"the largest other one) of logits upsampled to {CASES[gain[2]].size}² are computed {faster[0]} times as "
        f"fast as with the better of eager PyTorch and `torch.compile`, in 1/{less[0]} of the memory; those of "
        f"cross-entropy {faster[1]} times as fast, in 1/{less[1]}.",
        f"**Training** ({_short_machine(large)}): "
        "compared with a *basic* step (no attack) in conventional eager code, a Fast Newton step that attacks half "
        f"of the samples takes {' and '.join(told)}{': the fused loss pays for the attack' * pays}. Brackets give 95 % "
        "intervals within one run; runs at other hours differ by as much again. Over basic training with the same "
        f"fused loss it takes {' and '.join(over_fused)} more, and on PSPNet50, whose loss is a small part of a step, "
        f"{large.p50:.0f} % more than conventional basic training.",
        "**Page faults** of large buffers are a part of eager code's time. With `THP_MEM_ALLOC_ENABLE=1`, torch's "
        f"switch for huge pages, on both sides, these operations are {' and '.join(on_huge_pages)} times as fast; "
        "conventional training steps then vary too much to be compared "
        "([figures](benchmarks/README.md#a-training-step)).",
    )
    where = "GPUs are [still to come](#limits)" if cpus_only else "GPUs are in the tables there"
    listed = "\n".join(paragraph(point, bullet="* ") for point in points)
    return f"Measured on two CPU cores ([tables and commands](#what-it-costs)); {where}:\n\n{listed}"


def _short_machine(record: Record) -> str:
    return record.machine.partition(",")[0]


_NEWTON_OVER_CONVENTIONAL = {
    "operation": "over conventional basic",
    "provider": overhead.OURS,
    "mode": "fast-newton, p = 0.5",
}


def overhead_details(results: Path) -> str:
    """All that benchmarks.overhead prints: both shares, parts of a step, passes, memory."""
    blocks = []
    for path in files(results, "overhead"):
        for case, records in _by_case(path).items():
            told = paragraph(f"{_over_other_basic_steps({case: records})}{provenance_of(records)}")
            blocks.append(f"```\n{overhead.report(case, records).strip()}\n```\n\n{told}")
    return "\n\n".join(blocks)


# --- other packages: peers-cpu.csv --------------------------------------------------------------------------------

_PEERS_TITLES = {
    "fgsm": "FGSM",
    "pgd": "PGD without random start",
    "segpgd": "SegPGD without random start",
    "cospgd": "CosPGD without random start",
    "jaccard": "upsampling and mIoU",
    "segformer": "SegFormer-B0, forward, loss and backward",
}


def other_packages(results: Path) -> str:
    """A row for every comparison; that a package's or eager's row is missing is an error, compile's may be. On a GPU
    comparisons may be missing."""
    return "\n\n".join(filter(None, map(_peers_on_a_device, files(results, "peers"))))


def other_packages_in_a_sentence(results: Path) -> str:
    """On the CPU."""
    path = results / "peers-cpu.csv"
    records = comparable(records_in(path))
    told = []
    for operation in peers.COMPARISONS:
        package = _package(path, records, operation)
        by_ours = one(records, operation=f"{operation}, time by segadv's", provider=package)
        title = _PEERS_TITLES[operation].removesuffix(" without random start")
        told.append(f"{title} {by_ours.p50:.1f} times as long ({package})")
    return paragraph(f"Other packages take longer than segadv for the same outputs: {'; '.join(told)}.")


_OWN = ("eager", "compile", "segadv", "segadv, compile")


def _package(path: Path, records: Sequence[Record], operation: str) -> str:
    found = [record.provider for record in records if record.operation == operation and record.provider not in _OWN]
    if len(found) != 1:
        raise ReportError(f"{path.name}: {operation} needs the rows of one other package, there are {found}")
    return found[0]


def _peers_on_a_device(path: Path) -> str:
    records = comparable(records_in(path))
    lines = []
    for operation in peers.COMPARISONS:
        of_operation = [record for record in records if record.operation == operation]
        if path.name != "peers-cpu.csv" and {record.provider for record in of_operation} <= {*_OWN}:
            continue
        package = _package(path, records, operation)
        cells = []
        for provider in (package, *_OWN):
            if not (provider.endswith("compile") and provider not in {record.provider for record in of_operation}):
                time = one(of_operation, provider=provider).p50
                memory = one(records, operation=f"{operation}, peak memory", provider=provider).p50
                cells.append(f"{three_digits(time)} ms, {three_digits(memory)} MB")
            else:
                cells.append("")
        by_ours = one(records, operation=f"{operation}, time by segadv's", provider=package)
        mode = of_operation[0].mode and f", {of_operation[0].mode}"
        title = f"{_PEERS_TITLES[operation]}{mode}"
        lines.append([title, of_operation[0].case, package, *cells, f"{with_interval(by_ours, 2)} x"])
    if not lines:
        return ""
    header = ["what", "on", "package", "the package", "eager", "eager, compiled", "segadv", "segadv, compiled network"]
    notes = paragraph(f"Medians; intervals 95 %. {provenance_of(records)}")
    return f"{table([*header, 'the package / segadv'], lines, text_columns=3)}\n\n{notes}"


# --- attacks: attacks-cpu.csv -------------------------------------------------------------------------------------


def attack_steps(results: Path) -> str:
    records = comparable(records_in(results / "attacks-cpu.csv"))
    bare = one(records, operation=attacks.RUN, provider="bare pass")
    lines = [["bare pass", f"{with_interval(bare)} ms", "", "", "", ""]]
    for name in ("FGSM", "FastNewton", *attacks.ITERATIVE):
        run = one(records, operation=attacks.RUN, provider=name, mode="1 step")
        over = one(records, operation=attacks.OVER_BARE, provider=name, mode="1 step")
        cells = [f"{with_interval(run)} ms", f"{with_interval(over)} %"]
        for operation, unit in ((attacks.STEP, "ms"), (attacks.STEP_OVER_BARE, "%"), (attacks.STEP_OVER_PGD, "%")):
            known = name in attacks.ITERATIVE and not (name == "PGD" and operation == attacks.STEP_OVER_PGD)
            cells.append(f"{with_interval(one(records, operation=operation, provider=name))} {unit}" if known else "")
        lines.append([name, *cells])
    header = ["attack", "one step", "over the bare pass", "one more step", "over the bare pass", "over a step of PGD"]
    notes = paragraph(f"{bare.case}; medians with 95 % intervals. {provenance_of(records)}")
    return f"{table(header, lines)}\n\n{notes}"


# --- the trainer: trainer-cpu.csv ---------------------------------------------------------------------------------


def trainer_cost(results: Path) -> str:
    records = comparable(records_in(results / "trainer-cpu.csv"))
    parts = ("these together", trainer.TRAINER, trainer.READING, trainer.CHECKPOINT, trainer.PROBE)
    lines = [
        [name, f"{with_interval(one(records, operation=trainer.PART, provider=name), 2)} ms"]
        for name in (*trainer.WORK, *parts)
    ]
    share = one(records, operation=trainer.SHARE, provider=trainer.TRAINER)
    work = one(records, operation=trainer.PART, provider="these together").p50
    probe = one(records, operation=trainer.PART, provider=trainer.PROBE).p50
    every = TrainConfig.monitor_every
    notes = paragraph(
        f"{share.mode}, {share.case}; medians with 95 % intervals. The trainer takes {with_interval(share, 2)} % of "
        "the work of a step. Not in it: reading the batch, the checkpoint, and the probe for catastrophic overfitting "
        f"(PGD with 10 steps and FGSM on 8 images), by default every {every} steps and then "
        f"{100 * probe / work / every:.1f} % of their work; `--monitor-every 0` leaves it out. {provenance_of(records)}"
    )
    return f"{table(['part of a step', 'time'], lines)}\n\n{notes}"


# --- how cost grows: scaling-cpu.csv ------------------------------------------------------------------------------


def call_ladder(results: Path) -> str:
    records = [
        record for record in comparable(records_in(results / "scaling-cpu.csv")) if record.operation == scaling.LADDER
    ]
    if not records:
        raise ReportError("scaling-cpu.csv: no rows of the ladder")
    lines = [[name, f"{with_interval(one(records, provider=name))} us"] for name in scaling.RUNGS]
    notes = paragraph(f"Medians with 95 % intervals. {provenance_of(records)}")
    return f"{table(['averaged gain of 1 x 2 x 4 x 4', 'a call'], lines)}\n\n{notes}"


def growth(results: Path) -> str:
    records = [record for record in records_in(results / "scaling-cpu.csv") if record.mode in scaling.AXES]
    if missing := scaling.AXES.keys() - {record.mode for record in records}:
        raise ReportError(f"scaling-cpu.csv: no rows of {', '.join(sorted(missing))}")
    return f"![Time and memory per pixel](results/scaling-cpu.png)\n\n{paragraph(provenance_of(records))}"


# --- the demo's outcome: demo.csv ---------------------------------------------------------------------------------

MIOU, MINUTES = "mIoU", "time of the demo"
STEP_SIZE = "step size of the attack"
_COLUMNS = (("fgsm", 0.0), ("fgsm", 0.01), ("fgsm", 0.03), ("bim-10", 0.01), ("bim-10", 0.03))
_CASE = re.compile(r"eps ([\d.]+), seed (\d+)")


def _commit_of(run: Mapping[str, Any], path: Path, given: str | None) -> str:
    """That which ran it, as short as the other rows'."""
    commit = given or run.get("git_commit")
    if not commit:
        raise ReportError(f"{path} names no commit, it ran outside of a clone or is an older version's: give --commit")
    name = commit.removesuffix("-dirty")
    return f"{name[:10]}{commit[len(name) :]}"


def demo_records(results_json: Path, commit: str | None) -> list[Record]:
    """Rows of what a finished demo wrote, every seed by itself; the step sizes are those of its metrics.jsonl."""
    content = json.loads(results_json.read_text(encoding="utf-8"))
    if not content.get("finished"):
        raise ReportError(f"{results_json}: this demo is not finished")
    machine, seed = content["machine"], content["arguments"]["seed"]
    shared = {
        "dtype": "float32",
        "device": "cuda" if machine["gpu"] else "cpu",
        "threads": machine["threads"],
        "thp": 0,
        **_NO_SPREAD,
        "commit": _commit_of(content, results_json, commit),
        "versions": f"torch {machine['torch']}, segadv {content['arguments']['segadv']}, Python {machine['python']}",
        "machine": f"{machine['gpu'] or machine['processor']}, {machine['cpu_count']} cores",
    }
    records = [
        Record(
            operation=MIOU, provider=row["arm"], mode=row["attack"],
            case=f"eps {row['eps']:g}, seed {row.get('seed', seed)}",
            p50=row["miou"], unit="", rounds=1, **shared,
        )
        for row in content["curves"]
    ]  # fmt: skip
    for which in content.get("seeds", [seed]):
        run = results_json.parent / ("" if which == seed else f"seed-{which}") / "fast-newton"
        metrics = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        sizes = [line["eps_median"] for line in metrics if line["eps_median"] is not None]
        records.append(
            Record(
                operation=STEP_SIZE, provider="fast-newton", mode="median", case=f"seed {which}",
                p50=statistics.median(sizes), unit="", rounds=len(sizes), **shared,
            )
        )  # fmt: skip
    minutes = sum(content["seconds"].values()) / 60
    records.append(
        Record(
            operation=MINUTES, provider="demo", mode="", case="demo", p50=round(minutes, 1), unit="minutes", rounds=1,
            **shared,
        )
    )  # fmt: skip
    return sorted(records, key=lambda record: (record.operation, record.provider, record.mode, record.case))


def _miou_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """As in the demo's curves, in the order of the arms."""
    rows = []
    for record in records:
        if record.operation == MIOU:
            match = _CASE.fullmatch(record.case)
            if match is None:
                raise ReportError(f"demo.csv: {record.case!r} is not like 'eps 0.01, seed 0'")
            rows.append(
                {
                    "arm": record.provider,
                    "attack": record.mode,
                    "eps": float(match[1]),
                    "seed": int(match[2]),
                    "miou": record.p50,
                }
            )
    attacks_in_order = list(dict.fromkeys(attack for attack, _ in _COLUMNS))
    return sorted(
        rows,
        key=lambda row: (PAPER_ARMS.index(row["arm"]), attacks_in_order.index(row["attack"]), row["eps"], row["seed"]),
    )


def demo_outcome(results: Path) -> str:
    records = records_in(results / "demo.csv")
    rows = _miou_rows(records)
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for arm in PAPER_ARMS:
        cells = []
        for attack, eps in _COLUMNS:
            values = [row["miou"] for row in rows if (row["arm"], row["attack"], row["eps"]) == (arm, attack, eps)]
            if len(values) != len(seeds):
                raise ReportError(f"demo.csv: {len(values)} rows of {arm}, {attack}, eps {eps:g}, {len(seeds)} seeds")
            cells.append(mean_and_range(values))
        lines.append([arm, *cells])
    titles = [f"{plots.attack_title(attack)} {eps:g}" if eps else "clean" for attack, eps in _COLUMNS]
    header = ["trained with", *titles]
    which = f"seeds {', '.join(map(str, seeds))}: mean and range" if len(seeds) > 1 else f"seed {seeds[0]}"
    minutes = one(records, operation=MINUTES).p50
    sizes = [one(records, operation=STEP_SIZE, case=f"seed {seed}").p50 for seed in seeds]
    notes = paragraph(
        f"mIoU of {which}; the run took {minutes:.0f} minutes. The median of Fast Newton's step size in training was "
        f"{', '.join(f'{size:.3f}' for size in sizes)}. {provenance_of(records)}"
    )
    return f"{table(header, lines)}\n\n{notes}"


# --- how robust its networks are: a file each -----------------------------------------------------------------------

EVALUATIONS = ("robustness", "robustness-longer", "segpgd")
UNDER_ATTACK, PIXELS_UNDER_ATTACK = "mIoU under attack", "pixel accuracy under attack"
CHECK = "check for gradient masking"
_UNDER_ATTACK_CASE = re.compile(r"eps ([\d.]+), (\d+) steps, (\d+) images, training (\d+)")
_ROBUST_EPS, _OTHER_EPS = 0.03, (0.02, 0.04)
_WORST, _WORST_MIOU = "worst-case", "worst-case-miou"


def robustness_records(results_json: Sequence[Path], commit: str | None) -> list[Record]:
    """Rows of what segadv evaluate wrote, a file for every training of the arms, on this machine."""
    records = []
    for training, path in enumerate(results_json):
        result = EvaluationResult.from_json(path)
        for entry in result.final:
            run = result.run[entry.arm]
            versions, device = run["versions"], torch.device(run["device"])
            case = f"eps {entry.eps:g}, {entry.steps} steps, {run['images']} images, training {training}"
            record = Record(
                operation=UNDER_ATTACK, provider=entry.arm, mode=entry.attack, case=case, dtype="float32",
                device=device.type, threads=0, thp=0, p50=entry.row["miou"], **_NO_SPREAD, unit="", rounds=1,
                commit=_commit_of(run, path, commit),
                versions=f"torch {versions['torch']}, segadv {versions['segadv']}, Python {versions['python']}",
                machine=machine_of(device),
            )  # fmt: skip
            records += [record, replace(record, operation=PIXELS_UNDER_ATTACK, p50=entry.row["pixel_accuracy"])]
        records += _check_records(path.parent / "checks.csv", training, records[-1])
    return records


def _check_records(checks_csv: Path, training: int, like: Record) -> list[Record]:
    """1 for a check that passed, 0 for one that failed, NaN for one that could not be made; none without the file."""
    if not checks_csv.exists():
        return []
    with checks_csv.open(encoding="utf-8", newline="") as file:
        checks = list(csv.DictReader(file))
    return [
        replace(
            like, operation=CHECK, provider=check["arm"], mode=check["check"],
            case=f"training {training}: {check['finding']}",
            p50={"True": 1.0, "False": 0.0, "": _NAN}[check["passed"]],
        )
        for check in checks
    ]  # fmt: skip


def robustness(results: Path, name: str = "robustness.csv") -> str:
    """Attack by attack at one eps, the worst case, that by mIoU where it was taken, at others too where they were."""
    found = _UnderAttack(records_in(results / name), name)
    worst = _WORST_MIOU if found.with_worst_miou else _WORST
    others = [eps for eps in _OTHER_EPS if eps in found.steps]
    columns = [(worst, 0.0), *((attack, _ROBUST_EPS) for attack in (*found.attacks, worst))]
    columns += [(worst, eps) for eps in others]
    titles = ["clean", *map(plots.attack_title, found.attacks), "worst case"]
    titles += [f"worst case at {eps:g}" for eps in others]
    lines = found.lines(columns)
    shown = found.steps[_ROBUST_EPS]
    most = max((found.steps[eps] for eps in others), default=shown)
    at_others = f", {most} at {' and '.join(f'{eps:g}' for eps in others)}" if most != shown else ""
    chosen_by = (
        "mIoU"
        if found.with_worst_miou
        else "wrong pixels; so its mIoU may be a little above that of the strongest of them"
    )
    notes = paragraph(
        f"{found.what}; BIM-10 has 10 steps, the others have {shown}{at_others}. The worst case is chosen for each "
        f"image among these and FGSM, by its {chosen_by}. "
        f"{_of_checks(found.checks)}{found.provenance}"
    )
    return f"{table(['trained with', *titles], lines)}\n\n{notes}"


def robustness_miou(results: Path) -> str:
    """CosPGD and CosPGD, balanced, the worst cases by pixels and by mIoU: mIoU and pixel accuracy."""
    rows = records_in(results / "robustness.csv")
    found, pixels = (_UnderAttack(rows, "robustness.csv", of) for of in (UNDER_ATTACK, PIXELS_UNDER_ATTACK))
    attacks = ("cospgd", _WORST, "cospgd-balanced", _WORST_MIOU)
    columns = [(_WORST, 0.0), *((attack, _ROBUST_EPS) for attack in attacks)]
    titles = ["clean", "CosPGD", "worst case by pixels", "CosPGD, balanced", "worst case by mIoU"]
    lines = [
        [arm, *(f"{miou} / {accuracy}" for miou, accuracy in zip(cells, accuracies, strict=True))]
        for (arm, *cells), (_, *accuracies) in zip(
            found.lines(columns), pixels.lines(columns, ranges=False), strict=True
        )
    ]
    others = ", ".join(plots.attack_title(attack) for attack in ("fgsm", *found.attacks) if attack not in attacks)
    notes = paragraph(
        f"{found.what} / mean pixel accuracy; BIM-10 has 10 steps, the others have {found.steps[_ROBUST_EPS]}. The "
        f"worst cases are chosen for each image among these, {others}. {found.provenance}"
    )
    return f"{table(['trained with', *titles], lines)}\n\n{notes}"


def segpgd(results: Path) -> str:
    """Gu et al.'s comparison: both attacks with equal numbers of steps, on networks trained with either."""
    found = _UnderAttack(records_in(results / "segpgd.csv"), "segpgd.csv")
    attacks = [f"{kind}-{steps}" for kind in ("pgd", "segpgd") for steps in (10, 20, 40, 100)]
    lines = found.lines([(_WORST, 0.0), *((attack, _ROBUST_EPS) for attack in attacks)])
    notes = paragraph(
        f"{found.what}; random start, steps of eps / 3, last iterate. {_of_checks(found.checks)}{found.provenance}"
    )
    return f"{table(['trained with', 'clean', *map(plots.attack_title, attacks)], lines)}\n\n{notes}"


class _UnderAttack:
    """What rows say of networks under attack; ReportError where one is missing."""

    def __init__(self, rows: Sequence[Record], name: str, operation: str = UNDER_ATTACK) -> None:
        self.name = name
        self.records, self.checks = ([row for row in rows if row.operation == what] for what in (operation, CHECK))
        self.found: dict[tuple[str, str, float], list[float]] = {}
        self.steps: dict[float, int] = {}
        """eps -> the largest number of steps of an attack."""
        images, trainings = set(), set()
        for record in self.records:
            match = _UNDER_ATTACK_CASE.fullmatch(record.case)
            if match is None:
                raise ReportError(f"{name}: {record.case!r} is not like 'eps 0.03, 20 steps, 32 images, training 0'")
            eps = float(match[1])
            self.found.setdefault((record.provider, record.mode, eps), []).append(record.p50)
            self.steps[eps] = max(self.steps.get(eps, 0), int(match[2]))
            images.add(match[3])
            trainings.add(match[4])
        self.trainings = len(trainings)
        how = f"mean and range of {self.trainings} trainings" if self.trainings > 1 else "one training"
        self.what = f"mIoU of {', '.join(sorted(images))} validation scenes at eps {_ROBUST_EPS:g}, {how}"

    @property
    def attacks(self) -> list[str]:
        """But for FGSM and the worst cases."""
        left_out = ("fgsm", _WORST, _WORST_MIOU)
        return [each for each in dict.fromkeys(attack for _, attack, _ in self.found) if each not in left_out]

    @property
    def with_worst_miou(self) -> bool:
        return any(attack == _WORST_MIOU for _, attack, _ in self.found)

    @property
    def provenance(self) -> str:
        rows = self.records
        return provenance((r.machine for r in rows), (r.versions for r in rows), (r.commit for r in rows))

    def lines(self, columns: Sequence[tuple[str, float]], *, ranges: bool = True) -> list[list[str]]:
        """A line for each arm: its name, and the mean, with the range unless told otherwise, for each (attack, eps)."""
        lines = []
        for arm in dict.fromkeys(record.provider for record in self.records):
            cells = []
            for attack, eps in columns:
                values = self.found.get((arm, attack, eps), [])
                if len(values) != self.trainings:
                    raise ReportError(
                        f"{self.name}: {len(values)} rows of {arm}, {attack}, eps {eps:g}, {self.trainings} trainings"
                    )
                cells.append(mean_and_range(values if ranges else [statistics.fmean(values)]))
            lines.append([arm, *cells])
        return lines


def _of_checks(checks: Sequence[Record]) -> str:
    """How many were made, and those that failed, with their figures."""
    made = [check for check in checks if not math.isnan(check.p50)]
    failed = [f"{check.provider}, {check.mode}, {check.case}" for check in made if not check.p50]
    if not made:
        return ""
    which = f"{len(failed)} failed ({'; '.join(failed)})" if failed else "none failed"
    return f"Of {len(made)} checks for gradient masking {which}. "


def mean_and_range(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.3f}"
    return f"{mean} ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else mean


# --- documents and pictures ---------------------------------------------------------------------------------------

BLOCKS: Mapping[str, Callable[[Path], str]] = {
    "headline": headline,
    "operations": operations,
    "operations-all": all_operations,
    "layouts": layouts,
    "repeated": repeated,
    "repeated-in-a-sentence": repeated_in_a_sentence,
    "data": training_samples,
    "gpu": gpus,
    "overhead": training_overhead,
    "overhead-details": overhead_details,
    "peers": other_packages,
    "peers-in-a-sentence": other_packages_in_a_sentence,
    "attacks": attack_steps,
    "trainer": trainer_cost,
    "scaling": growth,
    "calls": call_ladder,
    "demo": demo_outcome,
    "robustness": robustness,
    "robustness-miou": robustness_miou,
    "robustness-longer": lambda results: robustness(results, "robustness-longer.csv"),
    "segpgd": segpgd,
}


@dataclass(frozen=True)
class Picture:
    """Belongs to a block: where that is in a document, the picture is drawn from the rows in `source`."""

    block: str
    path: str
    source: str
    draw: Callable[[list[Record], Path], None]


PICTURES = (
    Picture(
        "demo", "docs/robustness.png", "demo.csv", lambda rows, path: plots.plot_robustness(_miou_rows(rows), path)
    ),
    Picture(
        "overhead",
        f"{RESULTS}/overhead-cpu.png",
        "overhead-cpu.csv",
        lambda rows, path: overhead.plot(comparable(rows), path),
    ),
    Picture("scaling", f"{RESULTS}/scaling-cpu.png", "scaling-cpu.csv", scaling.plot),
)
_STAMP = "segadv-source"


def filled(text: str, results: Path) -> str:
    """A document with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise ReportError(f"no table is called {name!r}; there are {', '.join(BLOCKS)}")
        content = BLOCKS[name](results)
        return f"{match[1]}{content}\n{match[4]}" if content else match[1] + match[4]

    result, count = _BLOCK.subn(block, text)
    if len(_MARKER.findall(text)) != 2 * count:
        raise ReportError("markers do not come in pairs of <!-- begin: NAME --> and <!-- end: NAME -->")
    return result


def blocks_in(root: Path) -> list[str]:
    return [match[2] for name in DOCUMENTS for match in _BLOCK.finditer((root / name).read_text(encoding="utf-8"))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stamp_of(picture: Path) -> str | None:
    """The hash of what it was drawn from; None where it does not tell."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(_STAMP)


def draw(picture: Picture, root: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    source, target = root / RESULTS / picture.source, root / picture.path
    records = records_in(source)
    with atomic_write(target) as temporary:
        picture.draw(records, temporary)
        information = PngInfo()
        information.add_text(_STAMP, digest(source))
        with Image.open(temporary) as image:
            image.load()
        image.save(temporary, pnginfo=information)


def outdated(root: Path) -> list[str]:
    """What the rows in results/ do not give: documents and pictures."""
    stale = []
    for name in DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        if filled(text, root / RESULTS) != text:
            stale.append(name)
    shown = blocks_in(root)
    for picture in PICTURES:
        source = root / RESULTS / picture.source
        if picture.block in shown and stamp_of(root / picture.path) != digest(source):
            stale.append(picture.path)
    return stale


def regenerate(root: Path) -> list[str]:
    """Writes what is out of step, and tells what that was."""
    stale = outdated(root)
    for name in DOCUMENTS:
        if name in stale:
            text = filled((root / name).read_text(encoding="utf-8"), root / RESULTS)
            write_text(root / name, text)
    for picture in PICTURES:
        if picture.path in stale:
            draw(picture, root)
    return stale


def write_anew(path: Path, records: Sequence[Record]) -> None:
    """Rows of what was measured before do not stay."""
    write_text(path, csv_text([asdict(record) for record in records]))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is out of step")
    parser.add_argument("--demo", type=Path, metavar="RESULTS_JSON", help="a demo's results.json, for demo.csv")
    for name in EVALUATIONS:
        parser.add_argument(
            f"--{name}",
            type=Path,
            nargs="+",
            metavar="RESULTS_JSON",
            help=f"evaluations' results.json, for {name}.csv",
        )
    parser.add_argument("--commit", help="the commit that ran these, where their files do not name it")
    options = parser.parse_args(arguments)
    try:
        if options.demo:
            write_anew(root / RESULTS / "demo.csv", demo_records(options.demo, options.commit))
        for name in EVALUATIONS:
            if evaluations := getattr(options, name.replace("-", "_")):
                write_anew(root / RESULTS / f"{name}.csv", robustness_records(evaluations, options.commit))
        stale = outdated(root) if options.check else regenerate(root)
    except (ReportError, OSError, ValueError, KeyError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    for name in stale:
        print(f"{name}: {'out of step with the rows in benchmarks/results' if options.check else 'written'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
