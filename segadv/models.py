"""Segmentation networks, and `wrap`, which normalises inside the model.

The networks return low-resolution logits [N, C, h, w]: the operations of `segadv.functional` resample them.
`pspnet50` takes its backbone from timm; the others need torch alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attacks.frozen import device_of, model_logits
from .checks import a_module, at_least, one_of
from .compat import import_torchvision

__all__ = [
    "MODELS",
    "ModelConfig",
    "PSPNet",
    "SmallBackbone",
    "build_model",
    "pspnet50",
    "small_pspnet",
    "sync_batchnorm",
    "wrap",
]


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
        head_channels: channels between the 3x3 convolution and the classifier.
        dropout: probability with which a channel is zeroed before the classifier.

    ``model(images)`` are the logits [N, num_classes, h, w], of the features' size. In training mode a batch
    needs at least two images: the pyramid's 1x1 level has one value per image and channel, and one value has
    no variance. The head is initialised as He et al. propose; the backbone is taken as it is.
    """

    bins = (1, 2, 3, 6)  # side lengths of the pyramid's levels

    def __init__(
        self,
        backbone: nn.Module,
        *,
        feature_channels: int,
        num_classes: int,
        head_channels: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        at_least(2, num_classes=num_classes)
        pooled = feature_channels // len(self.bins)
        self.backbone = backbone
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

    [N, 3, H, W] -> [N, 64, ceil(H / 8), ceil(W / 8)]: a stem and two stages of stride 2, then dilation 2 and 4 in place
    of further strides; batch normalisation and ReLU at the end.
    """

    channels = 64

    def __init__(self) -> None:
        super().__init__()
        in_channels = 16
        self.stem = nn.Conv2d(3, in_channels, 3, stride=2, padding=1, bias=False)
        blocks = []
        for out_channels, stride, dilation in ((32, 2, 1), (64, 2, 1), (64, 1, 2), (self.channels, 1, 4)):
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
    return PSPNet(backbone, feature_channels=backbone.channels, num_classes=num_classes, head_channels=64)


def pspnet50(num_classes: int = 19, *, pretrained: bool = False, backbone: str | Path = "") -> nn.Module:
    """`PSPNet` on the pre-activation ResNet-50 (ResNet50v2), for images in [0, 1]: the network of Wiens & Hammer 2022
    (doi 10.5220/0010788400003122).

    Backbone: timm's ``resnetv2_50`` (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, arXiv
    1603.05027) at output stride 8, that is with dilation 2 and 4 in place of the last two strides, its final norm
    and ReLU included. Images are normalised inside as timm's weights expect it, (images - 0.5) / 0.5. 46.6 million
    parameters; logits [N, num_classes, ceil(H / 8), ceil(W / 8)].

    Args:
        num_classes: C of the logits.
        pretrained: take timm's ImageNet weights (``resnetv2_50.a1h_in1k``), from the Hugging Face hub or its cache.
        backbone: a file with weights of timm's ``resnetv2_50``, for example trained robustly on ImageNet with the
            same normalisation: a state dict, or a checkpoint with one under "state_dict" or "model" (or averaged
            weights under "state_dict_ema" or "model_ema", which are preferred), as .safetensors, or as anything
            `torch.load(weights_only=True)` reads. All its names may share a prefix such as "module."; the
            classifier ("head.fc") is not used; everything else has to fit.

    With neither, the initial weights are random.

    Raises:
        ImportError: timm is missing or does not import.
        FileNotFoundError: there is no file `backbone`.
        ValueError: both `pretrained` and `backbone`; a file that is no state dict of this backbone (missing,
            unexpected and mismatching entries are named).
        RuntimeError: the pretrained weights could not be had, for example without a network.
    """
    if pretrained and backbone:
        raise ValueError(f"pretrained and backbone exclude each other, got pretrained=True and backbone={backbone!r}")
    timm = _import_timm()
    try:
        # Without classifier and pooling the forward pass returns the features behind the final norm and ReLU.
        network = timm.create_model(
            "resnetv2_50", pretrained=pretrained, num_classes=0, global_pool="", output_stride=8
        )
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            "pretrained: timm could not get the weights of resnetv2_50 from the Hugging Face hub or its cache "
            f"({type(error).__name__}: {error}). Without a network: fill the cache on another machine and let HF_HOME "
            "name its copy, or give the weights as a file, backbone="
        ) from error
    if backbone:
        _load_backbone(network, Path(backbone), timm)
    model = PSPNet(network, feature_channels=network.num_features, num_classes=num_classes)
    # No class is likelier than another at first. He et al.'s weights over so few outputs make the first loss 8.
    nn.init.normal_(model.classifier.weight, std=0.01)
    return wrap(model, mean=network.pretrained_cfg["mean"], std=network.pretrained_cfg["std"])


def _import_timm() -> ModuleType:
    try:
        import_torchvision()  # timm imports it
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ImportError(f"pspnet50 needs timm ({error}): pip install timm torchvision") from error
    module: ModuleType = timm
    return module


def _load_backbone(network: nn.Module, path: Path, timm: ModuleType) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"backbone: there is no file {path}")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        raise ValueError(f"backbone: {path} cannot be read as weights ({type(error).__name__}: {error})") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"backbone: {path} holds no state dict, a mapping from names to tensors")
    first = "stem.conv.weight"
    prefixes = [name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} of them under the prefixes {prefixes}" if prefixes else f"only {_listed(weights)}"
        raise ValueError(f"backbone: {path} has to hold one {first!r} of timm's resnetv2_50; it holds {found}")
    unused = {f"{prefixes[0]}head.fc.{name}" for name in ("weight", "bias")}
    used = {name: value for name, value in weights.items() if name not in unused}
    foreign = [name for name in used if not name.startswith(prefixes[0])]
    if foreign:
        raise ValueError(f"backbone: {path} holds entries without the prefix {prefixes[0]!r}: {_listed(foreign)}")
    try:
        network.load_state_dict({name.removeprefix(prefixes[0]): value for name, value in used.items()})
    except RuntimeError as error:  # it names every entry that is missing, unexpected or of another size
        raise ValueError(f"backbone: {path} does not fit timm's resnetv2_50: {error}") from error


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """The model with `torch.nn.SyncBatchNorm` in place of batch normalisation, weights and statistics shared.

    timm's layers, in which norm and activation are one module, become timm's synchronised ones: torch's own
    converter would drop their activation. Layers that are synchronised already stay. The model is changed in
    place, except where it is itself such a layer: use what is returned.

    Raises:
        TypeError: a sub-class of batch normalisation with a forward pass of its own, which would be lost.
    """
    return _synchronised(model, {})


def _synchronised(model: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`done`: layer -> what took its place, as a layer may have several names."""
    if model not in done:
        done[model] = _synchronised_layer(model) if isinstance(model, _BatchNorm) else model
        for name, child in list(model._modules.items()):
            if child is not None and done[model] is model:
                model._modules[name] = _synchronised(child, done)
    return done[model]


def _synchronised_layer(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.SyncBatchNorm):
        return model
    timm_layers = sys.modules.get("timm.layers")  # a model with timm's layers has imported them
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if timm_layers is not None and type(model) is timm_layers.BatchNormAct2d:
        convert = timm_layers.convert_sync_batchnorm
    elif type(model).forward is not _BatchNorm.forward:
        raise TypeError(f"model: the forward pass of its {type(model).__name__} would be lost in SyncBatchNorm")
    converted: nn.Module = convert(model)
    return converted.train(model.training)  # some releases of timm leave it in train mode


@dataclass(frozen=True)
class ModelConfig:
    """Which network a training run builds.

    Args:
        name: a key of `MODELS`.
        pretrained: start from timm's ImageNet weights; pspnet50 only.
        backbone: a file with the backbone's initial weights, or empty; pspnet50 only.

    Raises:
        ValueError: an unknown name; weights for a network that takes none, or from two places.
    """

    name: str = "small_pspnet"
    pretrained: bool = False
    backbone: str = ""

    def __post_init__(self) -> None:
        one_of(MODELS, **{"model.name": self.name})
        if self.name == "small_pspnet" and (self.pretrained or self.backbone):
            raise ValueError("model.pretrained and model.backbone are for pspnet50; small_pspnet has no such weights")
        if self.pretrained and self.backbone:
            raise ValueError("model.pretrained and model.backbone exclude each other")


MODELS: Mapping[str, Callable[[ModelConfig, int], nn.Module]] = {
    "small_pspnet": lambda config, num_classes: small_pspnet(num_classes),
    "pspnet50": lambda config, num_classes: pspnet50(
        num_classes, pretrained=config.pretrained, backbone=config.backbone
    ),
}
"""name -> (config, num_classes) -> network."""


def build_model(config: ModelConfig, *, num_classes: int, seed: int) -> nn.Module:
    """The network of a config, on the CPU, with initial weights that depend on the seed alone.

    The global random state stays as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed seeds the GPUs' as well
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
        device = device_of(model)
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

    So attacks step in pixel space, where eps has its meaning, whatever the network was trained on. Auxiliary outputs
    are dropped: to train with them, normalise in the network's own forward instead.

    Args:
        model: any network, in any mode; it becomes the sub-module ``.model`` and keeps its parameters.
        mean: per channel, in [0, 1] as the images; None: 0.
        std: per channel, positive; None: 1. The model gets ``(images - mean) / std``.
        output: callable from what the model returns to the logits; None: a tensor, a dict with "out" or
            "logits", an object with ``.logits`` or a tuple whose first entry is the logits are understood.

    Raises:
        ValueError: mean and std of different lengths, a mean outside of [0, 1], a std that is not positive or not
            finite; in the forward pass images with another number of channels. (A single entry fits any number.)
        TypeError: ``model`` is no nn.Module, ``output`` no callable, mean or std no numbers; in the forward pass an
            output that is not understood.
    """
    a_module(model)
    if output is not None and not callable(output):
        raise TypeError(f"output must be a callable or None, got a {type(output).__name__}")
    mean, std = _per_channel("mean", mean), _per_channel("std", std)
    if mean is None:
        mean = [0.0] * (1 if std is None else len(std))
    if std is None:
        std = [1.0] * len(mean)
    if len(mean) != len(std) or len(mean) == 0:
        raise ValueError(f"mean and std must have one entry per channel each, got mean={mean} and std={std}")
    if not all(0 <= entry <= 1 for entry in mean):
        raise ValueError(f"mean must be in [0, 1], the unit of the images (0.485, not 123.675), got {mean}")
    if not all(0 < entry < math.inf for entry in std):
        raise ValueError(f"std must be positive and finite, got {std}")
    return _Wrapped(model, mean, std, output)


def _per_channel(name: str, values: Sequence[float] | None) -> list[float] | None:
    try:
        return None if values is None else [float(entry) for entry in values]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a sequence, one number per channel, got {values!r}; one of a single number fits all"
        ) from error
