"""Round activations to e4m3 in Triton, as the FP8 formats' `round_activation` defines it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...formats.fp8 import BLOCK, BLOCK_RANGE_MIN, TOKEN_SCALE_MIN
from ...formats.scaled import E4M3_MAX

__all__ = ["round_blocks", "round_kernel", "round_rows", "to_codes"]

_MAX = tl.constexpr(E4M3_MAX)
_TOKEN_SCALE_MIN = tl.constexpr(TOKEN_SCALE_MIN)
_BLOCK_RANGE_MIN = tl.constexpr(BLOCK_RANGE_MIN)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def to_codes(x, ASSEMBLY: tl.constexpr):
    """Round float32 to e4m3, saturated at 448; NaN stays."""
    x = tl.clamp(x, -_MAX, _MAX, propagate_nan=tl.PropagateNan.ALL)
    if not ASSEMBLY:
        # Triton's interpreter cuts bits off; numbers of e4m3 pass its cast unchanged.
        bits = x.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def round_blocks(x, ASSEMBLY: tl.constexpr):
    """Return codes of float32 blocks [N, 128], and their scales [N]."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), _BLOCK_RANGE_MIN), _MAX)
    return to_codes(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), ASSEMBLY), scale


@triton.jit
def round_kernel(
    x, stride, static_scale, codes, scales, columns, width, BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Write codes [rows, width] of x [rows, columns], and the scales it computes; grid [rows].

    FORMAT: fp8 (one scale, given), fp8_channel (one a row) or fp8_block (one for 128 columns;
    scales [rows, width / 128], rounded up). BLOCKS of 128 columns: a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    value = tl.load(x + row * stride + column, mask=column < columns, other=0.0)
    value = value.to(tl.bfloat16).to(tl.float32)
    if FORMAT == "fp8":
        code = to_codes(value * tl.div_rn(1.0, tl.load(static_scale)), ASSEMBLY)
    elif FORMAT == "fp8_channel":
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value)), _MAX), _TOKEN_SCALE_MIN)
        tl.store(scales + row, scale)
        code = to_codes(value * tl.div_rn(1.0, scale), ASSEMBLY)
    else:
        tl.static_assert(FORMAT == "fp8_block")
        code, scale = round_blocks(value, ASSEMBLY)
        blocks = (width + _BLOCK - 1) // _BLOCK
        tl.store(scales + row * blocks + block, scale, mask=block < blocks)
    tl.store(codes + row * width + column, code, mask=column < width)


def round_rows(
    x: torch.Tensor, width: int, static_scale: torch.Tensor, format: str, assembly: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes [R, W] and float32 scales: static_scale, [R] or [R, W / 128] by format.

    Args:
        x: [R, K] bfloat16, float16 or float32, rounded to bfloat16 first; its last axis is dense.
        width: W, not below K; codes behind K are 0.
        static_scale: float32 [1], the decode multiplier of `fp8`; others do not read it.
        format: fp8, fp8_channel or fp8_block. assembly: False in Triton's interpreter.
    """
    rows, columns = x.shape
    blocks = -(-width // BLOCK)
    codes = x.new_empty((rows, width), dtype=torch.float8_e4m3fn)
    scales = static_scale
    if format != "fp8":
        shape = (rows, blocks) if format == "fp8_block" else (rows,)
        scales = x.new_empty(shape, dtype=torch.float32)
    round_kernel[(rows,)](
        x, x.stride(0), static_scale, codes, scales, columns, width,
        BLOCKS=triton.next_power_of_2(blocks), FORMAT=format, ASSEMBLY=assembly,
        num_warps=8 if blocks > 16 else 4,
    )  # fmt: skip
    return codes, scales
