"""The monitor of catastrophic overfitting, and what the trainer does with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import Squares, assert_same_state, config, metrics_of, run, tiny_model
from torch import Tensor, nn

from segadv import models, plots, training
from segadv.attacks import PGD
from segadv.evaluation import evaluate
from segadv.monitor import catastrophic_overfitting, probe
from segadv.training import Trainer, Validation


def sample() -> tuple[Tensor, Tensor]:
    data = Squares(torch.float64)
    return data.images[:5], data.labels[:5]


def test_probe_is_what_it_says() -> None:
    """Everything by hand, in float64."""
    model = tiny_model().double()
    images, labels = sample()
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    plain = copy.deepcopy(model).eval()

    def logits(x: Tensor) -> Tensor:
        return F.interpolate(plain(x), labels.shape[1:], mode="bilinear", align_corners=False)

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        entropy = F.cross_entropy(logits(x), labels.long(), ignore_index=255, reduction="none").sum((1, 2))
        return torch.autograd.grad(entropy.sum(), x)[0]

    def accuracy(x: Tensor) -> float:
        valid = labels != 255
        return (logits(x).argmax(1) == labels)[valid].double().mean().item()

    near = (images + 0.03 * noise).clamp(0, 1)
    x = near
    for _ in range(10):
        x = (x + 0.01 * gradient(x).sign()).clamp(images - 0.03, images + 0.03).clamp(0, 1)
    found = probe(model, images, labels)
    assert found["pgd_accuracy"] == pytest.approx(accuracy(x), abs=1e-12)
    assert found["fgsm_accuracy"] == pytest.approx(
        accuracy((images + 0.03 * gradient(images).sign()).clamp(0, 1)), abs=1e-12
    )
    cosine = F.cosine_similarity(gradient(images).flatten(1), gradient(near).flatten(1)).mean().item()
    assert found["gradient_cosine"] == pytest.approx(cosine, abs=1e-9)

    leaf = images.clone().requires_grad_()
    z = logits(leaf)
    onehot = F.one_hot(labels.long().where(labels != 255, 0), z.shape[1]).movedim(-1, 1).bool()
    margin = z.masked_fill(~onehot, 0).sum(1) - z.masked_fill(onehot, -torch.inf).amax(1)
    gain = margin.where(labels != 255, 0).sum((1, 2)) / (labels != 255).sum((1, 2))
    eps = (gain / torch.autograd.grad(gain.sum(), leaf)[0].abs().sum((1, 2, 3))).detach()
    expected = np.quantile(eps.numpy(), [0.1, 0.5, 0.9])
    assert [found[f"newton_eps_{name}"] for name in ("p10", "median", "p90")] == pytest.approx(expected, rel=1e-9)
    assert found["newton_share_negative_gain"] == (gain < 0).double().mean().item()
    assert probe(model, images, labels) == found
    assert model.training


class Wavy(nn.Conv2d):
    """Its loss turns so often that every step counts."""

    def forward(self, images: Tensor) -> Tensor:
        return (10 * super().forward(images)).sin()


def test_pgd_of_the_probe_takes_ten_steps_of_a_third_of_eps() -> None:
    images, labels = sample()
    model = Wavy(3, 19, 3, padding=1).double()
    labels = model(images).argmax(1).where(labels != 255, 255)

    def accuracy(alpha: float, steps: int) -> float:
        attack = PGD(model, eps=0.03, alpha=alpha, steps=steps, generator=torch.Generator().manual_seed(0))
        return (model(attack(images, labels)).argmax(1) == labels)[labels != 255].double().mean().item()

    found = probe(model, images, labels)["pgd_accuracy"]
    assert found == pytest.approx(accuracy(0.01, 10), abs=1e-12)
    for alpha, steps in ((0.01, 9), (0.01, 11), (0.015, 10), (0.0075, 10)):
        assert found != pytest.approx(accuracy(alpha, steps), abs=1e-12)


class Sure(nn.Module):
    """Two classes, the first ahead by `by`: where the gradient of its cross-entropy points does not depend on that."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear, self.by = nn.Linear(48, 1), by

    def forward(self, images: Tensor) -> Tensor:
        wave = (20 * self.linear(images.flatten(1))).sin()
        return torch.cat([wave + self.by, -wave], dim=1)


def test_classifier_whose_gradients_are_short() -> None:
    images, labels = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)
    doubtful, sure = Sure(0.0), Sure(21.0)
    sure.load_state_dict(doubtful.state_dict())
    cosine = probe(doubtful, images, labels)["gradient_cosine"]
    assert abs(cosine) > 0.1
    assert probe(sure, images, labels)["gradient_cosine"] == pytest.approx(cosine, abs=1e-3)


def test_an_image_without_a_label_does_not_count() -> None:
    images, labels = sample()
    void = torch.full_like(labels, 255)
    model = tiny_model().eval().to(images.dtype)
    whole = probe(model, images.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1))
    beside = probe(model, images.repeat(2, 1, 1, 1), torch.cat([labels, void]))
    assert whole["gradient_cosine"] > 0.1
    assert beside["gradient_cosine"] > 0.75 * whole["gradient_cosine"]  # not half of it
    assert probe(model, images, void)["gradient_cosine"] == 0
    assert probe(model, images, void)["newton_share_negative_gain"] == 0


@pytest.mark.parametrize(
    ("pgd", "fgsm", "expected"),
    [
        ([], [], False),
        ([0.5], [0.5], False),
        ([0.5, 0.6, 0.2], [0.5, 0.6, 0.9], True),
        ([0.5, 0.6, 0.31], [0.5, 0.6, 0.9], False),  # not below half
        ([0.5, 0.6, 0.3], [0.5, 0.6, 0.9], False),
        ([0.5, 0.6, 0.2], [0.5, 0.6, 0.6], False),  # not higher
        ([0.5, 0.6, 0.2], [0.5, 0.6, 0.5], False),  # the network gets worse altogether
        ([0.1, 0.6, 0.2], [0.1, 0.6, 0.7], True),
        ([0.6, 0.6, 0.2], [0.5, 0.9, 0.8], True),  # than at the first of equals
    ],
)
def test_catastrophic_overfitting(pgd: list[float], fgsm: list[float], expected: bool) -> None:
    probes = [{"pgd_accuracy": p, "fgsm_accuracy": f} for p, f in zip(pgd, fgsm, strict=True)]
    assert catastrophic_overfitting(probes) is expected


def test_probes_are_in_the_metrics_and_change_nothing(tmp_path: Path) -> None:
    with_probes = run(tmp_path / "with", arm="random-fgsm", monitor_every=4)
    without = run(tmp_path / "without", arm="random-fgsm", monitor_every=0)
    assert_same_state(with_probes, without)
    lines = metrics_of(tmp_path / "with")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 14]
    probed = [line for line in lines if "pgd_accuracy" in line]
    assert [line["step"] for line in probed] == [4, 8, 12]
    assert len({line["pgd_accuracy"] for line in probed}) > 1
    assert not any("pgd_accuracy" in line for line in metrics_of(tmp_path / "without"))


def test_probe_and_validation_run_in_the_precision_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def looking(call: Any) -> Any:
        def look(*arguments: Any, **options: Any) -> Any:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return call(*arguments, **options)

        return look

    for name in ("probe", "evaluate"):
        monkeypatch.setattr(training, name, looking(getattr(training, name)))
    validation = Validation(every=4, attacks=("fgsm",), eps=(0.0,))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        settings = config(arm="fgsm", steps=4, monitor_every=4, precision=precision, validation=validation)
        Trainer(settings, tiny_model(), Squares(), validation_dataset=Squares()).run(
            tmp_path / precision, progress=False
        )
        assert seen == [dtype, dtype]
        seen.clear()


class Script:
    """Stands for the probe: gives accuracies from a list."""

    def __init__(self, pgd: list[float], fgsm: list[float]) -> None:
        self.accuracies = iter(zip(pgd, fgsm, strict=True))
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.eps: set[float] = set()

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> dict[str, float]:
        self.batches.append((images.clone(), labels.clone()))
        self.eps.add(eps)
        pgd, fgsm = next(self.accuracies)
        return {"pgd_accuracy": pgd, "fgsm_accuracy": fgsm}


def test_warning_comes_once_also_over_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    script = Script([0.5, 0.6, 0.1, 0.05, 0.0], [0.5, 0.6, 0.8, 0.9, 0.9])
    monkeypatch.setattr(training, "probe", script)
    trainer = Trainer(config(arm="fgsm", monitor_every=2, checkpoint_every=2), tiny_model(), Squares())
    real_step = trainer.step_in_place

    def step(*arguments: Any) -> Any:
        if trainer.steps_done == 9:
            raise RuntimeError("the power is gone")
        return real_step(*arguments)

    monkeypatch.setattr(trainer, "step_in_place", step)
    with pytest.raises(RuntimeError, match="power"):
        trainer.run(tmp_path, progress=False)
    messages = [str(warning.message) for warning in recwarn if "catastrophic" in str(warning.message)]
    assert len(messages) == 1
    assert "after 6 steps the accuracy on 8 training images is 0.100 under PGD and 0.800 under FGSM" in messages[0]
    assert len(script.batches) == 4
    assert all(torch.equal(images, script.batches[0][0]) for images, _ in script.batches)
    script.accuracies = iter([(0.6, 0.6), *[(0.0, 0.9)] * 8])
    recwarn.clear()
    run(tmp_path, arm="fgsm", monitor_every=2, checkpoint_every=2)
    assert script.eps == {0.03}
    run(tmp_path / "other", arm="fgsm", monitor_every=7, eps=0.01)
    assert script.eps == {0.03, 0.01}
    assert not [warning for warning in recwarn if "catastrophic" in str(warning.message)]
    assert torch.equal(script.batches[-1][0], script.batches[0][0])


def test_a_data_set_with_fewer_images_than_a_probe_is_probed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([0.5], [0.5])
    monkeypatch.setattr(training, "probe", script)
    data = torch.utils.data.Subset(Squares(), range(5))
    Trainer(config(steps=1, monitor_every=1), tiny_model(), data).run(tmp_path, progress=False)
    assert [len(images) for images, _ in script.batches] == [5]


def test_rs_fgsm_stops_early_with_the_weights_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop is from one probe to the next, and more than 0.2: 0.5, 0.3, 0.09 stops at the third."""
    monkeypatch.setattr(training, "probe", Script([0.5, 0.3, 0.09], [0.5, 0.5, 0.5]))
    with pytest.warns(RuntimeWarning, match=r"rs-fgsm stops after 9 of 14 steps: .* from 0.300 to 0.090"):
        stopped = run(tmp_path / "rs", arm="rs-fgsm", monitor_every=3)
    assert (stopped.steps_done, stopped.stopped_at) == (9, 9)
    monkeypatch.setattr(training, "probe", Script([0.5] * 9, [0.5] * 9))
    until = Trainer(config(arm="rs-fgsm", monitor_every=3, checkpoint_every=1), tiny_model(), Squares())
    kept: dict[str, Tensor] = {}
    real_save = until.save

    def save(path: Any) -> None:
        real_save(path)
        if until.steps_done == 6:
            kept.update({name: value.clone() for name, value in until.model.state_dict().items()})

    monkeypatch.setattr(until, "save", save)
    until.run(tmp_path / "until", progress=False)
    assert until.steps_done == 14
    saved = torch.load(tmp_path / "rs" / "last.pt", weights_only=True)
    assert saved["model"].keys() == kept.keys()
    assert all(torch.equal(saved["model"][name], value) for name, value in kept.items())
    again = run(tmp_path / "rs", arm="rs-fgsm", monitor_every=3)  # there is nothing left to do
    assert (again.steps_done, again.stopped_at) == (9, 9)
    assert_same_state(again, stopped)

    with pytest.raises(
        ValueError, match="monitor_every must be at least 1 with the arm rs-fgsm, which stops by its probes"
    ):
        config(arm="rs-fgsm", monitor_every=0)
    with pytest.raises(ValueError, match="monitor_every"):
        run(tmp_path / "rs", arm="rs-fgsm", monitor_every=2)


def test_an_early_stop_is_validated_with_the_weights_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "probe", Script([0.5, 0.1], [0.5, 0.5]))
    monkeypatch.setattr(training.RunDirectory, "draw", lambda *_: [])  # it wants the other numbers of a probe
    data = Squares()
    settings = config(
        arm="rs-fgsm", monitor_every=3, validation=Validation(every=100, attacks=("fgsm",), eps=(0.0, 0.02))
    )
    trainer = Trainer(settings, tiny_model(), data, validation_dataset=data)
    with pytest.warns(RuntimeWarning, match="rs-fgsm stops after 6 of 14 steps"):
        trainer.run(tmp_path, progress=False)
    [line] = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert line["step"] == 6
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    assert line["rows"] == evaluate(trainer.model, loader, ["fgsm"], [0.0, 0.02]).rows


@pytest.mark.parametrize("crash_after", [4, 7, 11])
def test_early_stop_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_after: int) -> None:
    """The probe before, and its weights, may be from before the crash."""

    def scripted(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> dict[str, float]:
        # a number of the weights' own, so that it does not depend on how often it was asked
        steps = int(model[1].num_batches_tracked)
        return {"pgd_accuracy": {3: 0.5, 6: 0.6, 9: 0.5, 12: 0.1}[steps], "fgsm_accuracy": 0.5}

    monkeypatch.setattr(training, "probe", scripted)
    arguments: dict[str, Any] = {"arm": "rs-fgsm", "monitor_every": 3, "checkpoint_every": 5}
    with pytest.warns(RuntimeWarning, match="stops after 12"):
        whole = run(tmp_path / "whole", **arguments)
    crashing = Trainer(config(**arguments), tiny_model(), Squares())
    real_step = crashing.step_in_place

    def step(*args: Any) -> Any:
        if crashing.steps_done == crash_after:
            raise RuntimeError("the power is gone")
        return real_step(*args)

    monkeypatch.setattr(crashing, "step_in_place", step)
    with pytest.raises(RuntimeError, match="power"):
        crashing.run(tmp_path / "parts", progress=False)
    with pytest.warns(RuntimeWarning, match="stops after 12"):
        resumed = run(tmp_path / "parts", **arguments)
    assert_same_state(whole, resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("arm", [arm for arm in training.ARMS if arm != "basic"])
def test_share_of_adversarial_samples_is_an_option_of_every_arm(tmp_path: Path, arm: str) -> None:
    shares = {}
    for share in (0.0, 0.5, 1.0):
        run(tmp_path / f"{share}", arm=arm, steps=3, adversarial_share=share)
        shares[share] = metrics_of(tmp_path / f"{share}")[0]["adversarial_share"]
    assert (shares[0.0], shares[1.0]) == (0, 1)
    assert 0 < shares[0.5] < 1


def test_training_picture(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    run(tmp_path, models.small_pspnet(num_classes=5), steps=4, crop=(20, 28), monitor_every=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name, drawn in (("all", lines), ("none", [{"step": 3, "loss": 1.0}])):
        plots.plot_training(drawn, tmp_path / f"{name}.png", title=name)
        with image_module.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_every_figure_of_a_training_is_drawn_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    names = (
        "gradient_cosine", "fgsm_accuracy", "pgd_accuracy", "newton_eps_median", "newton_share_negative_gain",
        "newton_eps_p10", "newton_eps_p90",
    )  # fmt: skip
    probes = [{"step": step, "loss": 9.0} | {name: step + i for i, name in enumerate(names)} for step in (-0.5, -0.4)]
    plots.plot_training([*probes, {"step": 0, "loss": 8.0}], tmp_path / "x.png")
    plots.plot_training([{"step": 3, "loss": 1.0}], tmp_path / "x.png")
    loss, accuracy, cosine, newton, share = figures[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[-0.5, 9], [-0.4, 9], [0, 8]]
    assert (loss.get_ylim()[0], cosine.get_ylim()[0], loss.lines[0].get_marker()) == (0, -0.5, "")
    drawn = [[line.get_ydata()[0] for line in panel.lines] for panel in (accuracy, cosine, newton, share)]
    assert drawn == [[0.5, 1.5], [-0.5], [2.5, 0], [3.5]]
    assert [line.get_label() for line in accuracy.lines] == ["FGSM", "PGD-10"]
    (band,) = newton.collections
    assert band.get_paths()[0].get_extents().extents[[1, 3]].tolist() == [4.5, 5.6]
    (alone,) = figures[1].axes
    assert alone.lines[0].get_marker() == "o"
