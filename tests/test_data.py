from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from segadv.data import (
    CLASSES,
    COLORS,
    IGNORE_INDEX,
    NUM_CLASSES,
    Augmented,
    Cityscapes,
    EpochSampler,
    generate_streets,
)
from segadv.data.streets import _halved, _Scene

SIZE = (96, 192)
TRAIN, VAL = 7, 4

# label id -> trainId, copied from the data set's published table row by row, not from the package
TRAIN_IDS = {
    0: 255, 1: 255, 2: 255, 3: 255, 4: 255, 5: 255, 6: 255, 7: 0, 8: 1, 9: 255, 10: 255, 11: 2, 12: 3, 13: 4,
    14: 255, 15: 255, 16: 255, 17: 5, 18: 255, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 29: 255, 30: 255, 31: 16, 32: 17, 33: 18, 255: 255,
}  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_streets(tmp_path_factory.mktemp("streets"), train=TRAIN, val=VAL, size=SIZE, seed=3)


@pytest.fixture
def copy(streets: Path, tmp_path: Path) -> Path:
    """A copy of the generated tree that a test may spoil."""
    shutil.copytree(streets, tmp_path / "copy")
    return tmp_path / "copy"


def write_pair(root: Path, image: Image.Image, label: Image.Image, name: str = "ulm_000000_000019") -> None:
    for layer, ending, picture in (
        ("leftImg8bit", "leftImg8bit", image),
        ("gtFine", "gtFine_labelIds", label),
    ):
        folder = root / layer / "train" / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}_{ending}.png")


# generated scenes


def test_layout_and_names(streets: Path) -> None:
    files = set(contents(streets)) - {"streets.json"}
    pattern = re.compile(
        r"(?:leftImg8bit|gtFine)/(train|val)/([a-z]+)/\2_\d{6}_\d{6}_(?:leftImg8bit|gtFine_labelIds)\.png"
    )
    matches = [pattern.fullmatch(name) for name in files]
    assert all(matches), files
    assert Counter(match[1] for match in matches if match) == {"train": 2 * TRAIN, "val": 2 * VAL}
    cities = {split: {m[2] for m in matches if m and m[1] == split} for split in ("train", "val")}
    assert len(cities["train"]) > 1
    assert len(cities["val"]) > 1
    assert not cities["train"] & cities["val"]
    for name in files:
        if name.startswith("leftImg8bit"):
            assert name.replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit", "_gtFine_labelIds") in files
    manifest = json.loads((streets / "streets.json").read_text())
    assert manifest | {"train": TRAIN, "val": VAL, "size": list(SIZE), "seed": 3} == manifest


def test_label_ids_and_unlabelled_border(streets: Path) -> None:
    seen = set()
    for path in streets.glob("gtFine/*/*/*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            ids = np.asarray(image)
        assert ids.shape == SIZE
        seen |= set(np.unique(ids).tolist())
        border = np.concatenate((ids[:2].ravel(), ids[-2:].ravel(), ids[:, :2].ravel(), ids[:, -2:].ravel()))
        assert border.max() <= 4
        assert (ids == 1).any()  # the bonnet
        assert (ids > 4).mean() > 0.7
    assert seen <= set(TRAIN_IDS)
    assert seen >= {7, 8, 11, 17, 20, 21, 23, 24, 26}


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("polygon", ([(-3.0, 0.0, 9.0), (3.0, 0.0, 9.0), (1.0, 4.0, 15.0)],)),
        ("side", (3.0, (0.0, 4.0), (5.0, 20.0))),
        ("front", ((-3.0, 3.0), (0.5, 2.0), 9.0)),
        ("ellipse", ((1.0, 1.0, 9.0), (3.0, 1.0))),
    ],
)
def test_what_is_drawn_is_labelled(shape: str, arguments: tuple[Any, ...]) -> None:
    scene = _Scene(np.random.default_rng(0), 64, 96)
    getattr(scene, shape)(*arguments, (0.5, 0.6, 0.7), 26)
    drawn = np.asarray(scene.color).any(axis=2)
    assert np.array_equal(np.asarray(scene.label) == 26, drawn)
    assert 100 < drawn.sum() < drawn.size / 2


def test_what_is_near_hides_what_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lay_out_sides", "lay_out_pavement", "lay_out_vehicles", "draw_background"):
        monkeypatch.setattr(_Scene, name, lambda self: None)
    scene = _Scene(np.random.default_rng(0), 64, 96)
    for z, label in ((9.0, 24), (5.0, 26), (20.0, 11)):
        scene.add(z, scene.front, (-90.0, 90.0), (-90.0, 90.0), z, (0.5, 0.6, 0.7), label)
    assert np.unique(np.asarray(scene.render()[1])).tolist() == [1, 3, 26]  # bonnet, border, the nearest


@pytest.mark.parametrize("axis", [0, 1])
def test_labels_are_not_shifted_against_colours(axis: int) -> None:
    """Half-planes that begin at every place: the mean of the colours covers as many pixels as the labels."""
    shifts = []
    for edge in range(16, 48):
        covered = np.zeros((64, 64), np.uint8)
        covered.swapaxes(0, axis)[edge:] = 1
        color = Image.fromarray(255 * covered.repeat(3).reshape(64, 64, 3))
        pixels, label = _halved(color, Image.fromarray(covered))
        assert label.shape == pixels.shape[:2] == (32, 32)
        shifts.append((pixels.sum() / 3 - label.sum()) / 32)  # in pixels of the result
    assert np.abs(shifts).max() < 0.26
    assert abs(np.mean(shifts)) < 1e-3


def test_same_bytes_for_any_number_of_images(streets: Path, tmp_path: Path) -> None:
    more = contents(streets)
    again = contents(generate_streets(tmp_path / "again", train=TRAIN, val=VAL, size=SIZE, seed=3))
    assert again == more
    few = contents(generate_streets(tmp_path / "few", train=1, val=2, size=SIZE, seed=3))
    del few["streets.json"]
    assert len(few) == 6
    assert all(more[name] == content for name, content in few.items())


def test_seed_split_and_index_change_the_scene(streets: Path, tmp_path: Path) -> None:
    other = generate_streets(tmp_path, train=1, val=1, size=SIZE, seed=4)
    images = [Image.open(path).tobytes() for root in (streets, other) for path in root.glob("leftImg8bit/*/*/*.png")]
    assert len(set(images)) == len(images) == TRAIN + VAL + 2


def test_complete_tree_is_reused(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert generate_streets(copy, train=TRAIN, val=VAL, size=SIZE, seed=3) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("manifest", [True, False])
def test_interrupted_generation_goes_on(streets: Path, copy: Path, manifest: bool) -> None:
    images, labels = sorted(copy.glob("leftImg8bit/*/*/*.png")), sorted(copy.glob("gtFine/*/*/*.png"))
    for path in (images[1], images[4], labels[4], labels[6]):
        path.unlink()
    # what a kill in the middle of a write leaves behind
    leftover = images[1].with_name(f".{images[1].stem}.1.2.segadv.png")
    leftover.write_bytes(b"half")
    if not manifest:
        (copy / "streets.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (images[0], labels[1])}
    generate_streets(copy, train=TRAIN, val=VAL, size=SIZE, seed=3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    leftover.unlink()
    assert contents(copy) == contents(streets)


def test_a_generation_stopped_before_its_manifest_gets_it(copy: Path) -> None:
    manifest = (copy / "streets.json").read_bytes()
    (copy / "streets.json").unlink()
    generate_streets(copy, train=TRAIN, val=VAL, size=SIZE, seed=3)
    assert (copy / "streets.json").read_bytes() == manifest


@pytest.mark.parametrize(
    ("change", "manifest"),
    [
        ({"seed": 4}, True),
        ({"train": 8}, True),
        ({"val": 3}, True),
        ({"size": (96, 200)}, True),
        ({"seed": 4}, False),
        ({"val": 3}, False),
        ({"size": (96, 200)}, False),
    ],
)
def test_other_arguments_overwrite_nothing(copy: Path, change: dict[str, object], manifest: bool) -> None:
    if not manifest:
        (copy / "streets.json").unlink()
    before = contents(copy)
    arguments = {"train": TRAIN, "val": VAL, "size": SIZE, "seed": 3} | change
    with pytest.raises(FileExistsError, match=re.escape(str(copy))):
        generate_streets(copy, **arguments)  # type: ignore[arg-type]
    assert contents(copy) == before


def test_a_manifest_of_something_else_is_left_alone(copy: Path) -> None:
    (copy / "streets.json").write_text("{")
    before = contents(copy)
    with pytest.raises(FileExistsError, match=r"streets\.json exists and was not written by this generator"):
        generate_streets(copy, train=TRAIN, val=VAL, size=SIZE, seed=3)
    assert contents(copy) == before


def test_other_data_sets_are_left_alone(tmp_path: Path) -> None:
    write_pair(tmp_path, Image.new("RGB", (8, 4)), Image.new("L", (8, 4)))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="ulm_000000_000019"):
        generate_streets(tmp_path, train=1, val=1, size=SIZE)
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "leftImg8bit")
    with pytest.raises(FileExistsError, match="ulm_000000_000019_gtFine"):
        generate_streets(tmp_path, train=1, val=1, size=SIZE)
    # a file of somebody else's that bears one of our names
    name = "arbeiterstadt_000000_000019"
    shutil.rmtree(tmp_path / "gtFine")
    write_pair(tmp_path, Image.new("RGB", SIZE[::-1]), Image.new("L", SIZE[::-1]), name)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=name):
        generate_streets(tmp_path, train=1, val=1, size=SIZE)
    assert contents(tmp_path) == before
    next(tmp_path.glob("gtFine/train/*/*.png")).write_bytes(b"no picture")
    next(tmp_path.glob("leftImg8bit/train/*/*.png")).unlink()
    with pytest.raises(FileExistsError, match=f"{name}.* is not the scene asked for"):
        generate_streets(tmp_path, train=1, val=1, size=SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": -1}, "train must be a whole number of at least 0, got -1"),
        ({"val": -2}, "val must be a whole number of at least 0, got -2"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"size": (63, 320)}, r"size must be .* got \(63, 320\)"),
        ({"size": (320, 63)}, r"size must be .* got \(320, 63\)"),
    ],
)
def test_generator_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_streets(tmp_path, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# reading


def test_constants() -> None:
    assert (NUM_CLASSES, IGNORE_INDEX) == (19, 255)
    assert len(CLASSES) == len(set(CLASSES)) == len(COLORS) == len(set(COLORS)) == 19
    assert (CLASSES[0], CLASSES[10], CLASSES[13], CLASSES[18]) == ("road", "sky", "car", "bicycle")
    assert (COLORS[0], COLORS[10], COLORS[13], COLORS[18]) == (
        (128, 64, 128),
        (70, 130, 180),
        (0, 0, 142),
        (119, 11, 32),
    )


def test_samples(streets: Path) -> None:
    dataset = Cityscapes(streets, "train")
    assert len(dataset) == TRAIN
    assert dataset.image_paths == sorted(dataset.image_paths)
    for index in range(TRAIN):
        image, label = dataset[index]
        assert image.shape == (3, *SIZE)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert 0 <= image.min() < image.max() <= 1
        assert label.shape == SIZE
        assert label.dtype == torch.uint8
        with Image.open(dataset.image_paths[index]) as picture:
            pixels = torch.tensor(bytearray(picture.tobytes())).view(*SIZE, 3).permute(2, 0, 1)
        torch.testing.assert_close(image, pixels / 255, rtol=0, atol=0)
        with Image.open(dataset.label_paths[index]) as picture:
            expected = [TRAIN_IDS[value] for value in picture.tobytes()]
        assert label.flatten().tolist() == expected


def test_every_label_id(tmp_path: Path) -> None:
    ids = np.array(list(TRAIN_IDS), np.uint8)[None]
    write_pair(tmp_path, Image.new("RGB", (ids.size, 1)), Image.fromarray(ids))
    _, label = Cityscapes(tmp_path, "train")[0]
    assert label.tolist() == [list(TRAIN_IDS.values())]


def test_dataset_survives_pickling(streets: Path) -> None:
    dataset = Cityscapes(streets, "val")
    copied = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(dataset[1], copied[1], strict=True))


def test_missing_pillow_says_how_to_get_it(streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        Cityscapes(streets, "train")
    with pytest.raises(ImportError, match="pip install pillow"):
        generate_streets(tmp_path, train=1, val=1, size=SIZE)


@pytest.mark.parametrize("value", [34, 100, 254])
def test_value_outside_the_table(tmp_path: Path, value: int) -> None:
    write_pair(tmp_path, Image.new("RGB", (8, 4)), Image.new("L", (8, 4), value))
    with pytest.raises(ValueError, match=rf"ulm_000000_000019_gtFine_labelIds.png.*0\.\.33.*{value}"):
        Cityscapes(tmp_path, "train")[0]


def test_missing_folder_names_the_expected_paths(streets: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)expected: .*leftImg8bit.train.*does not exist"):
        Cityscapes(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"(?s)expected: .*leftImg8bit.test.*contains: train, val"):
        Cityscapes(streets, "test")
    with pytest.raises(FileNotFoundError, match=r"(?s)gtFine.train.*contains: train, val"):
        Cityscapes(streets / "leftImg8bit", "train")  # one folder too deep


@pytest.mark.parametrize(("layer", "what"), [("gtFine", "image"), ("leftImg8bit", "label")])
def test_a_missing_file_is_named_and_its_partner(layer: str, what: str, copy: Path) -> None:
    victim = sorted(copy.glob(f"{layer}/train/*/*.png"))[2]
    victim.unlink()
    [partner] = copy.glob(f"*/train/*/{re.split('_gtFine|_leftImg8bit', victim.name)[0]}_*")
    with pytest.raises(FileNotFoundError, match=f"{what} {partner} has no .*{victim.name}"):
        Cityscapes(copy, "train")
    for path in copy.glob("gtFine/train/*/*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"\n\.\.\. and [12] more like these$"):
        Cityscapes(copy, "train")


def test_size_mismatch_names_both_files_and_sizes(tmp_path: Path) -> None:
    write_pair(tmp_path, Image.new("RGB", (8, 4)), Image.new("L", (10, 6)))
    with pytest.raises(ValueError, match=r"_leftImg8bit.png has 4 x 8.*_labelIds.png has 6 x 10"):
        Cityscapes(tmp_path, "train")[0]
    for size in ((8, 6), (10, 4)):
        write_pair(tmp_path, Image.new("RGB", (8, 4)), Image.new("L", size))
        with pytest.raises(ValueError, match=f"has 4 x 8.*_labelIds.png has {size[1]} x {size[0]}"):
            Cityscapes(tmp_path, "train")[0]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [("L", "L", r'leftImg8bit.png.*must be "RGB".*"L"'), ("RGB", "P", r'labelIds.png.*must be "L".*"P"')],
)
def test_wrong_mode(tmp_path: Path, image: str, label: str, message: str) -> None:
    write_pair(tmp_path, Image.new(image, (8, 4)), Image.new(label, (8, 4)))
    with pytest.raises(ValueError, match=message):
        Cityscapes(tmp_path, "train")[0]


@pytest.mark.parametrize("which", ["image_paths", "label_paths"])
@pytest.mark.parametrize("damage", ["truncated", "half header", "empty", "no png", "overwritten"])
def test_corrupt_file_is_named(copy: Path, which: str, damage: str) -> None:
    dataset = Cityscapes(copy, "val")
    path = Path(getattr(dataset, which)[0])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "half header": content[:20],
            "empty": b"",
            "no png": b"<html>not found</html>",
            "overwritten": content[:middle] + bytes(64) + content[middle + 64 :],
        }[damage]
    )
    with pytest.raises(OSError, match=re.escape(path.name)):
        dataset[0]


# augmentation


class Coordinates(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples whose pixels say where they came from: channels row, column, index; label = column."""

    def __init__(self, height: int, width: int, length: int = 5) -> None:
        self.height, self.width, self.length = height, width, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(1.0, self.height + 1)[:, None].expand(self.height, self.width)
        columns = torch.arange(1.0, self.width + 1).expand(self.height, self.width)
        image = torch.stack((rows, columns, torch.full_like(rows, index + 1)))
        return image, columns.to(torch.uint8)


def test_crop_and_flip_treat_image_and_label_alike() -> None:
    augmented = Augmented(Coordinates(20, 30), crop=(8, 12), seed=0)
    flips, corners = Counter[bool](), set()
    for epoch in range(200):
        image, label, index = augmented[epoch, 3]
        assert image.shape == (3, 8, 12)
        assert image.dtype == torch.float32
        assert label.shape == (8, 12)
        assert label.dtype == torch.uint8
        assert index == 3
        assert torch.equal(image[1].to(torch.uint8), label)
        rows, columns = image[0, :, 0], image[1, 0]
        flips[bool(columns[0] > columns[1])] += 1
        assert torch.equal(rows.diff(), torch.ones(7))
        assert torch.equal(columns.diff().abs(), torch.ones(11))
        corners.add((int(rows[0]), int(columns.min())))
    assert 60 < flips[True] < 140
    tops, lefts = {top for top, _ in corners}, {left for _, left in corners}
    assert tops == set(range(1, 14))  # every offset is reached, the last one too
    assert lefts == set(range(1, 20))


@pytest.mark.parametrize("crop", [(9, 14), (9, 7), (4, 14), (6, 10)])
def test_padding(crop: tuple[int, int]) -> None:
    augmented = Augmented(Coordinates(6, 10), crop=crop, seed=1)
    places = set()
    for epoch in range(60):
        image, label, _ = augmented[epoch, 0]
        assert image.shape == (3, *crop)
        inside = label != IGNORE_INDEX
        assert int(inside.sum()) == min(crop[0], 6) * min(crop[1], 10)
        assert torch.equal(inside, image[0] > 0)
        assert not image[:, ~inside].any()
        assert torch.equal(image[1][inside].to(torch.uint8), label[inside])
        places.add(tuple(inside.nonzero()[0].tolist()))
    assert len(places) == (max(crop[0] - 6, 0) + 1) * (max(crop[1] - 10, 0) + 1)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    def sample(seed: int, epoch: int, index: int) -> torch.Tensor:
        return Augmented(Coordinates(64, 64), crop=(8, 8), seed=seed)[epoch, index][0][:2]

    reference = sample(5, 2, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]
    assert torch.equal(sample(5, 2, 1), reference)
    after = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]
    assert torch.equal(before[0], after[0])
    assert before[1]["pos"] == after[1]["pos"]
    assert np.array_equal(before[1]["key"], after[1]["key"])
    for other in ((6, 2, 1), (5, 3, 1), (5, 2, 0)):
        assert not torch.equal(sample(*other), reference)


def test_augmented_arguments() -> None:
    with pytest.raises(ValueError, match="crop_height must be a whole number of at least 1, got 0"):
        Augmented(Coordinates(4, 4), crop=(0, 4), seed=0)
    with pytest.raises(ValueError, match="crop_width must be a whole number of at least 1, got 0"):
        Augmented(Coordinates(4, 4), crop=(4, 0), seed=0)
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got -1"):
        Augmented(Coordinates(4, 4), crop=(4, 4), seed=-1)


# order


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 40),
    seed=st.integers(0, 3),
    steps=st.integers(0, 30),
    data=st.data(),
)
def test_resumed_sampler_gives_the_tail(length: int, batch: int, seed: int, steps: int, data: st.DataObject) -> None:
    batch = min(batch, length)
    start = data.draw(st.integers(0, steps))
    whole = list(EpochSampler(length, batch_size=batch, seed=seed, steps=steps))
    tail = EpochSampler(length, batch_size=batch, seed=seed, start_step=start, steps=steps)
    assert len(whole) == steps
    assert len(tail) == steps - start
    assert list(tail) == whole[start:]
    assert list(tail) == whole[start:]  # a second pass gives the same
    # a longer run begins with the same batches
    assert list(EpochSampler(length, batch_size=batch, seed=seed, steps=steps + 2))[:steps] == whole


@settings(deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_index_at_most_once_per_epoch(length: int, batch: int, seed: int) -> None:
    batch = min(batch, length)
    sampler = EpochSampler(length, batch_size=batch, seed=seed, steps=3 * (length // batch))
    seen: dict[int, list[int]] = {}
    for step, keys in enumerate(sampler):
        assert len(keys) == batch
        assert {epoch for epoch, _ in keys} == {step // sampler.batches_per_epoch}
        for epoch, index in keys:
            seen.setdefault(epoch, []).append(index)
    for indices in seen.values():
        assert len(set(indices)) == len(indices) == length - length % batch
        assert set(indices) <= set(range(length))
    if length % batch == 0 and length > 30:
        assert seen[0] != seen[1]


def test_order_is_that_of_a_stream_of_its_own() -> None:
    """Of the stream of the coins, it would depend on which samples are attacked."""
    batches = list(EpochSampler(10, batch_size=5, seed=3, steps=4))
    for epoch in (0, 1):
        order = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(0, epoch))).permutation(10)
        assert batches[2 * epoch] + batches[2 * epoch + 1] == [(epoch, index) for index in order]


def test_seeds_give_other_orders() -> None:
    orders = [list(EpochSampler(30, batch_size=30, seed=seed, steps=1)) for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 11}, "batch_size must be at most the data set's length 10, got 11"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"start_step": 6}, "steps must be a whole number of at least 6, got 5"),
        ({"rank": -1}, "rank must be a whole number of at least 0, got -1"),
        ({"rank": 2, "processes": 2}, "rank must be less than processes, got 2 and 2"),
        ({"batch_size": 6, "processes": 2, "accumulation": 2}, "divisible by processes x accumulation = 2 x 2, got 6"),
    ],
)
def test_sampler_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(10, **({"batch_size": 2, "seed": 0, "steps": 5} | arguments))


def test_a_scene_cut_short_is_named_with_the_remedy(tmp_path: Path) -> None:
    generate_streets(tmp_path, train=2, val=0, size=(64, 64))
    path = sorted(tmp_path.rglob("*_leftImg8bit.png"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileExistsError, match=rf"{path.name}.* is cut short; delete it"):
        generate_streets(tmp_path, train=2, val=0, size=(64, 64))
    path.unlink()
    generate_streets(tmp_path, train=2, val=0, size=(64, 64))
    assert path.read_bytes() == whole
