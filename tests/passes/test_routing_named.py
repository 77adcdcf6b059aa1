"""fp4moe::choose_experts in front of a fused operator: the pass reads it as any other routing."""

from __future__ import annotations

import pytest
import torch
from fused_layers import layer
from tiny_models import CapturingBackend
from torch import nn
from torch.nn.functional import linear

import fp4moe
from fp4moe.kernels import Routing
from fp4moe.kernels.reference import REFERENCE
from fp4moe.passes.routing.fuse import fuse_routing

CHOOSE = torch.ops.fp4moe.choose_experts.default
GIVEN = torch.ops.fp4moe.nvfp4_moe.default
FROM_LOGITS = torch.ops.fp4moe.nvfp4_moe_from_logits.default
EXPERTS, SIZE = 8, 32
# A factor per expert moves from the weight into a scale: a few of float32's 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A linear router that chooses by the operator, and fused experts."""

    def __init__(self, routing, biased=False, scaled=False, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.routing = routing
        weights = layer(SIZE, 32, EXPERTS, gated=False, activation="relu2")
        self.experts = fp4moe.FusedExperts(weights, "reference")
        router = torch.randn(EXPERTS, SIZE, generator=generator)
        self.router = nn.Parameter(router.to(dtype), requires_grad=False)
        sizes = [EXPERTS * biased, EXPERTS * scaled]
        self.bias, self.scale = (
            nn.Parameter(torch.rand(n, generator=generator) + 0.5, requires_grad=False)
            for n in sizes
        )

    def forward(self, x):
        logits = linear(x, self.router)
        nothing = logits.new_empty(0)
        bias = self.bias if self.bias.numel() else nothing
        scale = self.scale if self.scale.numel() else nothing
        ids, weights = CHOOSE(logits, bias, scale, *self.routing)
        return self.experts(x, ids, weights.to(logits.dtype))


def tokens(dtype=torch.float32):
    return torch.randn(6, SIZE, generator=torch.Generator().manual_seed(2)).to(dtype)


def captured(model, x):
    backend = CapturingBackend()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    return backend.graphs[0], backend.inputs[0]


SIGMOID = Routing("sigmoid_topk", 3, 4, 2, 2.5)
CASES = {
    "softmax": (Routing("softmax_topk", 3), False, False),
    "softmax scaled": (Routing("softmax_topk", 3, scaling=1.5), False, True),
    "sigmoid": (Routing("sigmoid_topk", 2), False, False),
    "sigmoid in groups": (SIGMOID, True, False),
    "sigmoid in groups scaled": (SIGMOID, True, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_named_nodes_become_one(name, dtype):
    routing, biased, scaled = CASES[name]
    graph, inputs = captured(Block(routing, biased, scaled, dtype), tokens(dtype))
    with torch.no_grad():
        before = graph(*inputs)[0]
        (match,) = fuse_routing(graph, inputs)
        after = graph(*inputs)[0]
    assert match.fused and not match.reasons and match.method.startswith(routing.method)
    targets = [node.target for node in graph.graph.nodes]
    assert FROM_LOGITS in targets and GIVEN not in targets and CHOOSE not in targets
    (node,) = graph.graph.find_nodes(op="call_function", target=FROM_LOGITS)
    assert node.args[11:16] == tuple(routing)
    # The cast of the weights to bfloat16 goes: half a unit of it.
    close = CLOSE if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7 * float(after.std())}
    torch.testing.assert_close(after, before, **close)


def test_what_others_read_stays():
    class Returning(Block):
        def forward(self, x):
            logits = linear(x, self.router)
            nothing = logits.new_empty(0)
            ids, weights = CHOOSE(logits, nothing, nothing, *self.routing)
            return self.experts(x, ids, weights), weights, ids

    graph, inputs = captured(Returning(Routing("softmax_topk", 3)), tokens())
    with torch.no_grad():
        before = graph(*inputs)
        (match,) = fuse_routing(graph, inputs)
        after = graph(*inputs)
    assert match.fused
    targets = [node.target for node in graph.graph.nodes]
    assert FROM_LOGITS in targets and CHOOSE in targets
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])
    torch.testing.assert_close(after[0], before[0], **CLOSE)


def test_weights_that_are_changed_on_the_way_are_not_handed_over():
    class Changing(Block):
        def forward(self, x):
            logits = linear(x, self.router)
            nothing = logits.new_empty(0)
            ids, weights = CHOOSE(logits, nothing, nothing, *self.routing)
            return self.experts(x, ids, weights.square())

    graph, inputs = captured(Changing(Routing("softmax_topk", 3)), tokens())
    (match,) = fuse_routing(graph, inputs)
    assert not match.fused and match.reasons == ("its numbers fit no known method",)
    assert CHOOSE in [node.target for node in graph.graph.nodes]


def test_a_kernel_that_does_not_route_so_keeps_both(monkeypatch):
    monkeypatch.setattr(REFERENCE, "reasons_not_to_route", lambda layer, routing: ["not today"])
    graph, inputs = captured(Block(SIGMOID, True), tokens())
    (match,) = fuse_routing(graph, inputs)
    assert match.reasons == ("kernel reference does not route so: not today",)
    targets = [node.target for node in graph.graph.nodes]
    assert CHOOSE in targets and GIVEN in targets and FROM_LOGITS not in targets
