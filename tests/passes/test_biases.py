"""Experts with biases: found by data flow, decided by numbers, against `moe_definition`."""

from __future__ import annotations

import pytest
import torch
from biased_writers import BIASED, Gathered, Linears, parts_of
from moe_writers import ROUTES, Sizes, inputs
from tiny_models import Block, experts_class, routed
from torch import nn

import fp4moe
from fp4moe.experts import ExpertWeights
from fp4moe.passes import rewrite_exported, rewrite_moe
from fp4moe.reference import moe_definition

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIZES = Sizes()
# Float32 sums of up to 64 terms in another order, sqrt(64) * 2^-24 each, twice, ten-fold.
LIMIT = 1e-5


def definition(parts, args, activation="silu", weighted_input=False):
    """The layer on the weights that NVFP4 holds, and its biases as they are."""
    held = ExpertWeights.quantize(**parts, activation=activation).dequantize()
    hidden, ids, weights = args
    if not weighted_input:
        return moe_definition(*args, **held, activation=activation)
    spread = (hidden[:, None] * weights[..., None]).flatten(0, 1)
    ids, ones = ids.reshape(-1, 1), torch.ones(ids.numel(), 1)
    y = moe_definition(spread, ids, ones, **held, activation=activation)
    return y.view(*weights.shape, -1).sum(1)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def rewritten(model, args, route):
    graph, values = ROUTES[route](model, args)
    with torch.no_grad():
        report = rewrite_moe(graph, values)
        result = graph(*values)
    return report, result[0] if isinstance(result, (tuple, list)) else result


@pytest.mark.slow
@pytest.mark.parametrize("route", ["dynamo", "export", "export decomposed"])
@pytest.mark.parametrize("name", BIASED)
def test_ways_of_writing(name, route):
    parts, args = parts_of(SIZES), inputs(SIZES, router=False)
    report, actual = rewritten(BIASED[name](parts), args, route)
    assert report.count == 1, str(report)
    assert ", biases" in report.blocks[0].form
    weighted_input = name == "weighted input"
    assert error(actual, definition(parts, args, weighted_input=weighted_input)) < LIMIT
    # The definition would show each of the biases.
    for bias in ("gate_bias", "up_bias", "down_bias"):
        other = {**parts, bias: parts[bias] * 1.01}
        assert error(actual, definition(other, args, weighted_input=weighted_input)) > 1e-4


@pytest.mark.parametrize("name", ["gathered", "dense, baddbmm", "list of Linears"])
def test_without_a_gate(name):
    parts, args = parts_of(SIZES, gated=False), inputs(SIZES, router=False)
    report, actual = rewritten(BIASED[name](parts), args, "export")
    assert report.blocks[0].form == "silu, biases"
    assert error(actual, definition(parts, args)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("stamps", [{}, {"is_transposed": True}, {"has_gate": False}], ids=str)
def test_transformers_implementations(stamps, implementation):
    block = Block(experts_class(has_bias=True, **stamps), implementation)
    compiled = torch.compile(
        block,
        backend=fp4moe.backend,
        fullgraph=True,
        options={"inner_backend": "eager", "on_no_match": "error", "kernel": "reference"},
    )
    with torch.no_grad():
        actual = compiled(*routed(5))
    own = dict(block.experts.named_parameters())
    first = "gate_up" if stamps.get("has_gate", True) else "up"
    parts = {first: own[f"{first}_proj"], "down": own["down_proj"]}
    parts = {n: p.mT if stamps.get("is_transposed") else p for n, p in parts.items()}
    parts |= {f"{first}_bias": own[f"{first}_proj_bias"], "down_bias": own["down_proj_bias"]}
    assert error(actual, definition(parts, routed(5))) < LIMIT


class Multiplied(Gathered):
    """What stands where a bias would is a factor."""

    def forward(self, hidden, ids, weights):
        first = torch.einsum("th,tkih->tki", hidden, self.first[ids]) * self.first_bias[ids]
        y = torch.einsum("tki,tkhi->tkh", self.inner(first), self.down[ids]) + self.down_bias[ids]
        return (y * weights.unsqueeze(-1)).sum(1)


class Doubled(Gathered):
    """The bias of down is not weighted."""

    def forward(self, hidden, ids, weights):
        out = super().forward(hidden, ids, weights)
        return out + (self.down_bias[ids] * (1 - weights).unsqueeze(-1)).sum(1)


class UpAlone(Linears):
    """Only one of the three Linears has a bias."""

    def stored(self, parts):
        super().stored(parts)
        for expert in self.list:
            expert["gate"].bias = expert["down"].bias = None
        return {}


class Shared(Gathered):
    """One bias for all experts."""

    def stored(self, parts):
        stored = super().stored(parts)
        return stored | {"first_bias": stored["first_bias"][0]}

    def forward(self, hidden, ids, weights):
        first = torch.einsum("th,tkih->tki", hidden, self.first[ids]) + self.first_bias
        y = torch.einsum("tki,tkhi->tkh", self.inner(first), self.down[ids]) + self.down_bias[ids]
        return (y * weights.unsqueeze(-1)).sum(1)


NO_BIAS = {
    "a factor": (Multiplied, "its numbers fit no known form; closest is gated (gate_up)"),
    "not weighted": (Doubled, "its numbers fit no known form; closest is gated (gate_up) silu, bi"),
    "of up alone": (UpAlone, "it has biases, but none behind"),
    "of all experts": (Shared, "besides its weights; a bias or a scale?"),
}


@pytest.mark.parametrize("name", NO_BIAS)
def test_what_only_looks_like_biases(name):
    experts, reason = NO_BIAS[name]
    graph, values = ROUTES["export"](experts(parts_of(SIZES)), inputs(SIZES, router=False))
    before = str(graph.graph)
    report = rewrite_moe(graph, values)
    assert report.count == 0 and reason in "; ".join(report.near_misses[0].reasons), str(report)
    assert str(graph.graph) == before


def test_biases_of_another_dtype():
    experts = Gathered(parts_of(SIZES, dtype=torch.bfloat16))
    experts.down_bias.data = experts.down_bias.float()
    args = [a.bfloat16() if a.is_floating_point() else a for a in inputs(SIZES, router=False)]
    report = rewrite_moe(*ROUTES["export"](experts, tuple(args)))
    assert report.count == 0
    assert (
        "its weights and biases have several dtypes, torch.bfloat16, torch.float32"
        in (report.near_misses[0].reasons[-1])
    )


def routed_model(experts):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts
            self.router = nn.Linear(SIZES.hidden, SIZES.experts, bias=False).requires_grad_(False)
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, SIZES.experts), requires_grad=False)

        def forward(self, hidden):
            values, ids = self.router(hidden).softmax(-1).topk(SIZES.top_k)
            return self.experts(
                hidden, ids, values / values.sum(-1, keepdim=True) * self.scale[ids]
            )

    torch.manual_seed(0)
    return Routed()


def expected_of(model, parts, hidden):
    values, ids = (hidden @ model.router.weight.T).softmax(-1).topk(SIZES.top_k)
    weights = values / values.sum(-1, keepdim=True) * model.scale[ids]
    return definition(parts, (hidden, ids, weights))


class TestExported:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["interleaved, transposed", "list of Linears"])
    @pytest.mark.parametrize("routing", ["given", "fused"])
    def test_program_owns_biases(self, name, routing, tmp_path):
        parts, (hidden,) = parts_of(SIZES), inputs(SIZES)
        model = routed_model(BIASED[name](parts))
        program, report = rewrite_exported(
            torch.export.export(model, (hidden,)), kernel="reference", routing=routing
        )
        assert report.count == 1 and report.routing[0].fused == (routing == "fused"), str(report)
        fp4 = torch.ops.fp4moe
        operator = fp4.moe if routing == "given" else fp4.moe_from_logits
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(operator.default) == 1
        assert not any("experts" in name for name in program.state_dict)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        for each in (program, loaded):
            actual = each.module()(hidden)
            assert error(actual, expected_of(model, parts, hidden)) < LIMIT

    def test_a_second_rewrite_finds_it_fused(self):
        (hidden,) = inputs(SIZES)
        model = routed_model(Gathered(parts_of(SIZES)))
        program, _ = rewrite_exported(torch.export.export(model, (hidden,)), kernel="reference")
        again, report = rewrite_exported(program)
        assert again is program and (report.count, report.already_fused) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gathered", "list of Linears"])
@pytest.mark.parametrize("routing", ["given", "fused"])
def test_compiled(name, routing):
    parts, (hidden,) = parts_of(SIZES), inputs(SIZES)
    model = routed_model(BIASED[name](parts))
    options = {"kernel": "reference", "routing": routing, "inner_backend": "eager"}
    compiled = torch.compile(model, backend=fp4moe.backend, options=options, fullgraph=True)
    with torch.no_grad():
        assert error(compiled(hidden), expected_of(model, parts, hidden)) < LIMIT
        # The factors per expert multiply the biases of down, too, and are followed.
        model.scale.mul_(torch.linspace(1.0, 0.2, SIZES.experts))
        assert error(compiled(hidden), expected_of(model, parts, hidden)) < LIMIT
