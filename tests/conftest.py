"""Fixtures shared by all tests. One test body serves every backend through the `backend` fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import segadv
from segadv.ops import backends

BACKENDS = ("native", "reference")


def pytest_configure(config: pytest.Config) -> None:
    reason = backends.BACKENDS["native"].unavailable("cpu")
    if reason is not None:
        raise pytest.UsageError(f"the tests need the compiled core, they never fall back: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with segadv.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
