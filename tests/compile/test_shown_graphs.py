"""The operator in a compiled graph, as `show_graph` prints it."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import MODELS, Block, CapturingBackend, experts_class, keep_layers, routed

import fp4moe
from fp4moe.kernels import Operands
from fp4moe.passes.graph.show import show_graph

expecttest = pytest.importorskip("expecttest", reason="optional package")
assert_expected_inline = expecttest.assert_expected_inline

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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
    ids = torch.randint(1, 128, (2, 5), generator=torch.Generator().manual_seed(5))
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    # One MoE layer, for NemotronH the attention behind it.
    model = keep_layers(MODELS[name](), *((1, 2) if name == "nemotron_h" else (0,)))
    path = "model.layers.0.mixer.experts" if name == "nemotron_h" else "model.layers.0.experts"
    operands = Operands._fields[:-2]
    return shown(model, path, lambda compiled: compiled(input_ids=ids, use_cache=False), operands)


class TestShownGraph:
    @pytest.mark.slow
    def test_gemma4_static(self):
        assert_expected_inline(
            shown_model("gemma4", dynamic=False),
            """\
nvfp4_moe_default: f32[10, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_9, top_k_index, top_k_weights_2,
    <packed experts>, gelu_tanh, True, reference, 8, 0)""",
        )

    @pytest.mark.slow
    def test_gemma4_dynamic(self):
        assert_expected_inline(
            shown_model("gemma4", dynamic=True),
            """\
nvfp4_moe_default: f32[2*s, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_9, top_k_index, top_k_weights_2,
    <packed experts>, gelu_tanh, True, reference, 8, 0)""",
        )

    @pytest.mark.slow
    def test_nemotron_h_static(self):
        assert_expected_inline(
            shown_model("nemotron_h", dynamic=False),
            """\
nvfp4_moe_default: f32[10, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_4, topk_indices, topk_weights_2,
    <packed experts>, relu2, False, reference, 8, 0)""",
        )

    @pytest.mark.slow
    def test_nemotron_h_dynamic(self):
        assert_expected_inline(
            shown_model("nemotron_h", dynamic=True),
            """\
nvfp4_moe_default: f32[2*s, 64] = fp4moe.nvfp4_moe.default(
    hidden_states_4, topk_indices, topk_weights_2,
    <packed experts>, relu2, False, reference, 8, 0)""",
        )

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
