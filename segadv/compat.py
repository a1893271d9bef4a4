"""torchvision beside a torch that it was not built for."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_libraries: list[torch.library.Library] = []  # a schema is gone when its Library is


def import_torchvision() -> ModuleType:
    """torchvision, imported also where its compiled operators cannot be loaded.

    A torchvision wheel that was built for CUDA, beside a torch for the CPU, fails at its import ("operator
    torchvision::nms does not exist"), and so does everything that imports it: timm, torchmetrics, transformers,
    segmentation-models-pytorch. Only the schemas of two operators are missed; they are defined here, in this
    case alone. Then models, transforms and data sets work; the compiled operators (nms, roi_align, ...) and
    image codecs do not. Call it before anything else imports torchvision.

    Raises:
        ImportError: there is no torchvision.
        RuntimeError: it cannot be imported for another reason.
    """
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
