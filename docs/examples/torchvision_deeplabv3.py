"""DeepLabV3 of torchvision, which returns a dict with "out" and, for training, "aux".

    pip install -c constraints.txt ".[models]"
    python docs/examples/torchvision_deeplabv3.py

The attacks find "out" by themselves. torchvision upsamples both to the images' size (align_corners=False);
`SmallLogits` leaves that to the criterion and the attacks, which give the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segadv
from segadv.compat import import_torchvision

import_torchvision()  # not needed where torch and torchvision were built for the same device
from torchvision.models.segmentation import DeepLabV3, deeplabv3_mobilenet_v3_large


class SmallLogits(nn.Module):
    """A torchvision segmentation network without its last step, F.interpolate to the images' size."""

    def __init__(self, network: DeepLabV3) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.backbone(images)
        logits = {"out": self.network.classifier(features["out"])}
        if self.network.aux_classifier is not None:
            logits["aux"] = self.network.aux_classifier(features["aux"])
        return logits


def training_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """torchvision's reference training: the main loss and half of the auxiliary one."""
    criterion = segadv.CrossEntropyLoss()
    logits = model(images)
    loss: Tensor = criterion(logits["out"], labels) + 0.5 * criterion(logits["aux"], labels)
    return loss


def take_statistics(network: nn.Module, images: Tensor) -> None:
    """Sets the running statistics, which mean nothing in an untrained network, to those of one batch."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches since the reset, instead of a moving one
            part.reset_running_stats()
    with torch.no_grad():
        network.train()(images)


def main() -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 8, 8), size=(64, 64), mode="bilinear")
    labels = images.argmax(1)  # three classes: the strongest colour
    labels[:, :4] = 255  # not labelled
    network = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    take_statistics(network, images)
    network.eval()

    for model in (network, SmallLogits(network)):
        loss = training_loss(model, images, labels)
        adversarial, info = segadv.fast_newton_step(model, images, labels, return_info=True)
        print(
            f"{type(model).__name__}: logits {list(model(images)['out'].shape)}, loss {loss:.6f}, "
            f"eps {[round(eps, 6) for eps in info.eps.tolist()]}, "
            f"largest change of a pixel {(adversarial - images).abs().max():.6f}"
        )


if __name__ == "__main__":
    main()
