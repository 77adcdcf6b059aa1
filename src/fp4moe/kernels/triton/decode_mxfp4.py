"""Decode MXFP4 weights in registers: codes as NVFP4's, a power of two for each 32 columns.

One factor makes a code's bits (see `decode_nvfp4`) the weight, in float16 two of them; both are
exact, see `decode_mxfp4`. 1.7 instructions a weight in bfloat16, 3.9 in float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrange import arrange, assemble
from .decode_fp8 import MX_SHIFT, power_lines, powers
from .decode_nvfp4 import code_lines, code_values, lanes, word_lines

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
_TO_VALUE = tl.constexpr(2.0**126)
_FLOAT16_FACTOR = tl.constexpr(2.0**MXFP4_SHIFT)
_BFLOAT16_FACTOR = tl.constexpr(2.0**MX_SHIFT)


@triton.jit
def decode_mxfp4(
    words, scales, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return weights [ROWS, 64 * SLABS] times 2^-32 in bfloat16, or times 2^10 in float16.

    words: uint32 [SLABS, ROWS, 8]; scales: uint32 [SLABS, ROWS], two bytes each. Exact in
    bfloat16 with scale bytes 27 to 160, in float16 94 to 130: below rounded, above infinite.
    """
    first, second, scales = lanes(words, scales, SLABS, ROWS)
    if ASSEMBLY:
        h = assemble(
            (first, second, scales), FLOAT16_PROGRAM if FP16 else BFLOAT16_PROGRAM, CONSTRAINTS
        )
    else:
        a, b = powers(scales, _FLOAT16_FACTOR if FP16 else _BFLOAT16_FACTOR)
        h = code_values(first, second, a, a, b, b, _TO_VALUE, FP16)
    return arrange(h, SLABS, ROWS, FP16, ASSEMBLY)
