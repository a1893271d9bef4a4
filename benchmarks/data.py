"""Reading and augmenting training samples on one core: `python -m benchmarks.data [--rounds 5] [--write]`.

A 1024 x 2048 pair of PNG files is decoded, flipped, resized by 0.5 to 2, rotated by up to 10 degrees, blurred (half of
the samples, up to 1.5 pixels), cropped to 712 x 712 and converted to float32. Compared are, all from the same 8-bit
pixels in memory, with the same random numbers and one thread:

fused: segadv.data.Augmented, one affine map that samples the crop only.
v2: the chain of torchvision.transforms.v2 as one writes it, every step on the whole 8-bit image and the crop at last.
v2, blur last: the same, but the blur follows the crop.
v2, crop first: as early as it can be: the part of the image that the crop will need is cut out, then resized,
rotated about its own centre, cut to the crop, flipped and blurred. The rotation's centre is another one: these
samples are not those of the other two.

The files hold generated street scenes. `--write` adds rows to benchmarks/results/cpu.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from segadv.compat import import_torchvision
from segadv.data import IGNORE_INDEX, Augmentation, Augmented, Cityscapes, augment, generate_streets

from .measure import K, commit, machine, milliseconds_of
from .ops import CPU, RESULTS
from .records import Where, write_records

WANTED = Augmentation(scale=(0.5, 2.0), rotation=10.0, blur=1.5)


class InMemory(Cityscapes):
    """A data set that has been decoded."""

    def __init__(self, dataset: Cityscapes) -> None:
        self.image_paths, self.label_paths = dataset.image_paths, dataset.label_paths
        self.decoded = [dataset.pixels(index) for index in range(len(dataset))]

    def pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.decoded[index]


@dataclass(frozen=True)
class Draw:
    """The random numbers of a sample."""

    canvas: tuple[int, int]
    angle: float
    offset: tuple[int, int]
    crop: tuple[int, int]
    flip: bool
    blur: float = 0.0


def drawn(augmented: Augmented, key: tuple[int, int]) -> Draw:
    """What `Augmented` draws for a sample."""
    draws = []

    def warp(image: Tensor, label: Tensor, **given: object) -> tuple[Tensor, Tensor]:
        draws.append(Draw(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}))  # type: ignore[arg-type]
        return image, label

    def blur(image: Tensor, deviation: float) -> Tensor:
        draws[0] = replace(draws[0], blur=deviation)
        return image

    with mock.patch.object(augment, "warp", warp), mock.patch.object(augment, "gaussian_blur", blur):
        augmented[key]
    return draws[0]


class Chains:
    """torchvision.transforms.v2 with given random numbers: image and label [C, H, W] uint8."""

    def __init__(self) -> None:
        if import_torchvision() is None:
            raise ImportError("this benchmark compares with torchvision: pip install torchvision")
        from torchvision.transforms.v2 import InterpolationMode, functional

        self.v2, self.modes = functional, InterpolationMode

    def blurred(self, image: Tensor, deviation: float) -> Tensor:
        size = 2 * math.ceil(3 * deviation) + 1
        return self.v2.gaussian_blur(image, [size, size], [deviation, deviation]) if deviation else image

    def resized(self, image: Tensor, label: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
        return (
            self.v2.resize(image, size, interpolation=self.modes.BILINEAR, antialias=True),
            # NEAREST would move the label by up to half a pixel
            self.v2.resize(label, size, interpolation=self.modes.NEAREST_EXACT),
        )

    def rotated(self, image: Tensor, label: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        return (
            self.v2.rotate(image, angle, interpolation=self.modes.BILINEAR),
            self.v2.rotate(label, angle, interpolation=self.modes.NEAREST, fill=[IGNORE_INDEX]),
        )

    def cropped(self, image: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        size = image.shape[-2:]
        before = [max(0, -o) for o in draw.offset]
        after = [max(0, o + c - n) for o, c, n in zip(draw.offset, draw.crop, size, strict=True)]
        if any(before + after):  # what RandomCrop(pad_if_needed=True) does
            padding = [before[1], before[0], after[1], after[0]]
            image = self.v2.pad(image, padding, fill=0)
            label = self.v2.pad(label, padding, fill=IGNORE_INDEX)
        corner = [o + b for o, b in zip(draw.offset, before, strict=True)]
        return self.v2.crop(image, *corner, *draw.crop), self.v2.crop(label, *corner, *draw.crop)

    def flipped(self, image: Tensor, label: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
        return (self.v2.horizontal_flip(image), self.v2.horizontal_flip(label)) if flip else (image, label)

    def whole(self, image: Tensor, label: Tensor, draw: Draw, *, blur_last: bool = False) -> tuple[Tensor, Tensor]:
        image, label = self.resized(image, label, list(draw.canvas))
        image, label = self.rotated(image, label, draw.angle)
        if not blur_last:
            image = self.blurred(image, draw.blur)
        narrow = draw.canvas[1] < draw.crop[1]  # Augmented mirrors it in its place in the crop
        image, label = self.flipped(image, label, draw.flip and narrow)
        image, label = self.cropped(image, label, draw)
        image, label = self.flipped(image, label, draw.flip and not narrow)
        if blur_last:
            image = self.blurred(image, draw.blur)
        return self.v2.to_dtype(image, torch.float32, scale=True), label[0]

    def crop_first(self, image: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        turn = math.radians(abs(draw.angle))
        ratio = image.shape[-1] / draw.canvas[1]
        corner, part = [], []
        for offset, length, other in zip(draw.offset, draw.crop, draw.crop[::-1], strict=True):
            needed = math.ceil(length * math.cos(turn) + other * math.sin(turn))  # what turns into the crop
            corner.append(round((offset - (needed - length) / 2) * ratio))
            part.append(needed)
        source = [round(length * ratio) for length in part]
        # crop pads with zeros where it leaves the image: the complement of a void label
        image, label = self.v2.crop(image, *corner, *source), self.v2.crop(IGNORE_INDEX - label, *corner, *source)
        image, label = self.resized(image, IGNORE_INDEX - label, part)
        image, label = self.rotated(image, label, draw.angle)
        image, label = (self.v2.center_crop(tensor, list(draw.crop)) for tensor in (image, label))
        image, label = self.flipped(image, label, draw.flip)
        image = self.blurred(image, draw.blur)
        return self.v2.to_dtype(image, torch.float32, scale=True), label[0]


def require_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, Tensor]) -> None:
    """Raises where two samples differ by more than interpolation and the edge of the void account for."""
    difference = (ours[0] - theirs[0]).abs().mean().item()
    labels = (ours[1] != theirs[1]).float().mean().item()
    if difference > 0.03 or labels > 0.05:
        raise AssertionError(f"the chains differ: images by {difference:.3f}, labels in {labels:.1%} of the pixels")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, nargs=2, default=[712, 712], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--samples", type=int, default=12, help="with random numbers of their own, in every round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", help="folder in the layout of Cityscapes; else scenes are generated")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            generate_streets(folder, train=2, val=0, size=tuple(options.size))
        dataset = Cityscapes(options.data or folder, "train")
        dataset.image_paths, dataset.label_paths = dataset.image_paths[:2], dataset.label_paths[:2]
        measure(dataset, options)
    return 0


def measure(dataset: Cityscapes, options: argparse.Namespace) -> None:
    crop = (options.crop[0], options.crop[1])
    memory, chains = InMemory(dataset), Chains()
    fused = Augmented(memory, crop=crop, seed=0, augmentation=WANTED)
    total = Augmented(dataset, crop=crop, seed=0, augmentation=WANTED)
    keys = [(epoch, epoch % len(dataset)) for epoch in range(options.samples)]
    draws = [drawn(fused, key) for key in keys]
    tensors = [
        (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)[None]) for image, label in memory.decoded
    ]

    def all_of(chain: Callable[..., tuple[Tensor, Tensor]], **given: bool) -> Callable[[], None]:
        def call() -> None:
            for (_, index), draw in zip(keys, draws, strict=True):
                chain(*tensors[index], draw, **given)

        return call

    for key, draw in zip(keys, draws, strict=True):
        ours, pair = fused[key], tensors[key[1]]
        require_same(ours, chains.whole(*pair, draw))
        require_same(ours, chains.whole(*pair, draw, blur_last=True))

    def each(sample: Callable[[K], object], of: Sequence[K]) -> Callable[[], None]:
        """One after the other, as in `all_of`: none is kept."""

        def call() -> None:
            for which in of:
                sample(which)

        return call

    decode = "decode"
    providers: dict[str, Callable[[], object]] = {
        "fused": each(fused.__getitem__, keys),
        "v2": all_of(chains.whole),
        "v2, blur last": all_of(chains.whole, blur_last=True),
        "v2, crop first": all_of(chains.crop_first),
        decode: each(dataset.pixels, [index for _, index in keys]),
        "decode + fused": each(total.__getitem__, keys),
    }
    for call in providers.values():
        call()
    of_all_keys = milliseconds_of(providers, CPU, rounds=options.rounds)
    times = {name: milliseconds / len(keys) for name, milliseconds in of_all_keys.items()}
    height, width = memory.decoded[0][1].shape
    print(
        f"{height} x {width} -> {crop[0]} x {crop[1]}, one thread, mean of {len(keys)} samples, median of "
        f"{options.rounds} rounds; {machine()}, commit {commit()}, torch {torch.__version__}"
    )
    sizes = [Path(path).stat().st_size / 1e6 for paths in (dataset.image_paths, dataset.label_paths) for path in paths]
    print(f"files of {', '.join(f'{size:.2f}' for size in sizes)} MB")
    where = Where(f"{height}x{width} to {crop[0]}x{crop[1]}", torch.uint8, CPU)
    rows = {
        name: where.time_and_memory("decode" if name == decode else "augment", name, "per image", times[name], call)
        for name, call in providers.items()
    }
    print(f"{'':20s}{'ms per image':>14s}{'p20':>9s}{'p80':>9s}{'images/s':>10s}{'against fused':>16s}")
    for name, (time, _) in rows.items():
        against = "" if decode in name else f"{time.p50 / rows['fused'][0].p50:.1f} x"
        print(f"{name:20s}{time.p50:14.1f}{time.p20:9.1f}{time.p80:9.1f}{1e3 / time.p50:10.1f}{against:>16s}")
    if options.write:
        write_records(RESULTS, chain.from_iterable(rows.values()))
        print(f"{RESULTS}: {2 * len(rows)} rows")


if __name__ == "__main__":
    sys.exit(main())
