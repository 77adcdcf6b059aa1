"""Cut the routing in front of an operator out of its graph, and run it on numbers of our own.

A slice starts at logits [T, E] and ends at expert ids and routing weights [T, K]; beside the logits
it reads only vectors of E values and plain numbers. What it computes is asked in forms.py.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

import torch
from torch import fx

from fp4moe.arguments import ChooseArguments

from ..graph.dataflow import Flow, hinted_shape, is_data, meta_value, storage, structure
from ..graph.execute import run_in_float32

__all__ = ["RoutingSlice", "cut_routing"]

# Known routers take up to 30 nodes. A limit, so that no search walks back to the embedding.
MOST_NODES = 200
CHOOSE = torch.ops.fp4moe.choose_experts.default


@dataclasses.dataclass
class RoutingSlice:
    """Routing in a graph.

    Attributes:
        gm: owns it.
        logits: its input [T, E].
        vectors: the [E] tensors that it reads, placeholders or attributes.
        nodes: what it runs, in graph order.
        expert_ids, routing_weights: its outputs [T, K].
    """

    gm: fx.GraphModule
    logits: fx.Node
    vectors: list[fx.Node]
    nodes: list[fx.Node]
    expert_ids: fx.Node
    routing_weights: fx.Node

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, experts) of the trace."""
        shape = hinted_shape(self.logits)
        assert shape is not None
        return shape[0], shape[1]

    def structure(self) -> str:
        """A text that is equal for slices of equal operations and sizes."""
        inputs = {"logits": self.logits}
        inputs |= {f"vector {i}": vector for i, vector in enumerate(self.vectors)}
        return structure(inputs, self.nodes, (self.expert_ids, self.routing_weights))

    def literals(self) -> set[float]:
        """The plain numbers among the arguments of its nodes."""
        found: set[float] = set()

        def note(value: Any) -> Any:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.add(float(value))
            return value

        for node in self.nodes:
            fx.node.map_aggregate((node.args, node.kwargs), note)
        return found

    def groups(self) -> list[tuple[int, int]]:
        """Pairs (groups, groups kept) that its nodes suggest; (1, 1) is always one."""
        found = {(1, 1)}
        for node in self.nodes:
            if node.target is CHOOSE:
                given = ChooseArguments.read(node.args).routing
                found.add((given.num_groups, given.top_groups))
                continue
            scores = node.args[0] if node.args else None
            shape = hinted_shape(scores) if isinstance(scores, fx.Node) else None
            results = meta_value(node)
            if shape is None or len(shape) != 2 or not isinstance(results, (tuple, list)):
                continue
            groups, first = shape[1], results[0]
            if 1 < groups < self.shape[1] and self.shape[1] % groups == 0:
                found.add((groups, int(first.shape[-1])))
        return sorted(found)

    def run(
        self, logits: torch.Tensor, vectors: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (expert ids, routing weights), all of it computed in float32."""
        values: dict[fx.Node, Any] = {self.logits: logits}
        values |= dict(zip(self.vectors, vectors, strict=True))
        outputs = (self.expert_ids, self.routing_weights)
        ids, weights = run_in_float32(self.gm, self.nodes, values, *outputs)
        return ids, weights


def cut_routing(
    gm: fx.GraphModule, flow: Flow, operator: fx.Node, num_experts: int
) -> tuple[list[RoutingSlice], str]:
    """Return the slices in front of an nvfp4_moe node, longest first; and why none if empty."""
    found, why = [], f"no [T, {num_experts}] tensor of logits leads to its ids and weights"
    starts = _last_values(flow, operator)
    for logits in sorted(_needed(flow, starts, None), key=flow.index.__getitem__):
        value = meta_value(logits)
        shape = hinted_shape(logits) or ()
        if len(shape) != 2 or shape[1] != num_experts or not value.is_floating_point():
            continue
        cut, reason = _cut(gm, flow, operator, logits, num_experts)
        if cut is not None:
            found.append(cut)
        elif reason:
            why = f"behind {logits.name} {reason}"
    return found, why


def _last_values(flow: Flow, operator: fx.Node) -> list[fx.Node]:
    """The operator's ids and weights, and what last wrote to them before it."""
    found: list[fx.Node] = []
    _hidden, ids, weights, *_others = operator.args
    for node in (ids, weights):
        assert isinstance(node, fx.Node)
        writers = flow.writers.get(storage(node), [])
        found += [node, *[w for w in writers if flow.index[w] < flow.index[operator]][-1:]]
    return found


def _needed(flow: Flow, nodes: list[fx.Node], until: fx.Node | None) -> set[fx.Node]:
    """The nodes and all that their values need, back to `until` or a little beyond MOST_NODES."""
    found: set[fx.Node] = set()
    waiting = [(-flow.index[node], node) for node in nodes]
    heapq.heapify(waiting)
    # The latest first: what is near comes before what is far.
    while waiting and len(found) <= MOST_NODES:
        _, node = heapq.heappop(waiting)
        if node is not until and node not in found:
            found.add(node)
            for read in flow.reads[node]:
                heapq.heappush(waiting, (-flow.index[read], read))
    return found


def _cut(
    gm: fx.GraphModule, flow: Flow, operator: fx.Node, logits: fx.Node, num_experts: int
) -> tuple[RoutingSlice | None, str]:
    """Return (the slice from these logits on, ""), or (None, why it cannot be cut out)."""
    _hidden, ids, weights, *_others = operator.args
    assert isinstance(ids, fx.Node) and isinstance(weights, fx.Node)
    needed = _needed(flow, _last_values(flow, operator), logits)
    if len(needed) > MOST_NODES:
        return None, f"it reads more than {MOST_NODES} nodes"
    _add_shapes(flow, needed, logits)
    needed.discard(logits)
    ordered = sorted(needed, key=flow.index.__getitem__)
    sources = [node for node in ordered if node.op in ("placeholder", "get_attr")]
    why = _refusal(flow, ordered, logits, sources, num_experts)
    if why or ids not in needed or weights not in needed:
        return None, why
    nodes = [node for node in ordered if node not in sources]
    return RoutingSlice(gm, logits, sources, nodes, ids, weights), ""


def _add_shapes(flow: Flow, needed: set[fx.Node], logits: fx.Node) -> None:
    """Add what only lends its shape, such as to zeros_like: it belongs to the routing as well."""
    waiting = list(needed)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            reads = flow.reads[node]
            if node not in needed and reads and all(r in needed or r is logits for r in reads):
                needed.add(node)
                waiting.append(node)


def _refusal(
    flow: Flow, ordered: list[fx.Node], logits: fx.Node, sources: list[fx.Node], num_experts: int
) -> str:
    """Why the nodes are no routing that can be run by itself; "" where they are."""
    for node in ordered:
        if node in sources and hinted_shape(node) != (num_experts,):
            return f"it also reads {node.name}, which is no vector of {num_experts}"
        if isinstance(meta_value(node), (float, torch.SymFloat)) and is_data(node):
            return f"it reads {node.name}, a number that may change from call to call"
    given = {storage(node) for node in (logits, *sources)}
    if any(storage(target) in given for node in ordered for target in flow.writes[node]):
        return "it writes to its input in place"
    return ""
