"""Decode MXFP4 weights in registers: codes as NVFP4's, a power of two for each 32 columns.

One factor makes a code's bits (see `decode_nvfp4`) the weight, in float16 two of them; both are
exact, see `decode_mxfp4`. 1.7 instructions a weight in bfloat16, 3.9 in float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrange import arrange
from .decode_fp8 import MX_SHIFT, power_lines
from .decode_nvfp4 import code_lines, word_lines
from .layout import LEFT, RECIPE, SECOND_MOVE

__all__ = ["MXFP4_SHIFT", "decode_mxfp4"]

# With float16 activations the weights are multiplied by 2^10, so that small ones fit.
MXFP4_SHIFT = 10


def _program(fp16: bool) -> str:
    """PTX: 16 halfwords $0..$15 from two words $16, $17 and two scale bytes $18."""
    lines = ["{", ".reg .b32 r<3>, m, n, z, c;", ".reg .b16 h<2>; .reg .f32 f<2>;"]
    lines += ["mov.b32 z, 0x80008000;", f"mov.b32 c, {'0x74007400' if fp16 else '0x7E807E80'};"]
    lines += word_lines()
    lines += power_lines("$18", MXFP4_SHIFT if fp16 else 126 + MX_SHIFT, fp16)
    for register in range(8):
        lines += code_lines(register, fp16)
        for factor in "cn" if fp16 else "n":
            if factor == "n":
                lines.append(f"mov.b32 n, {{h{register // 4}, h{register // 4}}};")
            by = f"m, m, {factor}"
            lines.append(f"mul.f16x2 {by};" if fp16 else f"fma.rn.bf16x2 {by}, z;")
        lines.append(f"mov.b32 {{${register * 2}, ${register * 2 + 1}}}, m;")
    return "\n".join([*lines, "}"])


BFLOAT16_PROGRAM = tl.constexpr(_program(fp16=False))
FLOAT16_PROGRAM = tl.constexpr(_program(fp16=True))
CONSTRAINTS = tl.constexpr(",".join(["=h"] * 16 + ["r"] * 3))
_ROTATION = tuple(tl.constexpr(rotation) for _, rotation in RECIPE)
_REST = tl.constexpr(sum(0x10001 << bit for bit in LEFT))
_MOVE = tl.constexpr(SECOND_MOVE)
_FLOAT16_FACTOR = tl.constexpr(2.0**MXFP4_SHIFT)
_BFLOAT16_FACTOR = tl.constexpr(2.0**MX_SHIFT)


@triton.jit
def _values(word, ROTATION: tl.constexpr, scale, FP16: tl.constexpr):
    """The two values of one register, as the PTX makes them."""
    rotated = word
    if ROTATION > 0:
        rotated = (word << ROTATION) | (word >> (32 - ROTATION))
    power = 8.507059173023462e37  # 2^126
    even = ((rotated & 0x81C0) << 16).to(tl.float32, bitcast=True) * power * scale
    odd = (rotated & 0x81C00000).to(tl.float32, bitcast=True) * power * scale
    kind = tl.float16 if FP16 else tl.bfloat16
    return even.to(kind), odd.to(kind)


@triton.jit
def _plain(first, second, a, b, FP16: tl.constexpr):
    """The 16 values of two words, in the order of the PTX."""
    rest = (first & _REST) | ((second << _MOVE) & (0xFFFFFFFF - _REST))
    v0, v1 = _values(first, _ROTATION[0], a, FP16)
    v2, v3 = _values(first, _ROTATION[1], a, FP16)
    v4, v5 = _values(first, _ROTATION[2], a, FP16)
    v6, v7 = _values(rest, _ROTATION[3], a, FP16)
    v8, v9 = _values(second, _ROTATION[4], b, FP16)
    v10, v11 = _values(second, _ROTATION[5], b, FP16)
    v12, v13 = _values(second, _ROTATION[6], b, FP16)
    v14, v15 = _values(rest, _ROTATION[7], b, FP16)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def decode_mxfp4(
    words,
    scales,
    SLABS: tl.constexpr,
    ROWS: tl.constexpr,
    FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Return weights [ROWS, 64 * SLABS] times 2^-32 in bfloat16, or times 2^10 in float16.

    words: uint32 [SLABS, ROWS, 8]; scales: uint32 [SLABS, ROWS], two bytes each. Exact in
    bfloat16 with scale bytes 27 to 160, in float16 94 to 130: below rounded, above infinite.
    """
    first, second = tl.split(tl.reshape(words, (SLABS, ROWS, 4, 2)))
    scales = tl.broadcast_to(tl.expand_dims(scales, 2), (SLABS, ROWS, 4))
    if ASSEMBLY:
        h = tl.inline_asm_elementwise(
            asm=FLOAT16_PROGRAM if FP16 else BFLOAT16_PROGRAM,
            constraints=CONSTRAINTS,
            args=[first, second, scales],
            dtype=(
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        a = ((scales & 0xFF) << 23).to(tl.float32, bitcast=True)
        b = (((scales >> 8) & 0xFF) << 23).to(tl.float32, bitcast=True)
        a *= _FLOAT16_FACTOR if FP16 else _BFLOAT16_FACTOR
        b *= _FLOAT16_FACTOR if FP16 else _BFLOAT16_FACTOR
        h = _plain(first, second, a, b, FP16)
    return arrange(h, SLABS, ROWS, FP16, ASSEMBLY)
