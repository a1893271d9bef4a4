"""Cityscapes: images and their 19 training classes, read from the data set's own folder layout.

Layout, class table and palette (packages leftImg8bit and gtFine): Cordts et al., "The Cityscapes Dataset for
Semantic Urban Scene Understanding", CVPR 2016, arXiv 1604.01685.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .files import IGNORE_INDEX, NO_CLASS, Listing, SegmentationFiles, found_in, names_in, read_pixels

__all__ = ["CLASSES", "COLORS", "NUM_CLASSES", "Cityscapes"]

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


def _classes_of_label_ids() -> npt.NDArray[np.uint8]:
    classes = np.full(256, NO_CLASS, np.uint8)
    classes[:34] = IGNORE_INDEX
    classes[255] = IGNORE_INDEX  # id -1 (licence plate) in a file of 8 bits
    for train_id, (_, label_id, _) in enumerate(_TABLE):
        classes[label_id] = train_id
    return classes


class Cityscapes(SegmentationFiles):
    """Images and the 19 training classes of one split, sorted by city and name.

    Samples and errors are those of `SegmentationFiles`; the classes are the trainIds of `CLASSES`.

    Args:
        root: folder with ``leftImg8bit/<split>/<city>/<id>_leftImg8bit.png`` (8-bit RGB) and
            ``gtFine/<split>/<city>/<id>_gtFine_labelIds.png`` (8-bit grey, label ids of the official table).
        split: name of the split's folder: "train", "val" or "test".
    """

    num_classes = NUM_CLASSES
    class_names = CLASSES
    colors = COLORS
    official_lengths: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500, "test": 1525}
    classes_of_values = _classes_of_label_ids()
    allowed_values = "0..33 (or 255 for -1)"

    @classmethod
    def list_files(cls, root: Path, split: str) -> Listing:
        image_folder, label_folder = root / "leftImg8bit" / split, root / "gtFine" / split
        images = _by_city(image_folder, "_leftImg8bit.png")
        if not images:
            found = [found_in(folder) for folder in (root, root / "leftImg8bit", image_folder) if folder.is_dir()]
            raise FileNotFoundError(
                f"no Cityscapes images for split {split!r} under root {str(root)!r}\n"
                f"  expected: {image_folder}/<city>/<id>_leftImg8bit.png\n"
                f"       and: {label_folder}/<city>/<id>_gtFine_labelIds.png\n"
                f"     found: " + "; ".join(found or [found_in(root)])
            )
        labels = _by_city(label_folder, "_gtFine_labelIds.png")
        listing = Listing()
        for city, name in sorted(images):
            image = image_folder / city / f"{name}_leftImg8bit.png"
            label = label_folder / city / f"{name}_gtFine_labelIds.png"
            if (city, name) in labels:
                listing.images.append(str(image))
                listing.labels.append(str(label))
            else:
                listing.missing.append(
                    f"image {image} has no label file, expected {label}; "
                    "restore it from the archive gtFine, or remove the image"
                )
        for city, name in sorted(labels - images):
            label = label_folder / city / f"{name}_gtFine_labelIds.png"
            image = image_folder / city / f"{name}_leftImg8bit.png"
            listing.missing.append(
                f"label {label} has no image file, expected {image}; "
                "restore it from the archive leftImg8bit, or remove the label"
            )
        return listing

    @classmethod
    def doubt(cls, pixels: npt.NDArray[np.int64]) -> str | None:
        """Train ids are 0 to 18; of label ids vegetation, sky and cars, which no split lacks, are above."""
        if pixels[:6].any() and not pixels[6:NUM_CLASSES].any():
            return (
                "no mask has a value above 18: these are train ids, not label ids; restore the files "
                "*_gtFine_labelIds.png of the archive gtFine"
            )
        return None

    @staticmethod
    def read_image(path: str) -> npt.NDArray[np.uint8]:
        return read_pixels(path, ["RGB"], "restore the original file")

    @staticmethod
    def read_mask(path: str) -> npt.NDArray[np.uint8]:
        remedy = "use the files *_gtFine_labelIds.png of the archive gtFine, not *_color.png"
        return read_pixels(path, ["L"], remedy, of_indices=True)


def _by_city(folder: Path, ending: str) -> set[tuple[str, str]]:
    cities = folder.iterdir() if folder.is_dir() else []
    return {(city.name, name) for city in cities for name in names_in(city, ending)}
