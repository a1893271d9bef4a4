"""Checks every file of a data set: `segadv data check DIR`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from ..progress import progress_bar
from .files import IGNORE_INDEX, NO_CLASS, Listing, SegmentationFiles, require_pillow, require_same_size

__all__ = ["SplitCheck", "check_files", "format_checks"]

KINDS = ("missing", "orphan", "unreadable", "other size", "wrong values")
"""What can be wrong: a file that should be there, a mask without image, a file that cannot be read or has a wrong
mode or palette, a mask of another size than its image, a mask with values that stand for no class."""

_FEW = 64  # files that one process reads before others have started


@dataclass
class SplitCheck:
    """What was found in one split.

    Attributes:
        split: its name.
        pairs: number of images with a mask.
        sizes: (height, width) -> number of images.
        pixels: int64 [256], pixels of each class; 255: void, 254: values outside of the table.
        images: int64 [256], masks in which each of them occurs.
        problems: (one of `KINDS`, message with the file and the remedy).
    """

    split: str
    pairs: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    images: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[tuple[str, str]] = field(default_factory=list)


def check_files(
    kind: type[SegmentationFiles],
    root: str | os.PathLike[str],
    splits: Sequence[str] = ("train", "val"),
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[SplitCheck]:
    """Reads all images and masks of some splits of a data set and collects what is wrong, instead of raising.

    Args:
        kind: class of the data set, one of the values of `segadv.data.DATASETS`.
        root: its folder.
        workers: processes that read; None: one for every CPU that this process may use, but none for few files.
        progress: show a progress bar, where the standard error stream is a terminal.

    Raises:
        OSError, ValueError: none of the splits has the layout of the data set; the message says what is expected.
        ImportError: a package that reads the files is missing.
    """
    require_pillow()
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    listings: dict[str, Listing | Exception] = {}
    for split in splits:
        try:
            listings[split] = kind.list_files(Path(root), split)
        except (OSError, ValueError) as error:
            listings[split] = error
    errors = [listing for listing in listings.values() if isinstance(listing, Exception)]
    if errors and len(errors) == len(listings):
        raise errors[0]
    checks = [_check_split(kind, split, listing, workers, progress) for split, listing in listings.items()]
    seen: set[tuple[str, str]] = set()  # splits that share a folder share its orphans
    for check in checks:
        check.problems = [problem for problem in check.problems if problem not in seen]
        seen.update(check.problems)
    return checks


def _check_split(
    kind: type[SegmentationFiles], split: str, listing: Listing | Exception, workers: int, progress: bool
) -> SplitCheck:
    check = SplitCheck(split)
    if isinstance(listing, Exception):
        check.problems.append(("missing", str(listing)))
        return check
    check.pairs = len(listing.images)
    check.problems += [("missing", message) for message in listing.missing]
    check.problems += [("orphan", message) for message in listing.orphans]
    loader: Iterable[Any] = DataLoader(
        _Pairs(kind, listing),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers if check.pairs > _FEW else 0,
    )
    show = progress and sys.stderr.isatty()  # so that log files stay readable
    with progress_bar(split, total=check.pairs, unit="pair", show=show) as bar:
        for size, pixels, problems in loader:
            if size is not None:
                check.sizes[size] += 1
            check.pixels += pixels
            check.images += pixels > 0
            check.problems += problems
            bar.update()
    if check.pixels.any() and not check.pixels[: len(kind.class_names)].any():
        check.problems.append(("wrong values", "no pixel of the split has a class: it can only be looked at"))
    if doubt := kind.doubt(check.pixels):
        check.problems.append(("wrong values", doubt))
    return check


class _Pairs(Dataset[tuple[Any, ...]]):
    """index -> (size of the image or None, pixels of each class, problems)."""

    def __init__(self, kind: type[SegmentationFiles], listing: Listing) -> None:
        self.kind, self.images, self.labels = kind, listing.images, listing.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        kind, image_path, label_path = self.kind, self.images[index], self.labels[index]
        size, pixels, problems = None, np.zeros(256, np.int64), []
        try:
            size = kind.read_image(image_path).shape[:2]
        except (OSError, ValueError) as error:
            problems.append(("unreadable", str(error)))
        try:
            values = kind.read_mask(label_path)
        except (OSError, ValueError) as error:
            problems.append(("unreadable", str(error)))
            return size, pixels, problems
        if size is not None:
            try:
                require_same_size(image_path, size, label_path, values.shape)
            except ValueError as error:
                problems.append(("other size", str(error)))
        counts = np.bincount(values.ravel(), minlength=256)
        np.add.at(pixels, kind.classes_of_values, counts)
        wrong = np.flatnonzero((counts > 0) & (kind.classes_of_values == NO_CLASS))
        if len(wrong):
            problems.append(("wrong values", kind.wrong_values(label_path, wrong)))
        return size, pixels, problems


def _as_it_is(sample: Any) -> Any:
    return sample


def format_checks(kind: type[SegmentationFiles], checks: Sequence[SplitCheck]) -> str:
    """Tables of the splits and classes, then every problem, as text."""
    rows = [["split", "pairs", "published", "height x width", *KINDS]]
    for check in checks:
        counts = Counter(name for name, _ in check.problems)
        official = kind.official_lengths.get(check.split)
        rows.append(
            [
                check.split,
                str(check.pairs),
                "-" if official is None else str(official),
                _sizes(check.sizes),
                *(str(counts[name]) for name in KINDS),
            ]
        )
    lines = [*_table(rows), ""]

    names = [*enumerate(kind.class_names), (IGNORE_INDEX, "void")]
    if any(check.pixels[NO_CLASS] for check in checks):
        names.append((NO_CLASS, "outside of the table"))
    rows = [["class", *(f"{check.split} {what}" for check in checks for what in ("pixels", "images"))]]
    for value, name in names:
        row = [f"{value:3d} {name}" if value != NO_CLASS else f"    {name}"]
        for check in checks:
            total = check.pixels.sum()
            row += [f"{check.pixels[value] / total:.3%}" if total else "-", str(check.images[value])]
        rows.append(row)
    lines += [*_table(rows), ""]

    problems = [f"{check.split}, {name}: {message}" for check in checks for name, message in check.problems]
    lines.append(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:" if problems else "no problems")
    lines += [f"  {message}" for message in problems]
    for check in checks:  # a folder that is not there leaves no gap to be seen
        official = kind.official_lengths.get(check.split, check.pairs)
        if check.pairs != official:
            lines.append(f"{check.split} has {check.pairs} pairs; {official} are published")
    return "\n".join(lines)


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "-"
    shown = [f"{height} x {width}" for height, width in (min(sizes), max(sizes))]
    return shown[0] if len(sizes) == 1 else f"{shown[0]} to {shown[1]} ({len(sizes)} sizes)"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
