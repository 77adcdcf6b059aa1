"""One quantised Linear in Triton: weights on the M side of the tensor core, tokens on its N side.

Few tokens leave most of the N side empty. CHUNKS fills it: the M side holds a row once for each of
CHUNKS pieces of K, and the N side the tokens once for each piece. The products of a piece of the
weights with another piece of the tokens are thrown away, the others summed. So a program needs
1 / CHUNKS of the rows, and enough programs are in flight without a second launch. Splits along K
beside that go to a float32 scratch [splits, tokens, rows], which `sum_splits_kernel` adds up in
their order.

A matrix is an expert, number 0, in the layout of `layout` or `layout_fp8`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import _add_dot
from .weights import load_weights, row_factor

__all__ = ["linear_kernel", "sum_splits_kernel", "weight_kernel"]


@triton.jit
def _load_slabs(
    words, scales, row, slab, slabs, SLABS: tl.constexpr, LINES: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Decoded weights [LINES, SLABS * 64] of each line's row, from a slab of its own on."""
    # A slab of 64 rows taken as a tile: what follows a tile is the next slab of the same rows.
    tile = (row // 64 * slabs + slab) * 64 + row % 64
    first = tl.program_id(2)  # always 0
    return load_weights(
        words, scales, first, tile, 0, 0, 1, SLABS, LINES, True, FP16, ASSEMBLY, FORMAT
    )


@triton.jit
def _block_scales(scales, row, slab, slabs):
    """fp8_block's scale of each line, [LINES, 1]."""
    return tl.load(scales + row // 128 * ((slabs + 1) // 2) + slab // 2)[:, None]


# They differ from layer to layer: no variant for a multiple of 16, or for 1.
@triton.jit(do_not_specialize=["tokens", "slabs", "steps", "split_steps"])
def linear_kernel(
    x, stride_token, words, scales, global_scale, bias, out, tokens, rows, columns, total_rows,
    slabs, steps, split_steps,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, FP16: tl.constexpr, ASSEMBLY: tl.constexpr,
    WAIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Write weight x + bias to out [tokens, rows], or float32 sums of each split to its part.

    Grid: [row blocks * token tiles, splits]. bias: [rows] or None; None for splits, too. A step is
    CHUNKS * SLABS slabs of 64 columns; there are `steps`, and a split takes `split_steps` of them.
    """
    tiles = tl.cdiv(tokens, SLOTS)
    block = tl.program_id(0) // tiles
    split = tl.program_id(1)
    line = tl.arange(0, CHUNKS * ROWS)
    row = tl.minimum(block * ROWS + line % ROWS, total_rows - 1)
    place = tl.arange(0, CHUNKS * SLOTS)
    token = tl.program_id(0) % tiles * SLOTS + place % SLOTS
    there = token < tokens
    x += tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * stride_token
    acc = tl.zeros((CHUNKS * ROWS, CHUNKS * SLOTS), dtype=tl.float32)
    last = tl.minimum((split + 1) * split_steps, steps)
    for step in tl.range(split * split_steps, last, num_stages=STAGES):
        slab = (step * CHUNKS + line // ROWS) * SLABS
        token_slab = (step * CHUNKS + place // SLOTS) * SLABS
        if WHOLE:
            column = token_slab[:, None] * 64 + tl.arange(0, SLABS * 64)[None, :]
            mask = there[:, None]
        else:
            # Behind the end the last slabs again, with zeros for what another step has taken.
            slab = tl.minimum(slab, slabs - SLABS)
            first = tl.minimum(token_slab, slabs - SLABS)
            column = first[:, None] * 64 + tl.arange(0, SLABS * 64)[None, :]
            mask = there[:, None] & (column >= token_slab[:, None] * 64) & (column < columns)
        y = tl.trans(tl.load(x + column, mask=mask, other=0.0))
        w = _load_slabs(
            words, scales, row, slab, slabs, SLABS, CHUNKS * ROWS, FP16, ASSEMBLY, FORMAT
        )
        if FORMAT == "fp8_block":
            # A step's sum must not reach beyond a block of 128 columns.
            tl.static_assert(SLABS == 1 or (SLABS == 2 and WHOLE))
            factor = _block_scales(scales, row, slab, slabs)
            acc += _add_dot(w, y, tl.zeros_like(acc), ASSEMBLY, WAIT) * factor
        else:
            acc = _add_dot(w, y, acc, ASSEMBLY, WAIT)
    acc *= row_factor(scales, global_scale, tl.program_id(2), row, total_rows, 1, FP16, FORMAT)
    if CHUNKS > 1:
        pairs = tl.where((line // ROWS)[:, None] == (place // SLOTS)[None, :], acc, 0.0)
        pairs = tl.reshape(pairs, (CHUNKS, ROWS, CHUNKS, SLOTS))
        total = tl.sum(tl.sum(pairs, 2), 0)
    else:
        total = acc
    row = block * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % tiles * SLOTS + tl.arange(0, SLOTS)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = (token.to(tl.int64) + split.to(tl.int64) * tokens)[None, :] * rows + row[:, None]
    mask = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits_kernel(
    partial, bias, out, rows, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the parts of partial [SPLITS, size] and bias [rows]; grid [size / BLOCK]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = partial + at
    for _ in tl.static_range(SPLITS):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    if bias is not None:
        total += tl.load(bias + at % rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    words, scales, global_scale, out, rows, columns, total_rows, slabs,
    ROWS: tl.constexpr, SLABS: tl.constexpr, ASSEMBLY: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Write the weight [rows, columns], rounded once to out's dtype.

    Grid: [row blocks * steps of SLABS slabs], those of a row block one after another.
    """
    steps = tl.cdiv(slabs, SLABS)
    row = tl.program_id(0) // steps * ROWS + tl.arange(0, ROWS)
    # Behind the end the last slabs again: two programs write the same numbers.
    slab = tl.minimum(tl.program_id(0) % steps * SLABS, slabs - SLABS)
    # bfloat16 holds every format's weights exactly, but for the ends of the range of MX scales.
    w = _load_slabs(words, scales, row, slab, slabs, SLABS, ROWS, False, ASSEMBLY, FORMAT)
    w = w.to(tl.float32)
    if FORMAT == "fp8_block":
        column = slab * 64 + tl.arange(0, SLABS * 64)
        at = row[:, None] // 128 * ((slabs + 1) // 2) + column[None, :] // 128
        w *= tl.load(scales + at)
    else:
        w *= row_factor(scales, global_scale, tl.program_id(2), row, total_rows, 1, False, FORMAT)
    column = slab * 64 + tl.arange(0, SLABS * 64)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=mask)
