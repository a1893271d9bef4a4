"""Checks for gradient masking: whether a model only looks robust because its gradients lead attacks astray.

The signs are those of Athalye, Carlini & Wagner 2018 (arXiv 1802.00420), section 3.1, and of Carlini et al. 2019
(arXiv 1902.06705), and the shape of the loss along the attack's own direction.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .attacks import FGSM, PGD
from .attacks.base import has_label
from .attacks.frozen import device_of, frozen, logits_of
from .checks import is_number
from .evaluation import AttackFactory, evaluate

__all__ = ["Check", "masking_checks"]

TOLERANCE = 0.01
"""Pixel accuracy by which an attack may be weaker than it should be: a random start makes some difference."""
ABOUT_ZERO = 0.05
"""Pixel accuracy that is left at `LARGE_EPS` at most."""
LARGE_EPS = 0.5
_POINTS = 10


@dataclass(frozen=True)
class Check:
    """The result of one check for gradient masking.

    Attributes:
        name: what should hold.
        passed: whether it does; None where it could not be checked.
        finding: the figures, in words.
    """

    name: str
    passed: bool | None
    finding: str


def masking_checks(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    *,
    eps: float = 0.03,
    steps: int = 20,
    sources: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
    ignore_index: int = 255,
    align_corners: bool = False,
    records: str | os.PathLike[str] | None = None,
) -> list[Check]:
    """Six checks for gradient masking; accuracy is pixel accuracy over the loader's images, of which a few suffice.

    1. Accuracy falls with eps and is about 0 at eps 0.5, where any image can become uniform grey ("pgd" and
       "segpgd", the worse for each image).
    2. PGD is not weaker than FGSM.
    3. PGD with more steps is not weaker. Its last iterate is judged: for the best iterate this always holds.
    4. Random noise, every channel of every pixel moved by +eps or -eps, is not stronger than FGSM.
    5. PGD against another model is not stronger than PGD against this one.
    6. The mean loss along the direction of FGSM rises, and does not fall between 0 and eps.

    A failed check is a reason to doubt the model's robustness: gradients may lead the attacks astray. Or the model
    hardly looks at the image: what is left at eps 0.5 may be the accuracy of one class everywhere. That all checks
    pass proves nothing.

    Args:
        model, loader, seed, ignore_index, align_corners, records: as in `segadv.evaluation.evaluate`; all batches of
            the loader are kept in memory: give `itertools.islice(loader, 4)` of a long one.
        eps: size of the perturbation, in the images' unit, at most 0.5.
        steps: of the iterative attacks.
        sources: name -> other models on the same device, for check 5; none leaves it out.

    Returns:
        the six checks, in this order.

    Raises:
        ValueError: eps outside (0, 0.5], and what `evaluate` raises.
    """
    if not is_number(eps) or not 0 < eps <= LARGE_EPS:
        raise ValueError(f"eps must be more than 0 and at most {LARGE_EPS}, in the unit of the images, got {eps!r}")
    options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
    shared: dict[str, Any] = {**options, "seed": seed, "records": records}
    batches = list(loader)

    growing = sorted({0.0, eps / 4, eps / 2, eps, min(2 * eps, LARGE_EPS), LARGE_EPS})
    curves = evaluate(model, batches, ["pgd", "segpgd"], growing, steps=steps, **shared)
    curve = [row["pixel_accuracy"] for row in curves.rows if row["attack"] == "worst-case"]

    def pgd(against: nn.Module | None) -> AttackFactory:
        def factory(target: nn.Module, value: float) -> PGD:
            attacked = target if against is None else against
            return PGD(attacked, eps=value, alpha=value / 3, steps=steps, **options)

        return factory

    attacks: dict[str, AttackFactory] = {
        "fgsm": lambda target, value: FGSM(target, eps=value, **options),
        "pgd": pgd(None),
        "noise": lambda target, value: _noise(value),
        **{f"from {name}": pgd(source) for name, source in (sources or {}).items()},
    }
    result = evaluate(model, batches, attacks, [eps], worst_case=False, **shared)
    accuracy = {row["attack"]: row["pixel_accuracy"] for row in result.rows}
    by_steps = {entry.steps: entry.row["pixel_accuracy"] for entry in result.measurements if entry.attack == "pgd"}
    transfer = {name: value for name, value in accuracy.items() if name.startswith("from ")}
    losses = _losses_along_fgsm(model, batches, eps, options)
    loss = losses.mean(0).tolist()
    highest = itertools.accumulate(loss, max)
    rising = ((losses.diff(dim=1) >= 0).all(1) & (losses[:, -1] > losses[:, 0])).double().mean().item()

    return [
        Check(
            "accuracy falls with eps, to about 0",
            _falls(curve) and curve[-1] <= ABOUT_ZERO,
            ", ".join(f"{value:.3f} at eps {size:g}" for size, value in zip(growing, curve, strict=True))
            + f" under PGD and SegPGD, the worse for each image; {ABOUT_ZERO:g} is about 0",
        ),
        Check(
            "an iterative attack is not weaker than a single step",
            accuracy["pgd"] <= accuracy["fgsm"] + TOLERANCE,
            f"at eps {eps:g} PGD-{steps} leaves {accuracy['pgd']:.3f}, FGSM {accuracy['fgsm']:.3f}",
        ),
        Check(
            "more steps are not weaker",
            _falls([*by_steps.values()]) if len(by_steps) > 1 else None,
            ", ".join(f"{value:.3f} after {count} steps" for count, value in by_steps.items())
            + f" of PGD at eps {eps:g}",
        ),
        Check(
            "random noise is not stronger than a gradient",
            accuracy["noise"] >= accuracy["fgsm"] - TOLERANCE,
            f"at eps {eps:g} noise leaves {accuracy['noise']:.3f}, FGSM {accuracy['fgsm']:.3f}",
        ),
        Check(
            "an attack on another model is not stronger than one on this",
            all(value >= accuracy["pgd"] - TOLERANCE for value in transfer.values()) if transfer else None,
            f"at eps {eps:g} PGD-{steps} on this model leaves {accuracy['pgd']:.3f}, "
            + (", ".join(f"{name} {value:.3f}" for name, value in transfer.items()) or "there was no other model"),
        ),
        Check(
            "the loss only rises along FGSM's direction",
            loss[-1] > loss[0] and all(later >= 0.99 * top for top, later in zip(highest, loss, strict=True)),
            f"mean cross-entropy {loss[0]:.3f} at 0, {loss[_POINTS // 2]:.3f} at {eps / 2:g}, "
            f"{loss[-1]:.3f} at {eps:g}; it only rises for {rising:.0%} of the images",
        ),
    ]


def _falls(accuracy: Sequence[float]) -> bool:
    """Whether none is above the lowest before it, which a slow rise leaves behind, by more than `TOLERANCE`."""
    lowest = itertools.accumulate(accuracy, min)
    return all(later <= before + TOLERANCE for before, later in zip(lowest, accuracy, strict=True))


def _noise(eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, labels: (images + eps * (torch.rand_like(images) - 0.5).sign()).clamp(0, 1)


@torch.no_grad()
def _losses_along_fgsm(
    model: nn.Module, batches: Iterable[Sequence[Tensor]], eps: float, options: Mapping[str, Any]
) -> Tensor:
    """Cross-entropy of each image with a labelled pixel at 0, eps / 10, ... eps along its gradient's sign:
    [images, 11]."""
    device = device_of(model) or torch.device("cpu")
    attack = FGSM(model, **options)
    losses = []
    with frozen(model):
        for images, labels, *_ in batches:
            images, labels = images.to(device), labels.to(device)
            gradient = attack.input_gradient(images, labels)
            points = [functional.sign_step(images, gradient, eps * i / _POINTS) for i in range(_POINTS + 1)]
            by_point = [
                functional.cross_entropy(logits_of(model, point), labels, reduction="image", **options).double()
                for point in points
            ]
            losses.append(torch.stack(by_point, 1)[has_label(labels, attack.ignore_index)].cpu())
    return torch.cat(losses)
