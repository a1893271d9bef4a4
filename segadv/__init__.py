"""segadv: fast, exact adversarial training and evaluation of semantic segmentation models."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import functional
from .attacks import fast_newton_step
from .losses import CrossEntropyLoss
from .ops.backends import backend
from .ops.native import build_info

try:
    __version__ = version("segadv")
except PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CrossEntropyLoss",
    "__version__",
    "backend",
    "build_info",
    "fast_newton_step",
    "functional",
]
