"""Samples that are wrong are named when they are read, where the file is still known."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor
from torch.utils.data import Dataset

from ..checks import LABEL_TYPES, dtype_names, in_range
from .files import IGNORE_INDEX, reads_files

__all__ = ["CheckedSamples", "checked"]


def checked(dataset: Dataset[tuple[Tensor, Tensor]], num_classes: int | None) -> Dataset[tuple[Tensor, Tensor]]:
    """`CheckedSamples` of a data set that does not check its samples itself, as `SegmentationFiles` do."""
    return dataset if reads_files(dataset) else CheckedSamples(dataset, num_classes=num_classes)


class CheckedSamples(Dataset[tuple[Tensor, Tensor]]):
    """The samples of another data set.

    Args:
        dataset: ``dataset[i]`` is (image, label). Its image_paths, where it has them, are named in errors.
        num_classes: labels have to be below, or `IGNORE_INDEX`; None: the data set's, where it has it.

    Raises:
        TypeError: a sample that is not two tensors.
        ValueError: image and label that are not [3, H, W] floating point and [H, W], a label that is no class, or not
            int64, int32, int16 or uint8, an image that is clearly not in [0, 1], to which attacks clip (upon indexing).
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, Tensor]], *, num_classes: int | None = None) -> None:
        self.dataset = dataset
        self.num_classes = getattr(dataset, "num_classes", None) if num_classes is None else num_classes

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.dataset[index]
        if not isinstance(sample, (tuple, list)) or [isinstance(part, Tensor) for part in sample] != [True, True]:
            parts = f" of {[type(part).__name__ for part in sample]}" if isinstance(sample, (tuple, list)) else ""
            raise TypeError(
                f"{self._named(index)}: two tensors, (image, label), are needed, got a {type(sample).__name__}{parts}"
            )
        image, label = sample
        if image.dim() != 3 or image.shape[0] != 3 or image.shape[1:] != label.shape or not image.is_floating_point():
            raise ValueError(
                f"{self._named(index)}: a floating point image [3, H, W] and a label [H, W] of the same size are "
                f"needed, got {dtype_names(image.dtype)} {list(image.shape)} and {list(label.shape)}"
            )
        if label.dtype not in LABEL_TYPES:
            known, given = dtype_names(*LABEL_TYPES), dtype_names(label.dtype)
            raise ValueError(f"{self._named(index)}: a label of {known} is needed, got {given}")
        in_range(image, self._named(index))
        if self.num_classes is not None:
            values = label.long()  # a comparison would take a number modulo 256 for uint8
            wrong = values[((values < 0) | (values >= self.num_classes)) & (values != IGNORE_INDEX)]
            if len(wrong):
                raise ValueError(
                    f"{self._named(index)}: labels must be classes 0 to {self.num_classes - 1} or {IGNORE_INDEX}, "
                    f"found {sorted(set(wrong.tolist()))[:8]}; pixels that do not count have the label {IGNORE_INDEX}"
                )
        return image, label

    def _named(self, index: int) -> str:
        for name in ("label_paths", "image_paths"):
            with suppress(Exception):  # of anybody's data set: they must not hide what is wrong with the sample
                return f"sample {index} ({getattr(self.dataset, name)[index]})"
        return f"sample {index}"
