"""Catastrophic overfitting: what to look at while training with single-step attacks.

A network that overfits catastrophically learns to withstand the one step it is trained with and loses its
robustness against everything else within a few steps of training (Wong et al. 2020, arXiv 2001.03994). Its loss
turns crooked: gradients at neighbouring points stop pointing the same way (Andriushchenko & Flammarion 2020, arXiv
2007.02617).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .attacks import FGSM, PGD, FastNewton
from .attacks.base import has_label
from .attacks.frozen import frozen, logits_of
from .attacks.sign_attacks import uniform_noise
from .data import IGNORE_INDEX
from .results import pixel_accuracy

__all__ = ["catastrophic_overfitting", "probe"]


@torch.no_grad()
def probe(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float = 0.03) -> dict[str, float]:
    """What the model makes of a few images, always the same ones; the model is left as it was.

    Args:
        model: in any mode; looked at in eval mode.
        images: [N, 3, H, W] in [0, 1].
        labels: [N, H, W].
        eps: size of the perturbation, in the images' unit.

    Returns:
        pgd_accuracy: pixel accuracy under PGD with 10 steps of eps / 3, from the same start every time.
        fgsm_accuracy: under FGSM.
        gradient_cosine: between the gradient of an image's cross-entropy at the image and at a random point of
            the ball, the same one every time; mean over the images with a labelled pixel.
        newton_eps_p10, newton_eps_median, newton_eps_p90: of the step sizes that FastNewton would take.
        newton_share_negative_gain: of the images, those whose averaged gain is negative.
    """
    generator = torch.Generator(images.device).manual_seed(0)
    noise = uniform_noise(images, generator)
    neighbours = (images + eps * noise).clamp(0, 1)
    fgsm = FGSM(model, eps=eps)
    pgd = PGD(model, eps=eps, alpha=eps / 3, steps=10, generator=generator.manual_seed(0))
    gradient, other = (fgsm.input_gradient(points, labels) for points in (images, neighbours))
    # of any length: by default what is shorter than 1e-8 counts as that long, as of a network that is sure
    cosine = F.cosine_similarity(gradient.flatten(1).double(), other.flatten(1).double(), eps=1e-150)
    _, newton = FastNewton(model)(images, labels, return_info=True)
    assert newton.gain is not None
    p10, median, p90 = np.quantile(newton.eps.double().cpu().numpy(), [0.1, 0.5, 0.9]).tolist()
    return {
        "pgd_accuracy": _accuracy(model, pgd(images, labels), labels),
        "fgsm_accuracy": _accuracy(model, functional.sign_step(images, gradient, eps), labels),
        "gradient_cosine": _mean_of_labelled(cosine, labels),
        "newton_eps_p10": p10,
        "newton_eps_median": median,
        "newton_eps_p90": p90,
        "newton_share_negative_gain": (newton.gain < 0).double().mean().item(),
    }


def _mean_of_labelled(values: Tensor, labels: Tensor) -> float:
    """Mean over the images that have a labelled pixel; 0 where none has."""
    labelled = values[has_label(labels, IGNORE_INDEX)]
    return labelled.mean().item() if len(labelled) else 0.0


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with frozen(model):
        return pixel_accuracy(functional.confusion_matrix(logits_of(model, images), labels))


def catastrophic_overfitting(probes: Sequence[Mapping[str, float]]) -> bool:
    """Whether, at the last of the probes, PGD accuracy has fallen below half of its highest value while FGSM
    accuracy is higher than it was then.

    Args:
        probes: results of `probe`, in the order of the training; without any there is no overfitting.
    """
    if not probes:
        return False
    best = max(probes, key=lambda entry: entry["pgd_accuracy"])
    last = probes[-1]
    return last["pgd_accuracy"] < 0.5 * best["pgd_accuracy"] and last["fgsm_accuracy"] > best["fgsm_accuracy"]
