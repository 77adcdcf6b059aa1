"""The CUDA source of one GEMM: what `gemm.cu` asks for, from a layer and a tile.

Decoders are the programs of PTX that the Triton kernels have, read with whole registers; so both
compute the same weights from the same layout.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

from ...activations import get_activation
from ..triton import decode_fp8, decode_mxfp4, decode_nvfp4
from .tiles import HopperTile

__all__ = ["FORMATS", "Decoding", "source_of"]

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the weights of a format stand in memory, and how they are decoded.

    Attributes:
        words: 32-bit words of a lane, of a row of a slab. scale_bytes: of a row of a slab.
        programs: PTX for bfloat16 and for float16.
        row_factor: what sums are multiplied by: 0 the factor alone, 1 times the expert's global
            scale, 2 a scale of the expert's gate or up, 3 a scale of the row.
        factors: what undoes the decoders' power of two, bfloat16 and float16.
    """

    words: int
    scale_bytes: int
    programs: tuple[str, str]
    row_factor: int
    factors: tuple[float, float]


def _fp8(row_factor: int) -> Decoding:
    programs = decode_fp8.BFLOAT16_PROGRAM.value, decode_fp8.FLOAT16_PROGRAM.value
    return Decoding(4, 0, programs, row_factor, (1.0, 1.0))


FORMATS = {
    "nvfp4": Decoding(
        2, 4, (decode_nvfp4.BFLOAT16_PROGRAM.value, decode_nvfp4.FLOAT16_PROGRAM.value), 1,
        (decode_nvfp4.WEIGHT_FACTOR.value, decode_nvfp4.WEIGHT_FACTOR.value),
    ),
    "mxfp4": Decoding(
        2, 2, (decode_mxfp4.BFLOAT16_PROGRAM.value, decode_mxfp4.FLOAT16_PROGRAM.value), 0,
        (2.0**-decode_fp8.MX_SHIFT, 2.0**-decode_mxfp4.MXFP4_SHIFT),
    ),
    "mxfp8": Decoding(
        4, 2,
        (decode_fp8.BFLOAT16_SCALED_PROGRAM.value, decode_fp8.FLOAT16_SCALED_PROGRAM.value), 0,
        (2.0**-decode_fp8.MX_SHIFT, 2.0**-decode_fp8.MXFP8_SHIFT),
    ),
    "fp8": _fp8(2),
    "fp8_channel": _fp8(3),
}  # fmt: skip


def _product(n: int, half: bool) -> str:
    """Code of the product of 64 rows with n tokens; weights in registers, tokens in memory."""
    kind = "f16" if half else "bf16"
    sums = n // 2
    numbers = ", ".join(f"%{i}" for i in range(sums))
    weights = ", ".join(f"%{sums + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    return f"""
__device__ __forceinline__ void product(float (&d)[{sums}], u32 a, u32 b, u32 c, u32 e,
                                        u64 tokens) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
    "{{{numbers}}}, {{{weights}}}, %{sums + 4}, 1, 1, 1, 0;"
    : {outputs}
    : "r"(a), "r"(b), "r"(c), "r"(e), "l"(tokens));
}}
"""


def _decoder(program: str, words: int, scaled: bool) -> str:
    """Code of decode(): a program of Triton's, whose pairs of halfwords are one register."""
    text, pairs = re.subn(
        r"mov\.b32 \{\$(\d+), \$\d+\}, m;", lambda m: f"mov.b32 %{int(m[1]) // 2}, m;", program
    )
    assert pairs == 8, program
    # Multiplications: the pipe of shifts is the busiest one.
    text = re.sub(
        r"shl\.b32 (\w+), (\w+), ([246]);",
        lambda m: f"mul.lo.u32 {m[1]}, {m[2]}, %{8 + words + scaled + int(m[3]) // 2 - 1};",
        text,
    )
    text = re.sub(r"\$(\d+)", lambda m: f"%{int(m[1]) - 8}", text)
    lines = "\n".join(f'      "{line}\\n"' for line in text.splitlines())
    outputs = ", ".join(f'"=r"(out[{i}])' for i in range(8))
    inputs = ", ".join([*(f'"r"(words[{i}])' for i in range(words)), *(['"r"(scale)'] * scaled)])
    inputs += ', "r"(a.times_4), "r"(a.times_16), "r"(a.times_64)'
    return f"""
__device__ __forceinline__ void decode(const Arguments& a, u32* out, const u32* words, u32 scale) {{
  asm({lines.strip()}
      : {outputs}
      : {inputs});
}}
"""


@functools.lru_cache(maxsize=256)
def source_of(
    tile: HopperTile, *, gate_up: bool, gated: bool, activation: str, biased: bool, half: bool,
    format: str,
) -> str:  # fmt: skip
    """Return the source of one GEMM.

    Args:
        gate_up: the first GEMM, with the activation; else the second one.
        gated: whether the layer has a gate. activation: text of an `fp4moe.Activation`.
        half: whether tokens are float16. format: of the weights.
    """
    decoding = FORMATS[format]
    gated = gated and gate_up
    # What a block starts with is shared out anew: a hang, if more is asked for.
    loader = 32 if tile.groups > 2 else 56
    at_start = 65536 // tile.threads // 8 * 8
    product = (at_start * (tile.groups + 1) - loader) // tile.groups // 8 * 8
    defined = {
        "GATE_UP": int(gate_up),
        "GATED": int(gated),
        "GROUPS": tile.groups,
        "SLOTS": tile.slots,
        "STAGES": tile.stages,
        "WORDS": decoding.words,
        "SCALE_BYTES": decoding.scale_bytes,
        "ROW_FACTOR": decoding.row_factor,
        "WEIGHT_FACTOR": f"{decoding.factors[half]!r}f",
        "LOADER_REGISTERS": loader,
        "PRODUCT_REGISTERS": min(product, 232),
        "BIASED": int(biased),
    }
    chosen = get_activation(activation)
    defined["ACTIVATION"] = chosen.name.upper() if gate_up else "IDENTITY"
    for name in ("alpha", "beta", "limit"):
        defined[name.upper()] = f"{float(getattr(chosen, name))!r}f"
    head = "\n".join(f"#define {name} {value}" for name, value in defined.items())
    decoder = _decoder(decoding.programs[half], decoding.words, decoding.scale_bytes > 0)
    common, load, activation, gemm = (
        (HERE / f"{name}.cu").read_text() for name in ("common", "load", "activation", "gemm")
    )
    return "\n".join([head, common, load, activation, decoder, _product(tile.slots, half), gemm])
