"""Kernel `triton` with the FP8 and MX formats: layout, decoding, results, compilation.

The interpreter's cases are started by test_triton.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from triton_layers import (
    CUT,
    HAS_TRITON,
    INTERPRETED,
    MODES,
    ON_THE_GPU,
    compare,
    compile_for,
    compiled,
    interpreted,
    layer,
)
from triton_ptx import run_ptx

from fp4moe.formats import FORMATS, StoredMatrix
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.kernel import TRITON
from fp4moe.kernels.triton.layout import to_slabs as nvfp4_to_slabs
from fp4moe.kernels.triton.layout_fp8 import (
    fp8_from_slabs,
    fp8_to_slabs,
    powers_from_slabs,
    powers_to_slabs,
)
from fp4moe.kernels.triton.tiles import Config, Tile, fitted, parse_config
from fp4moe.layer import Layer
from fp4moe.testing import random_codes

NAMES = [name for name in FORMATS if name != "nvfp4"]
# Three roundings to bfloat16 at most, each below 2^-9.
ROUNDED = 3 * 2.0**-9
GPT_OSS = "silu(alpha=1.702,beta=1,limit=0.5)"

if INTERPRETED and HAS_TRITON:
    # Here, since a kernel sees the names of its module alone.
    import triton
    import triton.language as tl

    from fp4moe.kernels.triton.weights import load_weights

    @triton.jit
    def decode(
        words, scales, out, total_rows, slabs, SLABS: tl.constexpr, FP16: tl.constexpr,
        FORMAT: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * 64 + tl.arange(0, 64)
        slab = tl.program_id(1) * SLABS
        expert = tl.program_id(2)
        w = load_weights(
            words, scales, expert, row, total_rows, slab, slabs, SLABS, 64, False, FP16, False,
            FORMAT,
        )  # fmt: skip
        column = slab * 64 + tl.arange(0, SLABS * 64)
        at = (expert * total_rows + row)[:, None] * (slabs * 64) + column[None, :]
        tl.store(out + at, w, mask=(column < slabs * 64)[None, :])


if HAS_TRITON and not INTERPRETED:
    from fp4moe.kernels.triton import activation, gemm


def uneven(weights):
    """The same layer with scales that differ from row to row, block to block, gate to up."""
    for stored in (weights.gate_up, weights.down):
        scale = stored.block_scale
        if scale.dtype == torch.float32:
            scale *= 0.5 + torch.rand_like(scale)
    return weights


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 128, 192)])
def test_the_layout_of_codes(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    slabs = fp8_to_slabs(codes)
    assert torch.equal(fp8_from_slabs(slabs), codes)
    words = slabs.view(torch.int32).flatten().tolist()
    # A second way: bit by bit, as the module's text says.
    _, rows, columns = shape
    for _ in range(50):
        e, r, c = (int(torch.randint(0, n, ())) for n in shape)
        word, half, lane, place = c % 64 // 16, c % 16 // 8, c % 8 // 2, c % 2
        slab = (e * (rows // 64) + r // 64) * (columns // 64) + c // 64
        found = words[(slab * 64 + r % 64) * 16 + lane * 4 + word] >> (16 * place)
        places = ((4, 5, 6, 7, 8, 9, 10, 15), (0, 1, 2, 3, 12, 13, 14, 11))[half]
        assert sum((found >> p & 1) << bit for bit, p in enumerate(places)) == codes[e, r, c]


def test_the_layout_of_powers():
    scale = torch.randint(0, 256, (2, 128, 6), dtype=torch.uint8)
    slabs = powers_to_slabs(scale)
    assert torch.equal(powers_from_slabs(slabs), scale)
    # [expert, row tile, slab, row, byte]
    assert slabs.flatten()[(((1 * 2 + 1) * 3 + 2) * 64 + 5) * 2 + 1] == scale[1, 64 + 5, 5]


def codes_and_scales(format, fp16):
    """Every code but NaN with every scale that the decoder is exact with, [2, 128, 64 x N]."""
    if fp16:
        first, last = {"mxfp8": (105, 127), "mxfp4": (94, 130)}[format]
    else:
        first, last = {"mxfp8": (35, 166), "mxfp4": (27, 160)}[format]
        if INTERPRETED:
            first = 42  # its cast to subnormal numbers of bfloat16 is wrong
    columns = -(-(last - first + 1) // 2 // 2) * 64
    scale = torch.arange(2 * 128 * columns // 32) % (last - first + 1) + first
    scale = scale.to(torch.uint8).reshape(2, 128, -1)
    codes = torch.randint(0, 256, (2, 128, columns), dtype=torch.uint8)
    if format == "mxfp4":
        codes = codes[..., ::2].contiguous()
    else:
        codes[(codes & 127) == 127] = 0
    return codes, scale


def values_of(format, codes, scale):
    if format.startswith("fp8"):
        return codes.view(torch.float8_e4m3fn).float()
    stored = StoredMatrix(codes.view(FORMATS[format].codes.dtype), scale, torch.empty(0))
    return FORMATS[format].dequantize(stored, torch.float32)


def slabs_of(format, codes, scale):
    to_slabs = nvfp4_to_slabs if format == "mxfp4" else fp8_to_slabs
    words = to_slabs(codes).view(-1).view(torch.int32)
    return words, powers_to_slabs(scale).view(-1).view(torch.int32)


# Weights are multiplied by two to this power, in bfloat16 and in float16.
SHIFTS = {"fp8": (0, 0), "mxfp8": (-32, 7), "mxfp4": (-32, 10)}


@interpreted
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("format", SHIFTS)
def test_weights_are_exact(format, fp16):
    codes, scale = codes_and_scales("mxfp8" if format == "fp8" else format, fp16)
    expected = values_of(format, codes, scale)
    slabs = expected.shape[2] // 64
    out = torch.empty(expected.shape, dtype=torch.float16 if fp16 else torch.bfloat16)
    words, scales = slabs_of(format, codes, scale)
    decode[(2, -(-slabs // 4), 2)](words, scales, out, 128, slabs, 4, fp16, format)
    assert torch.equal(out.double(), expected.double() * 2.0 ** SHIFTS[format][fp16])


@compiled
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("format", SHIFTS)
def test_the_ptx_is_exact(format, fp16):
    from fp4moe.kernels.triton import decode_fp8, decode_mxfp4

    codes, scale = codes_and_scales("mxfp8" if format == "fp8" else format, fp16)
    expected = values_of(format, codes, scale)
    words, scales = (t.long() & 0xFFFFFFFF for t in slabs_of(format, codes, scale))
    module = decode_mxfp4 if format == "mxfp4" else decode_fp8
    name = "FLOAT16" if fp16 else "BFLOAT16"
    name += "_SCALED_PROGRAM" if format == "mxfp8" else "_PROGRAM"
    # [expert, row tile, slab, row, lane, word], and two rows a word of scales.
    count = 2 if format == "mxfp4" else 4
    words = words.view(2, 2, -1, 64, 4, count)
    own = torch.stack((scales & 0xFFFF, scales >> 16), -1).view(2, 2, -1, 64, 1)
    # The other row's bytes stand above and must not matter.
    own = (own | 0xA5A50000).expand(words.shape[:-1])
    inputs = {f"${16 + i}": words[..., i] for i in range(count)} | {f"${16 + count}": own}
    program = getattr(module, name).value
    got = run_ptx(program, inputs, torch.float16 if fp16 else torch.bfloat16).double()
    # [expert, row tile, slab, row, lane, (block, half), place] to rows and columns.
    got = got.view(*words.shape[:-1], 8, 2).permute(0, 1, 3, 2, 5, 4, 6).reshape(expected.shape)
    assert torch.equal(got, expected.double() * 2.0 ** SHIFTS[format][fp16])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("format", NAMES)
def test_restore_undoes_prepare(format, gated):
    weights = uneven(layer(2, 160, 96, "silu", gated, format=format))
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    assert prepared.operands.down_packed.shape[:2] == (2, 192)
    back = TRITON.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


@interpreted
@pytest.mark.parametrize(
    ("mode", "activation", "gated", "dtype"),
    [("sorted", "gelu_tanh", True, torch.bfloat16), ("slot", "relu2", False, torch.float16)],
)
@pytest.mark.parametrize("format", NAMES)
def test_small_layers(format, mode, activation, gated, dtype, poisoned_empty):
    # Gate and up end within a block of 128 rows; both sizes end within a slab.
    window = {"num_experts": 4, "expert_offset": 1}
    weights = uneven(layer(2, 96, 160, activation, gated, format=format, **window))
    compare(fitted(MODES[mode], format, gated), weights, dtype, 2, 2, CUT)


@interpreted
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_more_slots_than_a_power_of_two(format, poisoned_empty):
    # One expert, and 2 of 3 ids are not its: 16 to 32 of 70 slots with all but certainty.
    weights = uneven(layer(1, 64, 64, "relu2", False, format=format))
    compare(fitted(MODES["more"], format, False), weights, torch.bfloat16, 35, 2, CUT)


@interpreted
@pytest.mark.parametrize("format", NAMES)
def test_biases_and_parameters(format, poisoned_empty):
    weights = layer(2, 64, 96, GPT_OSS, True, format=format, biased=True)
    compare(fitted(MODES["sorted"], format, True), weights, torch.float32, 3, 2, CUT)


@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "gated", "tokens", "dtype"), ON_THE_GPU)
@pytest.mark.parametrize("format", NAMES)
def test_on_the_gpu(format, activation, gated, tokens, dtype, poisoned_empty):
    window = {"num_experts": 16, "expert_offset": 3, "device": "cuda"}
    weights = uneven(layer(9, 352, 224, activation, gated, format=format, **window))
    config = choose_tiles((9, 0), gated, 384, 256, 9, tokens * 5, format)
    compare(config, weights, dtype, tokens, 5, ROUNDED, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", NAMES)
def test_biases_and_parameters_on_the_gpu(format, mode, poisoned_empty):
    weights = uneven(layer(7, 256, 192, GPT_OSS, True, "cuda", True, format=format))
    config = fitted(MODES[mode], format, True)
    compare(config, weights, torch.bfloat16, 37, 4, ROUNDED, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 1024])
@pytest.mark.parametrize("format", NAMES)
def test_equal_bits_at_full_size(format, tokens):
    shape = Layer("gelu_tanh", True, 2816, 704, 128, 8, format=format)
    prepared = TRITON.prepare(random_codes(shape, "cuda"), hidden_alignment=256)
    hidden = torch.randn(tokens, 2816, device="cuda").bfloat16()
    ids = torch.rand(tokens, 128, device="cuda").topk(8).indices
    call = prepared.call(hidden, ids, torch.rand(tokens, 8, device="cuda"))
    first = TRITON(call)
    assert all(torch.equal(TRITON(call), first) for _ in range(20))


@pytest.mark.parametrize("format", [*NAMES, "nvfp4"])
def test_shipped_tiles_fit(format):
    """Eight bits a code: no more shared memory; and wgmma still has its 64 rows."""
    for entry in read(SHIPPED):
        for config in entry.tiles.values():
            found = fitted(config, format, entry.gated)
            assert (found == config) if format == "nvfp4" else parse_config(str(found)) == found
            for tile, parts in ((found.gate_up, 1 + entry.gated), (found.down, 1)):
                codes = tile.slabs * parts * tile.rows * (32 if format.endswith("fp4") else 64)
                tokens = tile.slabs * (tile.slots + tile.more) * 128
                size = tile.stages * tokens + (tile.stages - 1) * codes
                assert size <= 99 * 1024 or format == "nvfp4"
                assert parts * tile.rows >= 64 and tile.warps in (4, 8)
                assert format != "fp8_block" or tile.slabs <= 2


@compiled
@pytest.mark.parametrize(
    "capability",
    [90, *(pytest.param(t, marks=pytest.mark.slow) for t in (80, 89, 100, 120))],
)
def test_every_format_compiles(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # What targets share is compiled with every format for two of them.
    names = NAMES if capability in (80, 90) else ["fp8_block", "mxfp8", "mxfp4"]
    for format in names:
        odd = names.index(format) % 2 == 1
        # For one target of each size of shared memory the largest tile of the table.
        large = capability in (89, 90)
        tile = Tile(128, 64, 1, 4, 5, 16) if large else Tile(64, 64, 1, 4, 3, 16 * odd)
        config = fitted(Config("sorted", tile, tile), format, not odd)
        pointers = {"scales": "*fp32"} if format.startswith("fp8") else {}
        for function in (gemm.gate_up_kernel, gemm.down_kernel):
            own = config.gate_up if function is gemm.gate_up_kernel else config.down
            constants = {"SLOTS": own.slots, "MORE": own.more, "ROWS": own.rows}
            constants |= {"SLABS": own.slabs, "STAGES": own.stages, "MODE": 1, "WHOLE": not odd}
            constants |= {"ASSEMBLY": True, "WAIT": capability == 90, "FORMAT": format}
            further = {"pointers": pointers}
            if function is gemm.gate_up_kernel:
                constants |= {"GATED": not odd, "FP16": odd}
                constants |= activation.activation_constants("gelu_tanh" if not odd else "relu2")
                further["hidden"] = "*fp16" if odd else "*bf16"
            if odd:
                constants["bias"] = None
            kernel = compile_for(capability, function, constants, own.warps, further)
            label = (function.__name__, format)
            assert kernel.asm["cubin"], label
            text = kernel.asm["ptx"]
            assert not re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", text), label
            assert kernel.metadata.shared <= 99 * 1024, (label, kernel.metadata.shared)
