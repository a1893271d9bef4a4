"""PSPNet and Unet of segmentation-models-pytorch.

    pip install -c constraints.txt ".[models]" segmentation-models-pytorch
    python docs/examples/smp_models.py

Its Unet returns logits of the images' size and can be used as it is. Its PSPNet upsamples them eightfold at its end,
with align_corners=True. Built with upsampling=1 it returns the small logits, which the criterion and the attacks
resample themselves: the same values, without logits of full size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segadv
from segadv.compat import import_torchvision

import_torchvision()  # not needed where torch and torchvision were built for the same device
import segmentation_models_pytorch as smp

CLASSES = 3


def unet() -> nn.Module:
    model: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
    return model


def pspnet(upsampling: int) -> nn.Module:
    model: nn.Module = smp.PSPNet("resnet18", encoder_weights=None, classes=CLASSES, upsampling=upsampling)
    return model


def loss_and_attack(
    model: nn.Module, images: Tensor, labels: Tensor, *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    criterion = segadv.CrossEntropyLoss(align_corners=align_corners)
    loss = criterion(model(images), labels)
    adversarial = segadv.fast_newton_step(model, images, labels, align_corners=align_corners)
    return loss, adversarial


def main() -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 8, 8), size=(64, 64), mode="bilinear")
    labels = images.argmax(1)  # three classes: the strongest colour
    labels[:, :4] = 255  # not labelled

    loss, adversarial = loss_and_attack(unet().eval(), images, labels)
    print(f"Unet: loss {loss:.6f}, largest change of a pixel {(adversarial - images).abs().max():.5f}")

    large, small = pspnet(upsampling=8).eval(), pspnet(upsampling=1).eval()
    small.load_state_dict(large.state_dict())
    for name, model in (("upsampling=8", large), ("upsampling=1", small)):
        loss, adversarial = loss_and_attack(model, images, labels, align_corners=True)
        change = (adversarial - images).abs().max()
        print(f"PSPNet({name}): logits {list(model(images).shape)}, loss {loss:.6f}, largest change {change:.5f}")


if __name__ == "__main__":
    main()
