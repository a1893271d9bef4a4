"""argmax over the classes at the labels' size, and the confusion matrix.

Fuses upsampling, the arg-max, label lookup, masking and the counting. Counts are integers, added by atomics: the same
bits in any order. Several copies of the matrix, and one addition for neighbours in the same cell (`add_counts`), keep
the few cells that take most pixels from being the queue for all programs. Fewest bytes: the logits read once, labels
read once (or predictions written once). Resampled, bound by arithmetic: 9 instructions for a class of a pixel, as
Triton 3.9 compiles it for sm_90.

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import check_labels, class_dtype, zero_counts
from .tiles import UNALIGNED, UNSPECIALIZED, find_largest, launch, load_labels, taps, tile_of, tiles


@triton.jit
def add_counts(counts, cell, counted, AXIS: tl.constexpr):
    """Counts the pixels `counted` in their cells: those along AXIS, which a thread owns, at once where they are in the
    same cell, as neighbours mostly are."""
    lowest = tl.min(tl.where(counted, cell, 2**31 - 1), AXIS, keep_dims=True)
    highest = tl.max(tl.where(counted, cell, -1), AXIS, keep_dims=True)
    number = tl.sum(counted.to(tl.int32), AXIS, keep_dims=True)
    tl.atomic_add(counts + lowest, number, mask=lowest == highest, sem="relaxed")
    tl.atomic_add(counts + cell, 1, mask=counted & (lowest != highest), sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def confusion_kernel(
    logits, labels, prediction, counts,
    stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x,
    C, h, w, H, W, programs, tiles_x, chunks, one, ignore_index, copies, PER_IMAGE: tl.constexpr,
    UP: tl.constexpr, QUAD_ROWS: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, y, x, inside = tile_of(program, programs, tiles_x, chunks, one, h, H, W, UP, QUAD_ROWS, ALIGN, BLOCK_Y, BLOCK_X)
    o00, o01, o10, o11, wy0, wy1, wx0, wx1 = taps(
        program, programs, tiles_x, chunks, one, y, x, h, w, H, W, stride_y, stride_x, UP, QUAD_ROWS, ALIGN, A
    )
    inside_taps = x < W if QUAD_ROWS else inside
    _, _, best_class = find_largest(
        logits + n * stride_n, stride_c, C, None, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
        UP, QUAD_ROWS, A, BLOCK_Y, BLOCK_X, GROUP, UNROLL,
    )  # fmt: skip
    if prediction is not None:
        tl.store(prediction + n * H * W + y.to(tl.int64) * W + x, best_class, mask=inside)
    if counts is not None:
        at = n * label_n + y.to(tl.int64) * label_y + x.to(tl.int64) * label_x
        label, is_bad = load_labels(labels, at, inside, C, ignore_index)
        cells = C * C  # below 2^30
        cell = tl.where(is_bad, cells, label * C + best_class)  # one cell more counts the bad labels
        copy = (program % copies).to(tl.int64)
        if PER_IMAGE:
            copy += n * copies
        counts += copy * (cells + 1)
        counted = (label >= 0) | is_bad
        if QUAD_ROWS:
            add_counts(counts, cell, counted, 0)
        else:
            NEIGHBOURS: tl.constexpr = min(4, BLOCK_Y * BLOCK_X)
            rows: tl.constexpr = [BLOCK_Y * BLOCK_X // NEIGHBOURS, NEIGHBOURS]
            add_counts(counts, tl.reshape(cell, rows), tl.reshape(counted, rows), 1)


def _launch(
    logits: Tensor,
    labels: Tensor | None,
    size: list[int],
    align_corners: bool,
    *,
    ignore_index: int = 0,
    prediction: Tensor | None = None,
    counts: Tensor | None = None,
    per_image: bool = False,
) -> None:
    label_stride = (0, 0, 0) if labels is None else labels.stride()
    strides = [logits.stride(), label_stride]
    t = tiles(logits.shape, size, align_corners, logits.dtype, logits.device, strides)
    launch(
        confusion_kernel, t.total, logits, logits, labels, prediction, counts, *logits.stride(), *label_stride,
        *t.sizes, *t.walk, ignore_index, 1 if counts is None else counts.shape[1], PER_IMAGE=per_image, **t.options,
    )  # fmt: skip


def confusion_matrix(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
) -> tuple[Tensor, Tensor]:
    num_classes = logits.shape[1]
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    counts = zero_counts(logits, per_image)
    _launch(logits, labels, list(labels.shape[-2:]), align_corners, ignore_index=ignore_index, counts=counts,
            per_image=per_image)  # fmt: skip
    total = counts.sum(dim=1, dtype=torch.int64)
    matrix = total[:, :-1].unflatten(1, (num_classes, num_classes))
    matrix = matrix if per_image else matrix[0]
    return matrix.clone(), total[:, -1].sum()


def argmax_labels(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    dtype = class_dtype(logits.shape[1])
    prediction = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
    _launch(logits, None, size, align_corners, prediction=prediction)
    return prediction
