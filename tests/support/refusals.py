"""Errors by a fragment of their message."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fp4moe.errors import Fp4MoeError, ShapeError


def assert_refused(
    call: Callable[[], object], fragment: str, error: type[Fp4MoeError] = ShapeError
) -> None:
    """The call raises this error, and its message holds the fragment."""
    with pytest.raises(error) as raised:
        call()
    assert fragment in str(raised.value)
