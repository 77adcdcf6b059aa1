"""The rewrite of a captured graph: what matches, what only looks alike, and what stays."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest
import torch
from moe_writers import LargestStorage
from tiny_models import Block, CapturingBackend, experts_class, routed
from torch import nn

import fp4moe
from fp4moe.activations import ACTIVATIONS
from fp4moe.errors import UnsupportedError
from fp4moe.passes import rewrite_moe
from fp4moe.passes.find.by_flow import propose_regions
from fp4moe.passes.graph import execute
from fp4moe.passes.graph.dataflow import Flow
from fp4moe.passes.graph.show import show_graph
from fp4moe.passes.insert import FUSED_OPERATORS
from fp4moe.passes.judge import probes, verify
from fp4moe.passes.judge.forms import possible_forms
from fp4moe.passes.judge.verify import judge_region
from fp4moe.testing import relative_error

expecttest = pytest.importorskip("expecttest", reason="optional package")
assert_expected_inline = expecttest.assert_expected_inline

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "nothing_verified")

Gated = experts_class()
Plain = experts_class(has_gate=False, act_fn=nn.ReLU)


def capture(model, *inputs, dynamic=None):
    """The graph of one call as dynamo hands it to a backend, and its inputs."""
    backend = CapturingBackend()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (graph,), (values,) = backend.graphs, backend.inputs
    return graph, values


def rewrite(model, tokens=5, **settings):
    graph, values = capture(model, *routed(tokens))
    with torch.no_grad():
        report = rewrite_moe(graph, values, **settings)
        return report, graph(*values)[0], graph


def region_of(graph):
    (regions,) = propose_regions(Flow(graph.graph))
    return next(regions)


def operators(graph):
    return [node for node in graph.graph.nodes if node.target in FUSED_OPERATORS]


def replaced(block):
    block = fp4moe.replace_moe(copy.deepcopy(block), progress=False)
    with torch.no_grad():
        return block(*routed(5))


class TestReport:
    def test_one_rewritten_and_one_not(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.good, self.clamped = Block(Gated), Block(with_gate(clamped))

            def forward(self, hidden, ids, weights):
                return self.good(hidden, ids, weights) + self.clamped(hidden, ids, weights)

        report, _, graph = rewrite(Both())
        assert report.count == 1 and report.already_fused == 0 and len(report.blocks) == 2
        assert [block.path for block in report.near_misses] == ["clamped.experts"]
        assert len(operators(graph)) == 1
        plain = report.to_dict()
        assert json.loads(json.dumps(plain)) == {
            "count": 1,
            "already_fused": 0,
            "blocks": [
                {
                    "path": "good.experts",
                    "module": "Experts",
                    "rewritten": True,
                    "form": "gated (gate_up) silu",
                    "format": "nvfp4",
                    "kernel": "reference",
                    "reasons": [],
                },
                {
                    "path": "clamped.experts",
                    "module": "Gating",
                    "rewritten": False,
                    "form": None,
                    "format": None,
                    "kernel": None,
                    "reasons": list(report.blocks[1].reasons),
                },
            ],
            "routing": [
                {
                    "path": "good.experts",
                    "method": None,
                    "fused": False,
                    "reasons": ["no [T, 8] tensor of logits leads to its ids and weights"],
                }
            ],
        }
        report = dataclasses.replace(
            report,
            routing=(),
            blocks=(report.blocks[0], dataclasses.replace(report.blocks[1], reasons=("a", "b"))),
        )
        assert_expected_inline(
            str(report),
            """\
block            module   rewritten  form                  format  kernel
good.experts     Experts  yes        gated (gate_up) silu  nvfp4   reference
clamped.experts  Gating   no         -                     -       -
clamped.experts: a; b
1 of 2 blocks rewritten""",
        )

    def test_second_rewrite_finds_it_fused(self):
        graph, values = capture(Block(Gated), *routed(5))
        with torch.no_grad():
            rewrite_moe(graph, values)
            before = show_graph(graph)
            report = rewrite_moe(graph, values)
        assert (report.count, report.already_fused) == (0, 1)
        assert show_graph(graph) == before
        assert "1 already fused" in str(report)

    def test_nothing_to_do(self):
        graph, values = capture(nn.Linear(4, 4), torch.ones(2, 4))
        before = str(graph.graph)
        assert rewrite_moe(graph, values).to_dict() == {
            "count": 0,
            "already_fused": 0,
            "blocks": [],
            "routing": [],
        }
        assert str(graph.graph) == before


def overriding(forward):
    """Experts with this forward, marked as wrapped so that it counts as stamped."""

    class Overriding(Gated):
        pass

    Overriding.forward = functools.wraps(Gated.forward)(forward)
    return Overriding


def with_gate(function):
    class Gating(Gated):
        def _apply_gate(self, both):
            return function(*both.chunk(2, dim=-1))

    return Gating


def twice(self, *inputs):
    return Gated.forward(self, *inputs) * 2


def plus_input(self, hidden, ids, weights):
    return Gated.forward(self, hidden, ids, weights) + hidden


def weights_squared(self, hidden, ids, weights):
    return Gated.forward(self, hidden, ids, weights * weights)


def next_expert(self, hidden, ids, weights):
    return Gated.forward(self, hidden, (ids + 1) % 8, weights)


class Scaled(Gated):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(64))


def scaled_by_a_parameter(self, hidden, ids, weights):
    return Gated.forward(self, hidden, ids, weights) * self.scale


Scaled.forward = functools.wraps(Gated.forward)(scaled_by_a_parameter)


def changes_hidden(self, hidden, ids, weights):
    out = Gated.forward(self, hidden, ids, weights)
    hidden.mul_(2)
    return out


def changes_ids(self, hidden, ids, weights):
    out = Gated.forward(self, hidden, ids, weights)
    ids.zero_()
    return out


def changes_a_weight(self, hidden, ids, weights):
    out = Gated.forward(self, hidden, ids, weights)
    self.down_proj.mul_(1)
    return out


def noisy(self, hidden, ids, weights):
    return Gated.forward(self, hidden, ids, weights) * (1 + torch.rand(()))


def clamped(gate, up):
    return nn.functional.silu(gate).clamp(max=0.5) * up


def weights_ignored(self, hidden, ids, weights):
    return Gated.forward(self, hidden, ids, torch.ones_like(weights))


def changes_hidden_meanwhile(self, hidden, ids, weights):
    self.__dict__["now"] = hidden
    return Gated.forward(self, hidden, ids, weights)


class ChangesHidden(overriding(changes_hidden_meanwhile)):
    def _apply_gate(self, both):
        self.now.mul_(2)
        return Gated._apply_gate(self, both)


def noisy_gate(gate, up):
    return nn.functional.silu(gate) * up * (1 + torch.rand(()))


def ids_of_a_table(self, hidden, ids, weights):
    return Gated.forward(self, hidden, torch.arange(2)[ids], weights)


NO_FORM = "its numbers fit no known form; closest is gated "
NEAR = {
    "clamp in the gate": (with_gate(clamped), NO_FORM),
    "another expert": (overriding(next_expert), NO_FORM),
    "noise": (with_gate(noisy_gate), NO_FORM),
    "hidden changed": (ChangesHidden, "one of its inputs is changed by mul_ meanwhile"),
    "tanh": (experts_class(act_fn=nn.Tanh), NO_FORM),
}

# Around a layer: found inside, and left as it is.
AROUND = {
    "output times two": overriding(twice),
    "input added": overriding(plus_input),
    "weights squared": overriding(weights_squared),
    "weights ignored": overriding(weights_ignored),
    "hidden changed": overriding(changes_hidden),
    "ids changed": overriding(changes_ids),
    "weight changed": overriding(changes_a_weight),
    "noise": overriding(noisy),
    "scale of ones": Scaled,
}


def on_grid(block):
    """The block with weights that NVFP4 holds exactly."""
    for weight in block.parameters():
        if weight.ndim == 3:
            # One block scale and one global scale: the codes alone carry the value.
            codes = torch.tensor([-6.0, -3.0, -1.5, -0.5, 0.0, 0.5, 1.0, 4.0, 6.0])
            drawn = codes[torch.randint(9, weight.shape)]
            drawn[..., ::4] = drawn[..., ::4].sign() * 6 + 6 * (drawn[..., ::4] == 0)
            drawn[:, ::4] = drawn[:, ::4].sign() * 6 + 6 * (drawn[:, ::4] == 0)
            weight.copy_(drawn / 32)
    return block


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("what", AROUND)
def test_what_stands_around_a_layer_stays(what, implementation):
    block = on_grid(Block(AROUND[what], implementation))
    inputs, expected_inputs = routed(5), routed(5)
    graph, values = capture(block, *routed(5))
    assert rewrite_moe(graph, values).count == 1 and len(operators(graph)) == 1
    compiled = torch.compile(
        copy.deepcopy(block), backend=fp4moe.backend, options={"inner_backend": "eager"}
    )
    with torch.no_grad():
        torch.manual_seed(3)
        expected = block(*expected_inputs)
        torch.manual_seed(3)
        actual = compiled(*inputs)
    # Float32 sums of 64 and 48 terms in another order: sqrt(64) * 2^-24 each, five-fold.
    assert relative_error(actual, expected) < 5e-6
    assert all(map(torch.equal, inputs, expected_inputs))


class TestNearMisses:
    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("what", NEAR)
    def test_is_left_with_its_reason(self, what, implementation):
        experts, reason = NEAR[what]
        graph, values = capture(Block(experts, implementation), *routed(5))
        before = str(graph.graph)
        with torch.no_grad():
            report = rewrite_moe(graph, values)
        assert report.count == 0
        (block,) = report.near_misses
        assert block.kernel is None
        assert any(reason in said for said in block.reasons)
        assert str(graph.graph) == before

    def test_does_not_run_on_other_ids(self):
        hidden, _, weights = routed(5)
        ids = torch.tensor([[0, 1]]).expand(5, 2)
        block = Block(overriding(ids_of_a_table))
        report = rewrite_moe(*capture(block, hidden, ids, weights))
        (reason,) = report.near_misses[0].reasons
        assert reason.startswith("it does not run by itself on random numbers: index ")

    def test_number_that_may_change(self):
        # With dynamic=True a float attribute becomes an input of the graph.
        class Factor(Gated):
            factor = 1.5

            def _apply_gate(self, both):
                gate, up = both.chunk(2, dim=-1)
                return nn.functional.silu(gate) * up * self.factor

        block = Block(Factor)
        block.experts.factor = 1.5
        report = rewrite_moe(*capture(block, *routed(5), dynamic=True))
        assert report.near_misses[0].reasons == (
            "it reads item, a number that may change from call to call",
        )

    def test_four_stacked_weights(self):
        class Twofold(Gated):
            def __init__(self, config):
                super().__init__(config)
                self.more, self.last = (
                    copy.deepcopy(self.gate_up_proj),
                    nn.Parameter(torch.randn(8, 64, 64)),
                )

            def forward(self, hidden, ids, weights):
                both = torch.einsum("th,tkih->tki", hidden, self.gate_up_proj[ids])
                more = torch.einsum("th,tkih->tki", hidden, self.more[ids])
                inner = nn.functional.silu(both[..., :48]) * more[..., 48:]
                out = torch.einsum("tki,tkhi->tkh", inner, self.down_proj[ids])
                out = torch.einsum("tkh,tkoh->tko", out, self.last[ids])
                return (out * weights[..., None]).sum(1)

        report, _, _ = rewrite(Block(Twofold))
        (reason,) = report.near_misses[0].reasons
        assert reason.startswith("its weights ") and "[8, 64, 64]" in reason
        assert reason.endswith(
            "are not one up projection, or gate and up, followed by one down projection"
        )

    def test_weights_made_in_the_graph(self):
        class Made(Block):
            def forward(self, hidden, ids, weights):
                self.experts.__dict__["gate_up_proj"] = self.raw * 2
                return self.experts(hidden, ids, weights)

        block = Made(Gated)
        block.raw = block.experts.gate_up_proj
        del block.experts.gate_up_proj
        report, _, _ = rewrite(block)
        assert report.near_misses[0].reasons[0].startswith("its weights are computed in the graph")


class SquaredReLU(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x) ** 2


def interleaved_gate(self, both):
    return nn.functional.silu(both[..., ::2]) * both[..., 1::2]


def form_class(name):
    if name == "gated (gate_up_interleaved) silu":
        cls = experts_class(is_concatenated=False)
        cls._apply_gate = interleaved_gate
        return cls
    return {
        "gated (gate_up) silu": Gated,
        "gated (gate_up) gelu": experts_class(act_fn=nn.GELU),
        "gated (gate_up) gelu_tanh": experts_class(
            act_fn=functools.partial(nn.GELU, approximate="tanh")
        ),
        "gated (up_gate) silu": with_gate(lambda up, gate: nn.functional.silu(gate) * up),
        "gated (gate_up) silu, transposed weights": experts_class(is_transposed=True),
        "relu": Plain,
        "relu2": experts_class(has_gate=False, act_fn=SquaredReLU),
        "relu2, transposed weights": experts_class(
            has_gate=False, act_fn=SquaredReLU, is_transposed=True
        ),
        "gated (gate_up) identity": experts_class(act_fn=nn.Identity),
    }[name]


FORMS = (
    "gated (gate_up) silu",
    "gated (gate_up) gelu",
    "gated (gate_up) gelu_tanh",
    "gated (up_gate) silu",
    "gated (gate_up_interleaved) silu",
    "gated (gate_up) silu, transposed weights",
    "gated (gate_up) identity",
    "relu",
    "relu2",
    "relu2, transposed weights",
)


def float_output(block):
    with torch.no_grad():
        return block(*routed(5))


class TestForms:
    @pytest.mark.slow
    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("form", FORMS)
    def test_is_told_from_its_numbers(self, form, implementation):
        block = Block(form_class(form), implementation)
        before = float_output(block)
        report, actual, _ = rewrite(block)
        assert report.blocks[0].form == form
        assert report.count == 1
        # Two GEMMs with NVFP4 weights, each of relative error 0.08 to 0.1; the forms differ by
        # 0.3 and more, except for the two GELUs, which the name above tells apart.
        assert relative_error(actual, before) < 0.2

    @pytest.mark.parametrize("form", ["gated (up_gate) silu", "relu2, transposed weights"])
    def test_exact_on_weights_that_nvfp4_holds(self, form):
        block = on_grid(Block(form_class(form)))
        before = float_output(block)
        report, actual, _ = rewrite(block)
        assert report.count == 1
        # Float32 sums of 64 and 48 terms in another order: sqrt(64) * 2^-24 each, five-fold.
        assert relative_error(actual, before) < 5e-6

    @pytest.mark.slow
    def test_square_weights(self):
        # H = I: shapes tell nothing about transposition.
        class Square(Plain):
            def __init__(self, config):
                super().__init__(config)
                self.up_proj = nn.Parameter(torch.randn(8, 64, 64) / 8)
                self.down_proj = nn.Parameter(torch.randn(8, 64, 64) / 8)

        report, _, _ = rewrite(Block(Square))
        assert report.blocks[0].form == "relu"

    def test_chain_of_two(self):
        # The second reads what the first has written, with nothing between.
        class Chain(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Block(Gated), Block(Plain)

            def forward(self, hidden, ids, weights):
                return self.second(self.first(hidden, ids, weights), ids, weights)

        model = Chain()
        report, actual, graph = rewrite(model)
        assert report.count == 2 and [b.path for b in report.blocks] == [
            "first.experts",
            "second.experts",
        ]
        assert torch.equal(actual, replaced(model))
        first, second = operators(graph)
        assert second.args[0] is first

    def test_one_module_called_twice(self):
        class Twice(Block):
            def forward(self, hidden, ids, weights):
                return self.experts(self.experts(hidden, ids, weights), ids, weights)

        model = Twice(Gated)
        report, actual, graph = rewrite(model)
        assert report.count == len(operators(graph)) == 2
        assert torch.equal(actual, replaced(model))
        first, second = operators(graph)
        assert first.args[3:] == second.args[3:]

    @pytest.mark.parametrize("tokens", [1, 2, 33])
    def test_numbers_of_tokens(self, tokens):
        report, actual, _ = rewrite(Block(Gated), tokens)
        assert report.count == 1 and actual.shape == (tokens, 64)


class TestKernel:
    def test_named_and_absent_leaves_the_graph(self):
        graph, values = capture(Block(Gated), *routed(5))
        before = str(graph.graph)
        with pytest.raises(UnsupportedError, match="rewrite_moe: kernel 'triton' cannot run this"):
            rewrite_moe(graph, values, kernel="triton")
        with pytest.raises(UnsupportedError, match="rewrite_moe: kernel must be auto or one of"):
            rewrite_moe(graph, values, kernel="tritn")
        assert str(graph.graph) == before


def clamped_when_large(gate, up):
    return (nn.functional.silu(gate) * up).clamp(-40, 40)


def one_apart(self, hidden, ids, weights):
    both = torch.einsum("th,tkih->tki", hidden, self.gate_up_proj[ids])
    inner = self._apply_gate(both) * (1 + (ids == 7)[..., None])
    return torch.einsum("tki,tkhi,tk->th", inner, self.down_proj[ids], weights)


class TestWithoutVerification:
    """verify=False leaves out the checks behind the first comparison, and those alone."""

    @pytest.mark.parametrize(
        ("experts", "tokens", "how"),
        [
            (with_gate(clamped_when_large), 5, "on large inputs"),
            (overriding(one_apart), 1, "on experts not chosen before"),
        ],
        ids=["clamp", "expert"],
    )
    def test_rare_behaviour_is_not_looked_for(self, experts, tokens, how):
        report, _, _ = rewrite(Block(experts), tokens)
        assert report.count == 0 and how in report.near_misses[0].reasons[0]
        report, _, _ = rewrite(Block(experts), tokens, verify=False)
        assert report.blocks[0].form == "gated (gate_up) silu"

    @pytest.mark.slow
    @pytest.mark.parametrize("form", FORMS)
    def test_forms_are_told_all_the_same(self, form):
        report, _, _ = rewrite(Block(form_class(form)), verify=False)
        assert report.count == 1 and report.blocks[0].form == form

    def test_what_never_fits_is_left(self):
        report, _, _ = rewrite(Block(with_gate(clamped)), verify=False)
        assert report.count == 0 and report.near_misses[0].reasons[0].startswith(NO_FORM)


class TestVerification:
    def test_same_result_twice(self):
        graph, _ = capture(Block(with_gate(clamped)), *routed(5))
        first, second = (judge_region(graph, region_of(graph)) for _ in range(2))
        assert first == second and first.form is None and "relative error" in first.reason
        graph, _ = capture(Block(with_gate(noisy_gate)), *routed(5))
        torch.manual_seed(7)
        assert judge_region(graph, region_of(graph)).form is None
        torch.manual_seed(8)
        assert judge_region(graph, region_of(graph)).form is None

    @pytest.mark.parametrize("experts", [Gated, with_gate(noisy_gate)])
    def test_no_side_effects(self, experts, float32_settings):
        block = Block(experts)
        graph, _ = capture(block, *routed(5))
        region = region_of(graph)
        text = str(graph.graph)
        values = [p.clone() for p in block.parameters()]
        versions = [p._version for p in block.parameters()]
        state = torch.get_rng_state()
        torch.set_float32_matmul_precision("high")
        with torch.enable_grad():
            judge_region(graph, region)
            assert torch.is_grad_enabled()
        with torch.no_grad():
            judge_region(graph, region)
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, values, block.parameters()))
        assert [p._version for p in block.parameters()] == versions
        assert str(graph.graph) == text

    def test_float32_products_are_whole(self, float32_products, monkeypatch):
        def settings():
            matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            return [setting.fp32_precision for setting in matmul]

        asked, during = settings(), []
        compute = verify.compute

        def noting(*given):
            during.append(settings())
            return compute(*given)

        monkeypatch.setattr(verify, "compute", noting)
        graph, _ = capture(Block(Gated), *routed(5))
        assert judge_region(graph, region_of(graph)).form is not None
        assert asked[0] == "tf32" and settings() == asked
        assert during and all(precision == ["ieee"] * 2 for precision in during)

    def test_a_setting_of_all_products_still_rules(self, float32_settings):
        graph, _ = capture(Block(Gated), *routed(5))
        torch.backends.fp32_precision = "tf32"
        judge_region(graph, region_of(graph))
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"

    def test_memory_of_many_experts(self):
        class Many(Gated):
            def __init__(self, config):
                super().__init__(config)
                self.num_experts = 128
                self.gate_up_proj = nn.Parameter(torch.zeros(128, 512, 128))
                self.down_proj = nn.Parameter(torch.zeros(128, 128, 256))

        graph, _ = capture(Block(Many), *routed(5, hidden_size=128, experts=128))
        expert = 512 * 128 * 4
        with LargestStorage() as largest:
            form = judge_region(graph, region_of(graph)).form
        assert str(form) == "gated (gate_up) silu"
        # One expert and 127 shifts of its window; the comparison gathers one for each of 5 tokens.
        assert expert < largest.nbytes <= 5 * expert
        drawn = probes.make_probes(region_of(graph))
        for role, one in (("first", expert), ("down", expert // 2)):
            assert drawn[role].shape[0] == 128
            assert drawn[role].untyped_storage().nbytes() < 1.4 * one

    def test_under_a_fake_mode(self):
        graph, _ = capture(Block(Gated), *routed(5))
        with torch._subclasses.FakeTensorMode():
            verdict = judge_region(graph, region_of(graph))
        assert (str(verdict.form), verdict.reason) == ("gated (gate_up) silu", "")

    def test_experts_differ(self):
        # Windows of one buffer must not make two experts alike.
        graph, _ = capture(Block(Gated), *routed(5))
        drawn = probes.make_probes(region_of(graph))
        for role in ("first", "down"):
            rows = drawn[role].flatten(0, 1)
            assert torch.unique(rows, dim=0).shape == rows.shape

    @pytest.mark.slow
    def test_structure_is_verified_once(self, monkeypatch):
        class Four(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([*(Block(Gated) for _ in range(3)), Block(Plain)])

            def forward(self, hidden, ids, weights):
                return sum(block(hidden, ids, weights) for block in self.blocks)

        runs = []
        make = probes.make_probes
        monkeypatch.setattr(verify, "make_probes", lambda region: runs.append(1) or make(region))
        model = Four()
        report, _, _ = rewrite(model)
        assert report.count == 4 and len(runs) == 2
        # Nor does another model of that structure run again.
        other = copy.deepcopy(model)
        other.blocks[0].experts.down_proj.mul_(3)
        report, actual, _ = rewrite(other)
        assert report.count == 4 and len(runs) == 2
        assert torch.equal(actual, replaced(other))


class TestMutations:
    """A wrong definition must show."""

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x: nn.functional.silu(x) * 1.001,
            lambda x: nn.functional.silu(x + 1e-3),
            nn.functional.mish,
        ],
        ids=["scaled", "shifted", "another"],
    )
    def test_activation(self, monkeypatch, wrong):
        monkeypatch.setitem(
            ACTIVATIONS, "silu", dataclasses.replace(ACTIVATIONS["silu"], function=wrong)
        )
        # Nor may another be read in its place.
        monkeypatch.setattr(verify, "read_forms", lambda *_given: [])
        report, _, _ = rewrite(Block(Gated))
        assert report.count == 0
        assert "closest is gated (gate_up) silu with" in report.near_misses[0].reasons[0]

    def test_the_two_gelus(self, monkeypatch):
        # With the other one in its place, gelu is found under the wrong name: numbers decide.
        tanh = ACTIVATIONS["gelu_tanh"]
        monkeypatch.setitem(ACTIVATIONS, "gelu_tanh", ACTIVATIONS["gelu"])
        monkeypatch.setitem(ACTIVATIONS, "gelu", tanh)
        report, _, _ = rewrite(Block(form_class("gated (gate_up) gelu")))
        assert report.blocks[0].form == "gated (gate_up) gelu_tanh"

    @pytest.mark.parametrize(
        "form, closest, least, most",
        [
            # The two GELUs differ by 5e-4 at most; the limit is 3e-5.
            ("gated (gate_up) gelu", "gated (gate_up) gelu_tanh", 3e-5, 1e-3),
            ("gated (gate_up) gelu_tanh", "gated (gate_up) gelu", 3e-5, 1e-3),
            ("gated (up_gate) silu", "gated (up_gate) ", 3e-2, 1),
            ("gated (gate_up) identity", "gated (", 3e-2, 2),
        ],
    )
    def test_without_the_form_that_fits(self, monkeypatch, form, closest, least, most):
        def others(*args, **settings):
            return (f for f in possible_forms(*args, **settings) if str(f) != form)

        monkeypatch.setattr(verify, "possible_forms", others)
        graph, _ = capture(Block(form_class(form)), *routed(5))
        verdict = verify.judge_region(graph, region_of(graph))
        assert verdict.form is None and str(verdict.closest).startswith(closest)
        assert least < verdict.error < most
        assert f"closest is {verdict.closest} with relative error" in verdict.reason

    def test_two_that_fit_are_one_too_many(self, monkeypatch):
        monkeypatch.setitem(ACTIVATIONS, "relu", ACTIVATIONS["silu"])
        report, _, _ = rewrite(Block(Gated))
        assert report.near_misses[0].reasons[0] == (
            "it fits more than one form: gated (gate_up) silu; gated (gate_up) relu"
        )

    def test_order_of_gate_and_up(self, monkeypatch):
        split = verify.split_gate_up
        monkeypatch.setattr(
            verify, "split_gate_up", lambda stacked, layout: split(stacked, layout)[::-1]
        )
        report, _, _ = rewrite(Block(Gated))
        assert report.blocks[0].form == "gated (up_gate) silu"


class TestGraph:
    def test_metadata(self):
        graph, values = capture(Block(Gated), *routed(5))
        region = region_of(graph)
        stack, value = region.output.meta["nn_module_stack"], region.output.meta["example_value"]
        placeholders = [(n.name, dict(n.meta)) for n in graph.graph.nodes if n.op == "placeholder"]
        rewrite_moe(graph, values)
        graph.graph.lint()
        (fused,) = operators(graph)
        assert fused.meta["nn_module_stack"] == stack
        assert fused.meta["example_value"] is value
        assert [(n.name, n.meta) for n in graph.graph.nodes if n.op == "placeholder"] == (
            placeholders
        )
        # The graph holds no weights: the operator takes the float ones, its inputs.
        assert not [*graph.buffers()] and not [n for n in graph.graph.nodes if n.op == "get_attr"]
        weights = {name for group in fused.args[3:6] for name in map(str, group)}
        assert len(weights) == 2 and weights <= {name for name, _meta in placeholders}
        assert fused.args[6:9] == ([], [], [])
        assert fused.args[9:] == ("nvfp4", "silu", "gate_up", False, False, "reference", 256)

    def test_only_one_operator_is_left(self):
        report, _, graph = rewrite(Block(Gated))
        assert report.count == 1
        counts = {}
        for node in graph.graph.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
        assert counts == {"placeholder": 5, "call_function": 1, "output": 1}

    def test_sizes_that_others_use_survive(self):
        def forward(self, hidden, ids, weights):
            pairs = ids.size(0) * ids.size(1)
            return Gated.forward(self, hidden, ids, weights), pairs

        class UsesSize(Block):
            def forward(self, *inputs):
                out, pairs = self.experts(*inputs)
                return out, torch.arange(pairs)

        backend = CapturingBackend()
        options = {"inner_backend": backend, "on_no_match": "error"}
        model = UsesSize(overriding(forward))
        compiled = torch.compile(
            model, backend=fp4moe.backend, options=options, fullgraph=True, dynamic=True
        )
        plain = Block(Gated)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            for tokens in (5, 9):
                out, pairs = compiled(*routed(tokens))
                assert torch.equal(pairs, torch.arange(2 * tokens))
                if tokens == 5:
                    assert torch.equal(out, replaced(plain))
        (graph,) = backend.graphs
        assert len(operators(graph)) == 1
        # The product is made by a node of the experts module.
        assert any(
            isinstance(n.meta.get("example_value"), torch.SymInt) and n.op == "call_function"
            for n in graph.graph.nodes
        )

    def test_sizes_of_what_goes_away(self):
        graph, values = capture(Block(Gated), *routed(5))
        node = next(n for n in graph.graph.nodes if n.name == "proj_out")
        with graph.graph.inserting_after(node):
            size = graph.graph.call_method("size", (node, 0))
            size.meta = {"example_value": 10, "nn_module_stack": node.meta["nn_module_stack"]}
        output = next(n for n in graph.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], size),)
        report = rewrite_moe(graph, values)
        assert report.near_misses[0].reasons == (
            "sizes of its intermediate proj_out are used outside",
        )
        assert size in graph.graph.nodes

    def test_fake_weights_are_packed_when_real_ones_come(self):
        block = Block(Gated)
        graph, values = capture(block, *routed(5))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) for value in values]
        assert rewrite_moe(graph, fake).count == 1
        with torch.no_grad():
            (actual,) = graph(*values)
        assert torch.equal(actual, replaced(block))

    def test_computed_weights_are_left(self):
        block = Block(Gated)
        graph, values = capture(block, *routed(5))
        inputs = graph.graph.find_nodes(op="placeholder")
        (down,) = [node for node in inputs if "down_proj" in node.name]
        with graph.graph.inserting_after(down):
            doubled = graph.graph.call_function(torch.mul, (down, 2))
        doubled.meta = {"example_value": down.meta["example_value"] * 2}
        down.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
        report = rewrite_moe(graph, values)
        assert "weights are computed in the graph" in report.near_misses[0].reasons[0]


def test_a_bias_of_grouped_mm_is_refused_not_dropped():
    x, weight, offs = torch.ones(2, 3), torch.ones(1, 3, 4), torch.tensor([2], dtype=torch.int32)
    assert torch.equal(execute.grouped_mm(x, weight, offs), torch.full((2, 4), 3.0))
    with pytest.raises(ValueError, match="grouped_mm with a bias"):
        execute.grouped_mm(x, weight, offs, bias=torch.ones(1, 4))
