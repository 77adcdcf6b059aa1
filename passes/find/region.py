"""A part of a graph that may be a mixture of experts, with the roles of what feeds it."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..graph.dataflow import hinted_shape

__all__ = ["Region", "innermost_module"]


@dataclasses.dataclass
class Region:
    """A part of a graph that takes hidden states and a selection of experts and gives one tensor.

    Attributes:
        path: dotted name of the module that it was recorded in. module_class: name of its class.
        nodes: its nodes in graph order, without the sources of its weights.
        reasons: why it cannot be replaced, whatever it computes; empty where it can.
        hidden: [T, H], or [B, S, H]. expert_ids: [T, K] or [B, S, K] integers.
        routing_weights: of the shape of expert_ids; [T, E] when dense; None where nothing is
            weighted.
        dense: whether routing_weights has a column for each expert, zero where not chosen.
        weights: the sources of "first" (gate_up, up, or one of gate and up), "second" (the other of
            gate and up, where they are apart) and "down"; one stacked tensor [E, ...], or E of 2
            axes in the order of the experts. Then their biases, "first_bias" and so on, [E, N] or
            E of [N]. Empty where the roles could not be told.
        computed_weights: nodes that change the values of a weight before it is multiplied.
        extras: other float sources: scales, norms.
        numbers: Python numbers that it reads and that may differ from call to call.
        output: the tensor that leaves it.
        aliases: nodes that are the same memory as output once it is computed.
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
    computed_weights: tuple[fx.Node, ...] = ()
    extras: tuple[fx.Node, ...] = ()
    numbers: tuple[fx.Node, ...] = ()
    output: fx.Node | None = None
    aliases: tuple[fx.Node, ...] = ()
    support: list[fx.Node] = dataclasses.field(default_factory=list)

    def inputs(self) -> dict[str, fx.Node]:
        """Return the tensors that feed the region, by role; "first 3" is that of expert 3."""
        roles = ("hidden", "expert_ids", "routing_weights")
        by_role = {role: node for role in roles if (node := getattr(self, role)) is not None}
        for role, nodes in self.weights.items():
            for expert, node in enumerate(nodes):
                by_role[role if len(nodes) == 1 else f"{role} {expert}"] = node
        return by_role | {f"extra {i}": node for i, node in enumerate(self.extras)}

    def weight_nodes(self) -> tuple[fx.Node, ...]:
        """Return all sources of its expert weights."""
        return tuple(node for nodes in self.weights.values() for node in nodes)

    def weight_shape(self, role: str) -> tuple[int, ...]:
        """Return [E, rows, columns] of the weights in that role, [E, N] of biases."""
        nodes = self.weights[role]
        shape = hinted_shape(nodes[0]) or ()
        return shape if len(nodes) == 1 else (len(nodes), *shape)

    @property
    def biases(self) -> dict[str, tuple[fx.Node, ...]]:
        """The weights that are biases, by role."""
        return {role: nodes for role, nodes in self.weights.items() if role.endswith("_bias")}


def innermost_module(node: fx.Node) -> tuple[str, str]:
    """Return path and class name of the module that a node was recorded in, else its own name."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    path, cls = stack[-1] if stack else ("", "-")
    # torch.export writes the class down by name.
    name = cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]
    return path.removeprefix("L['self'].").removeprefix("L['fn'].") or node.name, name
