"""How FP8 weights lie in memory for FlashInfer's CUTLASS: as its own helpers leave them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flashinfer_formats_layers import LIMIT, float_matrices, layer, weights_of, with_scales
from flashinfer_formats_layers import expected_of_cutlass as expected
from fused_layers import tokens, with_biases

from fp4moe import FusedExperts
from fp4moe.kernels import get_kernel
from fp4moe.kernels.flashinfer.cutlass import ENTRIES
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

# FlashInfer's module of helpers for whole layers came with 0.7.
WHOLE = pytest.mark.skipif(
    not hasattr(pytest.importorskip("flashinfer.fused_moe"), "prepare"),
    reason="needs FlashInfer 0.7",
)
CUTLASS = get_kernel("flashinfer_cutlass")
FP8S = ("fp8", "fp8_block")


@pytest.fixture(autouse=True)
def hopper(claim):
    claim((9, 0))


def test_scales_of_fp8_by_hand():
    """s_x = 2, s_gate = 3 and 24, s_up = 12 and 6, s_a = 4, s_down = 7."""
    for gated in (True, False):
        weights = layer("fp8", 128, 128, "silu" if gated else "relu2", gated, experts=2)
        first = torch.tensor([[3.0, 12.0], [24.0, 6.0]] if gated else [[3.0], [24.0]])
        weights = dataclasses.replace(
            weights,
            gate_up=dataclasses.replace(weights.gate_up, block_scale=first.unsqueeze(2)),
            down=dataclasses.replace(weights.down, block_scale=torch.full((2, 1, 1), 7.0)),
            hidden_scale=torch.tensor([2.0]),
            intermediate_scale=torch.tensor([4.0, 4.0]),
        )
        weights = with_biases(weights) if gated else weights
        operands = CUTLASS.prepare(weights, hidden_alignment=128).operands
        made = ENTRIES["fp8"].arguments(torch.ones(1, 128), operands)
        encode = [1.0, 0.0625] if gated else [0.25, 0.25]
        wanted = [[6.0, 48.0], encode, [28.0, 28.0], 2.0]
        assert [scale.tolist() for scale in made["quant_scales"]] == wanted
        assert made["input"].float().eq(0.5).all()
        if gated:
            gate, up = weights.gate_up_bias.chunk(2, 1)
            ratio = torch.tensor([[0.25], [4.0]])
            assert torch.equal(operands.gate_up_bias, torch.cat((up * ratio, gate), 1))
            found = ENTRIES["fp8"].parameters({"swiglu_alpha": 2.0, "swiglu_beta": 1.0}, operands)
            assert found["swiglu_alpha"].tolist() == [2.0, 2.0]
            assert found["swiglu_beta"].tolist() == [0.25, 4.0]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation, gated", [("silu", True), ("relu2", False)])
@pytest.mark.parametrize("format", FP8S)
def test_restore_is_exact(format, activation, gated, biased):
    form = {"biased": biased, "num_experts": 9, "expert_offset": 3}
    weights = layer(format, 272, 40, activation, gated, **form)
    if gated and format == "fp8":
        weights = with_scales(weights, 3.0, 0.7)
    if format == "fp8_block":
        weights.gate_up.block_scale[0, 0] = 1e-23
    back = CUTLASS.restore(CUTLASS.prepare(weights, hidden_alignment=256))
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        same = back.tensors()[name]
        assert same.dtype == tensor.dtype
        assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8)), name


@WHOLE
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("format", FP8S)
def test_a_whole_layer_is_as_the_library_prepares_it(format, gated):
    from flashinfer.fused_moe import prepare
    from flashinfer.fused_moe.api import ReLU2, SwiGLU

    (up_gate, down), sizes = float_matrices(gated)
    sizes["activation"] = SwiGLU() if gated else ReLU2()
    scales = {}
    if format == "fp8":
        given = {"hidden_states_scale_global": 64.0, "intermediate_scale_global": 16.0}
        made = prepare.prepare_cutlass_fp8_per_tensor_weights(up_gate, down, **given, **sizes)
        first, second = map(prepare._quantize_fp8_per_expert, (up_gate, down))
        first = first[0], first[1].reciprocal().view(-1, 1, 1).repeat(1, 1 + gated, 1)
        second = second[0], second[1].reciprocal().view(-1, 1, 1)
        scales = {"hidden_scale": torch.tensor([1 / 64])}
        scales |= {"intermediate_scale": torch.full((len(down),), 1 / 16)}
        names = ("fc1_dequant_scale", "fc2_act_quant_scale", "fc2_dequant_scale")
        names += ("fc1_act_dequant_scale",)
    else:
        made = prepare.prepare_cutlass_fp8_block_weights(up_gate, down, **sizes)
        first, second = map(prepare._deepseek_fp8_quantize_weights, (up_gate, down))
        names = ("fc1_block_scale", "fc2_block_scale")
    weights = weights_of(format, first, second, gated, **scales)
    x = torch.randn(5, 256).bfloat16()
    operands = CUTLASS.prepare(weights, hidden_alignment=128).operands
    ours = ENTRIES[format].arguments(x, operands)
    for name in ("fc1_expert_weights", "fc2_expert_weights"):
        assert torch.equal(ours[name].view(torch.uint8), made[name].view(torch.uint8)), name
    for name, scale in zip(names, ours["quant_scales"], strict=True):
        # Theirs is one for all experts, ours one for each.
        assert torch.equal(scale, made[name].expand(scale.shape)), name
    if format == "fp8":
        scale = {"hidden_states_scale_global": 64.0}
        codes, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(x, **scale)
        assert torch.equal(ours["input"].view(torch.uint8), codes.view(torch.uint8))


def test_halves_of_blocks_are_padded_apart():
    """704 rows are six blocks of 128, fused twelve: not the eleven of 1408 rows."""
    weights = layer("fp8_block", 256, 704, experts=2)
    operands = CUTLASS.prepare(weights, hidden_alignment=128).operands
    assert operands.gate_up_packed.shape == (2, 2 * 768, 256)
    gate, up = weights.gate_up.block_scale.chunk(2, 1)
    assert torch.equal(operands.gate_up_block_scale, torch.cat((up, gate), 1))
    assert operands.gate_up_packed[:, 704:768].eq(0).all()
    assert operands.gate_up_packed[:, 768 + 704 :].eq(0).all()


@pytest.mark.parametrize("format", FP8S)
def test_state_is_logical_and_scales_may_change(emulated, format):
    weights = layer(format, 272, 40)
    module = FusedExperts(weights, CUTLASS.name)
    state = module.state_dict()
    for name, tensor in weights.tensors().items():
        kept = state[name.replace(".", "_")]
        assert kept.dtype == tensor.dtype
        assert torch.equal(kept.view(torch.uint8), tensor.view(torch.uint8)), name
    call = tokens(5, weights)
    other = FusedExperts(layer(format, 272, 40, seed=5), CUTLASS.name)
    other.load_state_dict(state)
    assert torch.equal(other(*call), module(*call))
    if format == "fp8_block":
        return
    scales = torch.tensor([0.02]), torch.linspace(0.004, 0.01, 4)
    module.set_activation_scales(*scales)
    changed = dataclasses.replace(weights, hidden_scale=scales[0], intermediate_scale=scales[1])
    assert torch.equal(module(*call), FusedExperts(changed, CUTLASS.name)(*call))
    assert relative_error(module(*call), expected(changed, call, rounds=True)) < LIMIT
