"""Attacks that step along the sign of a loss's gradient: FGSM, random FGSM, BIM, PGD, SegPGD, CosPGD."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import functional
from .base import Attack, AttackInfo, checked_size, per_image

__all__ = ["BIM", "FGSM", "PGD", "CosPGD", "RandomFGSM", "SegPGD"]


@dataclass(kw_only=True, eq=False)
class _SignAttack(Attack):
    eps: float | Tensor = 8 / 255
    targeted: bool = False

    loss: ClassVar[functional.Loss] = "cross_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.eps = checked_size("eps", self.eps, self.bounds)

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        functional._number_or_vector("eps", self.eps, images)

    def _objective(
        self, logits: Tensor, labels: Tensor, *, step: int = 0, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, n_valid, grad = functional.loss_and_grad(
            logits,
            labels,
            loss=self.loss,
            step=step,
            steps=steps,
            targeted=self.targeted,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        # The steps ascend; a targeted attack lowers the loss.
        return total, n_valid, grad.neg_() if self.targeted else grad

    def _eps_of(self, images: Tensor) -> Tensor:
        """eps [N]."""
        if isinstance(self.eps, Tensor):
            return self.eps.detach().to(images.dtype)
        return images.new_full(images.shape[:1], self.eps)


@dataclass(kw_only=True, eq=False)
class FGSM(_SignAttack):
    """Fast gradient sign method: clip(x + eps * sign(grad CE)).

    Source: Goodfellow et al. 2015 (arXiv 1412.6572);
    Wiens & Hammer 2022 (doi 10.5220/0010788400003122), eq. 3.

    Args, besides those of `Attack`:
        eps: step size in the units of the images; a float, or a tensor [N] on their device.
        targeted: the labels are the target, and the step descends.

    `AttackInfo`: eps and loss.
    """

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        loss = self._differentiate(images, labels)
        eps = self._eps_of(images)
        adversarial = functional.sign_step(images, loss.grad, eps, bounds=self.bounds)
        return adversarial, AttackInfo(eps=eps, loss=loss.mean)


@dataclass(kw_only=True, eq=False)
class RandomFGSM(FGSM):
    """`FGSM` with a step size of its own for each image, drawn from U(0, eps).

    Source: Wiens & Hammer 2022 (doi 10.5220/0010788400003122), section 4.1.2.

    Args, besides those of `FGSM`:
        generator: of the random numbers, on the images' device; None: the device's default one.

    `AttackInfo`: the drawn eps, and loss.
    """

    generator: torch.Generator | None = None

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        _check_generator(self.generator, images)

    def _eps_of(self, images: Tensor) -> Tensor:
        return _uniform(images.shape[:1], images, self.generator) * super()._eps_of(images)


class _Candidate(NamedTuple):
    """Adversarial images [N, ...] and the number of pixels [N] that serve the attack."""

    images: Tensor
    score: Tensor

    def or_better(self, other: _Candidate) -> _Candidate:
        """Of each image the one with the higher score; this one where they are equal."""
        better = other.score > self.score
        images = torch.where(per_image(better, self.images), other.images, self.images)
        return _Candidate(images, torch.where(better, other.score, self.score))


@dataclass(kw_only=True, eq=False)
class BIM(_SignAttack):
    """Basic iterative method: x_0 = x, x_{t+1} = clip(project(x_t + alpha * sign(grad CE(x_t)))).

    project: onto the max-norm ball of radius eps around x; clip: to the box. The result is the last iterate.

    Source: Kurakin et al. 2017 (arXiv 1607.02533); Wiens & Hammer 2022 (doi 10.5220/0010788400003122), eq. 4.

    Args, besides those of `Attack`:
        eps: radius of the ball in the units of the images; a float, or a tensor [N] on their device.
        alpha: step size, likewise. A UserWarning says when steps * alpha < eps, too little to reach the
            ball's surface.
        steps: number of steps.
        targeted: the labels are the target, and the steps descend.
        best: give for each image the iterate 1 ... steps with the most wrong valid pixels (targeted: with the
            most pixels at their target), the earliest of equals. One more forward pass judges the last.

    `AttackInfo`: eps, and loss at the last gradient that was computed.
    """

    alpha: float | Tensor = 2 / 255
    steps: int = 10
    best: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = checked_size("alpha", self.alpha, self.bounds)
        _check_count("steps", self.steps)
        if isinstance(self.eps, Tensor) or isinstance(self.alpha, Tensor):
            return
        if self.steps * self.alpha < self.eps * (1 - 1e-9):
            warnings.warn(
                f"steps * alpha = {self.steps} * {self.alpha:g} < eps = {self.eps:g}: too little to reach "
                "the surface of the eps-ball",
                stacklevel=3 if type(self) is BIM else 4,  # the line that makes the attack
            )

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        functional._number_or_vector("alpha", self.alpha, images)

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        candidate, loss = self._iterate(images, labels, images)
        return candidate.images, AttackInfo(eps=self._eps_of(images), loss=loss)

    def _iterate(
        self, images: Tensor, labels: Tensor, start: Tensor, *, judge_last: bool = False
    ) -> tuple[_Candidate, Tensor]:
        """The outcome from `start`, scored if `best` or `judge_last`, and the last loss [N]."""
        iterate, kept = start, None
        for step in range(self.steps):
            loss = self._differentiate(iterate, labels, step=step, steps=self.steps)
            if self.best and step > 0:
                candidate = _Candidate(iterate, self._score(loss.logits, labels))
                kept = candidate if kept is None else kept.or_better(candidate)
            iterate = functional.sign_step(
                iterate, loss.grad, self.alpha, origin=images, eps=self.eps, bounds=self.bounds
            )
        if not (self.best or judge_last):
            return _Candidate(iterate, torch.zeros_like(loss.pixels)), loss.mean
        last = _Candidate(iterate, self._score(self._logits(iterate), labels))
        return last if kept is None else kept.or_better(last), loss.mean

    def _score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Number of wrong valid pixels [N]; targeted: of pixels at their target."""
        confusion = functional.confusion_matrix(
            logits, labels, per_image=True, ignore_index=self.ignore_index, align_corners=self.align_corners
        )
        hits = confusion.diagonal(dim1=1, dim2=2).sum(1)
        return hits if self.targeted else confusion.sum((1, 2)) - hits


@dataclass(kw_only=True, eq=False)
class PGD(BIM):
    """Projected gradient descent: `BIM` from a random start in the ball, x_0 = clip(x + U(-eps, eps)).

    Source: Madry et al. 2018 (arXiv 1706.06083).

    Args, besides those of `BIM`:
        random_start: False starts at the image.
        restarts: number of runs. Each image gets the run whose outcome has the most wrong valid pixels
            (judged as `best` does, the earliest of equals), at the price of one more forward pass per run.
        generator: of the random numbers, on the images' device; None: the device's default one.
    """

    random_start: bool = True
    restarts: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("restarts", self.restarts)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts: {self.restarts} came with random_start=False, where all runs are the same")

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        _check_generator(self.generator, images)

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        judge = self.restarts > 1
        kept, loss = self._iterate(images, labels, self._start(images), judge_last=judge)
        for _ in range(1, self.restarts):
            candidate, loss = self._iterate(images, labels, self._start(images), judge_last=judge)
            kept = kept.or_better(candidate)
        return kept.images, AttackInfo(eps=self._eps_of(images), loss=loss)

    def _start(self, images: Tensor) -> Tensor:
        if not self.random_start:
            return images
        noise = 2 * _uniform(images.shape, images, self.generator) - 1
        start = torch.empty_like(images)
        torch.add(images, noise * per_image(self._eps_of(images), images), out=start)
        return start.clamp_(*self.bounds)


@dataclass(kw_only=True, eq=False)
class SegPGD(PGD):
    """`PGD` on `functional.segpgd_loss`, a cross-entropy that weighs correct and wrong pixels differently.

    Weights 1 - lambda and lambda, lambda = step / (2 * steps) with step = 0 ... steps - 1: early steps
    turn correct pixels, later ones also keep the others wrong. Source: Gu et al. 2022 (arXiv 2207.12391),
    algorithm 1. Arguments and defaults as `PGD`.
    """

    loss: ClassVar[functional.Loss] = "segpgd"


@dataclass(kw_only=True, eq=False)
class CosPGD(PGD):
    """`PGD` on `functional.cospgd_loss`, a cross-entropy weighted by how well the prediction fits the label.

    Source: Agnihotri et al. 2024 (arXiv 2302.02213). Arguments and defaults as `PGD`.
    """

    loss: ClassVar[functional.Loss] = "cospgd"


def _uniform(shape: torch.Size, images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=images.dtype, device=images.device)


def _check_generator(generator: torch.Generator | None, images: Tensor) -> None:
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"generator: it is on {generator.device}, the images are on {images.device}")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r} came; a whole number of at least 1 is needed")
