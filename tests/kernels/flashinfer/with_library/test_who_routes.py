"""What FlashInfer can do only where it chooses the experts itself, in compiled models.

FP8 before 0.7 and biased MXFP8 from 0.7 on have one function, and it routes. The models are
transformers' own, small; FlashInfer's GPU part is emulated (conftest.py).
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from flashinfer_formats_layers import FROM_LOGITS, GIVEN, LIMIT, TRTLLM, layer
from fused_layers import LAYER
from fused_routers import build
from tiny_models import family
from torch._dynamo.exc import BackendCompilerFailed

import fp4moe
from fp4moe import FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing
from fp4moe.kernels.flashinfer.library import library
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")

ROUTES_ONLY = GIVEN["fp8"] not in library().arguments
BIASES = "gemm1_bias" in library().arguments[FROM_LOGITS["mxfp8"]]
IDS = torch.tensor([[17, 5, 99, 42, 7]]) % 32
# Weights of the routing are bfloat16 there; a value of e4m3 next to a tie may take the other side.
MODEL_LIMIT = 5e-2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


def run(model):
    with torch.no_grad():
        return model(IDS)[0].float()


def compiled(model, **options):
    own = {"on_no_match": "error", "routing": "fused", "inner_backend": "eager", **options}
    return torch.compile(model, backend=fp4moe.backend, options=own, fullgraph=True)


def blocks(model) -> int:
    return sum(isinstance(m, FusedExperts) for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_fp8_whose_experts_the_library_chooses(emulated, name):
    model = build(name, torch.bfloat16)
    options = {"format": "fp8", "routing": "fused", "progress": False}
    want = run(fp4moe.replace_moe(copy.deepcopy(model), "reference_w4a4", **options))
    fused = fp4moe.replace_moe(copy.deepcopy(model), TRTLLM.name, **options)
    got = run(compiled(fused))
    assert relative_error(got, want) < MODEL_LIMIT
    assert len(emulated.of(FROM_LOGITS["fp8"])) == blocks(fused) == 2
    # Nobody routes for it outside a compiled graph: it says so where it cannot take ids.
    if ROUTES_ONLY:
        with pytest.raises(UnsupportedError, match=r"^moe: .* pass routing='fused' in replace_moe"):
            run(fused)
        with pytest.raises(UnsupportedError, match="which takes experts that were chosen"):
            fp4moe.replace_moe(model, TRTLLM.name, format="fp8", progress=False)
    else:
        assert relative_error(run(fused), want) < MODEL_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_fp8_from_float_weights(emulated, name):
    """The backend alone: it packs, and hands the choice to the library."""
    model = build(name, torch.bfloat16)
    options = {"format": "fp8", "routing": "fused", "progress": False}
    want = run(fp4moe.replace_moe(copy.deepcopy(model), "reference_w4a4", **options))
    assert (
        relative_error(run(compiled(model, kernel=TRTLLM.name, format="fp8")), want) < MODEL_LIMIT
    )
    assert len(emulated.of(FROM_LOGITS["fp8"])) == 2


@pytest.mark.slow
def test_from_a_checkpoint(emulated, tmp_path):
    build("nemotron_h", torch.bfloat16).save_pretrained(tmp_path)
    options = {"format": "fp8", "routing": "fused", "progress": False}
    want = run(fp4moe.from_pretrained(tmp_path, kernel="reference_w4a4", **options))
    fused = fp4moe.from_pretrained(tmp_path, kernel=TRTLLM.name, **options)
    assert relative_error(run(compiled(fused)), want) < MODEL_LIMIT
    assert len(emulated.of(FROM_LOGITS["fp8"])) == 2


@pytest.mark.slow
def test_biases_of_mxfp8_where_the_library_chooses(emulated):
    model = family("gpt_oss", dtype=torch.bfloat16)
    options = {"format": "mxfp8", "progress": False}
    text = "has no biases with mxfp8 weights, only trtllm_fp8_block_scale_moe; pass routing='fused'"
    with pytest.raises(UnsupportedError, match=text):
        fp4moe.replace_moe(copy.deepcopy(model), TRTLLM.name, **options)
    program = compiled(model, kernel=TRTLLM.name, format="mxfp8")
    if not BIASES:
        with pytest.raises(BackendCompilerFailed, match="installed FlashInfer has no biases in "):
            run(program)
        return
    got = run(program)
    want = run(fp4moe.replace_moe(copy.deepcopy(model), "reference_w4a4", **options))
    assert relative_error(got, want) < MODEL_LIMIT
    assert len(emulated.of(FROM_LOGITS["mxfp8"])) == 2


@pytest.mark.skipif(not BIASES, reason="needs FlashInfer 0.7")
@pytest.mark.slow
def test_a_router_that_the_library_lacks_is_refused(emulated):
    """The weights of this one are a softmax over top_k: the graph keeps its router."""
    program = compiled(family("privacy_filter"), kernel=TRTLLM.name, format="mxfp8")
    with pytest.raises(UnsupportedError, match=r"^moe: kernel flashinfer_trtllm cannot run"):
        run(program)
    assert emulated.calls == []


class Routed(torch.nn.Module):
    """A user's own block around fused experts."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        generator = torch.Generator().manual_seed(0)
        self.router = torch.randn(experts.num_experts, 256, generator=generator) / 16

    def forward(self, hidden):
        scores = torch.softmax(hidden.float() @ self.router.T, -1)
        weights, ids = scores.topk(2, -1)
        return self.experts(hidden, ids, weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "format, activation, gated", [("fp8", "silu", True), ("mxfp8", "relu2", False)]
)
def test_a_block_of_ones_own(emulated, format, activation, gated):
    biased = format == "mxfp8"
    weights = layer(format, 256, 128, activation, gated, experts=8, biased=biased)
    if biased and not BIASES:
        with pytest.raises(UnsupportedError, match="the installed FlashInfer has no biases in "):
            FusedExperts(weights, TRTLLM.name, routing="fused")
        return
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        got = compiled(Routed(FusedExperts(weights, TRTLLM.name, routing="fused")))(x)
        want = Routed(FusedExperts(weights, "reference_w4a4"))(x)
    assert relative_error(got, want) < LIMIT
    (made,) = emulated.of(FROM_LOGITS[format])
    assert ("gemm1_bias" in made) == biased


@pytest.mark.parametrize("format, biased", [("fp8", False), ("mxfp8", True)])
def test_the_choice_knows_who_routes(emulated, format, biased):
    weights = layer(format, experts=8, biased=biased)
    form = LAYER | {"activation": "silu", "format": format, "biased": biased}
    for routing, able in (
        ("given", not biased and not ROUTES_ONLY),
        ("fused", BIASES or not biased),
    ):
        reasons = why_not(TRTLLM.name, **form, routing=routing)
        assert (not reasons) == able, reasons
        if able:
            assert FusedExperts(weights, TRTLLM.name, routing=routing).kernel == TRTLLM.name
        else:
            with pytest.raises(UnsupportedError, match=r"^FusedExperts: kernel 'flashinfer_trt"):
                FusedExperts(weights, TRTLLM.name, routing=routing)
        # "auto" gives a module that runs in eager mode, too.
        automatic = FusedExperts(weights, routing=routing).kernel
        assert automatic == ("triton" if biased or ROUTES_ONLY else TRTLLM.name)
    chosen = dataclasses.replace(weights.layer(2), num_experts=8)
    reasons = TRTLLM.reasons_not_to_route(chosen, Routing("softmax_topk", 2))
    assert (not reasons) == (BIASES or not biased)


def test_routing_is_given_or_fused():
    weights = layer("mxfp4")
    with pytest.raises(UnsupportedError, match="FusedExperts: routing must be one of given, fused"):
        FusedExperts(weights, routing="kernel")
    with pytest.raises(UnsupportedError, match="why_not: routing must be one of given, fused"):
        why_not("auto", **LAYER, routing="kernel")
