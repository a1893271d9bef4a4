"""confusion_matrix and argmax_labels against a count by hand, on every backend."""

from __future__ import annotations

import oracle
import pytest
import torch

from segadv import functional as F


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_random_cases(backend: str, seed: int, dtype: torch.dtype, largest: int) -> None:
    case = oracle.random_case(seed, dtype, largest=largest)
    expected = oracle.confusion(case.logits, case.labels, **case.options)
    matrix = F.confusion_matrix(case.logits, case.labels, **case.options)
    assert matrix.dtype is torch.int64
    assert torch.equal(matrix, expected.sum(0))
    assert matrix.invalid.item() == 0
    assert torch.equal(F.confusion_matrix(case.logits, case.labels, per_image=True, **case.options), expected)
    prediction = F.argmax_labels(case.logits, tuple(case.labels.shape[-2:]), align_corners=case.align_corners)
    truth = oracle.upsample(case.logits.double(), case.labels.shape[-2:], case.align_corners).argmax(1)
    counted = case.labels.long() != case.ignore_index
    assert torch.equal(prediction.long()[counted], truth[counted])
    assert prediction.dtype is torch.uint8


@pytest.mark.parametrize("seed", range(len(oracle.SMOOTH)))
def test_smooth_logits(backend: str, seed: int) -> None:
    case = oracle.smooth_case(seed)
    expected = oracle.confusion(case.logits, case.labels, **case.options)
    assert torch.equal(F.confusion_matrix(case.logits, case.labels, per_image=True, **case.options), expected)


def test_ties_nan_and_infinity(backend: str) -> None:
    z = torch.zeros(1, 3, 1, 5)
    z[0, :, 0, 1] = torch.tensor([1.0, 2.0, 2.0])
    z[0, :, 0, 2] = torch.tensor([5.0, torch.nan, torch.nan])
    z[0, :, 0, 3] = -torch.inf
    z[0, :, 0, 4] = torch.tensor([-torch.inf, torch.inf, torch.inf])
    assert F.argmax_labels(z, (1, 5)).flatten().tolist() == z.argmax(1).flatten().tolist() == [0, 1, 1, 0, 1]


def test_more_than_256_classes(backend: str) -> None:
    z = torch.randn(2, 300, 3, 3)
    prediction = F.argmax_labels(z, (7, 7))
    assert prediction.dtype is torch.int16
    assert torch.equal(prediction.long(), oracle.upsample(z, (7, 7)).argmax(1))
    matrix = F.confusion_matrix(z, torch.full((2, 7, 7), 299))
    assert matrix.sum() == matrix[299].sum() == 98


def test_classification_and_empty(backend: str) -> None:
    z, y = torch.randn(9, 4), torch.randint(0, 4, (9,))
    assert F.confusion_matrix(z, y).sum() == 9
    for per_image in (False, True):
        z, y = torch.randn(0, 4, 2, 2), torch.zeros(0, 4, 4, dtype=torch.uint8)
        matrix = F.confusion_matrix(z, y, per_image=per_image)
        assert matrix.shape == ((0, 4, 4) if per_image else (4, 4))
        assert (matrix.sum(), matrix.invalid) == (0, 0)
    assert F.confusion_matrix(torch.randn(2, 4, 2, 2), torch.full((2, 4, 4), 255)).sum() == 0
