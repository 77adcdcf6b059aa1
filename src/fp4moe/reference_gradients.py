"""The gradients of the operator by its definition, in plain torch: of hidden and routing weights.

For a token's row x and the gradient dy of its output, with the weight r of an expert:

    inner = combine(up x + up_bias, gate x + gate_bias)       dr = <dy, down inner + down_bias>
    d_inner = r * (dy down)                                   dx = d_up up + d_gate gate

where `Activation.gradients` makes d_up and d_gate of d_inner. The weights are frozen. One
expert's weights are float at a time.
"""

from __future__ import annotations

import torch

from .experts import ExpertWeights
from .precision import without_autocast
from .reference import Definition, definition_of, rounded_input

__all__ = ["reference_gradients", "reference_w4a4_gradients"]


def reference_gradients(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of hidden and routing_weights through `fp4moe.reference.reference`.

    Computed in float32, or in float64 where hidden is float64.

    Args:
        gradient: [T, H], of the output. hidden: [T, H]. weights: the quantised experts.
        expert_ids: [T, K] global ids; one that is not local gives its routing weight 0.
        routing_weights: [T, K].

    Returns:
        [T, H] in the dtype of hidden, and [T, K] in that of routing_weights.
    """
    defined = definition_of(weights, caller="reference_gradients")
    return _run(gradient, hidden, hidden, weights, expert_ids, routing_weights, defined)


def reference_w4a4_gradients(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients through `reference_w4a4`, as `reference_gradients`.

    Straight through: what the forward rounds is used as it was rounded, and the derivative of every
    rounding is 1.
    """
    defined = definition_of(weights, torch.float32, caller="reference_w4a4_gradients")
    x = rounded_input(hidden, weights)
    return _run(gradient, x, hidden, weights, expert_ids, routing_weights, defined)


def _run(
    gradient: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    defined: Definition,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: the rows that the experts take, of hidden."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x, dy, scale = x.to(dtype), gradient.to(dtype), routing_weights.to(dtype)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    dr = torch.zeros(scale.shape, dtype=dtype, device=x.device)
    first, count = weights.expert_offset, weights.local_experts
    with without_autocast(x.device):
        if x.device.type == "cpu":
            for expert in torch.unique(expert_ids).tolist():
                if first <= expert < first + count:
                    token, slot = (expert_ids == expert).nonzero(as_tuple=True)
                    rows = x[token], dy[token], scale[token, slot]
                    to_rows, dr[token, slot] = _of_expert(defined, expert - first, *rows)
                    dx.index_add_(0, token, to_rows)
        else:
            # Every expert runs on all tokens: no host synchronisation, safe under capture.
            for expert in range(count):
                hit = expert_ids == expert + first
                factor = torch.where(hit, scale, 0.0).sum(1)
                to_rows, to_factor = _of_expert(defined, expert, x, dy, factor)
                # where, not a product: tokens of other experts must not pass on inf or NaN.
                dx += torch.where(hit.any(1, keepdim=True), to_rows, 0.0)
                dr = torch.where(hit, to_factor[:, None], dr)
    return dx.to(hidden.dtype), dr.to(routing_weights.dtype)


def _of_expert(
    defined: Definition, expert: int, x: torch.Tensor, dy: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one expert gives rows [N, H], and their routing weights [N]."""
    part = defined.load(expert)
    up_and_gate = defined.up_and_gate(part, x)
    inner = defined.activation.combine(*up_and_gate)
    to_factor = (dy * defined.down(expert, part, inner)).sum(1)
    to_inner = factor[:, None] * (dy @ part["down"].to(dy.dtype))
    to_products = defined.activation.gradients(to_inner, *up_and_gate)
    to_rows = torch.zeros_like(x)
    for name, to_product in zip(("up", "gate"), to_products, strict=False):
        to_rows = to_rows + to_product @ part[name].to(dy.dtype)
    return to_rows, to_factor
