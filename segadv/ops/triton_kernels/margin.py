"""Margin g = z_y - max over the other classes, its sum per image, and the gradient of that sum.

Fuses upsampling, label lookup, masking, the maximum, the mean's sum and, at full resolution, the gradient. Fewest
bytes: the logits read once, the gradient written once (where wanted), labels read once. At full resolution bound by
memory. Resampled, by arithmetic: 10 instructions for a class of a pixel, as Triton 3.9 compiles it for sm_90.

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import check_labels, class_dtype, empty_gradient, empty_map
from . import gradient
from .tiles import (
    UNALIGNED,
    UNSPECIALIZED,
    classes_from,
    find_largest,
    finish,
    for_classes,
    launch,
    load_labels,
    taps,
    tile_of,
    tiles,
)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def margin_kernel(
    logits, labels, grad, margin, runner_up, gain_sum, valid, bad,
    stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x, grad_n, grad_c, grad_y, grad_x,
    C, h, w, H, W, programs, tiles_x, chunks, one, ignore_index,
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
    own, best, runner = find_largest(
        logits + n * stride_n, stride_c, C, label, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
        UP, QUAD_ROWS, A, BLOCK_Y, BLOCK_X, GROUP, UNROLL,
    )  # fmt: skip
    value = tl.where(label >= 0, own - best, 0.0)
    tl.store(bad + program, tl.sum(is_bad.to(tl.int32)))
    at = n * H * W + y.to(tl.int64) * W + x
    if gain_sum is not None:
        tl.store(gain_sum + program, tl.sum(value))
        tl.store(valid + program, tl.sum((label >= 0).to(tl.int32)))
    if margin is not None:
        tl.store(margin + at, value, mask=inside)
    if runner_up is not None:
        tl.store(runner_up + at, tl.where(label >= 0, runner, 0), mask=inside)
    if grad is not None:
        runner = for_classes(tl.where(label >= 0, runner, -1), GROUP)
        label, inside = for_classes(label, GROUP), for_classes(inside, GROUP)
        at = for_classes(n * grad_n + y.to(tl.int64) * grad_y + x.to(tl.int64) * grad_x, GROUP)
        for first in tl.range(0, C, GROUP, loop_unroll_factor=UNROLL):
            c, exists = classes_from(first, C, GROUP)
            g = gradient.margin_gradient(c, label, runner, 1.0)
            tl.store(grad + at + tl.cast(c, tl.int64) * grad_c, g, mask=inside & exists)


def margin(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    align_corners: bool,
    *,
    grad: Tensor | None = None,
    margin: Tensor | None = None,
    runner_up: Tensor | None = None,
    gain_sum: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> None:
    if labels.device.type == "cpu":
        check_labels(labels, logits.shape[1], ignore_index)
    strides = [tensor.stride() for tensor in (logits, labels, grad) if tensor is not None]
    t = tiles(logits.shape, labels.shape[-2:], align_corners, logits.dtype, logits.device, strides)
    sums = None if gain_sum is None else t.partial(gain_sum.dtype, logits.device)
    valid, bad = (t.partial(torch.int32, logits.device) for _ in range(2))
    up = t.options["UP"]
    if up and grad is not None:
        runner_up = empty_map(labels, class_dtype(logits.shape[1]))
    launch(
        margin_kernel, t.total, logits, logits, labels, None if up else grad, margin, runner_up, sums, valid, bad,
        *logits.stride(), *labels.stride(), *((0, 0, 0, 0) if grad is None else grad.stride()), *t.sizes, *t.walk,
        ignore_index, **t.options,
    )  # fmt: skip
    if up and grad is not None:
        gradient.launch_gradient(grad, labels, ignore_index, align_corners, runner_up=runner_up)
    finish(
        bad,
        sums=[(sums, gain_sum)],
        valid=None if n_valid is None else (valid, n_valid),
        poisoned=[x for x in (margin, grad) if x is not None],
    )


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
    grad = empty_gradient(size, channels_last, dtype, labels.device)
    bad = gradient.launch_gradient(
        grad, labels, ignore_index, align_corners, runner_up=runner_up, grad_loss=grad_margin
    )
    finish(bad, poisoned=[grad])
    return grad
