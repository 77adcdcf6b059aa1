"""Gemma4-26B-A4B (text) and Nemotron-3-Nano-30B-A3B with random weights, made on the device.

Sizes are those of the released configurations; only gains of random weights are changed, which no
time depends on.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch

from fp4moe.models.linears import pack_linear, shared_extremes

SIZES: dict[str, dict[str, Any]] = {
    "gemma4": {
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_experts": 128,
        "top_k_experts": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "vocab_size": 262144,
    },
    "nemotron": {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "hidden_size": 2688,
        "intermediate_size": 1856,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "vocab_size": 131072,
        "routed_scaling_factor": 2.5,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "gemma4": SIZES["gemma4"]
    | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    | {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
    | {"num_experts": 8, "top_k_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"num_global_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "vocab_size": 128},
    "nemotron": SIZES["nemotron"]
    | {"hybrid_override_pattern": "ME*E", "hidden_size": 64, "moe_intermediate_size": 48}
    | {"moe_shared_expert_intermediate_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2}
    | {"num_attention_heads": 4, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8}
    | {"ssm_state_size": 16, "n_groups": 2, "vocab_size": 128, "routed_scaling_factor": 1.0},
}


# Which dense Linears have which format: Gemma4's as in nvidia's NVFP4 checkpoints, Nemotron's as in
# the recipe of its NVFP4 ones, whose attention stays bfloat16.
LINEARS = {
    "gemma4": {"nvfp4": ("*.self_attn.*", "*.mlp.*")},
    "nemotron": {"fp8": ("*.mixer.in_proj", "*.mixer.out_proj", "*.shared_experts.*")},
}


def pack_linears(model: torch.nn.Module, name: str, kernel: str) -> int:
    """Quantise the Linears of LINEARS in place, each format with its own; return how many."""
    count = 0
    for format, patterns in LINEARS[name].items():
        chosen = {
            path: module
            for path, module in model.named_modules()
            if type(module) is torch.nn.Linear
            and any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        }
        extremes = shared_extremes(chosen, format)
        for path, linear in chosen.items():
            model.set_submodule(path, pack_linear(linear, format, "max", kernel, extremes[path]))
        count += len(chosen)
    return count


def build(name: str, tiny: bool, layers: int | None, device: str) -> torch.nn.Module:
    """Build a model in bfloat16 with transformers' own random initialisation, from seed 0.

    Args:
        name: a key of SIZES.
        tiny: small sizes, for a check on a CPU.
        layers: the first so many layers only; NemotronH's need an attention layer, the sixth.
        device: where the weights are made.
    """
    import transformers

    sizes = {**(TINY if tiny else SIZES)[name], "dtype": torch.bfloat16}
    # Unit gain at any width; 0.019 at the real ones.
    sizes["initializer_range"] = sizes["hidden_size"] ** -0.5
    model_class: Any
    if name == "gemma4":
        if layers:
            sizes = sizes | {"num_hidden_layers": layers, "layer_types": None}
        config = transformers.Gemma4TextConfig(
            **sizes,
            enable_moe_block=True,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=0,
            final_logit_softcapping=30.0,
        )
        model_class = transformers.Gemma4ForCausalLM
    else:
        sizes["hybrid_override_pattern"] = sizes["hybrid_override_pattern"][:layers]
        config = transformers.NemotronHConfig(**sizes)
        model_class = transformers.NemotronHForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config).eval().requires_grad_(False)
    steady(model)
    # Random weights may well choose it.
    model.generation_config.eos_token_id = None
    return model


def steady(model: torch.nn.Module) -> None:
    """Set gains as trained models have them; with random ones a rounding changes all logits.

    Attention scores and embeddings of unit size, and blocks that add half as much in all.
    """
    config = model.config
    gain = 0.5 * (2 * config.num_hidden_layers) ** -0.5
    norms = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    outputs = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.fill_(parameter.numel() ** -0.5)
            elif name.endswith(norms):
                parameter.fill_(gain)
            elif config.model_type == "nemotron_h" and name.endswith(outputs):
                parameter.mul_(gain)
            elif name.endswith("embeddings.weight"):
                parameter.mul_(config.hidden_size**0.5)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            # As from_pretrained loads it.
            module.e_score_correction_bias = module.e_score_correction_bias.float()
