"""The demo over several seeds, and its recipe; with one seed it is tested in test_cli.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import TINY, read_csv

from segadv import cli, demo, plots
from segadv.cli import main
from segadv.comparison import PAPER_ARMS
from segadv.data import Cityscapes
from segadv.demo import run_demo
from segadv.recipes import recipe_file
from segadv.training import Trainer

pytest.importorskip("PIL.Image")

TWO = ("basic", "fast-newton")


@pytest.fixture
def two_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to train: only the arms that the pictures need."""
    monkeypatch.setattr(demo, "PAPER_ARMS", TWO)


def counting(trained: list[tuple[str, int]]) -> Callable[..., Any]:
    """Trainer.step_in_place, which notes the arm and the seed."""
    genuine = Trainer.step_in_place

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        trained.append((self.config.arm, self.config.seed))
        return genuine(self, *args, **kwargs)

    return step


def test_the_recipe_streets_small_trains_what_the_demo_trains() -> None:
    recipe = yaml.safe_load(recipe_file("streets_small").read_text())
    theirs = dataclasses.asdict(demo._config("basic", demo.FULL, seed=0))
    assert recipe.pop("dataset") == "cityscapes"
    assert recipe.pop("model") == {"name": demo._NETWORK.name}
    assert tuple(map(int, recipe.pop("crop").split("x"))) == theirs["crop"]
    assert recipe == {name: theirs[name] for name in recipe}
    assert {"steps", "batch_size", "learning_rate", "channels_last", "checkpoint_every"} == recipe.keys()


def test_what_is_left_by_a_killed_write_or_a_wrong_seed_does_not_end_the_demo(tmp_path: Path) -> None:
    for seed in (-1, 2**64 - 1):
        with pytest.raises(ValueError, match="seed must be"):
            run_demo(tmp_path, sizes=TINY, seed=seed, seeds=2)
        assert not list(tmp_path.iterdir())
    (tmp_path / ".results.123.456.segadv.json").write_text("{")
    demo._Record(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.usefixtures("two_arms")
def test_seeds_extend_a_finished_demo_and_come_back_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = run_demo(tmp_path, sizes=TINY, seed=5, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "seeds" not in single

    trained: list[tuple[str, int]] = []
    drawn: list[Sequence[Any]] = []
    draw = plots.plot_robustness
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", counting(trained))
        patched.setattr(plots, "plot_robustness", lambda rows, path: (drawn.append(rows), draw(rows, path)))
        several = run_demo(tmp_path, sizes=TINY, seed=5, seeds=2, progress=False)
    # what was there was neither trained nor timed again; the others on the same scenes
    assert sorted(trained) == sorted((arm, 6) for arm in TWO for _ in range(TINY.steps))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(["data", *TWO, "seed-6"])
    assert (tmp_path / "overhead.csv").read_bytes() == before["overhead.csv"]
    assert (tmp_path / "qualitative.png").read_bytes() == before["qualitative.png"]
    assert (tmp_path / "robustness.png").read_bytes() != before["robustness.png"]

    assert several["seeds"] == [5, 6]
    assert several["finished"] is True
    assert several["arguments"] == single["arguments"]
    assert {"train basic", "train basic, seed 6", "evaluate basic, seed 6"} <= several["seconds"].keys()
    assert drawn == [several["curves"]]
    by_seed = {
        seed: [{k: v for k, v in row.items() if k != "seed"} for row in several["curves"] if row["seed"] == seed]
        for seed in (5, 6)
    }
    assert by_seed[5] == single["curves"]
    assert [(row["arm"], row["attack"], row["eps"]) for row in by_seed[6]] == [
        (row["arm"], row["attack"], row["eps"]) for row in single["curves"]
    ]
    evaluated = json.loads((tmp_path / "seed-6" / "fast-newton" / "evaluation.json").read_text())["rows"]
    assert [row["miou"] for row in evaluated] == [row["miou"] for row in by_seed[6] if row["arm"] == "fast-newton"]
    clean = [row["miou"] for row in several["curves"] if (row["arm"], row["eps"]) == ("basic", 0)]
    assert len(set(clean[::2])) == 2, "two seeds are the same"
    written = read_csv(tmp_path / "curves.csv")
    assert list(written[0]) == ["arm", "attack", "eps", "miou", "pixel_accuracy", "seed"]
    assert [{k: str(v) for k, v in row.items()} for row in several["curves"]] == written

    run_demo(tmp_path, sizes=TINY, seed=5, progress=False)
    for name in ("curves.csv", "overhead.csv", "robustness.png"):
        assert (tmp_path / name).read_bytes() == before[name]
    assert "seeds" not in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.usefixtures("two_arms")
def test_interrupted_in_a_further_seed_continues_to_the_same_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_demo(tmp_path / "whole", sizes=TINY, seeds=2, progress=False)
    trained: list[tuple[str, int]] = []
    step = counting(trained)

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if trained.count(("fast-newton", 1)) == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "parts", sizes=TINY, seeds=2, progress=False)
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["finished"] is False
    assert not (tmp_path / "parts" / "curves.csv").exists()
    trained.clear()
    monkeypatch.setattr(Trainer, "step_in_place", counting(trained))
    run_demo(tmp_path / "parts", sizes=TINY, seeds=2, progress=False)
    of_training = [(arm, seed) for arm, seed in trained if seed == 1]
    assert [of_training.count((arm, 1)) for arm in TWO] == [0, TINY.steps - 1]
    assert (tmp_path / "parts" / "curves.csv").read_bytes() == (tmp_path / "whole" / "curves.csv").read_bytes()


def test_the_machine_is_the_one_that_timed_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines, commits = iter(({"threads": 1}, {"threads": 2}, {"threads": 3})), iter("abc")
    monkeypatch.setattr(demo, "_machine", lambda: next(machines))
    monkeypatch.setattr(demo, "git_commit", lambda: next(commits))
    assert demo._Record(tmp_path / "out", {}).content["machine"] == {"threads": 1}
    assert demo._Record(tmp_path / "out", {}).content["machine"] == {"threads": 2}  # stopped before it timed them
    (tmp_path / "out" / "overhead.csv").touch()
    record = demo._Record(tmp_path / "out", {})
    record.finish()
    assert (record.content["machine"], record.content["git_commit"]) == ({"threads": 2}, "b")


def test_wrong_number_of_seeds_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--seeds", "0", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "segadv: error: seeds must be a whole number of at least 1, got 0\n"
    assert not (tmp_path / "x").exists()


def test_the_command_line_hands_the_seeds_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "run_demo", lambda out, **options: calls.append(options))
    assert main(["demo", "--out", str(tmp_path / "x")]) == 0
    assert main(["demo", "--seed", "4", "--seeds", "3", "--out", str(tmp_path / "x")]) == 0
    assert [(call["seed"], call["seeds"]) for call in calls] == [(0, 1), (4, 3)]


MIOU = {"basic": 0.1, "fgsm": 0.28, "random-fgsm": 0.3, "bim-3": 0.4, "fast-newton": 0.35}


def curves(miou: dict[str, float], spread: float) -> list[dict[str, Any]]:
    """Three seeds, `spread` around the mean."""
    return [
        {"arm": arm, "attack": attack, "eps": eps, "miou": miou[arm] + difference, "seed": seed}
        for seed, difference in enumerate((spread, 0.0, -spread))
        for arm in PAPER_ARMS
        for attack in ("fgsm", "bim-10")
        for eps in (0.0, 0.01, 0.03)
    ]


@pytest.mark.parametrize(
    ("spread", "ranges", "overlapping"),
    [
        (0.0, "0.350-0.350", "none of them"),
        (0.026, "0.324-0.376", "random-fgsm"),
        (0.04, "0.310-0.390", "random-fgsm, fgsm"),
        (0.13, "0.220-0.480", "random-fgsm, fgsm, basic"),
    ],
)
def test_the_tables_show_mean_and_range_of_the_seeds(spread: float, ranges: str, overlapping: str) -> None:
    overhead = [{"arm": arm, "step_ms_p50": 100.0, "overhead_percent": 5.0} for arm in PAPER_ARMS]
    text = demo._report(curves(MIOU, spread), overhead, {"train": 60.0}, 400)
    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("fast-newton"))
    assert lines[row].split() == ["fast-newton", *["0.350"] * 5]
    assert lines[row + 1].split() == [ranges] * 5
    assert len(lines[row]) == len(lines[row + 1])
    assert "of 3 trainings" in text
    assert f"the range of fast-newton overlaps that of {overlapping}.\n" in text
    above = demo._report(curves(MIOU | {"basic": 0.9}, 0.026), overhead, {"train": 60.0}, 400)
    assert "the range of fast-newton overlaps that of random-fgsm.\n" in above
    single = demo._report([row for row in curves(MIOU, spread) if row["seed"] == 1], overhead, {"train": 60.0}, 400)
    assert "range" not in single


def test_every_figure_has_its_place_in_the_printed_tables() -> None:
    attacks, sizes = ("fgsm", "bim-10"), (0.0, 0.01, 0.03)
    found = [
        {"arm": arm, "attack": attack, "eps": eps, "miou": 0.1 * i + (0.01 * (1 + j) + k / 1000 if k else 0.0)}
        for i, arm in enumerate(PAPER_ARMS)
        for j, attack in enumerate(attacks)
        for k, eps in enumerate(sizes)
    ]
    overhead = [{"arm": arm, "step_ms_p50": 100.0 + i, "overhead_percent": 5.5 * i} for i, arm in enumerate(PAPER_ARMS)]
    text = demo._report(found, overhead, {"train": 60.0, "data": 75.0}, 100)
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["mIoU", "clean", "fgsm", "0.01", "fgsm", "0.03", "bim-10", "0.01", "bim-10", "0.03"]
    for i, arm in enumerate(PAPER_ARMS):
        expected = [0.1 * i, *(0.1 * i + difference for difference in (0.011, 0.012, 0.021, 0.022))]
        assert lines[2 + i] == [arm, *(f"{value:.3f}" for value in expected)]
    assert lines[8][:3] == ["overhead", "step", "here"]
    assert text.splitlines()[8].split(maxsplit=3)[3].split("  ")[0] == "paper, Cityscapes"
    theirs = {
        "basic": (0, 0, 0), "fgsm": (12.52, 31.76, 100 / 3), "random-fgsm": (12.34, 34.71, 100 / 3),
        "bim-3": (45.92, 98.24, 100), "fast-newton": (11.98, 31.18, 100 / 3),
    }  # fmt: skip
    for i, arm in enumerate(PAPER_ARMS):
        percents = [5.5 * i, *theirs[arm]]
        told = [word for percent in percents for word in (f"{percent:.2f}", "%")]
        assert lines[9 + i] == [arm, f"{100 + i:.1f}", "ms", *told]
    assert "Time: 2.2 minutes." in text
    assert "train nothing" not in text
    short = demo._report(found, overhead, {"train": 60.0, "data": 75.0}, 99)
    assert "99 steps train nothing" in short
    assert short.endswith("Time: 2.2 minutes.")


def test_an_interrupted_stage_is_made_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 13.0, 20.0, 24.5, 30.0, 30.25])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(times))
    record = demo._Record(tmp_path, {})
    with pytest.raises(KeyboardInterrupt), record.stage("train basic"):
        raise KeyboardInterrupt
    for name in ("train basic", "data"):
        with demo._Record(tmp_path, {}).stage(name):  # of a further call
            pass
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == {"train basic": 7.5, "data": 0.25}


@pytest.mark.usefixtures("two_arms")
def test_the_networks_are_attacked_on_the_validation_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    shown: list[tuple[Any, ...]] = []
    genuine = demo.evaluate

    def evaluate(model: Any, loader: Any, attacks: Any, eps: Any, **options: Any) -> Any:
        calls.append((len(loader.dataset), loader.batch_size, attacks, eps, options["worst_case"]))
        return genuine(model, loader, attacks, eps, **options)

    def examples(models: Any, samples: Any) -> Any:
        shown.append((list(models), samples))
        return examples_of(models, samples)

    examples_of = demo.examples
    monkeypatch.setattr(demo, "evaluate", evaluate)
    monkeypatch.setattr(demo, "examples", examples)
    sizes = dataclasses.replace(TINY, val_images=11, train_images=5)
    results = run_demo(tmp_path, sizes=sizes, progress=False)
    expected = (11, 8, ["fgsm", "bim-10"], [0.0, 0.01, 0.02, 0.03, 0.04], False)
    assert [(n, size, list(attacks), list(eps), worst) for n, size, attacks, eps, worst in calls] == [expected] * 2
    scenes = Cityscapes(tmp_path / "data", "val")
    ((names, samples),) = shown
    assert names == ["basic", "fast-newton"]
    assert len(samples) == 2
    for (image, labels), index in zip(samples, (0, 5), strict=True):
        assert torch.equal(image, scenes[index][0])
        assert torch.equal(labels, scenes[index][1])
    assert {name: list(values) for name, values in results["evaluation"].items()} == {
        "attacks": expected[2],
        "eps": expected[3],
    }


def test_a_picture_is_drawn_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def half(self: Figure, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    (tmp_path / "x.png").write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space left"):
        plots.plot_robustness([{"attack": "fgsm", "eps": 0.0, "miou": 0.5}], tmp_path / "x.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is drawn instead of being written."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def test_the_picture_shows_mean_and_range(tmp_path: Path, figures: list[Any]) -> None:
    plots.plot_robustness(curves(MIOU, 0.02), tmp_path / "x.png")
    plots.plot_robustness([row for row in curves(MIOU, 0.02) if row["seed"] == 1], tmp_path / "x.png")
    several, single = figures
    for panel in several.axes:
        bands = [collection.get_paths()[0].vertices for collection in panel.collections]
        assert len(bands) == len(panel.lines) == len(PAPER_ARMS)
        for line, band, arm in zip(panel.lines, bands, PAPER_ARMS, strict=True):
            assert line.get_xdata().tolist() == [0.0, 0.01, 0.03]
            assert line.get_ydata() == pytest.approx([MIOU[arm]] * 3)
            assert (band[:, 0].min(), band[:, 0].max()) == (0.0, 0.03)
            assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((MIOU[arm] - 0.02, MIOU[arm] + 0.02))
    assert all(not panel.collections for panel in single.axes)


def test_ticks_of_the_picture_do_not_overlap(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"attack": "fgsm", "eps": eps, "miou": 0.5} for eps in (0.0, 0.01, 0.03, 8 / 255)]
    plots.plot_robustness([*rows, rows[0] | {"arm": "of one eps"}], tmp_path / "x.png")
    plots.plot_robustness(rows[1:2], tmp_path / "x.png")
    labels = [[text.get_text() for text in figure.axes[0].get_xticklabels()] for figure in figures]
    assert labels == [["0", "0.01", "0.03"], ["0.01"]]


def test_every_curve_is_the_mean_of_its_own_rows(tmp_path: Path, figures: list[Any]) -> None:
    """In whatever order they come, and where an arm was not put under an attack."""
    rows = [
        {"arm": arm, "attack": attack, "eps": eps, "miou": miou - eps}
        for arm, attack in (("a", "x"), ("a", "y"), ("b", "y"), ("a", "z"), ("a", "w"))
        for eps, values in ((0.03, (0.1, 0.2, 0.6)), (0.0, (0.7,)))
        for miou in values
    ]
    plots.plot_robustness(rows, tmp_path / "x.png")
    (figure,) = figures
    assert [panel.get_title() for panel in figure.axes] == [f"attack: {name}" for name in "xyzw"]
    assert [len(panel.lines) for panel in figure.axes] == [1, 2, 1, 1]
    for panel in figure.axes:
        assert (panel.get_ylim()[0], panel.get_ylim()[1] > 0.75) == (0, True)
        for line in panel.lines:
            assert line.get_xdata().tolist() == [0.0, 0.03]
            assert line.get_ydata() == pytest.approx([0.7, 0.27])


def test_steps_are_those_of_one_eps_in_their_order(tmp_path: Path, figures: list[Any]) -> None:
    rows = [
        {"arm": arm, "attack": attack, "eps": eps, "steps": steps, "miou": 1 / steps + eps}
        for arm, attack, counts in (("a", "pgd", (100, 2, 1, 10)), ("b", "pgd", (10,)), ("a", "fgsm", (1,)))
        for eps in (0.01, 0.03)
        for steps in counts
    ]
    plots.plot_steps(rows, tmp_path / "x.png", eps=0.03)
    ((panel,),) = (figure.axes for figure in figures)
    assert panel.get_title() == "attack: PGD, eps 0.03"
    assert (panel.get_xscale(), panel.get_ylim()[0]) == ("log", 0)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["100", "10", "2", "1"]
    drawn = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in panel.lines]
    assert drawn == [[(steps, 1 / steps + 0.03) for steps in counts] for counts in ((1, 2, 10, 100), (10,))]
    with pytest.raises(ValueError, match=r"no attack was judged after several numbers of steps at 0\.02"):
        plots.plot_steps(rows, tmp_path / "x.png", eps=0.02)


def test_cells_of_the_classes(tmp_path: Path, figures: list[Any]) -> None:
    """Columns that are empty everywhere are left out, and colours stand for the same in all tables."""
    tables = {
        "clean": {"a": [0.9, None, None], "b": [0.2, None, 0.61]},
        "attacked": {"a": [0.1, None, 0.0], "b": [0.3, None, 0.3]},
    }
    plots.plot_per_class(tables, tmp_path / "x.png", class_names=["road", "sky", "car"])
    panels = figures[0].axes
    assert [text.get_text() for text in panels[-1].get_xticklabels()] == ["road", "car"]
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        assert (panel.get_title(), panel.images[0].get_clim()) == (title, (0, 1))
        assert [text.get_text() for text in panel.get_yticklabels()] == list(table)
        told = {(*text.get_position(), text.get_text(), text.get_color()) for text in panel.texts}
        assert told == {
            (x, y, f"{row[i]:.2f}", "k" if row[i] > 0.6 else "w")
            for y, row in enumerate(table.values())
            for x, i in enumerate((0, 2))
            if row[i] is not None
        }


def test_bars_and_whiskers_of_the_overhead(tmp_path: Path, figures: list[Any]) -> None:
    """A spread as large as a disturbed machine's does not make the rest small."""
    times = {"basic": (90, 100, 110), "fgsm": (130.004, 130.004, 150), "bim-3": (170, 200, 2000)}
    rows = [
        {"arm": arm, "step_ms_p20": low, "step_ms_p50": mid, "step_ms_p80": high, "overhead_percent": round(mid - 100)}
        for arm, (low, mid, high) in times.items()
    ]
    references = {"one": {"fgsm": 12.0}, "two": {"fgsm": 33.0, "bim-3": 110.0}, "three": {"bim-3": 5.0}}
    plots.plot_overhead(rows, tmp_path / "x.png", references=references)
    ((panel,),) = (figure.axes for figure in figures)
    assert [bar.get_height() for bar in panel.patches] == [30, 100]
    whiskers = [entry.lines[2][0].get_segments()[0][:, 1] for entry in panel.containers if hasattr(entry, "has_yerr")]
    assert [ends.tolist() for ends in whiskers] == [pytest.approx([30, 50]), pytest.approx([70, 1900])]
    assert panel.get_ylim()[1] == pytest.approx(1.08 * 1.4 * 110)
    assert [text.xy[1] for text in panel.texts] == pytest.approx([50, 1.4 * 110])
    markers = [entry for entry in panel.collections if entry.get_label() in references]
    assert [[value for _, value in entry.get_offsets()] for entry in markers] == [[12], [33, 110], [5]]
    places = [x for entry in markers for x, _ in entry.get_offsets()]
    assert len(set(places)) == len(places)
    assert [entry.get_facecolor().tolist() == entry.get_edgecolor().tolist() for entry in markers] == [
        False,
        False,
        True,
    ]


def test_pictures_of_an_attack_stand_under_their_titles(tmp_path: Path, figures: list[Any]) -> None:
    names = ("label", "prediction", "adversarial_prediction")
    maps = {name: torch.full((2, 3), i, dtype=torch.uint8) for i, name in enumerate(names)}
    maps["prediction"][0, 0] = 255
    image, adversarial = torch.full((3, 2, 3), 0.5), torch.full((3, 2, 3), 0.52)
    image[0, 0, 0], adversarial[0, 0, 0], adversarial[1, 0, 0] = -0.1, 1.1, 0.47
    colors = ((9, 0, 0), (0, 9, 0), (0, 0, 9), (1, 1, 1))
    example = {"arm": "basic", "image": image, "adversarial": adversarial, **maps}
    for given in (example, example | {"prediction": maps["label"]}):
        plots.plot_qualitative([given], tmp_path / "x.png", attack="fgsm", eps=0.02, class_names="abcd", colors=colors)
    panels = {panel.get_title(): panel.images[0].get_array() for panel in figures[0].axes}
    assert list(panels) == ["image", "label", "prediction", "FGSM, eps 0.02", "its prediction", "perturbation x10"]
    for title, color in (("label", colors[0]), ("prediction", colors[1]), ("its prediction", colors[2])):
        assert panels[title][1, 1].tolist() == list(color)
    assert panels["prediction"][0, 0].tolist() == [255, 255, 255]
    assert panels["image"][0, 0].tolist() == [0, 0.5, 0.5]
    assert panels["FGSM, eps 0.02"][0, 0].tolist() == pytest.approx([1, 0.47, 0.52])
    assert panels["perturbation x10"][0, 0].tolist() == pytest.approx([1, 0.2, 0.7])
    legends = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    assert legends == [["a", "b", "c", "not labelled"], ["a", "c"]]


ODD = [
    "_Net", "cost $5, or $6", r"x$\foo$y", "fast-newton (seed-1/fast-newton)", "a folder's long name " * 4, "W" * 60,
    "RESNET50_WITH_DILATED_CONVOLUTIONS_WITHOUT_PRETRAINED_WEIGHTS", "f",
]  # fmt: skip


def _texts(figure: Any) -> list[str]:
    """All that is written there; none of it reaches beyond the picture, nor do labels of an axis lie on one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    for text in shown:
        box = text.get_window_extent(canvas.get_renderer())
        assert min(box.x0, box.y0) >= 0, text
        assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 0, text
    for panel in figure.axes:
        boxes = [label.get_window_extent() for label in panel.get_xticklabels() if not label.get_rotation()]
        assert all(one.x1 < other.x0 for one, other in pairwise(sorted(boxes, key=lambda box: box.x0)))
    return [text.get_text() for text in shown]


@pytest.mark.parametrize("attacks", [1, 2, 4])
@pytest.mark.parametrize("arms", [1, 2, 8])
def test_names_of_any_kind_are_told_whole_in_pictures(
    arms: int, attacks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last numbers of steps near one another, and few classes or many."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(_texts(figure)))
    names = ODD[:arms]
    rows = [
        {"arm": arm, "attack": attack, "eps": eps, "steps": steps, "miou": 0.5}
        for arm in names
        for attack in ("worst-case", "a$b", "_c", "pgd")[:attacks]
        for eps in (0.0, 0.03)
        for steps in (3, 5, 10, 20, 40, 100, 101)
    ]
    plots.plot_robustness(rows, tmp_path / "x.png")
    plots.plot_steps(rows, tmp_path / "x.png", eps=0.03)
    title = f"IoU under attack: {plots.attack_title('worst-case-miou')}, eps 0.0313725"
    for classes in (1, 2, 19):
        tables = {title: {arm: [0.5] * classes for arm in names}}
        long = "construction--flat--crosswalk-plain"
        for class_names in (["b_$c$"] * classes, [long, *["a"] * (classes - 1)], [*["a"] * (classes - 1), long]):
            plots.plot_per_class(tables, tmp_path / "x.png", class_names=class_names)
            assert title in figures[-1]
            assert all(figures[-1].count(name) == class_names.count(name) for name in class_names)
    label = torch.zeros(32, 64, dtype=torch.uint8)
    label[0, 1], label[0, 2] = 1, 2
    shown = {"label": label, "prediction": label, "adversarial_prediction": label}
    shown |= {"image": torch.rand(3, 32, 64), "adversarial": torch.rand(3, 32, 64)}
    alike = {"class_names": ["A", "not labelled", "A"], "colors": [(9, 9, 9), (99, 9, 9), (9, 99, 9)]}
    examples = [{"arm": arm, **shown} for arm in names]
    plots.plot_qualitative(examples, tmp_path / "x.png", attack="a$b", eps=8 / 255, **alike)
    assert (figures[-1].count("A"), figures[-1].count("not labelled")) == (2, 1)
    assert "101" in figures[1]
    for written in figures:
        without_space = ["".join(text.split()) for text in written]
        assert all(without_space.count("".join(name.split())) == 1 for name in names)
