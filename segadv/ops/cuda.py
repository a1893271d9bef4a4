"""The native backend on a GPU: tensors become pointers, sizes and strides for the CUDA kernels of the compiled core.

Outputs, workspaces and the maps that one kernel leaves for the next are allocated here, from torch's own allocator and
so in the order of the current stream; the kernels write every element of the outputs. What the arguments mean:
csrc/segadv.h. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import (
    check_labels,
    compute_dtype,
    empty_gradient,
    empty_images,
    is_channels_last,
    numel_per_image,
    ordered_like,
    prediction_dtype,
    runner_up_dtype,
)
from .native import DTYPES, LOSSES, row, view

# Absent where torch has no CUDA; the public way builds an object at every call.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(device: torch.device) -> int:
    if _raw_stream is not None:
        return int(_raw_stream(device.index))
    return torch.cuda.current_stream(device).cuda_stream


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An [N], of the dtype of floating results unless said otherwise."""
    return torch.empty(tensor.shape[0], dtype=dtype or compute_dtype(tensor.dtype), device=tensor.device)


def _map(labels: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(labels.shape, dtype=dtype, device=labels.device)


def _gradient(logits: Tensor) -> Tensor:
    return empty_gradient(list(logits.shape), is_channels_last(logits), logits.dtype, logits.device)


def _resampled(size: Any, labels: Tensor) -> bool:
    return tuple(size[-2:]) != tuple(labels.shape[-2:])


class CudaKernels:
    """One method per operation of library.py, over the functions of a compiled module.

    Args:
        core: the submodule `cuda` of the extension; None where it has none. The tests' emulation, whose kernels run on
            CPU tensors, offers the same functions.
    """

    def __init__(self, core: Any, device_type: str = "cuda") -> None:
        self.core = core
        self.device_type = device_type

    def unavailable(self, device_type: str) -> str | None:
        """For the emulation; of a GPU the native backend answers."""
        return None if device_type == self.device_type else f"it is made for {self.device_type} tensors"

    def _launch(self, kernel: Any, like: Tensor, *arguments: Any, workspace_bytes: int = 0) -> None:
        """Calls the kernel on the device and the current stream of the tensor `like`."""
        device = like.device
        # Freed when this returns, which is in order: what takes its place is used later on the same stream.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device) if workspace_bytes else None
        address = 0 if workspace is None else workspace.data_ptr()
        if device.type != "cuda":
            kernel(*arguments, address, 0)
        elif device.index == torch.cuda.current_device():
            kernel(*arguments, address, _stream(device))
        else:
            with torch.cuda.device(device):
                kernel(*arguments, address, _stream(device))

    def _launch_pixels(
        self, kernel: Any, size: Any, labels: Tensor, ignore_index: int, align_corners: bool, *arguments: Any
    ) -> None:
        if labels.device.type == "cpu":  # emulated: a bad label is an error there
            check_labels(labels, size[1], ignore_index)
        workspace_bytes = self.core.pixel_workspace(*size, *labels.shape[1:], align_corners)
        self._launch(kernel, labels, *arguments, workspace_bytes=workspace_bytes)

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
        if grad is not None and _resampled(logits.shape, labels):  # what the gradient's own kernel reads
            runner_up = _map(labels, runner_up_dtype(logits.shape[1]))
        self._launch_pixels(
            self.core.margin, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners,
            view(margin), view(runner_up), view(gain_sum), view(n_valid),
        )  # fmt: skip

    def pixel_margin(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor]:
        margin = _map(labels, compute_dtype(logits.dtype))
        runner_up = _map(labels, runner_up_dtype(logits.shape[1]))
        self._margin(logits, labels, ignore_index, align_corners, margin=margin, runner_up=runner_up)
        return margin, runner_up

    def averaged_gain(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain_sum, n_valid = _like(logits), _like(logits, torch.int64)
        runner_up = _map(labels, runner_up_dtype(logits.shape[1]))
        self._margin(
            logits, labels, ignore_index, align_corners, runner_up=runner_up, gain_sum=gain_sum, n_valid=n_valid
        )
        return gain_sum, n_valid, runner_up

    def gain_and_grad(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gain_sum, n_valid, grad = _like(logits), _like(logits, torch.int64), _gradient(logits)
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
        logits = (0, DTYPES[dtype], size, grad.stride())
        self._launch_pixels(
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
        largest: Tensor | None = None,
        log_normalizer: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        loss_sum: Tensor | None = None,
        weight_sum: Tensor | None = None,
        n_valid: Tensor | None = None,
    ) -> None:
        if grad is not None and _resampled(logits.shape, labels):  # what the gradient's own kernel reads
            largest, log_normalizer = (_map(labels, compute_dtype(logits.dtype)) for _ in range(2))
            if loss != "cross_entropy":
                pixel_weight = torch.empty_like(largest)
        self._launch_pixels(
            self.core.cross_entropy, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners, LOSSES[loss], lam, targeted,
            view(class_weight), view(pixel_loss), view(largest), view(log_normalizer), view(pixel_weight),
            view(loss_sum), view(weight_sum), view(n_valid),
        )  # fmt: skip

    def cross_entropy(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        align_corners: bool,
        per_pixel: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(logits.dtype)
        loss = _map(labels, dtype) if per_pixel else _like(logits)
        weight_sum = _like(logits)
        largest, log_normalizer = _map(labels, dtype), _map(labels, dtype)
        self._cross_entropy(
            logits,
            labels,
            ignore_index,
            align_corners,
            class_weight=weight,
            pixel_loss=loss if per_pixel else None,
            loss_sum=None if per_pixel else loss,
            weight_sum=weight_sum,
            largest=largest,
            log_normalizer=log_normalizer,
        )
        return loss, weight_sum, largest, log_normalizer

    def _weighted_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        loss: str,
        lam: float,
        targeted: bool,
        ignore_index: int,
        align_corners: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss_sum, n_valid = _like(logits), _like(logits, torch.int64)
        largest, log_normalizer, pixel_weight = (_map(labels, loss_sum.dtype) for _ in range(3))
        self._cross_entropy(
            logits,
            labels,
            ignore_index,
            align_corners,
            loss=loss,
            lam=lam,
            targeted=targeted,
            loss_sum=loss_sum,
            n_valid=n_valid,
            largest=largest,
            log_normalizer=log_normalizer,
            pixel_weight=pixel_weight,
        )
        return loss_sum, n_valid, largest, log_normalizer, pixel_weight

    def segpgd_loss(
        self, logits: Tensor, labels: Tensor, lam: float, targeted: bool, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self._weighted_loss(logits, labels, "segpgd", lam, targeted, ignore_index, align_corners)

    def cospgd_loss(
        self, logits: Tensor, labels: Tensor, targeted: bool, ignore_index: int, align_corners: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self._weighted_loss(logits, labels, "cospgd", 0.0, targeted, ignore_index, align_corners)

    def loss_and_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        loss: str,
        lam: float,
        targeted: bool,
        ignore_index: int,
        align_corners: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss_sum, n_valid, weight_sum = _like(logits), _like(logits, torch.int64), _like(logits)
        grad = _gradient(logits)
        self._cross_entropy(
            logits,
            labels,
            ignore_index,
            align_corners,
            loss=loss,
            lam=lam,
            targeted=targeted,
            grad=grad,
            class_weight=weight,
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
        largest: Tensor,
        log_normalizer: Tensor,
        weight: Tensor | None,
        pixel_weight: Tensor | None,
        ignore_index: int,
        align_corners: bool,
    ) -> Tensor:
        grad = _gradient(logits)
        self._launch_pixels(
            self.core.cross_entropy_backward, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), view(grad), ignore_index, align_corners,
            view(grad_loss), view(largest), view(log_normalizer), view(weight), view(pixel_weight),
        )  # fmt: skip
        return grad

    # --- steps in pixel space ---

    def l1_norm(self, grad: Tensor) -> Tensor:
        norm = _like(grad)
        if not is_channels_last(grad):
            grad = grad.contiguous()
        n, numel = grad.shape[0], numel_per_image(grad)
        self._launch(
            self.core.l1_norm, grad, n, numel, row(grad), row(norm),
            workspace_bytes=self.core.image_workspace(n, numel),
        )  # fmt: skip
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
        n, numel = images.shape[0], numel_per_image(images)
        if numel == 0:
            return adversarial, eps.zero_(), norm.zero_()
        self._launch(
            self.core.newton_step, images, n, numel, row(images), row(grad), row(gain), row(adversarial), row(eps),
            row(norm), low, high, -1.0 if max_eps is None else max_eps, clamp_negative,
            workspace_bytes=self.core.image_workspace(n, numel),
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
        self._launch(
            self.core.sign_step, images, images.shape[0], numel_per_image(images), row(images), row(grad),
            None if origin is None else row(origin), row(adversarial), alpha, 0.0 if eps is None else eps,
            None if alpha_per_image is None else row(alpha_per_image),
            None if eps_per_image is None else row(eps_per_image), low, high,
        )  # fmt: skip
        return adversarial

    # --- predictions ---

    def confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
    ) -> tuple[Tensor, Tensor]:
        num_images, num_classes = logits.shape[:2]
        if labels.device.type == "cpu":
            check_labels(labels, num_classes, ignore_index)
        images, cells = num_images if per_image else 1, num_classes**2
        # 64 copies of a matrix, less where they would take more than 16 MiB
        copies = max(1, min(64, 2**22 // max(1, images * cells)))
        counts = torch.zeros(images, copies, cells + 1, dtype=torch.int32, device=logits.device)
        shape = (num_images, num_classes, num_classes) if per_image else (num_classes, num_classes)
        matrix = torch.empty(shape, dtype=torch.int64, device=logits.device)
        invalid = torch.empty((), dtype=torch.int64, device=logits.device)
        self._launch(
            self.core.confusion, logits, view(logits), view(labels), ignore_index, align_corners, None, view(matrix),
            per_image, view(counts), view(invalid),
        )  # fmt: skip
        return matrix, invalid

    def argmax_labels(self, logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
        dtype = prediction_dtype(logits.shape[1])
        prediction = torch.empty((logits.shape[0], *size), dtype=dtype, device=logits.device)
        labels = (0, DTYPES[torch.uint8], prediction.shape, prediction.stride())
        self._launch(
            self.core.confusion, logits, view(logits), labels, 0, align_corners, view(prediction), None, False, None,
            None,
        )  # fmt: skip
        return prediction
