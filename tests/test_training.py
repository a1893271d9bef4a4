"""segadv.training: arms, coins, one step, resuming to the same bits, checkpoints that survive, metrics."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from segadv import models, training
from segadv.attacks import BIM, FGSM, NFGSM, PGD, AttackInfo, CheckpointFGSM, FastNewton, RandomFGSM, SegPGD
from segadv.data import Augmentation, Augmented, Cityscapes, EpochSampler
from segadv.evaluation import EvaluationResult, evaluate
from segadv.interrupts import Interrupts
from segadv.training import TrainConfig, Trainer, Validation

CLASSES, SAMPLES, SIZE = 5, 13, (20, 28)
FILES = [".lock", "last.pt", "metrics.jsonl", "model.safetensors", "run.json"]


class Squares(Dataset[tuple[Tensor, Tensor]]):
    """Noisy images whose colour tells the label, some pixels ignored; `on_read` gets every index read."""

    def __init__(self, dtype: torch.dtype = torch.float32, on_read: Callable[[int], None] | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        coarse = torch.randint(0, CLASSES, (SAMPLES, 5, 7), generator=generator)
        labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
        palette = torch.rand(CLASSES, 3, generator=generator)
        images = palette[labels].movedim(3, 1)
        self.images = (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1).to(dtype)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        self.labels = labels.to(torch.uint8)
        self.on_read = on_read

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.on_read is not None:
            self.on_read(index)
        return self.images[index], self.labels[index]


def tiny_model(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(dropout),
        nn.Conv2d(8, CLASSES, 1),
    )


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "arm": "basic",
        "steps": 14,
        "batch_size": 4,
        "crop": (16, 24),
        "learning_rate": 0.1,
        "seed": 7,
        "device": "cpu",
        "log_every": 3,
        "checkpoint_every": 4,
    }
    return TrainConfig(**{**values, **changes})


def run(out_dir: Path, model: nn.Module | None = None, **changes: Any) -> Trainer:
    trainer = Trainer(config(**changes), tiny_model() if model is None else model, Squares())
    trainer.run(out_dir, progress=False)
    return trainer


def metrics_of(out_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_s"} for line in lines]


def assert_same_state(first: Trainer, second: Trainer) -> None:
    assert first.steps_done == second.steps_done
    states = [{**trainer.model.state_dict(), **flat(trainer.optimizer.state_dict())} for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name])), name


def flat(optimizer: dict[str, Any]) -> dict[str, Any]:
    momenta = {f"momentum {key}": value["momentum_buffer"] for key, value in optimizer["state"].items()}
    return {**momenta, "lr": optimizer["param_groups"][0]["lr"]}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_device_does_not_matter(tmp_path: Path, workers: int) -> None:
    """For a run with probes and validations, and for a step by hand."""
    changes: dict[str, Any] = {"arm": "fast-newton", "workers": workers, "monitor_every": 5}
    changes["validation"] = Validation(every=5, attacks=("fgsm",), eps=(0.0, 0.03))
    trainers, losses = {}, {}
    images, labels = (torch.stack(batch) for batch in zip(*(Squares()[i] for i in range(4)), strict=True))
    for device in ("cpu", "meta"):  # on which tensors have no values
        trainers[device] = Trainer(config(**changes), tiny_model(), Squares(), validation_dataset=Squares())
        with torch.device(device):
            trainers[device].run(tmp_path / device, progress=False)
        trainer = Trainer(config(arm="fast-newton"), tiny_model(), Squares())
        with torch.device(device):
            losses[device] = trainer.step(images, labels, [1, 3]).loss
    assert metrics_of(tmp_path / "meta") == metrics_of(tmp_path / "cpu")
    assert_same_state(trainers["meta"], trainers["cpu"])
    assert torch.equal(losses["meta"], losses["cpu"])


# --- the arms and the coins ---------------------------------------------------------------------------------


def test_arms_are_the_papers() -> None:
    model, generator = tiny_model(), torch.Generator()
    arms = {name: make(model, TrainConfig().eps, generator) for name, make in training.ARMS.items()}
    assert list(arms) == [
        "basic", "fgsm", "random-fgsm", "bim-3", "fast-newton",
        "pgd-3", "pgd-7", "segpgd-3", "segpgd-7", "rs-fgsm", "n-fgsm", "kim",
    ]  # fmt: skip
    assert arms["basic"] is None
    assert type(arms["fgsm"]) is FGSM
    assert arms["fgsm"].eps == 0.03
    assert type(arms["random-fgsm"]) is RandomFGSM
    assert arms["random-fgsm"].eps == 0.03
    assert arms["random-fgsm"].generator is generator
    assert type(arms["bim-3"]) is BIM
    assert (arms["bim-3"].eps, arms["bim-3"].alpha, arms["bim-3"].steps) == (0.03, 0.01, 3)
    assert type(arms["fast-newton"]) is FastNewton
    assert (arms["fast-newton"].clamp_negative, arms["fast-newton"].max_eps) == (False, None)
    for name, kind, steps, alpha in (
        ("pgd-3", PGD, 3, 0.01),
        ("pgd-7", PGD, 7, 0.01),
        ("segpgd-3", SegPGD, 3, 0.01),
        ("segpgd-7", SegPGD, 7, 0.01),
        ("rs-fgsm", PGD, 1, 0.0375),
    ):
        assert type(arms[name]) is kind
        assert (arms[name].eps, arms[name].steps, arms[name].random_start) == (0.03, steps, True)
        assert arms[name].alpha == pytest.approx(alpha)
        assert arms[name].generator is generator
        assert (arms[name].restarts, arms[name].best, arms[name].targeted) == (1, False, False)
    assert type(arms["n-fgsm"]) is NFGSM
    assert (arms["n-fgsm"].eps, arms["n-fgsm"].noise, arms["n-fgsm"].generator) == (0.03, 2, generator)
    assert type(arms["kim"]) is CheckpointFGSM
    assert (arms["kim"].eps, arms["kim"].checkpoints) == (0.03, 3)
    assert all(attack.bn == "eval" for attack in arms.values() if attack is not None)
    for name, make in training.ARMS.items():  # all keep to another eps
        attack = make(model, 8 / 255, generator)
        assert getattr(attack, "eps", 8 / 255) == 8 / 255
        if isinstance(attack, BIM):
            assert attack.alpha == pytest.approx(arms[name].alpha / 0.03 * 8 / 255)


def test_the_config_decides_the_size_of_the_perturbation() -> None:
    images, labels = torch.rand(4, 3, 16, 24), torch.randint(0, CLASSES, (4, 16, 24))
    for eps in (4 / 255, 1):
        trainer = Trainer(config(arm="fgsm", eps=eps, adversarial_share=1.0), tiny_model(), Squares())
        assert trainer.step(images, labels, range(4)).eps.tolist() == pytest.approx([eps] * 4)


def test_defaults_are_the_papers() -> None:
    """Half of the samples adversarial, at eps 0.03; SGD and poly schedule as PSPNet's."""
    own = TrainConfig()
    assert (own.arm, own.eps, own.adversarial_share) == ("fast-newton", 0.03, 0.5)
    assert (own.momentum, own.weight_decay, own.power) == (0.9, 1e-4, 0.9)


def test_coins_are_fair_independent_and_the_samples_own() -> None:
    coins = np.stack([training.adversarial_coins(3, epoch, 1000, 0.5) for epoch in range(40)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    assert abs(coins.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(40)
    signs = 2.0 * coins - 1
    bound = 5 / np.sqrt(39 * 999)
    assert abs((signs[1:] * signs[:-1]).mean()) < bound  # a sample's epochs
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < bound  # neighbours
    other_seed = np.stack([training.adversarial_coins(4, epoch, 1000, 0.5) for epoch in range(40)])
    assert abs((signs * (2.0 * other_seed - 1)).mean()) < bound
    assert np.array_equal(training.adversarial_coins(3, 5, 100, 0.5), coins[5, :100])
    stream = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(2, 5)))  # not that of the order of the samples
    assert np.array_equal(coins[5], stream.random(1000) < 0.5)
    quarter = training.adversarial_coins(3, 0, 10000, 0.25)
    assert abs(quarter.mean() - 0.25) < 0.02
    assert not training.adversarial_coins(3, 0, 1000, 0.0).any()
    assert training.adversarial_coins(3, 0, 1000, 1.0).all()


class Recorder:
    """Stands for an attack: records what it was given, and inverts the images."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, images: Tensor, labels: Tensor, *, return_info: bool) -> tuple[Tensor, AttackInfo]:
        assert return_info
        self.calls.append((images.clone(), labels))
        eps = torch.full((len(images),), 0.5)
        return 1 - images, AttackInfo(eps=eps, gain=eps - 1)


def test_the_same_samples_are_chosen_in_every_arm_and_only_they_are_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    for arm in training.ARMS:
        trainer = Trainer(config(arm=arm), tiny_model(), Squares())
        chosen: list[tuple[list[int], list[float]]] = []
        real_step = trainer.step_in_place

        def step(images: Tensor, labels: Tensor, counts: list[int], real: Any = real_step) -> Any:
            chosen.append((counts, images.mean((1, 2, 3)).tolist()))  # noqa: B023
            return real(images, labels, counts)

        monkeypatch.setattr(trainer, "step_in_place", step)
        trainer.run(tmp_path / arm, progress=False)
        seen[arm] = chosen
    assert all(chosen == seen["basic"] for chosen in seen.values())
    sampler = EpochSampler(SAMPLES, batch_size=4, seed=7, steps=14)
    data = Augmented(Squares(), crop=(16, 24), seed=7)
    for keys, (counts, means) in zip(sampler, seen["basic"], strict=True):
        coins = [training.adversarial_coins(7, epoch, SAMPLES, 0.5)[index] for epoch, index in keys]
        order = [key for wanted in (True, False) for key, coin in zip(keys, coins, strict=True) if coin == wanted]
        assert counts == [sum(coins)]
        assert means == torch.stack([data[key][0] for key in order]).mean((1, 2, 3)).tolist()
        assert len(set(means)) == 4
    line = metrics_of(tmp_path / "fgsm")[0]
    assert line["adversarial_share"] == sum(counts[0] for counts, _ in seen["basic"][:3]) / 12
    assert metrics_of(tmp_path / "basic")[0]["adversarial_share"] == 0


def test_attack_gets_the_chosen_samples_and_the_model_their_adversarial_versions() -> None:
    batches: list[Tensor] = []
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].clone()))
    trainer = Trainer(config(), model, Squares())
    attack = Recorder()
    trainer.attack = attack  # type: ignore[assignment]
    images, labels = torch.rand(4, 3, 16, 24), torch.randint(0, CLASSES, (4, 16, 24))
    before = images.clone(), labels.clone()
    result = trainer.step(images, labels, [1, 3])
    assert len(attack.calls) == 1
    assert torch.equal(attack.calls[0][0], images[[1, 3]])
    assert torch.equal(attack.calls[0][1], labels[[1, 3]])
    assert torch.equal(batches[-1], torch.stack([1 - images[1], 1 - images[3], images[0], images[2]]))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert result.eps.tolist() == [0.5, 0.5]
    assert result.gain.tolist() == [-0.5, -0.5]
    assert result.skipped.tolist() == [False, False]
    assert not trainer.step(images, labels, []).eps.numel()
    assert len(attack.calls) == 1
    assert trainer.steps_done == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_attack_reads_the_chosen_images_where_they_are(channels_last: bool) -> None:
    """And does to them what it does to copies of them, which come anywhere in a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (4, 16, 24), generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ends = []
    for in_place in (True, False):
        trainer = Trainer(config(arm="fast-newton", channels_last=channels_last), tiny_model(dropout=0), Squares())
        trainer.model.double()
        attack, attacked = trainer.attack, []
        assert attack is not None

        def recording(images: Tensor, labels: Tensor, *, return_info: bool, attack: Any = attack) -> Any:
            assert images.is_contiguous(memory_format=layout)
            attacked.append(images)  # noqa: B023
            return attack(images, labels, return_info=return_info)

        trainer.attack = recording  # type: ignore[assignment]
        if in_place:
            batch = images.clone(memory_format=layout)
            result = trainer.step_in_place(batch, labels, [2])
            assert attacked[0].data_ptr() == batch.data_ptr()
            assert torch.equal(batch[2:], images[2:])
        else:
            order = [3, 1, 2, 0]
            result = trainer.step(images[order], labels[order], [1, 3])
        assert not result.skipped.any()
        assert len(attacked) == 1
        assert (
            (attacked[0] - images[[0, 1] if in_place else [1, 0]]).abs().amax((1, 2, 3)) > 0.1 * result.eps.abs()
        ).all()
        ends.append([result.loss, result.eps, result.gain, attacked[0], *trainer.model.state_dict().values()])
    for at in (1, 2, 3):
        ends[1][at] = ends[1][at].flip(0)
    for there, here in zip(*ends, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-12)


def test_positions_in_a_tensor_are_positions() -> None:
    trainer = Trainer(config(arm="fgsm"), tiny_model(), Squares())
    images, labels = torch.rand(4, 3, 16, 24), torch.zeros(4, 16, 24, dtype=torch.int64)
    assert len(trainer.step(images, labels, torch.tensor([0, 2])).eps) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["scaler", "probes", "window"])
def test_an_incomplete_checkpoint_changes_nothing(missing: str, tmp_path: Path) -> None:
    trainer = Trainer(config(), tiny_model(), Squares())
    trainer.save(tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state[missing]
    torch.save(state, tmp_path / "last.pt")
    other = Trainer(config(), tiny_model(), Squares())
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    before = [value.clone() for value in other.model.state_dict().values()]
    with pytest.raises(ValueError, match=rf"last\.pt is no complete checkpoint, it lacks {missing}"):
        other.load(tmp_path / "last.pt")
    assert all(map(torch.equal, before, other.model.state_dict().values()))


def test_a_model_that_nothing_can_be_loaded_into_is_refused(tmp_path: Path) -> None:
    def model(scale: Tensor) -> nn.Module:
        network = nn.Conv2d(3, CLASSES, 1)
        network.register_buffer("scale", scale)
        return network

    message = r"no expanded tensors in its state_dict\(\), got \['scale'\].*\.clone\(\)"
    with pytest.raises(ValueError, match=message):
        Trainer(config(), model(torch.ones(1).expand(5)), Squares())
    run(tmp_path, model(torch.ones(1).expand(5).clone()))
    other = model(torch.ones(1).expand(5))
    before = [value.clone() for value in other.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        training.load_model(tmp_path / "last.pt", other)
    assert all(map(torch.equal, before, other.state_dict().values()))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"image": 1}, r"sample 0: two tensors, \(image, label\), are needed, got a dict$"),
        ((np.zeros((3, 16, 24)), torch.zeros(16, 24)), r"got a tuple of \['ndarray', 'Tensor'\]"),
    ],
)
def test_a_sample_that_is_not_two_tensors_is_named(sample: Any, message: str) -> None:
    class Strange(Squares):
        def __getitem__(self, index: int) -> Any:
            return sample

    with pytest.raises(TypeError, match=message):
        Trainer(config(), tiny_model(), Strange()).dataset[0, 0]


def test_what_cannot_be_written_is_refused_before_the_training() -> None:
    class Extra(nn.Conv2d):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

    with pytest.raises(
        ValueError, match=r"nothing but tensors in its state_dict\(\), got others in \['_extra_state'\]"
    ):
        Trainer(config(), Extra(3, CLASSES, 1), Squares())
    with pytest.raises(TypeError, match=r"config must hold plain numbers and strings: .*float32"):
        Trainer(config(learning_rate=np.float32(0.1)), tiny_model(), Squares())


@pytest.mark.parametrize("chosen", [[4], [-1], [0, 0]])
def test_positions_that_are_none_are_refused(chosen: list[int]) -> None:
    trainer = Trainer(config(arm="fgsm"), tiny_model(), Squares())
    with pytest.raises(
        ValueError, match=f"chosen must hold different positions from 0 to 3, got {re.escape(str(chosen))}"
    ):
        trainer.step(torch.rand(4, 3, 16, 24), torch.zeros(4, 16, 24, dtype=torch.int64), chosen)
    assert trainer.steps_done == 0


def test_positions_may_come_from_an_iterator() -> None:
    batch = torch.rand(4, 3, 16, 24), torch.randint(CLASSES, (4, 16, 24))
    results = [
        Trainer(config(arm="fgsm"), tiny_model(), Squares()).step(*batch, chosen)
        for chosen in ([0, 2], iter([0, 2]), torch.tensor([0, 2]))
    ]
    assert results[0].eps.shape == (2,)
    assert len({float(result.loss) for result in results}) == 1


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_mask_is_no_list_of_positions(kind: Callable[[list[bool]], Any]) -> None:
    trainer = Trainer(config(arm="fgsm"), tiny_model(), Squares())
    with pytest.raises(TypeError, match=r"chosen must hold positions, got True or False; mask\.nonzero\(\)\.flatten"):
        trainer.step(torch.rand(2, 3, 16, 24), torch.zeros(2, 16, 24, dtype=torch.int64), kind([True, False]))
    assert trainer.steps_done == 0


# --- one step -----------------------------------------------------------------------------------------------


def test_basic_arm_is_the_plain_training_loop(tmp_path: Path) -> None:
    unflipped = Augmentation(flip=False)
    settings = config(steps=10, weight_decay=0.01, momentum=0.8, power=0.7, augmentation=unflipped)
    plain, ours = tiny_model(dropout=0).double(), tiny_model(dropout=0).double()
    trainer = Trainer(settings, ours, Squares(torch.float64))
    trainer.run(tmp_path, progress=False)
    data = Augmented(Squares(torch.float64), crop=(16, 24), seed=7, augmentation=unflipped)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    losses = []
    for step, keys in enumerate(EpochSampler(SAMPLES, batch_size=4, seed=7, steps=10)):
        images = torch.stack([data[key][0] for key in keys])
        labels = torch.stack([data[key][1] for key in keys]).long()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 10) ** 0.7
        logits = F.interpolate(plain(images), size=(16, 24), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    means = [np.mean(losses[start : start + 3]) for start in (0, 3, 6, 9)]
    assert [line["loss"] for line in metrics_of(tmp_path)] == pytest.approx(means, abs=1e-10)


def test_poly_learning_rate(tmp_path: Path) -> None:
    assert [training.poly_learning_rate(step, steps=2, power=0) for step in range(4)] == [0.01, 0.01, 0, 0]
    schedule = [training.poly_learning_rate(step, steps=4, learning_rate=0.01, power=0.9) for step in range(6)]
    # 0.01 * (0.75, 0.5, 0.25) ** 0.9 by hand
    assert schedule == pytest.approx([0.01, 0.0077189, 0.0053589, 0.0028717, 0, 0], abs=1e-7)
    run(tmp_path, power=2.0)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 14]
    for line in lines:
        assert line["learning_rate"] == pytest.approx(0.1 * (1 - (line["step"] - 1) / 14) ** 2)


def test_training_learns(tmp_path: Path) -> None:
    run(tmp_path, tiny_model(dropout=0), arm="fast-newton", steps=60, learning_rate=0.3)
    lines = metrics_of(tmp_path)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]


@pytest.mark.parametrize("arm", ["fast-newton", "segpgd-3", "n-fgsm", "kim"])
def test_bf16_trains_on_the_cpu_with_images_in_full_precision(tmp_path: Path, arm: str) -> None:
    model = tiny_model()
    kinds = set()
    model[4].register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    model.register_forward_pre_hook(lambda module, inputs: kinds.add(inputs[0].dtype))
    run(tmp_path, model, precision="bf16", arm=arm, monitor_every=7)
    assert kinds == {torch.float32, torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(np.isfinite(line["loss"]) for line in metrics_of(tmp_path))


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["random-fgsm", "fast-newton"])
@pytest.mark.parametrize("crash_after", [3, 4, 6, 13])
def test_resumed_run_after_a_crash_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, crash_after: int
) -> None:
    whole = run(tmp_path / "whole", arm=arm)
    crashing = Trainer(config(arm=arm), tiny_model(), Squares())
    real_step = crashing.step_in_place

    def step(*arguments: Any) -> Any:
        if crashing.steps_done == crash_after:
            raise RuntimeError("the power is gone")
        return real_step(*arguments)

    monkeypatch.setattr(crashing, "step_in_place", step)
    with pytest.raises(RuntimeError, match="the power is gone"):
        crashing.run(tmp_path / "parts", progress=False)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')  # cut short
    torch.manual_seed(99)
    torch.rand(3)
    resumed = run(tmp_path / "parts", arm=arm)
    assert_same_state(whole, resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    # once more: there is nothing left to do, and nothing changes
    assert_same_state(whole, run(tmp_path / "parts", arm=arm))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_the_same_trainer_continues_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured after the checkpoint is measured again, and counted once."""
    whole = run(tmp_path / "whole", arm="random-fgsm")
    trainer = Trainer(config(arm="random-fgsm"), tiny_model(), Squares())
    real_step = trainer.step_in_place

    def step(*arguments: Any) -> Any:
        if trainer.steps_done == 11:
            raise RuntimeError("the power is gone")
        return real_step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "step_in_place", step)
        with pytest.raises(RuntimeError, match="power"):
            trainer.run(tmp_path / "parts", progress=False)
    trainer.run(tmp_path / "parts", progress=False)
    assert_same_state(whole, trainer)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_the_progress_of_a_resumed_run_is_that_of_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(config(), tiny_model(), Squares())
    data = Squares()
    for _ in range(4):
        trainer.step(data.images[:4], data.labels[:4], [])
    trainer.save(tmp_path / "last.pt")
    Trainer(config(), tiny_model(), Squares()).run(tmp_path)
    assert "basic: step 14/14" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["loading", "step"])
def test_interrupt_writes_a_checkpoint_from_between_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = run(tmp_path / "whole", arm="random-fgsm")
    reads = 0

    def press(index: int) -> None:
        nonlocal reads
        reads += 1
        if where == "loading" and reads == 4 * 6 + 2:
            signal.raise_signal(signal.SIGINT)

    model = tiny_model()
    trainer = Trainer(config(arm="random-fgsm"), model, Squares(on_read=press))

    def press_in_forward(module: nn.Module, inputs: Any) -> None:
        if where == "step" and trainer.steps_done == 6 and module.training:
            signal.raise_signal(signal.SIGINT)

    model.register_forward_pre_hook(press_in_forward)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "parts", progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    steps_done = {"loading": 6, "step": 7}[where]
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["steps_done"] == steps_done
    resumed = run(tmp_path / "parts", arm="random-fgsm")
    assert_same_state(whole, resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_workers_and_frequencies_change_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", arm="random-fgsm")
    part = config(arm="random-fgsm", checkpoint_every=1)
    trainer = Trainer(part, tiny_model(), Squares())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save", stop_after(trainer, 5))
        with pytest.raises(RuntimeError, match="stop"):
            trainer.run(tmp_path / "parts", progress=False)
    resumed = run(tmp_path / "parts", arm="random-fgsm", workers=2, log_every=5, checkpoint_every=3)
    assert_same_state(whole, resumed)


def stop_after(trainer: Trainer, steps: int) -> Callable[[Any], None]:
    real_save = trainer.save

    def save(path: Any) -> None:
        real_save(path)
        if trainer.steps_done == steps:
            raise RuntimeError("stop")

    return save


def test_step_depends_on_nothing_but_its_number_and_the_state(tmp_path: Path) -> None:
    """Neither on the global generator nor on what was drawn before."""
    images, labels = torch.rand(4, 3, 16, 24), torch.randint(0, CLASSES, (4, 16, 24))
    results = []
    for draws in (0, 5):
        trainer = Trainer(config(arm="random-fgsm"), tiny_model(), Squares())
        torch.rand(draws)
        results.append([trainer.step(images, labels, [0, 2]) for _ in range(2)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first.eps, second.eps)
    first, second = results[0]
    assert not torch.equal(first.eps, second.eps)


def test_random_numbers_of_steps_parts_model_and_attack_are_different_ones() -> None:
    trainer, drawn = Trainer(config(arm="fgsm", accumulation=2), tiny_model(), Squares()), []

    def attack(images: Tensor, labels: Tensor, *, return_info: bool) -> tuple[Tensor, AttackInfo]:
        drawn.extend([torch.rand(8), torch.rand(8, generator=trainer.generator)])
        return images, AttackInfo(eps=torch.ones(len(images)))

    trainer.attack = attack  # type: ignore[assignment]
    for _ in range(2):
        trainer.step(torch.rand(4, 3, 16, 24), torch.zeros(4, 16, 24, dtype=torch.long), [0, 2])
    assert len(drawn) == len(torch.stack(drawn).unique(dim=0)) == 8


# --- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoint_loads_as_plain_weights_and_into_a_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, arm="fast-newton")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["steps_done"] == 14
    assert state["config"]["arm"] == "fast-newton"
    model = training.load_model(tmp_path / "last.pt", nn.Sequential(*tiny_model().children()))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("failing", ["torch.save", "os.replace", "os.fsync"])
def test_failed_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    trainer = run(tmp_path, steps=4)
    before = (tmp_path / "last.pt").read_bytes()

    def full(*arguments: Any, **keywords: Any) -> None:
        if failing == "torch.save":
            arguments[1].write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    module, _, name = failing.partition(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path / "last.pt")
    monkeypatch.undo()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    trainer.load(tmp_path / "last.pt")


def test_an_error_of_a_save_that_is_not_of_writing_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    trainer = run(tmp_path, steps=4)
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.save(tmp_path / "last.pt")


def test_really_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the writer fails in the middle of the file."""
    run(tmp_path, steps=4)
    before = (tmp_path / "last.pt").read_bytes()
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(models.__file__).parents[1]), str(Path(__file__).parent)]}
from test_training import Squares, Trainer, config, tiny_model
trainer = Trainer(config(steps=4), tiny_model(), Squares())
trainer.load({str(tmp_path / "last.pt")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, -1))
try:
    trainer.save({str(tmp_path / "last.pt")!r})
except (OSError, RuntimeError) as error:
    print("failed:", error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("failed:")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    told = r"differs in arm \('basic' there, 'fgsm' here\), seed \(7 there, 8 here\): give another output folder, or"
    with pytest.raises(ValueError, match=told):
        run(tmp_path, steps=4, arm="fgsm", seed=8)
    for changes in ({"accumulation": 2}, {"accumulation": 2, "seed": 8}):
        with pytest.raises(ValueError, match=r"differs in accumulation \(1 there, 2 here\)") as refused:
            run(tmp_path, steps=4, **changes)
        alone = "accumulation 1 as before, or set allow_other_split" in str(refused.value)
        assert alone == (changes == {"accumulation": 2}), "the remedy where nothing else differs"
    Trainer(config(steps=4, accumulation=2, allow_other_split=True), tiny_model(), Squares()).load(tmp_path / "last.pt")
    described = Trainer(config(steps=4), tiny_model(), Squares(), description={"data": {"files": {"crop": 1}}})
    with pytest.raises(ValueError, match=r"differs in description\.data\.files\.crop \(None there, 1 here\)"):
        described.run(tmp_path, progress=False)
    larger = Trainer(config(steps=4), nn.Sequential(*tiny_model()[:4], nn.Conv2d(8, 6, 1)), Squares())
    before = {name: value.clone() for name, value in larger.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another architecture.*4.weight has shape \[5, 8, 1, 1\] there and \[6, 8"):
        larger.run(tmp_path, progress=False)
    assert all(torch.equal(before[name], value) for name, value in larger.model.state_dict().items())
    with pytest.raises(ValueError, match=r"2.weight has shape none there"):
        training.load_model(tmp_path / "last.pt", nn.Sequential(*tiny_model()[:2], nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match=r"4.weight has shape \[5, 8, 1, 1\] there and none in the model"):
        training.load_model(tmp_path / "last.pt", tiny_model()[:4])


def test_damaged_or_missing_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.pt cannot be read as a checkpoint"):
            training.load_model(path, tiny_model())
        told = r"last\.pt cannot be read as a checkpoint .* \(BadZipFile: .* zip file\).* remove it to start anew"
        with pytest.raises(ValueError, match=told):
            run(tmp_path, steps=4)
    for other in ([1, 2], {"model": tiny_model().state_dict()}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="holds something else"):
            training.load_model(path, tiny_model())
    torch.save({"config": {}, "model": tiny_model(), "steps_done": 4}, path)  # what it would execute is the file's
    with pytest.raises(ValueError, match=r"something else \(UnpicklingError\)"):
        training.load_model(path, tiny_model())
    with pytest.raises(FileNotFoundError):
        training.load_model(tmp_path / "other.pt", tiny_model())


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, steps=4)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "last.pt"))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError, match=r"last\.pt cannot be read: Permission denied"):
        training.load_model(tmp_path / "last.pt", tiny_model())


def test_a_checkpoint_of_another_device_fits_this_one(tmp_path: Path) -> None:
    """The optimiser's way of working belongs to the device; what several processes gathered stays on the CPU."""
    run(tmp_path, steps=4, log_every=3, checkpoint_every=4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    torch.save(state, tmp_path / "last.pt")
    trainer = Trainer(config(steps=4, allow_other_split=True), tiny_model(), Squares())
    trainer.processes = 2
    trainer.device = torch.device("meta")
    trainer.load(tmp_path / "last.pt")
    assert [group["fused"] for group in trainer.optimizer.param_groups] == [False]
    assert not trainer._window
    state["window"] = [{name: torch.ones(2) for name in ("loss", "eps", "gain", "skipped")}]
    torch.save(state, tmp_path / "last.pt")
    trainer.load(tmp_path / "last.pt")
    assert {value.device.type for value in vars(trainer._window[0]).values()} == {"cpu"}


def test_no_progress_bar_needs_no_tqdm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(tmp_path, steps=2)
    Trainer(config(steps=4), tiny_model(), Squares()).run(tmp_path / "shown")  # nothing is shown
    assert (tmp_path / "shown" / "last.pt").exists()


# --- validation -------------------------------------------------------------------------------------------


VALIDATION = Validation(every=5, images=6, attacks=("fgsm", "pgd"), eps=(0.0, 0.02), batch_size=4)


def test_validation_is_an_evaluation_on_the_way_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = run(tmp_path / "without", arm="random-fgsm")
    data = Squares()
    settings = config(arm="random-fgsm", validation=VALIDATION)
    trainer = Trainer(settings, tiny_model(), Squares(), validation_dataset=data)
    expected = []
    real_validate = trainer._validate

    def validate() -> EvaluationResult:
        trainer.model[3].eval()  # someone's frozen layer
        before = torch.get_rng_state(), copy.deepcopy(trainer.model.state_dict()), modes(trainer.model)
        result = real_validate()
        assert torch.equal(before[0], torch.get_rng_state())
        assert all(torch.equal(value, before[1][name]) for name, value in trainer.model.state_dict().items())
        assert modes(trainer.model) == before[2]
        trainer.model[3].train()
        loader = [(data.images[:4], data.labels[:4]), (data.images[4:6], data.labels[4:6])]
        expected.append(evaluate(trainer.model, loader, ["fgsm", "pgd"], [0.0, 0.02], worst_case=False).rows)
        return result

    monkeypatch.setattr(trainer, "_validate", validate)
    trainer.run(tmp_path / "with", progress=False)
    assert_same_state(without, trainer)
    assert metrics_of(tmp_path / "without") == metrics_of(tmp_path / "with")
    lines = [json.loads(line) for line in (tmp_path / "with" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 14]
    assert [line["rows"] for line in lines] == expected
    for name in ("training.png", "robustness.png"):
        assert (tmp_path / "with" / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "with" / "curves.csv").read_text()
    assert text.splitlines()[0] == "arm,attack,eps,miou,pixel_accuracy"
    found = [line.split(",") for line in text.splitlines()[1:]]
    assert [(row[0], row[1], *map(float, row[2:])) for row in found] == [
        ("random-fgsm", *(row[name] for name in ("attack", "eps", "miou", "pixel_accuracy"))) for row in expected[-1]
    ]


@pytest.mark.parametrize("step", [5, 14])
def test_ctrl_c_ends_a_validation_which_is_made_when_the_run_goes_on(tmp_path: Path, step: int) -> None:
    def trainer(press: Callable[[int], None] | None = None) -> Trainer:
        settings = config(arm="random-fgsm", validation=VALIDATION, checkpoint_every=100)
        return Trainer(settings, tiny_model(), Squares(), validation_dataset=Squares(on_read=press))

    whole = trainer()
    whole.run(tmp_path / "whole", progress=False)
    reads = []

    def press(index: int) -> None:
        if ended.steps_done == step:
            reads.append(index)
            if len(reads) == 2:  # of the first batch's four
                signal.raise_signal(signal.SIGINT)

    ended = trainer(press)
    with pytest.raises(KeyboardInterrupt):
        ended.run(tmp_path / "parts", progress=False)
    assert len(reads) == 4, "not to the end of the validation"
    ended.model.load_state_dict(whole.model.state_dict())  # so that only what is not in it can differ
    assert modes(ended.model) == modes(whole.model)
    assert all(parameter.requires_grad for parameter in ended.model.parameters())
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["steps_done"] == step
    for again in range(3):  # what is there stays as it is
        resumed = ended if again == 0 else trainer()
        if again == 0:
            ended.validation_dataset.on_read = None
        resumed.run(tmp_path / "parts", progress=False)
        assert_same_state(whole, resumed)
        for name in ("validation.jsonl", "curves.csv", "model.safetensors"):
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_the_checkpoint_is_from_before_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed in a long one loses no step."""
    settings = config(validation=VALIDATION, checkpoint_every=100)
    trainer = Trainer(settings, tiny_model(), Squares(), validation_dataset=Squares())
    seen = []
    real = trainer._validate

    def validate() -> EvaluationResult:
        seen.append(torch.load(tmp_path / "last.pt", weights_only=True)["steps_done"])
        return real()

    monkeypatch.setattr(trainer, "_validate", validate)
    trainer.save(tmp_path / "last.pt")  # what Ctrl-C before the first step leaves
    trainer.run(tmp_path, progress=False)
    assert seen == [5, 10, 14]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_time_of_what_is_no_step_is_not_that_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a step takes 1 s, a validation 100 s, its pictures 50 s, a probe 20 s; it does not begin
    at 0."""
    clock = [1000.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    settings = config(log_every=2, validation=Validation(every=3, images=2), monitor_every=4)
    trainer = Trainer(settings, tiny_model(), Squares(), validation_dataset=Squares())
    real_step = trainer.step_in_place

    def step(*arguments: Any) -> Any:
        clock[0] += 1
        return real_step(*arguments)

    def slow(*arguments: Any, **keywords: Any) -> Any:
        clock[0] += 100
        return evaluate(*arguments, **keywords)

    def probe(*arguments: Any, **keywords: Any) -> dict[str, float]:
        clock[0] += 20
        return {"pgd_accuracy": 0.5, "fgsm_accuracy": 0.5}

    monkeypatch.setattr(trainer, "step_in_place", step)
    monkeypatch.setattr(training, "probe", probe)

    def draw(self: training.RunDirectory, title: str) -> list[Path]:
        clock[0] += 50
        return []

    monkeypatch.setattr(training, "evaluate", slow)
    monkeypatch.setattr(training.RunDirectory, "draw", draw)
    trainer.run(tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps_per_s"] for line in lines] == [1.0] * 7


@pytest.mark.parametrize("at", [7, 13])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, at: int) -> None:
    """The loss is that of before the last update, which may have been one too many."""
    model = tiny_model()
    trainer = Trainer(config(), model, Squares())
    model[4].bias.register_hook(lambda grad: grad / 0 if trainer.steps_done == at else grad)
    rate = f"{0.1 * (1 - at / 14) ** 0.9:.3g}"
    with pytest.raises(FloatingPointError, match=f"are not finite after {at + 1} steps, learning rate {rate}: a lower"):
        trainer.run(tmp_path, progress=False)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["steps_done"] == (4 if at == 7 else 12)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (tmp_path / "model.safetensors").exists()


def test_running_statistics_that_are_not_finite_are_not_saved_and_frozen_infinities_are(tmp_path: Path) -> None:
    class Masked(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)

    model = Masked(*tiny_model())
    model.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]), requires_grad=False)
    trainer = run(tmp_path, model, steps=2)
    model[1].running_var[0] = torch.nan
    with pytest.raises(FloatingPointError, match="running statistics are not finite"):
        trainer.save(tmp_path / "last.pt")


def test_load_changes_nothing_where_other_parameters_were_trained(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, trained: bool) -> None:
            super().__init__()
            self.conv, scale = nn.Conv2d(3, CLASSES, 1), torch.ones(())
            if trained:
                self.scale = nn.Parameter(scale)
            else:
                self.register_buffer("scale", scale)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images) * self.scale

    run(tmp_path, Scaled(trained=True), steps=2)
    trainer = Trainer(config(steps=2), Scaled(trained=False), Squares())
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"last\.pt: 3 parameters were trained there, 2 are trained here"):
        trainer.load(tmp_path / "last.pt")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_checkpoint_of_a_network_with_more_layers_is_told_by_its_tensors(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    deeper = nn.Sequential(*tiny_model(), nn.Conv2d(CLASSES, CLASSES, 1))
    with pytest.raises(ValueError, match=r"belongs to another architecture: .* has shape none there"):
        Trainer(config(steps=2), deeper, Squares()).load(tmp_path / "last.pt")


def test_one_image_suffices_norm_layers_that_are_frozen() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="batch normalisation needs at least two"):
        Trainer(config(batch_size=2, accumulation=2), model.eval(), Squares())  # is put into train mode
    model.train()[1].eval()
    trainer = Trainer(config(batch_size=2, accumulation=2), model, Squares())
    samples = [trainer.dataset[0, i] for i in range(2)]
    trainer.step(torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]), [0])


def test_files_of_another_run_do_not_stay(tmp_path: Path) -> None:
    first = run(tmp_path / "first", steps=4)
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    first.run(tmp_path / "second", progress=False)  # there is nothing left to train
    assert {path.name for path in (tmp_path / "second").iterdir()} >= {"last.pt", "model.safetensors"}

    # into the folder of another run: all of it is replaced
    run(tmp_path / "other", steps=4, seed=8, log_every=1)
    (tmp_path / "other" / "last.pt").unlink()
    first.run(tmp_path / "other", progress=False)
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".lock", "last.pt", "model.safetensors"}
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before

    run(tmp_path / "third", steps=2, arm="fgsm")
    for name in ("robustness.png", "training.png"):
        (tmp_path / "third" / name).write_text("of the old run")
    (tmp_path / "third" / "last.pt").unlink()
    run(tmp_path / "third", steps=4)
    assert not (tmp_path / "third" / "robustness.png").exists()
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == before


def test_a_run_that_goes_on_shares_its_own_weights(tmp_path: Path) -> None:
    trainer = Trainer(config(steps=5), tiny_model(), Squares())
    data = Squares()
    for _ in range(4):
        trainer.step(data.images[:4], data.labels[:4], [])
    trainer.save(tmp_path / "last.pt")
    (tmp_path / "model.safetensors").write_text("of another run")
    trained = run(tmp_path, steps=5)
    shared = training.load_model(tmp_path / "model.safetensors", tiny_model()).state_dict()
    assert all(torch.equal(shared[name], value) for name, value in trained.model.state_dict().items())


def test_an_interruption_that_was_told_before_a_run_does_not_end_it(tmp_path: Path) -> None:
    trainer = Trainer(config(steps=2), tiny_model(), Squares())
    trainer._interrupts_told.extend([torch.tensor(1)] * 3)
    trainer.run(tmp_path, progress=False)
    assert not trainer._interrupts_told


def test_validation_of_files_of_different_sizes_is_refused_before_the_training(tmp_path: Path) -> None:
    class Resized(Cityscapes):
        """Whose pixels are made of one size, for example."""

    data, resized = Cityscapes.__new__(Cityscapes), Resized.__new__(Resized)
    data.image_paths = resized.image_paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(data.image_paths[:2]):
        Image.new("RGB", (16, 16 + 8 * i)).save(path)  # the third cannot be read, which is told when it is
    for batch_size, images in ((1, 0), (2, 1)):
        settings = config(validation=Validation(every=2, batch_size=batch_size, images=images))
        Trainer(settings, tiny_model(), Squares(), validation_dataset=data)
    settings = config(validation=Validation(every=2, batch_size=2))
    with pytest.raises(ValueError, match=r"validation.batch_size must be 1 for images of different sizes"):
        Trainer(settings, tiny_model(), Squares(), validation_dataset=data)
    Trainer(settings, tiny_model(), Squares(), validation_dataset=resized)
    never = config(validation=Validation(every=0, batch_size=2))
    Trainer(never, tiny_model(), Squares(), validation_dataset=data)


def test_parameters_that_the_loss_does_not_reach_are_named(tmp_path: Path) -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = tiny_model(), nn.Conv2d(3, CLASSES, 1)
            self.frozen = nn.Linear(1, 1).requires_grad_(False)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"out": self.main(images), "aux": self.auxiliary(images)}

    with pytest.warns(UserWarning, match=r"2 of its parameters, such as auxiliary\.weight, got no gradient") as told:
        run(tmp_path, WithAuxiliary(), steps=3)
    assert [warning.filename for warning in told] == [__file__]


def test_images_out_of_range_are_refused(tmp_path: Path) -> None:
    data = Squares()
    data.images = data.images * 255
    with pytest.raises(ValueError, match=r"pixels must be in \[0, 1\], found .* segadv.models.wrap"):
        Trainer(config(), tiny_model(), data).run(tmp_path, progress=False)


def test_norm_layers_of_ones_own_are_saved(tmp_path: Path) -> None:
    class Norm(nn.Module):
        track_running_stats = True

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(8))

        def forward(self, images: Tensor) -> Tensor:
            return images / self.running_var.view(-1, 1, 1)

    model = tiny_model()
    model[1] = Norm()  # type: ignore[index]
    run(tmp_path, model, steps=2)
    assert (tmp_path / "last.pt").exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    mine = ("notes.csv", ".package-1.2.3.json", ".backup.2024.11.tar")
    for name in mine:
        (tmp_path / name).write_text("mine")
    trainer = run(tmp_path, steps=2)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    written = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "run.json")}
    (tmp_path / "last.pt").unlink()
    trainer.run(tmp_path, progress=False)  # writes what is missing
    assert (tmp_path / "last.pt").exists()
    assert written == {name: (tmp_path / name).read_bytes() for name in written}


def test_validation_of_images_of_different_sizes(tmp_path: Path) -> None:
    data = [(torch.rand(3, 16, 16 + 8 * i), torch.randint(0, CLASSES, (16, 16 + 8 * i))) for i in range(3)]
    for batch_size in (1, 2):
        validation = Validation(every=2, images=9, batch_size=batch_size)  # of 3
        settings = config(steps=2, validation=validation)
        trainer = Trainer(settings, tiny_model(), Squares(), validation_dataset=data)  # type: ignore[arg-type]
        if batch_size == 1:
            trainer.run(tmp_path / "1", progress=False)
            continue
        with pytest.raises(ValueError, match=r"validation.batch_size must be 1 for images of different sizes"):
            trainer.run(tmp_path / "2", progress=False)


# --- how the same is computed otherwise -------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["basic", "fast-newton"])
def test_channels_last_is_the_same_training(tmp_path: Path, arm: str) -> None:
    formats = set()

    def look(module: nn.Module, inputs: Any) -> None:
        formats.add((inputs[0].is_contiguous(memory_format=torch.channels_last), module.weight.is_contiguous()))

    ends = []
    for channels_last in (False, True):
        model = tiny_model(dropout=0).double()
        model[0].register_forward_pre_hook(look)
        settings = config(arm=arm, channels_last=channels_last, monitor_every=0)
        trainer = Trainer(settings, model, Squares(torch.float64))
        trainer.run(tmp_path / str(channels_last), progress=False)
        assert formats == {(channels_last, not channels_last)}
        formats.clear()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-10)


def test_compiled_network_is_trained_and_attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured by torch.compile and run without code generation, in float64: the same training."""
    compiled = []

    def compile_without_generation(model: nn.Module) -> Any:
        compiled.append(model)
        return torch._dynamo.optimize("eager", dynamic=True)(model)

    ends = []
    for compile in (False, True):
        model = tiny_model(dropout=0).double()
        monkeypatch.setattr(torch, "compile", compile_without_generation)
        settings = config(arm="fgsm", steps=6, compile=compile, monitor_every=3)
        trainer = Trainer(settings, model, Squares(torch.float64))
        trainer.run(tmp_path / str(compile), progress=False)
        ends.append(trainer.model.state_dict())
        assert len(compiled) == int(compile)
        assert trainer.attack is not None
        assert (trainer.attack.model is trainer.model) is not compile
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-10)


def test_a_first_step_that_overflows_leaves_no_rubbish_in_the_momentum() -> None:
    """Fused SGD leaves the step out on the device, after it has made its buffers without writing to them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # then what is not written is NaN
    try:
        results = []
        for overflows in (False, True):
            model = tiny_model()
            optimizer = training._sgd(model, config(precision="fp16"), fused=True)
            scaler = torch.amp.GradScaler("cpu")
            for step in range(3 if overflows else 2):
                for i, parameter in enumerate(model.parameters()):
                    parameter.grad = scaler.scale(torch.full_like(parameter, 0.1 * (i + step + 1 - overflows)))
                    if overflows and step == 0:
                        parameter.grad.view(-1)[0] = math.inf
                scaler.step(optimizer)
                scaler.update()
            results.append([value.clone() for value in model.parameters()])
            plain = tiny_model()
            usual = training._sgd(plain, config(), fused=False)
            assert not usual.state
            for step in range(2):
                for i, parameter in enumerate(plain.parameters()):
                    parameter.grad = torch.full_like(parameter, 0.1 * (i + step + 1))
                usual.step()
            results.append([value.clone() for value in plain.parameters()])
        for found in results:
            for ours, expected in zip(found, results[1], strict=True):
                torch.testing.assert_close(ours, expected)
    finally:
        torch.use_deterministic_algorithms(before)


def test_accumulation_takes_the_parts_one_after_the_other() -> None:
    """Also where the attack draws; batch norm sees parts."""
    sizes = []
    model = tiny_model(dropout=0)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    trainer = Trainer(config(accumulation=2, arm="fgsm"), model, Squares())
    images, labels = torch.rand(4, 3, 16, 24), torch.randint(0, CLASSES, (4, 16, 24))
    attack = Recorder()
    trainer.attack = attack  # type: ignore[assignment]
    result = trainer.step(images, labels, [1, 2, 3])
    assert sizes == [2, 2]
    assert [len(call[0]) for call in attack.calls] == [1, 2]
    assert torch.equal(torch.cat([call[0] for call in attack.calls]), images[1:])
    assert len(result.eps) == len(result.gain) == len(result.skipped) == 3
    assert int(model[1].num_batches_tracked) == 2
    sizes.clear()
    trainer.step(images, labels, [0])
    assert len(attack.calls) == 3
    with pytest.raises(ValueError, match="divisible into 2 equal parts, got 3"):
        trainer.step(images[:3], labels[:3], [])


def test_accumulated_run_attacks_the_samples_whose_coins_say_so(tmp_path: Path) -> None:
    trainer = Trainer(config(accumulation=2, arm="fgsm"), tiny_model(), Squares())
    attack = Recorder()
    trainer.attack = attack  # type: ignore[assignment]
    trainer.run(tmp_path, progress=False)
    data = Augmented(Squares(), crop=(16, 24), seed=7)
    expected = []
    for keys in EpochSampler(SAMPLES, batch_size=4, seed=7, steps=14, accumulation=2):
        coins = [training.adversarial_coins(7, epoch, SAMPLES, 0.5)[index] for epoch, index in keys]
        for part in (slice(2), slice(2, 4)):
            chosen = [data[key][0] for key, coin in zip(keys[part], coins[part], strict=True) if coin]
            expected += [torch.stack(chosen)] if chosen else []
    assert {len(images) for images in expected} == {1, 2}
    assert len(attack.calls) == len(expected)
    assert all(torch.equal(call[0], images) for call, images in zip(attack.calls, expected, strict=True))
    attacked = [
        4 * steps * line["adversarial_share"] for steps, line in zip((3, 3, 3, 3, 2), metrics_of(tmp_path), strict=True)
    ]
    assert sum(attacked) == pytest.approx(sum(map(len, expected)))


def test_a_frozen_layer_stays_frozen_and_a_model_in_eval_mode_is_trained() -> None:
    images, labels = torch.rand(4, 3, 16, 24), torch.randint(0, CLASSES, (4, 16, 24))
    model = tiny_model()
    model[1].eval()
    trainer = Trainer(config(arm="fgsm"), model, Squares())
    trainer.step(images, labels, [0])
    assert modes(model) == [True, True, False, True, True, True]
    assert int(model[1].num_batches_tracked) == 0
    model.eval()
    trainer.step(images, labels, [0])
    assert all(modes(model))
    assert int(model[1].num_batches_tracked) == 1


def test_batch_norm_needs_two_images_in_each_part() -> None:
    with pytest.raises(ValueError, match="one image to each of 1 processes and 4 accumulated parts"):
        Trainer(config(accumulation=4), tiny_model(), Squares())
    Trainer(config(accumulation=4), nn.Conv2d(3, CLASSES, 1), Squares())


@pytest.mark.parametrize("arm", ["random-fgsm"])
def test_accumulated_run_resumes_to_the_same_bits(tmp_path: Path, arm: str) -> None:
    whole = run(tmp_path / "whole", arm=arm, accumulation=2)
    trainer = Trainer(config(arm=arm, accumulation=2, checkpoint_every=1), tiny_model(), Squares())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save", stop_after(trainer, 5))
        with pytest.raises(RuntimeError, match="stop"):
            trainer.run(tmp_path / "parts", progress=False)
    assert_same_state(whole, run(tmp_path / "parts", arm=arm, accumulation=2))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


# --- Ctrl-C ------------------------------------------------------------------------------------------------


def test_interrupts_wait_for_the_end_of_a_step_and_go_where_they_went_before() -> None:
    received: list[str] = []
    interrupts = Interrupts()

    def press_twice_in_a_step() -> None:
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert interrupts.received == 2
            received.append("end of the step")
        received.append("after the step")

    def fail_in_a_step() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise OSError("in the step")

    def terminate_in_a_step() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGTERM)
            received.append("end of the step")

    def press_both_in_a_step(both: tuple[int, int]) -> None:
        with interrupts.held():
            for number in both:
                signal.raise_signal(number)

    def press_nothing() -> None:
        with interrupts.held():
            pass

    def run_in_a_thread() -> None:
        with interrupts:
            press_nothing()

    before = signal.signal(signal.SIGINT, lambda number, frame: received.append("handled"))
    try:
        with interrupts:
            press_twice_in_a_step()
            press_nothing()  # what was handled is not handled again
            signal.raise_signal(signal.SIGINT)
        assert received == ["end of the step", "handled", "after the step", "handled"]

        signal.signal(signal.SIGINT, signal.default_int_handler)
        received.clear()
        with pytest.raises(KeyboardInterrupt), interrupts:
            press_twice_in_a_step()
        assert received == ["end of the step"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with interrupts, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with interrupts, pytest.raises(OSError, match="in the step"):
            fail_in_a_step()
        with interrupts, interrupts.held():  # a run that failed leaves nothing to the next
            assert interrupts.received == 0

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup, or behind "&" in a script
        with interrupts, interrupts.held():
            signal.raise_signal(signal.SIGINT)
            assert interrupts.received == 0

        terminations = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
        try:
            for interruption in (signal.SIG_IGN, lambda number, frame: received.append("handled")):
                signal.signal(signal.SIGINT, interruption)
                received.clear()
                with interrupts, pytest.raises(KeyboardInterrupt):
                    terminate_in_a_step()
                assert received == ["end of the step"]
            with interrupts, interrupts.held():
                signal.raise_signal(signal.SIGINT)
            assert received == ["end of the step", "handled"]
            for both in ((signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
                received.clear()
                with interrupts, pytest.raises(KeyboardInterrupt):
                    press_both_in_a_step(both)
                assert received == ["handled"]
            for own in (signal.SIG_DFL, lambda number, frame: None):  # somebody else's stays as it is
                signal.signal(signal.SIGTERM, own)
                with interrupts:
                    assert signal.getsignal(signal.SIGTERM) == own
        finally:
            signal.signal(signal.SIGTERM, terminations)

        with ThreadPoolExecutor(1) as pool:  # where no signal arrives, and none may be changed
            pool.submit(run_in_a_thread).result()
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_an_interrupt_ends_the_process_it_does_so_after_the_step() -> None:
    program = """
import signal
from segadv.interrupts import Interrupts

signal.signal(signal.SIGINT, signal.SIG_DFL)
with Interrupts() as interrupts:
    with interrupts.held():
        signal.raise_signal(signal.SIGINT)
        print("end of the step", flush=True)
    print("after the step", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "end of the step\n"), result.stderr


def test_a_process_ends_although_one_that_loads_data_does_not(tmp_path: Path) -> None:
    """What multiprocessing does then is to terminate it, and to wait until it has ended."""
    program = """
import sys, time, torch
from segadv.models import small_pspnet
from segadv.training import TrainConfig, Trainer

class Noise(torch.utils.data.Dataset):
    read = 0

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.read += 1
        if self.read > 2:
            time.sleep(1000)
        return torch.rand(3, 40, 48), torch.zeros(40, 48, dtype=torch.uint8)

def fail(*arguments):
    raise OSError("in a step")

if __name__ == "__main__":
    settings = TrainConfig(arm="basic", steps=3, batch_size=2, crop=(32, 32), workers=1, device="cpu")
    trainer = Trainer(settings, small_pspnet(), Noise())
    trainer.step_in_place = fail
    try:
        trainer.run(sys.argv[1], progress=False)
    except OSError as error:
        kept = error
"""
    (tmp_path / "program.py").write_text(program)  # for what starts processes by running it once more
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "run")]
    subprocess.run(command, timeout=120, check=True)


def test_processes_that_read_the_script_load_on_the_cpu_too(tmp_path: Path) -> None:
    """As they do on macOS, and from Python 3.14 on; "meta" stands for a GPU."""
    program = """
import multiprocessing, sys, torch
from segadv.models import small_pspnet
from segadv.training import TrainConfig, Trainer

torch.set_default_device("meta")

class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        assert torch.empty(1).device.type == "cpu"
        return torch.rand(3, 40, 48), torch.zeros(40, 48, dtype=torch.uint8)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    settings = TrainConfig(arm="basic", steps=2, batch_size=2, crop=(32, 32), workers=1, device="cpu", monitor_every=0)
    with torch.device("cpu"):
        model = small_pspnet()
    Trainer(settings, model, Noise()).run(sys.argv[1], progress=False)
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "run")]
    result = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class Signals(Squares):
    """Writes to a file how the process that reads takes signals, and whether it has left the group of its parent."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        ends = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with open(self.path, "a") as file:
            file.write(f"{ignored} {ends} {os.getpgid(0) == os.getpid()}\n")
        return super().__getitem__(index)


def test_signals_to_the_training_do_not_reach_what_loads_its_data(tmp_path: Path) -> None:
    settings = config(steps=2, workers=1, validation=Validation(every=2, images=2, attacks=("fgsm",), eps=(0.0,)))
    data, validation = Signals(tmp_path / "data"), Signals(tmp_path / "validation")
    trainer = Trainer(settings, tiny_model(), data, validation_dataset=validation)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
    try:
        trainer.run(tmp_path / "out", progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    for path in (data.path, validation.path):
        assert set(path.read_text().splitlines()) == {"True True True"}


# --- metrics ------------------------------------------------------------------------------------------------


def test_metrics_tell_about_the_steps_since_the_line_before(tmp_path: Path) -> None:
    trainer = Trainer(config(adversarial_share=1.0), tiny_model(), Squares())
    results = []

    def attack(images: Tensor, labels: Tensor, *, return_info: bool) -> tuple[Tensor, AttackInfo]:
        eps = torch.arange(4.0) + len(results)
        results.append(eps)
        adversarial = torch.cat([images[:1], 1 - images[1:]])
        return adversarial, AttackInfo(eps=eps, gain=torch.tensor([float("nan"), -1, -1, 0]))

    trainer.attack = attack  # type: ignore[assignment]
    with pytest.warns(RuntimeWarning, match=r"left 25\.0% of its images as they were in the steps up to 3") as told:
        trainer.run(tmp_path, progress=False)
    (warning,) = [warning for warning in told if "as they were" in str(warning.message)]
    assert warning.filename == __file__  # the line that called for the training
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 14]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]  # 13 samples, 3 batches of 4 in each
    for line, first, last in zip(lines, (0, 3, 6, 9, 12), (3, 6, 9, 12, 14), strict=True):
        eps = np.concatenate(results[first:last])
        assert line["eps_median"] == pytest.approx(np.median(eps))
        assert line["eps_p10"] == pytest.approx(np.quantile(eps, 0.1))
        assert line["eps_p90"] == pytest.approx(np.quantile(eps, 0.9))
        assert line["adversarial_share"] == 1
        assert line["share_negative_gain"] == 0.5
        assert line["share_skipped"] == 0.25
        assert line["steps_per_s"] > 0


@pytest.mark.parametrize(("skipped", "warned"), [(1, False), (2, True)])
def test_one_image_in_a_hundred_may_stay_as_it_was(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, skipped: int, warned: bool
) -> None:
    settings = config(adversarial_share=1.0, steps=25, log_every=25, monitor_every=0)
    trainer = Trainer(settings, tiny_model(), Squares())

    def attack(images: Tensor, labels: Tensor, *, return_info: bool) -> tuple[Tensor, AttackInfo]:
        left = skipped if trainer.steps_done == 0 else 0
        return torch.cat([images[:left], 1 - images[left:]]), AttackInfo(eps=torch.ones(4))

    trainer.attack = attack  # type: ignore[assignment]
    trainer.run(tmp_path, progress=False)
    assert metrics_of(tmp_path)[0]["share_skipped"] == skipped / 100
    assert any("as they were" in str(warning.message) for warning in recwarn) == warned


@pytest.mark.parametrize(("void", "accumulation"), [(0, 1), (3, 1), (25, 1), (3, 2)])
def test_steps_without_a_labelled_pixel_are_told_of(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, void: int, accumulation: int
) -> None:
    class Void(Squares):
        def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return image, torch.full_like(label, 255) if trainer.steps_done < void else label

    settings = config(arm="basic", steps=25, log_every=25, monitor_every=0, accumulation=accumulation)
    trainer = Trainer(settings, tiny_model(), Void())
    trainer.run(tmp_path, progress=False)
    told = [str(warning.message) for warning in recwarn if "exactly 0" in str(warning.message)]
    expected = f"the loss was exactly 0 in {void} of the 25 steps up to 25: no pixel of their batches has a label other"
    assert [message[: len(expected)] for message in told] == [expected] * bool(void)


def test_metrics_of_the_arms(tmp_path: Path) -> None:
    for arm in training.ARMS:
        run(tmp_path / arm, arm=arm, steps=3)
    lines = {arm: metrics_of(tmp_path / arm)[0] for arm in training.ARMS}
    assert lines["basic"]["eps_median"] is None
    assert lines["basic"]["share_skipped"] is None
    for arm in ("fgsm", "bim-3"):
        assert lines[arm]["eps_p10"] == pytest.approx(0.03)
        assert lines[arm]["share_negative_gain"] is None
        assert lines[arm]["share_skipped"] == 0
    assert 0 < lines["random-fgsm"]["eps_p10"] < lines["random-fgsm"]["eps_p90"] < 0.03
    assert 0 <= lines["fast-newton"]["share_negative_gain"] <= 1
    assert len({line["loss"] for line in lines.values()}) == len(training.ARMS)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(), tiny_model(), Squares())
    real_step = trainer.step_in_place

    def step(*arguments: Any) -> Any:
        result = real_step(*arguments)
        return dataclasses.replace(result, loss=result.loss * (torch.nan if trainer.steps_done == 8 else 1))

    monkeypatch.setattr(trainer, "step_in_place", step)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7 \(counted from 0\)"):
        trainer.run(tmp_path, progress=False)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["steps_done"] == 4
    assert [line["step"] for line in metrics_of(tmp_path)] == [3, 6]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "fast-newtonn"}, "did you mean 'fast-newton'"),
        ({"arm": "FGSM"}, "arm must be one of basic, fgsm, random-fgsm, bim-3, fast-newton, pgd-3.*; got 'FGSM'"),
        ({"eps": 8}, r"eps must be a number in \(0, 1\], the unit of the images \(8/255, not 8\), got 8"),
        ({"eps": 0.0}, "eps must be a number"),
        ({"eps": True}, "eps must be a number"),
        ({"momentum": False}, "momentum must be a finite number"),
        ({"eps": "8/255"}, "eps must be a number"),
        ({"eps": float("nan")}, "eps must be a number"),
        ({"adversarial_share": 1.5}, r"adversarial_share must be a finite number in \[0.0, 1.0\], got 1.5"),
        ({"adversarial_share": float("nan")}, "adversarial_share"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"crop": (128, 4)}, "crop width must be a whole number of at least 8, got 4"),
        ({"crop": (128,)}, r"crop must be \(height, width\)"),
        ({"crop": 32}, r"crop must be \(height, width\), got 32"),
        ({"arm": None}, "arm must be one of .*; got None"),
        ({"learning_rate": "1e-3"}, r"learning_rate must be a finite number in .*, got '1e-3'"),
        ({"learning_rate": -0.1}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"adversarial_share": -0.1}, "adversarial_share"),
        ({"momentum": 1.1}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1e-9}, "weight_decay"),
        ({"power": float("inf")}, "power"),
        ({"monitor_every": -1}, "monitor_every"),
        ({"crop": (4, 128)}, "crop height must be a whole number of at least 8, got 4"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"power": -1}, "power"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, r"seed must be less than 2\^64, got 18446744073709551616"),
        ({"workers": -1}, "workers"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"accumulation": 0}, "accumulation must be a whole number of at least 1, got 0"),
        ({"accumulation": 3}, "batch_size must be divisible by accumulation, got 4 and 3"),
    ],
)
def test_config_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "least_or_largest",
    [
        {"eps": 1, "adversarial_share": 1, "momentum": 1, "seed": (1 << 64) - 1, "accumulation": 4},
        {"adversarial_share": 0, "learning_rate": 0, "momentum": 0, "weight_decay": 0, "power": 0, "seed": 0},
        {"steps": 1, "batch_size": 2, "crop": (8, 8), "workers": 0, "monitor_every": 0, "accumulation": 1},
        {"log_every": 1, "checkpoint_every": 1},
    ],
)
def test_the_ends_of_each_range_are_in_it(least_or_largest: dict[str, Any]) -> None:
    assert vars(config(**least_or_largest)).items() >= least_or_largest.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"steps": True}, "steps must be a whole number of at least 1, got True"),
        ({"channels_last": "no"}, "channels_last must be True or False, got 'no'"),
        ({"compile": 0}, "compile must be True or False, got 0"),
        ({"allow_other_split": None}, "allow_other_split must be True or False, got None"),
        ({"augmentation": {}}, "augmentation must be a segadv.data.Augmentation"),
    ],
)
def test_config_names_what_is_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": -1}, "validation.every must be a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "validation.batch_size"),
        ({"attacks": ("fgsm", "bmi")}, "validation.attacks must be names out of fgsm, bim-10, .*; got .*bmi"),
        ({"attacks": ()}, "validation.attacks"),
        ({"eps": (8.0,)}, r"validation.eps must be numbers in \[0, 1\], .* \(8/255, not 8\), got"),
        ({"eps": (0.1, 0.1)}, "validation.eps must not repeat a number"),
        ({"eps": ()}, "validation.eps must be numbers in"),
    ],
)
def test_validation_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Validation(**changes)


def test_types_of_a_validation() -> None:
    for one in ("fgsm", ["fgsm"]):
        assert Validation(attacks=one) == Validation(attacks=("fgsm",))  # type: ignore[arg-type]
    for eps in (0.03, "0.03", None, ("0.03",)):
        with pytest.raises(TypeError, match=r"validation\.eps must be a sequence of numbers") as raised:
            Validation(eps=eps)  # type: ignore[arg-type]
        assert str(raised.value).endswith(f", got {eps!r}")
    with pytest.raises(TypeError, match=r"validation.images must be a whole number of at least 0, got 1\.5"):
        Validation(images=1.5)  # type: ignore[arg-type]


class Files(Squares):
    """Reads files of its own, of which one is wrong."""

    num_classes = CLASSES

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong
        self.label_paths = [f"/data/label {i}.png" for i in range(SAMPLES)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        if index == 9 and self.wrong == "label":
            label = label.clone()
            label[3, 4:6] = 17
        if index == 9 and self.wrong == "size":
            label = label[:-1]
        if index == 9 and self.wrong == "type":
            image = (image * 255).to(torch.uint8)
        if index == 9 and self.wrong == "label's type":
            label = label.float()
        return image, label


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("label", r"sample 9 \(/data/label 9.png\): labels must be classes 0 to 4 or 255, found \[17\]"),
        (
            "size",
            r"sample 9 \(/data/label 9.png\): .* of the same size are needed, got float32 \[3, 20, 28\] and \[19, 28\]",
        ),
        ("type", r"sample 9 \(.*got uint8"),
        (
            "label's type",
            r"sample 9 \(/data/label 9.png\): a label of int64, int32, int16, uint8 is needed, got float32",
        ),
    ],
)
def test_a_wrong_sample_is_named(tmp_path: Path, wrong: str, message: str, workers: int) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config(workers=workers), tiny_model(), Files(wrong)).run(tmp_path / "1", progress=False)
    if workers == 0:
        settings = config(steps=1, validation=Validation(every=1))
        trainer = Trainer(settings, tiny_model(), Squares(), validation_dataset=Files(wrong))
        with pytest.raises(ValueError, match=message):
            trainer.run(tmp_path / "2", progress=False)


def test_images_of_another_precision_than_the_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images must be of a dtype that the model takes, got float64; images.float"):
        Trainer(config(), tiny_model(), Squares(torch.float64)).run(tmp_path, progress=False)


def test_config_takes_whole_numbers_of_numpy_and_no_other_parts(tmp_path: Path) -> None:
    assert run(tmp_path, steps=np.int64(2)).steps_done == 2
    settings = config(steps=np.int64(2), batch_size=np.int32(4), crop=(np.int64(8), 12), seed=np.uint8(3))
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["crop"] == [8, 12]
    for changes in ({"augmentation": {"flip": False}}, {"validation": {"every": 2}}):
        with pytest.raises(TypeError, match=r"a segadv\.data\.Augmentation, validation a segadv\.training\.Validation"):
            config(**changes)


def test_number_of_classes_of_the_description_is_checked(tmp_path: Path) -> None:
    trainer = Trainer(config(), tiny_model(), Squares(), description={"num_classes": 4})
    with pytest.raises(ValueError, match=r"sample \d+: labels must be classes 0 to 3 or 255, found \[4\]"):
        trainer.run(tmp_path, progress=False)


def test_trainer_names_what_is_wrong() -> None:
    for changes, message in (
        ({"device": "abacus"}, 'device must be "auto" or a name'),
        ({"device": "meta"}, "device 'meta' cannot be used here: Tensor.item"),
        ({"device": "hpu"}, "device 'hpu' cannot be used here: "),
        ({"precision": "fp16"}, 'precision "fp16" needs a CUDA device'),
        ({"batch_size": 14}, "dataset must hold at least one batch, batch_size = 14, got 13"),
        ({"validation": Validation(every=2)}, "validation.every needs a validation_dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config(**changes), tiny_model(), Squares(), validation_dataset=[])  # type: ignore[arg-type]
    Trainer(config(batch_size=13), tiny_model(), Squares())  # one batch
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        Trainer(config(), tiny_model().requires_grad_(False), Squares())
    for model, data, message in (
        (models.SmallBackbone, Squares(), "model must be an nn.Module, got the class SmallBackbone; give an instance"),
        (lambda x: x, Squares(), "model must be an nn.Module, got a function"),
        (torch.compile(tiny_model(), backend="eager"), Squares(), "model must not be compiled: give what was compiled"),
        (tiny_model(), DataLoader(Squares(), 4), "dataset must be a Dataset of single samples, got a DataLoader"),
        (tiny_model(), iter(Squares()), r"dataset must have a length \(__len__\), got a "),
        (tiny_model(), None, r"dataset must have a length \(__len__\), got a NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            Trainer(config(), model, data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config must be a TrainConfig\(\.\.\.\), got a dict"):
        Trainer({"arm": "fgsm"}, tiny_model(), Squares())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"validation_dataset must have a length \(__len__\), got a "):
        Trainer(config(), tiny_model(), Squares(), validation_dataset=iter(Squares()))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' does not exist: this machine has 0"):
            Trainer(config(device="cuda"), tiny_model(), Squares())
        assert Trainer(config(device="auto"), tiny_model(), Squares()).device.type == "cpu"


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_device_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is too old, or a GPU that another process has for itself, is told before anything begins."""

    def zeros(*size: int, device: torch.device) -> Tensor:
        raise AssertionError("out of order. And much more\nabout that")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"device '\w+' cannot be used here: out of order$"):
        training.resolve_device(name)


@pytest.mark.parametrize(("classes", "fits"), [(255, True), (256, False)])
def test_a_class_that_is_the_ignored_label_is_refused(classes: int, fits: bool) -> None:
    trainer = Trainer(config(), nn.Sequential(nn.Conv2d(3, classes, 1)), Squares())
    batch = torch.rand(4, 3, 16, 24), torch.zeros(4, 16, 24, dtype=torch.uint8), [0]
    if fits:
        trainer.step(*batch)
        return
    with pytest.raises(ValueError, match=r"256 classes; at most 255 can be trained .* label 255 are ignored"):
        trainer.step(*batch)


def test_a_trainer_half_way_leaves_nothing_of_another_run_there(tmp_path: Path) -> None:
    run(tmp_path, seed=8)
    (tmp_path / "last.pt").unlink()
    trainer, data = Trainer(config(), tiny_model(), Squares()), Squares()
    for _ in range(4):
        trainer.step(data.images[:4], data.labels[:4], [])
    trainer.run(tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["seed"] == 7
    assert [line["step"] for line in metrics_of(tmp_path)] == [6, 9, 12, 14]


def test_a_run_that_was_finished_before_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, steps=3)
    for progress in (True, False):
        model = tiny_model()
        nn.init.zeros_(model[4].weight)
        trainer = Trainer(config(steps=3), model, Squares())
        trainer.run(tmp_path, progress=progress)
        assert_same_state(trainer, first)
        told = f"{tmp_path / 'last.pt'}: already finished; loaded its weights\n"
        assert capsys.readouterr().err == told * progress
