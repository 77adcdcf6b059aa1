"""Captured whole: no graph break, one operator a block, the numbers of the replaced model.

Through `fp4moe.backend` and after `replace_moe`, with both implementations of the experts, static
and dynamic shapes, and through `generate()`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import warnings

import pytest
import torch
from tiny_models import (
    MODELS,
    CapturingBackend,
    enlarge_latent_experts,
    generate,
    keep_layers,
    packed_addresses,
    table_entries,
)
from transformers import CompileConfig

import fp4moe
import fp4moe.compile.backend
from fp4moe.errors import UnsupportedError
from fp4moe.testing import relative_error

OPERATOR = torch.ops.fp4moe.nvfp4_moe.default
# One MoE layer, for NemotronH attention behind it: what a case of the matrix compiles.
ONE_BLOCK = {"gemma4": (0,), "nemotron_h": (1, 2), "nemotron_h_latent": (1, 2), "qwen3_moe": (0,)}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
GRAD_MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
SHAPES = ("static", "mark_dynamic", "dynamic=True")
# Each model with each way of shapes, and any two settings of different kinds in some row.
MATRIX = [
    (name, IMPLEMENTATIONS[(i + j) % 2], list(GRAD_MODES)[(i // 2 + j) % 2], shapes)
    for i, name in enumerate(MODELS)
    for j, shapes in enumerate(SHAPES)
]

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
@pytest.mark.parametrize("name, implementation, grad_mode, shapes", MATRIX)
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
@pytest.mark.parametrize("name, implementation, grad_mode, shapes", MATRIX)
def test_replaced_with_either_implementation(name, implementation, grad_mode, shapes):
    inner = CapturingBackend()
    model = replaced_model(name, implementation)
    compiled = torch.compile(
        model, backend=inner, fullgraph=True, dynamic=True if shapes == "dynamic=True" else None
    )
    with GRAD_MODES[grad_mode]():
        for other in sorted(IMPLEMENTATIONS, key=lambda one: one != implementation):
            model.set_experts_implementation(other)
            actual = logits(compiled, marked(tokens(5), shapes))
            assert torch.equal(actual, expected(name, 5))
        if shapes != "static":
            assert torch.equal(logits(compiled, tokens(7)), expected(name, 7))
    check_unbroken(graphs=1)
    assert len(inner.graphs) == 1
    check_graph(inner.graphs[0], blocks=1)


def test_the_matrix_has_each_pair_of_settings():
    kinds = (MODELS, IMPLEMENTATIONS, GRAD_MODES, SHAPES)
    for first, second in itertools.combinations(range(len(kinds)), 2):
        expected = set(itertools.product(kinds[first], kinds[second]))
        assert {(row[first], row[second]) for row in MATRIX} == expected


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
@pytest.mark.parametrize("name, whole", [("nemotron_h", False), ("qwen3_moe", True)])
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
        assert "the loop of their implementation 'eager' breaks the graph" in ours[0]
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
