"""Blocks that look like experts and are none, and the error of a rewritten model."""

from __future__ import annotations

import pathlib

import torch
import torch.nn.functional as F
from moe_writers import (
    ROUTES,
    WRITERS,
    BatchedMM,
    DenseScatter,
    GatherEinsum,
    GroupedMM,
    LoopIndexAdd,
    LoopMask,
    Model,
    Sizes,
    Writer,
    inputs,
)
from torch import nn

from fp4moe.experts import ExpertWeights
from fp4moe.passes import rewrite_moe
from fp4moe.testing import relative_error

OPERATOR = torch.ops.fp4moe.float_moe.default


TABLE = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "ways_of_writing.md"


# What a tracer raises where Python would need a value that only a run knows.
NOT_CAPTURED = (
    torch.fx.proxy.TraceError,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
    torch._dynamo.exc.UserError,
    torch._dynamo.exc.Unsupported,
    TypeError,
)


def dequantized(model: Model) -> Model:
    """The same model on the weights that NVFP4 holds: what a rewritten graph must compute."""
    writer = model.experts
    parts = {name: part.float() for name, part in writer.parts.items()}
    packed = ExpertWeights.quantize(**parts, activation="silu").dequantize()
    other = type(writer)(writer.sizes, writer.activation, writer.gated)
    other.parts = packed
    other.build({name: part.contiguous() for name, part in packed.items()})
    changed = Model(other, model.gate is not None, model.batched, model.shared is not None)
    for name in ("gate", "shared"):
        if getattr(model, name) is not None:
            getattr(changed, name).weight = nn.Parameter(getattr(model, name).weight.float())
    return changed.requires_grad_(False)


def error_after_rewrite(model: Model, args, captured):
    """(report, relative RMS difference from the original on dequantised weights, the graph)."""
    graph, values = captured if isinstance(captured, tuple) else ROUTES[captured](model, args)
    with torch.no_grad():
        report = rewrite_moe(graph, values)
        result = graph(*values)
        actual = result[0] if isinstance(result, (tuple, list)) else result
        expected = dequantized(model)(*(a.float() if a.is_floating_point() else a for a in args))
    return report, relative_error(actual, expected), graph


# Float32 sums of up to 64 terms in another order, sqrt(64) * 2^-24 each, twice, ten-fold: 1e-5.
# The grouped ones multiply in bfloat16, as grouped_mm must: three roundings of 2^-9, doubled.
LIMIT = {False: 1e-5, True: 1.2e-2}


def limit(name: str) -> float:
    return LIMIT[issubclass(WRITERS[name], GroupedMM)]


def row(name: str) -> list[str]:
    """What one way of writing becomes on each route."""
    torch._dynamo.reset()
    sizes = Sizes()
    model, args = Model(WRITERS[name](sizes, "silu", True)), inputs(sizes)
    return [cell(name, route, model, args) for route in ROUTES]


def cell(name: str, route: str, model: Model, args) -> str:
    try:
        captured = ROUTES[route](model, args)
    except NOT_CAPTURED:
        return "not captured"
    report, error, graph = error_after_rewrite(model, args, captured)
    if not report.count:
        return "refused" if report.blocks else "not found"
    assert report.count == 1 and error < limit(name), (error, str(report))
    assert len([n for n in graph.graph.nodes if n.target is OPERATOR]) == 1
    return "matched"


def table() -> dict[str, list[str]]:
    """The rows of the committed table."""
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}


class Twisted(BatchedMM):
    """Something between the two products that no activation does."""

    def between(self, y):
        raise NotImplementedError

    def inner(self, first):
        return self.between(super().inner(first))


def twisted(change):
    return type("Twisted", (Twisted,), {"between": lambda self, y: change(y)})


class UpBiased(GatherEinsum):
    def build(self, parts):
        super().build(parts)
        self.bias = nn.Parameter(torch.ones(self.sizes.experts, self.sizes.intermediate))

    def forward(self, hidden, ids, weights):
        up = torch.einsum("th,tkih->tki", hidden, self.up[ids]) + self.bias[ids]
        gate = torch.einsum("th,tkih->tki", hidden, self.gate[ids])
        y = torch.einsum("tki,tkhi->tkh", self.both(gate, up), self.down[ids])
        return (y * weights.unsqueeze(-1)).sum(1)


class UpBiasedLoop(LoopMask):
    def build(self, parts):
        super().build(parts)
        for expert in self.experts:
            expert["up"].bias = nn.Parameter(torch.ones(self.sizes.intermediate))


class NormedLoop(LoopIndexAdd):
    def build(self, parts):
        super().build(parts)
        for expert in self.experts:
            expert["norm"] = nn.RMSNorm(self.sizes.hidden)

    def one(self, expert, x):
        return super().one(expert, expert["norm"](x))


class SecondUse(DenseScatter):
    def forward(self, hidden, ids, weights):
        dense = weights.new_zeros(hidden.shape[0], self.sizes.experts).scatter(1, ids, weights)
        x = hidden.expand(self.sizes.experts, -1, -1)
        inner = self.inner(torch.bmm(x, self.first.mT))
        y = (torch.bmm(inner, self.down.mT) * dense.t().unsqueeze(-1)).sum(0)
        return y + inner.mean((0, 2)).unsqueeze(-1)


class AllWeighed(DenseScatter):
    """Experts that were not selected count a little."""

    def forward(self, hidden, ids, weights):
        dense = weights.new_full((hidden.shape[0], self.sizes.experts), 0.01)
        dense = dense.scatter(1, ids, weights)
        dense = torch.tanh(dense)
        x = hidden.expand(self.sizes.experts, -1, -1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first.mT)), self.down.mT)
        return (y * dense.t().unsqueeze(-1)).sum(0)


class OneApart(LoopMask):
    """The last expert has another activation."""

    def one(self, expert, x):
        if expert is not self.experts[-1]:
            return super().one(expert, x)
        up = expert["up"](x)
        return expert["down"](torch.tanh(expert["gate"](x)) * up)


class Copies(LoopMask):
    """The id behind the last expert copies its input."""

    def forward(self, hidden, ids, weights):
        copied = (weights * (ids == self.sizes.experts)).sum(-1, keepdim=True)
        return super().forward(hidden, ids, weights) + hidden * copied


class CopiesOneHot(LoopMask):
    """LongCat's way: a mask for each expert, of which the last has none but copies."""

    def forward(self, hidden, ids, weights):
        mask = F.one_hot(ids, self.sizes.experts + 1).to(weights.dtype)
        out = hidden * (mask[..., self.sizes.experts] * weights).sum(-1, keepdim=True)
        for index, expert in enumerate(self.experts):
            out = out + self.one(expert, hidden) * (mask[..., index] * weights).sum(
                -1, keepdim=True
            )
        return out


LOOK_ALIKES: dict[str, tuple[type[Writer], str]] = {
    "clamp": (twisted(lambda y: y.clamp(-1, 1)), "closest is gated (gate_up) silu with relative"),
    "clamp that only large values meet": (
        twisted(lambda y: y.clamp(-40, 40)),
        "closest is gated (gate_up) silu with relative error",
    ),
    "dropout in training": (
        twisted(lambda y: F.dropout(y, 0.1, training=True)),
        "closest is gated (gate_up) silu with relative error",
    ),
    "norm without weight": (
        twisted(lambda y: F.layer_norm(y, y.shape[-1:])),
        "its numbers fit no known form; closest is gated",
    ),
    "wrong activation": (twisted(torch.tanh), "its numbers fit no known form; closest is gated"),
    "gelu by a sigmoid": (
        twisted(lambda y: y * torch.sigmoid(1.702 * y)),
        "its numbers fit no known form; closest is gated",
    ),
    "bias of up alone": (UpBiased, "it has biases, but none behind "),
    "bias of up alone in a loop": (UpBiasedLoop, "it has biases, but none behind "),
    "norm for each expert": (NormedLoop, "its numbers fit no known form; closest is gated"),
    "one expert apart": (OneApart, "its numbers fit no known form; closest is gated ("),
    "experts that copy": (Copies, "asks for experts beyond the 4 that have weights"),
    "experts that copy, one-hot": (CopiesOneHot, "asks for experts beyond the 4 that have weights"),
    "second use": (SecondUse, "its intermediate"),
    "all weighed": (AllWeighed, "its dense weighting weighs experts that were not selected"),
}
