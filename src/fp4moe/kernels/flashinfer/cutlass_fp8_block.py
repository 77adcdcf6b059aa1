"""FP8 weights with a scale for 128 x 128 of them, as in DeepSeek-V3, for CUTLASS."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..base import Layout
from ..devices import Devices
from ..operands import Operands
from .cutlass_entry import CutlassEntry
from .weights import pad_columns, swap_halves

__all__ = ["Fp8BlockCutlassEntry"]

BLOCK = 128
# Gate and up of smaller scales, whose weights are below 4.5e-8, may have an intermediate so small
# that 448 over its largest value is infinite, and the kernel would return NaN.
SMALLEST_SCALE = 1e-10


class Fp8BlockCutlassEntry(CutlassEntry):
    """e4m3 x e4m3 with scales for 128 x 128 weights and for 128 activations of a token.

    Operands: rows of gate_up, their scales and their biases are [up; gate]; scales of gate and up
    below 1e-10 are 0.
    The kernel rounds gate, up and the intermediate to bfloat16 and quantises both inputs by itself,
    as x * (448 / amax). The library wants CUDA 12.8 or newer, and looks when it is called.
    """

    format = FORMATS["fp8_block"].name
    devices = Devices(((9, 0),))
    layout = Layout(lambda layer, hidden_alignment: (BLOCK, BLOCK), swap_halves, swap_halves)

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return the scales without those that lead to NaN."""
        scale = operands.gate_up_block_scale
        scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
        return operands._replace(gate_up_block_scale=scale)

    def arguments(self, hidden: torch.Tensor, operands: Operands) -> dict[str, Any]:
        """Return the input in bfloat16, the weights and their scales."""
        return {
            "input": pad_columns(hidden, operands.down_packed.shape[1]),
            "fc1_expert_weights": operands.gate_up_packed.view(torch.float8_e4m3fn),
            "fc2_expert_weights": operands.down_packed.view(torch.float8_e4m3fn),
            "quant_scales": [operands.gate_up_block_scale, operands.down_block_scale],
            "use_deepseek_fp8_block_scale": True,
        }
