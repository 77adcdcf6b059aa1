"""The checker and the emulator of FP8, MXFP8 and MXFP4 calls notice what is wrong in a call."""

from __future__ import annotations

import pytest
import torch
from flashinfer_contract import installed_features, takes
from flashinfer_formats_contract import check_format_call, format_of
from flashinfer_formats_emulator import emulate_format, emulate_mxfp8_quantize

fused_moe = pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")
E4M3, BYTE = torch.float8_e4m3fn, torch.uint8
LOCAL, EXPERTS, TOKENS, HIDDEN, INTERMEDIATE, TOP_K = 4, 8, 3, 256, 128, 2
NAMES = {
    "mxfp8": "trtllm_fp8_block_scale_moe",
    "mxfp4": "trtllm_fp4_block_scale_moe",
    "fp8": "trtllm_fp8_per_tensor_scale_moe",
    "fp8_block": "trtllm_fp8_block_scale_moe",
}


def bytes_(*shape, high=256):
    return torch.randint(0, high, shape, dtype=BYTE)


def codes(*shape):
    return bytes_(*shape, high=0x70).view(E4M3)


def good(format):
    """A call with all that the function wants, of random numbers."""
    rows = 2 * INTERMEDIATE
    enums, members = fused_moe, installed_features()
    call = {
        "routing_logits": torch.randn(TOKENS, EXPERTS),
        "routing_bias": None,
        "hidden_states": codes(TOKENS, HIDDEN),
        "gemm1_weights": codes(LOCAL, rows, HIDDEN),
        "gemm2_weights": codes(LOCAL, HIDDEN, INTERMEDIATE),
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": INTERMEDIATE,
        "local_expert_offset": 2,
        "local_num_experts": LOCAL,
        "routed_scaling_factor": None,
        "routing_method_type": members.routing_methods["Renormalize"].value,
        "activation_type": members.activations["Swiglu"].value,
    }
    if format == "fp8":
        names = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
        call |= {name: torch.rand(LOCAL) for name in names} | {"use_routing_scales_on_input": False}
    elif format == "fp8_block":
        call |= {
            "hidden_states_scale": torch.rand(HIDDEN // 128, TOKENS) + 0.1,
            "gemm1_weights_scale": torch.rand(LOCAL, rows // 128, HIDDEN // 128),
            "gemm2_weights_scale": torch.rand(LOCAL, HIDDEN // 128, INTERMEDIATE // 128),
            "fp8_quantization_type": enums.Fp8QuantizationType.DeepSeekFp8,
        }
    else:
        scales = {
            "hidden_states_scale": bytes_(TOKENS, HIDDEN // 32, high=130),
            "gemm1_weights_scale": bytes_(LOCAL, rows, HIDDEN // 32, high=130),
            "gemm2_weights_scale": bytes_(LOCAL, HIDDEN, INTERMEDIATE // 32, high=130),
        }
        if format == "mxfp8":
            kind = enums.Fp8QuantizationType.MxFp8
            call |= {**scales, "use_shuffled_weight": True, "fp8_quantization_type": kind}
        else:
            call |= {name: scale.view(E4M3) for name, scale in scales.items()}
            call["gemm1_weights"] = bytes_(LOCAL, rows, HIDDEN // 2)
            call["gemm2_weights"] = bytes_(LOCAL, HIDDEN, INTERMEDIATE // 2)
            absent = ("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")
            absent += ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
            call |= dict.fromkeys(absent)
    return call


def check(format, call, **meant):
    name = NAMES[format]
    if "topk_ids" in call:
        name = name.replace("_scale_moe", "_scale_routed_moe")
    function = getattr(fused_moe, name)
    check_format_call(function, (), call, version_features=installed_features(), **meant)


@pytest.mark.parametrize("format", NAMES)
def test_a_sound_call_passes_and_computes(format):
    call = good(format)
    assert format_of(call) == format
    check(format, call)
    out = emulate_format(NAMES[format], **call)
    out = out[0] if isinstance(out, list) else out
    assert out.shape == (TOKENS, HIDDEN) and out.dtype == torch.bfloat16


DEEPSEEK = installed_features().routing_methods["DeepSeekV3"].value
GEGLU = installed_features().activations["Geglu"].value
RELU2 = installed_features().activations["Relu2"].value
UNGATED = {
    "activation_type": RELU2,
    "gemm1_weights": codes(LOCAL, INTERMEDIATE, HIDDEN),
    "gemm1_weights_scale": bytes_(LOCAL, INTERMEDIATE, HIDDEN // 32, high=130),
}
WRONG = [
    *(
        (f, {"hidden_states": torch.zeros(TOKENS, HIDDEN)}, "hidden_states must be of")
        for f in ("fp8", "mxfp8")
    ),
    *((f, {"activation_type": GEGLU}, "activation_type must be one of") for f in NAMES),
    ("fp8_block", {"activation_type": RELU2}, "activation_type must be one of"),
    *(
        (f, {"num_experts": 10, "routing_logits": torch.randn(TOKENS, 10)}, "a multiple of 4")
        for f in ("mxfp8", "fp8_block")
    ),
    ("mxfp8", {"use_shuffled_weight": False}, "use_shuffled_weight must be True"),
    ("mxfp8", {"weight_layout": 2}, "weight_layout must be MajorK"),
    ("mxfp8", {"hidden_states_scale": torch.ones(TOKENS, 8)}, "hidden_states_scale must be of"),
    ("mxfp8", {"hidden_states_scale": torch.full((TOKENS, 8), 255, dtype=BYTE)}, "be numbers"),
    ("mxfp8", {"n_group": 1, "topk_group": 1}, "n_group must be None, or positive for DeepSeekV3"),
    ("mxfp4", {"output2_scale_scalar": torch.ones(LOCAL)}, "output2_scale_scalar must be None"),
    ("mxfp4", {"gemm1_bias": torch.zeros(LOCAL, 5)}, "gemm1_bias must be"),
    ("mxfp4", {"gemm1_alpha": torch.ones(LOCAL + 1)}, "gemm1_alpha must be"),
    ("fp8_block", {"use_shuffled_weight": True}, "be False for plain rows"),
    ("fp8_block", {"hidden_states_scale": torch.ones(TOKENS, 2)}, "hidden_states_scale must be"),
    ("fp8_block", {"gemm1_clamp_limit": torch.ones(1)}, "gemm1_clamp_limit must be"),
    ("mxfp8", UNGATED | {"gemm1_alpha": torch.ones(LOCAL)}, "gemm1_alpha must be None but for"),
    ("fp8", {"output1_scales_scalar": torch.ones(LOCAL, 1)}, "output1_scales_scalar must be"),
    ("fp8", {"output2_scales_scalar": torch.full((LOCAL,), float("inf"))}, "be finite"),
    ("fp8", {"use_routing_scales_on_input": True}, "use_routing_scales_on_input must be False"),
    ("fp8", {"gemm1_weights": codes(LOCAL, HIDDEN, 2 * INTERMEDIATE).mT}, "gemm1_weights must be"),
]


@pytest.mark.parametrize("format, change, text", WRONG)
def test_a_wrong_call_is_noticed(format, change, text):
    with pytest.raises(AssertionError, match=text):
        check(format, good(format) | change)


@pytest.mark.parametrize("format", ["mxfp8", "fp8_block"])
def test_a_biased_router_of_block_scales_says_that_it_has_one_group(format):
    biased = {"routing_method_type": DEEPSEEK, "routing_bias": torch.zeros(EXPERTS)}
    with pytest.raises(AssertionError, match="n_group must be at least 1 for DeepSeekV3"):
        check(format, good(format) | biased)
    check(format, good(format) | biased | {"n_group": 1, "topk_group": 1})


@pytest.mark.parametrize("format", ["mxfp8", "fp8_block"])
def test_ids_of_block_scales_are_packed(format):
    call = {k: v for k, v in good(format).items() if k != "routing_logits"}
    ids = torch.tensor([[2, 3]] * TOKENS, dtype=torch.int32)
    weights = torch.full((TOKENS, TOP_K), 0.5, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="topk_ids must be packed"):
        check(format, call | {"topk_ids": (ids, weights)})
    bits = weights.view(torch.int16).int()
    check(format, call | {"topk_ids": ids << 16 | bits})


def test_parameters_are_in_the_models_units():
    seven = {"gemm1_clamp_limit": torch.full((LOCAL,), 7.0)}
    check("mxfp8", good("mxfp8") | seven, parameters={"limit": 7.0})
    with pytest.raises(AssertionError, match=r"gemm1_clamp_limit must be 6\.0"):
        check("mxfp8", good("mxfp8") | seven, parameters={"limit": 6.0})


def test_mxfp8_quantise_by_hand():
    """amax 448 has scale 2^0, what lies above it 2^1; zeros have byte 0."""
    x = torch.zeros(2, 96, dtype=torch.bfloat16)
    x[0, 0], x[0, 32], x[1, 64] = 448, 450, 0.4375
    got, scale = emulate_mxfp8_quantize(x, is_sf_swizzled_layout=False)
    assert scale.view(2, 3).tolist() == [[127, 128, 0], [0, 0, 117]]
    assert got.dtype == E4M3
    assert [got[0, 0].item(), got[0, 32].item(), got[1, 64].item()] == [448, 224, 448]


@pytest.mark.skipif(not takes(NAMES["mxfp8"], "gemm1_bias"), reason="needs FlashInfer 0.7")
def test_biases_of_mxfp8_are_added():
    call = good("mxfp8")
    plain = emulate_format(NAMES["mxfp8"], **call)
    bias = {"gemm2_bias": torch.full((LOCAL, HIDDEN), 2.0**20)}
    check("mxfp8", call | bias | {"gemm1_bias": torch.zeros(LOCAL, 2 * INTERMEDIATE)})
    assert not torch.equal(emulate_format(NAMES["mxfp8"], **call, **bias), plain)
