"""Errors to the letter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fp4moe.errors import Fp4MoeError, ShapeError


def assert_refused(
    call: Callable[[], object], message: str, error: type[Fp4MoeError] = ShapeError
) -> None:
    """The call raises this error with exactly this message."""
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
