"""What every backend agrees on: the dtypes and layouts of outputs, and the message for a bad label."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Floating results and all arithmetic: float32, or float64 for float64 logits."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def class_dtype(num_classes: int) -> torch.dtype:
    """Of a map of classes, a quarter or half of an int32: predictions, or what is kept for the backward."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def is_channels_last(tensor: Tensor) -> bool:
    """Whether what belongs to `tensor` (gradient, adversarial images) is laid out channels_last, or contiguous."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def empty_images(images: Tensor) -> Tensor:
    """An output of an operation on images: channels_last like them, otherwise contiguous."""
    memory_format = torch.channels_last if is_channels_last(images) else torch.contiguous_format
    return torch.empty_like(images, memory_format=memory_format)


def ordered_like(tensor: Tensor, output: Tensor) -> Tensor:
    """The tensor itself where its elements lie in the output's order, as they nearly always do, else a copy."""
    if tensor.stride() == output.stride():
        return tensor
    return torch.empty_like(output).copy_(tensor)


def empty_gradient(size: list[int], channels_last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)


def gradient_like(logits: Tensor) -> Tensor:
    return empty_gradient(list(logits.shape), is_channels_last(logits), logits.dtype, logits.device)


def empty_vector(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An [N], of the dtype of floating results unless said otherwise."""
    return torch.empty(like.shape[0], dtype=dtype or compute_dtype(like.dtype), device=like.device)


def weights_of_images(class_weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """[C] or [N, C] as the [N, C], dense along C, that kernels read. Inductor makes an expanded one dense along N."""
    if class_weight is None:
        return None
    n, num_classes = logits.shape[:2]
    dtype = compute_dtype(logits.dtype)
    if class_weight.shape not in ((num_classes,), (n, num_classes)) or class_weight.dtype is not dtype:
        raise ValueError(
            f"class_weight must be [{num_classes}] or [{n}, {num_classes}] of {dtype}, got "
            f"{list(class_weight.shape)} of {class_weight.dtype}"
        )
    of_images = class_weight.expand(n, num_classes)
    return of_images if of_images.stride(1) == 1 else of_images.contiguous()


def empty_map(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous [N, H, W]."""
    return torch.empty(labels.shape, dtype=dtype, device=labels.device)


def empty_maps(labels: Tensor, dtype: torch.dtype, count: int, wanted: bool) -> list[Tensor]:
    """Several of them, or as many [0] where they are not wanted."""
    return [empty_map(labels, dtype) if wanted else labels.new_empty(0, dtype=dtype) for _ in range(count)]


def empty_matrix(logits: Tensor, per_image: bool) -> Tensor:
    """An int64 [C, C], or [N, C, C]."""
    num_images, num_classes = logits.shape[:2]
    shape = (num_images, num_classes, num_classes) if per_image else (num_classes, num_classes)
    return torch.empty(shape, dtype=torch.int64, device=logits.device)


def zero_counts(logits: Tensor, per_image: bool) -> Tensor:
    """Zeros, int32 [matrices, copies, C * C + 1], in which a GPU counts (label, prediction), and bad labels at the end.

    64 copies of a matrix, so that few threads meet at one count; less where they would take more than 16 MiB.
    """
    matrices, cells = logits.shape[0] if per_image else 1, logits.shape[1] ** 2
    copies = max(1, min(64, 2**22 // max(1, matrices * cells)))
    return torch.zeros(matrices, copies, cells + 1, dtype=torch.int32, device=logits.device)


def synchronous_checks() -> bool:
    """SEGADV_CHECK=1: labels and images on a GPU are checked at once, as on the CPU, at the price of a wait."""
    on = os.environ.get("SEGADV_CHECK", "0") not in ("", "0")
    if on and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("SEGADV_CHECK=1 waits for the GPU and so cannot be on during a CUDA graph capture")
    return on


def raise_bad_label(labels: Tensor, index: int, num_classes: int, ignore_index: int) -> None:
    """Raises the ValueError for the bad label at the flat (row-major) position `index` of labels [N, H, W]."""
    where = tuple(map(int, np.unravel_index(index, labels.shape)))
    raise ValueError(
        f"labels must be class indices in [0, {num_classes}) (the logits have {num_classes} classes) or "
        f"ignore_index = {ignore_index}, got {int(labels[where])} at [n, y, x] = {list(where)}"
    )


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises for the first label that is neither a class nor ignore_index. Reads the result: waits for a GPU."""
    wide = labels.long()
    bad = ((wide < 0) | (wide >= num_classes)) & (wide != ignore_index)
    if bool(bad.any()):
        raise_bad_label(labels, int(bad.flatten().int().argmax()), num_classes, ignore_index)


def numel_per_image(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])
