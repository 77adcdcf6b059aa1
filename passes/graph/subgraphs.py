"""The graphs inside a graph: bodies of higher-order operators, such as nested compile regions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from .attributes import read_attribute
from .dataflow import hinted_shape

__all__ = ["SubgraphCall", "subgraph_calls"]


@dataclasses.dataclass(frozen=True)
class SubgraphCall:
    """A call of a higher-order operator with one of its graphs.

    Attributes:
        node: the call. graph_module: the graph that it runs.
        operands: what feeds each of the graph's placeholders; None where that is not one node of
            the same shape.
        plain: whether the operands are the last arguments of the call, one by one.
    """

    node: fx.Node
    graph_module: fx.GraphModule
    operands: tuple[fx.Node | None, ...]
    plain: bool


def subgraph_calls(gm: fx.GraphModule) -> Iterator[SubgraphCall]:
    """Yield each pair of a higher-order call and a graph that it runs, in graph order."""
    for node in gm.graph.nodes:
        if not isinstance(node.target, HigherOrderOperator):
            continue
        leaves: list[Any] = []
        fx.node.map_aggregate(node.args, leaves.append)
        bodies = [body for leaf in leaves if (body := _body(gm, leaf)) is not None]
        operands = [leaf for leaf in leaves if _body(gm, leaf) is None]
        for body in bodies:
            inner = body.graph.find_nodes(op="placeholder")
            given = operands[len(operands) - len(inner) :]
            if len(given) == len(inner):
                fitting = tuple(
                    a if _fits(a, b) else None for a, b in zip(given, inner, strict=True)
                )
                last = node.args[len(node.args) - len(inner) :]
                yield SubgraphCall(node, body, fitting, list(last) == given)


def _body(gm: fx.GraphModule, leaf: Any) -> fx.GraphModule | None:
    if not isinstance(leaf, fx.Node) or leaf.op != "get_attr":
        return None
    found = read_attribute(gm, leaf)
    return found if isinstance(found, fx.GraphModule) else None


def _fits(given: Any, placeholder: fx.Node) -> bool:
    if not isinstance(given, fx.Node):
        return False
    # A scan hands over slices, which are other tensors at each step.
    return hinted_shape(given) == hinted_shape(placeholder)
