"""Models whose routing uses all that their router has, and their routers."""

from __future__ import annotations

import functools

import torch
from tiny_models import (
    enlarge_latent_experts,
    family,
    gemma4,
    nemotron_h,
    nemotron_h_latent,
    qwen3_moe,
)

from fp4moe.models.replace import replace_moe
from fp4moe.models.routers import ROUTERS, FusedRouter

IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71]])
EPS = torch.finfo(torch.float32).eps
MODELS = {
    "gemma4": gemma4,
    "nemotron_h": nemotron_h,
    "nemotron_h_groups": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}


FAMILIES = (
    *("deepseek_v3", "dots1", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "mellum"),
    *("mimo_v2_flash", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_next", "solar_open"),
)


def routers(model):
    known = {n: getattr(type(m), "kind", type(m)).__name__ for n, m in model.named_modules()}
    return {n: model.get_submodule(n) for n, kind in known.items() if kind in ROUTERS}


def fused_routers(model):
    return [m for m in model.modules() if isinstance(m, FusedRouter)]


def build(name, dtype=torch.float32, seed=3):
    """A float model whose routing uses all that its router has."""
    make = MODELS.get(name) or functools.partial(family, name)
    model = enlarge_latent_experts(make(dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    for router in routers(model).values():
        shape = dict(router.named_parameters())
        for parameter in (shape.get("weight"), shape.get("proj.weight")):
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(values * parameter.shape[1] ** -0.5)
        if hasattr(router, "per_expert_scale"):
            router.per_expert_scale.data.uniform_(0.5, 2, generator=generator)
            router.scale.data.uniform_(0.5, 2, generator=generator)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.data.normal_(generator=generator)
            router.routed_scaling_factor = 2.5
        if hasattr(router, "norm_topk_prob"):
            router.norm_topk_prob = True
        if name.endswith("groups"):
            router.num_group, router.topk_group = 4, 2
    return model


def replaced(model, routing="fused", **options):
    return replace_moe(model, "reference", progress=False, routing=routing, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())
