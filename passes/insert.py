"""Put the operator in the place of a region, with the metadata that compilers read.

The operator takes the float weights and finds the packed ones itself (`float_moe`), or, in a
program that owns its weights, packed ones that become attributes of the graph (`nvfp4_moe`, or
`moe` where there are biases or the format is another).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fp4moe.arguments import MoeArguments, Settings, lacks_biases
from fp4moe.identity.float_weights import FloatWeights, StoredForm
from fp4moe.kernels import Operands, PreparedWeights

from .find.region import Region
from .graph.attributes import add_attribute, insert_nothing
from .graph.dataflow import meta_value, result_node

__all__ = ["FUSED_OPERATORS", "insert_operator", "output_sizes"]

FUSED_OPERATORS = tuple(
    getattr(torch.ops.fp4moe, f"{kind}moe{end}").default
    for kind in ("", "nvfp4_", "float_")
    for end in ("", "_from_logits")
)
aten = torch.ops.aten
_numbers = itertools.count()


def output_sizes(region: Region) -> list[Any] | None:
    """Return the region's output shape as integers, -1 at most once, and sizes of its input.

    None where a size is neither. A size of the input is given as ("hidden", axis).
    """
    assert region.hidden is not None and region.output is not None
    given = list(meta_value(region.hidden).shape)
    sizes: list[Any] = []
    for size in meta_value(result_node(region.output)).shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        same = [i for i, other in enumerate(given) if str(other) == str(size)]
        sizes.append(("hidden", same[0]) if same else -1)
    return sizes if sizes.count(-1) <= 1 else None


def insert_operator(
    gm: fx.GraphModule,
    region: Region,
    form: StoredForm,
    weighting: str,
    constants: PreparedWeights | None,
) -> None:
    """Insert the operator before the region's output and erase what is dead then.

    Args:
        gm: changed in place, not recompiled. region: verified. form: what its weights mean.
        weighting: "output", or "input" where the hidden states are weighted.
        constants: packed weights for the graph to own, or None.
    """
    assert region.output is not None
    inside = set(region.nodes)
    with gm.graph.inserting_before(region.output):
        result = _Maker(gm, region).block(form, weighting, constants)
    sources = [source for node in region.nodes for source in node.all_input_nodes]
    before = dict.fromkeys(source for source in sources if source not in inside)
    for node in (region.output, *region.aliases):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region.nodes):
        # Dead code elimination would keep in-place nodes such as setitem.
        if not node.users:
            gm.graph.erase_node(node)
    _erase_sizes(gm.graph, before)


def _erase_sizes(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Remove those of the nodes that compute a size which nobody reads any more."""
    waiting = dict.fromkeys(nodes)
    while waiting:
        node, _ = waiting.popitem()
        number = isinstance(meta_value(node), (int, torch.SymInt))
        if number and node.op == "call_function" and not node.users:
            waiting |= dict.fromkeys(node.all_input_nodes)
            graph.erase_node(node)


class _Maker:
    """Adds nodes and what the tracer would have written into their `meta`."""

    def __init__(self, gm: fx.GraphModule, region: Region):
        assert region.output and region.hidden and region.expert_ids
        self.gm, self.graph, self.region = gm, gm.graph, region
        self.output, self.hidden, self.ids = region.output, region.hidden, region.expert_ids
        self.result = meta_value(result_node(region.output))
        self.width = int(meta_value(self.hidden).shape[-1])
        self.top_k = int(meta_value(self.ids).shape[-1])
        self.key = "example_value" if "example_value" in self.hidden.meta else "val"
        self.fake_mode = getattr(meta_value(self.hidden), "fake_mode", None)

    def block(self, form: StoredForm, weighting: str, constants: PreparedWeights | None) -> fx.Node:
        """Insert the operator call, with the reshapes and casts around it."""
        hidden = self.reshape(self.hidden, [-1, self.width])
        ids = self.reshape(self.ids, [-1, self.top_k])
        weights = self.routing_weights(ids)
        if weighting == "input":
            # Each pair of token and expert becomes a token of its own, with one expert, weight 1.
            assert weights is not None
            tokens = self.call(aten.unsqueeze.default, hidden, 1)
            factors = self.call(aten.unsqueeze.default, weights, 2)
            spread = self.call(aten.mul.Tensor, tokens, factors)
            spread = self.reshape(spread, [-1, self.width])
            hidden = self.cast(spread, meta_value(self.hidden).dtype)
            ids, weights = self.reshape(ids, [-1, 1]), None
        if weights is None:
            weights = self.call(aten.ones_like.default, ids, dtype=torch.float32)
        if constants is None:
            floats = self.floats()
            operator = torch.ops.fp4moe.float_moe.default
            result = self.call(operator, hidden, ids, weights, *map(list, floats), *form)
        else:
            stem = f"fp4moe_{next(_numbers)}"
            attributes: dict[str, Any] = {
                name: add_attribute(self.gm, self.output, f"{stem}_{name}", tensor)
                for name, tensor in constants.operands.named().items()
            }
            settings = Settings.of_layer(constants.layer, form.kernel)
            given = MoeArguments(hidden, ids, weights, Operands(**attributes), settings)
            nothing = insert_nothing(self.graph, hidden) if lacks_biases(given) else None
            result = self.call(given.operator, *given.flat(nothing))
        if weighting == "input" and self.top_k > 1:
            apart = self.reshape(result, [-1, self.top_k, self.width])
            result = self.call(aten.sum.dim_IntList, apart, [1])
        result = self.cast(self.shaped(result), self.result.dtype)
        result.meta[self.key] = self.result
        return result

    def floats(self) -> FloatWeights:
        """The nodes of the float weights, of this graph."""
        roles: Any = {role: tuple(map(self.own, n)) for role, n in self.region.weights.items()}
        return FloatWeights(**{"second": (), **roles})

    def own(self, node: fx.Node) -> Any:
        """The node; or where a copy was searched, whose modules are functions, one like it."""
        if node.graph is self.graph:
            return node
        like = self.graph.get_attr(str(node.target))
        like.meta[self.key] = meta_value(node)
        return like

    def routing_weights(self, ids: fx.Node) -> fx.Node | None:
        """[T, K], gathered from [T, E] where they are dense."""
        node = self.region.routing_weights
        if node is None:
            return None
        columns = int(meta_value(node).shape[-1])
        flat = self.reshape(node, [-1, columns])
        if not self.region.dense:
            return flat
        if meta_value(ids).dtype != torch.int64:
            ids = self.cast(ids, torch.int64)
        return self.call(aten.gather.default, flat, 1, ids)

    def shaped(self, node: fx.Node) -> fx.Node:
        """The node [T, H] in the shape of the region's output."""
        sizes = output_sizes(self.region)
        assert sizes is not None
        if len(sizes) == 2:
            return node
        plain = [
            self.call(aten.sym_size.int, self.hidden, size[1]) if isinstance(size, tuple) else size
            for size in sizes
        ]
        return self.call(aten.reshape.default, node, plain)

    def reshape(self, node: fx.Node, sizes: list[int]) -> fx.Node:
        """Reshape unless only the first of the sizes, all tokens, could differ."""
        shape = meta_value(node).shape
        if len(shape) == len(sizes) and list(shape[1:]) == sizes[1:]:
            return node
        return self.call(aten.reshape.default, node, sizes)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Cast as this kind of graph does: a method in dynamo's, an operator in ATen's."""
        if meta_value(node).dtype == dtype:
            return node
        if self.key == "val":
            return self.call(aten._to_copy.default, node, dtype=dtype)
        cast = self.graph.call_method("to", (node, dtype))
        cast.meta.update(self.kept())
        cast.meta[self.key] = meta_value(node).to(dtype)
        return cast

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call whose metadata comes from running it on the metadata of its arguments."""
        node = self.node(target, *args, **kwargs)
        values: Any = fx.node.map_arg(args, meta_value)
        with self.fake_mode or contextlib.nullcontext(), torch.no_grad():
            node.meta[self.key] = target(*values, **kwargs)
        return node

    def node(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.kept())
        return node

    def kept(self) -> dict[str, Any]:
        names = ("nn_module_stack", "stack_trace", "source_fn_stack")
        return {name: self.output.meta[name] for name in names if name in self.output.meta}
