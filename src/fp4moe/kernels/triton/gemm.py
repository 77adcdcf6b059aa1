"""The GEMMs of experts in Triton: gate and up with the activation, down with the weighting.

Weights stand on the M side of the tensor core, tokens on its N side. A program takes ROWS rows of
one expert (of gate and of up each) for up to SLOTS + MORE slots: what is decoded once is multiplied
with both parts, since sizes must be powers of two. How it finds its slots is its MODE:

    SLOT    the program's number is a slot: no metadata, an expert is read once a slot
    SORTED  the number is a tile of `sort.sort_kernel`

Sizes are the padded ones, multiples of 64; a slab is 64 columns of K, see `layout`. Nothing
splits K: the program that has a slot's sum in float32 adds the bias, which is None without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import combine
from .round_e4m3 import to_codes
from .weights import block_scale, load_weights, row_factor

__all__ = ["SLOT", "SORTED", "UNSPECIALIZED", "down_kernel", "find_work", "gate_up_kernel"]
__all__ += ["local_expert", "store_down", "store_gate_up"]

SLOT = tl.constexpr(0)
SORTED = tl.constexpr(1)
# They differ from call to call: no variant for a multiple of 16, or for 1.
UNSPECIALIZED = ["num_slots", "expert_offset"]


@triton.jit
def local_expert(ids, index, mask, expert_offset, local_experts):
    """Local expert of a slot, -1 for none."""
    local = tl.load(ids + index, mask=mask, other=-1).to(tl.int64) - expert_offset
    return tl.where((local >= 0) & (local < local_experts) & mask, local, -1).to(tl.int32)


@triton.jit
def _add_dot(a, b, acc, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr):
    """Return acc + a @ b; WAIT: finished when the next step begins.

    Left in flight, wgmma reads weights from registers that ptxas lets the next step overwrite.
    """
    # Triton's interpreter multiplies the bits of bfloat16; float32 holds the same values.
    if not ASSEMBLY:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    acc = tl.dot(a, b, acc)
    if WAIT:
        # Nothing is computed; what is no product cannot stay in flight.
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def _add_block(w, x, acc, scale, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr, FORMAT: tl.constexpr):
    """Return acc + w @ x, with fp8_block times its scale."""
    if FORMAT == "fp8_block":
        acc += _add_dot(w, x, tl.zeros_like(acc), ASSEMBLY, WAIT) * scale
    else:
        acc = _add_dot(w, x, acc, ASSEMBLY, WAIT)
    return acc


@triton.jit
def _load_tokens(x, row, valid, column, columns, WHOLE: tl.constexpr):
    """Activations [SLOTS, K]; row: element offsets, int64."""
    if WHOLE:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _gate_up_tile(
    hidden, stride_token, words, scales, global_scale, bias, out,
    slot, more, expert, block, top_k, hidden_size, intermediate, slabs,
    SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr, WAIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    token = (tl.maximum(slot, 0) // top_k).to(tl.int64) * stride_token
    token_more = (tl.maximum(more, 0) // top_k).to(tl.int64) * stride_token
    PARTS: tl.constexpr = 2 if GATED else 1
    # Eight rows of gate, the same eight of up: a thread of the tensor core holds both.
    place = tl.arange(0, PARTS * ROWS)
    row = block * ROWS + place // (8 * PARTS) * 8 + place % 8
    if ROWS > 64:
        row = tl.minimum(row, intermediate - 1)
    row += place // 8 % PARTS * intermediate
    acc = tl.zeros((PARTS * ROWS, SLOTS), dtype=tl.float32)
    acc_more = tl.zeros((PARTS * ROWS, MORE if MORE else 16), dtype=tl.float32)
    following = 1.0
    if FORMAT == "fp8_block":
        following = block_scale(
            scales, expert, block * ROWS, place, 0, PARTS * intermediate, slabs, PARTS
        )
    for slab in tl.range(0, slabs, SLABS, num_stages=STAGES):
        factor = following
        if FORMAT == "fp8_block":
            tl.static_assert(SLABS <= 2)
            following = block_scale(
                scales, expert, block * ROWS, place, slab + SLABS, PARTS * intermediate, slabs,
                PARTS,
            )  # fmt: skip
        column = slab * 64 + tl.arange(0, SLABS * 64)
        x = tl.trans(_load_tokens(hidden, token, slot >= 0, column, hidden_size, WHOLE))
        w = load_weights(
            words, scales, expert, row, PARTS * intermediate, slab, slabs,
            SLABS, PARTS * ROWS, WHOLE, FP16, ASSEMBLY, FORMAT,
        )  # fmt: skip
        acc = _add_block(w, x, acc, factor, ASSEMBLY, WAIT, FORMAT)
        if MORE:
            x = _load_tokens(hidden, token_more, more >= 0, column, hidden_size, WHOLE)
            acc_more = _add_block(w, tl.trans(x), acc_more, factor, ASSEMBLY, WAIT, FORMAT)
    scale = row_factor(scales, global_scale, expert, row, PARTS * intermediate, PARTS, FP16, FORMAT)
    acc *= scale
    if bias is not None:
        bias += expert.to(tl.int64) * PARTS * intermediate
        acc += tl.load(bias + row)[:, None]
    store_gate_up(
        out, acc, slot, block, intermediate, SLOTS, ROWS, GATED, ACTIVATION, ALPHA, BETA, LIMIT
    )
    if MORE:
        acc_more *= scale
        if bias is not None:
            acc_more += tl.load(bias + row)[:, None]
        store_gate_up(
            out, acc_more, more, block, intermediate, MORE, ROWS, GATED,
            ACTIVATION, ALPHA, BETA, LIMIT,
        )  # fmt: skip


@triton.jit
def store_gate_up(
    out, acc, slot, block, intermediate,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, inverse=None,
    ASSEMBLY: tl.constexpr = True,
):  # fmt: skip
    """Store the activation of sums [PARTS * ROWS, SLOTS]; inverse: of the scale of e4m3 codes."""
    row = block * ROWS + tl.arange(0, ROWS)
    PARTS: tl.constexpr = 1 + GATED if ACTIVATION == "sums" else 1
    at = out + (tl.maximum(slot, 0).to(tl.int64) * PARTS * intermediate)[None, :] + row[:, None]
    mask = (row < intermediate)[:, None] & (slot >= 0)[None, :]
    if GATED:
        parts = tl.reshape(acc, (ROWS // 8, 2, 8, SLOTS))
        gate, up = tl.split(tl.permute(parts, (0, 2, 3, 1)))
        gate, up = tl.reshape(gate, (ROWS, SLOTS)), tl.reshape(up, (ROWS, SLOTS))
        if ACTIVATION == "sums":
            tl.store(at, gate.to(out.dtype.element_ty), mask=mask)
            value = up
        else:
            value = combine(up, gate, ACTIVATION, ALPHA, BETA, LIMIT)
    elif ACTIVATION == "sums":
        value = acc
    else:
        value = combine(acc, None, ACTIVATION, ALPHA, BETA, LIMIT)
    if inverse is not None:
        value = to_codes(value.to(tl.bfloat16).to(tl.float32) * inverse, ASSEMBLY)
    tl.store(at + (PARTS - 1) * intermediate, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _down_tile(
    x, words, scales, global_scale, bias, routing_weights, out,
    slot, more, expert, block, hidden_padded, intermediate, slabs,
    SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    at = tl.maximum(slot, 0).to(tl.int64) * intermediate
    at_more = tl.maximum(more, 0).to(tl.int64) * intermediate
    row = block * ROWS + tl.arange(0, ROWS)
    if ROWS > 64:
        row = tl.minimum(row, hidden_padded - 1)
    # Scales of blocks are those of 128 rows.
    tl.static_assert(FORMAT != "fp8_block" or ROWS <= 128)
    acc = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
    acc_more = tl.zeros((ROWS, MORE if MORE else 16), dtype=tl.float32)
    following = 1.0
    if FORMAT == "fp8_block":
        following = block_scale(scales, expert, block * ROWS, row, 0, hidden_padded, slabs, 1)
    for slab in tl.range(0, slabs, SLABS, num_stages=STAGES):
        factor = following
        if FORMAT == "fp8_block":
            tl.static_assert(SLABS <= 2)
            following = block_scale(
                scales, expert, block * ROWS, row, slab + SLABS, hidden_padded, slabs, 1
            )
        column = slab * 64 + tl.arange(0, SLABS * 64)
        y = _load_tokens(x, at, slot >= 0, column, intermediate, WHOLE)
        w = load_weights(
            words, scales, expert, row, hidden_padded, slab, slabs,
            SLABS, ROWS, WHOLE, False, ASSEMBLY, FORMAT,
        )  # fmt: skip
        acc = _add_block(w, tl.trans(y), acc, factor, ASSEMBLY, WAIT, FORMAT)
        if MORE:
            y = _load_tokens(x, at_more, more >= 0, column, intermediate, WHOLE)
            acc_more = _add_block(w, tl.trans(y), acc_more, factor, ASSEMBLY, WAIT, FORMAT)
    scale = row_factor(scales, global_scale, expert, row, hidden_padded, 1, False, FORMAT)
    if FORMAT == "fp8" or FORMAT == "fp8_channel":
        # One for each row, while what follows takes a number.
        acc *= scale
        if MORE:
            acc_more *= scale
        scale = 1.0
    if bias is not None:
        # The routing weight multiplies the bias, too.
        bias += expert.to(tl.int64) * hidden_padded
        acc = acc * scale + tl.load(bias + row)[:, None]
        if MORE:
            acc_more = acc_more * scale + tl.load(bias + row)[:, None]
        scale = 1.0
    store_down(out, acc, routing_weights, scale, slot, block, hidden_padded, ROWS)
    if MORE:
        store_down(out, acc_more, routing_weights, scale, more, block, hidden_padded, ROWS)


@triton.jit
def store_down(
    out, acc, routing_weights, scale, slot, block, hidden_padded, ROWS: tl.constexpr
):  # fmt: skip
    row = block * ROWS + tl.arange(0, ROWS)
    factor = tl.load(routing_weights + tl.maximum(slot, 0), mask=slot >= 0, other=0.0) * scale
    at = out + (tl.maximum(slot, 0).to(tl.int64) * hidden_padded)[None, :] + row[:, None]
    mask = (row < hidden_padded)[:, None] & (slot >= 0)[None, :]
    tl.store(at, (acc * factor[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def find_work(
    ids, order, tiles, num_tiles, total_rows, num_slots, expert_offset, local_experts,
    MODE: tl.constexpr, SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block of rows, expert, slots and further slots of a program of mode SLOT or SORTED."""
    blocks = tl.cdiv(total_rows, ROWS)
    number = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    column = tl.arange(0, SLOTS)
    further = tl.arange(0, MORE if MORE else 16)
    if MODE == SLOT:
        expert = local_expert(ids, number, number < num_slots, expert_offset, local_experts)
        slot = tl.where(column == 0, number, -1)
        more = further * 0 - 1
    else:
        tile = tl.load(tiles + number, mask=number < tl.load(num_tiles), other=-1)
        expert = tile >> 10
        used = tl.where(tile >= 0, tile & 1023, 0)
        order += number * (SLOTS + MORE)
        slot = tl.load(order + column, mask=column < used, other=-1)
        more = tl.load(order + SLOTS + further, mask=SLOTS + further < used, other=-1)
    return block, expert, slot, more


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_up_kernel(
    hidden, stride_token, ids, order, tiles, num_tiles, words, scales, global_scale, bias, out,
    num_slots, top_k, hidden_size, intermediate, slabs, expert_offset, local_experts,
    MODE: tl.constexpr, SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
    SLABS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    FP16: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Write combine(up x, gate x), or combine(up x), to out [slots, intermediate].

    With the ACTIVATION "sums" gate x and up x themselves: [slots, gate, up], or [slots, up].
    Grid: [(slots or tiles, by MODE) * row blocks]. bias: float32 [experts, rows of words], or None.
    """
    block, expert, slot, more = find_work(
        ids, order, tiles, num_tiles, intermediate, num_slots, expert_offset, local_experts,
        MODE, SLOTS, MORE, ROWS,
    )  # fmt: skip
    if expert >= 0:
        _gate_up_tile(
            hidden, stride_token, words, scales, global_scale, bias, out, slot, more, expert,
            block, top_k, hidden_size, intermediate, slabs, SLOTS, MORE, ROWS, SLABS, STAGES, WHOLE,
            GATED, ACTIVATION, ALPHA, BETA, LIMIT, FP16, ASSEMBLY, WAIT, FORMAT,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    x, ids, order, tiles, num_tiles, words, scales, global_scale, bias, routing_weights, out,
    num_slots, hidden_padded, intermediate, slabs, expert_offset, local_experts,
    MODE: tl.constexpr, SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
    SLABS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr,
    WAIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Write routing weight * (down x + bias) of every slot to out [slots, hidden_padded].

    Grid and bias as above. Slots whose id is not local stay unwritten.
    """
    block, expert, slot, more = find_work(
        ids, order, tiles, num_tiles, hidden_padded, num_slots, expert_offset, local_experts,
        MODE, SLOTS, MORE, ROWS,
    )  # fmt: skip
    if expert >= 0:
        _down_tile(
            x, words, scales, global_scale, bias, routing_weights, out, slot, more, expert,
            block, hidden_padded, intermediate, slabs, SLOTS, MORE, ROWS, SLABS, STAGES, WHOLE,
            ASSEMBLY, WAIT, FORMAT,
        )  # fmt: skip
