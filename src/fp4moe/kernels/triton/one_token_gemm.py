"""The GEMMs of one token's experts: all of a program's weights are on their way at once.

A program takes a few rows of the expert of one slot (gate and up), or of the experts of all slots
(down). Each of its warps has a chunk of K for itself: weights are loaded straight into the
registers where the tensor core reads them, the N side holds the token's chunks beside each other,
and what a warp multiplies with another's chunk is thrown away. So no warp waits for another until
the sums of the chunks are added up, in their order and in float32.

A unit is one slab (64 columns of K) of one slot's expert; a program's are numbered slot by slot,
and a chunk has PER of them, GROUP of which are loaded together. PER is SLABS at most, so that a
chunk has units of two slots at most. down's sums are weighted, so that what they add up to is the
token's output. Layout, codes and scales are those of NVFP4, see `layout`.
"""

from __future__ import annotations

import triton.language as tl

from .activation import combine
from .decode_nvfp4 import WEIGHT_FACTOR
from .gemm import local_expert
from .registers import (
    arange,
    convert,
    decoded,
    jit,
    launch,
    lines_layout,
    operand_layout,
    pin,
    plain_layout,
    product,
    sliced,
    sums_layout,
    wait,
    zeros,
)  # fmt: skip

__all__ = ["one_token_down_kernel", "one_token_gate_up_kernel"]

# Columns of the N side, the tensor core's fewest: so many chunks at most.
N = tl.constexpr(8)


@jit
def _chunk_start(
    chunk, ids, alone, expert_offset, local_experts,
    PER: tl.constexpr, SLABS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """First slot of each chunk, its first slab, its expert, and that of the next slot; -1: none."""
    slot = chunk * PER // SLABS
    slab = chunk * PER - slot * SLABS
    if SLOTS == 1:
        expert = tl.where(slot == 0, alone, -1)
        following = slot * 0 - 1
    else:
        expert = local_expert(ids, slot, slot < SLOTS, expert_offset, local_experts)
        following = local_expert(ids, slot + 1, slot + 1 < SLOTS, expert_offset, local_experts)
    return slot, slab, expert, following


@jit
def _of_unit(j, slab, first, following, SLABS: tl.constexpr, STRADDLE: tl.constexpr):
    """What is there once for a chunk's first slot, and once for the next one."""
    if STRADDLE:
        first = tl.where(slab + j < SLABS, first, following)
    return first


@jit
def _load_group(
    start, slab, expert, following, words, scales, next_words, next_scales, word_at, scale_at,
    SLABS: tl.constexpr, PER: tl.constexpr, STRADDLE: tl.constexpr, BOTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Words [tiles, chunks, 16, 8] and scales of units, as a tuple; zeros where is none."""
    found = ()
    for i in tl.static_range(GROUP):
        j = start + i
        own = _of_unit(j, slab, expert, following, SLABS, STRADDLE)
        there = ((own >= 0) & (own * 0 + j < PER))[None, :, None]
        if BOTH:
            at = _of_unit(j, slab, words, next_words, SLABS, STRADDLE) + j * 512
            at = at[None, :, None][:, :, :, None] + word_at
            of_scale = _of_unit(j, slab, scales, next_scales, SLABS, STRADDLE)
            of_scale = (of_scale + j * 64)[None, :, None] + scale_at
        else:
            # The same registers for each unit, and the rest a number in the instruction.
            at = words[None, :, None][:, :, :, None] + word_at
            at += j * 512
            of_scale = scales[None, :, None] + scale_at
            of_scale += j * 64
        word = tl.load(at, mask=there[:, :, :, None], other=0).to(tl.uint32, bitcast=True)
        scale = tl.load(of_scale, mask=there, other=0).to(tl.uint32, bitcast=True)
        # Triton knows no stars in tuples.
        found = found + ((word, scale),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@jit
def _load_token(
    j, slab, expert, following, x, depth, chunk, columns,
    SLABS: tl.constexpr, PER: tl.constexpr, STRADDLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What unit j of each chunk is multiplied with, [64, chunks]; zeros where there is none."""
    own = _of_unit(j, slab, expert, following, SLABS, STRADDLE)
    mask = ((own >= 0) & (own * 0 + j < PER))[None, :]
    if not WHOLE:
        mask = mask & (((chunk * PER + j) * 64)[None, :] + depth[:, None] < columns)
    at = x[None, :] + depth[:, None]
    at += j * 64
    return tl.load(at, mask=mask, other=0.0)


@jit
def _factors(global_scale, routing_weights, slot, expert):
    """What the products of lines of a slot's expert are to be multiplied by."""
    there = expert >= 0
    factor = tl.load(global_scale + tl.maximum(expert, 0)) * WEIGHT_FACTOR
    if routing_weights is not None:
        factor = factor * tl.load(routing_weights + slot, mask=there, other=0.0)
    return tl.where(there, factor, 0.0)


@jit
def _sum_units(
    x, columns, words, scales, global_scale, routing_weights, ids, alone, expert_offset,
    local_experts, first_row,
    TOTAL_ROWS: tl.constexpr, SLABS: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    WAITS: tl.constexpr, FP16: tl.constexpr,
):  # fmt: skip
    """Sums [TILES, 16] of lines over the units of SLOTS slots.

    x: what the first unit is multiplied with; the others follow. alone: with SLOTS 1, the local
    expert. routing_weights: None, or multiplied with the slots' sums. WAITS: for what wrote x.
    """
    tl.static_assert(SLOTS <= CHUNKS and CHUNKS <= N)
    PER: tl.constexpr = (SLOTS * SLABS + CHUNKS - 1) // CHUNKS
    STEPS: tl.constexpr = (PER + GROUP - 1) // GROUP
    # Whether a chunk has units of two slots, or of the last one and of none.
    STRADDLE: tl.constexpr = SLABS % PER != 0
    BOTH: tl.constexpr = STRADDLE and SLOTS > 1
    LINES: tl.constexpr = TILES * CHUNKS * 16
    L: tl.constexpr = lines_layout(TILES, CHUNKS)
    SUMS: tl.constexpr = sums_layout(CHUNKS)
    B: tl.constexpr = operand_layout(1, CHUNKS)

    tile = arange(TILES, sliced(L, 3, 2, 1))[:, None, None]
    line = arange(16, sliced(L, 3, 1, 0))[None, None, :]
    if PARTS == 2:
        # Eight rows of gate, the same eight of up: a thread of the tensor core holds both.
        row = first_row % 64 + tile * 8 + line % 8
        above = line // 8 * (TOTAL_ROWS // 2 * SLABS) + first_row // 64 * (SLABS * 64)
    else:
        row = first_row % 64 + tile * 16 + line
        above = line * 0 + first_row // 64 * (SLABS * 64)
    scale_at = above + row
    word_at = (scale_at * 8)[:, :, :, None]
    word_at += arange(8, sliced(L, 2, 1, 0))[None, None, None, :]
    chunk = arange(CHUNKS, sliced(L, 3, 2, 0))
    _slot, slab, expert, following = _chunk_start(
        chunk, ids, alone, expert_offset, local_experts, PER, SLABS, SLOTS
    )
    at = tl.maximum(expert, 0).to(tl.int64) * TOTAL_ROWS * SLABS + slab * 64
    next_at = tl.maximum(following, 0).to(tl.int64) * TOTAL_ROWS * SLABS + (slab - SLABS) * 64
    next_words, next_scales = words + next_at * 8, scales + next_at
    words, scales = words + at * 8, scales + at
    current = _load_group(
        0, slab, expert, following, words, scales, next_words, next_scales, word_at, scale_at,
        SLABS, PER, STRADDLE, BOTH, GROUP,
    )  # fmt: skip
    pin()
    if WAITS:
        wait()

    depth = arange(64, sliced(B, 1))
    other = arange(N, sliced(B, 0))
    _, token_slab, token_expert, token_following = _chunk_start(
        other, ids, alone, expert_offset, local_experts, PER, SLABS, SLOTS
    )
    token_expert = tl.where(other < CHUNKS, token_expert, -1)
    token_following = tl.where(other < CHUNKS, token_following, -1)
    x += other * (PER * 64)
    b = _load_token(
        0, token_slab, token_expert, token_following, x, depth, other, columns, SLABS, PER,
        STRADDLE, WHOLE,
    )  # fmt: skip

    mine = arange(LINES, sliced(SUMS, 1)) // 16 % CHUNKS
    line_slot, line_slab, line_expert, line_following = _chunk_start(
        mine, ids, alone, expert_offset, local_experts, PER, SLABS, SLOTS
    )
    factor = _factors(global_scale, routing_weights, line_slot, line_expert)
    next_factor = factor
    if BOTH:
        next_factor = _factors(global_scale, routing_weights, line_slot + 1, line_following)
    acc = zeros(LINES, N, SUMS)
    for step in tl.static_range(STEPS):
        group = current
        if step + 1 < STEPS:
            current = _load_group(
                (step + 1) * GROUP, slab, expert, following, words, scales, next_words,
                next_scales, word_at, scale_at, SLABS, PER, STRADDLE, BOTH, GROUP,
            )  # fmt: skip
        pin()
        for i in tl.static_range(GROUP):
            j = step * GROUP + i
            next_b = _load_token(
                j + 1, token_slab, token_expert, token_following, x, depth, other, columns, SLABS,
                PER, STRADDLE, WHOLE,
            )  # fmt: skip
            pin()
            word, scale = group[i]
            scale = tl.broadcast_to(scale[:, :, :, None], (TILES, CHUNKS, 16, 8))
            w = decoded(
                tl.reshape(word, (1, LINES, 8)), tl.reshape(scale, (1, LINES, 8)), LINES, FP16
            )
            w = convert(w, operand_layout(0, CHUNKS))
            if BOTH:
                own = _of_unit(j, line_slab, factor, next_factor, SLABS, STRADDLE)
                acc += product(w, b, zeros(LINES, N, SUMS)) * own[:, None]
            else:
                acc = product(w, b, acc)
            b = next_b
    if not BOTH:
        acc = acc * factor[:, None]
    column = arange(N, sliced(SUMS, 0))
    own = tl.where(mine[:, None] == column[None, :], acc, 0.0)
    return tl.sum(tl.reshape(tl.sum(own, 1), (TILES, CHUNKS, 16)), 1)


@jit(do_not_specialize=["expert_offset"])
def one_token_gate_up_kernel(
    hidden, ids, words, scales, global_scale, bias, out, hidden_size, expert_offset, local_experts,
    INTERMEDIATE: tl.constexpr, SLABS: tl.constexpr, CHUNKS: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, FP16: tl.constexpr,
):  # fmt: skip
    """Write combine(up x, gate x), or combine(up x), of each slot to out [slots, INTERMEDIATE].

    Grid: [row blocks, slots]. hidden: [hidden_size]. bias: float32 [experts, rows of words], or
    None.
    """
    launch()
    PARTS: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = TILES * 16 // PARTS
    number = tl.program_id(1)
    first_row = tl.program_id(0) * ROWS
    expert = local_expert(ids, number, number >= 0, expert_offset, local_experts)
    if expert >= 0:
        total = _sum_units(
            hidden, hidden_size, words, scales, global_scale, None, ids, expert, expert_offset,
            local_experts, first_row, PARTS * INTERMEDIATE, SLABS, 1, CHUNKS, TILES, GROUP, PARTS,
            WHOLE, False, FP16,
        )  # fmt: skip
        PLAIN: tl.constexpr = plain_layout(CHUNKS)
        row = first_row + arange(ROWS, PLAIN)
        gate = None
        if GATED:
            parts = tl.permute(tl.reshape(total, (TILES, 2, 8)), (0, 2, 1))
            gate, up = tl.split(parts)
            gate = convert(tl.reshape(gate, (ROWS,)), PLAIN)
            up = convert(tl.reshape(up, (ROWS,)), PLAIN)
        else:
            up = convert(tl.reshape(total, (ROWS,)), PLAIN)
        if bias is not None:
            bias += expert.to(tl.int64) * PARTS * INTERMEDIATE
            if GATED:
                gate += tl.load(bias + row)
            up += tl.load(bias + (PARTS - 1) * INTERMEDIATE + row)
        value = combine(up, gate, ACTIVATION, ALPHA, BETA, LIMIT)
        tl.store(out + number * INTERMEDIATE + row, value.to(out.dtype.element_ty))


@jit(do_not_specialize=["expert_offset"])
def one_token_down_kernel(
    x, ids, words, scales, global_scale, bias, routing_weights, out, hidden_size, expert_offset,
    local_experts,
    TOP_K: tl.constexpr, HIDDEN_PADDED: tl.constexpr, SLABS: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the sum of routing weight * (down x + bias) over all slots to out [hidden_size].

    Grid: [row blocks]. Slots whose id is not local count nothing, and their rows of x are not read.
    Starts before gate and up have ended.
    """
    ROWS: tl.constexpr = TILES * 16
    PLAIN: tl.constexpr = plain_layout(CHUNKS)
    first_row = tl.program_id(0) * ROWS
    row = first_row + arange(ROWS, PLAIN)
    first = local_expert(ids, 0, first_row >= 0, expert_offset, local_experts)
    sums = _sum_units(
        x, 0, words, scales, global_scale, routing_weights, ids, first, expert_offset,
        local_experts, first_row, HIDDEN_PADDED, SLABS, TOP_K, CHUNKS, TILES, GROUP, 1, True, True,
        False,
    )  # fmt: skip
    total = convert(tl.reshape(sums, (ROWS,)), PLAIN)
    if bias is not None:
        for slot in range(TOP_K):
            expert = local_expert(ids, slot, slot < TOP_K, expert_offset, local_experts)
            if expert >= 0:
                # The routing weight multiplies the bias, too.
                own = tl.load(bias + expert.to(tl.int64) * HIDDEN_PADDED + row)
                total += own * tl.load(routing_weights + slot)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < hidden_size)
