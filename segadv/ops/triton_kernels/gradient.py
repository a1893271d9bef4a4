"""The gradient of the losses with respect to the logits, from what the forward kept of every pixel.

`gradient_kernel`, logits of the labels' size: every class of every pixel once. Fewest bytes: the gradient written
once, and for cross-entropy the logits read once. Bound by memory.

`gradient_up_kernel`, resampled logits: the transpose of the resampling without atomics. A lane owns a column of quads
(the output pixels between four neighbouring taps, see bilinear.py) for a few classes, and walks down: over the pixels
of a quad, column by column, it adds up four corner sums; two of them complete the row of logits above, two are carried
to the row below.
Along x the sums of neighbouring lanes meet once per quad. Nothing of C classes is ever larger than the gradient
itself. Rows at the upper edge of a program, and one column of quads, are computed twice. Bound by arithmetic: 91
(margin) or 124 (cross-entropy) instructions for 8 classes of a pixel, as Triton 3.9 compiles it for sm_90 (3.6: 93 and
125; tests/triton_compile.py prints them).

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype
from .bilinear import first_output, largest_quad, weights
from .configs import config
from .tiles import (
    UNALIGNED,
    UNSPECIALIZED,
    check_sizes,
    classes_from,
    exp,
    for_classes,
    launch,
    load_labels,
    mean,
    power_of_two,
    tile_of,
    tiles,
    triton_dtype,
)


@triton.jit
def margin_gradient(c, label, runner_up, value):
    """+value at the label, -value at the runner-up, 0 elsewhere; label and runner-up are -1 where not valid."""
    return tl.where(label == c, value, tl.where(runner_up == c, -value, 0.0))


@triton.jit
def cross_entropy_gradient(c, label, e, factor, value):
    """value * (softmax - onehot), 0 where not valid (also where e is NaN); e = exp(z - shift), factor = value *
    scale."""
    g = e * factor - tl.where(label == c, value, 0.0)
    return tl.where(label >= 0, g, 0.0)


@triton.jit
def store_cross_entropy_gradient(grad, at_grad, grad_c, logits, at, stride_c, C, label, shift, factor, value, inside,
                                 A: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """The gradients of all classes at a tile's pixels, whose logits have the labels' size.

    UNROLL groups of classes are loaded before the first one is stored: no load is moved ahead of a store, and one under
    way for each thread would not keep the memory busy. Backwards: where the cache does not hold all logits of the
    programs at work, it holds those read last; nor should the gradient push them out.
    """
    label, shift, inside = for_classes(label, GROUP), for_classes(shift, GROUP), for_classes(inside, GROUP)
    factor, value = for_classes(factor, GROUP), for_classes(value, GROUP)
    at, at_grad = for_classes(at, GROUP), for_classes(at_grad, GROUP)
    last = (C - 1) // GROUP * GROUP
    for k in tl.range(0, C, GROUP * UNROLL):
        loaded = ()
        for j in tl.static_range(UNROLL):
            first = last - k - j * GROUP
            c, exists = classes_from(first, C, GROUP)
            # The interpreter takes no mask of a number's comparison.
            mask = inside & exists & (tl.full(inside.shape, first, tl.int32) >= 0)
            z = tl.load(logits + at + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0)
            loaded = loaded + ((z, mask),)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(UNROLL):
            c, _ = classes_from(last - k - j * GROUP, C, GROUP)
            z, mask = loaded[j]
            g = cross_entropy_gradient(c, label, exp(z.to(A) - shift), factor, value)
            to = grad + at_grad + tl.cast(c, tl.int64) * grad_c
            tl.store(to, g, mask=mask, eviction_policy="evict_first")


@triton.jit
def load_value(grad_loss, at_loss, class_weight, at_weight, pixel_weight, at, label, inside, A: tl.constexpr):
    """What a pixel's gradient is multiplied with: incoming gradient, weight of its class, weight of the pixel."""
    value = tl.full(inside.shape, 1.0, A)
    if grad_loss is not None:
        value *= tl.load(grad_loss + at_loss, mask=inside, other=0)
    if class_weight is not None:
        value *= tl.load(class_weight + at_weight + tl.maximum(label, 0))
    if pixel_weight is not None:
        value *= tl.load(pixel_weight + at, mask=inside, other=0)
    return value


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    grad, logits, labels, runner_up, grad_loss, shift, scale, class_weight, pixel_weight, bad,
    grad_n, grad_c, grad_y, grad_x, stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x,
    loss_n, loss_y, loss_x, weight_n, C, h, w, H, W, programs, tiles_x, chunks, one, ignore_index,
    UP: tl.constexpr, QUAD_ROWS: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, y, x, inside = tile_of(program, programs, tiles_x, chunks, one, h, H, W, UP, QUAD_ROWS, ALIGN, BLOCK_Y, BLOCK_X)
    y, x = y.to(tl.int64), x.to(tl.int64)
    label, is_bad = load_labels(labels, n * label_n + y * label_y + x * label_x, inside, C, ignore_index)
    tl.store(bad + program, tl.sum(is_bad.to(tl.int32)))
    at = n * H * W + y * W + x
    value = load_value(
        grad_loss, n * loss_n + y * loss_y + x * loss_x, class_weight, n * weight_n, pixel_weight, at, label, inside, A
    )
    at_grad = n * grad_n + y * grad_y + x * grad_x
    if runner_up is not None:
        runner = tl.where(label >= 0, tl.load(runner_up + at, mask=inside, other=0).to(tl.int32), -1)
        label, runner, value = for_classes(label, GROUP), for_classes(runner, GROUP), for_classes(value, GROUP)
        at_grad, inside = for_classes(at_grad, GROUP), for_classes(inside, GROUP)
        for first in tl.range(0, C, GROUP, loop_unroll_factor=UNROLL):
            c, exists = classes_from(first, C, GROUP)
            g = margin_gradient(c, label, runner, value)
            tl.store(grad + at_grad + tl.cast(c, tl.int64) * grad_c, g, mask=inside & exists)
    else:
        subtracted = tl.load(shift + at, mask=inside, other=0)
        factor = value * tl.load(scale + at, mask=inside, other=0)
        at = n * stride_n + y * stride_y + x * stride_x
        store_cross_entropy_gradient(
            grad, at_grad, grad_c, logits, at, stride_c, C, label, subtracted, factor, value, inside, A, GROUP, UNROLL
        )


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def gradient_up_kernel(
    grad, logits, labels, runner_up, grad_loss, shift, scale, class_weight, pixel_weight, bad,
    grad_n, grad_c, grad_y, grad_x, stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x,
    loss_n, loss_y, loss_x, weight_n, C, h, w, H, W, tiles_c, tiles_x, tiles_y, widest, one, ignore_index,
    ALIGN: tl.constexpr, A: tl.constexpr, CLASSES: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = program % tiles_c * CLASSES + tl.arange(0, CLASSES)[:, None]  # [CLASSES, 1]
    lane = tl.arange(0, QUADS)[None, :]
    # The last lane's quad only completes the column of the lane before it.
    quad_x = program // tiles_c % tiles_x * (QUADS - 1) + lane  # [1, QUADS]
    row = program // tiles_c // tiles_x % tiles_y * ROWS
    last_row = tl.minimum(row + ROWS, h)
    n = (program // tiles_c // tiles_x // tiles_y).to(tl.int64)

    begin_x, end_x = first_output(quad_x, w, W, ALIGN), first_output(quad_x + 1, w, W, ALIGN)
    # Where a tap does not exist its weight is 0, and it is read as 0. For one - 1 and the hint below see load_rows.
    left = (quad_x - 1) * stride_x + (one - 1)
    right = quad_x * stride_x + (one - 1)
    to_the_right = tl.broadcast_to(tl.minimum(lane + 1, QUADS - 1), [CLASSES, QUADS])
    is_class = c < C
    has_left = is_class & (quad_x > 0) & (quad_x <= w)
    has_right = is_class & (quad_x < w)
    planes = n * stride_n + c.to(tl.int64) * stride_c  # [CLASSES, 1]
    grad_planes = n * grad_n + c.to(tl.int64) * grad_c
    bad_labels = tl.zeros([1, QUADS], tl.int32)

    # Corner sums [CLASSES, QUADS] for the row of logits that the next quad row completes.
    lower_left = tl.zeros([CLASSES, QUADS], A)
    lower_right = tl.zeros([CLASSES, QUADS], A)
    for quad_y in range(row, last_row + 1):
        upper_left, upper_right = lower_left, lower_right
        lower_left = tl.zeros([CLASSES, QUADS], A)
        lower_right = tl.zeros([CLASSES, QUADS], A)
        if runner_up is None:
            rows = lane * 0 + quad_y  # a number alone would not do in a mask, for the interpreter
            upper = logits + planes + (quad_y - 1) * stride_y
            lower = logits + planes + quad_y * stride_y
            z00 = tl.load(tl.max_contiguous(upper + left, [1, 2]), mask=has_left & (rows > 0), other=0).to(A)
            z01 = tl.load(tl.max_contiguous(upper + right, [1, 2]), mask=has_right & (rows > 0), other=0).to(A)
            z10 = tl.load(tl.max_contiguous(lower + left, [1, 2]), mask=has_left & (rows < h), other=0).to(A)
            z11 = tl.load(tl.max_contiguous(lower + right, [1, 2]), mask=has_right & (rows < h), other=0).to(A)
        begin_y, end_y = first_output(quad_y, h, H, ALIGN), first_output(quad_y + 1, h, H, ALIGN)
        for i in range(0, widest):
            x = begin_x + i
            x64 = x.to(tl.int64)
            wx0, wx1 = weights(x, quad_x, w, W, ALIGN, A)
            if runner_up is None:  # first along x, as the forward
                z0, z1 = mean(z00, z01, wx0, wx1), mean(z10, z11, wx0, wx1)
            sum_upper = tl.zeros([CLASSES, QUADS], A)
            sum_lower = tl.zeros([CLASSES, QUADS], A)
            for y in range(begin_y, end_y):
                inside = x < end_x
                wy0, wy1 = weights(y, quad_y, h, H, ALIGN, A)
                y64 = tl.cast(y, tl.int64)
                row_map = n * H * W + y64 * W
                at_label = n * label_n + y64 * label_y + x64 * label_x
                label, is_bad = load_labels(labels, at_label, inside, C, ignore_index)
                bad_labels += is_bad.to(tl.int32)
                at_loss = n * loss_n + y64 * loss_y + x64 * loss_x
                value = load_value(
                    grad_loss, at_loss, class_weight, n * weight_n, pixel_weight, row_map + x, label, inside, A
                )
                if runner_up is not None:
                    runner = tl.load(runner_up + row_map + x, mask=inside, other=0).to(tl.int32)
                    g = margin_gradient(c, label, tl.where(label >= 0, runner, -1), value)
                else:
                    subtracted = tl.load(shift + row_map + x, mask=inside, other=0)
                    factor = value * tl.load(scale + row_map + x, mask=inside, other=0)
                    e = exp(mean(z0, z1, wy0, wy1) - subtracted)
                    g = cross_entropy_gradient(c, label, e, factor, value)
                sum_upper += wy0 * g
                sum_lower += wy1 * g
            upper_left += wx0 * sum_upper
            upper_right += wx1 * sum_upper
            lower_left += wx0 * sum_lower
            lower_right += wx1 * sum_lower
        if quad_y > row:
            # Column i: the right corner of quad i and the left one of quad i + 1.
            g = upper_right + tl.gather(upper_left, to_the_right, axis=1)
            at = grad_planes + tl.cast(quad_y - 1, tl.int64) * grad_y + quad_x * grad_x
            tl.store(grad + at, g, mask=is_class & (lane < QUADS - 1) & (quad_x < w))
    tl.store(bad + program, tl.sum(bad_labels))


def launch_gradient(
    grad: Tensor,
    labels: Tensor,
    ignore_index: int,
    align_corners: bool,
    *,
    logits: Tensor | None = None,
    runner_up: Tensor | None = None,
    grad_loss: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """Fills grad [N, C, h, w]; gives the number of bad labels seen by each program, [N, programs].

    Args:
        runner_up: [N, H, W], for margins; None for cross-entropy, which needs
        logits, and shift and scale [N, H, W].
        grad_loss: [N, H, W] of any strides; None means 1.
        class_weight: [N, C], dense along C; pixel_weight: [N, H, W].
    """
    n, num_classes, h, w = grad.shape
    H, W = labels.shape[-2:]
    logit_stride = (0, 0, 0, 0) if logits is None else logits.stride()
    loss_stride = (0, 0, 0) if grad_loss is None else grad_loss.stride()
    weight_n = 0 if class_weight is None else class_weight.stride(0)
    pixels = (logits, labels, runner_up, grad_loss, shift, scale, class_weight, pixel_weight)
    if (h, w) == (H, W):
        strides = [tensor.stride() for tensor in (grad, labels, logits, grad_loss) if tensor is not None]
        t = tiles(grad.shape, labels.shape[-2:], align_corners, grad.dtype, labels.device, strides)
        bad = t.partial(torch.int32, labels.device)
        launch(
            gradient_kernel, t.total, labels, grad, *pixels, bad, *grad.stride(), *logit_stride,
            *labels.stride(), *loss_stride, weight_n, *t.sizes, *t.walk, ignore_index, **t.options,
        )  # fmt: skip
        return bad
    check_sizes(grad.shape, (H, W), grad.stride() if logits is None else logits.stride())
    tuned = config("gradient_up", labels.device)
    quads = max(2, min(power_of_two(w + 1), tuned.block))
    classes = min(power_of_two(num_classes), tuned.classes)
    rows = min(power_of_two(h), tuned.rows)
    walk = (triton.cdiv(num_classes, classes), triton.cdiv(w, quads - 1), triton.cdiv(h, rows))
    bad = torch.empty(n, walk[0] * walk[1] * walk[2], dtype=torch.int32, device=labels.device)
    launch(
        gradient_up_kernel, bad.numel(), labels, grad, *pixels, bad, *grad.stride(), *logit_stride,
        *labels.stride(), *loss_stride, weight_n, num_classes, h, w, H, W, *walk, largest_quad(w, W, align_corners),
        1, ignore_index, ALIGN=align_corners, A=triton_dtype(compute_dtype(grad.dtype)), CLASSES=classes, QUADS=quads,
        ROWS=rows, num_warps=tuned.num_warps * (2 if grad.dtype is torch.float64 else 1),
    )  # fmt: skip
    return bad
