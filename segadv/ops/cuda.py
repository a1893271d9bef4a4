"""The native backend on a GPU: the CUDA kernels of the compiled core.

Workspaces, and the maps that one kernel leaves for the next, come from torch's own allocator and so in the order of the
current stream. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import empty_matrix, numel_per_image, zero_counts
from .kernels import Kernels, view

# Absent where torch has no CUDA; the public way builds an object at every call.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(device: torch.device) -> int:
    if _raw_stream is not None:
        return int(_raw_stream(device.index))
    return torch.cuda.current_stream(device).cuda_stream


class CudaKernels(Kernels):
    """The functions for a GPU, which take a workspace and a stream.

    Args:
        core: the submodule `cuda` of the extension; None where it has none.
    """

    def _launch(self, kernel: Any, like: Tensor, *arguments: Any, workspace_bytes: int = 0) -> None:
        """Calls the kernel on the device and the current stream of the tensor `like`."""
        device = like.device
        # Freed when this returns, which is in order: what takes its place is used later on the same stream.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device) if workspace_bytes else None
        address = 0 if workspace is None else workspace.data_ptr()
        if device.index == torch.cuda.current_device():
            kernel(*arguments, address, _stream(device))
        else:
            with torch.cuda.device(device):
                kernel(*arguments, address, _stream(device))

    def _pixels(
        self, kernel: Any, size: Any, labels: Tensor, ignore_index: int, align_corners: bool, *arguments: Any
    ) -> None:
        workspace_bytes = self.core.pixel_workspace(*size, *labels.shape[1:], align_corners)
        self._launch(kernel, labels, *arguments, workspace_bytes=workspace_bytes)

    def _images(self, kernel: Any, images: Tensor, *arguments: Any, sums: bool = False) -> None:
        n, numel = images.shape[0], numel_per_image(images)
        workspace_bytes = self.core.image_workspace(n, numel) if sums else 0
        self._launch(kernel, images, n, numel, *arguments, workspace_bytes=workspace_bytes)

    def _in_two_kernels(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.shape[-2:] != labels.shape[-2:]

    def confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
    ) -> tuple[Tensor, Tensor]:
        counts = zero_counts(logits, per_image)
        matrix = empty_matrix(logits, per_image)
        invalid = torch.empty((), dtype=torch.int64, device=logits.device)
        self._launch(
            self.core.confusion, logits, view(logits), view(labels), ignore_index, align_corners, None, view(matrix),
            per_image, view(counts), view(invalid),
        )  # fmt: skip
        return matrix, invalid
