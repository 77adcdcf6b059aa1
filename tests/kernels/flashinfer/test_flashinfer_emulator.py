"""The emulator of FlashInfer's TRT-LLM-Gen path is right, and the contract refuses what is not."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
import re
import warnings

import flashinfer_contract as contract
import pytest
import torch
from flashinfer_emulator import emulate_fp4_quantize, emulate_moe, emulate_routed_moe, route

from fp4moe.activations import Activation
from fp4moe.formats.nvfp4 import NVFP4Values
from fp4moe.reference import reference_w4a4
from fp4moe.testing import make_layer, relative_error

try:
    VERSION = importlib.metadata.version("flashinfer-python")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""
pytestmark = pytest.mark.skipif(not VERSION, reason="needs flashinfer-python")
RELEASE = tuple(map(int, re.findall(r"\d+", VERSION)[:3]))

ROUTED_ENTRY, LAYOUT = "trtllm_fp4_block_scale_routed_moe", "hidden_states_scale_layout"
MEMBERS = {"silu": "Swiglu", "gelu_tanh": "Geglu", "relu2": "Relu2"}
# In the order of the library's numbers, up to where its versions part.
METHODS = ["Default", "Renormalize", "DeepSeekV3", "Llama4", "RenormalizeNaive", "TopK"]
METHODS += ["SigmoidRenorm", "MiniMax2", "Sigmoid", "TopKSigmoid"]
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"  # gpt-oss, with a limit that is reached
# activation, hidden, intermediate, experts, top_k, tokens, first and count of local experts, and
# whether there are biases.
BIASED = [
    (OPENAI, 128, 192, 6, 3, 9, 0, 6, True),
    (OPENAI, 200, 40, 5, 2, 7, 1, 3, True),
    ("gelu_tanh", 128, 64, 4, 2, 5, 0, 4, True),
    ("relu2", 100, 72, 4, 2, 3, 2, 2, True),
]
CASES = [
    ("silu", 128, 64, 4, 2, 5, 0, 4),
    ("silu", 256, 192, 8, 3, 9, 0, 8),
    ("silu", 200, 40, 5, 2, 7, 1, 3),
    ("gelu_tanh", 128, 192, 6, 3, 9, 0, 6),
    ("gelu_tanh", 256, 64, 4, 1, 1, 0, 4),
    ("relu2", 256, 128, 5, 2, 7, 0, 5),
    ("relu2", 100, 72, 4, 2, 3, 2, 2),
    ("silu(limit=0.5)", 128, 64, 4, 2, 5, 0, 4),
    ("silu(alpha=0.5,beta=-2)", 128, 64, 4, 2, 5, 0, 4),
    *BIASED,
]


def unspecified(call):
    """The number of a method that is none: the last one."""
    return contract.installed_features().routing_methods["Unspecified"]


@pytest.fixture(scope="module")
def features():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        importlib.import_module("flashinfer")
    return contract.installed_features()


def interleave(scale):
    """Put the scales [M, C] of one matrix into 128x4 tiles, one byte at a time."""
    rows, columns = scale.shape
    flat = torch.empty(rows * columns, dtype=torch.uint8)
    for m in range(rows):
        for k in range(columns):
            tile = (m // 128) * (columns // 4) + k // 4
            flat[tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4] = scale[m, k]
    return flat.reshape(rows, columns)


def prepare(values, gated, *, swap=True, shuffle=True, tiles=True):
    """Return (packed, block scales) of one GEMM as the library wants them."""
    library = importlib.import_module("flashinfer")
    prepared: tuple[list, list] = ([], [])
    for packed, scale in zip(values.packed, values.block_scale.view(torch.uint8), strict=True):
        for part, done in zip((packed, scale), prepared, strict=True):
            if gated:
                part = torch.cat(part.chunk(2)[::-1]) if swap else part
                part = library.reorder_rows_for_gated_act_gemm(part.contiguous())
            part = library.shuffle_matrix_a(part, 128) if shuffle else part
            done.append(interleave(part) if tiles and done is prepared[1] else part)
    return torch.stack(prepared[0]), torch.stack(prepared[1]).view(torch.float8_e4m3fn)


def prepare_bias(bias, scale, gated, *, divide=True, swap=True, shuffle=True):
    """Return the bias [L, rows] of one GEMM as the library wants it; its functions reorder it."""
    library = importlib.import_module("flashinfer")
    done = []
    for part in bias / scale.unsqueeze(1) if divide else bias:
        part = part.unsqueeze(1)
        if gated:
            part = torch.cat(part.chunk(2)[::-1]) if swap else part
            part = library.reorder_rows_for_gated_act_gemm(part.contiguous())
        done.append(library.shuffle_matrix_a(part, 128) if shuffle else part)
    return torch.stack(done).squeeze(2)


def make(case, intermediate_scale=None):
    """Return (weights, hidden, ids, routing weights) of a case; weights hold local experts."""
    activation, hidden, intermediate, experts, top_k, tokens, first, local, *biased = case
    gated = activation != "relu2"
    if intermediate_scale is None:
        intermediate_scale = torch.rand(local) * 0.008 + 0.002
    weights = make_layer(
        local,
        hidden,
        intermediate,
        activation,
        gated,
        biased=bool(biased),
        hidden_scale=0.037,
        intermediate_scale=intermediate_scale,
        num_experts=experts,
        expert_offset=first,
    ).padded(hidden_multiple=128, intermediate_multiple=64 if gated else 128)
    x = torch.randn(tokens, hidden).bfloat16()
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    outside = (ids < first) | (ids >= first + local)
    return weights, x, ids.masked_fill(outside, -1), torch.rand(tokens, top_k).bfloat16()


def call_of(features, weights, x, ids, routing_weights, **prepared):
    """Return the keyword arguments of a right routed call."""
    gated, activation = weights.gated, Activation.parse(weights.activation)
    x = torch.nn.functional.pad(x, (0, weights.hidden_padded - x.shape[1]))
    packed, scale = emulate_fp4_quantize(x, 1.0 / weights.hidden_scale, 16, False, False)
    gate_scale = weights.gate_up.global_scale * weights.hidden_scale
    up_scale = gate_scale / weights.intermediate_scale if gated else 1 / weights.intermediate_scale
    call = dict(
        topk_ids=(ids, routing_weights),
        hidden_states=packed,
        hidden_states_scale=scale.view(torch.float8_e4m3fn),
        output1_scale_scalar=up_scale,
        output1_scale_gate_scalar=gate_scale,
        output2_scale_scalar=weights.down.global_scale * weights.intermediate_scale,
        num_experts=weights.num_experts,
        top_k=ids.shape[1],
        intermediate_size=weights.intermediate_padded,
        local_expert_offset=weights.expert_offset,
        local_num_experts=weights.local_experts,
        routing_method_type=METHODS.index("Renormalize"),
        activation_type=int(features.activations[MEMBERS[activation.name]]),
    )
    given = {"gemm1_alpha": activation.alpha if activation.alpha != 1 else None}
    given |= {"gemm1_beta": activation.beta / gate_scale if activation.beta else None}
    given |= {"gemm1_clamp_limit": activation.limit / gate_scale if activation.limit else None}
    alpha = given["gemm1_alpha"]
    given["gemm1_alpha"] = None if alpha is None else torch.full_like(gate_scale, alpha)
    given |= {"gemm1_bias": None, "gemm2_bias": None}
    if weights.biased:
        second = call["output2_scale_scalar"]
        given["gemm1_bias"] = prepare_bias(weights.gate_up_bias, gate_scale, gated)
        given["gemm2_bias"] = prepare_bias(weights.down_bias, second, False)
    call["gemm1_weights"], call["gemm1_weights_scale"] = prepare(weights.gate_up, gated, **prepared)
    call["gemm2_weights"], call["gemm2_weights_scale"] = prepare(weights.down, False)
    empty = ("routing_bias", "n_group", "topk_group", "routed_scaling_factor")
    newer = {LAYOUT: features.linear_scales} if contract.takes(ROUTED_ENTRY, LAYOUT) else {}
    return call | given | dict.fromkeys(empty) | newer


def assert_agrees(got, want):
    """Accept float32 rounding: one bfloat16 step here and there, and one crossed FP4 tie.

    Both sides differ by float32 roundings, 2^-21 of a value at most. They cross a tie of one of
    the K + 1 bfloat16 roundings behind an element in about (K + 1) 2^-12 of the cases: below
    2^-6 with room. A step is at most 2^-7 of a term, and the row's largest element stands for the
    largest term. A crossed tie of an intermediate code (4e-6 each, up to 5,000 codes) would move
    one token by one code of many, hence the exempt token where there are several.
    """
    got, want = got.float(), want.float()
    step = 2.0**-7 * want.abs().amax(1, keepdim=True)
    beyond = ((got - want).abs() > step).any(1)
    differing = (got != want).float().mean(1) > 2.0**-6
    assert int((beyond | differing).sum()) <= (len(want) > 1)
    assert relative_error(got, want) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_routed_equals_the_reference(features, case):
    weights, x, ids, routing_weights = make(case)
    call = call_of(features, weights, x, ids, routing_weights)
    function = importlib.import_module("flashinfer.fused_moe").trtllm_fp4_block_scale_routed_moe
    contract.check_routed_call(function, (), call, version_features=features)
    (got,) = emulate_routed_moe(**call)
    assert got.dtype == torch.bfloat16 and got.shape == (len(x), weights.hidden_padded)
    want = reference_w4a4(x, weights, ids, routing_weights)
    assert_agrees(got[:, : x.shape[1]], want)
    assert not got[:, x.shape[1] :].any()
    if len(x) > 1:
        with pytest.raises(AssertionError):
            assert_agrees(got[:, : x.shape[1]] * 1.01, want)
    nobody = (ids == -1).all(1)
    assert not got[nobody].any() and got[~nobody].any(1).all()


def test_saturated_block_scales(features):
    weights, x, ids, routing_weights = make(CASES[1], intermediate_scale=2e-4)
    (got,) = emulate_routed_moe(**call_of(features, weights, x, ids, routing_weights))
    assert_agrees(got, reference_w4a4(x, weights, ids, routing_weights))


# What is left out of the preparation, and which arguments are changed.
MISTAKES = {
    "gate and up swapped": ({"swap": False}, {}),
    "rows not shuffled": ({"shuffle": False}, {}),
    "scales not interleaved": ({"tiles": False}, {}),
    "padding not zero": ({}, {}),
    "intermediate scale inverted": ({}, {"output1_scale_scalar": torch.reciprocal}),
    "gate scale left out": ({}, {"output1_scale_gate_scalar": torch.ones_like}),
    "down scale inverted": ({}, {"output2_scale_scalar": torch.reciprocal}),
    "nibbles swapped": ({}, {"gemm1_weights": lambda w: w >> 4 | w << 4}),
    "ids made local": ({}, {"topk_ids": lambda routed: (routed[0] - 1, routed[1])}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(features, mistake):
    weights, x, ids, routing_weights = make(CASES[2])
    want = reference_w4a4(x, weights, ids, routing_weights).float()
    if mistake == "padding not zero":
        for part, byte in ((weights.gate_up.packed, 0x77), (weights.gate_up.block_scale, 0x7E)):
            part.view(torch.uint8).unflatten(1, (2, -1))[:, :, weights.intermediate_size :] = byte
        weights.down.packed[..., weights.intermediate_size // 2 :] = 0x77
    prepared, changes = MISTAKES[mistake]
    call = call_of(features, weights, x, ids, routing_weights, **prepared)
    (got,) = emulate_routed_moe(**(call | {k: change(call[k]) for k, change in changes.items()}))
    assert relative_error(got[:, : x.shape[1]].float(), want) > 0.3


# Of a case with parameters and biases: which arguments are made how.
SLIPS = {
    "alpha left out": lambda w, c: {"gemm1_alpha": None},
    "beta not divided": lambda w, c: {"gemm1_beta": torch.ones(6)},
    "limit not divided": lambda w, c: {"gemm1_clamp_limit": torch.full((6,), 0.7)},
    "limit left out": lambda w, c: {"gemm1_clamp_limit": None},
    "bias not divided": lambda w, c: {
        "gemm1_bias": prepare_bias(w.gate_up_bias, None, True, divide=False)
    },
    "bias of gate first": lambda w, c: {
        "gemm1_bias": prepare_bias(w.gate_up_bias, c["output1_scale_gate_scalar"], True, swap=False)
    },
    "bias not shuffled": lambda w, c: {
        "gemm2_bias": prepare_bias(w.down_bias, c["output2_scale_scalar"], False, shuffle=False)
    },
    "bias of down left out": lambda w, c: {"gemm2_bias": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_slips_with_parameters_and_biases_show(features, slip):
    weights, x, ids, routing_weights = make(BIASED[0])
    want = reference_w4a4(x, weights, ids, routing_weights).float()
    call = call_of(features, weights, x, ids, routing_weights)
    (got,) = emulate_routed_moe(**(call | SLIPS[slip](weights, call)))
    assert relative_error(got.float(), want) > 0.1


def test_parameters_and_biases_by_hand(features):
    # Raw accumulators of 0; scales 1/2, 1 and 4. gate = 2 is cut to 1, up = -3 to -1, and beta 2 is
    # added: sigmoid(3) (-1 + 2) = 0.9526. Block scale e4m3(0.9526 / 6) = 0.15625, code 6: 0.9375.
    weights = make(("silu", 128, 64, 1, 1, 1, 0, 1, True), intermediate_scale=1.0)[0]
    zero = torch.zeros(1, 128, 64, dtype=torch.uint8)
    down = torch.zeros(1, 128, 32, dtype=torch.uint8)
    down[0, 3, 2] = 3 << 4  # 1.5 at (3, 5)
    weights = dataclasses.replace(
        weights,
        activation="silu(alpha=3,beta=2,limit=1)",
        gate_up=NVFP4Values(zero, torch.ones(1, 128, 8).to(torch.float8_e4m3fn), torch.ones(1) / 2),
        down=NVFP4Values(
            down, torch.ones(1, 128, 4).to(torch.float8_e4m3fn), torch.full((1,), 4.0)
        ),
        hidden_scale=torch.ones(1),
        gate_up_bias=torch.tensor([[0.0] * 5 + [2.0] + [0.0] * 63 + [-3.0] + [0.0] * 58]),
        down_bias=torch.tensor([[0.0] * 3 + [0.25, -8.0] + [0.0] * 123]),
    )
    x, ids = torch.ones(1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
    call = call_of(features, weights, x, ids, torch.full((1, 1), 0.5, dtype=torch.bfloat16))
    assert call["gemm1_clamp_limit"].tolist() == [2.0] and call["gemm1_beta"].tolist() == [4.0]
    (got,) = emulate_routed_moe(**call)
    want = torch.zeros(1, 128)
    want[0, 3:5] = torch.tensor([(0.9375 * 1.5 * 4 + 0.25) / 2, -4.0]).bfloat16()
    assert torch.equal(got.float(), want)


def test_by_hand(features):
    # Expert 1 of 2: 6.0 / 6 times 2.0 at (5, 0) gives relu2 4, block scale e4m3(4/6) = 0.6875,
    # code 6, hence 4.125; down has 1.5 at (3, 5): 6.1875, and half of it is 3.09375.
    def matrix(row, column, code):
        packed = torch.zeros(1, 128, 64, dtype=torch.uint8)
        packed[0, row, column // 2] = code << 4 * (column % 2)
        ones = torch.ones(1, 128, 8).to(torch.float8_e4m3fn)
        return NVFP4Values(packed, ones, torch.ones(1))

    weights = dataclasses.replace(
        make(("relu2", 128, 128, 2, 1, 1, 1, 1), intermediate_scale=1.0)[0],
        gate_up=matrix(5, 0, 4),
        down=matrix(3, 5, 3),
        hidden_scale=torch.ones(1),
    )
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    x[0, 0] = 6.0
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    half = torch.full((2, 1), 0.5, dtype=torch.bfloat16)
    call = call_of(features, weights, x, ids, half)
    call["output1_scale_gate_scalar"] = torch.tensor([1.0 / 6.0])
    want = torch.zeros(2, 128)
    want[0, 3] = 3.09375
    (got,) = emulate_routed_moe(**call)
    assert torch.equal(got.float(), want)
    packed = ids << 16 | half.view(torch.int16).int()
    output = torch.full((2, 8), math.nan, dtype=torch.bfloat16)
    (same,) = emulate_routed_moe(**(call | {"topk_ids": packed, "output": output}))
    assert same is output and torch.equal(output.float(), want[:, :8])


def test_quantize_by_hand():
    # Every tie of the grid in both signs, under block scale 1; the ties go to the even code.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    rows = [[first] + [0.0] * 15 for first in (0.0, 1e4, 2.0**-9)]
    x = torch.tensor([ties + [-t for t in ties], *rows])
    packed, scale = emulate_fp4_quantize(x.bfloat16(), torch.ones(1), 16, False, False)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    even = [0, 2, 2, 4, 4, 6, 6, 7]
    assert codes[0].tolist() == even + [8 + code for code in even]
    # The scale of row 2 saturates, that of row 3 underflows and leaves 0 * inf behind.
    assert scale.flatten().tolist() == [0x38, 0, 0x7E, 0]
    assert not codes[1].any() and codes[2].tolist() == [7] + [0] * 15 and codes[3, 0] == 7


def test_quantize_in_tiles():
    x, encode = torch.randn(130, 80).half(), torch.tensor([27.0])
    scales = torch.zeros(256, 8, dtype=torch.uint8)
    scales[:130, :5] = emulate_fp4_quantize(x, encode, is_sf_swizzled_layout=False)[1]
    assert torch.equal(emulate_fp4_quantize(x, encode)[1], interleave(scales))


QUANTIZE_REFUSALS = [
    (dict(input=torch.zeros(2, 16)), "input must be half; got torch.float32"),
    (dict(input=torch.zeros(16, 1).half().t()), "row stride of 1"),
    (dict(input=torch.zeros(2, 24).half()), "input must have 16n columns; got 24"),
    (dict(sf_vec_size=32), "only NVFP4"),
    (dict(backend="cute-dsl"), "arguments must keep defaults"),
    (dict(global_scale=torch.ones(2)), r"global_scale must be \[1\]; got \[2\]"),
]


@pytest.mark.parametrize(("change", "text"), QUANTIZE_REFUSALS)
def test_quantize_refuses(change, text):
    call = dict(input=torch.zeros(2, 16).half(), global_scale=torch.ones(1)) | change
    with pytest.raises(AssertionError, match=text):
        emulate_fp4_quantize(**call)


def by_hand(method, logits, bias, top_k, factor):
    """Route one token with plain Python floats: {id: weight}."""
    sigmoid = [1 / (1 + math.exp(-v)) for v in logits]
    biased = method in ("DeepSeekV3", "MiniMax2")
    scores = dict(enumerate(map(sum, zip(sigmoid, bias, strict=True)) if biased else logits))
    if method == "DeepSeekV3":  # 4 groups of 3, of which 2 are kept
        groups = [sum(sorted(scores[g * 3 + i] for i in range(3))[1:]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -groups[g])[:2]
        scores = {e: v for e, v in scores.items() if e // 3 in kept}
    best = sorted(scores, key=lambda e: (-scores[e], e))[:top_k]
    if method == "TopK":
        return {e: logits[e] for e in best}
    if method in ("Default", "Renormalize", "RenormalizeNaive"):
        total = sum(math.exp(v) for v in (logits if method == "Default" else map(scores.get, best)))
        return {e: math.exp(logits[e]) / total for e in best}
    total = 1.0 if method in ("Sigmoid", "Llama4", "TopKSigmoid") else sum(sigmoid[e] for e in best)
    return {e: sigmoid[e] * (factor if biased else 1.0) / total for e in best}


@pytest.mark.parametrize("method", METHODS)
def test_routing_methods(method):
    logits, bias = torch.randn(17, 12), torch.randn(12).bfloat16()
    logits[3] = 0.5  # all equal: the smaller ids win
    bias[:] = bias[0] if method == "MiniMax2" else bias
    top_k = 1 if method == "Llama4" else 3
    ids, weights = route(method, logits, bias, top_k=top_k, groups=4, kept_groups=2, factor=2.5)
    for t, row in enumerate(logits.tolist()):
        want = by_hand(method, row, bias.tolist(), top_k, 2.5)
        assert set(ids[t].tolist()) == set(want)
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            assert weight == pytest.approx(want[expert], rel=2.0**-8)  # half a bfloat16 step
    unscaled = route("SigmoidRenorm", logits, None, top_k=3, normalise=False)
    assert torch.equal(unscaled[1], route("Sigmoid", logits, None, top_k=3)[1])


def test_logits_equal_routed(features):
    weights, x, ids, _ = make(CASES[3])
    call = call_of(features, weights, x, ids, None)
    del call["topk_ids"]
    call |= dict(routing_logits=torch.randn(9, 6), routing_bias=torch.randn(6))
    call |= dict(routing_method_type=METHODS.index("DeepSeekV3"))
    call |= dict(routed_scaling_factor=2.5, top_k=3)
    function = importlib.import_module("flashinfer.fused_moe").trtllm_fp4_block_scale_moe
    contract.check_logits_call(function, (), call, version_features=features)
    ids, routing_weights = route(
        "DeepSeekV3", call["routing_logits"], call["routing_bias"], top_k=3, factor=2.5
    )
    assert_agrees(emulate_moe(**call)[0], reference_w4a4(x, weights, ids, routing_weights))


def method(name):
    return {"routing_method_type": METHODS.index(name)}


@pytest.fixture(scope="module")
def good_calls(features):
    """Return {name: (check, the library's function, keyword arguments)} of right calls."""
    module = importlib.import_module("flashinfer.fused_moe")
    routed_moe = contract.check_routed_call, module.trtllm_fp4_block_scale_routed_moe
    logits_moe = contract.check_logits_call, module.trtllm_fp4_block_scale_moe
    torch.manual_seed(0)
    routed = call_of(features, *make(("silu", 128, 64, 6, 2, 5, 1, 4)))
    plain = call_of(features, *make(CASES[5]))
    logits = dict(routing_logits=torch.randn(5, 6), routing_bias=torch.randn(6))
    logits |= {k: v for k, v in routed.items() if k not in ("topk_ids", "routing_bias")}
    logits |= method("DeepSeekV3") | {"routed_scaling_factor": 2.5}
    calls = {"routed": (*routed_moe, routed), "ungated": (*routed_moe, plain)}
    return calls | {"logits": (*logits_moe, logits)}


def column_major(tensor):
    if tensor.ndim == 1:
        return tensor[:1].expand(len(tensor))
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


TENSORS = ("hidden_states_scale", "gemm1_weights", "gemm1_weights_scale", "gemm2_weights")
TENSORS += ("gemm2_weights_scale", *contract.SCALARS)
SPOILED = {
    "be a tensor": lambda t: None,
    "be of": lambda t: t.to(torch.int16),
    r"be \(": lambda t: t[:-1],
    "be contiguous": column_major,
    "be on cpu": lambda t: t.to("meta"),
}


def other(name, function):
    return {name: lambda call: function(call[name])}


def routing(ids=lambda t: t, weights=lambda t: t):
    return other("topk_ids", lambda pair: (ids(pair[0]), weights(pair[1])))


def more_experts(count=8, **change):
    logits = torch.zeros(5, count)
    return dict(num_experts=count, routing_logits=logits, routing_bias=None) | change


def negated(scale):
    return (scale.view(torch.uint8) | 0x80).view(scale.dtype)


BORROWED = {"output": lambda c: c["gemm1_weights"].view(torch.bfloat16).view(128, 128)[:5]}
# What is changed (a value, or a function of the call), and the refusal.
ROUTED = [
    ({"gemm3": 1}, "arguments must fit the signature; got got an unexpected"),
    (other("hidden_states", lambda t: t[:0]), "hidden_states must have a token"),
    (other("hidden_states", lambda t: t[0]), "hidden_states must have 2 axes; got 1"),
    (other("hidden_states", SPOILED["be of"]), "hidden_states must be of"),
    (other("hidden_states", column_major), "hidden_states must be contiguous"),
    (other("hidden_states", lambda t: t[:, :32]), "must hold a multiple of 128 columns"),
    (other("gemm1_weights_scale", negated), "must be finite and not negative; got byte 0x"),
    (other("output2_scale_scalar", lambda t: t / 0), "output2_scale_scalar must be finite"),
    ({"intermediate_size": 40}, "intermediate_size must be a multiple of 64; got 40"),
    ({"intermediate_size": 128}, r"gemm1_weights must be \(4, 256, 64\)"),
    ({"local_num_experts": 0}, "local_num_experts must be positive; got 0"),
    ({"local_expert_offset": 3}, r"local_expert_offset must be in 0\.\.2; got 3"),
    ({"top_k": 7}, "top_k must be up to 6; got 7"),
    (routing(ids=torch.Tensor.long), r"topk_ids\[0\] must be of"),
    (routing(ids=torch.zeros_like), r"topk_ids must be -1 or in 1\.\.4"),
    (routing(ids=lambda t: t[:4]), r"topk_ids\[0\] must be \(5, 2\)"),
    (routing(weights=torch.Tensor.half), r"topk_ids\[1\] must be of"),
    (other("topk_ids", lambda pair: pair[:1]), r"topk_ids must be \(ids, weights\); got 1"),
    (other("topk_ids", lambda pair: pair[0].clamp(1) << 16 | 0xBF80), "pack no negative weight"),
    ({"routing_bias": torch.zeros(6)}, "routing_bias must be None where the caller routes"),
    ({"n_group": 1}, "n_group must be None where the caller routes; got 1"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor must be None or 1.0"),
    ({"activation_type": 99}, "activation_type must be a value of ActivationType"),
    ({"activation_type": 4}, r"activation_type must be one of \('Swiglu',\); got Geglu"),
    ({"routing_method_type": 99}, "routing_method_type must be a value of"),
    ({"routing_method_type": unspecified}, "routing_method_type must be specified"),
    ({"do_finalize": False}, "do_finalize must be True; got False"),
    ({"enable_pdl": 1}, "enable_pdl must be None or a bool; got 1"),
    ({"tune_max_num_tokens": 5000}, "tune_max_num_tokens must be a power of two up to 8192"),
    ({"tune_max_num_tokens": 16384}, "tune_max_num_tokens must be a power of two up to 8192"),
    ({"gemm1_alpha": torch.ones(1)}, r"gemm1_alpha must be \(4,\); got \(1,\)"),
    ({"gemm1_beta": torch.ones(4).half()}, "gemm1_beta must be of"),
    ({"gemm1_beta": torch.ones(4) / 0}, "gemm1_beta must be finite"),
    ({"gemm1_clamp_limit": torch.zeros(4)}, "gemm1_clamp_limit must be above 0"),
    ({"gemm1_bias": torch.zeros(4, 64)}, r"gemm1_bias must be \(4, 128\)"),
    ({"gemm1_bias": torch.zeros(4, 128).bfloat16()}, "gemm1_bias must be of"),
    ({"gemm1_bias": torch.zeros(128, 4).T}, "gemm1_bias must be contiguous"),
    ({"gemm2_bias": torch.full((4, 128), torch.nan)}, "gemm2_bias must be finite"),
    ({"per_token_scale": torch.ones(5)}, "per_token_scale must be None"),
    ({"output": torch.zeros(5, 128)}, "output must be of"),
    ({"output": torch.zeros(5, 130).bfloat16()}, r"output must be \(5, 128\)"),
    ({"output": torch.zeros(5, 128).bfloat16()[:, :64]}, "output must be contiguous"),
    (BORROWED, "output must have memory of its own; got that of gemm1_weights"),
]
ROUTED += [(other(n, spoil), f"{n} must {t}") for n in TENSORS for t, spoil in SPOILED.items()]
LOGITS = [
    ({"routing_logits": torch.zeros(5, 5)}, r"routing_logits must be \(5, 6\)"),
    ({"routing_logits": torch.zeros(5, 6).half()}, "routing_logits must be of"),
    ({"routing_bias": None}, "routing_bias must be a tensor for DeepSeekV3; got None"),
    ({"routing_bias": torch.zeros(4)}, r"routing_bias must be \(6,\)"),
    ({"n_group": 0, "topk_group": 0}, "n_group must be None, or positive"),
    ({"n_group": 1}, "topk_group must come with n_group; got None"),
    ({"n_group": 4, "topk_group": 1}, "n_group must be up to 8 and split 6 experts"),
    (more_experts(n_group=2, topk_group=3), "topk_group must be up to 2; got 3"),
    (more_experts(n_group=2, topk_group=1, top_k=5), "top_k must be up to 4 in these groups"),
    (more_experts(300) | method("TopK"), "num_experts must be up to 256; got 300"),
    (more_experts(9, top_k=9) | method("TopK"), "top_k must be up to 8 for TopK; got 9"),
    (method("TopK"), "routing_bias must be None for TopK; got a tensor"),
    ({"routing_bias": None} | method("TopK"), "routed_scaling_factor must be None or 1.0"),
    ({"routed_scaling_factor": 2}, "routed_scaling_factor must be None or a float; got 2"),
    ({"norm_topk_prob": False}, "norm_topk_prob must be True for DeepSeekV3; got False"),
    ({"routing_replay_out": torch.ones(5, 2)}, "routing_replay_out must be None"),
]
UNGATED = [
    ({"intermediate_size": 64}, "intermediate_size must be a multiple of 128; got 64"),
    ({"gemm1_alpha": torch.ones(5)}, "gemm1_alpha must be None but for Swiglu"),
]
VIOLATIONS = [
    pytest.param(name, *row, id=f"{name}-{row[1][:40]}")
    for name, rows in (("routed", ROUTED), ("logits", LOGITS), ("ungated", UNGATED))
    for row in rows
]


def check(good_calls, features, name, change, args=(), **keywords):
    function, library_function, call = good_calls[name]
    changed = {k: v(call) if callable(v) else v for k, v in change.items()}
    function(library_function, args, call | changed, version_features=features, **keywords)


@pytest.mark.parametrize(("name", "change", "text"), VIOLATIONS)
def test_contract_refuses(good_calls, features, name, change, text):
    meant = {"activation": "Swiglu"} if name == "routed" else {}
    check(good_calls, features, name, {}, **meant)
    with pytest.raises(AssertionError, match=text):
        check(good_calls, features, name, change, **meant)


def test_versions_differ(good_calls, features):
    # 0.6.16 reads float32 weights, 0.6.14 has GegluTanh: read off the sources in between.
    assert features.float32_routing_weights == (RELEASE >= (0, 6, 16))
    assert features.activations["Identity"] == (9 if RELEASE >= (0, 6, 14) else 8)
    ids, weights = good_calls["routed"][2]["topk_ids"]
    wider = {"topk_ids": (ids, weights.float())}
    if features.float32_routing_weights:
        check(good_calls, features, "routed", wider)
    else:
        with pytest.raises(AssertionError, match=r"topk_ids\[1\] must be of \(torch.bfloat16,\)"):
            check(good_calls, features, "routed", wider)
    if contract.takes(ROUTED_ENTRY, LAYOUT):
        for layout in (None, features.linear_scales - 1):
            with pytest.raises(AssertionError, match="hidden_states_scale_layout must be"):
                check(good_calls, features, "routed", {LAYOUT: layout})


def test_contract_accepts(good_calls, features):
    call = good_calls["routed"][2]
    ids, weights = call["topk_ids"]
    packed = {"topk_ids": ids << 16 | weights.view(torch.int16).int()}
    check(good_calls, features, "routed", packed | {"output": torch.zeros(5, 100).bfloat16()})
    check(good_calls, features, "routed", {"tune_max_num_tokens": 16384}, tune_max_num_tokens=16384)
    check(good_calls, features, "logits", more_experts(n_group=2, topk_group=1))
    with pytest.raises(AssertionError, match="tune_max_num_tokens must be 64; got 8192"):
        check(good_calls, features, "routed", {}, tune_max_num_tokens=64)
    with pytest.raises(AssertionError, match="routing_method_type must be TopK; got DeepSeekV3"):
        check(good_calls, features, "logits", {}, routing_method="TopK")
    with pytest.raises(AssertionError, match="arguments must all be keywords; got 1 positional"):
        check(good_calls, features, "routed", {}, (packed["topk_ids"],))


def test_emulator_refuses_what_it_lacks(good_calls, features):
    call = good_calls["routed"][2]
    with pytest.raises(AssertionError, match="per_token_scale must be None; got tensor"):
        emulate_routed_moe(**(call | {"per_token_scale": torch.ones(4)}))
    with pytest.raises(AssertionError, match="activation_type must have an NVFP4 kernel; got Sw"):
        emulate_routed_moe(**(call | {"activation_type": features.activations["SwigluStep"]}))
    with pytest.raises(AssertionError, match="top_k must be 1 for Llama4; got 2"):
        route("Llama4", torch.zeros(1, 4), None, top_k=2)
    with pytest.raises(AssertionError, match="must be a known method; got Unspecified"):
        route("Unspecified", torch.zeros(1, 4), None, top_k=2)
