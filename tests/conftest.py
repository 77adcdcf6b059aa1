"""What every test gets: a fixed seed, and the fixtures and markers that tests ask for by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compile from nothing, and leave nothing compiled behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill torch.empty and its kin with NaN (integers: their maximum).

    An output element that nobody wrote then fails the comparison. Torch fills memory only in its
    deterministic mode; operators without a deterministic form warn there, which is not an error.
    """
    deterministic = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            deterministic.fill_uninitialized_memory = fill
            torch.set_deterministic_debug_mode(mode)
