"""Kernels `reference` and `reference_w4a4`: the definition itself, without a layout of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .. import reference as definition
from ..experts import ExpertWeights
from ..routing import sigmoid_topk, softmax_topk
from .prepared import Operands, PreparedWeights, logical_weights
from .spec import LayerSettings, MoeSpec, Routing

__all__ = ["REFERENCE", "REFERENCE_W4A4", "ReferenceKernel", "route"]

Definition = Callable[[torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor], torch.Tensor]
BLOCK = 16


def route(
    router_logits: torch.Tensor, routing_bias: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert_ids, routing_weights) as `Routing` says; routing_bias [E] or [0]."""
    if routing.method == "softmax_topk":
        return softmax_topk(router_logits, routing.top_k, renormalize=True, scaling=routing.scaling)
    return sigmoid_topk(
        router_logits,
        routing.top_k,
        bias=routing_bias if routing_bias.numel() else None,
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        scaling=routing.scaling,
    )


class ReferenceKernel:
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

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return nothing: routing is plain torch here."""
        return []

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which size is no multiple of a block."""
        return [
            f"{name} must be a multiple of {BLOCK} without padding, got {getattr(spec, name)}"
            for name in ("hidden_size", "intermediate_size")
            if getattr(spec, name) % BLOCK
        ]

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
        operands, kept = Operands(**weights.operands()), {}
        if output_scale is not None:
            kept["logical_down_global_scale"] = operands.down_global_scale
            operands = operands._replace(
                down_global_scale=operands.down_global_scale * output_scale
            )
        return PreparedWeights(operands, kept, weights.metadata())

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        sizes = (prepared.metadata["hidden_size"], prepared.metadata["intermediate_size"])
        weights = logical_weights(prepared.operands, prepared.settings, *sizes)
        if prepared.kept:
            scale = prepared.kept["logical_down_global_scale"]
            down = dataclasses.replace(weights.down, global_scale=scale)
            weights = dataclasses.replace(weights, down=down)
        return weights

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

    def run_from_logits(
        self,
        hidden: torch.Tensor,
        router_logits: torch.Tensor,
        routing_bias: torch.Tensor,
        routing: Routing,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Route with `fp4moe.routing`, then `run`."""
        with torch.no_grad():
            expert_ids, routing_weights = route(router_logits, routing_bias, routing)
        return self.run(hidden, expert_ids, routing_weights, operands, settings)


REFERENCE = ReferenceKernel("reference", definition.reference, automatic=True)
# Never chosen by itself: it is there to judge Blackwell's accuracy without one.
REFERENCE_W4A4 = ReferenceKernel("reference_w4a4", definition.reference_w4a4, automatic=False)
