"""Routing in front of a fused operator: named by its numbers, handed to the kernel on request."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math

import pytest
import torch
from fused_layers import layer
from moe_layers import hidden, moe_layer
from moe_writers import ROUTES, WRITERS, Model, Sizes, inputs
from tiny_models import CapturingBackend, enlarge_experts, gemma4, nemotron_h
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear

import fp4moe
from fp4moe.compile.backend import BackendOptions
from fp4moe.compile.tensorrt import lowering_pass
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import KERNELS
from fp4moe.passes import rewrite_exported, rewrite_moe
from fp4moe.passes.routing.fuse import fuse_routing

GIVEN = torch.ops.fp4moe.nvfp4_moe.default
FROM_LOGITS = torch.ops.fp4moe.nvfp4_moe_from_logits.default
FLOAT = torch.ops.fp4moe.float_moe.default
FLOAT_FROM_LOGITS = torch.ops.fp4moe.float_moe_from_logits.default
EXPERTS, TOP_K, SIZE = 8, 3, 32
# Weights of the routing in another order: a few of float32's 6e-8 each, and a sum over top_k.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


class Routed(nn.Module):
    """A linear router, `choose(self, logits)` -> (ids, weights), and fused experts."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        weights = layer(SIZE, 32, EXPERTS, gated=False, activation="relu2")
        self.experts = fp4moe.FusedExperts(weights)
        self.router = nn.Parameter(seeded(EXPERTS, SIZE), requires_grad=False)
        self.bias = nn.Parameter(0.3 * seeded(EXPERTS) - 1, requires_grad=False)
        self.scale = nn.Parameter(1 + 0.3 * seeded(EXPERTS), requires_grad=False)

    def forward(self, x):
        logits = linear(x, self.router)
        ids, weights = self.choose(self, logits)
        return self.experts(x, ids, weights)


def tokens(count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, SIZE, generator=generator).to(dtype)


def captured(model, x, dynamic=None):
    backend = CapturingBackend()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(x)
    return backend.graphs[0], backend.inputs[0]


def fuse(choose, dynamic=None, **options):
    """Fuse the routing of one model; returns match, output before and after, and the graph."""
    graph, inputs = captured(Routed(choose), tokens(), dynamic)
    with torch.no_grad():
        before = graph(*inputs)[0]
        (match,) = fuse_routing(graph, inputs, **options)
        return match, before, graph(*inputs)[0], graph


def renormalised(weights):
    return weights / weights.sum(-1, keepdim=True)


def softmax_first(self, logits):
    weights, ids = torch.softmax(logits, -1, dtype=torch.float32).topk(TOP_K)
    return ids, renormalised(weights)


def softmax_last(self, logits):
    values, ids = torch.topk(logits, TOP_K, dim=-1)
    return ids, values.softmax(-1)


def softmax_in_place(self, logits):
    weights, ids = logits.softmax(-1).topk(TOP_K)
    weights /= weights.sum(-1, keepdim=True)
    weights.mul_(2.5)
    return ids.to(torch.int32), weights


def softmax_by_hand(self, logits):
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    ids = powers.argsort(-1, descending=True)[:, :TOP_K]
    return ids, renormalised(powers.gather(1, ids))


def half_logits(self, logits):
    return softmax_first(self, logits * 0.5)


def scaled_experts(self, logits):
    ids, weights = softmax_first(self, logits)
    return ids, weights * self.scale[ids]


def sigmoid(self, logits):
    weights, ids = logits.sigmoid().topk(TOP_K)
    return ids, renormalised(weights)


def sigmoid_bias(self, logits):
    scores = logits.sigmoid()
    ids = (scores + self.bias).topk(TOP_K).indices
    return ids, renormalised(scores.gather(1, ids)) * 1.5


def sigmoid_bias_and_scale(self, logits):
    ids, weights = sigmoid_bias(self, logits)
    return ids, weights * self.scale[ids]


def in_groups(fill):
    def choose(self, logits):
        scores = logits.sigmoid()
        biased = scores + self.bias
        grouped = biased.view(-1, 4, 2)
        kept = grouped.topk(2, dim=-1)[0].sum(-1).topk(2, sorted=False)[1]
        mask = torch.zeros_like(grouped[:, :, 0])
        mask.scatter_(1, kept, 1)
        mask = mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, EXPERTS)
        ids = biased.masked_fill(~mask.bool(), fill).topk(TOP_K)[1]
        weights = scores.gather(1, ids)
        weights /= weights.sum(-1, keepdim=True) + 1e-20
        return ids, weights

    return choose


FUSED = {
    "softmax, top k, sum to 1": (softmax_first, "softmax_topk, renormalised"),
    "top k, softmax": (softmax_last, "softmax_topk, renormalised"),
    "softmax in place, times 2.5": (softmax_in_place, "softmax_topk, renormalised, times 2.5"),
    "softmax written out": (softmax_by_hand, "softmax_topk, renormalised"),
    "softmax of half the logits": (half_logits, "softmax_topk, renormalised"),
    "softmax, scaled experts": (
        scaled_experts,
        "softmax_topk, renormalised, times a factor per expert",
    ),
    "sigmoid": (sigmoid, "sigmoid_topk, renormalised"),
    "sigmoid, bias": (
        sigmoid_bias,
        "sigmoid_topk, renormalised, with a bias for the choice, times 1.5",
    ),
    "sigmoid, bias, scaled experts": (
        sigmoid_bias_and_scale,
        "sigmoid_topk, renormalised, with a bias for the choice, times 1.5, times a factor per "
        "expert",
    ),
    "sigmoid, bias, groups": (
        in_groups(-math.inf),
        "sigmoid_topk, renormalised, with a bias for the choice, 2 of 4 groups",
    ),
}


class TestFused:
    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [None, True])
    @pytest.mark.parametrize("name", FUSED)
    def test_method_and_numbers(self, name, dynamic):
        choose, method = FUSED[name]
        match, before, after, graph = fuse(choose, dynamic)
        assert (match.method, match.fused, match.reasons) == (method, True, ())
        targets = [node.target for node in graph.graph.nodes]
        assert FROM_LOGITS in targets and GIVEN not in targets
        torch.testing.assert_close(after, before, **CLOSE)
        # Nothing of the routing is left to run, in-place nodes included.
        words = ("topk", "softmax", "sigmoid", "scatter", "truediv", "sum", "sort", "gather")
        assert not [t for t in map(str, targets) for w in words if w in t and "fp4moe" not in t]

    def test_naming_changes_nothing(self):
        graph, inputs = captured(Routed(sigmoid_bias), tokens())
        text = str(graph.graph)
        (match,) = fuse_routing(graph, inputs, rewrite=False)
        assert match.method and not match.fused and not match.reasons
        assert str(graph.graph) == text

    def test_what_others_read_stays(self):
        class Losses(Routed):
            def forward(self, x):
                logits = linear(x, self.router)
                weights, ids = logits.softmax(-1).topk(TOP_K)
                weights /= weights.sum(-1, keepdim=True)
                return self.experts(x, ids, weights), weights, logits

        graph, inputs = captured(Losses(None), tokens())
        with torch.no_grad():
            before = graph(*inputs)
            (match,) = fuse_routing(graph, inputs)
            after = graph(*inputs)
        assert match.fused
        for actual, expected in zip(after, before, strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)

    def test_one_expert_a_token(self):
        def choose(self, logits):
            weights, ids = logits.softmax(-1).topk(1)
            return ids, renormalised(weights)

        match, before, after, _ = fuse(choose)
        assert match.fused
        torch.testing.assert_close(after, before, **CLOSE)


def not_renormalised(self, logits):
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return ids, weights


def raw_logits(self, logits):
    weights, ids = logits.topk(TOP_K)
    return ids, weights


def plain_sigmoid(self, logits):
    weights, ids = logits.topk(TOP_K)
    return ids, weights.sigmoid()


def smallest(self, logits):
    weights, ids = logits.softmax(-1).topk(TOP_K, largest=False)
    return ids, renormalised(weights)


def biased_weights(self, logits):
    weights, ids = (logits.sigmoid() + self.bias).topk(TOP_K)
    return ids, renormalised(weights)


def temperature(self, logits):
    ids = logits.topk(TOP_K).indices
    return ids, renormalised((0.5 * logits).softmax(-1).gather(1, ids))


def last_rank_doubled(self, logits):
    ids, weights = softmax_first(self, logits)
    weights[:, -1] *= 2
    return ids, weights


def shifted_ids(self, logits):
    ids, weights = softmax_first(self, logits)
    return (ids + 1) % EXPERTS, weights


def by_hidden(self, logits):
    ids, weights = softmax_first(self, logits)
    factors = 1 + 0.1 * (self.router.sum(1) * self.router[:, 0])
    return ids, weights * factors[ids]


LEFT = {
    "not renormalised": (not_renormalised, "softmax_topk", "no kernel routes by softmax_topk"),
    "the logits": (raw_logits, "the top k logits themselves", "no kernel routes by the top k"),
    "sigmoid of the largest": (plain_sigmoid, "sigmoid_topk", "no kernel routes by sigmoid_topk"),
    "the smallest": (smallest, None, "its numbers fit no known method"),
    "weights with the bias": (biased_weights, None, "its numbers fit no known method"),
    "temperature of the weights": (temperature, None, "its numbers fit no known method"),
    "the last doubled": (last_rank_doubled, None, "its numbers fit no known method"),
    "other ids": (shifted_ids, None, "its numbers fit no known method"),
    "groups filled with 0": (in_groups(0.0), None, "its numbers fit no known method"),
    "computed factors": (by_hidden, None, "it also reads"),
}


class TestLeft:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", LEFT)
    def test_named_or_not_and_unchanged(self, name, caplog):
        choose, method, reason = LEFT[name]
        match, before, after, graph = fuse(choose)
        assert (match.method, match.fused) == (method, False)
        assert reason in match.reasons[0]
        assert torch.equal(after, before)
        assert {GIVEN, FLOAT}.intersection(node.target for node in graph.graph.nodes)
        assert "keeps its routing" in caplog.text

    def test_given_from_outside(self):
        class Given(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = Routed(None).experts

            def forward(self, x):
                return self.experts(x, x[:, :2].long().abs() % EXPERTS, x[:, 2:4])

        graph, inputs = captured(Given(), tokens())
        (match,) = fuse_routing(graph, inputs)
        assert match.reasons == ("no [T, 8] tensor of logits leads to its ids and weights",)

    def test_a_factor_that_is_trained(self):
        model = Routed(scaled_experts)
        graph, inputs = captured(model, tokens())
        model.scale.requires_grad_(True)
        (match,) = fuse_routing(graph, inputs)
        assert "requires gradients" in match.reasons[0]

    def test_random_state_and_inputs_are_untouched(self):
        graph, inputs = captured(Routed(in_groups(-math.inf)), tokens())
        state, copies = torch.get_rng_state(), [value.clone() for value in inputs]
        fuse_routing(graph, inputs)
        assert torch.equal(state, torch.get_rng_state())
        assert all(map(torch.equal, inputs, copies))


@pytest.mark.parametrize(
    "name", sorted(n for n, k in KERNELS.items() if "nvfp4" in k.layouts and n != "humming")
)
def test_every_kernel_takes_the_factors_as_a_scale_of_down(name):
    # The pass relies on it: what a kernel makes of weights of down that are multiplied is the
    # product of one operand. Powers of two, for it may stand elsewhere in a product.
    weights, factors = layer(256, 128, EXPERTS), 2.0 ** torch.arange(EXPERTS)
    down = dataclasses.replace(weights.down, global_scale=weights.down.global_scale * factors)
    kernel = KERNELS[name]
    plain, scaled = (
        kernel.prepare(given, hidden_alignment=256).operands.named()
        for given in (weights, dataclasses.replace(weights, down=down))
    )
    plain["down_global_scale"] = plain["down_global_scale"] * factors
    assert all(torch.equal(plain[key], scaled[key]) for key in plain)


class TestModels:
    @pytest.mark.slow
    @pytest.mark.parametrize("make", [gemma4, nemotron_h])
    def test_backend(self, make):
        model = enlarge_experts(make()).requires_grad_(False)
        ids = torch.arange(10)[None]
        inner = CapturingBackend()
        options = {"inner_backend": inner, "routing": "fused", "on_no_match": "error"}
        run = torch.compile(model, backend=fp4moe.backend, options=options, fullgraph=True)
        with torch.no_grad():
            actual = run(ids, use_cache=False).logits
            fused = fp4moe.replace_moe(copy.deepcopy(model), progress=False, routing="fused")
            expected = fused(ids, use_cache=False).logits
        targets = [node.target for node in inner.graphs[0].graph.nodes]
        assert targets.count(FROM_LOGITS) == 2 and GIVEN not in targets
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("decomposed", [False, True])
    @pytest.mark.parametrize("name", ["gemma4", "nemotron_h", "qwen3_moe"])
    def test_exported(self, name, decomposed):
        model = moe_layer(name)
        if name == "qwen3_moe":
            model.gate.norm_topk_prob = True
        program = torch.export.export(model, (hidden(),), strict=False)
        program = program.run_decompositions() if decomposed else program
        given, report = rewrite_exported(program)
        assert [r.fused for r in report.routing] == [False] and not report.routing[0].reasons
        fused, report = rewrite_exported(program, routing="fused")
        assert [r.fused for r in report.routing] == [True]
        assert [n.target for n in fused.graph.nodes].count(FROM_LOGITS) == 1
        actual, expected = fused.module()(hidden()), given.module()(hidden())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert len(fused.graph.nodes) < len(given.graph.nodes)

    def test_bfloat16_keeps_its_logits(self):
        model = moe_layer(dtype=torch.bfloat16)
        program = torch.export.export(model, (hidden(dtype=torch.bfloat16),), strict=False)
        fused, _ = rewrite_exported(program, routing="fused")
        (operator,) = [n for n in fused.graph.nodes if n.target is FROM_LOGITS]
        assert operator.args[1].meta["val"].dtype == torch.bfloat16
        replaced = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
        actual, expected = (m(hidden(dtype=torch.bfloat16)) for m in (fused.module(), replaced))
        # One more rounding of weights to bfloat16 in neither: they differ in float32 only.
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize("fake", [False, True])
    @pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
    def test_rewrite_moe(self, name, fake):
        model = moe_layer(name)
        graph, values = captured(model, hidden())
        # A caller's fake mode must not turn probes and packed weights into fakes.
        with FakeTensorMode() if fake else contextlib.nullcontext():
            report = rewrite_moe(graph, values, routing="fused")
        assert report.count == 1 and report.routing[0].fused
        targets = [node.target for node in graph.graph.nodes]
        assert FLOAT_FROM_LOGITS in targets and FLOAT not in targets
        fused = fp4moe.replace_moe(copy.deepcopy(model), progress=False, routing="fused")
        with torch.no_grad():
            torch.testing.assert_close(graph(*values)[0], fused(hidden()), **CLOSE)

    def test_rewrite_moe_by_default_names_it(self):
        graph, values = captured(moe_layer(), hidden())
        (match,) = rewrite_moe(graph, values).routing
        assert (match.method, match.fused, match.reasons) == (
            "softmax_topk, renormalised, times a factor per expert",
            False,
            (),
        )
        with pytest.raises(UnsupportedError, match=r"^rewrite_moe: routing must be one of given"):
            rewrite_moe(graph, values, routing="fast")

    def test_a_graph_without_shapes(self):
        sizes = Sizes()
        graph, values = ROUTES["symbolic"](
            Model(WRITERS["batched_mm"](sizes, "silu", True)), inputs(sizes)
        )
        report = rewrite_moe(graph, values, routing="fused")
        assert report.count == 1 and not report.routing[0].fused
        assert report.routing[0].reasons[0].startswith("the graph carries no shapes; capture it")

    def test_report(self):
        program = torch.export.export(moe_layer(), (hidden(),), strict=False)
        _, report = rewrite_exported(program, routing="fused")
        text = (
            "experts: routing softmax_topk, renormalised, times a factor per expert, in the kernel"
        )
        assert str(report).splitlines()[-1] == text
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["routing"] == [
            {
                "path": "experts",
                "method": "softmax_topk, renormalised, times a factor per expert",
                "fused": True,
                "reasons": [],
            }
        ]

    def test_the_option_is_checked(self):
        with pytest.raises(
            UnsupportedError, match="rewrite_exported: routing must be one of given"
        ):
            rewrite_exported(
                torch.export.export(moe_layer(), (hidden(),), strict=False), routing="kernel"
            )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("kernel", "best"), ("hidden_alignment", 64), ("routing", "auto"), ("on_no_match", "raise")],
)
def test_each_way_in_names_itself_and_the_choices(setting, value):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    ways = {
        "rewrite_moe": lambda **given: rewrite_moe(graph, [torch.ones(1, 2)], **given),
        "rewrite_exported": lambda **given: rewrite_exported(program, **given),
        "inductor_options": lambda **given: fp4moe.inductor_options(**given),
        # Checked before torch_tensorrt is asked for.
        "lowering_pass": lambda **given: lowering_pass(**given).__enter__(),
        "backend": lambda **given: BackendOptions.parse(given),
    }
    for caller, way in ways.items():
        with pytest.raises(UnsupportedError, match=f"^{caller}: {setting} must be .*{value}"):
            way(**{setting: value})
