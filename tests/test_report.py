"""benchmarks.report: the committed tables are those of the committed rows, and what is wrong is told."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import attacks, device, overhead, peers, report, scaling, trainer
from benchmarks import test_bench_cpu as guard
from benchmarks.records import PEAK_MEMORY, Record, read_records, write_records
from segadv.comparison import PAPER_ARMS
from segadv.results import EvaluationResult, Measurement

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NAN = float("nan")


def record(
    operation: str, provider: str = "", mode: str = "", case: str = "a case", p50: float = 1.0, **values: Any
) -> Record:
    known = {
        "dtype": "float32", "device": "cpu", "threads": 2, "thp": 0, "p20": p50 - 0.1, "p80": p50 + 0.1,
        "low": p50 - 0.5, "high": p50 + 0.5, "unit": "", "rounds": 9, "commit": "c0ffee", "versions": "torch 2.13.0",
        "machine": "a machine",
    }  # fmt: skip
    return Record(operation=operation, provider=provider, mode=mode, case=case, p50=p50, **known | values)


def cells(text: str, start: str) -> list[str]:
    """Of the only row of a Markdown table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of what the report reads and writes."""
    for name in (*report.DOCUMENTS, *(picture.path for picture in report.PICTURES)):
        if (report.ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(report.ROOT / name, tmp_path / name)
    shutil.copytree(report.ROOT / report.RESULTS, tmp_path / report.RESULTS, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def with_block(root: Path, name: str) -> None:
    """Puts an empty table into the benchmarks' README."""
    path = root / "benchmarks/README.md"
    path.write_text(f"{path.read_text()}\n<!-- begin: {name} -->\n<!-- end: {name} -->\n")


def edited(text: str) -> str:
    """With another digit in a ratio of the operations' table."""
    return re.sub(
        r"\d( x \| [\d.]+ x \|)", lambda match: ("2" if match[0][0] == "1" else "1") + match[1], text, count=1
    )


# --- in step ------------------------------------------------------------------------------------------------------


def test_the_committed_documents_are_in_step_with_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr()
    assert "operations" in report.blocks_in(report.ROOT)


def test_a_changed_row_is_found_and_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / report.RESULTS / "cpu.csv"
    changed = [
        row for row in read_records(path) if (row.operation, row.provider, row.thp) == ("newton_step", "segadv", 0)
    ]
    write_records(path, [replace(row, p50=0.918) for row in changed])
    documents = {name: (root / name).read_text() for name in report.DOCUMENTS}
    assert report.main(["--check"], root) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: out of step with the rows in benchmarks/results"
        for name in ("README.md", "benchmarks/README.md", "benchmarks/results/cpu.md")
    ]
    assert {name: (root / name).read_text() for name in report.DOCUMENTS} == documents, "--check has written"
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    assert cells((root / "README.md").read_text(), "newton_step")[4].startswith("0.9 ms, ")
    # the lines outside the table are as before
    outside = [re.sub(r"(<!-- begin: operations -->).*(<!-- end: operations -->)", r"\1\2", text, flags=re.DOTALL)
               for text in (documents["README.md"], (root / "README.md").read_text())]  # fmt: skip
    assert outside[0] == outside[1]


def test_a_table_edited_by_hand_is_found(root: Path) -> None:
    path = root / "README.md"
    text = path.read_text()
    path.write_text(edited(text))
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        ("<!-- begin: nonsense -->\n<!-- end: nonsense -->", "no table is called 'nonsense'"),
        ("<!-- begin: operations -->", "markers do not come in pairs"),
        ("<!-- end: operations -->", "markers do not come in pairs"),
        ("<!-- begin: gpu -->\n<!-- end: data -->", "markers do not come in pairs"),
        ("<!-- begin: peers -->\n<!-- end: peers -->", "peers-cpu.csv: no such file"),
    ],
)
def test_markers_that_make_no_sense(marked: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / report.RESULTS / "peers-cpu.csv").unlink(missing_ok=True)
    (root / "README.md").write_text("No table needs those rows.\n")
    path = root / "benchmarks/README.md"
    path.write_text(f"A text.\n\n{marked}\n")
    before = path.read_text()
    for arguments in ([], ["--check"]):
        assert report.main(arguments, root) == 1
        assert message in capsys.readouterr().err
    assert path.read_text() == before


def test_a_document_is_written_whole_or_not_at_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "README.md"
    path.write_text(edited(path.read_text()))
    before = path.read_bytes()

    def full(self: Path, text: str, **options: Any) -> int:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert report.main([], root) == 1
    assert path.read_bytes() == before
    assert [entry.name for entry in root.iterdir() if entry.name.startswith(".")] == []


# --- operations ---------------------------------------------------------------------------------------------------


def test_a_row_of_the_operations_from_the_file_itself() -> None:
    """One row worked out by itself: time and memory of each, ratios to the better of the others."""
    ms: dict[str, float] = {}
    megabytes: dict[str, float] = {}
    with (report.ROOT / report.RESULTS / "cpu.csv").open() as file:
        for row in csv.DictReader(file):
            key = (row["mode"], row["case"], row["thp"], row["dtype"], row["threads"])
            if key == ("forward + backward", "ade150", "0", "float32", "2"):
                if row["operation"] == "upsample + cross_entropy":
                    ms[row["provider"]] = float(row["p50"])
                elif row["operation"] == "upsample + cross_entropy, peak memory":
                    megabytes[row["provider"]] = float(row["p50"])
    text = report.operations(report.ROOT / report.RESULTS)
    (line,) = [line for line in text.splitlines() if "cross_entropy, value and g" in line and "1 x 150 x 128²" in line]
    shown = re.findall(r"([\d.]+) ms, ([\d.]+) MB", line)
    for provider, found in zip(("eager", "compile", "segadv"), shown, strict=True):
        assert [*map(float, found)] == pytest.approx([ms[provider], megabytes[provider]], rel=0.02, abs=0.051)
    faster, less = map(float, re.findall(r"([\d.]+) x \|", line))
    assert faster == pytest.approx(min(ms["eager"], ms["compile"]) / ms["segadv"], abs=0.051)
    assert less == pytest.approx(min(megabytes["eager"], megabytes["compile"]) / megabytes["segadv"], abs=0.051)


@pytest.mark.parametrize(
    ("operation", "mode", "case", "provider", "thp"),
    [
        ("upsample + averaged_gain", "forward + backward", "ade150", "compile", 0),
        ("upsample + averaged_gain", "forward + backward", "cityscapes19", "eager, max", 0),
        ("sign_step", "forward", "cityscapes19", "segadv", 0),
        ("sign_step, peak memory", "forward", "cityscapes19", "eager", 0),
        ("newton_step", "forward", "cityscapes19", "compile", 1),
    ],
)
def test_a_missing_row_of_the_operations_is_an_error(
    operation: str, mode: str, case: str, provider: str, thp: int, root: Path
) -> None:
    path = root / report.RESULTS / "cpu.csv"
    rows = read_records(path)
    key = (operation, mode, case, provider, thp, "float32")
    kept = [row for row in rows if (row.operation, row.mode, row.case, row.provider, row.thp, row.dtype) != key]
    assert len(kept) == len(rows) - 1
    path.unlink()
    write_records(path, kept)
    with pytest.raises(report.ReportError, match=re.escape(f"no row of {operation}, {mode}, {case}, {provider}")):
        report.operations(path.parent)


def test_ways_and_floors(tmp_path: Path) -> None:
    """Above the table of all operations; a row that is missing is an error."""
    path = tmp_path / "cpu.csv"
    rows = read_records(report.ROOT / report.RESULTS / path.name)
    made = {
        ("upsample + averaged_gain", "eager"): 330.0, ("upsample + averaged_gain", "eager, max"): 220.0,
        ("averaged_gain", "eager"): 210.0, ("averaged_gain", "eager, max"): 120.0,
        ("averaged_gain", "segadv"): 15.0, ("averaged_gain", "floor"): 10.0,
        ("cross_entropy", "segadv"): 31.0, ("cross_entropy", "floor"): 10.0,
    }  # fmt: skip
    key = ("forward + backward", "cityscapes19", 0, "float32", 2)

    def told(row: Record) -> bool:
        return (row.operation, row.provider) in made and (row.mode, row.case, row.thp, row.dtype, row.threads) == key

    changed = [replace(row, p50=made[row.operation, row.provider]) if told(row) else row for row in rows]
    assert sum(map(told, rows)) == len(made)
    write_records(path, changed)
    words = " ".join(report.all_operations(tmp_path).partition("\n|")[0].split())
    assert "take 330 ms instead of 220 ms with `max` on cityscapes19, resampled, and 210 ms instead of 120 ms" in words
    assert "ours take 1.5 (`averaged_gain`) and 3.1 (`cross_entropy`) times the floor" in words
    for missing in filter(told, changed):
        path.unlink()
        write_records(path, [row for row in changed if row is not missing])
        with pytest.raises(report.ReportError, match=re.escape(f"no row of {missing.operation}, forward + backward")):
            report.all_operations(tmp_path)


def test_memory_of_less_than_a_megabyte(tmp_path: Path) -> None:
    """Is told down to 0.1, and counts as one."""
    made = {
        ("sign_step", "eager"): 42.7, ("sign_step", "compile"): 50.0, ("sign_step", "segadv"): 0.5,
        ("newton_step", "eager"): 60.0, ("newton_step", "compile"): 42.7, ("newton_step", "segadv"): 0.05,
        ("averaged_gain", "eager"): 9.0, ("averaged_gain", "eager, max"): 5.0, ("averaged_gain", "compile"): 7.0,
        ("averaged_gain", "compile, max"): 8.0, ("averaged_gain", "segadv"): 2.0,
    }  # fmt: skip
    rows = read_records(report.ROOT / report.RESULTS / "cpu.csv")
    of = {row: made.get((row.operation.removesuffix(f", {PEAK_MEMORY}"), row.provider)) for row in rows}
    write_records(
        tmp_path / "cpu.csv",
        [row if p50 is None or row.unit != "MB" else replace(row, p50=p50) for row, p50 in of.items()],
    )
    text = report.operations(tmp_path)
    for name, told, less in (
        ("sign_step", "0.5 MB", "> 42 x"),
        ("newton_step", "< 0.1 MB", "> 42 x"),
        ("averaged_gain, value and gradient", "2.0 MB", "2.5 x"),
    ):
        shown = cells(text, name)
        assert (shown[4].partition(", ")[2], shown[6]) == (told, less)


def rows_of_layouts() -> list[Record]:
    """Eager with max is its faster way; each layout has a time of its own."""
    layouts = [("float32", "", 10.0), ("float32", ", channels_last", 20.0)]
    layouts += [("bfloat16", "", 5.0), ("bfloat16", ", channels_last", 4.0)]
    names = ("averaged_gain", "cross_entropy", "confusion_matrix")
    operations = [*names, *(f"upsample + {name}" for name in names), "newton_step", "sign_step"]
    times = {"eager": 300.0, "eager, max": 200.0, "compile": 120.0, "compile, max": 100.0}
    both = ("averaged_gain", "cross_entropy")
    rows = [
        record(name, provider, f"forward{' + backward' * name.endswith(both)}", case + suffix, p50, dtype=dtype)
        for name in operations
        for case in ("cityscapes19", "ade150", "noise19")
        for dtype, suffix, ms in layouts
        for provider, p50 in (times | {"segadv": ms}).items()
        if name.endswith("averaged_gain") or "max" not in provider
    ]
    return [*rows, *(replace(row, thp=1, p50=77.0) for row in rows)]


def test_layouts(tmp_path: Path) -> None:
    rows = rows_of_layouts()
    write_records(tmp_path / "cpu.csv", rows)
    text = report.layouts(tmp_path)
    of_layouts = [["10.0 ms, 20.0 x", "20.0 ms, 10.0 x", "5.0 ms, 40.0 x", "4.0 ms, 50.0 x"]] * 2
    lines = [line for line in text.splitlines() if line.startswith("| averaged_gain, value and gradient")]
    assert [line.strip("| ").split(" | ")[2:] for line in lines] == of_layouts
    assert "step" not in text, "what has no logits"
    key = ("confusion_matrix", "eager", "bfloat16", 0)
    needed = [row for row in rows if (row.operation, row.provider, row.dtype, row.thp) == key]
    for missing in (row for row in needed if "noise" not in row.case):
        (tmp_path / "cpu.csv").unlink()
        write_records(tmp_path / "cpu.csv", [row for row in rows if row is not missing])
        with pytest.raises(report.ReportError, match="0 rows of provider 'eager'"):
            report.layouts(tmp_path)


def test_repeated(tmp_path: Path) -> None:
    key = ("over conventional basic", overhead.OURS, "fast-newton, p = 0.5")
    networks = ("small, a size", "segformer-b0, a size")
    steps = [record(*key, case, p50) for case, p50 in zip(networks, (-21.0, -31.0), strict=True)]
    steps += [record("overhead", *key[1:], case, p50) for case, p50 in zip(networks, (41.0, 51.0), strict=True)]
    steps += [record(overhead.GLUE_SHARE, *key[1:], case, p50) for case, p50 in zip(networks, (8.0, 6.0), strict=True)]
    steps = [replace(step, machine="another", commit="decade") for step in steps]
    steps = [replace(step, commit="facade") if step.operation == overhead.GLUE_SHARE else step for step in steps]
    steps.append(replace(steps[0], case="smaller, a size", p50=99.0))
    rows = [replace(row, p50=20.0) if (row.thp, row.provider) == (1, "segadv") else row for row in rows_of_layouts()]
    write_records(tmp_path / "cpu-repeated.csv", [*rows, *steps, replace(steps[0], thp=1, p50=77.0)])
    own = [replace(row, p50=40.0, machine="own") if row.provider == "segadv" else row for row in rows]
    write_records(tmp_path / "cpu.csv", own)
    text = report.repeated(tmp_path)
    title = "averaged_gain, value and gradient"
    assert cells(text, title)[1:] == ["2 x 19 x 712²", "200 ms", "100 ms", "10.0 ms", "10.0 x", "2.5 x"]
    assert cells(text, "sign_step")[1:] == ["2 x 3 x 712²", "300 ms", "120 ms", "10.0 ms", "12.0 x", "3.0 x"]
    words = " ".join(report.repeated_in_a_sentence(tmp_path).split())
    assert ": at 712² upsample + averaged_gain 10.0 times, upsample + cross_entropy 12.0 times, upsample" in words
    assert "on both sides 3.9, 3.9, 3.9 times (a machine; commit c0ffee); Fast Newton's" in words, "77 / 20"
    told = (
        "-21.0 [-21.5, -20.5] % (small) and -31.0 [-31.5, -30.5] % (segformer-b0) over conventional basic training, "
        "41.0 [40.5, 41.5] % (small) and 51.0 [50.5, 51.5] % (segformer-b0) over basic training with the same fused "
        "loss"
    )
    assert words.endswith(f"training step {told} (another; commit decade).")
    text = " ".join(text.split())
    assert f"{told}; of its attack 8.0 [7.5, 8.5] % (small) and 6.0 [5.5, 6.5] % (segformer-b0) are neither" in text
    assert " (a machine; threads 2, torch 2.13.0; commit c0ffee) Fast Newton's training step: " in text
    assert text.endswith(" backward pass. (another; threads 2, torch 2.13.0; commits decade, facade)")


def test_tables_of_a_gpu_appear_with_its_rows(tmp_path: Path) -> None:
    shutil.copy(report.ROOT / report.RESULTS / "cpu.csv", tmp_path)
    assert report.gpus(tmp_path) == "No GPU has been measured yet."

    known = {"mode": "forward", "case": "voc21", "dtype": "bfloat16", "device": "cuda", "threads": 0}
    known["machine"] = "NVIDIA X1, driver 1.2"

    def rows(provider: str, ms: float, of_copy: float = 0.25, operation: str = "confusion_matrix") -> list[Record]:
        return [
            record(operation, provider, p50=ms, unit="ms", **known),
            record(f"{operation}, {PEAK_MEMORY}", provider, p50=9.0, unit="MB", **known),
            record(f"{operation}, {device.EXTRA_MEMORY}", provider, p50=10 * ms, unit="MB", **known),
            record(f"{operation}, {device.BANDWIDTH}", provider, p50=1.0, unit="GB/s", **known),
            record(f"{operation}, {device.OF_COPY}", provider, p50=of_copy, **known),
        ]

    times = {"eager": 0.8, "eager, max": 0.6, "compile": 0.5, "triton": 0.2}
    found = [row for provider, ms in times.items() for row in rows(provider, ms)]
    found += rows("native", 0.1, of_copy=0.75)
    found += [row for name in ("eager", "native") for row in rows(name, 0.01, operation="enqueueing confusion_matrix")]
    found += rows("copy", 1.0, operation="copy")
    # without ours, or without what is usual, there is nothing to compare
    found += rows("eager", 0.3, operation="l1_norm") + rows("native", 0.3, operation="argmax_labels")
    found += rows("eager", 0.8, operation="newton_step") + rows("native", 0.4, operation="newton_step")
    write_records(tmp_path / "nvidia-x1.csv", found)
    write_records(tmp_path / "overhead-nvidia-x1.csv", found)  # another command's
    write_records(tmp_path / "a-machine.csv", [record("sign_step", "segadv")])  # a CPU's
    text = report.gpus(tmp_path)
    assert text.count("### NVIDIA X1\n") == 1
    assert "(NVIDIA X1, driver 1.2; torch 2.13.0; commit c0ffee)" in text
    assert text.count("### ") == 1
    assert text.count("\n| ") == 3, "a header and two rows"
    shown = cells(text, "voc21 | confusion_matrix")[4:]
    assert shown == ["0.600", "0.500", "0.200", "0.100", "5.0 x", "0.75", "5.0", "1.0"]
    assert cells(text, "voc21 | newton_step")[4:] == ["0.800", "", "", "0.400", "2.0 x", "0.25", "8.0", "4.0"]


def test_training_samples(tmp_path: Path) -> None:
    times = {"fused": 20.0, "v2": 180.0, "v2, blur last": 150.0, "v2, crop first": 90.0, "decode": 40.0}
    rows = [
        record(
            "decode" if name == "decode" else "augment", name, "per image", "8x16 to 4x4", ms, p20=ms - 1, p80=ms + 1,
            dtype="uint8", threads=1, unit="ms",
        )
        for name, ms in (times | {"decode + fused": 60.0}).items()
    ]  # fmt: skip
    memory = [replace(row, operation=f"{row.operation}, {PEAK_MEMORY}", p50=1.0, unit="MB") for row in rows]
    write_records(tmp_path / "cpu.csv", rows + memory)
    text = report.training_samples(tmp_path)
    assert cells(text, "torchvision v2, whole image")[1:] == ["180 [179, 181]", "9.0 x"]
    assert cells(text, "decoding the PNG files")[1:] == ["40.0 [39.0, 41.0]", ""]
    assert "8x16 to 4x4 pixels. (a machine; threads 1, torch 2.13.0; commit c0ffee)" in text
    for row in rows:
        (tmp_path / "cpu.csv").unlink()
        write_records(tmp_path / "cpu.csv", memory + [other for other in rows if other is not row])
        with pytest.raises(report.ReportError, match=re.escape(f"no rows of {row.provider};")):
            report.training_samples(tmp_path)


# --- other tables: rows made up -----------------------------------------------------------------------------------


def overhead_rows() -> list[Record]:
    """Of one network; every value is another one."""
    case = "small, 8 x 3 x 256 x 512, 19 classes"
    columns = (overhead.CONVENTIONAL, overhead.EFFICIENT, overhead.OURS)
    rows = [record("training step", column, "basic", case, 100.0 + i) for i, column in enumerate(columns)]
    peak = {"operation": PEAK_MEMORY, "mode": "basic", "unit": "MB", "rounds": 1}
    rows += [record(provider=column, case=case, p50=500.0 + i, **peak) for i, column in enumerate(columns)]
    for i, arm in enumerate(overhead.ARMS):
        mode = f"{arm}, p = 0.5"
        rows += [record("overhead", column, mode, case, 10.0 * j + i, unit="%") for j, column in enumerate(columns, 1)]
        rows.append(record("over conventional basic", overhead.OURS, mode, case, 40.0 + i, unit="%"))
        rows.append(record(overhead.COST_MODEL, overhead.OURS, mode, case, 50.0 + i, unit="%", rounds=1))
    rows.append(record(overhead.GLUE_SHARE, overhead.OURS, "fast-newton, p = 0.5", case, 60.0, unit="%"))
    return rows


def peer_rows() -> list[Record]:
    rows = []
    for i, operation in enumerate(peers.COMPARISONS):
        for j, provider in enumerate(("eager", "segadv", f"package {i}")):
            rows += [
                record(operation, provider, "3 steps", "a case", 10.0 * i + j + 1, unit="ms"),
                record(f"{operation}, time by segadv's", provider, "3 steps", "a case", 1.5 + j, unit="x"),
                record(f"{operation}, peak memory", provider, "3 steps", "a case", 200.0 + i + j, unit="MB"),
            ]
    return [row for row in rows if "time by" not in row.operation or row.provider.startswith("package")]


def attack_rows() -> list[Record]:
    rows = [record(attacks.RUN, "bare pass", p50=95.0, unit="ms")]
    iterative = list(attacks.ITERATIVE)
    for i, name in enumerate(("FGSM", "FastNewton", *iterative)):
        rows += [
            record(attacks.RUN, name, "1 step", p50=100.0 + i),
            record(attacks.OVER_BARE, name, "1 step", p50=5.0 + i),
        ]
    for i, name in enumerate(iterative):
        rows += [record(attacks.STEP, name, p50=110.0 + i), record(attacks.STEP_OVER_BARE, name, p50=15.0 + i)]
        if name != "PGD":
            rows.append(record(attacks.STEP_OVER_PGD, name, p50=1.0 + i))
    return rows


def ladder_rows() -> list[Record]:
    return [record(scaling.LADDER, name, p50=2.0 * i + 1, unit="us") for i, name in enumerate(scaling.RUNGS)]


def growth_rows() -> list[Record]:
    rows = []
    for axis, (values, case) in scaling.AXES.items():
        for value in values:
            threads = value if axis == "threads" else 2
            for i, (operation, provider) in enumerate(
                [("fewest bytes", "floor")]
                + [(f"upsample + {name}", who) for name in scaling.OPERATIONS for who in ("segadv", "eager")]
            ):
                for what in (scaling.TIME, scaling.MEMORY):
                    rows.append(
                        record(f"{operation}, {what}", provider, axis, case(value).name, 1.0 + i, threads=threads)
                    )
    return rows


def demo_rows(seeds: Sequence[int] = (0, 1, 2)) -> list[Record]:
    """The means are multiples of 0.05, the ranges 0.01 to each side."""
    rows = [
        record(report.MIOU, arm, attack, f"eps {eps:g}, seed {seed}", 0.05 * (i + 1) + 0.01 * (seed - 1), rounds=1)
        for i, arm in enumerate(PAPER_ARMS)
        for attack in ("fgsm", "bim-10")
        for eps in (0.0, 0.01, 0.02, 0.03, 0.04)
        for seed in seeds
    ]
    rows += [
        record(report.STEP_SIZE, "fast-newton", "median", f"seed {seed}", 0.07 + 0.01 * seed, rounds=40)
        for seed in seeds
    ]
    return [*rows, record(report.MINUTES, "demo", "", "demo", 31.4, unit="minutes", rounds=1)]


def trainer_rows() -> list[Record]:
    names = (*trainer.WORK, "these together", trainer.TRAINER, trainer.READING, trainer.CHECKPOINT, trainer.PROBE)
    rows = [record(trainer.PART, name, "fast-newton", p50=1.0 + i, unit="ms") for i, name in enumerate(names)]
    return [*rows, record(trainer.SHARE, trainer.TRAINER, "fast-newton", p50=0.7, unit="%")]


ROBUST_ARMS = ("basic", "fast-newton")
COMMIT = f"{'0123456789abcdef' * 2}01234567-dirty"


def robust_rows(trainings: Sequence[int] = (0, 1, 2)) -> list[Record]:
    """What the table shows: its means are multiples of 0.01, the ranges 0.002 to each side."""
    shown = [("worst-case", 0.0), *((attack, 0.03) for attack in ("bim-10", "pgd", "cospgd", "worst-case"))]
    shown += [("worst-case", 0.02), ("worst-case", 0.04)]
    return [
        record(
            report.UNDER_ATTACK, arm, attack,
            f"eps {eps:g}, {100 if eps == 0.03 else 20 if eps else 0} steps, 32 images, training {training}",
            0.1 * (1 + i) + 0.01 * j + 0.002 * (training - 1), rounds=1,
        )
        for training in trainings
        for i, arm in enumerate(ROBUST_ARMS)
        for j, (attack, eps) in enumerate(shown)
    ]  # fmt: skip


def robust_miou_rows() -> list[Record]:
    """What the table shows."""
    shown = [row for row in robust_rows() if row.mode != "pgd" and "eps 0.02" not in row.case]
    attacks = {"bim-10": "cospgd", "cospgd": "cospgd-balanced"}
    shown = [replace(row, mode=attacks.get(row.mode, row.mode)) for row in shown if "eps 0.04" not in row.case]
    shown += [
        replace(row, mode="worst-case-miou", p50=row.p50 - 0.01)
        for row in shown
        if row.mode == "worst-case" and "eps 0.03" in row.case
    ]
    return [*shown, *(replace(row, operation=report.PIXELS_UNDER_ATTACK, p50=row.p50 + 0.5) for row in shown)]


def segpgd_rows() -> list[Record]:
    """What the table shows."""
    return [
        replace(row, mode=attack, p50=row.p50 + 0.01 * i)
        for row in robust_rows()
        if row.mode in ("pgd", "worst-case") and "eps 0.02" not in row.case and "eps 0.04" not in row.case
        for i, attack in enumerate([row.mode] if row.case.startswith("eps 0,") else GU if row.mode == "pgd" else [])
    ]


TABLES: dict[str, tuple[str, Callable[[], list[Record]]]] = {
    "overhead": ("overhead-cpu.csv", overhead_rows),
    "peers": ("peers-cpu.csv", peer_rows),
    "attacks": ("attacks-cpu.csv", attack_rows),
    "calls": ("scaling-cpu.csv", ladder_rows),
    "demo": ("demo.csv", demo_rows),
    "robustness": ("robustness.csv", robust_rows),
    "robustness-miou": ("robustness.csv", robust_miou_rows),
    "robustness-longer": ("robustness-longer.csv", robust_rows),
    "segpgd": ("segpgd.csv", segpgd_rows),
    "trainer": ("trainer-cpu.csv", trainer_rows),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_needed(name: str, tmp_path: Path) -> None:
    """Any one that is missing is an error, and every one is shown or counted; of demo and overhead, what is shown."""
    file, made = TABLES[name]
    rows = made()
    path = tmp_path / file
    write_records(path, rows)
    whole = report.BLOCKS[name](tmp_path)
    words = " ".join(whole.split())
    assert "a machine" in words
    assert "c0ffee" in words
    shown = [row for row in rows if row.operation != report.MIOU or (row.mode, row.case.split(",")[0]) in SHOWN_OF_DEMO]
    if name == "overhead":
        shown = [row for row in shown if row.mode.split(",")[0] in ("basic", *SHOWN_OF_OVERHEAD)]
    for row in shown:
        path.unlink()
        write_records(path, [other for other in rows if other is not row])
        with pytest.raises(report.ReportError):
            report.BLOCKS[name](tmp_path)
    for row in shown[:: max(1, len(shown) // 8)]:
        path.unlink()
        changed = replace(row, p50=row.p50 + 3, low=row.low + 3, high=row.high + 3)
        write_records(path, [changed if other is row else other for other in rows])
        assert report.BLOCKS[name](tmp_path) != whole, row
    path.unlink()
    with pytest.raises(report.ReportError, match=re.escape(f"{file}: no such file")):
        report.BLOCKS[name](tmp_path)


SHOWN_OF_OVERHEAD = ("fgsm", "fast-newton", "bim-3", "segpgd-3")
SHOWN_OF_DEMO = {
    ("fgsm", "eps 0"),
    ("fgsm", "eps 0.01"),
    ("fgsm", "eps 0.03"),
    ("bim-10", "eps 0.01"),
    ("bim-10", "eps 0.03"),
}


@pytest.mark.parametrize("name", ["overhead", "peers", "attacks", "calls", "trainer"])
def test_rows_of_other_threads_or_memory_stand_aside(name: str, tmp_path: Path) -> None:
    file, made = TABLES[name]
    write_records(tmp_path / file, made())
    whole = report.BLOCKS[name](tmp_path)
    others = [replace(row, threads=1, p50=77.0) for row in made()] + [replace(row, thp=1, p50=77.0) for row in made()]
    write_records(tmp_path / file, others)
    assert report.BLOCKS[name](tmp_path) == whole


def test_cells_of_the_overhead(tmp_path: Path) -> None:
    rows = overhead_rows()
    passes = [replace(row, operation="passes: forward", rounds=1) for row in rows if row.operation == "training step"]
    write_records(tmp_path / "overhead-cpu.csv", [*rows, *passes])
    text = report.training_overhead(tmp_path)
    i = overhead.ARMS.index("fast-newton")
    columns = [f"{value + i:.1f} [{value + i - 0.5:.1f}, {value + i + 0.5:.1f}] %" for value in (10, 20, 30, 40)]
    assert cells(text, "small | fast-newton")[2:] == [*columns, f"{50 + i:.1f} %", "", ""]
    words = " ".join(text.split())
    assert "on small, 8 x 3 x 256 x 512, 19 classes: 100, 101 and 102 ms, 500, 501 and 502 MB (9 rounds). What" in words
    assert "of Fast Newton's attack with segadv 60.0 [59.5, 60.5] % on small (9 rounds)." in words
    assert "hold the median less often, some in 91 % of cases only" in words
    few = [replace(row, rounds=4 if row.operation == overhead.GLUE_SHARE else 20) for row in rows if row.rounds > 1]
    write_records(tmp_path / "overhead-cpu.csv", few)
    assert "some in 87 % of cases only" in " ".join(report.training_overhead(tmp_path).split())


def test_networks_of_the_overhead(tmp_path: Path) -> None:
    """In one table, in the order of benchmarks.overhead; the notes name them."""
    rows = overhead_rows()
    other = "pspnet50, 2 x 3 x 192 x 192, 19 classes"
    parts_alone = [record(overhead.GLUE_SHARE, overhead.OURS, "fast-newton, p = 0.5", "segformer-b0, 4", 30.0)]
    write_records(
        tmp_path / "overhead-cpu.csv",
        [*(replace(row, case=other, p50=row.p50 + 200, rounds=20) for row in rows), *rows, *parts_alone],
    )
    text = report.training_overhead(tmp_path)
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert names == [*["small"] * 4, *["pspnet50"] * 4]
    # the paper's, beside its own network
    assert cells(text, "pspnet50 | fast-newton")[-2:] == ["11.98 %", "31.18 %"]
    assert cells(text, "pspnet50 | segpgd-3")[-2:] == cells(text, "small | fast-newton")[-2:] == ["", ""]
    words = " ".join(text.split())
    assert re.search(
        r"on small, .*: 100, 101 and 102 ms, .* MB \(9 rounds\); pspnet50, .*: 300, 301 and 302 ms, .* MB \(20", words
    )
    assert re.search(r"segadv 60\.0 .* % on small \(9 rounds\), 260\.0 .* % on pspnet50 \(20 rounds\)", words)
    write_records(tmp_path / "overhead-cpu.csv", [replace(row, rounds=10) for row in rows])
    assert "9 rounds" not in report.training_overhead(tmp_path)


def test_overhead_of_two_runs_is_refused(tmp_path: Path) -> None:
    """Whether the steps are of two, or only their parts."""
    rows = overhead_rows()
    rows.append(replace(rows[-1], mode="fgsm, p = 1"))
    for at, row in enumerate(rows):
        write_records(tmp_path / "overhead-cpu.csv", [*rows[:at], replace(row, commit="decade"), *rows[at + 1 :]])
        with pytest.raises(report.ReportError, match="of several runs"):
            report.training_overhead(tmp_path)


def test_overhead_of_other_threads_alone_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "overhead-cpu.csv", [replace(row, threads=4) for row in overhead_rows()])
    for table in (report.training_overhead, report.overhead_details):
        with pytest.raises(report.ReportError, match=re.escape("overhead-cpu.csv: no rows of 2 threads")):
            table(tmp_path)


def test_overhead_beside_another_runs_basic_step_is_told(tmp_path: Path) -> None:
    """A run of one share writes the basic steps anew, of the same commit and as many rounds."""
    rows = overhead_rows()  # the basic steps: 100 and 102 ms
    over = {row.operation: row for row in rows if (row.provider, row.mode) == (overhead.OURS, "fgsm, p = 0.5")}
    step = replace(over["overhead"], operation="training step", unit="ms")
    others = [row for row in rows if row not in (over["overhead"], over["over conventional basic"])]
    told = "Percentages at p = 0.5 on small are over the basic steps of their own run, which these are not. "
    for overhead_basic, conventional_basic in ((102.0, 100.0), (102.0, 101.0), (102.0, 100.1), (103.0, 100.0)):
        percentages = {
            "overhead": 100 * (150.0 / overhead_basic - 1),
            "over conventional basic": 100 * (150.0 / conventional_basic - 1),
        }
        (tmp_path / "overhead-cpu.csv").unlink(missing_ok=True)
        measured = [replace(over[name], p50=round(p50, 4)) for name, p50 in percentages.items()]
        write_records(tmp_path / "overhead-cpu.csv", [*others, *measured, replace(step, p50=150.0)])
        for text in (report.overhead_details(tmp_path), report.training_overhead(tmp_path)):
            assert (told in f"{' '.join(text.split())} ") == ((overhead_basic, conventional_basic) != (102.0, 100.0))
    (tmp_path / "overhead-cpu.csv").unlink()
    measured = [replace(row, p50=77.0) for row in (over["overhead"], replace(over["overhead"], mode="fgsm, p = 1"))]
    measured += [replace(step, p50=150.0), replace(step, p50=150.0, mode="fgsm, p = 1")]
    both = [replace(row, case="pspnet50, 2 x 3") for row in (*others, over["over conventional basic"], *measured)]
    write_records(tmp_path / "overhead-cpu.csv", [*others, over["over conventional basic"], *measured, *both])
    words = " ".join(report.training_overhead(tmp_path).split())
    assert "Percentages at p = 0.5 and p = 1 on small, at p = 0.5 and p = 1 on pspnet50 are over the basic" in words
    words = " ".join(report.overhead_details(tmp_path).split())
    assert words.count("Percentages at p = 0.5 and p = 1 on ") == 2, "each beside its own network"
    assert "on small, at" not in words


def rows_of_fused_operations() -> list[Record]:
    """Of the headline: the fastest is eager with max and torch.compile, the least memory is torch.compile's."""
    rows = []
    for name, ms, huge, own in (("averaged_gain", 10.0, 30.0, 2.0), ("cross_entropy", 17.0, 40.0, 10.0)):
        ways = {"eager": 200.0, "eager, max": 120.0, "compile": 120.0, "compile, max": 150.0, "segadv": ms}
        megabytes = {"eager": 400.0, "eager, max": 300.0, "compile": 200.0, "compile, max": 100.0, "segadv": own}
        key = ("forward + backward", "cityscapes19")
        for provider, p50 in ways.items():
            rows.append(record(f"upsample + {name}", provider, *key, p50))
            rows.append(record(f"upsample + {name}", provider, *key, huge if provider == "segadv" else p50, thp=1))
            rows.append(record(f"upsample + {name}, {PEAK_MEMORY}", provider, *key, megabytes[provider]))
    return rows


def test_the_headline(tmp_path: Path) -> None:
    """Shows both networks; more time is called more, and what is not known is not told."""
    path = tmp_path / "overhead-cpu.csv"
    key = ("over conventional basic", overhead.OURS, "fast-newton, p = 0.5")
    small = record(*key, "small, 8 x 3 x 256 x 512, 19 classes", -20.4, low=-30.6, high=-10.4)
    other = record(*key, "segformer-b0, 4 x 3 x 256 x 256, 150 classes", 7.4, low=5.2, high=9.6)
    over_fused = [
        record("overhead", overhead.OURS, key[2], row.case, p50) for row, p50 in ((small, 27.6), (other, 36.4))
    ]
    large = record(*key, "pspnet50, 2 x 3 x 192 x 192, 19 classes", 32.8, machine="another machine, 2 cores")
    over_fused.append(large)
    write_records(tmp_path / "cpu.csv", rows_of_fused_operations())
    beside = record("overhead", overhead.EFFICIENT, key[2], small.case, 99.0)
    write_records(path, [small, other, *over_fused, beside])
    words = " ".join(report.headline(tmp_path).split())
    assert "20 % less time on a small PSPNet (10 to 31 %)" in words
    assert "712² are computed 12 times as fast as with the better of eager PyTorch" in words
    assert "and `torch.compile`, in 1/50 of the memory;" in words
    assert "those of cross-entropy 7 times as fast, in 1/20." in words
    assert "these operations are 4 and 3 times as fast; conventional training steps then vary too much" in words
    assert "7 % more time on SegFormer-B0 with 150 classes (5 to 10 %). Brackets give 95 % intervals" in words
    assert "with the same fused loss it takes 28 % and 36 % more, and on PSPNet50" in words
    assert "a small part of a step, 33 % more than conventional basic training" in words
    assert words.startswith("Measured on two CPU cores ([tables and")
    assert "; GPUs are [still to come](#limits): * **Operations** (a machine): value and" in words
    assert " * **Training** (another machine): compared with a *basic* step (no attack)" in words
    on_gpu = tmp_path / "overhead-nvidia-x1.csv"
    write_records(on_gpu, [replace(small, device="cuda", threads=0)])  # of which no table can be made
    assert " ".join(report.headline(tmp_path).split()) == words
    write_records(on_gpu, [replace(row, device="cuda", threads=0) for row in overhead_rows()])
    assert "; GPUs are in the tables there:" in report.headline(tmp_path)
    on_gpu.unlink()
    write_records(path, [replace(other, p50=-7.4, low=-10.0, high=-5.0)])
    told = "7 % less time on SegFormer-B0 with 150 classes (5 to 10 %): the fused loss pays for the attack. Brackets"
    assert told in " ".join(report.headline(tmp_path).split())
    write_records(path, [other])
    write_records(path, [replace(small, mode="fast-newton, p = 1", low=-1.0)])
    assert " ".join(report.headline(tmp_path).split()) == words
    for high in (0.1, 0.0):
        write_records(path, [replace(small, high=high)])
        with pytest.raises(report.ReportError, match=rf"small: .* not known: -20\.4 \[-30\.6, {high}\] %"):
            report.headline(tmp_path)
    write_records(path, [small, replace(over_fused[0], p50=-2.7), replace(large, p50=-3.8)])
    words = " ".join(report.headline(tmp_path).split())
    assert "it takes -3 % and 36 % more, and on PSPNet50, whose loss is a small part of a step, -4 % more than" in words
    for rows in (
        [small, *over_fused],
        *([small, other, *(row for row in over_fused if row is not missing)] for missing in over_fused),
    ):
        path.unlink()
        write_records(path, rows)
        with pytest.raises(report.ReportError, match="0 rows of"):
            report.headline(tmp_path)


def test_cells_of_peers(tmp_path: Path) -> None:
    write_records(
        tmp_path / "peers-cpu.csv",
        [
            *peer_rows(),
            record("pgd", "compile", "3 steps", p50=55.0),
            record("pgd, peak memory", "compile", "3 steps", p50=66.0),
        ],
    )
    text = report.other_packages(tmp_path)
    assert cells(text, "PGD without random start, 3 steps") == [
        "PGD without random start, 3 steps", "a case", "package 1", "13.0 ms, 203 MB", "11.0 ms, 201 MB",
        "55.0 ms, 66.0 MB", "12.0 ms, 202 MB", "", "3.50 [3.00, 4.00] x",
    ]  # fmt: skip
    words = " ".join(report.other_packages_in_a_sentence(tmp_path).split())
    assert "; PGD 3.5 times as long (package 1); SegPGD 3.5 times as long (package 2); " in words
    write_records(tmp_path / "peers-cpu.csv", [record("pgd", "another package", "3 steps")])
    with pytest.raises(report.ReportError, match="pgd needs the rows of one other package"):
        report.other_packages_in_a_sentence(tmp_path)


@pytest.mark.parametrize("name", ["overhead", "peers"])
def test_a_gpu_has_a_table_of_its_own(name: str, tmp_path: Path) -> None:
    file, made = TABLES[name]
    write_records(tmp_path / file, made())
    cpu = report.BLOCKS[name](tmp_path)
    on_gpu = [replace(row, device="cuda", threads=0, machine="another machine") for row in made()]
    write_records(tmp_path / file.replace("cpu", "nvidia-x1"), on_gpu)
    both = report.BLOCKS[name](tmp_path)
    assert both.startswith(cpu)
    assert "another machine" in both.removeprefix(cpu)


def test_what_a_gpus_time_did_not_suffice_for_is_left_out_of_its_table(tmp_path: Path) -> None:
    """Arms, what is measured after the times, other packages that are missing there; of the CPU all is needed."""
    made = [replace(row, device="cuda", threads=0) for row in overhead_rows()]
    late = (overhead.COST_MODEL, PEAK_MEMORY, overhead.GLUE_SHARE)
    some = [row for row in made if row.operation not in late and not row.mode.startswith(("fgsm", "segpgd"))]
    path = tmp_path / "overhead-nvidia-x1.csv"
    write_records(path, some)
    text = report._overhead_on_a_device(path)
    assert [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| small")] == [
        "fast-newton",
        "bim-3",
    ]
    whole = tmp_path / "overhead-nvidia-x2.csv"
    write_records(whole, made)
    shown = cells(report._overhead_on_a_device(whole), "small | bim-3")
    assert shown[6] == f"{50 + overhead.ARMS.index('bim-3'):.1f} %"
    assert cells(text, "small | bim-3") == [*shown[:6], "", *shown[7:]]
    words = " ".join(text.split())
    assert "19 classes: 100, 101 and 102 ms (9 rounds). Medians" in words
    path.unlink()
    key = {"operation": "overhead", "provider": overhead.EFFICIENT, "mode": "bim-3, p = 0.5"}
    write_records(path, [row for row in some if row is not report.one(some, **key)])
    assert cells(report._overhead_on_a_device(path), "small | bim-3") == [*shown[:3], "", *shown[4:6], "", *shown[7:]]
    path.unlink()
    peaks = [row for row in made if row.operation == PEAK_MEMORY]
    write_records(path, [*some, *peaks[1:]])
    assert report._overhead_on_a_device(path) == text, "the memory of all columns, or of none"
    alone = [row for row in made if row.provider != overhead.EFFICIENT]  # --columns conventional segadv
    path.unlink()
    write_records(path, alone)
    assert report._overhead_on_a_device(path) == ""

    made = [replace(row, device="cuda", threads=0) for row in peer_rows()]
    path = tmp_path / "peers-nvidia-x1.csv"
    write_records(path, [row for row in made if row.provider != "package 1"])
    whole = tmp_path / "peers-nvidia-x2.csv"
    write_records(whole, made)
    missing = report._PEERS_TITLES[peers.COMPARISONS[1]]
    expected = [line for line in report._peers_on_a_device(whole).splitlines() if not line.startswith(f"| {missing}")]
    assert report._peers_on_a_device(path).splitlines() == expected
    path.unlink()
    write_records(path, [row for row in made if not row.provider.startswith("package")])
    assert report._peers_on_a_device(path) == ""


# --- the demo -----------------------------------------------------------------------------------------------------


def finished_demo(path: Path, seeds: Sequence[int]) -> Path:
    """A results.json as segadv demo writes it, of these numbers."""
    curves = [
        {
            "arm": arm,
            "attack": attack,
            "eps": eps,
            "miou": round(0.1 * (i + 1) + 0.02 * k + eps, 6),
            "pixel_accuracy": 0.5,
        }
        | ({"seed": seed} if len(seeds) > 1 else {})
        for k, seed in enumerate(seeds)
        for i, arm in enumerate(PAPER_ARMS)
        for attack in ("fgsm", "bim-10")
        for eps in (0.0, 0.01, 0.02, 0.03, 0.04)
    ]
    content = {
        "arguments": {"segadv": "0.1.0", "seed": seeds[0]},
        "finished": True,
        "seconds": {"data": 90.0, "train basic": 150.0},
        "git_commit": COMMIT,
        "machine": {
            "processor": "AMD EPYC",
            "cpu_count": 2,
            "threads": 2,
            "gpu": None,
            "torch": "2.13.0",
            "python": "3.11",
        },
        "curves": curves,
    }
    if len(seeds) > 1:
        content["seeds"] = list(seeds)
    path.write_text(json.dumps(content))
    for k, seed in enumerate(seeds):
        run = path.parent / (f"seed-{seed}" if k else "") / "fast-newton"
        run.mkdir(parents=True)
        medians = (None, 0.0, 0.01 * (k + 1), 0.01 * (k + 3), 0.9, 0.9)  # None: no sample was attacked
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps({'eps_median': value})}\n" for value in medians))
    return path


@pytest.mark.parametrize("seeds", [(4,), (4, 5, 6)])
def test_a_demo_becomes_rows_a_table_and_a_picture(seeds: tuple[int, ...], root: Path, tmp_path: Path) -> None:
    with_block(root, "demo")
    rows_file = root / report.RESULTS / "demo.csv"
    # rows of an earlier demo do not stay
    write_records(rows_file, [record(report.MIOU, "basic", "fgsm", "eps 0, seed 99", 0.5)])
    results = finished_demo(tmp_path / "results.json", seeds)
    assert report.main(["--demo", str(results), "--commit", "c0ffee"], root) == 0
    assert len(read_records(rows_file)) == 5 * 2 * 5 * len(seeds) + len(seeds) + 1
    text = (root / "benchmarks/README.md").read_text()
    if len(seeds) == 1:
        expected = ["0.300", "0.310", "0.330", "0.310", "0.330"]
    else:
        expected = [
            "0.320 (0.300-0.340)",
            "0.330 (0.310-0.350)",
            "0.350 (0.330-0.370)",
            "0.330 (0.310-0.350)",
            "0.350 (0.330-0.370)",
        ]
    assert cells(text, "random-fgsm")[1:] == expected
    assert "took 4 minutes" in text.replace("\n", " ")
    sizes = ", ".join(["0.030", "0.040", "0.050"][: len(seeds)])
    assert f"Fast Newton's step size in training was {sizes}. (" in text.replace("\n", " ")
    assert "commit c0ffee" in text.replace("\n", " ")
    picture = root / "docs/robustness.png"
    assert report.stamp_of(picture) == report.digest(rows_file)
    assert report.main(["--check"], root) == 0
    # other rows: the picture is out of step, and nothing else where the table does not show them
    rows = [
        replace(row, p50=row.p50 + 0.01) if row.case.startswith("eps 0.04") else row for row in read_records(rows_file)
    ]
    write_records(rows_file, rows)
    assert report.outdated(root) == ["docs/robustness.png"]
    before = picture.read_bytes()
    assert report.main([], root) == 0
    assert picture.read_bytes() != before
    with Image.open(picture) as image:
        assert image.width >= 700
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    picture.unlink()
    assert report.outdated(root) == ["docs/robustness.png"]


def test_an_unfinished_or_foreign_demo_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = finished_demo(tmp_path / "results.json", (0,))
    results.write_text(results.read_text().replace('"finished": true', '"finished": false'))
    rows_file = root / report.RESULTS / "demo.csv"
    rows_file.write_text("as before")
    for text, message in (
        (None, "is not finished"),
        ("{}", "is not finished"),
        ("[", "Expecting"),
        ('{"finished": true}', "machine"),
    ):
        if text is not None:
            results.write_text(text)
        assert report.main(["--demo", str(results)], root) == 1
        assert message in capsys.readouterr().err
    assert rows_file.read_text() == "as before"


# --- pictures and commands ----------------------------------------------------------------------------------------


def test_the_growth_is_drawn_from_all_axes(root: Path, figures: list[Any]) -> None:
    path = root / report.RESULTS / "scaling-cpu.csv"
    path.unlink(missing_ok=True)
    write_records(path, growth_rows())
    for name in report.DOCUMENTS:  # without the tables that need other rows
        (root / name).write_text("Nothing else.\n")
    with_block(root, "scaling")
    assert report.main([], root) == 0
    (figure,) = figures
    assert len(figure.axes) == 2 * len(scaling.AXES)
    for panel, (axis, (values, _)) in zip(figure.axes, scaling.AXES.items(), strict=False):
        places = [value**2 for value in values] if axis == "pixels" else list(values)
        assert len(panel.lines) == 5
        assert all(list(line.get_xdata()) == places for line in panel.lines), axis
    assert report.outdated(root) == []
    for axis in scaling.AXES:
        path.unlink()
        write_records(path, [row for row in growth_rows() if row.mode != axis])
        with pytest.raises(report.ReportError, match=f"no rows of {axis}"):
            report.growth(path.parent)


def test_attacks_write_what_their_table_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attacks-cpu.csv"
    assert attacks.main(["--images", "1", "--size", "16", "16", "--rounds", "2", "--write", str(path)]) == 0
    assert "further step" in capsys.readouterr().out
    rows = [replace(row, threads=2) for row in read_records(path)]
    path.unlink()
    write_records(path, rows)
    assert len(report.attack_steps(tmp_path).splitlines()) > len(attacks.ITERATIVE)


def test_the_trainer_writes_what_its_table_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trainer-cpu.csv"
    tiny = ["--steps", "8", "--batch-size", "2", "--crop", "16", "16"]
    assert trainer.main([*tiny, "--write", str(path)]) == 0
    assert "percent of the work of the step" in capsys.readouterr().out
    rows = read_records(path)
    assert all(row.p50 > 0 for row in rows)
    path.unlink()
    write_records(path, [replace(row, threads=2) for row in rows])
    assert cells(report.trainer_cost(tmp_path), trainer.TRAINER)[1].endswith(" ms")


def test_rows_of_the_trainer_are_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps of a second's work: 1, 2 and 3 ms are left for the trainer, so many tenths of a percent."""
    steps = []
    for trainers in (0.002, 0.001, 0.003):
        step = dict.fromkeys(trainer.WORK, 1 / len(trainer.WORK))
        steps.append(step | {"batch": 0.5, "whole": 1.5 + trainers})
    steps[1] |= {"checkpoint": 0.25, "whole": steps[1]["whole"] + 0.25}
    monkeypatch.setattr(trainer, "measure", lambda config: steps)
    path = tmp_path / "trainer-cpu.csv"
    assert trainer.main(["--write", str(path)]) == 0
    rows = {(row.operation, row.provider): (row.p50, row.rounds, row.unit) for row in read_records(path)}
    assert rows == {
        **{(trainer.PART, name): (pytest.approx(1000 / len(trainer.WORK)), 3, "ms") for name in trainer.WORK},
        (trainer.PART, "these together"): (pytest.approx(1000), 3, "ms"),
        (trainer.PART, trainer.TRAINER): (pytest.approx(2), 3, "ms"),
        (trainer.PART, trainer.READING): (pytest.approx(500), 3, "ms"),
        (trainer.PART, trainer.CHECKPOINT): (pytest.approx(250), 1, "ms"),
        (trainer.SHARE, trainer.TRAINER): (pytest.approx(0.2), 3, "%"),
    }


def test_scaling_writes_what_its_table_and_picture_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "QUICK", {"pixels": [16, 32], "classes": [2, 3], "batch": [1, 3], "threads": [1]})
    path = tmp_path / "scaling-cpu.csv"
    assert scaling.main(["--quick", "--write", str(path)]) == 0
    capsys.readouterr()
    rows = read_records(path)
    assert {row.mode for row in rows} == {*scaling.AXES, ""}
    at = {(row.operation, row.provider, row.mode, row.case): row for row in rows}
    floor = at["fewest bytes, peak memory per pixel", "floor", "classes", "2 x 3 x 32 x 32 to 256 x 256"]
    assert floor.p50 == pytest.approx(4 * 3 / 64, abs=1e-3)
    assert all(row.p50 > 0 for row in rows)
    assert Image.open(path.with_suffix(".png")).width > 700
    path.unlink()
    write_records(path, [replace(row, threads=2) for row in rows])
    assert "autograd" in report.call_ladder(tmp_path)
    with pytest.raises(SystemExit, match="its figures mean nothing"):
        scaling.main(["--quick", "--write"])


def test_a_further_step_is_half_of_what_two_more_cost() -> None:
    three, one, base = np.array([31.0, 30.0, 29.0]), np.array([10.0, 10.0, 12.0]), np.array([8.0, 8.0, 9.0])
    assert attacks.further_step(three, one) == 10
    assert attacks.further_step_over(three, one, base) == pytest.approx(25)
    assert attacks.further_step_over_step(three, one, one + 16, one) == pytest.approx(25)


def test_numbers_have_the_digits_that_they_deserve() -> None:
    assert [report.three_digits(value) for value in (304.6, 99.95, 99.94, 4.84)] == ["305", "100", "99.9", "4.8"]


@pytest.mark.parametrize(
    ("rounds", "share"), [(3, "73 %"), (4, "87 %"), (8, "87 %"), (9, "91 %"), (19, "91 %"), (20, "")]
)
def test_what_intervals_of_few_rounds_hold(rounds: int, share: str) -> None:
    assert "".join(re.findall(r"\d+ %", report._few(rounds))) == share


def test_two_rows_where_one_is_meant_are_an_error() -> None:
    rows = [record("overhead", "segadv"), record("overhead", "segadv", dtype="bfloat16")]
    for of_rows in (report.one, report.none_or_one):
        assert of_rows(rows, operation="overhead", dtype="bfloat16") is rows[1]
        with pytest.raises(report.ReportError, match="2 rows of operation 'overhead'"):
            of_rows(rows, operation="overhead")


def test_the_floor_reads_logits_and_labels_and_writes_the_gradient() -> None:
    logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
    assert scaling.floor_bytes(logits, labels) == 2 * (2 * 3 * 4 * 4 * 4) + 2 * 8 * 8 * 8


def test_the_cases_of_the_growth() -> None:
    sizes = [scaling.pixels_of(case(value).name) for values, case in [scaling.AXES["pixels"]] for value in values]
    assert sizes == [128**2, 256**2, 512**2, 1024**2]
    assert sizes[-1] == 64 * sizes[0]
    assert scaling.pixels_of(scaling.scaled(images=3, classes=5, size=64).name) == 3 * 64 * 64


def test_bars_of_the_overhead(tmp_path: Path, figures: list[Any]) -> None:
    """Heights and ends of the intervals are those of the rows of two threads and without huge pages."""
    rows = [replace(row, low=row.p50 - 1, high=row.p50 + 3) for row in overhead_rows()]
    counted = [row for row in rows if row.operation == overhead.COST_MODEL]
    rows += [replace(row, provider=column) for row in counted for column in overhead.COLUMNS[:2]]
    others = [replace(row, p50=77.0, **key) for row in rows for key in ({"thp": 1}, {"threads": 4})]
    write_records(tmp_path / report.RESULTS / "overhead-cpu.csv", [*rows, *others])
    (picture,) = [picture for picture in report.PICTURES if picture.source == "overhead-cpu.csv"]
    report.draw(picture, tmp_path)
    ((axes,),) = (figure.axes for figure in figures)
    values = [10.0 * column + i for column in (1, 2, 3) for i in range(len(overhead.ARMS))]
    assert [bar.get_height() for bar in axes.patches] == values
    bars = [entry for entry in axes.containers if hasattr(entry, "has_yerr")]
    ends = [segment[:, 1].tolist() for entry in bars for segment in entry.lines[2][0].get_segments()]
    assert ends == [[value - 1, value + 3] for value in values]


def test_overhead_of_runs_of_other_rounds_is_refused(tmp_path: Path) -> None:
    """Where the commit is the same."""
    rows = overhead_rows()
    rows += [replace(row, mode="fgsm, p = 1", rounds=5) for row in rows if row.mode == "basic"]
    write_records(tmp_path / "overhead-cpu.csv", rows)
    with pytest.raises(report.ReportError, match="of several runs"):
        report.training_overhead(tmp_path)


def test_training_samples_of_huge_pages_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    shutil.copy(report.ROOT / report.RESULTS / "cpu.csv", path)
    shown = report.training_samples(tmp_path)
    rows = [row for row in read_records(path) if row.operation in ("augment", "decode")]
    write_records(path, [replace(row, thp=1, p50=77.0) for row in rows])
    assert report.training_samples(tmp_path) == shown


# --- the guard of the leads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "fails"), [([8.0], False), ([5.0], False), ([4.99, 4.9], True), ([4.0, 5.1], False), ([0.1, 0.2], True)]
)
def test_the_guard_fails_when_half_of_the_lead_is_lost_twice(found: list[float], fails: bool) -> None:
    measured = iter(found)
    if fails:
        with pytest.raises(AssertionError, match=r"more than half of the lead is lost"):
            guard.assert_lead_kept("x", lambda: next(measured), 10.0)
    else:
        guard.assert_lead_kept("x", lambda: next(measured), 10.0)
    assert next(measured, None) is None


def test_a_lead_is_eagers_time_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"eager": np.array([1.0, 12.0, 99.0]), "segadv": np.array([9.0, 0.1, 4.0])}
    monkeypatch.setattr(guard, "milliseconds_of", lambda providers, device, rounds: times)
    assert guard.lead({}) == 3.0


def test_every_guarded_operation_has_a_recorded_lead(root: Path) -> None:
    leads = {measurement.name: guard.recorded_lead(measurement) for measurement in guard.MEASUREMENTS}
    assert len(guard.MEASUREMENTS) == 12
    assert all(value > 1 for value in leads.values()), leads
    first = guard.MEASUREMENTS[0]
    path = root / report.RESULTS / "cpu.csv"
    rows = {(r.operation, r.mode, r.case, r.provider, r.thp): r.p50 for r in read_records(path)}
    key = (first.name, first.mode, "cityscapes19")
    assert guard.recorded_lead(first) == rows[*key, "eager", 0] / rows[*key, "segadv", 0]
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith(f"{first.name},segadv,"))
    )
    with pytest.raises(KeyError, match="has no row of upsample \\+ averaged_gain, segadv"):
        guard.recorded_lead(first, path)


# --- robustness ---------------------------------------------------------------------------------------------------


GU = [f"{kind}-{steps}" for kind in ("pgd", "segpgd") for steps in (10, 20, 40, 100)]


USUAL = ("fgsm", "bim-10", "pgd", "cospgd", "cospgd-balanced", "worst-case", "worst-case-miou")


def evaluated(path: Path, shift: float, attacks: Sequence[str] = USUAL) -> Path:
    """A results.json as segadv evaluate writes it, of two classes; its mIoU are made of `shift`."""
    results = {}
    for i, arm in enumerate(ROBUST_ARMS):
        measurements = []
        for eps in (0.0, 0.02, 0.03, 0.04):
            steps = 100 if eps == 0.03 else 20 if eps else 0
            for j, attack in enumerate(attacks):
                for done in sorted({steps // 2, steps}):  # also judged on its way
                    wrong = 50 * (i + j) + int(1000 * eps) + int(shift * 1000) + (steps - done)
                    confusion = torch.tensor([[1000 - wrong, wrong], [wrong, 1000 - wrong]])
                    measurements.append(Measurement("", attack, eps, done, confusion, torch.ones(1), torch.zeros(0)))
        versions = {"segadv": "0.1.0", "torch": "2.13.0", "numpy": "2.4", "python": "3.11"}
        run = {"images": 32, "device": "cpu", "versions": versions, "git_commit": COMMIT}
        results[arm] = EvaluationResult(measurements, run)
    EvaluationResult.merge(results).to_json(path)
    return path


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("robustness", 1), ("robustness", 3), ("robustness-longer", 2), ("segpgd", 1), ("segpgd", 3)),
        *(("robustness-miou", 1), ("robustness-miou", 2)),
    ],
)
def test_evaluations_become_rows_and_a_table(name: str, count: int, root: Path, tmp_path: Path) -> None:
    with_block(root, name)
    shifts = [0.0, 0.05, 0.01][:count]
    attacks = {
        "segpgd": [*GU, "worst-case"],
        "robustness-longer": ["fgsm", "bim-10", "pgd", "worst-case"],  # no worst case by mIoU
    }.get(name, USUAL)
    files = [evaluated(tmp_path / f"{i}.json", shift, attacks) for i, shift in enumerate(shifts)]
    of_file = name.removesuffix("-miou")
    for _ in range(2):  # rows of an earlier evaluation do not stay
        assert report.main([f"--{of_file}", *map(str, files), "--commit", "c0ffee"], root) == 0
    assert report.main(["--check"], root) == 0
    rows = read_records(root / report.RESULTS / f"{of_file}.csv")
    # 2 numbers at 4 eps; what was judged on the way is left out
    assert len(rows) == count * len(ROBUST_ARMS) * 2 * 4 * len(attacks)
    assert {row.commit for row in rows} == {"c0ffee"}

    def miou(arm: int, attack: int, eps: float) -> str:
        values, accuracies = [], []
        for shift in shifts:
            wrong = 50 * (arm + attack) + int(1000 * eps) + int(shift * 1000)
            values.append((1000 - wrong) / (1000 + wrong))
            accuracies.append((1000 - wrong) / 1000)
        told = f"{np.mean(values):.3f}" + f" ({min(values):.3f}-{max(values):.3f})" * (count > 1)
        return told + f" / {np.mean(accuracies):.3f}" * (name == "robustness-miou")

    text = report.BLOCKS[name](root / report.RESULTS)
    for i, arm in enumerate(ROBUST_ARMS):
        wanted = {
            "robustness": [(6, 0.0), *((j, 0.03) for j in (1, 2, 3, 4, 6)), (6, 0.02), (6, 0.04)],
            "robustness-miou": [(5, 0.0), *((j, 0.03) for j in (3, 5, 4, 6))],
            "robustness-longer": [(3, 0.0), *((j, 0.03) for j in (1, 2, 3)), (3, 0.02), (3, 0.04)],
            "segpgd": [(8, 0.0), *((j, 0.03) for j in range(8))],
        }[name]
        assert cells(text, arm) == [arm, *(miou(i, attack, eps) for attack, eps in wanted)]
    assert f"mean and range of {count} trainings" in text or count == 1
    assert "32 validation scenes" in text
    if name == "segpgd":
        assert "| trained with | clean | PGD-10 | PGD-20 | PGD-40 | PGD-100 | SegPGD-10 | SegPGD-20 |" in text
    elif name == "robustness-miou":
        told = " ".join(text.split())
        assert "BIM-10 has 10 steps, the others have 100. The worst cases are chosen for each" in told
        assert "each image among these, FGSM, BIM-10, PGD. " in told
    else:
        told = " ".join(text.split())
        assert "BIM-10 has 10 steps, the others have 100, 20 at 0.02 and 0.04" in told
        by_miou = name == "robustness"
        assert ("FGSM, by its mIoU. " in told, "FGSM, by its wrong pixels; so" in told) == (by_miou, not by_miou)


def test_steps_at_other_eps_are_told_where_they_are_others(tmp_path: Path) -> None:
    at_others = [
        [replace(row, case=row.case.replace(" 20 steps", f" {steps} steps")) for row in robust_rows()]
        for steps in (20, 100)
    ]
    at_none = [row for row in robust_rows() if "eps 0.02" not in row.case and "eps 0.04" not in row.case]
    for rows, told, columns in (
        (at_others[0], "the others have 100, 20 at 0.02 and 0.04. The", "worst case at 0.02 | worst case at 0.04 |"),
        (at_others[1], "the others have 100. The", "worst case at 0.02 | worst case at 0.04 |"),
        (at_none, "the others have 100. The", "PGD | worst case |"),
    ):
        (tmp_path / "robustness.csv").unlink(missing_ok=True)
        write_records(tmp_path / "robustness.csv", rows)
        text = report.robustness(tmp_path)
        assert f"BIM-10 has 10 steps, {told} worst case" in " ".join(text.split())
        assert text.partition("\n")[0].endswith(columns)


def test_checks_for_gradient_masking_become_rows_and_a_sentence(root: Path, tmp_path: Path) -> None:
    with_block(root, "robustness")
    files = []
    for training, failing in enumerate((None, "fast-newton")):
        folder = tmp_path / str(training)
        folder.mkdir()
        files.append(str(evaluated(folder / "results.json", 0.0)))
        (folder / "checks.csv").write_text(
            "arm,check,passed,finding\n"
            + "".join(f'{arm},falls,{arm != failing},"0.9, 0.054"\n{arm},other,,none\n' for arm in ROBUST_ARMS)
        )
    for count, told in (
        (1, "Of 2 checks for gradient masking none failed. ("),
        (2, "Of 4 checks for gradient masking 1 failed (fast-newton, falls, training 1: 0.9, 0.054). ("),
    ):
        assert report.main(["--robustness", *files[:count]], root) == 0
        text = " ".join((root / "benchmarks/README.md").read_text().split())
        assert told in text
        rows = [row for row in read_records(root / report.RESULTS / "robustness.csv") if row.operation == report.CHECK]
        assert len(rows) == 4 * count
        assert [row.p50 for row in rows[:4:2]] == [1.0, 1.0]
        assert all(math.isnan(row.p50) for row in rows[1::2])


def test_rows_of_demos_and_evaluations_name_the_commit_that_ran_them(tmp_path: Path) -> None:
    found = {
        report.demo_records: finished_demo(tmp_path / "results.json", [0]),
        lambda path, commit: report.robustness_records([path], commit): evaluated(tmp_path / "evaluated.json", 0.0),
    }
    for records, path in found.items():
        assert {row.commit for row in records(path, None)} == {"0123456789-dirty"}
        for given in ("c0ffee", "c0ffee-dirty"):
            assert {row.commit for row in records(path, given)} == {given}
        path.write_text(path.read_text().replace(f'"{COMMIT}"', "null"))  # outside of a clone
        with pytest.raises(report.ReportError, match=f"{path} names no commit, .*: give --commit"):
            records(path, None)


def test_rows_of_a_demo_on_a_gpu_name_that(tmp_path: Path) -> None:
    path = finished_demo(tmp_path / "results.json", [0])
    path.write_text(path.read_text().replace('"gpu": null', '"gpu": "NVIDIA X1"'))
    rows = report.demo_records(path, "c0ffee")
    assert {(row.device, row.machine) for row in rows} == {("cuda", "NVIDIA X1, 2 cores")}


def test_rows_of_an_evaluation_on_a_gpu_name_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = evaluated(tmp_path / "0.json", 0.0)
    content = json.loads(path.read_text())
    for run in content["run"].values():
        run["device"] = "cuda:1"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(report, "machine_of", lambda device: f"that of {device}")
    rows = report.robustness_records([path], "c0ffee")
    assert {(row.device, row.machine) for row in rows} == {("cuda", "that of cuda:1")}


def test_what_is_no_evaluation_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file = root / report.RESULTS / "robustness.csv"
    before = rows_file.read_bytes() if rows_file.exists() else None
    foreign = tmp_path / "results.json"
    foreign.write_text("{}")
    for path, message in ((foreign, "no result of an evaluation"), (tmp_path / "none.json", "No such file")):
        assert report.main(["--robustness", str(evaluated(tmp_path / "good.json", 0.0)), str(path)], root) == 1
        assert message in capsys.readouterr().err
    assert (rows_file.read_bytes() if rows_file.exists() else None) == before
