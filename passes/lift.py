"""Make the packed weights of a dynamo graph its inputs, which whoever calls it looks up.

Before: float weights are placeholders, which float_moe reads.
After:  packed weights are placeholders behind the others, which nvfp4_moe or moe reads; float
weights that nothing else reads are no placeholders any more.
Graphs of higher-order operators get the packed weights from their callers. So CUDA graphs see by
the addresses whose weights they hold; an operator that finds them would hide it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fp4moe.arguments import (
    FloatMoeArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeFromLogitsArguments,
    Settings,
    lacks_biases,
)
from fp4moe.identity.float_weights import FloatWeights, StoredForm
from fp4moe.identity.table import find_packed
from fp4moe.kernels import Operands

from .find.region import innermost_module
from .graph.attributes import insert_nothing
from .graph.dataflow import meta_value
from .graph.subgraphs import SubgraphCall, subgraph_calls

__all__ = ["LiftedGraph", "PackedInput", "lift_packed"]

FLOAT = torch.ops.fp4moe.float_moe.default
FLOAT_FROM_LOGITS = torch.ops.fp4moe.float_moe_from_logits.default
# Numbers stand where the tensors would.
FloatPositions: Any = FloatWeights
# What dynamo and AOTAutograd ask of a graph beside its nodes.
OF_DYNAMO = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")


@dataclasses.dataclass(frozen=True)
class PackedInput:
    """Where the packed weights of one layer come from.

    Attributes:
        path: dotted name of the module.
        floats: positions of the float weights among the original inputs.
        output_scale: position of the factor per expert, None without one.
        form: what the floats mean.
        unused: the positions among them that nothing else in the graph reads.
    """

    path: str
    floats: FloatPositions
    output_scale: int | None
    form: StoredForm
    unused: tuple[int, ...] = ()

    @property
    def positions(self) -> tuple[int, ...]:
        """All positions."""
        scale = () if self.output_scale is None else (self.output_scale,)
        return (*self.floats.flat(), *scale)

    def weights(self, inputs: Sequence[Any]) -> FloatWeights:
        """Pick the float weights out of the original inputs."""
        return FloatWeights(*(tuple(inputs[i] for i in group) for group in self.floats))

    def scale(self, inputs: Sequence[Any]) -> torch.Tensor | None:
        """Pick the factor per expert."""
        return None if self.output_scale is None else inputs[self.output_scale]


@dataclasses.dataclass(frozen=True)
class LiftedGraph:
    """A graph whose inputs are the kept ones of the original and the operands of each layer."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    kept: tuple[int, ...]
    layers: tuple[PackedInput, ...]


def lift_packed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LiftedGraph:
    """Return the graph with packed weights as inputs; the original keeps its own.

    Args:
        gm: a dynamo graph after `rewrite_graph`; graphs inside it are changed in place.
        example_inputs: the values of its placeholders, real tensors.
    """
    # A copy: dynamo still reads the placeholders of its graph.
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, val_map=copies))
    graph.output_node().meta.update(gm.graph.output_node().meta)
    lifted = fx.GraphModule(gm, graph)
    lifted.meta.update(gm.meta)
    for name in OF_DYNAMO:
        if hasattr(gm, name):
            setattr(lifted, name, getattr(gm, name))
    for node, copy in copies.items():
        if node.op == "placeholder" and hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    lifting = _Lifting(lifted, example_inputs)
    lifting.run()
    before = graph.find_nodes(op="placeholder")[: len(example_inputs)]
    read = {position for layer in lifting.layers for position in layer.packed.positions}
    unused = {i for i in read if not before[i].users}
    layers = tuple(
        dataclasses.replace(
            layer.packed, unused=tuple(i for i in layer.packed.positions if i in unused)
        )
        for layer in lifting.layers
    )
    inputs = [value for i, value in enumerate(example_inputs) if i not in unused]
    for layer in layers:
        inputs += _operands(layer, example_inputs).flat()
    for i in unused:
        graph.erase_node(before[i])
    kept = tuple(i for i in range(len(example_inputs)) if i not in unused)
    if layers:
        graph.lint()
        lifted.recompile()
    return LiftedGraph(lifted, inputs, kept, layers)


def _operands(layer: PackedInput, inputs: Sequence[Any]) -> Operands:
    packed = find_packed(layer.weights(inputs), layer.form, caller="backend")
    return packed.operands(layer.scale(inputs), caller="backend")


@dataclasses.dataclass(frozen=True)
class _Layer:
    packed: PackedInput
    nodes: list[fx.Node]


class _Lifting:
    """Changes one graph and the graphs inside it.

    Args:
        gm: changed in place. values: of its placeholders.

    Attributes:
        layers: what was made an input, in the order of the new placeholders.
    """

    def __init__(self, gm: fx.GraphModule, values: Sequence[Any]):
        self.gm, self.values = gm, values
        self.placeholders = gm.graph.find_nodes(op="placeholder")
        self.places = {node: i for i, node in enumerate(self.placeholders)}
        self.layers: list[_Layer] = []

    def run(self) -> None:
        graph = self.gm.graph
        for node in list(graph.nodes):
            if node.target in (FLOAT, FLOAT_FROM_LOGITS):
                self._operator(node)
        calls: dict[fx.GraphModule, list[SubgraphCall]] = {}
        for call in subgraph_calls(self.gm):
            calls.setdefault(call.graph_module, []).append(call)
        for body, each in calls.items():
            self._body(body, each)

    def _operator(self, node: fx.Node) -> None:
        args: Any = node.args
        routed = node.target is FLOAT_FROM_LOGITS
        given = (FloatMoeFromLogitsArguments if routed else FloatMoeArguments).read(args)
        groups: Any = given.weights
        form = given.form
        scale = getattr(given, "output_scale", None)
        scale = scale if scale in self.places else None
        if not all(weight in self.places for group in groups for weight in group):
            return
        positions = FloatPositions(*(tuple(self.places[w] for w in group) for group in groups))
        place = None if scale is None else self.places[scale]
        packed = PackedInput(innermost_module(node)[0], positions, place, form)
        placeholders: Any = self._placeholders(packed)
        # In the order of the fields, biases last.
        operands = Operands(*placeholders)
        settings = Settings.of_floats(packed.weights(self.values), form)
        with self.gm.graph.inserting_before(node):
            if isinstance(given, FloatMoeFromLogitsArguments):
                logits, bias = given.router_logits, given.routing_bias
                call: Any = MoeFromLogitsArguments(
                    given.hidden, logits, bias, operands, given.routing, settings
                )
            else:
                ids, weights = given.expert_ids, given.routing_weights
                call = MoeArguments(given.hidden, ids, weights, operands, settings)
            nothing = insert_nothing(self.gm.graph, given.hidden) if lacks_biases(call) else None
            fused = self.gm.graph.call_function(call.operator, call.flat(nothing))
        fused.meta.update(node.meta)
        node.replace_all_uses_with(fused)
        self.gm.graph.erase_node(node)

    def _placeholders(self, packed: PackedInput) -> list[fx.Node]:
        """The new inputs for a layer; those it has where the graph uses its weights twice."""
        for layer in self.layers:
            if dataclasses.replace(layer.packed, path=packed.path) == packed:
                return layer.nodes
        last = self.gm.graph.find_nodes(op="placeholder")[-1]
        near = meta_value(self.placeholders[packed.floats.down[0]])
        mode = getattr(near, "fake_mode", None)
        nodes: list[fx.Node] = []
        with self.gm.graph.inserting_after(last):
            operands = _operands(packed, self.values).named()
            for name, tensor in reversed(operands.items()):
                node = self.gm.graph.placeholder(f"fp4moe_{len(self.layers)}_{name}")
                node.meta["example_value"] = _fake(mode, tensor)
                # Neither a guard nor a symbolic size, and for CUDA graphs an address that stays.
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
                node._dynamo_source = None
                nodes.insert(0, node)
        self.layers.append(_Layer(packed, nodes))
        return nodes

    def _body(self, body: fx.GraphModule, calls: list[SubgraphCall]) -> None:
        """Lift a graph inside, and hand it its packed weights at each call."""
        if not all(call.plain for call in calls):
            return
        operands = [call.operands for call in calls]
        fed = [all(o[i] in self.places for o in operands) for i in range(len(operands[0]))]
        first = operands[0]
        values = [
            self.values[self.places[n]] if ok else None for n, ok in zip(first, fed, strict=True)
        ]
        inner = _Lifting(body, values)
        inner.places = {node: i for node, i in inner.places.items() if fed[i]}
        inner.run()
        if not inner.layers:
            return
        read = {position for layer in inner.layers for position in layer.packed.positions}
        unused = sorted(i for i in read if not inner.placeholders[i].users)
        for i in unused:
            body.graph.erase_node(inner.placeholders[i])
        body.graph.lint()
        body.recompile()
        for call in calls:
            given = call.operands
            handed: list[fx.Node] = []
            for layer in inner.layers:
                handed += self._placeholders(_seen_from(layer.packed, given, self.places))
            args = list(call.node.args)
            start = len(args) - len(given)
            keep = [arg for i, arg in enumerate(args[start:]) if i not in unused]
            call.node.args = (*args[:start], *keep, *handed)


def _seen_from(
    packed: PackedInput, given: Sequence[Any], places: dict[fx.Node, int]
) -> PackedInput:
    """The same layer in terms of the inputs of the graph outside."""

    def outside(positions: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(places[given[i]] for i in positions)

    scale = packed.output_scale
    return dataclasses.replace(
        packed,
        floats=FloatPositions(*map(outside, packed.floats)),
        output_scale=None if scale is None else places[given[scale]],
    )


def _fake(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
