"""Data sets: Cityscapes from disk, generated street scenes in the same layout, and seeded augmentation."""

from __future__ import annotations

from .augment import Augmented, EpochSampler
from .cityscapes import CLASSES, COLORS, IGNORE_INDEX, NUM_CLASSES, Cityscapes
from .streets import generate_streets

__all__ = [
    "CLASSES",
    "COLORS",
    "IGNORE_INDEX",
    "NUM_CLASSES",
    "Augmented",
    "Cityscapes",
    "EpochSampler",
    "generate_streets",
]
