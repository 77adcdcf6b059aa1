"""The GEMMs of experts for few tokens: all of a program's weights are on their way at once.

A program takes a few rows of the experts of one slot (gate and up), or of all slots of one token
(down). Each of its warps has a chunk of K for itself: weights are loaded straight into the
registers where the tensor core reads them, the N side holds the token's chunks beside each other,
and what a warp multiplies with another's chunk is thrown away. So no warp waits for another until
the sums of the chunks are added up, in their order and in float32.

A unit is one slab (64 columns of K) of one slot's expert; those of a token are numbered slot by
slot, and a chunk has PER of them, GROUP of which are loaded together. down's sums are weighted, so
that what they add up to is the token's output.
"""

from __future__ import annotations

import triton.language as tl

from .activation import combine
from .gemm import _local
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
from .weights import row_scale

__all__ = ["few_down_kernel", "few_gate_up_kernel"]


@jit
def _chunk_start(
    chunk, ids, first_slot, slots, alone, expert_offset, local_experts,
    PER: tl.constexpr, SLABS: tl.constexpr, SLOTS: tl.constexpr, STRADDLE: tl.constexpr,
):  # fmt: skip
    """First slot of each chunk, its first slab, its expert, and that of the next slot; -1: none."""
    slot = chunk * PER // SLABS
    slab = chunk * PER - slot * SLABS
    if SLOTS == 1:
        expert = tl.where(slot == 0, alone, -1)
        following = expert
    else:
        expert = _local(ids, first_slot + slot, slot < slots, expert_offset, local_experts)
        following = expert
        if STRADDLE:
            following = _local(
                ids, first_slot + slot + 1, slot + 1 < slots, expert_offset, local_experts
            )
    return slot, slab, expert, following


@jit
def _of_unit(j, slab, first, following, SLABS: tl.constexpr, STRADDLE: tl.constexpr):
    """What is there once for a chunk's first slot, and once for the next one."""
    if STRADDLE:
        first = tl.where(slab + j < SLABS, first, following)
    return first


@jit
def _load_group(
    start, slab, expert, following, words, scales, next_words, next_scales, word_at, scale_at, odd,
    SLABS: tl.constexpr, SLOTS: tl.constexpr, PER: tl.constexpr, STRADDLE: tl.constexpr,
    WORDS: tl.constexpr, SHARED: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Words [tiles, chunks, 16, words] and scales of units, as a tuple; zeros where is none."""
    found = ()
    for i in tl.static_range(GROUP):
        j = start + i
        own = _of_unit(j, slab, expert, following, SLABS, STRADDLE)
        there = ((own >= 0) & (own * 0 + j < PER))[None, :, None]
        if STRADDLE and SLOTS > 1:
            at = _of_unit(j, slab, words, next_words, SLABS, STRADDLE) + j * (64 * WORDS)
            at = at[None, :, None][:, :, :, None] + word_at
        else:
            # The same registers for each unit, and the rest a number in the instruction.
            at = words[None, :, None][:, :, :, None] + word_at
            at += j * (64 * WORDS)
        word = tl.load(at, mask=there[:, :, :, None], other=0).to(tl.uint32, bitcast=True)
        scale = odd
        if SCALED:
            if STRADDLE and SLOTS > 1:
                at = _of_unit(j, slab, scales, next_scales, SLABS, STRADDLE)
                at = (at + j * (64 // SHARED))[None, :, None] + scale_at
            else:
                at = scales[None, :, None] + scale_at
                at += j * (64 // SHARED)
            scale = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True)
            if SHARED == 2:
                # A neighbour's two bytes stand beside a row's own.
                scale = scale >> odd
        found = found + ((word, scale),)  # noqa: RUF005  (Triton knows no stars in tuples)
    return found


@jit
def _load_tokens(
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
def _factors(
    scales, global_scale, routing_weights, slot, slab, expert, row, part, total_rows,
    SLABS: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, FP16: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """What the products of each line with a slab are to be multiplied by, [lines]."""
    there = expert >= 0
    expert = tl.maximum(expert, 0)
    if FORMAT == "fp8_block":
        rows: tl.constexpr = (total_rows // PARTS + 127) // 128
        columns: tl.constexpr = (SLABS + 1) // 2
        block = (expert.to(tl.int64) * PARTS + part) * rows + row // 128
        factor = tl.load(scales + block * columns + slab // 2, mask=there, other=0.0)
    else:
        row = row + part * (total_rows // PARTS)
        factor = row_scale(scales, global_scale, expert, row, total_rows, PARTS, FP16, FORMAT)
    if WEIGHTED:
        factor = factor * tl.load(routing_weights + slot, mask=there, other=0.0)
    return tl.where(there, factor, 0.0)


@jit
def _add_group(
    acc, b, group, start, token_slab, token_expert, token_following, x, depth, other, columns,
    scales, global_scale, routing_weights, first_slot, line_slot, line_slab, line_expert,
    line_following, factor, next_factor, row, part,
    TOTAL_ROWS: tl.constexpr, SLABS: tl.constexpr, PER: tl.constexpr, STRADDLE: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, N: tl.constexpr,
    WORDS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BY_UNIT: tl.constexpr,
    FP16: tl.constexpr, ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Add the products of a group; b: the first unit's tokens, returned for the one behind."""
    LINES: tl.constexpr = TILES * CHUNKS * 16
    WEIGHTED: tl.constexpr = routing_weights is not None
    SUMS: tl.constexpr = sums_layout(CHUNKS)
    pin()
    for i in tl.static_range(GROUP):
        j = start + i
        next_b = _load_tokens(
            j + 1, token_slab, token_expert, token_following, x, depth, other, columns, SLABS,
            PER, STRADDLE, WHOLE,
        )  # fmt: skip
        pin()
        word, scale = group[i]
        scale = tl.broadcast_to(scale[:, :, :, None], (TILES, CHUNKS, 16, WORDS))
        w = decoded(
            tl.reshape(word, (1, LINES, WORDS)), tl.reshape(scale, (1, LINES, WORDS)), LINES,
            FP16, ASSEMBLY, FORMAT,
        )  # fmt: skip
        w = convert(w, operand_layout(0, CHUNKS))
        if FORMAT == "fp8_block":
            own = _of_unit(j, line_slab, line_slot, line_slot + 1, SLABS, STRADDLE)
            own_slab = line_slab + j - (own - line_slot) * SLABS
            own_expert = _of_unit(j, line_slab, line_expert, line_following, SLABS, STRADDLE)
            own_factor = _factors(
                scales, global_scale, routing_weights, first_slot + own, own_slab, own_expert,
                row, part, TOTAL_ROWS, SLABS, PARTS, WEIGHTED, FP16, FORMAT,
            )  # fmt: skip
            acc += product(w, b, zeros(LINES, N, SUMS)) * own_factor[:, None]
        elif BY_UNIT:
            own_factor = _of_unit(j, line_slab, factor, next_factor, SLABS, STRADDLE)
            acc += product(w, b, zeros(LINES, N, SUMS)) * own_factor[:, None]
        else:
            acc = product(w, b, acc)
        b = next_b
    return acc, b


@jit
def _sum_units(
    x, columns, words, scales, global_scale, routing_weights, ids, first_slot, slots, alone,
    expert_offset, local_experts, first_row,
    TOTAL_ROWS: tl.constexpr, SLABS: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    UNROLLED: tl.constexpr, WAITS: tl.constexpr, FP16: tl.constexpr, ASSEMBLY: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Sums [TILES, 16] of lines over the units of `slots` slots, at most SLOTS <= CHUNKS.

    x: what the first unit is multiplied with; the others follow. alone: with SLOTS 1, the local
    expert. routing_weights: None, or multiplied with the slots' sums.
    """
    WORDS: tl.constexpr = 8 if FORMAT == "nvfp4" or FORMAT == "mxfp4" else 16
    SHARED: tl.constexpr = 1 if FORMAT == "nvfp4" else 2
    SCALED: tl.constexpr = FORMAT == "nvfp4" or FORMAT == "mxfp4" or FORMAT == "mxfp8"
    PER: tl.constexpr = (SLOTS * SLABS + CHUNKS - 1) // CHUNKS
    STEPS: tl.constexpr = (PER + GROUP - 1) // GROUP
    tl.static_assert(SLOTS <= CHUNKS)
    # Whether a chunk has units of two slots, or of the last one and of none.
    STRADDLE: tl.constexpr = SLABS % PER != 0
    BY_UNIT: tl.constexpr = (STRADDLE and SLOTS > 1) or FORMAT == "fp8_block"
    LINES: tl.constexpr = TILES * CHUNKS * 16
    N: tl.constexpr = CHUNKS if CHUNKS > 8 else 8
    WEIGHTED: tl.constexpr = routing_weights is not None
    L: tl.constexpr = lines_layout(TILES, CHUNKS, WORDS)
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
    word_at = ((above + row) * WORDS)[:, :, :, None]
    word_at += arange(WORDS, sliced(L, 2, 1, 0))[None, None, None, :]
    scale_at = above // SHARED + row // SHARED
    odd = (row % SHARED * 16).to(tl.uint32)
    chunk = arange(CHUNKS, sliced(L, 3, 2, 0))
    _slot, slab, expert, following = _chunk_start(
        chunk, ids, first_slot, slots, alone, expert_offset, local_experts, PER, SLABS, SLOTS,
        STRADDLE,
    )  # fmt: skip
    at = tl.maximum(expert, 0).to(tl.int64) * TOTAL_ROWS * SLABS + slab * 64
    next_at = tl.maximum(following, 0).to(tl.int64) * TOTAL_ROWS * SLABS + (slab - SLABS) * 64
    if SLOTS == 1:
        following = following * 0 - 1
    next_words = words + next_at * WORDS
    next_scales = scales + next_at // SHARED
    words += at * WORDS
    scales_at = scales + at // SHARED
    current = _load_group(
        0, slab, expert, following, words, scales_at, next_words, next_scales, word_at, scale_at,
        odd, SLABS, SLOTS, PER, STRADDLE, WORDS, SHARED, SCALED, GROUP,
    )  # fmt: skip
    pin()
    if WAITS:
        wait()

    depth = arange(64, sliced(B, 1))
    other = arange(N, sliced(B, 0))
    _, token_slab, token_expert, token_following = _chunk_start(
        other, ids, first_slot, slots, alone, expert_offset, local_experts, PER, SLABS, SLOTS,
        STRADDLE,
    )  # fmt: skip
    token_expert = tl.where(other < CHUNKS, token_expert, -1)
    token_following = tl.where(other < CHUNKS, token_following, -1)
    if SLOTS == 1:
        token_following = token_following * 0 - 1
    x += other * (PER * 64)
    b = _load_tokens(
        0, token_slab, token_expert, token_following, x, depth, other, columns, SLABS, PER,
        STRADDLE, WHOLE,
    )  # fmt: skip

    line = arange(LINES, sliced(SUMS, 1))
    mine = line // 16 % CHUNKS
    line_slot, line_slab, line_expert, line_following = _chunk_start(
        mine, ids, first_slot, slots, alone, expert_offset, local_experts, PER, SLABS, SLOTS,
        STRADDLE,
    )  # fmt: skip
    part = line * 0
    row = first_row + line // (16 * CHUNKS) * (16 // PARTS) + line % (16 // PARTS)
    if PARTS == 2:
        part = line % 16 // 8
    acc = zeros(LINES, N, SUMS)
    factor = _factors(
        scales, global_scale, routing_weights, first_slot + line_slot, line_slab, line_expert, row,
        part, TOTAL_ROWS, SLABS, PARTS, WEIGHTED, FP16, FORMAT,
    )  # fmt: skip
    next_factor = factor
    if BY_UNIT and SLOTS > 1:
        next_factor = _factors(
            scales, global_scale, routing_weights, first_slot + line_slot + 1, line_slab * 0,
            line_following, row, part, TOTAL_ROWS, SLABS, PARTS, WEIGHTED, FP16, FORMAT,
        )  # fmt: skip
    if UNROLLED:
        for step in tl.static_range(STEPS):
            group = current
            if step + 1 < STEPS:
                current = _load_group(
                    (step + 1) * GROUP, slab, expert, following, words, scales_at, next_words,
                    next_scales, word_at, scale_at, odd, SLABS, SLOTS, PER, STRADDLE, WORDS, SHARED,
                    SCALED, GROUP,
                )  # fmt: skip
            acc, b = _add_group(
                acc, b, group, step * GROUP, token_slab, token_expert, token_following, x, depth,
                other, columns, scales, global_scale, routing_weights, first_slot, line_slot,
                line_slab, line_expert, line_following, factor, next_factor, row, part, TOTAL_ROWS,
                SLABS, PER, STRADDLE, WHOLE, TILES, CHUNKS, N, WORDS, GROUP, PARTS, BY_UNIT, FP16,
                ASSEMBLY, FORMAT,
            )  # fmt: skip
    else:
        for step in range(STEPS):
            group = current
            # Behind the end nothing is loaded.
            current = _load_group(
                (step + 1) * GROUP, slab, expert, following, words, scales_at, next_words,
                next_scales, word_at, scale_at, odd, SLABS, SLOTS, PER, STRADDLE, WORDS, SHARED,
                SCALED, GROUP,
            )  # fmt: skip
            acc, b = _add_group(
                acc, b, group, step * GROUP, token_slab, token_expert, token_following, x, depth,
                other, columns, scales, global_scale, routing_weights, first_slot, line_slot,
                line_slab, line_expert, line_following, factor, next_factor, row, part, TOTAL_ROWS,
                SLABS, PER, STRADDLE, WHOLE, TILES, CHUNKS, N, WORDS, GROUP, PARTS, BY_UNIT, FP16,
                ASSEMBLY, FORMAT,
            )  # fmt: skip
    if not BY_UNIT:
        acc = acc * factor[:, None]
    column = arange(N, sliced(SUMS, 0))
    own = tl.where(mine[:, None] == column[None, :], acc, 0.0)
    return tl.sum(tl.reshape(tl.sum(own, 1), (TILES, CHUNKS, 16)), 1)


@jit(do_not_specialize=["num_slots", "expert_offset"])
def few_gate_up_kernel(
    hidden, stride_token, ids, words, scales, global_scale, bias, out, num_slots, hidden_size,
    expert_offset, local_experts,
    TOP_K: tl.constexpr, INTERMEDIATE: tl.constexpr, SLABS: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, UNROLLED: tl.constexpr, WHOLE: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    FP16: tl.constexpr, ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write combine(up x, gate x), or combine(up x), of each slot to out [slots, INTERMEDIATE].

    Grid: [row blocks, slots]. bias: float32 [experts, rows of words], or None. CHAINED: down may
    start before this has ended.
    """
    if CHAINED:
        launch()
    PARTS: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = TILES * 16 // PARTS
    number = tl.program_id(1)
    first_row = tl.program_id(0) * ROWS
    expert = _local(ids, number, number < num_slots, expert_offset, local_experts)
    if expert >= 0:
        token = (number // TOP_K).to(tl.int64)
        total = _sum_units(
            hidden + token * stride_token, hidden_size, words, scales, global_scale, None, ids,
            number, 1, expert, expert_offset, local_experts, first_row, PARTS * INTERMEDIATE, SLABS,
            1, CHUNKS, TILES, GROUP, PARTS, WHOLE, UNROLLED, False, FP16, ASSEMBLY, FORMAT,
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
        at = out + number.to(tl.int64) * INTERMEDIATE + row
        tl.store(at, value.to(out.dtype.element_ty))


@jit(do_not_specialize=["expert_offset"])
def few_down_kernel(
    x, ids, words, scales, global_scale, bias, routing_weights, out, hidden_size, expert_offset,
    local_experts,
    TOP_K: tl.constexpr, HIDDEN_PADDED: tl.constexpr, SLABS: tl.constexpr, CHUNKS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, UNROLLED: tl.constexpr, ASSEMBLY: tl.constexpr,
    FORMAT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Write the sum of routing weight * (down x + bias) over a token's slots to out [T, H].

    Grid: [row blocks, tokens]. Slots whose id is not local count nothing, and their rows of x are
    not read. CHAINED: started before gate and up have ended.
    """
    ROWS: tl.constexpr = TILES * 16
    SLOTS: tl.constexpr = TOP_K if TOP_K < CHUNKS else CHUNKS
    PLAIN: tl.constexpr = plain_layout(CHUNKS)
    first_slot = tl.program_id(1) * TOP_K
    first_row = tl.program_id(0) * ROWS
    row = first_row + arange(ROWS, PLAIN)
    total = (row * 0).to(tl.float32)
    for start in tl.static_range(0, TOP_K, SLOTS):
        slot = first_slot + start
        sums = _sum_units(
            x + slot.to(tl.int64) * (SLABS * 64), 0, words, scales, global_scale, routing_weights,
            ids, slot, TOP_K - start, -1, expert_offset, local_experts, first_row, HIDDEN_PADDED,
            SLABS, SLOTS, CHUNKS, TILES, GROUP, 1, True, UNROLLED, CHAINED and start == 0, False,
            ASSEMBLY, FORMAT,
        )  # fmt: skip
        total += convert(tl.reshape(sums, (ROWS,)), PLAIN)
    if bias is not None:
        for slot in range(TOP_K):
            expert = _local(ids, first_slot + slot, slot < TOP_K, expert_offset, local_experts)
            if expert >= 0:
                # The routing weight multiplies the bias, too.
                own = tl.load(bias + expert.to(tl.int64) * HIDDEN_PADDED + row)
                total += own * tl.load(routing_weights + first_slot + slot)
    at = out + tl.program_id(1).to(tl.int64) * hidden_size + row
    tl.store(at, total.to(out.dtype.element_ty), mask=row < hidden_size)
