"""The peers' parity tests, run by `make peers`: vLLM's and SGLang's sources must be on the path."""

from __future__ import annotations

import pathlib
import sys
import warnings

import pytest

with warnings.catch_warnings():
    # While tests are collected warnings are errors; those of its packages are theirs.
    warnings.simplefilter("ignore")
    import flashinfer  # noqa: F401

# The modules beside this file are imported by their plain names.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if pathlib.Path(__file__).parent in item.path.parents:
            # What the peers warn about is theirs.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fp4moe take every device for a B200; the calls are recorded."""
    from gpu import install

    from fp4moe.kernels import base

    install()
    monkeypatch.setattr(base, "query_capability", lambda device: (10, 0))
