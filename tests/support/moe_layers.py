"""The mixture-of-experts layers of both models alone, with routing that shows: for graph tests."""

from __future__ import annotations

import torch
from tiny_models import (
    enlarge_experts,
    enlarge_latent_experts,
    gemma4,
    nemotron_h,
    nemotron_h_latent,
    qwen3_moe,
)
from torch import nn


class Gemma4Moe(nn.Module):
    """What a Gemma4 decoder layer does between its dense MLP and its last norm."""

    def __init__(self, layer):
        super().__init__()
        self.router, self.norm = layer.router, layer.pre_feedforward_layernorm_2
        self.experts = layer.experts

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = self.router(flat)
        return self.experts(self.norm(flat), ids, weights).reshape(hidden.shape)


def moe_layer(name="gemma4", dtype=torch.float32, **settings):
    """[B, S, 64] -> [B, S, 64], frozen; no bias, scale or router weight is 0 or 1."""
    make = {
        "gemma4": gemma4,
        "nemotron_h": nemotron_h,
        "nemotron_h_latent": nemotron_h_latent,
        "qwen3_moe": qwen3_moe,
    }[name]
    model = make(dtype=dtype)
    layers = enlarge_latent_experts(model) if "latent" in name else enlarge_experts(model)
    layers = layers.model.layers
    layer = {"gemma4": lambda: Gemma4Moe(layers[0]), "qwen3_moe": lambda: layers[0].mlp}.get(
        name, lambda: layers[1].mixer
    )()
    router = getattr(layer, "router", None) or layer.gate
    for attribute, value in settings.items():
        setattr(router, attribute, value)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in [*router.named_parameters(), *router.named_buffers()]:
        random = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2:
            tensor.data.copy_(random * tensor.shape[1] ** -0.5)
        elif "bias" in key or "per_expert" in key:
            tensor.data.copy_(1 + 0.3 * random)
    return layer.requires_grad_(False)


def hidden(tokens=7, dtype=torch.float32):
    """Random hidden states [2, tokens, 64]."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, 64, generator=generator).to(dtype)
