"""The pages "How to add" of CONTRIBUTING.md, done: an activation and a kernel."""

from __future__ import annotations

import pytest
import torch

import fp4moe
from fp4moe.activations import ACTIVATIONS, Function, get_activation
from fp4moe.kernels.base import Kernel, logical_layout, logical_weights
from fp4moe.kernels.select import KERNELS
from fp4moe.testing import relative_error

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 3, 32, 16, 5, 2


@pytest.fixture
def floats():
    torch.manual_seed(0)
    shapes = {
        "gate": (EXPERTS, INNER, HIDDEN),
        "up": (EXPERTS, INNER, HIDDEN),
        "down": (EXPERTS, HIDDEN, INNER),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def call():
    torch.manual_seed(1)
    return (
        torch.randn(TOKENS, HIDDEN),
        torch.randint(0, EXPERTS, (TOKENS, TOP_K)),
        torch.rand(TOKENS, TOP_K),
    )


def test_an_activation_is_one_row(monkeypatch, floats, call):
    row = Function("cube", lambda x: x**3, lambda x: 3 * x**2, "x^3")
    monkeypatch.setitem(ACTIVATIONS, row.name, row)
    weights = fp4moe.ExpertWeights.quantize(**floats, activation="cube(limit=0.5)")
    parts = weights.dequantize()
    actual = fp4moe.fused_moe(call[0], weights, *call[1:], kernel="reference")
    out = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for t in range(TOKENS):
        for k in range(TOP_K):
            e, x = int(call[1][t, k]), call[0][t].double()
            gate, up = parts["gate"][e].double() @ x, parts["up"][e].double() @ x
            inner = gate.clamp(max=0.5) ** 3 * up.clamp(-0.5, 0.5)
            out[t] += call[2][t, k].double() * (parts["down"][e].double() @ inner)
    # Three float32 sums of at most 32 products, against float64; the cube triples the first.
    assert relative_error(actual.double(), out) < 5 * 32 * 2**-24


class Plain(Kernel):
    """Layouts, activations and `run`: all that a kernel for any device has to write."""

    name = "plain"
    layouts = {"nvfp4": logical_layout(16)}  # noqa: RUF012

    def activation_reasons(self, layer, ready):
        return [] if layer.activation == "silu" else ["it has silu alone"]

    def run(self, call):
        parts = logical_weights(call.operands, call.layer).dequantize()
        gate, up, down = parts["gate"], parts["up"], parts["down"]
        combine = get_activation(call.layer.activation).combine
        out = torch.zeros_like(call.hidden)
        for slot in range(call.expert_ids.shape[1]):
            ids = call.expert_ids[:, slot]
            inner = combine(
                torch.einsum("th,tih->ti", call.hidden, up[ids]),
                torch.einsum("th,tih->ti", call.hidden, gate[ids]),
            )
            out += call.routing_weights[:, slot, None] * torch.einsum(
                "ti,thi->th", inner, down[ids]
            )
        return out


def test_a_kernel_is_one_class_and_one_row(monkeypatch, floats, call):
    monkeypatch.setitem(KERNELS, "plain", Plain())
    weights = fp4moe.ExpertWeights.quantize(**floats, activation="silu")
    actual = fp4moe.fused_moe(call[0], weights, *call[1:], kernel="plain")
    expected = fp4moe.fused_moe(call[0], weights, *call[1:], kernel="reference")
    # float32 sums of at most 32 products.
    assert relative_error(actual, expected) < 32 * 2**-24
    relu = fp4moe.ExpertWeights.quantize(**floats, activation="relu")
    with pytest.raises(
        fp4moe.errors.UnsupportedError, match="fused_moe: kernel 'plain' cannot run"
    ):
        fp4moe.fused_moe(call[0], relu, *call[1:], kernel="plain")
