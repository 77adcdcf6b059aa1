"""Blocks that loop in Python over a ModuleList of per-expert MLPs."""

from __future__ import annotations

from torch import nn

from ..candidates import Candidate

__all__ = ["find_module_lists"]


def find_module_lists(model: nn.Module) -> list[Candidate]:
    """Return a candidate for each block that loops over a ModuleList of expert MLPs."""
    return []
