"""Fast Newton adversarial training inside your own training loop: two lines are new.

python docs/examples/training_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segadv


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, chosen: Tensor
) -> Tensor:
    """One optimiser step; chosen: [N] bool, the samples that are attacked."""
    if chosen.any():  # new: adversarial images in place of the chosen ones
        images[chosen] = segadv.fast_newton_step(model, images[chosen], labels[chosen])
    loss: Tensor = segadv.CrossEntropyLoss()(model(images), labels)  # the logits may be smaller than the labels
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    model = segadv.models.small_pspnet(num_classes=3)  # any network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        images = F.interpolate(torch.rand(8, 3, 4, 4), size=(64, 64), mode="bilinear")
        labels = images.argmax(1)  # three classes: the strongest colour
        labels[:, :4] = 255  # not labelled
        chosen = torch.rand(len(images)) < 0.5  # the paper attacks each sample with probability 0.5
        losses.append(training_step(model, optimizer, images, labels, chosen).item())
        if step % 10 == 9:
            print(f"step {step + 1}: mean loss of ten steps {sum(losses[-10:]) / 10:.4f}")
    return losses


if __name__ == "__main__":
    main()
