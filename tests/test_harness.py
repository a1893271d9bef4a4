"""The benchmarks' harness: what a row says is what was measured, of the call that it names, checked before."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measure, ops, overhead, records
from benchmarks.cases import Case
from benchmarks.overhead import CONVENTIONAL, EFFICIENT, OURS, Step, Training
from benchmarks.records import PEAK_MEMORY, Where
from segadv import functional as F

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(overhead.MODELS["small"], CPU, quick=True)


def test_every_figure_of_a_step_is_of_its_own_series(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times, parts, passes and memory are made up, and every row is worked out by hand."""
    steps = overhead.steps_of([CONVENTIONAL, OURS], ["fgsm", "fast-newton"], [0.5, 1.0])
    ms = {step: 100.0 + 7 * i for i, step in enumerate(steps)}
    parts = dict(zip(overhead.PHASES, (10.0, 20.0, 20.0, 15.0, 5.0, 25.0, 5.0), strict=True))
    done: list[Step] = []
    monkeypatch.setattr(training, "step", lambda column, arm, share, *_: done.append(Step(column, arm, share)))

    def times(calls: Any, device: torch.device, *, rounds: int, seconds: float) -> dict[Step, Any]:
        assert seconds == math.inf  # on a CPU
        assert done == steps, "every step once, to warm up"
        for step, call in calls.items():
            call()
            assert done[-1] == step
        return {step: np.full(rounds, ms[step]) for step in calls}

    def peak(call: Any, device: torch.device) -> float:
        call()
        return 1e6 * steps.index(done[-1])

    def passes(training: Training) -> Any:
        return SimpleNamespace(
            count=lambda step: SimpleNamespace(forward=1, backward=2, weights=4, cost=4 + 2 * step.share)
        )

    monkeypatch.setattr(overhead, "milliseconds_of", times)
    monkeypatch.setattr(overhead, "in_rounds", lambda measure, keys, **_: {key: [parts, parts] for key in keys})
    monkeypatch.setattr(overhead, "peak_memory", peak)
    monkeypatch.setattr(overhead, "Passes", passes)
    where = Where("small", torch.float32, CPU)
    rows = [row for some in overhead.measured(training, where, steps, rounds=3) for row in some]
    found = {(row.operation, row.provider, row.mode): row.p50 for row in rows}
    assert len(found) == len(rows)
    for i, step in enumerate(steps):
        of, basic = (step.column, step.mode), ms[Step(step.column, "basic", 0.0)]
        expected = {"training step": ms[step], overhead.LOSS_SHARE: 5.0, "peak memory": i}
        if step.column != CONVENTIONAL:
            expected["over conventional basic"] = ms[step] - 100
        if step.arm != "basic":
            expected["overhead"] = 100 * (ms[step] / basic - 1)
            expected |= {overhead.GLUE_SHARE: 40.0, overhead.COST_MODEL: 50 * step.share}
        if step.arm == "fast-newton":
            fgsm = ms[Step(step.column, "fgsm", step.share)]
            expected[overhead.NEWTON_OVER_FGSM] = 100 * (ms[step] - fgsm) / basic
        expected |= {f"part: {phase}": value for phase, value in parts.items()}
        expected |= {"passes: forward": 1, "passes: backward": 2, "passes: weights": 4}
        assert {name: value for (name, *rest), value in found.items() if tuple(rest) == of} == pytest.approx(
            expected, abs=1e-3
        )


def test_nothing_is_timed_before_it_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(*_: Any) -> None:
        raise RuntimeError("differs")

    monkeypatch.setattr(ops, "CASES", {"cityscapes19": Case("tiny", images=1, classes=3, own=4, size=16)})
    for module in (overhead, ops):
        monkeypatch.setattr(module, "check", differs)
        monkeypatch.setattr(module, "measured", lambda *_, **__: pytest.fail("timed"))
    assert overhead.main(["--quick", "--device", "cpu"]) == 1
    assert "RuntimeError: differs" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="differs"):
        ops.main(["--no-compile"])


def test_every_arm_of_every_column_is_checked(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second arm, the first column; and a thousandth of the elements is too much."""
    right = overhead.usual_newton_step

    def nearly(*tensors: torch.Tensor) -> torch.Tensor:
        images = right(*tensors)
        images[:, :, 0, :2] = 0.5
        return images

    with monkeypatch.context() as patched:
        patched.setattr(overhead, "usual_newton_step", nearly)
        with pytest.raises(RuntimeError, match="fast-newton, segadv"):
            overhead.check(training, ["fgsm", "fast-newton"], [CONVENTIONAL, OURS])
    with monkeypatch.context() as patched:
        ours = training.losses[CONVENTIONAL]
        patched.setitem(training.losses, CONVENTIONAL, lambda logits, labels: 1.01 * ours(logits, labels))
        with pytest.raises(RuntimeError, match="loss, conventional"):
            overhead.check(training, [], [CONVENTIONAL, OURS])
    gradient = training._conventional_gradient
    monkeypatch.setattr(training, "_conventional_gradient", lambda *a: tuple(-x for x in gradient(*a)))
    with pytest.raises(RuntimeError, match="fgsm, conventional"):
        overhead.check(training, ["fgsm"], [CONVENTIONAL, OURS])


def test_a_column_is_written_as_it_says(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns' losses, in the type that is timed, and the optimiser's work with all gradients."""
    assert training.losses == {
        CONVENTIONAL: ops.usual_cross_entropy, EFFICIENT: ops.usual_cross_entropy, OURS: F.cross_entropy
    }  # fmt: skip
    done: list[bool] = []
    parameters = list(training.model.parameters())
    monkeypatch.setattr(training.optimizer, "step", lambda: done.append(all(p.grad is not None for p in parameters)))
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(training, "dtype", dtype)
        for column in overhead.COLUMNS:
            found: list[torch.dtype] = []
            with training.observed(lambda images: None, lambda images, logits, to=found: to.append(logits.dtype)):
                training.step(column, "fgsm", 0.5)
            assert found == [dtype, dtype]  # of the attack and of the step
    assert done == [True] * 6


@pytest.mark.parametrize("full", [False, True])
def test_a_provider_is_what_it_is_called(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tiny", images=2, classes=4, own=5, size=20)
    called: list[Any] = []

    def function(name: str) -> Any:
        return lambda logits, labels, **options: called.append((name, logits.shape[-1], labels.shape[-1], options))

    resets: list[bool] = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: partial(lambda *a: (called.append("compiled"), f(*a))))
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(True))
    monkeypatch.setattr(ops, "usual_averaged_gain", function("usual"))
    monkeypatch.setitem(ops.OPERATIONS, "averaged_gain", (function("ours"), function("usual"), ("forward",)))
    providers = ops.providers_of("averaged_gain", "forward", case, full_resolution=full, compiled=True)
    expected = {"segadv": ("ours", {}), "eager": ("usual", {}), "eager, max": ("usual", {"by_max": True})}
    expected |= {name.replace("eager", "compile"): expected[name] for name in ("eager", "eager, max")}
    assert providers.keys() == expected.keys()
    assert resets == [True]
    for provider, (name, options) in expected.items():
        called.clear()
        providers[provider]()
        made = (name, 20 if full else 5, 20, options)
        assert called == [*["compiled"] * provider.startswith("compile"), made]


@pytest.mark.parametrize("operation", ops.ONE_PASS)
def test_a_wrong_value_with_the_right_gradient_is_not_timed(operation: str) -> None:
    """One percent is too much."""
    case = Case("tiny", images=2, classes=4, own=5, size=20)
    providers = ops.providers_of(operation, "forward + backward", case, full_resolution=False, compiled=False)
    value, grad = providers["segadv"]()
    for wrong in ((1.01 * value, grad), (value, 1.01 * grad)):
        with pytest.raises(RuntimeError, match="segadv against eager: it differs"):
            ops.check(operation, providers | {"segadv": lambda wrong=wrong: wrong})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_what_is_close(dtype: torch.dtype) -> None:
    expected = torch.tensor([300.0, 400.0]).to(dtype)
    ours = expected + torch.tensor([3, 4]).to(dtype) * (2 if dtype is torch.bfloat16 else 1)  # of which 8 bits are left
    difference = float((ours.double() - expected.double()).norm()) / 500
    measure.check_close("ours", ours, expected.float(), tolerance=1.001 * difference)
    with pytest.raises(RuntimeError, match=rf"ours: it differs by {difference:.2e} of its size, 9e-04 is allowed"):
        measure.check_close("ours", ours, expected, tolerance=9e-4)
    measure.check_close("ours", 0 * expected, 0 * expected, tolerance=0)
    with pytest.raises(RuntimeError, match="ours: it differs by"):
        measure.check_close("ours", ours, 0 * expected, tolerance=1)
    with pytest.raises(RuntimeError, match=r"ours: \[1, 2\], expected \[2\]"):
        measure.check_close("ours", ours[None], expected, tolerance=1)
    if dtype.is_floating_point:
        with pytest.raises(RuntimeError, match="ours: it differs by nan of its size"):
            measure.check_close("ours", ours.where(ours > 350, torch.nan), expected, tolerance=1)


def test_logits_that_tie_in_bfloat16_are_no_difference() -> None:
    """A hundred classes of noise: in bfloat16 the two largest are often one number, whose gradient amax divides."""
    case, mode = Case("tiny", images=2, classes=100, own=20, size=20, noise=True), "forward + backward"
    options: dict[str, Any] = {"full_resolution": True}
    truth = ops.in_float32("averaged_gain", mode, case, torch.bfloat16, **options)
    providers = ops.providers_of("averaged_gain", mode, case, compiled=False, dtype=torch.bfloat16, **options)
    ops.check("averaged_gain", providers, truth)
    logits, labels = case.tensors(dtype=torch.bfloat16, **options)
    divided = ops.value_and_gradient(ops.usual_averaged_gain, logits.float().requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="against eager: it differs"):
        ops.check("averaged_gain", providers, divided)


def test_time_and_memory_are_those_of_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    names, ran = ["segadv", "eager", "floor"], []
    calls = {name: partial(ran.append, name) for name in names}

    def times(calls: Any, device: torch.device, *, rounds: int) -> dict[str, Any]:
        assert sorted(ran) == sorted(2 * names), "all twice, to warm up"
        return {name: np.full(rounds, 1.0 + names.index(name)) for name in calls}

    peaks = [0.0, 0.0, 7.0, 7.0, -3.0]

    def peak(call: Any, device: torch.device) -> float:
        call()
        return 1e6 * (10 + names.index(ran[-1]) + peaks[len(ran) % 5])

    monkeypatch.setattr(ops, "milliseconds_of", times)
    monkeypatch.setattr(records, "peak_memory", peak)
    rows = ops.measured(Where("case", torch.float32, CPU), "op", "forward", calls, rounds=3)
    assert {(row.operation, row.provider): (row.p50, row.unit, row.rounds) for row in rows} == {
        **{("op", name): (1.0 + i, "ms", 3) for i, name in enumerate(names)},
        **{(f"op, {PEAK_MEMORY}", name): (10.0 + i, "MB", 5) for i, name in enumerate(names)},
    }


def test_a_time_is_that_of_the_call_and_of_what_it_has_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what was enqueued before, nor of freeing the result."""
    clock, enqueued = [0.0], [5.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def synchronize(device: torch.device) -> None:
        clock[0] += enqueued.pop() if enqueued else 0

    class Result:
        def __del__(self) -> None:
            clock[0] += 7

    def call() -> Result:
        clock[0] += 0.001
        enqueued.append(0.002)
        return Result()

    monkeypatch.setattr(measure, "synchronize", synchronize)
    assert measure.milliseconds_of({"a": call}, CPU, rounds=3)["a"].tolist() == pytest.approx([3.0] * 3)


def test_a_peak_is_that_of_the_call_alone() -> None:
    """Also where all is free again in the end, and not that of a call before."""

    def take(megabytes: int) -> None:
        np.ones(megabytes << 20, np.uint8)

    first, second = (measure.peak_bytes(partial(take, megabytes)) for megabytes in (64, 8))
    assert 60e6 < first < 90e6
    assert second < 30e6


def test_a_peak_that_cannot_be_reset_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(measure.Path, "write_text", refused)
    assert math.isnan(measure.peak_bytes(lambda: None))


def test_resident_memory_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Path, "read_text", lambda self: "VmPeak:\t  9000 kB\nVmHWM:\t   300 kB\n")
    assert measure._resident("VmHWM") == 300 * 1024


def test_the_driver_is_what_a_program_says_that_does_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.driver_version.__wrapped__() == "unknown"
    program = tmp_path / "nvidia-smi"
    for text, status, told in (("No devices were found", 6, "unknown"), ("580.65.06\n580.65.06", 0, "580.65.06")):
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        program.chmod(0o755)
        assert measure.driver_version.__wrapped__() == told


def test_names_of_devices_in_those_of_files() -> None:
    assert measure.slug("NVIDIA H100 (80 GB)") == "nvidia-h100-80-gb"


def test_a_time_on_a_gpu_is_that_between_events_around_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, last: Event) -> float:
            return 1.5 if last is not self else 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("head start"))
    monkeypatch.setattr(measure, "_larger_than_l2", lambda device: SimpleNamespace(sum=lambda: log.append("flush")))
    found = measure.times_on_device({"a": lambda: log.append("call")}, torch.device("cuda"), rounds=2)
    assert found["a"].tolist() == [1.5, 1.5]
    assert log[0] == "call", "what it takes its memory from is there"
    assert log[1:] == 2 * ["flush", "head start", "event", "call", "event", "synchronize"]


def test_a_peak_on_a_gpu_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"now": 100, "peak": 900}  # of a call before
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    call = lambda: memory.update(peak=max(170, memory["peak"]), now=120)  # noqa: E731
    assert measure.peak_bytes_on_device(call, torch.device("cuda")) == (70, 50)


def test_a_row_tells_of_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", 1), ("0", 0), (None, 0)):
        if value is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        else:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", value)
        assert Where("case", torch.float32, CPU).record("a", "b", "c", ([1.0],), unit="ms").thp == expected


def test_a_row_names_the_packages_it_depends_on() -> None:
    row = Where("case", torch.float32, CPU, ("numpy",)).record("a", "b", "c", ([1.0],), unit="ms")
    assert f"numpy {np.__version__}" in row.versions


@pytest.mark.parametrize(
    ("built", "device", "named"),
    [
        ({"native": True, "compiler": "GNU 12.2.0", "cuda": None}, "cpu", "GNU 12.2.0"),
        ({"native": True, "compiler": "GNU 12.2.0", "cuda": "nvcc 13.0"}, "cpu", "GNU 12.2.0"),
        ({"native": True, "compiler": "GNU 12.2.0", "cuda": "nvcc 13.0"}, "cuda", "GNU 12.2.0, nvcc 13.0"),
        ({"native": False}, "cuda", ""),
    ],
)
def test_a_row_names_the_compilers_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, built: dict[str, object], device: str, named: str
) -> None:
    monkeypatch.setattr("segadv.build_info", lambda: built)
    told = records._versions.__wrapped__((), device).split(", ")
    assert ", ".join(told[2:-1]) == named


@pytest.mark.parametrize("column", ["operation", "provider", "mode", "case", "dtype", "device", "threads", "thp"])
def test_rows_that_differ_in_any_of_the_key_stay_both(column: str, tmp_path: Path) -> None:
    row = Where("case", torch.float32, CPU).record("a", "b", "c", ([1.0],), unit="ms")
    other = replace(row, **{column: 7 if column in ("threads", "thp") else "other"})
    records.write_records(tmp_path / "rows.csv", [row, other])
    assert len(records.read_records(tmp_path / "rows.csv")) == 2
