"""Low-rank adapters inside packed experts: between the two products, which moe keeps to itself.

    first = W x + s B (A x)      inner = combine(first)      y = down inner + s B' (A' inner)

The packed products are fp4moe::grouped_mm, those of the adapters torch's grouped_mm; rows stand
sorted by expert. Every sum has one order. `register_peft` makes PEFT's LoRA use this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..grouped_mm import grouped_mm_operator
from ..kernels import Operands
from ..kernels.grouped import combine, combine_gradient
from ..kernels.grouped_matrix import GroupedMatrix
from ..module import FusedExperts

__all__ = ["LowRank", "experts_with_adapters"]


class LowRank(NamedTuple):
    """A change of one float parameter of E experts, W[e] + scaling * up[e] down[e].

    Attributes:
        down: [E, r, in]. up: [E, out, r], rows in the order of the float parameter.
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


class _Sorted(NamedTuple):
    """The slots of a call by expert.

    Attributes:
        order: slots by expert, int64 [N]. inverse: where each slot stands.
        ids: [N, 1], global, in that order.
        there: bool [T, K], whether the id is an expert's.
        ends: int32 [E], where each expert's slots end; those without an expert are the last one's.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    ids: torch.Tensor
    there: torch.Tensor
    ends: torch.Tensor


def _sort(expert_ids: torch.Tensor, experts: int) -> _Sorted:
    there = (expert_ids >= 0) & (expert_ids < experts)
    keys, order = torch.where(there, expert_ids, experts - 1).reshape(-1).sort(stable=True)
    places = torch.arange(experts, device=order.device, dtype=keys.dtype)
    ends = torch.searchsorted(keys, places, right=True).to(torch.int32)
    return _Sorted(order, order.argsort(), expert_ids.reshape(-1, 1)[order], there, ends)


class _ToSlots(torch.autograd.Function):
    """hidden [T, H] -> the rows of sorted slots, zero without an expert.

    The gradient sums a token's slots in order.
    """

    @staticmethod
    def forward(ctx, hidden, order, inverse, there):
        ctx.save_for_backward(inverse, there)
        tokens, top_k = there.shape
        # A row of zeros behind them: what has no expert must not pass on inf or NaN.
        rows = torch.where(there.reshape(-1)[order], order // top_k, tokens)
        return torch.cat((hidden, hidden.new_zeros((1, hidden.shape[1]))))[rows]

    @staticmethod
    def backward(ctx, gradient):
        inverse, there = ctx.saved_tensors
        slots = inverse.view(there.shape).unbind(1)
        total = torch.where(there[:, :1], gradient[slots[0]], 0).float()
        for k in range(1, len(slots)):
            total = total + torch.where(there[:, k, None], gradient[slots[k]], 0)
        return total.to(gradient.dtype), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Rows of sorted slots and weights [T, K] -> [T, H], summed in float32."""

    @staticmethod
    def forward(ctx, rows, weights, order, inverse):
        ctx.save_for_backward(rows, weights, order, inverse)
        slots, scale = inverse.view(weights.shape).unbind(1), weights.float()
        total = rows[slots[0]] * scale[:, :1]
        for k in range(1, len(slots)):
            total = total + rows[slots[k]] * scale[:, k, None]
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        rows, weights, order, inverse = ctx.saved_tensors
        each = gradient[order // weights.shape[1]]
        to_weights = (each.float() * rows).sum(1)[inverse].view(weights.shape)
        to_rows = (each * weights.reshape(-1)[order][:, None]).to(rows.dtype)
        return to_rows, to_weights.to(weights.dtype), None, None


class _Combine(torch.autograd.Function):
    """Gate and up side by side -> what down takes; saves them alone, computes in float32."""

    @staticmethod
    def forward(ctx, first, activation, halves, kernel):
        ctx.save_for_backward(first)
        ctx.form = activation, halves, kernel
        return combine(kernel, first, activation, halves)

    @staticmethod
    def backward(ctx, gradient):
        (first,) = ctx.saved_tensors
        activation, halves, kernel = ctx.form
        # A second gradient, which grouped_mm refuses, must find its way there.
        kernel = "reference" if torch.is_grad_enabled() else kernel
        to_first = combine_gradient(kernel, gradient, first, activation, halves)
        return to_first, None, None, None


def experts_with_adapters(
    fused: FusedExperts,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    adapters: Mapping[str, Sequence[LowRank]],
) -> torch.Tensor:
    """Compute the experts with adapters of their first and of their down projection.

    Gradients go to hidden, routing weights and the adapters; what is packed is frozen.

    Args:
        fused: all experts of a layer, prepared for kernel "triton" or "reference".
        hidden: [T, H]. expert_ids, routing_weights: [T, K]. Gate, up and the products of adapters
            are rounded to hidden's dtype, which torch.compile takes as bfloat16 alone.
        adapters: of "first" (gate and up, or up) and "down"; absent or empty: none.

    Returns:
        [T, H] in the dtype of hidden.
    """
    if not torch.compiler.is_compiling():
        fused.look_again()
    if not expert_ids.numel():
        return hidden * 0
    layer, operands = fused.layer, fused.prepared.operands
    found = _sort(expert_ids, layer.num_experts)
    x = _ToSlots.apply(hidden, found.order, found.inverse, found.there)
    halves = 1 + layer.gated
    # Inductor fuses plain operations with what stands around them.
    kernel = "reference" if torch.compiler.is_compiling() else fused.kernel
    first = _product(fused, operands, "gate_up", halves, x, found)
    for change in adapters.get("first", ()):
        rows = _gate_first(change.up, fused.float_layout, halves)
        first = first + _low_rank(x, change._replace(up=rows), found.ends, first.shape[1], halves)
    inner = _Combine.apply(first, layer.activation, halves, kernel)
    y = _product(fused, operands, "down", 1, inner, found)
    for change in adapters.get("down", ()):
        y = y + _low_rank(inner, change, found.ends, y.shape[1], 1)
    weights = torch.where(found.there, routing_weights, 0)
    return _WeightedSum.apply(y, weights, found.order, found.inverse)[:, : hidden.shape[1]]


def _product(
    fused: FusedExperts,
    operands: Operands,
    gemm: str,
    halves: int,
    rows: torch.Tensor,
    found: _Sorted,
) -> torch.Tensor:
    layer = fused.layer
    matrix = GroupedMatrix.of(operands, gemm, layer.format, halves, layer.expert_offset)
    bias = getattr(operands, f"{gemm}_bias")
    bias = rows.new_empty(0, dtype=torch.float32) if bias is None else bias
    settings = layer.format, fused.kernel, halves, layer.expert_offset
    return grouped_mm_operator(rows, found.ids, *matrix[:3], bias, *settings)


def _gate_first(up: torch.Tensor, layout: str | None, halves: int) -> torch.Tensor:
    """Return rows [E, out, r] of a float module's order as the packed weights have them."""
    if halves == 1 or layout == "gate_up":
        return up
    pairs = up.unflatten(1, (-1, 2))
    return pairs.transpose(1, 2).flatten(1, 2)


def _low_rank(
    x: torch.Tensor, change: LowRank, ends: torch.Tensor, rows: int, halves: int
) -> torch.Tensor:
    """Return scaling * up[e] (down[e] x), with the columns and rows that padding adds."""
    down, up = change.down.to(x.dtype), change.up.to(x.dtype)
    # CUDA's grouped product takes contiguous rows of whole 16 bytes.
    rank = -down.shape[1] % 8
    down = F.pad(down, (0, x.shape[1] - down.shape[2], 0, rank)).contiguous()
    up = up.unflatten(1, (halves, -1))
    up = F.pad(up, (0, rank, 0, rows // halves - up.shape[2])).flatten(1, 2).contiguous()
    inner = F.grouped_mm(x, down.transpose(1, 2), offs=ends) * change.scaling
    return F.grouped_mm(inner, up.transpose(1, 2), offs=ends)
