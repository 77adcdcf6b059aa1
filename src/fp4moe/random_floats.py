"""Random float32 numbers on the CPU, whatever dtype and device the caller has made the default."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["random_normal", "random_uniform"]


def random_normal(generator: torch.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Return normal float32 numbers of that shape from a CPU generator."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def random_uniform(generator: torch.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Return float32 numbers of that shape, uniform from 0 to 1, from a CPU generator."""
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
