"""Choose experts from router logits in one small Triton kernel, a program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...layer import Routing

__all__ = ["MOST_EXPERTS", "choose_experts", "choose_experts_kernel"]

# The last ten bits of a key are the expert.
MOST_EXPERTS = 1024


@triton.jit
def _ordered(value, index):
    """int64 in the order of float32 value (NaN first), the lower index first among equals."""
    bits = value.to(tl.int32, bitcast=True)
    # Negative floats count down: all bits but the sign turn over.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.int64) * 1024 + (1023 - index)


@triton.jit
def choose_experts_kernel(
    logits, stride_token, bias, output_scale, ids, weights, num_groups, group_experts, scaling,
    GROUPS: tl.constexpr, GROUP_EXPERTS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Write ids int64 and weights float32 [T, TOP_K] by falling score; grid [T].

    Experts stand as [GROUPS, GROUP_EXPERTS], both padded to powers of two. TOP_GROUPS: 0 for all.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    inside = tl.arange(0, GROUP_EXPERTS)[None, :]
    expert = group * group_experts + inside
    there = (group < num_groups) & (inside < group_experts)
    value = tl.load(logits + token * stride_token + expert, mask=there, other=0.0).to(tl.float32)
    if SIGMOID:
        value = tl.sigmoid(value)
    score = value
    if BIASED:
        score += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    LAST: tl.constexpr = -(2**63)
    key = tl.where(there, _ordered(score, expert), LAST)
    if TOP_GROUPS:
        first = tl.max(key, 1)[:, None]
        second = tl.max(tl.where(key == first, LAST, key), 1)[:, None]
        best_two = tl.sum(tl.where((key == first) | (key == second), score, 0.0), 1)[:, None]
        group_key = tl.where(group < num_groups, _ordered(best_two, group), LAST)
        kept = group_key == LAST
        for _ in tl.static_range(TOP_GROUPS):
            kept |= group_key == tl.max(tl.where(kept, LAST, group_key))
        key = tl.where(kept, key, LAST)
    place = tl.arange(0, TOP_K_PADDED)
    chosen = tl.zeros((TOP_K_PADDED,), dtype=tl.int64)
    weight = tl.zeros((TOP_K_PADDED,), dtype=tl.float32)
    largest = tl.max(tl.where(there, value, float("-inf")))
    for k in tl.static_range(TOP_K):
        best = tl.max(key)
        mine = key == best
        chosen = tl.where(place == k, 1023 - (best & 1023), chosen)
        weight = tl.where(place == k, tl.sum(tl.where(mine, value, 0.0)), weight)
        key = tl.where(mine, LAST, key)
    if SIGMOID:
        weight /= tl.sum(weight) + 1e-20
    else:
        # The sum over all experts cancels.
        weight = tl.where(place < TOP_K, tl.exp(weight - largest), 0.0)
        weight /= tl.sum(weight)
    weight *= scaling
    if SCALED:
        weight *= tl.load(output_scale + chosen, mask=place < TOP_K, other=0.0).to(tl.float32)
    at = token * TOP_K + place
    tl.store(ids + at, chosen, mask=place < TOP_K)
    tl.store(weights + at, weight, mask=place < TOP_K)


def choose_experts(
    logits: torch.Tensor, bias: torch.Tensor, routing: Routing, output_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expert_ids int64, routing_weights float32), [T, K] each, as `fp4moe.routing` does.

    Args:
        logits: [T, E], any float dtype, T > 0 and E at most MOST_EXPERTS.
        bias, output_scale: [E], or [0] for none.
        routing: the method; see `Routing`.
    """
    tokens, num_experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = logits.new_empty((tokens, routing.top_k), dtype=torch.int64)
    weights = logits.new_empty((tokens, routing.top_k), dtype=torch.float32)
    group_experts = num_experts // routing.num_groups
    sigmoid = routing.method == "sigmoid_topk"
    choose_experts_kernel[(tokens,)](
        logits, logits.stride(0), bias.contiguous(), output_scale.contiguous(),
        ids, weights, routing.num_groups, group_experts, routing.scaling,
        GROUPS=triton.next_power_of_2(routing.num_groups),
        GROUP_EXPERTS=triton.next_power_of_2(group_experts),
        TOP_GROUPS=routing.top_groups if routing.top_groups < routing.num_groups else 0,
        TOP_K=routing.top_k, TOP_K_PADDED=triton.next_power_of_2(routing.top_k),
        SIGMOID=sigmoid, BIASED=sigmoid and bias.numel() > 0,
        SCALED=output_scale.numel() > 0, num_warps=1,
    )  # fmt: skip
    return ids, weights
