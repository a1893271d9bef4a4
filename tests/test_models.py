"""segadv.models: sizes, parameter counts, initialisation, and wrap."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import segadv
from segadv import models

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]


def test_small_pspnet_has_the_promised_size_and_stride() -> None:
    model = models.small_pspnet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 299_811
    assert models.small_pspnet(num_classes=5).classifier.out_channels == 5
    backbone = model.backbone
    assert backbone.channels == backbone.bn.num_features
    dilations = [block.conv2.dilation[0] for block in backbone.blocks]
    strides = [backbone.stem.stride[0], *(block.conv1.stride[0] for block in backbone.blocks)]
    assert strides == [2, 2, 2, 1, 1]
    assert dilations == [1, 1, 2, 4]


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (16, 24), (33, 17), (47, 65), (64, 128), (101, 77), (8, 100)])
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_an_eighth_of_any_image_size(size: tuple[int, int], training: bool) -> None:
    torch.manual_seed(0)
    model = models.small_pspnet(num_classes=7).train(training)
    logits = model(torch.rand(2, 3, *size))
    assert logits.shape == (2, 7, -(-size[0] // 8), -(-size[1] // 8))
    assert logits.isfinite().all()


def test_pspnet_is_the_written_out_network() -> None:
    torch.manual_seed(1)
    model = models.small_pspnet(num_classes=4).eval().double()
    for part in model.modules():  # running statistics unlike those of a new network
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 41, 58, dtype=torch.float64)

    def norm_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        mean, std = bn.running_mean.view(-1, 1, 1), (bn.running_var + bn.eps).sqrt().view(-1, 1, 1)
        return ((x - mean) / std * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)).clamp(min=0)

    x = F.conv2d(images, model.backbone.stem.weight, stride=2, padding=1)
    for block, stride, dilation in zip(model.backbone.blocks, (2, 2, 1, 1), (1, 1, 2, 4), strict=True):
        a = norm_relu(x, block.bn1)
        if block.shortcut is not None:
            x = F.conv2d(a, block.shortcut.weight, stride=stride)
        a = F.conv2d(a, block.conv1.weight, stride=stride, padding=dilation, dilation=dilation)
        x = x + F.conv2d(norm_relu(a, block.bn2), block.conv2.weight, padding=dilation, dilation=dilation)
    features = norm_relu(x, model.backbone.bn)
    parts = [features]
    for bins, (conv, bn, _) in zip((1, 2, 3, 6), model.levels, strict=True):
        height, width = features.shape[-2:]
        pooled = torch.stack(
            [
                features[
                    :,
                    :,
                    i * height // bins : -(-(i + 1) * height // bins),
                    j * width // bins : -(-(j + 1) * width // bins),
                ].mean((2, 3))
                for i in range(bins)
                for j in range(bins)
            ],
            dim=2,
        ).unflatten(2, (bins, bins))
        pooled = norm_relu(F.conv2d(pooled, conv.weight), bn)
        parts.append(F.interpolate(pooled, size=(height, width), mode="bilinear", align_corners=False))
    conv, bn, _ = model.bottleneck
    x = norm_relu(F.conv2d(torch.cat(parts, 1), conv.weight, padding=1), bn)
    expected = F.conv2d(x, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_dropout_zeroes_whole_channels() -> None:
    dropout = models.PSPNet(nn.Identity(), feature_channels=8, num_classes=2, dropout=0.5).train().dropout
    kept = dropout(torch.ones(8, 64, 3, 5))
    assert torch.equal(kept.amin((2, 3)), kept.amax((2, 3)))
    assert set(kept.unique().tolist()) == {0.0, 2.0}


def test_initial_weights_are_he_et_als() -> None:
    """Normal with variance 2 / (outputs * kernel), so that gradients neither vanish nor grow; 7 standard deviations."""
    torch.manual_seed(0)
    model = models.small_pspnet(num_classes=200)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            weight, outputs = part.weight.detach().double(), part.out_channels * math.prod(part.kernel_size)
            assert weight.square().mean().item() == pytest.approx(2 / outputs, rel=7 * math.sqrt(2 / weight.numel()))
            assert part.bias is None or not part.bias.any()
    assert model.dropout.p == 0.1


def test_seed_decides_the_initialisation() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return models.small_pspnet().state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.stem.weight"], other["backbone.stem.weight"])
    weight = first["bottleneck.0.weight"]  # He: variance 2 / fan-out
    assert weight.var().item() == pytest.approx(2 / (weight.shape[0] * 9), rel=0.05)


def test_head_takes_any_backbone() -> None:
    backbone = nn.Conv2d(3, 8, 8, stride=8)
    model = models.PSPNet(backbone, feature_channels=8, num_classes=3, head_channels=16, dropout=0)
    assert model(torch.rand(2, 3, 48, 40)).shape == (2, 3, 6, 5)
    assert [level[0].out_channels for level in model.levels] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2, got 1"):
        models.PSPNet(backbone, feature_channels=8, num_classes=1)


def test_forward_and_backward_repeat_their_bits() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = models.small_pspnet()
        images = torch.rand(4, 3, 40, 72, requires_grad=True)
        logits = model(images)
        logits.square().mean().backward()
        return [logits.detach(), images.grad, *(parameter.grad for parameter in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_wrap_normalises() -> None:
    torch.manual_seed(0)
    model = models.small_pspnet().eval()
    images = torch.rand(2, 3, 24, 32)
    wrapped = models.wrap(model, mean=MEAN, std=STD)
    mean, std = (torch.tensor(entries).view(3, 1, 1) for entries in (MEAN, STD))
    torch.testing.assert_close(wrapped(images), model((images - mean) / std), rtol=0, atol=0)
    assert torch.equal(models.wrap(model)(images), model(images))
    assert torch.equal(models.wrap(model, mean=MEAN)(images), model(images - mean))
    assert torch.equal(models.wrap(model, std=STD)(images), model(images / std))
    assert torch.equal(models.wrap(model, mean=[0.5], std=[0.5])(images), model((images - 0.5) / 0.5))
    with warnings.catch_warnings(action="error"):
        assert torch.equal(models.wrap(model, mean=torch.tensor(MEAN), std=np.array(STD))(images), wrapped(images))
    assert not wrapped.training
    assert models.wrap(model.train()).training
    double = models.wrap(model.eval().double(), mean=MEAN, std=STD)
    assert double(images.double()).dtype == torch.float64


def test_wrapped_gradient_is_in_pixel_space() -> None:
    model = nn.Conv2d(3, 2, 1)
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(models.wrap(model, mean=MEAN, std=STD)(images).sum(), images)
    expected = model.weight.sum(0).flatten() / torch.tensor(STD)
    torch.testing.assert_close(grad[0, :, 0, 0], expected.detach())


@pytest.mark.parametrize(
    ("adapt", "output"),
    [
        (lambda z: {"out": z, "aux": 0}, None),
        (lambda z: {"logits": z}, None),
        (lambda z: SimpleNamespace(logits=z), None),
        (lambda z: (z, "rest"), None),
        (lambda z: ["rest", [z]], lambda output: output[1][0]),
    ],
)
def test_wrap_adapts_the_output(adapt: object, output: object) -> None:
    class Model(nn.Module):
        def forward(self, images: Tensor) -> object:
            return adapt(2 * images)

    images = torch.rand(1, 3, 2, 2)
    assert torch.equal(models.wrap(Model(), output=output)(images), 2 * images)


def test_wrap_names_what_is_wrong() -> None:
    model = nn.Identity()
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got a function"):
        models.wrap(lambda images: images)
    with pytest.raises(ValueError, match=r"one entry per channel each, got mean=\[0.5, 0.5\] and std=\[1.0\]"):
        models.wrap(model, mean=[0.5, 0.5], std=[1.0])
    with pytest.raises(ValueError, match="one entry per channel"):
        models.wrap(model, mean=[])
    for std in (0.2, np.float32(0.2), True, torch.tensor(0.2), "0.2", [None]):
        with pytest.raises(TypeError, match=r"std must be a sequence, one number per channel, got .*; one of a"):
            models.wrap(model, mean=[0.5], std=std)
    for std in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std must be positive and finite"):
            models.wrap(model, std=[1.0, std, 1.0])
    for mean in (float("inf"), float("nan"), -0.1, 123.675):
        with pytest.raises(ValueError, match=r"mean must be in \[0, 1\], the unit of the images"):
            models.wrap(model, mean=[mean])
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\].*got \[2, 4, 5, 6\]"):
        models.wrap(model, mean=MEAN)(torch.zeros(2, 4, 5, 6))
    for mean in (MEAN, [0.5]):
        with pytest.raises(ValueError, match=r"images must be \[N, .*got \[5, 6\]"):
            models.wrap(model, mean=mean)(torch.zeros(5, 6))

    class Strange(nn.Module):
        def forward(self, images: Tensor) -> str:
            return "logits"

    with pytest.raises(TypeError, match="output="):
        models.wrap(Strange())(torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="output must be a callable or None, got a str"):
        models.wrap(model, output="out")


def test_wrap_normalises_where_the_model_is() -> None:
    with FakeTensorMode():  # as if there were a GPU
        wrapped = models.wrap(nn.LayerNorm(3, device="cuda"), mean=[0.5] * 3, std=[0.2] * 3)
    assert {buffer.device.type for buffer in wrapped.buffers()} == {"cuda"}


def test_wrap_takes_a_model_whose_weights_are_offloaded() -> None:
    model, images = nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 4)
    expected, logits = (
        models.wrap(each, mean=MEAN, std=STD)(images) for each in (model, oracle.Offloaded(copy.deepcopy(model)))
    )
    assert torch.equal(logits, expected)


def test_wrap_keeps_the_model() -> None:
    model = models.small_pspnet()
    wrapped = models.wrap(model, mean=MEAN, std=STD)
    assert list(wrapped.parameters()) == list(model.parameters())
    other = models.wrap(models.small_pspnet(), mean=[0, 0, 0], std=STD)
    other.load_state_dict(wrapped.state_dict())
    assert torch.equal(other.eval()(torch.ones(1, 3, 16, 16)), wrapped.eval()(torch.ones(1, 3, 16, 16)))


def test_build_model_depends_on_the_seed_alone() -> None:
    def build(seed: int) -> torch.nn.Module:
        return models.build_model(models.ModelConfig(), num_classes=5, seed=seed)

    state = torch.get_rng_state()
    first = build(3)
    torch.rand(1)
    assert all(map(torch.equal, first.parameters(), build(3).parameters()))
    assert not all(map(torch.equal, first.parameters(), build(4).parameters()))
    torch.set_rng_state(state)
    build(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'small_pspnet'"):
        models.ModelConfig("small-pspnet")


# --- pspnet50 -----------------------------------------------------------------------------------------------------

STAGES = ((256, 3), (512, 4), (1024, 6), (2048, 3))  # channels and blocks of ResNet-50
DILATED = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))  # of each stage: stride, dilation of its first block and others


def randomise_norms(network: nn.Module) -> nn.Module:
    """Norm layers unlike those of a new network."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(std=0.2)
    return network


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    module: ModuleType = pytest.importorskip("timm", exc_type=ImportError)  # it needs torchvision in its turn
    return module


@pytest.fixture(scope="module")
def network(timm: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(models.pspnet50(19)).eval()


def resnet50v2_parameters() -> int:
    """He et al. 2016: 7x7 stem, pre-activation bottlenecks with a quarter of the channels, a last norm; no biases."""
    count, channels = 3 * 64 * 7 * 7, 64
    for out, blocks in STAGES:
        middle = out // 4
        count += channels * out  # the 1x1 convolution of the stage's shortcut
        for _ in range(blocks):
            count += 2 * (channels + middle + middle)  # three norms: scale and shift
            count += channels * middle + 9 * middle * middle + middle * out  # 1x1, 3x3, 1x1
            channels = out
    return count + 2 * channels


@pytest.mark.parametrize("num_classes", [19, 21])
def test_pspnet50_has_the_parameters_of_its_description(network: nn.Module, num_classes: int) -> None:
    backbone = resnet50v2_parameters()
    assert sum(parameter.numel() for parameter in network.model.backbone.parameters()) == backbone
    pyramid = 4 * (2048 * 512 + 2 * 512)
    head = (2048 + 4 * 512) * 512 * 9 + 2 * 512 + 512 * num_classes + num_classes
    model = (
        network if num_classes == 19 else models.PSPNet(network.model.backbone, feature_channels=2048, num_classes=21)
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == backbone + pyramid + head
    assert [level[0].out_channels for level in network.model.levels] == [512] * 4
    assert network.model.bins == (1, 2, 3, 6)


def test_pspnet50_begins_with_no_class_likelier_than_another() -> None:
    torch.manual_seed(0)
    logits = models.pspnet50(19).train()(torch.rand(2, 3, 64, 64))
    assert F.cross_entropy(logits, torch.randint(19, (2, 8, 8))).item() == pytest.approx(math.log(19), abs=0.1)


def test_pspnet50_backbone_is_the_written_out_network(network: nn.Module) -> None:
    """The pre-activation ResNet-50 at output stride 8, in float64; and what timm calls its normed features."""
    backbone = network.model.backbone.double()
    images = torch.rand(1, 3, 50, 65, dtype=torch.float64)

    def norm_relu(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps).clamp(min=0)

    with torch.no_grad():
        x = F.max_pool2d(F.conv2d(images, backbone.stem.conv.weight, stride=2, padding=3), 3, 2, 1)
        for stage, (_, blocks), (stride, first, dilation) in zip(backbone.stages, STAGES, DILATED, strict=True):
            assert len(stage.blocks) == blocks
            for i, block in enumerate(stage.blocks):
                step, spread = (stride, first) if i == 0 else (1, dilation)
                a = norm_relu(x, block.norm1)
                shortcut = F.conv2d(a, block.downsample.conv.weight, stride=step) if i == 0 else x
                a = norm_relu(F.conv2d(a, block.conv1.weight), block.norm2)
                a = F.conv2d(a, block.conv2.weight, stride=step, padding=spread, dilation=spread)
                x = shortcut + F.conv2d(norm_relu(a, block.norm3), block.conv3.weight)
        expected = norm_relu(x, backbone.norm)
        features = backbone(images)
        _, intermediates = backbone.forward_intermediates(images, norm=True)
    network.float()
    assert features.shape == (1, 2048, 7, 9)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(features, intermediates[-1])
    assert features.min() == 0  # after a ReLU
    assert features.max() > 0


def test_pspnet50_dilation_computes_the_same_features_more_densely(network: nn.Module, timm: ModuleType) -> None:
    """Every fourth feature of the dilated backbone is one of the undilated, at output stride 32."""
    undilated = timm.create_model("resnetv2_50", num_classes=0, global_pool="").eval()
    undilated.load_state_dict(network.model.backbone.state_dict())
    images = torch.rand(1, 3, 97, 65, dtype=torch.float64)
    with torch.no_grad():
        sparse, dense = undilated.double()(images), network.model.backbone.double()(images)
    network.float()
    assert dense.shape == (1, 2048, 13, 9)
    torch.testing.assert_close(dense[..., ::4, ::4], sparse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(65, 65), (64, 33), (41, 72)])
def test_pspnet50_normalises_inside_and_returns_small_logits(network: nn.Module, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        logits = network(images)
        torch.testing.assert_close(logits, network.model(2 * images - 1), rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 19, -(-size[0] // 8), -(-size[1] // 8))


def test_pspnet50_is_attacked_in_pixels_and_left_as_it_was(network: nn.Module) -> None:
    images, labels = torch.rand(2, 3, 41, 33), torch.randint(0, 19, (2, 41, 33))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    for bn in ("eval", "train"):
        adversarial = segadv.attacks.FGSM(network, eps=0.02, bn=bn)(images, labels)
        assert (adversarial - images).abs().max() <= 0.02 + 1e-6
        assert ((adversarial - images).abs() > 0.0199).float().mean() > 0.9
    assert all(part.training for part in network.modules())
    network.eval()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.fixture(scope="module")
def imagenet(timm: ModuleType) -> dict[str, Tensor]:
    """The state dict of timm's resnetv2_50 with its classifier, as its published weights have it; random."""
    torch.manual_seed(1)
    return randomise_norms(timm.create_model("resnetv2_50")).state_dict()


def assert_has(network: nn.Module, weights: dict[str, Tensor]) -> None:
    state = network.model.backbone.state_dict()
    assert state.keys() == {name for name in weights if not name.startswith("head.")}
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


def test_backbone_from_a_file(imagenet: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(imagenet, tmp_path / "robust.safetensors")
    config = models.ModelConfig("pspnet50", backbone=str(tmp_path / "robust.safetensors"))
    assert_has(models.build_model(config, num_classes=3, seed=0), imagenet)
    prefixed = {f"module.model.{name}": value for name, value in imagenet.items() if not name.startswith("head.")}
    torch.save({"state_dict": prefixed, "epoch": 90}, tmp_path / "robust.pth")
    assert_has(models.pspnet50(3, backbone=tmp_path / "robust.pth"), imagenet)


def test_pretrained_comes_through_timm(
    imagenet: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache of the Hugging Face hub laid out as the hub's client does it, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pretrained: .*resnetv2_50 from the Hugging Face hub.*backbone="):
        models.pspnet50(3, pretrained=True)
    cache = tmp_path / "models--timm--resnetv2_50.a1h_in1k"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    safetensors.torch.save_file(imagenet, cache / "snapshots" / commit / "model.safetensors")
    assert_has(models.build_model(models.ModelConfig("pspnet50", pretrained=True), num_classes=3, seed=0), imagenet)


class Backbone(nn.Module):
    """What `_load_backbone` looks at, small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 1, bias=False)))
        self.norm = nn.BatchNorm2d(2)


WEIGHTS = randomise_norms(Backbone()).state_dict()
HEAD = {"head.fc.weight": torch.ones(2, 2), "head.fc.bias": torch.ones(2)}


Load = Callable[[object], dict[str, Tensor]]


@pytest.fixture
def load(timm: ModuleType, tmp_path: Path) -> Load:
    """What a backbone has got from a file of that content."""

    def load(content: object) -> dict[str, Tensor]:
        torch.save(content, tmp_path / "weights.pth")
        backbone = Backbone()
        models._load_backbone(backbone, tmp_path / "weights.pth", timm)
        return backbone.state_dict()

    return load


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.model.", "_orig_mod.module.", "1."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("head", [{}, HEAD])
def test_backbone_weights_are_found(prefix: str, key: str | None, head: dict[str, Tensor], load: Load) -> None:
    content: dict[str, object] = {f"{prefix}{name}": value for name, value in {**WEIGHTS, **head}.items()}
    if key is not None:
        content = {key: content, "arch": "resnetv2_50"}
    loaded = load(content)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [w.pop("norm.weight")], r"does not fit.*Missing key\(s\).*\"norm.weight\""),
        (lambda w: w.update(extra=torch.ones(1)), r"does not fit.*Unexpected key\(s\).*\"extra\""),
        (lambda w: w.update({"head.fc.scale": torch.ones(1)}), r"Unexpected key\(s\).*\"head.fc.scale\""),
        (lambda w: w.update({"norm.bias": torch.ones(3)}), r"size mismatch for norm.bias"),
        (lambda w: w.pop("stem.conv.weight"), r"has to hold one 'stem.conv.weight'.*norm.num_batches_tracked$"),
        (lambda w: w.update(other=w.pop("stem.conv.weight")), r"holds only .*, norm.num_batches_tracked and 1 more$"),
        (lambda w: w.update({"ema.stem.conv.weight": torch.ones(1)}), r"it holds 2 of them under the prefixes"),
        (lambda w: w.update(epoch=3), "holds no state dict"),
    ],
)  # fmt: skip
def test_backbone_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, object]], object], message: str, load: Load
) -> None:
    weights: dict[str, object] = dict(WEIGHTS)
    change(weights)
    with pytest.raises(ValueError, match=re.compile(rf"backbone: .*weights\.pth.*{message}", re.DOTALL)):
        load(weights)


def test_backbone_files_that_are_none_are_refused(load: Load, timm: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"backbone: there is no file .*nowhere\.pth"):
        models.pspnet50(3, backbone=tmp_path / "nowhere.pth")
    prefixed = {f"module.model.{name}": value for name, value in WEIGHTS.items()}
    with pytest.raises(ValueError, match=r"entries without the prefix 'model\.': mean, std"):  # timm takes "module."
        load({**prefixed, "mean": torch.zeros(3), "std": torch.ones(3)})
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as weights"):
        load([1, 2])
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=rf"backbone: .*{name} cannot be read as weights"):
            models._load_backbone(Backbone(), tmp_path / name, timm)
    # Loading never executes code.
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as weights.*(?i:weights.only)"):
        load({"state_dict": WEIGHTS, "hook": Malicious(tmp_path / "executed")})
    assert not (tmp_path / "executed").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pspnet50_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pspnet50 needs timm .*pip install timm torchvision"):
        models.pspnet50(19)

    def not_of_this_torch() -> None:
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(models, "import_torchvision", not_of_this_torch)
    with pytest.raises(ImportError, match=r"pspnet50 needs timm .*roi_align.*pip install timm torchvision"):
        models.pspnet50(19)


def test_only_pretrained_weights_come_from_elsewhere(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("no output_stride in this timm")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(TypeError, match="no output_stride in this timm"):
        models.pspnet50(19)


def test_timm_is_imported_where_there_is_no_torchvision(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert models._import_timm() is timm


def test_model_config_refuses_weights_that_nobody_takes() -> None:
    with pytest.raises(ValueError, match="are for pspnet50; small_pspnet has no such weights"):
        models.ModelConfig(pretrained=True)
    with pytest.raises(ValueError, match="are for pspnet50; small_pspnet has no such weights"):
        models.ModelConfig(backbone="weights.pth")
    with pytest.raises(ValueError, match="exclude each other"):
        models.ModelConfig("pspnet50", pretrained=True, backbone="weights.pth")
    with pytest.raises(ValueError, match="exclude each other"):
        models.pspnet50(19, pretrained=True, backbone="weights.pth")


def test_nothing_else_needs_timm_torchvision_or_transformers() -> None:
    code = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'transformers', 'scipy'): sys.modules[name] = None\n"
        "import segadv, segadv.models, segadv.training, segadv.cli, torch\n"
        "model = segadv.models.build_model(segadv.models.ModelConfig(), num_classes=3, seed=0)\n"
        "segadv.models.sync_batchnorm(model)\n"
        "assert model.eval()(torch.rand(1, 3, 16, 24)).shape == (1, 3, 2, 3)\n"
        "try: segadv.models.pspnet50(3)\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "pip install timm torchvision" in result.stdout


def test_initial_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = models.build_model(models.ModelConfig(), num_classes=3, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    with torch.device("meta"):  # any default device
        second = models.build_model(models.ModelConfig(), num_classes=3, seed=np.int64(4))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# --- sync_batchnorm -----------------------------------------------------------------------------------------------


def test_a_layer_with_two_names_stays_one() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Module()
    model.a, model.b, model.c = shared, nn.Sequential(shared, nn.ReLU()), shared
    models.sync_batchnorm(model)
    assert type(model.a) is nn.SyncBatchNorm
    assert model.a is model.b[0] is model.c


def test_sync_batchnorm_keeps_the_network(network: nn.Module) -> None:
    """The activations inside timm's norm layers too; in eval mode SyncBatchNorm runs on the CPU."""
    images = torch.rand(1, 3, 33, 33)
    model = copy.deepcopy(network)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = network(images)
        assert models.sync_batchnorm(model) is model
        assert torch.equal(model(images), expected)
        models.sync_batchnorm(model)  # a second time changes nothing
        assert torch.equal(model(images), expected)
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in model.modules()) == 3 * 16 + 1 + 5
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places

    class Scaled(sys.modules["timm.layers"].BatchNormAct2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="the forward pass of its Scaled would be lost"):
        models.sync_batchnorm(nn.Sequential(Scaled(2)))


def test_sync_batchnorm_of_networks_without_timm() -> None:
    model = randomise_norms(models.small_pspnet(num_classes=3)).eval()
    images = torch.rand(2, 3, 24, 32)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(models.sync_batchnorm(model)(images), expected)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    alone = models.sync_batchnorm(nn.BatchNorm1d(3, eps=0.1, momentum=0.2))
    assert isinstance(alone, nn.SyncBatchNorm)
    assert (alone.num_features, alone.eps, alone.momentum, alone.training) == (3, 0.1, 0.2, True)
    unchanged = nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), nn.Conv2d(2, 2, 1))
    parts = list(unchanged)
    assert list(models.sync_batchnorm(unchanged)) == parts

    class Scaled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="the forward pass of its Scaled would be lost"):
        models.sync_batchnorm(nn.Sequential(Scaled(2)))
