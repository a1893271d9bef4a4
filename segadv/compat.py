"""torchvision beside a torch that it was not built for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_libraries: list[torch.library.Library] = []  # kept: a schema is gone when its Library is


def import_torchvision() -> ModuleType | None:
    """torchvision, imported also where its compiled operators cannot be loaded; None where it is not installed.

    A torchvision that was built for CUDA, beside a torch for the CPU, fails at its import ("operator
    torchvision::nms does not exist"), and with it everything that imports it: timm, torchmetrics, transformers,
    segmentation-models-pytorch. All it lacks then is the schemas of two operators. They are defined here, in this
    case only; models, transforms and data sets then work, the compiled operators (nms, roi_align, ...) and image codecs
    do not. Call it before importing a package that imports torchvision.

    Raises:
        ImportError, RuntimeError: torchvision is installed, but cannot be imported for another reason.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _libraries or "operator torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
