"""MXFP4 weights with MXFP8 or bfloat16 activations for TRT-LLM-Gen."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..operands import Operands
from .library import FlashInfer
from .trtllm_entry import Entry, fp4_weights, raw_parameters, shuffled_rows
from .trtllm_mxfp8 import ONE, quantize_mxfp8
from .weights import pad_columns

__all__ = ["Mxfp4Bf16Entry", "Mxfp4Entry"]


class Mxfp4Entry(Entry):
    """MXFP8 x MXFP4: W4A8, as gpt-oss runs on Blackwell.

    Operands as those of MXFP8, but codes of four bits. The library takes its scale bytes as e4m3,
    and tells MXFP4 from NVFP4 by how many there are.
    """

    format = FORMATS["mxfp4"].name
    given, from_logits = "trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"
    biased = (given, from_logits)
    layout = shuffled_rows(pad_byte=ONE)
    drops_padding = True

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return codes e4m3 [T, Hp] and scale bytes [T, Hp/32], viewed as e4m3."""
        codes, scale = quantize_mxfp8(flashinfer, hidden, columns)
        return {"hidden_states": codes, "hidden_states_scale": scale.view(torch.float8_e4m3fn)}

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the weights; without scalars, for only blocks have scales."""
        return fp4_weights(operands, raw_parameters(operands, layer), (None, None, None))


class Mxfp4Bf16Entry(Mxfp4Entry):
    """bfloat16 x MXFP4: W4A16. Operands are those of W4A8, the intermediate is bfloat16."""

    kind = "mxfp4_w4a16"

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return hidden as bfloat16 [T, Hp]; that there are no scales tells the library."""
        return {"hidden_states": pad_columns(hidden, columns), "hidden_states_scale": None}
