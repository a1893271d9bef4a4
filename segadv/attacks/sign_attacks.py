"""Attacks that step along the sign of a loss's gradient: FGSM and its relatives, BIM, PGD, SegPGD, CosPGD."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..checks import a_tensor, at_least, is_number, levels_to_the_caller, number_or_vector
from .base import Attack, AttackInfo, checked_size, has_label, has_no_loss, per_image

__all__ = ["BIM", "FGSM", "NFGSM", "PGD", "CheckpointFGSM", "CosPGD", "RandomFGSM", "SegPGD"]


@dataclass(kw_only=True, eq=False)
class _SignAttack(Attack):
    eps: float | Tensor = None  # type: ignore[assignment]  # becomes 8/255 of the width of `bounds`
    targeted: bool = False
    balanced: bool = False

    loss: ClassVar[functional.Loss] = "cross_entropy"

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.eps = checked_size("eps", self.eps, self.bounds, default=8 / 255)

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        number_or_vector("eps", self.eps, images)
        _check_generator(getattr(self, "generator", None), images)

    def _objective(
        self, logits: Tensor, labels: Tensor, *, step: int = 0, steps: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.balanced and logits.dtype is torch.float16:  # the weight of a rare class may not fit into it
            logits = logits.float()
        total, n_valid, grad = functional.loss_and_grad(
            logits,
            labels,
            loss=self.loss,
            step=step,
            steps=steps,
            targeted=self.targeted,
            balanced=self.balanced,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        # The steps ascend; a targeted attack lowers the loss.
        return total, n_valid, grad.neg_() if self.targeted else grad

    def _eps_of(self, images: Tensor) -> Tensor:
        """eps [N]."""
        if isinstance(self.eps, Tensor):
            return self.eps.detach().to(images.dtype, copy=True)  # `AttackInfo` is the caller's
        return images.new_full(images.shape[:1], self.eps)


@dataclass(kw_only=True, eq=False)
class FGSM(_SignAttack):
    """Fast gradient sign method: clip(x + eps * sign(grad CE)).

    Source: Goodfellow et al. 2015 (arXiv 1412.6572);
    Wiens & Hammer 2022 (doi 10.5220/0010788400003122), eq. 3.

    Args, besides those of `Attack`:
        eps: step size in the units of the images; a float, or a tensor [N] on their device. Unless given, 8/255 of the
            width of `bounds`.
        targeted: the labels are the target, and the step descends.
        balanced: in the loss all classes among an image's labels weigh alike, where otherwise all its pixels do
            (`functional.loss_and_grad`): an attack on mIoU more than on pixel accuracy.

    `AttackInfo`: eps and loss.
    """

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        loss = self._differentiate(images, labels)
        eps = self._eps_of(images)
        adversarial = functional.sign_step(images, loss.grad, eps, bounds=self.bounds)
        return adversarial, AttackInfo(eps=eps, loss=loss.mean)


@dataclass(kw_only=True, eq=False)
class RandomFGSM(FGSM):
    """`FGSM` with a step size drawn from U(0, eps) for each image.

    Source: Wiens & Hammer 2022 (doi 10.5220/0010788400003122), section 4.1.2.

    Args, besides those of `FGSM`:
        generator: of the random numbers, on the images' device; None: the device's default one.

    `AttackInfo`: the drawn eps, and loss.
    """

    generator: torch.Generator | None = None

    def _eps_of(self, images: Tensor) -> Tensor:
        eps = super()._eps_of(images)
        return eps * torch.rand(eps.shape, generator=self.generator, dtype=eps.dtype, device=eps.device)


@dataclass(kw_only=True, eq=False)
class NFGSM(FGSM):
    """`FGSM` from a noisy image: x_0 = clip(x + noise * eps * U(-1, 1)); clip(x_0 + eps * sign(grad CE(x_0))).

    Nothing is projected onto the ball: the result is up to (noise + 1) * eps away from the image.

    Source: de Jorge et al. 2022 (arXiv 2202.01181), algorithm 1 with k = noise = 2 and alpha = eps.

    Args, besides those of `FGSM`:
        noise: size of the noise in units of eps.
        generator: of the random numbers, on the images' device; None: the device's default one.
    """

    noise: float = 2.0
    generator: torch.Generator | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not is_number(self.noise) or not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a finite number of at least 0, in units of eps, got {self.noise!r}")
        self.noise = float(self.noise)

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        eps = self._eps_of(images)
        size = self.noise * eps * has_label(labels, self.ignore_index)
        start = _noisy(images, uniform_noise(images, self.generator), size, self.bounds)
        loss = self._differentiate(start, labels)
        adversarial = functional.sign_step(start, loss.grad, eps, bounds=self.bounds)
        return adversarial, AttackInfo(eps=eps, loss=loss.mean)


@dataclass(kw_only=True, eq=False)
class CheckpointFGSM(FGSM):
    """`FGSM` with the smallest of `checkpoints` equal parts of its step that already fools the model.

    clip(x + (k / c) * eps * sign(grad CE)) with the smallest k = 1 ... c for which the image is misclassified,
    and k = c where it never is. Source: Kim et al. 2021 (arXiv 2010.01799), with c = 3.

    The paper classifies images. For segmentation, "misclassified" is taken to be what Wiens & Hammer 2022
    (doi 10.5220/0010788400003122, eq. 17) take it to be: the averaged gain is negative. So this attack searches
    for what FastNewton computes, the step to where the averaged gain is 0; with one pixel it is Kim's method.

    Args, besides those of `FGSM`:
        checkpoints: c; costs c - 1 forward passes, as the last part needs none.

    `AttackInfo`: the chosen k / c * eps, and loss.
    """

    checkpoints: int = 3

    def _check_arguments(self) -> None:
        super()._check_arguments()
        at_least(1, checkpoints=self.checkpoints)
        self.checkpoints = int(self.checkpoints)
        if self.targeted:
            raise ValueError("targeted must be False, as the search is for misclassification, got True")

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        loss = self._differentiate(images, labels)
        gradient = loss.own_grad
        full = self._eps_of(images)
        eps = full
        for k in range(self.checkpoints - 1, 0, -1):
            part = full * (k / self.checkpoints)
            logits = self._logits(functional.sign_step(images, gradient, part, bounds=self.bounds))
            gain = functional.averaged_gain(
                logits, labels, ignore_index=self.ignore_index, align_corners=self.align_corners
            )
            eps = torch.where(gain < 0, part, eps)
        adversarial = functional.sign_step(images, gradient, eps, bounds=self.bounds)
        return adversarial, AttackInfo(eps=eps, loss=loss.mean)


class _Candidate(NamedTuple):
    """Adversarial images [N, ...], and how the model sees them where that was looked at."""

    images: Tensor
    score: Tensor
    """[N] number of pixels that serve the attack; where classes weigh alike, the sum of their shares of it."""
    confusion: Tensor
    """int64 [N, C, C], or [N, 0] where only the score was asked for."""
    broken: Tensor
    """bool [N], whether the cross-entropy is NaN; False where only the score was asked for."""

    def or_better(self, other: _Candidate) -> _Candidate:
        """Of each image the one with the higher score; this one where they are equal."""
        better = other.score > self.score
        return _Candidate(
            *(torch.where(per_image(better, mine), theirs, mine) for mine, theirs in zip(self, other, strict=True))
        )


class _Run(NamedTuple):
    """What an iterative attack came to."""

    images: Tensor
    loss: Tensor
    """[N] where the last gradient was taken."""
    judged: list[_Candidate]
    """What there was after each of the steps that were asked for."""
    unmoved: Tensor
    """bool [N], whether no step moved anything; of no meaning where nothing was asked for."""


@dataclass(kw_only=True, eq=False)
class BIM(_SignAttack):
    """Basic iterative method: x_0 = x, x_{t+1} = clip(project(x_t + alpha * sign(grad CE(x_t)))).

    project: onto the max-norm ball of radius eps around x; clip: to the box. The result is the last iterate.

    Source: Kurakin et al. 2017 (arXiv 1607.02533); Wiens & Hammer 2022 (doi 10.5220/0010788400003122), eq. 4.

    Args, besides those of `Attack`:
        eps: radius of the ball in the units of the images; a float, or a tensor [N] on their device. Unless given,
            8/255 of the width of `bounds`.
        alpha: step size, likewise; by default 2/255 of that width. A UserWarning says when steps * alpha < eps, too
            little to reach the ball's surface (not where one of them is a tensor, which may be on a GPU).
        steps: number of steps.
        targeted: the labels are the target, and the steps descend.
        balanced: as in `FGSM`.
        best: return for each image the iterate 1 ... steps with the most wrong valid pixels (targeted: with the
            most pixels at their target; balanced: with the largest mean over the classes of their share), the earliest
            of equals. One more forward pass judges the last.

    `AttackInfo`: eps, and loss at the last gradient that was computed.
    """

    alpha: float | Tensor = None  # type: ignore[assignment]  # becomes 2/255 of the width of `bounds`
    steps: int = 10
    best: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.alpha = checked_size("alpha", self.alpha, self.bounds, default=2 / 255)
        at_least(1, steps=self.steps)
        self.steps = int(self.steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eps, Tensor) or isinstance(self.alpha, Tensor):
            return
        if self.steps * self.alpha < self.eps * (1 - 1e-9):
            warnings.warn(
                f"steps * alpha = {self.steps} * {self.alpha:g} < eps = {self.eps:g}: too little to reach "
                "the surface of the eps-ball; take more steps, or a larger alpha",
                stacklevel=levels_to_the_caller(),
            )

    def _check_inputs(self, images: Tensor, labels: Tensor) -> None:
        super()._check_inputs(images, labels)
        number_or_vector("alpha", self.alpha, images)

    def outcomes(self, images: Tensor, labels: Tensor, steps: Sequence[int], *, noise: Tensor | None = None) -> Tensor:
        """How the model classifies the images after some of the attack's steps, from one run.

        Entry i judges what the attack has after steps[i] steps: each image's best iterate so far (`best`), or the
        iterate itself. That is the result of the same attack with fewer steps, except with SegPGD, whose lambda
        remains step / (2 * self.steps): there it is a long run seen on its way.

        Args:
            images, labels: as in the call.
            steps: increasing numbers out of 1 ... self.steps. Judging the last step costs a forward pass, the
                others none.
            noise: [N, ...] like the images, in [-1, 1]: the random start in units of eps, instead of a drawn one.
                Only for attacks with a random start and without restarts.

        Returns:
            confusion matrices, int64 [len(steps), N, C, C], row = label, column = prediction.

        Raises, besides what the call raises:
            ValueError: steps that do not increase, or are not in 1 ... self.steps; noise for an attack that takes none,
                or not like the images.
            TypeError: a step that is no whole number; noise that is no tensor.
        """
        steps = [operator.index(step) for step in steps]
        if not steps or steps != sorted(set(steps)) or not 1 <= steps[0] <= steps[-1] <= self.steps:
            raise ValueError(f"steps must be increasing numbers out of 1 ... {self.steps}, got {steps}")
        return self._outcomes(images, labels, steps, noise=noise)[0]

    def _outcomes(
        self, images: Tensor, labels: Tensor, steps: Sequence[int], *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`outcomes`; and bool [N], whether the cross-entropy of one of them is NaN, and `unmoved` of the `_Run`."""
        with self._isolated(images, labels) as (own_images, own_labels):
            run = self._run(own_images, own_labels, judge=steps, noise=noise)
        confusion, broken = (
            torch.stack([getattr(candidate, name) for candidate in run.judged]) for name in ("confusion", "broken")
        )
        return confusion, broken.any(0), run.unmoved

    def _perturb(self, images: Tensor, labels: Tensor) -> tuple[Tensor, AttackInfo]:
        run = self._run(images, labels)
        return run.images, AttackInfo(eps=self._eps_of(images), loss=run.loss)

    def _run(self, images: Tensor, labels: Tensor, *, judge: Sequence[int] = (), noise: Tensor | None = None) -> _Run:
        if noise is not None:
            raise ValueError("noise must be None, as the attack has no random start")
        return self._iterate(images, labels, images, judge, matrices=bool(judge))

    def _iterate(self, images: Tensor, labels: Tensor, start: Tensor, judge: Sequence[int], *, matrices: bool) -> _Run:
        iterate, best, judged = start, None, []
        for step in range(self.steps):
            loss = self._differentiate(iterate, labels, step=step, steps=self.steps)
            if step > 0 and (self.best or step in judge):
                best = self._judged(iterate, loss.logits, labels, best, matrices=matrices)
                judged += [best] * (step in judge)
            iterate = functional.sign_step(
                iterate, loss.grad, self.alpha, origin=images, eps=self.eps, bounds=self.bounds
            )
        unmoved = (iterate == start).flatten(1).all(1) if judge else loss.pixels < 0
        if not (self.best or self.steps in judge):
            return _Run(iterate, loss.mean, judged, unmoved)
        best = self._judged(iterate, self._logits(iterate), labels, best, matrices=matrices)
        return _Run(best.images, loss.mean, judged + [best] * (self.steps in judge), unmoved)

    def _judged(
        self, iterate: Tensor, logits: Tensor, labels: Tensor, before: _Candidate | None, *, matrices: bool
    ) -> _Candidate:
        """The iterate, or with `best` the one before where that is not worse."""
        classes, balanced = logits.shape[1], self.balanced and labels.dim() > 1
        if matrices or balanced or classes**2 <= labels.shape[1:].numel():
            confusion = functional.confusion_matrix(
                logits, labels, per_image=True, ignore_index=self.ignore_index, align_corners=self.align_corners
            )
            hits, pixels = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2)  # of each class
            if balanced:
                hits, pixels = hits / pixels.double().clamp(min=1), (pixels > 0).double()
            hits, pixels = hits.sum(1), pixels.sum(1)
            broken = hits < 0
            if matrices:
                broken = has_no_loss(logits, labels, ignore_index=self.ignore_index, align_corners=self.align_corners)
        else:  # classification into many classes: a matrix for each image would be most of the memory
            labels = labels.long()  # a comparison would take a number modulo 256 for uint8
            valid = (labels != self.ignore_index) & (labels >= 0) & (labels < classes)
            prediction = (
                logits.argmax(1)
                if logits.dim() == 2
                else functional.argmax_labels(
                    logits, (labels.shape[1], labels.shape[2]), align_corners=self.align_corners
                )
            )
            hits, pixels = (each.reshape(len(labels), -1).sum(1) for each in (valid & (prediction == labels), valid))
            confusion, broken = hits.new_empty(len(hits), 0), hits < 0
        candidate = _Candidate(iterate, hits if self.targeted else pixels - hits, confusion, broken)
        return candidate if before is None or not self.best else before.or_better(candidate)


@dataclass(kw_only=True, eq=False)
class PGD(BIM):
    """Projected gradient descent: `BIM` from a random start in the ball, x_0 = clip(x + U(-eps, eps)).

    An image without a valid pixel stays as it is; not with bn="train", where other images' losses depend on it.

    Source: Madry et al. 2018 (arXiv 1706.06083).

    Args, besides those of `BIM`:
        random_start: False starts at the image.
        restarts: number of runs. Each image gets the run whose outcome has the most wrong valid pixels
            (judged as with `best`, the earliest of equals), which costs one more forward pass per run.
        generator: of the random numbers, on the images' device; None: the device's default one.
    """

    random_start: bool = True
    restarts: int = 1
    generator: torch.Generator | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        at_least(1, restarts=self.restarts)
        self.restarts = int(self.restarts)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts must be 1 with random_start=False, where all runs are the same, got {self.restarts}"
            )

    def _run(self, images: Tensor, labels: Tensor, *, judge: Sequence[int] = (), noise: Tensor | None = None) -> _Run:
        if noise is not None and (self.restarts > 1 or not self.random_start):
            raise ValueError("noise must be None unless random_start=True and restarts=1")
        if noise is not None:
            a_tensor("noise", noise)
            if noise.shape != images.shape:
                raise ValueError(f"noise must be {list(images.shape)} as the images, got {list(noise.shape)}")
            if (noise.dtype, noise.device) != (images.dtype, images.device):
                raise ValueError(
                    f"noise must be of the images' dtype and device, {images.dtype} on {images.device}, got "
                    f"{noise.dtype} on {noise.device}"
                )
        if self.restarts == 1:
            return self._iterate(images, labels, self._start(images, labels, noise), judge, matrices=bool(judge))
        at = sorted({*judge, self.steps})
        run = self._iterate(images, labels, self._start(images, labels), at, matrices=bool(judge))
        kept, unmoved = run.judged, run.unmoved
        for _ in range(1, self.restarts):
            run = self._iterate(images, labels, self._start(images, labels), at, matrices=bool(judge))
            kept = [mine.or_better(other) for mine, other in zip(kept, run.judged, strict=True)]
            unmoved = unmoved & run.unmoved
        judged = [entry for step, entry in zip(at, kept, strict=True) if step in judge]
        return _Run(kept[-1].images, run.loss, judged, unmoved)

    def _start(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        if not self.random_start:
            return images
        noise = uniform_noise(images, self.generator) if noise is None else noise
        return _noisy(images, noise, self._eps_of(images) * has_label(labels, self.ignore_index), self.bounds)


@dataclass(kw_only=True, eq=False)
class SegPGD(PGD):
    """`PGD` on `functional.segpgd_loss`, a cross-entropy that weighs correct and wrong pixels differently.

    Their weights are 1 - lambda and lambda, lambda = step / (2 * steps) with step = 0 ... steps - 1: early steps turn
    correct pixels, later ones also keep the others wrong. Source: Gu et al. 2022 (arXiv 2207.12391), algorithm 1.
    Targeted, "correct" means at the target, and the weights change places: lambda on such pixels, 1 - lambda on the
    others. Arguments and defaults are those of `PGD`.
    """

    loss: ClassVar[functional.Loss] = "segpgd"


@dataclass(kw_only=True, eq=False)
class CosPGD(PGD):
    """`PGD` on `functional.cospgd_loss`, a cross-entropy weighted by how well the prediction fits the label.

    Targeted, the weight is 1 minus that. Source: Agnihotri et al. 2024 (arXiv 2302.02213). Arguments and defaults are
    those of `PGD`.
    """

    loss: ClassVar[functional.Loss] = "cospgd"


def uniform_noise(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """U(-1, 1), of the images' shape; the same for any memory format of theirs."""
    return images.new_empty(images.shape).uniform_(-1, 1, generator=generator)


def _noisy(images: Tensor, noise: Tensor, size: Tensor, bounds: tuple[float, float]) -> Tensor:
    """clip(images + size * noise), in the images' memory format."""
    noisy = torch.empty_like(images)
    torch.add(images, noise * per_image(size, images), out=noisy)
    return noisy.clamp_(*bounds)


def _check_generator(generator: torch.Generator | None, images: Tensor) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got a {type(generator).__name__}")
    if generator is not None and generator.device.type != images.device.type:
        raise ValueError(f"generator must be on the images' device, {images.device}, got {generator.device}")
