"""benchmarks.overhead, .peers and .device on tiny sizes: statistics, counted passes, rows, and what they refuse."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segadv
from benchmarks import device, measure, ops, overhead, peers, records
from benchmarks.cases import Case
from benchmarks.measure import in_rounds
from benchmarks.overhead import CONVENTIONAL, EFFICIENT, OURS, Passes, Step, Training
from benchmarks.records import Record, Where
from segadv.ops import backends

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(overhead.MODELS["small"], CPU, quick=True)


# --- statistics ---------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    """Of many independent values: mean -+ 1.96 standard errors."""
    values = np.random.default_rng(0).gamma(2.0, size=400)
    low, high = records.interval(lambda x: np.mean(x, -1), values, resamples=20_000)
    error = values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.12 * error)


@pytest.mark.parametrize(("drift", "most"), [(0.0, 0.985), (0.3, 1.0)])
def test_the_interval_covers_the_true_overhead_as_often_as_it_says(drift: float, most: float) -> None:
    """The true overhead is 30 %. Where a drift is shared by a round's series, the interval is too wide, not too narrow:
    the medians are then those of one and the same round."""
    draws = np.random.default_rng(1)
    covered, trials = 0, 300
    for _ in range(trials):
        machine = draws.lognormal(0, drift, 25)
        basic = 100 * machine * draws.lognormal(0, 0.03, 25)
        arm = 130 * machine * draws.lognormal(0, 0.03, 25)
        low, high = records.interval(records.percent_over, arm, basic, resamples=400)
        covered += low <= 30 <= high
    assert 0.91 <= covered / trials <= most


def test_rounds_stay_together() -> None:
    """Two series that are equal in every round have a ratio without any uncertainty, however much the rounds differ."""
    series = np.random.default_rng(2).lognormal(0, 1, 15)
    assert records.interval(records.percent_over, 1.5 * series, series) == pytest.approx((50.0, 50.0))
    other = np.random.default_rng(3).permutation(series)
    low, high = records.interval(records.percent_over, other, series)
    assert high - low > 20


def test_a_row_of_two_series() -> None:
    arm, basic = np.array([3.0, 3.0, 6.0, 9.0]), np.array([2.0, 2.0, 2.0, 4.0])
    row = Where("case", torch.float32, CPU).record(
        "overhead", "segadv", "fgsm", (arm, basic), unit="%", statistic=records.percent_over
    )
    assert row.p50 == 125.0  # median 4.5 of median 2
    assert (row.p20, row.p80) == pytest.approx(np.percentile([50, 50, 200, 125], [20, 80]))
    assert row.low <= row.p50 <= row.high
    assert row.rounds == 4
    alone = Where("case", torch.float32, CPU).record("passes", "segadv", "fgsm", (np.array([1.5]),), unit="batches")
    assert (alone.p50, alone.rounds) == (1.5, 1)
    assert math.isnan(alone.low)
    assert math.isnan(alone.p80)
    of_two = Where("case", torch.float32, CPU).record("time", "segadv", "fgsm", (np.array([1.0, 3.0]),), unit="ms")
    assert (of_two.low, of_two.p20, of_two.p50, of_two.p80, of_two.high) == (1.0, 1.4, 2.0, 2.6, 3.0)


def test_every_key_is_measured_once_in_every_round_in_changing_order() -> None:
    calls: list[str] = []

    def measure(key: str) -> float:
        calls.append(key)
        return float(len(calls))

    found = in_rounds(measure, "abcde", rounds=12)
    rounds = [calls[i : i + 5] for i in range(0, 60, 5)]
    assert all(sorted(order) == list("abcde") for order in rounds)
    assert len({tuple(order) for order in rounds}) > 6
    assert [found[key][3] for key in rounds[3]] == [16, 17, 18, 19, 20]
    assert in_rounds(measure, "abcde", rounds=12).keys() == found.keys()
    assert calls[60:] == calls[:60]  # the same seed, the same order


def test_no_garbage_is_collected_in_the_rounds_and_again_after_a_failure() -> None:
    assert in_rounds(lambda key: gc.isenabled(), [1], rounds=1) == {1: [False]}
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        in_rounds(lambda key: key / 0, [1], rounds=1)
    assert gc.isenabled()


def test_the_time_of_the_host_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += 0.003

    def longer() -> None:
        clock[0] += 0.005

    found = measure.host_milliseconds({"call": call, "longer": longer}, CPU, rounds=4)
    assert found["call"].tolist() == pytest.approx([3.0] * 4)
    assert found["longer"].tolist() == pytest.approx([5.0] * 4)


def test_rounds_end_early_but_not_before_the_fifth() -> None:
    assert len(in_rounds(lambda key: key, [1], rounds=20, seconds=0.0)[1]) == 5
    assert len(in_rounds(lambda key: key, [1], rounds=3, seconds=0.0)[1]) == 3
    assert len(in_rounds(lambda key: key, [1], rounds=20, seconds=60.0)[1]) == 20


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("operation", ops.ONE_PASS)
def test_every_provider_of_an_operation_is_checked(operation: str, full: bool) -> None:
    case = Case("tiny", images=2, classes=4, own=5, size=20)
    providers = ops.providers_of(operation, "forward + backward", case, full_resolution=full, compiled=False)
    ops.check(operation, providers)
    for name in providers.keys() - {"eager", "floor"}:
        *values, grad = providers[name]()
        wrong = (*values, 2 * grad)
        with pytest.raises(RuntimeError, match=f"{name} against eager: it differs"):
            ops.check(operation, providers | {name: lambda wrong=wrong: wrong})


def test_another_backend_is_not_measured_as_the_compiled_core(monkeypatch: pytest.MonkeyPatch) -> None:
    records.require_native_core(CPU)
    monkeypatch.setattr(
        backends.BACKENDS["native"], "unavailable", lambda device_type: "no CUDA" if device_type == "cuda" else None
    )
    records.require_native_core(CPU)
    with pytest.raises(SystemExit, match="need the compiled core on cuda: no CUDA"):  # Triton would run there
        records.require_native_core(torch.device("cuda"))
    monkeypatch.setenv("SEGADV_BACKEND", "reference")
    with pytest.raises(SystemExit, match="without SEGADV_BACKEND"):
        records.require_native_core(CPU)


# --- rows ---------------------------------------------------------------------------------------------------------


def rows() -> list[Record]:
    where = Where("case", torch.float32, CPU)
    return [
        where.record("step", "segadv", "fgsm", (np.array([1.0, 2.0, 4.0]),), unit="ms"),
        where.record("passes", "segadv", "fgsm, with a comma", (np.array([1.5]),), unit="batches"),
    ]


def test_rows_of_a_gpu_belong_to_no_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one replaces the other, whatever the host was set to."""
    monkeypatch.setattr(records, "machine_of", lambda device: "a GPU")
    row = Where("case", torch.float32, torch.device("cuda")).record("step", "segadv", "fgsm", ([1.0],), unit="ms")
    assert (row.device, row.threads) == ("cuda", 0)
    assert rows()[0].threads == torch.get_num_threads()


def test_rows_are_read_as_written_and_replaced_by_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    first, second = rows()
    records.write_records(path, [first, second])
    records.write_records(path, [replace(first, p50=9.0), replace(first, thp=1 - first.thp)])
    found = records.read_records(path)
    assert len(found) == 3
    keys = [[getattr(row, name) for name in records.KEY] for row in found]
    assert keys == sorted(keys)
    assert repr(sorted(found, key=repr)) == repr(  # repr, because NaN is not equal to itself
        sorted([replace(first, p50=9.0), second, replace(first, thp=1 - first.thp)], key=repr)
    )


def test_a_write_that_fails_leaves_the_rows_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    first, second = rows()
    records.write_records(path, [first])
    before = path.read_bytes()

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        with open(self, "w") as file:
            file.write("half a r")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        records.write_records(path, [second])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_another_kind_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("operation,provider\na,b\n")
    with pytest.raises(ValueError, match="columns"):
        records.write_records(path, rows())
    assert path.read_text() == "operation,provider\na,b\n"


# --- overhead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "arm", "share", "expected"),
    [
        (CONVENTIONAL, "basic", 0.0, (1, 1, 1)),
        (OURS, "basic", 0.0, (1, 1, 1)),
        (CONVENTIONAL, "fgsm", 0.5, (2, 2, 2)),  # the whole batch, and weight gradients
        (EFFICIENT, "fgsm", 0.5, (1.5, 1.5, 1)),
        (OURS, "fgsm", 0.5, (1.5, 1.5, 1)),
        (OURS, "fast-newton", 0.5, (1.5, 1.5, 1)),
        (OURS, "fast-newton", 1.0, (2, 2, 1)),
        (OURS, "bim-3", 0.5, (2.5, 2.5, 1)),
        (EFFICIENT, "segpgd-3", 1.0, (4, 4, 1)),
        (CONVENTIONAL, "pgd-3", 0.5, (4, 4, 4)),
    ],
)
def test_counted_passes(training: Training, column: str, arm: str, share: float, expected: tuple[float, ...]) -> None:
    passes = Passes(training).count(Step(column, arm, share))
    assert (passes.forward, passes.backward, passes.weights) == expected


def test_weight_gradients_of_half_a_batch_count_half(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_one_image(column: str, arm: str, share: float) -> torch.Tensor:
        training.attack(column, arm, training.images[:1], training.labels[:1])
        return training.images

    monkeypatch.setattr(training, "with_adversarial", of_one_image)
    passes = Passes(training).count(Step(CONVENTIONAL, "fgsm", 0.5))
    assert (passes.forward, passes.backward, passes.weights) == (1.5, 1.5, 1.5)


def test_the_parts_make_up_the_step(training: Training) -> None:
    begin = overhead.time.perf_counter()
    parts = overhead.phases_of(training, Step(OURS, "fast-newton", 0.5))
    milliseconds = 1e3 * (overhead.time.perf_counter() - begin)
    assert set(parts) == set(overhead.PHASES)
    assert min(parts.values()) > 0
    assert sum(parts.values()) < milliseconds
    basic = overhead.phases_of(training, Step(CONVENTIONAL, "basic", 0.0))
    assert [name for name, value in basic.items() if value == 0] == list(overhead.PHASES[:3])


@pytest.mark.parametrize("column", overhead.COLUMNS)
def test_the_order_of_the_parts(training: Training, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    """What follows the gradient of an attack's images is glue again."""
    marks: list[str] = []
    mark = overhead.Clock.mark

    def noted(clock: overhead.Clock, phase: str) -> None:
        marks.append(phase)
        mark(clock, phase)

    monkeypatch.setattr(overhead.Clock, "mark", noted)
    overhead.phases_of(training, Step(column, "bim-3", 0.5))
    attack = ["attack forward", "attack glue", "attack backward", "attack glue"]
    assert marks == ["attack glue", *3 * attack, "forward", "loss", "backward", "optimiser", "end"]


def test_parts_belong_to_the_mark_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 3.5, 7.5, 7.75])
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(times))
    clock = overhead.Clock(CPU)
    for phase in ("attack glue", "attack forward", "attack glue", "loss", "end"):
        clock.mark(phase)
    found = {name: value for name, value in clock.milliseconds().items() if value}
    assert found == {"attack glue": 4500.0, "attack forward": 2000.0, "loss": 250.0}


def test_a_step_changes_no_weight_and_leaves_no_gradient(training: Training) -> None:
    before = [p.detach().clone() for p in training.model.parameters()]
    for column in overhead.COLUMNS:
        training.step(column, "bim-3", 0.5)
    assert all(
        torch.equal(p, old) and p.grad is None for p, old in zip(training.model.parameters(), before, strict=True)
    )
    assert training.model.training


@pytest.mark.parametrize("column", overhead.COLUMNS)
def test_exactly_the_chosen_images_are_attacked(training: Training, column: str) -> None:
    clean = training.images.clone()
    for share, chosen in ((0.5, [True, False]), (1.0, [True, True]), (0.5, [True, False])):
        images = training.with_adversarial(column, "fgsm", share)
        assert (images != clean).flatten(1).any(1).tolist() == chosen
    assert torch.equal(training.images, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_columns_agree(training: Training, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In bfloat16, as on a GPU, too."""
    monkeypatch.setattr(training, "dtype", dtype)
    overhead.check(training, overhead.ARMS, overhead.COLUMNS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_attack_is_not_timed(training: Training, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(training, "dtype", dtype)
    right = overhead.usual_newton_step
    monkeypatch.setattr(overhead, "usual_newton_step", lambda *tensors: (tensors[0] + right(*tensors)) / 2)
    with pytest.raises(RuntimeError, match=r"fast-newton, segadv .* elements agree"):
        overhead.check(training, ["fast-newton"], [OURS])


def test_a_wrong_loss_is_not_timed(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = training.losses[OURS]
    monkeypatch.setitem(training.losses, OURS, lambda logits, labels: 1.01 * ours(logits, labels))
    with pytest.raises(RuntimeError, match="loss, segadv"):
        overhead.check(training, [], [OURS])
    # the right value with a wrong gradient
    monkeypatch.setitem(
        training.losses, OURS, lambda logits, labels: ours(logits.detach() + 1.01 * (logits - logits.detach()), labels)
    )
    with pytest.raises(RuntimeError, match="weight gradients, segadv"):
        overhead.check(training, [], [OURS])


def test_an_attack_that_leaves_its_weight_gradients_is_not_timed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.model, "zero_grad", lambda: None)
    with pytest.raises(RuntimeError, match="weight gradients, conventional"):
        overhead.check(training, ["fgsm"], [CONVENTIONAL])
    training.optimizer.zero_grad()


def test_overhead_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overhead.csv"
    arms = ["fgsm", "fast-newton"]
    where = records.Where("cityscapes19", torch.float32, CPU)  # a file may hold rows of other benchmarks too
    records.write_records(path, [where.record("l1_norm", "segadv", "forward", [np.ones(1)], unit="ms")])
    assert overhead.main(["--quick", "--device", "cpu", "--arms", *arms, "--write", str(path)]) == 0
    found = {(r.operation, r.provider, r.mode): r for r in records.read_records(path)}
    modes = [f"{arm}, p = {share}" for arm in arms for share in ("0.5", "1")]
    parts = {f"part: {phase}" for phase in overhead.PHASES}
    for column in overhead.COLUMNS:
        assert found["training step", column, "basic"].p50 > 0
        for mode in modes:
            step = found["training step", column, mode]
            assert step.low <= step.p50 <= step.high
            assert parts <= {name for name, *rest in found if rest == [column, mode]}
            basic = found["training step", column, "basic"]
            assert found["overhead", column, mode].p50 == pytest.approx(100 * (step.p50 / basic.p50 - 1), abs=0.1)
            assert found["peak memory", column, mode].p50 >= 0
    expected = {(CONVENTIONAL, "0.5"): 100, (EFFICIENT, "0.5"): 100 / 3, (OURS, "0.5"): 100 / 3, (OURS, "1"): 200 / 3}
    for (column, share), percent in expected.items():
        assert found["cost model", column, f"fgsm, p = {share}"].p50 == pytest.approx(percent, abs=1e-3)
    printed = capsys.readouterr().out
    assert "12.52 %" not in printed  # the paper's FGSM, of another network
    assert overhead.paper_values("pspnet50, 2 x 3 x 192 x 192", "fgsm, p = 0.5") == pytest.approx(
        {"paper, Cityscapes": 12.52, "paper, PASCAL VOC": 31.76}
    )
    assert printed.count("fast-newton less fgsm") == 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_network_that_fails_does_not_take_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a missing matplotlib."""
    path = tmp_path / "overhead.csv"

    def without_weights(num_classes: int) -> torch.nn.Module:
        raise ImportError("No module named 'transformers'")

    broken = replace(overhead.MODELS["segformer-b0"], build=without_weights)
    monkeypatch.setitem(overhead.MODELS, "segformer-b0", broken)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    few = ["--arms", "fgsm", "--columns", OURS, "--shares", "1"]
    models = ["--models", "segformer-b0", "small"]
    assert overhead.main(["--quick", "--device", "cpu", *models, *few, "--write", str(path)]) == 1
    assert {row.case.partition(",")[0] for row in records.read_records(path)} == {"small"}
    printed = capsys.readouterr()
    assert "No module named 'transformers'" in printed.err
    assert printed.out.endswith("failed: segformer-b0\n")
    assert "no picture of them: " in printed.out
    assert not path.with_suffix(".png").exists()


def test_fast_newton_is_shown_beside_fgsm() -> None:
    (row, _) = rows()
    modes = {share: f"fast-newton, p = {share}" for share in ("0.5", "1")}
    found = [
        replace(row, operation="overhead", provider=OURS, mode=modes["0.5"]),
        replace(row, operation="training step", provider=OURS, mode="basic"),
        *(
            replace(row, operation=overhead.NEWTON_OVER_FGSM, provider=OURS, mode=mode, p50=value, low=-3.0, high=9.0,
                    unit="points", rounds=9)
            for value, mode in zip((3.0, -1.0), modes.values(), strict=True)
        ),
    ]  # fmt: skip
    lines = [line.split() for line in overhead.report("small, 8 x 3", found).splitlines()]
    start = lines.index(["fast-newton", "less", "fgsm", OURS])
    assert lines[start + 1] == ["p", "=", "0.5", "3.0", "[-3.0,", "9.0]", "points"]
    assert lines[start + 2] == ["p", "=", "1", "-1.0", "[-3.0,", "9.0]", "points"]


def test_quick_figures_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for module in (overhead, peers):
        with pytest.raises(SystemExit, match="not kept"):
            module.main(["--quick", "--write"])


# --- peers --------------------------------------------------------------------------------------------------------


def test_peers_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.csv"
    assert peers.main(["--quick", "--device", "cpu", "--no-compile", "--steps", "3", "--write", str(path)]) == 0
    found = {(r.operation, r.provider): r for r in records.read_records(path)}
    printed = capsys.readouterr().out
    expected = {name: ["eager", "segadv"] for name in peers.COMPARISONS}
    for name, peer in [("jaccard", "torchmetrics"), ("segformer", "transformers")]:
        expected[name].append(peer)  # the tests have these
    for name, peer in [("fgsm", "torchattacks"), ("pgd", "torchattacks"), ("segpgd", "cospgd"), ("cospgd", "cospgd")]:
        if f"{peer} is left out" not in printed:
            expected[name].append(peer)
    for name, providers in expected.items():
        assert {provider for operation, provider in found if operation == name} == set(providers)
        for provider in providers:
            time, ours = found[name, provider], found[name, "segadv"]
            assert 0 < time.low <= time.p50 <= time.high
            by_ours = found[f"{name}, time by segadv's", provider]
            assert by_ours.p50 == pytest.approx(time.p50 / ours.p50, rel=1e-2)
            assert found[f"{name}, peak memory", provider].p50 >= 0
    assert "3 steps" in found["pgd", "eager"].mode


def test_a_peer_with_other_images_is_not_timed() -> None:
    compared = peers.comparison("pgd", CPU, quick=True, steps=3, compiled=False)
    with compared.checking():
        (right,) = compared.calls["eager"]()
    assert right.dtype is torch.float64
    images = peers.Attacks.on(CPU, quick=True, steps=3).images.double()
    for wrong in (images, images + 0.9 * (right - images), right * math.nan, right.float(), right[:1]):
        checked = replace(compared, calls={**compared.calls, "wrong": lambda wrong=wrong: (wrong,)}).checked()
        assert checked.calls.keys() == compared.calls.keys()
        assert "pgd, wrong against eager" in checked.differing[0]
    checked = replace(compared, calls={**compared.calls, "segadv": lambda: (images,)}).checked()
    assert not checked.calls
    assert "pgd, segadv against eager" in checked.differing[0]


def test_a_metric_that_differs_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compared = peers.jaccard(CPU, quick=True)
    (right,) = compared.calls["eager"]()
    assert 0 < right < 1
    assert not compared.checked().differing
    for wrong in (1.001 * right, right * math.nan):
        broken = replace(compared, calls={**compared.calls, "wrong": lambda wrong=wrong: (wrong,)})
        monkeypatch.setattr(peers, "jaccard", lambda device, *, quick, broken=broken: broken)
        path = tmp_path / "peers.csv"
        assert peers.main(["--quick", "--device", "cpu", "--only", "jaccard", "--write", str(path)]) == 1
        assert "not timed, its results differ: jaccard, wrong against eager" in capsys.readouterr().out
        assert {row.provider for row in records.read_records(path)} == set(compared.calls)


def test_a_peer_that_is_missing_is_named() -> None:
    calls, missing = peers.with_peers({}, {"other": lambda: peers.package("no_such_package", "pip install other")})
    assert calls == {}
    assert "no_such_package is left out" in missing[0]
    assert missing[0].endswith("pip install other")


# --- device: what does not need a GPU -------------------------------------------------------------------------------


def test_sanitizer_runs_every_tool_and_names_those_that_find_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ntest "$2" = racecheck && exit 9\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = device.Run(CPU, tmp_path / "cpu.csv")
    device.part_sanitizer(run)
    assert run.failed == ["compute-sanitizer --tool racecheck: exit status 9"]
    assert not run.left_out
    lines = (tmp_path / "log").read_text().splitlines()
    lines.sort(key=lambda line: line.split()[1])  # they run side by side
    assert [line.split()[1] for line in lines] == ["initcheck", "memcheck", "racecheck", "synccheck"]
    assert all("every_walk" in line for line in lines)
    # initcheck would take what PyTorch's kernels write for uninitialised
    assert ["--kernel-name kns=segadv" in line for line in lines] == [False, True, True, True]
    monkeypatch.setattr(device, "our_backends", lambda _: [])
    device.part_sanitizer(run)
    assert run.left_out == ["compute-sanitizer: the CUDA kernels are missing"]
    assert len((tmp_path / "log").read_text().splitlines()) == len(lines)


def test_commands_side_by_side_keep_all_that_they_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, ended = tmp_path / "begun", device._ended
    programs = {
        "good": "import os, time\n"
        f"while not os.path.exists({str(begun)!r}): time.sleep(0.01)\n"
        "for i in range(100): print('line', i, 'x' * 300)",
        "bad": "raise SystemExit('went wrong')",
        "slow": f"import os, time; print(os.environ['GIVEN'], flush=True); open({str(begun)!r}, 'w'); time.sleep(600)",
    }
    commands = {what: [sys.executable, "-c", program] for what, program in programs.items()}
    run = device.Run(CPU, tmp_path / "new" / "gpu.csv")
    whole, kept = tmp_path / "new" / "gpu-tests.log", []

    def until_two_have(processes: Any, _: float) -> Iterator[Any]:
        yield from ended(list(processes)[:2], 60)
        kept.append(whole.read_text())

    monkeypatch.setattr(device, "_ended", until_two_have)
    device._side_by_side(run, commands, "tests", {"GIVEN": "told"})
    assert (run.failed, run.left_out) == (["bad: exit status 1", "slow: stopped, the time was up"], [])
    assert "\nbad\nwent wrong\n" in kept[0]
    assert "\ngood\n" + "".join(f"line {i} {'x' * 300}\n" for i in range(100)) in kept[0]
    assert whole.read_text().startswith(kept[0] + "\nslow\ntold\n")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("line ")] == [str(i) for i in range(85, 100)]
    assert max(len(line) for line in lines if line.startswith("line ")) == 200
    assert "went wrong" in lines


def test_the_kernels_of_the_tests_are_built_with_the_clone_s_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where segadv is not installed, which tests/emulated.py imports."""
    commands: list[tuple[list[str], Path]] = []
    with monkeypatch.context() as patch:
        patch.setattr(device, "install_native_core", lambda: None)
        patch.setattr(device, "run_apart", lambda *_, **__: (0, "ok"))
        patch.setattr(device.signal, "signal", lambda *_: None)
        patch.setattr(subprocess, "run", lambda command, *, cwd, check: commands.append((command, cwd)))
        assert device.main(["--only", "tests", "--dry-run", "--results", str(tmp_path)]) == 0
    (((python, option, build), folder),) = commands
    code = f"{build}; import segadv; print(segadv.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(
        [python, option, code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(shown.stdout.strip()) == device.ROOT / "segadv" / "__init__.py"


@pytest.mark.parametrize("backend", ["native", "cuda-emulated"], indirect=True)
def test_the_walks_run(backend: str) -> None:
    """They are those of the CUDA kernels."""
    device.every_walk(CPU)


def test_rows_of_a_device_and_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "our_backends", lambda device: ["native"])
    run = device.Run(CPU, tmp_path / "gpu.csv", dry=True)
    run.measure_copies()
    names = ["loss_and_grad, segpgd", "newton_step"]
    device.measure_operations(run, run.cases["voc21"], names, full_resolution=False, dtypes=(torch.float32,))
    assert not run.failed
    found = {(r.operation, r.provider): r for r in records.read_records(run.path)}
    named = ("upsample + loss_and_grad, segpgd", "newton_step")
    belonging = ("", *(f", {name}" for name in device.BELONGING if name != device.OVER_BARE))
    expected = {(n + what, provider) for n in named for what in belonging for provider in ("native", "eager")}
    assert found.keys() == expected | {
        ("copy" + what, "torch") for what in ("", f", {device.BANDWIDTH}", f", {device.OF_COPY}")
    }
    assert found[f"copy, {device.OF_COPY}", "torch"].p50 == 1
    # images and gradient read, images written: 2 x 3 x 32 x 32 float32 each
    time, speed = found["newton_step", "native"], found[f"newton_step, {device.BANDWIDTH}", "native"]
    assert 1e6 * speed.p50 * time.p50 == pytest.approx(3 * 24576, rel=0.01)
    of_copy = found[f"newton_step, {device.OF_COPY}", "native"]
    smallest = run.copies[min(run.copies)]
    assert of_copy.p50 * smallest == pytest.approx(speed.p50, rel=0.01, abs=1e-4 * smallest)
    lines = device.markdown(records.read_records(run.path)).splitlines()
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [(line[0], line[4]) for line in shown if line[4] == "native"] == [(n, "native") for n in sorted(named)]
    assert {line[9] for line in shown if line[4] == "native"} == {"1.00"}
    assert {len(line) for line in shown} == {11}


def test_glue_times_no_backend_with_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = segadv.models.small_pspnet(19).eval().requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(device, "our_backends", lambda device: ["native", "triton"])
    genuine = segadv.fast_newton_step

    def wrong(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert images.dtype is torch.float64
        return images if backends.requested() == "triton" else genuine(model, images, labels)

    monkeypatch.setattr(segadv, "fast_newton_step", wrong)
    run = device.Run(CPU, tmp_path / "gpu.csv", dry=True)
    assert device._right_backends(run, "small", model, 64) == ["native"]
    assert run.failed == ["small: triton"]
    assert all(map(torch.equal, model.parameters(), before))


def test_operations_on_a_cpu_write_what_their_table_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Case("tiny", images=1, classes=3, own=4, size=16)
    monkeypatch.setattr(ops, "CASES", {"cityscapes19": tiny})
    path = tmp_path / "cpu.csv"
    assert ops.main(["--rounds", "3", "--no-compile", "--write", str(path)]) == 0
    found = {(r.operation, r.provider, r.mode): r for r in records.read_records(path)}
    times = {key for key in found if not key[0].endswith(records.PEAK_MEMORY)}
    assert found.keys() - times == {(f"{name}, {records.PEAK_MEMORY}", *rest) for name, *rest in times}
    both, value = "forward + backward", "forward"
    expected = {
        *product(
            ("upsample + averaged_gain", "averaged_gain"), ("segadv", "segadv one pass", "eager", "eager, max"), (both,)
        ),
        *product(("upsample + averaged_gain", "averaged_gain"), ("segadv", "eager", "eager, max"), (value,)),
        *product(("upsample + cross_entropy", "cross_entropy"), ("segadv", "segadv one pass", "eager"), (both,)),
        *product(("upsample + cross_entropy", "cross_entropy"), ("segadv", "eager"), (value,)),
        *product(("upsample + confusion_matrix", "confusion_matrix"), ("segadv", "eager"), (value,)),
        *product(("averaged_gain", "cross_entropy"), ("floor",), (both,)),
        *product(("newton_step", "sign_step"), ("segadv", "eager", "floor"), (value,)),
    }
    assert times == expected
    assert {r.rounds for key, r in found.items() if key in times} == {3}
    assert {r.unit for key, r in found.items() if key in times} == {"ms"}


def test_a_measurement_that_fails_does_not_touch_the_next_unless_the_device_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    done: list[str] = []
    run = device.Run(torch.device("cuda"), tmp_path / "gpu.csv")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run.attempt("first", broken)
    run.attempt("second", lambda: done.append("second"))
    assert (run.failed, run.left_out, done) == (["first"], [], ["second"])
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    run.attempt("third", broken)
    run.attempt("fourth", lambda: done.append("fourth"))
    assert run.failed[1:] == ["third", "third: the device, which takes nothing more in this process"]
    assert (run.left_out, done) == (["fourth: the device had failed"], ["second"])


def test_nothing_runs_on_after_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it has started, nor the part itself when its time is up."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "device.py").write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('begun', 'w').write(str(child.pid))\n"
        "os.replace('begun', 'child')\n"
        "time.sleep(60 if 'tune' in sys.argv else 0)\n"
        "sys.exit(3 if 'glue' in sys.argv else 1 if 'compile' in sys.argv else 0)\n"
    )
    child = tmp_path / "child"

    class Popen(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or "tune" not in self.args:  # type: ignore[operator]
                return super().wait(timeout)
            while not child.exists() and self.poll() is None:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)  # as soon as the part has begun

    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device.subprocess, "Popen", Popen)
    outcomes = {
        "launch": (0, "ok"),
        "tune": (device.FAILED, f"ended after {device.PART_SECONDS} s"),
        "glue": (device.LEFT_OUT, "something was left out"),
        "compile": (1, "exit status 1"),
    }
    for part, outcome in outcomes.items():
        child.unlink(missing_ok=True)
        assert device.run_apart(part, tmp_path, dry=False) == outcome
        for _ in range(200):  # it dies soon, not at once
            if is_gone(int(child.read_text())):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"what {part} has started runs on")


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_copy_without_history_names_the_commit_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_output", lambda *command: "")
    assert measure.commit.__wrapped__() == "unknown"
    monkeypatch.setenv("SEGADV_COMMIT", "abc1234")
    assert measure.commit.__wrapped__() == "abc1234"
    monkeypatch.setattr(segadv, "build_info", lambda: {"sources": "of something else"})
    assert measure.commit.__wrapped__() == "abc1234-dirty"
    monkeypatch.setattr(segadv, "build_info", lambda: {"native": False})
    assert measure.commit.__wrapped__() == "abc1234"


def test_a_core_of_other_sources_makes_a_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = measure.Path(measure.__file__).parents[1]
    shutil.copy(root / "CMakeLists.txt", tmp_path)
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))
    monkeypatch.setenv("SEGADV_COMMIT", "abc1234")
    assert measure.sources() == segadv.build_info()["sources"], "the installed core is of other sources: install again"
    assert measure.commit.__wrapped__() == "abc1234"
    header = tmp_path / "csrc" / "common" / "margin.h"
    text = header.read_text()
    for change in (lambda: header.write_text(text + "\n"), lambda: header.rename(header.with_name("gain.h"))):
        change()
        assert measure.commit.__wrapped__() == "abc1234-dirty"
    header.with_name("gain.h").rename(header)
    header.write_text(text)
    (tmp_path / "CMakeLists.txt").write_text("# other flags")
    assert measure.commit.__wrapped__() == "abc1234-dirty"


def test_a_commit_is_dirty_where_code_differs_and_not_for_rows_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ("benchmarks/results/cpu.csv", "README.md", "docs/one.md", "docs/overhead.png")
    for name in (*made, "segadv/code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))
    monkeypatch.setattr(measure, "sources", lambda: segadv.build_info()["sources"])
    monkeypatch.setenv("SEGADV_COMMIT", "of-another-clone")
    for command in (["init", "-q"], ["add", "."], [*person, "commit", "-qm", "one"]):
        assert measure.commit.__wrapped__().startswith("of-another-clone"), "there is none yet"
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    clean = measure.commit.__wrapped__()
    assert re.fullmatch("[0-9a-f]{10}", clean)
    for name in made:
        (tmp_path / name).write_text("two")
    assert measure.commit.__wrapped__() == clean
    for name in ("benchmarks/results/new.csv", "notes.py"):  # not of what is measured
        (tmp_path / name).write_text("new")
    assert measure.commit.__wrapped__() == clean
    code = tmp_path / "segadv" / "code.py"
    for text, mark in (("two", "-dirty"), ("one", "")):
        code.write_text(text)
        assert measure.commit.__wrapped__() == clean + mark
    code.with_name("new.py").write_text("new")
    assert measure.commit.__wrapped__() == f"{clean}-dirty"
