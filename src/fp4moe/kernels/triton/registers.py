"""Tensors whose registers are chosen: Gluon's layouts for `one_token_gemm`, and its decoding.

Weights are loaded into the registers where the tensor core reads them, so that no thread waits for
another one. Triton's interpreter knows no layouts: there the same functions are plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_nvfp4 import decode_lanes

__all__ = ["ASSEMBLY", "arange", "convert", "decoded", "jit", "launch", "lines_layout"]
__all__ += ["operand_layout", "pin", "plain_layout", "product", "sliced", "sums_layout", "wait"]
__all__ += ["zeros"]

ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)

if triton.knobs.runtime.interpret:
    jit = triton.jit

    @triton.jit
    def arange(SIZE: tl.constexpr, LAYOUT: tl.constexpr):
        return tl.arange(0, SIZE)

    @triton.jit
    def convert(x, LAYOUT: tl.constexpr):
        return x

    @triton.jit
    def zeros(LINES: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
        return tl.zeros((LINES, N), tl.float32)

    @triton.jit
    def product(a, b, acc):
        # It multiplies the bits of bfloat16; float32 holds the same values.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")

    def lines_layout(tiles, chunks):
        return None

    def sums_layout(chunks):
        return None

    def operand_layout(index, chunks):
        return None

    def plain_layout(chunks):
        return None

    def sliced(layout, *dims):
        return None

    @triton.jit
    def pin():
        pass

    @triton.jit
    def wait():
        pass

    @triton.jit
    def launch():
        pass

else:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.language.extra.cuda import gdc_launch_dependents as launch  # type: ignore[no-redef]
    from triton.language.extra.cuda import gdc_wait as wait  # type: ignore[no-redef]

    jit = gluon.jit

    @gluon.constexpr_function
    def lines_layout(tiles, chunks):
        """[tiles, chunks, 16 lines, 8 words]: a lane's two, and its lines as the tensor core's."""
        registers = [[0, 0, 0, 1], [0, 0, 8, 0]]
        registers += [[1 << i, 0, 0, 0] for i in range(tiles.bit_length() - 1)]
        lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
        warps = [[0, 1 << i, 0, 0] for i in range(chunks.bit_length() - 1)]
        return gl.DistributedLinearLayout(registers, lanes, warps, [], [tiles, chunks, 16, 8])

    @gluon.constexpr_function
    def sums_layout(chunks):
        return gl.NVMMADistributedLayout([2, 0], [chunks, 1], [16, 8])

    @gluon.constexpr_function
    def operand_layout(index, chunks):
        parent = gl.NVMMADistributedLayout([2, 0], [chunks, 1], [16, 8])
        return gl.DotOperandLayout(index, parent, 2)

    @gluon.constexpr_function
    def plain_layout(chunks):
        return gl.BlockedLayout([1], [32], [chunks], [0])

    @gluon.constexpr_function
    def sliced(layout, *dims):
        for dim in dims:
            layout = gl.SliceLayout(dim, layout)
        return layout

    @gluon.jit
    def pin():
        """Keep loads above this: ptxas would move each to where it is used."""
        gl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )

    @gluon.jit
    def arange(SIZE: tl.constexpr, LAYOUT: tl.constexpr):
        return gl.arange(0, SIZE, LAYOUT)

    @gluon.jit
    def convert(x, LAYOUT: tl.constexpr):
        return gl.convert_layout(x, LAYOUT)

    @gluon.jit
    def zeros(LINES: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
        return gl.full((LINES, N), 0, gl.float32, LAYOUT)

    @gluon.jit
    def product(a, b, acc):
        return gl.nvidia.ampere.mma_v2(a, b, acc)


@jit
def decoded(word, scale, LINES: tl.constexpr, FP16: tl.constexpr):
    """Weights [LINES, 64]; word: [1, LINES, 8], scale: the same form, whatever the word."""
    first, second = tl.split(tl.reshape(word, (1, LINES, 4, 2)))
    scale, _ = tl.split(tl.reshape(scale, (1, LINES, 4, 2)))
    return decode_lanes(first, second, scale, 1, LINES, FP16, ASSEMBLY)
