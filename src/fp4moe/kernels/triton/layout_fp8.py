"""The Triton kernels' order of e4m3 codes and of MX scales: same bytes, and an exact inverse.

Tiles of rows and slabs of columns as in `layout`: codes [row tile, slab, row, lane 4, word 4] of
32-bit words. A word holds columns 16 * word + 8 * half + 2 * lane + place of a row; its 16-bit
half `place` has the code of half 0 at bits 15 and 10 to 4, where a bfloat16 wants it, and that of
half 1 around: sign at 11, magnitude at 14 to 12 and 3 to 0. MX scales are [row tile, slab, row,
byte 2].
"""

from __future__ import annotations

import torch

from .layout import PART_BYTES, SLAB

__all__ = ["fp8_from_slabs", "fp8_to_slabs", "powers_from_slabs", "powers_to_slabs"]


def fp8_to_slabs(codes: torch.Tensor) -> torch.Tensor:
    """Reorder codes [L, R, K] uint8; R and K are multiples of 64. Same shape, fresh."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    rows, columns = codes.shape[1] // SLAB, codes.shape[2] // SLAB
    for part, target in zip(_parts(codes), _parts(out), strict=True):
        # [expert, row tile, row, slab, word, half, lane, place]
        bits = part.reshape(-1, rows, SLAB, columns, 4, 2, 4, 2).to(torch.int32)
        a, b = bits.unbind(5)
        both = (a & 0x80) << 8 | (a & 0x7F) << 4 | (b & 0x80) << 4 | (b & 0x70) << 8 | b & 0x0F
        words = both[..., 0] | both[..., 1] << 16
        # To [expert, row tile, slab, row, lane, word].
        ordered = words.permute(0, 1, 3, 2, 5, 4).contiguous()
        target.copy_(ordered.view(torch.uint8).reshape(target.shape))
    return out


def fp8_from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `fp8_to_slabs`."""
    out = torch.empty(slabs.shape, dtype=torch.uint8, device=slabs.device)
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] // SLAB
    for part, target in zip(_parts(slabs), _parts(out), strict=True):
        words = part.reshape(-1).view(torch.int32).reshape(-1, rows, columns, SLAB, 4, 4)
        words = words.permute(0, 1, 3, 2, 5, 4)
        both = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), -1)
        a = both >> 8 & 0x80 | both >> 4 & 0x7F
        b = both >> 4 & 0x80 | both >> 8 & 0x70 | both & 0x0F
        target.copy_(torch.stack((a, b), 5).to(torch.uint8).reshape(target.shape))
    return out


def powers_to_slabs(scale: torch.Tensor) -> torch.Tensor:
    """Reorder MX block scales [L, R, K / 32] uint8 by the same tiles. Same shape, fresh."""
    rows, columns = scale.shape[1] // SLAB, scale.shape[2] // 2
    tiles = scale.reshape(-1, rows, SLAB, columns, 2).transpose(2, 3)
    return tiles.contiguous().reshape(scale.shape)


def powers_from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `powers_to_slabs`."""
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] // 2
    tiles = slabs.reshape(-1, rows, columns, SLAB, 2).transpose(2, 3)
    return tiles.contiguous().reshape(slabs.shape)


def _parts(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split off as many experts at a time as the scratch allows, about ten times their bytes."""
    return codes.split(max(1, PART_BYTES // max(1, codes[0].numel())))
