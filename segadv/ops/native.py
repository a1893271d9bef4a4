"""The native backend on the CPU: tensors become pointers, sizes and strides for the compiled core `_segadv_native`.

Outputs are allocated here; the core writes every element of them. What the arguments mean: csrc/segadv.h. On a GPU
the native backend is `cuda.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .common import (
    compute_dtype,
    empty_gradient,
    empty_images,
    is_channels_last,
    numel_per_image,
    ordered_like,
    prediction_dtype,
    raise_bad_label,
    runner_up_dtype,
)

try:
    import _segadv_native as core
except ImportError as error:
    core = None
    _import_error = (
        "the extension _segadv_native is not installed; installing segadv builds it where there is a C++ compiler"
        if isinstance(error, ModuleNotFoundError)
        else f"the extension _segadv_native does not load: {error}"
    )

# csrc/segadv.h, kInterfaceVersion
_INTERFACE_VERSION = 3
if core is not None and core.interface_version != _INTERFACE_VERSION:
    raise ImportError(
        f"segadv: the installed extension {core.__file__} has interface {core.interface_version}, this package "
        f"({__file__}) needs {_INTERFACE_VERSION}. They come from different versions: install segadv again, and "
        "run it from outside an older clone."
    )

# The functions of the CUDA kernels, where they are compiled in.
cuda_core = getattr(core, "cuda", None)

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.uint8: 7,
}
LOSSES = {"cross_entropy": 0, "segpgd": 1, "cospgd": 2}

_View = tuple[int, int, Any, Any]


def unavailable(device_type: str) -> str | None:
    if core is None:
        return _import_error
    if device_type == "cuda":
        return _cuda_unavailable()
    if device_type != "cpu":
        return f"this build has no kernels for {device_type} tensors"
    return None


@cache
def _cuda_unavailable() -> str | None:
    if cuda_core is None:
        return (
            "this build has no CUDA kernels: no working nvcc was found when segadv was installed, or SEGADV_CUDA=OFF; "
            "install it again with SEGADV_CUDA=ON, which says what is missing"
        )
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if reason := cuda_core.check():
        return f"its CUDA kernels (CUDA {cuda_core.compiler}) cannot run: {reason}"
    architectures = cuda_core.architectures.split()
    for index in range(torch.cuda.device_count()):
        if not compiled_for(torch.cuda.get_device_capability(index), architectures):
            major, minor = torch.cuda.get_device_capability(index)
            return (
                f"its CUDA kernels were compiled for {', '.join(architectures)}, not for GPU {index} of compute "
                f"capability {major}.{minor}; install segadv again on this machine, or with CUDAARCHS={major}{minor}"
            )
    return None


def compiled_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for CMake's `architectures` runs on such a GPU.

    "90-real" is machine code, for 9.0 and what follows within the 9s; "120-virtual" is PTX, for all that follows;
    "120" is both. "90a" is for 9.0 alone.
    """
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        digits = number.rstrip("af")
        compiled = (int(digits[:-1]), int(digits[-1]))
        same_generation = kind != "virtual" and capability[0] == compiled[0]
        later = kind != "real" and digits == number
        if capability == compiled or (
            not number.endswith("a") and (same_generation or later) and capability > compiled
        ):
            return True
    return False


def build_info() -> dict[str, Any]:
    """What is installed and compiled in: versions, compiler, instruction set, OpenMP, and where the extension lies."""
    info: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "native": core is not None,
    }
    if core is None:
        return info | {"native_missing": _import_error}
    return info | {
        "native_version": core.version,
        "native_path": core.__file__,
        "interface_version": core.interface_version,
        "compiler": core.compiler,
        "instruction_set": core.instruction_set(),
        "openmp": getattr(core, "openmp", None),
        "threads": core.max_threads() if hasattr(core, "max_threads") else 1,
        "cuda": f"nvcc {cuda_core.compiler} for {cuda_core.architectures}" if cuda_core is not None else None,
    }


def view(tensor: Tensor | None) -> _View | None:
    return None if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape, tensor.stride())


def _vector(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape[0], dtype=dtype)


def _map(labels: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(labels.shape, dtype=dtype)


def _gradient(logits: Tensor) -> Tensor:
    return empty_gradient(list(logits.shape), is_channels_last(logits), logits.dtype, logits.device)


def _check(bad: int, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    if bad >= 0:
        raise_bad_label(labels, bad, num_classes, ignore_index)


def _margin(
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
    bad = core.margin(
        view(logits), view(labels), view(grad), ignore_index, align_corners,
        view(margin), view(runner_up), view(gain_sum), view(n_valid),
    )  # fmt: skip
    _check(bad, labels, logits.shape[1], ignore_index)


def pixel_margin(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    margin = _map(labels, compute_dtype(logits.dtype))
    runner_up = _map(labels, runner_up_dtype(logits.shape[1]))
    _margin(logits, labels, ignore_index, align_corners, margin=margin, runner_up=runner_up)
    return margin, runner_up


def averaged_gain(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gain_sum = _vector(logits, compute_dtype(logits.dtype))
    n_valid = _vector(logits, torch.int64)
    runner_up = _map(labels, runner_up_dtype(logits.shape[1]))
    _margin(logits, labels, ignore_index, align_corners, runner_up=runner_up, gain_sum=gain_sum, n_valid=n_valid)
    return gain_sum, n_valid, runner_up


def gain_and_grad(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gain_sum = _vector(logits, compute_dtype(logits.dtype))
    n_valid = _vector(logits, torch.int64)
    grad = _gradient(logits)
    _margin(logits, labels, ignore_index, align_corners, grad=grad, gain_sum=gain_sum, n_valid=n_valid)
    return gain_sum, n_valid, grad


def margin_backward(
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
    bad = core.margin_backward(
        logits, view(labels), view(grad), ignore_index, align_corners, view(runner_up), view(grad_margin)
    )
    _check(bad, labels, size[1], ignore_index)
    return grad


def _cross_entropy(
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
    bad = core.cross_entropy(
        view(logits), view(labels), view(grad), ignore_index, align_corners, LOSSES[loss], lam, targeted,
        view(class_weight), view(pixel_loss), view(largest), view(log_normalizer), view(pixel_weight),
        view(loss_sum), view(weight_sum), view(n_valid),
    )  # fmt: skip
    _check(bad, labels, logits.shape[1], ignore_index)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    loss = _map(labels, dtype) if per_pixel else _vector(logits, dtype)
    weight_sum = _vector(logits, dtype)
    largest, log_normalizer = _map(labels, dtype), _map(labels, dtype)
    _cross_entropy(
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
    logits: Tensor,
    labels: Tensor,
    loss: str,
    lam: float,
    targeted: bool,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    loss_sum, n_valid = _vector(logits, dtype), _vector(logits, torch.int64)
    largest, log_normalizer, pixel_weight = (_map(labels, dtype) for _ in range(3))
    _cross_entropy(
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
    logits: Tensor, labels: Tensor, lam: float, targeted: bool, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _weighted_loss(logits, labels, "segpgd", lam, targeted, ignore_index, align_corners)


def cospgd_loss(
    logits: Tensor, labels: Tensor, targeted: bool, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _weighted_loss(logits, labels, "cospgd", 0.0, targeted, ignore_index, align_corners)


def loss_and_grad(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    loss: str,
    lam: float,
    targeted: bool,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    loss_sum, n_valid, weight_sum = (
        _vector(logits, dtype),
        _vector(logits, torch.int64),
        _vector(logits, dtype),
    )
    grad = _gradient(logits)
    _cross_entropy(
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
    bad = core.cross_entropy_backward(
        view(logits), view(labels), view(grad), ignore_index, align_corners,
        view(grad_loss), view(largest), view(log_normalizer), view(weight), view(pixel_weight),
    )  # fmt: skip
    _check(bad, labels, logits.shape[1], ignore_index)
    return grad


def row(tensor: Tensor) -> _View:
    """A tensor that the step kernels see as rows of elements in whatever dense order."""
    return (tensor.data_ptr(), DTYPES[tensor.dtype], (), ())


def l1_norm(grad: Tensor) -> Tensor:
    norm = _vector(grad, compute_dtype(grad.dtype))
    if not is_channels_last(grad):
        grad = grad.contiguous()
    core.l1_norm(grad.shape[0], numel_per_image(grad), row(grad), row(norm))
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
    core.newton_step(
        images.shape[0], numel_per_image(images), row(images), row(grad), row(gain), row(adversarial),
        row(eps), row(norm), low, high, -1.0 if max_eps is None else max_eps, clamp_negative,
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
    core.sign_step(
        images.shape[0], numel_per_image(images), row(images), row(grad),
        None if origin is None else row(origin), row(adversarial), alpha, 0.0 if eps is None else eps,
        None if alpha_per_image is None else row(alpha_per_image),
        None if eps_per_image is None else row(eps_per_image), low, high,
    )  # fmt: skip
    return adversarial


def confusion_matrix(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
) -> tuple[Tensor, Tensor]:
    num_images, num_classes = logits.shape[:2]
    shape = (num_images, num_classes, num_classes) if per_image else (num_classes, num_classes)
    matrix = torch.empty(shape, dtype=torch.int64)
    bad = core.confusion(
        view(logits), view(labels), ignore_index, align_corners, None, view(matrix), per_image, None, None
    )
    _check(bad, labels, num_classes, ignore_index)
    return matrix, torch.zeros((), dtype=torch.int64)


def argmax_labels(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    prediction = torch.empty((logits.shape[0], *size), dtype=prediction_dtype(logits.shape[1]))
    labels = (0, DTYPES[torch.uint8], prediction.shape, prediction.stride())
    core.confusion(view(logits), labels, 0, align_corners, view(prediction), None, False, None, None)
    return prediction
