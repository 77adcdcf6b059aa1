"""Stacked experts of a class without transformers' stamps: told by their forward, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, experts_class, family, routed
from torch import nn
from torch.nn.utils import parametrize

from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain, replace_moe
from fp4moe.reference import moe_definition

E, H, INNER = 8, 64, 48


def silu_gate(gate, up):
    return F.silu(gate) * up


def clamped_gate(gate, up):
    gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def step_gate(gate, up):
    return F.silu(gate).clamp(max=1.5) * up.clamp(-1.5, 1.5)


class Own(nn.Module):
    """A user's experts: stacks, biases, a loop, and the gate in the midst of it."""

    gate, interleaved, transposed, biased = staticmethod(silu_gate), False, False, False
    gated = True

    def __init__(self, config=None):
        super().__init__()
        rows = (1 + self.gated) * INNER
        first, down = torch.randn(E, rows, H) / 8, torch.randn(E, H, INNER) / 7
        if self.transposed:
            first, down = first.mT.contiguous(), down.mT.contiguous()
        name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(name, nn.Parameter(first))
        self.down_proj = nn.Parameter(down)
        if self.biased:
            name = "gate_up_bias" if self.gated else "up_bias"
            self.register_parameter(name, nn.Parameter(torch.randn(E, rows)))
            self.down_bias = nn.Parameter(torch.randn(E, H))

    def linear(self, x, weight, bias, expert):
        y = x @ weight[expert] if self.transposed else x @ weight[expert].T
        return y + getattr(self, bias)[expert] if self.biased else y

    def inner(self, x, expert):
        if not self.gated:
            return F.relu(self.linear(x, self.up_proj, "up_bias", expert)).square()
        y = self.linear(x, self.gate_up_proj, "gate_up_bias", expert)
        pair = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, -1)
        return self.gate(*pair)

    def forward(self, x, chosen, scores):
        out = torch.zeros_like(x)
        for expert in range(E):
            token, slot = torch.where(chosen == expert)
            y = self.linear(self.inner(x[token], expert), self.down_proj, "down_bias", expert)
            out.index_add_(0, token, y * scores[token, slot, None])
        return out


def variant(base=Own, **members):
    members = {k: staticmethod(v) if k == "gate" else v for k, v in members.items()}
    return type("Variant", (base,), members)


FORMS = {
    "plain": ({}, "silu"),
    "clamped": ({"gate": clamped_gate, "biased": True}, "silu(alpha=1.702,beta=1,limit=1.5)"),
    "interleaved": ({"gate": step_gate, "interleaved": True}, "silu_step(limit=1.5)"),
    "transposed": (
        {"gate": clamped_gate, "interleaved": True, "transposed": True, "biased": True},
        "silu(alpha=1.702,beta=1,limit=1.5)",
    ),
    "ungated": ({"gated": False, "biased": True}, "relu2"),
    "ungated transposed": ({"gated": False, "transposed": True}, "relu2"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_told_by_its_forward(name):
    options, activation = FORMS[name]
    model = Block(variant(**options))
    original, inputs = copy.deepcopy(model.experts), routed(40)
    (row,) = explain(model).blocks
    assert (row.status, row.activation) == ("replaceable", activation)
    assert (row.num_experts, row.hidden_size, row.intermediate_size) == (E, H, INNER)
    replace_moe(model, kernel="reference", progress=False)
    parts = model.experts.weights.dequantize()
    biases = {n: p.detach() for n, p in original.named_parameters() if n.endswith("_bias")}
    if "gate_up_bias" in biases:
        rows = biases.pop("gate_up_bias")
        pair = (rows[:, ::2], rows[:, 1::2]) if original.interleaved else rows.chunk(2, 1)
        biases |= dict(zip(("gate_bias", "up_bias"), pair, strict=True))
    assert {n for n in parts if n.endswith("_bias")} == set(biases)
    assert all(torch.equal(parts[n], bias) for n, bias in biases.items())
    expected = moe_definition(*inputs, **parts, activation=activation)
    assert torch.equal(model(*inputs), expected), "the definition on the same numbers"
    error = (expected - original(*inputs)).norm() / original(*inputs).norm()
    assert 0.02 < float(error) < 0.3


def beyond(self, x, chosen, scores):
    """The id behind the last expert is one that hands its input on."""
    out = Own.forward(self, x, chosen, scores)
    return out + x * (scores * (chosen == E)).sum(1, keepdim=True)


def scaled_input(self, x, chosen, scores):
    return Own.forward(self, x * scores.mean(1, keepdim=True), chosen, torch.ones_like(scores))


def with_norm(self, x, chosen, scores):
    return Own.forward(self, F.layer_norm(x, (x.shape[-1],)), chosen, scores)


def fixed_width(self, x, chosen, scores):
    return Own.forward(self, x.view(-1, H), chosen, scores)


class Extra(Own):
    def __init__(self, config=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(E))


NEAR_MISSES = {
    "an expert that hands on": (variant(forward=beyond), "expert id 8, behind the last"),
    "weights on the input": (variant(forward=scaled_input), "it does not compute a gated silu"),
    "a norm": (variant(forward=with_norm), "what its forward computes is not act(gate) * up"),
    "a fixed width": (variant(forward=fixed_width), "its forward cannot be asked for its numbers"),
    "one more parameter": (Extra, "its parameters {"),
    "tanh": (
        variant(gate=lambda g, u: torch.tanh(g) * u),
        "what its forward computes is not act(gate) * up with one of our activations; closest",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_with_their_reason(name):
    make, reason = NEAR_MISSES[name]
    model = Block(make)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedError) as raised:
        replace_moe(model, kernel="reference", progress=False)
    assert f"experts: {reason}" in str(raised.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_class_that_clamps_beside_its_gate_is_refused():
    """Only large tokens tell it from what its _apply_gate computes."""
    experts = experts_class()
    experts._apply_gate = lambda self, x: step_gate(*(7 / 1.5 * half for half in x.chunk(2, -1)))
    model = Block(experts)
    with pytest.raises(UnsupportedError, match=r"its _apply_gate is not act\(gate\) \* up"):
        replace_moe(model, progress=False)

    class Clamping(experts_class()):
        def _apply_gate(self, x):
            gate, up = x.chunk(2, -1)
            return F.silu(gate).clamp(max=7) * up.clamp(-7, 7)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = super().forward(hidden_states, top_k_index, top_k_weights)
            return out.clamp(-20, 20)

    with pytest.raises(UnsupportedError, match=r"silu_step.*on large random tokens, limit"):
        replace_moe(Block(Clamping, "eager"), progress=False)


def test_an_adapter_is_refused_by_name():
    model = Block(Own)
    parametrize.register_parametrization(model.experts, "down_proj", nn.Identity())
    with pytest.raises(UnsupportedError, match="down_proj is parametrised, as unmerged adapters"):
        replace_moe(model, kernel="reference", progress=False)


def test_step_experts_do_not_route_by_themselves():
    model = family("step3p7")
    with pytest.raises(UnsupportedError, match="use routing='given'"):
        replace_moe(model, kernel="reference", progress=False, routing="fused")
