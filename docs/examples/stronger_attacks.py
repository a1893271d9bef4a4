"""Are the built-in attacks strong enough? Attacks of your own beside them in `evaluate`, here with the losses of SEA.

    pip install -c constraints.txt ".[demo]" && segadv demo --out runs/demo
    python docs/examples/stronger_attacks.py runs/demo/*/last.pt --data runs/demo/data

SEA (Croce, Singh & Hein, ECCV 2024, arXiv 2306.12941) maximises three losses: the Jensen-Shannon divergence between
prediction and label, the cross-entropy of those pixels that are still right, and the same with weights for the classes
(here all classes of an image weigh alike). This takes these losses, and sign steps that shrink from eps to 0 along a
cosine; it is not SEA itself, whose steps are APGD's and begin in balls of twice eps. An attack is any function from
images and labels to adversarial images: `evaluate` judges what it returns, and complains where it leaves the ball.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segadv
from segadv.attacks.frozen import model_logits
from segadv.comparison import load_trained, whole_images
from segadv.data import open_dataset
from segadv.evaluation import ATTACKS, Measurement, evaluate

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, C, H, W], labels [N, H, W]) -> [N, H, W], 0 where the label is 255; more is worse for the model."""


def jensen_shannon(logits: Tensor, labels: Tensor) -> Tensor:
    """Against a one-hot label it depends on the label's probability p alone, and flattens where p is near 0 or 1."""
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    p = torch.exp(-cross_entropy)
    divergence = math.log(2) - (p * cross_entropy + (1 + p) * p.log1p()) / 2
    return divergence * (labels != 255)


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    return cross_entropy * (logits.argmax(1) == labels)


def balanced(logits: Tensor, labels: Tensor) -> Tensor:
    of_class = F.one_hot(torch.where(labels == 255, logits.shape[1], labels), logits.shape[1] + 1)  # [N, H, W, C + 1]
    pixels = of_class.sum((1, 2), keepdim=True).expand_as(of_class)
    return masked(logits, labels) / (pixels * of_class).sum(3)


OWN = {"js": jensen_shannon, "masked-ce": masked, "balanced-ce": balanced}
BUILT_IN = ("fgsm", "pgd", "segpgd", "cospgd", "cospgd-balanced")


def decaying_pgd(model: nn.Module, eps: float, *, loss: Loss, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack: sign steps from a random start, of eps (1 + cos(pi t / steps)) / 2; of each image the iterate with
    the most wrong pixels."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        labels = labels.long()
        iterate = best = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
        most = torch.full_like(labels[:, 0, 0], -1)
        for step in range(steps + 1):
            with torch.enable_grad():
                logits = model_logits(model(iterate.requires_grad_()))
                logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
                (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), iterate)
            iterate = iterate.detach()
            wrong = ((logits.argmax(1) != labels) & (labels != 255)).sum((1, 2))
            best = torch.where((wrong > most).view(-1, 1, 1, 1), iterate, best)
            most = most.maximum(wrong)
            alpha = eps * (1 + math.cos(math.pi * step / steps)) / 2
            iterate = segadv.functional.sign_step(iterate, gradient, alpha, origin=images, eps=eps)
        return best

    return attack


def compare(model: nn.Module, loader: Iterable[Any], *, eps: float, steps: int) -> list[Measurement]:
    """Clean images, the built-in attacks, their worst cases, those of one's own, and the worst cases of all."""
    built_in = {name: functools.partial(ATTACKS[name], steps=steps) for name in BUILT_IN}
    own = {name: functools.partial(decaying_pgd, loss=loss, steps=steps) for name, loss in OWN.items()}
    with tempfile.TemporaryDirectory() as records:  # so that the built-in attacks run once
        first = evaluate(model, loader, built_in, (0, eps), records=records)
        second = evaluate(model, loader, {**built_in, **own}, (eps,), records=records)
    after_all = {(entry.attack, entry.eps): entry for entry in first.measurements}  # of each attack after all its steps
    clean = after_all.pop((BUILT_IN[0], 0))
    return [
        clean,
        *(entry for (_, at), entry in after_all.items() if at == eps),
        *({entry.attack: entry for entry in second.measurements if entry.attack not in built_in}.values()),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="of segadv train or demo")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args(arguments)
    for path in options.checkpoints:
        model, config = load_trained(path)
        dataset = open_dataset(config["description"]["dataset"], options.data, "val")
        loader = whole_images(dataset, images=options.images, batch_size=4)
        print(f"{path}, trained with {config['arm']}: mIoU, pixel accuracy")
        found = compare(model, loader, eps=options.eps, steps=options.steps)
        names = ["clean", *BUILT_IN, "worst of these, by pixels", "worst of these, by mIoU"]
        names += [*OWN, "worst of all, by pixels", "worst of all, by mIoU"]
        for name, entry in zip(names, found, strict=True):
            print(f"  {name:25} {entry.row['miou']:.4f}  {entry.row['pixel_accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
