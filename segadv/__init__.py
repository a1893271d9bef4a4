"""segadv: fast, exact adversarial training and evaluation of semantic segmentation models."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from . import attacks, functional
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
    "attacks",
    "backend",
    "build_info",
    "fast_newton_step",
    "functional",
]

_ON_DEMAND = (
    "checkpoints", "compat", "data", "distributed", "evaluation", "masking", "models", "monitor", "plots", "report",
    "results", "training",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """`segadv.models` and the like, imported when first used: someone else's training loop needs none of them."""
    if name in _ON_DEMAND:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
