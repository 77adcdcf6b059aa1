"""One MoE layer of Nemotron-3-Nano-30B-A3B at its real width, random weights, on any device.

Run: python examples/nemotron_h_compile.py
"""

from __future__ import annotations

import torch
from one_layer import run
from transformers import NemotronHConfig, NemotronHForCausalLM


def main() -> None:
    """Build Mamba, attention and MoE: 128 experts, top-6, hidden 2688, intermediate 1856."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=2688,
        intermediate_size=1856,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        n_routed_experts=128,
        num_experts_per_tok=6,
        routed_scaling_factor=2.5,
        layers_block_type=["linear_attention", "full_attention", "moe"],
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        vocab_size=4096,
        dtype=torch.bfloat16,
    )
    run(NemotronHForCausalLM._from_config(config))


if __name__ == "__main__":
    main()
