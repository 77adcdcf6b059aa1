"""Rows times the packed matrices of their experts in Triton, and the gradient of the rows.

Launches are those of the fused experts (`gate_up_kernel` that stores its sums) and of their
gradients (`hidden_gradient_kernel`). Sums are float32, in one order.
"""

from __future__ import annotations

import torch

from ..base import current_capability
from ..grouped_matrix import GroupedMatrix
from ..measured import choose_tiles
from .backward import slot_gradients, slot_sums, tile_for
from .sort import sort_slots, sum_slots
from .tiles import Tile

__all__ = ["grouped_input_gradient", "multiply_grouped", "multiply_with"]


def multiply_grouped(
    x: torch.Tensor, ids: torch.Tensor, matrix: GroupedMatrix, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute `fp4moe.kernels.grouped.multiply`; float32 x is rounded to bfloat16."""
    # The tiles of one GEMM of a layer that was measured.
    gate_up = matrix.halves == 2
    rows, columns = matrix.rows // matrix.halves, matrix.columns
    config = choose_tiles(
        current_capability(x.device), gate_up, *((columns, rows) if gate_up else (rows, columns)),
        matrix.experts, ids.numel(), matrix.format,
    )  # fmt: skip
    return multiply_with(
        config.mode, config.gate_up if gate_up else config.down, x, ids, matrix, bias
    )


def multiply_with(
    mode: str,
    tile: Tile,
    x: torch.Tensor,
    ids: torch.Tensor,
    matrix: GroupedMatrix,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute it with a given tile."""
    # Rows without an expert stay zero.
    out = x.new_zeros((ids.numel(), matrix.rows))
    with torch.cuda.device_of(x):
        return slot_sums(mode, tile, x, ids.contiguous(), matrix, bias, out)


def grouped_input_gradient(
    grad: torch.Tensor, ids: torch.Tensor, matrix: GroupedMatrix, columns: int
) -> torch.Tensor:
    """Compute `fp4moe.kernels.grouped.input_gradient`; a row's own is bfloat16 before the sum."""
    ids, rows = ids.contiguous(), grad.to(torch.bfloat16).contiguous()
    tile, window = tile_for(ids.numel(), matrix.experts), (matrix.expert_offset, matrix.experts)
    with torch.cuda.device_of(grad):
        found = sort_slots(ids, *window, tile.slots)
        partial = slot_gradients(tile, rows, ids, matrix, found)
        return sum_slots(partial, ids, window, grad.new_empty((ids.shape[0], columns)))
