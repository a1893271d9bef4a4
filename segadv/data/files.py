"""Segmentation data sets on disk: pairs of an image file and a mask file, read and checked in one place."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IGNORE_INDEX", "Listing", "SegmentationFiles"]

IGNORE_INDEX = 255

NO_CLASS = 254
"""In a table from file values to classes: a value that must not occur."""


@dataclass
class Listing:
    """The files of a split, before any of them is opened.

    Attributes:
        images, labels: paths; those at equal positions belong together.
        missing: a message for every file that should be there and is not.
        orphans: a message for every mask without an image that no list names; they do no harm.
    """

    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    def extend(self, other: Listing) -> None:
        for name, messages in vars(self).items():
            messages.extend(getattr(other, name))


def reads_files(dataset: object) -> TypeGuard[SegmentationFiles]:
    """Whether its samples are what `SegmentationFiles.pixels` reads: those of a sub-class with a ``__getitem__`` of its
    own are not."""
    return isinstance(dataset, SegmentationFiles) and type(dataset).__getitem__ is SegmentationFiles.__getitem__


class SegmentationFiles(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images and masks of one split of a data set on disk; the base of `Cityscapes`, `VOC` and `TrainAug`.

    ``dataset[i]`` is ``(image, label)``: image float32 [3, H, W] in [0, 1]; label uint8 [H, W] with the classes
    of `class_names`, and `IGNORE_INDEX` where there is none. ``dataset.image_paths[i]`` and
    ``dataset.label_paths[i]`` name the files.

    Args:
        root: folder of the data set.
        split: "train", "val" or another one that the data set has.

    Raises:
        FileNotFoundError: a folder, an image or a mask is missing.
        OSError: a file that cannot be read (upon indexing).
        ValueError: image and mask of different sizes, a wrong image mode or palette, a value that stands for no class
            (upon indexing).
        ImportError: a package that reads the files is missing.
    """

    num_classes: ClassVar[int]
    class_names: ClassVar[tuple[str, ...]]
    colors: ClassVar[tuple[tuple[int, int, int], ...]]
    official_lengths: ClassVar[Mapping[str, int]]
    """split -> number of images in the data set as it is published."""
    classes_of_values: ClassVar[npt.NDArray[np.uint8]]
    """[256]: value in a mask file -> class, `IGNORE_INDEX` or `NO_CLASS`."""
    allowed_values: ClassVar[str]
    """`classes_of_values` in words, for messages."""

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        require_pillow()
        listing = self.list_files(Path(root), split)
        if listing.missing:
            raise FileNotFoundError(shortened(listing.missing))
        self.image_paths, self.label_paths = listing.images, listing.labels

    @classmethod
    def list_files(cls, root: Path, split: str) -> Listing:
        """The files of a split. Raises FileNotFoundError where the layout is not as expected."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, label = self.pixels(index)
        return torch.from_numpy(to_float(pixels)), torch.from_numpy(label)

    def pixels(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The sample before its conversion: image uint8 [H, W, 3], label uint8 [H, W].

        `Augmented` reads this, so that only the crop is converted.
        """
        image_path, label_path = self.image_paths[index], self.label_paths[index]
        image, values = self.read_image(image_path), self.read_mask(label_path)
        require_same_size(image_path, image.shape[:2], label_path, values.shape)
        label = np.take(self.classes_of_values, values)
        if (label == NO_CLASS).any():
            raise ValueError(self.wrong_values(label_path, np.unique(values[label == NO_CLASS])))
        return image, label

    @staticmethod
    def read_image(path: str) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3]."""
        raise NotImplementedError

    @staticmethod
    def read_mask(path: str) -> npt.NDArray[np.uint8]:
        """The values of a mask file, uint8 [H, W]."""
        raise NotImplementedError

    @classmethod
    def doubt(cls, pixels: npt.NDArray[np.int64]) -> str | None:
        """What is odd about the classes of a whole split; pixels: [256] of each class. None: nothing."""
        return None

    @classmethod
    def wrong_values(cls, path: str, values: Iterable[int]) -> str:
        found = [int(value) for value in values]
        return (
            f"{path}: label values must be {cls.allowed_values}, found {found}; "
            "restore the file, or paint these pixels 255 (no class)"
        )


def to_float(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    image = np.empty((3, *pixels.shape[:2]), np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=image)
    return image


def require_same_size(image_path: str, image: tuple[int, ...], label_path: str, label: tuple[int, ...]) -> None:
    if image != label:
        raise ValueError(
            f"image and label must have the same size: {image_path} has {image[0]} x {image[1]}, "
            f"{label_path} has {label[0]} x {label[1]} (height x width); restore the one that was changed"
        )


def require_pillow() -> None:
    """Raises an ImportError that says how to get Pillow where it is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("reading and writing PNG files needs Pillow: pip install pillow") from error


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file whose pixels are not yet read. Whatever is wrong with it is an OSError that names it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist (any more); restore it") from error
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise OSError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {error}); "
            "restore it from the data set's archive"
        ) from error


def load_image(path: str, modes: Collection[str], remedy: str, *, of_indices: bool = False) -> Image.Image:
    """An image file as it is stored. An EXIF orientation is not applied: masks are drawn for the stored pixels.

    Args:
        modes: of Pillow; any other is refused.
        remedy: what to do about another mode, for the message.
        of_indices: refuse grey of few bits, which Pillow multiplies.
    """
    with opened(path) as image:
        stored = [str(tile[3]) for tile in getattr(image, "tile", ())] if of_indices else []
        few_bits = any(kind in name for name in stored for kind in ("L;2", "L;4"))
        image.load()
    if few_bits:
        raise ValueError(f"{path}: grey of 2 or 4 bits, which is read as multiples of its values; save it with 8 bits")
    if image.mode not in modes:
        allowed = " or ".join(f'"{mode}"' for mode in modes)
        raise ValueError(f'{path}: the image mode must be {allowed}, this one is "{image.mode}"; {remedy}')
    return image


def read_pixels(path: str, modes: Collection[str], remedy: str, *, of_indices: bool = False) -> npt.NDArray[np.uint8]:
    """The pixels of `load_image`: [H, W, 3] for the mode "RGB", [H, W] for "L" and "P"."""
    return np.array(load_image(path, modes, remedy, of_indices=of_indices))


def names_in(folder: Path, ending: str) -> set[str]:
    """File names of a folder that end so, without the ending. Hidden files are left out (macOS puts ._* there)."""
    if not folder.is_dir():
        return set()
    return {name.removesuffix(ending) for name in os.listdir(folder) if name.endswith(ending) and name[0] != "."}


def found_in(folder: Path) -> str:
    """What stands in a folder, for an error message."""
    if not folder.is_dir():
        return f"{folder} is no folder" if folder.exists() else f"{folder} does not exist"
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"{folder} contains: {shown or 'nothing'}"


def shortened(messages: list[str]) -> str:
    more = len(messages) - 5
    return "\n".join(messages[:5] + ([f"... and {more} more like these"] if more > 0 else []))
