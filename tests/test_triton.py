"""What is Triton's own: many programs and tiles, images with bad labels, scalars, and that the kernels compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

import segadv
from segadv import functional as F
from segadv.ops import reference
from segadv.ops.triton_kernels import bilinear, configs, confusion, cross_entropy, margin, step, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "pixels": configs.Config(block=16, num_warps=1, unroll=2),
    "channels_last": configs.Config(block=16, num_warps=1, classes=2),
    "pixels_up": configs.Config(block=32, num_warps=1, rows=2, unroll=2),
    "gradient_up": configs.Config(block=4, num_warps=1, rows=2, classes=2),
    "step": configs.Config(block=16, num_warps=1),
}


@pytest.mark.parametrize(
    ("own", "align_corners"),
    [
        ((6, 7), False),
        ((6, 7), True),  # in channels_last
        ((4, 5), True),
        ((3, 4), False),
        ((1, 2), True),
        ((2, 3), True),  # five rows of a quad: the last of their tiles is not full
        ((1, 1), False),
        ((9, 3), True),
        ((8, 9), False),
    ],
    ids=str,
)
def test_tiles_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, own: tuple[int, int], align_corners: bool
) -> None:
    """Many tiles in every direction against the native backend, gradients and sums included."""
    monkeypatch.setattr(configs, "_INTERPRETED", configs._INTERPRETED | SMALL)
    monkeypatch.setattr(configs, "_of_device", lambda _: configs._DEFAULT | SMALL)
    z, y = torch.randn(2, 3, *own), torch.randint(0, 3, (2, 6, 7))
    if own == (6, 7) and align_corners:
        z = z.contiguous(memory_format=torch.channels_last)
    y[0, :2] = 255
    results = []
    for name, device in (("native", "cpu"), ("triton", DEVICE)):
        z, y = z.to(device), y.to(device)
        with segadv.backend(name):
            results.append(
                (
                    *F.gain_and_grad(z, y, align_corners=align_corners),
                    *F.loss_and_grad(z, y, loss="cospgd", align_corners=align_corners),
                    F.confusion_matrix(z, y, per_image=True, align_corners=align_corners),
                    F.argmax_labels(z, (6, 7), align_corners=align_corners),
                )
            )
    for native, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), native, rtol=2e-5, atol=2e-6)


@pytest.mark.skipif(not configs.INTERPRETED, reason="a GPU's programs run in no order")
@pytest.mark.parametrize("own", [(6, 7), (4, 5), (2, 3)], ids=str)
def test_programs_in_another_order(monkeypatch: pytest.MonkeyPatch, own: tuple[int, int]) -> None:
    """None writes what another one has written: the interpreter runs them in order, which would hide it."""
    monkeypatch.setattr(configs, "_INTERPRETED", configs._INTERPRETED | SMALL)
    z, y = torch.randn(2, 3, *own), torch.randint(0, 3, (2, 6, 7))
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def everything() -> list[Tensor]:
        with segadv.backend("triton"):
            return [
                *F.gain_and_grad(z, y),
                *F.loss_and_grad(z, y),
                F.pixel_margin(z, y),
                F.confusion_matrix(z, y),
                F.argmax_labels(z, (6, 7)),
            ]

    def backwards(*at: int) -> None:
        set_grid_idx(*(size - 1 - i for size, i in zip(builder.grid_dim, at, strict=True)))

    expected = everything()
    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    for ours, forwards in zip(everything(), expected, strict=True):
        assert torch.equal(ours, forwards)


@triton.jit
def axis_kernel(quads, w0, w1, firsts, size_in, size_out, align: tl.constexpr, block: tl.constexpr):
    o = tl.arange(0, block)
    quad = bilinear.quad_of(o, size_in, size_out, align)
    weight0, weight1 = bilinear.weights(o, quad, size_in, size_out, align, tl.float64)
    tl.store(quads + o, quad, mask=o < size_out)
    tl.store(w0 + o, weight0, mask=o < size_out)
    tl.store(w1 + o, weight1, mask=o < size_out)
    tl.store(firsts + o, bilinear.first_output(o, size_in, size_out, align), mask=o < size_in + 2)


@settings(max_examples=200, deadline=None)
@given(size_in=st.integers(1, 100), size_out=st.integers(1, 100), align_corners=st.booleans())
@example(size_in=89, size_out=712, align_corners=False)
@example(size_in=90, size_out=713, align_corners=True)
@example(size_in=1, size_out=1, align_corners=True)
@example(size_in=7, size_out=1, align_corners=True)
def test_taps(size_in: int, size_out: int, align_corners: bool) -> None:
    """Quads and weights along one axis against F.interpolate of the unit vectors."""
    quads = torch.full((size_out,), -1, dtype=torch.int32, device=DEVICE)
    w0, w1 = (torch.full((size_out,), torch.nan, dtype=torch.float64, device=DEVICE) for _ in range(2))
    firsts = torch.full((size_in + 2,), -1, dtype=torch.int32, device=DEVICE)
    with np.errstate(divide="raise"):  # the interpreter would make 0 of what on a GPU is any number
        axis_kernel[(1,)](quads, w0, w1, firsts, size_in, size_out, align_corners, 1024)
    quads, firsts = quads.long().cpu(), firsts.cpu()
    assert (quads.diff() >= 0).all()
    assert 0 <= quads.min() <= quads.max() <= size_in
    for q in range(size_in + 2):
        assert firsts[q] == (quads < q).sum()
    assert bilinear.largest_quad(size_in, size_out, align_corners) == quads.bincount().max()
    ours = torch.zeros(size_in + 2, size_out, dtype=torch.float64)
    ours.scatter_add_(0, quads.unsqueeze(0), w0.cpu().unsqueeze(0))
    ours.scatter_add_(0, quads.unsqueeze(0) + 1, w1.cpu().unsqueeze(0))
    assert (ours[0] == 0).all()  # what does not exist has no weight
    assert (ours[-1] == 0).all()
    unit = torch.eye(size_in, dtype=torch.float64)[:, None, None]
    theirs = torch.nn.functional.interpolate(unit, (1, size_out), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(ours[1:-1], theirs[:, 0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("along", ["x", "y"])
@pytest.mark.parametrize(
    ("size_out", "dtype"),
    [(41, torch.float32), (83, torch.float32), (49, torch.float64), (103, torch.float64)],
    ids=str,
)
def test_the_weight_in_the_middle_is_a_half(size_out: int, dtype: torch.dtype, along: str) -> None:
    """And so it would not be as a product with the quotient's rounded inverse: n * (1 / 2n) of these sizes is less."""
    z, y = torch.tensor([0.0, 1.0], dtype=dtype, device=DEVICE), torch.zeros(1, size_out, 1, device=DEVICE).byte()
    z = torch.stack([z, torch.zeros_like(z)]).view(1, 2, 2, 1).requires_grad_()
    if along == "x":
        z, y = z.detach().transpose(2, 3).contiguous().requires_grad_(), y.transpose(1, 2).contiguous()
    outgoing = torch.zeros(y.shape, dtype=dtype, device=DEVICE)
    outgoing.view(-1)[size_out // 2] = 1
    with segadv.backend("triton"):
        value = F.pixel_margin(z, y)
        (grad,) = torch.autograd.grad(value, z, outgoing)
    assert value.flatten()[size_out // 2].item() == 0.5
    assert grad[0, 0].flatten().tolist() == [0.5, 0.5]


@triton.jit
def far_kernel(quads, firsts, begin, size_in, size_out, align: tl.constexpr, block: tl.constexpr):
    o = begin + tl.arange(0, block)
    quad = bilinear.quad_of(o, size_in, size_out, align)
    tl.store(quads + tl.arange(0, block), quad)
    tl.store(firsts + tl.arange(0, block), bilinear.first_output(quad, size_in, size_out, align))


LARGE = bilinear.MAX_PRODUCT - 1


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, LARGE), (LARGE // 32, 32), (16, LARGE // 16), (23170, 23170), (40000, 13421)], ids=str
)
def test_the_largest_sizes(size_in: int, size_out: int, align_corners: bool) -> None:
    """Positions in int32 against integers without end, for the first and the last outputs."""
    assert size_in * size_out < bilinear.MAX_PRODUCT

    def quad_of(o: int) -> int:
        if align_corners:
            return o * (size_in - 1) // (size_out - 1) + 1
        return ((2 * o + 1) * size_in + size_out) // (2 * size_out)

    for begin in (0, size_out - 32):
        quads, firsts = (torch.full((32,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
        far_kernel[(1,)](quads, firsts, begin, size_in, size_out, align_corners, 32)
        assert quads.tolist() == [quad_of(o) for o in range(begin, begin + 32)]
        for quad, first in zip(quads.tolist(), firsts.tolist(), strict=True):
            assert 0 <= first < size_out
            assert quad_of(first) == quad
            assert first == 0 or quad_of(first - 1) < quad


@pytest.mark.parametrize("own", [(8, 10), (3, 4)], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("triton", torch.float32), ("triton", torch.bfloat16), ("reference", torch.float32)]
)
def test_bad_labels_make_their_image_nan_and_no_other(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, own: tuple[int, int]
) -> None:
    """What happens on a GPU, where nothing waits for a check: tried here with the check of CPU labels taken out."""
    for module in (margin, cross_entropy, confusion, reference):
        monkeypatch.setattr(module, "check_labels", lambda *_: None)
    device = "cpu" if name == "reference" else DEVICE  # on a GPU PyTorch's resampling has other bits every time
    z = torch.randn(3, 4, *own, device=device).to(dtype).requires_grad_()
    good = torch.randint(0, 4, (3, 8, 10), device=device)
    good[0, 0] = 255

    def everything(labels: Tensor) -> dict[str, Tensor]:
        results = {}
        results["gain_sum"], results["n_valid"], results["gain gradient"] = F.gain_and_grad(z, labels)
        results["loss_sum"], _, results["loss gradient"] = F.loss_and_grad(z, labels, loss="segpgd", step=1, steps=4)
        results["margin"] = F.pixel_margin(z, labels)
        results["loss"] = F.cross_entropy(z, labels, reduction="none")
        results["averaged_gain"] = F.averaged_gain(z, labels)
        for name in ("margin", "loss", "averaged_gain"):
            (results[f"gradient of {name}"],) = torch.autograd.grad(results[name].sum(), z)
        return {name: value.detach() for name, value in results.items()}

    with segadv.backend(name):
        expected = everything(good)
        expected.pop("n_valid")
        bad = good.clone()
        for at, label in {(7, 9): 4, (3, 2): -7, (0, 0): 2**32 + 1, (0, 1): 7, (1, 0): 5}.items():
            bad[(1, *at)] = label
        results = everything(bad)
        assert results.pop("n_valid").tolist() == [70, 75, 80]
        for what, value in results.items():
            assert value[1].isnan().all(), what
            assert torch.equal(value[[0, 2]], expected[what][[0, 2]]), what
        for per_image in (False, True):
            matrix = F.confusion_matrix(z, bad, per_image=per_image)
            assert matrix.invalid.item() == 5
            assert matrix.sum().item() == 70 + 75 + 80


def test_more_programs_than_are_added_at_once() -> None:
    """And results of which every program that writes NaN fills several parts."""
    partial, valid = torch.rand(3, 2500, device=DEVICE), torch.ones(3, 2500, dtype=torch.int32, device=DEVICE)
    bad = torch.zeros_like(valid)
    bad[1, 2400] = 1
    total, n_valid = torch.empty(3, device=DEVICE), torch.empty(3, dtype=torch.int64, device=DEVICE)
    results = [torch.zeros(3, 40000, device=DEVICE), torch.zeros(3, 70000, device=DEVICE)]
    tiles.finish(bad, sums=[(partial, total)], valid=(valid, n_valid), poisoned=results)
    for n in (0, 2):
        assert total[n].item() == pytest.approx(partial[n].double().sum().item())
    assert n_valid.tolist() == [2500] * 3
    for value in (total, *results):
        assert value[[0, 2]].isfinite().all()
        assert value[1].isnan().all()


@pytest.mark.parametrize("most", [1, 3, 11, 12])
def test_many_blocks_have_few_partial_sums(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Twelve blocks in each image, the last one not full."""
    monkeypatch.setattr(configs, "_INTERPRETED", configs._INTERPRETED | SMALL)
    monkeypatch.setattr(configs, "_of_device", lambda _: configs._DEFAULT | SMALL)
    monkeypatch.setattr(step, "_MOST_PARTIALS", most)
    images, grad, gain = torch.rand(2, 3, 7, 9), torch.randn(2, 3, 7, 9), torch.tensor([0.5, 2.0])
    assert step._absolute_sums(grad.to(DEVICE)).shape[1] == {1: 1, 3: 3, 11: 6, 12: 12}[most]
    with segadv.backend("native"):
        expected = (F.l1_norm(grad), *F.newton_step(images, grad, gain))
    with segadv.backend("triton"):
        found = (F.l1_norm(grad.to(DEVICE)), *F.newton_step(*(t.to(DEVICE) for t in (images, grad, gain))))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_numbers_reach_the_kernels_in_float64() -> None:
    """Triton alone would pass 0.1 as float32."""
    images = torch.full((2, 3), 0.5, dtype=torch.float64, device=DEVICE)
    with segadv.backend("triton"):
        stepped = F.sign_step(images, torch.ones_like(images), 0.1, origin=images, eps=0.07)
        capped = F.newton_step(images, torch.ones_like(images), images.new_ones(2), max_eps=0.1)[1]
        loss = F.segpgd_loss(images.new_tensor([[0.0, 0.0]]), torch.ones(1, dtype=torch.long, device=DEVICE), 1, 3)
    assert (stepped == 0.5 + 0.07).all()
    assert (capped == 0.1).all()
    torch.testing.assert_close(loss, images.new_tensor([2.0]).log() / 6, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("size", "stride", "size_out", "named"),
    [
        ((40000, 1), (0, 0), (40001, 1), r"40000 x 1 .* to 40001 x 1"),
        ((1, 40000), (0, 0), (1, 40001), r"1 x 40000 .* to 1 x 40001"),
        ((2, 2), (2**30, 1), (3, 3), rf"2 x 2 \(strides {2**30}, 1\) to 3 x 3"),
        ((2, 2), (1, 2**30), (3, 3), rf"2 x 2 \(strides 1, {2**30}\) to 3 x 3"),
        ((2, 2), (2**29, 2**29), (3, 3), rf"2 x 2 \(strides {2**29}, {2**29}\) to 3 x 3"),
    ],
)
def test_too_large_for_int32_is_refused(
    size: tuple[int, int], stride: tuple[int, int], size_out: tuple[int, int], named: str
) -> None:
    strides = [(0, 0, *stride)]
    with pytest.raises(ValueError, match=rf"logits must have h \* H and w \* W below .*, got {named}"):
        margin.tiles((1, 2, *size), size_out, False, torch.float32, torch.device("cpu"), strides)


@pytest.mark.parametrize(
    ("size_out", "walked"), [((2**15, 2**15), (1, 2**30)), ((2**15, 2**15 + 1), (2**15, 2**15 + 1))]
)
def test_columns_fit_int32(size_out: tuple[int, int], walked: tuple[int, int]) -> None:
    """Of an image without gaps one long row is made, unless it were so long that its pixels could not be counted."""
    row, plane = size_out[1], size_out[0] * size_out[1]
    strides = [(2 * plane, plane, row, 1), (plane, row, 1)]
    found = margin.tiles((1, 2, *size_out), size_out, False, torch.float32, torch.device("cpu"), strides)
    assert found.sizes == (2, *walked, *walked)


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    """The interpreter accepts much that the compiler does not. No register is spilled to speak of.

    And no innermost loop waits for a barrier: it computes in one layout. In channels_last the logits of several classes
    go from the threads that load them to those that own the pixels: once, between two barriers.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("triton_compile.py")
    result = subprocess.run(
        [sys.executable, str(program), target, "--few"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    kernels = {line.split(" | ")[2] for line in result.stdout.splitlines()}
    source = "".join(path.read_text() for path in Path(margin.__file__).parent.glob("*.py"))
    assert kernels == set(re.findall(r"def (\w+_kernel)\(", source))
    for line in result.stdout.splitlines():
        stack = re.search(r"stack (\d+)", line)
        assert stack is None or int(stack[1]) <= 16, line
        barriers, conversions = ("[02]", "[01]") if "256 -> 256 channels_last" in line else ("0", "0")
        assert bool(re.search(rf"barriers {barriers} ahead", line)) == target.startswith("cuda"), line
        reads = r"(loss_and_grad|cross_entropy_backward) \w*float(32|16) 256 -> 256 \| (cross_entropy|gradient)_kernel"
        if re.search(reads, line):  # no load is moved ahead of a store, and one alone leaves a GPU waiting for it
            assert (" ahead 4 " in line) == target.startswith("cuda"), line
        assert re.search(rf"\| {conversions} conversions$", line) or "256 -> 256" not in line, line
