"""Gradients of kernel `triton` against those of the definition, in the interpreter and on a GPU.

test_triton.py starts the interpreter.
"""

from __future__ import annotations

import re

import pytest
import torch
from triton_layers import MODES, compile_for, compiled, interpreted, layer, relative

from fp4moe.activations import ACTIVATIONS
from fp4moe.formats import FORMATS
from fp4moe.kernels.triton.kernel import TRITON
from fp4moe.kernels.triton.tiles import Tile
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.reference_gradients import reference_gradients

# Rounded to bfloat16: hidden and the gradient (exact here, or for the other dtypes once), gate and
# up's gradients, a slot's, the sum; with fp8_channel what its scale multiplied. The interpreter
# cuts, 2^-8 each; a GPU rounds, half of that.
CUT = 6 * 2.0**-8
FORMS = [
    *((name, True, False) for name in ACTIVATIONS),
    ("silu(alpha=1.702)", False, True),
    ("relu2", False, True),
    ("silu(alpha=1.702,beta=1,limit=0.5)", True, True),
    ("gelu_tanh(limit=0.4)", True, False),
    ("silu_step(limit=0.2)", True, True),
    ("silu_softcap(alpha=0.6,beta=0.5)", True, True),
]
TILES = (Tile(16, 64, 2, 4, 3), Tile(32, 64, 1, 4, 2), Tile(64, 64, 2, 4, 3))


def compare(weights, dtype, mode="sorted", tile=TILES[0], tokens=5, top_k=2, device="cpu"):
    """Ids inside and outside the window, one twice in a row."""
    from fp4moe.kernels.triton.backward import gradients_with

    hidden = (torch.randn(tokens, weights.hidden_size, device=device) / 16).to(dtype)
    gradient = torch.randn(tokens, weights.hidden_size, device=device).to(dtype)
    ids = torch.randint(-1, weights.num_experts + 1, (tokens, top_k), device=device)
    ids[0] = weights.expert_offset
    routing = torch.rand(tokens, top_k, device=device).to(dtype)
    call = TRITON.prepare(weights, hidden_alignment=256).call(hidden, ids, routing)
    got = gradients_with(MODES[mode], tile, call, gradient)
    args = gradient.float(), hidden.float(), weights, ids, routing.float()
    # Routing weights' take no part in the last three.
    for actual, expected, limit in zip(
        got, reference_gradients(*args), (CUT, CUT / 2), strict=True
    ):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert relative(actual, expected) < limit
    again = gradients_with(MODES[mode], tile, call, gradient)
    assert all(map(torch.equal, got, again))
    outside = (ids < weights.expert_offset) | (ids >= weights.expert_offset + weights.local_experts)
    assert not got[1][outside].any() and not got[0][outside.all(1)].any()


@interpreted
@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
def test_every_activation(activation, gated, biased, poisoned_empty):
    window = {"num_experts": 4, "expert_offset": 1}
    weights = layer(2, 80, 48, activation, gated, biased=biased, **window)
    number = FORMS.index((activation, gated, biased))
    dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
    compare(weights, dtype, list(MODES)[number // 3 % 3])


@interpreted
@pytest.mark.parametrize(
    ("format", "gated"), [*((format, True) for format in FORMATS), ("fp8_block", False)]
)
def test_every_format(format, gated, poisoned_empty):
    # Blocks of 128 rows: 192 of gate end inside one.
    weights = layer(2, 128, 192, "gelu_tanh", gated, format=format)
    compare(weights, torch.bfloat16)


@interpreted
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_tile(tile, tokens, poisoned_empty):
    weights = layer(1, 64, 128, "silu", True, biased=True)
    compare(weights, torch.bfloat16, tile=tile, tokens=tokens)


@interpreted
def test_through_the_operator():
    weights = layer(3, 64, 64, "silu", True)
    hidden = (torch.randn(4, 64) / 16).bfloat16().requires_grad_()
    ids, routing = torch.randint(0, 3, (4, 2)), torch.rand(4, 2, requires_grad=True)
    arguments = nvfp4_moe_arguments(TRITON.prepare(weights, hidden_alignment=256), "triton")
    out = torch.ops.fp4moe.nvfp4_moe.default(hidden, ids, routing, *arguments)
    gradient = torch.randn(4, 64).bfloat16()
    got = torch.autograd.grad(out, (hidden, routing), gradient)
    args = gradient.float(), hidden.detach().float(), weights, ids, routing.detach()
    for actual, expected in zip(got, reference_gradients(*args), strict=True):
        assert relative(actual, expected) < CUT


def variants():
    """(kernel, constants, pointers): formats, biases, gates and tiles by turns."""
    from fp4moe.kernels.triton import backward, gemm
    from fp4moe.kernels.triton.activation import activation_constants

    for number, format in enumerate(FORMATS):
        tile, gated = TILES[number % 3], number % 2 == 0
        form = {"SLOTS": tile.slots, "ROWS": tile.rows, "SLABS": tile.slabs, "STAGES": tile.stages}
        form |= {"WHOLE": number % 2 == 1, "ASSEMBLY": True, "FORMAT": format}
        yield backward.hidden_gradient_kernel, form | {"PARTS": 1 + gated}, {}
        activation = FORMS[-1 - number if gated else -5][0]
        form |= {"GATED": gated, **activation_constants(activation)}
        form |= {"bias": None} if number % 3 else {}
        yield backward.inner_gradient_kernel, form, {"grad": "*bf16", "sums": "*fp32"}
    sums = {"ACTIVATION": "sums", "ALPHA": 1.0, "BETA": 0.0, "LIMIT": 0.0, "MORE": 0, "MODE": 1}
    form |= {**sums, "FORMAT": "nvfp4", "GATED": True, "FP16": False, "bias": None}
    yield gemm.gate_up_kernel, form, {"out": "*fp32"}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_variant_compiles(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function, constants, pointers in variants():
        constants = {**constants, "WAIT": capability == 90}
        pointers |= {"to_sums": "*bf16", "to_weights": "*fp32"}
        kernel = compile_for(capability, function, constants, 4, {"pointers": pointers})
        assert kernel.asm["cubin"]
        assert not re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", kernel.asm["ptx"])
        limit = (99 if capability == 120 else 163) * 1024
        assert kernel.metadata.shared <= limit, (function, constants, kernel.metadata.shared)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 33, 300, 2100])
def test_on_the_gpu(tokens, format, poisoned_empty):
    options = {"format": format, "num_experts": 16, "expert_offset": 3, "biased": True}
    weights = layer(9, 336, 208, "silu", True, device="cuda", **options)
    tile = TILES[0 if tokens < 300 else 2]
    for mode in MODES if tokens == 33 else ("sorted",):
        compare(weights, torch.bfloat16, mode, tile, tokens, 4, device="cuda")
