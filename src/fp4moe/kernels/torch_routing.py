"""Routing in plain torch before a kernel runs, for kernels that take ids and weights only."""

from __future__ import annotations

import torch

from ..layer import LayerSettings, MoeSpec, Routing
from ..routing import sigmoid_topk, softmax_topk
from .base import Operands

__all__ = ["RoutesInTorch", "route"]


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


class RoutesInTorch:
    """The part of a kernel that routes: any method will do."""

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return nothing."""
        return []

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Compute [T, H] for given ids and weights."""
        raise NotImplementedError

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
