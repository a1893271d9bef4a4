"""Bilinear resampling along one axis, exactly the taps of F.interpolate(mode="bilinear"), in one place.

The twin of csrc/common/bilinear.h, in integers: position and weight of an output are one quotient, so neither the
taps nor where they change depend on rounding, and no float64 is needed.

All outputs between two neighbouring inputs form a *quad* (an interval, along one axis). Quad q reads the inputs q - 1
and q, for q = 0 ... in: what lies before the first input or behind the last one are quads of their own, whose weight
is all on the input that exists. So input i receives from quad i (its weight w1) and quad i + 1 (w0), and from no
other: the transpose of the resampling, which the gradient needs, is a sum over neighbours.
"""

from collections import Counter
from functools import cache

import triton
import triton.language as tl

# Positions, 2 * input size * output size + output size, are computed in int32.
MAX_PRODUCT = 2**29


@triton.jit
def position_of(o, size_in, size_out, ALIGN: tl.constexpr):
    """(numerator, denominator) of the position of output o, in quads: never negative."""
    if ALIGN:
        denominator = tl.maximum(size_out - 1, 1)
        numerator = o * (size_in - 1) + denominator
    else:
        denominator = 2 * size_out
        numerator = (2 * o + 1) * size_in + size_out
    return numerator, denominator


@triton.jit
def quad_of(o, size_in, size_out, ALIGN: tl.constexpr):
    numerator, denominator = position_of(o, size_in, size_out, ALIGN)
    return numerator // denominator


@triton.jit
def weights(o, quad, size_in, size_out, ALIGN: tl.constexpr, A: tl.constexpr):
    """(w0 of input quad - 1, w1 of input quad) for an output in this quad."""
    numerator, denominator = position_of(o, size_in, size_out, ALIGN)
    # What depends on the quad alone leaves the loop over its outputs. Division is slow: a product, corrected by what it
    # leaves over (where multiplication and addition are fused, as on a GPU: then rounded once).
    between = (quad > 0) & (quad < size_in)
    divisor = denominator.to(A)
    slope = tl.where(between, 1.0 / divisor, 0.0).to(A)
    start = tl.where(quad == 0, 1.0, 0.0).to(A)
    rest = (numerator - quad * denominator).to(A)
    w1 = rest * slope
    w1 = tl.fma(tl.fma(-w1, divisor, rest), slope, w1) + start
    return 1.0 - w1, w1


@triton.jit
def forward_weights(o, quad, size_in, size_out, ALIGN: tl.constexpr, A: tl.constexpr):
    """The same, but behind the edges half and half, of an input that is read twice: a weight of 0 would make NaN of
    infinity."""
    w0, w1 = weights(o, quad, size_in, size_out, ALIGN, A)
    behind = (quad <= 0) | (quad >= size_in)
    return tl.where(behind, 0.5, w0).to(A), tl.where(behind, 0.5, w1).to(A)


@triton.jit
def first_output(quad, size_in, size_out, ALIGN: tl.constexpr):
    """The lowest output that lies in this quad or behind it; size_out for quads behind the last one."""
    if ALIGN:
        inputs, numerator = size_in - 1, (quad - 1) * tl.maximum(size_out - 1, 1)
    else:
        inputs, numerator = 2 * size_in, (2 * quad - 1) * size_out - size_in
    inputs, numerator = tl.maximum(inputs, 1), tl.maximum(numerator, 0)
    first = tl.minimum((numerator + inputs - 1) // inputs, size_out)  # of no outputs, aligned, it would be 1
    return tl.where(quad > size_in, size_out, first)


@cache
def largest_quad(size_in: int, size_out: int, align_corners: bool) -> int:
    """The most outputs that any quad has."""
    if align_corners:
        quads = [o * (size_in - 1) // max(size_out - 1, 1) + 1 for o in range(size_out)]
    else:
        quads = [((2 * o + 1) * size_in + size_out) // (2 * size_out) for o in range(size_out)]
    return max(Counter(quads).values(), default=0)
