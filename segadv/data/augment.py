"""Augmentation of training samples: it depends on (seed, epoch, index), not on workers or global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import at_least, is_number, true_or_false
from .files import IGNORE_INDEX, reads_files
from .sampler import AUGMENTATION, seeded

__all__ = ["Augmentation", "Augmented"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Augmentation:
    """How a training sample is changed at random before its crop is taken.

    Args:
        flip: mirror left and right with probability 1/2.
        scale: lowest and highest factor of the size; uniform between them.
        rotation: largest angle in degrees, to either side of upright, at most 180; uniform.
        blur: largest standard deviation of a Gaussian blur of the crop, in pixels of the crop; half of the samples
            are blurred, with a deviation uniform in [0, blur].

    Raises:
        ValueError: a value outside its range.
        TypeError: a flip that is neither True nor False.
    """

    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        true_or_false(flip=self.flip)
        if isinstance(self.scale, list):
            object.__setattr__(self, "scale", tuple(self.scale))
        if not (isinstance(self.scale, tuple) and len(self.scale) == 2 and all(map(is_number, self.scale))) or not (
            0 < self.scale[0] <= self.scale[1] < math.inf
        ):
            raise ValueError(f"scale must be (lowest, highest) with 0 < lowest <= highest, got {self.scale!r}")
        if not (is_number(self.rotation) and 0 <= self.rotation <= 180):
            raise ValueError(f"rotation must be in [0, 180] degrees, got {self.rotation!r}")
        if not (is_number(self.blur) and 0 <= self.blur < math.inf):
            raise ValueError(f"blur must be a finite number of pixels, at least 0, got {self.blur!r}")


class Augmented(Dataset[tuple[Tensor, Tensor, int]]):
    """Random crops of another data set's samples, flipped, resized, rotated and blurred at random.

    The result is that of this chain: resize the image to (round(scale * H), round(scale * W)), rotate it about its
    centre, cut a crop at a random place of that canvas, flip the crop, blur it. But everything up to the flip is one
    affine map from the crop's pixel centres to the image, and only what the crop sees is sampled, once: the image
    bilinearly, the label at the nearest pixel. A pixel whose centre is mapped beyond the image is 0, and `IGNORE_INDEX`
    in the label; a crop larger than the canvas holds it at a random place, where the flip leaves it.

    Where the size shrinks, the part of the image that the crop sees is first resized with antialiasing, as
    ``torch.nn.functional.interpolate(antialias=True)`` and torchvision's Resize do it, and the map starts from there:
    bilinear samples alone would skip pixels of the image. The label needs none.

    Without resizing and rotation, crop and flip copy pixels unchanged.

    Args:
        dataset: ``dataset[index]`` is (image float32 [3, H, W], label uint8 [H, W]). `SegmentationFiles`
            are read as 8-bit pixels, and only the crop is converted; where the size shrinks, antialiasing is in 8 bits
            then, up to 1/255 from what floats give.
        crop: (h, w) of the result.
        seed: with the epoch and the index it decides everything random about a sample.
        augmentation: what happens before the crop is taken.

    ``augmented[epoch, index]`` is (image float32 [3, h, w], label uint8 [h, w], index).

    Raises:
        ValueError: a crop below 1 x 1, a negative seed; image and label of different sizes (upon indexing).
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, Tensor]],
        *,
        crop: tuple[int, int],
        seed: int,
        augmentation: Augmentation = Augmentation(),
    ) -> None:
        height, width = crop
        at_least(1, crop_height=height, crop_width=width)
        at_least(0, seed=seed)
        self.dataset = dataset
        self.crop = (height, width)
        self.augmentation = augmentation
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        if reads_files(self.dataset):
            pixels, classes = self.dataset.pixels(index)
            image, label = torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes)
        else:
            image, label = self.dataset[index]
            if image.shape[1:] != label.shape:
                raise ValueError(
                    f"sample {index} of the data set: image must be [3, H, W] and label [H, W] of the same size, "
                    f"got {list(image.shape)} and {list(label.shape)}"
                )
        wanted = self.augmentation
        generator = seeded(self.seed, AUGMENTATION, epoch, index)
        flip = generator.random() < 0.5 and wanted.flip
        scale = generator.uniform(*wanted.scale) if wanted.scale != (1, 1) else 1.0
        angle = generator.uniform(-wanted.rotation, wanted.rotation) if wanted.rotation else 0.0
        canvas = [max(1, round(scale * length)) for length in label.shape]
        offset = []
        for length, crop in zip(canvas, self.crop, strict=True):
            surplus = length - crop
            offset.append(int(generator.integers(min(surplus, 0), max(surplus, 0), endpoint=True)))
        if angle == 0 and canvas == list(label.shape):
            image, label = cut(image, label, offset=offset, crop=self.crop, flip=flip)
        else:
            image, label = warp(image, label, canvas=canvas, angle=angle, offset=offset, crop=self.crop, flip=flip)
        if wanted.blur and generator.random() < 0.5:
            image = gaussian_blur(image, generator.uniform(0, wanted.blur))
        return image, label, index


def cut(
    image: Tensor, label: Tensor, *, offset: Sequence[int], crop: tuple[int, int], flip: bool
) -> tuple[Tensor, Tensor]:
    """The crop whose corner is the image's pixel `offset` (negative: before the image begins); pixels are copied.

    A flip mirrors what the crop shows of the image in its place: a narrow image stays where it lies in the crop.
    """
    inside, outside = [], []
    for size, length, start in zip(label.shape, crop, offset, strict=True):
        inside.append(slice(max(start, 0), min(start + length, size)))
        outside.append(slice(max(-start, 0), max(-start, 0) + min(length, size)))
    image, label = image[:, *inside], label[*inside]
    if flip:
        image, label = image.flip(-1), label.flip(-1)
    floating = image.is_floating_point()
    cropped_image = image.new_zeros(image.shape[0], *crop, dtype=image.dtype if floating else torch.float32)
    cropped_label = label.new_full(crop, IGNORE_INDEX)
    cropped_image[:, *outside] = image
    cropped_label[*outside] = label
    return cropped_image if floating else cropped_image.div_(255), cropped_label


def warp(
    image: Tensor,
    label: Tensor,
    *,
    canvas: Sequence[int],
    angle: float,
    offset: Sequence[int],
    crop: tuple[int, int],
    flip: bool,
) -> tuple[Tensor, Tensor]:
    """A crop of the resized and rotated image, see `Augmented`.

    Args:
        image: uint8 or floating [C, H, W].
        label: uint8 [H, W].
        canvas: (height, width) that the image is resized to.
        angle: in degrees, counter-clockwise, about the centre of the canvas.
        offset, flip: as for `cut`, on the canvas.
    """
    # Points are (row, column), pixel k covers [k, k + 1). A crop's point p shows the canvas's point linear @ p + shift.
    turn = math.radians(angle)
    mirror = np.diag([1.0, -1.0 if flip else 1.0])
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    centre = np.array(canvas) / 2
    corner = np.array(offset, float)
    if flip:
        corner[1] = min(offset[1] + crop[1], canvas[1]) + max(-offset[1], 0)
    on_canvas = rotation @ mirror, rotation @ (corner - centre) + centre
    ratio = np.array(label.shape) / np.array(canvas)
    on_image = ratio[:, None] * on_canvas[0], ratio * on_canvas[1]

    if (ratio > 1).any():
        rows, columns = _seen(*on_canvas, crop, canvas)
        shrunk = _shrunk(image, canvas, (rows.stop, columns.stop))
        cropped_image = _sample(shrunk, *on_canvas, crop, "bilinear")
    else:
        cropped_image = _sample(image, *on_image, crop, "bilinear")
    cropped_label = _sample(label[None], *on_image, crop, "nearest")[0].to(label.dtype)
    outside = _outside(*on_canvas, crop, canvas)
    if outside is not None:
        cropped_image.masked_fill_(outside, 0)
        cropped_label.masked_fill_(outside, IGNORE_INDEX)
    return cropped_image, cropped_label


def gaussian_blur(image: Tensor, deviation: float) -> Tensor:
    """Convolution of [C, h, w] with exp(-(x^2 + y^2) / (2 deviation^2)), normalised, up to 3 deviations to each side.

    Beyond the border the outermost pixels go on. As sums of shifted planes: PyTorch's convolution of so few channels
    takes ten times as long on a CPU, and need not give the same bits for every number of threads.
    """
    if deviation == 0:
        return image
    radius = math.ceil(3 * deviation)
    weights = np.exp(-((np.arange(radius + 1) / deviation) ** 2) / 2)  # of the centre and one side
    weights /= 2 * weights.sum() - weights[0]
    blurred = torch.empty_like(image)
    for plane, out in zip(image, blurred, strict=True):  # one after the other: a plane stays in the cache
        rest = F.pad(plane[None, None], [radius] * 4, mode="replicate")[0, 0]
        for dim in (0, 1):
            length = rest.shape[dim] - 2 * radius
            total = rest.narrow(dim, radius, length) * weights[0]
            sides = torch.empty_like(total)
            for distance in range(1, radius + 1):
                before, after = (rest.narrow(dim, start, length) for start in (radius - distance, radius + distance))
                total += torch.add(before, after, out=sides).mul_(weights[distance])
            rest = total
        out.copy_(rest)
    return blurred


def _floating(image: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1], contiguous; floats as they are."""
    if image.is_floating_point():
        return image
    return image.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _coordinates(linear: Array, shift: Array, crop: tuple[int, int], axis: int) -> tuple[Array, Array]:
    """The row (axis 0) or column (1) that a crop's pixel shows: what its own row and its own column add to it."""
    by_row = linear[axis, 0] * (np.arange(crop[0]) + 0.5) + shift[axis]
    by_column = linear[axis, 1] * (np.arange(crop[1]) + 0.5)
    return by_row, by_column


def _range(by_row: Array, by_column: Array) -> tuple[float, float]:
    return float(by_row.min() + by_column.min()), float(by_row.max() + by_column.max())


def _outside(linear: Array, shift: Array, crop: tuple[int, int], size: Sequence[int]) -> Tensor | None:
    """bool [h, w]: the crop's pixels whose centre lies outside of an image of this size; None where all lie inside."""
    outside = None
    for axis in range(2):
        parts = _coordinates(linear, shift, crop, axis)
        low, high = _range(*parts)
        if low < 0 or high >= size[axis]:
            by_row, by_column = map(torch.from_numpy, parts)
            points = by_row[:, None] + by_column
            beyond = (points < 0) | (points >= size[axis])
            outside = beyond if outside is None else outside | beyond
    return outside


def _seen(linear: Array, shift: Array, crop: tuple[int, int], size: Sequence[int]) -> tuple[slice, slice]:
    """The rows and columns of an image of this size that bilinear sampling reads for a crop; empty where none."""
    slices = []
    for axis in range(2):
        low, high = _range(*_coordinates(linear, shift, crop, axis))
        start, stop = max(math.floor(low - 1), 0), min(math.ceil(high + 1), size[axis])
        slices.append(slice(start, max(stop, start)))
    return slices[0], slices[1]


def _shrunk(image: Tensor, canvas: Sequence[int], needed: Sequence[int]) -> Tensor:
    """The first rows and columns, at least so many as are needed, of the antialiased resizing of image to canvas."""
    sizes = []
    factors = []
    for length, target, count in zip(image.shape[1:], canvas, needed, strict=True):
        # one pixel of the canvas weighs pixels of the image up to length / target beyond its own
        sizes.append(min(length, math.ceil((count + 2) * length / target)))
        factors.append(math.nextafter(target / length, math.inf))  # length * factor must not fall below target
    part = image[None, :, : sizes[0], : sizes[1]]
    return F.interpolate(part, scale_factor=factors, mode="bilinear", antialias=True)[0]


def _sample(image: Tensor, linear: Array, shift: Array, crop: tuple[int, int], mode: str) -> Tensor:
    """Floating [C, h, w]: the crop's point p, a pixel's centre, shows the image's point linear @ p + shift.

    Beyond its border the image goes on as the pixels there, as in any resizing.
    """
    rows, columns = _seen(linear, shift, crop, image.shape[1:])
    part = image[:, rows, columns]
    part = part.float() if mode == "nearest" else _floating(part)
    if part.numel() == 0:
        return part.new_zeros(part.shape[0], *crop)
    # grid_sample's points are (column, row), -1 at the one border of the image and 1 at the other
    grid = part.new_empty(1, *crop, 2)
    for axis, start in enumerate((rows.start, columns.start)):
        unit = 2 / part.shape[1 + axis]
        by_row, by_column = _coordinates(linear, shift, crop, axis)
        down, along = (torch.from_numpy(x).to(part.dtype) for x in (unit * (by_row - start) - 1, unit * by_column))
        torch.add(down[:, None], along, out=grid[0, :, :, 1 - axis])
    return F.grid_sample(part[None], grid, mode=mode, padding_mode="border", align_corners=False)[0]
