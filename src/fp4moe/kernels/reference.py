"""Kernels `reference` and `reference_w4a4`: the definition itself, without a layout of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import reference as definition
from ..experts import ExpertWeights
from .spec import MoeSpec

__all__ = ["REFERENCE", "REFERENCE_W4A4", "ReferenceKernel"]

Definition = Callable[[torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor], torch.Tensor]


class ReferenceKernel:
    """A definition of `fp4moe.reference` behind the operator."""

    def __init__(self, name: str, compute: Definition, automatic: bool):
        self.name = name
        self.automatic = automatic
        self._compute = compute

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return nothing: any size, activation and device will do once padded to blocks of 16."""
        return []

    def size_multiples(self, spec: MoeSpec) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return 16, 16

    def prepare(self, weights: ExpertWeights) -> ExpertWeights:
        """Return the weights: the logical layout is this kernel's own."""
        return weights

    def restore(self, prepared: ExpertWeights) -> ExpertWeights:
        """Undo `prepare`."""
        return prepared

    def run(
        self,
        hidden: torch.Tensor,
        prepared: ExpertWeights,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute [T, H]; see `fp4moe.reference`."""
        with torch.no_grad():
            return self._compute(hidden, prepared, expert_ids, routing_weights)


REFERENCE = ReferenceKernel("reference", definition.reference, automatic=True)
# Never chosen by itself: it is there to judge Blackwell's accuracy without one.
REFERENCE_W4A4 = ReferenceKernel("reference_w4a4", definition.reference_w4a4, automatic=False)
