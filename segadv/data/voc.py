"""PASCAL VOC 2012 segmentation, and "trainaug": its training images with those of SBD.

VOC: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2015, and its development kit
(``VOClabelcolormap`` is the palette). SBD: Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .files import IGNORE_INDEX, NO_CLASS, Listing, SegmentationFiles, found_in, load_image, names_in, read_pixels

__all__ = ["VOC", "TrainAug"]

# class: name, official colour
_TABLE: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("background", (0, 0, 0)),
    ("aeroplane", (128, 0, 0)),
    ("bicycle", (0, 128, 0)),
    ("bird", (128, 128, 0)),
    ("boat", (0, 0, 128)),
    ("bottle", (128, 0, 128)),
    ("bus", (0, 128, 128)),
    ("car", (128, 128, 128)),
    ("cat", (64, 0, 0)),
    ("chair", (192, 0, 0)),
    ("cow", (64, 128, 0)),
    ("diningtable", (192, 128, 0)),
    ("dog", (64, 0, 128)),
    ("horse", (192, 0, 128)),
    ("motorbike", (64, 128, 128)),
    ("person", (192, 128, 128)),
    ("pottedplant", (0, 64, 0)),
    ("sheep", (128, 64, 0)),
    ("sofa", (0, 192, 0)),
    ("train", (128, 192, 0)),
    ("tvmonitor", (0, 64, 128)),
)

_INDICES = {color: index for index, (_, color) in enumerate(_TABLE) if index > 0}
"""Black stands in many a palette, at the indices that are not used."""


def _classes_of_indices() -> npt.NDArray[np.uint8]:
    classes = np.full(256, NO_CLASS, np.uint8)
    classes[: len(_TABLE)] = np.arange(len(_TABLE))
    classes[255] = IGNORE_INDEX
    return classes


class VOC(SegmentationFiles):
    """Images and the 21 classes of one split of PASCAL VOC 2012, in the order of the split's list file.

    Samples and errors are those of `SegmentationFiles`. The masks' palette indices are the classes (255: void),
    whatever the palette; but one that has an official colour at another class's index is refused, because a program
    that saves images small has then re-ordered both. A grey JPEG file becomes RGB with three equal channels; other
    modes (CMYK) are refused, because what their colours are depends on a profile. Blank lines, surrounding white space
    and repeated names in a list file do not count.

    Args:
        root: the folder ``VOC2012`` with ``JPEGImages/<name>.jpg``, ``SegmentationClass/<name>.png`` and
            ``ImageSets/Segmentation/<split>.txt``, or a folder with ``VOC2012`` or ``VOCdevkit/VOC2012`` in it.
        split: "train", "val" or "trainval".
    """

    num_classes = len(_TABLE)
    class_names = tuple(name for name, _ in _TABLE)
    colors = tuple(color for _, color in _TABLE)
    official_lengths: ClassVar[Mapping[str, int]] = {"train": 1464, "val": 1449, "trainval": 2913}
    classes_of_values = _classes_of_indices()
    allowed_values = "0..20, or 255 for void"

    @classmethod
    def list_files(cls, root: Path, split: str) -> Listing:
        folder = _voc_folder(root)
        names = _names(folder, split)
        lists = (folder / "ImageSets" / "Segmentation").glob("*.txt")
        return _pairs(
            names,
            folder / "JPEGImages",
            folder / "SegmentationClass",
            ".png",
            f"the list {split}.txt names",
            elsewhere={name for path in lists for name in path.read_text("utf-8-sig", "replace").split()},
        )

    @staticmethod
    def read_image(path: str) -> npt.NDArray[np.uint8]:
        pixels = read_pixels(path, ["RGB", "L"], "convert it to RGB")
        return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)

    @staticmethod
    def read_mask(path: str) -> npt.NDArray[np.uint8]:
        remedy = "masks hold class indices, not colours: restore the original palette PNG"
        image = load_image(path, ["P", "L"], remedy, of_indices=True)
        palette = iter((image.getpalette() or [])[: 3 * len(_TABLE)])
        for index, color in enumerate(zip(palette, palette, palette, strict=False)):
            if _INDICES.get(color, index) != index:
                raise ValueError(
                    f"{path}: its palette has at index {index} the colour of class {_INDICES[color]} "
                    f"({_TABLE[_INDICES[color]][0]}), so that its indices are not the classes; "
                    "restore the mask from the data set's archive"
                )
        return np.array(image)


class TrainAug(VOC):
    """The usual training set for VOC: "trainaug", (VOC train + SBD train + SBD val) - VOC val, sorted by name.

    10,582 images of the published data, computed from the file names. An image of VOC train has VOC's own mask, the
    others have SBD's. Samples and errors as for `VOC`.

    SBD's masks are MATLAB files, which need scipy. Its reader does not unpickle and executes nothing of a file.
    Without SBD's folder, the masks may be PNG files with class indices in ``SegmentationClassAug/`` beside
    VOC's ``SegmentationClass/``: then its file names take the place of SBD's lists.

    Args:
        root: as for `VOC`. SBD's folder ``benchmark_RELEASE/dataset`` with ``img/<name>.jpg``, ``cls/<name>.mat``,
            ``train.txt`` and ``val.txt`` stands in root, or beside ``VOC2012`` or ``VOCdevkit``.
        split: "train" for trainaug, "val" for VOC val.
    """

    official_lengths: ClassVar[Mapping[str, int]] = {"train": 10582, "val": 1449}

    @classmethod
    def list_files(cls, root: Path, split: str) -> Listing:
        if split == "val":
            return VOC.list_files(root, split)
        if split != "train":
            raise ValueError(f'split must be "train" (trainaug) or "val" (of VOC), got {split!r}')
        voc = _voc_folder(root)
        own, held_out = _names(voc, "train"), _names(voc, "val")
        sbd, png = _sbd_folder(root, voc), voc / "SegmentationClassAug"
        if sbd is not None:
            _require_scipy()
            named = [*_lines(sbd / "train.txt"), *_lines(sbd / "val.txt")]
            more = sorted(set(named) - set(own) - set(held_out))
            listing = _pairs(more, sbd / "img", sbd / "cls", ".mat", "SBD's train.txt or val.txt names")
        elif png.is_dir():
            more = sorted(names_in(png, ".png") - set(own) - set(held_out))
            listing = _pairs(more, voc / "JPEGImages", png, ".png", "SegmentationClassAug has a mask of")
        else:
            raise FileNotFoundError(
                f"no masks of SBD for root {str(root)!r}\n"
                f"  expected: {_SBD} with img/, cls/, train.txt and val.txt\n"
                f"        in: {' or '.join(map(str, _beside(root, voc)))}\n"
                f"        or: {png} with <name>.png\n"
                f"     found: {found_in(voc.parent)}; {found_in(voc)}"
            )
        masks = voc / "SegmentationClass"
        listing.extend(_pairs(own, voc / "JPEGImages", masks, ".png", "the list train.txt names", elsewhere=held_out))
        order = sorted(range(len(listing.images)), key=lambda i: Path(listing.images[i]).stem)
        listing.images = [listing.images[i] for i in order]
        listing.labels = [listing.labels[i] for i in order]
        return listing

    @staticmethod
    def read_mask(path: str) -> npt.NDArray[np.uint8]:
        return _read_mat(path) if path.endswith(".mat") else VOC.read_mask(path)


_FOLDERS = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
_SBD = Path("benchmark_RELEASE") / "dataset"


def _voc_folder(root: Path) -> Path:
    candidates = [root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"]
    missing = {folder: [name for name in _FOLDERS if not (folder / name).is_dir()] for folder in candidates}
    for folder in candidates:
        if not missing[folder]:
            return folder
    for folder in candidates:
        if len(missing[folder]) < len(_FOLDERS):
            raise FileNotFoundError(
                f"{folder} is not a whole VOC2012: {' and '.join(missing[folder])} missing\n"
                f"  expected: {folder} with {', '.join(_FOLDERS)}\n"
                f"     found: {found_in(folder)}"
            )
    raise FileNotFoundError(
        f"no VOC2012 under root {str(root)!r}\n"
        f"  expected: JPEGImages/<name>.jpg, SegmentationClass/<name>.png and ImageSets/Segmentation/<split>.txt\n"
        f"        in: {' or '.join(map(str, candidates))}\n"
        f"     found: {found_in(root)}"
    )


def _beside(root: Path, voc: Path) -> list[Path]:
    """Where SBD's folder may stand."""
    voc = Path(os.path.abspath(voc))  # a relative path has no parents beyond where it begins
    return list(dict.fromkeys([root, voc.parent, voc.parent.parent]))


def _sbd_folder(root: Path, voc: Path) -> Path | None:
    """SBD's folder; None where there is none. Raises where it is there, but not whole."""
    folder = next((place / _SBD for place in _beside(root, voc) if (place / _SBD).is_dir()), None)
    if folder is not None:
        missing = [name for name in ("img", "cls") if not (folder / name).is_dir()]
        missing += [name for name in ("train.txt", "val.txt") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} is not a whole SBD: {' and '.join(missing)} missing\n"
                f"  expected: {folder} with img/, cls/, train.txt and val.txt\n"
                f"     found: {found_in(folder)}"
            )
    return folder


def _names(voc: Path, split: str) -> list[str]:
    path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no list of split {split!r}\n  expected: {path}\n     found: {found_in(path.parent)}")
    return _lines(path)


def _lines(path: Path) -> list[str]:
    """The names in a list file, each once. Blank lines, white space around and a byte order mark are left out."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise ValueError(f"{path} names no image; restore it from the data set's archive")
    return names


def _pairs(
    names: list[str], images: Path, labels: Path, ending: str, who: str, *, elsewhere: Collection[str] = ()
) -> Listing:
    """Image ``<name>.jpg`` and mask ``<name><ending>`` for every name; `who` wants them, for messages. Those of
    `elsewhere`, which other lists name, are no orphans: their images are missing there."""
    with_image, with_label = names_in(images, ".jpg"), names_in(labels, ending)
    listing = Listing()
    for name in names:
        image, label = images / f"{name}.jpg", labels / f"{name}{ending}"
        if name in with_image and name in with_label:
            listing.images.append(str(image))
            listing.labels.append(str(label))
            continue
        wanted = ([] if name in with_image else [f"image {image}"]) + ([] if name in with_label else [f"label {label}"])
        listing.missing.append(
            f"{who} {name!r}, but there is no {' and no '.join(wanted)}; restore it from the data set's archive"
        )
    for name in sorted(with_label - with_image - {*names, *elsewhere}):
        listing.orphans.append(
            f"label {labels / (name + ending)} has no image; restore {images}/{name}.jpg, or remove it"
        )
    return listing


def _require_scipy() -> None:
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise ImportError("reading the masks of SBD (.mat files) needs scipy: pip install scipy") from error


def _read_mat(path: str) -> npt.NDArray[np.uint8]:
    """The mask ``GTcls.Segmentation`` of a file of SBD. `scipy.io.loadmat` parses arrays; it does not unpickle."""
    from scipy.io import loadmat

    try:
        values: npt.NDArray[np.uint8] = loadmat(path, variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
        if values.ndim != 2 or values.dtype != np.uint8:
            raise ValueError(f"GTcls.Segmentation is {values.dtype} of shape {values.shape}, not uint8 [H, W]")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist (any more); restore it") from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise OSError(
            f"{path}: cannot be read as a mask of SBD ({type(error).__name__}: {error}); "
            "restore it from the data set's archive"
        ) from error
    return values
