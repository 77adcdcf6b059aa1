"""How weights of FP8, MXFP8 and MXFP4 lie in memory for TRT-LLM-Gen: as FlashInfer's own do.

Its helpers for rows run on a CPU in both versions; those that prepare whole FP8 layers, in 0.7.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flashinfer_formats_layers import (
    FORMS,
    GIVEN,
    LIMIT,
    TRTLLM,
    expected,
    float_matrices,
    from_logits,
    layer,
    weights_of,
)
from fused_layers import tokens

from fp4moe import FusedExperts
from fp4moe.formats import FORMATS
from fp4moe.kernels.flashinfer.block_scales import deinterleave_128x4
from fp4moe.kernels.flashinfer.library import library
from fp4moe.kernels.flashinfer.trtllm import ENTRIES
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

MX = [form for form in FORMS if form[0].startswith("mx")]
# FlashInfer's module of helpers for whole layers came with 0.7.
WHOLE = pytest.mark.skipif(
    not hasattr(pytest.importorskip("flashinfer.fused_moe"), "prepare"),
    reason="needs FlashInfer 0.7",
)


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


def theirs(name, matrix, gated, block=None):
    """Return FlashInfer's row order for a matrix [N, C] of codes, or of scales of `block`."""
    from flashinfer.fused_moe import core

    if name == "down":
        return core.get_w2_permute_indices_with_cache({}, matrix, 128, block)
    return core._maybe_get_cached_w3_w1_permute_indices(
        {}, matrix, 128, block, is_gated_act_gemm=gated
    )


@pytest.mark.parametrize("format, activation, gated", MX)
def test_rows_and_scales_of_mx(format, activation, gated):
    weights = layer(format, 256, 256, activation, gated)
    operands = TRTLLM.prepare(weights, hidden_alignment=256).operands
    for name in ("gate_up", "down"):
        stored = getattr(weights, name)
        codes, scale = stored.packed.view(torch.uint8), stored.block_scale
        tiles = getattr(operands, f"{name}_block_scale")
        linear = deinterleave_128x4(tiles, *tiles.shape[1:])
        for expert in range(4):
            for ours, logical, block in (
                (getattr(operands, f"{name}_packed"), codes, None),
                (linear, scale, 32),
            ):
                matrix = logical[expert]
                if gated and name == "gate_up":
                    matrix = torch.cat(matrix.chunk(2)[::-1])
                order = theirs(name, matrix, gated, block)
                assert torch.equal(ours[expert], matrix[order])


@pytest.mark.parametrize("format, activation, gated", MX)
def test_padding_of_mx_has_scale_one(format, activation, gated):
    """Each half of gate and up is padded apart; byte 127 is 2^0."""
    weights = layer(format, 96, 64, activation, gated)
    operands = TRTLLM.prepare(weights, hidden_alignment=256).operands
    for name, rows, columns in (("gate_up", 64, 3), ("down", 96, 2)):
        scale = getattr(operands, f"{name}_block_scale")
        linear = deinterleave_128x4(scale, *scale.shape[1:])
        halves = 2 if gated and name == "gate_up" else 1
        order = theirs(name, linear[0], gated)
        logical = torch.empty_like(linear)
        logical[:, order] = linear
        stored = getattr(weights, name).block_scale.unflatten(1, (halves, -1)).flip(1)
        found = logical.unflatten(1, (halves, -1))
        assert torch.equal(found[:, :, :rows, :columns], stored)
        assert found[:, :, rows:].eq(127).all() and found[..., columns:].eq(127).all()
        assert found[:, :, rows:].numel() and found[..., columns:].numel()
        codes = getattr(operands, f"{name}_packed")
        assert (codes & 0x77 if format == "mxfp4" else codes & 0x7F).ne(0).sum() <= (
            4 * halves * rows * columns * 32
        )


def same_bytes(ours, theirs):
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@WHOLE
@pytest.mark.parametrize("gated", [True, False])
def test_a_whole_fp8_layer(gated):
    from flashinfer.fused_moe import prepare
    from flashinfer.fused_moe.api import ReLU2, SwiGLU

    (up_gate, down), sizes = float_matrices(gated)
    made = prepare.prepare_trtllm_fp8_per_tensor_weights(
        up_gate,
        down,
        hidden_states_scale_global=64.0,
        intermediate_scale_global=16.0,
        activation=SwiGLU() if gated else ReLU2(),
        **sizes,
    )
    codes, multiplier = prepare._quantize_fp8_per_expert(up_gate)
    scale = multiplier.reciprocal().view(3, 1, 1).repeat(1, 1 + gated, 1)
    second, multiplier = prepare._quantize_fp8_per_expert(down)
    weights = weights_of(
        "fp8",
        (codes, scale),
        (second, multiplier.reciprocal().view(3, 1, 1)),
        gated,
        hidden_scale=torch.tensor([1 / 64]),
        intermediate_scale=torch.full((3,), 1 / 16),
    )
    prepared = TRTLLM.prepare(weights, hidden_alignment=128)
    ours = ENTRIES["fp8"].weights(library(), prepared.operands, prepared.layer)
    for name in ("gemm1_weights", "gemm2_weights"):
        assert same_bytes(ours[name], made[name]), name
    for name in ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar"):
        # Their quotient is rounded twice, our product of a reciprocal three times.
        torch.testing.assert_close(ours[name], made[name], rtol=2.0**-21, atol=0)

    x = torch.randn(5, 256).bfloat16()
    theirs, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(
        x, hidden_states_scale_global=64.0
    )
    made = ENTRIES["fp8"].quantize_input(library(), x, 256, prepared.operands)
    assert same_bytes(made["hidden_states"], theirs)


@WHOLE
def test_a_whole_fp8_block_layer():
    from flashinfer.fused_moe import prepare
    from flashinfer.fused_moe.api import QuantConfig, QuantFormat

    (up_gate, down), sizes = float_matrices(True)
    kind = QuantFormat.DeepSeekFp8
    quant = QuantConfig(weight=kind, activation=kind)
    made = prepare.prepare_trtllm_fp8_block_weights(up_gate, down, quant=quant, **sizes)
    # Not what was made: then rows that the helper moves would go unnoticed.
    first, second = map(prepare._deepseek_fp8_quantize_weights, (up_gate, down))
    weights = weights_of("fp8_block", first, second)
    prepared = TRTLLM.prepare(weights, hidden_alignment=128)
    ours = ENTRIES["fp8_block"].weights(library(), prepared.operands, prepared.layer)
    for name in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        assert same_bytes(ours[name], made[name]), name

    x = torch.randn(5, 256).bfloat16()
    codes, scale = prepare.prepare_trtllm_fp8_block_activations(x, quant=quant)
    mine = ENTRIES["fp8_block"].quantize_input(library(), x, 256, prepared.operands)
    assert same_bytes(mine["hidden_states"], codes)
    assert torch.equal(mine["hidden_states_scale"], scale)


def test_halves_of_fp8_blocks_are_padded_apart():
    """704 rows are six blocks of 128, fused twelve: not the eleven of 1408 rows."""
    weights = layer("fp8_block", 256, 704, experts=2)
    assert weights.gate_up.block_scale.shape == (2, 12, 2)
    operands = TRTLLM.prepare(weights, hidden_alignment=128).operands
    assert operands.gate_up_packed.shape == (2, 2 * 768, 256)
    gate, up = weights.gate_up.block_scale.chunk(2, 1)
    assert torch.equal(operands.gate_up_block_scale, torch.cat((up, gate), 1))
    assert operands.gate_up_packed[:, 704:768].eq(0).all()
    assert operands.gate_up_packed[:, 768 + 704 :].eq(0).all()


# What the emulator must not forgive.


def swapped_halves(operands):
    return operands._replace(gate_up_packed=torch.cat(operands.gate_up_packed.chunk(2, 1)[::-1], 1))


def turned(name, axis=1):
    def change(operands):
        return operands._replace(**{name: getattr(operands, name).roll(1, axis)})

    return change


BREAKS = {
    "codes of gate and up in other rows": turned("gate_up_packed"),
    "codes of down in other rows": turned("down_packed"),
    "another expert's codes": turned("down_packed", 0),
    "another expert's scales of down": turned("down_block_scale", 0),
    "another expert's scales of gate and up": turned("gate_up_block_scale", 0),
}
NOT_IN_FP8 = {
    "scales of gate and up in other rows": turned("gate_up_block_scale"),
    "scales of down in other rows": turned("down_block_scale"),
}


@pytest.mark.parametrize("name", [*BREAKS, *NOT_IN_FP8])
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_a_broken_preparation_shows(emulated, format, activation, gated, name):
    if format == "fp8" and name in NOT_IN_FP8:
        name = "codes of down in other rows"
    weights = layer(format, 256, 256, activation, gated)
    got, call = from_logits(weights)
    want = expected(weights, call)
    assert relative_error(got, want) < LIMIT
    change = {**BREAKS, **NOT_IN_FP8}[name]
    broken, _ = from_logits(weights, change=change)
    assert relative_error(broken, want) > 10 * LIMIT


# The tensors of a module.


@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_state_is_logical_and_bit_equal(emulated, format, activation, gated):
    if GIVEN[format] not in library().arguments:
        assert format == "fp8"
        return
    form = {"biased": format == "mxfp4"}
    weights = layer(format, 272, 40, activation, gated, **form)
    module = FusedExperts(weights, TRTLLM.name)
    state = module.state_dict()
    for name, tensor in weights.tensors().items():
        kept = state[name.replace(".", "_")]
        assert kept.dtype == tensor.dtype and same_bytes(kept, tensor), name
    call = tokens(5, weights)
    want = module(*call)
    other = FusedExperts(layer(format, 272, 40, activation, gated, seed=5, **form), TRTLLM.name)
    other.load_state_dict(state)
    assert torch.equal(other(*call), want)
    if FORMATS[format].activation_range is None:
        return
    scales = torch.tensor([0.02]), torch.linspace(0.004, 0.01, 4)
    module.set_activation_scales(*scales)
    changed = dataclasses.replace(weights, hidden_scale=scales[0], intermediate_scale=scales[1])
    assert torch.equal(module(*call), FusedExperts(changed, TRTLLM.name)(*call))
    assert relative_error(module(*call), expected(changed, call)) < LIMIT
    assert same_bytes(module.gate_up_block_scale, weights.gate_up.block_scale)


@pytest.mark.parametrize("format", GIVEN)
def test_expert_and_tensor_shards_sum_to_the_whole(emulated, format):
    weights = layer(format, 256, 256)
    whole, _ = from_logits(weights)

    def run(part):
        return from_logits(part)[0].float()

    halves = [weights.slice_experts(0, 1), weights.slice_experts(1, 4)]
    assert relative_error(sum(map(run, halves)), whole.float()) < 2**-7
    parts = [weights.slice_intermediate(i * 128, i * 128 + 128) for i in range(2)]
    assert relative_error(sum(map(run, parts)), whole.float()) < 2**-7


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "fp8_block"])
def test_ids_outside_the_window_contribute_nothing(emulated, format):
    weights = layer(format, num_experts=8, expert_offset=2)
    call = tokens(9, weights, top_k=3)
    call[1][0] = torch.tensor([-1, 7, 0])
    call[1][1, 0] = 7
    got = FusedExperts(weights, TRTLLM.name)(*call)
    assert got[0].eq(0).all()
    limit = 3 * LIMIT if format == "fp8_block" else LIMIT
    assert relative_error(got, expected(weights, call)) < limit


@pytest.mark.parametrize("format", GIVEN)
def test_many_tokens_are_launched_in_parts(emulated, monkeypatch, format):
    from fp4moe.kernels.flashinfer import trtllm

    weights = layer(format)
    want, _ = from_logits(weights, count=11)
    monkeypatch.setattr(trtllm, "MOST_TOKENS", 4)
    assert torch.equal(from_logits(weights, count=11)[0], want)
    sizes = [len(call["hidden_states"]) for _, call in emulated.calls if "hidden_states" in call]
    assert sizes == [11, 4, 4, 3]


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "fp8_block"])
def test_compiled_without_a_break(emulated, format, fresh_dynamo):
    weights = layer(format)
    module = FusedExperts(weights, TRTLLM.name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 5):
        call = tokens(count, weights)
        assert torch.equal(compiled(*call), module(*call))
