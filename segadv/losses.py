"""The fused cross-entropy as a criterion for anyone's training loop."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .checks import dtype_names, one_of, true_or_false, whole_number

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` for logits of any size: bilinear upsampling is part of the loss.

    Full-resolution logits are never built, and the gradient is with respect to the logits as given. Without a valid
    pixel the loss is 0. There is no label smoothing.

    Args:
        weight: [C] class weights.
        ignore_index: label of the pixels that do not count; 255 here, where PyTorch has -100.
        reduction: "mean" over the valid pixels of the batch, divided by the sum of their weights; "sum"; "none", 0 at
            ignored pixels; "image": the mean of each image.
        align_corners: of the resampling.

    Shapes: logits [N, C, h, w] float32, bfloat16, float16 or float64; labels [N, H, W] int64, int32, int16 or
    uint8; the loss is a scalar ([N, H, W] with "none", [N] with "image"), float32 (float64 for float64 logits).

    Equivalent to::

        z = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
        nn.CrossEntropyLoss(weight=weight, ignore_index=ignore_index, reduction=reduction)(z, labels.long())

    (PyTorch has no "image".)

    Raises:
        TypeError: a weight that is no tensor, an ignore_index that is no whole number, an align_corners that is neither
            True nor False.
        ValueError: a weight that is not a floating point [C], an unknown reduction.

    The call raises what `segadv.functional.cross_entropy` does.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: functional.Reduction
    align_corners: bool

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        reduction: functional.Reduction = "mean",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor [C], got a {type(weight).__name__}")
        if weight is not None and (weight.dim() != 1 or not weight.is_floating_point()):
            raise ValueError(
                f"weight must be a floating point [C], got {dtype_names(weight.dtype)} {list(weight.shape)}"
            )
        whole_number(ignore_index=ignore_index)
        true_or_false(align_corners=align_corners)
        one_of(functional.REDUCTIONS, reduction=reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = int(ignore_index)
        self.reduction = reduction
        self.align_corners = align_corners

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits,
            labels,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f"weight={list(self.weight.shape)}, "
        options = f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, align_corners={self.align_corners}"
        return weight + options
