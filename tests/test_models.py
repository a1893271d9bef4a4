"""segadv.models: sizes, parameter counts, initialisation, and wrap."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segadv import models

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.5]


def test_small_pspnet_has_the_promised_size_and_stride() -> None:
    model = models.small_pspnet()
    assert 0.1e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.5e6
    assert models.small_pspnet(num_classes=5).classifier.out_channels == 5
    backbone = model.backbone
    assert backbone.channels[-1] == backbone.bn.num_features
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
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
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
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        models.wrap(lambda images: images)
    with pytest.raises(ValueError, match=r"one entry per channel each, got mean=\[0.5, 0.5\] and std=\[1.0\]"):
        models.wrap(model, mean=[0.5, 0.5], std=[1.0])
    with pytest.raises(ValueError, match="one entry per channel"):
        models.wrap(model, mean=[])
    for std in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std must be positive and finite"):
            models.wrap(model, std=[1.0, std, 1.0])
    with pytest.raises(ValueError, match="mean must be finite"):
        models.wrap(model, mean=[float("inf")])
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\].*got \[2, 4, 5, 6\]"):
        models.wrap(model, mean=MEAN)(torch.zeros(2, 4, 5, 6))

    class Strange(nn.Module):
        def forward(self, images: Tensor) -> str:
            return "logits"

    with pytest.raises(TypeError, match="output="):
        models.wrap(Strange())(torch.zeros(1, 3, 4, 4))


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
