"""Models and ways of compiling them for the tests of identity."""

from __future__ import annotations

import torch
from tiny_models import MODELS

import fp4moe


def ways(way, **options):
    """The arguments of torch.compile."""
    if way == "pass":
        return {"options": fp4moe.inductor_options()}
    return {
        "backend": fp4moe.backend,
        "options": {"inner_backend": way, "on_no_match": "ignore", **options},
    }


def build(name, seed=0):
    """A model whose weights no other seed has."""
    model = MODELS[name]().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def layers(model):
    return model.model.layers
