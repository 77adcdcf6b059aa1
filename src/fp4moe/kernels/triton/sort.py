"""Sort slots by expert into padded tiles, and sum a token's slots: small Triton kernels.

A slot is one entry of expert_ids [T, K], numbered t * K + k. Everything is in integers or in a
fixed order, so that equal inputs give equal bits.

Sorted slots come in two forms. Our GEMMs mask: a tile is its expert's number * 1024 + its slots,
and what lies behind an expert's last slot is unwritten. Other libraries read whole tiles (PADDED):
a tile is its expert's number, and behind the last slot stands num_slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["MOST_SORTED_AT_ONCE", "Sorted", "combine_kernel", "count_kernel", "place_kernel"]
__all__ += ["scan_kernel", "sort_kernel", "sort_slots", "sum_slots"]

MOST_SORTED_AT_ONCE = 2048
PADDED_CHUNK, PLACE_CHUNK, SCAN_BLOCK = 1024, 128, 2
COMBINE_COLUMNS = 1024


@triton.jit
def _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS: tl.constexpr):
    """Local experts of slots; the last bin for ids that are not local."""
    local = tl.load(ids + index, mask=index < num_slots, other=-1).to(tl.int64) - expert_offset
    inside = (local >= 0) & (local < local_experts) & (index < num_slots)
    return tl.where(inside, local, EXPERTS - 1).to(tl.int32)


@triton.jit
def _store_tiles(
    order, tiles, expert, first, own, count, num_slots, SLOTS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Write an expert's tiles, and where they are PADDED what stands behind its last slot."""
    for tile in range(own):
        if PADDED:
            tl.store(tiles + first + tile, expert)
        else:
            used = tl.minimum(count - tile * SLOTS, SLOTS)
            tl.store(tiles + first + tile, expert * 1024 + used)
    if PADDED:
        tail = count + tl.arange(0, PADDED)
        padding = tl.zeros((PADDED,), dtype=tl.int32) + num_slots
        tl.store(order + first * SLOTS + tail, padding, mask=tail < own * SLOTS)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def sort_kernel(
    ids, order, tiles, num_tiles, num_slots, expert_offset, local_experts,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr = 0,
):  # fmt: skip
    """Sort slots by expert, each expert's from a new tile on; grid [local experts], none waits.

    ids: int [num_slots], global. order: int32, SLOTS a tile, ascending. tiles: int32. num_tiles:
    int32 [1], where PADDED their slots. EXPERTS: a power of two above local_experts. PADDED: 0, or
    a power of two that is not below SLOTS. For many slots the three kernels below do the same.
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
        tl.store(num_tiles, tl.sum(own) * (SLOTS if PADDED else 1))
    done = 0
    if count > 0:
        for start in range(0, num_slots, CHUNK):
            index = start + tl.arange(0, CHUNK)
            local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
            match = (local == expert).to(tl.int32)
            place = first * SLOTS + done + tl.cumsum(match, 0) - 1
            tl.store(order + place, index, mask=match != 0)
            done += tl.sum(match)
    own = (count + SLOTS - 1) // SLOTS
    _store_tiles(order, tiles, expert, first, own, count, num_slots, SLOTS, PADDED)


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
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr = 0,
):  # fmt: skip
    """Write what `sort_kernel` writes, from scanned counts; grid [max(chunks, local experts)]."""
    number = tl.program_id(0)
    bins = tl.arange(0, EXPERTS)
    total = tl.load(counts + chunks * EXPERTS + bins, mask=bins < local_experts, other=0)
    own = (total + SLOTS - 1) // SLOTS
    first = tl.cumsum(own, 0) - own
    if number == 0:
        tl.store(num_tiles, tl.sum(own) * (SLOTS if PADDED else 1))
    if number < local_experts:
        mine = bins == number
        count = tl.sum(tl.where(mine, total, 0))
        start = tl.sum(tl.where(mine, first, 0))
        full = (count + SLOTS - 1) // SLOTS
        _store_tiles(order, tiles, number, start, full, count, num_slots, SLOTS, PADDED)
    if number < chunks:
        index = number * CHUNK + tl.arange(0, CHUNK)
        local = _bins(ids, index, num_slots, expert_offset, local_experts, EXPERTS)
        column = tl.arange(0, CHUNK)
        same = (local[:, None] == local[None, :]) & (column[:, None] > column[None, :])
        place = tl.gather(first * SLOTS, local, 0) + tl.sum(same.to(tl.int32), 1)
        place += tl.load(counts + number * EXPERTS + local)
        tl.store(order + place, index, mask=local < local_experts)


@triton.jit(do_not_specialize=["expert_offset", "top_k"])
def combine_kernel(
    partial, ids, weights, bias, out, stride_token, stride_bias, hidden_size, expert_offset,
    local_experts, top_k, LANES: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sum a token's slots in float32; grid [T, column blocks].

    partial: [T * K, stride], rows of ids that are not local unwritten. weights: [T * K], read where
    WEIGHTED; else the rows are weighted. bias: None, or float32 [experts, stride], added to rows
    before their weight. out: [T, hidden_size]. LANES: a power of two, not below K.
    """
    token = tl.program_id(0)
    lane = tl.arange(0, LANES)
    there = lane < top_k
    slot = token.to(tl.int64) * top_k + lane
    local = tl.load(ids + slot, mask=there, other=-1).to(tl.int64) - expert_offset
    there &= (local >= 0) & (local < local_experts)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = there[:, None] & (column < hidden_size)[None, :]
    at = (slot * stride_token)[:, None] + column[None, :]
    value = tl.load(partial + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        at = (local * stride_bias)[:, None] + column[None, :]
        value += tl.load(bias + at, mask=mask, other=0.0)
    if WEIGHTED:
        value *= tl.load(weights + slot, mask=there, other=0.0)[:, None]
    place = out + token.to(tl.int64) * hidden_size + column
    tl.store(place, tl.sum(value, 0).to(out.dtype.element_ty), mask=column < hidden_size)


class Sorted(NamedTuple):
    """Slots in tiles: their order, the tiles, how many there are, and at most."""

    order: torch.Tensor
    tiles: torch.Tensor
    number: torch.Tensor
    most: int


def sort_slots(
    ids: torch.Tensor, offset: int, local: int, slots: int, *, padded: bool = False
) -> Sorted:
    """Sort the slots of local experts into tiles of `slots`.

    Args:
        ids: int32 or int64, contiguous, global.
        offset, local: first local expert and their number.
        padded: write whole tiles, see the module; `number` counts their slots then.
    """
    count = ids.numel()
    most = min(count, -(-count // slots) + local)
    order = ids.new_empty(most * slots, dtype=torch.int32)
    tiles = ids.new_empty(most, dtype=torch.int32)
    number = ids.new_empty(1, dtype=torch.int32)
    experts = 1 << local.bit_length()
    common = count, offset, local
    form = {"SLOTS": slots, "PADDED": triton.next_power_of_2(slots) if padded else 0}
    if count <= MOST_SORTED_AT_ONCE:
        chunk = PADDED_CHUNK if padded else max(128, triton.next_power_of_2(count))
        sort_kernel[(local,)](
            ids, order, tiles, number, *common, EXPERTS=experts, CHUNK=chunk, **form, num_warps=8
        )
        return Sorted(order, tiles, number, most)
    chunks = -(-count // PLACE_CHUNK)
    counts = ids.new_empty((chunks + 1) * experts, dtype=torch.int32)
    sizes = {"EXPERTS": experts, "CHUNK": PLACE_CHUNK, "num_warps": 4}
    count_kernel[(chunks,)](ids, counts, *common, **sizes)
    scan_kernel[(experts // SCAN_BLOCK,)](
        counts, chunks, EXPERTS=experts, BLOCK=SCAN_BLOCK, num_warps=4
    )
    place_kernel[(max(chunks, local),)](
        ids, counts, order, tiles, number, *common, chunks, **form, **sizes
    )
    return Sorted(order, tiles, number, most)


def sum_slots(
    partial: torch.Tensor,
    ids: torch.Tensor,
    window: tuple[int, int],
    out: torch.Tensor,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write each token's sum over its slots of local experts to out [T, H], and return it.

    Args:
        partial: [T * K, H or more]; rows of other experts are not read.
        ids: [T, K], contiguous, global.
        window: first local expert and their number.
        weights: float32 [T, K], contiguous; None where the rows are weighted already.
        bias: float32 [L, H or more] of the experts, added to rows before their weight, or None.
    """
    tokens, top_k = ids.shape
    columns = out.shape[1]
    stride_bias = None if bias is None else bias.shape[1]
    combine_kernel[(tokens, -(-columns // COMBINE_COLUMNS))](
        partial, ids, partial if weights is None else weights, bias, out, partial.shape[1],
        stride_bias, columns, *window, top_k, LANES=triton.next_power_of_2(top_k),
        COLUMNS=COMBINE_COLUMNS, WEIGHTED=weights is not None, num_warps=4,
    )  # fmt: skip
    return out
