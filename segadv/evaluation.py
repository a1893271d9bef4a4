"""Evaluation under attack: worst cases per image, mIoU pooled and per image, curves over eps and over steps.

One call, `evaluate`, puts a model under several attacks. Everything measured comes from the confusion matrix of each
image after each attack, at each eps, after some numbers of steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain, product, zip_longest
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, functional
from .attacks import BIM, FGSM, PGD, Attack, CosPGD, SegPGD
from .attacks.base import check_sizes, has_no_loss, is_plain
from .attacks.frozen import device_of, frozen, logits_of, unwrapped
from .attacks.sign_attacks import uniform_noise
from .checks import (
    a_module,
    at_least,
    in_range,
    is_number,
    levels_to_the_caller,
    names_out_of,
    true_or_false,
    whole_number,
)
from .ops import backends
from .progress import progress_bar
from .records import Records, content_hash, model_hash, versions
from .results import (
    EvaluationResult,
    Measurement,
    class_iou,
    miou,
    miou_difference,
    overlap,
    pixel_accuracy,
    wrong_pixels,
)

__all__ = [
    "ATTACKS",
    "EPS",
    "PAPER_ATTACKS",
    "STEP_COUNTS",
    "EvaluationResult",
    "Measurement",
    "class_iou",
    "evaluate",
    "miou",
    "miou_difference",
    "pixel_accuracy",
]

T = TypeVar("T")

PAPER_ATTACKS, EPS = ("fgsm", "bim-10"), (0.0, 0.01, 0.02, 0.03, 0.04)
"""What Wiens & Hammer 2022 evaluate under, and at which eps."""
STEP_COUNTS = (3, 5, 10, 20, 40, 100)
"""Numbers of steps at which iterative attacks are judged on their way."""

AttackFactory = Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]
"""(model, eps) -> attack; attack(images [N, 3, H, W], labels [N, H, W]) -> adversarial images."""


def _strong(kind: Callable[..., BIM]) -> Callable[..., BIM]:
    """alpha in proportion to eps, the papers' 0.01 at eps 0.03; of each image the best iterate."""
    return lambda model, eps, steps, **options: kind(model, eps=eps, alpha=eps / 3, steps=steps, best=True, **options)


def _of_so_many_steps(kind: Callable[..., BIM], count: int) -> Callable[..., BIM]:
    """As in the tables of Gu et al. 2022 (arXiv 2207.12391): the last iterate."""
    return lambda model, eps, steps, **options: kind(model, eps=eps, alpha=eps / 3, steps=count, **options)


ITERATIVE: Mapping[str, Callable[..., BIM]] = {
    "bim": BIM,
    "pgd": PGD,
    "segpgd": SegPGD,
    "cospgd": CosPGD,
    "cospgd-balanced": partial(CosPGD, balanced=True),
}
"""Those of `ATTACKS` whose number of steps is an argument."""

ATTACKS: Mapping[str, Callable[..., Any]] = {
    "fgsm": lambda model, eps, steps, **options: FGSM(model, eps=eps, **options),
    "bim-10": lambda model, eps, steps, **options: BIM(model, eps=eps, alpha=0.004, steps=10, **options),
    **{name: _strong(kind) for name, kind in ITERATIVE.items()},
    **{
        f"{name}-{count}": _of_so_many_steps(ITERATIVE[name], count)
        for name in ("pgd", "segpgd")
        for count in (10, 20, 40, 100)
    },
}
"""The attacks that `evaluate` knows by name: (model, eps as a float or [N], steps, **options) -> attack."""

WORST_CASES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "worst-case": lambda matrices: wrong_pixels(matrices).argmax(0),
    "worst-case-miou": lambda matrices: class_iou(matrices).nanmean(-1).argmin(0),
}
"""Name -> matrices of the outcomes [A, N, C, C] -> which outcome is the worst for each image, the first of equals: [N].

"worst-case" has the most wrong pixels, "worst-case-miou" the lowest mIoU over the classes in the image's labels or
predictions; NaN in all outcomes of an image without a labelled pixel, which counts nowhere."""

# Stacked eps make larger batches, which a CPU works off faster up to about this many pixels (measured: half the
# time per image at 16 images of 160 x 320 against 4) and slower beyond.
_CPU_PIXELS = 1 << 20
_ROUNDING = 1e-6  # by which an attack may leave box and ball


# --- the work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """An attack at one or several eps, as far as it is computed, and stored, in one go."""

    attack: str
    eps: tuple[float, ...]
    steps: tuple[int, ...]
    outcomes: Callable[[Tensor, Tensor, int], Tensor]
    """(images, labels, seed) -> per-image confusion matrices, int64 [eps, steps, N, C, C]."""
    arguments: list[dict[str, Any]]
    """Of the attack at each eps; empty where they are not known: such outcomes cannot be found again."""

    @property
    def passes(self) -> int:
        return len(self.eps) * max(self.steps[-1], 1)


class _Judge:
    """Predicts, and counts what came out."""

    def __init__(self, model: nn.Module, ignore_index: int, align_corners: bool) -> None:
        self.model = model
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
        self.ignore_index = ignore_index
        self.strayed: dict[tuple[str, float], Tensor] = {}
        """(attack, eps) -> how far pixels went below 0, above 1 and out of the ball, so far."""
        self._latest_strayed: dict[tuple[str, float], Tensor] = {}
        self.found: Counter[tuple[str, str, float]] = Counter()
        """(what, attack, eps) -> how many: "label", bad labels; "nan", images whose loss is; "unmoved" images."""
        self._noted: dict[tuple[str, str, float], Tensor] = {}
        self._latest: dict[tuple[str, str, float], int] = {}
        self._probabilities: bool | None = None
        """Whether the model seems to give them, once its logits were looked at."""

    def looked_at(self, adversarial: Tensor, images: Tensor, name: str, eps: float) -> Tensor:
        """What an attack of the caller's gave, if that is images; how far they are from what they may be is noted."""
        if not isinstance(adversarial, Tensor) or adversarial.shape != images.shape:
            came = list(adversarial.shape) if isinstance(adversarial, Tensor) else f"a {type(adversarial).__name__}"
            raise ValueError(f"attack {name!r} gave {came} for images {list(images.shape)}; the same shape is needed")
        adversarial = adversarial.detach()
        if not adversarial.is_floating_point():
            adversarial = adversarial.to(images.dtype)
        if images.numel():
            low, high = adversarial.aminmax()
            far = (adversarial - images).abs().amax() - eps
            self._latest_strayed = {(name, eps): torch.stack([-low, high - 1, far]).double().cpu()}
            self.add_strays(self._latest_strayed)
        return adversarial.to(images.dtype)

    def add_strays(self, *strayed: Mapping[tuple[str, float], Tensor]) -> None:
        for key, distances in chain.from_iterable(each.items() for each in strayed):
            self.strayed[key] = torch.maximum(distances, self.strayed.get(key, distances))  # NaN where one is

    def note(self, what: str, attack: str, eps: float, number: Tensor) -> None:
        """A number of the batch at hand, for `settle`; a GPU is not waited for."""
        self._noted[what, attack, eps] = number

    def note_unmoved(self, attack: str, eps: float, unmoved: Tensor, matrices: Tensor) -> None:
        """bool [N] and [N, C, C] after the attack; of an image of which no pixel is right, nothing is missed."""
        self.note("unmoved", attack, eps, (unmoved & (matrices.diagonal(dim1=1, dim2=2).sum(1) > 0)).sum())

    def settle(self) -> None:
        """Reads what was noted, when the outcomes of the batch have been waited for."""
        self._latest = {key: int(number) for key, number in self._noted.items()}
        self._noted.clear()
        self.found.update(self._latest)

    def approves(self, attack: str, eps: float) -> bool:
        """Whether the outcomes of the batch just settled may be kept. Those of which a warning or an error tells are
        not: whoever goes on with them would not be told."""
        latest = self._latest_strayed.get((attack, eps))
        strayed = latest is not None and not (latest <= _ROUNDING).all()  # also where one is NaN
        wrong = any(number for (what, *_), number in self.found.items() if what != "unmoved")
        return not (strayed or wrong or self._probabilities or self._latest.get(("unmoved", attack, eps)))

    def warn(self) -> None:
        """Of what is no error: images that an attack could not move, and those that leave box or ball, as some do on
        purpose."""
        unmoved: dict[str, list[str]] = {}
        for (what, name, eps), number in self.found.items():
            if what == "unmoved" and number:
                unmoved.setdefault(name, []).append(f"{number} at eps {eps:g}")
        for name, counts in unmoved.items():
            warnings.warn(
                f"attack {name!r} left images where it began: {', '.join(counts)}. Their gradients are 0 or NaN, or "
                "lead out of [0, 1]: this says nothing about the model's robustness. Rounding, saturation or half "
                "precision in it may be the reason",
                stacklevel=levels_to_the_caller(),
            )
        for (name, eps), strayed in self.strayed.items():
            below, above, far = strayed.tolist()
            told = f"attack {name!r} at eps {eps:g}"
            if max(below, above) > _ROUNDING:
                box = f"[{-below:g}, {1 + above:g}]"
                warnings.warn(f"{told} gave pixels in {box}, outside of [0, 1]", stacklevel=levels_to_the_caller())
            if far > _ROUNDING:
                moved = f"moved pixels by up to {eps + far:g}: out of the ball of that radius"
                warnings.warn(f"{told} {moved}", stacklevel=levels_to_the_caller())

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, attack: str, eps: float) -> Tensor:
        """Confusion matrices, int64 [N, C, C]."""
        return self.count(self.logits(images), labels, attack, eps)

    def logits(self, images: Tensor) -> Tensor:
        return logits_of(self.model, images)

    def agrees(self, attack: Attack) -> bool:
        """Whether the attack sees the model, and counts, as this does."""
        options = {name: getattr(attack, name) for name in self.options}
        return options == self.options and attack.output is None

    def count(self, logits: Tensor, labels: Tensor, attack: str, eps: float) -> Tensor:
        self.note("nan", attack, eps, has_no_loss(logits, labels, **self.options).sum())
        return functional.confusion_matrix(logits, labels, per_image=True, **self.options)

    def clean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same, of the clean images; notes bad labels."""
        matrices = self.count(logits, labels, "clean", 0.0)
        self.note("label", "clean", 0.0, matrices.invalid)  # type: ignore[attr-defined]
        if self._probabilities is None and logits.numel():
            self._probabilities = bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 0.01).all())
            if self._probabilities:
                warnings.warn(
                    "model gives numbers of at least 0 that add up to 1 over the classes: are they probabilities? "
                    "Attacks need logits; the gradient of a softmax may vanish",
                    stacklevel=levels_to_the_caller(),
                )
        return matrices

    def check(self) -> None:
        """ValueError for bad labels, and for images and losses that are NaN."""
        if invalid := self.found["label", "clean", 0.0]:  # before the others: on a GPU the loss is NaN there, too
            ignored = f"ignore_index={self.ignore_index}"
            raise ValueError(f"labels must be classes of the model or {ignored}; {invalid} pixels are neither")
        for (attack, eps), strayed in self.strayed.items():
            if not strayed.isfinite().all():
                raise ValueError(f"attack {attack!r} at eps {eps:g} gave pixels that are NaN or infinite")
        for (what, attack, eps), number in self.found.items():
            if what == "nan" and number:
                under = f" under attack {attack!r} at eps {eps:g}" if eps else ""
                raise ValueError(
                    f"model: its logits are NaN or infinite at labelled pixels of {number} images{under}, and nothing "
                    "can be measured there (float16 overflows where bfloat16 and float32 do not)"
                )


def _clean(judge: _Judge) -> _Work:
    def outcomes(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with torch.no_grad():  # as a decorator it would be a frame between a warning and who called
            return judge.clean(judge.logits(images), labels)[None, None]

    return _Work("clean", (0.0,), (0,), outcomes, [{}])


def _fgsm(judge: _Judge, eps: tuple[float, ...]) -> _Work:
    """One gradient serves all eps, and the logits on its way are the clean prediction: eps 0 costs nothing."""
    attack = FGSM(judge.model, **judge.options)
    arguments = [{}, *(FGSM(judge.model, eps=value, **judge.options).arguments for value in eps)]

    def outcomes(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with attack._isolated(images, labels) as (own_images, own_labels):
            clean = attack._differentiate(own_images, own_labels)
            gradient = clean.own_grad
        matrices = [judge.clean(clean.logits, labels)]
        for value in eps:
            adversarial = functional.sign_step(images, gradient, value)
            matrices.append(judge(adversarial, labels, "fgsm", value))
            judge.note_unmoved("fgsm", value, _equal(adversarial, images), matrices[-1])
        return torch.stack(matrices)[:, None]

    return _Work("fgsm", (0.0, *eps), (1,), outcomes, arguments)


def _iterative(judge: _Judge, name: str, eps: tuple[float, ...], steps: int) -> _Work:
    """All eps in one batch, as far as memory allows, judged on the way."""
    singles = [ATTACKS[name](judge.model, value, steps, **judge.options) for value in eps]
    # those with a number in their name give the last iterate after so many steps, and are nothing else on their way
    judged = _judged_steps(singles[0].steps) if singles[0].best else (singles[0].steps,)

    def stacked(
        values: tuple[float, ...], images: Tensor, labels: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Matrices [eps, steps, N, C, C], and bool [eps, N]: is a loss NaN, did the image not move."""
        count = len(values)
        if count == 1 or images.device.type != "cpu" or count * labels.numel() <= _CPU_PIXELS:
            sizes = images.new_tensor(values).repeat_interleave(len(images))
            attack: Any = ATTACKS[name](judge.model, sizes, steps, **judge.options)
            start = _repeated(noise, count) if isinstance(attack, PGD) else None
            try:
                matrices, broken, unmoved = attack._outcomes(
                    _repeated(images, count), _repeated(labels, count), judged, noise=start
                )
                matrices = matrices.unflatten(1, (count, -1)).transpose(0, 1)
                return matrices, broken.unflatten(0, (count, -1)), unmoved.unflatten(0, (count, -1))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                del attack, start  # what did not fit must not take the halves' memory
        halves = (values[: count // 2], values[count // 2 :])
        first, second = (stacked(half, images, labels, noise) for half in halves)
        return tuple(map(torch.cat, zip(first, second, strict=True)))  # type: ignore[return-value]

    def outcomes(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        # The noise belongs to the batch: the same for all eps and attacks, however they are stacked.
        generator = torch.Generator(images.device).manual_seed(seed)
        noise = uniform_noise(images, generator)
        matrices, *others = stacked(eps, images, labels, noise)
        for value, outcome, broken, unmoved in zip(eps, matrices, *others, strict=True):
            judge.note("nan", name, value, broken.sum())
            judge.note_unmoved(name, value, unmoved, outcome[-1])
        return matrices

    return _Work(name, eps, judged, outcomes, [attack.arguments for attack in singles])


def _own(judge: _Judge, name: str, factory: AttackFactory, eps: float) -> _Work:
    """An attack of the caller's: at one eps; judged on the way where it is one of the package's."""
    came: Any = factory
    if not callable(came) or isinstance(came, Attack) or (isinstance(came, type) and issubclass(came, Attack)):
        told = f"the class {came.__name__}" if isinstance(came, type) else f"a {type(came).__name__}"
        raise TypeError(f"attacks[{name!r}] must be a factory, lambda model, eps: FGSM(model, eps=eps), got {told}")
    model = judge.model
    attack = factory(model, eps)
    network = unwrapped(model)
    if isinstance(attack, Attack) and attack.bn == "train" and any(part is network for part in attack.model.modules()):
        raise ValueError(f'attacks[{name!r}] must have bn="eval", as evaluate runs the model in eval mode, got "train"')
    if isinstance(attack, Attack) and getattr(attack, "targeted", False):
        raise ValueError(
            f"attacks[{name!r}] must not be targeted: evaluate gives it the true labels. For targets of yours: "
            f"lambda model, eps: lambda images, labels: {type(attack).__name__}(model, eps=eps, targeted=True)"
            "(images, targets)"
        )
    arguments, iterative = [], None
    # Of the package's own, and of nobody's sub-class, it is known what the call does and depends on.
    if isinstance(attack, Attack) and type(attack).__module__.startswith("segadv.attacks."):
        if isinstance(attack, BIM) and attack.model is model and judge.agrees(attack) and _keeps_to(attack, eps):
            iterative = attack
        plain = all(is_plain(getattr(attack, entry.name)) for entry in fields(attack) if entry.name != "model")
        if plain and attack.bn == "eval":  # the flags of another model are not in its hash
            source = {} if attack.model is model else {"model_sha256": model_hash(attack.model)}
            arguments = [attack.arguments | source]
    if iterative:
        judged = _judged_steps(iterative.steps)
    else:
        steps = getattr(attack, "steps", 1)
        judged = (int(steps) if isinstance(steps, Integral) and int(steps) > 0 else 1,)

    def outcomes(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        if iterative:
            matrices, broken, unmoved = iterative._outcomes(images, labels, judged)
            judge.note("nan", name, eps, broken.sum())
            judge.note_unmoved(name, eps, unmoved, matrices[-1])
            return matrices[None]
        with frozen(model):  # whatever the attack does to it, or to its arguments, ends here
            adversarial = attack(images.clone(), labels.clone())
        adversarial = judge.looked_at(adversarial, images, name, eps)
        outcome = judge(adversarial, labels, name, eps)
        if isinstance(attack, FGSM):  # others leave images as they are on purpose
            judge.note_unmoved(name, eps, _equal(adversarial, images), outcome)
        return outcome[None, None]

    return _Work(name, (eps,), judged, outcomes, arguments)


def _identity(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """The model, and where and how it computes."""
    network = unwrapped(model)
    with frozen(model):  # says what is wrong with a model that cannot be attacked
        model_sha256 = model_hash(model)
    return {
        "model": type(getattr(network, "_orig_mod", network)).__name__,  # not OptimizedModule
        "model_sha256": model_sha256,
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "float32": _precision_of_float32(device.type),
        "device": device.type,
        "backend": backends.requested() or backends.default(device.type),
        "versions": versions(),
    }


def _precision_of_float32(device_type: str) -> list[str]:
    """That of matrix products and of convolutions, which may be "tf32" or "bf16"; "none" leaves it to PyTorch."""
    backend: Any = torch.backends
    if device_type == "cuda":
        return [backend.cuda.matmul.fp32_precision, backend.cudnn.conv.fp32_precision]
    return [backend.mkldnn.matmul.fp32_precision, backend.mkldnn.conv.fp32_precision]


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds the default generators of the CPU and of a GPU.

    torch.manual_seed seeds those of all devices, also the ones that have nothing to do with it, and asks every kind of
    device there might be, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _keeps_to(attack: BIM, eps: float) -> bool:
    """Whether its images stay in box and ball, so that they need not be looked at."""
    # narrower bounds come after the ball, and lead out of it
    return attack.bounds == (0, 1) and float(torch.as_tensor(attack.eps, device="cpu").amax()) <= eps + _ROUNDING


def _equal(images: Tensor, others: Tensor) -> Tensor:
    """bool [N]."""
    return (images == others).flatten(1).all(1)


def _judged_steps(steps: int) -> tuple[int, ...]:
    return (*(count for count in STEP_COUNTS if count < steps), steps)


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *[1] * (tensor.dim() - 1))


# --- evaluate -----------------------------------------------------------------------------------------------


class _Tally:
    """Sums of outcomes over the batches, and of every image the `overlap` of those classes that are in it."""

    def __init__(self) -> None:
        self.confusion: dict[tuple[str, float, int], Tensor] = {}
        self.batches: dict[tuple[str, float, int], list[Tensor]] = {}
        """int64 [4, K] of each batch: number of the image, class, intersection, union."""

    def add(self, attack: str, eps: float, steps: int, matrices: Tensor) -> None:
        """matrices: int64 [N, C, C]."""
        key = (attack, eps, steps)
        total = matrices.sum(0)
        self.confusion[key] = self.confusion[key] + total if key in self.confusion else total
        intersection, union = overlap(matrices).unbind(1)
        image, kind = union.nonzero(as_tuple=True)
        number = image.unique(return_inverse=True)[1]  # among those with a labelled pixel
        entries = torch.stack((number, kind, intersection[image, kind], union[image, kind]))
        self.batches.setdefault(key, []).append(entries)

    @staticmethod
    def merged(shares: Sequence[_Tally]) -> _Tally:
        """Of batches that were dealt out in turn."""
        merged = _Tally()
        for key in dict.fromkeys(chain.from_iterable(share.confusion for share in shares)):
            merged.confusion[key] = sum(share.confusion[key] for share in shares if key in share.confusion)  # type: ignore[assignment]
            merged.batches[key] = _in_turn([share.batches.get(key, []) for share in shares])
        return merged

    def measurement(self, attack: str, key: tuple[str, float, int]) -> Measurement:
        count, batches = 0, []
        for image, *others in self.batches[key]:
            batches.append(torch.stack((image + count, *others)))
            count = int(batches[-1][0].max()) + 1 if len(image) else count
        image, kind, *counts = torch.cat(batches, 1)
        intersection, union = (values.double() for values in counts)

        def sums(values: Tensor) -> Tensor:
            """Over the classes of each image."""
            return values.new_zeros(count, dtype=torch.float64).index_add_(0, image, values.double())

        miou_of_each = sums(intersection / union) / sums(torch.ones_like(union))
        all_intersections, all_unions = overlap(self.confusion[key]).double()
        iou = class_iou(self.confusion[key])
        # without an image only its classes change; one of which nothing is left is gone, with the IoU 0 until then
        rest = all_unions[kind] - union
        changes = (all_intersections[kind] - intersection) / rest.clamp(min=1) - iou[kind]
        classes = (all_unions > 0).sum() - sums(rest == 0)
        without_each = (iou.nansum() + sums(changes)) / classes.clamp(min=1)
        return Measurement("", attack, *key[1:], self.confusion[key], miou_of_each, without_each)


def _in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """The order of the whole loader, whose entries were dealt out in turn."""
    return [entry for turn in zip_longest(*shares) for entry in turn if entry is not None]


def checked_eps(eps: Iterable[float], *, name: str = "eps") -> list[float]:
    """The sizes of an evaluation's perturbations as floats."""
    given: Any = eps.tolist() if isinstance(eps, Tensor) else eps
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(map(is_number, given := list(given))):
        raise TypeError(f"{name} must be a sequence of numbers, such as (0, 0.01), got {eps!r}")
    values = [float(value) for value in given]
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{name} must be numbers in [0, 1], the unit of the images (8/255, not 8), got {eps}")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must not repeat a number, got {eps}")
    return values


def _checked_steps(steps: int | Mapping[float, int], eps: Sequence[float]) -> dict[float, int]:
    """eps -> steps."""
    if isinstance(steps, Mapping) and (missing := [value for value in eps if value not in steps]):
        raise ValueError(f"steps must have an entry for every eps, there is none for {missing}")
    counts = {value: steps[value] if isinstance(steps, Mapping) else steps for value in eps}
    for count in counts.values():
        at_least(1, steps=count)
    return {value: int(count) for value, count in counts.items()}


def _checked_batch(batch: Any, index: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a loader's batch."""
    if isinstance(batch, Mapping):
        raise TypeError(
            f"loader gave a batch with the keys {list(batch)}; a tuple that begins with images and labels is "
            "needed: ((batch[...], batch[...]) for batch in loader)"
        )
    images, labels, *_ = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        came = f"{type(images).__name__} and {type(labels).__name__}"
        raise TypeError(f"loader gave a batch that begins with {came}; two tensors, images and labels, are needed")
    check_sizes(images, labels)
    in_range(images, f"batch {index} of the loader", slack=_ROUNDING)
    return images, labels


def _plan(
    judge: _Judge,
    attacks: Sequence[str] | Mapping[str, AttackFactory],
    eps: tuple[float, ...],
    steps: Mapping[float, int],
) -> tuple[list[str], list[_Work]]:
    """The attacks' names and what is to be done for each batch."""
    names = [attacks] if isinstance(attacks, str) else list(dict.fromkeys(attacks))
    if not names:
        raise ValueError("attacks must name at least one attack")
    works = []
    if isinstance(attacks, Mapping):
        if reserved := [name for name in names if name == "clean" or name in WORST_CASES]:
            raise ValueError(f"attacks must have other names than {', '.join(reserved)}")
        works = [_own(judge, name, factory, value) for name, factory in attacks.items() for value in eps]
    else:
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"attacks must be names, or a mapping from names to factories, got {names}")
        names_out_of(ATTACKS, attacks=names)
        for name in names if eps else ():
            if name == "fgsm":
                works.append(_fgsm(judge, eps))
                continue
            for count in dict.fromkeys(steps.values()):
                group = tuple(value for value in eps if steps[value] == count)
                works.append(_iterative(judge, name, group, count))
    if not any(0.0 in work.eps for work in works):
        works.insert(0, _clean(judge))
    return names, works


def evaluate(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    attacks: Sequence[str] | Mapping[str, AttackFactory] = PAPER_ATTACKS,
    eps: Sequence[float] = EPS,
    *,
    steps: int | Mapping[float, int] = 100,
    worst_case: bool = True,
    seed: int = 0,
    ignore_index: int = 255,
    align_corners: bool = False,
    records: str | os.PathLike[str] | None = None,
    progress: bool = False,
    sharded: bool = False,
) -> EvaluationResult:
    """mIoU, pixel accuracy and IoU of the classes under attacks, over ranges of eps and of steps.

    Images are taken whole, as the loader gives them; all pixels of the set go into one confusion matrix per
    attack, eps and number of steps (`miou`), and each image's mIoU is averaged beside it (`image_miou`). How far miou
    depends on the choice of the images is told by `miou_error`, for two models by `miou_difference`.

    * eps = 0 is the clean prediction; it is computed once, for all attacks.
    * "worst-case" and "worst-case-miou": for each image, the outcome with the most wrong valid pixels, or that with
      the lowest mIoU of the image: that of an attack, or the clean prediction, as the clean image is in every ball. No
      attack leaves, after all its steps, less pixel accuracy than the former, nor less `image_miou` than the latter.
      But miou is of all images together, and can be lower under a single attack.
    * Over steps: one run of an iterative attack is judged after each of `STEP_COUNTS`. That gives what shorter
      runs would give, except for "segpgd": its lambda rises towards 1/2 over all its steps, so that what is
      reported for 10 of 100 steps is a run of 100 on its way, not SegPGD with 10 steps, which is "segpgd-10".
    * Work is shared: one gradient for FGSM at all eps; iterative attacks take several eps in one batch (on a GPU
      all, or half as many whenever memory does not suffice). A model that takes statistics of the batch, or random
      numbers, may therefore give other outcomes where other eps are asked for.
    * A batch needs a matrix of classes x classes for each image, attack, eps and judged step: give small batches where
      there are thousands of classes.

    Args:
        model: takes images in [0, 1]; runs in eval mode where its parameters are, and is left as it was.
        loader: batches whose first two entries are images [N, 3, H, W] in [0, 1] and labels [N, H, W].
        attacks: names out of `ATTACKS`: "fgsm"; "bim-10" (alpha 0.004, no random start, last iterate: Wiens &
            Hammer 2022, doi 10.5220/0010788400003122); "bim", "pgd", "segpgd", "cospgd", "cospgd-balanced" (alpha =
            eps / 3, best iterate, random start but for "bim"; in the last one's loss all classes of an image weigh
            alike); "pgd-10", "segpgd-10" and those of 20, 40 and 100 steps (the same as "pgd" and "segpgd", but the
            last iterate: Gu et al. 2022, arXiv 2207.12391). Or a mapping from names to factories:
            ``factory(model, eps)`` gives the attack, and ``attack(images, labels)`` the adversarial images. What it
            does to its arguments and to the model's flags and buffers is undone after the call, what it does to
            `.grad` is not. A UserWarning tells of images outside [0, 1], or farther than eps from the clean ones, as
            some attacks' are on purpose.
        eps: the sizes of the perturbation, in the images' unit.
        steps: number of steps of "bim", "pgd", "segpgd", "cospgd" and "cospgd-balanced", or a mapping from each eps to
            one.
        worst_case: adds "worst-case" and "worst-case-miou" where there are several attacks.
        seed: with the batch's number it decides the random starts. (It seeds PyTorch's global generator, which is
            restored, for attacks from factories; a generator that a factory makes is its own affair.)
        ignore_index: label of the pixels that count nowhere.
        align_corners: how logits of another size than the labels are resampled.
        records: folder for the outcomes of every attack, eps and batch. Called again with it, `evaluate` goes
            on where it was stopped; records of another model, data or arguments are never taken. A model is told
            from others by all that `segadv.records.model_hash` sees; where something else changes, give another folder.
            Outcomes that a warning is about are not recorded. Attacks from factories are recorded only if they are of
            a class of `segadv.attacks` itself, with bn="eval", have neither a generator nor a callable, and stay in
            box and ball.
        progress: show a progress bar with the time left, or a line per minute where stderr is no terminal; needs
            tqdm.
        sharded: the loader gives this process's share of the batches, which may be none; the counts of all processes
            are added up, and all get the result. Every process of the group has to make the call. An image in two
            shares counts twice: a `DistributedSampler` repeats some, ``batches[rank::processes]`` does not.

    Raises:
        TypeError: a model that is no nn.Module, an attack that is neither a name nor a factory, a loader that gives no
            tensors, an argument of another type.
        ValueError: an unknown attack; eps outside [0, 1]; a loader without a batch or without a labelled pixel; images
            that are not in [0, 1]; logits that are NaN or infinite at labelled pixels, on clean images or under an
            attack, so that there is no loss; labels of another size than the images, or neither a class nor
            `ignore_index`; an attack of the caller's that gives something else than finite images of the same shape, is
            targeted, or has bn="train" with the evaluated model, which runs in eval mode.
    """
    a_module(model)
    at_least(0, seed=seed)
    whole_number(ignore_index=ignore_index)
    true_or_false(worst_case=worst_case, align_corners=align_corners, progress=progress, sharded=sharded)
    seed, ignore_index = int(seed), int(ignore_index)
    values = checked_eps(eps)
    positive = tuple(value for value in values if value > 0)
    judge = _Judge(model, ignore_index, align_corners)
    names, works = _plan(judge, attacks, positive, _checked_steps(steps, positive))
    judged = {(work.attack, value): work.steps for work in works for value in work.eps}
    worst_cases = WORST_CASES if worst_case and len(names) > 1 else {}
    for name, value in product(worst_cases, positive):
        judged[name, value] = (max(judged[attack, value][-1] for attack in names),)
    device = device_of(model) or torch.device("cpu")
    identity = {**_identity(model, device), "seed": seed, **judge.options}
    store, tally = Records(records, identity, approve=judge.approves), _Tally()

    def computed(work: _Work, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_generators(device, seed)
            outcomes = work.outcomes(images, labels, seed).cpu()
        judge.settle()
        if not sharded:  # where all processes have to raise together
            judge.check()
        return outcomes

    data: list[str] = []  # hashes of the samples, those of a batch in one entry
    images_seen, batch_size = 0, 0
    # Passes of a batch through the model, so that the time left is right in spite of unequal attacks.
    passes = sum(work.passes for work in works)
    total = len(loader) * passes if isinstance(loader, Sized) else None
    with progress_bar("evaluate", total=total, unit="pass", show=progress) as bar, frozen(model):
        for index, batch in enumerate(loader):
            images, labels = _checked_batch(batch, index)
            content = "".join(content_hash(*sample) for sample in zip(images, labels, strict=True))
            data.append(content)
            images_seen, batch_size = images_seen + len(images), max(batch_size, len(images))
            images, labels = images.to(device), labels.to(device)
            number = index * distributed.world_size() + distributed.rank() if sharded else index
            batch_seed = int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0])
            finals: dict[float, list[Tensor]] = {value: [] for value in positive}
            for work in works:
                depends_on = [[arguments, work.steps, number, content] for arguments in work.arguments]
                compute = partial(computed, work, images, labels, batch_seed)
                outcomes = store.outcomes(work.attack, work.eps, depends_on, compute)
                for value, by_steps in zip(work.eps, outcomes, strict=True):
                    if value == 0:
                        clean = by_steps[0]
                        tally.add("clean", 0.0, 0, clean)
                        continue
                    for count, matrices in zip(work.steps, by_steps, strict=True):
                        tally.add(work.attack, value, count, matrices)
                    finals[value].append(by_steps[-1])
                bar.update(work.passes)
            for value in positive if worst_cases else ():
                each = torch.stack([*finals[value], clean])
                numbers = torch.arange(each.shape[1], device=each.device)
                for name, worst in worst_cases.items():
                    tally.add(name, value, judged[name, value][0], each[worst(each), numbers])
    if sharded:
        shares = distributed.gather((tally, judge.found, images_seen, batch_size, data, judge.strayed))
        tally = _Tally.merged([share[0] for share in shares])
        judge.found = sum((share[1] for share in shares), Counter())
        judge.add_strays(*(share[5] for share in shares))
        images_seen = sum(share[2] for share in shares)
        batch_size = max(share[3] for share in shares)
        data = _in_turn([share[4] for share in shares])
    judge.check()
    judge.warn()
    if not tally.confusion:
        raise ValueError("loader gave no batch")
    if not tally.confusion["clean", 0.0, 0].any():
        raise ValueError(
            f"loader gave no pixel whose label is other than ignore_index={ignore_index}; the splits named test have "
            "no labels in Cityscapes and VOC: evaluate on val"
        )
    measurements = [
        tally.measurement(name, ("clean", 0.0, 0) if value == 0 else (name, value, count))
        for name in [*names, *worst_cases]
        for value in values
        for count in ((0,) if value == 0 else judged[name, value])
    ]
    run = {
        **identity,
        "attacks": {name: [a for w in works if w.attack == name for a in w.arguments if a] for name in names},
        "eps": values,
        "images": images_seen,
        "batch_size": batch_size,
        "data_sha256": hashlib.sha256("".join(data).encode()).hexdigest(),
        "device": str(device),
    }
    return EvaluationResult(measurements, json.loads(json.dumps(run)))
