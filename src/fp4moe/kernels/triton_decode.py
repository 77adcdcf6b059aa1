"""Decode NVFP4 weights in registers, for tensor cores that want bfloat16 or float16.

Where the bits are: see `triton_layout`. A code's bits, moved to a bfloat16's sign and low exponent,
are its value times 2^-126, subnormals included; an E4M3 byte shifted by 4 is its value times
2^-120. Two more factors, 2^120 and 2^119, give weight x 2^-7 without rounding, since code x block
scale has at most 6 significant bits. In float16 one factor is enough. `WEIGHT_FACTOR` undoes the
2^-7 in the epilogue. Block scales are taken to be neither negative nor NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["WEIGHT_FACTOR", "decode_slabs"]

WEIGHT_FACTOR = tl.constexpr(128.0)


def _spread(word: str, fp16: bool) -> list[str]:
    """PTX that spreads a word's eight codes to v0..v3, two in each."""
    lines = [
        f"and.b32 v0, {word}, 0x81C081C0;",
        f"shl.b32 m, {word}, 3;",
        "and.b32 v1, m, 0x81C081C0;",
    ]
    for out, move, sign in (("v2", "shl.b32", (6, 2)), ("v3", "shr.b32", (3, 1))):
        lines += [
            f"{move} m, {word}, {sign[0]};",
            f"shl.b32 n, {word}, {sign[1]};",
            "and.b32 m, m, 0x01C001C0;",
            f"lop3.b32 {out}, n, 0x80008000, m, 0xEA;",  # (n & mask) | m
        ]
    for out in ("v0", "v1", "v2", "v3") if fp16 else ():
        lines += [
            f"and.b32 m, {out}, 0x01C001C0;",
            "shl.b32 m, m, 3;",
            f"lop3.b32 {out}, {out}, 0x80008000, m, 0xEA;",
        ]
    return lines


def _program(fp16: bool) -> str:
    """PTX: 16 halfwords $0..$15 from two words $16, $17 and four block scales $18."""
    lines = ["{", ".reg .b32 v<4>, m, n, s, a, b, z, c, d;"]
    lines += ["mov.b32 z, 0x80008000;", "mov.b32 d, 0x7B007B00;"]
    lines.append(f"mov.b32 c, {'0x78007800' if fp16 else '0x7B807B80'};")
    for number, word in enumerate(("$16", "$17")):
        lines.append(f"prmt.b32 s, $18, 0, {('0x4140', '0x4342')[number]};")
        if fp16:
            lines += ["shl.b32 s, s, 7;", "mul.f16x2 s, s, c;"]
        else:
            # sm_80 has no mul.bf16x2; adding -0 keeps every product as it is.
            lines += [
                "shl.b32 s, s, 4;",
                "fma.rn.bf16x2 s, s, c, z;",
                "fma.rn.bf16x2 s, s, d, z;",
            ]
        lines += ["prmt.b32 a, s, s, 0x1010;", "prmt.b32 b, s, s, 0x3232;"]
        lines += _spread(word, fp16)
        for pair in range(4):
            scale, out = "ab"[pair // 2], number * 8 + pair * 2
            multiply = f"fma.rn.bf16x2 m, v{pair}, {scale}, z;"
            lines.append(f"mul.f16x2 m, v{pair}, {scale};" if fp16 else multiply)
            lines.append(f"mov.b32 {{${out}, ${out + 1}}}, m;")
    return "\n".join([*lines, "}"])


BFLOAT16_PROGRAM = tl.constexpr(_program(fp16=False))
FLOAT16_PROGRAM = tl.constexpr(_program(fp16=True))
CONSTRAINTS = tl.constexpr(",".join(["=h"] * 16 + ["r"] * 3))


@triton.jit
def _field(word, scale, PAIR: tl.constexpr, HALF: tl.constexpr, FP16: tl.constexpr):
    """The value of one code of a word, as the PTX makes it."""
    half = (word >> (16 * HALF)) & 0xFFFF
    if PAIR == 0:
        bits = half & 0x81C0
    elif PAIR == 1:
        bits = (half << 3) & 0x81C0
    elif PAIR == 2:
        bits = ((half << 6) & 0x01C0) | ((half << 2) & 0x8000)
    else:
        bits = ((half >> 3) & 0x01C0) | ((half << 1) & 0x8000)
    # The same bits at the same place of a float32.
    code = (bits << 16).to(tl.float32, bitcast=True)
    product = code * scale
    return product.to(tl.float16) if FP16 else product.to(tl.bfloat16)


@triton.jit
def _block_scale(scales, BLOCK: tl.constexpr):
    """A block scale times 2^119: what a code's bits are to be multiplied by."""
    bits = ((scales >> (8 * BLOCK)) & 0xFF) << 20
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36 * 6.64613997892458e35


@triton.jit
def _plain(first, second, scales, FP16: tl.constexpr):
    """The 16 values of two words, in the order of the PTX."""
    a = _block_scale(scales, 0)
    b = _block_scale(scales, 1)
    c = _block_scale(scales, 2)
    d = _block_scale(scales, 3)
    return (
        _field(first, a, 0, 0, FP16),
        _field(first, a, 0, 1, FP16),
        _field(first, a, 1, 0, FP16),
        _field(first, a, 1, 1, FP16),
        _field(first, b, 2, 0, FP16),
        _field(first, b, 2, 1, FP16),
        _field(first, b, 3, 0, FP16),
        _field(first, b, 3, 1, FP16),
        _field(second, c, 0, 0, FP16),
        _field(second, c, 0, 1, FP16),
        _field(second, c, 1, 0, FP16),
        _field(second, c, 1, 1, FP16),
        _field(second, d, 2, 0, FP16),
        _field(second, d, 2, 1, FP16),
        _field(second, d, 3, 0, FP16),
        _field(second, d, 3, 1, FP16),
    )


@triton.jit
def _pair(even, odd, FP16: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Two neighbours along K, on a new last axis."""
    if ASSEMBLY:
        target = tl.float16 if FP16 else tl.bfloat16
        even = even.to(target, bitcast=True)
        odd = odd.to(target, bitcast=True)
    return tl.join(even, odd)


@triton.jit
def decode_slabs(
    words,
    scales,
    SLABS: tl.constexpr,
    ROWS: tl.constexpr,
    FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Return weights x 2^-7 [ROWS, 64 * SLABS], bfloat16 or float16, exact.

    words: uint32 [SLABS, ROWS, 8]; scales: uint32 [SLABS, ROWS], four E4M3 bytes each. ASSEMBLY
    False computes the same with Triton's own operations, for its interpreter.
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
        h = _plain(first, second, scales, FP16)
    # Axes appended: place in the pair, half of the block, block of the word, word.
    a = tl.join(_pair(h[0], h[1], FP16, ASSEMBLY), _pair(h[2], h[3], FP16, ASSEMBLY))
    b = tl.join(_pair(h[4], h[5], FP16, ASSEMBLY), _pair(h[6], h[7], FP16, ASSEMBLY))
    c = tl.join(_pair(h[8], h[9], FP16, ASSEMBLY), _pair(h[10], h[11], FP16, ASSEMBLY))
    d = tl.join(_pair(h[12], h[13], FP16, ASSEMBLY), _pair(h[14], h[15], FP16, ASSEMBLY))
    values = tl.join(tl.join(a, b), tl.join(c, d))
    # [slab, row, lane, pair, half, block, word] to [row, slab, word, block, half, lane, pair].
    return tl.reshape(tl.permute(values, (1, 0, 6, 5, 4, 2, 3)), (ROWS, SLABS * 64))
