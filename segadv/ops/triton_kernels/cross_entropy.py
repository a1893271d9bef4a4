"""Cross-entropy, SegPGD's and CosPGD's weighted forms of it, and their gradients.

Fuses upsampling, log-softmax, label lookup, masking, the pixel weights, the sums per image and, at full resolution,
the gradient. One pass over the classes, with one exponential for each. At full resolution it finds the largest logit on
its way (online softmax). Resampled, it takes the exponential of the difference to the label's own logit, which four
loads give beforehand: their sum is 1 / softmax of the label. Only where that is too large, for a loss above 27 or for
what is not finite, a program looks for the largest logit, and repeats the pass. Fewest bytes: the logits read once, the
gradient written once (its exponentials need a second reading of the logits, from the cache where the tiles at work
fit), labels read once. At full resolution bound by memory. Resampled, by arithmetic: 9 instructions for a class of a
pixel, as Triton 3.9 compiles it for sm_90 (SegPGD looks for the largest logit: 8 more).

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import check_labels, compute_dtype, empty_maps, gradient_like, weights_of_images
from . import gradient
from .scalars import bits, scalar
from .tiles import (
    UNALIGNED,
    UNSPECIALIZED,
    exp,
    find_largest,
    finish,
    launch,
    load_classes,
    load_labels,
    load_logit,
    reciprocal,
    taps,
    tile_of,
    tiles,
)


@triton.jit
def sum_exponentials(image, stride_c, C, shift, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
                     COSPGD: tl.constexpr, A: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
                     UNROLL: tl.constexpr):  # fmt: skip
    """Sums of exp(z - shift) over the classes of resampled logits, and of their squares for CosPGD."""
    total = tl.zeros([BLOCK_Y, BLOCK_X], A)
    squares = tl.zeros([BLOCK_Y, BLOCK_X], A)
    for c in tl.range(0, C, loop_unroll_factor=UNROLL):
        plane = image + tl.cast(c, tl.int64) * stride_c
        z = load_logit(plane, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, A)
        e = exp(z - shift)
        total += e
        if COSPGD:
            squares += e * e
    return total, squares


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "right_bits", "wrong_bits"], do_not_specialize_on_alignment=UNALIGNED)
def cross_entropy_kernel(
    logits, labels, grad, class_weight, pixel_loss, shift, scale, pixel_weight,
    loss_sum, weight_sum, valid, bad,
    stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x, grad_n, grad_c, grad_y, grad_x,
    weight_n, C, h, w, H, W, programs, tiles_x, chunks, one, ignore_index, right_bits, wrong_bits,
    SEGPGD: tl.constexpr, COSPGD: tl.constexpr, TARGETED: tl.constexpr,
    UP: tl.constexpr, QUAD_ROWS: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, y, x, inside = tile_of(program, programs, tiles_x, chunks, one, h, H, W, UP, QUAD_ROWS, ALIGN, BLOCK_Y, BLOCK_X)
    at = n * label_n + y.to(tl.int64) * label_y + x.to(tl.int64) * label_x
    label, is_bad = load_labels(labels, at, inside, C, ignore_index)
    o00, o01, o10, o11, wy0, wy1, wx0, wx1 = taps(
        program, programs, tiles_x, chunks, one, y, x, h, w, H, W, stride_y, stride_x, UP, QUAD_ROWS, ALIGN, A
    )
    inside_taps = x < W if QUAD_ROWS else inside
    prediction = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    if UP:
        # Sums of exponentials below 1e12: an outgoing gradient divided by one should not be too small for a float.
        image = logits + n * stride_n
        own = load_logit(image + tl.maximum(label, 0).to(tl.int64) * stride_c, inside, o00, o01, o10, o11,
                         wy0, wy1, wx0, wx1, A)  # fmt: skip
        subtracted = own
        total, squares = sum_exponentials(
            image, stride_c, C, own, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1, COSPGD,
            A, BLOCK_Y, BLOCK_X, UNROLL,
        )  # fmt: skip
        fits = (total < 1e12) | (label < 0)
        if SEGPGD or tl.min(fits.to(tl.int32)) == 0:
            _, top, prediction = find_largest(
                image, stride_c, C, None, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
                UP, QUAD_ROWS, A, BLOCK_Y, BLOCK_X, GROUP, UNROLL,
            )  # fmt: skip
            if tl.min(fits.to(tl.int32)) == 0:
                subtracted = tl.where(fits, own, top)
                total, squares = sum_exponentials(
                    image, stride_c, C, subtracted, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
                    COSPGD, A, BLOCK_Y, BLOCK_X, UNROLL,
                )  # fmt: skip
    else:
        # Not -inf: the difference to a class of logit -inf must not be NaN.
        subtracted = tl.full([BLOCK_Y, BLOCK_X], -3.4028234663852886e38, A)
        total = tl.zeros([BLOCK_Y, BLOCK_X], A)
        squares = tl.zeros([BLOCK_Y, BLOCK_X], A)
        own = tl.zeros([BLOCK_Y, BLOCK_X], A)
        for first in tl.range(0, C, GROUP, loop_unroll_factor=UNROLL):
            group = load_classes(logits + n * stride_n, first, C, stride_c, inside, o00, A, GROUP)
            for i in tl.static_range(GROUP):
                c = first + i
                z = group[i]
                own = tl.where(label == c, z, own)
                higher = z - subtracted > 0  # of two equal ones the first stays; a NaN reaches the total below
                e = exp(-tl.abs(z - subtracted))
                total = tl.where(higher, total * e + 1.0, total + e)
                if COSPGD:
                    squares = tl.where(higher, squares * (e * e) + 1.0, squares + e * e)
                if SEGPGD:
                    prediction = tl.where(higher, c, prediction)
                subtracted = tl.where(higher, z, subtracted)
        total += subtracted - subtracted  # of a logit of infinity nobody knows the exponential: NaN, as in PyTorch
    above = own - subtracted
    is_valid = label >= 0
    if SEGPGD:
        weight = tl.where(prediction == label, scalar(right_bits, A), scalar(wrong_bits, A))
    elif COSPGD:
        cosine = exp(above) / tl.sqrt(squares)
        weight = 1.0 - cosine if TARGETED else cosine
    else:
        weight = tl.full([BLOCK_Y, BLOCK_X], 1.0, A)
    if class_weight is not None:
        weight *= tl.load(class_weight + n * weight_n + tl.maximum(label, 0))
    weight = tl.where(is_valid, weight, 0.0)
    loss = tl.where(is_valid, (tl.log(total) - above) * weight, 0.0)
    tl.store(bad + program, tl.sum(is_bad.to(tl.int32)))
    tl.store(valid + program, tl.sum(is_valid.to(tl.int32)))
    if weight_sum is not None:
        tl.store(weight_sum + program, tl.sum(weight))
    if loss_sum is not None:
        tl.store(loss_sum + program, tl.sum(loss))
    at = n * H * W + y.to(tl.int64) * W + x
    if pixel_loss is not None:
        tl.store(pixel_loss + at, loss, mask=inside)
    if shift is not None:
        tl.store(shift + at, tl.where(is_valid, subtracted, 0.0), mask=inside)
        tl.store(scale + at, tl.where(is_valid, reciprocal(total), 0.0), mask=inside)
    if pixel_weight is not None:
        tl.store(pixel_weight + at, weight, mask=inside)
    if grad is not None:
        at_grad = n * grad_n + y.to(tl.int64) * grad_y + x.to(tl.int64) * grad_x
        gradient.store_cross_entropy_gradient(
            grad, at_grad, grad_c, logits + n * stride_n, o00, stride_c, C, label, subtracted,
            weight * reciprocal(total), weight, inside, A, GROUP, UNROLL,
        )  # fmt: skip


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    align_corners: bool,
    *,
    loss: str = "cross_entropy",
    lam: float = 0.0,
    targeted: bool = False,
    grad: Tensor | None = None,
    class_weight: Tensor | None = None,
    pixel_loss: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    loss_sum: Tensor | None = None,
    weight_sum: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> None:
    if labels.device.type == "cpu":
        check_labels(labels, logits.shape[1], ignore_index)
    class_weight = weights_of_images(class_weight, logits)
    device, dtype = logits.device, compute_dtype(logits.dtype)
    strides = [tensor.stride() for tensor in (logits, labels, grad) if tensor is not None]
    t = tiles(logits.shape, labels.shape[-2:], align_corners, logits.dtype, device, strides)
    up = t.options["UP"]
    if up and grad is not None:  # what the gradient's own kernel reads
        shift, scale = empty_maps(labels, dtype, 2, True)
        if loss != "cross_entropy":
            pixel_weight = torch.empty_like(shift)
    losses, weights = (None if total is None else t.partial(dtype, device) for total in (loss_sum, weight_sum))
    valid, bad = (t.partial(torch.int32, device) for _ in range(2))
    right, wrong = (lam, 1.0 - lam) if targeted else (1.0 - lam, lam)
    launch(
        cross_entropy_kernel, t.total, logits, logits, labels, None if up else grad, class_weight, pixel_loss,
        shift, scale, pixel_weight, losses, weights, valid, bad,
        *logits.stride(), *labels.stride(), *((0, 0, 0, 0) if grad is None else grad.stride()),
        0 if class_weight is None else class_weight.stride(0), *t.sizes, *t.walk,
        ignore_index, bits(right), bits(wrong), SEGPGD=loss == "segpgd", COSPGD=loss == "cospgd", TARGETED=targeted,
        **t.options,
    )  # fmt: skip
    if up and grad is not None:
        gradient.launch_gradient(
            grad, labels, ignore_index, align_corners, logits=logits, shift=shift, scale=scale,
            class_weight=class_weight if pixel_weight is None else None, pixel_weight=pixel_weight,
        )  # fmt: skip
    finish(
        bad,
        sums=[(losses, loss_sum), (weights, weight_sum)],
        valid=None if n_valid is None else (valid, n_valid),
        poisoned=[x for x in (pixel_loss, grad) if x is not None],
    )


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
    grad = gradient_like(logits)
    bad = gradient.launch_gradient(
        grad, labels, ignore_index, align_corners, logits=logits, grad_loss=grad_loss, shift=shift,
        scale=scale, class_weight=weights_of_images(class_weight, logits), pixel_weight=pixel_weight,
    )  # fmt: skip
    finish(bad, poisoned=[grad])
    return grad
