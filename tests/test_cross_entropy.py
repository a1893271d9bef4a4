"""cross_entropy, segpgd_loss, cospgd_loss and loss_and_grad against the oracle, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor

import segadv
from segadv import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("cross_entropy", "segpgd", "cospgd")


def reduce(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """values and weights [N, H, W], both 0 at ignored pixels."""
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    dims = (1, 2) if reduction == "image" else (0, 1, 2)
    total = weights.sum(dims)
    return values.sum(dims) / torch.where(total == 0, 1, total)


def class_weights(case: oracle.Case, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    y, valid = oracle.split(case.labels, case.ignore_index)
    per_pixel = torch.ones(case.labels.shape, dtype=dtype) if weight is None else weight.to(dtype)[y]
    return torch.where(valid, per_pixel, 0)


def compare(
    ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], logits: Tensor, what: str, *, ulps: int = 0
) -> None:
    """Value and gradient of `ours` against the plain function in float64 and in the logits' dtype.

    ulps: the gradient may also be as far off as that of logits which differ by so many ulp. Where logits are 10^4
    apart, single pixels whose classes nearly tie make all of it, and the rounding of these is eager's luck.
    """
    z, z_eager = logits.detach().requires_grad_(), logits.detach().clone().requires_grad_()
    z64 = logits.detach().double().requires_grad_()
    value, eager, truth = ours(z), plain(z_eager), plain(z64)
    oracle.assert_accurate(value, eager, truth, what)
    oracle.assert_accurate(ours(logits.detach()), eager, truth, f"{what} without a gradient")
    outgoing = torch.randn(truth.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(value, z, outgoing.to(value.dtype))
    (grad_eager,) = torch.autograd.grad(eager, z_eager, outgoing.to(eager.dtype))
    (grad64,) = torch.autograd.grad(truth, z64, outgoing)
    assert grad.dtype is logits.dtype
    for _ in range(3 if ulps else 0):
        moved = 1 + ulps * torch.finfo(logits.dtype).eps * (2 * torch.randint(0, 2, logits.shape) - 1)
        z_moved = (logits.detach().double() * moved).requires_grad_()
        (grad_moved,) = torch.autograd.grad(plain(z_moved), z_moved, outgoing)
        grad_eager = max(grad_eager.double(), grad_moved, key=lambda grad: (grad - grad64).abs().max())
    oracle.assert_accurate(grad, grad_eager, grad64, f"gradient of {what}")
    oracle.assert_same_direction(grad, grad_eager, grad64, f"gradient of {what}")


FAR = [((3, 5), (24, 20)), ((4, 5), (32, 20)), ((4, 5), (16, 20)), ((4, 3), (6, 5)), ((3, 5), (23, 31))]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("own", "size"), FAR, ids=str)
def test_cross_entropy_of_logits_far_from_each_other(
    interpreted: bool, own: tuple[int, int], size: tuple[int, int], align_corners: bool
) -> None:
    """Large ones, and a class that is masked out; and labels that are clear: then the loss is a small difference."""
    y = torch.randint(0, 3, (2, *size))
    y[0, : size[0] // 2], y[1, :, : size[1] // 2] = 255, 255
    z = torch.randn(2, 4, *own)
    masked, clear = z.clone(), z.clone() / 10
    masked[:, 3] = torch.finfo(torch.float32).min / 2
    clear[:, 1] += 40 * torch.rand(2, *own).round() + 1
    cases = {"masked": (masked, y), "clear": (clear, torch.ones_like(y))}
    if interpreted:  # which takes seconds for a case
        del cases["clear" if align_corners else "masked"]
    else:  # the interpreter rounds the weights twice, as NumPy does not fuse
        cases |= {"z": (z, y), "100 z": (100 * z, y), "10^4 z": (1e4 * z, y)}
    for what, (logits, labels) in cases.items():

        def values(z: Tensor, labels: Tensor = labels) -> Tensor:
            return oracle.cross_entropy_map(z, labels, None, ignore_index=255, align_corners=align_corners)

        def ours(z: Tensor, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(z, labels, reduction="none", align_corners=align_corners)

        sums = (lambda z, ours=ours: ours(z).sum((1, 2)), lambda z, f=values: f(z).sum((1, 2)))
        compare(*sums, logits, what, ulps=2 if what == "10^4 z" else 0)
        oracle.assert_accurate(ours(logits), values(logits), values(logits.double()), f"pixels of {what}")


@pytest.mark.parametrize("margin", [15.0, 25.0])
@pytest.mark.parametrize("size", [(24, 24), (23, 31), (7, 5)], ids=str)
def test_pixels_that_are_clear(backend: str, size: tuple[int, int], margin: float) -> None:
    """All of them: where the label's softmax rounds to 1, no rounding may make noise of a gradient that is nearly 0."""
    z, y = torch.randn(1, 5, 3, 3), torch.full((1, *size), 2)
    z[:, 2] += margin
    z_eager, z64 = z.clone().requires_grad_(), z.double().requires_grad_()
    (grad_eager,) = torch.autograd.grad(oracle.cross_entropy_map(z_eager, y).sum(), z_eager)
    (grad64,) = torch.autograd.grad(oracle.cross_entropy_map(z64, y).sum(), z64)
    z.requires_grad_()
    values = F.cross_entropy(z, y, reduction="none")
    assert values.min() >= 0
    (grad,) = torch.autograd.grad(values.sum(), z)
    for ours in (grad, F.loss_and_grad(z.detach(), y)[2]):
        oracle.assert_accurate(ours, grad_eager, grad64, "gradient")


@pytest.mark.parametrize("logit", [0.7, 0.498878479])
@pytest.mark.parametrize("own", [(64, 64), (8, 8)], ids=str)
def test_the_mean_of_like_losses(backend: str, own: tuple[int, int], logit: float) -> None:
    z, y = torch.zeros(1, 2, *own), torch.zeros(1, 64, 64, dtype=torch.uint8)
    z[:, 0] = logit
    weight = torch.full((2,), 0.3)  # sums of weights are such sums, too
    mean, each = F.cross_entropy(z, y, weight=weight), F.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(mean, each[0, 0, 0], rtol=8 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("size", [(24, 24), (7, 5)], ids=str)
@pytest.mark.parametrize("factor", [3e9, 1e37])
def test_resampled_logits_as_large_as_can_be(backend: str, factor: float, size: tuple[int, int]) -> None:
    z, y = factor * torch.randn(1, 5, 3, 3), torch.randint(0, 5, (1, *size))
    z_eager = z.clone().requires_grad_()
    expected = oracle.cross_entropy_map(z_eager, y)
    (grad_expected,) = torch.autograd.grad(expected.sum(), z_eager)
    z.requires_grad_()
    values = F.cross_entropy(z, y, reduction="none")
    (grad,) = torch.autograd.grad(values.sum(), z)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * factor)
    assert grad_expected.isfinite().all()
    for ours in (grad, F.loss_and_grad(z.detach(), y)[2]):
        assert ours.isfinite().all()


def compare_gradients(z: torch.Tensor, y: torch.Tensor, *, tolerance: float) -> None:
    """Of the summed loss, through autograd and in one pass, with eager PyTorch in float64."""
    z64 = z.double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.cross_entropy_map(z64, y).sum(), z64)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="none").sum(), z)
    for ours in (grad, F.loss_and_grad(z.detach(), y)[2]):
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_neighbouring_logits_as_far_apart_as_can_be(backend: str) -> None:
    """Between them there is no number beyond the largest one; in line with them, a few pixels on, there is."""
    z = 1.69e38 * torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    compare_gradients(z.repeat(1, 1, 1, 3), torch.randint(0, 2, (1, 30, 30)), tolerance=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("of_label", [False, True])
@pytest.mark.parametrize("size", [(5, 5), (10, 15)])
def test_a_logit_of_infinity_makes_its_pixels_nan(
    backend: str, size: tuple[int, int], of_label: bool, loss: str
) -> None:
    """As in eager PyTorch, not infinite: value and gradient, of all classes; and no other pixel."""
    z, y = torch.randn(2, 3, 5, 5), torch.ones(2, *size, dtype=torch.long)
    z[0, 1 if of_label else 2, 2, 2] = torch.inf
    loss_sum, _, grad = F.loss_and_grad(z, y, loss=loss, step=1, steps=4)
    leaf = z.clone().requires_grad_()
    expected = oracle.cross_entropy_map(leaf, y)
    (grad_expected,) = torch.autograd.grad(expected.sum(), leaf)
    assert loss_sum[0].isnan()
    assert loss_sum[1].isfinite()
    assert torch.equal(grad.isnan(), grad_expected.isnan())
    assert grad.isinf().sum() == 0
    if loss == "cross_entropy":
        values = F.cross_entropy(z, y, reduction="none")
        torch.testing.assert_close(values, expected.detach(), equal_nan=True)


@pytest.mark.parametrize("loss", ["cross_entropy", "segpgd", "cospgd"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_logits_that_are_all_minus_infinity_make_their_pixel_nan(backend: str, layout: str, loss: str) -> None:
    z, y = torch.randn(2, 3, 5, 8), torch.ones(2, 5, 8, dtype=torch.long)
    z[0, :, 2, 3] = -torch.inf
    loss_sum, _, grad = F.loss_and_grad(oracle.in_layout(z, layout), y, loss=loss, step=1, steps=4)
    assert loss_sum.isnan().tolist() == [True, False]
    assert torch.equal(grad.isnan(), z.isinf())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [0, 2])
def test_a_class_of_minus_infinity(backend: str, masked: int, layout: str, loss: str) -> None:
    """The usual mask of a class that no pixel may have."""
    z, y = torch.randn(2, 3, 5, 8), torch.ones(2, 5, 8, dtype=torch.long)
    z[:, masked] = -torch.inf
    leaf = z.clone().requires_grad_()
    plain = {"cross_entropy": oracle.cross_entropy_map, "cospgd": oracle.cospgd_map}.get(loss)
    expected = (plain(leaf, y) if plain else oracle.segpgd_map(leaf, y, 1 / 8)).sum((1, 2))
    (grad_expected,) = torch.autograd.grad(expected.sum(), leaf)
    loss_sum, _, grad = F.loss_and_grad(oracle.in_layout(z, layout), y, loss=loss, step=1, steps=4)
    torch.testing.assert_close(loss_sum, expected.detach())
    torch.testing.assert_close(grad, grad_expected)
    assert (grad[:, masked] == 0).all()


@pytest.mark.parametrize("size", [(4, 6), (8, 15)], ids=str)
@pytest.mark.parametrize("label", [0, 1])
def test_of_equal_logits_the_lowest_class_is_predicted(backend: str, label: int, size: tuple[int, int]) -> None:
    """SegPGD takes a pixel for right where the label is that class."""
    z, y = torch.randn(1, 1, 4, 6).repeat(1, 3, 1, 1), torch.full((1, *size), label)
    weight = 1 / 8 if label else 7 / 8
    expected = torch.full((1,), weight * y.numel()) * torch.tensor(3.0).log()
    torch.testing.assert_close(F.loss_and_grad(z, y, loss="segpgd", step=1, steps=4)[0], expected)
    torch.testing.assert_close(F.segpgd_loss(z, y, 1, 4), expected / y.numel())


@pytest.mark.parametrize("own", [(4, 6), (2, 3)], ids=str)
def test_what_is_kept_of_a_pixel_is_zero_where_it_is_not_valid(backend: str, own: tuple[int, int]) -> None:
    """So that a backward on another backend may read it, also of logits that are NaN."""
    z, y = torch.randn(1, 3, *own), torch.full((1, 4, 6), 255)
    z[0, 2, 0, 0] = torch.nan
    y[0, 3, 5] = 1
    ops = torch.ops.segadv
    kept = [
        *ops.cross_entropy(z, y, None, "cross_entropy", 0.0, False, 255, False, True, True)[3:5],
        *ops.cross_entropy(z, y, None, "segpgd", 0.25, False, 255, False, False, True)[3:],
        *ops.cross_entropy(z, y, None, "cospgd", 0.0, False, 255, False, False, True)[3:],
    ]
    assert len(kept) == 8
    for values in kept:
        assert (values.flatten()[:-1] == 0).all()
        assert values[0, 3, 5].isfinite()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("corner", ["first", "last"])
@pytest.mark.parametrize("own", [(4, 6), (2, 3)], ids=str)
def test_nan_under_void_pixels_reaches_nothing(backend: str, own: tuple[int, int], corner: str, loss: str) -> None:
    z, y = torch.randn(2, 3, *own), torch.zeros(2, 4, 6, dtype=torch.long)
    z[0, 2, 0, 0] = torch.nan
    y[0, :3, :4] = 255
    if corner == "last":
        z, y = z.flip(2, 3), y.flip(1, 2)
        y[0, 0, 2:] = 255  # eager PyTorch, and native, multiply the last of two rows there by the weight 0
    for value in F.loss_and_grad(z, y, loss=loss, step=1, steps=4):
        assert value.isfinite().all()
    z.requires_grad_()
    value = {
        "cross_entropy": lambda: F.cross_entropy(z, y, reduction="none"),
        "segpgd": lambda: F.segpgd_loss(z, y, 1, 4),
        "cospgd": lambda: F.cospgd_loss(z, y),
    }[loss]()
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("own", [(4, 6), (2, 3)], ids=str)
def test_void_pixels_of_logits_far_from_zero(backend: str, own: tuple[int, int], dtype: torch.dtype) -> None:
    """Whose exponential is infinite."""
    z, y = 1000 + torch.randn(2, 3, *own).to(dtype), torch.randint(0, 3, (2, 4, 6))
    y[0, :3, :4] = 255
    compare_gradients(z, y, tolerance=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "image", "sum", "none"])
@pytest.mark.parametrize("own", [(6, 8), (4, 5), (3, 4)], ids=str)
def test_the_gradient_is_weighted_by_the_class(backend: str, own: tuple[int, int], reduction: str) -> None:
    """However the forward computes it."""
    z, y = torch.randn(2, 3, *own, requires_grad=True), torch.randint(0, 3, (2, 6, 8))
    y[0, 1] = 255
    weight = torch.tensor([0.1, 1.0, 7.0])
    values = oracle.cross_entropy_map(z, y, weight)
    expected = reduce(values, torch.where(y == 255, 0, weight[y % 3]), reduction)
    (grad,) = torch.autograd.grad(F.cross_entropy(z, y, weight=weight, reduction=reduction).sum(), z)
    (grad_expected,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(grad, grad_expected)


@pytest.mark.parametrize("size", [(16, 16), (7, 5)], ids=str)
def test_small_outgoing_gradients_of_large_losses(backend: str, size: tuple[int, int]) -> None:
    """Divided by the sum of exponentials relative to the label's they would be subnormal."""
    z, y = torch.randn(1, 4, 4, 4), torch.ones(1, *size, dtype=torch.long)
    z[:, 1] -= 60
    z.requires_grad_()
    value = F.cross_entropy(z, y, reduction="sum")
    small, expected = (torch.autograd.grad(factor * value, z, retain_graph=True)[0] for factor in (1e-20, 1.0))
    torch.testing.assert_close(small * 1e20, expected, rtol=1e-5, atol=1e-5)


def test_cosine_where_the_labels_class_is_masked_out(backend: str) -> None:
    z, y = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 24, 40))
    z[:, 3] = torch.finfo(torch.float32).min
    expected = oracle.cospgd_map(z, y).sum((1, 2))
    assert expected.isfinite().all()
    torch.testing.assert_close(F.loss_and_grad(z, y, loss="cospgd")[0], expected)


@pytest.mark.parametrize("seed", range(len(oracle.SMOOTH)))
def test_smooth_logits(backend: str, seed: int) -> None:
    case = oracle.smooth_case(seed)
    for name in LOSSES:
        steps = {"step": 1, "steps": 3} if name == "segpgd" else {}

        def plain(z: Tensor, name: str = name) -> Tensor:
            if name == "segpgd":
                return oracle.segpgd_map(z, case.labels, 1 / 6, **case.options)
            if name == "cospgd":
                return oracle.cospgd_map(z, case.labels, **case.options)
            return oracle.cross_entropy_map(z, case.labels, **case.options)

        z_eager, z64 = case.logits.clone().requires_grad_(), case.logits.double().requires_grad_()
        eager, truth = plain(z_eager), plain(z64)
        loss_sum, _, grad = F.loss_and_grad(case.logits, case.labels, loss=name, **steps, **case.options)
        oracle.assert_accurate(loss_sum, eager.sum((1, 2)), truth.sum((1, 2)), name)
        (grad_eager,) = torch.autograd.grad(eager.sum(), z_eager)
        (grad64,) = torch.autograd.grad(truth.sum(), z64)
        oracle.assert_accurate(grad, grad_eager, grad64, f"gradient of {name}")
        oracle.assert_same_direction(grad, grad_eager, grad64, f"gradient of {name}")


@pytest.mark.parametrize("at", [(2, 0), (2, 4), (0, 2), (4, 2)], ids=str)
def test_nan_at_an_edge_does_not_reach_its_neighbours_in_memory(backend: str, at: tuple[int, int]) -> None:
    z, y = torch.randn(1, 3, 5, 5), torch.randint(0, 3, (1, 10, 10))
    z[(0, 1, *at)] = torch.nan
    z_eager = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.cross_entropy_map(z_eager, y).sum(), z_eager)
    torch.testing.assert_close(F.loss_and_grad(z, y)[2], expected, equal_nan=True)


def test_nan_reaches_the_gradient_of_its_neighbours_alone(backend: str) -> None:
    z, y = torch.randn(2, 4, 5, 9), torch.randint(0, 4, (2, 20, 45))
    z[0, 1, 2, 4] = torch.nan
    z_eager = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.cross_entropy_map(z_eager, y).sum(), z_eager)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)
    for ours in (F.loss_and_grad(z.detach(), y)[2], grad):
        assert torch.equal(ours.isfinite(), expected.isfinite())
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_cross_entropy(backend: str, seed: int, dtype: torch.dtype, largest: int) -> None:
    case = oracle.random_case(seed, dtype, largest=largest)
    # Both, and all four, also among the few cases of slow backends (conftest.py).
    weight = torch.rand(case.logits.shape[1]) + 0.1 if (seed + 1) // 2 % 2 else None
    reduction = ("mean", "image", "sum", "none")[(seed // 2 + DTYPES.index(dtype)) % 4]

    def plain(z: Tensor) -> Tensor:
        values = oracle.cross_entropy_map(
            z, case.labels, None if weight is None else weight.to(z.dtype), **case.options
        )
        # The mean's denominator is an integer or a sum of weights: not rounded to half precision by the yardstick.
        return reduce(values.float() if z.dtype in (torch.float16, torch.bfloat16) else values,
                      class_weights(case, weight, torch.float64 if z.dtype is torch.float64 else torch.float32),
                      reduction)  # fmt: skip

    compare(
        lambda z: F.cross_entropy(z, case.labels, weight=weight, reduction=reduction, **case.options),
        plain,
        case.logits,
        f"cross_entropy {reduction}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(32))
def test_weighted_losses(backend: str, seed: int, dtype: torch.dtype, largest: int) -> None:
    case = oracle.random_case(seed, dtype, largest=largest)
    targeted = bool((seed // 2 + DTYPES.index(dtype)) % 2)
    step, steps = seed % 7, 7
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def plain_segpgd(z: Tensor) -> Tensor:
        values = oracle.segpgd_map(z, case.labels, step / (2 * steps), targeted, **case.options)
        return oracle.mean_over_valid(values.to(torch.promote_types(z.dtype, wide)), case.labels, case.ignore_index)

    def plain_cospgd(z: Tensor) -> Tensor:
        values = oracle.cospgd_map(z, case.labels, targeted, **case.options)
        return oracle.mean_over_valid(values.to(torch.promote_types(z.dtype, wide)), case.labels, case.ignore_index)

    compare(
        lambda z: F.segpgd_loss(z, case.labels, step, steps, targeted=targeted, **case.options),
        plain_segpgd,
        case.logits,
        "segpgd_loss",
    )
    compare(
        lambda z: F.cospgd_loss(z, case.labels, targeted=targeted, **case.options),
        plain_cospgd,
        case.logits,
        "cospgd_loss",
    )


def plain_map(loss: str, case: oracle.Case, targeted: bool) -> Callable[[Tensor], Tensor]:
    """logits -> loss [N, H, W] after 3 of 5 steps."""
    return {
        "cross_entropy": lambda z: oracle.cross_entropy_map(z, case.labels, **case.options),
        "segpgd": lambda z: oracle.segpgd_map(z, case.labels, 0.3, targeted, **case.options),
        "cospgd": lambda z: oracle.cospgd_map(z, case.labels, targeted, **case.options),
    }[loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_loss_and_grad(backend: str, seed: int, dtype: torch.dtype, largest: int, loss: str) -> None:
    case = oracle.random_case(100 + seed, dtype, largest=largest)
    targeted = bool((seed // 2 + DTYPES.index(dtype)) % 2)
    plain = plain_map(loss, case, targeted)
    loss_sum, n_valid, grad = F.loss_and_grad(
        case.logits, case.labels, loss=loss, step=3, steps=5, targeted=targeted, **case.options
    )
    z_eager, z64 = case.logits.detach().clone().requires_grad_(), case.logits.double().requires_grad_()
    eager, truth = plain(z_eager).sum((1, 2)), plain(z64).sum((1, 2))
    oracle.assert_accurate(loss_sum, eager, truth, loss)
    assert torch.equal(n_valid, (case.labels.long() != case.ignore_index).sum((1, 2)))
    (grad_eager,) = torch.autograd.grad(eager.sum(), z_eager)
    (grad64,) = torch.autograd.grad(truth.sum(), z64)
    oracle.assert_accurate(grad, grad_eager, grad64, f"grad of {loss}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_classes_that_weigh_alike(backend: str, seed: int, dtype: torch.dtype, largest: int, loss: str) -> None:
    case = oracle.random_case(140 + seed, dtype, largest=largest)
    targeted = bool((seed + DTYPES.index(dtype)) % 2)
    weight = torch.zeros(case.labels.shape, dtype=torch.float64)
    for own, of_image in zip(case.labels.long(), weight, strict=True):
        found = [label for label in own.unique().tolist() if label != case.ignore_index]
        for label in found:
            valid = (own != case.ignore_index).sum()
            of_image[own == label] = valid.double() / (len(found) * (own == label).sum())
    plain = plain_map(loss, case, targeted)
    loss_sum, n_valid, grad = F.loss_and_grad(
        case.logits, case.labels, loss=loss, step=3, steps=5, targeted=targeted, balanced=True, **case.options
    )
    z_eager, z64 = case.logits.detach().clone().requires_grad_(), case.logits.double().requires_grad_()
    eager, truth = ((weight.to(plain(z).dtype) * plain(z)).sum((1, 2)) for z in (z_eager, z64))
    oracle.assert_accurate(loss_sum, eager, truth, loss)
    assert torch.equal(n_valid, (case.labels.long() != case.ignore_index).sum((1, 2)))
    (grad_eager,) = torch.autograd.grad(eager.sum(), z_eager)
    (grad64,) = torch.autograd.grad(truth.sum(), z64)
    oracle.assert_accurate(grad, grad_eager, grad64, f"grad of {loss}")


def test_classes_weigh_alike_in_every_image_by_itself(backend: str) -> None:
    """The mean over an image's classes of their means, whatever else is in the batch; 0 where all is void."""
    z, y = torch.randn(4, 5, 3, 4), torch.full((4, 6, 8), 255)
    y[0], y[1, :3] = 2, torch.tensor([0, 4] * 4)
    y[2, 0, 0], y[2, 1:] = 3, 1
    loss_sum, n_valid, grad = F.loss_and_grad(z, y, balanced=True)
    losses = oracle.cross_entropy_map(z, y)
    means = [
        losses[0].mean(),
        (losses[1][y[1] == 0].mean() + losses[1][y[1] == 4].mean()) / 2,
        (losses[2, 0, 0] + losses[2, 1:].mean()) / 2,
        torch.zeros(()),
    ]
    assert n_valid.tolist() == [48, 24, 41, 0]
    torch.testing.assert_close(loss_sum / n_valid.clamp(min=1), torch.stack(means))
    assert not grad[3].any()
    for one in range(4):
        alone = F.loss_and_grad(z[one : one + 1], y[one : one + 1], balanced=True)
        torch.testing.assert_close(alone[2][0], grad[one])
        torch.testing.assert_close(alone[0][0], loss_sum[one])


def test_classes_weigh_alike_in_classification(backend: str) -> None:
    z, y = torch.randn(6, 5), torch.tensor([0, 1, 1, 4, 255, 2])
    for ours, plain in zip(F.loss_and_grad(z, y, balanced=True), F.loss_and_grad(z, y), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("own", [(4, 5), (3, 4), (7, 6)])
def test_gradcheck(backend: str, slow: bool, own: tuple[int, int], align_corners: bool) -> None:
    z = torch.randn(2, 4, *own, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 4, (2, 4, 5))
    y[0, 0] = 255
    weight = torch.rand(4, dtype=torch.float64)
    # One kernel serves all of them; interpreted or emulated, two.
    for reduction in ("mean", "none") if slow else ("mean", "image", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction: F.cross_entropy(z, y, weight=weight, reduction=r, align_corners=align_corners),
            z,
            fast_mode=slow,  # along random directions
        )


def test_reductions_are_those_of_torch(backend: str) -> None:
    z, y = torch.randn(3, 5, 6, 7), torch.randint(0, 5, (3, 6, 7))
    y[1, 2:4] = 255
    weight = torch.rand(5)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            F.cross_entropy(z, y, weight=weight, reduction=reduction),
            torch.nn.functional.cross_entropy(z, y, weight=weight, reduction=reduction, ignore_index=255),
        )


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_large_logits(backend: str, scale: float) -> None:
    z = torch.randn(2, 5, 6, 7) * scale
    y = torch.randint(0, 5, (2, 6, 7))
    z, z64 = z.requires_grad_(), z.double().requires_grad_()
    value, truth = F.cross_entropy(z, y), torch.nn.functional.cross_entropy(z64, y)
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    (grad,), (grad64,) = torch.autograd.grad(value, z), torch.autograd.grad(truth, z64)
    atol = 4 * 2**-23 / y.numel()  # where a probability is near 1, 1 - p is known to some ulp of 1
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-5, atol=atol)
    torch.testing.assert_close(F.loss_and_grad(z, y)[2].double() / y.numel(), grad64, rtol=1e-5, atol=atol)


def test_exponential_and_logarithm_to_a_few_ulp(backend: str) -> None:
    """Of two logits down to where float32 ends: sigmoid(-d) and log(1 + exp(-d)). Of equal logits: log(C)."""
    eps = torch.finfo(torch.float32).eps
    distance = torch.linspace(0, 87, 4096).view(1, 64, 64)
    z, y = torch.stack([torch.zeros_like(distance), -distance], dim=1), torch.zeros(1, 64, 64, dtype=torch.uint8)
    losses, grad = F.cross_entropy(z, y, reduction="none").double(), F.loss_and_grad(z, y)[2].double()
    d = distance.double()
    torch.testing.assert_close(losses, (-d).exp().log1p(), rtol=2 * eps, atol=eps)
    relative = (grad[:, 1] / (-d).sigmoid() - 1).abs()
    assert (relative <= (4 + d) * eps).all()  # 2^(d log2(e)), as a GPU computes it, has the rounding of its exponent
    if backend == "native" and not z.is_cuda:
        assert relative.max() <= 4 * eps
    for classes in (*range(2, 40), 300):
        loss = F.cross_entropy(torch.zeros(1, classes), torch.zeros(1, dtype=torch.long)).item()
        assert loss == pytest.approx(math.log(classes), rel=2 * eps)


@pytest.mark.parametrize("at", [(2, 3), (-1, -1), (0, 0)])
def test_a_class_that_is_masked_out_at_one_logit(backend: str, at: tuple[int, int]) -> None:
    z, y = torch.randn(1, 4, 5, 7), torch.randint(0, 3, (1, 20, 42))
    z[(0, 3, *at)] = -torch.inf
    leaf, leaf64 = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, expected = F.cross_entropy(leaf, y), oracle.cross_entropy_map(leaf64, y).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (grad,), (grad64,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf64)
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(F.loss_and_grad(z, y)[2].double() / y.numel(), grad64, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("own", [(4, 6), (2, 3)])
def test_nan_stays_in_its_image_and_out_of_ignored_pixels(backend: str, own: tuple[int, int]) -> None:
    z, y = torch.randn(2, 3, *own), torch.zeros(2, 4, 6, dtype=torch.long)
    z[0, 1, 0, 0] = torch.nan
    loss = F.cross_entropy(z, y, reduction="image")
    assert loss[0].isnan()
    assert loss[1].isfinite()
    y[0, :3, :4] = 255
    z.requires_grad_()
    loss = F.cross_entropy(z, y, reduction="mean")
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z)[0].isfinite().all()
    for name in LOSSES:
        loss_sum, _, grad = F.loss_and_grad(z, y, loss=name, step=1, steps=4)
        assert loss_sum.isfinite().all()
        assert grad.isfinite().all()


def test_all_ignored_and_empty(backend: str) -> None:
    y = torch.full((2, 8, 10), 255)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    for reduction in ("mean", "image", "sum", "none"):
        loss = F.cross_entropy(z, y, reduction=reduction)
        assert (loss == 0).all()
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert (grad == 0).all()
    z, y = torch.randn(0, 3, 4, 5, requires_grad=True), torch.zeros(0, 8, 10, dtype=torch.long)
    assert F.cross_entropy(z, y).item() == 0
    assert F.cross_entropy(z, y, reduction="image").shape == (0,)
    assert F.loss_and_grad(z, y)[2].shape == z.shape


def test_segpgd_weights_at_both_ends(backend: str) -> None:
    """Step 0: only correct pixels count. Targeted: only wrong ones. lambda never reaches 1/2."""
    z, y = torch.randn(1, 4, 6, 6), torch.randint(0, 4, (1, 6, 6))
    correct = z.argmax(1) == y
    loss = oracle.cross_entropy_map(z, y)
    torch.testing.assert_close(F.segpgd_loss(z, y, 0, 1), (loss * correct).mean((1, 2)))
    torch.testing.assert_close(F.segpgd_loss(z, y, 0, 10), (loss * correct).mean((1, 2)))
    torch.testing.assert_close(F.segpgd_loss(z, y, 0, 10, targeted=True), (loss * ~correct).mean((1, 2)))
    weights = torch.where(correct, 0.55, 0.45)
    torch.testing.assert_close(F.segpgd_loss(z, y, 9, 10), (loss * weights).mean((1, 2)))


def test_classification(backend: str) -> None:
    z, y = torch.randn(5, 7), torch.randint(0, 7, (5,))
    torch.testing.assert_close(F.cross_entropy(z, y), torch.nn.functional.cross_entropy(z, y))
    assert F.cross_entropy(z, y, reduction="none").shape == (5,)
    assert F.loss_and_grad(z, y)[2].shape == z.shape


@pytest.mark.parametrize("own", [(61, 83), (9, 11)])
def test_same_bits_for_any_number_of_threads(own: tuple[int, int]) -> None:
    z = torch.randn(3, 19, *own, requires_grad=True)
    y = torch.randint(0, 19, (3, 61, 83))
    before, results = torch.get_num_threads(), []
    try:
        with segadv.backend("native"):
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                loss = F.cross_entropy(z, y, reduction="image")
                (grad,) = torch.autograd.grad(loss.sum(), z)
                results.append((loss.detach(), grad, *F.loss_and_grad(z, y, loss="cospgd")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_half_precision_is_more_exact_than_eager() -> None:
    """Nothing is rounded between the interpolation and the loss."""
    z = (torch.randn(2, 19, 16, 16) * 4).bfloat16()
    y = torch.randint(0, 19, (2, 128, 128))
    truth = oracle.cross_entropy_map(z.double(), y).mean()
    eager = oracle.cross_entropy_map(z, y).float().mean()
    with segadv.backend("native"):
        ours = F.cross_entropy(z, y)
    assert (ours - truth).abs() < 0.01 * (eager - truth).abs()


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("incoming", [torch.inf, torch.nan])
def test_overflow_leaves_images_without_labels_alone(backend: str, incoming: float, size: int) -> None:
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = torch.full((2, size, size), 255)
    for loss in (F.cross_entropy(z, y, reduction="image"), F.averaged_gain(z, y)):
        (grad,) = torch.autograd.grad(loss, z, torch.full((2,), incoming))
        assert (grad == 0).all()


def test_means_in_float16_over_more_pixels_than_it_can_count() -> None:
    """The gradient of a sum would overflow, that of the mean does not."""
    z = torch.zeros(1, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    y = torch.zeros(1, 400, 400, dtype=torch.uint8)
    for mean, expected in ((F.cross_entropy(z, y), [-0.5, 0.5]), (F.averaged_gain(z, y).sum(), [1.0, -1.0])):
        (grad,) = torch.autograd.grad(mean, z)
        assert grad.flatten().tolist() == pytest.approx(expected, rel=1e-3)
