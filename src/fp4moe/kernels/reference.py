"""Kernels `reference` and `reference_w4a4`: the definition itself, without a layout of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import reference as definition
from ..experts import ExpertWeights
from ..layer import LayerSettings, MoeSpec
from .base import (
    Operands,
    PreparedWeights,
    fold_output_scale,
    logical_weights,
    sizes_to_pad,
    unfold_output_scale,
)
from .torch_routing import RoutesInTorch

__all__ = ["REFERENCE", "REFERENCE_W4A4", "ReferenceKernel"]

Definition = Callable[[torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor], torch.Tensor]
BLOCK = 16


class ReferenceKernel(RoutesInTorch):
    """A definition of `fp4moe.reference` behind the operator."""

    def __init__(self, name: str, compute: Definition, automatic: bool):
        self.name = name
        self.automatic = automatic
        self.quantizes_activations = compute is definition.reference_w4a4
        self.intermediate_dtype = torch.float32
        self._compute = compute

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return nothing: any size, activation and device will do once padded to blocks of 16."""
        return []

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which size is no multiple of a block."""
        return sizes_to_pad(spec, (BLOCK, BLOCK))

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return BLOCK, BLOCK

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Return the weights as they are: the logical layout is this kernel's own."""
        operands, kept = fold_output_scale(Operands(**weights.operands()), output_scale)
        return PreparedWeights(operands, kept, weights.metadata())

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        sizes = (prepared.metadata["hidden_size"], prepared.metadata["intermediate_size"])
        return logical_weights(unfold_output_scale(prepared), prepared.settings, *sizes)

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Compute [T, H]; see `fp4moe.reference`."""
        # The true intermediate size is not known here; what lies behind it is zero.
        sizes = (hidden.shape[1], operands.down_packed.shape[2] * 2)
        with torch.no_grad():
            weights = logical_weights(operands, settings, *sizes)
            return self._compute(hidden, weights, expert_ids, routing_weights)


REFERENCE = ReferenceKernel("reference", definition.reference, automatic=True)
# Never chosen by itself: it is there to judge Blackwell's accuracy without one.
REFERENCE_W4A4 = ReferenceKernel("reference_w4a4", definition.reference_w4a4, automatic=False)
