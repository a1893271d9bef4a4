"""The autograd.Functions, outside the operations.

Each backward is a registered operation of its own. None can be differentiated again: a backward that runs with
gradients enabled, that is under create_graph=True, raises (once_differentiable was measured to let silently
wrong second derivatives through).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import backends, library
from .common import compute_dtype, is_channels_last


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply; RuntimeError under a torch.func transform, where PyTorch's own tells how to write a function."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "tensors must be outside of a torch.func transform (grad, vmap, jvp), which the fused losses, margins and "
            "norms do not support, got them inside of one. Take the gradient with torch.autograd.grad or "
            "segadv.functional.loss_and_grad, or write the loss in plain PyTorch there (the docstring's "
            "'Equivalent to')"
        )
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _refuse_second_derivative(operation: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"segadv.functional.{operation} has no second derivative, so its backward cannot run under "
            "create_graph=True. Write the loss in plain PyTorch there (the docstring's 'Equivalent to')."
        )


def _remember_backend(ctx: FunctionCtx) -> None:
    ctx.backend = None if torch.compiler.is_compiling() else backends.requested()  # type: ignore[attr-defined]


def _remembered_backend(ctx: Any) -> AbstractContextManager[None]:
    """The forward's choice: the backward may run in another thread. A compiled graph chooses when it runs."""
    return nullcontext() if torch.compiler.is_compiling() else backends.backend(ctx.backend)


def _takes_one_pass(logits: Tensor, labels: Tensor) -> bool:
    """Whether the forward computes the gradient too, of each image's sum, which the backward then only scales.

    It saves the backward's pass over the upsampled logits, at the price of scaling a gradient of their own size:
    worth it from a quarter of the pixels on. Not in float16, which holds no sum over many pixels.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and logits.dtype is not torch.float16
        and 4 * logits.shape[2] * logits.shape[3] <= labels.shape[1] * labels.shape[2]
    )


class InOnePass(torch.autograd.Function):
    """(name, logits, the operation's other arguments) -> (sum per image [N], what its mean is divided by [N]), by the
    operation that gives the sum's gradient too."""

    @staticmethod
    def forward(ctx: Any, name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        operation = library.gain_and_grad if name == "averaged_gain" else library.loss_and_grad
        total, *_, count, grad = operation(*arguments)
        ctx.save_for_backward(grad)
        ctx.name, ctx.further = name, len(arguments) - 1
        ctx.mark_non_differentiable(count)
        _remember_backend(ctx)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivative(ctx.name)
        (grad,) = ctx.saved_tensors  # to which a hook may have given another precision
        with _remembered_backend(ctx):
            scaled: Tensor = library.scale_gradient(grad, grad_sum.to(compute_dtype(grad.dtype)))
        return None, scaled, *[None] * ctx.further


class PixelMargin(torch.autograd.Function):
    """(logits, labels) -> margin [N, H, W]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> Tensor:
        result: tuple[Tensor, Tensor] = library.pixel_margin(logits, labels, ignore_index, align_corners)
        margin, runner_up = result
        _save_margin(ctx, logits, labels, runner_up, ignore_index, align_corners)
        return margin

    @staticmethod
    def backward(ctx: Any, grad_margin: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivative("pixel_margin")
        return _margin_backward(ctx, grad_margin), None, None, None


class AveragedGain(torch.autograd.Function):
    """(logits, labels) -> (sum of margins [N], n_valid [N]); the mean is taken outside."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        gain_sum, n_valid, runner_up = library.averaged_gain(logits, labels, ignore_index, align_corners)
        _save_margin(ctx, logits, labels, runner_up, ignore_index, align_corners)
        ctx.mark_non_differentiable(n_valid)
        return gain_sum, n_valid

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivative("averaged_gain")
        return _margin_backward(ctx, grad_sum.view(-1, 1, 1)), None, None, None


def _save_margin(
    ctx: Any, logits: Tensor, labels: Tensor, runner_up: Tensor, ignore_index: int, align_corners: bool
) -> None:
    # Not the logits: the backward needs their layout only, and their memory may be freed meanwhile.
    ctx.save_for_backward(labels, runner_up)
    ctx.layout = (list(logits.shape), is_channels_last(logits), logits.dtype)
    ctx.options = (ignore_index, align_corners)
    _remember_backend(ctx)


def _margin_backward(ctx: Any, grad_margin: Tensor) -> Tensor:
    labels, runner_up = ctx.saved_tensors
    runner_up = runner_up.contiguous()  # hooks on saved tensors may give other strides back
    with _remembered_backend(ctx):
        grad: Tensor = library.margin_backward(
            grad_margin.expand(labels.shape), labels, runner_up, *ctx.layout, *ctx.options
        )
    return grad


def averaged_gain(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    if _takes_one_pass(logits, labels):
        return apply(InOnePass, "averaged_gain", logits, labels, ignore_index, align_corners)  # type: ignore[no-any-return]
    return apply(AveragedGain, logits, labels, ignore_index, align_corners)  # type: ignore[no-any-return]


class CrossEntropy(torch.autograd.Function):
    """(logits, labels, ...) -> (loss [N, H, W] or its sum per image [N], n_valid [N], sum of the weights [N])."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        loss: str,
        lam: float,
        targeted: bool,
        ignore_index: int,
        align_corners: bool,
        per_pixel: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, n_valid, weight_sum, shift, scale, pixel_weight = library.cross_entropy(
            logits, labels, class_weight, loss, lam, targeted, ignore_index, align_corners, per_pixel,
            ctx.needs_input_grad[0],
        )  # fmt: skip
        is_plain = loss == "cross_entropy"
        weights = (class_weight, None) if is_plain else (None, pixel_weight)  # the latter contains the former
        ctx.save_for_backward(logits, labels, shift, scale, *weights)
        ctx.dtype, ctx.options = logits.dtype, (ignore_index, align_corners)
        ctx.name = "cross_entropy" if is_plain else f"{loss}_loss"
        ctx.mark_non_differentiable(n_valid, weight_sum)
        _remember_backend(ctx)
        return value, n_valid, weight_sum

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _refuse_second_derivative(ctx.name)
        logits, labels, *others = ctx.saved_tensors
        # Hooks on saved tensors may give other strides and another precision back.
        logits = logits.to(ctx.dtype)
        shift, scale, class_weight, pixel_weight = (
            None if saved is None else saved.to(compute_dtype(ctx.dtype)).contiguous() for saved in others
        )
        if grad_loss.dim() == 1:  # [N]: the same for every pixel of an image; a view, no memory
            grad_loss = grad_loss.view(-1, 1, 1).expand(labels.shape)
        with _remembered_backend(ctx):
            grad = library.cross_entropy_backward(
                grad_loss, logits, labels, shift, scale, class_weight, pixel_weight, *ctx.options
            )
        return grad, *[None] * 8


_PLAIN = ("cross_entropy", 0.0, False)
"""The arguments loss, lam and targeted of a cross-entropy without weights of the pixels."""


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (logits, labels, class_weight, *_PLAIN, ignore_index, align_corners)
    if not per_pixel and _takes_one_pass(logits, labels):
        return apply(InOnePass, "cross_entropy", *arguments)  # type: ignore[no-any-return]
    value, _, weight_sum = apply(CrossEntropy, *arguments, per_pixel)
    return value, weight_sum


def weighted_loss(
    logits: Tensor, labels: Tensor, loss: str, lam: float, targeted: bool, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    arguments = (logits, labels, None, loss, lam, targeted, ignore_index, align_corners)
    value, n_valid, _ = apply(CrossEntropy, *arguments, False)
    return value, n_valid


class L1Norm(torch.autograd.Function):
    """grad [N, ...] -> norm [N]. Its backward is plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        norm: Tensor = library.l1_norm(grad)
        ctx.save_for_backward(grad)
        return norm

    @staticmethod
    def backward(ctx: Any, grad_norm: Tensor) -> Tensor:
        (grad,) = ctx.saved_tensors
        result: Tensor = grad_norm.view(-1, *[1] * (grad.dim() - 1)) * grad.sign()
        return result.to(grad.dtype)
