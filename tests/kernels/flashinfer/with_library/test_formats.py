"""Kernel `flashinfer_trtllm` with FP8, MXFP8 and MXFP4 weights, with the GPU's part emulated.

As test_trtllm.py: calls are bound to the real signatures and checked against the contract, an
emulator that undoes the layouts on its own computes, and `reference_w4a4` judges. Both round the
same values to e4m3; a value next to a tie may differ by a step of 2^-3 of its size, and outputs
are rounded to bfloat16 (2^-9).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch
from flashinfer_formats_layers import (
    FORMS,
    FROM_LOGITS,
    GIVEN,
    LIMIT,
    RELU2,
    SILU,
    TRTLLM,
    expected,
    from_logits,
    layer,
)
from fused_layers import LAYER, tokens

from fp4moe import FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing
from fp4moe.kernels.flashinfer.library import library, version_key
from fp4moe.kernels.flashinfer.trtllm import ENTRIES
from fp4moe.reference import reference_w4a4
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

TRTLLM_FP8 = ENTRIES["fp8"]
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"
SIZES = [(256, 192), (384, 176), (272, 40), (130, 100)]


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


def assert_refused(weights, call):
    """Chosen experts of an FP8 layer, on a FlashInfer without the function for them."""
    text = f"the installed FlashInfer has no {GIVEN[weights.format]}, which takes experts that"
    with pytest.raises(UnsupportedError, match=f"^FusedExperts: .*{text}.* install flashinfer-pyt"):
        FusedExperts(weights, TRTLLM.name)
    prepared = TRTLLM.prepare(weights, hidden_alignment=256)
    with pytest.raises(UnsupportedError, match=f"^moe: .* cannot run, because {text}"):
        TRTLLM(prepared.call(*call))
    assert FusedExperts(weights).kernel == "triton"


@pytest.mark.parametrize("hidden, intermediate", SIZES)
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_numbers(emulated, format, activation, gated, hidden, intermediate):
    weights = layer(format, hidden, intermediate, activation, gated)
    call = tokens(5, weights)
    if GIVEN[format] not in library().arguments:
        assert_refused(weights, call)
        return
    got = FusedExperts(weights, TRTLLM.name)(*call)
    want = expected(weights, call)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert relative_error(got, want) < LIMIT
    assert len(emulated.of(GIVEN[format])) == 1


@pytest.mark.parametrize("hidden_alignment", [128, 512])
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_restore_is_exact(format, activation, gated, hidden_alignment):
    biased = format in ("mxfp4", "mxfp8")
    form = {"biased": biased, "num_experts": 9, "expert_offset": 3}
    weights = layer(format, 272, 40, activation, gated, **form)
    prepared = TRTLLM.prepare(weights, hidden_alignment=hidden_alignment)
    back = TRTLLM.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        same = back.tensors()[name]
        assert same.dtype == tensor.dtype
        assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8)), name


def test_scales_of_fp8_by_hand():
    """s_x = 2, s_gate = 3, s_up = 5, s_a = 4, s_down = 7."""
    for gated in (True, False):
        weights = layer("fp8", 128, 128, "silu" if gated else "relu2", gated, experts=2)
        first = torch.tensor([3.0, 5.0] if gated else [5.0]).view(1, -1, 1).repeat(2, 1, 1)
        first[1] *= 8
        weights = dataclasses.replace(
            weights,
            gate_up=dataclasses.replace(weights.gate_up, block_scale=first),
            down=dataclasses.replace(weights.down, block_scale=torch.full((2, 1, 1), 7.0)),
            hidden_scale=torch.tensor([2.0]),
            intermediate_scale=torch.tensor([4.0, 4.0]),
        )
        operands = TRTLLM.prepare(weights, hidden_alignment=128).operands
        made = TRTLLM_FP8.weights(library(), operands, weights.layer())
        gate, one = ([6.0, 48.0], [2.5, 20.0]) if gated else ([10.0, 80.0], [0.25, 0.25])
        assert made["output1_scales_gate_scalar"].tolist() == gate
        assert made["output1_scales_scalar"].tolist() == one
        assert made["output2_scales_scalar"].tolist() == [28.0, 28.0]
        assert operands.hidden_scale.tolist() == [0.5]


ROUTINGS = {
    "softmax": (Routing("softmax_topk", 3), 0),
    "bias": (Routing("sigmoid_topk", 3, scaling=2.5), 8),
    "no bias": (Routing("sigmoid_topk", 2), 0),
    "groups": (Routing("sigmoid_topk", 3, num_groups=4, top_groups=2, scaling=1.5), 8),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_routing_in_the_kernel(emulated, format, activation, gated, name):
    weights = layer(format, 272, 40, activation, gated, experts=8)
    routing, biased = ROUTINGS[name]
    got, call = from_logits(weights, routing=routing, biased_router=biased)
    assert got.shape == call[0].shape and got.is_contiguous()
    assert relative_error(got, expected(weights, call)) < LIMIT
    (made,) = emulated.of(FROM_LOGITS[format])
    block = format in ("mxfp8", "fp8_block")
    groups = routing.num_groups if routing.num_groups > 1 else None
    groups = 1 if block and groups is None and routing.method == "sigmoid_topk" else groups
    assert made["n_group"] == groups


@pytest.mark.parametrize("format", ["mxfp8", "fp8_block"])
def test_what_block_scales_cannot_route(emulated, format):
    def reasons(routing, experts=128):
        shape = weights.layer(routing.top_k)
        return TRTLLM.reasons_not_to_route(dataclasses.replace(shape, num_experts=experts), routing)

    weights = layer(format)
    assert reasons(Routing("sigmoid_topk", 8)) == reasons(Routing("sigmoid_topk", 22), 512) == []
    (reason,) = reasons(Routing("sigmoid_topk", 9))
    assert reason == "top_k must not exceed 8 for 128 experts with a bias, got 9"
    (reason,) = reasons(Routing("softmax_topk", 4), 130)
    assert reason == "num_experts must be a multiple of 4, got 130"
    form = LAYER | {"format": format, "activation": "silu", "num_experts": 130}
    assert why_not(TRTLLM.name, **form) == [reason]
    (reason,) = why_not(TRTLLM.name, **form | {"num_experts": 8, "top_k": 8})
    assert reason == "top_k must be below the 8 experts to choose from, got 8"
    odd = layer(format, experts=6)
    with pytest.raises(UnsupportedError, match="cannot route like this, because num_experts"):
        TRTLLM(TRTLLM.prepare(odd, hidden_alignment=256).call(*tokens(2, odd)))
    assert emulated.calls == []


def test_gate_and_up_of_fp8_may_have_scales_that_differ(emulated):
    weights = layer("fp8", 272, 40)
    first = weights.gate_up.block_scale * torch.tensor([0.5, 3.0]).view(1, 2, 1)
    changed = dataclasses.replace(
        weights, gate_up=dataclasses.replace(weights.gate_up, block_scale=first)
    )
    got, call = from_logits(changed)
    assert relative_error(got, expected(changed, call)) < LIMIT
    assert relative_error(got, expected(weights, call)) > 10 * LIMIT


def test_fp8_blocks_round_gate_and_up():
    """What reference_w4a4 leaves out, for no other kernel does it: 0.027 for each of the two."""
    weights = layer("fp8_block", 256, 256)
    call = tokens(64, weights)
    x, ids, routing = call
    plain = reference_w4a4(x, weights, ids, routing.bfloat16().float())
    assert 0.01 < relative_error(expected(weights, call), plain) < 0.027 * 2


# Parameters and biases.


@pytest.mark.parametrize("activation", [OPENAI, "silu(limit=0.5)", "silu(beta=-0.5)"])
@pytest.mark.parametrize("format", ["mxfp8", "mxfp4"])
def test_parameters(emulated, format, activation):
    weights = layer(format, 272, 40, activation)
    call = tokens(9, weights)
    names = {"alpha": 1.702, "beta": 1.0, "limit": 0.7} if activation == OPENAI else None
    emulated.parameters = names
    got = FusedExperts(weights, TRTLLM.name)(*call)
    assert relative_error(got, expected(weights, call)) < LIMIT
    plain = dataclasses.replace(weights, activation="silu")
    assert relative_error(got, expected(plain, call)) > 10 * LIMIT


@pytest.mark.parametrize("activation", [OPENAI, "silu(limit=0.5)"])
def test_parameters_of_fp8_blocks(emulated, activation):
    """Taken by 0.7, refused by name before."""
    weights = layer("fp8_block", 256, 128, activation)
    form = {"format": "fp8_block", "activation": activation}
    reasons = why_not(TRTLLM.name, **LAYER | form)
    if version_key(library().version) < (0, 7, 2, 1):
        (reason,) = reasons
        assert reason.startswith("the installed FlashInfer takes no alpha, beta and limit with ")
        with pytest.raises(UnsupportedError, match=r"-python 0\.7\.2\.post1, or take form"):
            from_logits(weights)
        return
    assert reasons == []
    got, call = from_logits(weights)
    assert relative_error(got, expected(weights, call)) < 3 * LIMIT
    plain = dataclasses.replace(weights, activation="silu")
    assert relative_error(got, expected(plain, call)) > 10 * LIMIT


@pytest.mark.parametrize("activation, gated", [(OPENAI, True), SILU, RELU2])
def test_biases_of_mxfp4(emulated, activation, gated):
    weights = layer("mxfp4", 272, 40, activation, gated, biased=True)
    call = tokens(9, weights)
    got = FusedExperts(weights, TRTLLM.name)(*call)
    assert relative_error(got, expected(weights, call)) < LIMIT
    without = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    assert relative_error(got, expected(without, call)) > 10 * LIMIT
    got, call = from_logits(weights)
    assert relative_error(got, expected(weights, call)) < LIMIT


@pytest.mark.slow
def test_the_width_of_gpt_oss(emulated):
    weights = layer("mxfp4", 2880, 2880, OPENAI, experts=2, biased=True)
    call = tokens(2, weights)
    got = FusedExperts(weights, TRTLLM.name)(*call)
    assert relative_error(got, expected(weights, call)) < LIMIT
    (made,) = emulated.of(GIVEN["mxfp4"])
    assert made["hidden_states"].shape[1] == 3072 and made["intermediate_size"] == 2944


@pytest.mark.parametrize("activation, gated", [(OPENAI, True), RELU2])
def test_biases_of_mxfp8(emulated, activation, gated):
    """Where the library chooses the experts, from 0.7 on."""
    weights = layer("mxfp8", 272, 40, activation, gated, biased=True)
    prepared = TRTLLM.prepare(weights, hidden_alignment=256)
    text = r"^moe: .* trtllm_fp8_block_scale_routed_moe has no biases with mxfp8 weights, only "
    with pytest.raises(UnsupportedError, match=text):
        TRTLLM(prepared.call(*tokens(3, weights)))
    if "gemm1_bias" in library().arguments[FROM_LOGITS["mxfp8"]]:
        got, call = from_logits(weights)
        assert relative_error(got, expected(weights, call)) < LIMIT
        without = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
        assert relative_error(got, expected(without, call)) > 10 * LIMIT
    else:
        with pytest.raises(UnsupportedError, match="the installed FlashInfer has no biases in "):
            from_logits(weights)
    assert FusedExperts(weights).kernel != TRTLLM.name


@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
def test_without_biases(emulated, format):
    weights = layer(format, biased=True)
    with pytest.raises(UnsupportedError, match=f"has no biases with {format} weights; take format"):
        FusedExperts(weights, TRTLLM.name)
    with pytest.raises(UnsupportedError, match=f"has no biases with {format} weights; take format"):
        from_logits(weights)
    assert emulated.calls == []


def test_why_not_names_what_would_run():
    form = LAYER | {"format": "fp8"}
    (reason,) = why_not(TRTLLM.name, **form | {"activation": "gelu_tanh"})
    assert reason == (
        "no fp8 kernel for gated gelu_tanh; there are kernels for gated silu, ungated relu2; "
        "take format nvfp4, kernel flashinfer_cutlass or kernel triton"
    )
    (reason,) = why_not(TRTLLM.name, **form | {"activation": "silu_step(limit=7)"})
    assert reason.endswith("; take kernel flashinfer_cutlass or kernel triton")
    (reason,) = why_not(TRTLLM.name, **form | {"activation": "gelu", "format": "fp8_block"})
    assert reason.endswith("alpha, beta and limit); take format nvfp4 or kernel triton")
    (reason,) = why_not(TRTLLM.name, **form | {"format": "fp8_channel"})
    assert reason.startswith("it has no layout for fp8_channel")
    assert reason.endswith("what 0.7 has was not read; take kernel triton")


@pytest.mark.slow
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_why_not_agrees_with_the_manifest(format, activation, gated):
    """At exactly a row's size it says no where the row lacks the tile that few tokens take."""
    path = pathlib.Path(__file__).parents[3] / "data" / "trtllm_gen_kernels.json"
    kind = "fp8_per_tensor" if format == "fp8" else format, "swiglu" if gated else "relu2"
    rows = json.loads(path.read_text("utf-8"))["rows"]
    rows = [row for row in rows if (row["format"], row["activation"]) == kind]
    assert len(rows) > 450
    form = LAYER | {"activation": activation, "gated": gated, "format": format}
    for row in rows:
        sizes = {name: row[name] for name in ("hidden_size", "intermediate_size")}
        kept = [why for why in why_not(TRTLLM.name, **form | sizes, padded=False) if "size" in why]
        assert bool(kept) != (8 in row["tiles"]), (row, kept)
