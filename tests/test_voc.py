"""VOC, trainaug and the check of data sets, on small trees laid out as the real ones; torchvision reads them, too."""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from segadv.cli import main
from segadv.compat import import_torchvision
from segadv.data import DATASETS, VOC, Cityscapes, TrainAug, check, check_files, generate_streets, open_dataset
from segadv.data.check import SplitCheck, format_checks
from segadv.data.files import found_in, shortened

TRAIN = ["2007_000032", "2007_000039", "2009_001433"]
VAL = ["2007_000033", "2011_003276"]
SBD_TRAIN = ["2007_000032", "2008_000002", "2007_000033", "2010_005951"]  # one of VOC train, one of VOC val
SBD_VAL = ["2011_003276", "2008_000008", "2008_000002"]  # one of VOC val, one of SBD train
TRAIN_AUG = ["2007_000032", "2007_000039", "2008_000002", "2008_000008", "2009_001433", "2010_005951"]


def palette() -> list[int]:
    """``VOClabelcolormap`` of the development kit: the bits of the index, spread over the colours from the top."""
    colors = []
    for index in range(256):
        color, rest = [0, 0, 0], index
        for bit in range(7, -1, -1):
            for channel in range(3):
                color[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        colors += color
    return colors


def sample(name: str) -> tuple[np.ndarray, np.ndarray]:
    """An image and a mask that belong to a name; sizes differ, as those of VOC do."""
    rng = np.random.default_rng(list(name.encode()))
    height, width = (int(n) for n in rng.integers(9, 30, 2))
    mask = rng.choice([0, 1, 5, 15, 20, 255], (height, width)).astype(np.uint8)
    return rng.integers(0, 256, (height, width, 3), np.uint8), mask


def save_mask(path: Path, mask: np.ndarray) -> None:
    picture = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
    picture.putpalette(palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def save_mat(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"GTcls": {"Boundaries": np.zeros((20, 1), object), "Segmentation": mask, "CategoriesPresent": [1]}})


def save_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def build_voc(folder: Path) -> Path:
    for name in TRAIN + VAL:
        image, mask = sample(name)
        save_image(folder / "JPEGImages" / f"{name}.jpg", image)
        save_mask(folder / "SegmentationClass" / f"{name}.png", mask)
    for split, names in {"train": TRAIN, "val": VAL, "trainval": sorted(TRAIN + VAL)}.items():
        write_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    save_image(folder / "JPEGImages" / "2012_004331.jpg", sample("2012_004331")[0])  # most images have no mask
    return folder


def sbd_mask(name: str) -> np.ndarray:
    """What SBD says differs from VOC's own mask, and knows no void."""
    return (sample(name)[1] % 20).astype(np.uint8)


def build_sbd(folder: Path) -> Path:
    for name in sorted({*SBD_TRAIN, *SBD_VAL}):
        save_image(folder / "img" / f"{name}.jpg", sample(name)[0])
        save_mat(folder / "cls" / f"{name}.mat", sbd_mask(name))
    (folder / "inst").mkdir()
    write_list(folder / "train.txt", SBD_TRAIN)
    write_list(folder / "val.txt", SBD_VAL)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with VOCdevkit/VOC2012 and benchmark_RELEASE/dataset in it."""
    build_voc(tmp_path / "VOCdevkit" / "VOC2012")
    build_sbd(tmp_path / "benchmark_RELEASE" / "dataset")
    return tmp_path


@pytest.fixture
def voc(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


def stems(paths: Sequence[str]) -> list[str]:
    return [Path(path).stem for path in paths]


# classes


def test_classes_and_colours() -> None:
    import_torchvision()
    from torchvision.models._meta import _VOC_CATEGORIES

    assert list(VOC.class_names) == ["background", *_VOC_CATEGORIES[1:]]
    assert VOC.num_classes == len(VOC.colors) == 21
    assert np.ravel(VOC.colors).tolist() == palette()[: 3 * 21]
    for name in ("num_classes", "class_names", "colors"):
        assert getattr(TrainAug, name) == getattr(VOC, name)
    assert (Cityscapes.num_classes, len(Cityscapes.class_names), len(Cityscapes.colors)) == (19, 19, 19)
    assert {"cityscapes": Cityscapes, "voc": VOC, "trainaug": TrainAug} == DATASETS


def test_published_numbers_of_images() -> None:
    """Those of the papers of Cityscapes and VOC; of trainaug the number of names in its usual list."""
    assert Cityscapes.official_lengths == {"train": 2975, "val": 500, "test": 1525}
    assert VOC.official_lengths == {"train": 1464, "val": 1449, "trainval": 1464 + 1449}
    assert TrainAug.official_lengths == {"train": 10582, "val": 1449}


# reading


@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_samples_against_torchvision(root: Path, split: str) -> None:
    import_torchvision()
    from torchvision.datasets import VOCSegmentation

    theirs, ours = VOCSegmentation(root, image_set=split), VOC(root, split)
    assert len(ours) == len(theirs) > 0
    for index in range(len(ours)):
        image, label = ours[index]
        picture, mask = theirs[index]
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert label.dtype == torch.uint8
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        torch.testing.assert_close(image, expected / 255, rtol=0, atol=0)
        assert torch.equal(label, torch.from_numpy(np.array(mask)))
        assert np.array_equal(label.numpy(), sample(stems(ours.image_paths)[index])[1])


def test_cityscapes_against_torchvision(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import Cityscapes as Theirs

    generate_streets(tmp_path, train=3, val=2, size=(64, 96))
    for path in tmp_path.rglob("*_labelIds.png"):  # torchvision looks for them
        (path.parent / path.name.replace("labelIds", "color")).write_bytes(path.read_bytes())
    theirs, ours = (
        Theirs(str(tmp_path), split="train", mode="fine", target_type="semantic"),
        Cityscapes(tmp_path, "train"),
    )
    train_ids = {row.id % 256: row.train_id % 256 for row in Theirs.classes}
    assert sorted(map(str, theirs.images)) == ours.image_paths
    for index, path in enumerate(ours.image_paths):
        picture, target = theirs[list(map(str, theirs.images)).index(path)]
        image, label = ours[index]
        torch.testing.assert_close(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255, rtol=0, atol=0)
        assert label.flatten().tolist() == [train_ids[value] for value in target.tobytes()]
    colors = {row.train_id: (row.name, row.color) for row in Theirs.classes if 0 <= row.train_id < 19}
    assert [colors[i] for i in range(19)] == list(zip(Cityscapes.class_names, Cityscapes.colors, strict=True))


@pytest.mark.parametrize("depth", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize("kind", [VOC, TrainAug])
def test_root_is_found_from_above(root: Path, kind: type[VOC], depth: str) -> None:
    assert len(kind(root / depth, "val")) == 2
    assert len(kind(root / depth, "train")) == (3 if kind is VOC else 6)
    assert len(open_dataset("voc" if kind is VOC else "trainaug", str(root / depth), "val")) == 2


def test_odd_list_files(voc: Path) -> None:
    path = voc / "ImageSets" / "Segmentation" / "train.txt"
    for text in (
        "\r\n".join(TRAIN) + "\r\n",
        "\n\n" + " \n".join(TRAIN) + "\t\n  \n\n",
        "\ufeff" + "\n".join(TRAIN),
        "\n".join(TRAIN + TRAIN[:2]),
    ):
        path.write_bytes(text.encode())
        assert stems(VOC(voc, "train").image_paths) == TRAIN
        assert stems(TrainAug(voc, "train").image_paths) == TRAIN_AUG


def test_grey_images_become_rgb(voc: Path) -> None:
    grey = np.arange(0, 250, dtype=np.uint8).reshape(10, 25)
    save_image(voc / "JPEGImages" / f"{TRAIN[0]}.jpg", grey)
    save_mask(voc / "SegmentationClass" / f"{TRAIN[0]}.png", np.zeros((10, 25), np.uint8))
    image, _ = VOC(voc, "train")[0]
    assert image.shape == (3, 10, 25)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert (image[0] * 255 - torch.from_numpy(grey.astype(np.float32))).abs().max() < 12  # JPEG


def test_palette_does_not_matter_and_few_bits_are_read(voc: Path) -> None:
    mask = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    save_image(voc / "JPEGImages" / f"{TRAIN[0]}.jpg", np.zeros((2, 4, 3), np.uint8))
    picture = Image.frombytes("P", (4, 2), mask.tobytes())
    picture.putpalette([0, 0, 0] * 3 + [200, 10, 10])
    for options in ({}, {"bits": 2}, {"transparency": 0}):
        picture.save(voc / "SegmentationClass" / f"{TRAIN[0]}.png", **options)
        assert VOC(voc, "train")[0][1].tolist() == mask.tolist()
    Image.fromarray(mask).save(voc / "SegmentationClass" / f"{TRAIN[0]}.png")  # grey: indices, too
    assert VOC(voc, "train")[0][1].tolist() == mask.tolist()


def test_official_colours_behind_the_last_class_are_no_other_order(voc: Path) -> None:
    mask = np.array([[0, 1, 2, 255], [3, 2, 1, 0]], np.uint8)
    save_image(voc / "JPEGImages" / f"{TRAIN[0]}.jpg", np.zeros((2, 4, 3), np.uint8))
    picture = Image.frombytes("P", (4, 2), mask.tobytes())
    for index, allowed in ((21, True), (255, True), (20, False)):
        colors = np.array(palette()).reshape(256, 3)
        colors[index] = colors[1]
        picture.putpalette(colors.ravel().tolist())
        picture.save(voc / "SegmentationClass" / f"{TRAIN[0]}.png")
        if allowed:
            assert VOC(voc, "train")[0][1].tolist() == mask.tolist()
        else:
            with pytest.raises(ValueError, match="its palette has at index 20 the colour of class 1"):
                VOC(voc, "train")[0]


# trainaug


def test_trainaug(root: Path) -> None:
    dataset = TrainAug(root, "train")
    assert stems(dataset.image_paths) == stems(dataset.label_paths) == TRAIN_AUG
    for index, name in enumerate(TRAIN_AUG):
        image, label = dataset[index]
        own = name in TRAIN
        assert np.array_equal(label.numpy(), sample(name)[1] if own else sbd_mask(name))
        assert ("VOC2012" in dataset.label_paths[index]) is own
        assert ("VOC2012" in dataset.image_paths[index]) is own
        assert image.shape == (3, *label.shape)
    assert not np.array_equal(sbd_mask(TRAIN[0]), sample(TRAIN[0])[1])
    assert stems(TrainAug(root, "val").image_paths) == VAL
    copied = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(dataset[2], copied[2], strict=True))


def test_masks_of_sbd_against_torchvision(root: Path) -> None:
    import_torchvision()
    from torchvision.datasets import SBDataset

    theirs = SBDataset(str(root / "benchmark_RELEASE" / "dataset"), image_set="train", mode="segmentation")
    ours = TrainAug(root, "train")
    compared = 0
    for index in range(len(theirs)):
        name = Path(theirs.images[index]).stem
        if name not in VAL and name not in TRAIN:
            image, label = ours[TRAIN_AUG.index(name)]
            assert np.array_equal(label.numpy(), np.array(theirs[index][1]))
            assert np.array_equal((image * 255).round().numpy().transpose(1, 2, 0), np.array(theirs[index][0]))
            compared += 1
    assert compared == 2


@pytest.mark.parametrize("seed", range(5))
def test_trainaug_is_a_set_of_names(tmp_path: Path, seed: int) -> None:
    """Only names decide: the files here are empty."""
    rng = random.Random(seed)
    names = [f"20{rng.randrange(7, 12):02d}_{i:06d}" for i in range(60)]
    train, val = set(names[:15]), set(names[15:25])
    sbd_train, sbd_val = (set(rng.sample(names, 25)) for _ in range(2))
    voc, sbd = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset"
    for folder, ending, wanted in (
        (voc / "JPEGImages", "jpg", train | val),
        (voc / "SegmentationClass", "png", train | val),
        (sbd / "img", "jpg", sbd_train | sbd_val),
        (sbd / "cls", "mat", sbd_train | sbd_val),
    ):
        folder.mkdir(parents=True)
        for name in wanted:
            (folder / f"{name}.{ending}").touch()
    for path, wanted in (
        (voc / "ImageSets/Segmentation/train.txt", train),
        (voc / "ImageSets/Segmentation/val.txt", val),
        (sbd / "train.txt", sbd_train),
        (sbd / "val.txt", sbd_val),
    ):
        write_list(path, rng.sample(sorted(wanted), len(wanted)))
    expected = sorted((train | sbd_train | sbd_val) - val)
    dataset = TrainAug(tmp_path, "train")
    assert stems(dataset.image_paths) == stems(dataset.label_paths) == expected
    assert {Path(path).stem for path in dataset.label_paths if path.endswith(".png")} == train


def test_segmentation_class_aug_in_place_of_sbd(root: Path, voc: Path) -> None:
    (root / "benchmark_RELEASE").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"(?s)benchmark_RELEASE.*SegmentationClassAug.*found: .*JPEGImages"):
        TrainAug(root, "train")
    for name in {*SBD_TRAIN, *SBD_VAL, *TRAIN}:
        save_image(voc / "JPEGImages" / f"{name}.jpg", sample(name)[0])
        (voc / "SegmentationClassAug").mkdir(exist_ok=True)
        Image.fromarray(sbd_mask(name)).save(voc / "SegmentationClassAug" / f"{name}.png")
    (voc / "SegmentationClassAug" / "._2008_000002.png").touch()  # macOS
    dataset = TrainAug(root, "train")
    assert stems(dataset.image_paths) == TRAIN_AUG
    for index, name in enumerate(TRAIN_AUG):
        assert np.array_equal(dataset[index][1].numpy(), sample(name)[1] if name in TRAIN else sbd_mask(name))


def test_missing_scipy_says_how_to_get_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert len(TrainAug(root, "val")) == 2  # needs none
    with pytest.raises(ImportError, match="needs scipy: pip install scipy"):
        TrainAug(root, "train")


def test_a_mask_file_executes_nothing(root: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (Path.touch, (tmp_path / "executed",))

    dataset = TrainAug(root, "train")
    index = TRAIN_AUG.index("2008_000002")
    Path(dataset.label_paths[index]).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(OSError, match=r"2008_000002.mat: cannot be read as a mask of SBD"):
        dataset[index]
    assert not (tmp_path / "executed").exists()


# damage: every case, upon indexing and in the check


def png(mask: np.ndarray, mode: str = "L") -> bytes:
    content = io.BytesIO()
    Image.fromarray(mask).convert(mode).save(content, "PNG")
    return content.getvalue()


def grey_of_few_bits(depth: int) -> bytes:
    """A PNG of 8 x 1 pixels, class 1 each; Pillow writes no such file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes([sum(1 << shift for shift in range(0, 8, depth))] * depth)
    header = struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [2, 4])
def test_grey_masks_of_few_bits_are_refused_and_images_are_not(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(grey_of_few_bits(depth))
    for kind in DATASETS.values():
        with pytest.raises(ValueError, match="grey of 2 or 4 bits"):
            kind.read_mask(str(path))
    assert (VOC.read_image(str(path)) == 255 // (2**depth - 1)).all()


def jpeg(mode: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(sample(TRAIN[1])[0]).convert(mode).save(content, "JPEG")
    return content.getvalue()


def mat(mask: np.ndarray) -> bytes:
    content = io.BytesIO()
    savemat(content, {"GTcls": {"Segmentation": mask}})
    return content.getvalue()


def reordered(old: bytes) -> bytes:
    """The same picture with its colours in another order, as programs that make PNG files smaller write it."""
    picture = Image.open(io.BytesIO(old))
    content = io.BytesIO()
    picture.remap_palette([0, 5, 1, 15, 20, 255]).save(content, "PNG")
    assert np.array_equal(Image.open(content).convert("RGB"), picture.convert("RGB"))
    return content.getvalue()


def with_label_21() -> np.ndarray:
    mask = sample(TRAIN[1])[1].copy()
    mask[0, 0], mask[1, 2] = 21, 254
    return mask


IMAGE, MASK, MAT = "JPEGImages/2007_000039.jpg", "SegmentationClass/2007_000039.png", "cls/2008_000008.mat"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str, str]] = {
    "truncated image": (IMAGE, lambda old: old[: len(old) // 2], "unreadable", r"cannot be read.*restore"),
    "empty image": (IMAGE, lambda old: b"", "unreadable", r"cannot be read.*restore"),
    "a page instead of an image": (IMAGE, lambda old: b"<html>404</html>", "unreadable", r"cannot be read"),
    "CMYK image": (IMAGE, lambda old: jpeg("CMYK"), "unreadable", r'must be "RGB" or "L", .* "CMYK"; convert it'),
    "truncated mask": (MASK, lambda old: old[: len(old) // 2], "unreadable", r"cannot be read.*restore"),
    "cut in the header": (MASK, lambda old: old[:20], "unreadable", r"cannot be read.*restore"),
    "empty mask": (MASK, lambda old: b"", "unreadable", r"cannot be read.*restore"),
    "mask of colours": (MASK, lambda old: png(sample(TRAIN[1])[0], "RGB"), "unreadable", r'"P" or "L".*"RGB".*palette'),
    "re-ordered mask": (MASK, reordered, "unreadable", r"at index 1 the colour of class 5 \(bottle\).*restore"),
    "mask of 1 bit": (MASK, lambda old: png(sample(TRAIN[1])[1], "1"), "unreadable", r'"P" or "L", this one is "1"'),
    "mask of 16 bits": (MASK, lambda old: png(sample(TRAIN[1])[1].astype(np.uint16), "I;16"), "unreadable", '"I;16"'),
    "grey mask of 2 bits": (MASK, lambda old: grey_of_few_bits(2), "unreadable", "grey of 2 or 4 bits.*save it with 8"),
    "grey mask of 4 bits": (MASK, lambda old: grey_of_few_bits(4), "unreadable", "grey of 2 or 4 bits.*save it with 8"),
    "mask of another size": (MASK, lambda old: png(np.zeros((5, 7), np.uint8)), "other size", r"has 5 x 7.*restore"),
    "labels 21 and 254": (MASK, lambda old: png(with_label_21()), "wrong values", r"0\.\.20, or 255.*\[21, 254\].*255"),
    "truncated .mat": (MAT, lambda old: old[: len(old) // 2], "unreadable", r"mask of SBD.*restore"),
    "empty .mat": (MAT, lambda old: b"", "unreadable", r"mask of SBD.*restore"),
    "numbers that are no bytes": (MAT, lambda old: mat(np.zeros((4, 4), np.int16)), "unreadable", r"is int16 of shape"),
    "colours in a .mat": (MAT, lambda old: mat(np.zeros((4, 4, 3), np.uint8)), "unreadable", r"uint8 of shape \(4, 4"),
    "random .mat": (MAT, lambda old: random.Random(1).randbytes(400), "unreadable", r"mask of SBD.*restore"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(root: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    relative, change, kind, message = DAMAGE[case]
    dataset = TrainAug(root, "train")
    (path,) = root.rglob(relative)
    path.write_bytes(change(path.read_bytes()))
    wanted = rf"{re.escape(str(path))}.*{message}"
    errors = []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except (OSError, ValueError) as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert re.search(wanted, errors[0], re.DOTALL)
    (found, _) = check_files(TrainAug, root, workers=0, progress=False)
    assert found.problems == [(kind, errors[0])]
    assert found.pairs == len(TRAIN_AUG)
    assert main(["data", "check", str(root), "--dataset", "trainaug"]) == 2
    out, err = capsys.readouterr()
    assert f"train, {kind}: {errors[0]}" in out
    assert "1 problem in" in err


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        (
            f"JPEGImages/{TRAIN[1]}.jpg",
            rf"train.txt names '{TRAIN[1]}', but there is no image .*{TRAIN[1]}.jpg; restore",
        ),
        (f"SegmentationClass/{TRAIN[1]}.png", rf"but there is no label .*{TRAIN[1]}.png; restore"),
        (
            "img/2008_000002.jpg",
            r"SBD's train.txt or val.txt names '2008_000002', but there is no image .*2008_000002.jpg",
        ),
        ("cls/2008_000008.mat", r"but there is no label .*2008_000008.mat"),
    ],
)
def test_missing_files_are_named(root: Path, relative: str, message: str) -> None:
    (path,) = root.rglob(relative)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        TrainAug(root, "train")
    (found,) = check_files(TrainAug, root, ["train"], progress=False)
    kinds = [kind for kind, _ in found.problems]
    # an image of VOC that is gone leaves its mask alone
    assert kinds == ["missing"]
    assert re.search(message, found.problems[0][1])
    assert found.pairs == len(TRAIN_AUG) - 1


def test_a_file_that_goes_away_later_is_named(root: Path) -> None:
    for dataset in (VOC(root, "train"), TrainAug(root, "train")):
        index = [path.endswith(".mat") for path in dataset.label_paths].index(type(dataset) is TrainAug)
        path = Path(dataset.label_paths[index])
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist"):
            dataset[index]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "VOCdevkit",
            r"(?s)no VOC2012 under root.*JPEGImages.*VOCdevkit.VOC2012\n.*found: .*contains: benchmark_RELEASE",
        ),
        ("VOCdevkit/VOC2012/JPEGImages", r"(?s)not a whole VOC2012: JPEGImages missing.*found: .*SegmentationClass"),
        ("VOCdevkit/VOC2012/SegmentationClass", r"(?s)SegmentationClass missing"),
        (
            "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt",
            r"(?s)no list of split 'train'.*train.txt.*found: .*val.txt",
        ),
        ("benchmark_RELEASE/dataset/cls", r"(?s)not a whole SBD: cls missing.*found: .*img, inst"),
        ("benchmark_RELEASE/dataset/train.txt", r"(?s)not a whole SBD: train.txt missing"),
        (
            "benchmark_RELEASE",
            r"(?s)no masks of SBD.*benchmark_RELEASE.dataset with img/, cls/.*or: .*SegmentationClassAug",
        ),
    ],
)
def test_missing_folders_say_what_is_expected(
    root: Path, gone: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / gone).rename(root.parent / "gone")
    try:
        with pytest.raises(FileNotFoundError, match=message):
            TrainAug(root, "train")
        assert main(["data", "check", str(root), "--dataset", "trainaug", "--split", "train"]) == 2
        assert re.search(message, capsys.readouterr().err)
    finally:
        (root.parent / "gone").rename(root / "gone")


def test_half_a_folder_beside_a_whole_one_is_passed_over(root: Path) -> None:
    (root / "VOC2012/JPEGImages").mkdir(parents=True)
    assert len(VOC(root, "val")) == len(VAL)


def test_bad_arguments(root: Path, voc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r'split must be "train" \(trainaug\) or "val".*\'trainval\''):
        TrainAug(root, "trainval")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no list of split 'test'.*contains: train.txt, trainval.txt, val.txt"
    ):
        VOC(root, "test")
    (voc / "ImageSets/Segmentation/val.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"val.txt names no image"):
        VOC(root, "val")
    with pytest.raises(ValueError, match=r"cityscapes, voc, trainaug; got 'vox', did you mean 'voc'"):
        open_dataset("vox", root, "train")
    assert main(["data", "check", str(root), "--dataset", "vox"]) == 2
    assert "did you mean 'voc'" in capsys.readouterr().err


# the check


@pytest.mark.parametrize("workers", [0, 2])
def test_check_counts(root: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_FEW", 1)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # without a bar there is no need of it
    save_mask(root / "VOCdevkit/VOC2012/SegmentationClass/2012_000001.png", np.zeros((3, 3), np.uint8))
    wrong = root / "VOCdevkit/VOC2012" / MASK
    save_mask(wrong, with_label_21())
    train, val = check_files(TrainAug, root, workers=workers, progress=False)
    for found, names in ((train, TRAIN_AUG), (val, VAL)):
        pixels, images = np.zeros(256, int), np.zeros(256, int)
        sizes = []
        for name in names:
            mask = sample(name)[1] if name in TRAIN + VAL else sbd_mask(name)
            if name == TRAIN[1]:
                mask = with_label_21()
                mask[mask == 21] = 254  # both stand for no class
            sizes.append(mask.shape)
            for value in range(256):
                pixels[value] += (mask == value).sum()
                images[value] += (mask == value).any()
        assert found.pairs == len(names)
        assert sorted(found.sizes.elements()) == sorted(sizes)
        assert found.pixels.tolist() == pixels.tolist()
        assert found.images.tolist() == images.tolist()
    assert [kind for kind, _ in train.problems] == ["orphan", "wrong values"]
    assert re.search(r"label .*2012_000001.png has no image; restore .*2012_000001.jpg", train.problems[0][1])
    assert val.problems == []  # the orphan stands in a folder that the splits share
    text = format_checks(TrainAug, [train, val])
    assert re.search(r"train +6 +10582 .*\(\d sizes\) +0 +1 +0 +0 +1\n", text)
    assert re.search(rf"  0 background +[\d.]+% +{train.images[0]} +[\d.]+% +{val.images[0]}\n", text)
    assert re.search(r"outside of the table +[\d.]+% +1 ", text)
    assert "2 problems:" in text


def test_a_split_without_labels_is_told(voc: Path) -> None:
    """As Cityscapes' test is; in part without them it is none."""
    for name in TRAIN:
        path = voc / "SegmentationClass" / f"{name}.png"
        with Image.open(path) as image:
            size = image.size
        Image.new("L", size, 255).save(path)
        found = check_files(VOC, voc, progress=False)[0]
        assert found.problems == [] or name == TRAIN[-1]
    assert found.problems == [("wrong values", "no pixel of the split has a class: it can only be looked at")]


def test_the_tables_of_a_check_show_shares_and_extremes() -> None:
    check = SplitCheck("train", pairs=1465, sizes=Counter({(3, 9): 1, (5, 2): 1, (8, 4): 1}))
    check.pixels[[0, 15, 255]], check.images[[0, 15, 255]] = (700, 200, 100), (3, 2, 1)
    lines = format_checks(VOC, [check]).splitlines()
    assert " ".join(lines[1].split()) == "train 1465 1464 3 x 9 to 8 x 4 (3 sizes) 0 0 0 0 0"
    rows = [line.split() for line in lines]
    for row in ("0 background 70.000% 3", "15 person 20.000% 2", "1 aeroplane 0.000% 0", "255 void 10.000% 1"):
        assert row.split() in rows
    assert lines[-2:] == ["no problems", "train has 1465 pairs; 1464 are published"]
    lines = format_checks(VOC, [SplitCheck("mine", pairs=3)]).splitlines()
    assert lines[1].split() == ["mine", "3", "-", "-", *"00000"]
    assert (lines[-3].split(), *lines[-2:]) == (["255", "void", "-", "0"], "", "no problems")


def test_messages_count_what_they_leave_out(tmp_path: Path) -> None:
    messages = list("abcdefg")
    assert shortened(messages[:5]) == "a\nb\nc\nd\ne"
    assert shortened(messages[:6]) == "a\nb\nc\nd\ne\n... and 1 more like these"
    assert shortened(messages).endswith("\ne\n... and 2 more like these")
    for name in "abcdefgh":
        (tmp_path / name).touch()
    assert found_in(tmp_path) == f"{tmp_path} contains: a, b, c, d, e, f, g, h"
    (tmp_path / "i").touch()
    assert found_in(tmp_path) == f"{tmp_path} contains: a, b, c, d, e, f, g, h, ... (9 in all)"
    assert found_in(tmp_path / "a") == f"{tmp_path / 'a'} is no folder"
    assert found_in(tmp_path / "j") == f"{tmp_path / 'j'} does not exist"


@pytest.mark.parametrize("kind", [VOC, TrainAug])
def test_a_missing_image_is_told_once(kind: type[VOC], root: Path) -> None:
    (root / f"VOCdevkit/VOC2012/JPEGImages/{VAL[0]}.jpg").unlink()
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    for path in (lists / "train.txt", lists / "val.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (lists / "trainval.txt").write_bytes(b"not UTF-8: \xe4")
    (problem,) = (told for found in check_files(kind, root, progress=False) for told in found.problems)
    assert problem[0] == "missing"
    assert VAL[0] in problem[1]


def test_check_of_a_good_tree(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("voc", "trainaug"):
        assert main(["data", "check", str(root), "--dataset", name]) == 0
        out, err = capsys.readouterr()
        assert "no problems" in out
        assert err == ""
    assert main(["data", "check", str(root), "--dataset", "voc", "--split", "trainval"]) == 0
    assert re.search(r"trainval +5 +2913", capsys.readouterr().out)


def test_check_of_cityscapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate_streets(tmp_path, train=3, val=2, size=(64, 96))
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +3 +2975 +64 x 96 ", out)
    assert out.endswith("no problems\ntrain has 3 pairs; 2975 are published\nval has 2 pairs; 500 are published\n")
    images, labels = (sorted(tmp_path.glob(f"{layer}/train/*/*.png")) for layer in ("leftImg8bit", "gtFine"))
    (images[0].parent / f"._{images[0].name}").touch()  # macOS leaves such files
    (images[0].parents[1] / ".DS_Store").touch()
    labels[0].unlink()
    images[1].unlink()
    ids = np.array(Image.open(labels[2]))
    ids[3, 4] = 77
    Image.fromarray(ids).save(labels[2])
    assert main(["data", "check", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "3 problems in" in err
    assert f"train, missing: image {images[0]} has no label file, expected {labels[0]}; restore it" in out
    assert f"train, missing: label {labels[1]} has no image file, expected {images[1]}; restore it" in out
    assert re.search(rf"train, wrong values: {re.escape(str(labels[2]))}: label values must be 0\.\.33.*\[77\]", out)
    for path in tmp_path.glob("gtFine/val/*/*.png"):  # of train ids
        Image.fromarray(Cityscapes.classes_of_values[np.array(Image.open(path))]).save(path)
    assert main(["data", "check", str(tmp_path), "--split", "val"]) == 2
    assert "val, wrong values: no mask has a value above 18: these are train ids" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--split", "val, test"]) == 2
    assert "test, missing: no Cityscapes images for split 'test'" in capsys.readouterr().out


def test_masks_without_any_class_are_not_called_train_ids() -> None:
    pixels = np.zeros(256, np.int64)
    assert Cityscapes.doubt(pixels) is None  # no file
    pixels[255] = 1000  # the masks of the split "test" are all void
    assert Cityscapes.doubt(pixels) is None
    pixels[:6] = 10
    assert "these are train ids" in (Cityscapes.doubt(pixels) or "")
    for value in range(6, 19):  # traffic lights to bicycles, which have label ids above 18
        assert Cityscapes.doubt(pixels + (np.arange(256) == value)) is None


@pytest.mark.parametrize(("inside", "given"), [("VOCdevkit", "VOC2012"), ("VOCdevkit/VOC2012", ".")])
def test_sbd_is_found_from_a_relative_path(
    inside: str, given: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(TrainAug(root, "train"))
    monkeypatch.chdir(root / inside)
    assert len(TrainAug(given, "train")) == whole
