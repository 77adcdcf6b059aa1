"""Number formats in graphs: backend, Inductor's pass, exports, one graph for many weights."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from float_twins import fused_parts
from format_models import IDS, KEPT, expected, float_model, logits, replaced
from tiny_models import CapturingBackend, table_entries

import fp4moe
from fp4moe.errors import ShapeError
from fp4moe.formats import FORMATS
from fp4moe.passes import rewrite_exported, rewrite_moe
from fp4moe.testing import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# As in test_number_formats.py: the same products, summed in another order. Compiled graphs may fuse
# what lies between the experts, hence twice that for each of the layers before and behind.
EAGER, COMPILED = 1e-6, 4e-6
fp4 = torch.ops.fp4moe
# Each class and each format once, and the biases of gpt-oss with both kinds. What Dynamo sees of a
# format is a name and tensors, of a class what stands around them; test_exported has all pairs.
ONCE = [
    ("gemma4", "fp8"),
    ("nemotron_h", "mxfp8"),
    ("qwen3_moe", "fp8_block"),
    ("qwen3_moe", "fp8_channel"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "nvfp4"),
    ("gemma4", "nvfp4"),
]
ALL = list(itertools.product(KEPT, FORMATS))


def options(format, inner="eager", **others):
    return {"format": format, "on_no_match": "error", "inner_backend": inner, **others}


def compiled(model, format, inner="eager", **others):
    chosen = options(format, inner, **others)
    return torch.compile(model, backend=fp4moe.backend, fullgraph=True, options=chosen)


def operator_of(name, format):
    return fp4.nvfp4_moe if format == "nvfp4" and name != "gpt_oss" else fp4.moe


def operators(graph):
    return [n.target for n in graph.nodes if str(n.target).startswith("fp4moe.")]


@pytest.mark.slow
@pytest.mark.parametrize("name, format", ONCE)
def test_backend(name, format):
    inner = CapturingBackend()
    actual = logits(compiled(float_model(name), format, inner))
    assert relative_error(actual, expected(name, format)) < COMPILED
    (graph,) = inner.graphs
    assert operators(graph.graph) == [operator_of(name, format).default]


@pytest.mark.slow
@pytest.mark.parametrize("name, format", ONCE)
def test_replaced_and_compiled(name, format):
    inner = CapturingBackend()
    model = torch.compile(replaced(name, format), backend=inner, fullgraph=True)
    assert relative_error(logits(model), expected(name, format)) < COMPILED
    assert operators(inner.graphs[0].graph) == [operator_of(name, format).default]


def exported(model):
    return torch.export.export(model, (IDS,), {"use_cache": False})


def run(program):
    with torch.no_grad():
        return program.module()(IDS, use_cache=False).logits


@functools.cache
def exported_floats(name):
    """What every format of `name` is rewritten from; a rewrite changes no program."""
    return exported(float_model(name))


@pytest.mark.slow
@pytest.mark.parametrize("name, format", ALL)
def test_exported(name, format):
    plain = exported_floats(name)
    before = plain.graph_module.code
    program, report = rewrite_exported(plain, format=format, on_no_match="error")
    assert plain.graph_module.code == before
    assert [block.format for block in report.blocks] == [format]
    assert operators(program.graph) == [operator_of(name, format).default]
    assert relative_error(run(program), expected(name, format)) < COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("name, format", ONCE)
def test_replaced_and_exported(name, format):
    program = exported(replaced(name, format))
    assert operators(program.graph) == [operator_of(name, format).default]
    assert relative_error(run(program), expected(name, format)) < COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nvfp4", "fp8", "mxfp4"])
def test_a_saved_program_is_the_same(format, tmp_path):
    program, _ = rewrite_exported(exported_floats("qwen3_moe"), format=format)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert operators(loaded.graph) == operators(program.graph)
    assert torch.equal(run(program), run(loaded))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
@pytest.mark.parametrize("way", ["backend", "pass"])
def test_inductor(way, format):
    model = float_model("gpt_oss")
    if way == "backend":
        fast = compiled(model, format, "inductor")
    else:
        settings = fp4moe.inductor_options(format=format, on_no_match="error")
        fast = torch.compile(model, fullgraph=True, options=settings)
    assert relative_error(logits(fast), expected("gpt_oss", format)) < COMPILED


@pytest.mark.slow
def test_rewrite_moe_keeps_the_format_beside_the_floats():
    inner = CapturingBackend()
    logits(torch.compile(float_model("qwen3_moe"), backend=inner, fullgraph=True))
    (graph,), (inputs,) = inner.graphs, inner.inputs
    with torch.no_grad():
        report = rewrite_moe(graph, inputs, format="fp8_channel")
    assert [(b.format, b.kernel) for b in report.blocks] == [("fp8_channel", "reference")]
    assert "fp8_channel" in str(report) and report.to_dict()["blocks"][0]["format"] == "fp8_channel"
    (node,) = [n for n in graph.graph.nodes if n.target is fp4.float_moe.default]
    assert "fp8_channel" in node.args
    with torch.no_grad():
        out = next(o for o in graph(*inputs) if o.shape[:2] == IDS.shape)
    assert relative_error(out, expected("qwen3_moe", "fp8_channel")) < COMPILED


@pytest.mark.slow
def test_one_model_compiled_in_all_formats():
    """The same float weights, packed in each format, by turns."""
    model = float_model("qwen3_moe")
    fast = {format: compiled(model, format) for format in FORMATS}
    for format in [*FORMATS, *reversed(FORMATS)]:
        assert relative_error(logits(fast[format]), expected("qwen3_moe", format)) < COMPILED
    weight = model.model.layers[0].mlp.experts.down_proj
    assert {entry.form.format for entry in table_entries(weight)} == set(FORMATS)
    with torch.no_grad():
        weight.mul_(0.5)
    for format in FORMATS:
        changed = replaced_like(model, format)
        assert relative_error(logits(fast[format]), logits(changed)) < COMPILED


def replaced_like(model, format):
    other = float_model("qwen3_moe")
    other.load_state_dict(model.state_dict())
    return fp4moe.replace_moe(other, format=format, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("fp8", "mxfp4"), ("nvfp4", "fp8_block"), ("mxfp8", "nvfp4")])
def test_layers_of_one_class_in_several_formats(formats):
    """Each layer compiled by itself, with a format of its own, in either way."""
    first, second = (replaced("qwen3_moe", format, whole=True) for format in formats)
    first.model.layers[1] = second.model.layers[1]
    wanted = logits(first)
    floats = float_model("qwen3_moe", whole=True)
    for layer, format in zip(floats.model.layers, formats, strict=True):
        layer.compile(backend=fp4moe.backend, fullgraph=True, options=options(format))
    assert relative_error(logits(floats), wanted) < COMPILED
    inner = CapturingBackend()
    for layer in first.model.layers:
        layer.compile(backend=inner, fullgraph=True)
    assert relative_error(logits(first), wanted) < COMPILED
    assert {m.layer.format for m in fused_parts(first).values()} == set(formats)
    # What differs is in the graph, so that one graph cannot serve both.
    assert len(inner.graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nvfp4", "fp8", "mxfp8"])
def test_the_kernel_chooses_the_experts(format):
    """Also where an empty tensor stands for the biases, in a graph and in a program."""
    inner, ending = CapturingBackend(), "nvfp4_moe" if format == "nvfp4" else "moe"
    fast = compiled(float_model("nemotron_h"), format, inner, routing="fused")
    target = getattr(fp4, f"{ending}_from_logits").default
    assert relative_error(logits(fast), expected("nemotron_h", format)) < COMPILED
    assert operators(inner.graphs[0].graph) == [target]
    plain = exported_floats("nemotron_h")
    program, _ = rewrite_exported(plain, format=format, routing="fused")
    assert operators(program.graph) == [target]
    assert relative_error(run(program), expected("nemotron_h", format)) < COMPILED


def test_the_operator_refuses_a_factor_that_has_no_place():
    weights = [[torch.randn(4, 96, 64)], [], [torch.randn(4, 64, 48)], [], [], []]
    given = torch.randn(3, 64), torch.randn(3, 4), torch.empty(0), torch.ones(4)
    form = ("silu", "gate_up", False, False, "reference", 256)
    routing = ("softmax_topk", 2, 1, 1, 1.0)
    fp4.float_moe_from_logits(*given, *weights, *routing, "nvfp4", *form)
    text = "float_moe_from_logits: output_scale must be empty for fp8"
    with pytest.raises(ShapeError, match=text):
        fp4.float_moe_from_logits(*given, *weights, *routing, "fp8", *form)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_eager_and_compiled_agree_on_a_layer(format):
    """Dynamic shapes, one graph for every number of tokens."""
    (module,) = fused_parts(replaced("qwen3_moe", format)).values()
    inner = CapturingBackend()
    fast = torch.compile(module, backend=inner, fullgraph=True, dynamic=True)
    for count in (3, 5, 8):
        hidden = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
        ids = torch.arange(2 * count).view(count, 2) % 8
        given = hidden, ids, torch.full((count, 2), 0.5)
        assert relative_error(fast(*given), module(*given)) < EAGER
    assert len(inner.graphs) == 1
