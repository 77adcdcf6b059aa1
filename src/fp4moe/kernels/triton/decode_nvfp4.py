"""Decode NVFP4 weights in registers, for tensor cores that want bfloat16 or float16.

Where the bits are: see `layout`; a rotation and a mask bring them into place. A code's bits,
at a bfloat16's sign and low exponent, are its value times 2^-126, subnormals included; an E4M3 byte
shifted by 4 is its value times 2^-120. Two more factors, 2^120 and 2^119, give weight x 2^-7
without rounding, since code x block scale has at most 6 significant bits. In float16 one factor is
enough. `WEIGHT_FACTOR` undoes the 2^-7 in the epilogue. Block scales are taken to be neither
negative nor NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrange import arrange, assemble
from .layout import LEFT, RECIPE, SECOND_MOVE

__all__ = ["WEIGHT_FACTOR", "code_lines", "code_values", "decode_lanes", "decode_slabs", "lanes"]
__all__ += ["word_lines"]

WEIGHT_FACTOR = tl.constexpr(128.0)
_LEFT_MASK = sum(0x10001 << bit for bit in LEFT)


def word_lines() -> list[str]:
    """PTX: r0 and r1 from the words $16 and $17, and r2 from what remains of both."""
    return [
        "mov.b32 r0, $16;",
        "mov.b32 r1, $17;",
        f"shl.b32 m, r1, {SECOND_MOVE};",
        f"lop3.b32 r2, r0, m, 0x{_LEFT_MASK:08X}, 0xE4;",  # mask ? r0 : m
    ]


def code_lines(register: int, fp16: bool) -> list[str]:
    """PTX: m, the codes of a register where bfloat16 or float16 want them; n is used."""
    word, rotation = RECIPE[register]
    rotate = f"shf.l.wrap.b32 m, r{word}, r{word}, {rotation};"
    if rotation <= 6:  # no bit that counts comes from behind the end
        rotate = f"shl.b32 m, r{word}, {rotation};"
    lines = [rotate if rotation else f"mov.b32 m, r{word};", "and.b32 m, m, 0x81C081C0;"]
    if fp16:
        lines += ["and.b32 n, m, 0x01C001C0;", "shl.b32 n, n, 3;"]
        lines.append("lop3.b32 m, m, n, 0x80008000, 0xEC;")  # (m & mask) | n
    return lines


def _program(fp16: bool) -> str:
    """PTX: 16 halfwords $0..$15 from two words $16, $17 and four block scales $18."""
    lines = ["{", ".reg .b32 r<3>, s<2>, m, n, z, c, d;", ".reg .b16 h<4>;"]
    lines += ["mov.b32 z, 0x80008000;", "mov.b32 d, 0x7B007B00;"]
    lines.append(f"mov.b32 c, {'0x78007800' if fp16 else '0x7B807B80'};")
    lines += word_lines()
    lines += ["and.b32 s0, $18, 0x07F007F0;", "shf.r.wrap.b32 m, $18, $18, 8;"]
    lines.append("and.b32 s1, m, 0x07F007F0;")
    for block in range(2):
        if fp16:
            lines += [f"shl.b32 s{block}, s{block}, 3;", f"mul.f16x2 s{block}, s{block}, c;"]
        else:
            # sm_80 has no mul.bf16x2; adding -0 keeps every product as it is.
            lines += [f"fma.rn.bf16x2 s{block}, s{block}, {by}, z;" for by in "cd"]
        # Halves by name: ptxas then reads them in place, without a move.
        lines.append(f"mov.b32 {{h{block}, h{block + 2}}}, s{block};")
    for register in range(8):
        lines += code_lines(register, fp16)
        lines.append(f"mov.b32 n, {{h{register // 2}, h{register // 2}}};")
        lines.append("mul.f16x2 m, m, n;" if fp16 else "fma.rn.bf16x2 m, m, n, z;")
        lines.append(f"mov.b32 {{${register * 2}, ${register * 2 + 1}}}, m;")
    return "\n".join([*lines, "}"])


BFLOAT16_PROGRAM = tl.constexpr(_program(fp16=False))
FLOAT16_PROGRAM = tl.constexpr(_program(fp16=True))
_ROTATION = tuple(tl.constexpr(rotation) for _, rotation in RECIPE)
_REST, _MOVE = tl.constexpr(_LEFT_MASK), tl.constexpr(SECOND_MOVE)
CONSTRAINTS = tl.constexpr(",".join(["=h"] * 16 + ["r"] * 3))


@triton.jit
def _values(word, ROTATION: tl.constexpr, POWER: tl.constexpr, scale, FP16: tl.constexpr):
    """The two values of one register, as the PTX makes them."""
    rotated = word
    if ROTATION > 0:
        rotated = (word << ROTATION) | (word >> (32 - ROTATION))
    # The same bits at the same place of a float32.
    even = ((rotated & 0x81C0) << 16).to(tl.float32, bitcast=True) * POWER * scale
    odd = (rotated & 0x81C00000).to(tl.float32, bitcast=True) * POWER * scale
    kind = tl.float16 if FP16 else tl.bfloat16
    return even.to(kind), odd.to(kind)


@triton.jit
def _block_scale(scales, BLOCK: tl.constexpr):
    """A block scale times 2^119: what a code's bits are to be multiplied by."""
    plain = (scales >> 4) | (scales << 28)
    bits = ((plain >> (8 * BLOCK)) & 0x7F) << 20
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36 * 6.64613997892458e35


@triton.jit
def code_values(first, second, a, b, c, d, POWER: tl.constexpr, FP16: tl.constexpr):
    """The 16 codes of two words times 2^-126 x POWER x scale a to d, in the order of the PTX."""
    rest = (first & _REST) | ((second << _MOVE) & (0xFFFFFFFF - _REST))
    v0, v1 = _values(first, _ROTATION[0], POWER, a, FP16)
    v2, v3 = _values(first, _ROTATION[1], POWER, a, FP16)
    v4, v5 = _values(first, _ROTATION[2], POWER, b, FP16)
    v6, v7 = _values(rest, _ROTATION[3], POWER, b, FP16)
    v8, v9 = _values(second, _ROTATION[4], POWER, c, FP16)
    v10, v11 = _values(second, _ROTATION[5], POWER, c, FP16)
    v12, v13 = _values(second, _ROTATION[6], POWER, d, FP16)
    v14, v15 = _values(rest, _ROTATION[7], POWER, d, FP16)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def lanes(words, scales, SLABS: tl.constexpr, ROWS: tl.constexpr):
    """Both words of each lane, and the word of scales beside them: [SLABS, ROWS, 4] each."""
    first, second = tl.split(tl.reshape(words, (SLABS, ROWS, 4, 2)))
    return first, second, tl.broadcast_to(tl.expand_dims(scales, 2), (SLABS, ROWS, 4))


@triton.jit
def decode_slabs(
    words, scales, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Return weights x 2^-7 [ROWS, 64 * SLABS], bfloat16 or float16, exact.

    words: uint32 [SLABS, ROWS, 8]; scales: uint32 [SLABS, ROWS], four E4M3 bytes each. ASSEMBLY
    False computes the same with Triton's own operations, for its interpreter.
    """
    first, second, scales = lanes(words, scales, SLABS, ROWS)
    return decode_lanes(first, second, scales, SLABS, ROWS, FP16, ASSEMBLY)


@triton.jit
def decode_lanes(
    first, second, scales, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """What `decode_slabs` returns, of what `lanes` returns."""
    if ASSEMBLY:
        h = assemble(
            (first, second, scales), FLOAT16_PROGRAM if FP16 else BFLOAT16_PROGRAM, CONSTRAINTS
        )
    else:
        a = _block_scale(scales, 0)
        b = _block_scale(scales, 1)
        c = _block_scale(scales, 2)
        d = _block_scale(scales, 3)
        h = code_values(first, second, a, b, c, d, 1.0, FP16)
    return arrange(h, SLABS, ROWS, FP16, ASSEMBLY)
