"""A Hugging Face SegFormer, whose logits are at a quarter of the images' size.

    pip install -c constraints.txt . transformers
    python docs/examples/segformer.py

The network here is tiny and random; `SegformerForSemanticSegmentation.from_pretrained(...)` takes its place.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import segadv
from segadv.compat import import_torchvision

import_torchvision()  # not needed where torch and torchvision were built for the same device
from transformers import SegformerConfig, SegformerForSemanticSegmentation

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what SegFormer's image processor normalises with


def tiny_segformer(num_classes: int) -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        num_labels=num_classes,
        semantic_loss_ignore_index=255,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
    )
    return SegformerForSemanticSegmentation(config)


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(8, 3, 4, 4), size=(64, 64), mode="bilinear")  # in [0, 1]: what attacks need
    labels = images.argmax(1)  # three classes: the strongest colour
    labels[:, :4] = 255  # not labelled
    segformer = tiny_segformer(num_classes=3)

    # The network normalises its images inside, so that the attack's step is in pixels.
    model = segadv.models.wrap(segformer, mean=MEAN, std=STD)
    criterion = segadv.CrossEntropyLoss()  # resamples the logits while it reads them
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    logits = model(images)
    print(f"images {list(images.shape)}, logits {list(logits.shape)}")
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    own = segformer(pixel_values=normalised, labels=labels).loss  # upsamples the logits first
    print(f"loss {criterion(logits, labels):.6f}, SegFormer's own {own:.6f}")

    adversarial, info = segadv.fast_newton_step(model, images, labels, return_info=True)
    after = segadv.functional.averaged_gain(model(adversarial), labels)
    for eps, gain, gain_after in zip(info.eps, info.gain, after, strict=True):
        print(f"averaged gain {gain:.4f} -> {gain_after:.4f} by a step of eps {eps:.4f}")


if __name__ == "__main__":
    main()
