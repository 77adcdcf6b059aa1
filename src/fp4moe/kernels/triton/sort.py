"""Sort slots by expert into padded tiles, and sum a token's slots: small Triton kernels.

A slot is one entry of expert_ids [T, K], numbered t * K + k. Everything is in integers or in a
fixed order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_kernel", "count_kernel", "place_kernel", "scan_kernel", "sort_kernel"]


@triton.jit
def _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS: tl.constexpr):
    """Local experts of slots; the last bin for ids that are not local."""
    local = tl.load(ids + index, mask=index < num_slots, other=-1).to(tl.int64) - expert_offset
    inside = (local >= 0) & (local < local_experts) & (index < num_slots)
    return tl.where(inside, local, EXPERTS - 1).to(tl.int32)


@triton.jit
def _store_tiles(tiles, expert, first, own, count, SLOTS: tl.constexpr):
    """Write an expert's tiles: its number * 1024 + the tile's slots."""
    for tile in range(own):
        used = tl.minimum(count - tile * SLOTS, SLOTS)
        tl.store(tiles + first + tile, expert * 1024 + used)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def sort_kernel(
    ids, order, tiles, num_tiles, num_slots, expert_offset, local_experts,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort slots by expert, each expert's from a new tile on; grid [local experts], none waits.

    ids: int [num_slots], global. order: int32, SLOTS a tile, ascending; unwritten behind an
    expert's last. tiles: int32, see `_store_tiles`. num_tiles: int32 [1]. EXPERTS: a power of two
    above local_experts. For many slots the three kernels below do the same.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_slots, CHUNK):
        index = start + tl.arange(0, CHUNK)
        local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
        counts += tl.histogram(local, EXPERTS)
    own = tl.where(bins < local_experts, (counts + SLOTS - 1) // SLOTS, 0)
    first = tl.sum(tl.where(bins < expert, own, 0))
    count = tl.sum(tl.where(bins == expert, counts, 0))
    if expert == 0:
        tl.store(num_tiles, tl.sum(own))
    done = 0
    if count > 0:
        for start in range(0, num_slots, CHUNK):
            index = start + tl.arange(0, CHUNK)
            local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
            match = (local == expert).to(tl.int32)
            place = first * SLOTS + done + tl.cumsum(match, 0) - 1
            tl.store(order + place, index, mask=match != 0)
            done += tl.sum(match)
    _store_tiles(tiles, expert, first, (count + SLOTS - 1) // SLOTS, count, SLOTS)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def count_kernel(
    ids, counts, num_slots, expert_offset, local_experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Count every expert's slots in each chunk of slots; counts: int32 [chunks + 1, EXPERTS]."""
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
    place = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    tl.store(counts + place, tl.histogram(local, EXPERTS))


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(counts, chunks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Make counts those of earlier chunks, and row `chunks` of all; grid [EXPERTS / BLOCK]."""
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, chunks, 128):
        row = start + tl.arange(0, 128)
        at = counts + row[:, None] * EXPERTS + bins[None, :]
        there = (row < chunks)[:, None]
        count = tl.load(at, mask=there, other=0)
        earlier = tl.cumsum(count, 0) - count + before[None, :]
        tl.store(at, earlier, mask=there)
        before += tl.sum(count, 0)
    tl.store(counts + chunks * EXPERTS + bins, before)


@triton.jit(do_not_specialize=["num_slots", "expert_offset", "chunks"])
def place_kernel(
    ids, counts, order, tiles, num_tiles, num_slots, expert_offset, local_experts, chunks,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write what `sort_kernel` writes, from scanned counts; grid [max(chunks, local experts)]."""
    number = tl.program_id(0)
    bins = tl.arange(0, EXPERTS)
    total = tl.load(counts + chunks * EXPERTS + bins, mask=bins < local_experts, other=0)
    own = (total + SLOTS - 1) // SLOTS
    first = tl.cumsum(own, 0) - own
    if number == 0:
        tl.store(num_tiles, tl.sum(own))
    if number < local_experts:
        mine = bins == number
        count = tl.sum(tl.where(mine, total, 0))
        start = tl.sum(tl.where(mine, first, 0))
        _store_tiles(tiles, number, start, (count + SLOTS - 1) // SLOTS, count, SLOTS)
    if number < chunks:
        index = number * CHUNK + tl.arange(0, CHUNK)
        local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
        column = tl.arange(0, CHUNK)
        same = (local[:, None] == local[None, :]) & (column[:, None] > column[None, :])
        place = tl.gather(first * SLOTS, local, 0) + tl.sum(same.to(tl.int32), 1)
        place += tl.load(counts + number * EXPERTS + local)
        tl.store(order + place, index, mask=local < local_experts)


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
