"""Your own network, which returns something other than logits: `output=`.

    python docs/examples/own_model.py

`output=` is a callable from what the model returns to the logits [N, C, h, w]. A function has to
become an nn.Module first: the attacks need to know the modules, to switch them to eval mode and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segadv
from segadv.attacks import PGD


class Network(nn.Module):
    """Features and a list of side outputs, the last of which are the logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.heads = nn.ModuleList(nn.Conv2d(8, num_classes, 1) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        features = self.body(images)
        return features, {"heads": [head(features) for head in self.heads]}


def last_head(output: tuple[Tensor, dict[str, list[Tensor]]]) -> Tensor:
    return output[1]["heads"][-1]


def two_classes(output: tuple[Tensor, dict[str, list[Tensor]]]) -> Tensor:
    """Two channels of one sigmoid channel z: softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]."""
    z = last_head(output)
    return torch.cat([torch.zeros_like(z), z], 1)


class Ensemble(nn.Module):
    """The logarithm of the mean probabilities of several networks: logits of the ensemble."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([last_head(net(images)).log_softmax(1) for net in self.networks]).logsumexp(0)


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(8, 3, 4, 4), size=(64, 64), mode="bilinear")
    labels = images.argmax(1)  # three classes: the strongest colour
    labels[:, :4] = 255  # not labelled
    red = (labels == 0).long().masked_fill(labels == 255, 255)  # two classes, for the network with one channel
    networks, single = [Network(num_classes=3), Network(num_classes=3)], Network(num_classes=1)
    ensemble = Ensemble(networks)

    criterion = segadv.CrossEntropyLoss()
    parameters = [*ensemble.parameters(), *single.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        loss = criterion(ensemble(images), labels) + criterion(two_classes(single(images)), red)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    _, info = segadv.fast_newton_step(networks[0], images, labels, output=last_head, return_info=True)
    print(f"side outputs: mean eps {info.eps.mean():.4f}")
    _, info = segadv.fast_newton_step(single, images, red, output=two_classes, return_info=True)
    print(f"one sigmoid channel: mean eps {info.eps.mean():.4f}")
    ensemble.eval()
    adversarial = PGD(ensemble, eps=8 / 255, steps=5)(images, labels)
    before, after = (criterion(ensemble(x), labels).item() for x in (images, adversarial))
    print(f"ensemble under PGD: cross-entropy {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
