"""How a kernel walks over the pixels, and what all kernels share: labels, logits, sums per image.

The twin of csrc/cpu/tiles.h and up_tiles.h.

A program works on a tile of pixels [BLOCK_Y, BLOCK_X] of one image at the labels' size and goes through the classes one
after the other. Logits of the labels' size are read as they are; where the classes of a pixel are neighbours, several
of them at once (`load_classes`). Logits of another size are resampled on the fly.
Where they become four times as large or more, the rows of a tile lie in one quad row (`QUAD_ROWS`): two rows of logits
then serve them all, each is resampled along x once per class and column, and a pixel is two multiplications more. A
thread should then own whole columns. The compiler would rather give it four pixels of a row, for wide loads of labels,
and let every row's threads load the same taps. So columns are counted from `one` - 1, of which it does not know that it
is 0, and no wide load is possible. That columns are neighbours it has to know: otherwise some versions deal the threads
out along y, and move values between layouts for every class (3.6).

Sums per image go through one number per program (`sums`, `counts`), which `finish` adds in a fixed order.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype
from .bilinear import MAX_PRODUCT, first_output, forward_weights, largest_quad, quad_of
from .configs import config

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x * LOG2E)

UNALIGNED = [
    "C", "h", "w", "H", "programs", "blocks", "tiles_c", "tiles_x", "tiles_y", "chunks", "widest", "copies", "partials",
    "span", "numel0", "numel1", "ignore_index", "stride_x", "grad_x", "weight_n",
]  # fmt: skip
"""Arguments of the kernels whose divisibility by 16 should not be known.

Of most it says nothing about an address (that of W and of the other strides does): told of it, Triton would compile the
kernels anew for every other size of images, to the same code. Of the stride from pixel to pixel, where it is not 1, it
would say that the classes of a pixel begin at multiples of 16: each thread would take several of them, and the mask
that ends them, of whose divisibility nothing is known, take these loads apart again."""

UNSPECIALIZED = ["one", "h", "w"]
"""Arguments that the kernels must not take as constants where they are 1: `one` for the sake of the layout (above);
of logits with one row or column the compiler would find that all pixels of a tile have one tap, make its offsets a
scalar, and fail at what `load_rows` says of neighbours. For the same reason a tile that resamples has two columns."""

# --- device -------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(program, programs, tiles_x, chunks, one, h, H, W, UP: tl.constexpr, QUAD_ROWS: tl.constexpr,
            ALIGN: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):  # fmt: skip
    """(image, output rows [BLOCK_Y, 1], output columns [1, BLOCK_X], inside [BLOCK_Y, BLOCK_X])."""
    n, k = program // programs, program % programs
    x = k % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
    if UP:
        x += one - 1
    if QUAD_ROWS:
        quad = k // tiles_x // chunks
        begin = first_output(quad, h, H, ALIGN) + k // tiles_x % chunks * BLOCK_Y
        end = first_output(quad + 1, h, H, ALIGN)
    else:
        begin = k // tiles_x * BLOCK_Y
        end = H
    y = begin + tl.arange(0, BLOCK_Y)[:, None]
    return n.to(tl.int64), y, x, (y < end) & (x < W)


@triton.jit
def load_labels(labels, offsets, inside, num_classes, ignore_index):
    """(class as int32, -1 where not valid; whether the label is neither a class nor ignored)."""
    label = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    is_class = (label >= 0) & (label < num_classes)
    kept = inside & (label != ignore_index)
    return tl.where(kept & is_class, label, -1).to(tl.int32), kept & ~is_class


@triton.jit
def taps(program, programs, tiles_x, chunks, one, y, x, h, w, H, W, stride_y, stride_x, UP: tl.constexpr,
         QUAD_ROWS: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr):  # fmt: skip
    """Offsets of the four taps (upper and lower row, left and right) and weights along y and x of a tile's pixels."""
    if UP:
        quad_x, quad_y = quad_of(x, w, W, ALIGN), quad_of(y, h, H, ALIGN)
        wx0, wx1 = forward_weights(x, quad_x, w, W, ALIGN, A)
        wy0, wy1 = forward_weights(y, quad_y, h, H, ALIGN, A)
        left = tl.maximum(quad_x - 1, 0) * stride_x + (one - 1)
        right = tl.minimum(quad_x, w - 1) * stride_x + (one - 1)
        if QUAD_ROWS:
            row = program % programs // tiles_x // chunks
        else:
            row = quad_y
        upper = tl.maximum(row - 1, 0) * stride_y
        lower = tl.minimum(row, h - 1) * stride_y
        o00, o01, o10, o11 = upper + left, upper + right, lower + left, lower + right
    else:
        o00 = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        o01, o10, o11, wy0, wy1, wx0, wx1 = o00, o00, o00, 0.0, 0.0, 0.0, 0.0  # unused
    return o00, o01, o10, o11, wy0, wy1, wx0, wx1


@triton.jit
def exp(x):
    """The instruction for 2^x; tl.exp spends three more on results that are subnormal."""
    return tl.exp2(x * LOG2E)


@triton.jit
def reciprocal(x):
    """1 / x of a finite sum of exponentials: the division, which a GPU does 2 ulp off, and one step of Newton's method.
    The gradient at the label is the result minus 1, where the pixel is clear all rounding, and not of zero mean."""
    result = 1.0 / x
    return tl.fma(tl.fma(-x, result, tl.full(x.shape, 1.0, x.dtype)), result, result)


@triton.jit
def mean(a, b, w0, w1):
    """w0 * a + w1 * b. Fused by hand: the compiler would fuse either product, one way here and another there, and what
    the forward kept of a logit (the label's, or the largest one) would differ by its rounding from what the gradient
    computes."""
    return tl.fma(w1, b, w0 * a)


@triton.jit
def load_rows(plane, inside, o00, o01, o10, o11, wx0, wx1, A: tl.constexpr):
    """The logits of one class, `plane`, in the upper and the lower row of taps, at a tile's columns."""
    # That neighbours lie together need not be so: it keeps the layout of all other loads. No wide load comes of it, as
    # the compiler does not know that `one` - 1, in the offsets of all taps, is a multiple of anything.
    z00 = tl.load(tl.max_contiguous(plane + o00, [1, 2]), mask=inside, other=0).to(A)
    z01 = tl.load(tl.max_contiguous(plane + o01, [1, 2]), mask=inside, other=0).to(A)
    z10 = tl.load(tl.max_contiguous(plane + o10, [1, 2]), mask=inside, other=0).to(A)
    z11 = tl.load(tl.max_contiguous(plane + o11, [1, 2]), mask=inside, other=0).to(A)
    return mean(z00, z01, wx0, wx1), mean(z10, z11, wx0, wx1)


@triton.jit
def load_logit(plane, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, A: tl.constexpr):
    """The resampled logits of one class, `plane`, at a tile's pixels [BLOCK_Y, BLOCK_X]."""
    upper, lower = load_rows(plane, inside, o00, o01, o10, o11, wx0, wx1, A)
    return mean(upper, lower, wy0, wy1)


@triton.jit
def halves(tile):
    """[Y, X, K] -> what lies at even and at odd places of the last dimension, [Y, X, K / 2] each; [Y, X] for K = 2."""
    if tile.shape[2] == 2:
        even, odd = tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))
    return even, odd


@triton.jit
def split4(tile):
    a, b = halves(tile)
    a0, a1 = halves(a)
    b0, b1 = halves(b)
    return a0, b0, a1, b1


@triton.jit
def split8(tile):
    a, b = halves(tile)
    a0, a1, a2, a3 = split4(a)
    b0, b1, b2, b3 = split4(b)
    return a0, b0, a1, b1, a2, b2, a3, b3


@triton.jit
def split16(tile):
    a, b = halves(tile)
    a0, a1, a2, a3, a4, a5, a6, a7 = split8(a)
    b0, b1, b2, b3, b4, b5, b6, b7 = split8(b)
    return a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7


@triton.jit
def classes_from(first, C, GROUP: tl.constexpr):
    """(the next GROUP classes [1, 1, GROUP], whether they exist); of one class a number, and True."""
    if GROUP == 1:
        c = first
        exists = True
    else:
        c = first + tl.arange(0, GROUP)[None, None, :]
        exists = c < C
    return c, exists


@triton.jit
def for_classes(value, GROUP: tl.constexpr):
    """What is [Y, X], so that it can be combined with the classes of `classes_from`."""
    if GROUP == 1:
        result = value
    else:
        result = value[:, :, None]
    return result


@triton.jit
def load_classes(image, first, C, stride_c, inside, at, A: tl.constexpr, GROUP: tl.constexpr):
    """The logits of GROUP classes at a tile's pixels: as many tensors [Y, X]; -infinity behind the last class.

    Where the classes of a pixel are neighbours, GROUP > 1 of them are loaded together, neighbours by neighbouring
    threads; from those they go through shared memory to the thread that owns the pixel. With 8 of 19 classes a program
    touches 2 times the sectors that it must in float32, 3 times in half precision (tests/traffic.py), instead of 8 and
    16 times.
    """
    c, exists = classes_from(first, C, GROUP)
    at = for_classes(at, GROUP) + tl.cast(c, tl.int64) * stride_c
    z = tl.load(image + at, mask=for_classes(inside, GROUP) & exists, other=float("-inf")).to(A)
    if GROUP == 1:
        apart = (z,)
    elif GROUP == 2:
        apart = halves(z)
    elif GROUP == 4:
        apart = split4(z)
    elif GROUP == 8:
        apart = split8(z)
    else:
        tl.static_assert(GROUP == 16)
        apart = split16(z)
    return apart


@triton.jit
def beats(value, best):
    """Whether `value`, of a higher class index, takes best's place: ties go to the lowest class, NaN wins, once."""
    return ~(value <= best) & (best == best)


@triton.jit
def search(logits, stride_c, C, label, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, WITHOUT_NAN: tl.constexpr,
           UP: tl.constexpr, A: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, GROUP: tl.constexpr,
           UNROLL: tl.constexpr):  # fmt: skip
    own = tl.zeros([BLOCK_Y, BLOCK_X], A)
    best = tl.full([BLOCK_Y, BLOCK_X], float("-inf"), A)
    best_class = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    if label is not None:
        best_class = tl.where(label == 0, 1, 0)
    has_nan = tl.zeros(o00.shape, tl.int1)
    for first in tl.range(0, C, GROUP, loop_unroll_factor=UNROLL):
        if not UP:
            group = load_classes(logits, first, C, stride_c, inside, o00, A, GROUP)
        for i in tl.static_range(GROUP):
            c = first + i
            plane = logits + tl.cast(c, tl.int64) * stride_c
            if WITHOUT_NAN:
                upper, lower = load_rows(plane, inside, o00, o01, o10, o11, wx0, wx1, A)
                has_nan |= ~(tl.abs(upper) + tl.abs(lower) < float("inf"))  # 0 * infinity would be one
                z = mean(upper, lower, wy0, wy1)
                takes = z > best
                if label is not None:
                    takes &= label != c
            else:
                if UP:
                    z = load_logit(plane, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, A)
                else:
                    z = group[i]
                if label is not None:
                    is_label = label == c
                    own = tl.where(is_label, z, own)
                    z = tl.where(is_label, float("-inf"), z)  # takes no place, not even that of a NaN
                takes = beats(z, best)
            best = tl.where(takes, z, best)
            best_class = tl.where(takes, c, best_class)
    return own, best, best_class, has_nan


@triton.jit
def find_largest(logits, stride_c, C, label, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, UP: tl.constexpr,
                 QUAD_ROWS: tl.constexpr, A: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
                 GROUP: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """(own, largest logit, its class) of each pixel of an image, `logits`.

    Given a label, the largest is that of the other classes, and own the label's logit (where not valid: any number).
    """
    # In a column of pixels the two rows that serve them all tell of NaN; without it one comparison does.
    own, best, best_class, has_nan = search(
        logits, stride_c, C, label, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, QUAD_ROWS,
        UP, A, BLOCK_Y, BLOCK_X, GROUP, UNROLL,
    )  # fmt: skip
    if QUAD_ROWS:
        if tl.max(has_nan.to(tl.int32)) > 0:
            own, best, best_class, has_nan = search(
                logits, stride_c, C, label, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, False,
                UP, A, BLOCK_Y, BLOCK_X, GROUP, UNROLL,
            )  # fmt: skip
        elif label is not None:  # one look at the label's class instead of a comparison with every class
            plane = logits + tl.maximum(label, 0).to(tl.int64) * stride_c
            own = load_logit(plane, inside, o00, o01, o10, o11, wy0, wy1, wx0, wx1, A)
    return own, best, best_class


@triton.jit
def total_of(partial, n, programs, BLOCK: tl.constexpr):
    """Sum of an image's row of partial sums: lanes first, then across them, in float64 or int64."""
    total = tl.zeros([BLOCK], tl.int64 if partial.dtype.element_ty.is_int() else tl.float64)
    for begin in range(0, programs, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + n * programs + k, mask=k < programs, other=0).to(total.dtype)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def finish_kernel(sum0, out0, sum1, out1, valid, n_valid, bad, poisoned0, numel0, poisoned1, numel1, programs,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Adds up what the programs of each image left. NaN wherever a floating result belongs to an image with a bad
    label: every program looks, and writes only then."""
    n, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_bad = total_of(bad, n, programs, BLOCK) > 0
    if j == 0:
        if out0 is not None:
            tl.store(out0 + n, tl.where(is_bad, float("nan"), total_of(sum0, n, programs, BLOCK)))
        if out1 is not None:
            tl.store(out1 + n, tl.where(is_bad, float("nan"), total_of(sum1, n, programs, BLOCK)))
        if n_valid is not None:
            tl.store(n_valid + n, total_of(valid, n, programs, BLOCK))
    if is_bad:
        lanes = tl.arange(0, BLOCK)
        if poisoned0 is not None:
            for begin in range(j * BLOCK, numel0, tl.num_programs(1) * BLOCK):
                tl.store(poisoned0 + n * numel0 + begin + lanes, float("nan"), mask=begin + lanes < numel0)
        if poisoned1 is not None:
            for begin in range(j * BLOCK, numel1, tl.num_programs(1) * BLOCK):
                tl.store(poisoned1 + n * numel1 + begin + lanes, float("nan"), mask=begin + lanes < numel1)


# --- host ---------------------------------------------------------------------------------------------------------


def launch(kernel: Any, programs: int | tuple[int, int], like: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs the kernel on the device and the current stream of the tensor `like`."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    elsewhere = like.device.type == "cuda" and like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=True, **options)  # the default differs between versions


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass
class Tiles:
    """How logits and labels are cut into tiles, as the kernels want it."""

    sizes: tuple[int, int, int, int, int]  # C, h, w, H, W; 1, H*W, 1, H*W where an image is one long row
    walk: tuple[int, int, int, int]  # tiles of an image, of a row, of a quad row (one above the other); 1
    images: int
    options: dict[str, Any]  # constants of the kernels

    @property
    def total(self) -> int:
        return self.images * self.walk[0]

    def partial(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One number per tile, [N, tiles of an image]."""
        return torch.empty(self.images, self.walk[0], dtype=dtype, device=device)


def tiles(
    size: Sequence[int],
    size_out: Sequence[int],
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
    strides: Sequence[Sequence[int]],
) -> Tiles:
    """The tiles of logits [N, C, h, w] and labels [N, H, W].

    Args:
        strides: of all tensors that the kernel reads or writes at pixels and that are not contiguous [N, H, W]; of
            the logits, or their gradient, first.
    """
    n, c, h, w = size
    H, W = size_out
    up = (h, w) != (H, W)
    channels_last = not up and strides[0][1] == 1 and dtype is not torch.float64
    tuned = config("pixels_up" if up else "channels_last" if channels_last else "pixels", device)
    block, chunks, quad_rows = tuned.block, 1, False
    if up:
        check_sizes(size, size_out, strides[0])
        rows = largest_quad(h, H, align_corners)
        quad_rows = rows >= 4
    if quad_rows:
        block_y = min(power_of_two(rows), tuned.rows)
        chunks = triton.cdiv(rows, block_y)
        tiles_y = (h + 1) * chunks
    else:
        gapless = not up and all(stride[-2] == stride[-1] * W for stride in strides)  # rows follow each other
        if gapless and H * W <= 2**30:  # columns are counted in int32
            h, w, H, W = 1, H * W, 1, H * W
        per_thread = max(1, 16 // dtype.itemsize)  # 16 bytes of logits
        if channels_last:
            per_thread = 1
        elif not up and strides[0][-1] > 1:  # nor are pixels neighbours here
            block, per_thread = max(32, block // per_thread), 1
        block_y = max(1, min(power_of_two(H), block // power_of_two(W)))
        tiles_y = triton.cdiv(H, block_y)
    block_x = max(2 if up else 1, min(power_of_two(W), block // block_y))
    if up:  # four taps per pixel, or float64, would not fit the registers of as few threads
        warps = tuned.num_warps * (1 if quad_rows else 2) * (2 if dtype is torch.float64 else 1)
    else:
        # More pixels of a thread would take every second 16 bytes at once, and what is computed in one layout be stored
        # in another: through shared memory and a barrier, once per class.
        warps = min(max(1, block_y * block_x // (32 * per_thread)), 32)
    tiles_x = triton.cdiv(W, block_x)
    return Tiles(
        sizes=(c, h, w, H, W),
        walk=(tiles_x * tiles_y, tiles_x, chunks, 1),
        images=n,
        options={
            "UP": up,
            "QUAD_ROWS": quad_rows,
            "ALIGN": align_corners,
            "A": triton_dtype(compute_dtype(dtype)),
            "BLOCK_Y": block_y,
            "BLOCK_X": block_x,
            "GROUP": min(power_of_two(c), tuned.classes) if channels_last else 1,
            "UNROLL": tuned.unroll,
            "num_warps": warps,
        },
    )


def check_sizes(size: Sequence[int], size_out: Sequence[int], stride: Sequence[int]) -> None:
    """Refuses to resample logits of such size and stride where offsets in int32 would not do."""
    (h, w), (H, W) = size[-2:], size_out
    if max(h * H, w * W) >= MAX_PRODUCT or h * stride[-2] + w * stride[-1] >= 2**31:
        raise ValueError(
            f"logits must have h * H and w * W below {MAX_PRODUCT}, and a class of an image within 2^31, for the "
            f"resampling of the triton backend, got {h} x {w} (strides {stride[-2]}, {stride[-1]}) to {H} x {W}"
        )


def triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype is torch.float64 else tl.float32


def finish(
    bad: Tensor,
    *,
    sums: Sequence[tuple[Tensor | None, Tensor | None]] = (),
    valid: tuple[Tensor, Tensor] | None = None,
    poisoned: Sequence[Tensor] = (),
) -> None:
    """Adds the partial sums [N, programs] into the results [N]; NaN where an image has a bad label.

    Args:
        bad: the number of bad labels of every program.
        sums: pairs of a partial sum and its result, or of None where that is not wanted, at most two.
        valid: the number of valid pixels of every program, and its result.
        poisoned: further results of the images, dense, at most two.
    """
    n, programs = bad.shape
    (sum0, out0), (sum1, out1) = (*sums, (None, None), (None, None))[:2]
    filled = [(t, math.prod(t.shape[1:])) for t in poisoned]
    (poisoned0, numel0), (poisoned1, numel1) = (*filled, (None, 0), (None, 0))[:2]
    counts, n_valid = valid if valid is not None else (None, None)
    block = 1024
    writers = max(1, min(32, triton.cdiv(max(numel0, numel1), block)))
    launch(
        finish_kernel, (n, writers), bad, sum0, out0, sum1, out1, counts, n_valid, bad,
        poisoned0, numel0, poisoned1, numel1, programs, BLOCK=block, num_warps=4,
    )  # fmt: skip
