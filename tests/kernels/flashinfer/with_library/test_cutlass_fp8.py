"""Kernel `flashinfer_cutlass` with FP8 weights, with the GPU's part emulated.

Both formats round gate and up to bfloat16; in blocks the intermediate, too, before it is quantised.
Numbers are compared twice: without these roundings, and with them.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from flashinfer_contract import takes
from flashinfer_formats_layers import LIMIT, layer, with_scales
from flashinfer_formats_layers import expected_of_cutlass as expected
from fused_layers import LAYER, tokens
from fused_routers import build
from tiny_models import family

import fp4moe
from fp4moe import FusedExperts, why_not
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Routing, get_kernel
from fp4moe.kernels.flashinfer.library import library
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments
from fp4moe.reference import reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer", reason="needs flashinfer-python")

OP, FROM_LOGITS = torch.ops.fp4moe.moe.default, torch.ops.fp4moe.moe_from_logits.default
CUTLASS = get_kernel("flashinfer_cutlass")
FP8S = ("fp8", "fp8_block")
UNGATED = ("relu2", "relu", "silu", "gelu", "identity")
FORMS = [("silu", True), ("gelu", True), *((name, False) for name in UNGATED)]
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"
SITU = "silu_softcap(alpha=4,beta=2)"
# Rounding gate, up and their product to bfloat16 moves the intermediate by up to 3 x 2^-9; crossing
# a boundary of e4m3 costs a step of up to 2^-3 of a value. The mean square is the product of both.
ROUNDING_LIMIT = (3 * 2**-12) ** 0.5
# How far the numbers are from reference_w4a4's. In blocks, x * (448 / amax) and x / (amax / 448)
# differ by a last bit, which decides where a bfloat16 value is on a tie: a few in a hundred are.
APART = {"fp8": LIMIT, "fp8_block": 2**-5}


@pytest.fixture(autouse=True)
def hopper(claim):
    claim((9, 0))


@pytest.fixture
def exact(emulated, monkeypatch):
    """The emulator without the kernel's roundings between the GEMMs."""
    import flashinfer.fused_moe
    from flashinfer_cutlass_fp8 import emulate_cutlass_fp8

    recorded = flashinfer.fused_moe.cutlass_fused_moe

    @functools.wraps(recorded)
    def run(**kwargs):
        recorded(**kwargs)
        return emulate_cutlass_fp8(round_between=False, **kwargs)

    monkeypatch.setattr(flashinfer.fused_moe, "cutlass_fused_moe", run)
    return emulated


def absent():
    return torch.empty(0)


def run(weights, call, change=None):
    """Call the operator; change: of the operands, before the call."""
    prepared = CUTLASS.prepare(weights, hidden_alignment=256)
    operands = prepared.operands if change is None else change(prepared.operands)
    call = prepared.call(*call)
    return CUTLASS(call._replace(operands=operands))


@pytest.mark.parametrize("hidden, intermediate", [(256, 128), (272, 40), (130, 100), (384, 176)])
@pytest.mark.parametrize("activation, gated", FORMS)
@pytest.mark.parametrize("format", FP8S)
def test_numbers(exact, format, activation, gated, hidden, intermediate):
    weights = layer(format, hidden, intermediate, activation, gated)
    call = tokens(5, weights)
    got = FusedExperts(weights, CUTLASS.name)(*call)
    want = expected(weights, call)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert relative_error(got, want) < LIMIT
    assert relative_error(got, reference_w4a4(call[0], weights, *call[1:])) < APART[format]
    (made,) = exact.of("cutlass_fused_moe")
    assert made.get("use_deepseek_fp8_block_scale", False) is (format == "fp8_block")
    assert ("use_fused_finalize" in made) == takes("cutlass_fused_moe", "use_fused_finalize")
    wanted = torch.float8_e4m3fn if format == "fp8" else torch.bfloat16
    assert made["input"].dtype == wanted


@pytest.mark.parametrize("activation, gated", FORMS)
@pytest.mark.parametrize("format", FP8S)
def test_with_the_kernels_roundings(emulated, format, activation, gated):
    weights = layer(format, 256, 192, activation, gated)
    call = tokens(9, weights)
    got = run(weights, call)
    assert relative_error(got, expected(weights, call, rounds=True)) < LIMIT
    if format == "fp8_block":
        rounding = {"intermediate_dtype": CUTLASS.intermediate_dtype_for(format)}
        near = reference_w4a4(call[0], weights, *call[1:], **rounding)
        assert relative_error(got, near) < APART[format]
    assert (CUTLASS.intermediate_dtype_for(format) == torch.float32) == (format == "fp8")
    # They matter.
    assert LIMIT < relative_error(got, expected(weights, call)) < ROUNDING_LIMIT


DIFFERING = ["silu", "gelu", "silu(alpha=1.702,beta=0.5)", SITU]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", DIFFERING)
@pytest.mark.parametrize("gate, up", [(1.0, 4.0), (3.0, 0.7)])
def test_gate_and_up_of_fp8_may_have_scales_that_differ(exact, activation, gate, up, biased):
    weights = with_scales(layer("fp8", 256, 128, activation, biased=biased), gate, up)
    call = tokens(9, weights)
    if activation == SITU and "Situ" not in library().activation_names:
        assert "ActivationType.Situ" in why_not(CUTLASS.name, **HOPPER | {"activation": SITU})[0]
        return
    got = run(weights, call)
    # Biases are rounded to bfloat16, those of up after they are multiplied: 2^-9 of some products.
    limit = LIMIT + biased * 2**-6
    assert relative_error(got, expected(weights, call)) < limit
    equal = with_scales(weights, 1 / gate, 1 / up)
    assert relative_error(got, expected(equal, call)) > 10 * LIMIT


@pytest.mark.parametrize("activation", [OPENAI, "silu_step(limit=7)"])
def test_a_limit_wants_equal_scales(emulated, activation):
    weights = layer("fp8", 256, 128, activation)
    differing = with_scales(weights, 1.0, 2.0)
    text = r"kernel flashinfer_cutlass cannot take gate and up whose scales differ so, because one "
    text += r"limit and one scale hold for both in silu.*local experts \[0, 1, 2, 3\]"
    with pytest.raises(UnsupportedError, match=rf"^FusedExperts: {text}\. Use kernel triton\."):
        FusedExperts(differing, CUTLASS.name)
    FusedExperts(weights, CUTLASS.name)


@pytest.mark.parametrize("up", [0.0, 2.0**-60])
def test_a_scale_next_to_nothing_is_refused(emulated, up):
    weights = with_scales(layer("fp8"), 1.0, up)
    with pytest.raises(UnsupportedError, match="one of them is next to 0 beside the other"):
        FusedExperts(weights, CUTLASS.name)


@pytest.mark.parametrize("activation", [OPENAI, "silu(limit=0.5)", "silu(beta=-0.5)"])
@pytest.mark.parametrize("format", FP8S)
def test_parameters(exact, format, activation):
    weights = layer(format, 272, 40, activation)
    call = tokens(9, weights)
    got = run(weights, call)
    assert relative_error(got, expected(weights, call)) < LIMIT
    plain = dataclasses.replace(weights, activation="silu")
    assert relative_error(got, expected(plain, call)) > 10 * LIMIT


@pytest.mark.parametrize("activation, gated", [(OPENAI, True), ("silu", True), ("relu2", False)])
@pytest.mark.parametrize("format", FP8S)
def test_biases(exact, format, activation, gated):
    weights = layer(format, 272, 40, activation, gated, biased=True)
    call = tokens(9, weights)
    got = FusedExperts(weights, CUTLASS.name)(*call)
    assert relative_error(got, expected(weights, call)) < LIMIT
    without = dataclasses.replace(weights, gate_up_bias=None, down_bias=None)
    assert relative_error(got, expected(without, call)) > 10 * LIMIT


def test_block_scales_near_zero_do_not_lead_to_nan(exact):
    """At 1e-23 the intermediate is about 1e-40, and 448 / 1e-40 is infinite."""
    weights = layer("fp8_block", 128, 128, experts=1)
    weights.gate_up.block_scale[:] = 1e-23
    call = tokens(3, weights, top_k=1)
    assert run(weights, call).eq(0).all()

    from flashinfer_cutlass_fp8 import emulate_cutlass_fp8

    (made,) = exact.of("cutlass_fused_moe")
    kept = [torch.full_like(made["quant_scales"][0], 1e-23), made["quant_scales"][1]]
    assert emulate_cutlass_fp8(**made | {"quant_scales": kept}).isnan().any()


@pytest.mark.parametrize("format", FP8S)
def test_windows_dtypes_no_tokens_and_an_id_twice(exact, format):
    weights = layer(format, num_experts=9, expert_offset=3)
    x, ids, routing = tokens(7, weights, top_k=4)
    ids[0] = torch.tensor([-1, 9, 0, 8])
    ids[1, 3] = ids[1, 0]
    module = FusedExperts(weights, CUTLASS.name)
    want = expected(weights, (x, ids, routing))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = module(x.to(dtype), ids, routing)
        assert got.dtype == dtype and got[0].eq(0).all()
        assert relative_error(got, want) < LIMIT
    # More than one block sorts: then an id may be there once.
    many = [t.repeat(40, 1) for t in (x, ids, routing)]
    assert relative_error(module(*many), want.repeat(40, 1)) < LIMIT
    before = len(exact.calls)
    assert module(x[:0], ids[:0], routing[:0]).shape == (0, 256)
    assert len(exact.calls) == before


@pytest.mark.parametrize("format", FP8S)
def test_from_logits_chooses_outside_of_the_library(exact, format):
    weights, routing = layer(format, experts=8), Routing("softmax_topk", 2)
    x, logits = tokens(5, weights)[0], torch.randn(5, 8)
    prepared = CUTLASS.prepare(weights, hidden_alignment=256)
    arguments = nvfp4_moe_from_logits_arguments(prepared, routing, CUTLASS.name)
    got = FROM_LOGITS(x, logits, absent(), *arguments)
    want = expected(weights, (x, *route(logits, absent(), routing)))
    assert relative_error(got, want) < LIMIT


@pytest.mark.parametrize("format", FP8S)
def test_compiled_without_a_break(emulated, format, fresh_dynamo):
    weights = layer(format)
    module = FusedExperts(weights, CUTLASS.name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 5):
        call = tokens(count, weights)
        assert torch.equal(compiled(*call), module(*call))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gpt_oss"])
@pytest.mark.parametrize("format", FP8S)
def test_models(emulated, format, name):
    """Of transformers' classes: gated, without a gate, and with a limit and biases."""
    ids = torch.tensor([[17, 5, 9, 22, 7]])

    def outputs(kernel):
        model = (
            family(name, dtype=torch.bfloat16) if name == "gpt_oss" else build(name, torch.bfloat16)
        )
        fused = fp4moe.replace_moe(model, kernel, format=format, progress=False)
        with torch.no_grad():
            return fused(ids)[0].float()

    assert relative_error(outputs(CUTLASS.name), outputs("reference_w4a4")) < 2 * ROUNDING_LIMIT
    assert len(emulated.of("cutlass_fused_moe")) == 2


# What the emulator must not forgive.


def turned(name, axis):
    def change(operands):
        return operands._replace(**{name: getattr(operands, name).roll(1, axis)})

    return change


BREAKS = {
    "gate first": lambda o: o._replace(
        gate_up_packed=torch.cat(o.gate_up_packed.chunk(2, 1)[::-1], 1)
    ),
    "codes of down in other rows": turned("down_packed", 1),
    "another expert's codes": turned("down_packed", 0),
    "another expert's scales of down": turned("down_block_scale", 0),
    "another expert's scales of gate and up": turned("gate_up_block_scale", 0),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("format", FP8S)
def test_a_broken_preparation_shows(exact, format, name):
    weights = layer(format, 256, 256)
    call = tokens(9, weights)
    want = expected(weights, call)
    assert relative_error(run(weights, call), want) < LIMIT
    assert relative_error(run(weights, call, BREAKS[name]), want) > 10 * LIMIT


# The choice.

HOPPER = LAYER | {"activation": "silu", "format": "fp8", "capability": (9, 0)}
FP8_DEVICES = ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))


def test_devices_and_reasons():
    for capability in ((8, 0), (8, 6), *FP8_DEVICES):
        (*reasons,) = why_not(CUTLASS.name, **HOPPER | {"capability": capability})
        assert (not reasons) == (capability in FP8_DEVICES)
        block = HOPPER | {"capability": capability, "format": "fp8_block"}
        (*reasons,) = why_not(CUTLASS.name, **block)
        assert (not reasons) == (capability == (9, 0))
    (reason,) = why_not(CUTLASS.name, **block)
    assert reason == "needs compute capability 9.0, got 12.1"
    (reason,) = why_not(CUTLASS.name, **HOPPER | {"format": "fp8_channel"})
    assert reason.startswith("it has no layout for fp8_channel, only for nvfp4, fp8, fp8_block")
    (reason,) = why_not(CUTLASS.name, **HOPPER | {"activation": "relu2"})
    assert reason.startswith("activation must be one of silu, gelu_tanh, gelu, silu_step, ")
    sizes = {"hidden_size": 2880, "intermediate_size": 720}
    exact = why_not(CUTLASS.name, **HOPPER | sizes, padded=False)
    assert exact == ["intermediate_size must be a multiple of 32 without padding, got 720"]
    form = HOPPER | sizes | {"format": "fp8_block"}
    assert len(why_not(CUTLASS.name, **form, padded=False)) == 2


@pytest.mark.parametrize("capability", FP8_DEVICES)
@pytest.mark.parametrize("format", FP8S)
def test_nobody_gets_rounded_activations_unasked(claim, format, capability):
    """With 16-bit activations the model's numbers are other ones: only a name chooses this."""
    claim(capability)
    weights = layer(format, activation="gelu")
    assert FusedExperts(weights).kernel == "triton"
    if not why_not(CUTLASS.name, **HOPPER | {"format": format, "capability": capability}):
        assert FusedExperts(weights, CUTLASS.name).kernel == CUTLASS.name


def test_another_device_is_refused_at_the_call(claim):
    weights = layer("fp8_block")
    arguments = nvfp4_moe_arguments(CUTLASS.prepare(weights, hidden_alignment=256), CUTLASS.name)
    claim((12, 0))
    with pytest.raises(UnsupportedError, match=r"cannot run, because hidden .* capability 9\.0\."):
        OP(*tokens(2, weights), *arguments)
