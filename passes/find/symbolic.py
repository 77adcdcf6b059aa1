"""Read graphs of torch.fx.symbolic_trace, which carry no shapes and call modules.

The search runs on a copy with shapes, whose Linear modules are weights and a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fp4moe.borrowed import random_state_kept

from ..graph.dataflow import meta_value
from .region import Region

__all__ = ["has_shapes", "in_original", "with_shapes"]


def has_shapes(gm: fx.GraphModule) -> bool:
    """Whether a tracer has written down what each node produces."""
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    return any("example_value" in n.meta or "val" in n.meta for n in calls)


def with_shapes(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Return a copy of the graph (of no weights) with shapes, and its nodes' originals."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, val_map=copies)
    graph.output(output)
    origin = {copy: node for node, copy in copies.items()}
    copied = fx.GraphModule(gm, graph)
    for node in list(graph.nodes):
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is torch.nn.Linear:
            with graph.inserting_before(node):
                weight = graph.get_attr(f"{node.target}.weight")
                bias = graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
                linear = graph.call_function(
                    torch.nn.functional.linear, (*node.args, weight, bias), dict(node.kwargs)
                )
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
            origin[linear] = origin.pop(node)
    copied.recompile()
    # With a shape environment boolean masks have sizes; those of the inputs stay numbers.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake = [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value
        for value in example_inputs
    ]
    with torch.no_grad(), random_state_kept():
        FakeTensorProp(copied, mode).propagate_dont_convert_inputs(*fake)
    return copied, origin


def in_original(region: Region, origin: dict[fx.Node, fx.Node]) -> Region:
    """Return the region of a copy in terms of its original, whose borders get shapes."""

    def original(node: fx.Node | None) -> Any:
        if node is None:
            return None
        found = origin.get(node, node)
        found.meta.setdefault("val", meta_value(node))
        return found

    return dataclasses.replace(
        region,
        nodes=[origin[node] for node in region.nodes if node in origin],
        hidden=original(region.hidden),
        expert_ids=original(region.expert_ids),
        routing_weights=original(region.routing_weights),
        weights={
            role: tuple(original(n) if n in origin else n for n in nodes)
            for role, nodes in region.weights.items()
        },
        output=original(region.output),
        aliases=tuple(origin[node] for node in region.aliases),
    )
