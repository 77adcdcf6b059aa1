"""Blocks found by data flow alone: ways of writing x routes of capture, look-alikes, side effects.

The table in benchmarks/results/ways_of_writing.md is made by this file, run with
PYTHONPATH=tests/support; the tests compare each row with what happens.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dataflow_cases import (
    LIMIT,
    LOOK_ALIKES,
    TABLE,
    OneApart,
    UpBiased,
    dequantized,
    error_after_rewrite,
    limit,
    row,
    table,
)
from moe_writers import (
    ACTIVATIONS,
    ROUTES,
    WRITERS,
    BatchedMM,
    DenseScatter,
    LargestStorage,
    LoopIndexAdd,
    LoopMask,
    Model,
    Sizes,
    inputs,
)
from torch import nn

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.passes import rewrite_exported, rewrite_moe
from fp4moe.passes.find.by_flow import propose_regions
from fp4moe.passes.graph.dataflow import Flow, operation_name
from fp4moe.passes.judge import probes, verify
from fp4moe.testing import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def quick(name: str) -> str:
    """The route that takes the least time."""
    return "symbolic" if table()[name][-1] == "matched" else "export"


def short_table() -> str:
    """That of graph-pass.md: ways of writing by what becomes of them; all exports are alike."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (dynamo, *export, symbolic) in table().items():
        assert len(set(export)) == 1
        groups.setdefault((dynamo, export[0], symbolic), []).append(name)
    groups["refused", "refused", "-"] = list(LOOK_ALIKES)
    lines = [
        "| way of writing | torch.compile | torch.export | symbolic_trace |",
        "|---|---|---|---|",
        *(f"| {'; '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()),
    ]
    return "\n".join(lines)


class TestTable:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", WRITERS)
    def test_row(self, name):
        assert row(name) == table()[name]

    def test_rows_are_complete(self):
        assert list(table()) == list(WRITERS)

    def test_the_page_has_the_short_table(self):
        page = TABLE.parents[2] / "docs" / "graph-pass.md"
        assert short_table() in page.read_text("utf-8")


class TestForms:
    """Each way of writing with each activation, gated and not; the numbers are the original's."""

    @pytest.mark.slow
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("name", WRITERS)
    def test_activation(self, name, activation):
        # Two of the four gated and two not, by turns; the table above has gated silu for all.
        turn = [*WRITERS].index(name) + [*ACTIVATIONS].index(activation)
        gated = WRITERS[name].gated_only or turn % 2 == 0
        sizes = Sizes()
        model = Model(WRITERS[name](sizes, activation, gated))
        route = "export" if gated else quick(name)
        report, error, _ = error_after_rewrite(model, inputs(sizes), route)
        assert report.count == 1, str(report)
        words = report.blocks[0].form.replace(",", "").split()
        assert activation in words and ("gated" in words) == gated
        assert error < limit(name)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", WRITERS)
    def test_half_precision(self, name):
        dtype = (torch.bfloat16, torch.float16)[[*WRITERS].index(name) % 2]
        sizes = Sizes()
        model, args = Model(WRITERS[name](sizes, "silu", True, dtype)), inputs(sizes, dtype=dtype)
        with torch.no_grad():
            ids = model.gate(args[0]).topk(sizes.top_k)[1]
        graph, values = ROUTES[quick(name)](model, args)
        with torch.no_grad():
            assert rewrite_moe(graph, values).count == 1
            result = graph(*values)
            (actual,) = result if isinstance(result, (tuple, list)) else (result,)
            wide = (args[0].float(),)
            assert torch.equal(
                dequantized(model).gate(*wide).topk(sizes.top_k)[1].sort()[0], ids.sort()[0]
            )
            expected = dequantized(model)(*wide)
        assert actual.dtype == dtype
        # Routing weights and output are rounded to bfloat16, 2^-9 each, and the logits behind the
        # weights, 2^-9 of values near 1: under 4 * 2^-9. Weighted inputs are rounded once more.
        assert relative_error(actual, expected) < 1.2e-2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("route", "settings"),
        [
            ("dynamo", {"batched": True, "shared": True}),
            ("export", {"router": False, "shared": True}),
        ],
        ids=["batched, shared", "routing outside, shared"],
    )
    @pytest.mark.parametrize("name", WRITERS)
    def test_surroundings(self, name, route, settings):
        sizes = Sizes()
        model = Model(WRITERS[name](sizes, "silu", True), **settings)
        given = {k: v for k, v in settings.items() if k != "shared"}
        report, error, _ = error_after_rewrite(model, inputs(sizes, **given), route)
        assert report.count == 1, str(report)
        assert error < limit(name)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("sizes", "tokens"),
        [
            (Sizes(top_k=1), 7),
            (Sizes(experts=2, top_k=2), 7),
            (Sizes(hidden=32, intermediate=32), 7),
            (Sizes(hidden=64, intermediate=32), 7),
            (Sizes(), 48),
            (Sizes(), 6),
            (Sizes(), 1),
        ],
        ids=["K = 1", "K = E", "H = I", "H = 2 I", "T = I", "T = E", "T = 1"],
    )
    def test_sizes_that_coincide(self, sizes, tokens):
        for name in ("grouped_mm", "gather and einsum", "dense, one-hot", "loop, masks"):
            model = Model(WRITERS[name](sizes, "silu", True))
            report, error, _ = error_after_rewrite(model, inputs(sizes, tokens), quick(name))
            assert report.count == 1, (name, str(report))
            assert error < limit(name)

    def test_weights_that_are_not_applied(self):
        model = Model(Unweighted(Sizes(), "silu", True))
        report, error, _ = error_after_rewrite(model, inputs(Sizes()), "export")
        assert report.count == 1 and error < LIMIT[False]

    def test_capacity_is_a_dense_weighting(self):
        model, args = Model(Capacity(Sizes(), "silu", True)), inputs(Sizes())
        report, error, graph = error_after_rewrite(model, args, "export")
        assert report.count == 1 and error < LIMIT[False]
        assert torch.ops.aten.gather.default in {node.target for node in graph.graph.nodes}


class Capacity(DenseScatter):
    """Drops the tokens that an expert cannot hold; what is left is a dense weighting."""

    def forward(self, hidden, ids, weights):
        dense = weights.new_zeros(hidden.shape[0], self.sizes.experts).scatter(1, ids, weights)
        dense = dense * (F.one_hot(ids, self.sizes.experts).sum(1).cumsum(0) <= 2)
        x = hidden.expand(self.sizes.experts, -1, -1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first.mT)), self.down.mT)
        return (y * dense.t().unsqueeze(-1)).sum(0)


class Unweighted(BatchedMM):
    """Routing weights go in and are not applied: right with weights of 1."""

    def forward(self, hidden, ids, weights):
        return super().forward(hidden, ids, torch.ones_like(weights))


class TestDynamic:
    """One graph for any number of tokens."""

    NAMES = ("grouped_mm", "gather and einsum", "dense, one-hot", "loop, masks")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NAMES)
    def test_export(self, name):
        sizes = Sizes()
        model = Model(WRITERS[name](sizes, "silu", True))
        tokens = {"hidden": {0: torch.export.Dim("tokens", min=2, max=64)}}
        program = torch.export.export(model, inputs(sizes), dynamic_shapes=tokens)
        program, _ = rewrite_exported(program, on_no_match="error")
        self.check(name, model, program.module())

    @pytest.mark.slow
    @pytest.mark.parametrize("name", NAMES)
    def test_compile(self, name):
        model, graphs = Model(WRITERS[name](Sizes(), "silu", True)), []

        def inner(graph, _):
            graphs.append(graph)
            return graph.forward

        options = {"inner_backend": inner, "on_no_match": "error"}
        self.check(
            name,
            model,
            torch.compile(
                model, backend=fp4moe.backend, options=options, dynamic=True, fullgraph=True
            ),
        )
        assert len(graphs) == 1

    def check(self, name, model, rewritten):
        reference = dequantized(model)
        for tokens in (7, 2, 33):
            with torch.no_grad():
                (x,) = inputs(model.experts.sizes, tokens)
                actual, expected = rewritten(x), reference(x)
            assert relative_error(actual, expected) < limit(name)


class TestLookAlikes:
    @pytest.mark.slow
    @pytest.mark.parametrize("route", ["dynamo", "export"])
    @pytest.mark.parametrize("what", LOOK_ALIKES)
    def test_is_left_with_the_closest_form(self, what, route):
        writer, reason = LOOK_ALIKES[what]
        sizes = Sizes()
        graph, values = ROUTES[route](Model(writer(sizes, "silu", True)), inputs(sizes))
        before = str(graph.graph)
        with torch.no_grad():
            report = rewrite_moe(graph, values)
        assert report.count == 0
        assert str(graph.graph) == before
        (block,) = report.near_misses
        assert reason in "; ".join(block.reasons), block
        # The table says which form came closest.
        assert "gated" in str(report)

    @pytest.mark.parametrize("route", ["dynamo", "export"])
    def test_a_router_with_more_experts_than_weights(self, route):
        sizes = Sizes()
        model = Model(LoopMask(sizes, "silu", True))
        model.gate = nn.Linear(sizes.hidden, sizes.experts + 1, bias=False).requires_grad_(False)
        graph, values = ROUTES[route](model, inputs(sizes))
        report = rewrite_moe(graph, values)
        text = f"router chooses among {sizes.experts + 1} experts, of which {sizes.experts} have"
        assert report.count == 0 and text in str(report)

    def test_operations_have_one_name(self):
        def compare(x):
            return x.__eq__(1), x.eq(1), x == 1

        nodes = [n for n in torch.fx.symbolic_trace(compare).graph.nodes if n.op.startswith("call")]
        assert [operation_name(node) for node in nodes] == ["eq"] * 3
        method = torch.fx.Graph().call_method("__eq__", (1, 1))
        assert operation_name(method) == "eq"

    def test_an_expert_that_no_token_chose(self):
        # One token, two of four experts; and more tokens than are compared.
        for tokens in (1, 40):
            graph, values = ROUTES["export"](
                Model(OneApart(Sizes(), "silu", True)), inputs(Sizes(), tokens)
            )
            assert rewrite_moe(graph, values).count == 0

    @pytest.mark.slow
    def test_erf_and_tanh_are_told_apart(self):
        for activation in ("gelu", "gelu_tanh"):
            sizes = Sizes()
            graph, values = ROUTES["export"](
                Model(LoopIndexAdd(sizes, activation, True)), inputs(sizes)
            )
            assert rewrite_moe(graph, values).blocks[0].form == f"gated (up, gate) {activation}"

    def test_no_block_at_all(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
        graph = torch.fx.symbolic_trace(model)
        assert rewrite_moe(graph, [torch.ones(2, 8)]).blocks == ()


def test_flow_reads_keywords_and_lists():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    zeros = graph.call_function(torch.zeros_like, (), {"input": x})
    written = graph.call_function(torch._foreach_add_, ([x], 1))
    total = graph.call_function(torch.add, (x, zeros))
    graph.output(total)
    flow = Flow(graph)
    assert flow.writes[written] == [x]
    # Who reads what was written reads the writer too.
    assert flow.reads[total] == [x, written, zeros]


class TestSideEffects:
    @pytest.mark.slow
    @pytest.mark.parametrize("route", ["dynamo", "export", "symbolic"])
    def test_state_and_graph(self, route):
        sizes = Sizes()
        model = Model(LOOK_ALIKES["dropout in training"][0](sizes, "silu", True))
        graph, values = ROUTES[route](model, inputs(sizes))
        text, random = str(graph.graph), torch.get_rng_state()
        weights = {name: (p.clone(), p._version) for name, p in model.named_parameters()}
        with torch.enable_grad():
            first = rewrite_moe(graph, values)
            assert torch.is_grad_enabled()
        assert str(graph.graph) == text
        assert torch.equal(torch.get_rng_state(), random)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name][0])
            assert parameter._version == weights[name][1]
        assert rewrite_moe(graph, values).blocks[0].module == first.blocks[0].module

    def test_two_layers_are_packed_apart_and_verified_once(self, monkeypatch, nothing_verified):
        sizes = Sizes()
        model = nn.Sequential(*(Model(LoopMask(sizes, "silu", True)) for _ in range(3)))
        runs = []
        make = probes.make_probes
        monkeypatch.setattr(verify, "make_probes", lambda region: runs.append(1) or make(region))
        graph, values = ROUTES["symbolic"](model.requires_grad_(False), inputs(sizes))
        assert rewrite_moe(graph, values).count == 3
        assert len(runs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["grouped_mm", "dense, scatter", "loop, index_add", "loop over slices"]
)
def test_verification_makes_no_second_copy_of_the_weights(name):
    sizes = Sizes(experts=16, hidden=128, intermediate=96)
    graph, _ = ROUTES["export"](Model(WRITERS[name](sizes, "silu", True)), inputs(sizes))
    (region, *_), *_ = map(list, propose_regions(Flow(graph.graph), set(), set()))
    with LargestStorage() as largest:
        form = verify.judge_region(graph, region).form
    assert form is not None
    # All weights in float32, which is what they would be converted to; packing reads them, later.
    weights = 3 * sizes.experts * sizes.hidden * sizes.intermediate * 4
    assert 0 < largest.nbytes < weights / 8


class TestReport:
    def graph(self, writer):
        sizes = Sizes()
        return ROUTES["export"](Model(writer(sizes, "silu", True)), inputs(sizes))

    def test_on_no_match(self):
        graph, values = self.graph(UpBiased)
        rewrite_moe(graph, values)
        with pytest.warns(UserWarning, match="rewrite_moe: no experts of the graph can"):
            rewrite_moe(graph, values, on_no_match="warn")
        with pytest.raises(UnsupportedError, match=r"because .*it has biases, but none"):
            rewrite_moe(graph, values, on_no_match="error")
        with pytest.raises(UnsupportedError, match="on_no_match must be one of warn, error"):
            rewrite_moe(graph, values, on_no_match="raise")
        graph, values = self.graph(LoopMask)
        assert rewrite_moe(graph, values, on_no_match="error").count == 1

    def test_logger(self, caplog):
        graph, values = self.graph(LoopMask)
        with caplog.at_level(logging.INFO, logger="fp4moe"):
            rewrite_moe(graph, values)
        assert "1 of 1 blocks rewritten" in caplog.text

    @pytest.mark.slow
    def test_torch_logs_knows_the_logger(self):
        code = "import logging, fp4moe; print(logging.getLogger('fp4moe').getEffectiveLevel())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"TORCH_LOGS": "+fp4moe", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(logging.DEBUG)


if __name__ == "__main__":
    rows = {name: row(name) for name in WRITERS}
    header = ["way of writing", *ROUTES]
    lines = [header, ["---"] * len(header), *([name, *row] for name, row in rows.items())]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    TABLE.write_text(
        "# Ways of writing a mixture of experts, and what the pass makes of them\n\n"
        "Gated silu, 4 experts, top-2, router in the graph. Matched: one operator in its place,\n"
        "whose numbers are the original's on dequantised weights. Not captured: the tracer itself\n"
        f"gives up. torch {torch.__version__}; written by "
        "`PYTHONPATH=tests/support python tests/passes/test_dataflow.py`,\n"
        f"and each row is a test.\n\n{text}\n",
        "utf-8",
    )
