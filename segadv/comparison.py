"""Comparing trained networks: reading them, whole images of a split, the time of a training step, examples.

What `segadv demo`, `segadv reproduce` and `segadv evaluate` share.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import distributed, functional
from .attacks.frozen import frozen, logits_of
from .checkpoints import load_weights, read_checkpoint
from .data.files import opened
from .evaluation import ATTACKS
from .models import ModelConfig, build_model
from .training import TrainConfig, Trainer, Validation

__all__ = [
    "PAPER_ARMS",
    "PAPER_OVERHEAD",
    "SHOWN_EPS",
    "attacked_positions",
    "describe",
    "examples",
    "load_trained",
    "measure_overhead",
    "reference_overhead",
    "whole_images",
]

PAPER_ARMS = ("basic", "fgsm", "random-fgsm", "bim-3", "fast-newton")
"""The arms of Wiens & Hammer 2022 (doi 10.5220/0010788400003122)."""

PAPER_OVERHEAD: dict[str, dict[str, float]] = {
    "paper, Cityscapes": {"fgsm": 12.52, "random-fgsm": 12.34, "bim-3": 45.92, "fast-newton": 11.98},
    "paper, PASCAL VOC": {"fgsm": 31.76, "random-fgsm": 34.71, "bim-3": 98.24, "fast-newton": 31.18},
    "cost model": {"fgsm": 100 / 3, "random-fgsm": 100 / 3, "bim-3": 100.0, "fast-newton": 100 / 3},
}
"""Additional training time in percent: tables 1 and 2 of the paper, and what counting passes gives.

A clean step is 3 passes (forward, data gradient, weight gradient); an attack step on half the batch adds one.
"""


def reference_overhead(attacked: float) -> dict[str, dict[str, float]]:
    """`PAPER_OVERHEAD` for another share of attacked samples than 0.5: the cost model alone, which grows with it."""
    if math.isclose(attacked, 0.5):
        return PAPER_OVERHEAD
    return {"cost model": {arm: percent * attacked / 0.5 for arm, percent in PAPER_OVERHEAD["cost model"].items()}}


SHOWN_EPS = 0.03
_WARM_UP_STEPS = 2


def describe(dataset: str, model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The description that `Trainer` puts into checkpoints, and from which `load_trained` builds the network.

    It does not tell where the initial weights came from: a run goes on without them.
    """
    return {"dataset": dataset, "model": {"name": model.name}, "num_classes": num_classes}


def untrained(model: ModelConfig, checkpoint: Path, *, num_classes: int, seed: int) -> nn.Module:
    """The network to be trained; where there is a checkpoint to go on from, without fetching its initial weights.

    Of several processes each has to call it.
    """
    if distributed.from_first(checkpoint.exists):
        model = ModelConfig(model.name)
    return build_model(model, num_classes=num_classes, seed=seed)


def load_trained(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint whose description `describe` made, and what `read_config` tells of it.

    Its weights are in the memory format they were trained in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has no such description, or holds another network than that says.
    """
    state = read_checkpoint(path)
    try:
        config: dict[str, Any] = state["config"]
        arm, description = config["arm"], config["description"]
        if not isinstance(arm, str) or not isinstance(description["dataset"], str):
            raise TypeError("its arm and its data set have no names")
        network = ModelConfig(description["model"]["name"])
        model = build_model(network, num_classes=description["num_classes"], seed=0)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say which network it holds, as those of segadv train do ({error}); for a network of your "
            "own use segadv.training.load_model and segadv.evaluation.evaluate"
        ) from error
    load_weights(model, state["model"], path)
    if config.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, config


def whole_images(dataset: Any, *, images: int = 0, batch_size: int = 1) -> DataLoader[Any]:
    """Batches of the first images of a data set (0: all), whole, so that a batch holds images of one size only.

    Args:
        dataset: with ``image_paths``, from whose files the sizes are read.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index in range(min(images or len(dataset), len(dataset))):
        with opened(dataset.image_paths[index]) as image:
            by_size.setdefault(image.size, []).append(index)
    batches = [
        indices[start : start + batch_size]
        for indices in by_size.values()
        for start in range(0, len(indices), batch_size)
    ]
    return DataLoader(dataset, batch_sampler=batches)


def measure_overhead(
    configs: Mapping[str, TrainConfig],
    initial_model: Callable[[], nn.Module],
    dataset: Dataset[tuple[Tensor, Tensor]],
    steps: int,
) -> list[dict[str, Any]]:
    """Times training steps: in every round one of each arm, in an order drawn anew, because a step meets the memory and
    caches that the one before it left. All arms have the same batch, of which the `attacked_positions` are attacked,
    and each has a model of its own.

    With several processes all call it; each has its part of the batch.

    Args:
        configs: arm -> its run; one arm is "basic".
        initial_model: gives a network.
        dataset: as `Trainer` takes it.
        steps: timed steps of each arm, after two that are not.

    Returns:
        a row for each arm: arm, step_ms_p20, step_ms_p50, step_ms_p80, overhead_percent (of p50, against basic).
    """
    trainers = {
        arm: Trainer(dataclasses.replace(config, validation=Validation()), initial_model(), dataset)
        for arm, config in configs.items()
    }
    basic = trainers["basic"]
    part = basic.config.batch_size // distributed.world_size()
    own = range(distributed.rank() * part, (distributed.rank() + 1) * part)
    samples = [basic.dataset[0, i] for i in own]
    images = torch.stack([image for image, _, _ in samples]).to(basic.device)
    labels = torch.stack([label for _, label, _ in samples]).to(basic.device)
    chosen = [i - own.start for i in attacked_positions(basic.config) if i in own]
    milliseconds: dict[str, list[float]] = {arm: [] for arm in trainers}
    order = list(trainers)
    shuffle = random.Random(0).shuffle  # the same order in all processes
    for _ in range(_WARM_UP_STEPS + steps):
        shuffle(order)
        for arm in order:
            trainer = trainers[arm]
            _synchronize(trainer.device)
            start = time.perf_counter()
            trainer.step(images, labels, chosen)
            _synchronize(trainer.device)
            milliseconds[arm].append((time.perf_counter() - start) * 1000)
    basic_p50 = float(np.median(milliseconds["basic"][_WARM_UP_STEPS:]))
    rows = []
    for arm, times in milliseconds.items():
        p20, p50, p80 = np.percentile(times[_WARM_UP_STEPS:], (20, 50, 80)).tolist()
        rows.append(
            {
                "arm": arm,
                "step_ms_p20": round(p20, 3),
                "step_ms_p50": round(p50, 3),
                "step_ms_p80": round(p80, 3),
                "overhead_percent": round((p50 / basic_p50 - 1) * 100, 2),
            }
        )
    return rows


def attacked_positions(config: TrainConfig) -> list[int]:
    """As many samples of a batch as the share says, rounded down, but one at least where it is not 0; evenly spread."""
    share = config.adversarial_share
    found = [i for i in range(config.batch_size) if _whole(share * (i + 1)) > _whole(share * i)]
    return found or [0] * (share > 0)


def _whole(number: float) -> int:
    """Rounded down; 0.3 * 10 is 3."""
    return math.floor(number + 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examples(models: Mapping[str, nn.Module], samples: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """What BIM-10 at `SHOWN_EPS` does to images under each model, for `segadv.plots.plot_qualitative`."""
    found = []
    for sample in samples:
        for arm, model in models.items():
            device = next(model.parameters()).device
            image, label = (tensor[None].to(device) for tensor in sample)
            adversarial = ATTACKS["bim-10"](model, SHOWN_EPS, 10)(image, label)
            example = {
                "image": image,
                "label": label,
                "prediction": _predict(model, image),
                "adversarial": adversarial,
                "adversarial_prediction": _predict(model, adversarial),
            }
            found.append({"arm": arm, **{key: tensor[0].cpu() for key, tensor in example.items()}})
    return found


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    with frozen(model):
        return functional.argmax_labels(logits_of(model, images), (height, width))
