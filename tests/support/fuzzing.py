"""How hypothesis runs here."""

from __future__ import annotations

from typing import Any


def fuzz(max_examples: int) -> Any:
    """Settings: the same examples in every run, however slow; fixtures stay for all of them."""
    import hypothesis

    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
        ],
    )
