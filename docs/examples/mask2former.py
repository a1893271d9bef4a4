"""A Hugging Face Mask2Former, which returns masks and classes of queries instead of logits: `output=`.

    pip install -c constraints.txt . transformers scipy
    python docs/examples/mask2former.py

MaskFormer, OneFormer and EoMT return the same two tensors. The network here is tiny and random;
`Mask2FormerForUniversalSegmentation.from_pretrained(...)` takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import segadv
from segadv.compat import import_torchvision

import_torchvision()  # not needed where torch and torchvision were built for the same device
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what Mask2Former's image processor normalises with


def tiny_mask2former(num_classes: int) -> Mask2FormerForUniversalSegmentation:
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=num_classes,
        num_queries=6,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
    )
    return Mask2FormerForUniversalSegmentation(config)


def of_queries(output: Any) -> Tensor:
    """Logits [N, C, h, w]: the logarithm of the scores whose largest is the class in semantic segmentation.

    score_c = sum_q p_q(c) m_q, over the queries' classes, without "no object", and their masks. The image processor's
    `post_process_semantic_segmentation` gives the index of the largest instead, through which no gradient passes.
    """
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    masks = output.masks_queries_logits.sigmoid()
    return torch.einsum("nqc,nqhw->nchw", classes, masks).clamp(min=1e-6).log()


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(8, 3, 4, 4), size=(64, 64), mode="bilinear")
    labels = images.argmax(1)  # three classes: the strongest colour
    labels[:, :4] = 255  # not labelled

    # Trained by the logits' cross-entropy, which needs no matching of queries and objects.
    model = segadv.models.wrap(tiny_mask2former(num_classes=3), mean=MEAN, std=STD, output=of_queries)
    criterion = segadv.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    adversarial, info = segadv.fast_newton_step(model, images, labels, return_info=True)
    after = segadv.functional.averaged_gain(model(adversarial), labels)
    for eps, gain, gain_after in zip(info.eps, info.gain, after, strict=True):
        print(f"gain {gain:.4f} -> {gain_after:.4f} by a step of eps {eps:.4f}")


if __name__ == "__main__":
    main()
