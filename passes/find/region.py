"""A region that may be a mixture of experts, and the locator that goes by module names.

Here a region is the set of nodes that dynamo recorded inside one call of a stamped experts module
(`nn_module_stack`), whatever implementation the module ran. Its inputs are told apart by shape and
dtype: two 3-D weights, integer ids [T, K], float routing weights [T, K], hidden [T, H].
`by_flow.py` proposes regions of graphs without such names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from ..graph.dataflow import hinted_shape, meta_value

__all__ = ["Region", "find_regions", "innermost_module"]


@dataclasses.dataclass
class Region:
    """A part of a graph that takes hidden states and a selection of experts and gives one tensor.

    Attributes:
        path: dotted name of the module. module_class: name of its class.
        nodes: its nodes in graph order, without the sources of its weights.
        reasons: why it cannot be a region to rewrite; empty where it may.
        hidden: [T, H], or [B, S, H]. expert_ids: [T, K] or [B, S, K] integers.
        routing_weights: of the shape of expert_ids; [T, E] when dense; None where nothing is
            weighted.
        dense: whether routing_weights has a column for each expert, zero where not chosen.
        weights: the sources of "first" (gate_up, up, or one of gate and up), "second" (the other of
            gate and up, where they are apart) and "down"; one stacked tensor [E, ...], or E of 2
            axes in the order of the experts.
        extras: other float sources: biases, scales, norms.
        output: the tensor that leaves it.
        aliases: nodes that are the same memory as output once it is computed.
        by_flow: found by data flow, not by a module's name.
        support: the nodes that make a dense routing_weights from expert_ids.
    """

    path: str
    module_class: str
    nodes: list[fx.Node]
    reasons: list[str] = dataclasses.field(default_factory=list)
    hidden: fx.Node | None = None
    expert_ids: fx.Node | None = None
    routing_weights: fx.Node | None = None
    dense: bool = False
    weights: dict[str, tuple[fx.Node, ...]] = dataclasses.field(default_factory=dict)
    extras: tuple[fx.Node, ...] = ()
    output: fx.Node | None = None
    aliases: tuple[fx.Node, ...] = ()
    by_flow: bool = False
    support: list[fx.Node] = dataclasses.field(default_factory=list)

    def inputs(self) -> dict[str, fx.Node]:
        """The tensors that feed the region, by role; "first 3" is that of expert 3."""
        roles = ("hidden", "expert_ids", "routing_weights")
        found = {role: node for role in roles if (node := getattr(self, role)) is not None}
        for role, nodes in self.weights.items():
            for expert, node in enumerate(nodes):
                found[role if len(nodes) == 1 else f"{role} {expert}"] = node
        return found | {f"extra {i}": node for i, node in enumerate(self.extras)}

    def weight_nodes(self) -> tuple[fx.Node, ...]:
        """All sources of its expert weights."""
        return tuple(node for nodes in self.weights.values() for node in nodes)

    def weight_shape(self, role: str) -> tuple[int, int, int]:
        """[E, rows, columns] of the weights in that role."""
        nodes = self.weights[role]
        shape = hinted_shape(nodes[0]) or ()
        experts, rows, columns = shape if len(shape) == 3 else (len(nodes), *shape)
        return experts, rows, columns


def find_regions(graph: fx.Graph, is_experts_class: Callable[[type], bool]) -> list[Region]:
    """Return a region for each call of a module whose class is an experts class, in graph order."""
    calls: dict[str, Region] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        for key, (path, cls) in node.meta.get("nn_module_stack", {}).items():
            if isinstance(cls, type) and is_experts_class(cls):
                region = calls.setdefault(key, Region(_plain_path(path), cls.__name__, []))
                region.nodes.append(node)
                break
    for region in calls.values():
        _classify(region)
    return list(calls.values())


def innermost_module(node: fx.Node) -> tuple[str, str]:
    """Return path and class name of the module that a node was recorded in, else its own name."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    path, cls = stack[-1] if stack else ("", "-")
    name = cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return _plain_path(path) or node.name, name


def _plain_path(path: str) -> str:
    return path.removeprefix("L['self'].").removeprefix("L['fn'].")


def _is_tensor(node: fx.Node) -> bool:
    value = meta_value(node)
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)
    )


def _classify(region: Region) -> None:
    inside = set(region.nodes)
    fed: dict[fx.Node, None] = {}
    for node in region.nodes:
        fed |= {
            source: None
            for source in node.all_input_nodes
            if source not in inside and _is_tensor(source)
        }
    tuples = [n.name for n in fed if not isinstance(meta_value(n), torch.Tensor)]
    if tuples:
        region.reasons.append(f"it reads the tuple {', '.join(tuples)}, not tensors")
        return
    numbers = [
        source.name
        for node in region.nodes
        for source in node.all_input_nodes
        if source not in inside and isinstance(meta_value(source), (float, torch.SymFloat))
    ]
    if numbers:
        region.reasons.append(
            f"it reads {', '.join(dict.fromkeys(numbers))}, a number that may change from call to "
            "call"
        )
        return
    weights = [n for n in fed if meta_value(n).ndim == 3 and meta_value(n).is_floating_point()]
    outputs = [
        n for n in region.nodes if _is_tensor(n) and any(user not in inside for user in n.users)
    ]
    if len(weights) < 2 or len(outputs) != 1:
        region.reasons.append(
            f"it was captured only in part: {len(weights)} stacked weights go in and "
            f"{len(outputs)} tensors come out"
        )
        return
    others = [n for n in fed if n not in weights]
    ids = [n for n in others if meta_value(n).ndim == 2 and not meta_value(n).is_floating_point()]
    if len(weights) != 2 or len(ids) != 1:
        region.reasons.append(
            f"it reads {len(weights)} 3-D weights and {len(ids)} integer [T, K] tensors, not 2 and "
            f"1 ({_names(fed)})"
        )
        return
    tokens, top_k = meta_value(ids[0]).shape
    floats = [n for n in others if n is not ids[0]]
    routing = [n for n in floats if tuple(meta_value(n).shape) == (tokens, top_k)]
    # A list: symbolic sizes cannot be hashed.
    sizes = [s for n in weights for s in meta_value(n).shape[1:]]
    hidden = [
        n
        for n in floats
        if n not in routing[-1:] and meta_value(n).ndim == 2 and meta_value(n).shape[1] in sizes
    ]
    if len(floats) != 2 or len(routing) < 1 or len(hidden) != 1:
        region.reasons.append(
            f"it reads more than hidden [T, H] and routing weights [T, K] ({_names(fed)}); a bias "
            "or a scale?"
        )
        return
    region.hidden, region.routing_weights, region.expert_ids, region.output = (
        hidden[0],
        routing[-1],
        ids[0],
        outputs[0],
    )
    first, down = (meta_value(n) for n in weights)
    # Read in order of use: the first weight is the one whose product the second consumes.
    region.weights = {"first": (weights[0],), "down": (weights[1],)}
    size = meta_value(region.hidden).shape[1]
    if size not in first.shape[1:] or size not in down.shape[1:] or first.shape[0] != down.shape[0]:
        region.reasons.append(
            f"its weights {list(first.shape)} and {list(down.shape)} do not fit hidden size {size} "
            "and each other"
        )
    if meta_value(region.output).shape != meta_value(region.hidden).shape:
        region.reasons.append(
            f"it returns {list(meta_value(region.output).shape)}, not the shape of its input"
        )
    kept = _needed_by_sizes(region, inside)
    if kept:
        region.reasons.append(
            f"sizes of its intermediate {', '.join(n.name for n in kept)} are used outside"
        )


def _needed_by_sizes(region: Region, inside: set[fx.Node]) -> list[fx.Node]:
    leaving = [
        n for n in region.nodes if not _is_tensor(n) and any(user not in inside for user in n.users)
    ]
    seen: dict[fx.Node, None] = {}
    while leaving:
        node = leaving.pop()
        for source in node.all_input_nodes:
            if source in inside and source not in seen:
                seen[source] = None
                if not _is_tensor(source):
                    leaving.append(source)
    return [n for n in seen if _is_tensor(n)]


def _names(nodes: dict[fx.Node, None]) -> str:
    return ", ".join(f"{n.name} {list(meta_value(n).shape)}" for n in nodes)
