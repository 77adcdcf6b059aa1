"""One layer of Gemma4-26B-A4B at its real width, random weights, on any device.

Run: python examples/gemma4_compile.py
"""

from __future__ import annotations

import torch
from one_layer import run
from transformers import Gemma4ForCausalLM, Gemma4TextConfig


def main() -> None:
    """Build the layer: 128 experts, top-8, hidden 2816, intermediate 704; small vocabulary."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        hidden_size=2816,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        enable_moe_block=True,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        # As in a local layer; transformers 5.17 makes no static cache where head sizes differ.
        global_head_dim=256,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        vocab_size=4096,
        vocab_size_per_layer_input=4096,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    run(Gemma4ForCausalLM._from_config(config))


if __name__ == "__main__":
    main()
