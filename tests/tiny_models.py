"""Small random models of the real transformers classes, for tests."""

from __future__ import annotations

import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def finish(model_class, config, implementation, dtype):
    """Build the model from a fixed seed, with unlike layers and routing that is not uniform."""
    config._experts_implementation = implementation
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
    return model.to(dtype).eval()


def gemma4(implementation="grouped_mm", dtype=torch.float32):
    """Two MoE layers beside dense ones, gated gelu_tanh."""
    config = Gemma4TextConfig(
        **COMMON,
        num_experts=8,
        top_k_experts=2,
        enable_moe_block=True,
        num_hidden_layers=2,
        global_head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    return finish(Gemma4ForCausalLM, config, implementation, dtype)


def nemotron_h(implementation="grouped_mm", dtype=torch.float32, latent=None):
    """Mamba, MoE, attention, MoE; relu2, not gated; optional latent projection."""
    config = NemotronHConfig(
        **COMMON,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        moe_shared_expert_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_latent_size=latent,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
    )
    return finish(NemotronHForCausalLM, config, implementation, dtype)


def nemotron_h_latent(implementation="grouped_mm", dtype=torch.float32):
    """NemotronH whose experts work at half the hidden size."""
    return nemotron_h(implementation, dtype, latent=32)


def qwen3_moe(implementation="grouped_mm", dtype=torch.float32):
    """Two MoE layers, gated silu."""
    config = Qwen3MoeConfig(**COMMON, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2)
    return finish(Qwen3MoeForCausalLM, config, implementation, dtype)


MODELS = {
    "gemma4": gemma4,
    "nemotron_h": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}
