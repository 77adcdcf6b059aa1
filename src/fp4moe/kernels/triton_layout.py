"""The Triton kernels' order of weight bytes and block scales: same bytes, and an exact inverse.

Rows go in tiles of 64 and columns in slabs of 64: packed [row tile, slab, row, lane 4, word 2]
of 32-bit words, block scales [row tile, slab, row, 4 bytes]. A word holds eight codes of a row, of
columns 32 * word + 16 * block + 8 * half + 2 * lane + (0, 1): what one thread of a tensor core's
operand owns, so that a tile is decoded where it was loaded. FIELDS says where in a 16-bit half a
code lies; the pair's second code lies 16 bits above.
"""

from __future__ import annotations

import torch

__all__ = ["SLAB", "from_slabs", "scales_from_slabs", "scales_to_slabs", "to_slabs"]

SLAB = 64
# By (block, half): sign bit, lowest magnitude bit. Two of four need one shift and one mask.
FIELDS = ((15, 6), (12, 3), (13, 0), (14, 9))


def to_slabs(packed: torch.Tensor) -> torch.Tensor:
    """Reorder packed codes [L, R, K / 2] uint8; R and K are multiples of 64. Same shape, fresh."""
    out = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    rows, columns = packed.shape[1] // SLAB, packed.shape[2] * 2 // SLAB
    for expert in range(packed.shape[0]):  # the scratch is that of one expert
        codes = torch.stack((packed[expert] & 15, packed[expert] >> 4), -1).to(torch.int32)
        # [row tile, row, slab, word, block, half, lane, place]
        codes = codes.reshape(rows, SLAB, columns, 2, 2, 2, 4, 2)
        words = torch.zeros(rows, SLAB, columns, 2, 4, dtype=torch.int32, device=packed.device)
        for field, (sign, magnitude) in enumerate(FIELDS):
            for place in range(2):
                code = codes[:, :, :, :, field // 2, field % 2, :, place]
                words |= (code >> 3) << (sign + 16 * place)
                words |= (code & 7) << (magnitude + 16 * place)
        ordered = words.permute(0, 2, 1, 4, 3).contiguous()
        out[expert] = ordered.view(torch.uint8).reshape(out.shape[1:])
    return out


def from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `to_slabs`."""
    out = torch.empty(slabs.shape, dtype=torch.uint8, device=slabs.device)
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] * 2 // SLAB
    for expert in range(slabs.shape[0]):
        words = slabs[expert].reshape(-1).view(torch.int32).reshape(rows, columns, SLAB, 4, 2)
        words = words.permute(0, 2, 1, 4, 3)
        # [row tile, row, slab, word, block, half, lane]
        bytes_ = torch.empty(
            (rows, SLAB, columns, 2, 2, 2, 4), dtype=torch.uint8, device=slabs.device
        )
        for field, (sign, magnitude) in enumerate(FIELDS):
            low, high = (
                (((words >> (sign + 16 * place)) & 1) << 3)
                | ((words >> (magnitude + 16 * place)) & 7)
                for place in range(2)
            )
            bytes_[:, :, :, :, field // 2, field % 2] = (low | (high << 4)).to(torch.uint8)
        out[expert] = bytes_.reshape(out.shape[1:])
    return out


def scales_to_slabs(scale: torch.Tensor) -> torch.Tensor:
    """Reorder block scales [L, R, K / 16] uint8 by the same tiles. Same shape, fresh."""
    rows, columns = scale.shape[1] // SLAB, scale.shape[2] // 4
    tiles = scale.reshape(-1, rows, SLAB, columns, 4).transpose(2, 3)
    return tiles.contiguous().view(scale.shape)


def scales_from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `scales_to_slabs`."""
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] // 4
    tiles = slabs.reshape(-1, rows, columns, SLAB, 4).transpose(2, 3)
    return tiles.contiguous().view(slabs.shape)
