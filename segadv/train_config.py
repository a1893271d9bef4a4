"""The settings of a training run: arms, config, the choice of attacked samples, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .attacks import BIM, FGSM, NFGSM, PGD, CheckpointFGSM, FastNewton, RandomFGSM, SegPGD
from .attacks.base import Attack
from .checks import at_least, is_number, names_out_of, one_of, true_or_false
from .data import Augmentation
from .data.sampler import COINS, seeded
from .evaluation import ATTACKS, EPS, PAPER_ATTACKS, checked_eps

__all__ = ["ARMS", "EARLY_STOP", "PRECISIONS", "TrainConfig", "Validation", "adversarial_coins", "poly_learning_rate"]

ARMS: Mapping[str, Callable[[nn.Module, float, torch.Generator], Attack | None]] = {
    "basic": lambda model, eps, generator: None,
    "fgsm": lambda model, eps, generator: FGSM(model, eps=eps),
    "random-fgsm": lambda model, eps, generator: RandomFGSM(model, eps=eps, generator=generator),
    "bim-3": lambda model, eps, generator: BIM(model, eps=eps, alpha=eps / 3, steps=3),
    "fast-newton": lambda model, eps, generator: FastNewton(model),
    "pgd-3": lambda model, eps, generator: PGD(model, eps=eps, alpha=eps / 3, steps=3, generator=generator),
    "pgd-7": lambda model, eps, generator: PGD(model, eps=eps, alpha=eps / 3, steps=7, generator=generator),
    "segpgd-3": lambda model, eps, generator: SegPGD(model, eps=eps, alpha=eps / 3, steps=3, generator=generator),
    "segpgd-7": lambda model, eps, generator: SegPGD(model, eps=eps, alpha=eps / 3, steps=7, generator=generator),
    # Wong et al. 2020 (arXiv 2001.03994): a random start and one step of 1.25 eps; with `EARLY_STOP`
    "rs-fgsm": lambda model, eps, generator: PGD(model, eps=eps, alpha=1.25 * eps, steps=1, generator=generator),
    "n-fgsm": lambda model, eps, generator: NFGSM(model, eps=eps, generator=generator),
    "kim": lambda model, eps, generator: CheckpointFGSM(model, eps=eps),
}
"""name -> (model, eps, generator of the random numbers) -> the attack this arm trains with, or None. basic and
fast-newton have no eps; the papers' steps of 0.01 at eps 0.03 are eps / 3."""

EARLY_STOP: Mapping[str, float] = {"rs-fgsm": 0.2}
"""arm -> drop of PGD accuracy from one probe to the next that ends the training with the weights of the former.

Wong et al. look once per epoch, with PGD-5 on a batch of training images; here the monitor's probe is looked at.
"""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Validation:
    """When and how a training run evaluates its model under attack, with `segadv.evaluation.evaluate`.

    Args:
        every: steps between evaluations; the last step is followed by one too. 0: none.
        images: number of images, the first of the validation data set; 0: all.
        attacks: names out of `segadv.evaluation.ATTACKS`; bim, pgd, segpgd, cospgd and
            cospgd-balanced take 100 steps every time.
        eps: sizes of the perturbation, in the images' unit; 0 is the clean prediction.
        batch_size: images at once; they are taken whole, so where their sizes differ it has to be 1.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of another type.
    """

    every: int = 0
    images: int = 0
    attacks: tuple[str, ...] = PAPER_ATTACKS
    eps: tuple[float, ...] = EPS
    batch_size: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", (self.attacks,) if isinstance(self.attacks, str) else tuple(self.attacks))
        object.__setattr__(self, "eps", tuple(checked_eps(self.eps, name="validation.eps")))
        at_least(0, **{"validation.every": self.every, "validation.images": self.images})
        at_least(1, **{"validation.batch_size": self.batch_size})
        _make_ints(self)
        if not self.attacks:
            raise ValueError("validation.attacks must name at least one attack")
        names_out_of(ATTACKS, **{"validation.attacks": self.attacks})


def _make_ints(config: object) -> None:
    """Of the whole numbers of a frozen dataclass, which may be NumPy's; JSON and files know ints only."""
    for name, value in vars(config).items():
        if isinstance(value, Integral) and not isinstance(value, bool):
            object.__setattr__(config, name, int(value))
        elif isinstance(value, (tuple, list)) and all(isinstance(part, Integral) for part in value):
            object.__setattr__(config, name, tuple(map(int, value)))


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    Args:
        arm: name of the training method, a key of `ARMS`.
        eps: size of the perturbation, in the images' unit (8/255, not 8), for all arms but basic and fast-newton and
            for the probes. The papers' is 0.03.
        adversarial_share: probability that a sample is made adversarial, 0 to 1.
        steps: number of optimiser steps of the whole run.
        batch_size: samples per step, over all processes and accumulated parts; at least 2 (batch normalisation).
        accumulation: number of parts in which a process takes its share of a batch, one after the other, to save
            memory. The gradient is that of the whole batch; batch normalisation takes the statistics of each part.
        crop: height and width of the training crops, in pixels.
        learning_rate: that of the first step; it falls as (1 - step / steps) ** power.
        momentum: of SGD.
        weight_decay: L2, on all parameters.
        power: of the poly schedule.
        augmentation: how samples are changed before they are cropped.
        seed: decides the order of the data, augmentation, coins, dropout and the attack's random numbers (not
            the initialisation, which came with the model).
        workers: processes that load data; 0 loads in the training process. Where Python does not fork (macOS, from 3.14
            on Linux) they run the script again, which must then train under
            ``if __name__ == "__main__":``, and get the data set pickled.
        precision: "fp32", or "bf16" or "fp16" for mixed precision (fp16 needs CUDA; bf16 is recommended).
        channels_last: keep images and convolution weights in the channels-last memory format.
        compile: compile the network with `torch.compile`, for training and attack; it is compiled again at the first
            steps with another number of attacked samples.
        device: "auto" (CUDA where there is one, else the CPU), or a name that `torch.device` takes.
        log_every: steps per line of metrics.jsonl.
        checkpoint_every: steps between checkpoints.
        monitor_every: steps between probes for catastrophic overfitting; 0: none (not with rs-fgsm).
        validation: evaluation under attack on the way.
        allow_other_split: continue a checkpoint made with another number of processes or of accumulated parts. The
            batches stay the same; rounding, the random numbers of attack and dropout and, where batch normalisation
            sees other parts, its statistics do not.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of another type.
    """

    arm: str = "fast-newton"
    eps: float = 0.03
    adversarial_share: float = 0.5
    steps: int = 300
    batch_size: int = 16
    accumulation: int = 1
    crop: tuple[int, int] = (128, 256)
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    augmentation: Augmentation = field(default=Augmentation())
    seed: int = 0
    workers: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 100
    monitor_every: int = 100
    validation: Validation = Validation()
    allow_other_split: bool = False

    def __post_init__(self) -> None:
        one_of(ARMS, arm=self.arm)
        one_of(PRECISIONS, precision=self.precision)
        if not isinstance(self.crop, (tuple, list)) or len(self.crop) != 2:
            raise ValueError(f"crop must be (height, width), got {self.crop!r}")
        if not isinstance(self.augmentation, Augmentation) or not isinstance(self.validation, Validation):
            raise TypeError("augmentation must be a segadv.data.Augmentation, validation a segadv.training.Validation")
        true_or_false(**{entry.name: getattr(self, entry.name) for entry in fields(self) if entry.type == "bool"})
        at_least(0, seed=self.seed, workers=self.workers)
        at_least(1, steps=self.steps, accumulation=self.accumulation)
        at_least(1, log_every=self.log_every, checkpoint_every=self.checkpoint_every)
        at_least(0, monitor_every=self.monitor_every)
        if self.arm in EARLY_STOP and not self.monitor_every:
            raise ValueError(
                f"monitor_every must be at least 1 with the arm {self.arm}, which stops by its probes, got 0"
            )
        at_least(2, batch_size=self.batch_size)
        at_least(8, **{"crop height": self.crop[0], "crop width": self.crop[1]})
        _make_ints(self)
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be less than 2^64, got {self.seed}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be divisible by accumulation, got {self.batch_size} and {self.accumulation}"
            )
        if not is_number(self.eps) or not 0 < self.eps <= 1:
            raise ValueError(f"eps must be a number in (0, 1], the unit of the images (8/255, not 8), got {self.eps!r}")
        for name, number, low, high in (
            ("adversarial_share", self.adversarial_share, 0.0, 1.0),
            ("learning_rate", self.learning_rate, 0.0, math.inf),
            ("momentum", self.momentum, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
            ("power", self.power, 0.0, math.inf),
        ):
            if not is_number(number) or not (low <= number <= high and math.isfinite(number)):
                raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {number!r}")


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, such as those of a config, as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def adversarial_coins(seed: int, epoch: int, length: int, share: float) -> npt.NDArray[np.bool_]:
    """Which samples of a data set are made adversarial in an epoch: bool [length], True with probability `share`.

    The coin of a sample is the index-th number of a stream that belongs to (seed, epoch): it depends neither
    on the arm nor on the batch the sample is in, the number of workers or the length of the data set. Drawn
    on the host, so that the choice of samples never waits for a GPU.
    """
    return seeded(seed, COINS, epoch).random(length) < share


def poly_learning_rate(step: int, *, steps: int, learning_rate: float = 0.01, power: float = 0.9) -> float:
    """learning_rate * (1 - step / steps) ** power for step 0 ... steps - 1, and 0 from there on."""
    return float(learning_rate * (1 - step / steps) ** power) if step < steps else 0.0
