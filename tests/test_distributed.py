"""Several processes train the network that one process would: gloo on this machine, started by torchrun.

What they do stands in two_processes.py; here it is compared with one process. Networks have group norm where nothing
else is said: batch normalisation over several processes exists on GPUs only.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import SAMPLES, Squares, metrics_of
from two_processes import VALIDATION, network, outcome, trained, trainer, void_batches

from segadv import distributed
from segadv.checkpoints import read_config
from segadv.data import EpochSampler
from segadv.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")  # as the other processes: so come the same bits

TESTS = Path(__file__).parent


def torchrun(out: Path, *names: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    paths = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*command, str(TESTS / "two_processes.py"), str(out), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done everything once."""
    folder = tmp_path_factory.mktemp("two")
    stopped_after_four(folder / "one")
    result = torchrun(folder)
    assert result.returncode == 0, result.stderr
    return folder


def stopped_after_four(folder: Path) -> None:
    """A run of one process whose power goes."""
    stopped = trainer()
    real_step = stopped.step_in_place

    def step(*arguments: Any) -> Any:
        if stopped.steps_done == 4:
            raise RuntimeError("the power is gone")
        return real_step(*arguments)

    stopped.step_in_place = step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power"):
        stopped.run(folder, progress=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One process, float64, accumulation 1."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder, validation=VALIDATION)


def of(out: Path, name: str) -> list[Any]:
    """What the two processes found."""
    return [torch.load(out / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """To the bit."""
    assert first["steps_done"] == second["steps_done"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert all(map(torch.equal, first["momenta"], second["momenta"]))


def assert_close(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    assert first["steps_done"] == second["steps_done"]
    for name, value in first["weights"].items():
        torch.testing.assert_close(value, second["weights"][name], rtol=tolerance, atol=tolerance)
    for one, other in zip(first["momenta"], second["momenta"], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_same_curve(first: Path, second: Path, tolerance: float) -> None:
    lines = [metrics_of(folder) for folder in (first, second)]
    assert len(lines[0]) == len(lines[1]) == 5
    for one, other in zip(*lines, strict=True):
        for name, value in other.items():
            assert one[name] == (value if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)), name


# --- the same training --------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_does(out: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    """In float64, 14 steps with attack: what is left is the rounding of sums in another order, 1e-16 each.

    That the attack's signs are the same shows that its gradients do not depend on the share either.
    """
    first, second = of(out, "float64")
    assert_equal(first, second)
    assert_close(first, alone[1], 1e-12)
    assert_same_curve(out / "float64", alone[0], 1e-12)


def test_in_float32_the_difference_is_rounding(out: Path, tmp_path: Path) -> None:
    """float32 rounds 2^29 times more coarsely than float64, where the difference is below 1e-12: 1e-4 < 2^29 * 1e-12.

    Without an attack: the sign of a gradient near 0 may come out differently.
    """
    first, second = of(out, "float32")
    assert_equal(first, second)
    assert_close(first, trained(tmp_path, torch.float32, arm="basic"), 1e-4)
    assert_same_curve(out / "float32", tmp_path, 1e-4)


def test_accumulation_divides_the_same_batch(out: Path, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    first, second = of(out, "accumulated")
    assert_equal(first, second)
    assert_close(first, alone[1], 1e-12)
    assert_same_curve(out / "accumulated", alone[0], 1e-12)
    assert_close(trained(tmp_path, accumulation=4), alone[1], 1e-12)
    assert_same_curve(tmp_path, alone[0], 1e-12)


def test_numbers_of_labelled_pixels_may_differ(out: Path) -> None:
    """Against plain PyTorch in one process: the mean over the batch's labelled pixels, SGD as the papers write it."""
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step, (images, labels) in enumerate(void_batches()):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 14) ** 0.9
        logits = F.interpolate(plain(images), size=(16, 24), mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
        loss = total / max(int((labels != 255).sum()), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    first, second = of(out, "one_all_void")
    assert_equal(first, second)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-12, atol=1e-12)
    for step, loss in enumerate(losses):
        torch.testing.assert_close(first["losses"][step] + second["losses"][step], loss, rtol=1e-12, atol=1e-12)
    assert second["losses"][0] == 0
    assert losses[2] == 0


def test_accumulation_weighs_parts_by_their_labelled_pixels() -> None:
    """One process, two parts and four, of which some are void."""
    ends = []
    for accumulation in (1, 2, 4):
        found = trainer(arm="basic", accumulation=accumulation)
        losses = [found.step(images, labels, []).loss for images, labels in void_batches()]
        ends.append(outcome(found) | {"losses": torch.stack(losses)})
    for end in ends[1:]:
        assert_close(ends[0], end, 1e-12)
        torch.testing.assert_close(ends[0]["losses"], end["losses"], rtol=1e-12, atol=1e-12)


def test_attacked_samples_are_the_same_however_the_batch_is_divided(out: Path) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 7, "steps": 6}
    whole = list(EpochSampler(SAMPLES, **options))
    for accumulation in (1, 2):
        shares = [
            list(EpochSampler(SAMPLES, **options, rank=rank, processes=2, accumulation=accumulation)) for rank in (0, 1)
        ]
        if accumulation == 2:
            assert shares == of(out, "shares")
        for batch, first, second in zip(whole, *shares, strict=True):
            if accumulation == 1:
                assert first + second == batch
            else:  # part after part
                assert [first[0], second[0], first[1], second[1]] == batch
    tail = list(EpochSampler(SAMPLES, **options, rank=1, processes=2, start_step=4))
    assert tail == list(EpochSampler(SAMPLES, **options, rank=1, processes=2))[4:]


def test_processes_draw_random_numbers_of_their_own(out: Path) -> None:
    first, second = of(out, "random_numbers")
    assert len({*first["eps"].tolist(), *second["eps"].tolist()}) == 4


def test_batch_norm_on_the_cpu_stays_equal(out: Path) -> None:
    first, second = of(out, "batch_norm")
    assert "1.running_mean" in first["weights"]
    assert_equal(first, second)


def test_early_stop_is_decided_by_one_for_all(out: Path) -> None:
    first, second = of(out, "early_stop")
    assert first["stopped_at"] == second["stopped_at"] == 9
    assert_equal(first, second)


# --- what it costs ------------------------------------------------------------------------------------------------


def test_a_step_communicates_gradients_and_a_count(out: Path) -> None:
    """The small network's gradients fit one bucket of DistributedDataParallel."""
    for found in of(out, "collectives"):
        assert found.pop("attack") == {}
        assert found.pop("with buffers") == {"gloo:all_reduce": 1}
        assert len(found) == 4
        assert all(names == {"gloo:all_reduce": 2} for names in found.values()), found


def test_only_the_first_process_writes(out: Path) -> None:
    first, second = of(out, "only_the_first_writes")
    folder = out / "only_the_first_writes"
    files = {"last.pt", "model.safetensors", "metrics.jsonl", "validation.jsonl", "curves.csv", "run.json"}
    assert files | {".lock", "training.png", "robustness.png"} == {path.name for path in folder.iterdir()}
    written = {re.sub(r"^\.(.+?)\.[\d.]+\.segadv(?=\.)", r"\1", Path(name).name) for name in first}
    assert written >= files
    assert second == []


# --- validation -----------------------------------------------------------------------------------------------------


def test_validation_is_that_of_one_process(out: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    texts = [(folder / "validation.jsonl").read_text() for folder in (out / "float64", alone[0])]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["step"] for line in lines[0]] == [7, 14]
    for one, other in zip(*lines, strict=True):
        for row, expected in zip(one["rows"], other["rows"], strict=True):
            assert row == pytest.approx(expected, abs=1e-12)


def test_shares_of_an_evaluation_add_up(out: Path) -> None:
    first, second = of(out, "validated")
    assert first == second
    data = Squares(torch.float64)
    for found, batches in zip(first, ([[0, 1], [2, 3], [4]], [[0, 1, 2]]), strict=True):
        loader = [(data.images[indices], data.labels[indices]) for indices in batches]
        whole = evaluate(network(), loader, ["fgsm", "segpgd"], [0.0, 0.03], steps=4)  # segpgd: the same random starts
        attacked = next(entry for entry in found if entry["attack"] == "fgsm" and entry["eps"] > 0)
        for entry, expected in zip(found, whole.measurements, strict=True):
            assert (entry["attack"], entry["eps"]) == (expected.attack, expected.eps)
            assert entry["confusion"] == expected.confusion.tolist()
            assert entry["image_miou"] == pytest.approx(expected.image_miou, abs=1e-12)
            assert entry["without_each"] == pytest.approx(expected.without_each.tolist(), abs=1e-12)
            assert entry["batch_size"] == whole.run["batch_size"]
        worst = next(entry for entry in found if entry["attack"] == "worst-case" and entry["eps"] > 0)
        assert worst["pixel_accuracy"] <= attacked["pixel_accuracy"]


# --- when it goes wrong ---------------------------------------------------------------------------------------------


def test_ctrl_c_at_one_stops_all_at_the_same_step(out: Path) -> None:
    """And the same command continues to the same bits, batch norm's running statistics too."""
    found, whole = of(out, "interrupted"), of(out, "batch_norm")
    for one, other in zip(found, whole, strict=True):
        assert one["raised"]
        assert one["handler"]
        assert one["stopped_after"] == 7  # no line of metrics is due there
        assert_equal(one, other)
    assert metrics_of(out / "interrupted") == metrics_of(out / "batch_norm")


def test_ctrl_c_in_the_last_step_stops_all(out: Path) -> None:
    """With the last checkpoint written; the same command does what was left."""
    found, whole = of(out, "interrupted_at_the_end"), of(out, "batch_norm")
    for one, other in zip(found, whole, strict=True):
        assert one["raised"]
        assert not one["shared"]
        assert_equal(one, other)
    assert (out / "interrupted_at_the_end" / "model.safetensors").exists()
    assert metrics_of(out / "interrupted_at_the_end") == metrics_of(out / "batch_norm")


def test_a_full_disk_is_told_to_all(out: Path) -> None:
    for found in of(out, "full_disk"):
        assert "last.pt could not be written: No space left on device; free some space" in found["message"]
        assert found["checkpoint"] == 4
        assert sorted(found["files"]) == [".lock", "last.pt", "metrics.jsonl", "run.json"]


def test_another_number_of_processes_is_refused_unless_it_is_wanted(
    out: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    for found in of(out, "refused"):
        assert found["batch"] == "batch_size must be divisible by processes x accumulation = 2 x 2, got 6"
        assert "device" in found
        assert (
            "one/last.pt belongs to another run, it differs in processes (1 there, 2 here): start it with 1 "
            in (found["processes"])
        )
        assert "allow_other_split" in found["processes"]
        # continued nevertheless: the same batches
        assert_close(found, alone[1], 1e-12)
    starts = json.loads((out / "one" / "run.json").read_text())["starts"]
    assert [(start["steps_done"], start["different"].get("processes")) for start in starts] == [(0, None), (4, 2)]
    assert read_config(out / "one" / "last.pt")["processes"] == 2


def test_a_process_that_is_killed_stops_the_job_and_the_same_command_continues(out: Path, tmp_path: Path) -> None:
    (tmp_path / "kill").touch()
    result = torchrun(tmp_path, "killed")
    assert result.returncode != 0
    assert (
        "process 0 of 2 stops: another process ended or cannot be reached any more, its own message tells why; the "
        f"same command continues from {tmp_path}/killed/last.pt"
    ) in result.stderr
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in result.stderr
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["steps_done"] == 4
    (tmp_path / "kill").unlink()
    result = torchrun(tmp_path, "killed")
    assert result.returncode == 0, result.stderr
    for one, other in zip(of(tmp_path, "killed"), of(out, "float64"), strict=True):
        assert_equal(one, other)
    assert metrics_of(tmp_path / "killed") == metrics_of(out / "float64")
    validation = [(folder / "validation.jsonl").read_text() for folder in (tmp_path / "killed", out / "float64")]
    assert validation[0] == validation[1]


def test_a_single_process_leaves_as_usual() -> None:
    with pytest.raises(SystemExit) as exit_of_one:
        distributed.leave(3)
    assert exit_of_one.value.code == 3


def test_one_of_several_leaves_at_once_with_all_it_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err))
    left = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append((status, out.getvalue(), err.getvalue())))
    print("trained")
    print("slowly", file=sys.stderr)
    with pytest.raises(SystemExit):  # as os._exit came back
        distributed.leave(3)
    assert left == [(3, b"trained\n", b"slowly\n")]


def test_who_takes_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs and a group that are not there."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, timeout: called.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: called.append("left"))
    for device, expected in {"auto": [1, "nccl"], "cuda": [1, "nccl"], "cpu": ["gloo"]}.items():
        with distributed.process_group(device):
            assert called == expected
        assert called == [*expected, "left"]
        called.clear()
    with pytest.raises(KeyError), distributed.process_group("cpu"):
        raise KeyError
    assert called == ["gloo"]  # leaving would wait for the others
    called.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine finds no GPU of its own, there are 1"):
        distributed.process_group("auto").__enter__()
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    with distributed.process_group("auto"):  # inside of another one
        pass
    assert called == []


def test_a_number_of_processes_without_torchrun_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers set it, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.started() == 1


def test_only_errors_of_the_communication_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError) as raised, distributed.explained("nothing"):
        raise error
    assert raised.value is error
    for error in (
        torch.distributed.DistBackendError("NCCL error"),
        RuntimeError("[gloo/transport/tcp/pair.cc] closed"),
    ):
        message = r"process 0 of 2 stops: another process ended .*; it goes on"
        with pytest.raises(RuntimeError, match=message), distributed.explained("it goes on"):
            raise error


def test_processes_without_a_group_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train by itself, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"torchrun started 2 processes, but the process group has 1: .*process_group"):
        trainer()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="several processes, got 'cuda:0'"):
        distributed.process_group("cuda:0").__enter__()
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match="process 1 of this machine finds no GPU of its own"):
            distributed.process_group("cuda").__enter__()


def test_alone_everything_means_one_process() -> None:
    with distributed.process_group("cpu"):
        assert (distributed.rank(), distributed.world_size(), distributed.started()) == (0, 1, 1)
        assert distributed.gather("x") == ["x"]
        assert distributed.add_up(torch.tensor(3)) == 3
        assert distributed.from_first(functools.partial(int, "7")) == 7
    error = RuntimeError("gloo")
    with pytest.raises(RuntimeError) as raised, distributed.explained("nothing"):
        raise error
    assert raised.value is error
