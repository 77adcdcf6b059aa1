"""NVFP4 weights and activations for FlashInfer's CUTLASS kernels."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import NVFP4
from ...layer import Layer
from ..devices import Devices
from ..operands import Operands
from .cutlass_entry import CutlassEntry
from .weights import pad_columns, row_layout, scale_products, up_first

__all__ = ["Nvfp4CutlassEntry", "size_multiples"]


def size_multiples(gated: bool) -> tuple[int, int]:
    """Return the multiples that hidden and intermediate size are padded to.

    At these, block scales in the kernel's order need no padding of their own: their atom has 128
    rows and 64 columns. The kernel alone would take hidden sizes by 32, padded scales beside.
    """
    # Without a gate, the library checks block scale rows against multiples of 64, but steps from
    # expert to expert by multiples of 128: at 704 or 1856 rows it reads the wrong scales.
    return (128, 64) if gated else (128, 128)


class Nvfp4CutlassEntry(CutlassEntry):
    """NVFP4 x NVFP4.

    Operands: rows of gate_up are [up; gate]; block scales are interleaved 128x4 per expert; scales
    as in `scale_products`; biases are in the order of the rows. Gate, up, the intermediate and each
    expert's output are rounded to bfloat16.
    """

    format = NVFP4.name
    # First where nothing else of FlashInfer runs, then where TRT-LLM-Gen comes first.
    devices = Devices(((12, 0), (12, 1), (10, 0), (10, 3)))
    automatic = True
    layout = row_layout(lambda layer, hidden_alignment: size_multiples(layer.gated), up_first)

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return the operands with the four scales, see `scale_products`."""
        return scale_products(operands)

    def arguments(self, hidden: torch.Tensor, operands: Operands) -> dict[str, Any]:
        """Return the input, which the kernel quantises, the weights and six scales."""
        return {
            "input": pad_columns(hidden, operands.down_packed.shape[1]),
            "fc1_expert_weights": operands.gate_up_packed.view(torch.int64),
            "fc2_expert_weights": operands.down_packed.view(torch.int64),
            "quant_scales": [
                operands.hidden_scale.reshape(()),
                operands.gate_up_block_scale.view(torch.int32),
                operands.gate_up_global_scale,
                operands.intermediate_scale,
                operands.down_block_scale.view(torch.int32),
                operands.down_global_scale,
            ],
        }
