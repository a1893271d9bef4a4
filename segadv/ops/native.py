"""The native backend on the CPU, and what is compiled into the core `_segadv_native`. On a GPU it is cuda.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .common import empty_matrix, numel_per_image, raise_bad_label
from .kernels import Kernels, view

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
_INTERFACE_VERSION = 8
if core is not None and core.interface_version != _INTERFACE_VERSION:
    raise ImportError(
        f"segadv: the installed extension {core.__file__} has interface {core.interface_version}, this package "
        f"({__file__}) needs {_INTERFACE_VERSION}. They come from different versions: install segadv again, and "
        "run it from outside an older clone."
    )

# The functions of the CUDA kernels, where they are compiled in.
cuda_core = getattr(core, "cuda", None)


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
    "120" is both. "90a" is for 9.0 alone, "100f" for the 10s.
    """
    for architecture in architectures:
        number, _, kind = architecture.partition("-")
        digits = number.rstrip("af")
        compiled = (int(digits[:-1]), int(digits[-1]))
        same_generation = capability[0] == compiled[0]
        later = kind != "real" and digits == number
        if capability == compiled or (
            not number.endswith("a") and (same_generation or later) and capability > compiled
        ):
            return True
    return False


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:  # it comes under another name: pytorch-triton, pytorch-triton-rocm, triton-windows
        found: str | None = getattr(importlib.import_module("triton"), "__version__", None)  # a folder has none
        return found


def build_info() -> dict[str, Any]:
    """What is installed and compiled in: versions, compiler, instruction set, OpenMP, and where the extension lies."""
    info: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": _triton_version(),
        "native": core is not None,
    }
    if core is None:
        return info | {"native_missing": _import_error}
    return info | {
        "native_version": core.version,
        "native_path": core.__file__,
        "interface_version": core.interface_version,
        "sources": core.sources,
        "compiler": core.compiler,
        "instruction_set": core.instruction_set(),
        "openmp": core.openmp,
        "threads": torch.get_num_threads(),
        "cuda": f"nvcc {cuda_core.compiler} for {cuda_core.architectures}" if cuda_core is not None else None,
    }


class CpuKernels(Kernels):
    """The functions for the CPU: they return the position of a bad label, or -1."""

    def unavailable(self, device_type: str) -> str | None:
        """Of both of the native backends."""
        if core is None:
            return _import_error
        if device_type == "cuda":
            return _cuda_unavailable()
        if device_type != "cpu":
            return f"this build has no kernels for {device_type} tensors"
        return None

    def _launch(self, kernel: Any, like: Tensor, *arguments: Any) -> Any:
        return kernel(*arguments, torch.get_num_threads())

    def _pixels(
        self, kernel: Any, size: Any, labels: Tensor, ignore_index: int, align_corners: bool, *arguments: Any
    ) -> None:
        if (bad := self._launch(kernel, labels, *arguments)) >= 0:
            raise_bad_label(labels, bad, size[1], ignore_index)

    def _images(self, kernel: Any, images: Tensor, *arguments: Any, sums: bool = False) -> None:
        self._launch(kernel, images, images.shape[0], numel_per_image(images), *arguments)

    def confusion_matrix(
        self, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, per_image: bool
    ) -> tuple[Tensor, Tensor]:
        matrix = empty_matrix(logits, per_image)
        self._pixels(
            self.core.confusion, logits.shape, labels, ignore_index, align_corners,
            view(logits), view(labels), ignore_index, align_corners, None, view(matrix), per_image, None, None,
        )  # fmt: skip
        return matrix, torch.zeros((), dtype=torch.int64, device=logits.device)


CPU = CpuKernels(core)
