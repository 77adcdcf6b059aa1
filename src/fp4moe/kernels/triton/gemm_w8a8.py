"""The GEMMs of experts with e4m3 weights and e4m3 activations, both as they are stored.

Tiles, slots and programs are those of `gemm`. Nothing is decoded: both operands go from memory to
the tensor core, which sums SLABS * 64 columns; these sums are added in float32, since Hopper's
tensor core keeps fewer bits of FP8 products. Sizes are multiples of 16. `token_scales` of the
activations are, by format: one number (fp8), one a row (fp8_channel), one for a row's 128 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import UNSPECIALIZED, find_work, store_down, store_gate_up
from .weights import block_scale, row_factor

__all__ = ["down_w8a8_kernel", "gate_up_w8a8_kernel"]


@triton.jit
def _load_weights(codes, row, column, columns, WHOLE: tl.constexpr):
    """Codes [rows, columns]; row: element offsets."""
    at = codes + (row[:, None] + column[None, :])
    if WHOLE:
        w = tl.load(at)
    else:
        w = tl.load(at, mask=(column < columns)[None, :], other=0.0)
    return w


@triton.jit
def _load_tokens(codes, row, there, column, columns, WHOLE: tl.constexpr):
    """Codes [slots, columns]; row: element offsets, int64."""
    mask = there[:, None] if WHOLE else there[:, None] & (column < columns)[None, :]
    return tl.load(codes + row[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _product(w, x, ASSEMBLY: tl.constexpr):
    """Return w @ x.T in float32; Triton's interpreter multiplies float32."""
    if ASSEMBLY:
        product = tl.dot(w, tl.trans(x), out_dtype=tl.float32)
    else:
        product = tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")
    return product


@triton.jit
def _token_scale(token_scales, row, there, block, blocks, FORMAT: tl.constexpr):
    """The scales of tokens [1, slots], or a number; block: of 128 columns."""
    if FORMAT == "fp8":
        scale = tl.load(token_scales)
    elif FORMAT == "fp8_channel":
        scale = tl.load(token_scales + row, mask=there, other=0.0)[None, :]
    else:
        scale = tl.load(token_scales + row.to(tl.int64) * blocks + block, mask=there, other=0.0)
        scale = scale[None, :]
    return scale


@triton.jit
def _sums(
    weights, scales, codes, token_scales, expert, first_row, place, row, token, there, token_more,
    there_more, total_rows, columns, one, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    MORE: tl.constexpr, SLABS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Products of rows with tokens and with further tokens, times the scales of both."""
    BLOCKED: tl.constexpr = FORMAT == "fp8_block"
    acc = tl.zeros((row.shape[0], SLOTS), dtype=tl.float32)
    acc_more = tl.zeros((row.shape[0], MORE if MORE else 16), dtype=tl.float32)
    weights += expert.to(tl.int64) * total_rows * columns
    weight_at = row * columns
    token_at, more_at = token.to(tl.int64) * columns, token_more.to(tl.int64) * columns
    slabs, blocks = (columns + 63) // 64, (columns + 127) // 128
    # Scales of blocks are those of 128 rows and 128 columns.
    tl.static_assert(SLABS <= 2 and (not BLOCKED or row.shape[0] <= 128 * PARTS))
    for slab in tl.range(0, slabs, SLABS, num_stages=STAGES):
        column = slab * 64 + tl.arange(0, SLABS * 64)
        w = _load_weights(weights, weight_at, column, columns, WHOLE)
        x = _load_tokens(codes, token_at, there, column, columns, WHOLE)
        # Times a number that Triton does not know: it would let the tensor core add.
        factor = one
        if BLOCKED:
            factor = block_scale(scales, expert, first_row, place, slab, total_rows, slabs, PARTS)
        own = factor
        if BLOCKED:
            own *= _token_scale(token_scales, token, there, slab // 2, blocks, FORMAT)
        acc += _product(w, x, ASSEMBLY) * own
        if MORE:
            own = factor
            if BLOCKED:
                own *= _token_scale(token_scales, token_more, there_more, slab // 2, blocks, FORMAT)
            x = _load_tokens(codes, more_at, there_more, column, columns, WHOLE)
            acc_more += _product(w, x, ASSEMBLY) * own
    if not BLOCKED:
        factor = row_factor(scales, scales, expert, row, total_rows, PARTS, False, FORMAT)
        acc *= factor * _token_scale(token_scales, token, there, 0, blocks, FORMAT)
        if MORE:
            acc_more *= factor * _token_scale(
                token_scales, token_more, there_more, 0, blocks, FORMAT
            )
    return acc, acc_more


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gate_up_w8a8_kernel(
    codes, token_scales, ids, order, tiles, num_tiles, weights, scales, intermediate_scale, bias,
    out, num_slots, top_k, hidden_size, intermediate, expert_offset, local_experts, one,
    MODE: tl.constexpr, SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
    SLABS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Write combine(up x, gate x), or combine(up x), to out [slots, intermediate].

    codes: e4m3 [T, hidden_size]. weights: e4m3 [experts, rows, hidden_size]. out is bfloat16, or
    for fp8 e4m3 with intermediate_scale [experts], from a value rounded to bfloat16. one: 1.0.
    Grid and bias as in `gemm`.
    """
    block, expert, slot, more = find_work(
        ids, order, tiles, num_tiles, intermediate, num_slots, expert_offset, local_experts,
        MODE, SLOTS, MORE, ROWS,
    )  # fmt: skip
    if expert >= 0:
        PARTS: tl.constexpr = 2 if GATED else 1
        # Eight rows of gate, the same eight of up: a thread of the tensor core holds both.
        place = tl.arange(0, PARTS * ROWS)
        row = tl.minimum(block * ROWS + place // (8 * PARTS) * 8 + place % 8, intermediate - 1)
        row += place // 8 % PARTS * intermediate
        acc, acc_more = _sums(
            weights, scales, codes, token_scales, expert, block * ROWS, place, row,
            tl.maximum(slot, 0) // top_k, slot >= 0, tl.maximum(more, 0) // top_k, more >= 0,
            PARTS * intermediate, hidden_size, one, PARTS, SLOTS, MORE, SLABS, STAGES, WHOLE,
            ASSEMBLY, FORMAT,
        )  # fmt: skip
        if bias is not None:
            bias += expert.to(tl.int64) * PARTS * intermediate
            acc += tl.load(bias + row)[:, None]
            acc_more += tl.load(bias + row)[:, None]
        inverse = None
        if FORMAT == "fp8":
            inverse = tl.div_rn(1.0, tl.load(intermediate_scale + expert))
        store_gate_up(
            out, acc, slot, block, intermediate, SLOTS, ROWS, GATED, ACTIVATION, ALPHA, BETA, LIMIT,
            inverse, ASSEMBLY,
        )  # fmt: skip
        if MORE:
            store_gate_up(
                out, acc_more, more, block, intermediate, MORE, ROWS, GATED,
                ACTIVATION, ALPHA, BETA, LIMIT, inverse, ASSEMBLY,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def down_w8a8_kernel(
    codes, token_scales, ids, order, tiles, num_tiles, weights, scales, intermediate_scale, bias,
    routing_weights, out, num_slots, hidden_size, intermediate, expert_offset, local_experts, one,
    MODE: tl.constexpr, SLOTS: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
    SLABS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Write routing weight * (down x + bias) of every slot to out [slots, hidden_size].

    codes: e4m3 [slots, intermediate]. Slots of other ids stay unwritten.
    """
    block, expert, slot, more = find_work(
        ids, order, tiles, num_tiles, hidden_size, num_slots, expert_offset, local_experts,
        MODE, SLOTS, MORE, ROWS,
    )  # fmt: skip
    if expert >= 0:
        place = tl.arange(0, ROWS)
        row = tl.minimum(block * ROWS + place, hidden_size - 1)
        if FORMAT == "fp8":
            token_scales = intermediate_scale + expert
        acc, acc_more = _sums(
            weights, scales, codes, token_scales, expert, block * ROWS, place, row,
            tl.maximum(slot, 0), slot >= 0, tl.maximum(more, 0), more >= 0, hidden_size,
            intermediate, one, 1, SLOTS, MORE, SLABS, STAGES, WHOLE, ASSEMBLY, FORMAT,
        )  # fmt: skip
        if bias is not None:
            bias += expert.to(tl.int64) * hidden_size
            acc += tl.load(bias + row)[:, None]
            acc_more += tl.load(bias + row)[:, None]
        store_down(out, acc, routing_weights, 1.0, slot, block, hidden_size, ROWS)
        if MORE:
            store_down(out, acc_more, routing_weights, 1.0, more, block, hidden_size, ROWS)
