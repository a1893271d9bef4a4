"""The reference backend: every operation in eager PyTorch, spelled out, on any device.

It is the baseline of the benchmarks and the fallback where nothing is compiled. It builds full-resolution
logits; the other backends do not. Shapes: logits [N, C, h, w], labels [N, H, W]; `size` is (H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    check_labels,
    class_dtype,
    compute_dtype,
    empty_gradient,
    empty_images,
    gradient_like,
    is_channels_last,
    weights_of_images,
)


def unavailable(device_type: str) -> str | None:
    return None


def _upsample(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    if tuple(z.shape[-2:]) == tuple(size):
        return z
    if z.numel() == 0 or min(size) == 0:
        return z.new_zeros(*z.shape[:2], *size)
    return F.interpolate(z, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _upsample_backward(grad: Tensor, like: list[int], align_corners: bool) -> Tensor:
    """Gradient at the labels' size -> gradient at the logits' own size `like` = [N, C, h, w]."""
    if list(grad.shape) == list(like) or grad.numel() == 0:
        return grad if list(grad.shape) == list(like) else grad.new_zeros(like)
    result: Tensor = torch.ops.aten.upsample_bilinear2d_backward(grad, list(grad.shape[-2:]), list(like), align_corners)
    return result


def _as_gradient(grad: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    result = empty_gradient(list(grad.shape), channels_last, dtype, grad.device)
    return result.copy_(grad)


class _Labels:
    """y [N, 1, H, W] int64 with 0 where not valid; valid [N, H, W]; n_valid [N]; NaN for images with a bad label."""

    def __init__(self, labels: Tensor, num_classes: int, ignore_index: int, dtype: torch.dtype) -> None:
        if labels.device.type == "cpu":
            check_labels(labels, num_classes, ignore_index)
        wide = labels.long()
        in_range = (wide >= 0) & (wide < num_classes)
        not_ignored = wide != ignore_index
        self.valid = in_range & not_ignored
        self.bad = not_ignored & ~in_range
        self.y = wide.where(self.valid, 0).unsqueeze(1)
        self.n_valid = self.valid.sum(dim=(1, 2))
        zero = torch.zeros((), dtype=dtype, device=labels.device)
        # Added to the floating results of an image: 0, or NaN where it has a bad label.
        self.poison = torch.where(self.bad.any(dim=2).any(dim=1), zero + float("nan"), zero)

    def masked(self, value: Tensor) -> Tensor:
        """value [N, H, W], dense, with 0 at ignored pixels, NaN all over an image with a bad label."""
        return (value.where(self.valid, 0) + self.poison.view(-1, 1, 1)).contiguous()


def _margin(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    others = z.scatter(1, y, float("-inf"))
    best, runner_up = others.max(dim=1, keepdim=True)
    # Only where all the others are -inf can the maximum stand at y itself: the lowest other index then.
    runner_up = torch.where(runner_up == y, (y == 0).long(), runner_up)
    return (z.gather(1, y) - best).squeeze(1), runner_up.squeeze(1)


def pixel_margin(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    z = _upsample(logits, labels.shape[-2:], align_corners)
    target = _Labels(labels, z.shape[1], ignore_index, z.dtype)
    margin, runner_up = _margin(z, target.y)
    return target.masked(margin), runner_up.where(target.valid, 0).to(class_dtype(z.shape[1])).contiguous()


def averaged_gain(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    margin, runner_up = pixel_margin(logits, labels, ignore_index, align_corners)
    n_valid = _Labels(labels, logits.shape[1], ignore_index, margin.dtype).n_valid
    return margin.sum(dim=(1, 2)), n_valid, runner_up


def margin_backward(
    grad_margin: Tensor,
    labels: Tensor,
    runner_up: Tensor,
    size: list[int],
    channels_last: bool,
    dtype: torch.dtype,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    target = _Labels(labels, size[1], ignore_index, grad_margin.dtype)
    g = target.masked(grad_margin).unsqueeze(1)
    grad = g.new_zeros(size[0], size[1], *labels.shape[-2:])
    grad.scatter_(1, target.y, g).scatter_add_(1, runner_up.long().unsqueeze(1), -g)
    # after the resampling: where that leaves logits out, they are poisoned too
    grad = _upsample_backward(grad, size, align_corners) + target.poison.view(-1, 1, 1, 1)
    return _as_gradient(grad, channels_last, dtype)


def gain_and_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gain_sum, n_valid, runner_up = averaged_gain(logits, labels, ignore_index, align_corners)
    one = torch.ones((), dtype=gain_sum.dtype, device=logits.device).expand(labels.shape)
    grad = margin_backward(
        one, labels, runner_up, list(logits.shape), is_channels_last(logits), logits.dtype,
        ignore_index, align_corners,
    )  # fmt: skip
    return gain_sum, n_valid, grad


def _log_softmax_terms(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-softmax [N, C, H, W], shift [N, H, W], 1 / sum of exp(z - shift) [N, H, W]); shift is the largest logit."""
    shift = z.amax(dim=1, keepdim=True)
    shifted = z - shift
    total = shifted.exp().sum(dim=1, keepdim=True)
    return shifted - total.log(), shift.squeeze(1), 1.0 / total.squeeze(1)


def _pixel_weight(z: Tensor, log_softmax: Tensor, y: Tensor, loss: str, lam: float, targeted: bool) -> Tensor:
    """The weight of each pixel [N, H, W]: SegPGD's 1 - lambda or lambda, or CosPGD's cosine."""
    if loss == "segpgd":
        correct = z.argmax(dim=1) == y.squeeze(1)
        # full_like: two Python numbers in a where would be rounded to float32
        high, low = torch.full_like(log_softmax[:, 0], 1.0 - lam), torch.full_like(log_softmax[:, 0], lam)
        return torch.where(correct != targeted, high, low)
    probability = log_softmax.exp()
    cosine: Tensor = (probability.gather(1, y) / probability.norm(dim=1, keepdim=True)).squeeze(1)
    return 1.0 - cosine if targeted else cosine


def _of_labels(class_weight: Tensor, y: Tensor) -> Tensor:
    """[N, C] at the labels [N, 1, H, W]: [N, H, W]."""
    return class_weight.gather(1, y.flatten(1)).view_as(y).squeeze(1)


def _maps(target: _Labels, wanted: bool, *maps: Tensor) -> list[Tensor]:
    """What a backward reads, 0 at ignored pixels; as many [0] where it is not wanted."""
    return [target.masked(entry) if wanted else entry.new_empty(0) for entry in maps]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    loss: str,
    lam: float,
    targeted: bool,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = _upsample(logits, labels.shape[-2:], align_corners)
    target = _Labels(labels, z.shape[1], ignore_index, z.dtype)
    log_softmax, shift, scale = _log_softmax_terms(z)
    weighs = loss != "cross_entropy"
    factor = _pixel_weight(z, log_softmax, target.y, loss, lam, targeted) if weighs else torch.ones_like(scale)
    class_weight = weights_of_images(class_weight, logits)
    if class_weight is not None:
        factor = factor * _of_labels(class_weight, target.y)
    value = target.masked(-log_softmax.gather(1, target.y).squeeze(1) * factor)
    weight_sum = target.masked(factor).sum(dim=(1, 2))
    shift, scale = _maps(target, for_backward, shift, scale)
    (pixel_weight,) = _maps(target, for_backward and weighs, factor)
    return value if per_pixel else value.sum(dim=(1, 2)), target.n_valid, weight_sum, shift, scale, pixel_weight


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    shift: Tensor,
    scale: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    z = _upsample(logits, labels.shape[-2:], align_corners)
    target = _Labels(labels, z.shape[1], ignore_index, z.dtype)
    coefficient = grad_loss if pixel_weight is None else grad_loss * pixel_weight
    class_weight = weights_of_images(class_weight, logits)
    if class_weight is not None:
        coefficient = coefficient * _of_labels(class_weight, target.y)
    softmax = (z - shift.unsqueeze(1)).exp() * scale.unsqueeze(1)
    onehot = torch.zeros_like(z).scatter_(1, target.y, 1.0)
    # where, not a product: NaN logits of an ignored pixel must not reach the gradient.
    grad = torch.where(target.valid.unsqueeze(1), (softmax - onehot) * coefficient.unsqueeze(1), 0.0)
    grad = _upsample_backward(grad, list(logits.shape), align_corners) + target.poison.view(-1, 1, 1, 1)
    return _as_gradient(grad, is_channels_last(logits), logits.dtype)


def loss_and_grad(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    loss: str,
    lam: float,
    targeted: bool,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_sum, n_valid, weight_sum, shift, scale, pixel_weight = cross_entropy(
        logits, labels, class_weight, loss, lam, targeted, ignore_index, align_corners, False, True
    )
    one = torch.ones((), dtype=loss_sum.dtype, device=logits.device).expand(labels.shape)
    of_class, of_pixel = (class_weight, None) if loss == "cross_entropy" else (None, pixel_weight)
    grad = cross_entropy_backward(one, logits, labels, shift, scale, of_class, of_pixel, ignore_index, align_corners)
    return loss_sum, n_valid, weight_sum, grad


def _per_image(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def l1_norm(grad: Tensor) -> Tensor:
    absolute = grad.to(compute_dtype(grad.dtype)).abs()
    return absolute.flatten(1).sum(dim=1) if grad.dim() > 1 else absolute


def newton_step(
    images: Tensor,
    grad: Tensor,
    gain: Tensor,
    low: float,
    high: float,
    clamp_negative: bool,
    max_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = l1_norm(grad)
    gain = gain.to(norm.dtype)
    eps = gain / norm
    if clamp_negative:
        eps = eps.clamp(min=0.0)
    if max_eps is not None:
        eps = eps.clamp(-max_eps, max_eps)
    usable = gain.isfinite() & (norm > 0) & eps.isfinite()  # max_eps would cap an infinity
    eps = torch.where(usable, eps, 0.0)
    adversarial = empty_images(images)
    adversarial.copy_((images - _per_image(eps, images) * grad.nan_to_num(0.0).sign()).clamp(low, high))
    return adversarial, eps, norm


def sign_step(
    images: Tensor,
    grad: Tensor,
    alpha: float,
    alpha_per_image: Tensor | None,
    origin: Tensor | None,
    eps: float | None,
    eps_per_image: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    step = alpha if alpha_per_image is None else _per_image(alpha_per_image, images)
    x = images + step * grad.nan_to_num(0.0).sign()
    if origin is not None:
        assert eps is not None
        radius = eps if eps_per_image is None else _per_image(eps_per_image, images)
        x = x.minimum(origin + radius).maximum(origin - radius)
    return empty_images(images).copy_(x.clamp(low, high))


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    scaled = grad.to(factor.dtype) * factor.view(-1, 1, 1, 1)
    # What has no gradient keeps none, also where an overflow makes the factor infinite.
    return gradient_like(grad).copy_(scaled.masked_fill(grad == 0, 0.0))


def confusion_matrix(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
) -> tuple[Tensor, Tensor]:
    num_images, num_classes = logits.shape[:2]
    prediction = _upsample(logits, labels.shape[-2:], align_corners).argmax(dim=1)
    target = _Labels(labels, num_classes, ignore_index, torch.float32)
    image = torch.arange(num_images, device=labels.device).view(-1, 1, 1) if per_image else 0
    cell = (image * num_classes + target.y.squeeze(1)) * num_classes + prediction
    images = num_images if per_image else 1
    # One cell more takes the pixels that are not counted: no boolean indexing, which would wait for a GPU.
    spare = images * num_classes**2
    cell = cell.where(target.valid, spare).flatten()
    # scatter_add, not bincount, which waits for a GPU too
    counts = torch.zeros(spare + 1, dtype=torch.int64, device=labels.device)
    counts = counts.scatter_add_(0, cell, torch.ones_like(cell))[:spare].clone()
    shape = (num_images, num_classes, num_classes) if per_image else (num_classes, num_classes)
    return counts.view(shape), target.bad.sum()


def argmax_labels(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    prediction = _upsample(logits, size, align_corners).argmax(dim=1)
    return prediction.to(class_dtype(logits.shape[1]))
