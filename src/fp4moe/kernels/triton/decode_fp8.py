"""Decode e4m3 weights in registers, for tensor cores that want bfloat16 or float16.

Where the bits are: see `layout_fp8`. A code's bits at a bfloat16's sign and low exponent are its
value times 2^-120, subnormals included, at a float16's its value times 2^-8; one multiplication
gives the value without rounding. That is 1.75 instructions a weight in bfloat16, 2.75 in float16.
MXFP8 has a power of two for each 32 columns: part of that factor in bfloat16, a second one in
float16; with what unpacks the scales 1.9 and 3.7. Codes are taken not to be NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrange import arrange, assemble

__all__ = ["MXFP8_SHIFT", "MX_SHIFT", "decode_fp8", "decode_mxfp8", "power_lines", "powers"]

# With float16 activations MXFP8's weights are multiplied by 2^7, so that small ones fit; in
# bfloat16 those of MX formats by 2^-32, so that one factor reaches from a code's bits to them.
MXFP8_SHIFT, MX_SHIFT = 7, -32
_OUTPUTS = ["=h"] * 16


def power_lines(scale: str, shift: int, fp16: bool) -> list[str]:
    """PTX: halfwords h0 and h1, powers of two of the bytes 0 and 1 of a register.

    Byte b is 2^(b - 127 + shift), byte 0 is 0, and what is too large is infinite. m and n are used;
    z is -0.
    """
    if not fp16:
        return [
            f"prmt.b32 m, {scale}, 0, 0x4140;",
            "shl.b32 m, m, 7;",
            f"mov.b32 n, 0x{(127 + shift) * 0x800080:08X};",
            "fma.rn.bf16x2 m, m, n, z;",
            "mov.b32 {h0, h1}, m;",
        ]
    lines = []
    for block, left in enumerate((23, 15)):
        lines += [f"shl.b32 m, {scale}, {left};", "and.b32 m, m, 0x7F800000;"]
        lines.append(f"mov.b32 f{block}, m;")
        lines.append(f"mul.f32 f{block}, f{block}, 0f{(127 + shift) << 23:08X};")
    return [*lines, "cvt.rn.f16x2.f32 m, f1, f0;", "mov.b32 {h0, h1}, m;"]


def _code_lines(word: str, half: int, fp16: bool) -> list[str]:
    """PTX: m, two codes of a word where bfloat16 or float16 want them; n is used."""
    if not fp16:
        if half == 0:
            return [f"and.b32 m, {word}, 0x87F087F0;"]
        return [
            f"shl.b32 m, {word}, 4;",
            "and.b32 m, m, 0x80F080F0;",
            f"shr.b32 n, {word}, 4;",
            "lop3.b32 m, n, m, 0x07000700, 0xEC;",
        ]
    if half == 0:
        return [
            f"shl.b32 m, {word}, 3;",
            "and.b32 m, m, 0x3F803F80;",
            f"lop3.b32 m, {word}, m, 0x80008000, 0xEC;",
        ]
    return [
        f"shl.b32 m, {word}, 4;",
        "and.b32 m, m, 0x80008000;",
        f"shl.b32 n, {word}, 7;",
        "lop3.b32 m, n, m, 0x07800780, 0xEC;",
        f"shr.b32 n, {word}, 1;",
        "lop3.b32 m, n, m, 0x38003800, 0xEC;",
    ]


def _program(fp16: bool, scaled: bool) -> str:
    """PTX: 16 halfwords $0..$15 from four words $16 to $19 and, scaled, two bytes $20."""
    lines = ["{", ".reg .b32 m, n, z, c;", ".reg .b16 h<2>; .reg .f32 f<2>;"]
    # sm_80 has no mul.bf16x2; adding -0 keeps every product as it is.
    lines += ["mov.b32 z, 0x80008000;", f"mov.b32 c, {'0x5C005C00' if fp16 else '0x7B807B80'};"]
    if scaled:
        lines += power_lines("$20", MXFP8_SHIFT if fp16 else 120 + MX_SHIFT, fp16)
    for register in range(8):
        lines += _code_lines(f"${16 + register // 2}", register % 2, fp16)
        for factor in ("c" if fp16 or not scaled else "") + ("n" if scaled else ""):
            if factor == "n":
                lines.append(f"mov.b32 n, {{h{register // 4}, h{register // 4}}};")
            by = f"m, m, {factor}"
            lines.append(f"mul.f16x2 {by};" if fp16 else f"fma.rn.bf16x2 {by}, z;")
        lines.append(f"mov.b32 {{${register * 2}, ${register * 2 + 1}}}, m;")
    return "\n".join([*lines, "}"])


BFLOAT16_PROGRAM = tl.constexpr(_program(fp16=False, scaled=False))
FLOAT16_PROGRAM = tl.constexpr(_program(fp16=True, scaled=False))
BFLOAT16_SCALED_PROGRAM = tl.constexpr(_program(fp16=False, scaled=True))
FLOAT16_SCALED_PROGRAM = tl.constexpr(_program(fp16=True, scaled=True))
CONSTRAINTS = tl.constexpr(",".join([*_OUTPUTS, *["r"] * 4]))
SCALED_CONSTRAINTS = tl.constexpr(",".join([*_OUTPUTS, *["r"] * 5]))
_FLOAT16_FACTOR = tl.constexpr(2.0**MXFP8_SHIFT)
_BFLOAT16_FACTOR = tl.constexpr(2.0**MX_SHIFT)


@triton.jit
def powers(scales, FACTOR: tl.constexpr):
    """What `power_lines` makes of the bytes 0 and 1, in float32: 2^(byte - 127) x FACTOR."""
    first = ((scales & 0xFF) << 23).to(tl.float32, bitcast=True)
    second = (((scales >> 8) & 0xFF) << 23).to(tl.float32, bitcast=True)
    return first * FACTOR, second * FACTOR


@triton.jit
def _values(word, scale, FP16: tl.constexpr):
    """The four values of a word times a scale: columns 2 * lane, + 1, + 8, + 9."""
    other = ((word << 4) & 0x80F080F0) | ((word >> 4) & 0x07000700)
    # The same bits at the same place of a float32.
    power = 1.329227995784916e36  # 2^120
    v0 = ((word & 0x87F0) << 16).to(tl.float32, bitcast=True) * power * scale
    v1 = (word & 0x87F00000).to(tl.float32, bitcast=True) * power * scale
    v2 = ((other & 0x87F0) << 16).to(tl.float32, bitcast=True) * power * scale
    v3 = (other & 0x87F00000).to(tl.float32, bitcast=True) * power * scale
    kind = tl.float16 if FP16 else tl.bfloat16
    return v0.to(kind), v1.to(kind), v2.to(kind), v3.to(kind)


@triton.jit
def _plain(w0, w1, w2, w3, first, second, FP16: tl.constexpr):
    """The 16 values of four words, in the order of the PTX."""
    v0, v1, v2, v3 = _values(w0, first, FP16)
    v4, v5, v6, v7 = _values(w1, first, FP16)
    v8, v9, v10, v11 = _values(w2, second, FP16)
    v12, v13, v14, v15 = _values(w3, second, FP16)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def _four(words, SLABS: tl.constexpr, ROWS: tl.constexpr):
    """The four words of a lane, of uint32 [SLABS, ROWS, 16]."""
    even, odd = tl.split(tl.reshape(words, (SLABS, ROWS, 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def decode_fp8(
    words, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Return the codes' values [ROWS, 64 * SLABS], bfloat16 or float16, exact.

    words: uint32 [SLABS, ROWS, 16]. ASSEMBLY False computes the same with Triton's own operations,
    for its interpreter.
    """
    w0, w1, w2, w3 = _four(words, SLABS, ROWS)
    if ASSEMBLY:
        h = assemble((w0, w1, w2, w3), FLOAT16_PROGRAM if FP16 else BFLOAT16_PROGRAM, CONSTRAINTS)
    else:
        h = _plain(w0, w1, w2, w3, 1.0, 1.0, FP16)
    return arrange(h, SLABS, ROWS, FP16, ASSEMBLY)


@triton.jit
def decode_mxfp8(
    words, scales, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return weights [ROWS, 64 * SLABS] times 2^-32 in bfloat16, or times 2^7 in float16.

    words: uint32 [SLABS, ROWS, 16]; scales: uint32 [SLABS, ROWS], two bytes each. Exact in
    bfloat16 with scale bytes 35 to 166, in float16 105 to 127: below rounded, above infinite.
    """
    w0, w1, w2, w3 = _four(words, SLABS, ROWS)
    scales = tl.broadcast_to(tl.expand_dims(scales, 2), (SLABS, ROWS, 4))
    if ASSEMBLY:
        h = assemble(
            (w0, w1, w2, w3, scales),
            FLOAT16_SCALED_PROGRAM if FP16 else BFLOAT16_SCALED_PROGRAM,
            SCALED_CONSTRAINTS,
        )
    else:
        first, second = powers(scales, _FLOAT16_FACTOR if FP16 else _BFLOAT16_FACTOR)
        h = _plain(w0, w1, w2, w3, first, second, FP16)
    return arrange(h, SLABS, ROWS, FP16, ASSEMBLY)
