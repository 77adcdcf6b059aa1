"""Activations with alpha, beta and limit: read off a region's numbers, then verified by others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from moe_writers import ROUTES, WRITERS, Sizes, inputs
from tiny_models import Block, CapturingBackend, experts_class, routed

from fp4moe.experts import ExpertWeights
from fp4moe.passes import rewrite_moe
from fp4moe.passes.judge import probes, verify
from fp4moe.passes.judge.read import read_forms
from fp4moe.reference import moe_definition

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "nothing_verified")

# Float32 sums of up to 64 terms in another order, sqrt(64) * 2^-24 each, twice, ten-fold.
LIMIT = 1e-5


def clamped(limit, alpha=1.0, beta=0.0):
    def combine(gate, up):
        gate = torch.minimum(gate, torch.tensor(limit))
        up = up.clip(-limit, limit)
        return gate / (1 + torch.exp(-alpha * gate)) * (up + beta)

    return combine


def step(limit):
    return lambda gate, up: F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


# What an experts class may compute -> its name.
KNOWN = {
    "silu(alpha=1.702,beta=1,limit=7)": clamped(7.0, 1.702, 1.0),
    "silu(limit=10)": clamped(10.0),
    "silu(limit=1.5)": clamped(1.5),
    "silu(limit=500)": clamped(500.0),
    "silu(limit=9000)": clamped(9000.0),
    "silu_step(limit=7)": step(7.0),
    # Above 13 silu and silu_step are one function in float32; silu is the name of both.
    "silu(limit=20)": step(20.0),
    "silu(alpha=1.702)": lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
    "silu(beta=-0.5)": lambda gate, up: F.silu(gate) * (up - 0.5),
    "gelu_tanh(limit=6)": lambda gate, up: (
        F.gelu(gate.clamp(max=6.0), approximate="tanh") * up.clamp(-6.0, 6.0)
    ),
    "relu(beta=1,limit=3)": lambda gate, up: gate.clamp(max=3.0).relu() * (up.clamp(-3, 3) + 1),
    "silu_softcap(alpha=4,beta=25)": lambda gate, up: (
        4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)
    ),
}


def gating(combine, **stamps):
    """An experts class of that function; `interleaved` rows instead of halves."""
    interleaved = stamps.pop("interleaved", False)

    class Gating(experts_class(**stamps)):
        def _apply_gate(self, both):
            halves = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, -1)
            return combine(*halves)

    return Gating


def capture(model, *given):
    backend = CapturingBackend()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*given)
    return backend.graphs[0], backend.inputs[0]


def rewrite(block, tokens=5, **settings):
    graph, values = capture(block, *routed(tokens))
    with torch.no_grad():
        report = rewrite_moe(graph, values, **settings)
        return report, graph(*values)[0]


def definition(block, activation, layout, tokens):
    own = block.experts
    first, down = own.gate_up_proj, own.down_proj
    first, down = (first.mT, down.mT) if own.is_transposed else (first, down)
    held = ExpertWeights.quantize(gate_up=first, down=down, layout=layout, activation=activation)
    return moe_definition(*routed(tokens), **held.dequantize(), activation=activation)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("activation", KNOWN)
def test_every_activation(activation):
    block = Block(gating(KNOWN[activation]))
    # Large enough that limits and caps of up to 10 are met.
    block.experts.gate_up_proj.mul_(8)
    report, actual = rewrite(block)
    assert report.blocks[0].form == f"gated (gate_up) {activation}", str(report)
    assert error(actual, definition(block, activation, "gate_up", 5)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "gate_up_interleaved"])
def test_every_storage(layout, transposed, tokens, implementation):
    activation = "silu(alpha=1.702,beta=1,limit=7)"
    function = KNOWN[activation]
    combine = function if layout != "up_gate" else lambda up, gate: function(gate, up)
    interleaved = layout.endswith("interleaved")
    experts = gating(combine, interleaved=interleaved, is_transposed=transposed)
    block = Block(experts, implementation)
    report, actual = rewrite(block, tokens)
    stored = ", transposed weights" if transposed else ""
    assert report.blocks[0].form == f"gated ({layout}) {activation}{stored}", str(report)
    assert error(actual, definition(block, activation, layout, tokens)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, w in WRITERS.items() if n != "interleaved"])
def test_ways_of_writing_without_a_gate(name):
    writer = WRITERS[name]
    if writer.gated_only:
        pytest.fail("it has no form without a gate")
    experts = writer(Sizes(), "silu", False)
    experts.act = lambda x: x * torch.sigmoid(1.702 * x)
    report = rewrite_moe(
        *ROUTES["export"](experts.requires_grad_(False), inputs(Sizes(), 7, False))
    )
    assert report.count == 1, str(report)
    assert report.blocks[0].form.startswith("silu(alpha=1.702)")


@pytest.mark.parametrize("name", WRITERS)
def test_ways_of_writing(name):
    experts = WRITERS[name](Sizes(), "silu", True)
    # A clamped gate alone is no form; with the product's factor it is silu of alpha.
    experts.act = lambda x: x * torch.sigmoid(0.75 * x)
    report = rewrite_moe(
        *ROUTES["export"](experts.requires_grad_(False), inputs(Sizes(), 7, False))
    )
    assert report.count == 1, str(report)
    assert " silu(alpha=0.75)" in report.blocks[0].form


# Near a form, but none: what comes closest is named.
NEAR = {
    "gate alone clamped": lambda gate, up: F.silu(gate.clamp(max=7.0)) * up,
    "up alone clamped": lambda gate, up: F.silu(gate) * up.clamp(-7.0, 7.0),
    "two limits": lambda gate, up: F.silu(gate.clamp(max=7.0)) * up.clamp(-8.0, 8.0),
    "gate clamped on both sides": lambda gate, up: (
        F.silu(gate.clamp(-0.5, 7.0)) * up.clamp(-7.0, 7.0)
    ),
    "up clamped above": lambda gate, up: F.silu(gate.clamp(max=7.0)) * up.clamp(max=7.0),
    "product clamped": lambda gate, up: (F.silu(gate) * up).clamp(-7.0, 7.0),
    "beyond what is read": lambda gate, up: F.silu(gate.clamp(max=2e4)) * up.clamp(-2e4, 2e4),
    "beta before the clamp": lambda gate, up: (
        F.silu(gate.clamp(max=7.0)) * (up + 1).clamp(-7.0, 7.0)
    ),
    "one channel apart": lambda gate, up: (
        KNOWN["silu(limit=10)"](gate, up) * (1 + (torch.arange(gate.shape[-1]) == 40) * 0.1)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR)
def test_what_is_no_form_is_left(name):
    graph, values = capture(Block(gating(NEAR[name])), *routed(5))
    report = rewrite_moe(graph, values)
    assert report.count == 0
    assert (
        "its numbers fit no known form; closest is gated (gate_up) "
        in (report.near_misses[0].reasons[0])
    )


@pytest.mark.parametrize("wrong", ["silu(limit=10.01)", "silu(alpha=1.001,limit=10)"])
def test_a_wrong_reading_shows(wrong, monkeypatch):
    def misread(gm, region, drawn, forms):
        read = read_forms(gm, region, drawn, forms)
        return [dataclasses.replace(form, activation=wrong) for form in read]

    monkeypatch.setattr(verify, "read_forms", misread)
    report, _ = rewrite(Block(gating(KNOWN["silu(limit=10)"])))
    assert report.count == 0
    assert f"closest is gated (gate_up) {wrong} with" in report.near_misses[0].reasons[0]


def test_a_limit_beyond_ordinary_inputs_needs_verification():
    # verify=False leaves out the large inputs on which it shows, as it says.
    block = Block(gating(KNOWN["silu(limit=500)"]))
    assert rewrite(block, verify=False)[0].blocks[0].form == "gated (gate_up) silu"
    # Else dynamo would take the numbers of both for inputs.
    torch._dynamo.reset()
    block = Block(gating(KNOWN["silu(alpha=1.702,beta=1,limit=7)"]))
    report, _ = rewrite(block, verify=False)
    assert report.blocks[0].form == "gated (gate_up) silu(alpha=1.702,beta=1,limit=7)"


def test_plain_activations_are_not_read(monkeypatch):
    def read(*_given):
        raise AssertionError("read")

    monkeypatch.setattr(verify, "read_forms", read)
    assert rewrite(Block(experts_class()))[0].blocks[0].form == "gated (gate_up) silu"


def test_a_number_of_dynamo_may_change():
    # Two blocks of one code and other limits: dynamo makes the limit an input of the second graph.
    first, second = (Block(gating(KNOWN[f"silu(limit={limit})"])) for limit in (10, 500))
    assert rewrite(first)[0].count == 1
    report, _ = rewrite(second)
    assert report.count == 0
    assert any("a number that may change from call to call" in r for r in report.blocks[0].reasons)


def test_rounds_that_plain_activations_take(monkeypatch):
    runs = []
    compute = verify.compute
    monkeypatch.setattr(verify, "compute", lambda *given: runs.append(given[2]) or compute(*given))
    assert rewrite(Block(experts_class()))[0].count == 1
    # Ordinary, large, and until every expert was chosen.
    assert len(runs) == 2 + len(list(probes.other_experts(runs[0])))
