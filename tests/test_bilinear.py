"""The native core's resampling (csrc/common/bilinear.h) and its transpose against F.interpolate in float64.

The margin of two classes, one of them 0, is the resampled other one: so the taps can be looked at alone.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable

import emulated
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import segadv
from segadv.functional import pixel_margin

SIZES = st.integers(1, 48)


@settings(max_examples=300, deadline=None)
@given(h=SIZES, w=SIZES, height=SIZES, width=SIZES, align_corners=st.booleans(), seed=st.integers(0, 2**31))
@example(h=1, w=1, height=7, width=9, align_corners=True, seed=0)
@example(h=7, w=9, height=1, width=1, align_corners=True, seed=0)
@example(h=7, w=9, height=1, width=1, align_corners=False, seed=0)
@example(h=2, w=2, height=2, width=3, align_corners=False, seed=0)
@example(h=89, w=59, height=712, width=472, align_corners=False, seed=0)
@example(h=90, w=60, height=713, width=473, align_corners=True, seed=0)
def test_taps_and_their_transpose(h: int, w: int, height: int, width: int, align_corners: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(1, 1, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
    outgoing = torch.randn(1, height, width, dtype=torch.float64, generator=generator)
    labels = torch.zeros(1, height, width, dtype=torch.uint8)
    with segadv.backend("native"):
        logits = torch.cat([plane, torch.zeros_like(plane)], dim=1)
        ours = pixel_margin(logits, labels, align_corners=align_corners)
        (grad,) = torch.autograd.grad(ours, plane, outgoing)
    theirs = F.interpolate(plane, (height, width), mode="bilinear", align_corners=align_corners)[:, 0]
    (expected,) = torch.autograd.grad(theirs, plane, outgoing)
    # F.interpolate rounds its scale before it multiplies: positions, and so values, agree to some 1e-13.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-11 * max(1.0, float(expected.abs().max())))


def answers(lines: Iterable[str]) -> list[list[int]]:
    """Of tests/cuda/axis.cpp, a list of numbers for every line."""
    program = emulated.build([emulated.ROOT / "tests" / "cuda" / "axis.cpp"], "axis")
    result = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [[int(number) for number in line.split()] for line in result.stdout.splitlines()]


def test_division_by_a_product() -> None:
    draw = random.Random(0)
    near = [2**k + offset for k in (*range(33), 40, 62) for offset in (-1, 0, 1)]
    divisors = sorted({d for d in near if d > 0} | {draw.randrange(1, 2 ** draw.randint(1, 40)) for _ in range(1000)})
    pairs = [
        (n, d) for d in divisors for n in (0, d - 1, d, 2 * d - 1, 7 * d, 7 * d - 1, 2**31 - 1, 2**31 // d * d - 1)
    ]
    pairs += [(draw.randrange(2**31), d) for d in divisors]
    pairs += [(n, d) for d in (1, 2, 3, 641, 2**31 - 1, 2**31, 2**31 + 1) for n in near]
    pairs = [(n, d) for n, d in pairs if 0 <= n < 2**63]
    assert answers(f"divide {n} {d}" for n, d in pairs) == [[n // d, 1] for n, d in pairs]


def test_outputs_of_a_quad() -> None:
    """From every output on, and from some behind; in 32 bits as in 64."""
    draw = random.Random(0)
    sizes = [(1, 1), (1, 9), (9, 1), (2, 3), (3, 2), (5, 40), (5, 41), (40, 5), (7, 7), (89, 712)]
    sizes += [(2**21, 2**24 + 1), (2**23 + 1, 2**26), (2**26, 2**26 - 1), (1, 2**27), (3, 2**29), (2**29, 2**30)]
    lines, expected = [], []
    for size_in, size_out in sizes:
        for align_corners in (False, True):
            step, start, denominator = 2 * size_in, size_in + size_out, 2 * size_out
            if align_corners:
                step, denominator = size_in - 1, max(size_out - 1, 1)
                start = denominator
            narrow = 2 * denominator + 16 * step < 2**31
            outputs = range(size_out) if size_out < 1000 else [draw.randrange(size_out) for _ in range(100)]
            for o in (*outputs, 0, size_out - 1):
                quad = (start + o * step) // denominator
                assert 0 <= quad <= size_in
                end = size_out if step == 0 else min(size_out, -(((quad + 1) * denominator - start) // -step))
                for behind in (0, 1, end - o - 1, end - o, end - o + 8):
                    rest = start + (o + behind) * step - quad * denominator
                    lines.append(f"axis {size_in} {size_out} {align_corners:d} {o + behind} {quad}")
                    expected.append([narrow, rest, max(end - o - behind, 0), 1])
    assert {narrow for narrow, *_ in expected} == {False, True}
    assert answers(lines) == expected
