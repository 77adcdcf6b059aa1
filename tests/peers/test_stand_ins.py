"""What stands in for the GPU, against vLLM's own formulas; and whether mistakes are noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import differences, neutral, one_call, same_quantisation
from flashinfer import SfLayout
from gpu import QUANTIZE, ROUTED, block_scale_interleave, quantize, recorded
from ours import our_calls
from peer_layers import Case, checkpoint
from vllm_side import on_blackwell, vllm_calls

CASE = Case("gated", 384, 176, "gelu_tanh")
ALONE = Case("no gate", 384, 176, "relu2")


@pytest.mark.parametrize("rows, columns", [(128, 4), (256, 11), (300, 8), (1, 1), (384, 44)])
def test_block_scale_interleave(rows, columns):
    """vLLM reshapes and permutes a padded tensor, the stand-in computes each byte's place."""
    scales = torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
    with on_blackwell():
        from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

        want = swizzle_blockscale(scales.view(torch.float8_e4m3fn))
    assert torch.equal(block_scale_interleave(scales), want.view(torch.uint8).reshape(-1))


@pytest.mark.parametrize("scale", [1.0, 81.3, 2688.0])
def test_quantize(scale):
    """vLLM's reference computes in float32 in another order: codes at a tie may differ, no more."""
    with on_blackwell():
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
            ref_nvfp4_quant,
        )
    hidden = torch.randn(64, 512).bfloat16()
    with recorded():
        packed, got = quantize(hidden, torch.tensor([scale]), swizzled=False)
    values, want = ref_nvfp4_quant(hidden, torch.tensor(scale), 16)
    assert torch.equal(got.view(torch.float8_e4m3fn).float(), want.float())
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    decoded = torch.cat([grid, -grid])[codes]
    # One value in about 2^15 lies within a rounding of a tie.
    assert (decoded != values.float().reshape(decoded.shape)).sum() <= 8


def changed(value):
    """The value with its last bit turned, or the next number, or the other bool."""
    if isinstance(value, torch.Tensor):
        other = value.detach().clone(memory_format=torch.contiguous_format)
        other.as_strided((other.numel(),), (1,)).view(torch.uint8)[-1] ^= 1
        return other
    if isinstance(value, tuple):
        return (*value[:-1], changed(value[-1]))
    return not value if isinstance(value, bool) else value + 1


# Of these only a neutral difference is there to break.
OTHERWISE = {"n_group": 2, "topk_group": 2, "routed_scaling_factor": 2.0, "enable_pdl": False}
OTHERWISE |= {"tune_max_num_tokens": 0, "hidden_states_scale_layout": SfLayout.layout_128x4}


@pytest.mark.parametrize("case", [CASE, ALONE], ids=str)
def test_each_changed_argument_is_noticed(case):
    layer = checkpoint(case)
    ours = one_call(our_calls(layer.ours(), layer.tokens), ROUTED)
    theirs = one_call(vllm_calls(layer), ROUTED)
    allowed = neutral(theirs)
    assert differences(ours, theirs, allowed) == []
    for name, value in ours.items():
        if name == "output":
            wrong = value.float()
        elif name in OTHERWISE:
            wrong = OTHERWISE[name]
        else:
            wrong = torch.ones(1) if value is None else changed(value)
        assert differences(ours | {name: wrong}, theirs, allowed) == [name]


def halves_swapped(weights):
    def swapped(tensor):
        tensor = tensor.view(torch.uint8)
        return torch.cat(tensor.chunk(2, 1)[::-1], 1)

    part = weights.gate_up
    scale = swapped(part.block_scale).view(part.block_scale.dtype)
    other = dataclasses.replace(part, packed=swapped(part.packed), block_scale=scale)
    return dataclasses.replace(weights, gate_up=other)


WEIGHTS = {"gemm1_weights", "gemm1_weights_scale"}
# A wrong preparation, and the arguments that must show it.
PLANTED = {
    "gate and up swapped": (halves_swapped, WEIGHTS),
    "another scale of the input": (
        lambda w: dataclasses.replace(w, hidden_scale=w.hidden_scale * 2),
        {"output1_scale_scalar", "output1_scale_gate_scalar", "hidden_states_scale"},
    ),
    "another scale of the intermediate": (
        lambda w: dataclasses.replace(w, intermediate_scale=w.intermediate_scale * 2),
        {"output1_scale_scalar", "output2_scale_scalar"},
    ),
    "another activation": (
        lambda w: dataclasses.replace(w, activation="silu"),
        {"activation_type"},
    ),
    "another place among the experts": (
        lambda w: dataclasses.replace(w, num_experts=4, expert_offset=2),
        {"num_experts", "local_expert_offset", "topk_ids"},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_noticed(name):
    change, shown = PLANTED[name]
    layer = checkpoint(CASE)
    wrong = our_calls(change(layer.ours()), layer.tokens)
    right = vllm_calls(layer)
    call = one_call(right, ROUTED)
    found = differences(one_call(wrong, ROUTED), call, neutral(call))
    assert shown <= set(found), found
    same = same_quantisation(one_call(wrong, QUANTIZE), one_call(right, QUANTIZE))
    assert same == ("input" not in name)


def test_another_alignment_is_noticed():
    layer = checkpoint(CASE)
    narrow = our_calls(layer.ours(), layer.tokens, hidden_alignment=128)
    right = vllm_calls(layer)
    call = one_call(right, ROUTED)
    found = differences(one_call(narrow, ROUTED), call, neutral(call))
    assert {"gemm1_weights", "gemm2_weights", "hidden_states"} <= set(found)
    assert not same_quantisation(one_call(narrow, QUANTIZE), one_call(right, QUANTIZE))
