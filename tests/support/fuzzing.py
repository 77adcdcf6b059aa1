"""How hypothesis runs here. Import this behind `pytest.importorskip("hypothesis")`."""

from __future__ import annotations

import hypothesis


def fuzz(max_examples: int) -> hypothesis.settings:
    """The same examples in every run, however slow; fixtures stay from one to the next."""
    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
        ],
    )
