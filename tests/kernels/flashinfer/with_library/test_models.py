"""Gemma4 and NemotronH on a claimed SM100: the graph holds the operator, nothing breaks it.

The models are transformers' own, small; FlashInfer's GPU part is emulated (conftest.py).
"""

from __future__ import annotations

import copy
import pathlib
import re

import pytest
import torch
from tiny_models import CapturingBackend, enlarge_experts, gemma4, nemotron_h, nemotron_h_latent

import fp4moe
from fp4moe.arguments import MoeFromLogitsArguments
from fp4moe.kernels.flashinfer.library import library
from fp4moe.models.routers import FusedRouter
from fp4moe.passes.report import RewriteReport
from fp4moe.reference import reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import relative_error

pytest.importorskip("flashinfer.fused_moe", reason="needs flashinfer-python")

OPERATOR = torch.ops.fp4moe.nvfp4_moe.default
CHOOSE = torch.ops.fp4moe.choose_experts.default
FROM_LOGITS = torch.ops.fp4moe.nvfp4_moe_from_logits.default
MODELS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "nemotron_h_latent": nemotron_h_latent}
ROUTED, LOGITS = "trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"
# As in test_trtllm.py, for each block on the inputs that it got. Whole models are compared only
# between runs of the same kernel: a value that crosses a tie of the E2M1 grid can change a router's
# choice further on.
BLOCK_LIMIT, MODEL_LIMIT = 4e-3, 5e-2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def blackwell(claim):
    claim((10, 0))


def build(name):
    torch.manual_seed(0)
    return enlarge_experts(MODELS[name]())


def replaced(model, **options):
    return fp4moe.replace_moe(copy.deepcopy(model), progress=False, **options)


def blocks(model) -> int:
    return sum(isinstance(m, fp4moe.FusedExperts) for m in model.modules())


def watch(model) -> list:
    """Note (module, arguments, output) of each fused block that runs from now on."""
    seen: list = []
    for module in model.modules():
        if isinstance(module, fp4moe.FusedExperts):
            module.register_forward_hook(lambda *call: seen.append(call))
    return seen


class Watched(CapturingBackend):
    """Runs graphs node by node, and notes (arguments, output) of each operator that routes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __call__(self, graph_module, example_inputs, **keywords):
        super().__call__(graph_module, example_inputs, **keywords)
        calls = self.calls

        class Interpreter(torch.fx.Interpreter):
            def run_node(self, node):
                result = super().run_node(node)
                if node.target is FROM_LOGITS:
                    args, _ = self.fetch_args_kwargs_from_env(node)
                    calls.append((MoeFromLogitsArguments.read(args), result))
                return result

        return Interpreter(graph_module).run


def run(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hidden_alignment", [128, 256, 512])
def test_replaced(emulated, name, hidden_alignment):
    model, ids = build(name), torch.randint(0, 32, (2, 5))
    fused = replaced(model, hidden_alignment=hidden_alignment)
    kernels = {m.kernel for m in fused.modules() if isinstance(m, fp4moe.FusedExperts)}
    assert kernels == {"flashinfer_trtllm"}
    seen = watch(fused)
    run(fused, ids)
    for module, (x, expert_ids, routing), out in seen:
        routing = routing if library().float32_weights else routing.bfloat16().float()
        assert (
            relative_error(out, reference_w4a4(x, module.weights, expert_ids, routing))
            < BLOCK_LIMIT
        )
    calls = emulated.of(ROUTED)
    assert len(calls) == len(seen) == blocks(fused)
    assert {c["hidden_states"].shape[1] * 2 % hidden_alignment for c in calls} == {0}
    rows = fp4moe.explain(fused).blocks
    assert {row.padded_sizes[0] % hidden_alignment for row in rows} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["replace_moe", "backend"])
def test_compiled_without_a_break(emulated, name, way):
    model, capture = build(name), CapturingBackend()
    eager = replaced(model)
    # With symbolic sizes tracing the Mamba scan in plain torch takes half a minute.
    options: dict = {"fullgraph": True, "dynamic": name == "gemma4"}
    if way == "backend":
        own = {"inner_backend": capture, "on_no_match": "error", "hidden_alignment": 256}
        compiled = torch.compile(model, backend=fp4moe.backend, options=own, **options)
    else:
        compiled = torch.compile(replaced(model), backend=capture, **options)
    for shape in ((2, 5), (1, 7)):
        ids = torch.randint(0, 32, shape)
        assert relative_error(run(compiled, ids), run(eager, ids)) < MODEL_LIMIT
    assert capture.graphs
    for graph in capture.graphs:
        nodes = [n for n in graph.graph.nodes if n.target is OPERATOR]
        assert len(nodes) == blocks(eager)
        assert {node.args[13] for node in nodes} == {"flashinfer_trtllm"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_fused_routing(emulated, name):
    model, ids = build(name), torch.randint(0, 32, (2, 5))
    fused, capture = replaced(model, routing="fused"), CapturingBackend()
    seen = watch(fused)
    run(fused, ids)
    for module, (x, expert_ids, routing), out in seen:
        routing = routing if library().float32_weights else routing.bfloat16().float()
        assert (
            relative_error(out, reference_w4a4(x, module.weights, expert_ids, routing))
            < BLOCK_LIMIT
        )
    assert len(emulated.of(ROUTED)) == len(seen) == blocks(fused)
    # Two operators in a graph, until the pass lets the library choose.
    fused = replaced(model, routing="fused")
    compiled = torch.compile(fused, backend=capture, fullgraph=True)
    assert relative_error(run(compiled, ids), run(fused, ids)) < MODEL_LIMIT
    torch._dynamo.reset()
    watched = Watched()
    own = {"inner_backend": watched, "on_no_match": "error", "routing": "fused"}
    run(torch.compile(fused, backend=fp4moe.backend, options=own, fullgraph=True), ids)
    counts = [
        [sum(n.target is target for n in graph.graph.nodes) for target in (CHOOSE, FROM_LOGITS)]
        for graph in (*capture.graphs, *watched.graphs)
    ]
    assert counts == [[blocks(fused), 0], [0, blocks(fused)]]
    assert len(emulated.of(LOGITS)) == blocks(fused) == len(watched.calls)
    routers = [m for m in fused.modules() if isinstance(m, FusedRouter)]
    layers = [m for m in fused.modules() if isinstance(m, fp4moe.FusedExperts)]
    for router, layer, (call, out) in zip(routers, layers, watched.calls, strict=True):
        # Gemma4's factor per expert, which the pass has moved into down.
        scale = getattr(router, "per_expert_scale", torch.empty(0))
        chosen = route(call.router_logits, call.routing_bias, call.routing, scale)
        assert (
            relative_error(out, reference_w4a4(call.hidden, layer.weights, *chosen)) < BLOCK_LIMIT
        )


def test_the_page_on_blackwell(emulated, tmp_path, monkeypatch):
    """Its code, on a small model and for few tokens."""
    page = (pathlib.Path(__file__).parents[4] / "docs" / "blackwell.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "autotune" in c]
    monkeypatch.chdir(tmp_path)
    names = {"model": build("gemma4"), "fp4moe": fp4moe}
    exec(code.replace("8192", "16"), names)
    assert names["model"].model.layers[0].experts.kernel == "flashinfer_trtllm"
    assert (tmp_path / "tune.json.versions.json").exists() and len(emulated.of(ROUTED)) == 1
    fp4moe.set_flashinfer()


@pytest.mark.slow
def test_the_report_names_the_kernel(emulated):
    model, reports = build("gemma4"), []
    from fp4moe.passes import rewrite_moe

    def backend(graph_module, example_inputs):
        reports.append(rewrite_moe(graph_module, example_inputs, hidden_alignment=512))
        return graph_module.forward

    run(torch.compile(model, backend=backend, fullgraph=True), torch.randint(0, 32, (1, 4)))
    (report,) = reports
    assert isinstance(report, RewriteReport)
    assert {block.kernel for block in report.blocks} == {"flashinfer_trtllm"}
    with pytest.raises(fp4moe.errors.UnsupportedError, match=r"^rewrite_moe: hidden_alignment"):
        rewrite_moe(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), [], hidden_alignment=64)
