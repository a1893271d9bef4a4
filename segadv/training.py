"""Adversarial training: plain PyTorch, seeded, resumable to the same bits.

The training of Wiens & Hammer 2022 (doi 10.5220/0010788400003122), section 4.1: each sample of a batch is
made adversarial with probability 0.5, the attack sees those samples only, and the network learns from clean
and adversarial samples together. SegPGD's training (Gu et al. 2022, arXiv 2207.12391, algorithm 2) is the same with
exactly half of each batch; here the coins decide, as for all arms, so that all see the same samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import operator
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from . import distributed, functional
from .attacks.frozen import explain_float64, model_logits
from .checkpoints import (
    check_weights,
    load_model,
    read_checkpoint,
    read_config,
    require_loadable,
    share,
    write_checkpoint,
)
from .checks import a_module, levels_to_the_caller
from .data import DATASETS, IGNORE_INDEX, Augmented, EpochSampler
from .data.checked import checked
from .data.loader import Loader, require_one_size, stack
from .data.sampler import STEP
from .evaluation import EvaluationResult, evaluate, seed_generators
from .interrupts import Interrupts
from .models import sync_batchnorm
from .monitor import catastrophic_overfitting, probe
from .progress import progress_bar
from .results import csv_text
from .run_directory import RunDirectory
from .train_config import (
    ARMS,
    EARLY_STOP,
    PRECISIONS,
    TrainConfig,
    Validation,
    adversarial_coins,
    flat,
    poly_learning_rate,
)
from .writing import write_text

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

_PROBE_IMAGES = 8

# a resumed run may differ in these: they change no number, or (device) are the user's to move
FREE_TO_CHANGE = {
    "workers", "device", "log_every", "checkpoint_every", "monitor_every", "validation", "allow_other_split",
}  # fmt: skip

# how a batch is divided: another way gives the same run up to rounding and random numbers, see allow_other_split
_SPLIT = {"processes", "accumulation"}

_STEPS_TO_STOP = 2
"""From Ctrl-C in one of several processes to the stop of all: what they told so long ago is there without waiting."""


_coins = functools.lru_cache(maxsize=2)(adversarial_coins)  # two epochs: the loader is some batches ahead


@dataclass(frozen=True)
class StepResult:
    """What one step measured, on the training device (reading it waits for the device).

    Attributes:
        loss: [], of the whole batch; with several processes each has the part of its share, and the parts add up.
        eps: [K], step size for each of the K attacked samples.
        gain: [K], averaged gain of the clean images where the attack computes it (Fast Newton), otherwise
            [0].
        skipped: bool [K], whether the attack left the image as it was. With a random start (pgd, segpgd,
            rs-fgsm, n-fgsm) that happens only without a valid pixel: without a usable gradient the noise stays.
    """

    loss: Tensor
    eps: Tensor
    gain: Tensor
    skipped: Tensor


class Trainer:
    """Trains a model with one arm, in one process or, inside `segadv.distributed.process_group`, in several.

    Every process gets its share of the same batches, gradients are averaged (DistributedDataParallel) so that each
    step is that of one process with the whole batch, and all processes have the same weights at any time. Batch
    normalisation is synchronised on GPUs; on the CPU, where PyTorch cannot do that, each process takes the
    statistics of its share and the running ones are averaged. With `TrainConfig.accumulation` the statistics are
    those of a part. Only the first process writes files. With several processes the loss has to reach every parameter
    that requires a gradient: freeze or remove what the logits do not depend on, such as an auxiliary head.

    Args:
        config: the run.
        model: images [N, 3, H, W] -> logits, or what `segadv.attacks.frozen.model_logits` finds them in.
            Trained in place, and moved to the device. The loss is the cross-entropy of these logits alone: a
            UserWarning names a parameter that it does not reach, such as an auxiliary head's.
        dataset: ``dataset[i]`` is (image float32 [3, H, W] in [0, 1], label uint8 [H, W]), with a length. Where
            it has num_classes, labels are checked against it when read; where it has image_paths, errors name them.
        validation_dataset: the same, for config.validation.
        description: plain values (fit for JSON) that say what model and dataset are; written to checkpoints, and
            compared when a run continues.

    Attributes:
        steps_done: number of steps taken so far.
        stopped_at: the step after which an early stop ended the training, or None. The weights are then those
            of the probe before.

    Raises:
        TypeError: a model that is no nn.Module, or is compiled; a DataLoader in place of a data set, or a data set
            without a length; a config with values that JSON does not know, such as NumPy's float32.
        ValueError: a device that does not exist here; fp16 without CUDA; fewer samples than one batch; a batch that
            cannot be divided among the processes and parts; validation without a data set; a model that is frozen as a
            whole, or whose state is not all tensors.
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
        _require_types(config, model, dataset, validation_dataset)
        self.config = config
        self.description = json.loads(json.dumps(description or {}))  # plain values, as they come back from a file
        self.device = resolve_device(config.device)
        self.processes = distributed.world_size()
        self.dataset_length = len(dataset)  # type: ignore[arg-type]
        self._require_trainable(model, validation_dataset)
        cuda = self.device.type == "cuda"
        self.dataset = Augmented(
            self._checked(dataset), crop=config.crop, seed=config.seed, augmentation=config.augmentation
        )
        self.validation_dataset = validation_dataset
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device)
        require_loadable(self.model)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.processes > 1 and cuda:
            self.model = sync_batchnorm(self.model)
        attacked: Any = torch.compile(self.model) if config.compile else self.model
        self._network: nn.Module = attacked
        if self.processes > 1:
            self._network = distributed.averaging_gradients(attacked)
        self._own_statistics = _running_statistics(self.model) if self.processes > 1 and not cuda else []
        # fused takes the scaler's overflow flag on the device; the other kinds wait for it
        self.optimizer = _sgd(self.model, config, fused=cuda)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.generator = torch.Generator(self.device)
        self.attack = ARMS[config.arm](attacked, config.eps, self.generator)
        self.steps_done = 0
        self.stopped_at: int | None = None
        self._probes: list[dict[str, float]] = []
        self._probed_weights: dict[str, Tensor] = {}  # of the last probe, for an early stop
        self._probe_batch: tuple[Tensor, Tensor] | None = None
        # the steps since the last line of metrics: of all processes, and of this one since they were last gathered
        self._window: list[StepResult] = []
        self._own_window: list[StepResult] = []
        # Ctrl-C in this process, and, while several agree on where to stop, how often it was pressed in all of them in
        # the last steps, the oldest first
        self._interrupts = Interrupts()
        self._interrupts_told: deque[_Told] = deque(maxlen=_STEPS_TO_STOP + 1)
        self._clock = (0, 0.0)  # steps done and time when the time of the steps was last read
        self._warned = False
        self._looked_for_gradients = False

    def _require_trainable(self, model: nn.Module, validation_dataset: Dataset[tuple[Tensor, Tensor]] | None) -> None:
        """What would fail later, after hours of training for some of it."""
        config = self.config
        if config.precision == "fp16" and self.device.type != "cuda":
            raise ValueError(f'precision "fp16" needs a CUDA device, got {str(self.device)!r}; use "fp32" or "bf16"')
        if self.processes != distributed.started():
            raise ValueError(
                f"torchrun started {distributed.started()} processes, but the process group has {self.processes}: "
                "make and run the Trainer inside of segadv.distributed.process_group()"
            )
        if self.dataset_length < config.batch_size:
            raise ValueError(
                f"dataset must hold at least one batch, batch_size = {config.batch_size}, got {self.dataset_length}"
            )
        if config.validation.every and (validation_dataset is None or len(validation_dataset) == 0):  # type: ignore[arg-type]
            raise ValueError("validation.every needs a validation_dataset that is not empty")
        # what would fail then; a sub-class may make pixels of one size of all files
        own = type(validation_dataset) in DATASETS.values()
        if own and config.validation.every and config.validation.batch_size > 1:
            require_one_size(validation_dataset.image_paths[: config.validation.images or None])  # type: ignore[union-attr]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model must have a parameter that requires a gradient: there is nothing to train")
        # what would fail after the training, when files are written
        if strange := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
            raise ValueError(f"model must hold nothing but tensors in its state_dict(), got others in {strange[:3]}")
        try:
            self._identity()
        except TypeError as error:
            raise TypeError(f"config must hold plain numbers and strings: {error}") from error
        self._batches(start_step=0)  # raises where the batch cannot be divided
        part = config.batch_size // (self.processes * config.accumulation)
        # a layer frozen in eval mode takes none; a model in eval mode as a whole is put into train mode
        takes_statistics = any(
            isinstance(m, _BatchNorm) and (m.training or not model.training) for m in model.modules()
        )
        if part < 2 and not (self.device.type == "cuda" and self.processes > 1) and takes_statistics:
            raise ValueError(
                f"batch_size {config.batch_size} leaves one image to each of {self.processes} processes and "
                f"{config.accumulation} accumulated parts, and the model's batch normalisation needs at least two"
            )

    def _checked(self, dataset: Dataset[tuple[Tensor, Tensor]]) -> Dataset[tuple[Tensor, Tensor]]:
        return checked(dataset, self.description.get("num_classes"))

    # --- one step -------------------------------------------------------------------------------------------

    def step(self, images: Tensor, labels: Tensor, chosen: Sequence[int]) -> StepResult:
        """One whole training step on a batch in memory; on a GPU it is only queued, nothing waits for it.

        The loss is the mean over the valid pixels of the whole batch: of all processes and all parts. All random
        numbers of a step (attack, dropout) come from seeds that belong to (config.seed, step, part of the batch),
        so no random state needs to be saved. A step seeds PyTorch's global generator: two trainers in two threads of
        one process disturb one another.

        Args:
            images: [N, 3, H, W] in [0, 1], this process's share of the batch; left as they are. Parts are equal
                slices, one after the other.
            labels: [N, H, W].
            chosen: positions in the share to be made adversarial; the basic arm ignores them. In each part the network
                sees these samples first, then the others, both in the order of the batch.

        Raises:
            ValueError: chosen holds something that is no position in the batch, or a position twice; a batch that
                cannot be split into equal parts; float64 images that the model does not take.
            TypeError: chosen is a mask, or holds something that is no whole number.
        """
        size, chosen = self._part_size(len(images)), list(chosen)
        if any(getattr(entry, "dtype", type(entry)) in (bool, np.bool_, torch.bool) for entry in chosen):
            raise TypeError("chosen must hold positions, got True or False; mask.nonzero().flatten() gives a mask's")
        chosen = [operator.index(position) for position in chosen]  # those of a tensor, too
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(images))):
            raise ValueError(f"chosen must hold different positions from 0 to {len(images) - 1}, got {chosen}")
        order = sorted(range(len(images)), key=lambda i: (i // size, i not in chosen))
        index = torch.tensor(order, device="cpu", pin_memory=images.is_cuda).to(images.device, non_blocking=True)
        return self.step_in_place(
            images[index].to(self.device, non_blocking=True, memory_format=self._memory_format),
            labels[index.to(labels.device)].to(self.device, non_blocking=True),
            [sum(i // size == part for i in chosen) for part in range(self.config.accumulation)],
        )

    def _part_size(self, images: int) -> int:
        size, rest = divmod(images, self.config.accumulation)
        if rest:
            raise ValueError(f"images must be divisible into {self.config.accumulation} equal parts, got {images}")
        return size

    def step_in_place(self, images: Tensor, labels: Tensor, chosen: Sequence[int]) -> StepResult:
        """`step` with images and labels on the training device, and the chosen images in front: nothing is copied.

        Args:
            images: as for `step`; the chosen ones are overwritten by the adversarial ones.
            labels: [N, H, W].
            chosen: of each part, how many of its first images are made adversarial.
        """
        config = self.config
        divided = self.processes * config.accumulation > 1
        pixels = None
        if divided:
            valid = (labels != IGNORE_INDEX).sum()
            told = distributed.add_up(torch.stack([valid, torch.full_like(valid, self._interrupts.received)]))
            pixels = told[0].clamp(min=1)
            if self.processes > 1:
                self._interrupts_told.append(_Told(told[1]))
        if not self.model.training:  # a layer that someone froze in eval mode stays there
            self.model.train()
        self.optimizer.zero_grad()
        results = []
        size = self._part_size(len(images))
        for part in range(config.accumulation):
            own = slice(part * size, (part + 1) * size)
            self._seed(part)
            last = part == config.accumulation - 1
            try:
                with contextlib.nullcontext() if last or self.processes == 1 else self._network.no_sync():  # type: ignore[operator]
                    results.append(self._accumulate(images[own], labels[own], chosen[part], pixels))
            except RuntimeError as error:
                explain_float64(error, self.model, images)
                raise
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.steps_done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average_statistics()
        self.steps_done += 1
        return (
            results[0]
            if len(results) == 1
            else StepResult(
                sum((result.loss for result in results[1:]), results[0].loss),
                *(torch.cat([getattr(result, name) for result in results]) for name in ("eps", "gain", "skipped")),
            )
        )

    def _seed(self, part: int) -> None:
        number = part * self.processes + distributed.rank()
        key = (STEP, self.steps_done, number) if number else (STEP, self.steps_done)
        model_seed, attack_seed = np.random.SeedSequence(self.config.seed, spawn_key=key).generate_state(2, np.uint64)
        seed_generators(self.device, int(model_seed))
        self.generator.manual_seed(int(attack_seed))

    def _accumulate(self, images: Tensor, labels: Tensor, chosen: int, pixels: Tensor | None) -> StepResult:
        """Adds the gradient of a part of the batch; pixels: [] valid ones of the whole batch, None: of the images."""
        with self._autocast():
            if self.attack is None or not chosen:
                eps = gain = images.new_empty(0)
                skipped = eps.bool()
            else:
                clean = images[:chosen]
                adversarial, info = self.attack(clean, labels[:chosen], return_info=True)
                eps = info.eps
                gain = eps[:0] if info.gain is None else info.gain
                # in place: on the CPU fresh memory costs more than the comparison
                skipped = clean.eq_(adversarial).amin((1, 2, 3)).bool()
                clean.copy_(adversarial)
            logits = model_logits(self._network(images))
            if logits.shape[1] > IGNORE_INDEX:  # a class would silently be left out
                raise ValueError(
                    f"model: it has {logits.shape[1]} classes; at most {IGNORE_INDEX} can be trained here, because "
                    f"pixels with the label {IGNORE_INDEX} are ignored"
                )
            if pixels is None:
                loss = own_loss = functional.cross_entropy(logits, labels)
            else:
                own_loss = functional.cross_entropy(logits, labels, reduction="sum") / pixels
                loss = own_loss * self.processes  # whose gradients DistributedDataParallel averages
        self.scaler.scale(loss).backward()
        if not self._looked_for_gradients:
            self._looked_for_gradients = True
            self._tell_untrained()
        return StepResult(own_loss.detach(), eps, gain, skipped)

    def _tell_untrained(self) -> None:
        without = [name for name, value in self.model.named_parameters() if value.requires_grad and value.grad is None]
        if without and distributed.rank() == 0:
            warnings.warn(
                f"model: {len(without)} of its parameters, such as {without[0]}, got no gradient in the first step and "
                "stay as they are: the loss is that of the logits alone, without auxiliary heads",
                stacklevel=levels_to_the_caller(),
            )

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")

    def _average_statistics(self) -> None:
        if self._own_statistics:
            flat = torch.cat([statistic.flatten() for statistic in self._own_statistics])
            averages = (distributed.add_up(flat) / self.processes).split([s.numel() for s in self._own_statistics])
            for statistic, average in zip(self._own_statistics, averages, strict=True):
                statistic.copy_(average.view_as(statistic))

    # --- the run --------------------------------------------------------------------------------------------

    def run(self, out_dir: str | os.PathLike[str], *, progress: bool = True) -> None:
        """Trains for config.steps steps, or resumes from ``out_dir/last.pt`` if that exists: its weights then replace
        the model's, and if that run was finished nothing is trained.

        Writes to out_dir, each file replaced in one go or appended to:

        * ``last.pt``, the whole checkpoint; in the end also ``model.safetensors``, the weights to be shared.
        * ``metrics.jsonl``, one JSON object every config.log_every steps, about the steps since the line before:
          step (number of steps done), epoch, loss (mean), learning_rate (of the last step), adversarial_share (of
          all samples), and of the attacked ones eps_median, eps_p10, eps_p90, share_negative_gain (Fast Newton),
          share_skipped (`StepResult.skipped`), each null where there is none; steps_per_s. Every
          config.monitor_every steps it also has what `segadv.monitor.probe` finds on eight fixed training images; a
          RuntimeWarning tells of catastrophic overfitting. The arm rs-fgsm stops early, with the weights of the
          probe before, when PGD accuracy drops by more than 0.2 between two probes.
        * ``validation.jsonl``, one JSON object every config.validation.every steps: step, and rows as
          `segadv.evaluation.EvaluationResult.rows`; ``curves.csv``, the last of them; where matplotlib is installed
          ``training.png`` and ``robustness.png`` of all that so far.
        * ``run.json``: see `segadv.run_directory.RunDirectory`.

        On the CPU, with an equal number of threads, a resumed run gives the same bits as one that was never
        interrupted, wherever it was killed; so does a run of two processes (of more: to rounding, because the order in
        which their gradients are added up differs from run to run). Ctrl-C finishes the current step, or batch of a
        validation, writes a checkpoint and raises KeyboardInterrupt; a validation that was cut short is made when the
        run continues. Several processes stop together two steps later; a validation that is running is finished before.
        SIGTERM does the same where it is handled as Ctrl-C (`signal.default_int_handler`), as the command line does.
        (torchrun kills processes after 30 s. A validation, or a GPU that waits for a process that has ended, may take
        longer; then the run continues from the last checkpoint, made before that validation.)

        Args:
            progress: show a progress bar, or a line per minute where the standard error stream is no terminal. A line
                tells if the run was already finished.

        Raises:
            ValueError: last.pt belongs to another config, data set length or architecture, or cannot be read; or
                another process is training in out_dir.
            OSError: a file cannot be written, because the disk is full for example. The last checkpoint is whole.
            FloatingPointError: the loss, or a weight, is not finite. The last checkpoint is from before that.
            RuntimeError: another process of the group ended.
        """
        directory = RunDirectory(out_dir)
        with (
            contextlib.closing(directory),
            distributed.explained(f"the same command continues from {directory.checkpoint}"),
        ):
            continues = distributed.from_first(directory.prepare)
            if continues:
                self.load(directory.checkpoint)
                if progress and self._ends() and distributed.rank() == 0:
                    print(f"{directory.checkpoint}: already finished; loaded its weights", file=sys.stderr)
            elif self.steps_done and distributed.from_first(lambda: directory.is_of_another(self._identity())):
                distributed.from_first(directory.clear)  # these steps were taken elsewhere
            distributed.from_first(lambda: directory.drop_after(self.steps_done))
            trains = not self._ends()
            if trains:
                distributed.from_first(lambda: directory.start(self._identity(), self.steps_done, self.device))
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._interrupts)
                if self.processes > 1:  # they stop together
                    stack.enter_context(self._interrupts.held())
                if continues and self.steps_done:
                    self._validate_if_due(directory)
                if trains:
                    self._train(directory, progress)
            if distributed.from_first(lambda: not directory.checkpoint.exists()):  # trained before, elsewhere
                self.save(directory.checkpoint)
            if distributed.from_first(lambda: not directory.model.exists()):
                distributed.from_first(lambda: self._share(directory))

    def _share(self, directory: RunDirectory) -> None:
        config = read_checkpoint(directory.checkpoint)["config"]  # of those processes that trained
        share(directory.model, self.model, config, self.steps_done)

    def _train(self, directory: RunDirectory, progress: bool) -> None:
        config = self.config
        sampler = self._batches(start_step=self.steps_done)
        loader = Loader(
            self.dataset,
            batch_sampler=self._chosen_first(sampler),
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        alone = self.processes == 1
        self._interrupts_told.clear()  # what was told before this run has ended another
        show = progress and distributed.rank() == 0
        bar = progress_bar(config.arm, total=config.steps, initial=self.steps_done, unit="step", show=show)
        with bar:
            self._clock = (self.steps_done, time.perf_counter())
            try:
                for images, labels, indices in loader:
                    with self._interrupts.held():
                        epoch = self.steps_done // sampler.batches_per_epoch
                        coins = _coins(config.seed, epoch, self.dataset_length, config.adversarial_share)
                        chosen = coins[indices.numpy()].reshape(config.accumulation, -1).sum(1).tolist()
                        images = images.to(self.device, non_blocking=True, memory_format=self._memory_format)
                        labels = labels.to(self.device, non_blocking=True)
                        self._own_window.append(self.step_in_place(images, labels, chosen))
                        self._write(directory, epoch, bar)
                        self._validate_if_due(directory)
                    bar.update()
                    if self.stopped_at:
                        break
                # what was pressed in the last steps has not been told yet; what follows is done by all together
                if not alone and distributed.add_up(torch.tensor(self._interrupts.received, device=self.device)).item():
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                if alone:
                    self.save(directory.checkpoint)
                raise

    def _write(self, directory: RunDirectory, epoch: int, bar: Any) -> None:
        """What is due after a step, but for the validation: metrics, probe, checkpoint."""
        config, first = self.config, distributed.rank() == 0
        last = self.steps_done == config.steps
        probed = self._due(config.monitor_every)
        interrupted = self._is_interrupted()
        if last or probed or self._due(config.log_every):
            self._gather_window()
            metrics = self._take_metrics(epoch)
            if probed:
                metrics |= self._take_probe()
            if first:
                directory.append(directory.metrics, metrics)
            bar.set_postfix_str(_summary(metrics), refresh=False)
        if interrupted or self._due(config.checkpoint_every) or self._ends() or self._is_validation_due():
            self.save(directory.checkpoint)
        if interrupted:
            raise KeyboardInterrupt

    def _validate_if_due(self, directory: RunDirectory) -> None:
        """But not a second time. The checkpoint is from before it: one that is interrupted is made when the run goes
        on."""
        if not self._is_validation_due() or distributed.from_first(lambda: directory.is_validated(self.steps_done)):
            return
        started = time.perf_counter()
        with self._interrupts.held():
            result = self._validate()
            if distributed.rank() == 0:
                curves = EvaluationResult.merge({self.config.arm: result})
                write_text(directory.curves, csv_text(curves.rows), of_run=True)
                directory.draw(f"trained with {self.config.arm}")
                directory.append(directory.validation, {"step": self.steps_done, "rows": result.rows})
        steps, clock = self._clock
        self._clock = (steps, clock + time.perf_counter() - started)  # it is no training: see steps_per_s

    def _is_validation_due(self) -> bool:
        every = self.config.validation.every
        return self._due(every) or (every > 0 and self._ends())

    def _ends(self) -> bool:
        return self.steps_done >= self.config.steps or self.stopped_at is not None

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    def _batches(self, start_step: int) -> EpochSampler:
        config = self.config
        return EpochSampler(
            self.dataset_length,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            steps=config.steps,
            rank=distributed.rank(),
            processes=self.processes,
            accumulation=config.accumulation,
        )

    def _chosen_first(self, sampler: EpochSampler) -> Iterator[list[tuple[int, int]]]:
        """The sampler's batches, of each part the chosen first: then they are a view of the batch, not a copy."""
        config = self.config
        size = config.batch_size // (self.processes * config.accumulation)
        for keys in sampler:
            coins = _coins(config.seed, keys[0][0], self.dataset_length, config.adversarial_share)
            parts = (keys[start : start + size] for start in range(0, len(keys), size))
            yield [key for part in parts for key in sorted(part, key=lambda key: not coins[key[1]])]

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint; at any moment, `path` is the whole previous one or the whole new one.

        It holds tensors and plain values only: ``torch.load(path, weights_only=True)`` reads it. With several
        processes each has to make the call.

        Raises:
            OSError: it cannot be written.
            FloatingPointError: a loss since the last line of metrics, a trained weight or a running statistic is not
                finite.
        """
        self._gather_window()
        self._check_finite()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        finite = [value.isfinite().all() for value in (*trained, *_running_statistics(self.model))]
        if finite and not bool(torch.stack(finite).all()):
            raise FloatingPointError(
                f"weights or running statistics are not finite after {self.steps_done} steps, learning rate "
                f"{self._learning_rate(self.steps_done - 1):.3g}: a lower one or another precision may help"
            )
        distributed.from_first(lambda: write_checkpoint(Path(path), self._state()))

    def _state(self) -> dict[str, Any]:
        return {
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

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint of `save`. With several processes the first reads it; each has to make the call.

        Raises:
            ValueError: it belongs to another config, description, data set length, architecture or number of
                processes, or cannot be read; nothing is changed then.
        """

        def read() -> dict[str, Any]:
            try:
                return read_checkpoint(path)
            except ValueError as error:
                raise ValueError(f"{error}; restore it, or remove it to start anew") from error

        state = distributed.from_first(read)
        if "optimizer" not in state:
            raise ValueError(f"{path} holds weights only; to continue a run its last.pt is needed")
        if missing := [name for name in self._state() if name not in state]:
            raise ValueError(f"{path} is no complete checkpoint, it lacks {', '.join(missing)}")
        is_over = state["steps_done"] >= self.config.steps or state["stopped_at"] is not None
        self._check_identity(state["config"], path, is_over=is_over)
        sizes = [
            [len(group["params"]) for group in groups]
            for groups in (state["optimizer"]["param_groups"], self.optimizer.param_groups)
        ]
        check_weights(self.model, state["model"], path)
        if sizes[0] != sizes[1]:
            there, here = map(sum, sizes)
            raise ValueError(
                f"{path}: {there} parameters were trained there, {here} are trained here (requires_grad): freeze the "
                "same ones, or give another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type == "cuda"  # that of the checkpoint's device until here
        self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]
        self._probes = state["probes"]
        self._probed_weights = state["probed_weights"]
        self.stopped_at = state["stopped_at"]
        self._own_window = []
        device = torch.device("cpu") if self.processes > 1 else self.device  # as `_gather_window` leaves it
        self._window = [
            StepResult(**{name: value.to(device) for name, value in result.items()}) for result in state["window"]
        ]

    def _identity(self) -> dict[str, Any]:
        identity = {
            **dataclasses.asdict(self.config),
            "dataset_length": self.dataset_length,
            "processes": self.processes,
            "description": self.description,
        }
        return json.loads(json.dumps(identity))  # type: ignore[no-any-return]  # lists for tuples, as in a file

    def _check_identity(self, saved: Mapping[str, Any], path: str | os.PathLike[str], *, is_over: bool) -> None:
        ours = self._identity()
        free = FREE_TO_CHANGE | (_SPLIT if self.config.allow_other_split else set())
        if is_over:  # nothing is divided any more
            free = free | {"processes"}
        if self.config.arm in EARLY_STOP:  # where the probes decide when to stop, their number is part of the run
            free = free - {"monitor_every"}
        there, here = (flat({k: v for k, v in values.items() if k not in free}) for values in (saved, ours))
        differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        if not differing:
            return
        told = ", ".join(f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)" for name in differing)
        remedy = "give another output folder, or remove the file to start anew"
        if set(differing) <= _SPLIT:
            remedy = (
                f"start it with {saved['processes']} processes (torchrun --nproc-per-node) and accumulation "
                f"{saved['accumulation']} as before, or set allow_other_split to divide the same batches "
                "otherwise from here on"
            )
        raise ValueError(f"{path} belongs to another run, it differs in {told}: {remedy}")

    # --- metrics, probes, validation ------------------------------------------------------------------------

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return poly_learning_rate(step, steps=config.steps, learning_rate=config.learning_rate, power=config.power)

    def _is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed at one of several processes, the same answer in all of them."""
        told = self._interrupts_told
        return self.processes > 1 and len(told) == told.maxlen and bool(told[0])

    def _gather_window(self) -> None:
        """Puts together what the processes measured."""
        own, self._own_window = self._own_window, []
        if self.processes == 1:
            self._window += own
            return
        on_cpu = [{name: value.cpu() for name, value in vars(result).items()} for result in own]
        for parts in zip(*distributed.gather(on_cpu), strict=True):
            loss = torch.stack([part["loss"] for part in parts]).sum()
            rest = {name: torch.cat([part[name] for part in parts]) for name in ("eps", "gain", "skipped")}
            self._window.append(StepResult(loss=loss, **rest))

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
        message = ""
        if share_skipped is not None and share_skipped > 0.01:
            message = (
                f"the attack left {share_skipped:.1%} of its images as they were in the steps up to "
                f"{self.steps_done}: no labelled pixel, or a gain or gradient that is 0, infinite or NaN "
                '(with precision "fp16" that is an overflow; "bf16" has none)'
            )
        elif silent := int((losses == 0).sum()):
            message = (
                f"the loss was exactly 0 in {silent} of the {len(losses)} steps up to {self.steps_done}: no pixel of "
                f"their batches has a label other than {IGNORE_INDEX}, that of pixels that do not count, or the "
                "network is sure of all of them"
            )
        if message and not self._warned and distributed.rank() == 0:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=levels_to_the_caller())
        self._window = []
        last_read, self._clock = self._clock, (self.steps_done, time.perf_counter())
        return {
            "step": self.steps_done,
            "epoch": epoch,
            "loss": _mean(losses),
            "learning_rate": self._learning_rate(self.steps_done - 1),
            "adversarial_share": len(eps) / (len(losses) * self.config.batch_size),
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
        batch = self._probe_batch
        with self._autocast():
            # all have to draw the same conclusion
            found = distributed.from_first(lambda: probe(self.model, *batch, eps=config.eps))
        before = self._probes[-1] if self._probes else found
        warned = any(catastrophic_overfitting(self._probes[: i + 1]) for i in range(len(self._probes)))
        self._probes.append(found)
        drop = before["pgd_accuracy"] - found["pgd_accuracy"]
        message = ""
        if drop > EARLY_STOP.get(config.arm, math.inf):
            self.stopped_at = self.steps_done
            self.model.load_state_dict(self._probed_weights)
            message = (
                f"{config.arm} stops after {self.steps_done} of {config.steps} steps: the accuracy under PGD fell "
                f"from {before['pgd_accuracy']:.3f} to {found['pgd_accuracy']:.3f}; the weights are those of before"
            )
        elif catastrophic_overfitting(self._probes) and not warned:
            message = (
                f"catastrophic overfitting: after {self.steps_done} steps the accuracy on {len(batch[0])} training "
                f"images is {found['pgd_accuracy']:.3f} under PGD and {found['fgsm_accuracy']:.3f} under FGSM: the "
                "network has learnt to withstand a single step only. An arm with several steps (segpgd-3), n-fgsm "
                "or an earlier checkpoint may help"
            )
        if message and distributed.rank() == 0:
            warnings.warn(message, RuntimeWarning, stacklevel=levels_to_the_caller())
        if config.arm in EARLY_STOP:
            self._probed_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._clock = (self.steps_done, time.perf_counter())  # the probe is no training
        return found

    def _validate(self) -> EvaluationResult:
        """The model under attack; batches are dealt out to the processes."""
        validation, dataset = self.config.validation, self.validation_dataset
        assert dataset is not None
        length = len(dataset)  # type: ignore[arg-type]
        images = range(min(validation.images or length, length))
        batches = [images[start : start + validation.batch_size] for start in images[:: validation.batch_size]]
        loader = Loader(
            self._checked(dataset),
            batch_sampler=batches[distributed.rank() :: self.processes],
            num_workers=self.config.workers,
            collate_fn=stack,
        )
        several = self.processes > 1
        read = loader if several else self._interrupts.between(loader)
        with self._autocast():
            return evaluate(self.model, read, validation.attacks, validation.eps, worst_case=False, sharded=several)


def _require_types(config: Any, model: Any, dataset: Any, validation_dataset: Any) -> None:
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig(...), got a {type(config).__name__}")
    a_module(model)
    if hasattr(model, "_orig_mod"):  # the names in its checkpoints would be others
        raise TypeError("model must not be compiled: give what was compiled, and TrainConfig(compile=True)")
    for name, given in (("dataset", dataset), ("validation_dataset", validation_dataset)):
        if isinstance(given, DataLoader):
            raise TypeError(f"{name} must be a Dataset of single samples, got a DataLoader; give its .dataset")
        if not hasattr(given, "__len__") and (name == "dataset" or given is not None):
            raise TypeError(f"{name} must have a length (__len__), got a {type(given).__name__}")


def _sgd(model: nn.Module, config: TrainConfig, *, fused: bool) -> torch.optim.SGD:
    """The optimiser of a run."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    if config.precision == "fp16" and config.momentum:
        # A fused step that is left out for an overflow, in the first step above all, leaves the buffers it has made
        # unwritten. With zeros the first step gives the same bits as without buffers.
        for parameter in model.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None


def _running_statistics(model: nn.Module) -> list[Tensor]:
    return [
        statistic
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        for statistic in (getattr(module, name, None) for name in ("running_mean", "running_var"))
        if isinstance(statistic, Tensor)
    ]


class _Told:
    """A number that is read steps after it was computed: from a GPU without waiting for what was queued since then."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if number.is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(number.device))

    def __bool__(self) -> bool:
        if self._there is not None:
            self._there.synchronize()
        return bool(self._number)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto" or a name that torch.device takes, got {name!r}') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # an AssertionError where torch was built without it, for one
        told = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {name!r} cannot be used here: {told or type(error).__name__}") from error
    return device


def _summary(metrics: Mapping[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.3f}", f"adversarial {metrics['adversarial_share']:.0%}"]
    if metrics["eps_median"] is not None:
        parts.append(f"median eps {metrics['eps_median']:.4f}")
    return ", ".join(parts)
