"""Captured whole: no graph break, one operator a block, the numbers of the replaced model.

Through `fp4moe.backend` and after `replace_moe`, with both implementations of the experts, static
and dynamic shapes, and through `generate()`.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings

import pytest
import torch
from tiny_models import (
    MODELS,
    Block,
    CapturingBackend,
    enlarge_latent_experts,
    experts_class,
    generate,
    keep_layers,
    packed_addresses,
    routed,
    table_entries,
)
from transformers import CompileConfig

import fp4moe
import fp4moe.compile.backend
from fp4moe.errors import UnsupportedError
from fp4moe.kernels import Operands
from fp4moe.passes.graph.show import show_graph
from fp4moe.testing import relative_error

expecttest = pytest.importorskip("expecttest", reason="optional package")
assert_expected_inline = expecttest.assert_expected_inline
OPERATOR = torch.ops.fp4moe.nvfp4_moe.default
# One MoE layer, for NemotronH attention behind it: what a case of the matrix compiles.
ONE_BLOCK = {"gemma4": (0,), "nemotron_h": (1, 2), "nemotron_h_latent": (1, 2), "qwen3_moe": (0,)}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
GRAD_MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
SHAPES = ("static", "mark_dynamic", "dynamic=True")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@functools.cache
def template(name, whole=False):
    """The float model in evaluation mode; tests work on copies."""
    model = enlarge_latent_experts(MODELS[name]())
    return model if whole else keep_layers(model, *ONE_BLOCK[name])


def float_model(name, implementation="grouped_mm", whole=False):
    model = copy.deepcopy(template(name, whole))
    model.set_experts_implementation(implementation)
    return model


def replaced_model(name, implementation="grouped_mm", whole=False):
    return fp4moe.replace_moe(float_model(name, implementation, whole), progress=False)


def tokens(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 128, (2, length), generator=generator)


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@functools.cache
def expected(name, length, whole=False):
    """The replaced model in eager."""
    with torch.no_grad():
        return logits(replaced_model(name, whole=whole), tokens(length))


def inside_experts(node):
    stack = node.meta.get("nn_module_stack", {}).values()
    # transformers' decorator gives every class of experts an _apply_gate.
    return any(hasattr(cls, "_apply_gate") or cls is fp4moe.module.FusedExperts for _, cls in stack)


def operators(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is OPERATOR]


def check_graph(graph_module, blocks):
    """One operator a block, and nothing else where the experts were."""
    assert len(operators(graph_module)) == blocks
    left = [
        node
        for node in graph_module.graph.nodes
        if inside_experts(node)
        and node.op not in ("placeholder", "get_attr")
        and node.target is not OPERATOR
        # Sizes, which others may use.
        and isinstance(node.meta.get("example_value"), torch.Tensor)
    ]
    assert left == []
    assert not any("grouped_mm" in str(node.target) for node in graph_module.graph.nodes)


def check_unbroken(graphs):
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


def marked(ids, shapes):
    if shapes == "mark_dynamic":
        ids = ids.clone()
        torch._dynamo.mark_dynamic(ids, 1)
    return ids


@pytest.fixture
def counters():
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("grad_mode", GRAD_MODES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_backend(name, implementation, grad_mode, shapes):
    inner = CapturingBackend()
    compiled = torch.compile(
        float_model(name, implementation),
        backend=fp4moe.backend,
        options={"inner_backend": inner, "on_no_match": "error"},
        fullgraph=True,
        dynamic=True if shapes == "dynamic=True" else None,
    )
    with GRAD_MODES[grad_mode]():
        actual = logits(compiled, marked(tokens(5), shapes))
        assert torch.equal(actual, expected(name, 5))
        if shapes != "static":
            assert torch.equal(logits(compiled, tokens(7)), expected(name, 7))
    check_unbroken(graphs=1)
    assert len(inner.graphs) == 1
    check_graph(inner.graphs[0], blocks=1)
    (operator,) = operators(inner.graphs[0])
    sizes = operator.meta["example_value"].shape
    assert isinstance(sizes[0], torch.SymInt) == (shapes != "static")
    assert isinstance(sizes[1], int)


# After replace_moe nobody asks for the implementation: one graph must serve both.
@pytest.mark.slow
@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("grad_mode", GRAD_MODES)
@pytest.mark.parametrize("name", MODELS)
def test_replaced_with_either_implementation(name, grad_mode, shapes):
    inner = CapturingBackend()
    model = replaced_model(name, "grouped_mm")
    compiled = torch.compile(
        model, backend=inner, fullgraph=True, dynamic=True if shapes == "dynamic=True" else None
    )
    with GRAD_MODES[grad_mode]():
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            actual = logits(compiled, marked(tokens(5), shapes))
            assert torch.equal(actual, expected(name, 5))
        if shapes != "static":
            assert torch.equal(logits(compiled, tokens(7)), expected(name, 7))
    check_unbroken(graphs=1)
    assert len(inner.graphs) == 1
    check_graph(inner.graphs[0], blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_can_fail(name):
    # What the cases above look for is there without fp4moe, and the experts move the logits.
    for implementation, target in zip(IMPLEMENTATIONS, ("grouped_mm", "bmm"), strict=True):
        inner = CapturingBackend()
        compiled = torch.compile(float_model(name, implementation), backend=inner, fullgraph=True)
        with torch.no_grad():
            actual = logits(compiled, tokens(5))
        (graph,) = inner.graphs
        found = [n for n in graph.graph.nodes if target in str(n.target) and inside_experts(n)]
        assert len(found) == 2
        assert relative_error(expected(name, 5), actual) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("counters")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_of_two_blocks(name):
    inner = CapturingBackend()
    compiled = torch.compile(
        float_model(name, "batched_mm", whole=True),
        backend=fp4moe.backend,
        options={"inner_backend": inner},
        fullgraph=True,
    )
    with torch.no_grad():
        assert torch.equal(logits(compiled, tokens(5)), expected(name, 5, whole=True))
    check_unbroken(graphs=1)
    assert len(inner.graphs) == 1
    check_graph(inner.graphs[0], blocks=2)


@pytest.mark.slow
@pytest.mark.parametrize("name, whole", [("gemma4", False), ("nemotron_h", True)])
def test_three_lengths_compile_twice_and_pack_once(name, whole):
    inner = CapturingBackend()
    model = float_model(name, whole=whole)
    compiled = torch.compile(
        model, backend=fp4moe.backend, options={"inner_backend": inner}, fullgraph=True
    )
    with torch.no_grad():
        # Static, then automatic dynamic.
        for length, compiles in ((5, 1), (7, 2), (9, 2)):
            actual = logits(compiled, tokens(length))
            assert torch.equal(actual, expected(name, length, whole))
            assert len(inner.graphs) == compiles
    blocks = len(operators(inner.graphs[0]))
    assert blocks == (2 if whole else 1)
    weights = [p for n, p in model.named_parameters() if n.endswith(("up_proj", "gate_up_proj"))]
    weights = [p for p in weights if p.ndim == 3]
    assert len(weights) == blocks
    assert all(len(table_entries(weight)) == 1 for weight in weights)
    first, second = (packed_addresses(inner, number) for number in range(2))
    # Six packed tensors and two activation scales a block.
    assert first == second and len(first) == 8 * blocks


@pytest.mark.slow
def test_marked_dynamic_compiles_once_for_three_lengths():
    inner = CapturingBackend()
    compiled = torch.compile(
        float_model("gemma4", whole=True),
        backend=fp4moe.backend,
        options={"inner_backend": inner},
        fullgraph=True,
    )
    with torch.no_grad():
        for length in (5, 7, 9):
            actual = logits(compiled, marked(tokens(length), "mark_dynamic"))
            assert torch.equal(actual, expected("gemma4", length, True))
    assert len(inner.graphs) == 1


def generated(model, prompt, compile_config=None, **options):
    options |= {"compile_config": compile_config, "disable_compile": compile_config is None}
    return generate(model, prompt, **options)


def compile_config(**settings):
    config = CompileConfig(fullgraph=True, **settings)
    config._compile_all_devices = True
    return config


def seen_tokens(graph_module):
    """What T the operators of a graph see; None where it is symbolic."""
    sizes = [n.meta["example_value"].shape[0] for n in operators(graph_module)]
    return {size if isinstance(size, int) else None for size in sizes}


# generate() runs the prefill in eager, unless it comes in chunks: then they are compiled too.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_generate_compiles_prefill_and_decode(name):
    prompt = tokens(8)
    eager = generated(replaced_model(name, whole=True), prompt)
    model = float_model(name, whole=True)
    assert not torch.equal(generated(model, prompt), eager)
    inner = CapturingBackend()
    backend = functools.partial(fp4moe.backend, options={"inner_backend": inner})
    actual = generated(model, prompt, compile_config(backend=backend), prefill_chunk_size=4)
    assert torch.equal(actual, eager)
    assert actual.shape == (2, 14)
    # Two rows of four prompt tokens, two rows of one token.
    assert {8, 2} <= set.union(*map(seen_tokens, inner.graphs))
    assert all(len(operators(graph)) == 2 for graph in inner.graphs)
    first, *others = (packed_addresses(inner, number) for number in range(len(inner.graphs)))
    assert first and all(other == first for other in others)
    # What generate() passes reaches the inner backend.
    assert all(keywords == {"mode": "reduce-overhead"} for keywords in inner.keywords)


@pytest.mark.slow
def test_generate_takes_options_in_place_of_a_mode():
    prompt = tokens(8)
    inner = CapturingBackend()
    config = compile_config(
        backend=fp4moe.backend, mode=None, options={"inner_backend": inner, "kernel": "reference"}
    )
    model = replaced_model("gemma4", whole=True)
    eager = generated(model, prompt)
    assert torch.equal(generated(model, prompt, config), eager)
    assert inner.graphs and all(keywords == {} for keywords in inner.keywords)


class TestEagerImplementation:
    @pytest.fixture(autouse=True)
    def not_yet_warned(self, monkeypatch):
        monkeypatch.setattr(fp4moe.compile.backend, "_warned_eager", False)

    @pytest.mark.slow
    def test_warns_once_with_the_fix(self):
        inner = CapturingBackend()
        model = float_model("qwen3_moe", "eager")
        compiled = torch.compile(model, backend=fp4moe.backend, options={"inner_backend": inner})
        with torch.no_grad():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                actual = logits(compiled, tokens(5))
            assert torch.equal(actual, logits(model, tokens(5)))
        assert len(inner.graphs) > 1
        ours = [str(w.message) for w in caught if "fp4moe" in str(w.message)]
        assert len(ours) == 1
        assert "must not be 'eager', whose loop breaks the graph" in ours[0]
        assert "set_experts_implementation('grouped_mm') before compiling" in ours[0]

    @pytest.mark.slow
    def test_can_be_an_error(self):
        compiled = torch.compile(
            float_model("qwen3_moe", "eager"),
            backend=fp4moe.backend,
            options={"inner_backend": "eager", "on_no_match": "error"},
        )
        with (
            torch.no_grad(),
            pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="'eager'") as caught,
        ):
            logits(compiled, tokens(5))
        assert isinstance(caught.value.inner_exception, UnsupportedError)


def packed(*names):
    return ", ".join(f"fp4moe_N_{name}" for name in names)


def shown(model, path, call, operands):
    inner = CapturingBackend()
    compiled = torch.compile(
        model, backend=fp4moe.backend, options={"inner_backend": inner}, fullgraph=True
    )
    with torch.no_grad():
        call(compiled)
    text = show_graph(inner.graphs[0], within=path)
    # Two numbers that depend on what ran before: of the packed weights, and of the symbol.
    text = re.sub(r"\bs\d+\b", "s", re.sub(r"fp4moe_\d+", "fp4moe_N", text))
    assert packed(*operands) in text
    return (
        text.replace(packed(*operands), "<packed experts>")
        .replace(", <", ",\n    <")
        .replace("default(", "default(\n    ")
    )


def shown_model(name, dynamic):
    ids = marked(tokens(5), "mark_dynamic" if dynamic else "static")
    path = "model.layers.0.mixer.experts" if name == "nemotron_h" else "model.layers.0.experts"
    operands = Operands._fields[:-2]
    return shown(float_model(name), path, lambda compiled: logits(compiled, ids), operands)


class TestShownGraph:
    def test_gemma4(self):
        assert_expected_inline(
            shown_model("gemma4", dynamic=False),
            """\
nvfp4_moe_default: f32[10, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_9, top_k_index, top_k_weights_2,
    <packed experts>, gelu_tanh, True, reference, 8, 0)""",
        )

    @pytest.mark.slow
    def test_nemotron_h(self):
        assert_expected_inline(
            shown_model("nemotron_h", dynamic=False),
            """\
nvfp4_moe_default: f32[10, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_4, topk_indices, topk_weights_2,
    <packed experts>, relu2, False, reference, 8, 0)""",
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
    def test_a_dynamic_length_changes_the_shape_alone(self, name):
        static = shown_model(name, dynamic=False)
        assert shown_model(name, dynamic=True) == static.replace("f32[10, 64]", "f32[2*s, 64]")
        assert "f32[10, 64]" in static

    def test_biases_and_a_clamp(self):
        class Clamped(experts_class(has_bias=True)):
            def _apply_gate(self, both):
                gate, up = both.chunk(2, -1)
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                return gate * torch.sigmoid(1.702 * gate) * (up + 1)

        operands = (
            *("gate_up_packed", "gate_up_block_scale", "gate_up_global_scale", "gate_up_bias"),
            *("down_packed", "down_block_scale", "down_global_scale", "down_bias"),
            *("hidden_scale", "intermediate_scale"),
        )
        assert_expected_inline(
            shown(Block(Clamped), "experts", lambda compiled: compiled(*routed(5)), operands),
            """\
moe_default: f32[5, 64] = fp4moe.moe.default(
    l_hidden_, l_expert_ids_, l_routing_weights_,
    <packed experts>, nvfp4, silu(alpha=1.702,beta=1,limit=7), True, reference, 8, 0)""",
        )
