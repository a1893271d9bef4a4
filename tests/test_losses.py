"""segadv.CrossEntropyLoss as a drop-in for torch.nn.CrossEntropyLoss and for a foreign model's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import segadv


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own", [(20, 30), (5, 8)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(reduction: Any, own: tuple[int, int], weighted: bool, align_corners: bool) -> None:
    z = torch.randn(2, 7, *own, requires_grad=True)
    y = torch.randint(0, 7, (2, 20, 30))
    y[0, :5] = 255
    weight = torch.rand(7) if weighted else None
    criterion = segadv.CrossEntropyLoss(weight=weight, reduction=reduction, align_corners=align_corners)
    theirs = nn.CrossEntropyLoss(weight=weight, ignore_index=255, reduction=reduction)
    upsampled = nn.functional.interpolate(z, (20, 30), mode="bilinear", align_corners=align_corners)
    loss, expected = criterion(z, y), theirs(upsampled, y)
    torch.testing.assert_close(loss, expected)
    outgoing = torch.rand_like(expected)
    (grad,), (grad_expected,) = (torch.autograd.grad(value, z, outgoing) for value in (loss, expected))
    largest = grad_expected.abs().max().item()
    torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-6 * largest)


def test_is_a_module() -> None:
    criterion = segadv.CrossEntropyLoss(weight=torch.ones(3), ignore_index=7)
    assert criterion.to(torch.float64).weight.dtype is torch.float64
    assert list(criterion.state_dict()) == ["weight"]
    assert repr(criterion) == "CrossEntropyLoss(weight=[3], ignore_index=7, reduction='mean', align_corners=False)"
    assert criterion(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 7)).item() == 0
    with pytest.raises(ValueError, match=r"weight must be a floating point \[C\], got int64 \[3\]"):
        segadv.CrossEntropyLoss(weight=torch.arange(3))
    with pytest.raises(TypeError):
        segadv.CrossEntropyLoss(torch.ones(3))  # type: ignore[misc]


def test_replaces_the_loss_of_segformer() -> None:
    """A Hugging Face SegFormer: logits at a quarter of the labels' size, and a loss that upsamples them."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=19, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16,
        semantic_loss_ignore_index=255, hidden_dropout_prob=0.0, drop_path_rate=0.0, classifier_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    images, labels = torch.rand(2, 3, 64, 96), torch.randint(0, 19, (2, 64, 96))
    labels[:, :4] = 255
    output = model(pixel_values=images, labels=labels)
    assert tuple(output.logits.shape[-2:]) == (16, 24)
    loss = segadv.CrossEntropyLoss()(output.logits, labels)
    torch.testing.assert_close(loss, output.loss)
    theirs = torch.autograd.grad(output.loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    adversarial = segadv.fast_newton_step(model, images, labels)
    assert adversarial.shape == images.shape
    assert not torch.equal(adversarial, images)


def test_bad_arguments_are_named() -> None:
    for given in ("255", True, None):
        with pytest.raises(TypeError, match=f"ignore_index must be a whole number, got a {type(given).__name__}"):
            segadv.CrossEntropyLoss(ignore_index=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction must be one of mean, image, sum, none; got 'average'"):
        segadv.CrossEntropyLoss(reduction="average")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="align_corners must be True or False, got 'false'"):
        segadv.CrossEntropyLoss(align_corners="false")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight must be a tensor \[C\], got a list"):
        segadv.CrossEntropyLoss(weight=[1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must be a floating point \[C\], got float32 \[1, 2\]"):
        segadv.CrossEntropyLoss(weight=torch.ones(1, 2))
