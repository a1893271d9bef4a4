"""Schemas, fake kernels and registration of every operation: reads from top to bottom.

Opaque operations (`define` + `impl`) keep the dispatcher's cost at about 2 us, pass opcheck, and compile with
fullgraph=True. None is differentiable by itself: the autograd.Functions of `autograd.py` stand outside. Which
backend runs is decided inside the implementation, at run time, so that compiled graphs obey `segadv.backend` too; but
for the backward of a compiled graph on a GPU, which autograd runs in a thread of its own: there SEGADV_BACKEND counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends
from .common import (
    class_dtype,
    compute_dtype,
    empty_gradient,
    empty_images,
    empty_map,
    empty_maps,
    empty_matrix,
    empty_vector,
    gradient_like,
)

_LIBRARY = torch.library.Library("segadv", "DEF")

# needs_fixed_stride_order: Inductor must hand over the strides that the fake kernels saw.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def _define(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Defines an operation, whose fake kernel is the decorated function of its name; gives the operation itself."""

    def register(fake: Callable[..., Any]) -> Any:
        name = fake.__name__
        _LIBRARY.define(name + schema, tags=_TAGS)

        def run(*args: Any) -> Any:
            return getattr(backends.select(args[0].device.type), name)(*args)

        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"segadv::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.segadv, name).default

    return register


# Margin: csrc/cpu/margin.cpp


@_define("(Tensor logits, Tensor labels, int ignore_index, bool align_corners) -> (Tensor margin, Tensor runner_up)")
def pixel_margin(logits, labels, ignore_index, align_corners):  # type: ignore[no-untyped-def]
    return empty_map(labels, compute_dtype(logits.dtype)), empty_map(labels, class_dtype(logits.shape[1]))


@_define(
    "(Tensor logits, Tensor labels, int ignore_index, bool align_corners)"
    " -> (Tensor gain_sum, Tensor n_valid, Tensor runner_up)"
)
def averaged_gain(logits, labels, ignore_index, align_corners):  # type: ignore[no-untyped-def]
    return empty_vector(logits), empty_vector(logits, torch.int64), empty_map(labels, class_dtype(logits.shape[1]))


@_define(
    "(Tensor grad_margin, Tensor labels, Tensor runner_up, SymInt[] size, bool channels_last, ScalarType dtype,"
    " int ignore_index, bool align_corners) -> Tensor"
)
def margin_backward(  # type: ignore[no-untyped-def]
    grad_margin, labels, runner_up, size, channels_last, dtype, ignore_index, align_corners
):
    return empty_gradient(size, channels_last, dtype, labels.device)


@_define(
    "(Tensor logits, Tensor labels, int ignore_index, bool align_corners)"
    " -> (Tensor gain_sum, Tensor n_valid, Tensor grad)"
)
def gain_and_grad(logits, labels, ignore_index, align_corners):  # type: ignore[no-untyped-def]
    return empty_vector(logits), empty_vector(logits, torch.int64), gradient_like(logits)


# Cross-entropy, and segpgd_loss and cospgd_loss, which weigh it: csrc/cpu/cross_entropy.cpp. class_weight is [C] or
# [N, C] of the compute type; it is part of pixel_weight, which is the weight of each pixel in the other losses.
# Without for_backward the maps that the backward reads are not written, and empty; so is always a plain
# cross-entropy's pixel_weight.


@_define(
    "(Tensor logits, Tensor labels, Tensor? class_weight, str loss, float lam, bool targeted, int ignore_index,"
    " bool align_corners, bool per_pixel, bool for_backward)"
    " -> (Tensor value, Tensor n_valid, Tensor weight_sum, Tensor shift, Tensor scale, Tensor pixel_weight)"
)
def cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, class_weight, loss, lam, targeted, ignore_index, align_corners, per_pixel, for_backward
):
    dtype = compute_dtype(logits.dtype)
    value = empty_map(labels, dtype) if per_pixel else empty_vector(logits)
    maps = empty_maps(labels, dtype, 2, for_backward)
    maps += empty_maps(labels, dtype, 1, for_backward and loss != "cross_entropy")
    return value, empty_vector(logits, torch.int64), empty_vector(logits), *maps


@_define(
    "(Tensor grad_loss, Tensor logits, Tensor labels, Tensor shift, Tensor scale, Tensor? class_weight,"
    " Tensor? pixel_weight, int ignore_index, bool align_corners) -> Tensor"
)
def cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad_loss, logits, labels, shift, scale, class_weight, pixel_weight, ignore_index, align_corners
):
    return gradient_like(logits)


@_define(
    "(Tensor logits, Tensor labels, Tensor? class_weight, str loss, float lam, bool targeted, int ignore_index,"
    " bool align_corners) -> (Tensor loss_sum, Tensor n_valid, Tensor weight_sum, Tensor grad)"
)
def loss_and_grad(  # type: ignore[no-untyped-def]
    logits, labels, class_weight, loss, lam, targeted, ignore_index, align_corners
):
    return empty_vector(logits), empty_vector(logits, torch.int64), empty_vector(logits), gradient_like(logits)


# Steps in pixel space, and what else takes images as rows: csrc/cpu/step.cpp


@_define("(Tensor grad) -> Tensor")
def l1_norm(grad):  # type: ignore[no-untyped-def]
    return empty_vector(grad)


@_define(
    "(Tensor images, Tensor grad, Tensor gain, float low, float high, bool clamp_negative, float? max_eps)"
    " -> (Tensor adversarial, Tensor eps, Tensor norm)"
)
def newton_step(images, grad, gain, low, high, clamp_negative, max_eps):  # type: ignore[no-untyped-def]
    return empty_images(images), empty_vector(images), empty_vector(images)


@_define(
    "(Tensor images, Tensor grad, float alpha, Tensor? alpha_per_image, Tensor? origin, float? eps,"
    " Tensor? eps_per_image, float low, float high) -> Tensor"
)
def sign_step(  # type: ignore[no-untyped-def]
    images, grad, alpha, alpha_per_image, origin, eps, eps_per_image, low, high
):
    return empty_images(images)


@_define("(Tensor grad, Tensor factor) -> Tensor")
def scale_gradient(grad, factor):  # type: ignore[no-untyped-def]
    return gradient_like(grad)


# Predictions: csrc/cpu/confusion.cpp


@_define(
    "(Tensor logits, Tensor labels, int ignore_index, bool align_corners, bool per_image)"
    " -> (Tensor matrix, Tensor invalid)"
)
def confusion_matrix(logits, labels, ignore_index, align_corners, per_image):  # type: ignore[no-untyped-def]
    return empty_matrix(logits, per_image), logits.new_empty((), dtype=torch.int64)


@_define("(Tensor logits, SymInt[2] size, bool align_corners) -> Tensor")
def argmax_labels(logits, size, align_corners):  # type: ignore[no-untyped-def]
    return logits.new_empty((logits.shape[0], *size), dtype=class_dtype(logits.shape[1]))
