"""Choose experts from router logits: in one launch where Triton runs, else with torch."""

from __future__ import annotations

import torch

from ..layer import Routing
from ..routing import route
from .base import current_capability

__all__ = ["choose_experts"]


def choose_experts(
    router_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    routing: Routing,
    output_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert_ids int64, routing_weights float32), [T, K] each; see `fp4moe.routing.route`.

    Args:
        router_logits: [T, E]. routing_bias, output_scale: [E], or [0] for none.
        routing: how to choose.
    """
    if router_logits.shape[0] and _runs_triton(router_logits):
        from .triton import choose

        if router_logits.shape[1] <= choose.MOST_EXPERTS:
            with torch.cuda.device_of(router_logits):
                return choose.choose_experts(router_logits, routing_bias, routing, output_scale)
    with torch.no_grad():
        return route(router_logits, routing_bias, routing, output_scale)


def _runs_triton(tensor: torch.Tensor) -> bool:
    from .triton.kernel import TRITON, has_triton, interpreted

    if not has_triton():
        return False
    if not tensor.is_cuda:
        return interpreted()
    return TRITON.devices.include(current_capability(tensor.device))
