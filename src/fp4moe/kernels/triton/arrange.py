"""What all decoders end with: their PTX program, and the order of rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["arrange", "assemble"]


@triton.jit
def assemble(args, PROGRAM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """Run a program of PTX on tensors of one shape; return its sixteen halfwords as int16."""
    return tl.inline_asm_elementwise(
        asm=PROGRAM,
        constraints=CONSTRAINTS,
        args=args,
        dtype=(
            tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
            tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
        ),
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _pair(even, odd, FP16: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Two neighbours along K, on a new last axis."""
    if ASSEMBLY:
        target = tl.float16 if FP16 else tl.bfloat16
        even = even.to(target, bitcast=True)
        odd = odd.to(target, bitcast=True)
    return tl.join(even, odd)


@triton.jit
def arrange(h, SLABS: tl.constexpr, ROWS: tl.constexpr, FP16: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return [ROWS, 64 * SLABS] of sixteen tensors [SLABS, ROWS, 4 lanes].

    They hold columns 16 * block + 8 * half + 2 * lane + place, ordered by block, half and place;
    ASSEMBLY: as the bits of int16.
    """
    # Axes appended: place in the pair, half of the block, block of the word, word.
    a = tl.join(_pair(h[0], h[1], FP16, ASSEMBLY), _pair(h[2], h[3], FP16, ASSEMBLY))
    b = tl.join(_pair(h[4], h[5], FP16, ASSEMBLY), _pair(h[6], h[7], FP16, ASSEMBLY))
    c = tl.join(_pair(h[8], h[9], FP16, ASSEMBLY), _pair(h[10], h[11], FP16, ASSEMBLY))
    d = tl.join(_pair(h[12], h[13], FP16, ASSEMBLY), _pair(h[14], h[15], FP16, ASSEMBLY))
    values = tl.join(tl.join(a, b), tl.join(c, d))
    # [slab, row, lane, pair, half, block, word] to [row, slab, word, block, half, lane, pair].
    return tl.reshape(tl.permute(values, (1, 0, 6, 5, 4, 2, 3)), (ROWS, SLABS * 64))
