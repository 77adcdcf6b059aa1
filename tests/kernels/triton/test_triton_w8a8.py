"""Kernel `triton_w8a8`: results against the definition, rounding, choice, compilation.

The interpreter's cases are started by test_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from triton_layers import (
    CUT,
    HAS_TRITON,
    INTERPRETED,
    ON_THE_GPU,
    compile_for,
    compiled,
    interpreted,
    layer,
    relative,
)

from fp4moe.activations import get_activation
from fp4moe.formats import FORMATS
from fp4moe.formats.scaled import to_e4m3
from fp4moe.kernels.measured import SHIPPED, choose_tiles, read
from fp4moe.kernels.triton.tiles import Config, Tile, fitted_w8a8
from fp4moe.kernels.triton.w8a8 import TRITON_W8A8, run_with
from fp4moe.layer import Layer
from fp4moe.reference import reference_w4a4
from fp4moe.testing import random_codes

NAMES = ("fp8", "fp8_channel", "fp8_block")
GPT_OSS = "silu(alpha=1.702,beta=1,limit=0.5)"
SMALL = {
    "sorted": Config("sorted", Tile(16, 64, 2, 4, 3), Tile(32, 64, 2, 4, 3)),
    "more": Config("sorted", Tile(16, 32, 2, 4, 3, 16), Tile(32, 128, 2, 4, 3, 16)),
    "slot": Config("slot", Tile(16, 64, 2, 4, 3), Tile(16, 64, 2, 4, 3)),
}
# Rounded to bfloat16: each slot's output here and in the definition, and the sum. Hopper's sums of
# 128 products of e4m3 are right to about 2^-11; one in a hundred intermediate values, whose codes
# lie 2^-3 to 2^-4 apart, therefore falls on the other side: sqrt(0.01) * 2^-4 of the output.
ROUNDED = 3 * 2.0**-9 + 0.1 * 2.0**-4

if HAS_TRITON and not INTERPRETED:
    from fp4moe.kernels.triton import activation, gemm_w8a8, round_e4m3


def uneven(weights):
    """The same layer with scales that differ from block to block, and calibrated ranges."""
    for stored in (weights.gate_up, weights.down):
        scale = stored.block_scale
        scale *= 0.5 + torch.rand_like(scale)
    if weights.number_format.activation_range:
        weights.hidden_scale.fill_(1 / 800)
        weights.intermediate_scale.uniform_(0.001, 0.004)
    return weights


def cut(x):
    """To bfloat16 as the interpreter does, which drops bits instead of rounding."""
    return (x.float().contiguous().view(torch.int32) & -65536).view(torch.float32)


def second_definition(hidden, weights, ids, routing_weights, to_bfloat16):
    """The layer written slot by slot, with scales taken from the tensors themselves."""
    parts = weights.dequantize()
    combine = get_activation(weights.activation).combine
    out = torch.zeros(hidden.shape)

    def rounded(x, static):
        if weights.format == "fp8":
            return to_e4m3(x * (1 / static)).float() * static
        if weights.format == "fp8_channel":
            scale = (x.abs().amax() / 448).clamp(min=1 / (448 * 512))
            return to_e4m3(x * (1 / scale)).float() * scale
        pieces = []
        for piece in x.split(128):
            scale = piece.abs().amax().clamp(min=1e-10) / 448
            pieces.append(to_e4m3(piece / scale).float() * scale)
        return torch.cat(pieces)

    for token, slots in enumerate(ids.tolist()):
        x = rounded(to_bfloat16(hidden[token]), weights.hidden_scale)
        for k, expert in enumerate(slots):
            e = expert - weights.expert_offset
            if not 0 <= e < weights.local_experts:
                continue
            one = {name: part[e] for name, part in parts.items()}
            up = one["up"] @ x + one.get("up_bias", 0)
            gate = one["gate"] @ x + one.get("gate_bias", 0) if "gate" in one else None
            y = rounded(to_bfloat16(combine(up, gate)), weights.intermediate_scale[e])
            out[token] += routing_weights[token, k] * (one["down"] @ y + one.get("down_bias", 0))
    return out


def call_of(weights, dtype, tokens, top_k, device="cpu"):
    hidden = (torch.randn(tokens, weights.hidden_size, device=device) / 16).to(dtype)
    ids = torch.randint(-1, weights.num_experts + 1, (tokens, top_k), device=device)
    ids[0] = weights.expert_offset
    routing_weights = torch.rand(tokens, top_k, device=device)
    prepared = TRITON_W8A8.prepare(weights, hidden_alignment=256)
    return prepared.call(hidden, ids, routing_weights), (hidden, weights, ids, routing_weights)


@interpreted
@pytest.mark.parametrize(
    ("mode", "activation", "gated", "dtype"),
    [
        ("sorted", "gelu_tanh", True, torch.bfloat16),
        ("slot", "relu2", False, torch.float16),
        ("slot", "silu", True, torch.float32),
    ],
)
@pytest.mark.parametrize("format", NAMES)
def test_small_layers(format, mode, activation, gated, dtype, poisoned_empty):
    # Gate and up end within a block of 128 rows, both sizes within a step, H within 16.
    window = {"num_experts": 4, "expert_offset": 1}
    weights = uneven(layer(2, 90, 160, activation, gated, format=format, **window))
    call, args = call_of(weights, dtype, 2, 2)
    got = run_with(SMALL[mode], call)
    assert got.dtype == dtype
    # Two bits dropped after what the second definition does: the slot's output and the sum.
    assert relative(got, second_definition(*args, cut)) < CUT
    assert torch.equal(got, run_with(SMALL[mode], call))


@interpreted
@pytest.mark.parametrize("format", NAMES)
def test_more_slots_biases_and_parameters(format, poisoned_empty):
    # One expert, and 2 of 3 ids are not its: 16 to 32 of 70 slots with all but certainty.
    weights = uneven(layer(1, 64, 144, GPT_OSS, True, biased=True, format=format))
    call, args = call_of(weights, torch.bfloat16, 35, 2)
    got = run_with(SMALL["more"], call)
    assert relative(got, second_definition(*args, cut)) < CUT


def check_rounding(device):
    from fp4moe.kernels.triton.round_e4m3 import round_rows

    x = torch.randn(5, 272, device=device) * torch.logspace(-6, 3, 5, device=device)[:, None]
    x[1, :128] = 0
    x = x.bfloat16()
    scale = torch.tensor([0.01], device=device)
    for name in NAMES:
        codes, scales = round_rows(x, 288, scale, name, device == "cuda")
        scales = scales[:, None] if name == "fp8_channel" else scales
        if name == "fp8_block":
            scales = scales.repeat_interleave(128, 1)[:, :288]
        assert not codes[:, 272:].float().any()
        got = (codes.float() * scales)[:, :272]
        assert torch.equal(got, FORMATS[name].round_activation(x.float(), scale)), name
    return round_rows, x, scale


@interpreted
def test_rounding_is_the_formats():
    check_rounding("cpu")


@pytest.mark.gpu
def test_rounding_on_the_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    round_rows, x, scale = check_rounding("cuda")
    x[2, 7] = float("nan")
    x[3, 5] = float("inf")
    for name in NAMES:
        codes = round_rows(x, 272, scale, name)[0].float()
        assert torch.isnan(codes[2, 7]) and not torch.isnan(codes[:2]).any()
    codes = round_rows(x, 272, scale, "fp8")[0].float()
    assert codes[3, 5] == 448


@pytest.mark.parametrize("format", NAMES)
def test_two_definitions(format):
    weights = uneven(layer(3, 90, 272, "silu", True, format=format, biased=True))
    _, args = call_of(weights, torch.bfloat16, 4, 2)
    keywords = {"intermediate_dtype": torch.bfloat16, "product_dtype": torch.float32}
    expected = second_definition(*args, lambda x: x.bfloat16().float())
    got = reference_w4a4(args[0].float(), *args[1:], **keywords)
    # The definition rounds a slot's output to bfloat16.
    assert relative(got, expected) < 2.0**-9


@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "gated", "tokens", "dtype"), ON_THE_GPU)
@pytest.mark.parametrize("format", NAMES)
def test_on_the_gpu(format, activation, gated, tokens, dtype, poisoned_empty):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    window = {"num_experts": 16, "expert_offset": 3, "device": "cuda"}
    weights = uneven(layer(9, 352, 224, activation, gated, format=format, **window))
    call, args = call_of(weights, dtype, tokens, 5, "cuda")
    keywords = {"intermediate_dtype": torch.bfloat16, "product_dtype": torch.float32}
    expected = reference_w4a4(args[0].float(), *args[1:], **keywords)
    for config in (
        *SMALL.values(),
        choose_tiles((9, 0), gated, 352, 224, 9, tokens * 5, format, w8a8=True),
    ):
        if config.mode == "slot" and tokens > 48:
            continue
        got = run_with(config, call)
        assert relative(got, expected) < ROUNDED
        assert torch.equal(got, run_with(config, call))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 4096])
@pytest.mark.parametrize("format", NAMES)
def test_equal_bits_at_full_size(format, tokens):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    shape = Layer("gelu_tanh", True, 2816, 704, 128, 8, format=format)
    prepared = TRITON_W8A8.prepare(random_codes(shape, "cuda"), hidden_alignment=256)
    hidden = torch.randn(tokens, 2816, device="cuda").bfloat16()
    ids = torch.rand(tokens, 128, device="cuda").topk(8).indices
    call = prepared.call(hidden, ids, torch.rand(tokens, 8, device="cuda"))
    first = TRITON_W8A8(call)
    assert all(torch.equal(TRITON_W8A8(call), first) for _ in range(10))


def size(tile):
    return tile.rows * (tile.slots + tile.more)


@compiled
@pytest.mark.parametrize(
    "capability",
    [90, *(pytest.param(t, marks=pytest.mark.slow) for t in (89, 100, 120))],
)
def test_every_tile_compiles(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {(m.gated, c) for m in read(SHIPPED) for c in m.w8a8_tiles.values()}
    # A part of them, the largest among it: each takes seconds.
    found = sorted(found, key=lambda pair: (size(pair[1].gate_up), str(pair)))
    found = found[:: -4 if capability == 90 else -8]
    pointers = {"codes": "*fp8e4nv", "weights": "*fp8e4nv", "scales": "*fp32"}
    pointers |= {"token_scales": "*fp32", "intermediate_scale": "*fp32", "one": "fp32"}
    for number, (gated, config) in enumerate(found):
        # Tiles of 256 rows would hold two blocks of scales.
        large = config.down.rows > 128
        format = NAMES[number % (2 if large else 3)]
        config = config if capability in (90, 100) else fitted_w8a8(config, gated)
        for function in (gemm_w8a8.gate_up_w8a8_kernel, gemm_w8a8.down_w8a8_kernel):
            first = function is gemm_w8a8.gate_up_w8a8_kernel
            own = config.gate_up if first else config.down
            constants = {"SLOTS": own.slots, "MORE": own.more, "ROWS": own.rows}
            constants |= {"SLABS": own.slabs, "STAGES": own.stages, "WHOLE": number % 2 == 0}
            constants |= {"MODE": int(config.mode == "sorted"), "ASSEMBLY": True, "FORMAT": format}
            further = {"pointers": dict(pointers)}
            if first:
                constants |= {"GATED": gated, **activation.activation_constants("silu")}
                further["pointers"]["out"] = "*fp8e4nv" if format == "fp8" else "*bf16"
            if number % 2:
                constants["bias"] = None
            kernel = compile_for(capability, function, constants, own.warps, further)
            assert kernel.asm["cubin"], (function.__name__, str(config))
            instruction = {89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
            assert f"{instruction[capability]}" in kernel.asm["ptx"]
            if not first:
                # What the tensor core has summed is multiplied and added outside.
                values = own.rows * own.slots // (32 * own.warps)
                sums = [kernel.asm["ptx"].count(f"fma.rn.{kind}") for kind in ("f32", "f32x2")]
                assert sum(sums) >= values
            # 89 and 120 have 99 KiB of shared memory a block.
            limit = (99 if capability in (89, 120) else 226) * 1024
            assert kernel.metadata.shared <= limit, (str(config), kernel.metadata.shared)
    for number, format in enumerate(NAMES):
        types = {"x": "*bf16", "codes": "*fp8e4nv", "static_scale": "*fp32", "scales": "*fp32"}
        constants = {"BLOCKS": 8 << number, "FORMAT": format, "ASSEMBLY": True}
        compile_for(capability, round_e4m3.round_kernel, constants, 4, {"pointers": types})
