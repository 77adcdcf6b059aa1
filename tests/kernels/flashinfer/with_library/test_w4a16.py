"""Kernel `flashinfer_trtllm_w4a16`: MXFP4 weights with bfloat16 activations, the GPU emulated.

Nothing is quantised: `reference` judges. The intermediate and each expert's output are rounded to
bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from flashinfer_formats_layers import FROM_LOGITS, GIVEN, TRTLLM, layer
from fused_layers import LAYER, tokens
from tiny_models import family

import fp4moe
from fp4moe import FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing, get_kernel
from fp4moe.kernels.flashinfer.library import library
from fp4moe.kernels.operands import LogitsCall
from fp4moe.reference import reference, reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

W4A16 = get_kernel("flashinfer_trtllm_w4a16")
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"
# Three roundings to bfloat16, each of 2^-9 at most: intermediate, output, sum.
LIMIT = 3 * 2**-9
FORM = LAYER | {"activation": "silu", "format": "mxfp4"}


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


def expected(weights, call, definition=reference):
    x, ids, routing = call
    routing = routing if library().float32_weights else routing.bfloat16().float()
    return definition(x, weights, ids, routing)


@pytest.mark.parametrize("hidden, intermediate", [(256, 128), (272, 40), (130, 100), (384, 176)])
@pytest.mark.parametrize("activation", ["silu", OPENAI, "silu(limit=0.5)"])
@pytest.mark.parametrize("biased", [False, True])
def test_numbers(emulated, activation, biased, hidden, intermediate):
    weights = layer("mxfp4", hidden, intermediate, activation, biased=biased)
    call = tokens(5, weights)
    got = FusedExperts(weights, W4A16.name)(*call)
    want = expected(weights, call)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    apart = relative_error(got, want)
    assert apart < LIMIT
    # The other kernel rounds activations, and that shows.
    assert relative_error(got, expected(weights, call, reference_w4a4)) > 2 * apart
    (made,) = emulated.of(GIVEN["mxfp4"])
    assert made["hidden_states"].dtype == torch.bfloat16
    assert made["hidden_states_scale"] is None
    assert "hidden_states_scale_layout" not in made


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_windows_dtypes_and_many_tokens(emulated, monkeypatch, dtype):
    from fp4moe.kernels.flashinfer import trtllm

    weights = layer("mxfp4", num_experts=9, expert_offset=3)
    x, ids, routing = tokens(11, weights, top_k=3)
    ids[0] = torch.tensor([-1, 8, 0])
    monkeypatch.setattr(trtllm, "MOST_TOKENS", 4)
    got = FusedExperts(weights, W4A16.name)(x.to(dtype), ids, routing)
    assert got.dtype == dtype and got[0].eq(0).all()
    assert relative_error(got.float(), expected(weights, (x, ids, routing)).float()) < LIMIT
    assert len(emulated.of(GIVEN["mxfp4"])) == 3


def test_routing_in_the_kernel(emulated):
    weights, routing = (
        layer("mxfp4", 272, 40, OPENAI, experts=8, biased=True),
        Routing("softmax_topk", 3),
    )
    x, logits = tokens(5, weights)[0], torch.arange(40).view(5, 8).flip(1).float()
    prepared = W4A16.prepare(weights, hidden_alignment=256)
    call = LogitsCall(x, logits, torch.empty(0), routing, prepared.operands, weights.layer(3))
    assert W4A16.reasons_not_to_route(weights.layer(3), routing) == []
    ids, chosen = route(logits, torch.empty(0), routing)
    want = reference(x, weights, ids, chosen.bfloat16().float())
    assert relative_error(W4A16(call), want) < LIMIT
    assert len(emulated.of(FROM_LOGITS["mxfp4"])) == 1


def test_the_layout_is_that_of_w4a8(emulated):
    weights = layer("mxfp4", 272, 40, OPENAI, biased=True)
    ours, others = (k.prepare(weights, hidden_alignment=256) for k in (W4A16, TRTLLM))
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, others.tensors()[name]), name
    back = W4A16.restore(ours)
    for name, tensor in weights.tensors().items():
        same = back.tensors()[name]
        assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", ["gpt_oss", "privacy_filter"])
def test_models(emulated, name):
    ids = torch.tensor([[17, 5, 9, 22, 7]])

    def run(kernel):
        model = family(name, dtype=torch.bfloat16)
        fused = fp4moe.replace_moe(model, kernel, format="mxfp4", progress=False)
        with torch.no_grad():
            return fused(ids)[0].float()

    # Roundings to bfloat16 in two layers.
    assert relative_error(run(W4A16.name), run("reference")) < 2**-5
    assert len(emulated.of(GIVEN["mxfp4"])) == 2


def test_choice_and_refusals():
    assert why_not(W4A16.name, **FORM) == why_not(W4A16.name, **FORM, biased=True) == []
    assert not W4A16.quantizes_activations and TRTLLM.quantizes_activations
    # Faster or not, nobody gets it unasked.
    assert FusedExperts(layer("mxfp4")).kernel == TRTLLM.name
    (reason,) = why_not(W4A16.name, **FORM | {"activation": "relu2", "gated": False})
    assert reason == (
        "no mxfp4_w4a16 kernel for ungated relu2; there are kernels for gated silu (also with "
        "alpha, beta and limit); take format nvfp4 or kernel triton"
    )
    (reason,) = why_not(W4A16.name, **FORM | {"format": "nvfp4"})
    assert reason == "it has no layout for nvfp4, only for mxfp4"
    (reason,) = why_not(W4A16.name, **FORM | {"capability": (9, 0)})
    assert reason == "needs compute capability 10.0 or 10.3, got 9.0"
    exact = why_not(W4A16.name, **FORM | {"hidden_size": 2688}, padded=False)
    assert len(exact) == 1 and "the next size with one is 2816 x 768" in exact[0]
    with pytest.raises(UnsupportedError, match="kernel 'flashinfer_trtllm_w4a16' cannot run"):
        FusedExperts(layer("mxfp8"), W4A16.name)


def test_a_broken_preparation_shows(emulated):
    weights = layer("mxfp4", 256, 256)
    call = tokens(9, weights)
    prepared = W4A16.prepare(weights, hidden_alignment=256)
    want = expected(weights, call)
    assert relative_error(W4A16(prepared.call(*call)), want) < LIMIT
    for name in ("gate_up_packed", "gate_up_block_scale", "down_packed", "down_block_scale"):
        turned = getattr(prepared.operands, name).roll(1, 1)
        operands = prepared.operands._replace(**{name: turned})
        broken = W4A16(prepared.call(*call)._replace(operands=operands))
        assert relative_error(broken, want) > 10 * LIMIT, name


def test_the_contract_knows_bfloat16(emulated):
    weights = layer("mxfp4")
    FusedExperts(weights, W4A16.name)(*tokens(3, weights))
    (made,) = emulated.of(GIVEN["mxfp4"])

    from flashinfer.fused_moe import trtllm_fp4_block_scale_routed_moe as function
    from flashinfer_contract import installed_features
    from flashinfer_formats_contract import check_format_call, format_of

    assert format_of(made) == "mxfp4_w4a16"
    given = {"version_features": installed_features()}
    check_format_call(function.__wrapped__, (), made, **given)
    scale = torch.ones(3, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for change, text in (
        ({"hidden_states_scale": scale}, "hidden_states_scale must be None for bfloat16"),
        ({"output2_scale_scalar": torch.ones(4)}, "output2_scale_scalar must be None"),
    ):
        with pytest.raises(AssertionError, match=text):
            check_format_call(function.__wrapped__, (), made | change, **given)
