"""How to tell an experts module of transformers without importing transformers."""

from __future__ import annotations

__all__ = ["STAMPS", "is_experts_class"]

# What `use_experts_implementation` sets on every instance.
STAMPS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts_class(cls: type) -> bool:
    """Whether `use_experts_implementation` has wrapped this class."""
    return hasattr(cls, "_apply_gate") and hasattr(getattr(cls, "forward", None), "__wrapped__")
