"""The steps of the attacks in pixel space, and the scaling of a gradient. Each image is a row of `numel` elements in
whatever dense order.

newton_step, two kernels: absolute sums of groups of blocks; then the norm (each program adds up its image's sums),
eps = gain / norm, sign, step and clip. Fewest bytes: gradient and images read once, the result written once. The second
reading of the gradient goes backwards, so that it starts with what the cache still holds, and images and result do not
push that out. sign_step fuses step, projection and clip: every input read once. Both are bound by memory.
scale_gradient, with which a backward ends, reads and writes a gradient once.

Fraction of the limit reached: not yet measured (python -m benchmarks.device).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import compute_dtype, empty_images, gradient_like, is_channels_last, numel_per_image, ordered_like
from .configs import config
from .scalars import bits, scalar
from .tiles import UNALIGNED, launch, power_of_two, total_of, triton_dtype

_MOST_PARTIALS = 1024
"""Of an image: every program of newton_step_kernel adds them all up, so that more would cost more than the image."""


@triton.jit
def sign(x):
    """sign(0) = 0, and a NaN does not move."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def clip(x, low, high):
    """Keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def divide(a, b):
    """Rounded as in PyTorch; `/` is 2 ulp off in float32."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def absolute_sum_kernel(grad, partial, numel, partials, span, A: tl.constexpr, BLOCK: tl.constexpr):
    n, k = (tl.program_id(0) // partials).to(tl.int64), (tl.program_id(0) % partials).to(tl.int64)
    total = tl.zeros([BLOCK], A)
    for j in range(0, span):
        i = (k * span + j) * BLOCK + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(grad + n * numel + i, mask=i < numel, other=0).to(A))
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def norm_kernel(partial, norm, partials, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    tl.store(norm + n, total_of(partial, n, partials, BLOCK))


@triton.jit(do_not_specialize=["low_bits", "high_bits", "max_eps_bits"], do_not_specialize_on_alignment=UNALIGNED)
def newton_step_kernel(
    images, grad, gain, partial, adversarial, eps, norm, numel, blocks, partials, low_bits, high_bits, max_eps_bits,
    CLAMP_NEGATIVE: tl.constexpr, MAX_EPS: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n, k = (program // blocks).to(tl.int64), (program % blocks).to(tl.int64)
    g = tl.load(gain + n)  # before the barriers of the sum, behind which it would be waited for once more
    length = total_of(partial, n, partials, 1024).to(A)
    usable = is_finite(g) & (length > 0)  # max_eps would cap an infinity
    step = divide(g, tl.where(usable, length, 1.0))
    if CLAMP_NEGATIVE:
        step = tl.maximum(step, 0.0)
    if MAX_EPS:
        max_eps = scalar(max_eps_bits, A)
        step = clip(step, -max_eps, max_eps)
    step = tl.where(usable & is_finite(step), step, 0.0).to(A)
    if k == 0:
        tl.store(eps + n, step)
        tl.store(norm + n, length)
    i = k * BLOCK + tl.arange(0, BLOCK)
    at, mask = n * numel + i, i < numel
    x = tl.load(images + at, mask=mask, other=0, eviction_policy="evict_first")
    x -= step * sign(tl.load(grad + at, mask=mask, other=0))
    x = clip(x, scalar(low_bits, A), scalar(high_bits, A))
    tl.store(adversarial + at, x, mask=mask, eviction_policy="evict_first")


@triton.jit(
    do_not_specialize=["alpha_bits", "eps_bits", "low_bits", "high_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def sign_step_kernel(
    images, grad, origin, adversarial, alpha_per_image, eps_per_image, numel, blocks,
    alpha_bits, eps_bits, low_bits, high_bits, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, k = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    i = k * BLOCK + tl.arange(0, BLOCK)
    at, mask = n * numel + i, i < numel
    if alpha_per_image is not None:
        alpha = tl.load(alpha_per_image + n).to(A)
    else:
        alpha = scalar(alpha_bits, A)
    x = tl.load(images + at, mask=mask, other=0)
    x += alpha * sign(tl.load(grad + at, mask=mask, other=0))
    if origin is not None:
        if eps_per_image is not None:
            eps = tl.load(eps_per_image + n).to(A)
        else:
            eps = scalar(eps_bits, A)
        center = tl.load(origin + at, mask=mask, other=0)
        upper, lower = center + eps, center - eps
        # A NaN radius makes the result NaN: the ball is never dropped silently.
        x = tl.where((x > upper) | (upper != upper), upper, x)
        x = tl.where(x < lower, lower, x)
    tl.store(adversarial + at, clip(x, scalar(low_bits, A), scalar(high_bits, A)), mask=mask)


@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=UNALIGNED)
def scale_gradient_kernel(grad, factor, scaled, numel, blocks, stride, A: tl.constexpr, BLOCK: tl.constexpr):
    n, k = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    i = k * BLOCK + tl.arange(0, BLOCK)
    at, mask = n * numel + i, i < numel
    g = tl.load(grad + at, mask=mask, other=0, eviction_policy="evict_first").to(A)
    # What has no gradient keeps none, also where an overflow makes the factor infinite.
    tl.store(scaled + at, tl.where(g == 0, 0.0, g * tl.load(factor + n * stride)), mask=mask)


def _absolute_sums(grad: Tensor) -> Tensor:
    """[N, at most _MOST_PARTIALS], sums of absolute values of every image's blocks."""
    numel, tuned = numel_per_image(grad), config("step", grad.device)
    block = min(power_of_two(numel), tuned.block)
    blocks = triton.cdiv(numel, block)
    span = max(1, triton.cdiv(blocks, _MOST_PARTIALS))
    dtype = compute_dtype(grad.dtype)
    partial = torch.empty(grad.shape[0], triton.cdiv(blocks, span), dtype=dtype, device=grad.device)
    launch(
        absolute_sum_kernel, partial.numel(), grad, grad, partial, numel, partial.shape[1], span,
        A=triton_dtype(dtype), BLOCK=block, num_warps=tuned.num_warps,
    )  # fmt: skip
    return partial


def l1_norm(grad: Tensor) -> Tensor:
    if not is_channels_last(grad):
        grad = grad.contiguous()
    partial = _absolute_sums(grad)
    norm = torch.empty(grad.shape[0], dtype=partial.dtype, device=grad.device)
    launch(norm_kernel, grad.shape[0], grad, partial, norm, partial.shape[1], BLOCK=1024, num_warps=4)
    return norm


def newton_step(
    images: Tensor,
    grad: Tensor,
    gain: Tensor,
    low: float,
    high: float,
    clamp_negative: bool,
    max_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    adversarial = empty_images(images)
    images, grad = ordered_like(images, adversarial), ordered_like(grad, adversarial)
    gain = gain.to(images.dtype).contiguous()
    eps, norm = torch.empty_like(gain), torch.empty_like(gain)
    numel, tuned = numel_per_image(images), config("step", images.device)
    if numel == 0:
        return adversarial, eps.zero_(), norm.zero_()
    partial = _absolute_sums(grad)
    block = min(power_of_two(numel), tuned.block)
    blocks = triton.cdiv(numel, block)
    launch(
        newton_step_kernel, images.shape[0] * blocks, images, images, grad, gain, partial, adversarial, eps, norm,
        numel, blocks, partial.shape[1], bits(low), bits(high), bits(0.0 if max_eps is None else max_eps),
        CLAMP_NEGATIVE=clamp_negative, MAX_EPS=max_eps is not None, A=triton_dtype(images.dtype), BLOCK=block,
        num_warps=tuned.num_warps,
    )  # fmt: skip
    return adversarial, eps, norm


def sign_step(
    images: Tensor,
    grad: Tensor,
    alpha: float,
    alpha_per_image: Tensor | None,
    origin: Tensor | None,
    eps: float | None,
    eps_per_image: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    adversarial = empty_images(images)
    images, grad = ordered_like(images, adversarial), ordered_like(grad, adversarial)
    origin = None if origin is None else ordered_like(origin, adversarial)
    numel, tuned = numel_per_image(images), config("step", images.device)
    block = min(power_of_two(numel), tuned.block)
    blocks = triton.cdiv(numel, block)
    launch(
        sign_step_kernel, images.shape[0] * blocks, images, images, grad, origin, adversarial, alpha_per_image,
        eps_per_image, numel, blocks, bits(alpha), bits(0.0 if eps is None else eps), bits(low), bits(high),
        A=triton_dtype(images.dtype), BLOCK=block, num_warps=tuned.num_warps,
    )  # fmt: skip
    return adversarial


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    scaled = gradient_like(grad)
    grad = ordered_like(grad, scaled)
    numel, tuned = numel_per_image(grad), config("step", grad.device)
    block = min(power_of_two(numel), tuned.block)
    blocks = triton.cdiv(numel, block)
    launch(
        scale_gradient_kernel, grad.shape[0] * blocks, grad, grad, factor, scaled, numel, blocks, factor.stride(0),
        A=triton_dtype(factor.dtype), BLOCK=block, num_warps=tuned.num_warps,
    )  # fmt: skip
    return scaled
