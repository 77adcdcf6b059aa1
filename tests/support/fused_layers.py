"""Calibrated layers and tokens for tests of the kernels."""

from __future__ import annotations

import dataclasses

import torch

from fp4moe import ExpertWeights
from fp4moe.testing import make_layer
from fp4moe.tools.selftest import LAYERS

# On a B200, as `why_not` takes it.
LAYER = {**LAYERS["Gemma4-26B-A4B"], "capability": (10, 0)}


def layer(
    hidden=256,
    intermediate=192,
    experts=4,
    activation="silu",
    gated=True,
    num_experts=None,
    expert_offset=0,
    seed=0,
    format="nvfp4",
) -> ExpertWeights:
    """Random experts whose four scales all differ from 1 and from expert to expert."""
    return make_layer(
        experts,
        hidden,
        intermediate,
        activation,
        gated,
        generator=torch.Generator().manual_seed(seed),
        hidden_scale=4.5 / 2688,
        intermediate_scale=torch.linspace(0.5, 2.0, experts) * 3 / 2688,
        num_experts=num_experts,
        expert_offset=expert_offset,
        format=format,
    )


def tokens(count, weights, top_k=2, dtype=torch.bfloat16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, weights.hidden_size, generator=generator).to(dtype)
    scores = torch.rand(count, weights.num_experts, generator=generator)
    routing_weights, ids = scores.topk(top_k, dim=-1)
    return hidden, ids, routing_weights


def with_biases(weights: ExpertWeights, seed=0) -> ExpertWeights:
    """Return the layer with random biases, zero behind its sizes, that are felt in its output."""
    generator = torch.Generator().manual_seed(seed)
    experts, halves = weights.local_experts, 1 + weights.gated
    first = torch.zeros(experts, halves, weights.intermediate_padded)
    second = torch.zeros(experts, weights.hidden_padded)
    for bias, size in ((first, weights.intermediate_size), (second, weights.hidden_size)):
        bias[..., :size] = torch.randn(*bias.shape[:-1], size, generator=generator) / 2
    first, second = first.flatten(1).to(weights.device), second.to(weights.device)
    return dataclasses.replace(weights, gate_up_bias=first, down_bias=second)
