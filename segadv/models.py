"""Segmentation networks without further dependencies, and `wrap`, which normalises inside the model.

The networks return low-resolution logits [N, C, h, w]: the operations of `segadv.functional` resample them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks.base import model_logits

__all__ = ["MODELS", "ModelConfig", "PSPNet", "SmallBackbone", "build_model", "small_pspnet", "wrap"]


def _conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _he_init(module: nn.Module) -> None:
    """He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv 1502.01852, over the outputs (fan-out)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class PSPNet(nn.Module):
    """Pyramid scene parsing network: a backbone, pyramid pooling, a 3x3 convolution and a classifier.

    Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, arXiv 1612.01105, without the auxiliary loss.

    Args:
        backbone: images [N, 3, H, W] -> features [N, feature_channels, h, w], usually at stride 8.
        feature_channels: channels of the backbone's features.
        num_classes: C of the logits, at least 2.
        pooled_channels: channels of each pyramid level; None: feature_channels // len(bins), as in the paper.
        head_channels: channels between the 3x3 convolution and the classifier.
        bins: side lengths of the pyramid's levels.
        dropout: probability with which a channel is zeroed before the classifier.

    ``model(images)`` are the logits [N, num_classes, h, w], of the features' size. In training mode a batch
    needs at least two images: the pyramid's 1x1 level has one value per image and channel, and one value has
    no variance. The head is initialised as He et al. propose; the backbone is taken as it is.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        feature_channels: int,
        num_classes: int,
        pooled_channels: int | None = None,
        head_channels: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        pooled = feature_channels // len(bins) if pooled_channels is None else pooled_channels
        self.backbone = backbone
        self.bins = tuple(bins)
        self.levels = nn.ModuleList(_conv_bn_relu(feature_channels, pooled, 1) for _ in self.bins)
        self.bottleneck = _conv_bn_relu(feature_channels + pooled * len(self.bins), head_channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)
        for part in (self.levels, self.bottleneck, self.classifier):
            _he_init(part)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        pyramid = [features]
        for size, level in zip(self.bins, self.levels, strict=True):
            pooled = level(F.adaptive_avg_pool2d(features, size))
            pyramid.append(F.interpolate(pooled, size=features.shape[-2:], mode="bilinear", align_corners=False))
        logits: Tensor = self.classifier(self.dropout(self.bottleneck(torch.cat(pyramid, 1))))
        return logits


class _PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, beside a shortcut (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + shortcut


class SmallBackbone(nn.Module):
    """A residual network of the ResNet v2 kind, small enough to be trained on a CPU.

    [N, 3, H, W] -> [N, channels[-1], ceil(H / 8), ceil(W / 8)]: a stem and two stages of stride 2, then
    dilation 2 and 4 in place of further strides; batch normalisation and ReLU at the end.

    Args:
        channels: channels of the stem and of the four stages.
    """

    def __init__(self, *, channels: tuple[int, int, int, int, int] = (16, 32, 64, 64, 64)) -> None:
        super().__init__()
        stem, *stages = channels
        self.channels = channels
        self.stem = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        blocks = []
        in_channels = stem
        for out_channels, stride, dilation in zip(stages, (2, 2, 1, 1), (1, 1, 2, 4), strict=True):
            blocks.append(_PreActivationBlock(in_channels, out_channels, stride=stride, dilation=dilation))
            in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(in_channels)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.bn(self.blocks(self.stem(images))), inplace=True)


def small_pspnet(num_classes: int = 19) -> PSPNet:
    """`PSPNet` on `SmallBackbone`: about 0.3 million parameters, logits at an eighth of the size."""
    backbone = SmallBackbone()
    return PSPNet(backbone, feature_channels=backbone.channels[-1], num_classes=num_classes, head_channels=64)


@dataclass(frozen=True)
class ModelConfig:
    """Which network a training run builds.

    Args:
        name: a key of `MODELS`.

    Raises:
        ValueError: an unknown name.
    """

    name: str = "small_pspnet"

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            near = difflib.get_close_matches(self.name, MODELS, n=1, cutoff=0.0)
            raise ValueError(
                f"model.name must be one of {', '.join(MODELS)}; got {self.name!r}, did you mean {near[0]!r}?"
            )


MODELS: Mapping[str, Callable[[ModelConfig, int], nn.Module]] = {
    "small_pspnet": lambda config, num_classes: small_pspnet(num_classes),
}
"""name -> (config, num_classes) -> network."""


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """The network of a config, with initial weights that depend on the seed alone.

    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[config.name](config, num_classes)


class _Wrapped(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        output: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__()
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device
        self.model = model
        self.output = output
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1))
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        channels = len(self.mean)
        if images.dim() < 3 or (channels > 1 and images.shape[-3] != channels):
            raise ValueError(
                f"images must be [N, {channels}, H, W], as many channels as mean and std have entries; "
                f"got {list(images.shape)}"
            )
        return model_logits(self.model((images - self.mean) / self.std), self.output)


def wrap(
    model: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """A module that takes images in [0, 1], normalises them inside and returns logits.

    So attacks step in pixel space, where eps has its meaning, whatever the network was trained on.

    Args:
        model: any network, in any mode; it becomes the sub-module ``.model`` and keeps its parameters.
        mean: per channel; None: 0. In units of images in [0, 1].
        std: per channel, positive; None: 1. The model gets ``(images - mean) / std``.
        output: callable from what the model returns to the logits; None: a tensor, a dict with "out" or
            "logits", an object with ``.logits`` or a tuple whose first entry is the logits are understood.

    Raises:
        ValueError: mean and std of different lengths, a std that is not positive, a value that is not finite;
            in the forward pass images with another number of channels. (A single entry fits any number.)
        TypeError: ``model`` is no nn.Module; in the forward pass an output that is not understood.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if mean is None:
        mean = [0.0] * (1 if std is None else len(std))
    if std is None:
        std = [1.0] * len(mean)
    if len(mean) != len(std) or len(mean) == 0:
        raise ValueError(f"mean and std must have one entry per channel each, got mean={mean} and std={std}")
    if not all(math.isfinite(entry) for entry in mean):
        raise ValueError(f"mean must be finite, got {mean}")
    if not all(0 < entry < math.inf for entry in std):
        raise ValueError(f"std must be positive and finite, got {std}")
    return _Wrapped(model, mean, std, output)
