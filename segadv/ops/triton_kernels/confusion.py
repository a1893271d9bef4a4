"""argmax over the classes at the labels' size, and the confusion matrix.

Fuses upsampling, the arg-max, label lookup, masking and the counting. Counts are integers, added by atomics: the same
bits in any order. There are several copies of the matrix, so that the few cells that take most pixels are not the
queue for all programs. Fewest bytes: the logits read once, labels read once (or predictions written once). Resampled,
bound by arithmetic: 9 instructions for a class of a pixel, as Triton 3.9 compiles it for sm_90.

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import check_labels, prediction_dtype
from .tiles import find_largest, launch, load_labels, taps, tile_of, tiles


@triton.jit(do_not_specialize=["one"])
def confusion_kernel(
    logits, labels, prediction, counts,
    stride_n, stride_c, stride_y, stride_x, label_n, label_y, label_x,
    C, h, w, H, W, programs, tiles_x, chunks, one, ignore_index, copies, PER_IMAGE: tl.constexpr,
    UP: tl.constexpr, QUAD_ROWS: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n, y, x, inside = tile_of(program, programs, tiles_x, chunks, one, h, H, W, UP, QUAD_ROWS, ALIGN, BLOCK_Y, BLOCK_X)
    o00, o01, o10, o11, wy0, wy1, wx0, wx1 = taps(
        program, programs, tiles_x, chunks, one, y, x, h, w, H, W, stride_y, stride_x, UP, QUAD_ROWS, ALIGN, A
    )
    inside_taps = x < W if QUAD_ROWS else inside
    _, _, best_class = find_largest(
        logits + n * stride_n, stride_c, C, None, inside_taps, o00, o01, o10, o11, wy0, wy1, wx0, wx1,
        UP, QUAD_ROWS, A, BLOCK_Y, BLOCK_X, UNROLL,
    )  # fmt: skip
    if prediction is not None:
        tl.store(prediction + n * H * W + y.to(tl.int64) * W + x, best_class, mask=inside)
    if counts is not None:
        at = n * label_n + y.to(tl.int64) * label_y + x.to(tl.int64) * label_x
        label, is_bad = load_labels(labels, at, inside, C, ignore_index)
        cells = tl.cast(C, tl.int64) * C
        cell = tl.where(is_bad, cells, label.to(tl.int64) * C + best_class)  # one cell more counts the bad labels
        copy = program % copies
        if PER_IMAGE:
            copy += n * copies
        tl.atomic_add(counts + copy * (cells + 1) + cell, 1, mask=(label >= 0) | is_bad, sem="relaxed")


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
    num_images, num_classes = logits.shape[:2]
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index)
    images, cells = num_images if per_image else 1, num_classes**2
    # 64 copies of a matrix, less where they would take more than 16 MiB
    copies = max(1, min(64, 2**22 // max(1, images * cells)))
    counts = torch.zeros(images, copies, cells + 1, dtype=torch.int32, device=logits.device)
    _launch(logits, labels, list(labels.shape[-2:]), align_corners, ignore_index=ignore_index, counts=counts,
            per_image=per_image)  # fmt: skip
    total = counts.sum(dim=1, dtype=torch.int64)
    matrix = total[:, :cells].reshape(images, num_classes, num_classes)
    matrix = matrix if per_image else matrix[0]
    return matrix.clone(), total[:, cells].sum()


def argmax_labels(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    dtype = prediction_dtype(logits.shape[1])
    prediction = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
    _launch(logits, None, size, align_corners, prediction=prediction)
    return prediction
