"""The affine augmentation, against a reference in fp64 that is written another way, closed forms and torchvision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from segadv.compat import import_torchvision
from segadv.data import IGNORE_INDEX, Augmentation, Augmented, Cityscapes, EpochSampler, augment, generate_streets
from segadv.data.augment import cut, gaussian_blur, warp
from segadv.data.checked import CheckedSamples, checked

FULL = Augmentation(scale=(0.5, 2.0), rotation=10.0, blur=1.5)


def functional():  # type: ignore[no-untyped-def]
    torchvision = import_torchvision()
    assert torchvision is not None, "torchvision is among the test dependencies: pip install .[test]"
    from torchvision.transforms.v2 import functional

    return functional


# an independent reference: one point after the other, in complex numbers


def antialiased(values: npt.NDArray[np.float64], length: int, axis: int) -> npt.NDArray[np.float64]:
    """Resizing with a triangle as wide as a target pixel's neighbours; plain bilinear where it grows."""
    size = values.shape[axis]
    ratio = size / length
    centres = (np.arange(length) + 0.5) * ratio
    if ratio > 1:
        weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / ratio)
    else:
        weights = np.maximum(0, 1 - np.abs(np.arange(size) - np.clip(centres - 0.5, 0, size - 1)[:, None]))
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)


def reference(
    image: npt.NDArray[np.float64],
    label: npt.NDArray[np.uint8],
    *,
    canvas: tuple[int, int],
    angle: float,
    offset: tuple[int, int],
    crop: tuple[int, int],
    flip: bool,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Image, label, and where a rounding error cannot change the label."""
    height, width = label.shape
    if canvas[0] < height or canvas[1] < width:
        source = antialiased(antialiased(image, canvas[0], 1), canvas[1], 2)
        unit = (1.0, 1.0)
    else:
        source, unit = image, (height / canvas[0], width / canvas[1])
    out = np.zeros((3, *crop))
    classes = np.full(crop, IGNORE_INDEX, np.int64)
    sure = np.ones(crop, bool)
    centre = complex(canvas[1] / 2, canvas[0] / 2)
    turn = complex(math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    for i in range(crop[0]):
        for j in range(crop[1]):
            column = j
            if flip and crop[1] <= canvas[1]:
                column = crop[1] - 1 - j
            elif flip:  # mirrored in the place where the narrow canvas lies
                column = canvas[1] - 1 - j - 2 * offset[1]
            point = complex(offset[1] + column + 0.5, offset[0] + i + 0.5)
            point = (point - centre) * turn + centre
            x, y = point.real * unit[1] - 0.5, point.imag * unit[0] - 0.5
            inside = 0 <= point.real < canvas[1] and 0 <= point.imag < canvas[0]
            if inside:
                for row in (math.floor(y), math.floor(y) + 1):
                    for col in (math.floor(x), math.floor(x) + 1):
                        value = source[:, min(max(row, 0), source.shape[1] - 1), min(max(col, 0), source.shape[2] - 1)]
                        out[:, i, j] += value * (1 - abs(y - row)) * (1 - abs(x - col))
            x, y = point.real * width / canvas[1], point.imag * height / canvas[0]
            sure[i, j] = min(abs(x - round(x)), abs(y - round(y))) > 1e-3
            if inside:
                classes[i, j] = label[int(y), int(x)]
    return out, classes, sure


@pytest.mark.parametrize("seed", range(30))
def test_against_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(5, 40, 2))
    scale = rng.uniform(0.4, 2.2)
    canvas = tuple(max(1, round(scale * n)) for n in size)
    crop = tuple(int(n) for n in rng.integers(1, 24, 2))
    offset = tuple(int(rng.integers(min(n - c, 0), max(n - c, 0) + 1)) for n, c in zip(canvas, crop, strict=True))
    angle = float(rng.choice([0.0, rng.uniform(-10, 10), rng.uniform(-180, 180)]))
    arguments = {"canvas": canvas, "angle": angle, "offset": offset, "crop": crop, "flip": bool(seed % 2)}
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    label = rng.integers(0, 19, size, np.uint8)
    exact, classes, sure = reference(pixels.transpose(2, 0, 1) / 255.0, label, **arguments)
    stored = torch.from_numpy(pixels).permute(2, 0, 1)
    shrinks = canvas[0] < size[0] or canvas[1] < size[1]
    # of 8 bits: two roundings of the antialiasing, of the rows and of the columns
    for image, tolerance in ((stored, 1.01 / 255 if shrinks else 2e-5), (stored.double() / 255, 1e-6), (None, 2e-5)):
        out, out_label = warp(stored.float() / 255 if image is None else image, torch.from_numpy(label), **arguments)
        assert out.shape == (3, *crop)
        assert out.dtype == (torch.float64 if image is not None and image.is_floating_point() else torch.float32)
        assert np.abs(out.numpy() - exact)[:, sure].max(initial=0) <= tolerance
        assert out_label.dtype == torch.uint8
        assert np.array_equal(out_label.numpy()[sure], classes[sure])


@pytest.mark.parametrize(("size", "canvas"), [((49, 22), (27, 15)), ((23, 47), (13, 31))])
def test_sizes_whose_ratio_is_rounded_down(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    """length * (target / length) is less than target, and the canvas has its last row and column all the same."""
    assert all(length * (target / length) < target for length, target in zip(size, canvas, strict=True))
    image, label = torch.rand(3, *size, dtype=torch.float64), torch.randint(0, 19, size, dtype=torch.uint8)
    arguments = {"canvas": canvas, "angle": 0.0, "offset": (0, 0), "crop": canvas, "flip": False}
    exact, classes, sure = reference(image.numpy(), label.numpy(), **arguments)
    out, out_label = warp(image, label, **arguments)
    assert np.abs(out.numpy() - exact)[:, sure].max() < 1e-6
    assert np.array_equal(out_label.numpy()[sure], classes[sure])


def test_an_image_is_never_resized_to_nothing() -> None:
    image, label = torch.full((3, 1, 8), 0.5), torch.full((1, 8), 7, dtype=torch.uint8)
    augmented = Augmented([(image, label)], crop=(1, 2), seed=0, augmentation=Augmentation(scale=(0.4, 0.4)))
    out, out_label, _ = augmented[0, 0]
    torch.testing.assert_close(out, torch.full((3, 1, 2), 0.5))
    assert out_label.tolist() == [[7, 7]]


@pytest.mark.parametrize(
    ("size", "scale", "canvas"),
    [((49, 22), 0.55, (27, 12)), ((1, 8), 0.4, (1, 3)), ((10, 200), 1.02, (10, 204)), ((200, 10), 1.02, (204, 10))],
)
def test_sizes_are_rounded(
    size: tuple[int, int], scale: float, canvas: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        augment, "warp", lambda image, label, *, canvas, **_: taken.append(tuple(canvas)) or (image, label)
    )
    augmented = Augmented(Images(*size), crop=(4, 4), seed=0, augmentation=Augmentation(scale=(scale, scale)))
    augmented[0, 0]
    assert taken == [canvas]


@pytest.mark.parametrize(("canvas", "angle"), [((20, 30), 3.0), ((20, 30), -2.5), ((14, 21), 4.0), ((33, 50), 2.0)])
def test_corners_that_barely_leave_the_image(canvas: tuple[int, int], angle: float) -> None:
    label = torch.randint(0, 19, (20, 30), dtype=torch.uint8)
    image = torch.rand(3, 20, 30, dtype=torch.float64)
    crop = (canvas[0] // 2, canvas[1] // 2)
    void = []
    for bottom in (0, canvas[0] - crop[0]):
        for right in (0, canvas[1] - crop[1]):  # one corner of the canvas in each crop
            arguments = {"canvas": canvas, "angle": angle, "offset": (bottom, right), "crop": crop, "flip": False}
            exact, classes, sure = reference(image.numpy(), label.numpy(), **arguments)
            out, out_label = warp(image, label, **arguments)
            void.append((classes == IGNORE_INDEX).mean())
            assert np.abs(out.numpy() - exact)[:, sure].max() < 1e-6
            assert np.array_equal(out_label.numpy()[sure], classes[sure])
    assert 0 < max(void) < 0.1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", [0.0, 7.5, -10.0, 90.0])
@pytest.mark.parametrize("canvas", [(50, 80), (75, 120), (100, 160), (153, 245), (200, 320)])
def test_a_ramp_is_mapped_exactly(canvas: tuple[int, int], angle: float, flip: bool) -> None:
    height, width, crop = 100, 160, (30, 40)
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    image = torch.stack((rows[:, None].expand(height, width), columns.expand(height, width), torch.ones(100, 160)))
    offset = (canvas[0] // 2 - 14, canvas[1] // 2 - 22)  # about the middle: no border in sight
    out, label = warp(
        image,
        torch.zeros(height, width, dtype=torch.uint8),
        canvas=canvas,
        angle=angle,
        offset=offset,
        crop=crop,
        flip=flip,
    )
    i, j = np.mgrid[: crop[0], : crop[1]]
    y = offset[0] + i + 0.5 - canvas[0] / 2
    x = offset[1] + (crop[1] - 1 - j if flip else j) + 0.5 - canvas[1] / 2
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # counter-clockwise as one sees it: at 90 degrees what was on the right is on top
    row = (canvas[0] / 2 + cos * y + sin * x) * height / canvas[0] - 0.5
    column = (canvas[1] / 2 + cos * x - sin * y) * width / canvas[1] - 0.5
    # antialiasing with pixels that a target pixel covers in part is itself up to 0.05 pixels off on a ramp
    tolerance = 0.08 if canvas == (75, 120) else 1e-9
    assert np.abs(out[0].numpy() - row).max() < tolerance
    assert np.abs(out[1].numpy() - column).max() < tolerance
    torch.testing.assert_close(out[2], torch.ones(crop, dtype=torch.float64))
    assert not label.any()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("crop", "offset"), [((8, 9), (3, 4)), ((8, 9), (12, 21)), ((40, 9), (-5, 3)), ((30, 50), (-9, -1))]
)
def test_without_resizing_and_rotation_warp_is_cut(crop: tuple[int, int], offset: tuple[int, int], flip: bool) -> None:
    image = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).permute(2, 0, 1)
    label = torch.randint(0, 19, (20, 30), dtype=torch.uint8)
    expected = cut(image, label, offset=offset, crop=crop, flip=flip)
    out = warp(image, label, canvas=(20, 30), angle=0.0, offset=offset, crop=crop, flip=flip)
    torch.testing.assert_close(out[0], expected[0], rtol=0, atol=2e-5)
    assert torch.equal(out[1], expected[1])
    for floats in (image.float() / 255, image.double() / 255):
        same = cut(floats, label, offset=offset, crop=crop, flip=flip)[0]
        assert same.dtype is floats.dtype
        torch.testing.assert_close(same, expected[0].to(floats.dtype), rtol=0, atol=1e-7)


# torchvision, one transform after the other on the whole image


def smooth(height: int, width: int) -> Tensor:
    """Bytes without detail that interpolation would lose: [3, height, width] in channels_last order."""
    coarse = torch.rand(1, 3, height // 24, width // 24)
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * fine[0]).round().to(torch.uint8).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def regions(height: int, width: int) -> Tensor:
    return F.interpolate(torch.randint(0, 19, (1, 1, height // 15, width // 15), dtype=torch.uint8), (height, width))[
        0, 0
    ]


def chain(image: Tensor, label: Tensor, canvas: tuple[int, int], angle: float, offset: tuple[int, int],
          crop: tuple[int, int], flip: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    v2 = functional()
    nearest = v2.InterpolationMode.NEAREST_EXACT
    image = v2.resize(image, list(canvas), antialias=True)
    label = v2.resize(label[None], list(canvas), interpolation=nearest)
    image = v2.rotate(image, angle, interpolation=v2.InterpolationMode.BILINEAR)
    label = v2.rotate(label, angle, interpolation=v2.InterpolationMode.NEAREST, fill=[IGNORE_INDEX])
    image, label = (v2.crop(tensor, *offset, *crop) for tensor in (image, label))
    if flip:
        image, label = v2.horizontal_flip(image), v2.horizontal_flip(label)
    return image / 255, label[0]


def away_from_borders(label: Tensor, distance: int) -> Tensor:
    """Where a label is the same in all pixels up to so far away (no void, and not the crop's edge)."""
    size, padded = 2 * distance + 1, F.pad(label[None].float(), [distance] * 4, value=IGNORE_INDEX)
    return (F.max_pool2d(padded, size, 1) == -F.max_pool2d(-padded, size, 1))[0] & (label != IGNORE_INDEX)


@pytest.mark.parametrize("angle", [0.0, 4.0, -10.0])
@pytest.mark.parametrize("scale", [0.5, 0.74, 1.0, 1.3, 2.0])
def test_against_torchvision(scale: float, angle: float) -> None:
    image, label = smooth(96, 130), regions(96, 130)
    canvas = (round(96 * scale), round(130 * scale))
    crop = (40, 52)
    for offset, flip in (((0, 0), False), ((canvas[0] - 40, canvas[1] - 52), True), ((3, 10), True)):
        expected, expected_label = chain(image, label, canvas, angle, offset, crop, flip)
        out, out_label = warp(image, label, canvas=canvas, angle=angle, offset=offset, crop=crop, flip=flip)
        # the chain rounds to 8 bits twice and, where it resizes, interpolates twice
        inside = away_from_borders(torch.where(expected_label == IGNORE_INDEX, expected_label, 0), 2)
        assert inside.float().mean() > 0.6
        assert (out - expected).abs()[:, inside].max() < 2.1 / 255
        calm = away_from_borders(expected_label, 2)
        assert calm.float().mean() > 0.15
        assert torch.equal(out_label[calm], expected_label[calm])
        if angle == 0:  # then the image's edge is the same, too
            assert (out - expected).abs().max() < 1.01 / 255


# what lies outside


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.9])
def test_void_and_zeros_are_the_same_pixels(scale: float) -> None:
    image, label = torch.ones(3, 40, 60), torch.zeros(40, 60, dtype=torch.uint8)
    canvas = (round(40 * scale), round(60 * scale))
    out, out_label = warp(image, label, canvas=canvas, angle=30.0, offset=(-6, -8), crop=(90, 130), flip=False)
    assert set(out_label.unique().tolist()) == {0, IGNORE_INDEX}
    assert out_label[0, 0] == IGNORE_INDEX
    assert not out[:, out_label == IGNORE_INDEX].any()
    torch.testing.assert_close(out[:, out_label == 0], torch.ones(3, int((out_label == 0).sum())))
    # corners of the canvas are turned out of the crop's view, which begins 6 and 8 pixels before the canvas
    assert int((out_label == 0).sum()) == pytest.approx(canvas[0] * canvas[1], rel=0.2)


@pytest.mark.parametrize("canvas", [(10, 100), (5, 50), (20, 200)])
def test_a_crop_that_sees_nothing_is_void(canvas: tuple[int, int]) -> None:
    image, label = torch.ones(3, 10, 100), torch.zeros(10, 100, dtype=torch.uint8)
    # turned by 90 degrees, the wide image leaves the ends of its canvas
    out, out_label = warp(image, label, canvas=canvas, angle=90.0, offset=(0, 0), crop=(5, 10), flip=False)
    assert out.shape == (3, 5, 10)
    assert not out.any()
    assert (out_label == IGNORE_INDEX).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_only_what_the_crop_sees_is_read(scale: float) -> None:
    image, label = torch.rand(3, 120, 160), torch.randint(0, 19, (120, 160), dtype=torch.uint8)
    canvas = (round(120 * scale), round(160 * scale))
    arguments = {"canvas": canvas, "angle": 8.0, "offset": (2, 3), "crop": (16, 20), "flip": False}
    expected = warp(image, label, **arguments)
    reach = math.ceil(45 / scale)
    image[:, reach:], image[:, :, reach:], label[reach:], label[:, reach:] = math.nan, math.nan, 20, 20
    out = warp(image, label, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# blur


def test_blur_is_a_gaussian() -> None:
    point = torch.zeros(2, 41, 41, dtype=torch.float64)
    point[0, 20, 20] = 1
    point[1, 5, 30] = 3
    out = gaussian_blur(point, 2.0)
    offsets = torch.arange(41, dtype=torch.float64)
    for channel, (row, column), weight in ((0, (20, 20), 1), (1, (5, 30), 3)):
        exact = torch.exp(-((offsets[:, None] - row) ** 2 + (offsets - column) ** 2) / 8) / (8 * math.pi)
        assert (out[channel] - weight * exact).abs().max() < 2e-3 * weight * exact.max() + 5e-4 * weight
        seen = (out[channel] > 0).nonzero()
        assert seen.min(0).values.tolist() == [max(0, row - 6), column - 6]
    assert out[0].sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("deviation", [0.0, 1e-9, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (30, 40)])
def test_blur_keeps_a_constant(size: tuple[int, int], deviation: float) -> None:
    image = torch.full((3, *size), 0.7)
    torch.testing.assert_close(gaussian_blur(image, deviation), image)
    assert (image == 0.7).all()


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.3])
def test_blur_against_torchvision(deviation: float) -> None:
    image, radius = torch.rand(3, 50, 60), math.ceil(3 * deviation)
    expected = functional().gaussian_blur(image, [2 * radius + 1] * 2, [deviation] * 2)
    inner = slice(radius, -radius)  # it mirrors the image at its border
    torch.testing.assert_close(gaussian_blur(image, deviation)[:, inner, inner], expected[:, inner, inner])


# samples


class Images(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, height: int = 48, width: int = 64) -> None:
        self.image, self.label = torch.rand(3, height, width), torch.randint(0, 19, (height, width), dtype=torch.uint8)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.image, self.label


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_streets(tmp_path_factory.mktemp("streets"), train=6, val=0, size=(96, 160), seed=3)


@pytest.mark.parametrize("crop", [(32, 40), (120, 60), (110, 200)])
def test_default_samples_are_those_of_before_there_was_more(streets: Path, crop: tuple[int, int]) -> None:
    dataset = Cityscapes(streets, "train")
    for epoch, index in ((0, 0), (0, 1), (1, 0), (2, 5), (7, 3)):
        generator = np.random.default_rng(np.random.SeedSequence(11, spawn_key=(1, epoch, index)))
        image, label = dataset[index]
        flip = generator.random() < 0.5
        out, out_label = torch.zeros(3, *crop), torch.full(crop, IGNORE_INDEX, dtype=torch.uint8)
        inside, outside = [], []
        for size, length in zip((96, 160), crop, strict=True):
            offset = int(generator.integers(min(size - length, 0), max(size - length, 0), endpoint=True))
            taken = min(size, length)
            inside.append(slice(max(offset, 0), max(offset, 0) + taken))
            outside.append(slice(max(-offset, 0), max(-offset, 0) + taken))
        image, label = image[:, *inside], label[*inside]
        out[:, *outside], out_label[*outside] = (image.flip(-1), label.flip(-1)) if flip else (image, label)
        for source in (dataset, Subset(dataset, range(6))):
            sample = Augmented(source, crop=crop, seed=11)[epoch, index]
            assert torch.equal(sample[0], out)
            assert torch.equal(sample[1], out_label)


def test_samples_of_a_subclass_are_taken(streets: Path) -> None:
    class Grey(Cityscapes):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return image.mean(0, keepdim=True).expand(3, -1, -1), label % 2

    dataset = Grey(streets, "train")
    image, label, _ = Augmented(dataset, crop=(16, 16), seed=0)[0, 0]
    assert torch.equal(image[0], image[1])
    assert set(label.unique().tolist()) <= {0, 1, 255}
    assert isinstance(checked(dataset, 2), CheckedSamples)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_below_the_number_of_classes_are_right_in_any_type(dtype: torch.dtype) -> None:
    """PyTorch compares a uint8 label with 256 as with 0, and with 300 as with 44."""
    label = torch.tensor([[3, 254, 255]], dtype=dtype)
    for classes in (255, 256, 300):
        assert torch.equal(CheckedSamples([(torch.rand(3, 1, 3), label)], num_classes=classes)[0][1], label)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels must be classes 0 to 253 or 255, found \[254\]"):
        CheckedSamples([(torch.rand(3, 1, 3), label)], num_classes=254)[0]  # type: ignore[arg-type]


def test_samples_are_named_by_whatever_paths_there_are() -> None:
    class Named(list[Any]):
        label_paths: Any = None
        image_paths: Any = None

    dataset = Named([(torch.rand(3, 1, 3), torch.tensor([[3, 254, 255]]))])
    for name, paths, told in (
        ("image_paths", ["i.png"], r"sample 0 \(i.png\): labels"),
        ("label_paths", np.array(["l.png"]), r"sample 0 \(l.png\): labels"),
        ("label_paths", {"l": "png"}, r"sample 0 \(i.png\): labels"),
        ("image_paths", 3, "sample 0: labels"),
    ):
        setattr(dataset, name, paths)
        with pytest.raises(ValueError, match=told):
            CheckedSamples(dataset, num_classes=254)[0]  # type: ignore[arg-type]


def test_negative_labels_and_grey_images_are_refused() -> None:
    image, label = torch.rand(3, 1, 2), torch.tensor([[0, -1]])  # -1 is no label to ignore here
    with pytest.raises(ValueError, match=r"sample 0: labels must be classes 0 to 18 or 255, found \[-1\]"):
        CheckedSamples([(image, label)], num_classes=19)[0]  # type: ignore[arg-type]
    for channels in (1, 4):
        with pytest.raises(ValueError, match=rf"image \[3, H, W\] .* got float32 \[{channels}, 1, 2\]"):
            CheckedSamples([(torch.rand(channels, 1, 2), label.abs())])[0]  # type: ignore[arg-type]


def test_stored_pixels_and_floats_give_the_same(streets: Path) -> None:
    dataset = Cityscapes(streets, "train")
    floats = Subset(dataset, range(6))  # does not let the pixels through
    for scale, tolerance in (((1.0, 1.0), 0), ((1.0, 2.0), 0), ((0.5, 1.0), 1.01 / 255)):
        wanted = Augmentation(scale=scale, rotation=10.0, blur=1.0)
        one, other = (Augmented(source, crop=(64, 80), seed=1, augmentation=wanted) for source in (dataset, floats))
        for key in ((0, 0), (0, 1), (3, 2), (4, 5)):
            torch.testing.assert_close(one[key][0], other[key][0], rtol=0, atol=tolerance)
            assert torch.equal(one[key][1], other[key][1])


def test_labels_are_those_of_the_image(streets: Path) -> None:
    """Colours that stand for classes: in the sample each pixel away from a border still has its class's colour."""
    dataset = Images(90, 140)
    dataset.label = regions(90, 140)
    dataset.image = torch.stack((dataset.label / 20, 1 - dataset.label / 20, torch.full((90, 140), 0.5)))
    augmented = Augmented(dataset, crop=(60, 80), seed=0, augmentation=Augmentation(scale=(0.5, 2.0), rotation=10.0))
    seen = 0
    for epoch in range(20):
        image, label, _ = augmented[epoch, 0]
        calm = away_from_borders(label, 3)
        seen += int(calm.sum())
        torch.testing.assert_close(image[0][calm], label[calm] / 20, rtol=0, atol=1e-4)
    assert seen > 20 * 60 * 80 / 10


def test_random_numbers_cover_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(augment, "warp", lambda image, label, **given: calls.append(given) or (image, label))
    blurs: list[float] = []
    monkeypatch.setattr(augment, "gaussian_blur", lambda image, deviation: blurs.append(deviation) or image)
    augmented = Augmented(Images(100, 200), crop=(80, 90), seed=0, augmentation=FULL)
    for epoch in range(500):
        augmented[epoch, 3]
    assert len(calls) == 500
    scales = np.array([call["canvas"] for call in calls]) / (100, 200)
    assert np.abs(scales[:, 0] - scales[:, 1]).max() < 0.01  # one factor for both
    angles, flips = np.array([call["angle"] for call in calls]), np.array([call["flip"] for call in calls])
    for values, low, high in ((scales[:, 1], 0.5, 2.0), (angles, -10.0, 10.0), (np.array(blurs), 0.0, 1.5)):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))  # uniform
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.08)
    assert 200 < flips.sum() < 300
    assert 200 < len(blurs) < 300
    for call in calls:
        for offset, length, crop in zip(call["offset"], call["canvas"], (80, 90), strict=True):  # type: ignore[call-overload]
            assert min(0, length - crop) <= offset <= max(0, length - crop)
    assert np.abs(np.corrcoef([scales[:, 1], angles, flips])[np.triu_indices(3, 1)]).max() < 0.15


@pytest.mark.parametrize(
    "wanted",
    [
        FULL,
        Augmentation(flip=False, scale=(0.5, 1.0), blur=2.0),
        Augmentation(scale=(1.0, 1.5), rotation=5.0),
        Augmentation(flip=False),
    ],
)
def test_random_numbers_are_drawn_in_one_order(wanted: Augmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order, or one number more or less, would change every sample of a training that goes on."""
    calls: list[dict[str, object]] = []
    blurs: list[float] = []
    for name in ("cut", "warp"):
        monkeypatch.setattr(augment, name, lambda image, label, **given: calls.append(given) or (image, label))
    monkeypatch.setattr(augment, "gaussian_blur", lambda image, deviation: blurs.append(deviation) or image)
    augmented = Augmented(Images(60, 90), crop=(40, 100), seed=7, augmentation=wanted)
    for epoch in range(100):
        calls.clear(), blurs.clear()
        augmented[epoch, 2]
        generator = np.random.default_rng(np.random.SeedSequence(7, spawn_key=(1, epoch, 2)))
        flip = bool(generator.random() < 0.5) and wanted.flip  # drawn in any case: the crops are those of a flip
        scale = generator.uniform(*wanted.scale) if wanted.scale != (1, 1) else 1.0
        angle = generator.uniform(-wanted.rotation, wanted.rotation) if wanted.rotation else 0.0
        canvas = [round(scale * 60), round(scale * 90)]
        edges = [sorted((0, length - crop)) for length, crop in zip(canvas, (40, 100), strict=True)]
        offset = [int(generator.integers(*edge, endpoint=True)) for edge in edges]
        (call,) = calls
        assert (call["offset"], call["flip"]) == (offset, flip)
        assert (call.get("canvas", [60, 90]), call.get("angle", 0.0)) == (canvas, angle)
        assert blurs == ([generator.uniform(0, wanted.blur)] if wanted.blur and generator.random() < 0.5 else [])


@pytest.mark.parametrize(
    ("wanted", "drawn"),
    [(Augmentation(flip=False), "flip"), (Augmentation(flip=False, scale=(0.7, 1.5), rotation=5.0), "flip")],
)
def test_no_flip(wanted: Augmentation, drawn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flips = []
    for name in ("cut", "warp"):
        original = getattr(augment, name)
        monkeypatch.setattr(
            augment, name, lambda *a, original=original, **given: (flips.append(given[drawn]), original(*a, **given))[1]
        )
    augmented = Augmented(Images(), crop=(16, 16), seed=0, augmentation=wanted)
    for epoch in range(20):
        augmented[epoch, 0]
    assert flips == [False] * 20


def test_samples_depend_on_seed_epoch_and_index_alone(streets: Path) -> None:
    dataset = Cityscapes(streets, "train")

    def batches(workers: int) -> list[list[Tensor]]:
        augmented = Augmented(dataset, crop=(64, 96), seed=5, augmentation=FULL)
        sampler = EpochSampler(6, batch_size=2, seed=5, steps=6)
        return list(DataLoader(augmented, batch_sampler=sampler, num_workers=workers))

    alone = batches(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(99)
        others = [batches(0), batches(1), batches(2)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for x, y in zip(alone, other, strict=True) for a, b in zip(x, y, strict=True))
    first = Augmented(dataset, crop=(64, 96), seed=5, augmentation=FULL)
    for seed, key in ((6, (0, 0)), (5, (1, 0)), (5, (0, 1))):
        assert not torch.equal(Augmented(dataset, crop=(64, 96), seed=seed, augmentation=FULL)[key][1], first[0, 0][1])


def test_label_of_another_size_is_refused() -> None:
    dataset = Images(48, 64)
    dataset.label = dataset.label[:, 1:]
    with pytest.raises(ValueError, match=r"sample 2 .*same size, got \[3, 48, 64\] and \[48, 63\]"):
        Augmented(dataset, crop=(8, 8), seed=0)[0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale must be .*0 < lowest <= highest, got \(0.0, 1.0\)"),
        ({"scale": (2.0, 0.5)}, "scale must be"),
        ({"scale": (1.0, math.inf)}, "scale must be"),
        ({"scale": (math.nan, 1.0)}, "scale must be"),
        ({"scale": (1.0,)}, "scale must be"),
        ({"scale": 0.5}, "scale must be"),
        ({"rotation": -1.0}, r"rotation must be in \[0, 180\] degrees, got -1.0"),
        ({"rotation": 181.0}, "rotation must be"),
        ({"rotation": math.nan}, "rotation must be"),
        ({"rotation": True}, "rotation must be"),
        ({"blur": -0.1}, "blur must be a finite number of pixels, at least 0, got -0.1"),
        ({"blur": math.inf}, "blur must be"),
        ({"blur": "1"}, "blur must be"),
    ],
)
def test_fields_outside_their_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)  # type: ignore[arg-type]


def test_types_of_fields() -> None:
    with pytest.raises(TypeError, match="flip must be True or False, got 1"):
        Augmentation(flip=1)  # type: ignore[arg-type]
    assert Augmentation(scale=[0.5, 2.0]) == Augmentation(scale=(0.5, 2.0))  # type: ignore[arg-type]
    assert Augmentation(rotation=180).rotation == 180
