"""Hugging Face's own experts, as a peer of `fp4moe bench`."""

from __future__ import annotations

from typing import Any

import torch

from ..experts import ExpertWeights

__all__ = ["huggingface_experts"]


def huggingface_experts(name: str, top_k: int, weights: ExpertWeights) -> Any:
    """Return transformers' own experts, bfloat16, with the values of `weights`.

    Args:
        name: "gemma4", or "nano" for Nemotron-H's, which have no gate.
    """
    from transformers import AutoConfig

    sizes = {"hidden_size": weights.hidden_size, "moe_intermediate_size": weights.intermediate_size}
    if name == "gemma4":
        from transformers.models.gemma4 import modeling_gemma4

        config = AutoConfig.for_model(
            "gemma4_text",
            num_experts=weights.num_experts,
            top_k_experts=top_k,
            **sizes,
        )
        make: Any = modeling_gemma4.Gemma4TextExperts
    else:
        from transformers.models.nemotron_h import modeling_nemotron_h

        config = AutoConfig.for_model(
            "nemotron_h",
            n_routed_experts=weights.num_experts,
            num_experts_per_tok=top_k,
            **sizes,
        )
        make = modeling_nemotron_h.NemotronHExperts
    with torch.device("meta"):
        experts = make(config)
    experts = (
        experts.to(torch.bfloat16).to_empty(device=weights.down.packed.device).requires_grad_(False)
    )
    for expert in range(weights.num_experts):
        part = weights.slice_experts(expert, expert + 1).dequantize()
        gate_up = [part["gate"][0]] if weights.gated else []
        target = experts.gate_up_proj if weights.gated else experts.up_proj
        target[expert].copy_(torch.cat([*gate_up, part["up"][0]]))
        experts.down_proj[expert].copy_(part["down"][0])
    return experts
