"""pixel_margin, averaged_gain and gain_and_grad against the oracle, on every backend."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

import segadv
from segadv import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gain_of(logits: Tensor, case: oracle.Case) -> Tensor:
    margin = oracle.pixel_margin(logits, case.labels, **case.options)
    return oracle.mean_over_valid(margin, case.labels, case.ignore_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(50))
def test_random_cases(backend: str, seed: int, dtype: torch.dtype, largest: int) -> None:
    case = oracle.random_case(seed, dtype, largest=largest)
    assert case.left_out <= 0.05 * case.labels.numel() + 1
    z, z_eager = case.logits.detach().requires_grad_(), case.logits.detach().clone().requires_grad_()
    z64 = case.logits.detach().double().requires_grad_()
    outgoing = torch.randn(case.labels.shape, dtype=torch.float64)

    margin = F.pixel_margin(z, case.labels, **case.options)
    eager = oracle.pixel_margin(z_eager, case.labels, **case.options)
    truth = oracle.pixel_margin(z64, case.labels, **case.options)
    oracle.assert_accurate(margin, eager, truth, "pixel_margin")
    (grad,) = torch.autograd.grad(margin, z, outgoing.to(margin.dtype))
    (grad_eager,) = torch.autograd.grad(eager, z_eager, outgoing.to(eager.dtype))
    (grad64,) = torch.autograd.grad(truth, z64, outgoing)
    assert grad.dtype is dtype
    oracle.assert_accurate(grad, grad_eager, grad64, "gradient of pixel_margin")
    oracle.assert_same_direction(grad, grad_eager, grad64, "gradient of pixel_margin")

    gain, gain64 = F.averaged_gain(z, case.labels, **case.options), gain_of(z64, case)
    eager = gain_of(z_eager, case)
    magnitude = oracle.mean_over_valid(truth.abs(), case.labels, case.ignore_index)
    oracle.assert_accurate(gain, eager, gain64, "averaged_gain", addends=magnitude)
    per_image = torch.arange(1.0, len(gain) + 1)
    (grad,) = torch.autograd.grad(gain, z, per_image.to(gain.dtype))
    (grad_eager,) = torch.autograd.grad(eager, z_eager, per_image.to(eager.dtype))
    (grad64,) = torch.autograd.grad(gain64, z64, per_image.double())
    oracle.assert_accurate(grad, grad_eager, grad64, "gradient of averaged_gain")
    oracle.assert_same_direction(grad, grad_eager, grad64, "gradient of averaged_gain")

    gain_sum, n_valid, grad = F.gain_and_grad(z, case.labels, **case.options)
    assert not gain_sum.requires_grad
    assert not grad.requires_grad
    assert torch.equal(n_valid, (case.labels.long() != case.ignore_index).sum((1, 2)))
    eager, sum64 = (oracle.pixel_margin(x, case.labels, **case.options).sum((1, 2)) for x in (z_eager, z64))
    oracle.assert_accurate(gain_sum, eager, sum64, "gain_sum", addends=truth.abs().sum((1, 2)))
    (grad_eager,) = torch.autograd.grad(eager.sum(), z_eager)
    (grad64,) = torch.autograd.grad(sum64.sum(), z64)
    oracle.assert_accurate(grad, grad_eager, grad64, "grad of gain_and_grad")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("own", [(4, 5), (3, 4), (7, 6), (1, 1)])
def test_gradcheck(backend: str, slow: bool, own: tuple[int, int], align_corners: bool) -> None:
    z = torch.randn(2, 4, *own, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 4, (2, 4, 5))
    y[0, 0] = 255
    options = {"align_corners": align_corners}
    # A step of 1e-6 does not reach a tie with these numbers.
    for operation in (F.pixel_margin, F.averaged_gain):
        assert torch.autograd.gradcheck(
            lambda z, f=operation: f(z, y, **options),
            z,
            eps=1e-6,
            atol=1e-7,
            fast_mode=slow,  # along random directions
        )


@pytest.mark.parametrize("size", [(6, 4), (2, 12), (4, 9), (4, 24), (7, 6), (16, 6), (64, 24)], ids=str)
def test_sizes_that_are_alike(backend: str, size: tuple[int, int]) -> None:
    """As many pixels, rows or columns as the logits have: resampled none the less. And 16 rows, 4 columns for each."""
    z, y = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randint(0, 5, (2, *size))
    exact, outgoing = z.detach().double().requires_grad_(), torch.randn(y.shape)
    margin, expected = F.pixel_margin(z, y), oracle.pixel_margin(exact, y)
    (grad,) = torch.autograd.grad(margin, z, outgoing)
    (exact_grad,) = torch.autograd.grad(expected, exact, outgoing.double(), retain_graph=True)
    (exact_sum,) = torch.autograd.grad(expected.sum(), exact)
    for ours, theirs in ((margin, expected), (grad, exact_grad), (F.gain_and_grad(z, y)[2], exact_sum)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(F.confusion_matrix(z, y), oracle.confusion(z, y).sum(0))


def test_by_hand(backend: str) -> None:
    z = torch.tensor([[[[1.0, 0.0]], [[3.0, 5.0]], [[2.0, -1.0]]]], requires_grad=True)  # [1, 3, 1, 2]
    y = torch.tensor([[[1, 0]]])
    assert F.pixel_margin(z, y).tolist() == [[[1.0, -5.0]]]
    gain = F.averaged_gain(z, y)
    assert gain.tolist() == [-2.0]
    gain.sum().backward()
    assert z.grad is not None
    assert z.grad[0, :, 0].tolist() == [[0.0, 0.5], [0.5, -0.5], [-0.5, 0.0]]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_ties_go_to_the_lowest_class(backend: str, label: int) -> None:
    z, y = torch.zeros(1, 3, 1, 1), torch.tensor([[[label]]])
    gain_sum, _, grad = F.gain_and_grad(z, y)
    assert gain_sum.item() == 0
    expected = torch.zeros(3)
    expected[label] = 1
    expected[1 if label == 0 else 0] = -1
    assert torch.equal(grad[0, :, 0, 0], expected)


@pytest.mark.parametrize("label", [0, 1, 2, 3])
def test_resampled_ties_go_to_the_lowest_class(backend: str, label: int) -> None:
    """Of three equal planes of logits above a fourth one."""
    z, y = torch.randn(1, 1, 2, 3).repeat(1, 4, 1, 1), torch.full((1, 8, 15), label)
    z[:, 1] -= 9
    grad = F.gain_and_grad(z, y)[2]
    runner_up = 2 if label == 0 else 0
    assert grad.sum((0, 2, 3)).tolist() == pytest.approx([120 * ((c == label) - (c == runner_up)) for c in range(4)])
    assert (F.argmax_labels(z, (8, 15)) == 0).all()


@pytest.mark.parametrize(("own", "void"), [((8, 8), 0), ((2, 2), 2)], ids=["full", "up"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_other_classes_all_minus_infinity(backend: str, label: int, own: tuple[int, int], void: int) -> None:
    """Resampled: where no weight is 0, by which eager PyTorch multiplies infinity."""
    z, y = torch.full((1, 3, *own), -torch.inf), torch.full((1, 8, 8), 255)
    z[0, label], y[:, void : 8 - void, void : 8 - void] = 2.0, label
    gain_sum, n_valid, grad = F.gain_and_grad(z, y)
    assert gain_sum.item() == torch.inf
    count, runner_up = int(n_valid), 1 if label == 0 else 0
    assert grad.sum((0, 2, 3)).tolist() == [count * ((c == label) - (c == runner_up)) for c in range(3)]


@pytest.mark.parametrize("own", [(4, 6), (2, 3)])
@pytest.mark.parametrize("where", ["label", "other"])
def test_nan_stays_in_its_pixels_and_its_image(backend: str, where: str, own: tuple[int, int]) -> None:
    z, y = torch.randn(2, 3, *own), torch.zeros(2, 4, 6, dtype=torch.long)
    z[0, 0 if where == "label" else 2, 0, 0] = torch.nan
    margin, gain = F.pixel_margin(z, y), F.averaged_gain(z, y)
    assert margin[0, 0, 0].isnan()
    assert gain[0].isnan()
    assert gain[1].isfinite()
    assert margin[1].isfinite().all()
    y[0, :3, :4] = 255  # all that the NaN reaches
    assert F.averaged_gain(z, y).isfinite().all()
    assert F.gain_and_grad(z, y)[2].isfinite().all()


def test_the_runner_up_of_a_label_that_is_nan(backend: str) -> None:
    z, y = torch.randn(1, 4, 3, 5), torch.ones(1, 3, 5, dtype=torch.long)
    z[0, 1, 1, 2] = torch.nan
    z_eager = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.pixel_margin(z_eager, y).sum(), z_eager)
    assert torch.equal(F.gain_and_grad(z, y)[2], expected)


def test_all_ignored_and_empty(backend: str) -> None:
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = torch.full((2, 8, 10), 255)
    y[1, 0, 0] = 2
    gain = F.averaged_gain(z, y)
    assert gain[0] == 0
    (grad,) = torch.autograd.grad(gain.sum(), z)
    assert (grad[0] == 0).all()
    assert (grad[1] != 0).any()
    for shape in ((0, 3, 4, 5), (0, 3, 8, 10)):
        z, y = torch.randn(shape, requires_grad=True), torch.zeros(0, 8, 10, dtype=torch.uint8)
        assert F.averaged_gain(z, y).shape == (0,)
        assert F.pixel_margin(z, y).shape == (0, 8, 10)
        gain_sum, n_valid, grad = F.gain_and_grad(z, y)
        assert (gain_sum.shape, n_valid.shape, grad.shape) == ((0,), (0,), z.shape)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_labels_without_pixels(backend: str, size: tuple[int, int], align_corners: bool) -> None:
    """Nothing is read of them, and the gradient is written all the same."""
    z, y = torch.randn(2, 3, 4, 5, requires_grad=True), torch.zeros(2, *size, dtype=torch.uint8)
    options = {"align_corners": align_corners}
    for function in (F.averaged_gain, F.cross_entropy, F.cospgd_loss, F.pixel_margin):
        value = function(z, y, **options)
        (grad,) = torch.autograd.grad(value.sum(), z)
        assert not value.any()
        assert not grad.any()
        assert grad.shape == z.shape
    for function in (F.gain_and_grad, F.loss_and_grad):
        assert not any(entry.any() for entry in function(z, y, **options))
    assert not F.confusion_matrix(z, y, **options).any()


def test_classification(backend: str) -> None:
    z, y = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    margin = F.pixel_margin(z, y)
    expected = oracle.pixel_margin(z[:, :, None, None], y[:, None, None]).flatten()
    assert margin.shape == (5,)
    torch.testing.assert_close(margin, expected)
    gain_sum, n_valid, grad = F.gain_and_grad(z, y)
    torch.testing.assert_close(gain_sum, expected)
    assert n_valid.tolist() == [1] * 5
    assert grad.shape == z.shape


@pytest.mark.parametrize("own", [(2, 3), (4, 6)])
@pytest.mark.parametrize("classes", [2, 255, 256, 257, 300])
def test_many_classes(backend: str, classes: int, own: tuple[int, int]) -> None:
    """The runner-up is kept in one byte up to 256 classes, in two above; no class stands for a void pixel."""
    z = torch.zeros(1, classes, *own, requires_grad=True)
    with torch.no_grad():
        z[0, classes - 1] = 1.0
    y = torch.zeros(1, 4, 6, dtype=torch.int16)
    y[0, 1, 2:] = -1
    (grad,) = torch.autograd.grad(F.averaged_gain(z, y, ignore_index=-1).sum(), z)
    for ours in (grad, F.gain_and_grad(z, y, ignore_index=-1)[2] / 20):
        assert torch.equal(ours[0, 0], -ours[0, classes - 1])
        assert ours[0, 0].sum().item() == pytest.approx(1)
        assert (ours[0, 1 : classes - 1] == 0).all()


def test_many_pixels(backend: str) -> None:
    """More than 2^18, which the native gradient takes at once."""
    z, y = torch.randn(1, 3, 514, 515, requires_grad=True), torch.randint(0, 3, (1, 514, 515))
    (expected,) = torch.autograd.grad(oracle.pixel_margin(z, y).sum(), z)
    assert torch.equal(F.gain_and_grad(z, y)[2], expected)


def test_several_images_of_rows_with_gaps_and_more_pixels_than_a_tile_has(backend: str) -> None:
    """The native walk takes 512 neighbours of a row at most, and 2^15 pixels of an image, at once."""
    z, y = torch.randn(2, 3, 64, 540)[..., :520].requires_grad_(), torch.randint(0, 3, (2, 64, 520))
    z_eager = z.detach().clone().requires_grad_()
    margin, expected = F.pixel_margin(z, y), oracle.pixel_margin(z_eager, y)
    losses, expected_losses = F.cross_entropy(z, y, reduction="none"), oracle.cross_entropy_map(z_eager, y)
    assert torch.equal(margin, expected)
    torch.testing.assert_close(losses, expected_losses)
    outgoing = torch.randn(y.shape)
    grads, expected_grads = (
        [torch.autograd.grad(value, leaf, outgoing)[0] for value in values]
        for leaf, values in ((z, (margin, losses)), (z_eager, (expected, expected_losses)))
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("margin", [0.7, 0.498878479])
@pytest.mark.parametrize("own", [(64, 64), (8, 8)], ids=str)
def test_the_mean_of_like_margins(backend: str, own: tuple[int, int], margin: float) -> None:
    """Rounding errors of like numbers are alike, too: they must not add up."""
    z, y = torch.zeros(1, 2, *own), torch.zeros(1, 64, 64, dtype=torch.uint8)
    z[:, 0] = margin
    torch.testing.assert_close(F.averaged_gain(z, y), z[:, 0, 0, 0], rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_half_precision(interpreted: bool, dtype: torch.dtype) -> None:
    """As a logit; and what lies between two of them, as a gradient: rounded to nearest, ties to even."""
    numbers = torch.arange(-(2**15), 2**15).short().view(dtype).view(1, 256, 256)
    half = 2**15 if dtype is torch.bfloat16 else 2**12
    distances = [0, 1, half - 1, half, half + 1]
    if interpreted and dtype is torch.bfloat16:
        # tl.load and tl.store in its interpreter take subnormal bfloat16 for 0, and cut float32 off instead of rounding
        numbers = numbers.where(numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).tiny), 1)
        distances = distances[:3]  # where both are the same
    z, y = torch.stack([numbers, torch.zeros_like(numbers)], dim=1), torch.zeros(1, 256, 256, dtype=torch.uint8)
    torch.testing.assert_close(F.pixel_margin(z, y), numbers.float(), rtol=0, atol=0, equal_nan=True)
    z = torch.zeros_like(z).requires_grad_()
    for distance in distances:
        outgoing = (numbers.float().view(torch.int32) + distance).view(torch.float32)
        (grad,) = torch.autograd.grad(F.pixel_margin(z, y), z, outgoing)
        torch.testing.assert_close(grad[:, 0], outgoing.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("own", [(61, 83), (9, 11)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_any_number_of_threads(own: tuple[int, int], layout: str) -> None:
    z = oracle.in_layout(torch.randn(3, 19, *own), layout)
    y = torch.randint(0, 19, (3, 61, 83))
    before, results = torch.get_num_threads(), []
    try:
        with segadv.backend("native"):
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(F.gain_and_grad(z, y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_keeps_the_layout(backend: str) -> None:
    for own in ((8, 9), (4, 5)):
        z = torch.randn(2, 3, *own).contiguous(memory_format=torch.channels_last)
        grad = F.gain_and_grad(z, torch.zeros(2, 8, 9, dtype=torch.long))[2]
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_is_more_exact_than_eager() -> None:
    """Nothing is rounded between the interpolation and the margin."""
    z = (torch.randn(2, 19, 16, 16) * 4).bfloat16()
    y = torch.randint(0, 19, (2, 128, 128))
    truth = oracle.mean_over_valid(oracle.pixel_margin(z.double(), y), y)
    eager = oracle.mean_over_valid(oracle.pixel_margin(z, y).float(), y)
    with segadv.backend("native"):
        ours = F.averaged_gain(z, y)
    assert (ours - truth).abs().max() < 0.01 * (eager - truth).abs().max()


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_two_hundred_resampled_cases(seed: int) -> None:
    """Value and gradient in one pass, float32, any scale, native: ten cases in each test."""
    for case in (oracle.random_case(1000 + seed + i, torch.float32, full_resolution=False) for i in range(10)):
        with segadv.backend("native"):
            gain_sum, _, grad = F.gain_and_grad(case.logits, case.labels, **case.options)
            loss_sum, _, loss_grad = F.loss_and_grad(case.logits, case.labels, **case.options)
            matrix = F.confusion_matrix(case.logits, case.labels, per_image=True, **case.options)
        z, z64 = case.logits.clone().requires_grad_(), case.logits.double().requires_grad_()
        for plain, value, gradient, what in (
            (oracle.pixel_margin, gain_sum, grad, "gain_and_grad"),
            (oracle.cross_entropy_map, loss_sum, loss_grad, "loss_and_grad"),
        ):
            eager, truth = (plain(x, case.labels, **case.options) for x in (z, z64))
            oracle.assert_accurate(value, eager.sum((1, 2)), truth.sum((1, 2)), what, addends=truth.abs().sum((1, 2)))
            (grad_eager,) = torch.autograd.grad(eager.sum(), z)
            (grad64,) = torch.autograd.grad(truth.sum(), z64)
            oracle.assert_accurate(gradient, grad_eager, grad64, f"gradient of {what}")
            oracle.assert_same_direction(gradient, grad_eager, grad64, f"gradient of {what}")
        assert torch.equal(matrix, oracle.confusion(case.logits, case.labels, **case.options))


@pytest.mark.parametrize("seed", range(len(oracle.SMOOTH)))
def test_smooth_logits(backend: str, seed: int) -> None:
    """Where a backend leaves out classes that cannot be the runner-up, it leaves out the right ones."""
    case = oracle.smooth_case(seed)
    z, z_eager = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
    z64 = case.logits.double().requires_grad_()
    eager, truth = (oracle.pixel_margin(x, case.labels, **case.options) for x in (z_eager, z64))
    margin = F.pixel_margin(z, case.labels, **case.options)
    oracle.assert_accurate(margin, eager, truth, "pixel_margin")
    (grad_eager,) = torch.autograd.grad(eager.sum(), z_eager)
    (grad64,) = torch.autograd.grad(truth.sum(), z64)
    (grad,) = torch.autograd.grad(margin.sum(), z)
    gain_sum, _, grad_in_one_pass = F.gain_and_grad(z, case.labels, **case.options)
    oracle.assert_accurate(gain_sum, eager.sum((1, 2)), truth.sum((1, 2)), "gain_sum", addends=truth.abs().sum((1, 2)))
    for ours in (grad, grad_in_one_pass):
        oracle.assert_accurate(ours, grad_eager, grad64, "gradient")
        oracle.assert_same_direction(ours, grad_eager, grad64, "gradient")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("of_label", [False, True])
@pytest.mark.parametrize(
    ("at", "size"), [((2, 3), (20, 35)), ((2, 3), (25, 42)), ((-1, -1), (20, 42)), ((0, 0), (20, 42))], ids=str
)
def test_a_logit_that_is_not_finite_reaches_its_pixels_alone(
    backend: str, value: float, of_label: bool, at: tuple[int, int], size: tuple[int, int]
) -> None:
    """Those next to it, also with a weight of 0 (sizes five times as large); there the margin is eager PyTorch's."""
    z, y = torch.randn(2, 5, 5, 7), torch.randint(0, 3, (2, *size))
    z[(0, 1 if of_label else 4, *at)] = value
    margin, eager = F.pixel_margin(z, y), oracle.pixel_margin(z, y)
    assert torch.equal(margin.isfinite(), eager.isfinite())
    assert torch.equal(margin.isnan(), eager.isnan())
    torch.testing.assert_close(margin, eager, equal_nan=True)
    matrix, expected = F.confusion_matrix(z, y), oracle.confusion(z, y).sum(0)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_infinity_at_the_last_logit(backend: str, align_corners: bool) -> None:
    """Pixels on it or behind it read it twice. Of weights 1 and 0, as in eager PyTorch, those on it would be NaN."""
    if backend == "reference":
        pytest.skip("eager PyTorch multiplies infinity by the weight 0")
    z, y = torch.randn(1, 3, 5, 7), torch.zeros(1, 25, 35, dtype=torch.long)
    z[0, 0, -1, -1] = torch.inf
    last = 1 if align_corners else 3
    assert (F.pixel_margin(z, y, align_corners=align_corners)[0, -last:, -last:] == torch.inf).all()


@pytest.mark.parametrize("own", [(6, 7), (3, 4)])
def test_outgoing_gradients_of_any_strides(backend: str, own: tuple[int, int]) -> None:
    """As the backward of a transpose and of sums and means along one dimension or another gives them."""
    z, y = torch.randn(2, 3, *own, requires_grad=True), torch.randint(0, 3, (2, 6, 7))
    transposed = torch.randn(2, 7, 6).transpose(1, 2)
    for value in (F.pixel_margin(z, y), F.cross_entropy(z, y, reduction="none")):
        for outgoing in (transposed, *(torch.randn(size).expand(2, 6, 7) for size in ((2, 1, 7), (2, 6, 1), (6, 7)))):
            (grad,) = torch.autograd.grad(value, z, outgoing, retain_graph=True)
            (expected,) = torch.autograd.grad(value, z, outgoing.contiguous(), retain_graph=True)
            assert torch.equal(grad, expected)


def everything(z: Tensor, y: Tensor, outgoing: Tensor) -> list[Tensor]:
    """Maps, their gradients, sums with theirs, predictions and counts."""
    leaf = z.requires_grad_()
    values = F.pixel_margin(leaf, y), F.cross_entropy(leaf, y, reduction="none")
    grads = [torch.autograd.grad(value, leaf, outgoing)[0] for value in values]
    sums = (*F.gain_and_grad(leaf, y), *F.loss_and_grad(leaf, y, loss="segpgd", step=1, steps=4))
    return [*values, *grads, *sums, F.argmax_labels(leaf, tuple(y.shape[-2:])), F.confusion_matrix(leaf, y)]


@pytest.mark.parametrize(
    ("moved", "own"),
    [("logits", (8, 16)), ("labels", (8, 16)), ("outgoing gradient", (8, 16)), ("logits", (3, 4)), ("labels", (3, 4))],
)
def test_memory_that_begins_anywhere(backend: str, own: tuple[int, int], moved: str) -> None:
    """With sizes that wide loads and stores serve: the same results, sums to rounding."""
    z, y, outgoing = torch.randn(2, 4, *own), torch.randint(0, 4, (2, 8, 16)).to(torch.uint8), torch.randn(2, 8, 16)

    expected = everything(z, y, outgoing)
    given = {"logits": z.detach(), "labels": y, "outgoing gradient": outgoing}
    results = everything(*(oracle.shifted(t) if name == moved else t for name, t in given.items()))
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-7)


ADDRESSES = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="4 GiB for a few numbers: on a CPU they are addresses without memory, on a GPU each process that runs tests "
    "would take all of it; offsets above 32 bits are then those of test_gpu.py, in tensors that are so large",
)


@ADDRESSES
@pytest.mark.parametrize(
    ("moved", "dim", "own"),
    [
        ("logits", 0, (8, 6)),
        ("logits", 1, (8, 6)),
        ("logits", 2, (8, 6)),
        ("logits", 3, (8, 6)),
        ("logits", 0, (2, 3)),
        ("logits", 1, (2, 3)),
        ("labels", 0, (8, 6)),
        ("labels", 1, (8, 6)),
        ("labels", 1, (2, 3)),
        ("labels", 2, (8, 6)),
        ("labels", 2, (2, 3)),
        ("outgoing gradient", 0, (2, 3)),
        ("outgoing gradient", 1, (8, 6)),
        ("outgoing gradient", 1, (2, 3)),
        ("outgoing gradient", 2, (8, 6)),
        ("outgoing gradient", 2, (2, 3)),
    ],
)
def test_offsets_of_more_than_32_bits(backend: str, moved: str, dim: int, own: tuple[int, int]) -> None:
    """Index and stride fit, their product does not. Of the memory between only what is written to is taken.

    Nor is there memory so far before it, for one who reads the class -1 of a pixel that is not valid."""
    z, y = torch.randn(3, 3, *own).half(), torch.randint(0, 3, (3, 8, 6)).to(torch.uint8)
    outgoing = torch.randn(3, 8, 6)
    y[0, 3:5] = 255
    expected = everything(z, y, outgoing)
    given = {"logits": z.detach(), "labels": y, "outgoing gradient": outgoing}
    near = given[moved]
    far = 2**31 // (near.shape[dim] - 1) + 1
    strides = [far if d == dim else stride for d, stride in enumerate(near.stride())]
    last = sum((size - 1) * stride for size, stride in zip(near.shape, strides, strict=True))
    assert last >= 2**31
    given[moved] = near.new_empty(last + 1).as_strided(near.shape, strides).copy_(near)
    for result, other in zip(everything(*given.values()), expected, strict=True):
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if result.dtype is torch.float32 else {}
        torch.testing.assert_close(result, other, **tolerance)


@ADDRESSES
@pytest.mark.parametrize("own", [(8, 6), (2, 3)], ids=str)
def test_classes_more_than_32_bits_apart(backend: str, own: tuple[int, int]) -> None:
    """The stride itself does not fit."""
    z, y = torch.randn(2, 2, *own).half(), torch.randint(0, 2, (2, 8, 6))
    outgoing = torch.randn(2, 8, 6)
    expected = everything(z, y, outgoing)
    strides = (z.stride(0), 2**31 + 1, *z.stride()[2:])
    far = torch.empty(2**31 + 1 + z.numel(), dtype=z.dtype).as_strided(z.shape, strides).copy_(z.detach())
    for result, other in zip(everything(far, y, outgoing), expected, strict=True):
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if result.dtype is torch.float32 else {}
        torch.testing.assert_close(result, other, **tolerance)


@ADDRESSES
def test_pixels_more_than_32_bits_apart(backend: str) -> None:
    """The classes are neighbours, as in channels_last."""
    z, y = torch.randn(2, 3, 2, 5).half(), torch.randint(0, 3, (2, 2, 5))
    outgoing = torch.randn(2, 2, 5)
    expected = everything(z, y, outgoing)
    far = 2**31 // 9 + 1  # the last of ten pixels
    memory = torch.empty(9 * far + 6, dtype=z.dtype)
    other = memory.as_strided(z.shape, (3, 1, 5 * far, far)).copy_(z.detach())
    for result, near in zip(everything(other, y, outgoing), expected, strict=True):
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if result.dtype is torch.float32 else {}
        torch.testing.assert_close(result, near, **tolerance)


@pytest.mark.parametrize("own", [(4, 6), (3, 4)])
@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_labels_of_any_strides(backend: str, layout: str, own: tuple[int, int]) -> None:
    z, outgoing = torch.randn(2, 4, *own), torch.randn(2, 4, 6)
    wide = torch.randint(0, 4, (2, 6, 13))
    y = wide[:, 1:5, 1::2] if layout == "sliced" else wide[:, :, 1:5].transpose(1, 2)
    y[0, 2, 3:5] = 255
    results, expected = everything(z, y, outgoing), everything(z, y.contiguous(), outgoing)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moved", ["logits", "labels", "both"])
@pytest.mark.parametrize(
    ("width", "columns"),
    [(32, slice(13)), (32, slice(None, None, 2)), (33, slice(16))],
    ids=["13 of 32", "every second", "16 of 33"],
)
def test_columns_of_wider_rows(backend: str, width: int, columns: slice, moved: str) -> None:
    """Where rows begin at a multiple of 16 bytes, but do not end at one or have gaps; and where they do not begin."""
    z, y = torch.randn(2, 4, 4, width)[..., columns], torch.randint(0, 4, (2, 4, width))[..., columns]
    outgoing = torch.randn(y.shape)
    expected = everything(z.contiguous(), y.contiguous(), outgoing)
    given = z if moved != "labels" else z.contiguous(), y if moved != "logits" else y.contiguous()
    for result, other in zip(everything(*given, outgoing), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "classes", "more", "before", "dtype"),
    [
        pytest.param((2, 6, 12), 19, 0, 0, torch.float32, id="vectors"),  # of 16 bytes
        pytest.param((2, 6, 12), 19, 0, 0, torch.bfloat16, id="vectors of bfloat16"),
        pytest.param((1, 5, 13), 19, 0, 0, torch.float32, id="not at the end"),
        pytest.param((2, 5, 13), 19, 0, 0, torch.bfloat16, id="not where the second image begins"),
        pytest.param((2, 6, 12), 19, 0, 1, torch.float32, id="not at a multiple of 16 bytes"),
        pytest.param((2, 6, 12), 16, 0, 0, torch.float32, id="pixels a multiple of 32 bytes apart"),
        pytest.param((2, 6, 12), 19, 3, 0, torch.bfloat16, id="some channels of more"),
        pytest.param((2, 6, 12), 19, 4, 0, torch.float32, id="some channels of more from 16 bytes on"),
        pytest.param((1, 5, 13), 70, 0, 0, torch.float32, id="more than 128 bytes a pixel"),
        pytest.param((1, 5, 13), 70, 0, 0, torch.bfloat16, id="more than 128 bytes a pixel of bfloat16"),
        pytest.param((1, 3, 7), 300, 0, 0, torch.float16, id="classes of 16 bits"),
        pytest.param((1, 5, 13), 3, 0, 0, torch.float32, id="three classes"),
    ],
)
def test_classes_that_are_neighbours(
    backend: str, size: tuple[int, int, int], classes: int, more: int, before: int, dtype: torch.dtype
) -> None:
    """Logits in channels_last: the same results as in NCHW, sums to rounding."""
    n, height, width = size
    z, y = torch.randn(n, classes, height, width).to(dtype), torch.randint(0, classes, size)
    y[:, 1] = 255
    outgoing = torch.randn(size)
    memory = torch.full((before + n * height * width * (classes + more),), torch.nan, dtype=dtype)
    wide = memory[before:].view(n, height, width, classes + more).permute(0, 3, 1, 2)
    other = wide[:, more : classes + more].copy_(z)
    for result, expected in zip(everything(other, y, outgoing), everything(z, y, outgoing), strict=True):
        if result.dim() == 4 and not more:
            assert result.is_contiguous(memory_format=torch.channels_last)
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if result.dtype is torch.float32 else {}
        torch.testing.assert_close(result, expected, **tolerance)


def test_an_outgoing_nan_reaches_its_logits_alone(backend: str) -> None:
    z, y = torch.randn(2, 5, 4, 7, requires_grad=True), torch.randint(0, 5, (2, 16, 35))
    z_eager = z.detach().clone().requires_grad_()
    outgoing = torch.randn(2, 16, 35)
    outgoing[0, 6, 17] = torch.nan
    y[1, 3, 4], outgoing[1, 3, 4] = 255, torch.nan  # that of a void pixel reaches none
    (grad,) = torch.autograd.grad(F.pixel_margin(z, y), z, outgoing)
    (expected,) = torch.autograd.grad(oracle.pixel_margin(z_eager, y), z_eager, outgoing)
    torch.testing.assert_close(grad, expected, equal_nan=True)
    assert 0 < grad.isfinite().logical_not().sum() <= 8  # four taps, two classes


def test_the_map_of_runners_up_is_zero_where_a_pixel_is_not_valid(backend: str) -> None:
    """So that a backward on another backend may read it."""
    for size in ((4, 6), (16, 24)):
        z, y = torch.randn(1, 5, 4, 6), torch.full((1, *size), 255)
        y[0, 0, 0] = 1
        _, runner_up = torch.ops.segadv.pixel_margin(z, y, 255, False)
        assert runner_up.flatten()[1:].count_nonzero() == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("own", [(16, 24), (4, 6)], ids=["full", "up"])
def test_runners_up_that_are_no_class_are_not_written(own: tuple[int, int], channels_last: bool) -> None:
    """The map is an argument of a registered operation: whatever is in it, no other memory is written.

    Of 23 classes: 24 bytes, a mark for each and for none, are all that the allocator gives; one more breaks its own.
    """
    y, outgoing = torch.randint(0, 23, (2, 16, 24)), torch.ones(1).expand(2, 16, 24)
    y[:, 3:5] = 255
    memory, size = {}, [2, 23, *own]
    for number in (0, 23, 254):
        runner_up = torch.full((2, 16, 24), number, dtype=torch.uint8)
        with segadv.backend("native"):
            arguments = (outgoing, y, runner_up, size, channels_last, torch.float32, 255, False)
            memory[number] = torch.ops.segadv.margin_backward(*arguments)
    assert torch.equal(memory[23], memory[254])
    total = memory[23].sum((1, 2, 3))
    torch.testing.assert_close(total, torch.full((2,), 14.0 * 24))  # the labels' alone
    assert (memory[23] >= memory[0]).all()


@pytest.mark.parametrize("seed", range(5))
def test_resampled_ties_are_ties(backend: str, seed: int) -> None:
    """Two equal planes of logits have margin 0 everywhere, whatever the rounding of the resampling."""
    torch.manual_seed(seed)
    z = torch.randn(1, 3, 7, 9) * 30 + 200
    z[:, 1], z[:, 2] = z[:, 0], -500
    for label in (0, 1):
        margin = F.pixel_margin(z, torch.full((1, 40, 50), label))
        assert (margin == 0).all()


def test_classes_that_tie_at_one_logit(backend: str) -> None:
    """There the lowest of them wins, though it lies below the others all around."""
    z = torch.randint(-2, 3, (1, 1, 4, 6)).float().repeat(1, 4, 1, 1)
    z[:, 1:3] += 1
    z[:, :3, 2, 0], z[:, 3] = 0, -9
    expected = torch.ones(1, 13, 21, dtype=torch.long)  # weights are quarters: nothing is rounded
    expected[0, 8, 0] = 0
    _, runner_up = torch.ops.segadv.pixel_margin(z, torch.full_like(expected, 3), 255, True)
    assert torch.equal(runner_up.long(), expected)
    assert torch.equal(F.argmax_labels(z, (13, 21), align_corners=True).long(), expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_integers_resampled_without_rounding(backend: str, scale: int) -> None:
    """Every number on the way is exact, and ties are everywhere: so must be margin, runner-up and prediction."""
    torch.manual_seed(scale)
    z, size = torch.randint(-2, 3, (2, 6, 3, 5)).float(), (3 * scale, 5 * scale)
    y = torch.randint(0, 6, (2, *size))
    y[:, :scale, : 2 * scale] = 3  # also where all labels of a block are one
    full = oracle.upsample(z.double(), size)
    others = full.scatter(1, y[:, None], -torch.inf)
    margin, runner_up = torch.ops.segadv.pixel_margin(z, y, 255, False)
    assert torch.equal(margin.double(), full.gather(1, y[:, None])[:, 0] - others.amax(1))
    assert torch.equal(runner_up.long(), others.argmax(1))
    assert torch.equal(F.argmax_labels(z, size).long(), full.argmax(1))
