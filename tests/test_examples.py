"""The worked examples in docs/examples: they run, and what they show is true."""

from __future__ import annotations

import copy
import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segadv
from segadv import cli
from segadv.records import model_hash

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
Logits = Callable[[Tensor], Tensor]


NEEDED = {
    "segformer": ("transformers",),
    "mask2former": ("transformers", "scipy"),
    "hf_trainer": ("transformers", "accelerate"),
    "smp_models": ("segmentation_models_pytorch",),
    "torchvision_deeplabv3": ("torchvision",),
    "own_model": (),
    "stronger_attacks": ("PIL", "tqdm"),
    "training_loop": (),
}


def needs(name: str) -> str:
    """The example's name; the test is skipped where a package is missing, as on a machine without a network."""
    for package in NEEDED[name]:
        pytest.importorskip(package, exc_type=ImportError)
    return name


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == NEEDED.keys()


@pytest.fixture(autouse=True)
def _one_example_may_import_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in {path.stem for path in FOLDER.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def example(name: str) -> ModuleType:
    return importlib.import_module(needs(name))


def case(count: int = 2, size: int = 64, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images = F.interpolate(torch.rand(count, 3, 8, 8, dtype=dtype), size=(size, size), mode="bilinear")
    labels = images.argmax(1)
    labels[:, :4] = 255
    return images, labels


def randomise_norms(network: nn.Module) -> nn.Module:
    """Norm layers and logits unlike those of a new network."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2)
    return network.eval()


def plain_newton(
    logits: Logits, images: Tensor, labels: Tensor, *, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Fast Newton in plain PyTorch ([FNM] equations 17 to 19): the adversarial images, eps [N], the gradient."""
    leaf = images.clone().requires_grad_()
    margin = oracle.pixel_margin(logits(leaf), labels, align_corners=align_corners)
    gain = oracle.mean_over_valid(margin, labels)
    (grad,) = torch.autograd.grad(gain.sum(), leaf)
    eps = gain.detach() / grad.abs().sum((1, 2, 3))
    return (images - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1), eps, grad


def assert_newton(
    model: nn.Module, logits: Logits, images: Tensor, labels: Tensor, *, align_corners: bool = False, **options: Any
) -> None:
    """`segadv.fast_newton_step` is the plain formula, in float64."""
    expected, eps, grad = plain_newton(logits, images, labels, align_corners=align_corners)
    ours, info = segadv.fast_newton_step(
        model, images, labels, align_corners=align_corners, return_info=True, **options
    )
    torch.testing.assert_close(info.eps, eps, rtol=1e-9, atol=0)
    clear = grad.abs() > 1e-9 * grad.abs().max()  # elsewhere the terms cancel, and rounding decides the sign
    assert clear.double().mean() > 0.5
    torch.testing.assert_close(ours[clear], expected[clear], rtol=0, atol=1e-9)
    assert not torch.equal(ours, images)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


NUMBER = r"(-?\d+\.?\d*(?:e-?\d+)?)"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / f"{needs(name)}.py"), run_name="__main__")
    return capsys.readouterr().out


# --- Hugging Face SegFormer ---------------------------------------------------------------------------------------


def test_segformer_loss_and_step() -> None:
    segformer = example("segformer")
    network = randomise_norms(segformer.tiny_segformer(num_classes=3)).double()
    model = segadv.models.wrap(network, mean=segformer.MEAN, std=segformer.STD)
    images, labels = case()
    mean, std = (torch.tensor(entries).view(3, 1, 1) for entries in (segformer.MEAN, segformer.STD))

    def plain(images: Tensor) -> Tensor:
        logits: Tensor = network(pixel_values=(images - mean) / std).logits
        return logits

    assert model(images).shape == (2, 3, 16, 16)
    ours = segadv.CrossEntropyLoss()(model(images), labels)
    theirs = network(pixel_values=(images - mean) / std, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(ours, network), gradients(theirs, network), rtol=1e-8, atol=1e-12)
    assert_newton(model, plain, images, labels)


def test_segformer_is_the_same_model_after_its_first_pass() -> None:
    """So that an evaluation that was stopped goes on."""
    network = example("segformer").tiny_segformer(num_classes=3).eval()
    first = model_hash(network)
    network(pixel_values=torch.rand(1, 3, 64, 64))
    assert model_hash(network) == first


def test_segformer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("segformer", capsys)
    assert "images [8, 3, 64, 64], logits [8, 3, 16, 16]" in text
    loss, own = map(float, re.search(rf"loss {NUMBER}, SegFormer's own {NUMBER}", text).groups())
    assert loss == pytest.approx(own, abs=2e-6)
    steps = re.findall(rf"gain {NUMBER} -> {NUMBER} by a step of eps {NUMBER}", text)
    assert len(steps) == 8
    for before, after, eps in (map(float, step) for step in steps):
        assert after < before / 2  # Newton's step brings the linearised gain to zero
        assert 0 < eps < 0.5


# --- Hugging Face Mask2Former -------------------------------------------------------------------------------------


def test_mask2former_of_queries() -> None:
    mask2former = example("mask2former")
    network = randomise_norms(mask2former.tiny_mask2former(num_classes=3)).double()
    images, labels = case()
    output = network(pixel_values=images)
    classes, masks = output.class_queries_logits.softmax(2), output.masks_queries_logits.sigmoid()
    scores = torch.stack([sum(classes[:, q, c, None, None] * masks[:, q] for q in range(6)) for c in range(3)], 1)
    logits = mask2former.of_queries(output)
    assert classes.shape == (2, 6, 4)
    torch.testing.assert_close(logits.softmax(1), scores / scores.sum(1, keepdim=True), rtol=1e-10, atol=0)
    torch.testing.assert_close(logits.exp(), scores, rtol=1e-10, atol=0)

    def plain(images: Tensor) -> Tensor:
        result: Tensor = mask2former.of_queries(network(pixel_values=images))
        return result

    assert_newton(network, plain, images, labels, output=mask2former.of_queries)


def test_mask2former_runs(capsys: pytest.CaptureFixture[str]) -> None:
    steps = re.findall(rf"gain {NUMBER} -> {NUMBER} by a step of eps {NUMBER}", run("mask2former", capsys))
    assert len(steps) == 8
    before, after, sizes = torch.tensor([list(map(float, step)) for step in steps]).T
    assert after.sum() < before.sum() / 1.5  # how far a single image's gain falls, rounding in the training decides
    assert ((sizes * before > 0) & (sizes.abs() < 0.5)).all()


# --- segmentation-models-pytorch ----------------------------------------------------------------------------------


def test_smp_unet() -> None:
    smp_models = example("smp_models")
    network = randomise_norms(smp_models.unet()).double()
    images, labels = case()
    assert network(images).shape == (2, 3, 64, 64)
    loss, adversarial = smp_models.loss_and_attack(network, images, labels)
    torch.testing.assert_close(loss, F.cross_entropy(network(images), labels, ignore_index=255), rtol=1e-10, atol=0)
    torch.testing.assert_close(adversarial, plain_newton(network, images, labels)[0], rtol=0, atol=1e-9)
    assert_newton(network, network, images, labels)


def test_smp_pspnet_with_small_logits_is_the_network_that_upsamples() -> None:
    smp_models = example("smp_models")
    large = randomise_norms(smp_models.pspnet(upsampling=8)).double()
    small = smp_models.pspnet(upsampling=1).double().eval()
    small.load_state_dict(large.state_dict())
    images, labels = case()
    assert large(images).shape == (2, 3, 64, 64)
    assert small(images).shape == (2, 3, 8, 8)
    expected = F.cross_entropy(large(images), labels, ignore_index=255)
    loss, adversarial = smp_models.loss_and_attack(small, images, labels, align_corners=True)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(loss, small), gradients(expected, large), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(adversarial, plain_newton(large, images, labels)[0], rtol=0, atol=1e-9)


def test_smp_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("smp_models", capsys)
    large, small = re.findall(rf"logits \[2, 3, (\d+), \1\], loss {NUMBER}, largest change {NUMBER}", text)
    assert (large[0], small[0]) == ("64", "8")
    assert [float(x) for x in small[1:]] == pytest.approx([float(x) for x in large[1:]], rel=1e-3)


# --- torchvision --------------------------------------------------------------------------------------------------


def test_deeplabv3_dict_and_its_small_logits() -> None:
    deeplab = example("torchvision_deeplabv3")
    network = deeplab.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    images, labels = case()
    deeplab.take_statistics(network.double(), images)
    network.eval()
    small = deeplab.SmallLogits(network)
    assert small(images)["out"].shape == (2, 3, 4, 4)
    output = network(images)
    assert output["out"].shape == (2, 3, 64, 64)
    expected = F.cross_entropy(output["out"], labels, ignore_index=255)
    expected = expected + 0.5 * F.cross_entropy(output["aux"], labels, ignore_index=255)
    for model in (network, small):
        loss = deeplab.training_loss(model, images, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        assert_newton(model, lambda images: network(images)["out"], images, labels)


def test_deeplabv3_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("torchvision_deeplabv3", capsys)
    losses = [float(loss) for loss in re.findall(rf"loss {NUMBER}", text)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# --- a network of one's own ---------------------------------------------------------------------------------------


def test_output_names_the_logits() -> None:
    own = example("own_model")
    images, labels = case()
    network = own.Network(num_classes=3).double()
    reference = copy.deepcopy(network).eval()
    assert_newton(network, lambda x: reference(x)[1]["heads"][1], images, labels, output=own.last_head)
    assert network.training

    one = own.Network(num_classes=1).double()
    red = (labels == 0).long().masked_fill(labels == 255, 255)
    loss = segadv.CrossEntropyLoss()(own.two_classes(one(images)), red)
    z = F.interpolate(own.last_head(one(images)), (64, 64), mode="bilinear")[:, 0]
    valid = labels != 255
    expected = F.binary_cross_entropy_with_logits(z[valid], red[valid].double())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)

    ensemble = own.Ensemble([own.Network(num_classes=3), own.Network(num_classes=3)]).double().eval()
    mean = torch.stack([own.last_head(part(images)).softmax(1) for part in ensemble.networks]).mean(0)
    torch.testing.assert_close(ensemble(images).softmax(1), mean, rtol=1e-10, atol=0)
    assert_newton(ensemble, ensemble, images, labels)


def test_own_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("own_model", capsys)
    assert all(0 < float(eps) < 0.5 for eps in re.findall(rf"mean eps {NUMBER}", text))
    before, after = map(float, re.search(rf"cross-entropy {NUMBER} -> {NUMBER}", text).groups())
    assert after > 1.5 * before


# --- loops of others ----------------------------------------------------------------------------------------------


def test_training_step_is_the_written_out_one() -> None:
    loop = example("training_loop")
    ours = segadv.models.small_pspnet(num_classes=3).double()
    ours.dropout.p = 0.0
    plain = copy.deepcopy(ours)
    images, labels = case(4)
    chosen = torch.tensor([True, False, True, False])

    mixed = images.clone()
    mixed[chosen] = plain_newton(plain.eval(), images[chosen], labels[chosen])[0]
    logits = F.interpolate(plain.train()(mixed), labels.shape[-2:], mode="bilinear")
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    expected.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.05 * parameter.grad

    loss = loop.training_step(ours, torch.optim.SGD(ours.parameters(), lr=0.05), images.clone(), labels, chosen)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
    assert not torch.equal(mixed, images)
    for (name, value), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_training_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [float(loss) for loss in re.findall(rf"ten steps {NUMBER}", run("training_loop", capsys))]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]


class Recorded(nn.Module):
    """A network that keeps what it is given in train mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        logits: Tensor = self.network(images)
        return logits


def deterministic_segformer(example: ModuleType) -> nn.Module:
    network = example.tiny_segformer(num_classes=3)
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if type(part).__name__ == "SegformerDropPath":
            part.drop_prob = 0.0
    model: nn.Module = segadv.models.wrap(network, mean=example.MEAN, std=example.STD)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hugging_face_trainer_takes_the_written_out_steps(accumulation: int, tmp_path: Path) -> None:
    """Three optimiser steps of plain SGD: images, weights and statistics are those of a loop written by hand."""
    trainer_example = example("hf_trainer")
    ours = Recorded(deterministic_segformer(trainer_example)).double()
    plain = copy.deepcopy(ours.network).train()
    order: list[int] = []

    class Colours(trainer_example.Colours):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            order.append(index)
            sample = super().__getitem__(index)
            return {**sample, "images": sample["images"].double()}

    data = Colours(6 * accumulation)
    settings = trainer_example.arguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trainer_example.FastNewtonTrainer(model=ours, args=settings, train_dataset=data, share=1.0)
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(ours.seen) == 3 * accumulation
    assert sorted(order) == list(range(6 * accumulation))
    batches = list(zip(order[::2], order[1::2], strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    for step in range(3):
        total = 0.0
        for part in range(accumulation):
            batch = step * accumulation + part
            samples = [data[index] for index in batches[batch]]
            images, labels = (torch.stack([sample[key] for sample in samples]) for key in ("images", "labels"))
            adversarial, _, _ = plain_newton(plain.eval(), images, labels)
            # The attack's forward passes are in eval mode: what the network saw in train mode is adversarial.
            torch.testing.assert_close(ours.seen[batch], adversarial, rtol=0, atol=1e-7)
            assert (adversarial - images).abs().mean() > 1e-4
            logits = F.interpolate(plain.train()(adversarial), labels.shape[-2:], mode="bilinear")
            loss = F.cross_entropy(logits, labels, ignore_index=255) / accumulation
            loss.backward()
            total += loss.item()
        assert losses[step] == pytest.approx(total, abs=1e-4)  # the Trainer rounds what it logs
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for (name, value), other in zip(ours.network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    assert all(module.training for module in ours.modules())
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_hugging_face_trainer_evaluates_on_clean_images(tmp_path: Path) -> None:
    trainer_example = example("hf_trainer")
    model = deterministic_segformer(trainer_example)
    data = trainer_example.Colours(4)
    settings = trainer_example.arguments(str(tmp_path), per_device_eval_batch_size=2, disable_tqdm=True, use_cpu=True)
    trainer = trainer_example.FastNewtonTrainer(model=model, args=settings, eval_dataset=data, share=1.0)
    result = trainer.predict(data)
    with torch.no_grad():
        expected = model.eval()(data.images)
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected, rtol=1e-4, atol=1e-5)
    labels = torch.stack([data[i]["labels"] for i in range(4)])
    loss = segadv.CrossEntropyLoss()(expected, labels).item()
    assert result.metrics["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_hugging_face_trainer_learns(capsys: pytest.CaptureFixture[str]) -> None:
    text = run("hf_trainer", capsys)
    losses = [float(loss) for loss in re.search(r"mean losses: \[(.*)\]", text)[1].split(",")]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0]


# --- attacks of one's own in `evaluate` ---------------------------------------------------------------------------


def test_losses_of_sea() -> None:
    attacks = example("stronger_attacks")
    logits = (3 * torch.randn(2, 5, 4, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 5, (2, 4, 6))
    labels[0, 0], labels[1, :, 2] = 255, 255
    found = {name: loss(logits, labels) for name, loss in attacks.OWN.items()}
    p = logits.softmax(1)
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6)).tolist():
        label = labels[image, row, column].item()
        here = {name: loss[image, row, column].item() for name, loss in found.items()}
        if label == 255:
            assert here == dict.fromkeys(found, 0)
            continue
        prediction = p[image, :, row, column].detach()
        truth = torch.eye(5, dtype=torch.float64)[label]
        middle = (prediction + truth) / 2
        divergence = (torch.xlogy(truth, truth / middle).sum() + torch.xlogy(prediction, prediction / middle).sum()) / 2
        assert here["js"] == pytest.approx(divergence.item(), abs=1e-12)
        right = prediction.argmax().item() == label
        masked = -prediction[label].log().item() if right else 0
        assert here["masked-ce"] == pytest.approx(masked, abs=1e-12)
        assert here["balanced-ce"] == pytest.approx(masked / (labels[image] == label).sum().item(), abs=1e-12)


@pytest.mark.parametrize("name", ["js", "masked-ce", "balanced-ce"])
def test_attack_with_a_loss_of_ones_own(name: str) -> None:
    attacks = example("stronger_attacks")
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 1)).double()
    images, labels = case(3)
    labels[2] = 255
    seen: list[Tensor] = []
    looking = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    loss = attacks.OWN[name]
    with torch.no_grad():
        adversarial = attacks.decaying_pgd(model, 0.1, loss=loss, steps=6)(images, labels)
    looking.remove()
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6

    sizes = torch.arange(6, dtype=torch.float64).mul(torch.pi / 6).cos().add(1).mul(0.1 / 2)
    wrong = []
    for step, iterate in enumerate(seen):  # 7: the start, and after each step
        leaf = iterate.clone().requires_grad_()
        logits = F.interpolate(model(leaf), (64, 64), mode="bilinear")
        wrong.append(((logits.argmax(1) != labels) & (labels != 255)).sum((1, 2)))
        if step < 6:
            (grad,) = torch.autograd.grad(loss(logits, labels).sum(), leaf)
            expected = (iterate + sizes[step] * grad.sign()).clamp(images - 0.1, images + 0.1).clamp(0, 1)
            torch.testing.assert_close(seen[step + 1], expected, rtol=0, atol=1e-9)
    assert len(wrong) == 7
    best = torch.stack(wrong).argmax(0)
    for image in range(2):
        assert torch.equal(adversarial[image], seen[best[image]][image])


def test_stronger_attacks_on_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacks = example("stronger_attacks")
    data = f"{tmp_path}/streets"
    assert cli.main(f"data generate-streets {data} --train 4 --val 2 --size 64x80".split()) == 0
    train = f"train --config streets_small --arm basic --data {data} --out {tmp_path}/run --steps 3 --crop [64,80]"
    assert cli.main(f"{train} --batch-size 4 --workers 0".split()) == 0
    capsys.readouterr()
    attacks.main([f"{tmp_path}/run/last.pt", "--data", data, "--eps", "0.05", "--steps", "3", "--images", "2"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert "trained with basic" in title
    names, rows = zip(*(re.fullmatch(rf"  (.+?) +{NUMBER}  {NUMBER}", line).group(1, 3) for line in lines), strict=True)
    worst = [[f"worst of {which}, by pixels", f"worst of {which}, by mIoU"] for which in ("these", "all")]
    assert names == ("clean", *attacks.BUILT_IN, *worst[0], *attacks.OWN, *worst[1])
    accuracy = [float(entry) for entry in rows]
    assert accuracy[6] <= min(accuracy[:6])
    assert accuracy[11] <= min(accuracy)
