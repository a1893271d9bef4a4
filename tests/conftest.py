"""Fixtures shared by all tests. One test body serves every backend through the `backend` fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import segadv
from segadv.ops import backends

BACKENDS = ("native", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


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
