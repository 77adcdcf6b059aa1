"""Byte layouts of prepared expert weights: padding, row orders, interleaved block scales.

Decides: where a kernel library wants each byte. Every step has an inverse and works on bytes alone.
Not handled here: what the bytes mean, which kernel wants which layout (`fp4moe.kernels`).
"""

from __future__ import annotations

from .block_scales import deinterleave_128x4, interleave_128x4
from .padding import pad_matrix, round_up, trim_matrix
from .rows import (
    down_row_index,
    gate_interleave_index,
    gate_up_row_index,
    inverse_index,
    permute_rows,
    shuffle_index,
    up_gate_index,
)

__all__ = [
    "deinterleave_128x4",
    "down_row_index",
    "gate_interleave_index",
    "gate_up_row_index",
    "interleave_128x4",
    "inverse_index",
    "pad_matrix",
    "permute_rows",
    "round_up",
    "shuffle_index",
    "trim_matrix",
    "up_gate_index",
]
