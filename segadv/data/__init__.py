"""Data sets from disk (Cityscapes, VOC, trainaug), generated street scenes, and seeded augmentation."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..checks import one_of
from .augment import Augmentation, Augmented
from .check import check_files
from .cityscapes import CLASSES, COLORS, NUM_CLASSES, Cityscapes
from .files import IGNORE_INDEX, SegmentationFiles
from .sampler import EpochSampler
from .streets import generate_streets
from .voc import VOC, TrainAug

__all__ = [
    "CLASSES",
    "COLORS",
    "DATASETS",
    "IGNORE_INDEX",
    "NUM_CLASSES",
    "VOC",
    "Augmentation",
    "Augmented",
    "Cityscapes",
    "EpochSampler",
    "SegmentationFiles",
    "TrainAug",
    "check_files",
    "dataset_class",
    "generate_streets",
    "open_dataset",
]

DATASETS: Mapping[str, type[SegmentationFiles]] = {"cityscapes": Cityscapes, "voc": VOC, "trainaug": TrainAug}
"""name -> (root, split: "train" or "val") -> data set."""


def dataset_class(name: str) -> type[SegmentationFiles]:
    """The data set of a name in `DATASETS`; ValueError for another name."""
    one_of(DATASETS, dataset=name)
    return DATASETS[name]


def open_dataset(name: str, root: str | os.PathLike[str], split: str) -> SegmentationFiles:
    """A split, "train" or "val", of a data set on disk.

    Raises:
        ValueError: an unknown name; else what the data set raises.
    """
    return dataset_class(name)(root, split)
