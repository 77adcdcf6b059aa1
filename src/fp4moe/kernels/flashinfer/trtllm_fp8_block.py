"""FP8 weights with a scale for 128 x 128 of them, as in DeepSeek-V3, for TRT-LLM-Gen."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..base import Layout
from ..operands import Operands
from .library import FlashInfer
from .trtllm_entry import Entry, padded_sizes, raw_parameters
from .weights import E4M3_MAX, pad_columns, swap_halves

__all__ = ["Fp8BlockEntry"]

# Smallest largest value of a block of activations, as in `fp4moe.formats`.
BLOCK, SMALLEST = 128, 1e-10


class Fp8BlockEntry(Entry):
    """e4m3 x e4m3 with scales for 128 x 128 weights and for 128 activations of a token.

    Operands: rows of gate_up are [up; gate], and nothing else is moved. The first GEMM rounds gate
    and up to e4m3 in such blocks, a kernel of its own applies the activation and rounds again.
    """

    format = FORMATS["fp8_block"].name
    given, from_logits = "trtllm_fp8_block_scale_routed_moe", "trtllm_fp8_block_scale_moe"
    layout = Layout(padded_sizes, swap_halves, swap_halves)
    packed_ids = one_group = True
    parameters_since = "0.7.2.post1"

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return codes e4m3 [T, Hp] and scales float32 [Hp/128, T]."""
        blocks = pad_columns(hidden, columns).float().unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax(-1).clamp_(min=SMALLEST) / E4M3_MAX
        codes = (blocks / scale.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).flatten(1)
        return {
            "hidden_states": codes.to(torch.float8_e4m3fn),
            "hidden_states_scale": scale.T.contiguous(),
        }

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the weights, neither shuffled nor in blocks of columns."""
        return {
            "gemm1_weights": operands.gate_up_packed.view(torch.float8_e4m3fn),
            "gemm1_weights_scale": operands.gate_up_block_scale,
            **raw_parameters(operands, layer),
            "gemm2_weights": operands.down_packed.view(torch.float8_e4m3fn),
            "gemm2_weights_scale": operands.down_block_scale,
            "use_shuffled_weight": False,
            "weight_layout": 0,
            "fp8_quantization_type": flashinfer.fp8_quantization("DeepSeekFp8"),
        }
