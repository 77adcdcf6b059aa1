"""Activations with parameters, and biases, in both kernels on the installed FlashInfer.

As in test_trtllm.py and test_cutlass.py: calls are bound to the real signatures and checked against
the contracts, then emulated, and compared with `reference_w4a4` in the roundings of each kernel.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flashinfer_cutlass_emulator import emulate_cutlass_moe
from flashinfer_emulator import emulate_routed_moe
from fused_layers import LAYER, tokens, with_biases
from fused_layers import layer as unbiased

from fp4moe import Activation, FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing, get_kernel
from fp4moe.kernels.flashinfer.library import library
from fp4moe.kernels.operands import LogitsCall
from fp4moe.reference import reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

TRTLLM, CUTLASS = get_kernel("flashinfer_trtllm"), get_kernel("flashinfer_cutlass")
KERNELS = {kernel.name: kernel for kernel in (TRTLLM, CUTLASS)}
CAPABILITY = {TRTLLM.name: (10, 0), CUTLASS.name: (12, 0)}
ENTRY = {TRTLLM.name: "trtllm_fp4_block_scale_routed_moe", CUTLASS.name: "cutlass_fused_moe"}
EMULATE = {
    TRTLLM.name: lambda **call: emulate_routed_moe(**call)[0],
    CUTLASS.name: emulate_cutlass_moe,
}
# As in test_trtllm.py.
LIMIT = 4e-3
# gpt-oss, DeepSeek-V4, Step-3.7 and Inkling-2, with limits and caps that these layers reach.
OPENAI, DEEPSEEK = "silu(alpha=1.702,beta=1,limit=0.7)", "silu(limit=0.5)"
STEP, CAPPED = "silu_step(limit=0.3)", "silu_softcap(alpha=0.5,beta=0.8)"
SILU = (OPENAI, DEEPSEEK, "silu(alpha=0.5)", "silu(beta=-0.5)")
PLAIN = [(TRTLLM.name, *form) for form in (("gelu_tanh", True), ("gelu", True), ("relu2", False))]
PLAIN += [(CUTLASS.name, name, False) for name in ("relu2", "relu", "silu", "gelu", "identity")]
PLAIN += [(CUTLASS.name, "gelu", True), *((name, "silu", True) for name in KERNELS)]
FORMS = [(name, text, True) for name in KERNELS for text in SILU] + [(CUTLASS.name, STEP, True)]
CUTLASS_NAMES = {
    "silu": ("swiglu_alpha", "swiglu_beta", "swiglu_limit"),
    "silu_step": ("", "", "swiglu_limit"),
    "silu_softcap": ("situ_beta", "situ_linear_beta", ""),
}
TRTLLM_NAMES = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")


def layer(*sizes, biased=False, **form):
    weights = unbiased(*sizes, **form)
    return with_biases(weights, form.get("seed", 0)) if biased else weights


def run(name, weights, call):
    """Call the operator with the weights as the kernel of that name prepares them."""
    return FusedExperts(weights, name)(*call)


def expected(name, weights, call):
    """Return reference_w4a4 with the kernel's roundings and routing weights."""
    hidden, ids, routing = call
    if name == TRTLLM.name and not library().float32_weights:
        routing = routing.bfloat16().float()
    dtype = KERNELS[name].intermediate_dtype
    return reference_w4a4(hidden, weights, ids, routing, intermediate_dtype=dtype)


@pytest.fixture(params=KERNELS)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def blackwell(claim, request):
    call = getattr(request.node, "callspec", None)
    names = [call.params[key] for key in ("name", "kernel") if key in call.params] if call else []
    claim(CAPABILITY[names[0]] if names else (10, 0))


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("hidden, intermediate", [(256, 192), (272, 40)])
@pytest.mark.parametrize("kernel, activation, gated", FORMS)
def test_parameters(emulated, kernel, activation, gated, hidden, intermediate, biased):
    weights = layer(hidden, intermediate, activation=activation, gated=gated, biased=biased)
    call = tokens(9, weights)
    found = Activation.parse(activation)
    given = {n: getattr(found, n) for n in ("alpha", "beta", "limit")}
    emulated.parameters = {
        n: value for n, value in given.items() if value != getattr(Activation("silu"), n)
    }
    got = run(kernel, weights, call)
    assert relative_error(got, expected(kernel, weights, call)) < LIMIT
    plain = dataclasses.replace(weights, activation="silu")
    assert relative_error(got, expected(kernel, plain, call)) > 10 * LIMIT
    (made,) = emulated.of(ENTRY[kernel])
    if kernel == CUTLASS.name:
        for ours, argument in zip(given, CUTLASS_NAMES[found.name], strict=True):
            if argument and ours in emulated.parameters:
                assert made[argument].tolist() == [torch.tensor(given[ours]).item()] * 4
            else:
                assert argument not in made


@pytest.mark.parametrize("kernel, activation, gated", PLAIN)
def test_biases(emulated, kernel, activation, gated):
    weights = layer(272, 40, activation=activation, gated=gated, biased=True)
    call = tokens(9, weights)
    got = run(kernel, weights, call)
    assert relative_error(got, expected(kernel, weights, call)) < LIMIT
    without = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    assert relative_error(got, expected(kernel, without, call)) > 10 * LIMIT


def test_soft_caps(emulated, claim):
    claim((12, 0))
    form = LAYER | {"activation": CAPPED, "capability": (12, 0)}
    if "Situ" in library().activation_names:
        assert why_not(CUTLASS.name, **form) == []
        weights = layer(activation=CAPPED, biased=True)
        call = tokens(9, weights)
        got = run(CUTLASS.name, weights, call)
        assert relative_error(got, expected(CUTLASS.name, weights, call)) < LIMIT
        (made,) = emulated.of(ENTRY[CUTLASS.name])
        assert made["situ_beta"].tolist() == [0.5] * 4
        assert made["situ_linear_beta"].tolist() == [torch.tensor(0.8).item()] * 4
    else:
        member, *arguments = why_not(CUTLASS.name, **form)
        assert "has no ActivationType.Situ, which silu_softcap(alpha=0.5,beta=0.8)" in member
        assert ["situ_beta" in arguments[0], "situ_linear_beta" in arguments[1]] == [True, True]
        with pytest.raises(UnsupportedError, match=r"no ActivationType\.Situ"):
            FusedExperts(layer(activation=CAPPED), CUTLASS.name)


def test_plain_layers_without_biases_hand_over_nothing_new(emulated, name):
    weights = layer()
    run(name, weights, tokens(3, weights))
    (made,) = emulated.of(ENTRY[name])
    if name == TRTLLM.name:
        new = (*TRTLLM_NAMES, "gemm1_bias", "gemm2_bias")
        assert [made[n] for n in new] == [None] * 5
    else:
        assert not [
            n for n in made if n.startswith(("swiglu", "situ", "fc1_expert_b", "fc2_expert_b"))
        ]
        assert made["activation_type"].name == "Swiglu"


def test_units_of_trtllm_by_hand(emulated):
    """s_x = 2, s_up = 4, s_a = 8, s_down = 16: accumulators are 1/8 and 1/128 of the values."""
    weights = layer(128, 64, 1, "silu(alpha=3,beta=2,limit=24)", biased=True)
    weights = dataclasses.replace(
        weights,
        gate_up=dataclasses.replace(weights.gate_up, global_scale=torch.tensor([4.0])),
        down=dataclasses.replace(weights.down, global_scale=torch.tensor([16.0])),
        hidden_scale=torch.tensor([2.0]),
        intermediate_scale=torch.tensor([8.0]),
    )
    run(TRTLLM.name, weights, tokens(2, weights, top_k=1))
    (made,) = emulated.of(ENTRY[TRTLLM.name])
    assert [made[n].tolist() for n in TRTLLM_NAMES] == [[3.0], [0.25], [3.0]]
    gate, up = weights.gate_up_bias[0].chunk(2)
    # Rows 0, 8, 16 and 24 are up 0, gate 0, up 1 and gate 1; those of down 0 to 3.
    rows = torch.stack((up[0], gate[0], up[1], gate[1]))
    assert torch.equal(made["gemm1_bias"][0, [0, 8, 16, 24]], rows / 8)
    assert torch.equal(made["gemm2_bias"][0, [0, 8, 16, 24]], weights.down_bias[0, :4] / 128)


def test_order_of_cutlass_by_hand(emulated, claim):
    claim((12, 0))
    weights = layer(128, 64, biased=True)
    run(CUTLASS.name, weights, tokens(2, weights))
    (made,) = emulated.of(ENTRY[CUTLASS.name])
    gate, up = weights.gate_up_bias.chunk(2, 1)
    assert torch.equal(made["fc1_expert_biases"], torch.cat((up, gate), 1).bfloat16())
    assert torch.equal(made["fc2_expert_biases"], weights.down_bias.bfloat16())


# A call of gpt-oss' form with this done to it must be another result.
SLIPS = {
    TRTLLM.name: {
        "alpha left out": lambda c: {"gemm1_alpha": None},
        "beta not divided": lambda c: {"gemm1_beta": torch.ones(4)},
        "limit not divided": lambda c: {"gemm1_clamp_limit": torch.full((4,), 0.7)},
        "limit of another expert": lambda c: {"gemm1_clamp_limit": c["gemm1_clamp_limit"].roll(1)},
        "biases not divided": lambda c: {
            "gemm1_bias": c["gemm1_bias"] * c["output1_scale_gate_scalar"].unsqueeze(1)
        },
        "biases of down not divided": lambda c: {
            "gemm2_bias": c["gemm2_bias"] * c["output2_scale_scalar"].unsqueeze(1)
        },
        "rows in another order": lambda c: {"gemm1_bias": c["gemm1_bias"].roll(1, 1)},
    },
    CUTLASS.name: {
        "alpha left out": lambda c: {"swiglu_alpha": None},
        "beta left out": lambda c: {"swiglu_beta": None},
        "limit left out": lambda c: {"swiglu_limit": None},
        "gate first": lambda c: {"fc1_expert_biases": c["fc1_expert_biases"].roll(192, 1)},
        "biases of another expert": lambda c: {
            "fc2_expert_biases": c["fc2_expert_biases"].roll(1, 0)
        },
    },
}


@pytest.mark.parametrize("kernel, slip", [(n, slip) for n in KERNELS for slip in SLIPS[n]])
def test_slips_show(emulated, kernel, slip):
    weights = layer(activation=OPENAI, biased=True)
    call = tokens(9, weights)
    run(kernel, weights, call)
    (made,) = emulated.of(ENTRY[kernel])
    made = {k: v for k, v in made.items() if k != "output"}
    want = expected(kernel, weights, call)
    assert relative_error(EMULATE[kernel](**made), want) < LIMIT
    broken = made | SLIPS[kernel][slip](made)
    assert relative_error(EMULATE[kernel](**broken), want) > 5 * LIMIT


def test_routing_in_the_kernel(emulated):
    weights = layer(experts=8, activation=OPENAI, biased=True)
    x, _, _ = tokens(9, weights)
    logits = torch.stack([torch.randperm(8) for _ in range(9)]).float() / 2 - 2
    routing = Routing("softmax_topk", 3)
    prepared = TRTLLM.prepare(weights, hidden_alignment=256)
    call = LogitsCall(x, logits, torch.empty(0), routing, prepared.operands, weights.layer(3))
    got = TRTLLM(call)
    ids, routing_weights = route(logits, torch.empty(0), routing)
    assert relative_error(got, reference_w4a4(x, weights, ids, routing_weights)) < LIMIT


@pytest.mark.parametrize("gated", [True, False])
def test_state_is_logical_and_bit_equal(emulated, name, gated):
    form = {"activation": OPENAI if gated else "relu2", "gated": gated, "biased": True}
    weights = layer(272, 40, num_experts=9, expert_offset=3, **form)
    module = FusedExperts(weights, name)
    state = module.state_dict()
    for tensor_name, tensor in weights.tensors().items():
        kept = state[tensor_name.replace(".", "_")]
        assert torch.equal(kept.view(torch.uint8), tensor.view(torch.uint8)), tensor_name
    call = tokens(5, weights)
    want = module(*call)
    other = FusedExperts(layer(272, 40, num_experts=9, expert_offset=3, seed=5, **form), name)
    other.load_state_dict(state)
    assert torch.equal(other(*call), want)
    # Values that were divided by the old scales are divided by the new ones.
    scales = torch.tensor([0.003]), torch.linspace(0.001, 0.004, 4)
    module.set_activation_scales(*scales)
    changed = dataclasses.replace(weights, hidden_scale=scales[0], intermediate_scale=scales[1])
    assert torch.equal(module(*call), run(name, changed, call))
    assert torch.equal(module.down_bias, weights.down_bias)


def test_expert_and_tensor_shards_sum_to_the_whole(emulated, name):
    weights = layer(256, 256, activation=OPENAI, biased=True)
    call = tokens(6, weights, dtype=torch.float32)
    whole = run(name, weights, call)
    for parts in (
        [weights.slice_experts(0, 1), weights.slice_experts(1, 4)],
        [weights.slice_intermediate(i * 64, i * 64 + 64) for i in range(4)],
    ):
        # Each part is rounded to bfloat16 once more.
        assert relative_error(sum(run(name, part, call) for part in parts), whole) < 2**-7


@pytest.mark.slow
def test_the_width_of_gpt_oss(emulated, name):
    weights = layer(2880, 2880, 2, OPENAI, biased=True)
    call = tokens(2, weights)
    got = run(name, weights, call)
    assert got.shape == (2, 2880)
    assert relative_error(got, expected(name, weights, call)) < LIMIT


def test_compiled_without_a_break(emulated, name, fresh_dynamo):
    weights = layer(activation=OPENAI, biased=True)
    module = FusedExperts(weights, name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 5):
        call = tokens(count, weights)
        assert torch.equal(compiled(*call), module(*call))


# Refusals, and what runs instead.


def test_why_not():
    openai = LAYER | {"activation": OPENAI, "biased": True}
    assert why_not(TRTLLM.name, **openai) == why_not(CUTLASS.name, **openai) == []
    for text in ("gelu_tanh(limit=7)", STEP):
        (reason,) = why_not(TRTLLM.name, **LAYER | {"activation": text})
        assert reason == (
            f"no nvfp4 kernel for gated {text}; there are kernels for gated silu (also with alpha, "
            "beta and limit), gated gelu_tanh, gated gelu, ungated relu2"
        )
    (reason,) = why_not(CUTLASS.name, **LAYER | {"activation": "gelu(limit=7)"})
    assert reason.endswith("only silu, silu_step, silu_softcap, got gelu(limit=7)")
    (reason,) = why_not(CUTLASS.name, **LAYER | {"activation": "silu(alpha=1.702)", "gated": False})
    assert reason.endswith("without a gate, got silu(alpha=1.702)")


def test_auto_takes_the_kernel_that_has_it(emulated):
    assert FusedExperts(layer(activation=OPENAI, biased=True)).kernel == TRTLLM.name
    assert FusedExperts(layer(activation=STEP, biased=True)).kernel == CUTLASS.name


def test_a_prepared_layer_of_another_activation_is_refused(emulated, name):
    weights = layer()
    prepared = KERNELS[name].prepare(weights, hidden_alignment=256)
    call = prepared.call(*tokens(2, weights))
    call = call._replace(layer=dataclasses.replace(call.layer, activation="gelu(limit=7)"))
    with pytest.raises(UnsupportedError, match=rf"^moe: kernel {name} cannot .*limit=7"):
        KERNELS[name](call)
    assert emulated.calls == []


@pytest.mark.parametrize("biased", [False, True])
def test_scales_next_to_zero_are_refused(biased):
    weights = layer(activation=OPENAI, biased=biased)
    weights.gate_up.global_scale[1] = 2.0**-149
    with pytest.raises(UnsupportedError) as refusal:
        TRTLLM.prepare(weights, hidden_alignment=256)
    text = str(refusal.value)
    assert text.startswith(
        "FusedExperts: kernel flashinfer_trtllm cannot take these scales, because"
    )
    assert "gate_up_global_scale" in text and "below 8e-31 for local experts [1]" in text
    without = {"activation": "silu", "gate_up_bias": None, "down_bias": None}
    TRTLLM.prepare(dataclasses.replace(weights, **without), hidden_alignment=256)
