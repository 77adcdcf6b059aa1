"""What vLLM hands to FlashInfer for a layer, and what fp4moe does: every bit and every number."""

from __future__ import annotations

import pytest
import torch
from compare import Neutral, differences, neutral, one_call, same, same_quantisation
from gpu import CUTLASS, FROM_LOGITS, QUANTIZE, ROUTED
from ours import our_calls, our_calls_from_logits
from peer_layers import Case, checkpoint, cutlass_cases, parameter_cases, vllm_cases
from vllm_side import vllm_calls, vllm_calls_from_logits

from fp4moe.kernels import Routing


@pytest.mark.parametrize("case", [*vllm_cases, *parameter_cases], ids=str)
def test_given_routing(case):
    layer = checkpoint(case)
    ours, theirs = our_calls(layer.ours(), layer.tokens), vllm_calls(layer)
    assert [name for name, _ in ours] == [name for name, _ in theirs] == [QUANTIZE, ROUTED]
    assert same_quantisation(one_call(ours, QUANTIZE), one_call(theirs, QUANTIZE))
    call = one_call(theirs, ROUTED)
    assert differences(one_call(ours, ROUTED), call, neutral(call)) == []


RENORMALIZE = Neutral(
    "softmax before or after the choice, with weights that sum to 1, is the same",
    lambda ours, theirs: {int(ours), int(theirs)} == {1, 4},
)
# vLLM's method and its layer's settings for one of ours.
ROUTINGS = {
    "Nemotron": (
        Case("Nemotron", 2688, 1856, "relu2", 3),
        Routing("sigmoid_topk", 2, scaling=2.5),
        "DeepSeekV3",
        {"num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
    ),
    "groups": (
        Case("groups", 512, 256, "silu", 8),
        Routing("sigmoid_topk", 2, num_groups=4, top_groups=2, scaling=1.5),
        "DeepSeekV3",
        {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    ),
    "Qwen3": (Case("Qwen3", 2048, 768), Routing("softmax_topk", 2), "Renormalize", {}),
    "softmax first": (
        Case("Qwen3", 2048, 768),
        Routing("softmax_topk", 2),
        "RenormalizeNaive",
        {},
    ),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_in_the_kernel(name):
    case, routing, method, settings = ROUTINGS[name]
    layer = checkpoint(case)
    logits, bias = torch.randn(5, case.num_experts), torch.empty(0)
    if method == "DeepSeekV3":
        bias = torch.rand(case.num_experts)
        settings = settings | {"e_score_correction_bias": bias}
    ours = our_calls_from_logits(layer.ours(), layer.tokens[0], logits, bias, routing)
    theirs = vllm_calls_from_logits(layer, method, logits, **settings)
    assert [name for name, _ in ours] == [name for name, _ in theirs] == [QUANTIZE, FROM_LOGITS]
    assert same_quantisation(one_call(ours, QUANTIZE), one_call(theirs, QUANTIZE))
    call = one_call(theirs, FROM_LOGITS)
    allowed = neutral(call)
    if method == "Renormalize":
        allowed["routing_method_type"] = RENORMALIZE
    assert differences(one_call(ours, FROM_LOGITS), call, allowed) == []


def _scales(ours, theirs):
    """The first is a number in ours, and repeated for each expert in vLLM's."""
    return bool((theirs[0] == ours[0]).all()) and same(ours[1:], theirs[1:])


INSIDE = "ours hands over bfloat16 and the library quantises it; vLLM quantises before"
CUTLASS_NEUTRAL = {
    "input": Neutral(INSIDE, lambda ours, theirs: theirs.shape[1] * 2 == ours.shape[1]),
    "input_sf": Neutral(INSIDE, lambda ours, theirs: ours is None),
    "quant_scales": Neutral("the library reads one input scale", _scales),
    "use_fused_finalize": Neutral(
        "the same sum: ours asks for the one whose order is fixed",
        lambda ours, theirs: (ours, theirs) == (False, True),
    ),
}


@pytest.mark.parametrize("case", [*cutlass_cases, *parameter_cases[::2]], ids=str)
def test_cutlass(case):
    layer = checkpoint(case)
    ours = one_call(our_calls(layer.ours(), layer.tokens, "flashinfer_cutlass"), CUTLASS)
    calls = vllm_calls(layer, "flashinfer_cutlass")
    theirs, quantised = one_call(calls, CUTLASS), one_call(calls, QUANTIZE)
    mine = {"hidden": ours["input"], "scale": ours["quant_scales"][0]}
    assert same_quantisation(mine, quantised)
    assert differences(ours, theirs, CUTLASS_NEUTRAL) == []
