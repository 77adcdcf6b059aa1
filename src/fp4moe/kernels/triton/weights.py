"""What the GEMMs ask a number format for: decoded weights, and the factors of their rows.

FORMAT is a name of `fp4moe.formats.FORMATS`. `scales` are 32-bit words of bytes that the decoder
reads, or with FP8 the format's own float32 scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_fp8 import MX_SHIFT, MXFP8_SHIFT, decode_fp8, decode_mxfp8
from .decode_mxfp4 import MXFP4_SHIFT, decode_mxfp4
from .decode_nvfp4 import WEIGHT_FACTOR, decode_slabs

__all__ = ["block_scale", "load_weights", "row_factor"]

_MX_FACTOR = tl.constexpr(2.0**-MX_SHIFT)
_MXFP8_FACTOR = tl.constexpr(2.0**-MXFP8_SHIFT)
_MXFP4_FACTOR = tl.constexpr(2.0**-MXFP4_SHIFT)


@triton.jit
def load_weights(
    words,
    scales,
    expert,
    row,
    total_rows,
    slab0,
    slabs,
    SLABS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Decoded weights [ROWS, SLABS * 64] of an expert; expert < 0 or slabs behind the end: zero."""
    # Words of a row of a slab, and rows that share a word of scales.
    WORDS: tl.constexpr = 8 if FORMAT == "nvfp4" or FORMAT == "mxfp4" else 16
    SHARED: tl.constexpr = 1 if FORMAT == "nvfp4" else 2
    SCALED: tl.constexpr = FORMAT == "nvfp4" or FORMAT == "mxfp4" or FORMAT == "mxfp8"
    slab = slab0 + tl.arange(0, SLABS)
    words += tl.maximum(expert, 0).to(tl.int64) * total_rows * slabs * WORDS
    if SCALED:
        if SHARED == 1:
            scales += tl.maximum(expert, 0).to(tl.int64) * total_rows * slabs
        else:
            scales += tl.maximum(expert, 0).to(tl.int64) * (total_rows // SHARED) * slabs
    word_row = (row // 64) * (slabs * (64 * WORDS)) + (row % 64) * WORDS
    if SCALED:
        scale_row = (row // 64) * (slabs * (64 // SHARED)) + row % 64 // SHARED
    word_at = (slab * (64 * WORDS))[:, None, None] + word_row[None, :, None]
    word_at += tl.arange(0, WORDS)[None, None, :]
    if SCALED:
        scale_at = (slab * (64 // SHARED))[:, None] + scale_row[None, :]
    if WHOLE:
        word = tl.load(words + word_at)
        if SCALED:
            scale = tl.load(scales + scale_at)
    else:
        # Not a scalar condition & a block's: triton 3.9's interpreter makes that one of integers.
        there = slab < tl.where(expert >= 0, slabs, 0)
        word = tl.load(words + word_at, mask=there[:, None, None], other=0)
        if SCALED:
            scale = tl.load(scales + scale_at, mask=there[:, None], other=0)
    word = word.to(tl.uint32, bitcast=True)
    if SCALED:
        scale = scale.to(tl.uint32, bitcast=True)
        if SHARED == 2:
            # A neighbour's two bytes stand beside a row's own.
            scale = scale >> (row % SHARED * 16)[None, :].to(tl.uint32)
    if FORMAT == "nvfp4":
        w = decode_slabs(word, scale, SLABS, ROWS, FP16, ASSEMBLY)
    elif FORMAT == "mxfp4":
        w = decode_mxfp4(word, scale, SLABS, ROWS, FP16, ASSEMBLY)
    elif FORMAT == "mxfp8":
        w = decode_mxfp8(word, scale, SLABS, ROWS, FP16, ASSEMBLY)
    else:
        w = decode_fp8(word, SLABS, ROWS, FP16, ASSEMBLY)
    return w


@triton.jit
def row_factor(
    scales, global_scale, expert, row, total_rows, PARTS: tl.constexpr, FP16: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """What sums are to be multiplied by: a number, or for FP8 one for each row [ROWS, 1]."""
    if FORMAT == "nvfp4":
        factor = tl.load(global_scale + expert) * WEIGHT_FACTOR
    elif FORMAT == "fp8":
        half = row // (total_rows // PARTS)
        factor = tl.load(scales + expert.to(tl.int64) * PARTS + half)[:, None]
    elif FORMAT == "fp8_channel":
        factor = tl.load(scales + expert.to(tl.int64) * total_rows + row)[:, None]
    elif FORMAT == "mxfp8":
        factor = _MXFP8_FACTOR if FP16 else _MX_FACTOR
    elif FORMAT == "mxfp4":
        factor = _MXFP4_FACTOR if FP16 else _MX_FACTOR
    else:
        tl.static_assert(FORMAT == "fp8_block")
        factor = 1.0
    return factor


@triton.jit
def block_scale(scales, expert, first_row, place, slab, total_rows, slabs, PARTS: tl.constexpr):
    """fp8_block's scale of the 128 columns around a slab, for rows of one block of each part.

    first_row: of a part. place: of rows, with two PARTS eight of gate and eight of up by turns.
    Returns a number, or [rows, 1].
    """
    columns = (slabs + 1) // 2
    rows = (total_rows // PARTS + 127) // 128
    # Behind the end the last one again: it is read a step ahead.
    column = tl.minimum(slab // 2, columns - 1)
    at = scales + (expert.to(tl.int64) * PARTS * rows + first_row // 128) * columns + column
    scale = tl.load(at)
    if PARTS == 2:
        up = tl.load(at + rows * columns)
        scale = tl.where(place // 8 % 2 == 1, up, scale)[:, None]
    return scale
