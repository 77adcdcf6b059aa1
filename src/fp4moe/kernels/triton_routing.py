"""Sort slots by expert into padded tiles, and sum a token's slots: two small Triton kernels.

A slot is one entry of expert_ids [T, K], numbered t * K + k. Everything is in integers or in a
fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_kernel", "sort_kernel"]


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def sort_kernel(
    ids,
    order,
    tile_expert,
    num_tiles,
    num_slots,
    expert_offset,
    local_experts,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one expert's tiles; grid [local experts], none waits for another.

    ids: int [num_slots], global. order: int32, SLOTS a tile, slots ascending, -1 behind the last.
    tile_expert: int32, a tile's local expert. num_tiles: int32 [1]. EXPERTS: a power of two above
    local_experts; the last bin takes ids that are not local.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_slots, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = tl.load(ids + index, mask=index < num_slots, other=-1).to(tl.int64) - expert_offset
        inside = (local >= 0) & (local < local_experts) & (index < num_slots)
        counts += tl.histogram(tl.where(inside, local, EXPERTS - 1).to(tl.int32), EXPERTS)
    tiles = tl.where(bins < local_experts, (counts + SLOTS - 1) // SLOTS, 0)
    first = tl.sum(tl.where(bins < expert, tiles, 0))
    own = tl.sum(tl.where(bins == expert, tiles, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    if expert == 0:
        tl.store(num_tiles, tl.sum(tiles))
    done = 0
    if count > 0:
        for start in range(0, num_slots, CHUNK):
            index = start + tl.arange(0, CHUNK)
            there = index < num_slots
            local = tl.load(ids + index, mask=there, other=-1).to(tl.int64) - expert_offset
            match = ((local == expert) & there).to(tl.int32)
            place = first * SLOTS + done + tl.cumsum(match, 0) - 1
            tl.store(order + place, index, mask=match != 0)
            done += tl.sum(match)
    column = tl.arange(0, SLOTS)
    for tile in range(own):
        tl.store(tile_expert + first + tile, expert)
        behind = tile * SLOTS + column
        tl.store(order + first * SLOTS + behind, column * 0 - 1, mask=behind >= count)


@triton.jit(do_not_specialize=["expert_offset"])
def combine_kernel(
    partial,
    ids,
    out,
    stride_token,
    hidden_size,
    expert_offset,
    local_experts,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum a token's weighted slots in float32; grid [T, column blocks].

    partial: [T * K, stride], rows of ids that are not local unwritten. out: [T, hidden_size].
    """
    token = tl.program_id(0)
    slot = tl.arange(0, TOP_K_PADDED)
    there = slot < TOP_K
    local = tl.load(ids + token.to(tl.int64) * TOP_K + slot, mask=there, other=-1).to(tl.int64)
    local -= expert_offset
    there &= (local >= 0) & (local < local_experts)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (token.to(tl.int64) * TOP_K + slot) * stride_token
    mask = there[:, None] & (column < hidden_size)[None, :]
    value = tl.load(partial + row[:, None] + column[None, :], mask=mask, other=0.0)
    total = tl.sum(value.to(tl.float32), 0)
    place = out + token.to(tl.int64) * hidden_size + column
    tl.store(place, total.to(out.dtype.element_ty), mask=column < hidden_size)
