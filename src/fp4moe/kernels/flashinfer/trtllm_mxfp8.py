"""MXFP8 weights and activations for TRT-LLM-Gen."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..operands import Operands
from .library import FlashInfer, flashinfer_settings
from .trtllm_entry import Entry, raw_parameters, shuffled_rows
from .weights import pad_columns

__all__ = ["ONE", "Mxfp8Entry", "quantize_mxfp8"]

# The scale byte of 1.0. That of zero bytes, 2^-127, has no finite reciprocal where denormals are
# flushed.
ONE = 127


class Mxfp8Entry(Entry):
    """MXFP8 x MXFP8.

    Operands: rows of gate_up are [up; gate], interleaved and shuffled; scale bytes are interleaved
    128x4; biases are in the order of the rows. Alpha, beta, limit and biases are in the model's
    units, since there is no scale besides those of the blocks.
    """

    format = FORMATS["mxfp8"].name
    given, from_logits = "trtllm_fp8_block_scale_routed_moe", "trtllm_fp8_block_scale_moe"
    biased = (from_logits,)
    layout = shuffled_rows(pad_byte=ONE)
    packed_ids = one_group = True

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return codes e4m3 [T, Hp] and scale bytes uint8 [T, Hp/32]."""
        codes, scale = quantize_mxfp8(flashinfer, hidden, columns)
        return {"hidden_states": codes, "hidden_states_scale": scale}

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the weights; biases only where there are some, for not every function has them."""
        biases = {"gemm1_bias": operands.gate_up_bias, "gemm2_bias": operands.down_bias}
        return {
            "gemm1_weights": operands.gate_up_packed.view(torch.float8_e4m3fn),
            "gemm1_weights_scale": operands.gate_up_block_scale,
            **raw_parameters(operands, layer),
            "gemm2_weights": operands.down_packed.view(torch.float8_e4m3fn),
            "gemm2_weights_scale": operands.down_block_scale,
            **{name: bias for name, bias in biases.items() if bias is not None},
            "use_shuffled_weight": True,
            "weight_layout": 0,
            "fp8_quantization_type": flashinfer.fp8_quantization("MxFp8"),
        }


def quantize_mxfp8(
    flashinfer: FlashInfer, hidden: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes e4m3 [T, columns], scale bytes uint8 [T, columns / 32], linear order).

    The library compiles the function for compute capability 10.0 and newer only; below, it returns
    what happens to lie in memory.
    """
    x = pad_columns(hidden, columns)
    codes, scale = flashinfer.call(
        "mxfp8_quantize",
        {"enable_pdl": flashinfer_settings().enable_pdl},
        input=x,
        is_sf_swizzled_layout=False,
    )
    return codes, scale.view(torch.uint8).reshape(x.shape[0], columns // 32)
