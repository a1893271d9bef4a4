"""The public operations on logits, labels, images and gradients.

Shapes and types, the same everywhere:

* logits [N, C, h, w], float32, bfloat16, float16 or float64, before softmax, any strides. Where (h, w) differs
  from the labels' (H, W), the operation includes bilinear resampling, exactly
  `F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=align_corners)` in float32 (float64 for
  float64 logits).
* labels [N, H, W], int64, int32, int16 or uint8: a class in [0, C), or `ignore_index`. Classification is
  logits [N, C] with labels [N]; what is [N, H, W] below is then [N].
* Floating-point results are float32 (float64 for float64 logits); gradients have the logits' dtype and shape.
* `valid` means labels != ignore_index; n_v is the number of valid pixels of an image. An image, or a batch,
  without a valid pixel has gain, loss and gradient 0.
* The lowest class index wins ties, as in `argmax`. NaN logits give NaN.

Errors, the same everywhere: TypeError for an argument of the wrong kind (not a tensor, a number, a whole number, or
True or False, where one is needed); ValueError for a dtype or shape that is not named above, for fewer than 2 or more
than 32767 classes, for tensors that are sparse or nested, do not fit together or are on different devices, and for any
other argument out of range. A label that is neither a class nor `ignore_index` is a ValueError on the CPU; on a GPU,
where a check would stall the stream, it makes the floating-point results of its image NaN (with SEGADV_CHECK=1 it is an
error there too, except in compiled code). RuntimeError for a requested backend that cannot run.

No operation on logits has a second derivative: a backward under create_graph=True raises RuntimeError. Inside
torch.compile that is up to PyTorch, which raises in the second backward or returns wrong derivatives, as for its own
cross_entropy (torch 2.13). Losses, margins, averaged_gain and l1_norm under a torch.func transform (grad, vmap, jvp)
raise RuntimeError too, compiled or not. All other results are detached: constants, for autograd and for torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import (
    a_tensor,
    checked_bounds,
    described,
    dtype_names,
    image_type,
    is_number,
    label_type,
    number_or_vector,
    one_of,
    true_or_false,
    whole_number,
)
from .ops import autograd, library
from .ops.common import check_labels, compute_dtype, synchronous_checks

__all__ = [
    "argmax_labels",
    "averaged_gain",
    "confusion_matrix",
    "cospgd_loss",
    "cross_entropy",
    "gain_and_grad",
    "l1_norm",
    "loss_and_grad",
    "newton_step",
    "pixel_margin",
    "segpgd_loss",
    "sign_step",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_CLASSES = 32767

Reduction = Literal["mean", "image", "sum", "none"]
REDUCTIONS = get_args(Reduction)
Loss = Literal["cross_entropy", "segpgd", "cospgd"]
_LOSSES = get_args(Loss)


# --- margins ----------------------------------------------------------------------------------------------------


def pixel_margin(logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False) -> Tensor:
    """Logit margin of every pixel: g_j = z_{j,y} - max_{i != y} z_{j,i}; 0 at ignored pixels.

    Positive where the pixel is classified correctly. Differentiable: +1 at the label, -1 at the runner-up.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).

    Returns:
        [N, H, W] (or [N]), float32 or float64.

    Equivalent to::

        z = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
        y = labels.where(labels != ignore_index, 0).long().unsqueeze(1)
        margin = z.gather(1, y) - z.scatter(1, y, -torch.inf).amax(1, keepdim=True)
        margin.squeeze(1).where(labels != ignore_index, 0)

    Source: Wiens & Hammer 2022, eq. 14 (doi 10.5220/0010788400003122).
    """
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    return _as_given(autograd.apply(autograd.PixelMargin, logits4, labels3, ignore_index, align_corners), labels)


def averaged_gain(logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False) -> Tensor:
    """Mean logit margin of an image over its valid pixels: gbar = (1 / n_v) sum_j g_j.

    Differentiable: +1 / n_v at every label, -1 / n_v at every runner-up. For the backward one byte per pixel is kept
    (two from 257 classes on) or, if the logits have at most a quarter of the labels' pixels and are not float16, the
    gradient itself.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).

    Returns:
        [N], float32 or float64.

    Equivalent to::

        valid = labels != ignore_index
        pixel_margin(logits, labels).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)

    Source: Wiens & Hammer 2022, eq. 17.
    """
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    gain_sum, n_valid = autograd.averaged_gain(logits4, labels3, ignore_index, align_corners)
    return _quotient(gain_sum, n_valid)


def gain_and_grad(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the margins of each image and its gradient with respect to the logits, in one pass.

    What an attack uses: the logits are read once and the gradient is written once. Results are detached.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).

    Returns:
        gain_sum [N], float32 or float64; n_valid [N], int64; grad, of the logits' dtype and shape.

    Equivalent to::

        gain_sum = pixel_margin(logits, labels).sum((1, 2))
        n_valid = (labels != ignore_index).sum((1, 2))
        (grad,) = torch.autograd.grad(gain_sum.sum(), logits)

    Source: Wiens & Hammer 2022, eqs. 14 and 17.
    """
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    logits4 = logits4.detach()
    gain_sum, n_valid, grad = library.gain_and_grad(logits4, labels3, ignore_index, align_corners)
    return gain_sum, n_valid, grad.view(logits.shape) if logits.dim() == 2 else grad


# --- losses -----------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy CE_j = log sum_i exp(z_{j,i}) - z_{j,y}, times weight[y] where class weights are given.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).
        weight: [C] floating point class weights; no gradient reaches them.
        reduction: "mean", the sum over the valid pixels of the batch divided by the sum of their weights; "image", the
            same for each image; "sum"; "none". Where the sum of weights is 0, nothing is divided: without a valid pixel
            the result is 0 (PyTorch: NaN).

    Returns:
        a scalar ("mean", "sum"), [N] ("image") or [N, H, W] ("none"), float32 or float64.

    Equivalent to::

        z = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
        F.cross_entropy(z, labels.long(), weight=weight, ignore_index=ignore_index, reduction=reduction)

    and for "image" to the "sum" of each image divided by the sum of `weight[y]` over its valid pixels.

    Raises, besides what all raise:
        ValueError: a reduction of another name; a weight that is not a floating point [C] on the logits' device.
    """
    one_of(REDUCTIONS, reduction=reduction)
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    if weight is not None:
        _check_class_weight(weight, logits)
        weight = weight.detach().to(compute_dtype(logits.dtype)).contiguous()
        if not torch.compiler.is_compiling() and weight.is_inference() and not torch.is_inference_mode_enabled():
            weight = weight.clone()  # as the labels
    loss, weight_sum = autograd.cross_entropy(
        logits4, labels3, weight, ignore_index, align_corners, reduction == "none"
    )
    if reduction == "none":
        return _as_given(loss, labels)
    if reduction == "image":
        return _quotient(loss, weight_sum)
    return loss.sum() if reduction == "sum" else _quotient(loss.sum(), weight_sum.sum())


def segpgd_loss(
    logits: Tensor,
    labels: Tensor,
    step: int,
    steps: int,
    *,
    targeted: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """SegPGD's loss of each image: (1 / n_v) sum_j w_j CE_j, with no gradient through w.

    w_j = 1 - lambda where pixel j is classified correctly, lambda where not; lambda = step / (2 * steps) with
    step = 0 ... steps - 1. Targeted swaps the two weights.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).
        step, steps: the current step, counted from 0, and their number.
        targeted: the labels are the target; swaps the weights.

    Returns:
        [N], float32 or float64.

    Raises, besides what all raise:
        ValueError: not 0 <= step < steps.

    Equivalent to::

        lam = step / (2 * steps)
        w = torch.where((z.argmax(1) == labels) != targeted, z.new_tensor(1 - lam), lam)   # z: at the labels' size
        (w * F.cross_entropy(z, labels.long(), ignore_index=ignore_index, reduction="none")).sum((1, 2)) / n_valid

    Source: Gu et al. 2022 (arXiv 2207.12391), eq. 5, where it is (t - 1) / (2 T) with t = 1 ... T.
    """
    lam = _segpgd_lambda(step, steps)
    true_or_false(targeted=targeted)
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    return _quotient(*autograd.weighted_loss(logits4, labels3, "segpgd", lam, targeted, ignore_index, align_corners))


def cospgd_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    targeted: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """CosPGD's loss of each image: (1 / n_v) sum_j c_j CE_j, with no gradient through c.

    c_j = cos(softmax(z_j), onehot(y_j)) = p_{j,y} / ||p_j||_2; targeted: 1 - c_j.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).
        targeted: the labels are the target; takes 1 - c.

    Returns:
        [N], float32 or float64.

    Equivalent to::

        y = labels.long().masked_fill(labels == ignore_index, 0).unsqueeze(1)  # any class, at void pixels
        p = z.softmax(1).detach()                                              # z: logits at the labels' size
        c = p.gather(1, y).squeeze(1) / p.norm(dim=1)
        c = 1 - c if targeted else c
        (c * F.cross_entropy(z, labels.long(), ignore_index=ignore_index, reduction="none")).sum((1, 2)) / n_valid

    Source: Agnihotri, Jung, Keuper 2024 (arXiv 2302.02213).
    """
    true_or_false(targeted=targeted)
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    return _quotient(*autograd.weighted_loss(logits4, labels3, "cospgd", 0.0, targeted, ignore_index, align_corners))


def loss_and_grad(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: Loss = "cross_entropy",
    step: int | None = None,
    steps: int | None = None,
    targeted: bool = False,
    balanced: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a loss over the valid pixels of each image and its gradient with respect to the logits, in one pass.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).
        loss: "cross_entropy", "segpgd" or "cospgd".
        step, steps: as in `segpgd_loss`; ignored for the other losses.
        targeted: swaps SegPGD's weights and takes 1 - c in CosPGD; the value is not negated.
        balanced: weighs the pixels so that all classes among an image's labels count alike, with mean 1: loss_sum /
            n_valid is then the mean over these classes of the loss's mean over a class's pixels.

    Returns:
        loss_sum [N], float32 or float64; n_valid [N], int64; grad, of the logits' dtype and shape. Detached.

    Equivalent to::

        loss_sum = cross_entropy(logits, labels, reduction="none").sum((1, 2))    # or segpgd_loss(...) * n_valid
        n_valid = (labels != ignore_index).sum((1, 2))
        (grad,) = torch.autograd.grad(loss_sum.sum(), logits)

    and with balanced=True, for an image with n_valid pixels of K classes, n_y of which have the label y::

        loss_sum = (n_valid / (K * n_y) * cross_entropy(logits, labels, reduction="none")).sum((1, 2))

    Sources: those of the losses. Croce et al. 2024 (arXiv 2306.12941) weigh classes to attack mIoU, with
    weights of the data set.

    Raises, besides what all raise:
        ValueError: a loss of another name; "segpgd" without step and steps, or not 0 <= step < steps.
    """
    one_of(_LOSSES, loss=loss)
    lam = 0.0
    if loss == "segpgd":
        if step is None or steps is None:
            raise ValueError(f"step and steps must both be given for loss='segpgd', got step={step} and steps={steps}")
        lam = _segpgd_lambda(step, steps)
    true_or_false(targeted=targeted, balanced=balanced)
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    logits4 = logits4.detach()
    options = (ignore_index, align_corners)
    weight = _balance(labels3, logits4, ignore_index) if balanced else None
    loss_sum, n_valid, _, grad = library.loss_and_grad(logits4, labels3, weight, loss, lam, targeted, *options)
    return loss_sum, n_valid, grad.view(logits.shape) if logits.dim() == 2 else grad


def _balance(labels: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """n_valid / (K * n_y) of every class among an image's labels, 0 of the others: [N, C] of the compute type."""
    classes = logits.shape[1]
    index = labels.long().clamp(-1, classes).add_(1).flatten(1)
    counts = index.new_zeros(index.shape[0], classes + 2).scatter_add_(1, index, index.new_ones(()).expand_as(index))
    counts = counts[:, 1:-1]
    if 0 <= ignore_index < classes:
        counts[:, ignore_index] = 0
    occurs = counts > 0
    weight = occurs * counts.sum(1, keepdim=True).double() / (occurs.sum(1, keepdim=True) * counts).clamp(min=1)
    return weight.to(compute_dtype(logits.dtype))


# --- steps in pixel space ---------------------------------------------------------------------------------------


def l1_norm(grad: Tensor) -> Tensor:
    """Sum of absolute values of each image's gradient. Differentiable any number of times.

    Args:
        grad: [N, ...], float32, bfloat16, float16 or float64.

    Returns:
        [N], float32 (float64 for float64).

    Equivalent to: `grad.float().abs().flatten(1).sum(1)`

    Source: the denominator of Wiens & Hammer 2022, eq. 18.
    """
    a_tensor("grad", grad)
    if grad.dtype not in _FLOATS:
        raise ValueError(f"grad must have one of the dtypes {dtype_names(*_FLOATS)}, got {dtype_names(grad.dtype)}")
    if grad.dim() < 1:
        raise ValueError("grad must be [N, ...], got a scalar")
    result: Tensor = autograd.apply(autograd.L1Norm, grad)
    return result


def newton_step(
    images: Tensor,
    grad: Tensor,
    gain: Tensor,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    clamp_negative: bool = False,
    max_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One Newton step on the gain in the max-norm: eps = gain / ||grad||_1, clip(images - eps * sign(grad)).

    gain and grad must belong to the same function of the images: both of a sum of margins, or both of a mean;
    multiplying both by the same positive number changes nothing. sign(0) = 0. Where gain or norm is non-finite or
    the norm is 0, or the quotient is too large for the type and not capped, eps is 0 and the image is only clipped.

    Args:
        images: [N, ...], float32 or float64, in the units of `bounds`.
        grad: gradient of the gain with respect to the images, their shape and dtype.
        gain: [N].
        bounds: lowest and highest pixel value.
        clamp_negative: eps = max(0, eps). The equation taken literally steps backwards where the gain is negative,
            that is, where the image is already misclassified on average.
        max_eps: caps |eps|. The paper has no cap.

    Returns:
        adversarial, like the images; eps [N], in the units of `bounds`. Both are detached.

    Equivalent to::

        eps = gain / grad.abs().flatten(1).sum(1)
        (images - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(*bounds), eps

    Source: Wiens & Hammer 2022, eqs. 18 and 19.

    Raises, besides what all raise:
        ValueError: images in half precision, too coarse for an eps-ball; bounds that are not (low, high) with
            low < high; a gain that is not a floating point [N]; a negative max_eps.
    """
    return _newton_step(images, grad, gain, bounds=bounds, clamp_negative=clamp_negative, max_eps=max_eps)[:2]


def _newton_step(
    images: Tensor,
    grad: Tensor,
    gain: Tensor,
    *,
    bounds: tuple[float, float],
    clamp_negative: bool,
    max_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`newton_step` with the norm [N], which the kernel has anyway, as a third result."""
    low, high = _check_step(images, grad, bounds)
    a_tensor("gain", gain)
    if gain.shape != images.shape[:1] or not gain.is_floating_point() or gain.device != images.device:
        raise ValueError(f"gain must be a floating point [{images.shape[0]}] on {images.device}, got {described(gain)}")
    true_or_false(clamp_negative=clamp_negative)
    if max_eps is not None and not is_number(max_eps):
        raise TypeError(f"max_eps must be a number or None, got a {type(max_eps).__name__}")
    if max_eps is not None and not max_eps >= 0:
        raise ValueError(f"max_eps must be at least 0, got {max_eps}")
    result: tuple[Tensor, Tensor, Tensor] = library.newton_step(
        images.detach(), grad.detach(), gain.detach(), low, high, clamp_negative, max_eps
    )
    return result


def sign_step(
    images: Tensor,
    grad: Tensor,
    alpha: float | Tensor,
    *,
    origin: Tensor | None = None,
    eps: float | Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Signed gradient step, then the max-norm ball, then the box.

    clip(project(images + alpha * sign(grad), origin, eps), bounds), with sign(0) = 0.

    Args:
        images: [N, ...], float32 or float64, in the units of `bounds`.
        grad: the images' shape and dtype.
        alpha: step size in the units of `bounds`; a float, or [N] on the images' device. Negative descends.
        origin: centre of the ball, like the images. Needs eps, and eps needs it.
        eps: radius of the ball; a float, or [N] on the images' device.
        bounds: lowest and highest pixel value.

    Returns:
        like the images, detached.

    Equivalent to::

        x = images + alpha * grad.sign()
        x = x.clamp(origin - eps, origin + eps)         # where origin and eps are given
        x.clamp(*bounds)

    Source: Wiens & Hammer 2022, eqs. 3 and 4.

    Raises, besides what all raise:
        ValueError: images in half precision; bounds that are not (low, high) with low < high; origin without eps, or
            eps without origin; an alpha or eps that is not finite in the images' dtype; a negative eps. The values of
            tensors [N] are not checked, which would wait for a GPU; a NaN in one makes its image NaN.
    """
    low, high = _check_step(images, grad, bounds)
    if (origin is None) != (eps is None):
        given = "eps" if origin is None else "origin"
        raise ValueError(f"origin and eps must both be given, or neither: they describe the ball; got {given} alone")
    if origin is not None:
        a_tensor("origin", origin)
    if origin is not None and (
        origin.shape != images.shape or origin.dtype != images.dtype or origin.device != images.device
    ):
        raise ValueError(f"origin must be like the images, {described(images)}, got {described(origin)}")
    alpha_number, alpha_per_image = number_or_vector("alpha", alpha, images)
    eps_number, eps_per_image = (None, None) if eps is None else number_or_vector("eps", eps, images)
    if eps_number is not None and not eps_number >= 0:
        raise ValueError(f"eps must be at least 0, got {eps_number}")
    result: Tensor = library.sign_step(
        images.detach(),
        grad.detach(),
        alpha_number,
        alpha_per_image,
        None if origin is None else origin.detach(),
        eps_number,
        eps_per_image,
        low,
        high,
    )
    return result


# --- predictions ------------------------------------------------------------------------------------------------


def confusion_matrix(
    logits: Tensor,
    labels: Tensor,
    *,
    per_image: bool = False,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """Counts of (label, prediction) over the valid pixels: row = label, column = argmax over the classes.

    Args:
        logits: [N, C, h, w] (or [N, C]).
        labels: [N, H, W] (or [N]).
        per_image: return one matrix for each image.

    Returns:
        int64 [C, C], or [N, C, C]. Its attribute `invalid` (an int64 scalar tensor) counts the pixels left out
        because their label is neither a class nor ignore_index: always 0 on the CPU, where such labels raise; on a
        GPU, look at it once per epoch. Inside torch.compile the attribute is not attached.

    Equivalent to::

        z = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
        prediction = z.argmax(1)
        valid = labels != ignore_index
        torch.bincount(labels[valid].long() * C + prediction[valid], minlength=C * C).view(C, C)
    """
    true_or_false(per_image=per_image)
    logits4, labels3 = _as_maps(logits, labels, ignore_index, align_corners)
    logits4 = logits4.detach()
    matrix, invalid = library.confusion_matrix(logits4, labels3, ignore_index, align_corners, per_image)
    if not torch.compiler.is_compiling():  # a traced tensor cannot carry attributes
        matrix.invalid = invalid
    return matrix  # type: ignore[no-any-return]


def argmax_labels(logits: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Predicted class of every pixel at the given size.

    Args:
        logits: [N, C, h, w].
        size: (H, W) of the prediction.

    Returns:
        [N, H, W], uint8 (int16 for more than 256 classes).

    Equivalent to::

        z = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=align_corners)
        z.argmax(1).to(torch.uint8 if C <= 256 else torch.int16)

    Raises, besides what all raise:
        ValueError: logits [N, C], which have no size; a size that is not (H, W) with both at least 1.
    """
    _check_logits(logits)
    if logits.dim() != 4:
        raise ValueError(f"logits must be [N, C, h, w], got {described(logits)}")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size must be (H, W), got {size}")
    true_or_false(align_corners=align_corners)
    for side in size:
        whole_number(size=side)
    if min(size) < 1:
        raise ValueError(f"size must be (H, W) with both at least 1, got {tuple(size)}")
    result: Tensor = library.argmax_labels(logits.detach(), list(size), align_corners)
    return result


# --- checks -----------------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"logits must be a tensor, got a {type(logits).__name__}. Take the logits out of the model's output: "
            'output["out"], output.logits, output[0]'
        )
    a_tensor("logits", logits)
    if logits.dtype not in _FLOATS:
        raise ValueError(f"logits must have one of the dtypes {dtype_names(*_FLOATS)}, got {dtype_names(logits.dtype)}")
    if logits.dim() not in (2, 4):
        raise ValueError(f"logits must be [N, C, h, w], or [N, C] for classification, got {described(logits)}")
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits must have at least 2 classes, got {logits.shape[1]}. Make two channels of a sigmoid "
            "output z: torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    if 0 in logits.shape[2:]:
        raise ValueError(f"logits must have at least 1 pixel, got {described(logits)}")
    if logits.shape[1] > _MAX_CLASSES:
        raise ValueError(f"logits must have at most {_MAX_CLASSES} classes, got {logits.shape[1]}")


def _as_maps(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Checks what they are and returns logits [N, C, h, w] and labels [N, H, W] as views."""
    _check_logits(logits)
    whole_number(ignore_index=ignore_index)
    true_or_false(align_corners=align_corners)
    a_tensor("labels", labels)
    label_type(labels)
    if labels.dim() != logits.dim() - 1 or labels.shape[0] != logits.shape[0]:
        needed = "[N]" if logits.dim() == 2 else "[N, H, W]"
        squeezable = labels.dim() == logits.dim() == 4 and labels.shape[1] == 1
        remedy = "; labels.squeeze(1) converts" if squeezable else ""
        raise ValueError(
            f"labels must be {needed} with the same N as logits {described(logits)}, got {described(labels)}{remedy}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the logits' device, {logits.device}, got {labels.device}")
    if not torch.compiler.is_compiling() and labels.is_inference() and not torch.is_inference_mode_enabled():
        labels = labels.clone()  # autograd may not save a tensor made under inference_mode
    if logits.dim() == 2:
        logits, labels = logits[:, :, None, None], labels[:, None, None]
    # not when a graph is compiled, which would have to break here, and would keep the choice
    if labels.device.type != "cpu" and not torch.compiler.is_compiling() and synchronous_checks():
        check_labels(labels, logits.shape[1], ignore_index)
    return logits, labels


def _as_given(per_pixel: Tensor, labels: Tensor) -> Tensor:
    return per_pixel.view(labels.shape) if labels.dim() == 1 else per_pixel


def _quotient(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where nothing was counted."""
    return total / count.where(count != 0, 1)


def _check_class_weight(weight: Tensor, logits: Tensor) -> None:
    a_tensor("weight", weight)
    if weight.shape != logits.shape[1:2] or not weight.is_floating_point() or weight.device != logits.device:
        raise ValueError(
            f"weight must be a floating point [{logits.shape[1]}] on {logits.device}, got {described(weight)}"
        )


def _segpgd_lambda(step: int, steps: int) -> float:
    whole_number(step=step, steps=steps)
    if not 0 <= step < steps:
        raise ValueError(f"step and steps must satisfy 0 <= step < steps, got {step} and {steps}")
    return step / (2 * steps)


def _check_step(images: Tensor, grad: Tensor, bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds as floats."""
    a_tensor("images", images)
    a_tensor("grad", grad)
    image_type(images)
    if grad.shape != images.shape or grad.dtype != images.dtype or grad.device != images.device:
        raise ValueError(f"grad must be like the images, {described(images)}, got {described(grad)}")
    return checked_bounds(bounds)
