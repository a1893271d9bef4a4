"""Recipes, --config and dotted options, training and evaluation on both data sets, `segadv reproduce`."""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import drawn, failure, run
from PIL import Image

from segadv import cli, comparison, models, plots, progress, recipes, reproduce, results, writing
from segadv.data import DATASETS, open_dataset
from segadv.evaluation import ATTACKS, WORST_CASES, EvaluationResult
from segadv.models import ModelConfig, small_pspnet
from segadv.options import arranged, configs, parser
from segadv.reproduce import Evaluation, claims
from segadv.training import TrainConfig, Trainer, Validation, load_model, read_config

ROOT = Path(__file__).parents[1]
FOLDER = importlib.resources.files("segadv") / "configs"
OF_THE_PAPER = ("cityscapes_pspnet50", "voc_pspnet50")
SMALL = "--config quick --device cpu --monitor-every 0 --validation.every 0"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _errors_are_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGADV_DEBUG", raising=False)


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    assert run(f"data generate-streets {folder} --train 5 --val 2 --size 64x80") == 0
    return folder


def make_voc(root: Path) -> Path:
    """A tree in the layout of VOC2012 with SegmentationClassAug: 4 + 2 training and 4 validation images."""
    voc = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    palette = np.zeros((256, 3), np.uint8)
    palette[:21] = DATASETS["voc"].colors  # type: ignore[attr-defined]
    palette[255] = (224, 224, 192)
    generator = np.random.default_rng(0)
    for split, year, count in (("train", 2007, 4), ("val", 2008, 4), ("", 2009, 2)):
        names = [f"{year}_{number:06d}" for number in range(count)]
        if split:
            (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name, size in zip(names, [(60, 80), (80, 60), (60, 80), (50, 80)], strict=False):
            mask = np.zeros(size, np.uint8)
            mask[10:32, 12:42] = 255
            mask[12:30, 14:40] = generator.integers(1, 21)
            Image.fromarray(palette[mask] // 2 + 60).save(voc / "JPEGImages" / f"{name}.jpg")
            picture = Image.fromarray(mask).convert("P")
            picture.putdata(mask.flatten().tolist())
            picture.putpalette(palette.flatten().tolist())
            picture.save(voc / ("SegmentationClass" if split else "SegmentationClassAug") / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


# --- the recipes --------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> tuple[TrainConfig, ModelConfig, Any]:
    """What `segadv train` makes of a command line."""
    arguments = ("train", *arguments, "--data", "x", "--out", "y")
    found = parser().parse_args(arranged(arguments)).train
    return *configs(found), found


@pytest.mark.parametrize(
    "options",
    [
        ["--validation.eps", "0,0.03,8/255", "--validation.attacks", "fgsm,pgd"],
        ["--validation.eps=0,0.03,8/255", "--validation.attacks=fgsm,pgd"],
        ["--validation.eps", f"[0,0.03,{8 / 255}]", "--validation.attacks", "[fgsm,pgd]"],
    ],
)
def test_lists_are_written_as_for_evaluate(options: list[str]) -> None:
    config, _, _ = parsed(*options)
    assert config.validation.eps == (0, 0.03, 8 / 255)
    assert config.validation.attacks == ("fgsm", "pgd")


def test_groups_of_options_come_from_files(tmp_path: Path, streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run's own config.yaml, which names none of these files, repeats it."""
    monkeypatch.chdir(tmp_path)
    Path("v.yaml").write_text("every: 0\n")
    Path("m.yaml").write_text("name: small_pspnet\n")
    Path("a.yaml").write_text("blur: 0.5\n")
    files = "--validation v.yaml --model m.yaml --augmentation a.yaml"
    assert run(f"train --config quick --device cpu --monitor-every 0 --data {streets} --out first {files}") == 0
    assert run("train --config first/config.yaml --out again") == 0
    assert yaml.safe_load(Path("first/config.yaml").read_text())["augmentation"]["blur"] == 0.5
    for name in ("config.yaml", "model.safetensors"):
        assert (Path("first") / name).read_bytes() == (Path("again") / name).read_bytes()


def test_a_reproduction_takes_its_evaluation_from_a_file(
    tmp_path: Path, streets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e.yaml").write_text("images: 1\n")
    command = f"reproduce cityscapes --quick --device cpu --monitor-every 0 --data {streets} --arms basic --evaluation"
    assert cli.main([*command.split(), "e.yaml", "--out", "first one"]) == 0
    assert yaml.safe_load(Path("first one/config.yaml").read_text())["evaluation"]["images"] == 1
    told = "\nsegadv reproduce cityscapes --config 'first one/config.yaml' --out 'first one'\n"
    assert told in Path("first one/report.md").read_text()
    Path("e.yaml").write_text("nope: 1\n")
    message = failure(f"{command} e.yaml --out b", capsys)
    assert re.search("holds a key that is no option|does not accept nested key .*nope", message)


def test_wheel_holds_the_recipes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    build = subprocess.run(
        command, env={**os.environ, "SEGADV_NATIVE": "OFF"}, capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"segadv/configs/{name}.yaml" for name in recipes.recipes()} <= set(names)


@pytest.mark.parametrize("name", recipes.recipes())
def test_every_key_is_documented(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    keys = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    bare = [line for line in keys if not re.match(r" *\w+:( .+)?  +# .+", line)]
    assert [line for line in bare if not re.fullmatch(r"\w+:", line)] == []
    assert text.startswith("# ")
    parsed("--config", name)
    assert "segadv train" in text.split("\n\n")[0]


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_recipes_of_the_paper_name_every_option(name: str) -> None:
    """So that an option that is added later is decided on, and documented, here too."""
    keys = recipes.flat(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
    config, model, _ = parsed("--config", name)
    options = recipes.flat({"dataset": "", "model": dataclasses.asdict(model), **dataclasses.asdict(config)})
    assert options.keys() - keys.keys() == {"arm", "allow_other_split"}


@pytest.mark.parametrize(
    ("name", "dataset", "crop"), [(OF_THE_PAPER[0], "cityscapes", 712), (OF_THE_PAPER[1], "trainaug", 472)]
)
def test_recipes_of_the_paper_say_what_it_says(name: str, dataset: str, crop: int) -> None:
    config, model, arguments = parsed("--config", name, "--arm", "bim-3")
    assert arguments.dataset == dataset
    assert (model.name, model.pretrained, model.backbone) == ("pspnet50", False, "")
    said = {
        "arm": "bim-3", "eps": 0.03, "adversarial_share": 0.5, "batch_size": 16, "accumulation": 1,
        "crop": (crop, crop), "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "power": 0.9,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in said} == said
    augmentation = config.augmentation
    assert (augmentation.flip, augmentation.scale, augmentation.rotation) == (True, (0.5, 2.0), 10)
    assert 0 < augmentation.blur <= 1
    assert (
        config.steps == {"cityscapes": 90_000, "trainaug": 30_000}[dataset]
    )  # of PSPNet's authors, at this batch size
    assert config.validation.attacks == ("fgsm", "bim-10")
    assert config.validation.eps == (0, 0.01, 0.02, 0.03, 0.04)
    # VOC's images differ in size, and validation takes batches of one size
    assert config.validation.batch_size == 1 or dataset == "cityscapes"


def test_a_recipe_is_found_by_name_and_a_file_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.recipe_file("quick").parent == Path(str(FOLDER))
    Path("mine.yaml").write_text("steps: 3")
    assert recipes.recipe_file("mine.yaml") == Path("mine.yaml")
    with pytest.raises(ValueError, match=r"voc_pspnet50\); 'voc_pspnet' is neither, did you mean 'voc_pspnet50'"):
        recipes.recipe_file("voc_pspnet")


# --- options ------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_file_whatever_the_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\nlearning_rate: 1.0e-3\naugmentation:\n  rotation: 3\n  scale: [0.5, 2]\n")
    for order in (1, -1):
        config, _, _ = parsed(*[f"--config={file}", "--steps=9", "--augmentation.rotation=5"][::order])
        assert (config.steps, config.learning_rate) == (9, 1e-3)
        assert config.augmentation == dataclasses.replace(TrainConfig.augmentation, rotation=5.0, scale=(0.5, 2.0))


def test_later_files_override_earlier_ones(tmp_path: Path) -> None:
    for name, steps in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"steps: {steps}\nworkers: {steps}\n")
    (tmp_path / "b.yaml").write_text("steps: 2\n")
    config, _, _ = parsed("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (config.steps, config.workers) == (2, 1)


def test_names_may_be_written_with_dashes_and_values_keep_theirs() -> None:
    config, model, _ = parsed(
        "--batch-size=6", "--validation.batch-size", "2", "--arm", "n-fgsm", "--model.name=small_pspnet"
    )
    assert (config.batch_size, config.validation.batch_size, config.arm) == (6, 2, "n-fgsm")
    assert model == ModelConfig("small_pspnet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--augmentation.rotate 3", "--augmentation.rotate 3, did you mean '--augmentation.rotation'?"),
        ("--btach-size 3", "--btach_size 3, did you mean '--batch_size'?"),
        ("--augmentation.scale 3", 'key "augmentation.scale": Expected a list, such as [0.5, 2]. Got value: [3]'),
        ("--augmentation.scale [1,2,3]", "Expected a list, such as [0.5, 2]. Got value: [1, 2, 3]"),
        ("--precision fp64", "key \"precision\": Expected one of 'fp32', 'bf16', 'fp16'. Got value: fp64"),
        ("--steps 1.5", 'key "steps": Expected a value of type int. Got value: 1.5'),
        ("--crop 3", "must be height x width, such as 160x320, got '3'"),
        ("--dataset vok", "dataset must be one of cityscapes, voc, trainaug; got 'vok', did you mean 'voc'?"),
        ("--model.name pspnet5", "got 'pspnet5', did you mean 'pspnet50'?"),
        ("--arm fast-newtn", "got 'fast-newtn', did you mean 'fast-newton'?"),
        ("--validation.every 1 --validation.attacks [pdg]", "validation.attacks must be names out of"),
        ("--validation.every 0 --validation.eps 0,0.02", "--validation.eps has no effect without --validation.every"),
        ("--config voc_pspnet5", "is neither, did you mean 'voc_pspnet50'?"),
        ("--config wrong-key.yaml", "wrong-key.yaml: there is no option 'stepz', did you mean 'steps'?"),
        ("--config wrong-part.yaml", "'augmentation.rot', did you mean 'augmentation.rotation'?"),
        ("--config wrong-type.yaml", 'wrong-type.yaml: Parser key "steps": Expected a value of type int'),
        ("--config no-parts.yaml", "no-parts.yaml: model consists of model.name, model.pretrained, "),
        ("--config not.yaml", "not.yaml is no YAML file"),
        ("--config no-value.yaml", "no-value.yaml: learning_rate has no value"),
        ("--config twice.yaml", "twice.yaml: validation.every is given beside validation; nest it under that key"),
        ("--config repeated.yaml", "repeated.yaml is no YAML file: validation stands there twice"),
        ("--config empty.yaml", "empty.yaml must hold keys and values such as 'steps: 300', it holds None"),
        ("--config list.yaml", "list.yaml must hold keys and values such as 'steps: 300', it holds [3]"),
        ("--config number.yaml", "number.yaml: there is no option '3'"),
        ("--config latin.yaml", "latin.yaml is no YAML file"),
        ("--config .", "config must be a YAML file or a recipe"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_is_right(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "wrong-key": "stepz: 7", "wrong-part": "augmentation:\n  rot: 3", "wrong-type": "steps: many",
        "no-parts": "model: pspnet50", "not": "a: [", "empty": "# nothing", "no-value": "steps: 3\nlearning_rate:",
        "repeated": "validation: {every: 2}\nvalidation: {batch_size: 1}",
        "twice": "validation.every: 5\nvalidation:\n  images: 2", "list": "[3]", "number": "3: 4", "latin": "arm: \xe9",
    }  # fmt: skip
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text, encoding="latin-1")
    assert message in failure(f"train --data . --out out {options}", capsys)
    assert not Path("out").exists()


# --- training -----------------------------------------------------------------------------------------------


def test_config_of_a_run_gives_the_same_run(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = "--arm random-fgsm --steps 2 --augmentation.rotation 7 --validation.every 2 --validation.eps [0,0.02]"
    assert run(f"train --config voc_pspnet50 {SMALL} --data {voc} --out {first} {options}") == 0
    assert run(f"train --config {first}/config.yaml --out {second}") == 0
    assert (first / "config.yaml").read_bytes() == (second / "config.yaml").read_bytes()
    weights = [torch.load(run / "last.pt", weights_only=True)["model"] for run in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    effective = yaml.safe_load((first / "config.yaml").read_text())
    options = {**dataclasses.asdict(TrainConfig()), "model": dataclasses.asdict(ModelConfig())}
    assert recipes.flat(effective).keys() == recipes.flat(options).keys() | {"dataset", "data"}
    assert (effective["arm"], effective["crop"], effective["data"]) == ("random-fgsm", "64x64", str(voc))
    assert effective["augmentation"] == {"flip": True, "scale": [0.5, 2.0], "rotation": 7.0, "blur": 1.0}
    config = read_config(first / "last.pt")
    assert config["description"] == {
        "dataset": "trainaug",
        "model": {"name": "small_pspnet"},
        "num_classes": 21,
    }
    assert config["dataset_length"] == 6
    assert drawn(first / "training.png")
    assert drawn(first / "robustness.png")
    assert not capsys.readouterr().err.count("Traceback")


def test_out_of_another_run_is_left_as_it_is(streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"train {SMALL} --data {streets} --out {tmp_path}/run --steps 2"
    assert run(f"{command} --arm basic") == 0
    before = content(tmp_path)
    for option, told in (
        ("--arm fgsm", "differs in arm ('basic' there, 'fgsm' here)"),
        ("--arm basic --augmentation.blur 1", "augmentation.blur"),
        ("--arm basic --seed 1", "seed"),
    ):
        message = failure(f"{command} {option}", capsys)
        assert "run/last.pt belongs to another run" in message
        assert told in message
    assert content(tmp_path) == before
    assert run(f"{command} --arm basic --log-every 9 --workers 0") == 0, "what changes no number may change"


def test_a_config_that_is_no_runs_is_left_as_it_is(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the one that the options come from; one that a run killed at its start left is no obstacle."""
    command = f"train {SMALL} --data {streets} --steps 2 --arm basic --out {tmp_path}"
    for written in (b"# mine\nsteps: 2\n", b"\xff"):
        (tmp_path / "config.yaml").write_bytes(written)
        assert f"{tmp_path}/config.yaml belongs to no run, and this one would overwrite it" in failure(command, capsys)
        found = content(tmp_path)
        assert found.pop("config.yaml") == written
        assert found.keys() == {".lock"}
    (tmp_path / "config.yaml").unlink()

    def killed(self: Trainer, *args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", killed)
        assert run(command) == 130
    assert (tmp_path / "config.yaml").exists()
    assert not (tmp_path / "run.json").exists()
    assert run(command) == 0
    (tmp_path / "last.pt").unlink()
    assert run(f"{command} --seed 1") == 0, "of a run that was killed before its first checkpoint"
    (tmp_path / "run.json").unlink()
    for written in (b"# nobody's", b"steps: 2", b"model: {}", b"a: [", b"\xff"):
        (tmp_path / "config.yaml").write_bytes(written)
        assert run(f"{command} --seed 1") == 0, "of a run's folder, as the checkpoint says"


def test_interrupted_training_continues_to_the_same_weights(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"train {SMALL} --data {streets} --arm fast-newton --out {tmp_path}"
    assert run(f"{command}/whole") == 0
    genuine = Trainer.step_in_place

    def step(self: Trainer, *args: Any) -> Any:
        if self.steps_done == 3:
            raise KeyboardInterrupt
        return genuine(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", step)
        assert run(f"{command}/parts") == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert run(f"{command}/parts") == 0
    whole, parts = (load_model(tmp_path / name / "last.pt", small_pspnet()).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_voc(tmp_path / "voc")
    mask = data / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000002.png"
    mask.unlink()
    assert str(mask) in failure(f"train --config voc_pspnet50 {SMALL} --data {data} --out {tmp_path}/x", capsys)
    assert not (tmp_path / "x").exists()


def test_pspnet50_takes_a_step(voc: Path, tmp_path: Path) -> None:
    options = "--steps 1 --batch-size 2 --crop 32x32 --workers 0 --monitor-every 0 --validation.every 0 --device cpu"
    assert run(f"train --config voc_pspnet50 --arm fast-newton --data {voc} --out {tmp_path}/run {options}") == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["loss"] < 100
    model, config = comparison.load_trained(tmp_path / "run" / "last.pt")
    assert config["precision"] == "bf16"
    assert config["channels_last"]
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 40, 48)).shape == (1, 21, 5, 6)


def test_two_processes(streets: Path, tmp_path: Path) -> None:
    """The second process neither prints nor writes what the first one does."""
    processes = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "segadv"]
    for command in (
        f"train {SMALL} --steps 2 --data {streets} --out {tmp_path}/train --arm fgsm",
        reproduction("cityscapes", streets, tmp_path / "both", "--arms basic --steps 1 --overhead-steps 1"),
    ):
        found = subprocess.run(
            [*processes, *command.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        last = "last.pt: fgsm, 2 steps" if command.startswith("train") else "(2 processes); medians"
        assert found.stdout.count(last) == 1
    assert read_config(tmp_path / "train" / "last.pt")["processes"] == 2
    assert (tmp_path / "train" / "config.yaml").exists()
    assert drawn(tmp_path / "train" / "training.png")
    assert json.loads((tmp_path / "both" / "results.json").read_text())["overhead"]["processes"] == 2


# --- progress -----------------------------------------------------------------------------------------------


def test_progress_is_told_in_lines_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress.progress_bar("fgsm", total=3, initial=1, unit="step") as bar:
        for loss in (2, 1):
            bar.set_postfix_str(f"loss {loss}", refresh=False)
            bar.update()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "fgsm: step 1/3",
        "fgsm: step 2/3",
        "fgsm: step 3/3",
        "fgsm: step 3/3",
    ]
    assert lines[1].endswith("left, loss 2")
    assert "\r" not in stream.getvalue()
    with progress.progress_bar("fgsm", total=3, unit="step", show=False) as bar:
        bar.update()
    assert stream.getvalue().splitlines() == lines


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with progress.progress_bar("fgsm", total=2, unit="step") as bar:
        bar.update(2)
    assert "\r" in stream.getvalue()
    assert "100%" in stream.getvalue()


def test_lines_come_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress.progress_bar("fgsm", total=3, unit="step") as bar:
        for _ in range(3):
            time.sleep(0.15)  # longer than between two drawings of a bar
            bar.update()
    assert stream.getvalue().count("\n") == 2  # at the start and in the end


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(voc: Path, streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for dataset, data in (("voc", voc), ("cityscapes", streets)):
        assert (
            run(f"train {SMALL} --steps 1 --arm basic --dataset {dataset} --data {data} --out {folder}/{dataset}") == 0
        )
    return folder


def test_evaluate_takes_data_set_classes_and_network_from_the_checkpoint(
    voc: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    genuine = plots.plot_per_class

    def seen(*args: Any, **kwargs: Any) -> None:
        names.append(kwargs["class_names"])
        genuine(*args, **kwargs)

    monkeypatch.setattr(plots, "plot_per_class", seen)
    monkeypatch.setattr("segadv.cli.git_commit", lambda: "c0ffee")
    options = "--attacks fgsm --eps 0,0.02 --check-images 0 --device cpu"
    # images of three sizes
    assert run(f"evaluate {trained}/voc/last.pt --data {voc} --out {tmp_path}/out {options}") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["run"]["basic"]["images"] == 4
    assert found["run"]["basic"]["git_commit"] == "c0ffee"
    confusion = torch.tensor(found["measurements"][0]["confusion"])
    assert confusion.shape == (21, 21)
    labels = torch.cat([label.flatten() for _, label in (open_dataset("voc", voc, "val")[i] for i in range(4))])
    assert confusion.sum(1).tolist() == torch.bincount(labels[labels != 255].long(), minlength=21).tolist()
    assert names == [DATASETS["voc"].class_names]  # type: ignore[attr-defined]
    assert drawn(tmp_path / "out" / "per_class.png")

    # one image at a time gives the same
    again = f"evaluate {trained}/voc/last.pt --data {voc} --out {tmp_path}/ones {options} --batch-size 1"
    assert run(again) == 0
    ones = json.loads((tmp_path / "ones" / "results.json").read_text())
    for one, several in zip(ones["measurements"], found["measurements"], strict=True):
        assert one["pixel_accuracy"] == pytest.approx(several["pixel_accuracy"], abs=1e-3)

    mixed = f"evaluate {trained}/voc/last.pt {trained}/cityscapes/last.pt --data {voc} --out {tmp_path}/x {options}"
    assert "lie in different folders" not in failure(mixed, capsys)
    assert "different data sets (cityscapes, voc): give --dataset" in failure(mixed, capsys)
    message = failure(f"{mixed} --dataset voc", capsys)
    assert "cityscapes/last.pt was trained on 19 classes (cityscapes), the data set has 21" in message
    assert not (tmp_path / "x").exists()


def test_checkpoint_without_description(
    trained: Path, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a program of one's own may write it."""
    state = torch.load(trained / "cityscapes" / "last.pt", weights_only=True)
    options = "--attacks fgsm --eps 0 --check-images 0 --device cpu"
    for own in ({}, {"note": "mine"}, {"model": {"name": "x"}, "num_classes": 3, "dataset": "x"}):
        state["config"]["description"] = own
        torch.save(state, tmp_path / "own.pt")
        message = failure(f"evaluate {tmp_path}/own.pt --data {streets} --out {tmp_path}/out {options}", capsys)
        assert "own.pt does not say which network it holds, as those of segadv train do (" in message
    for config in ({}, {"arm": "own"}, {"arm": 3, "description": state["config"]["description"]}, ["own"], None):
        torch.save({**state, "config": config}, tmp_path / "own.pt")
        message = failure(f"evaluate {tmp_path}/own.pt --data {streets} --out {tmp_path}/out {options}", capsys)
        assert "own.pt does not say which network it holds, as those of segadv train do (" in message


def test_a_checkpoint_is_read_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, read = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **options: (read.append(path), genuine(path, **options))[1])
    path = trained / "cityscapes" / "last.pt"
    model, config = comparison.load_trained(path)
    assert read == [path]
    assert config == genuine(path, weights_only=True)["config"]
    for name, value in genuine(path, weights_only=True)["model"].items():
        assert torch.equal(model.state_dict()[name], value)


def test_initial_weights_have_to_be_at_hand_at_the_start_only(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="pspnet50 needs timm, of the extra models")
    model = ModelConfig("pspnet50", backbone=str(tmp_path / "gone.pth"))
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        comparison.untrained(model, tmp_path / "last.pt", num_classes=3, seed=0)
    (tmp_path / "last.pt").touch()
    comparison.untrained(model, tmp_path / "last.pt", num_classes=3, seed=0)
    description = comparison.describe("voc", model, 21)
    assert description == comparison.describe("voc", ModelConfig("pspnet50", pretrained=True), 21)


@pytest.mark.parametrize(("images", "batch_size", "expected"), [
    (0, 4, [[0, 2], [1], [3]]), (0, 1, [[0], [2], [1], [3]]), (3, 2, [[0, 2], [1]]), (99, 4, [[0, 2], [1], [3]]),
])  # fmt: skip
def test_batches_of_whole_images_have_one_size(
    voc: Path, images: int, batch_size: int, expected: list[list[int]]
) -> None:
    dataset = open_dataset("voc", voc, "val")
    loader = comparison.whole_images(dataset, images=images, batch_size=batch_size)
    assert list(loader.batch_sampler) == expected  # type: ignore[arg-type]
    for indices, (pictures, labels) in zip(expected, loader, strict=True):
        assert torch.equal(pictures, torch.stack([dataset[i][0] for i in indices]))
        assert torch.equal(labels, torch.stack([dataset[i][1] for i in indices]))


def test_a_picture_whose_size_cannot_be_read_is_named(
    trained: Path, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes come from the files' heads: one that claims 60000 x 60000 pixels, too many for Pillow, and an empty one."""
    root = tmp_path / "data"
    shutil.copytree(streets, root)
    picture = sorted((root / "leftImg8bit" / "val").rglob("*.png"))[0]
    head = bytearray(picture.read_bytes())
    head[16:24] = struct.pack(">II", 60000, 60000)
    head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    train = f"train {SMALL} --data {root} --out {tmp_path}/run --validation.every 2 --validation.batch_size 2"
    for content in (bytes(head), b""):
        picture.write_bytes(content)
        for command in (f"evaluate {trained}/cityscapes/last.pt --data {root} --out {tmp_path}/out --eps 0", train):
            message = failure(command, capsys)
            assert f"{picture}: cannot be read as an image (" in message
            assert "restore it from the data set's archive" in message


def test_pictures_have_the_data_sets_colours(tmp_path: Path) -> None:
    dataset: Any = DATASETS["voc"]
    person = dataset.class_names.index("person")
    label = torch.full((40, 60), person, dtype=torch.uint8)
    label[:, 30:] = 255
    image = torch.full((3, 40, 60), 0.3)
    example = {
        "arm": "basic", "image": image, "adversarial": image, "label": label,
        "prediction": label, "adversarial_prediction": torch.zeros_like(label),
    }  # fmt: skip
    names = {"class_names": dataset.class_names, "colors": dataset.colors}
    plots.plot_qualitative([example], tmp_path / "voc.png", attack="bim-10", eps=0.03, **names)
    plots.plot_qualitative([example], tmp_path / "cityscapes.png", attack="bim-10", eps=0.03)

    def pixels(name: str, color: tuple[int, int, int]) -> int:
        found = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        return int((found == np.array(color)).all(-1).sum())

    # the halves of two of six pictures, and the legend
    assert pixels("voc.png", (192, 128, 128)) > 20_000
    assert pixels("cityscapes.png", (192, 128, 128)) == 0
    assert pixels("cityscapes.png", (0, 60, 100)) > 20_000  # bus


# --- reproduce ----------------------------------------------------------------------------------------------

FILES = {
    "config.yaml", "curves.csv", "overhead.csv", "overhead.json", "overhead.png", "qualitative.png", "report.md",
    "results.json", "robustness.png",
}  # fmt: skip


def reproduction(setting: str, data: Path, out: Path, options: str = "") -> str:
    cheap = "--quick --device cpu --monitor-every 0 --validation.every 0"
    return f"reproduce {setting} {cheap} --data {data} --out {out} {options}"


def test_reproduce_from_end_to_end(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "out"
    command = reproduction("voc", voc, out, "--steps 2 --evaluation.stronger [segpgd] --evaluation.steps 3")
    assert run(command) == 0
    assert {path.name for path in out.iterdir() if path.is_file()} == FILES
    assert all(drawn(out / name) for name in FILES if name.endswith(".png"))
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    for arm in comparison.PAPER_ARMS:
        config = read_config(out / arm / "last.pt")
        assert (config["arm"], config["steps"], config["description"]["num_classes"]) == (arm, 2, 21)
        assert json.loads((out / arm / "evaluation.json").read_text())["run"]["images"] == 2
    found = json.loads((out / "results.json").read_text())
    seen = [(row["arm"], row["attack"], row["eps"]) for row in found["curves"]]
    attacks = ("fgsm", "bim-10", "segpgd", "worst-case", "worst-case-miou")
    assert seen == [
        (arm, a, eps) for arm in comparison.PAPER_ARMS for a in attacks for eps in (0, 0.01, 0.02, 0.03, 0.04)
    ]
    assert results.read_rows(out / "curves.csv") == found["curves"]
    assert results.read_rows(out / "overhead.csv") == found["overhead"]["rows"]
    assert [row["arm"] for row in found["overhead"]["rows"]] == list(comparison.PAPER_ARMS)
    assert len(found["claims"]) == 6

    # The paper's figures of table 2, those of table 1, ours, the difference from the recipe
    for arm, percent in (
        ("fgsm", "31.76 %"),
        ("random-fgsm", "34.71 %"),
        ("fast-newton", "31.18 %"),
        ("bim-3", "98.24 %"),
    ):
        assert re.search(rf"^\| {arm} \| [\d.]+ ms \| -?[\d.]+ % \| [\d.]+ % \| {percent} ", text, flags=re.MULTILINE)
    assert "steps 2 instead of 30000" in text
    differing = {difference.partition(" ")[0].partition(".")[0] for difference in found["differs_from_recipe"]}
    assert "steps" in differing
    assert not differing & {"device", "monitor_every", "validation"}, "what changes no number"
    assert "model.name small_pspnet instead of pspnet50" in text
    assert "segpgd" in text

    # The command of the report, which is the same, trains, attacks and times nothing
    before = content(out)
    with monkeypatch.context() as patched:
        for owner, name in ((Trainer, "step_in_place"), (reproduce, "evaluate"), (reproduce, "measure_overhead")):
            patched.setattr(owner, name, None)
        repeated = re.search(r"^segadv (reproduce .*)$", text, flags=re.MULTILINE)
        assert repeated
        assert run(repeated[1]) == 0
    changed = {name for name, value in content(out).items() if before[name] != value}
    assert changed <= FILES - {"overhead.json", "curves.csv"}, "the pictures and the report are drawn anew"
    assert json.loads((out / "results.json").read_text())["curves"] == found["curves"]

    # Other attacks are computed, training stays; other options are refused
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", None)
        assert run(command.replace("--evaluation.stronger [segpgd] --evaluation.steps 3", "")) == 0
    assert "segpgd" not in (out / "report.md").read_text()
    assert {row["attack"] for row in results.read_rows(out / "curves.csv")} == {"fgsm", "bim-10"}, "no worst case"
    before = content(out)
    assert "holds a run with other options (steps 2 there and 3 here)" in failure(f"{command} --steps 3", capsys)
    assert content(out) == before


def test_reproduce_continues_where_it_was_stopped_and_in_parts(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = "--steps 2 --overhead-steps 1"
    assert run(reproduction("cityscapes", streets, whole, options)) == 0
    command = reproduction("cityscapes", streets, parts, options)
    genuine, evaluate, steps = Trainer.step_in_place, reproduce.evaluate, []

    def step(self: Trainer, *args: Any) -> Any:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(self.config.arm)
        return genuine(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step_in_place", step)
        assert run(f"{command} --arms basic,fgsm") == 130
    assert steps == ["basic", "basic", "fgsm"]
    assert "the same command continues" in capsys.readouterr().err

    def full(*args: Any, **kwargs: Any) -> Any:
        evaluate(*args, **kwargs)
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "evaluate", full)
        assert "No space left" in failure(f"{command} --arms basic,fgsm", capsys)
    records = {path: path.stat().st_mtime_ns for path in (parts / "basic" / "records").iterdir()}
    assert records
    left = parts / ".curves.123.456.segadv.csv"  # by a killed process
    left.write_text("half")
    assert run(f"{command} --arms basic,fgsm") == 0
    assert not left.exists()
    assert {path: path.stat().st_mtime_ns for path in records} == records, "records were made anew"
    text = (parts / "report.md").read_text()
    assert "Still missing: random-fgsm, bim-3, fast-newton." in text
    assert text.count("| not measured |") == 5  # all but the one about fgsm alone
    assert "unknown" not in text
    assert run(f"{command} --arms random-fgsm,bim-3,fast-newton") == 0
    assert "Still missing" not in (parts / "report.md").read_text()
    assert (parts / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()


def test_arms_that_were_evaluated_on_different_images_are_not_compared(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, options = tmp_path / "other", "--steps 1 --batch-size 2 --overhead-steps 1"
    assert run(f"data generate-streets {other} --train 5 --val 2 --size 64x80 --seed 9") == 0
    assert run(reproduction("cityscapes", streets, tmp_path / "out", f"{options} --arms basic")) == 0
    before = (tmp_path / "out" / "report.md").read_text()
    message = failure(reproduction("cityscapes", other, tmp_path / "out", f"{options} --arms fgsm"), capsys)
    assert re.search(r"evaluated on different images \(basic \w{16}, fgsm \w{16}, SHA-256\)", message)
    assert (tmp_path / "out" / "report.md").read_text() == before
    (tmp_path / "out" / "basic" / "evaluation.json").unlink()
    assert run(reproduction("cityscapes", other, tmp_path / "out", f"{options} --arms basic,fgsm")) == 0


def test_references_are_those_of_the_share_attacked(streets: Path, tmp_path: Path) -> None:
    assert comparison.reference_overhead(0.5) is comparison.PAPER_OVERHEAD
    (model,) = comparison.reference_overhead(1.0).values()
    assert model == pytest.approx({"fgsm": 200 / 3, "random-fgsm": 200 / 3, "bim-3": 200.0, "fast-newton": 200 / 3})
    options = "--steps 1 --batch-size 2 --overhead-steps 1 --adversarial-share 1 --arms basic"
    assert run(reproduction("cityscapes", streets, tmp_path / "out", options)) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "100% of it attacked" in text
    assert "| bim-3 |" in text
    assert " 200.00 % |" in text
    assert "45.92" not in text


def test_reproduce_writes_whole_files(streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file cannot be replaced, the others and the old one stay whole, and the next call makes it."""
    command = reproduction("cityscapes", streets, tmp_path, "--arms basic --steps 1 --batch-size 2 --overhead-steps 1")
    assert run(command) == 0
    before = content(tmp_path)
    for name in ("config.yaml", "overhead.csv", "results.json", "report.md"):
        genuine = os.replace

        def replace(source: Any, target: Any, name: str = name, genuine: Any = genuine) -> None:
            if Path(target).name == name:
                raise OSError(f"no space left for {name}")
            genuine(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(writing.os, "replace", replace)
            assert run(command) == 2
        assert content(tmp_path).keys() == before.keys(), "a half-written file stayed"
        assert (tmp_path / name).read_bytes() == before[name]
    assert run(command) == 0


def test_reproduce_leaves_foreign_folders_alone(
    voc: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "out must be a new or empty folder" in failure(reproduction("voc", voc, tmp_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    message = failure(reproduction("voc", voc, trained / "voc"), capsys)
    assert "holds a run with other options" in message
    assert "arm basic there and None here" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arms basic,fgms", "bim-3, fast-newton; got ['fgms'], did you mean 'fgsm'?"),
        ("--evaluation.stronger pgd,pdg", "evaluation.stronger must be names out of fgsm, bim-10, bim, pgd"),
        ("--evaluation.stronger [pdg]", "evaluation.stronger must be names out of fgsm, bim-10, bim, pgd"),
        ("--evaluation.steps 7", "--evaluation.steps has no effect without bim, pgd, segpgd, cospgd, cospgd-balanced"),
        ("--evaluation.steps 7 --evaluation.stronger pgd-10", "--evaluation.steps has no effect without bim, pgd,"),
        (
            "--evaluation.stronger pgd --evaluation.steps 0",
            "evaluation.steps must be a whole number of at least 1",
        ),
        ("--overhead-steps 0", "overhead_steps must be a whole number of at least 1, got 0"),
        ("--arm fgsm", "did you mean '--arms'?"),
        ("--stepz 3", "did you mean '--steps'?"),
        ("--evaluation.imges 3", "did you mean '--evaluation.images'?"),
    ],
)
def test_wrong_use_of_reproduce(
    options: str, message: str, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(reproduction("voc", voc, tmp_path / "out", options), capsys)
    assert not (tmp_path / "out").exists()


def curves(arms: dict[tuple[str, str], tuple[float, ...]]) -> list[dict[str, Any]]:
    """(arm, attack) -> mIoU at the five eps."""
    return [
        {"arm": arm, "attack": attack, "eps": eps, "miou": value}
        for (arm, attack), values in arms.items()
        for eps, value in zip((0.0, 0.01, 0.02, 0.03, 0.04), values, strict=True)
    ]


AS_THE_PAPER_SAYS = {
    ("fast-newton", "bim-10"): (0.7, 0.6, 0.5, 0.4, 0.3), ("random-fgsm", "bim-10"): (0.7, 0.5, 0.4, 0.3, 0.2),
    ("fgsm", "bim-10"): (0.7, 0.4, 0.3, 0.2, 0.1), ("basic", "bim-10"): (0.8, 0.3, 0.2, 0.1, 0.0),
    ("bim-3", "bim-10"): (0.6, 0.55, 0.45, 0.41, 0.29), ("fgsm", "fgsm"): (0.7, 0.4, 0.3, 0.6, 0.5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True] * 6),
        ({("random-fgsm", "bim-10"): (0.7, 0.5, 0.4, 0.43, 0.2)}, [False, True, True, True, True, True]),
        ({("random-fgsm", "bim-10"): (0.7, 0.5, 0.4, 0.39, 0.2)}, [None, True, True, True, True, True]),
        ({("random-fgsm", "bim-10"): (0.7, 0.5, 0.4, 0.41, 0.2)}, [None, True, True, True, True, True]),
        ({("random-fgsm", "bim-10"): (0.7, 0.5, 0.63, 0.41, 0.2)}, [False, True, True, True, True, True]),
        ({("fgsm", "bim-10"): (0.9, 0.4, 0.3, 0.2, 0.33)}, [True, False, True, True, True, True]),
        ({("basic", "bim-10"): (0.8, 0.63, 0.2, 0.1, 0.0)}, [True, True, False, True, True, True]),
        ({("bim-3", "bim-10"): (0.6, 0.55, 0.53, 0.41, 0.29)}, [True, True, True, False, True, True]),
        ({("bim-3", "bim-10"): (0.6, 0.55, 0.45, 0.42, 0.32)}, [True, True, True, True, True, True]),
        ({("bim-3", "bim-10"): (0.6, 0.55, 0.45, 0.41, 0.33)}, [True, True, True, True, False, True]),
        ({("fgsm", "fgsm"): (0.7, 0.65, 0.63, 0.6, 0.5)}, [True, True, True, True, True, False]),
        ({("bim-3", "bim-10"): None}, [True, True, True, None, None, True]),
    ],
)
def test_claims_are_judged_by_the_numbers(changed: dict[str, Any], expected: list[bool | None]) -> None:
    arms = {name: values for name, values in {**AS_THE_PAPER_SAYS, **changed}.items() if values is not None}
    found = claims(curves(arms))
    assert [claim.holds for claim in found] == expected
    for claim in found:
        assert ("(no)" in claim.finding) == (claim.holds is False)


def test_overhead_is_measured_without_validation(streets: Path) -> None:
    """Whose data set is not at hand there; and of the configs' own arms."""
    config = TrainConfig(
        steps=3, batch_size=2, crop=(32, 32), device="cpu", validation=Validation(every=1, images=1), arm="fgsm"
    )
    configs = {"basic": dataclasses.replace(config, arm="basic"), "fgsm": config}
    rows = comparison.measure_overhead(configs, small_pspnet, open_dataset("cityscapes", streets, "train"), 2)
    assert [row["arm"] for row in rows] == ["basic", "fgsm"]
    assert rows[0]["overhead_percent"] == 0
    expected = (rows[1]["step_ms_p50"] / rows[0]["step_ms_p50"] - 1) * 100
    assert rows[1]["overhead_percent"] == pytest.approx(expected, abs=0.1)


def test_the_arms_whose_steps_are_timed_follow_one_another_in_changing_order(
    streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once a round; the same order in every process."""
    config = TrainConfig(arm="basic", steps=3, batch_size=2, crop=(32, 32), device="cpu")
    configs = {arm: dataclasses.replace(config, arm=arm) for arm in ("basic", "fgsm", "fast-newton")}
    dataset = open_dataset("cityscapes", streets, "train")
    taken: list[str] = []
    monkeypatch.setattr(Trainer, "step", lambda self, images, labels, chosen: taken.append(self.config.arm))
    for _ in range(2):
        comparison.measure_overhead(configs, small_pspnet, dataset, 10)
    assert taken[: len(taken) // 2] == taken[len(taken) // 2 :]
    rounds = [tuple(taken[i : i + 3]) for i in range(0, len(taken), 3)]
    assert all(set(arms) == set(configs) for arms in rounds)
    assert len(set(rounds)) > 3


@pytest.mark.parametrize(
    ("share", "processes", "expected"),
    [
        (0.5, 1, [[1, 3, 5]]),
        (0.5, 2, [[1], [0, 2]]),
        (0.5, 6, [[], [0], [], [0], [], [0]]),
        (1.0, 2, [[0, 1, 2], [0, 1, 2]]),
        (0.0, 1, [[]]),
        (0.3, 1, [[3]]),
        (0.1, 1, [[0]]),
        (0.1, 2, [[0], []]),
        (1 / 3, 2, [[2], [2]]),
    ],
)
def test_overhead_is_that_of_the_runs_share(
    share: float, processes: int, expected: list[list[int]], streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole batch, however it is divided among processes."""
    config = TrainConfig(arm="basic", steps=3, batch_size=6, crop=(32, 32), device="cpu", adversarial_share=share)
    dataset = open_dataset("cityscapes", streets, "train")
    dataset.image_paths, dataset.label_paths = dataset.image_paths * 3, dataset.label_paths * 3
    taken: list[list[int]] = []

    def step(self: Trainer, images: Any, labels: Any, chosen: list[int]) -> None:
        assert len(images) == 6 // processes
        taken.append(chosen)

    monkeypatch.setattr(Trainer, "step", step)
    for rank in range(processes):
        monkeypatch.setattr(comparison.distributed, "world_size", lambda: processes)
        monkeypatch.setattr(comparison.distributed, "rank", lambda rank=rank: rank)
        with monkeypatch.context() as alone:  # the trainer itself
            alone.setattr(comparison, "Trainer", OneProcess)
            comparison.measure_overhead({"basic": config}, small_pspnet, dataset, 1)
    assert taken[::3] == taken[1::3] == expected


def test_a_share_of_a_batch_is_not_less_for_rounding() -> None:
    config = TrainConfig(batch_size=50, adversarial_share=0.58)  # 0.58 * 50 is 28.999999999999996
    assert len(comparison.attacked_positions(config)) == 29


class OneProcess(Trainer):
    def __init__(self, *args: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(comparison.distributed, "world_size", lambda: 1)
            patched.setattr(comparison.distributed, "rank", lambda: 0)
            super().__init__(*args, **options)


def test_overhead_is_measured_anew_where_more_steps_are_asked_for(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = reproduction("cityscapes", streets, out, "--arms basic --steps 1 --batch-size 2")
    genuine, asked = reproduce.measure_overhead, []

    def measured(configs: Any, model: Any, dataset: Any, steps: int) -> Any:
        asked.append(steps)
        return genuine(configs, model, dataset, 1)

    monkeypatch.setattr(reproduce, "measure_overhead", measured)
    for steps, timed in ((1, 1), (1, 1), (2, 2), (1, 2)):  # --quick takes two at most
        assert run(f"{command} --overhead-steps {steps}") == 0
        assert json.loads((out / "overhead.json").read_text())["steps"] == timed
    assert asked == [1, 2]
    assert "50% of it attacked" in (out / "report.md").read_text()

    # Of another machine: it stays
    other = json.loads((out / "overhead.json").read_text()) | {"processes": 4}
    other["environment"]["device"] = "another"
    (out / "overhead.json").write_text(json.dumps(other))
    assert run(f"{command} --overhead-steps 2") == 0
    assert asked == [1, 2]
    assert "a batch in memory, 50% of it attacked, on another (4 processes)" in (out / "report.md").read_text()


def test_refused_reproduction_leaves_the_options_and_a_finished_one_takes_any_number_of_processes(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = reproduction("cityscapes", streets, out, "--arms basic --steps 2 --batch-size 4 --overhead-steps 1")
    assert run(f"{command} --accumulation 2") == 0
    assert "accumulation 2 instead of 1" in (out / "report.md").read_text()
    before = content(out)
    assert "it differs in accumulation (2 there, 1 here)" in failure(command, capsys)
    assert content(out) == before
    state = torch.load(out / "basic" / "last.pt", weights_only=True)
    state["config"]["processes"] = 2
    torch.save(state, out / "basic" / "last.pt")
    assert run(f"{command} --accumulation 2") == 0  # nothing is left to train
    torch.save(state | {"steps_done": 1}, out / "basic" / "last.pt")
    assert "it differs in processes (2 there, 1 here)" in failure(f"{command} --accumulation 2", capsys)


def test_a_killed_first_write_does_not_make_a_folder_foreign(streets: Path, tmp_path: Path) -> None:
    for name, command in (
        ("out", reproduction("cityscapes", streets, tmp_path / "out", "--arms basic --steps 1 --batch-size 2")),
        ("train", f"train --data {streets} --out {tmp_path / 'train'} --steps 1 --batch-size 2 --crop 32x32"),
    ):
        (tmp_path / name).mkdir()
        for left in (".config.123.456.segadv.yaml", ".training.123.456.segadv.png"):
            (tmp_path / name / left).write_text("half")
        if name == "train":
            (tmp_path / name / ".wallpaper.1.2.png").write_text("mine")
        assert run(command) == 0
        assert [path.name for path in (tmp_path / name).glob(".*.*")] == [".wallpaper.1.2.png"] * (name == "train")


def test_a_refused_training_leaves_the_options_of_the_one_that_runs_there(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"train --data {streets} --out {tmp_path} --batch-size 2 --crop 32x32 --steps"
    assert run(f"{command} 1") == 0
    before = content(tmp_path)
    (tmp_path / "last.pt").rename(tmp_path / "last.pt.away")  # as before a first checkpoint
    code = (
        "import fcntl, sys\n"
        "lock = open(sys.argv[1], 'a+')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert "is training there" in failure(f"{command} 7 --arm kim", capsys)
        other.communicate("")
    (tmp_path / "last.pt.away").rename(tmp_path / "last.pt")
    assert content(tmp_path) == before


def test_a_run_goes_on_with_its_own_initial_weights_only(
    streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.MODELS, "pspnet50", lambda config, num_classes: small_pspnet(num_classes))
    command = f"train --data {streets} --out {tmp_path} --steps 1 --batch-size 2 --crop 32x32 --model.name pspnet50"
    assert run(f"{command} --model.backbone robust.pth") == 0
    assert run(f"{command} --model.backbone robust.pth") == 0
    before = content(tmp_path)
    message = failure(f"{command} --model.backbone other.pth", capsys)
    assert "holds a run that began with other weights (model.backbone 'robust.pth' there, 'other.pth' here)" in message
    assert content(tmp_path) == before


def test_evaluation_checks_its_values() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.images must be a whole number of at least 0, got -1"):
        Evaluation(images=-1)
    assert Evaluation(stronger=("pgd", "fgsm")).attacks == ["fgsm", "bim-10", "pgd"]
    assert Evaluation(stronger="pgd") == Evaluation(stronger=("pgd",))  # type: ignore[arg-type]
    assert Evaluation(stronger="") == Evaluation()  # type: ignore[arg-type]


# --- what reproduce hands on, keeps and shows ----------------------------------------------------------------------


def test_claims_tell_the_figures() -> None:
    found = claims(curves({**AS_THE_PAPER_SAYS, ("random-fgsm", "bim-10"): (0.7, 0.5, 0.49, 0.43, 0.2)}))
    assert found[0].finding == (
        "eps 0.01: 0.600, random-fgsm 0.500; eps 0.02: 0.500, random-fgsm 0.490 (level); "
        "eps 0.03: 0.400, random-fgsm 0.430 (no); eps 0.04: 0.300, random-fgsm 0.200"
    )
    assert (
        found[5].finding
        == "eps 0: 0.700, 0.400 at 0.01; eps 0.03: 0.600, 0.300 at 0.02; eps 0.03: 0.600, 0.500 at 0.04"
    )


def report(setting: str = "cityscapes", evaluation: Evaluation | None = None, **changed: Any) -> list[str]:
    """Of arms whose numbers all differ."""
    evaluation = evaluation or Evaluation()
    arms = ("basic", "bim-3")
    rows = [
        {"arm": arm, "attack": attack, "eps": eps, "miou": (n + 1) / 100, "pixel_accuracy": 0.99}
        for n, (arm, attack, eps) in enumerate(
            (arm, attack, eps) for arm in arms for attack in ("fgsm", "bim-10") for eps in (0.0, 0.01, 0.02, 0.03, 0.04)
        )
    ]
    times = {"step_ms_p20": 1.0, "step_ms_p50": 2.0, "step_ms_p80": 3.0}
    overhead = {
        "rows": [{"arm": arm, **times, "overhead_percent": 7.0 * i} for i, arm in enumerate(comparison.PAPER_ARMS)],
        "attacked": 0.5, "processes": 1, "environment": {"device": "cpu"}, **changed,
    }  # fmt: skip
    run = {"images": 3, "data_sha256": "0" * 64, "backend": "native", "device": "cpu", "versions": {"torch": "x"}}
    content = {
        "setting": setting,
        "recipe": reproduce.SETTINGS[setting],
        "differs_from_recipe": [],
        "command": "",
        "curves": rows,
        "options": {
            "model": {"name": "net"},
            "steps": 1,
            "batch_size": 2,
            "crop": "3x4",
            "precision": "fp32",
            "seed": 5,
        },
        "claims": [
            {"text": "a", "holds": True, "finding": "x"},
            {"text": "b", "holds": False, "finding": "x"},
            {"text": "c", "holds": None, "finding": "x"},
            {"text": "d", "holds": None, "finding": reproduce._NOT_MEASURED},
        ],
        "overhead": overhead,
        "overhead_references": comparison.reference_overhead(overhead["attacked"]),
        "step_ms_as_trained": {"basic": 8.0, "bim-3": 9.0},
        "evaluations": dict.fromkeys(arms, run),
    }
    return reproduce._report(content, arms, evaluation, "qualitative.png")


def test_report_shows_each_number_in_its_place() -> None:
    lines = report()
    text = "\n".join(lines)
    assert "| fgsm | basic | 0.010 | 0.020 | 0.030 | 0.040 | 0.050 |" in lines
    assert "| bim-10 | bim-3 | 0.160 | 0.170 | 0.180 | 0.190 | 0.200 |" in lines
    for claim, verdict in (
        ("a", "agrees"),
        ("b", "**does not agree**"),
        ("c", "too close to tell"),
        ("d", "not measured"),
    ):
        assert f"| {claim} | {verdict} | " in text
    assert "3 validation images, whole." in text
    assert "worst case" not in text
    assert "50% of it attacked, on cpu; medians. The paper's table 1 is the one for Cityscapes." in text
    titles, _, *table = lines[lines.index(next(line for line in lines if line.startswith("| trained with | step"))) :]
    assert titles == (
        "| trained with | step | here | paper, Cityscapes | paper, PASCAL VOC | cost model | step as trained |"
    )
    assert table[:5] == [
        "| basic | 2.0 ms |  |  |  |  | 8.0 ms |",
        "| fgsm | 2.0 ms | 7.00 % | 12.52 % | 31.76 % | 33.33 % |  |",
        "| random-fgsm | 2.0 ms | 14.00 % | 12.34 % | 34.71 % | 33.33 % |  |",
        "| bim-3 | 2.0 ms | 21.00 % | 45.92 % | 98.24 % | 100.00 % | 9.0 ms |",
        "| fast-newton | 2.0 ms | 28.00 % | 11.98 % | 31.18 % | 33.33 % |  |",
    ]
    other = "\n".join(report("voc", Evaluation(("pgd",), steps=7, images=3), attacked=0.25, processes=4))
    assert "whole (the first of the split)." in other
    assert "Steps of pgd: 7.\nThe worst cases take, for each image, the outcome with the most wrong pixels" in other
    assert "Steps" not in "\n".join(report(evaluation=Evaluation(("pgd-10",)))).partition("worst case")[0]
    assert "on cpu (4 processes); medians. The paper's tables are for half of the samples" in other
    assert "The paper's table 2 is the one for PASCAL VOC." in "\n".join(report("voc"))


def test_overhead_is_the_percentiles_of_each_arms_own_steps(streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = [0.0], []
    seconds = {"basic": iter([9, 9, 1, 2, 3, 4, 6]), "fgsm": iter([9, 9, 6, 5, 4, 2, 8])}

    def step(self: Trainer, *_: Any) -> None:
        assert len(waited) % 2 == 1, "not waited for what came before"
        clock[0] += next(seconds[self.config.arm]) / 1000

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(comparison, "_synchronize", waited.append)
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    config = TrainConfig(steps=3, batch_size=2, crop=(32, 32), device="cpu")
    configs = {arm: dataclasses.replace(config, arm=arm) for arm in seconds}
    rows = comparison.measure_overhead(configs, small_pspnet, open_dataset("cityscapes", streets, "train"), 5)
    of = ("arm", "step_ms_p20", "step_ms_p50", "step_ms_p80", "overhead_percent")
    assert [[row[name] for name in of] for row in rows] == [["basic", 1.8, 3, 4.4, 0], ["fgsm", 3.6, 5, 6.4, 66.67]]
    assert len(waited) == 2 * 2 * 7


def test_attacks_have_titles_and_those_of_others_keep_their_names() -> None:
    assert [plots.attack_title(name) for name in (*ATTACKS, *WORST_CASES, "fgsm-2", "mine")] == [
        "FGSM", "BIM-10", "BIM", "PGD", "SegPGD", "CosPGD", "CosPGD, balanced", "PGD-10", "PGD-20", "PGD-40",
        "PGD-100", "SegPGD-10", "SegPGD-20", "SegPGD-40", "SegPGD-100", "worst per image, by pixels",
        "worst per image, by mIoU", "fgsm-2", "mine",
    ]  # fmt: skip


def test_examples_are_bim_10_at_the_eps_that_is_shown() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 4, 3, padding=1)
    )
    network[0].weight.data *= 20  # FGSM finds something else
    image, label = torch.rand(3, 16, 16), torch.randint(0, 4, (16, 16))
    (found,) = comparison.examples({"x": network}, [(image, label)])
    assert (found["arm"], comparison.SHOWN_EPS) == ("x", 0.03)
    assert torch.equal(found["image"], image)
    assert torch.equal(found["adversarial"], ATTACKS["bim-10"](network, 0.03, 10)(image[None], label[None])[0])
    assert torch.equal(found["prediction"].long(), network(image[None])[0].argmax(0))
    assert torch.equal(found["adversarial_prediction"].long(), network(found["adversarial"][None])[0].argmax(0))
    assert not torch.equal(found["prediction"], found["adversarial_prediction"])


def test_reproduce_hands_its_options_on(streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def spy(name: str) -> None:
        genuine = getattr(reproduce, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            taken[name] = args, kwargs
            return genuine(*args, **kwargs)

        monkeypatch.setattr(reproduce, name, call)

    for name in ("untrained", "measure_overhead", "evaluate"):
        spy(name)
    monkeypatch.setattr(plots, "plot_qualitative", lambda found, path, **kwargs: taken.update(drawn=(found, kwargs)))
    options = (
        "--seed 7 --steps 1 --batch-size 2 --overhead-steps 1 --arms basic --validation.every 1 --validation.images 1"
        " --validation.attacks fgsm --validation.eps 0 --evaluation.stronger segpgd --evaluation.steps 3"
    )
    assert run(reproduction("cityscapes", streets, tmp_path / "out", options)) == 0
    assert taken["untrained"][1]["seed"] == 7
    assert {arm: config.arm for arm, config in taken["measure_overhead"][0][0].items()} == {
        arm: arm for arm in comparison.PAPER_ARMS
    }
    assert (taken["evaluate"][1]["seed"], taken["evaluate"][1]["steps"]) == (7, 3)
    assert (tmp_path / "out" / "basic" / "validation.jsonl").exists()
    found, kwargs = taken["drawn"]
    val = open_dataset("cityscapes", streets, "val")
    assert [example["arm"] for example in found] == ["basic"] * 2
    assert all(torch.equal(example["image"], val[i][0]) for i, example in enumerate(found))
    assert kwargs == {"attack": "bim-10", "eps": 0.03, "class_names": val.class_names, "colors": val.colors}
    (line,) = (tmp_path / "out" / "basic" / "metrics.jsonl").read_text().splitlines()
    shown = json.loads((tmp_path / "out" / "results.json").read_text())["step_ms_as_trained"]["basic"]
    assert shown == pytest.approx(1000 / json.loads(line)["steps_per_s"], abs=1e-3)


def test_an_evaluation_counts_for_its_own_network_and_options_only(
    streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated: list[Any] = []
    drawn: list[list[str]] = []
    genuine = reproduce.evaluate
    monkeypatch.setattr(reproduce, "evaluate", lambda *a, **k: evaluated.append(1) or genuine(*a, **k))
    monkeypatch.setattr(
        plots, "plot_qualitative", lambda found, path, **_: drawn.append([e["arm"] for e in found]) or path.touch()
    )
    out = tmp_path / "out"
    command = reproduction(
        "cityscapes", streets, out, "--steps 1 --batch-size 2 --overhead-steps 1 --evaluation.images 9"
    )
    for arm in ("basic", "fgsm", "fast-newton", "basic"):  # the split has two images
        assert run(f"{command} --arms {arm}") == 0
    assert (len(evaluated), drawn) == (3, [["basic"] * 2, ["basic"] * 2, ["basic", "fast-newton"] * 2])
    (out / "qualitative.png").unlink()
    assert run(f"{command} --arms basic") == 0
    assert drawn[3:] == [["basic", "fast-newton"] * 2]

    # Another's checkpoint: its evaluation is not that of the network
    (out / "basic" / "last.pt").write_bytes((out / "fast-newton" / "last.pt").read_bytes())
    state = torch.load(out / "basic" / "last.pt", weights_only=True)
    state["config"]["arm"] = "basic"
    torch.save(state, out / "basic" / "last.pt")
    capsys.readouterr()
    assert run(f"{command} --arms fgsm") == 0
    assert (
        f"evaluation: basic has another one in {out / 'basic' / 'evaluation.json'}; it is left out"
        in capsys.readouterr().out
    )
    assert "Still missing: basic, random-fgsm, bim-3." in (out / "report.md").read_text()
    assert len(evaluated) == 3
    assert drawn[4:] == [["fast-newton"] * 2]  # and not basic's any more
    assert run(f"{command} --arms basic") == 0
    assert len(evaluated) == 4

    # Another version's, which did not take all that this one takes
    path, count = out / "fgsm" / "evaluation.json", len(evaluated)
    result = EvaluationResult.from_json(path)
    EvaluationResult([entry for entry in result.measurements if entry.attack != "bim-10"], result.run).to_json(path)
    assert run(f"{command} --arms fgsm") == 0
    assert len(evaluated) == count + 1
    assert {entry.attack for entry in EvaluationResult.from_json(path).measurements} == {"fgsm", "bim-10"}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("a: [", "config.yaml is no YAML file: "),
        ("\xff", "config.yaml is no YAML file: "),
        ("- 3", "holds a run with other options"),
        ("steps: 30000", "seed None there and 0 here"),
    ],
)
def test_config_of_something_else_is_no_reproduction(
    there: str, message: str, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(there.encode("latin-1"))
    assert message in failure(reproduction("voc", voc, tmp_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_evaluation_checks_its_batches() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.batch_size must be a whole number of at least 1, got 0"):
        Evaluation(batch_size=0)


def test_no_examples_without_the_arms_that_are_shown(streets: Path, tmp_path: Path) -> None:
    assert (
        run(
            reproduction(
                "cityscapes", streets, tmp_path / "out", "--arms fgsm --steps 1 --batch-size 2 --overhead-steps 1"
            )
        )
        == 0
    )
    assert not (tmp_path / "out" / "qualitative.png").exists()
    assert "## Examples" not in (tmp_path / "out" / "report.md").read_text()
