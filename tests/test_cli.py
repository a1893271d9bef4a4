"""The command line, and the demo from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, drawn, failure, read_csv, run

import segadv
from segadv import cli, demo, evaluation, masking, training
from segadv.cli import main
from segadv.comparison import PAPER_ARMS
from segadv.demo import run_demo
from segadv.interrupts import Interrupts
from segadv.options import _explained, numbers
from segadv.training import Trainer

pytest.importorskip("PIL.Image")

FIGURES = ("robustness.png", "overhead.png", "qualitative.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "one of {demo,train,evaluate,reproduce,data"),
        ("trian", "invalid choice: 'trian'"),
        ("train --out x", "arguments are required: --data ("),
        ("train --data x --out y --stepz 3", "--stepz"),
        ("train --data x --out y --config", "argument --config: expected one argument"),
        ("train --data x --out y --steps few", '"steps"'),
        ("train --data x --out y --steps 0", "got 0"),
        ("train --data x --out y --arm newton", "did you mean"),
        ("train --data x --out y --crop 128", "must be height x width, such as 160x320, got '128'"),
        ("train --data x --out y --validation.eps 0,x", "validation.eps must be numbers with commas between them"),
        (
            "train --data x --out y --validation.every 1 --validation.eps 0,8",
            "validation.eps must be numbers in [0, 1]",
        ),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --data nowhere --out y", "nowhere/leftImg8bit/train"),
        ("evaluate nowhere.pt --data x --out y", "nowhere.pt"),
        ("data generate-streets x --size big", "must be height x width, such as 160x320, got 'big'"),
        ("data generate-streets x --seed -1", "seed must be a whole number of at least 0, got -1"),
        ("demo", "arguments are required: --out ("),
        ("data generate-streets", "arguments are required: dir ("),
        ("reproduce", "one of {cityscapes,voc}"),
        ("reproduce vok --data x --out y", "invalid choice: 'vok'"),
        ("reproduce voc --out y", "arguments are required: --data ("),
        ("evaluate x --dta y", "did you mean '--data'?"),
        ("train --data x --out y --lr 0.1", "did you mean '--learning_rate'?"),
    ],
)
def test_wrong_use_is_told_in_one_message(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEGADV_DEBUG", raising=False)
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("segadv: error: ")
    assert printed.err.count("segadv: error") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == [], "something was written"


@pytest.mark.parametrize(
    "command",
    ["train --data x --out", "evaluate x.pt --data x --out", "reproduce voc --data x --out", "data generate-streets"],
)
def test_output_has_to_be_a_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for given, message in (
        (str(tmp_path / "file"), "file', which is no folder"),
        (str(tmp_path / "link"), "link', which is no folder"),
        ("", "must be a folder, got ''"),
    ):
        assert main([*command.split(), given]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize(
    "command",
    [
        "train --out x --data",
        "evaluate x.pt --data x --out",
        "evaluate --data x --out x",
        "reproduce voc --data x --out",
    ],
)
def test_names_that_are_written_down_are_utf8(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before hours of work: a report with another one cannot be written, a config.yaml not be read again."""
    monkeypatch.chdir(tmp_path)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own; pytest-xdist takes nothing but UTF-8
    status = main([*command.split(), os.fsdecode(b"f\xe4ld")])
    told = capsys.readouterr().err
    assert status == 2, told
    assert r"names that are written to files must be UTF-8, got 'f\udce4ld'" in told
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_written_down_is_any(tmp_path: Path) -> None:
    """And is printed as it is, byte for byte, where Python would refuse to."""
    command = [sys.executable, "-m", "segadv", "data", "generate-streets", b"f\xe4ld", "--train", "1", "--val", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, b"f\xe4ld: 1 training and 0 validation images")


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"\\u65e5\xe4\\xb1"), ("ascii:replace", b"???")], ids=["ascii", "replace"]
)
def test_what_the_terminal_has_no_letters_for_is_printed_all_the_same(
    encoding: str, printed: bytes, tmp_path: Path
) -> None:
    """As bytes and numbers, unless the user chose otherwise."""
    command = [sys.executable, "-m", "segadv", "data", "generate-streets", "日\udce4±", "--train", "1", "--val", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, printed + b": 1 training and 0 validation images")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_closed_streams(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m segadv doctor {closed}>&-"
    result = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("cpu: " in result.stdout) == (closed == "2")


def test_termination_is_like_an_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step it waits for its end; as of a batch system, whose jobs may have Ctrl-C ignored."""
    monkeypatch.chdir(tmp_path)
    assert run("data generate-streets streets --train 4 --val 0 --size 64x96") == 0
    command = "train --arm basic --steps 6 --batch_size 2 --crop 32x48 --data streets --out run --device cpu"
    genuine = Trainer.step_in_place

    def step(self: Trainer, *arguments: Any) -> Any:
        if self.steps_done == 3:
            signal.raise_signal(signal.SIGTERM)
        return genuine(self, *arguments)

    for on_interrupt in (signal.default_int_handler, signal.SIG_IGN):
        before = signal.signal(signal.SIGINT, on_interrupt), signal.getsignal(signal.SIGTERM)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(Trainer, "step_in_place", step)
                assert run(command) == 130
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (on_interrupt, before[1])
        finally:
            signal.signal(signal.SIGINT, before[0])
        assert "interrupted; the same command continues" in capsys.readouterr().err
        assert torch.load("run/last.pt", weights_only=True)["steps_done"] == 4
        shutil.rmtree("run")
    # between steps, and in a command that holds nothing back
    for name in ("run_demo", "between"):
        with monkeypatch.context() as patched:
            if name == "between":
                patched.setattr(training, "_coins", lambda *a: signal.raise_signal(signal.SIGTERM))
                patched.setattr(Interrupts, "held", lambda self: contextlib.nullcontext())
            else:
                patched.setattr(cli, "run_demo", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
            assert run("demo --out x" if name == "run_demo" else command) == 130
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(cli, "_check_data", lambda arguments: signal.raise_signal(signal.SIGTERM))
        assert run("data check streets") == 130
    assert capsys.readouterr().err == "\nsegadv: interrupted\n"  # it begins anew


def test_termination_of_all_processes_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sends it: to the group of a process, in which those that load data would be."""
    monkeypatch.chdir(tmp_path)
    assert run("data generate-streets streets --train 4 --val 0 --size 64x96") == 0
    options = "--arm basic --steps 1000000 --batch_size 2 --crop 32x48 --log_every 1 --monitor_every 0 --workers 1"
    command = f"train {options} --checkpoint_every 1000000 --data streets --out run --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "segadv", *command.split()], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    # a process that loads data may tell, before or after, that it could no longer hand over a sample
    assert "segadv: interrupted; the same command continues" in told.splitlines(), told
    lines = metrics.read_text().splitlines()
    assert torch.load("run/last.pt", weights_only=True)["steps_done"] == json.loads(lines[-1])["step"] >= 3


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGADV_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("train --data nowhere --out y")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupted)
    assert run("demo --out x") == 130
    assert capsys.readouterr().err.strip() == "segadv: interrupted; the same command continues"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--version", segadv.__version__), ("--help", "doctor")):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


def test_help_explains_every_training_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train --help")
    text = " ".join(capsys.readouterr().out.split())
    explained = _explained(training.TrainConfig)
    assert explained.keys() == {field.name for field in dataclasses.fields(training.TrainConfig)}
    assert explained["checkpoint_every"] == "steps between checkpoints"
    assert explained["checkpoint_every"] in text
    assert "__main__" not in text, "which is for scripts"
    assert all(arm in text.replace("- ", "-") for arm in training.ARMS)  # lines break at hyphens


def test_every_option_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "reproduce voc"):
        with pytest.raises(SystemExit):
            run(f"{command} --help")
        text = capsys.readouterr().out
        # an option without help shows its type alone; a dataclass without title its Python name
        assert not re.search(r"^ +--\S+( [A-Z_]+| [{\[]\S+)?\s+\(type", text, flags=re.MULTILINE)
        for told in ("to either side", "validation:", "augmentation:", "network: small_pspnet, pspnet50"):
            assert told in " ".join(text.split())
        assert "<class" not in text.replace("<class 'HeightxWidth'>", "")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"segadv {segadv.__version__}\n")
    assert "cpu: " in text
    assert all(name in text for name in segadv.build_info())


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `segadv doctor | head -3`, whether a write or the last flush finds out."""
    for more in ("", "import segadv.cli; segadv.cli._doctor = lambda _: print('x' * 1_000_000); "):
        program = f"{more}import sys; from segadv.cli import main; sys.exit(main(['doctor']))"
        reader, writer = os.pipe()
        os.close(reader)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        run = subprocess.run(
            [sys.executable, "-c", program],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            check=False,
        )
        os.close(writer)
        assert (run.returncode, run.stderr) == (141, "")


class Broken(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            raise ValueError("not this")
        except ValueError as error:
            raise OSError("a.png: cannot be read\n  remedy: restore it") from error


def test_an_error_of_a_worker_is_told_without_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "segadv.cli._doctor", lambda arguments: list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    )
    assert failure("doctor", capsys) == "a.png: cannot be read\n  remedy: restore it\n"


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(arguments: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("segadv.cli._doctor", broken)
    assert run("doctor") == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_base_dependencies_are_enough_for_doctor_and_help() -> None:
    program = (
        "import sys\n"
        "for name in ('PIL', 'matplotlib', 'tqdm', 'torchvision', 'scipy'): sys.modules[name] = None\n"
        "from segadv.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "for arguments in (['demo', '--out', 'x'], ['train', '--data', 'x', '--out', 'y']):\n"
        "    assert main(arguments) == 2\n"
        "main(['--help'])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "extra demo: missing PIL, matplotlib, tqdm" in run.stdout
    assert run.stderr.count("pip install pillow matplotlib tqdm") == 2


def test_module_is_the_command_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "segadv", "train", "--data", "nowhere", "--out", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SEGADV_DEBUG": ""},
    )
    assert run.returncode == 2
    assert "segadv: error: " in run.stderr
    assert "Traceback" not in run.stderr


def test_data_train_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("data generate-streets streets --train 4 --val 2 --size 64x96 --seed 3") == 0
    Path("run.yaml").write_text("arm: basic\nsteps: 2\nbatch_size: 2\ncrop: 32x48\n")
    assert run("train --config run.yaml --data streets --out run --arm fgsm --device cpu") == 0
    saved = torch.load("run/last.pt", weights_only=True)
    assert (saved["config"]["arm"], saved["config"]["batch_size"], saved["steps_done"]) == ("fgsm", 2, 2)
    assert tuple(saved["config"]["crop"]) == (32, 48)
    assert drawn(Path("run/training.png"))

    command = "evaluate run/last.pt --data streets --out results --attacks fgsm --eps 0,0.02"
    assert run(command) == 0
    rows = read_csv(Path("results/curves.csv"))
    assert [(row["arm"], row["attack"], row["eps"]) for row in rows] == [
        ("fgsm", "fgsm", "0.0"),
        ("fgsm", "fgsm", "0.02"),
    ]
    assert json.loads(Path("results/results.json").read_text())["rows"][1]["miou"] == float(rows[1]["miou"])
    assert drawn(Path("results/robustness.png"))
    capsys.readouterr()
    assert "eps must be numbers with commas" in failure(f"{command} --eps 0;1", capsys)
    assert "such as 0,0.01,8/255, got '8/0'" in failure(f"{command} --eps 8/0", capsys)
    assert "such as 0,0.01,8/255, got '1e400'" in failure(f"{command} --eps 1e400", capsys)
    assert numbers("eps", "0,8/255,1e-2") == [0.0, 8 / 255, 0.01]
    for given in ("20,8/255:100", "8/255:100,20"):
        assert cli._steps(given, [0.0, 8 / 255]) == {0.0: 20, 8 / 255: 100}
    assert "steps gives eps 2/100 twice" in failure(f"{command} --steps 0.02:3,2/100:4", capsys)
    assert "steps gives the number without an eps twice" in failure(f"{command} --steps 3,4", capsys)
    assert "steps must be like 100, or like 20,0.03:100" in failure(f"{command} --steps 1/0:3", capsys)
    assert "steps has no effect" in failure(f"{command} --steps 3", capsys)
    assert "steps has no effect" in failure(f"{command} --attacks bim-10,segpgd-10 --steps 3", capsys)
    assert "out of fgsm, bim-10, bim, pgd" in failure(f"{command} --attacks pdg", capsys)
    for steps in ("many", "3:0.02", "0.02:", "2.5"):
        assert "steps must be like 100, or like 20,0.03:100" in failure(f"{command} --steps {steps}", capsys)
    assert "steps names eps that are not evaluated: [0.5]" in failure(f"{command} --steps 3,0.5:4", capsys)
    assert "images must be a whole number of at least 0, got -1" in failure(f"{command} --images -1", capsys)
    Path("broken.pt").write_bytes(b"PK no checkpoint")
    assert "broken.pt" in failure("evaluate broken.pt --data streets --out results", capsys)
    other = {"config": {"arm": "other"}, "steps_done": 0, "model": {"conv.weight": torch.zeros(3)}}
    torch.save(other, "other.pt")
    assert "other.pt does not say which network" in failure("evaluate other.pt --data streets --out r", capsys)
    assert "run holds a training run; give a folder of its own, such as run/report" in failure(
        "evaluate run/last.pt --data streets --out run", capsys
    )
    Path("results/results.json").write_text("{}")
    assert "results holds a results.json of something else" in failure(command, capsys)
    Path("results/results.json").unlink()
    assert "results holds a report.md of something else" in failure(command, capsys)


def test_evaluate_several_checkpoints_into_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("data generate-streets streets --train 2 --val 3 --size 64x96") == 0
    for folder, arm, seed in (("a", "basic", 0), ("b", "fgsm", 0), ("c", "fgsm", 1)):
        arguments = f"--steps 1 --batch-size 2 --crop 32x48 --device cpu --arm {arm} --seed {seed}"
        assert run(f"train --data streets --out runs/{folder} {arguments}") == 0
    checkpoints = "runs/a/last.pt runs/b/last.pt runs/c/last.pt"
    options = "--data streets --attacks fgsm,segpgd --eps 0,0.02,0.03 --images 2 --check-images 1 --steps 3,0.03:5"
    command = f"evaluate {checkpoints} --out report {options}"

    genuine, calls = evaluation.evaluate, []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(cli, "evaluate", stopping)
        assert run(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in Path("report/records").iterdir()}
    assert kept
    masking_checks, checked = masking.masking_checks, []

    def checks(model: Any, loader: Any, *, sources: Any, **options: Any) -> Any:
        checked.append((list(sources), sum(len(images) for images, _ in loader)))
        return masking_checks(model, loader, sources=sources, **options)

    monkeypatch.setattr(cli, "masking_checks", checks)
    assert run(command) == 0
    others = [["fgsm (b)", "fgsm (c)"], ["basic", "fgsm (c)"], ["basic", "fgsm (b)"]]
    assert checked == [(names, 1) for names in others]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "records were made anew"
    rows = read_csv(Path("report/details.csv"))
    assert list(dict.fromkeys(row["arm"] for row in rows)) == ["basic", "fgsm (b)", "fgsm (c)"]
    seen = [(row["attack"], row["eps"], row["steps"]) for row in rows if row["arm"] == "basic"]
    assert seen == [
        ("fgsm", "0.0", "0"), ("fgsm", "0.02", "1"), ("fgsm", "0.03", "1"),
        ("segpgd", "0.0", "0"), ("segpgd", "0.02", "3"), ("segpgd", "0.03", "3"), ("segpgd", "0.03", "5"),
        ("worst-case", "0.0", "0"), ("worst-case", "0.02", "3"), ("worst-case", "0.03", "5"),
        ("worst-case-miou", "0.0", "0"), ("worst-case-miou", "0.02", "3"), ("worst-case-miou", "0.03", "5"),
    ]  # fmt: skip
    text = Path("report/report.md").read_text()
    assert "from fgsm (b)" in text
    # the command in the report gives the same numbers
    repeated = re.search(r"^segadv (evaluate .*)$", text, flags=re.MULTILINE)
    assert repeated
    checked.clear()
    again = repeated[1].replace("--out report", "--out again").replace("--check-images 1", "--check-images 8")
    assert run(again) == 0
    assert checked == [(names, 2) for names in others]  # no more than are evaluated
    assert Path("again/details.csv").read_bytes() == Path("report/details.csv").read_bytes()
    assert "lie in different folders" in failure("evaluate runs/b/last.pt runs/b/last.pt --data x --out y", capsys)


def test_networks_of_one_arm_are_told_apart_by_their_folders() -> None:
    paths = ["runs/0/basic/last.pt", "runs/1/basic/last.pt", "runs/0/bim-3/last.pt"]
    assert cli._arm_names(paths, ["basic", "basic", "bim-3"]) == ["basic (0/basic)", "basic (1/basic)", "bim-3"]
    deeper = [f"{first}/x/basic/{file}" for first, file in (("a", "last.pt"), ("a/../b", "model.safetensors"))]
    assert cli._arm_names(deeper, ["basic"] * 2) == ["basic (a/x/basic)", "basic (b/x/basic)"]
    assert cli._arm_names(["last.pt"], ["basic"]) == ["basic"]
    with pytest.raises(ValueError, match=r"lie in different folders; got \['basic \(a\)'\]"):
        cli._arm_names(["/a/last.pt", "/b/../a/last.pt"], ["basic"] * 2)


def test_quick_demo_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    assert run(f"demo --quick --out {out}") == 0
    printed = capsys.readouterr().out
    assert "paper, Cityscapes" in printed
    assert "11.98 %" in printed
    assert "20 steps train nothing" in printed

    curves = read_csv(out / "curves.csv")
    assert list(curves[0]) == ["arm", "attack", "eps", "miou", "pixel_accuracy"]
    assert [(row["arm"], row["attack"], float(row["eps"])) for row in curves] == [
        (arm, attack, eps) for arm in PAPER_ARMS for attack in ("fgsm", "bim-10") for eps in (0, 0.01, 0.02, 0.03, 0.04)
    ]
    assert all(0 < float(row["miou"]) < 1 and 0 < float(row["pixel_accuracy"]) < 1 for row in curves)
    assert len({row["miou"] for row in curves if float(row["eps"]) == 0}) == len(PAPER_ARMS), "two arms are the same"

    overhead = read_csv(out / "overhead.csv")
    assert list(overhead[0]) == ["arm", "step_ms_p20", "step_ms_p50", "step_ms_p80", "overhead_percent"]
    assert [row["arm"] for row in overhead] == list(PAPER_ARMS)
    p50 = {row["arm"]: float(row["step_ms_p50"]) for row in overhead}
    for row in overhead:
        assert 0 < float(row["step_ms_p20"]) <= float(row["step_ms_p50"]) <= float(row["step_ms_p80"])
        percent = (p50[row["arm"]] / p50["basic"] - 1) * 100
        assert float(row["overhead_percent"]) == pytest.approx(percent, abs=0.1)

    results = json.loads((out / "results.json").read_text())
    assert results["finished"] is True
    assert results["arguments"]["seed"] == 0
    assert results["arguments"]["steps"] == demo.QUICK.steps
    assert {"machine", "build_info", "seconds", "train", "curves", "overhead"} <= results.keys()
    assert all(drawn(out / name) for name in FIGURES)

    # a second call finds everything done
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(Trainer, "step_in_place", None)
    monkeypatch.setattr(demo, "evaluate", None)
    assert run(f"demo --quick --out {out}") == 0
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"results.json", *FIGURES}

    assert "seed 0 there and 1 here" in failure(f"demo --quick --seed 1 --out {out}", capsys)
    assert "steps 20 there and 400 here" in failure(f"demo --out {out}", capsys)


def test_interrupted_demo_continues_to_the_same_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_demo(tmp_path / "whole", sizes=TINY, seed=2, progress=False)
    steps = []
    genuine = Trainer.step_in_place

    def step(self: Trainer, *args: object, **kwargs: object) -> object:
        if len(steps) == 2 * TINY.steps + 2:  # inside the third arm
            raise KeyboardInterrupt
        steps.append(self.config.arm)
        return genuine(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", step)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "parts", sizes=TINY, seed=2, progress=False)
    assert steps[-1] == list(PAPER_ARMS)[2]
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["finished"] is False
    assert not (tmp_path / "parts" / "curves.csv").exists()

    trained = []

    def counted(self: Trainer, *args: object, **kwargs: object) -> object:
        trained.append(self.config.arm)
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step_in_place", counted)
    results = run_demo(tmp_path / "parts", sizes=TINY, seed=2, progress=False)
    overhead_steps = 2 + TINY.overhead_steps
    counts = [trained.count(arm) - overhead_steps for arm in PAPER_ARMS]
    assert counts == [0, 0, TINY.steps - 2, TINY.steps, TINY.steps]
    for name in ("curves.csv", *(f"{arm}/evaluation.json" for arm in PAPER_ARMS)):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert results["finished"] is True


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        run_demo(tmp_path, sizes=TINY)
    for content in ('{"rows": []}', "[]", "{"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="no record of a demo"):
            run_demo(tmp_path, sizes=TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "thesis.tex"]


@pytest.mark.parametrize(
    ("fast_newton", "verdict"),
    [(0.5, "so it is here."), (0.25, "here it is not above random-fgsm, fgsm."), (0.3, "it is not above random-fgsm.")],
)
def test_report_states_what_the_numbers_say(fast_newton: float, verdict: str) -> None:
    miou = {"basic": 0.1, "fgsm": 0.28, "random-fgsm": 0.3, "bim-3": 0.4, "fast-newton": fast_newton}
    curves = [
        {"arm": arm, "attack": attack, "eps": eps, "miou": miou[arm]}
        for arm in PAPER_ARMS
        for attack in ("fgsm", "bim-10")
        for eps in (0.0, 0.01, 0.03)
    ]
    overhead = [{"arm": arm, "step_ms_p50": 100.0, "overhead_percent": 5.0} for arm in PAPER_ARMS]
    text = demo._report(curves, overhead, {"train": 60.0}, 400)
    assert verdict in text
    assert f"BIM-10, eps 0.03: {max(miou, key=lambda arm: miou[arm])} " in text
