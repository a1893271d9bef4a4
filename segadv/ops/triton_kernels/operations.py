"""The operations on these kernels. Those that are not named here are kernels.py's, which allocates what they give."""

from ..kernels import Kernels
from . import confusion, cross_entropy, margin, step


class TritonKernels(Kernels):
    """What launches them, in place of a compiled module's functions."""

    _margin = staticmethod(margin.margin)  # type: ignore[assignment]
    _cross_entropy = staticmethod(cross_entropy.cross_entropy)  # type: ignore[assignment]
    margin_backward = staticmethod(margin.margin_backward)  # type: ignore[assignment]
    cross_entropy_backward = staticmethod(cross_entropy.cross_entropy_backward)  # type: ignore[assignment]
    l1_norm = staticmethod(step.l1_norm)  # type: ignore[assignment]
    newton_step = staticmethod(step.newton_step)  # type: ignore[assignment]
    sign_step = staticmethod(step.sign_step)  # type: ignore[assignment]
    scale_gradient = staticmethod(step.scale_gradient)  # type: ignore[assignment]
    confusion_matrix = staticmethod(confusion.confusion_matrix)  # type: ignore[assignment]
    argmax_labels = staticmethod(confusion.argmax_labels)  # type: ignore[assignment]


OPERATIONS = TritonKernels(None)
