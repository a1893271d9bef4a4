"""The triton backend: kernels for a GPU without nvcc, other vendors' GPUs too, compiled at their first call.

The kernels are in triton_kernels/; nothing is imported before it is needed, Triton itself included. On the CPU they
run in Triton's interpreter, for tests (TRITON_INTERPRET=1, set before the first import).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from functools import cache
from typing import Any

import torch

from .kernels import Kernels


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not callable(getattr(Kernels, name, None)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    operation = getattr(importlib.import_module(".triton_kernels.operations", __package__).OPERATIONS, name)
    globals()[name] = operation
    return operation


def _has_compiler() -> bool:
    build = getattr(importlib.import_module("triton.knobs"), "build", None)
    replaced = getattr(build, "impl", None) is not None
    return replaced or "CC" in os.environ or bool(shutil.which("gcc") or shutil.which("clang"))


@cache
def unavailable(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type == "cpu" and not interpreted:
        return "Triton compiles for GPUs; on the CPU its interpreter can run the kernels, slowly: TRITON_INTERPRET=1"
    if device_type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set, with which Triton runs on CPU tensors only"
    if device_type not in ("cpu", "cuda"):
        return f"it has not been tried with {device_type} tensors"
    try:
        importlib.import_module(".triton_kernels.operations", __package__)
    except ImportError as error:
        return f"triton does not load: {error}"
    if device_type == "cuda" and sys.platform == "linux" and not _has_compiler():
        return "Triton needs a C compiler at its first call: gcc or clang on the PATH, or CC"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return "Triton needs a GPU of compute capability 7.5 or higher"
    return None
