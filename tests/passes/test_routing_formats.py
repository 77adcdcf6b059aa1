"""routing="fused" in graphs of each number format, with a factor per expert (Gemma4's)."""

from __future__ import annotations

import copy

import pytest
import torch
from format_models import IDS, float_model, logits
from moe_layers import hidden, moe_layer
from tiny_models import CapturingBackend

import fp4moe
from fp4moe.formats import FORMATS
from fp4moe.passes import rewrite_exported, rewrite_moe
from fp4moe.testing import relative_error

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]

fp4 = torch.ops.fp4moe
# Routing weights in another order of float32 operations, and sums over experts: a few of 6e-8 for
# each of two layers, with what lies between.
CLOSE = 4e-6


@pytest.fixture
def model():
    """Gemma4 with factors that differ from expert to expert and between the layers."""
    made = float_model("gemma4", whole=True).requires_grad_(False)
    for number, layer in enumerate(made.model.layers):
        layer.router.per_expert_scale.copy_(torch.linspace(0.5, 2 + number, 8))
    return made


def wanted(model, format):
    return logits(fp4moe.replace_moe(copy.deepcopy(model), format=format, progress=False))


def targets(graph):
    # The model's own choice, too, if anything of it is left.
    found = [n.target for n in graph.nodes if "fp4moe" in str(n.target) or "topk" in str(n.target)]
    return [target for target in found if not isinstance(target, str)]


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "mxfp4"])
def test_backend(model, format, caplog):
    inner = CapturingBackend()
    options = {"inner_backend": inner, "routing": "fused", "on_no_match": "error", "format": format}
    fast = torch.compile(model, backend=fp4moe.backend, options=options, fullgraph=True)
    assert relative_error(logits(fast), wanted(model, format)) < CLOSE
    each = [fp4.choose_experts, fp4.moe]
    each = [fp4.nvfp4_moe_from_logits] if format == "nvfp4" else each
    assert targets(inner.graphs[0].graph) == [target.default for target in each] * 2
    assert "keeps its routing" not in caplog.text
    # The factors are read at each call.
    model.model.layers[0].router.per_expert_scale.mul_(3)
    assert relative_error(logits(fast), wanted(model, format)) < CLOSE


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_exported(model, format):
    expected = wanted(model, format)
    program = torch.export.export(model, (IDS,), {"use_cache": False})
    program, report = rewrite_exported(program, format=format, routing="fused")
    assert [match.fused for match in report.routing] == [True] * 2
    assert targets(program.graph) == [fp4.choose_experts.default, fp4.moe.default] * 2
    with torch.no_grad():
        out = program.module()(IDS, use_cache=False).logits
    assert relative_error(out, expected) < CLOSE
    assert (
        str(report)
        .splitlines()[-1]
        .endswith(
            "renormalised, times a factor per expert, in one launch before the kernel "
            f"({format} has no global scale into which its factor per expert could go)"
        )
    )


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "nvfp4"])
def test_a_replaced_layer_and_symbolic_sizes(format):
    layer = fp4moe.replace_moe(moe_layer("gemma4"), format=format, progress=False)
    capture = CapturingBackend()
    with torch.no_grad():
        torch.compile(layer, backend=capture, fullgraph=True, dynamic=True)(hidden())
        (graph,), (inputs,) = capture.graphs, capture.inputs
        before = graph(*inputs)[0]
        report = rewrite_moe(graph, inputs, routing="fused")
        assert report.already_fused == 1 and all(match.fused for match in report.routing)
        assert targets(graph.graph) == [fp4.choose_experts.default, fp4.moe.default]
        assert relative_error(graph(*inputs)[0], before) < CLOSE
    (node,) = [n for n in graph.graph.nodes if n.target is fp4.choose_experts.default]
    ids, weights = node.meta["example_value"]
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert isinstance(ids.shape[0], torch.SymInt) and ids.shape[0] == weights.shape[0]


def test_only_named_it_stays(model):
    program = torch.export.export(model, (IDS,), {"use_cache": False})
    program, report = rewrite_exported(program, format="fp8")
    assert fp4.choose_experts.default not in targets(program.graph)
    assert [match.fused for match in report.routing] == [False] * 2
