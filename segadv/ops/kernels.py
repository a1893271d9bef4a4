"""Tensors become pointers, sizes and strides for a compiled core: the CPU's in native.py, the GPU's in cuda.py. Those
methods that call `_margin` or `_cross_entropy` serve Triton too, which replaces these: triton_kernels/operations.py.

Outputs are allocated here; the core writes every element of them. What the arguments mean: csrc/segadv.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import (
    class_dtype,
    compute_dtype,
    empty_gradient,
    empty_images,
    empty_map,
    empty_maps,
    empty_vector,
    gradient_like,
    is_channels_last,
    numel_per_image,
    ordered_like,
    weights_of_images,
)

_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.uint8: 7,
}
_LOSSES = {"cross_entropy": 0, "segpgd": 1, "cospgd": 2}

View = tuple[int, int, Any, Any]
"""Address, dtype, sizes and strides of a tensor, as the core takes them."""


def view(tensor: Tensor | None) -> View | None:
    return None if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride())


def row(tensor: Tensor | None) -> View | None:
    """A tensor that the step kernels see as rows of elements in whatever dense order."""
    return None if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype], (), ())


class Kernels:
    """One method per operation of library.py, over the functions of a compiled module. How a function is called is the
    sub-classes' affair.

    Args:
        core: the module; None where there is none, and then nothing may be called that a sub-class does not replace.
    """

    def __init__(self, core: Any) -> None:
        self.core = core

    def _launch(self, kernel: Any, like: Tensor, *arguments: Any) -> Any:
        """Calls a function of the core where the tensor `like` is."""
        raise NotImplementedError

    def _pixels(
        self, kernel: Any, size: Any, labels: Tensor, ignore_index: int, align_corners: bool, *arguments: Any
    ) -> None:
        """Calls one that reads labels, with logits of that size."""
        raise NotImplementedError

    def _images(self, kernel: Any, images: Tensor, *arguments: Any, sums: bool = False) -> None:
        """Calls one that takes images as rows, and sums over them or does not."""
        raise NotImplementedError

    def _in_two_kernels(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether the gradient has a kernel of its own, which reads maps that the first one leaves."""
        return False

    def confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    # --- margin ---

    def _margin(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        align_corners: bool,
        *,
        grad: Tensor | None = None,
        margin: Tensor | None = None,
        runner_up: Tensor | None = None,
        gain_sum: Tensor | None = None,
        n_valid: Tensor | None = None,
    ) -> None:
        if grad is not None and self._in_two_kernels(logits, labels):
            runner_up = empty_map(labels, class_dtype(logits.shape[1]))
        self._pixels(
            self.core.margin, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners,
            view(margin), view(runner_up), view(gain_sum), view(n_valid),
        )  # fmt: skip

    def pixel_margin(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        margin = empty_map(labels, compute_dtype(logits.dtype))
        runner_up = empty_map(labels, class_dtype(logits.shape[1]))
        self._margin(logits, labels, ignore_index, align_corners, margin=margin, runner_up=runner_up)
        return margin, runner_up

    def averaged_gain(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain_sum, n_valid = empty_vector(logits), empty_vector(logits, torch.int64)
        runner_up = empty_map(labels, class_dtype(logits.shape[1]))
        self._margin(
            logits, labels, ignore_index, align_corners, runner_up=runner_up, gain_sum=gain_sum, n_valid=n_valid
        )
        return gain_sum, n_valid, runner_up

    def gain_and_grad(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain_sum, n_valid, grad = empty_vector(logits), empty_vector(logits, torch.int64), gradient_like(logits)
        self._margin(logits, labels, ignore_index, align_corners, grad=grad, gain_sum=gain_sum, n_valid=n_valid)
        return gain_sum, n_valid, grad

    def margin_backward(
        self,
        grad_margin: Tensor,
        labels: Tensor,
        runner_up: Tensor,
        size: list[int],
        channels_last: bool,
        dtype: torch.dtype,
        ignore_index: int,
        align_corners: bool,
    ) -> Tensor:
        grad = empty_gradient(size, channels_last, dtype, labels.device)
        # Sizes without data: the logits' values are not needed.
        logits = (0, _DTYPES[dtype], size, grad.stride())
        self._pixels(
            self.core.margin_backward, size, labels, ignore_index, align_corners,
            logits, view(labels), view(grad), ignore_index, align_corners, view(runner_up), view(grad_margin),
        )  # fmt: skip
        return grad

    # --- cross-entropy and its weighted relatives ---

    def _cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        align_corners: bool,
        *,
        loss: str = "cross_entropy",
        lam: float = 0.0,
        targeted: bool = False,
        grad: Tensor | None = None,
        class_weight: Tensor | None = None,
        pixel_loss: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        loss_sum: Tensor | None = None,
        weight_sum: Tensor | None = None,
        n_valid: Tensor | None = None,
    ) -> None:
        class_weight = weights_of_images(class_weight, logits)
        if grad is not None and self._in_two_kernels(logits, labels):
            shift, scale = (empty_map(labels, compute_dtype(logits.dtype)) for _ in range(2))
            if loss != "cross_entropy":
                pixel_weight = torch.empty_like(shift)
        self._pixels(
            self.core.cross_entropy, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners, _LOSSES[loss], lam, targeted,
            view(class_weight), view(pixel_loss), view(shift), view(scale), view(pixel_weight),
            view(loss_sum), view(weight_sum), view(n_valid),
        )  # fmt: skip

    def cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        loss: str,
        lam: float,
        targeted: bool,
        ignore_index: int,
        align_corners: bool,
        per_pixel: bool,
        for_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype, weighs = compute_dtype(logits.dtype), for_backward and loss != "cross_entropy"
        value = empty_map(labels, dtype) if per_pixel else empty_vector(logits)
        n_valid, weight_sum = empty_vector(logits, torch.int64), empty_vector(logits)
        shift, scale = empty_maps(labels, dtype, 2, for_backward)
        (pixel_weight,) = empty_maps(labels, dtype, 1, weighs)
        self._cross_entropy(
            logits,
            labels,
            ignore_index,
            align_corners,
            loss=loss,
            lam=lam,
            targeted=targeted,
            class_weight=class_weight,
            pixel_loss=value if per_pixel else None,
            loss_sum=None if per_pixel else value,
            n_valid=n_valid,
            weight_sum=weight_sum,
            shift=shift if for_backward else None,
            scale=scale if for_backward else None,
            pixel_weight=pixel_weight if weighs else None,
        )
        return value, n_valid, weight_sum, shift, scale, pixel_weight

    def loss_and_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        loss: str,
        lam: float,
        targeted: bool,
        ignore_index: int,
        align_corners: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss_sum, n_valid, weight_sum = empty_vector(logits), empty_vector(logits, torch.int64), empty_vector(logits)
        grad = gradient_like(logits)
        self._cross_entropy(
            logits,
            labels,
            ignore_index,
            align_corners,
            loss=loss,
            lam=lam,
            targeted=targeted,
            grad=grad,
            class_weight=class_weight,
            loss_sum=loss_sum,
            weight_sum=weight_sum,
            n_valid=n_valid,
        )
        return loss_sum, n_valid, weight_sum, grad

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        shift: Tensor,
        scale: Tensor,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        ignore_index: int,
        align_corners: bool,
    ) -> Tensor:
        class_weight = weights_of_images(class_weight, logits)
        grad = gradient_like(logits)
        self._pixels(
            self.core.cross_entropy_backward, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners,
            view(grad_loss), view(shift), view(scale), view(class_weight), view(pixel_weight),
        )  # fmt: skip
        return grad

    # --- steps in pixel space, and what else takes images as rows ---

    def l1_norm(self, grad: Tensor) -> Tensor:
        norm = empty_vector(grad)
        if not is_channels_last(grad):
            grad = grad.contiguous()
        self._images(self.core.l1_norm, grad, row(grad), row(norm), sums=True)
        return norm

    def newton_step(
        self,
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
        if numel_per_image(images) == 0:
            return adversarial, eps.zero_(), norm.zero_()
        self._images(
            self.core.newton_step, images, row(images), row(grad), row(gain), row(adversarial), row(eps),
            row(norm), low, high, -1.0 if max_eps is None else max_eps, clamp_negative, sums=True,
        )  # fmt: skip
        return adversarial, eps, norm

    def sign_step(
        self,
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
        self._images(
            self.core.sign_step, images, row(images), row(grad), row(origin), row(adversarial), alpha,
            0.0 if eps is None else eps, row(alpha_per_image), row(eps_per_image), low, high,
        )  # fmt: skip
        return adversarial

    def scale_gradient(self, grad: Tensor, factor: Tensor) -> Tensor:
        scaled = gradient_like(grad)
        grad = ordered_like(grad, scaled)
        self._images(self.core.scale_gradient, grad, row(grad), view(factor), row(scaled))
        return scaled

    # --- predictions ---

    def argmax_labels(self, logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
        dtype = class_dtype(logits.shape[1])
        prediction = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
        labels = (0, _DTYPES[torch.uint8], prediction.shape, prediction.stride())
        self._launch(
            self.core.confusion, logits, view(logits), labels, 0, align_corners, view(prediction), None, False, None,
            None,
        )  # fmt: skip
        return prediction
