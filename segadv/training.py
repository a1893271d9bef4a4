"""Adversarial training: plain PyTorch, seeded, resumable to the same bits.

The training of Wiens & Hammer 2022 (doi 10.5220/0010788400003122), section 4.1: each sample of a batch is
made adversarial with probability 0.5, the attack sees those samples only, and the network learns from clean
and adversarial samples together. SegPGD's training (Gu et al. 2022, arXiv 2207.12391, algorithm 2) is the same with
exactly half of each batch; here the coins decide, as for all arms, so that all see the same samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import functional
from .attacks import BIM, FGSM, NFGSM, PGD, CheckpointFGSM, FastNewton, RandomFGSM, SegPGD
from .attacks.base import Attack, model_logits
from .data import Augmentation, Augmented, EpochSampler
from .evaluation import ATTACKS, EPS
from .monitor import catastrophic_overfitting, probe

__all__ = [
    "ARMS",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "Validation",
    "adversarial_coins",
    "load_model",
    "poly_learning_rate",
    "read_config",
]

ARMS: Mapping[str, Callable[[nn.Module, torch.Generator], Attack | None]] = {
    "basic": lambda model, generator: None,
    "fgsm": lambda model, generator: FGSM(model, eps=0.03),
    "random-fgsm": lambda model, generator: RandomFGSM(model, eps=0.03, generator=generator),
    "bim-3": lambda model, generator: BIM(model, eps=0.03, alpha=0.01, steps=3),
    "fast-newton": lambda model, generator: FastNewton(model),
    "pgd-3": lambda model, generator: PGD(model, eps=0.03, alpha=0.01, steps=3, generator=generator),
    "pgd-7": lambda model, generator: PGD(model, eps=0.03, alpha=0.01, steps=7, generator=generator),
    "segpgd-3": lambda model, generator: SegPGD(model, eps=0.03, alpha=0.01, steps=3, generator=generator),
    "segpgd-7": lambda model, generator: SegPGD(model, eps=0.03, alpha=0.01, steps=7, generator=generator),
    # Wong et al. 2020 (arXiv 2001.03994): a random start and one step of 1.25 eps; with `_EARLY_STOP`
    "rs-fgsm": lambda model, generator: PGD(model, eps=0.03, alpha=1.25 * 0.03, steps=1, generator=generator),
    "n-fgsm": lambda model, generator: NFGSM(model, eps=0.03, generator=generator),
    "kim": lambda model, generator: CheckpointFGSM(model, eps=0.03),
}
"""name -> (model, generator of the random numbers) -> the attack this arm trains with, or None."""

_EARLY_STOP: Mapping[str, float] = {"rs-fgsm": 0.2}
"""arm -> drop of PGD accuracy from one probe to the next that ends the training with the weights of the former.

Wong et al. look once per epoch, with PGD-5 on a batch of training images; here the monitor's probe is looked at.
"""

_PROBE_IMAGES = 8

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# a resumed run may differ in these: they change no number, or (device) are the user's to move
_FREE_TO_CHANGE = {
    "workers", "device", "log_every", "checkpoint_every", "monitor_every", "validation", "allow_other_split",
}  # fmt: skip

# first word of a SeedSequence's spawn key: one stream per purpose; 0 and 1 belong to segadv.data
_COINS, _STEP = 2, 3


@dataclass(frozen=True)
class Validation:
    """When and how a training run evaluates its model under attack, with `segadv.evaluation.evaluate`.

    Args:
        every: steps between evaluations, and one after the last step; 0 makes none.
        images: the first so many of the validation data set; 0: all.
        attacks: names out of `segadv.evaluation.ATTACKS`.
        eps: sizes of the perturbation, in the images' unit; 0 is the clean prediction.
        batch_size: images at once; they are taken whole, so that 1 is needed where their sizes differ.

    Raises:
        ValueError: a value outside its range.
    """

    every: int = 0
    images: int = 0
    attacks: tuple[str, ...] = ("fgsm", "bim-10")
    eps: tuple[float, ...] = EPS
    batch_size: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        object.__setattr__(self, "eps", tuple(float(value) for value in self.eps))
        _check_whole(
            ("validation.every", self.every, 0),
            ("validation.images", self.images, 0),
            ("validation.batch_size", self.batch_size, 1),
        )
        if not self.attacks or any(name not in ATTACKS for name in self.attacks):
            raise ValueError(f"validation.attacks must be names out of {', '.join(ATTACKS)}, got {self.attacks}")
        if not self.eps or not all(0 <= value <= 1 for value in self.eps) or len(set(self.eps)) < len(self.eps):
            raise ValueError(f"validation.eps must be different numbers in [0, 1] (8/255, not 8), got {self.eps}")


def _check_whole(*entries: tuple[str, int, int]) -> None:
    """(name, value, minimum) each."""
    for name, value, minimum in entries:
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of.

    Args:
        arm: name of the training method, a key of `ARMS`.
        adversarial_share: probability of a sample to be made adversarial, 0 to 1.
        steps: number of optimiser steps of the whole run.
        batch_size: samples per step, over all processes and accumulated parts; at least 2 (batch normalisation).
        accumulation: parts that a process works off one after the other for one step, to save memory. The gradient
            is that of the whole batch; batch normalisation takes the statistics of each part.
        crop: height and width of the training crops, in pixels.
        learning_rate: of the first step; it falls as (1 - step / steps) ** power.
        momentum: of SGD.
        weight_decay: L2, on all parameters.
        power: of the poly schedule.
        augmentation: how samples are changed before they are cropped.
        seed: decides the order of the data, augmentation, coins, dropout and the attack's random numbers (not
            the initialisation, which came with the model).
        workers: processes that load data; 0 loads in the training process.
        precision: "fp32", or "bf16" or "fp16" for mixed precision (fp16 needs CUDA; bf16 is recommended).
        channels_last: keep images and convolution weights in the channels-last memory format.
        compile: compile the network with `torch.compile`, for training and attack.
        device: "auto" (CUDA where there is one, else the CPU), or a name that `torch.device` takes.
        log_every: steps per line of metrics.jsonl.
        checkpoint_every: steps between checkpoints.
        monitor_every: steps between probes for catastrophic overfitting; 0 makes none.
        validation: evaluation under attack on the way.
        allow_other_split: continue a checkpoint of another number of processes or of accumulated parts. The
            batches stay the same; rounding, the random numbers of attack and dropout and, where batch normalisation
            sees other parts, its statistics do not.

    Raises:
        ValueError: a value outside its range.
    """

    arm: str = "fast-newton"
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
        if self.arm not in ARMS:
            near = difflib.get_close_matches(self.arm, ARMS, n=1, cutoff=0.0)
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {self.arm!r}, did you mean {near[0]!r}?")
        if self.precision not in _AUTOCAST:
            raise ValueError(f"precision must be one of {', '.join(_AUTOCAST)}; got {self.precision!r}")
        if len(self.crop) != 2:
            raise ValueError(f"crop must be (height, width), got {self.crop}")
        _check_whole(
            ("steps", self.steps, 1),
            ("batch_size", self.batch_size, 2),
            ("accumulation", self.accumulation, 1),
            ("crop height", self.crop[0], 8),
            ("crop width", self.crop[1], 8),
            ("seed", self.seed, 0),
            ("workers", self.workers, 0),
            ("log_every", self.log_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("monitor_every", self.monitor_every, 1 if self.arm in _EARLY_STOP else 0),
        )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be divisible by accumulation, got {self.batch_size} and {self.accumulation}"
            )
        for name, number, low, high in (
            ("adversarial_share", self.adversarial_share, 0.0, 1.0),
            ("learning_rate", self.learning_rate, 0.0, math.inf),
            ("momentum", self.momentum, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
            ("power", self.power, 0.0, math.inf),
        ):
            if not (low <= number <= high and math.isfinite(number)):
                raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {number}")


@dataclass(frozen=True)
class StepResult:
    """What one step measured, on the training device (reading it waits for the device).

    Attributes:
        loss: [], of the whole batch.
        eps: [K], step size for each of the K attacked samples.
        gain: [K], averaged gain of the clean images where the attack computes it (Fast Newton), otherwise
            [0].
        skipped: bool [K], whether the attack left the image as it was.
    """

    loss: Tensor
    eps: Tensor
    gain: Tensor
    skipped: Tensor


def adversarial_coins(seed: int, epoch: int, length: int, share: float) -> npt.NDArray[np.bool_]:
    """Which samples of a data set are made adversarial in an epoch: bool [length], each with probability
    share.

    The coin of a sample is the index-th number of a stream that belongs to (seed, epoch): it depends neither
    on the arm nor on the batch the sample is in, the number of workers or the length of the data set. Drawn
    on the host, so that the choice of samples never waits for a GPU.
    """
    stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_COINS, epoch)))
    return stream.random(length) < share


def poly_learning_rate(step: int, *, steps: int, learning_rate: float = 0.01, power: float = 0.9) -> float:
    """learning_rate * (1 - step / steps) ** power for step 0 ... steps - 1, and 0 from there on."""
    return float(learning_rate * max(0.0, 1 - step / steps) ** power)


class Trainer:
    """Trains a model with one arm.

    Args:
        config: the run.
        model: images [N, 3, H, W] -> logits, or what `segadv.attacks.base.model_logits` finds them in.
            Trained in place, and moved to the device.
        dataset: ``dataset[i]`` is (image float32 [3, H, W] in [0, 1], label uint8 [H, W]), with a length.
        validation_dataset: the same, for config.validation.
        description: plain values (fit for JSON) that say what model and dataset are; written to checkpoints and
            compared when one is continued.

    Attributes:
        steps_done: number of steps taken so far.
        stopped_at: the step after which an early stop ended the training, or None. The weights are then those
            of the probe before.

    Raises:
        ValueError: a device that does not exist here, fp16 without CUDA, fewer samples than one batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        dataset: Dataset[tuple[Tensor, Tensor]],
        *,
        validation_dataset: Dataset[tuple[Tensor, Tensor]] | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.description = json.loads(json.dumps(description or {}))  # plain values, as they come back from a file
        self.device = _resolve_device(config.device)
        cuda = self.device.type == "cuda"
        if config.precision == "fp16" and not cuda:
            raise ValueError(f'precision "fp16" needs a CUDA device, got {str(self.device)!r}; use "fp32" or "bf16"')
        self.dataset_length = len(dataset)  # type: ignore[arg-type]
        if self.dataset_length < config.batch_size:
            raise ValueError(f"dataset must hold at least one batch of {config.batch_size}, got {self.dataset_length}")
        self.model = model.to(self.device)
        self.dataset = Augmented(dataset, crop=config.crop, seed=config.seed, augmentation=config.augmentation)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=cuda,  # takes the scaler's overflow flag on the device; the other kinds wait for it
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.generator = torch.Generator(self.device)
        self.attack = ARMS[config.arm](model, self.generator)
        self.steps_done = 0
        self.stopped_at: int | None = None
        self._probes: list[dict[str, float]] = []
        self._probed_weights: dict[str, Tensor] = {}  # of the last probe, for an early stop
        self._probe_batch: tuple[Tensor, Tensor] | None = None
        self._window: list[StepResult] = []  # the steps since the last line of metrics
        self._clock = (0, 0.0)  # steps done and time when the time of the steps was last read
        self._warned = False

    def step(self, images: Tensor, labels: Tensor, chosen: Sequence[int]) -> StepResult:
        """One whole training step on a batch in memory; on a GPU it is only queued, nothing waits for it.

        All random numbers of a step (attack, dropout) come from seeds that belong to (config.seed, step),
        which is why no random state needs to be saved. It seeds PyTorch's global generator.

        Args:
            images: [N, 3, H, W] in [0, 1]; left as they are.
            labels: [N, H, W].
            chosen: positions in the batch to be made adversarial; the basic arm ignores them.
        """
        config = self.config
        sequence = np.random.SeedSequence(config.seed, spawn_key=(_STEP, self.steps_done))
        model_seed, attack_seed = sequence.generate_state(2, np.uint64).tolist()
        torch.manual_seed(model_seed)
        self.generator.manual_seed(attack_seed)
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        eps = gain = images.new_empty(0)
        skipped = eps.bool()
        self.model.train()
        with torch.autocast(self.device.type, dtype=_AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            if self.attack is not None and len(chosen) > 0:
                pinned = torch.tensor(chosen, pin_memory=self.device.type == "cuda")
                index = pinned.to(self.device, non_blocking=True)
                clean = images[index]
                adversarial, info = self.attack(clean, labels[index], return_info=True)
                images = images.index_copy(0, index, adversarial)
                eps = info.eps
                gain = gain if info.gain is None else info.gain
                skipped = (adversarial == clean).flatten(1).all(1)
            logits = model_logits(self.model(images), None)
            loss = functional.cross_entropy(logits, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.steps_done)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps_done += 1
        return StepResult(loss.detach(), eps, gain, skipped)

    def run(self, out_dir: str | os.PathLike[str], *, progress: bool = True) -> None:
        """Trains up to config.steps, or on from ``out_dir/last.pt`` where that exists.

        Writes to out_dir: ``last.pt``, the checkpoint, complete and replaced in one go; ``metrics.jsonl``,
        one JSON object every config.log_every steps, about the steps since the line before: step (number of
        steps done), epoch, loss (mean), learning_rate (of the last step), share_adversarial (of all samples),
        and of the attacked ones eps_median, eps_p10, eps_p90, share_negative_gain (Fast Newton),
        share_skipped (left as they were), each null where there is none; steps_per_s. Every
        config.monitor_every steps it also has what `segadv.monitor.probe` finds on eight fixed training images;
        a RuntimeWarning tells of catastrophic overfitting. The arm rs-fgsm stops early, with the weights of the
        probe before, when PGD accuracy drops by more than 0.2 between two probes.

        On the CPU, with an equal number of threads, a resumed run gives the same bits as one that was never
        interrupted. Ctrl-C ends the step that is running, writes a checkpoint and raises KeyboardInterrupt.

        Args:
            progress: show a progress bar, where the standard error stream is a terminal.

        Raises:
            ValueError: last.pt belongs to another config, data set length or architecture, or cannot be read.
            FloatingPointError: the loss is not finite. The last checkpoint is from before that.
        """
        config = self.config
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint, metrics_path = out_dir / "last.pt", out_dir / "metrics.jsonl"
        if checkpoint.exists():
            self.load(checkpoint)
        _drop_lines_after(metrics_path, self.steps_done)
        if self.steps_done >= config.steps or self.stopped_at is not None:
            return
        sampler = EpochSampler(
            self.dataset_length,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.steps_done,
            steps=config.steps,
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        with _progress_bar(config, self.steps_done, progress) as bar, open(metrics_path, "a") as metrics_file:
            self._clock = (self.steps_done, time.perf_counter())
            try:
                for images, labels, indices in loader:
                    with _interrupts_held():
                        epoch = self.steps_done // sampler.batches_per_epoch
                        coins = adversarial_coins(config.seed, epoch, self.dataset_length, config.adversarial_share)
                        chosen = np.flatnonzero(coins[indices.numpy()]).tolist()
                        self._window.append(self.step(images, labels, chosen))
                        last = self.steps_done == config.steps
                        due = config.monitor_every > 0 and self.steps_done % config.monitor_every == 0
                        if last or due or self.steps_done % config.log_every == 0:
                            metrics = self._take_metrics(epoch)
                            if due:
                                metrics |= self._take_probe()
                            metrics_file.write(json.dumps(metrics) + "\n")
                            metrics_file.flush()
                            bar.set_postfix_str(_summary(metrics), refresh=False)
                        if last or self.stopped_at or self.steps_done % config.checkpoint_every == 0:
                            self.save(checkpoint)
                    bar.update()
                    if self.stopped_at:
                        break
            except KeyboardInterrupt:
                self.save(checkpoint)
                raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint; at any moment, `path` is the previous one or the new one, each whole.

        It holds tensors and plain values only: ``torch.load(path, weights_only=True)`` reads it.
        """
        self._check_finite()
        state = {
            "config": self._identity(),
            "steps_done": self.steps_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "probes": self._probes,
            "probed_weights": self._probed_weights,
            "stopped_at": self.stopped_at,
            "window": [dataclasses.asdict(result) for result in self._window],
        }
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint of `save`.

        Raises:
            ValueError: it belongs to another config, data set length or architecture, or cannot be read;
                nothing is changed then.
        """
        state = _read_checkpoint(path)
        saved, ours = state["config"], self._identity()
        # where the probes decide when to stop, their number is part of the run
        free = _FREE_TO_CHANGE - {"monitor_every"} if self.config.arm in _EARLY_STOP else _FREE_TO_CHANGE
        differing = [
            f"{key} ({saved.get(key)!r} there, {ours.get(key)!r} here)"
            for key in sorted(saved.keys() | ours.keys())
            if key not in free and saved.get(key) != ours.get(key)
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to another run, it differs in {', '.join(differing)}: "
                "give another output folder, or remove the file to start anew"
            )
        _load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]
        self._probes = state.get("probes", [])
        self._probed_weights = state.get("probed_weights", {})
        self.stopped_at = state.get("stopped_at")
        self._window = [
            StepResult(**{name: value.to(self.device) for name, value in result.items()}) for result in state["window"]
        ]

    def _identity(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.config),
            "dataset_length": self.dataset_length,
            "description": self.description,
        }

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return poly_learning_rate(step, steps=config.steps, learning_rate=config.learning_rate, power=config.power)

    def _check_finite(self) -> Tensor:
        """The losses of the window, on the CPU; FloatingPointError where one is not finite."""
        if not self._window:
            return torch.empty(0)
        losses = torch.stack([result.loss for result in self._window]).cpu()
        for position in (~losses.isfinite()).nonzero().flatten().tolist():
            step = self.steps_done - len(losses) + position
            raise FloatingPointError(
                f"the loss is {losses[position].item()} at step {step} (counted from 0), "
                f"learning rate {self._learning_rate(step):.3g}: a lower one or another precision may help; "
                "on a GPU a label out of range does this too (SEGADV_CHECK=1 names it)"
            )
        return losses

    def _take_metrics(self, epoch: int) -> dict[str, Any]:
        """The next line of metrics.jsonl. Waits for the device, once per window."""
        losses = self._check_finite()
        eps, gain, skipped = (
            torch.cat([getattr(result, name) for result in self._window]).double().cpu()
            for name in ("eps", "gain", "skipped")
        )
        p10, median, p90 = np.quantile(eps.numpy(), [0.1, 0.5, 0.9]).tolist() if len(eps) else [None] * 3
        share_skipped = _mean(skipped)
        if share_skipped is not None and share_skipped > 0.01 and not self._warned:
            self._warned = True
            warnings.warn(
                f"the attack left {share_skipped:.1%} of its images as they were in the steps up to "
                f"{self.steps_done}: no labelled pixel, or a gain or gradient that is 0, infinite or NaN "
                '(with precision "fp16" that is an overflow; "bf16" has none)',
                RuntimeWarning,
                stacklevel=2,
            )
        self._window = []
        last_read, self._clock = self._clock, (self.steps_done, time.perf_counter())
        return {
            "step": self.steps_done,
            "epoch": epoch,
            "loss": _mean(losses),
            "learning_rate": self._learning_rate(self.steps_done - 1),
            "share_adversarial": len(eps) / (len(losses) * self.config.batch_size),
            "eps_median": median,
            "eps_p10": p10,
            "eps_p90": p90,
            "share_negative_gain": _mean(gain < 0),
            "share_skipped": share_skipped,
            "steps_per_s": (self._clock[0] - last_read[0]) / (self._clock[1] - last_read[1]),
        }

    def _take_probe(self) -> dict[str, float]:
        """Looks for catastrophic overfitting; warns of it, or ends the training of an arm that stops early."""
        config = self.config
        if self._probe_batch is None:
            count = min(_PROBE_IMAGES, self.dataset_length)
            samples = [self.dataset[0, index] for index in range(count)]
            images, labels = (torch.stack(tensors) for tensors in list(zip(*samples, strict=True))[:2])
            self._probe_batch = images.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, dtype=_AUTOCAST[config.precision], enabled=config.precision != "fp32"):
            found = probe(self.model, *self._probe_batch)
        before = self._probes[-1] if self._probes else found
        warned = any(catastrophic_overfitting(self._probes[: i + 1]) for i in range(len(self._probes)))
        self._probes.append(found)
        drop = before["pgd_accuracy"] - found["pgd_accuracy"]
        if drop > _EARLY_STOP.get(config.arm, math.inf):
            self.stopped_at = self.steps_done
            self.model.load_state_dict(self._probed_weights)
            warnings.warn(
                f"{config.arm} stops after {self.steps_done} of {config.steps} steps: the accuracy under PGD fell "
                f"from {before['pgd_accuracy']:.3f} to {found['pgd_accuracy']:.3f}; the weights are those of before",
                RuntimeWarning,
                stacklevel=3,
            )
        elif catastrophic_overfitting(self._probes) and not warned:
            warnings.warn(
                f"catastrophic overfitting: after {self.steps_done} steps the accuracy on {_PROBE_IMAGES} training "
                f"images is {found['pgd_accuracy']:.3f} under PGD and {found['fgsm_accuracy']:.3f} under FGSM: the "
                "network has learnt to withstand a single step only. An arm with several steps (segpgd-3), n-fgsm "
                "or an earlier checkpoint may help",
                RuntimeWarning,
                stacklevel=3,
            )
        if config.arm in _EARLY_STOP:
            self._probed_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._clock = (self.steps_done, time.perf_counter())  # the probe is no training
        return found


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None


def load_model(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Puts the weights of a checkpoint (``last.pt``) into a model of the same architecture, and returns it.

    Raises:
        ValueError: the checkpoint belongs to another architecture, or cannot be read; the model is unchanged
            then.
        FileNotFoundError: there is no such file.
    """
    _load_weights(model, _read_checkpoint(path)["model"], path)
    return model


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config a checkpoint was trained with, "dataset_length" and "description". Raises as `load_model`."""
    config: dict[str, Any] = _read_checkpoint(path)["config"]
    return config


def _read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    cause: Exception | None = None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and {"config", "model", "steps_done"} <= state.keys():
            return state
        problem = "it holds something else"
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {os.fspath(path)!r} does not exist") from error
    except Exception as error:  # whatever a damaged file makes the unpickler raise; its advice would mislead
        problem, cause = "it is damaged or something else", error
    raise ValueError(f"{path} cannot be read as a checkpoint of segadv (last.pt): {problem}") from cause


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    # compared before anything is copied: load_state_dict raises with the model half overwritten
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: list(value.shape) for name, value in weights.items()}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} in the model"
            for name in differing[:3]
        )
        raise ValueError(
            f"{path} belongs to another architecture: {len(differing)} of {len(ours)} tensors differ: {shown}"
        )
    model.load_state_dict(weights)


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto" or a name that torch.device takes, got {name!r}') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of the steps up to `step`: those after the checkpoint will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line a kill cut short
            break
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block has ended, so that no state is saved from the middle of a step."""
    if threading.current_thread() is not threading.main_thread():  # only there do signals arrive
        yield
        return
    received = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)


def _progress_bar(config: TrainConfig, steps_done: int, progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install tqdm") from error
    # None: shown on a terminal only, so that log files stay readable
    return tqdm(
        desc=config.arm,
        total=config.steps,
        initial=steps_done,
        unit="step",
        disable=None if progress else True,
    )


def _summary(metrics: Mapping[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.3f}", f"adversarial {metrics['share_adversarial']:.0%}"]
    if metrics["eps_median"] is not None:
        parts.append(f"median eps {metrics['eps_median']:.4f}")
    return ", ".join(parts)
