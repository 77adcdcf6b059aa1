"""The Triton kernels' order of weight bytes and block scales: same bytes, and an exact inverse.

Rows go in tiles of 64 and columns in slabs of 64: packed [row tile, slab, row, lane 4, word 2]
of 32-bit words, block scales [row tile, slab, row, 4 bytes]. Two words hold sixteen codes of a row,
of columns 32 * word + 16 * block + 8 * half + 2 * lane + (0, 1): what one thread of a tensor core's
operand owns, so that a tile is decoded where it was loaded.

Where a code's bits lie follows from how cheaply they are moved to where a bfloat16 wants them: sign
at bit 15, magnitude at 8 to 6, in both 16-bit halves of a register. RECIPE says for each register
by which rotation to the left it comes from a word. Three fit into a word; the bits that remain of
both words, at LEFT and, moved by SECOND_MOVE, beside them, make a third word for the last two. A
row's four scale bytes are one 32-bit word, rotated to the left by 4.
"""

from __future__ import annotations

import torch

__all__ = ["SLAB", "from_slabs", "scales_from_slabs", "scales_to_slabs", "to_slabs", "words_of"]

SLAB = 64
# (word 0, word 1, or 2 for what remains of both; rotation), by word, block and half.
RECIPE = ((0, 0), (0, 4), (0, 10), (2, 6), (1, 0), (1, 4), (1, 10), (2, 12))
LEFT, SECOND_MOVE = (0, 1, 9, 10), 2
PART_BYTES = 1 << 25
TARGETS = (6, 7, 8, 15)  # a code's bits, lowest first


def _source(target: int, word: int, rotation: int) -> int:
    """Return where, of the 64 bits of two words, the bit for place `target` of a register lies."""
    place = (target - rotation) % 32
    if word == 2 and place % 16 not in LEFT:
        return 32 + place - SECOND_MOVE
    return place + 32 * (word == 1)


# [register, place in the pair, bit of the code]
SOURCES = tuple(
    tuple(tuple(_source(target + 16 * place, *step) for target in TARGETS) for place in range(2))
    for step in RECIPE
)


def to_slabs(packed: torch.Tensor) -> torch.Tensor:
    """Reorder packed codes [L, R, K / 2] uint8; R and K are multiples of 64. Same shape, fresh."""
    out = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    rows, columns = packed.shape[1] // SLAB, packed.shape[2] * 2 // SLAB
    for part, target in zip(_parts(packed), _parts(out), strict=True):
        # [expert, row tile, row, slab, register, lane]: a byte is a pair of codes
        pairs = part.reshape(-1, rows, SLAB, columns, 8, 4).to(torch.int32)
        words = pairs.new_zeros((2, len(part), rows, SLAB, columns, 4))
        for register, places in enumerate(SOURCES):
            for place, sources in enumerate(places):
                for bit, source in enumerate(sources):
                    value = (pairs[..., register, :] >> (4 * place + bit)) & 1
                    words[source // 32] |= value << (source % 32)
        ordered = words.permute(1, 2, 4, 3, 5, 0).contiguous()
        target.copy_(ordered.view(torch.uint8).reshape(target.shape))
    return out


def from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `to_slabs`."""
    out = torch.empty(slabs.shape, dtype=torch.uint8, device=slabs.device)
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] * 2 // SLAB
    for part, target in zip(_parts(slabs), _parts(out), strict=True):
        words = part.reshape(-1).view(torch.int32).reshape(-1, rows, columns, SLAB, 4, 2)
        words = words.permute(5, 0, 1, 3, 2, 4)
        pairs = words.new_zeros((len(part), rows, SLAB, columns, 8, 4))
        for register, places in enumerate(SOURCES):
            for place, sources in enumerate(places):
                for bit, source in enumerate(sources):
                    value = (words[source // 32] >> (source % 32)) & 1
                    pairs[..., register, :] |= value << (4 * place + bit)
        target.copy_(pairs.reshape(target.shape))
    return out


def _parts(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split off as many experts at a time as the scratch allows, about ten times their bytes."""
    return packed.split(max(1, PART_BYTES // max(1, packed[0].numel())))


def scales_to_slabs(scale: torch.Tensor) -> torch.Tensor:
    """Reorder block scales [L, R, K / 16] uint8 by the same tiles. Same shape, fresh."""
    rows, columns = scale.shape[1] // SLAB, scale.shape[2] // 4
    tiles = scale.reshape(-1, rows, SLAB, columns, 4).transpose(2, 3)
    return ((tiles << 4) | (tiles.roll(1, -1) >> 4)).reshape(scale.shape)


def scales_from_slabs(slabs: torch.Tensor) -> torch.Tensor:
    """Undo `scales_to_slabs`."""
    rows, columns = slabs.shape[1] // SLAB, slabs.shape[2] // 4
    tiles = slabs.reshape(-1, rows, columns, SLAB, 4).transpose(2, 3)
    return ((tiles >> 4) | (tiles.roll(-1, -1) << 4)).reshape(slabs.shape)


def words_of(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block scales as kernels read them: 32-bit words, or float32 scales."""
    # A row of scales may be two bytes long, half a word.
    words = scale if scale.dtype == torch.float32 else scale.view(-1).view(torch.int32)
    return packed.view(torch.int32), words
