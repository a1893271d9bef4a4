"""The native core's resampling (csrc/common/bilinear.h) and its transpose against F.interpolate in float64.

The margin of two classes, one of them 0, is the resampled other one: so the taps can be looked at alone.
"""

from __future__ import annotations

import random
import subprocess

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


def test_division_by_a_product() -> None:
    program = emulated.build([emulated.ROOT / "tests" / "cuda" / "divisor.cpp"], "divisor")
    draw = random.Random(0)
    near = [2**k + offset for k in (*range(33), 40, 62) for offset in (-1, 0, 1)]
    divisors = sorted({d for d in near if d > 0} | {draw.randrange(1, 2 ** draw.randint(1, 40)) for _ in range(1000)})
    pairs = [
        (n, d) for d in divisors for n in (0, d - 1, d, 2 * d - 1, 7 * d, 7 * d - 1, 2**31 - 1, 2**31 // d * d - 1)
    ]
    pairs += [(draw.randrange(2**31), d) for d in divisors]
    pairs += [(n, d) for d in (1, 2, 3, 641, 2**31 - 1, 2**31, 2**31 + 1) for n in near]
    pairs = [(n, d) for n, d in pairs if 0 <= n < 2**63]
    lines = "".join(f"{n} {d}\n" for n, d in pairs)
    result = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    assert [int(line) for line in result.stdout.split()] == [n // d for n, d in pairs]
