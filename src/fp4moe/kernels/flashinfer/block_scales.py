"""The 128x4 interleave of block scales that tensor-core GEMMs read, and its inverse.

Row m, column k of an expert's scales lies at byte

    ((m // 128) * (Cp // 4) + k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4

of its Rp * Cp bytes, where Rp is R rounded up to 128 and Cp is C rounded up to 4. Source: the
FlashInfer 0.6.13 and 0.7.2 headers (quantization_utils.cuh, get_sf_out_offset_128x4).
"""

from __future__ import annotations

import torch

from ...errors import must
from ...padding import check_bytes, round_up

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "deinterleave_128x4", "interleave_128x4"]

TILE_ROWS, TILE_COLUMNS = 128, 4


def interleave_128x4(scale: torch.Tensor) -> torch.Tensor:
    """Reorder linear block scales into 128x4 tiles, padded with zeros to whole tiles.

    Args:
        scale: E4M3 bytes as uint8 [L, R, C], any strides; row m, column k scales elements 16 * k
            to 16 * k + 15 of row m.

    Returns:
        uint8 [L, Rp, Cp], contiguous; the shape is nominal, the module's docstring says where each
        byte is. Beside it, one expert's scales are held at a time.

    Raises:
        ShapeError: scale is not uint8 [L, R, C].
    """
    check_bytes("interleave_128x4", "scale", scale)
    experts, rows, columns = scale.shape
    padded = round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS)
    out = torch.empty((experts, *padded), dtype=torch.uint8, device=scale.device)
    # Its edges are zeroed once, and no expert writes them.
    linear = torch.zeros(padded, dtype=torch.uint8, device=scale.device)
    for expert in range(experts):
        linear[:rows, :columns] = scale[expert]
        _interleaved(out[expert]).copy_(_linear(linear))
    return out


def deinterleave_128x4(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undo `interleave_128x4`: return the linear block scales without their padding.

    Args:
        scale: uint8 [L, Rp, Cp] as `interleave_128x4` returns it, any strides.
        rows: rows of the linear scales (R).
        columns: columns of the linear scales (C).

    Returns:
        uint8 [L, R, C], contiguous.

    Raises:
        ShapeError: scale is not uint8, or not the size of rows x columns in whole tiles.
    """
    check_bytes("deinterleave_128x4", "scale", scale)
    padded = round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS)
    if min(rows, columns) < 0 or tuple(scale.shape[1:]) != padded:
        must(
            "deinterleave_128x4: scale",
            f"be [L, {padded[0]}, {padded[1]}] for rows {rows} and columns {columns}",
            list(scale.shape),
            "Pass the sizes before interleaving.",
        )
    out = torch.empty((scale.shape[0], rows, columns), dtype=torch.uint8, device=scale.device)
    tiles, linear = torch.empty((2, *padded), dtype=torch.uint8, device=scale.device)
    for expert in range(scale.shape[0]):
        tiles.copy_(scale[expert])  # scale may start at a byte that no int32 can start at
        _linear(linear).copy_(_interleaved(tiles))
        out[expert] = linear[:rows, :columns]
    return out


# Both views are [row tile, column tile, row % 32, row % 128 // 32] of four scales each, as one
# int32: four times fewer elements to copy.


def _linear(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = scale.shape
    shape = rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS
    return scale.view(shape).view(torch.int32).squeeze(4).permute(0, 3, 2, 1)


def _interleaved(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = scale.shape
    shape = rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS
    return scale.view(shape).view(torch.int32).squeeze(4)
