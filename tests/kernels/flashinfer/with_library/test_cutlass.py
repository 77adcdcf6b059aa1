"""Kernel `flashinfer_cutlass` on the installed FlashInfer, with the GPU's part emulated.

The kernel rounds gate, up and the intermediate to bfloat16 before it is quantised. Numbers are
compared with `reference_w4a4` twice: both without these roundings, and both with them.
"""

from __future__ import annotations

import functools

import pytest
import torch
from flashinfer_contract import takes
from fused_layers import LAYER, layer, tokens

from fp4moe import FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing, get_kernel
from fp4moe.kernels.flashinfer.cutlass import merge_repeated, sorts_in_one_block
from fp4moe.kernels.flashinfer.library import library
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments
from fp4moe.reference import moe_definition, reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

OP = torch.ops.fp4moe.nvfp4_moe.default
CUTLASS = get_kernel("flashinfer_cutlass")
# As in test_trtllm.py.
LIMIT = 4e-3
UNGATED = ("relu2", "relu", "silu", "gelu", "identity")
FORMS = [("silu", True), ("gelu", True), *((name, False) for name in UNGATED)]


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((12, 0))


@pytest.fixture
def exact(emulated, monkeypatch):
    """The emulator without the kernel's roundings between the GEMMs."""
    import flashinfer.fused_moe
    from flashinfer_cutlass_emulator import emulate_cutlass_moe

    recorded = flashinfer.fused_moe.cutlass_fused_moe

    @functools.wraps(recorded)
    def run(**kwargs):
        recorded(**kwargs)
        return emulate_cutlass_moe(round_between=False, **kwargs)

    monkeypatch.setattr(flashinfer.fused_moe, "cutlass_fused_moe", run)
    return emulated


def arguments(weights):
    return nvfp4_moe_arguments(CUTLASS.prepare(weights, hidden_alignment=256), CUTLASS.name)


@pytest.mark.slow
@pytest.mark.parametrize("hidden, intermediate", [(128, 64), (272, 40), (130, 100), (384, 176)])
@pytest.mark.parametrize("activation, gated", FORMS)
def test_numbers(exact, activation, gated, hidden, intermediate):
    weights = layer(hidden, intermediate, activation=activation, gated=gated)
    call = tokens(5, weights)
    got = OP(*call, *arguments(weights))
    want = reference_w4a4(call[0], weights, call[1], call[2])
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert relative_error(got, want) < LIMIT
    (made,) = exact.of("cutlass_fused_moe")
    assert made.get("use_fused_finalize", False) is False
    assert ("use_fused_finalize" in made) == takes("cutlass_fused_moe", "use_fused_finalize")


def test_tanh_gelu_needs_the_newer_library(exact):
    newer = "GegluTanh" in library().module.ActivationType.__members__
    form = LAYER | {"capability": (12, 0)}
    reasons = why_not("flashinfer_cutlass", **form)
    assert reasons == ([] if newer else reasons[:1])
    weights = layer(activation="gelu_tanh")
    call = tokens(4, weights)
    if newer:
        want = reference_w4a4(call[0], weights, call[1], call[2])
        assert relative_error(OP(*call, *arguments(weights)), want) < LIMIT
    else:
        assert "GegluTanh" in reasons[0] and "newer flashinfer-python" in reasons[0]
        with pytest.raises(
            UnsupportedError, match=r"^moe: kernel flashinfer_cutlass cannot compute"
        ):
            OP(*call, *arguments(weights))


@pytest.mark.parametrize("activation, gated", FORMS)
def test_with_the_kernels_roundings(emulated, activation, gated):
    weights = layer(256, 192, activation=activation, gated=gated)
    call = tokens(9, weights)
    got = OP(*call, *arguments(weights))
    rounding = {"intermediate_dtype": CUTLASS.intermediate_dtype}
    assert relative_error(got, reference_w4a4(call[0], weights, *call[1:], **rounding)) < LIMIT
    # They matter: one value in a hundred takes the next code of the E2M1 grid.
    assert relative_error(got, reference_w4a4(call[0], weights, *call[1:])) > LIMIT


def test_from_logits_chooses_outside_of_the_library(exact):
    weights, routing = layer(experts=8), Routing("softmax_topk", 2)
    x, logits = tokens(5, weights)[0], torch.randn(5, 8)
    prepared = CUTLASS.prepare(weights, hidden_alignment=256)
    arguments = nvfp4_moe_from_logits_arguments(prepared, routing, CUTLASS.name)
    got = torch.ops.fp4moe.nvfp4_moe_from_logits.default(x, logits, torch.empty(0), *arguments)
    want = reference_w4a4(x, weights, *route(logits, torch.empty(0), routing))
    assert relative_error(got, want) < LIMIT


def test_windows_dtypes_and_no_tokens(exact):
    weights = layer(num_experts=9, expert_offset=3)
    x, ids, routing = tokens(7, weights, top_k=4)
    ids[0] = torch.tensor([-1, 9, 0, 8])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = OP(x.to(dtype), ids, routing, *arguments(weights))
        assert got.dtype == dtype and got[0].eq(0).all()
        assert relative_error(got, reference_w4a4(x, weights, ids, routing)) < LIMIT
    before = len(exact.calls)
    assert OP(x[:0], ids[:0], routing[:0], *arguments(weights)).shape == (0, 256)
    assert len(exact.calls) == before


@pytest.mark.parametrize("gated", [True, False])
def test_restore_is_exact(gated):
    weights = layer(272, 40, gated=gated, activation="silu", num_experts=5, expert_offset=1)
    prepared = CUTLASS.prepare(weights, hidden_alignment=256)
    back = CUTLASS.restore(prepared)
    assert back.metadata() == weights.metadata()
    for name, tensor in weights.tensors().items():
        assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_an_id_twice_in_a_row():
    """By hand, and against the definition, which sums both places."""
    ids = torch.tensor([[2, 0, 2, 2], [-1, 1, -1, 3]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 1.0, 0.25, 2.0], [float("nan"), 1.0, 7.0, 3.0]])
    merged, summed = merge_repeated(ids, weights)
    assert merged.tolist() == [[2, 0, -1, -1], [-1, 1, -1, 3]]
    assert summed[0, :2].tolist() == [2.75, 1.0] and summed[1, 1::2].tolist() == [1.0, 3.0]
    torch.manual_seed(3)
    x, ids = torch.randn(40, 8), torch.randint(-1, 3, (40, 5))
    weights = torch.rand(40, 5)
    up, down = torch.randn(3, 4, 8), torch.randn(3, 8, 4)
    fixed = {"up": up, "down": down, "activation": "relu"}
    want = moe_definition(x, ids, weights, **fixed)
    torch.testing.assert_close(moe_definition(x, *merge_repeated(ids, weights), **fixed), want)


@pytest.mark.parametrize(
    "tokens_, top_k, experts, one",
    [(256, 8, 128, True), (257, 8, 128, False), (1, 22, 512, False), (1, 3, 8, False)],
)
def test_ids_are_merged_where_the_librarys_sort_needs_it(exact, tokens_, top_k, experts, one):
    assert sorts_in_one_block(tokens_, top_k, experts) == one
    weights = layer(128, 64, experts=4)
    x, ids, routing = tokens(3, weights, top_k=3)
    ids[:, 1] = ids[:, 0]
    got = OP(x, ids, routing, *arguments(weights))
    assert relative_error(got, reference_w4a4(x, weights, ids, routing)) < LIMIT
    (made,) = exact.of("cutlass_fused_moe")
    assert made["token_selected_experts"][:, 1].eq(-1).all()


def test_choice_and_refusals(claim):
    erf = LAYER | {"activation": "gelu", "capability": (12, 1)}
    assert why_not("flashinfer_cutlass", **erf) == []
    exact = why_not("flashinfer_cutlass", **erf | {"hidden_size": 2880}, padded=False)
    assert exact == ["hidden_size must be a multiple of 128 without padding, got 2880"]
    (reason,) = why_not("flashinfer_cutlass", **erf | {"capability": (9, 0)})
    assert reason == "needs compute capability 12.0, 12.1, 10.0 or 10.3, got 9.0"
    (reason,) = why_not("flashinfer_cutlass", **erf | {"activation": "relu2"})
    assert reason.startswith("activation must be one of silu, gelu_tanh, gelu, silu_step, ")
    # What TRT-LLM-Gen lacks on SM100 goes here by itself; what it has does not.
    assert FusedExperts(layer()).kernel == "flashinfer_cutlass"
    claim((10, 0))
    assert FusedExperts(layer()).kernel == "flashinfer_trtllm"
    assert FusedExperts(layer(activation="relu", gated=False)).kernel == "flashinfer_cutlass"
    assert FusedExperts(layer(activation="relu", gated=True)).kernel == "triton"
    weights = layer()
    claim((8, 9))
    with pytest.raises(UnsupportedError, match=r"^moe: kernel flashinfer_cutlass cannot run, "):
        OP(*tokens(2, weights), *arguments(weights))
