"""Which backend runs, and the reason where one cannot.

A backend is a module, or an object, that has one function per operation of `library.py`, of the same name and
arguments, and `unavailable(device_type)`: None where it can run, otherwise the reason in words. The native backend is
two of them: native.py for the CPU, cuda.py for a GPU.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..checks import one_of
from . import native, reference, triton
from .cuda import CudaKernels

BACKENDS: dict[str, Any] = {"native": native.CPU, "triton": triton, "reference": reference}

# The native backend on a GPU: CUDA, compiled in where there was an nvcc.
_CUDA = CudaKernels(native.cuda_core)


def _preference(device_type: str) -> tuple[str, ...]:
    """The first that can run on the device is the default. Triton's interpreter, on the CPU, is for tests only.

    On a GPU the compiled kernels come before Triton's: nothing is compiled at run time, and a call should cost less on
    the host. That is a choice made before any measurement on a GPU.
    """
    return ("native", "reference") if device_type == "cpu" else ("native", "triton", "reference")


_local = threading.local()
_warned: set[str] = set()


def requested() -> str | None:
    """The backend asked for by `segadv.backend(...)` in this thread, else by SEGADV_BACKEND, else None."""
    name: str | None = getattr(_local, "name", None)
    if name is None and (name := os.environ.get("SEGADV_BACKEND") or None):
        one_of(BACKENDS, SEGADV_BACKEND=name)
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces a backend inside the `with` block, in this thread; None leaves the choice automatic.

    Args:
        name: "native", "triton", "reference", or None.

    Raises:
        ValueError: for an unknown name. RuntimeError, from the operation, where the backend cannot run: an
        explicit request never falls back.
    """
    if name is not None:
        one_of(BACKENDS, backend=name)
    previous = getattr(_local, "name", None)
    _local.name = name
    try:
        yield
    finally:
        _local.name = previous


def _implementation(name: str, device_type: str) -> Any:
    return _CUDA if name == "native" and device_type == "cuda" else BACKENDS[name]


def select(device_type: str) -> Any:
    """The backend for tensors of a device: the requested one or an error, else the default."""
    name = requested()
    if name is not None:
        if reason := BACKENDS[name].unavailable(device_type):
            raise RuntimeError(f"backend {name!r} was requested for {device_type} tensors but cannot run: {reason}")
        return _implementation(name, device_type)
    chosen = default(device_type)
    if chosen == "reference" and device_type not in _warned:
        _warned.add(device_type)
        others = _preference(device_type)[:-1]
        reasons = "; ".join(f"{other}: {BACKENDS[other].unavailable(device_type)}" for other in others)
        warnings.warn(
            f"segadv runs its slow reference backend for {device_type} tensors ({reasons}). "
            "`segadv doctor` tells more; SEGADV_BACKEND=reference accepts it silently.",
            RuntimeWarning,
            stacklevel=2,
        )
    return _implementation(chosen, device_type)


def default(device_type: str) -> str:
    return next(name for name in _preference(device_type) if BACKENDS[name].unavailable(device_type) is None)


def report() -> str:
    """For every kind of device of this machine: the backend that would run, and why another would not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for device_type in devices:
        try:
            forced = requested()
            if forced:
                select(device_type)  # raises where it cannot run
            lines.append(f"{device_type}: {forced} (requested)" if forced else f"{device_type}: {default(device_type)}")
        except (RuntimeError, ValueError) as error:
            lines.append(f"{device_type}: none ({error})")
        for other, module in BACKENDS.items():
            reason = module.unavailable(device_type)
            lines.append(f"  {other}: {'can run' if reason is None else 'cannot run: ' + reason}")
    if "cuda" not in devices:
        lines.append("cuda: no GPU is visible to torch")
    return "\n".join(lines)
