"""Files of a run: killed at any moment it continues to the same bits; full disks; what others read from them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_training import FILES, Squares, assert_same_state, config, metrics_of, run, tiny_model
from torch import nn
from torch.utils.serialization import config as serialization

from segadv import checkpoints, run_directory, training, writing
from segadv.checkpoints import drop_lines_after, whole_lines
from segadv.training import Trainer, Validation

pytestmark = pytest.mark.usefixtures("one_thread")  # as the other processes: so come the same bits

VALIDATION = Validation(every=5, images=3, attacks=("fgsm",), eps=(0.0, 0.03))
ALL_FILES = sorted([*FILES, "validation.jsonl", "curves.csv"])


def without_pictures(self: run_directory.RunDirectory, title: str) -> list[Path]:
    """They take longer than all the rest of these runs."""
    return []


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory.RunDirectory, "draw", without_pictures)
        yield


@pytest.fixture(scope="module")
def forks() -> Any:
    """From a server that has imported everything: they start at once, and have no threads of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tqdm", "test_checkpoints"])  # what an optimiser imports, too
    with pytest.MonkeyPatch.context() as patch:  # the server does not get sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("TRITON_INTERPRET", "1")
        forkserver.ensure_running()
    return context


def trainer(**changes: Any) -> Trainer:
    data = Squares()
    settings = config(**{"arm": "random-fgsm", "monitor_every": 6, "validation": VALIDATION, **changes})
    return Trainer(settings, tiny_model(), data, validation_dataset=data, description={"model": {"name": "tiny"}})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(out: Path, moment: str) -> None:
    """In a process of its own, which is killed at the moment of that name, if it comes to that."""
    torch.set_num_threads(1)
    run_directory.RunDirectory.draw = without_pictures  # type: ignore[method-assign]
    trained = trainer()
    kind, _, count = moment.partition(" ")
    left = [int(count or 0)]

    def before_or_after(call: Any, *, before: Any = None, after: Any = None, of: str = "") -> Any:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            counts = not of or any(of in str(argument) for argument in arguments)
            left[0] -= counts
            if before and counts and left[0] == 0:
                before(*arguments)
                die()
            result = call(*arguments, **keywords)
            if after and counts and left[0] == 0:
                die()
            return result

        return wrapper

    def half(state: Any, file: Any) -> None:
        with open(out / "whole", "wb") as whole:
            SAVE(state, whole)
        file.write((out / "whole").read_bytes()[:3000])
        file.flush()
        (out / "whole").unlink()

    def half_a_line(path: Path, entry: Any) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(entry)[:20])

    def nothing(*arguments: Any) -> None:
        pass

    if kind == "step":
        trained.step_in_place = before_or_after(trained.step_in_place, before=nothing)  # type: ignore[method-assign]
    elif kind == "backward":
        trained.scaler.step = before_or_after(trained.scaler.step, before=nothing)  # type: ignore[method-assign]
    elif kind == "half":
        torch.save = before_or_after(SAVE, before=half)
    elif kind == "written":
        os.replace = before_or_after(REPLACE, before=nothing, of="last.pt")
    elif kind == "replaced":
        os.replace = before_or_after(REPLACE, after=True, of="last.pt")
    elif kind == "shared":
        os.replace = before_or_after(REPLACE, before=nothing, of="model.safetensors")
    elif kind == "started":
        os.replace = before_or_after(REPLACE, before=nothing, of="run.json")
    elif kind == "curves":
        os.replace = before_or_after(REPLACE, before=nothing, of="curves.csv")
    elif kind in ("metrics", "validation"):
        append = run_directory.RunDirectory.append
        bound = before_or_after(append, before=lambda self, path, entry: half_a_line(path, entry), of=f"{kind}.jsonl")
        run_directory.RunDirectory.append = bound  # type: ignore[method-assign]
    trained.run(out, progress=False)


SAVE, REPLACE = torch.save, os.replace


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """The run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trained = trainer()
    trained.run(folder, progress=False)
    return folder, trained


def assert_same_run(out: Path, whole: tuple[Path, Trainer]) -> None:
    resumed = trainer()
    resumed.run(out, progress=False)
    assert_same_state(whole[1], resumed)
    assert metrics_of(out) == metrics_of(whole[0])
    for name in ("validation.jsonl", "curves.csv"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    for name, value in checkpoints.read_checkpoint(out / "model.safetensors")["model"].items():
        assert torch.equal(value, whole[1].model.state_dict()[name])
    assert sorted(path.name for path in out.iterdir()) == ALL_FILES


MOMENTS = [
    "step 1", "step 6", "step 14", "backward 9", "half 1", "half 2", "half 4", "written 1", "written 3", "replaced 1",
    "replaced 2", "replaced 4", "shared 1", "started 1", "metrics 1", "metrics 4", "validation 1", "validation 3",
    "curves 2",
]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_continues_to_the_same_bits(
    tmp_path: Path, whole: tuple[Path, Trainer], forks: Any, moment: str
) -> None:
    child = forks.Process(target=train_until, args=(tmp_path, moment))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, "the moment never came"
    if moment in ("half 2", "written 3"):
        assert any(map(writing.is_leftover, tmp_path.iterdir()))
    if (tmp_path / "last.pt").exists():
        assert torch.load(tmp_path / "last.pt", weights_only=True)["steps_done"] in (4, 5, 8, 10, 12, 14)
    assert_same_run(tmp_path, whole)


def test_killed_at_random_again_and_again_it_continues_to_the_same_bits(
    tmp_path: Path, whole: tuple[Path, Trainer], forks: Any
) -> None:
    chance = random.Random(4)
    kills = 0
    for _ in range(60):
        child = forks.Process(target=train_until, args=(tmp_path, "never"))
        child.start()
        time.sleep(chance.uniform(0, 0.5))
        child.kill()
        child.join(120)
        kills += child.exitcode == -signal.SIGKILL
        if kills >= 10 and (tmp_path / "last.pt").exists():
            break
    assert kills
    assert_same_run(tmp_path, whole)


def hold(out: Path, ready: Any) -> None:
    directory = run_directory.RunDirectory(out)
    directory.prepare()
    ready.set()
    time.sleep(60)


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_gone(
    tmp_path: Path, whole: tuple[Path, Trainer], forks: Any
) -> None:
    (tmp_path / ".lock").write_text("process 1 on another machine, which has ended\n")
    ready = forks.Event()
    child = forks.Process(target=hold, args=(tmp_path, ready))
    child.start()
    try:
        assert ready.wait(60)
        unwritten = tmp_path / f".last.{child.pid}.1.segadv.pt"
        unwritten.write_text("the first run is writing this")
        with pytest.raises(ValueError, match=rf"{tmp_path}: process {child.pid} on .* is training there, and two runs"):
            trainer().run(tmp_path, progress=False)
        assert unwritten.exists()
        assert not (tmp_path / "run.json").exists()
    finally:
        child.kill()
        child.join(60)
    assert_same_run(tmp_path, whole)
    assert_same_run(tmp_path, whole)  # the lock was given back


@pytest.mark.parametrize(("code", "refused"), [(errno.EACCES, True), (errno.ENOLCK, False)])
def test_a_lock_may_be_refused_in_two_ways_or_not_exist(
    code: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_directory.fcntl, "lockf", lockf)
    with pytest.raises(ValueError, match="another process is training there") if refused else nullcontext():
        run_directory.RunDirectory(tmp_path).prepare()


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 20_000, 1_200_000, 2_000_500])
def test_a_limit_on_files_leaves_the_previous_ones(tmp_path: Path, limit: int) -> None:
    """The system refuses to write on, at the beginning, in the middle and at the end of a file of 2 MB."""
    model = nn.Linear(1000, 500)
    paths = tmp_path / "last.pt", tmp_path / "model.safetensors"
    checkpoints.write_checkpoint(paths[0], {"model": model.state_dict()})
    checkpoints.share(paths[1], model, {"arm": "basic"}, 3)
    before = [path.read_bytes() for path in paths]
    writers = (
        lambda: checkpoints.write_checkpoint(paths[0], {"model": model.state_dict()}),
        lambda: checkpoints.share(paths[1], model, {"arm": "basic"}, 4),
    )
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous[1]))
    try:
        for writer in writers:
            try:
                writer()
            except OSError as error:
                messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    for message, path in zip(messages, paths, strict=True):
        assert f"{path} could not be written: " in message
        assert "File too large" in message
        assert "free some space there and give the same command again: it continues from " in message
        assert message.endswith(f"{paths[0]}, which is whole")
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.safetensors"]


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "validation.jsonl", "curves.csv", "last.pt"])
def test_each_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """A folder of that name, made when the run has begun, stands for whatever keeps it from being written."""
    prepare = run_directory.RunDirectory.prepare

    def then_in_the_way(directory: run_directory.RunDirectory) -> bool:
        found = prepare(directory)
        (tmp_path / file).mkdir()
        (tmp_path / file / "in the way").touch()
        return found

    monkeypatch.setattr(run_directory.RunDirectory, "prepare", then_in_the_way)
    with pytest.raises((OSError, ValueError), match=f"{tmp_path}/{file}"):
        trainer().run(tmp_path, progress=False)
    assert not any(map(writing.is_leftover, tmp_path.iterdir()))
    with pytest.raises(OSError, match=f"{file} could not be written: Is a directory$"):
        writing.write_text(tmp_path / file, "", of_run=True)  # the same command would meet it again


@pytest.mark.parametrize("of_run", [False, True])
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space there"),
        (errno.EROFS, "make the folder writable"),
        (errno.EIO, ""),
        (errno.ENOTDIR, ""),
    ],
)
def test_the_remedy_is_that_of_the_error(tmp_path: Path, code: int, remedy: str, of_run: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    continues = "give the same command again" if of_run and code != errno.ENOTDIR else ""
    advice = " and ".join(filter(None, [remedy, continues]))
    for whole in (False, True):
        with (
            pytest.raises(OSError, match="could not be written") as raised,
            writing.atomic_write(path, of_run=of_run) as temporary,
            writing.atomic_write(temporary) as inner,  # explained once, of the file that is wanted
        ):
            raise OSError(code, os.strerror(code), str(inner))
        assert raised.value.errno == code
        there = f": it continues from {tmp_path / 'last.pt'}, which is whole" if whole and continues else ""
        told = f"{path} could not be written: {os.strerror(code)}"
        assert raised.value.strerror == told + (f"; {advice}{there}" if advice else "")
        (tmp_path / "last.pt").touch()


def test_an_error_about_another_file_is_not_explained(tmp_path: Path) -> None:
    """What is read to be written, such as a font of a picture."""
    with (
        pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*font\.ttf'") as raised,
        writing.atomic_write(tmp_path / "picture.png"),
    ):
        (tmp_path / "fonts" / "font.ttf").read_bytes()
    assert "could not be written" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "file",
    [
        "run.json",
        "model.safetensors",
        "metrics.jsonl",
        "validation.jsonl",
        "curves.csv",
        "training.png",
        "robustness.png",
    ],
)
def test_files_that_no_run_left_are_kept(tmp_path: Path, file: str) -> None:
    """Others use these names, too: Hugging Face's weights are a model.safetensors."""
    (tmp_path / file).write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} holds {file}, but neither last.pt nor a run's run.json: no"):
        trainer().run(tmp_path, progress=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / file).unlink()
    trainer().run(tmp_path, progress=False)  # and nobody is kept out


@pytest.mark.parametrize("moment", range(7))
def test_a_run_killed_while_it_clears_its_folder_is_still_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """What tells that the files are a run's goes last."""
    directory = run_directory.RunDirectory(tmp_path)
    for path in (*directory._written, directory.run):
        path.touch()
    directory.run.write_text('{"config": {}, "starts": []}')
    unlink, left = Path.unlink, iter(range(moment))

    def killed(path: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.clear()
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 7 - moment
    assert not directory.prepare()
    directory.close()


# --- what is written ----------------------------------------------------------------------------------------------


def test_shared_weights_are_read_like_a_checkpoint(whole: tuple[Path, Trainer]) -> None:
    folder, trained = whole
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["segadv"])
    assert metadata["arm"] == "random-fgsm"
    assert metadata["steps"] == 14
    assert metadata["description"] == {"model": {"name": "tiny"}}
    configs = [training.read_config(folder / name) for name in ("last.pt", "model.safetensors")]
    assert configs[0] == configs[1]
    assert configs[0]["description"] == {"model": {"name": "tiny"}}
    assert configs[0]["crop"] == [16, 24]
    assert checkpoints.read_checkpoint(folder / "model.safetensors")["steps_done"] == 14
    assert (folder / "model.safetensors").stat().st_mode == (folder / "last.pt").stat().st_mode
    for name in ("last.pt", "model.safetensors"):
        model = training.load_model(folder / name, nn.Sequential(*tiny_model().children()))
        compiled = training.load_model(folder / name, torch.compile(tiny_model()))  # type: ignore[arg-type]
        for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
            assert torch.equal(one, other)
        for key, value in trained.model.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(ValueError, match="another architecture"):
        training.load_model(folder / "model.safetensors", nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"is a folder: give its last\.pt or model\.safetensors"):
        training.load_model(folder, nn.Linear(2, 3))
    with pytest.raises(ValueError, match="holds weights only; to continue a run"):
        trainer().load(folder / "model.safetensors")


@pytest.mark.parametrize("line", [b"7", b'{"loss": 1}', b'{"st', b"\xff"])
def test_lines_end_before_one_that_is_no_object(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert whole_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    drop_lines_after(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_full_disk_leaves_the_lines_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(text[:5].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"{path} could not be written: No space left on device; free some space"):
        drop_lines_after(path, 1)
    assert whole_lines(path) == [{"step": 1}, {"step": 2}]


def test_every_flipped_bit_of_weights_and_values_is_found(tmp_path: Path) -> None:
    path, weight = tmp_path / "last.pt", torch.arange(8.0)
    with serialization.patch("save.compute_crc32", False):  # what else is saved may go without checksums
        checkpoints.write_checkpoint(path, {"config": {"arm": "basic"}, "model": {"weight": weight}, "steps_done": 4})
    assert torch.equal(checkpoints.read_checkpoint(path)["model"]["weight"], weight)
    content = path.read_bytes()
    for part in (weight.numpy().tobytes(), b"basic", b"steps_done"):
        start = content.index(part)
        for bit in range(8 * start, 8 * (start + len(part))):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"last\.pt cannot be read .* does not have its checksum\)"):
                checkpoints.read_checkpoint(path)


@pytest.mark.parametrize("missing", ["config", "model", "steps_done"])
def test_what_lacks_an_entry_of_a_checkpoint_is_none(missing: str, tmp_path: Path) -> None:
    state: dict[str, Any] = {"config": {}, "model": {}, "steps_done": 1}
    torch.save(state, tmp_path / "last.pt")
    assert checkpoints.read_checkpoint(tmp_path / "last.pt") == state
    del state[missing]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match=r"last\.pt cannot be read as a checkpoint of segadv .*: it holds something else"
    ):
        checkpoints.read_checkpoint(tmp_path / "last.pt")


def test_shared_weights_of_someone_else_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    for content in (path.read_bytes(), b"", b"no weights"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.safetensors cannot be read as a checkpoint of segadv"):
            training.load_model(path, tiny_model())


def test_weights_that_are_shared_later_tell_of_the_processes_that_trained_them(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 2, "monitor_every": 0, "validation": Validation()}
    trainer(**changes).run(tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["config"]["processes"] = 2
    torch.save(state, tmp_path / "last.pt")
    (tmp_path / "model.safetensors").unlink()
    trainer(**changes).run(tmp_path, progress=False)  # one process, and nothing is left to train
    assert training.read_config(tmp_path / "model.safetensors")["processes"] == 2


def test_checkpoints_and_shared_weights_are_on_the_disk_before_they_replace_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def replaced(source: Any, target: Any) -> None:
        events.append(Path(target).name)
        REPLACE(source, target)

    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync"))
    monkeypatch.setattr(os, "replace", replaced)
    trainer(steps=2, monitor_every=0, validation=Validation()).run(tmp_path, progress=False)
    for name in ("last.pt", "model.safetensors"):
        assert events[events.index(name) - 1] == "fsync"


def test_tied_and_sliced_weights_are_shared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("view", torch.arange(12.0).view(3, 4).T)
    path = tmp_path / "model.safetensors"
    checkpoints.share(path, model, {}, 1)
    for name, value in checkpoints.read_checkpoint(path)["model"].items():
        assert torch.equal(value, model.state_dict()[name])


def test_every_start_is_in_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = trainer()
    monkeypatch.setattr(stopped, "save", lambda path: (Trainer.save(stopped, path), die_softly()))
    with pytest.raises(RuntimeError, match="the power is gone"):
        stopped.run(tmp_path, progress=False)
    first = json.loads((tmp_path / "run.json").read_text())
    trainer(log_every=5).run(tmp_path, progress=False)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["starts"][0] == first["starts"][0]
    assert {name: content[name] for name in ("config", "description")} == {
        name: first[name] for name in ("config", "description")
    }
    assert content["config"] | {"description": content["description"]} == training.read_config(tmp_path / "last.pt") | {
        "log_every": 3
    }
    assert [start["steps_done"] for start in content["starts"]] == [0, 4]
    assert [start["different"] for start in content["starts"]] == [{}, {"log_every": 5}]
    for start in content["starts"]:
        assert start["command"] == shlex.join(sys.orig_argv)
        found = start["environment"]
        assert {"segadv", "torch", "numpy", "python", "torch_build", "build_info", "processor"} <= found.keys()
        assert (found["torch"], found["device"]) == (torch.__version__, "cpu")
        assert found["threads"] == torch.get_num_threads()
        assert start["time"].endswith("+00:00")
        assert start["git_commit"] == run_directory.git_commit()
    # with nothing left to do nothing is started
    trainer().run(tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text()) == content


def die_softly() -> None:
    raise RuntimeError("the power is gone")


def test_a_run_that_is_started_anew_forgets_the_former(tmp_path: Path) -> None:
    trainer().run(tmp_path, progress=False)
    (tmp_path / "last.pt").unlink()
    trainer(seed=8, validation=Validation()).run(tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["seed"] == 8
    assert training.read_config(tmp_path / "model.safetensors")["seed"] == 8
    assert [line["step"] for line in metrics_of(tmp_path)] == [3, 6, 9, 12, 14]
    assert not (tmp_path / "validation.jsonl").exists()
    assert not (tmp_path / "curves.csv").exists()


def test_commit_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert run_directory.git_commit() is None
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], [*person, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert run_directory.git_commit() == head
    (tmp_path / "file").write_text("two")
    assert run_directory.git_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_directory.git_commit() is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 3, "starts": []}', '{"config": {}, "starts": 3}'])
def test_a_run_json_of_someone_else_is_replaced(content: str, tmp_path: Path) -> None:
    directory = run_directory.RunDirectory(tmp_path)
    directory.run.write_text(content)
    settings = {"arm": "basic", "description": {"data": "squares"}}
    assert directory.is_of_another(settings)
    directory.start(settings, 3, torch.device("cpu"))
    written = json.loads(directory.run.read_text())
    assert (written["config"], written["description"]) == ({"arm": "basic"}, {"data": "squares"})
    assert [start["steps_done"] for start in written["starts"]] == [3]
    assert not directory.is_of_another(settings)


def test_a_checkpoint_too_large_for_the_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise MemoryError

    checkpoints.write_checkpoint(tmp_path / "last.pt", {})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        checkpoints.read_checkpoint(tmp_path / "last.pt")


def test_another_description_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    other = Trainer(config(steps=4), tiny_model(), Squares(), description={"model": {"name": "tiny", "size": (1, 2)}})
    with pytest.raises(ValueError, match=r"differs in description.model.name \(None there, 'tiny' here\), desc.*size"):
        other.run(tmp_path, progress=False)
    assert other.description == {"model": {"name": "tiny", "size": [1, 2]}}
    with pytest.raises(TypeError, match="JSON"):
        Trainer(config(), tiny_model(), Squares(), description={"model": tiny_model()})
