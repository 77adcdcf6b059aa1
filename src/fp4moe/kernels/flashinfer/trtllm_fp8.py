"""FP8 weights and activations with one scale a matrix for TRT-LLM-Gen."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..operands import Operands
from .library import FlashInfer
from .trtllm_entry import Entry, shuffled_rows
from .weights import round_to_e4m3

__all__ = ["Fp8Entry"]


class Fp8Entry(Entry):
    """e4m3 x e4m3, with static scales of the activations.

    Operands: rows of gate_up are [up; gate], interleaved and shuffled. With s the scales of the
    weights, s_x = hidden_scale and s_a = intermediate_scale (decode multipliers): hidden_scale [1]
    is 1 / s_x; intermediate_scale [L] is s_up * s_x / s_a where the layer is gated, else 1 / s_a;
    down_block_scale [L, 1, 1] is s_a * s_down; gate_up_block_scale is s * s_x, in memory first all
    of gate's [L], then all of up's. Gate and up may have scales that differ.
    """

    format = FORMATS["fp8"].name
    given, from_logits = "trtllm_fp8_per_tensor_scale_routed_moe", "trtllm_fp8_per_tensor_scale_moe"
    layout = shuffled_rows(tiled=False)

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return the scales as products."""
        first, inner = operands.gate_up_block_scale, operands.intermediate_scale
        product = (first[..., 0] * operands.hidden_scale).T.contiguous()
        encode = inner.reciprocal()
        return operands._replace(
            gate_up_block_scale=product.view(first.shape),
            hidden_scale=operands.hidden_scale.reciprocal(),
            intermediate_scale=product[1] * encode if layer.gated else encode,
            down_block_scale=operands.down_block_scale * inner.view(-1, 1, 1),
        )

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return codes e4m3 [T, Hp]."""
        return {"hidden_states": round_to_e4m3(hidden, columns, operands.hidden_scale)}

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the weights, and the three scalars of the epilogues."""
        local = operands.down_packed.shape[0]
        return {
            "gemm1_weights": operands.gate_up_packed.view(torch.float8_e4m3fn),
            "output1_scales_scalar": operands.intermediate_scale,
            "output1_scales_gate_scalar": operands.gate_up_block_scale.view(-1)[:local],
            "gemm2_weights": operands.down_packed.view(torch.float8_e4m3fn),
            "output2_scales_scalar": operands.down_block_scale.view(-1),
            "use_routing_scales_on_input": False,
        }
