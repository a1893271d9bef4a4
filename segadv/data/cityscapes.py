"""Cityscapes: images and their 19 training classes, read from the data set's own folder layout.

Layout, class table and palette (packages leftImg8bit and gtFine): Cordts et al., "The Cityscapes Dataset for
Semantic Urban Scene Understanding", CVPR 2016, arXiv 1604.01685.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

__all__ = ["CLASSES", "COLORS", "IGNORE_INDEX", "NUM_CLASSES", "Cityscapes"]

IGNORE_INDEX = 255

# trainId: name, the label id that the files carry, official colour
_TABLE: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CLASSES: tuple[str, ...] = tuple(name for name, _, _ in _TABLE)
COLORS: tuple[tuple[int, int, int], ...] = tuple(color for _, _, color in _TABLE)
NUM_CLASSES = len(CLASSES)

_NO_LABEL_ID = 254  # marks the values that are no label id at all


def _train_id_lookup() -> npt.NDArray[np.uint8]:
    lookup = np.full(256, _NO_LABEL_ID, np.uint8)
    lookup[:34] = IGNORE_INDEX
    lookup[255] = IGNORE_INDEX  # id -1 (licence plate) in a file of 8 bits
    for train_id, (_, label_id, _) in enumerate(_TABLE):
        lookup[label_id] = train_id
    return lookup


_TRAIN_IDS = _train_id_lookup()


def require_pillow() -> None:
    """Raises an ImportError that says how to get Pillow where it is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("reading and writing PNG files needs Pillow: pip install pillow") from error


def _read_png(path: str, mode: str) -> npt.NDArray[np.uint8]:
    """The pixels of an 8-bit PNG: [H, W, 3] for mode "RGB", [H, W] for mode "L". The array is read-only."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise OSError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error
    if image.mode != mode:
        raise ValueError(f'{path}: the image mode must be "{mode}", this one is "{image.mode}"')
    return np.asarray(image)


def _found(folder: Path) -> str:
    """What stands in a folder, for an error message."""
    if not folder.is_dir():
        return f"{folder} is no folder" if folder.exists() else f"{folder} does not exist"
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"{folder} contains: {shown or 'nothing'}"


class Cityscapes(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images and training labels of one split, sorted by city and name.

    Args:
        root: folder with ``leftImg8bit/<split>/<city>/<id>_leftImg8bit.png`` (8-bit RGB) and
            ``gtFine/<split>/<city>/<id>_gtFine_labelIds.png`` (8-bit grey, label ids of the official table).
        split: name of the split's folder: "train", "val" or "test".

    ``dataset[i]`` is ``(image, label)``: image float32 [3, H, W] in [0, 1]; label uint8 [H, W] with the 19
    trainIds of `CLASSES`, and `IGNORE_INDEX` where the table has none. ``dataset.image_paths[i]`` and
    ``dataset.label_paths[i]`` name the files.

    Raises:
        FileNotFoundError: no image where the layout expects them, or an image without a label file.
        OSError: a file that cannot be read as an image (upon indexing).
        ValueError: image and label of different sizes, a wrong image mode, a value that is no label id (upon
            indexing).
        ImportError: Pillow is missing.
    """

    num_classes = NUM_CLASSES
    class_names = CLASSES
    colors = COLORS

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        require_pillow()
        root = Path(root)
        image_folder, label_folder = root / "leftImg8bit" / split, root / "gtFine" / split
        self.image_paths = sorted(str(path) for path in image_folder.glob("*/*_leftImg8bit.png"))
        if not self.image_paths:
            found = [_found(folder) for folder in (root, root / "leftImg8bit", image_folder) if folder.is_dir()]
            raise FileNotFoundError(
                f"no Cityscapes images for split {split!r} under root {str(root)!r}\n"
                f"  expected: {image_folder}/<city>/<id>_leftImg8bit.png\n"
                f"       and: {label_folder}/<city>/<id>_gtFine_labelIds.png\n"
                f"     found: " + "; ".join(found or [_found(root)])
            )
        labels = {str(path) for path in label_folder.glob("*/*_gtFine_labelIds.png")}
        self.label_paths = []
        for path in self.image_paths:
            image = Path(path)
            identity = image.name.removesuffix("_leftImg8bit.png")
            label = str(label_folder / image.parent.name / f"{identity}_gtFine_labelIds.png")
            if label not in labels:
                raise FileNotFoundError(f"image {path} has no label file, expected {label}")
            self.label_paths.append(label)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_path, label_path = self.image_paths[index], self.label_paths[index]
        pixels = _read_png(image_path, "RGB")
        label_ids = _read_png(label_path, "L")
        height, width = pixels.shape[:2]
        if label_ids.shape != (height, width):
            raise ValueError(
                f"image and label must have the same size: {image_path} has {height} x {width}, "
                f"{label_path} has {label_ids.shape[0]} x {label_ids.shape[1]} (height x width)"
            )
        train_ids = _TRAIN_IDS[label_ids]
        if (train_ids == _NO_LABEL_ID).any():
            wrong = np.unique(label_ids[train_ids == _NO_LABEL_ID]).tolist()
            raise ValueError(f"{label_path}: label ids must be 0..33 (or 255 for -1), found {wrong}")
        image = np.empty((3, height, width), np.float32)
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=image)
        return torch.from_numpy(image), torch.from_numpy(train_ids)
