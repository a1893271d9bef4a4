"""How cost grows: `python -m benchmarks.scaling [--write] [--quick]`.

Value and gradient of the averaged gain and of the cross-entropy of logits at an eighth of the labels' size, ours in
one pass and eager PyTorch's, along four axes one after the other: pixels of an image x 1 to 64, classes 2 to 512,
images in the batch 1 to 64, threads. Time and peak memory per pixel of the labels; what grows in proportion is a flat
line. The floor moves the fewest bytes (reads logits and labels, writes the gradient) at the speed of a copy between
memory that is there, measured in the same rounds, and holds the gradient alone; it counts no arithmetic, of which
resampling has plenty.

Then the ladder of a call on tensors so small that only overhead is left: the compiled core by itself, the native
backend, through the dispatcher, the public function, and through autograd.

`--write` adds the rows to results/scaling-cpu.csv and draws scaling-cpu.png beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from segadv import functional as F
from segadv.ops import library, native
from segadv.writing import atomic_write

from .cases import Case
from .measure import in_rounds, milliseconds_of, peak_bytes
from .ops import CPU, usual_averaged_gain, usual_cross_entropy, value_and_gradient
from .records import Record, Where, destination, read_records, require_native_core, write_records

STRIDE = 8
TIME, MEMORY, LADDER = "time per pixel", "peak memory per pixel", "call"
OPERATIONS = {
    "averaged_gain": (F.gain_and_grad, partial(usual_averaged_gain, by_max=True)),
    "cross_entropy": (F.loss_and_grad, usual_cross_entropy),
}
PAGE = 4096  # the least that the resident memory tells

# axis -> its values, and the case at each
AXES: dict[str, tuple[Sequence[int], Callable[[int], Case]]] = {
    "pixels": ([128, 256, 512, 1024], lambda size: scaled(images=1, size=size)),
    "classes": ([2, 8, 32, 128, 512], lambda classes: scaled(classes=classes)),
    "batch": ([1, 4, 16, 64], lambda images: scaled(images=images, size=128)),
    "threads": ([1, 2], lambda threads: scaled()),
}
QUICK = {"pixels": [32, 64], "classes": [2, 8], "batch": [1, 2], "threads": [1]}


def scaled(*, images: int = 2, classes: int = 19, size: int = 256) -> Case:
    own = size // STRIDE
    return Case(f"{images} x {classes} x {own} x {own} to {size} x {size}", images, classes, own, size)


def pixels_of(case: str) -> int:
    """Of the labels of a row's case."""
    numbers = [int(number) for number in re.findall(r"\d+", case)]
    return numbers[0] * numbers[-2] * numbers[-1]


def floor_bytes(logits: Tensor, labels: Tensor) -> int:
    """Reads logits and labels, writes the gradient."""
    return 2 * logits.nbytes + labels.nbytes


def copying(size: int) -> Callable[[], Tensor]:
    """Copies a buffer of so many bytes into memory that is there; moves twice as many.

    Not into fresh memory, where the system may have huge pages or not: that is the same code 17 times as fast or slow.
    """
    source, target = torch.zeros(size // 4), torch.zeros(size // 4)
    return lambda: target.copy_(source)


def measure_axis(axis: str, values: Sequence[int], rounds: int, *, copied: int) -> list[Record]:
    """Rows at every value; `copied` bytes are copied in every round, which the floor's time is taken from."""
    rows: list[Record] = []
    threads = torch.get_num_threads()
    try:
        for value in values:
            case = AXES[axis][1](value)
            torch.set_num_threads(value if axis == "threads" else threads)
            logits, labels = case.tensors(full_resolution=False)
            where, pixels = Where(case.name, torch.float32, CPU), pixels_of(case.name)
            leaf = logits.clone().requires_grad_()
            calls: dict[tuple[str, str], Callable[[], object]] = {("fewest bytes", "floor"): copying(copied)}
            for operation, (ours, usual) in OPERATIONS.items():
                calls[f"upsample + {operation}", "segadv"] = partial(ours, logits, labels)
                calls[f"upsample + {operation}", "eager"] = partial(value_and_gradient, usual, leaf, labels)
            for call in (*calls.values(), *calls.values()):
                call()
            for (operation, provider), milliseconds in milliseconds_of(calls, CPU, rounds=rounds).items():
                nanoseconds = 1e6 * milliseconds / pixels
                memory = max(peak_bytes(calls[operation, provider]), PAGE)
                if provider == "floor":
                    nanoseconds *= floor_bytes(logits, labels) / (2 * copied)
                    memory = logits.nbytes
                per_pixel = np.array([memory / pixels])
                rows += [
                    where.record(f"{operation}, {TIME}", provider, axis, [nanoseconds], unit="ns"),
                    where.record(f"{operation}, {MEMORY}", provider, axis, [per_pixel], unit="bytes"),
                ]
            print(shown(rows[-2 * len(calls) :], f"{axis} {value}: {case.name}"), flush=True)
    finally:
        torch.set_num_threads(threads)
    return rows


def shown(rows: Sequence[Record], title: str) -> str:
    lines = (f"  {f'{row.operation}, {row.provider}':60s}{row.p50:10.3f} {row.unit}" for row in rows)
    return "\n".join([f"\n{title}", *lines])


# --- the ladder ---------------------------------------------------------------------------------------------------


RUNGS = (
    "compiled core, value and gradient",
    "native backend",
    "dispatcher",
    "public function",
    "through autograd, value",
    "through autograd, value and gradient",
    "eager, value",
    "eager, value and gradient",
)


def ladder() -> dict[str, Callable[[], object]]:
    """The averaged gain of one image of 4 x 4 pixels, with more around it on every rung; eager's beside."""
    case = Case("tiny", images=1, classes=2, own=4, size=4)
    logits, labels = case.tensors(full_resolution=True)
    leaf = logits.clone().requires_grad_()
    calls = (
        core_call(logits, labels),
        partial(native.CPU.gain_and_grad, logits, labels, 255, False),
        partial(library.gain_and_grad, logits, labels, 255, False),
        partial(F.gain_and_grad, logits, labels),
        partial(F.averaged_gain, leaf, labels),
        partial(value_and_gradient, F.averaged_gain, leaf, labels),
        partial(usual_averaged_gain, leaf, labels),
        partial(value_and_gradient, usual_averaged_gain, leaf, labels),
    )
    return dict(zip(RUNGS, calls, strict=True))


def core_call(logits: Tensor, labels: Tensor) -> Callable[[], object]:
    """The compiled function with the arguments that the native backend gives it, made once."""
    core = native.CPU.core
    with mock.patch.object(native.CPU, "core", wraps=core) as recorder:
        result = native.CPU.gain_and_grad(logits, labels, 255, False)
    ((name, arguments, keywords),) = recorder.mock_calls
    function = partial(getattr(core, name), *arguments, **keywords)
    kept = (result, logits, labels)  # the arguments are pointers into them
    return lambda kept=kept: function()  # type: ignore[misc]


def measure_ladder(*, rounds: int, calls: int) -> list[Record]:
    """In every round the mean of so many calls."""
    rungs = ladder()

    def microseconds(name: str) -> float:
        call = rungs[name]
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e6 * (time.perf_counter() - begin) / calls

    for name in RUNGS:
        microseconds(name)
    where = Where("1 x 2 x 4 x 4", torch.float32, CPU)
    times = in_rounds(microseconds, RUNGS, rounds=rounds)
    rows = [where.record(LADDER, name, "", [np.array(times[name])], unit="us") for name in RUNGS]
    print(shown(rows, "a call on 1 x 2 x 4 x 4"), flush=True)
    return rows


# --- picture ------------------------------------------------------------------------------------------------------

_COLORS = {"averaged_gain": "#D55E00", "cross_entropy": "#0072B2"}
_TITLES = {
    "pixels": "pixels of an image",
    "classes": "classes",
    "batch": "images in the batch",
    "threads": "threads",
}


def _place(axis: str, row: Record) -> int:
    """Where on the axis a row lies."""
    numbers = [int(number) for number in re.findall(r"\d+", row.case)]
    return {"pixels": numbers[-2] * numbers[-1], "classes": numbers[1], "batch": numbers[0], "threads": row.threads}[
        axis
    ]


def plot(rows: Sequence[Record], path: Path) -> None:
    """A column of panels for every axis: time above, memory below."""
    from matplotlib.figure import Figure

    axes = [axis for axis in AXES if any(row.mode == axis for row in rows)]
    figure = Figure(figsize=(4.2 * len(axes), 7.6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False, sharey="row", sharex="col")
    handles = {}
    for column, axis in enumerate(axes):
        for panel, quantity in zip(panels[:, column], (TIME, MEMORY), strict=True):
            lines: dict[tuple[str, str], list[Record]] = {}
            for row in rows:
                name, _, measures = row.operation.partition(", ")
                if row.mode == axis and measures == quantity:
                    lines.setdefault((name.removeprefix("upsample + "), row.provider), []).append(row)
            for (operation, provider), line in sorted(lines.items()):
                line.sort(key=lambda row: _place(axis, row))
                color = _COLORS.get(operation, "#333333")
                style = {"segadv": "-", "eager": "--", "floor": ":"}[provider]
                label = "fewest bytes" if provider == "floor" else f"{operation}, {provider}"
                xs = [_place(axis, row) for row in line]
                (handles[label],) = panel.plot(
                    xs, [row.p50 for row in line], style, color=color, marker="" if provider == "floor" else "o", lw=2
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({_place(axis, row) for line in lines.values() for row in line})
            names = [f"{round(tick**0.5)}²" if axis == "pixels" else str(tick) for tick in ticks]
            panel.set_xticks(ticks, names)
            panel.minorticks_off()
            panel.grid(color="#dddddd")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0, column].set_title(_TITLES[axis])
    panels[0, 0].set_ylabel("ns per pixel")
    panels[1, 0].set_ylabel("bytes per pixel at the peak")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, handlelength=3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-ladder", action="store_true", help="leave out the calls on tiny tensors")
    parser.add_argument("--write", metavar="CSV", nargs="?", const="")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: its figures mean nothing")
    options = parser.parse_args(arguments)
    quick = options.quick
    path = destination("scaling", options.write, CPU, quick=quick)
    require_native_core(CPU)

    def keep(rows: list[Record]) -> None:
        """At once: what comes after may fail."""
        if path is not None:
            write_records(path, rows)

    for axis in options.axes:
        values = QUICK[axis] if quick else AXES[axis][0]
        keep(measure_axis(axis, values, 2 if quick else options.rounds, copied=1 << 16 if quick else 64 << 20))
    if not options.no_ladder:
        keep(measure_ladder(rounds=3 if quick else 51, calls=3 if quick else 200))
    if path is not None:
        plot(read_records(path), path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
