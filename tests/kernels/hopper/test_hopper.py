"""Kernel `hopper` without a GPU: tiles, structure, machine code of what would run."""

from __future__ import annotations

import ctypes
import dataclasses
import math

import pytest
import torch
from triton_layers import compiled, layer

from fp4moe.errors import UnsupportedError
from fp4moe.kernels import measured
from fp4moe.kernels.hopper import kernel as hopper
from fp4moe.kernels.hopper import tiles
from fp4moe.kernels.hopper.kernel import HOPPER
from fp4moe.kernels.hopper.tiles import HopperTile, choose_tile, shared_bytes
from fp4moe.kernels.select import choose_kernel
from fp4moe.kernels.triton.kernel import TRITON
from fp4moe.layer import Layer

GEMMA = Layer("gelu_tanh", True, 2816, 704, 128, 8)
NANO = Layer("relu2", False, 2688, 1856, 128, 6)
GPT_OSS = "silu(alpha=1.702,beta=1,limit=7)"
# What the layers of these two models ask for at 1024 and at 4096 tokens, and the other formats,
# activations and dtypes once each: tile, gate_up, gated, activation, biased, float16, format.
SOURCES = [
    (HopperTile(80, 3, 6), True, True, "gelu_tanh", False, False, "nvfp4"),
    (HopperTile(80, 3, 6), False, True, "gelu_tanh", False, False, "nvfp4"),
    (HopperTile(144, 2, 6), True, True, "gelu_tanh", False, False, "nvfp4"),
    (HopperTile(160, 2, 4), False, False, "relu2", False, False, "nvfp4"),
    (HopperTile(152, 2, 3), True, False, "gelu", True, False, "fp8"),
    (HopperTile(72, 3, 4), False, True, "silu", True, False, "fp8_channel"),
    (HopperTile(64, 3, 4), True, True, GPT_OSS, True, True, "mxfp4"),
    (HopperTile(40, 3, 5), True, True, "silu_softcap(alpha=2,beta=3)", False, True, "mxfp8"),
]


def expected_tiles(slots: int, experts: int, size: int) -> float:
    """Tiles of an expert on average, from the binomial distribution itself."""
    log = [
        math.lgamma(slots + 1) - math.lgamma(n + 1) - math.lgamma(slots - n + 1)
        + n * math.log(1 / experts) + (slots - n) * math.log1p(-1 / experts)
        for n in range(slots + 1)
    ]  # fmt: skip
    return sum(math.exp(p) * -(-n // size) for n, p in enumerate(log))


@pytest.mark.parametrize("slots", [24 * 128, 64 * 128, 256 * 128])
@pytest.mark.parametrize("size", [16, 80, 144])
def test_the_tiles_that_an_expert_needs(slots, size):
    # A normal distribution instead of the binomial one, and the sum's end: below 2 %.
    cost = tiles._cost(slots / 128, size) / (size + tiles.TILE_COST)
    assert cost == pytest.approx(expected_tiles(slots, 128, size), rel=0.02)


@pytest.mark.parametrize("words, scale_bytes", [(2, 4), (2, 2), (4, 2), (4, 0)])
def test_a_tile_fits_at_every_density(words, scale_bytes):
    for density in (24.0, 31.7, 48.0, 64.0, 100.0, 192.0, 256.0, 1024.0, 99999.0):
        for gate_up, gated in ((True, True), (True, False), (False, True)):
            tile = choose_tile(density, words, scale_bytes, gate_up, gated)
            assert tile.slots % 8 == 0 and tile.groups in (2, 3) and 2 <= tile.stages <= 8
            # What a block of Hopper may have.
            assert shared_bytes(tile, words, scale_bytes, gate_up, gated) <= 232448
            assert tile.slots == choose_tile(density, 2, 4, True, True).slots  # sorted once


@pytest.mark.parametrize(
    "tokens, hidden, dtype, there",
    [
        (1024, 2816, torch.bfloat16, True),
        (383, 2816, torch.bfloat16, False),  # 23.9 slots an expert
        (384, 2816, torch.bfloat16, True),
        (1024, 2820, torch.bfloat16, False),  # rows of no whole 16 bytes
        (1024, 2816, torch.float32, True),
    ],
)
def test_which_calls_it_takes(tokens, hidden, dtype, there):
    pytest.importorskip("triton")
    call = TRITON.prepare(layer(2, 64, 64, "silu", True), hidden_alignment=256).call(
        torch.empty(tokens, hidden, dtype=dtype),
        torch.empty(tokens, 8, dtype=torch.int64),
        torch.empty(tokens, 8),
    )
    call = call._replace(layer=dataclasses.replace(GEMMA, hidden_size=hidden))
    assert (hopper.tiles_for(call) is not None) is there
    shifted = torch.empty(tokens * hidden + 1, dtype=dtype)[1:].view(tokens, hidden)
    assert hopper.tiles_for(call._replace(hidden=shifted)) is None or dtype == torch.float32


def test_reasons(monkeypatch):
    pytest.importorskip("triton")
    reasons = HOPPER.reasons_not_to_run(GEMMA, (8, 9), installed=True)
    assert reasons == ["needs compute capability 9.0, got 8.9"]
    block = dataclasses.replace(GEMMA, format="fp8_block")
    assert "a scale each, take kernel triton" in HOPPER.reasons_not_to_run(block, (9, 0))[0]
    monkeypatch.setattr("fp4moe.kernels.hopper.compile.nvrtc", lambda: None)
    reasons = ["needs NVRTC, which torch for CUDA brings; it was not found"]
    assert HOPPER.reasons_not_to_run(GEMMA, (9, 0)) == reasons
    assert choose_kernel("auto", GEMMA, (9, 0))[0] == "triton"


@pytest.mark.parametrize("given", [GEMMA, NANO], ids=["Gemma4", "Nano"])
def test_auto_takes_it_on_hopper(given, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("fp4moe.kernels.hopper.compile.nvrtc", lambda: object())
    monkeypatch.setenv("FP4MOE_MEASURED", "/nowhere/measured.json")
    measured.forget()
    assert choose_kernel("auto", given, (9, 0))[0] == "hopper"
    assert choose_kernel("auto", given, (8, 0))[0] != "hopper"


def test_a_cpu_is_refused(monkeypatch):
    pytest.importorskip("triton")
    prepared = HOPPER.prepare(layer(1, 64, 64, "silu", True), hidden_alignment=256)
    call = prepared.call(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    monkeypatch.setattr("fp4moe.kernels.triton.kernel.interpreted", lambda: True)
    with pytest.raises(UnsupportedError, match=r"^moe: kernel hopper cannot run.*a CPU"):
        HOPPER(call)


def library():
    """NVRTC as the tests' environment has it, of CUDA 13."""
    from fp4moe.kernels.hopper.compile import nvrtc

    found = nvrtc("13.0")
    if found is None:
        pytest.skip("needs the package nvidia-cuda-nvrtc")
    return found


def source(tile, gate_up, gated, activation, biased, half, format):
    from fp4moe.kernels.hopper.source import source_of

    return source_of(
        tile, gate_up=gate_up, gated=gated, activation=activation, biased=biased, half=half,
        format=format,
    )  # fmt: skip


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("case", SOURCES, ids=lambda case: f"{case[0]} {case[-1]}")
def test_the_machine_code(case):
    from hopper_sass import disassemble, main_loop, overwritten_in_flight

    from fp4moe.kernels.hopper.compile import compile_source
    from fp4moe.kernels.hopper.gemm import Arguments
    from fp4moe.kernels.hopper.source import FORMATS

    tile, gate_up, gated, *_, format = case
    decoding = FORMATS[format]
    bytes_ = shared_bytes(tile, decoding.words, decoding.scale_bytes, gate_up, gated)
    text = source(*case)
    # Both sides of a launch agree on the arguments and on shared memory.
    text += f"static_assert(sizeof(Arguments) == {ctypes.sizeof(Arguments)});\n"
    text += f"static_assert(BARRIERS_AT + 16 * STAGES == {bytes_});\n"
    loop = main_loop(disassemble(compile_source(text, library())))
    names = [instruction.name for instruction in loop]
    products = [i for i in loop if i.name.startswith("HGMMA")]
    # Two products of 64 rows and 64 columns, four steps each. Where ptxas serialises products, each
    # one ends a group of its own.
    assert len(products) == 8
    assert sum("gsb0" in i.operands for i in products) == 2
    assert all(i.name.startswith(f"HGMMA.64x{tile.slots}x16.F32") for i in products)
    assert not [n for n in names if n.startswith(("LDL", "STL"))]  # nothing was spilled
    assert overwritten_in_flight(loop, tile.slots) == []


@compiled
def test_the_check_of_registers_in_flight_finds_faults():
    from hopper_sass import Instruction, overwritten_in_flight

    product = Instruction("HGMMA.64x16x16.F32.BF16", ["R24", "R40", "gdesc[UR4]", "R24", "gsb0"])
    wait = Instruction("WARPGROUP.DEPBAR.LE", ["gsb0", "0x0"])
    decode = Instruction("HMUL2.BF16_V2", ["R43", "R9", "R10.H0_H0"])
    assert overwritten_in_flight([product, wait, decode], 16) == []
    assert overwritten_in_flight([product, decode, wait], 16)
    later = Instruction("WARPGROUP.DEPBAR.LE", ["gsb0", "0x1"])
    assert overwritten_in_flight([product, later, decode], 16)
    assert overwritten_in_flight([product, wait, Instruction("LDS.64", ["R38", "[R2]"])], 16) == []
    assert overwritten_in_flight([product, Instruction("LDS.128", ["R38", "[R2]"]), wait], 16)


@compiled
def test_source_that_does_not_compile_is_refused():
    from fp4moe.kernels.hopper.compile import compile_source

    with pytest.raises(UnsupportedError, match=r"cannot be compiled.*unknown_name"):
        compile_source("__global__ void gemm() { unknown_name; }", library())
