"""l1_norm, newton_step, sign_step and scale_gradient against closed forms and plain PyTorch, on every backend."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segadv
from segadv import functional as F
from segadv.ops import backends, library

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


def images_and_grad(layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    images = oracle.in_layout(torch.rand(3, 3, 17, 23, dtype=dtype), layout)
    grad = torch.randn(3, 3, 17, 23, dtype=dtype)
    grad[:, :, 0] = 0
    return images, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 17, 23), (2, 100003), (4,), (0, 3, 2, 2), (2, 0), (1, 2, 3, 4, 5)])
def test_l1_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape).to(dtype)
    norm = F.l1_norm(grad)
    assert norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    truth = grad.double().abs().reshape(shape[0], -1).sum(1) if grad.numel() else torch.zeros(shape[0])
    torch.testing.assert_close(norm.double(), truth.double(), rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_l1_norm_of_any_layout(backend: str, layout: str) -> None:
    grad = oracle.in_layout(torch.randn(3, 3, 17, 23), layout)
    torch.testing.assert_close(F.l1_norm(grad), grad.abs().sum((1, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_newton_step(backend: str, dtype: torch.dtype, layout: str) -> None:
    images, grad = images_and_grad(layout, dtype)
    before = images.clone()
    gain = torch.tensor([3.0, -2.0, 0.0], dtype=dtype)
    adversarial, eps = F.newton_step(images, grad, gain)
    norm = grad.double().abs().sum((1, 2, 3))
    torch.testing.assert_close(eps.double(), gain.double() / norm, rtol=1e-6, atol=0)
    expected = (images - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-7)
    assert torch.equal(images, before)
    assert torch.equal(adversarial[:, :, 0], images[:, :, 0])  # sign(0) = 0
    assert torch.equal(adversarial[2], images[2])
    if layout == "channels_last":
        assert adversarial.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_memory_that_begins_anywhere(backend: str, moved: int) -> None:
    """With sizes that wide loads and stores serve."""
    given = [torch.rand(2, 3, 8, 16), torch.randn(2, 3, 8, 16), torch.rand(2, 3, 8, 16)]
    images, grad, origin = (oracle.shifted(t) if i == moved else t for i, t in enumerate(given))
    gain = torch.tensor([3.0, -2.0])
    norm = grad.abs().sum((1, 2, 3))
    adversarial, eps = F.newton_step(images, grad, gain)
    torch.testing.assert_close(eps, gain / norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(F.l1_norm(grad), norm, rtol=1e-6, atol=0)
    assert torch.equal(eps, gain / F.l1_norm(grad))
    expected = (images - eps.view(-1, 1, 1, 1) * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-7)
    expected = torch.clamp(images + 0.1 * grad.sign(), origin - 0.3, origin + 0.3).clamp(0, 1)
    torch.testing.assert_close(F.sign_step(images, grad, 0.1, origin=origin, eps=0.3), expected, rtol=0, atol=1e-7)


def test_newton_step_options(backend: str) -> None:
    images, grad = torch.full((3, 1, 2, 2), 0.5), torch.ones(3, 1, 2, 2)
    gain = torch.tensor([-0.4, 0.04, 4.0])
    adversarial, eps = F.newton_step(images, grad, gain)
    torch.testing.assert_close(eps, torch.tensor([-0.1, 0.01, 1.0]))
    torch.testing.assert_close(adversarial[:, 0, 0, 0], torch.tensor([0.6, 0.49, 0.0]))
    eps = F.newton_step(images, grad, gain, clamp_negative=True)[1]
    torch.testing.assert_close(eps, torch.tensor([0.0, 0.01, 1.0]))
    eps = F.newton_step(images, grad, gain, max_eps=0.05)[1]
    torch.testing.assert_close(eps, torch.tensor([-0.05, 0.01, 0.05]))
    eps = F.newton_step(images, grad, gain, max_eps=0)[1]
    assert torch.equal(eps, torch.zeros(3))
    adversarial, _ = F.newton_step(images, grad, gain, bounds=(0.45, 0.55))
    torch.testing.assert_close(adversarial[:, 0, 0, 0], torch.tensor([0.55, 0.49, 0.45]))


@pytest.mark.parametrize("max_eps", [None, 0.1])
@pytest.mark.parametrize("bad", ["gain nan", "gain inf", "grad nan", "grad inf", "grad zero"])
def test_newton_step_without_meaning_leaves_the_image(backend: str, bad: str, max_eps: float | None) -> None:
    images, grad, gain = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([1.0, 1.0])
    if bad.startswith("gain"):
        gain[0] = torch.nan if bad.endswith("nan") else -torch.inf
    else:
        grad[0] = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}[bad.split()[1]]
    adversarial, eps = F.newton_step(images, grad, gain, max_eps=max_eps)
    assert eps[0] == 0
    assert torch.equal(adversarial[0], images[0])
    assert eps[1] != 0
    assert not torch.equal(adversarial[1], images[1])


def test_newton_step_beyond_the_largest_number(backend: str) -> None:
    """Of a finite gain and a finite norm. With a cap it means something."""
    images, grad, gain = torch.rand(2, 3, 4, 4), torch.full((2, 3, 4, 4), 1e-30), torch.tensor([1e30, -1e30])
    grad[:, 0] = 0
    adversarial, eps = F.newton_step(images, grad, gain)
    assert eps.tolist() == [0, 0]
    assert torch.equal(adversarial, images)
    torch.testing.assert_close(F.newton_step(images, grad, gain, max_eps=0.1)[1], torch.tensor([0.1, -0.1]))


def test_the_gradient_of_the_norm(backend: str) -> None:
    """As of its "Equivalent to", twice: a penalty on a gradient must not come to nothing unseen."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(F.l1_norm, x)
    results = []
    for norm in (F.l1_norm, lambda grad: grad.abs().flatten(1).sum(1)):
        (grad,) = torch.autograd.grad(x.tanh().pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(norm(grad)[0], x, create_graph=True)[0])
        results.append(torch.autograd.grad(results[-1].square().sum(), x)[0])
    torch.testing.assert_close(results[:2], results[2:])
    half = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(F.l1_norm(half).sum(), half)
    assert torch.equal(grad, half.sign())
    zero = torch.zeros(2, 3, requires_grad=True)
    assert not torch.autograd.grad(F.l1_norm(zero).sum(), zero)[0].any()


def test_an_image_may_be_a_number(backend: str) -> None:
    images, grad = torch.tensor([0.5, 0.95, 0.2]), torch.tensor([2.0, 1.0, -1.0])
    torch.testing.assert_close(F.sign_step(images, grad, 0.1), torch.tensor([0.6, 1.0, 0.1]))
    adversarial, eps = F.newton_step(images, grad, torch.tensor([0.2, -0.1, 0.1]))
    torch.testing.assert_close(eps, torch.tensor([0.1, -0.1, 0.1]))
    torch.testing.assert_close(adversarial, torch.tensor([0.4, 1.0, 0.3]))


def test_steps_are_constants(backend: str) -> None:
    images, grad = torch.rand(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    gain = torch.ones(2, requires_grad=True)
    for result in (*F.newton_step(images, grad, gain), F.sign_step(images, grad, 0.1, origin=images, eps=0.1)):
        assert not result.requires_grad


@pytest.mark.parametrize("shape", [(3, 65, 67), (3, 5, 17)], ids=str)
@pytest.mark.parametrize("value", [0.7, -0.498878479])
def test_the_norm_of_like_numbers(backend: str, value: float, shape: tuple[int, int, int]) -> None:
    """Rounding errors of like numbers are alike, too: they must not add up, nor where less than a block is left."""
    grad = torch.full((1, *shape), value)
    expected = grad.double().abs().sum()[None].float()
    torch.testing.assert_close(F.l1_norm(grad), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_scale_freedom(backend: str) -> None:
    """The same bits when gain and gradient are multiplied by a power of two."""
    images, grad = images_and_grad("contiguous")
    gain = torch.randn(3)
    one = F.newton_step(images, grad, gain)
    scaled = F.newton_step(images, grad * 2.0**-9, gain * 2.0**-9)
    assert torch.equal(one[0], scaled[0])
    assert torch.equal(one[1], scaled[1])


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("ball", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sign_step(backend: str, layout: str, ball: bool, per_image: bool) -> None:
    images, grad = images_and_grad(layout)
    origin = (images + 0.02 * torch.randn_like(images)).clamp(0, 1) if ball else None
    alpha: float | Tensor = torch.tensor([0.01, -0.02, 0.03]) if per_image else 0.02
    eps: float | Tensor | None = None
    if ball:
        eps = torch.tensor([0.03, 0.01, 0.02]) if per_image else 0.025
    result = F.sign_step(images, grad, alpha, origin=origin, eps=eps)
    wide = alpha.view(-1, 1, 1, 1) if isinstance(alpha, Tensor) else alpha
    expected = images + wide * grad.sign()
    if origin is not None:
        radius = eps.view(-1, 1, 1, 1) if isinstance(eps, Tensor) else eps
        expected = torch.maximum(torch.minimum(expected, origin + radius), origin - radius)
    torch.testing.assert_close(result, expected.clamp(0, 1), rtol=0, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    eps=st.floats(0.0, 1.0),
    alpha=st.floats(-2.0, 2.0),
    low=st.floats(-1.0, 0.4),
    high=st.floats(0.6, 2.0),
)
def test_sign_step_stays_in_ball_and_box(seed: int, eps: float, alpha: float, low: float, high: float) -> None:
    g = torch.Generator().manual_seed(seed)
    origin = torch.rand(2, 3, 5, 5, generator=g) * (high - low) + low
    images = (origin + (torch.rand(2, 3, 5, 5, generator=g) - 0.5)).clamp(low, high)
    grad = torch.randn(2, 3, 5, 5, generator=g)
    results = []
    for name in (name for name, module in backends.BACKENDS.items() if module.unavailable("cpu") is None):
        with segadv.backend(name):
            results.append(F.sign_step(images, grad, alpha, origin=origin, eps=eps, bounds=(low, high)))
    for result in results:
        assert result.min() >= torch.tensor(low) - 1e-6
        assert result.max() <= torch.tensor(high) + 1e-6
        assert (result - origin).abs().max() <= eps + 1e-6
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


def test_a_gradient_of_nan_moves_no_pixel(backend: str) -> None:
    images, grad = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    grad[0, 1, 2, 3] = torch.nan
    expected = (images + 0.1 * grad.nan_to_num().sign()).clamp(0, 1)
    torch.testing.assert_close(F.sign_step(images, grad, 0.1), expected, rtol=0, atol=1e-7)


def test_a_pixel_of_nan_stays_nan(backend: str) -> None:
    """In the box, and in the ball around another one: an image that is broken does not look whole."""
    images, grad, gain = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.ones(2)
    origin = images.clone()
    images[0, 1, 2, 3] = torch.nan
    ball = F.sign_step(images, grad, 0.1, origin=origin, eps=0.05)
    for result in (F.sign_step(images, grad, 0.1), ball, F.newton_step(images, grad, gain)[0]):
        assert torch.equal(result.isnan(), images.isnan())


def test_what_is_given_per_image_may_have_any_strides_and_precision(backend: str) -> None:
    images, grad = torch.rand(3, 3, 4, 5), torch.randn(3, 3, 4, 5)
    wide = torch.tensor([[0.02, 9.0], [0.01, 9.0], [0.03, 9.0]])
    sizes = wide[:, 0].clone()
    newton, sign = F.newton_step(images, grad, sizes), F.sign_step(images, grad, sizes, origin=images, eps=sizes / 2)
    for sized in (wide, wide.double()):
        for one, other in zip(F.newton_step(images, grad, sized[:, 0]), newton, strict=True):
            assert torch.equal(one, other)
            assert one.dtype is torch.float32
        half = sized / 2
        assert torch.equal(F.sign_step(images, grad, sized[:, 0], origin=images, eps=half[:, 0]), sign)


def test_many_elements_in_one_image(backend: str) -> None:
    """More than one item per image: borders of the items, and a norm that float32 alone would blur."""
    images, grad = torch.rand(2, 3, 300, 301), torch.full((2, 3, 300, 301), 1e-3)
    adversarial, eps = F.newton_step(images, grad, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(eps, torch.tensor([1.0, 2.0]) / 270.9, rtol=1e-6, atol=0)
    expected = (images - eps.view(-1, 1, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-7)


def test_empty_batch(backend: str) -> None:
    images = torch.rand(0, 3, 4, 4)
    adversarial, eps = F.newton_step(images, images, torch.zeros(0))
    assert adversarial.shape == images.shape
    assert eps.shape == (0,)
    assert F.sign_step(images, images, 0.1).shape == images.shape


def test_images_without_pixels_have_a_norm_and_a_step_of_0(backend: str) -> None:
    images = torch.rand(2, 3, 0, 4)
    torch.use_deterministic_algorithms(True)  # then new memory holds NaN
    try:
        adversarial, eps, norm = library.newton_step(images, images, torch.ones(2), 0.0, 1.0, False, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert adversarial.shape == images.shape
    assert eps.tolist() == norm.tolist() == [0, 0]


def test_radius_without_meaning(backend: str) -> None:
    """Per image eps come unchecked, as looking would wait for a GPU: NaN shows, and all backends agree."""
    images = torch.full((3, 1, 1, 2), 0.5)
    eps = torch.tensor([torch.nan, -0.1, 0.1])
    result = F.sign_step(images, torch.ones_like(images), 0.3, origin=images, eps=eps)
    assert result[0].isnan().all()
    torch.testing.assert_close(result[1:, 0, 0, 0], torch.tensor([0.6, 0.6]))


def scaled_by(grad: Tensor, factor: Tensor, interpreted: bool) -> Tensor:
    """grad [N, C, h, w] * factor [N] in eager PyTorch; 0 where grad is 0."""
    product = torch.where(grad == 0, 0.0, grad.to(factor.dtype) * factor.view(-1, 1, 1, 1))
    if interpreted and grad.dtype is torch.bfloat16:  # tl.store in the interpreter cuts float32 off, not rounding it
        product = (product.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return product.to(grad.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_gradient(backend: str, interpreted: bool, dtype: torch.dtype, layout: str) -> None:
    """Rounded once; 0 (and -0) stays 0 under an infinite factor, NaN stays NaN under 0; factors of any stride."""
    grad = torch.randn(6, 5, 7, 9).to(dtype)
    grad[:, :, 0], grad[:, :, 1] = 0.0, -0.0
    grad[5, 2, 3, 4] = float("nan")
    grad = oracle.in_layout(grad, layout)
    before = grad.clone()
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    factor = torch.tensor([1 / 3, -2e-5, 0.0, float("inf"), float("nan"), 0.7, 1.0], dtype=wide)
    for factors in (factor[:6], factor.repeat_interleave(3)[:16:3], factor[:1].expand(6)):
        scaled = library.scale_gradient(grad, factors)
        assert scaled.dtype is dtype
        expected = scaled_by(grad, factors, interpreted)
        torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)
        assert not scaled[:, :, :2].signbit().any()
        assert scaled.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
    torch.testing.assert_close(grad, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("numel", [1, 17, 4096, 70000])
def test_scale_gradient_of_any_size(backend: str, interpreted: bool, numel: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.randn(3, 1, 1, numel).to(dtype)
        shifted = torch.empty(3 * numel + 1, dtype=dtype)[1:].view(3, 1, 1, numel).copy_(grad)  # not aligned
        factor = torch.tensor([3.0, -0.1, 1.0])
        expected = scaled_by(grad, factor, interpreted)
        assert torch.equal(library.scale_gradient(grad, factor), expected)
        assert torch.equal(library.scale_gradient(shifted, factor), expected)
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2)):
        assert library.scale_gradient(torch.empty(shape), torch.ones(shape[0])).shape == shape
