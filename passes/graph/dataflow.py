"""What flows into what in a captured graph, in-place writes included.

An edge runs from each tensor to its readers and, where its storage was written in between, from the
last writer. Metadata (sizes, dtypes, `zeros_like`) is no data. Works on dynamo, ATen and symbolic
graphs; storages are told by the fake tensors that the tracer left in `meta`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

__all__ = ["Flow", "hinted_shape", "meta_value", "operation_name", "result_node", "size_hint"]
__all__ += ["elements", "is_data", "storage", "structure"]

# They read no values of their first argument, or of their second.
_SHAPE_OF_FIRST = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"),
    *("new_full", "size", "sym_size", "numel", "sym_numel", "dim"),
}
_SHAPE_OF_SECOND = {"type_as", "expand_as", "view_as", "reshape_as"}
_IN_PLACE_FUNCTIONS = {
    *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor"),
}


def meta_value(node: fx.Node) -> Any:
    """Return what the node produces as metadata: dynamo's example_value, or ATen's val."""
    return node.meta.get("example_value", node.meta.get("val"))


def result_node(node: fx.Node) -> fx.Node:
    """Return the node that holds what this one computes: for `x[i] = y`, which gives None, x."""
    if operation_name(node) == "setitem" and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def size_hint(size: Any) -> int | None:
    """Return a size as an integer; None where it depends on data."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None


def hinted_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return a tensor node's shape in integers; None for others or where it depends on data."""
    value = meta_value(node)
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size_hint(size) for size in value.shape]
    return None if None in sizes else tuple(s for s in sizes if s is not None)


def operation_name(node: fx.Node) -> str:
    """Return the plain name of an operation: "add" for torch.add, aten.add.Tensor and .add()."""
    if isinstance(node.target, str):
        # torch 2.11 writes x == y as x.__eq__(y).
        special = node.target.startswith("__") and node.target.endswith("__")
        return node.target[2:-2] if special else node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def is_data(node: fx.Node) -> bool:
    """Whether the node's value may differ from call to call at equal sizes."""
    value = meta_value(node)
    if isinstance(value, (torch.SymInt, torch.SymBool)):
        return not value.node.has_hint()
    return not isinstance(value, (int, bool, torch.Size, torch.dtype, torch.device))


class Flow:
    """The data flow of one graph.

    Attributes:
        nodes: in graph order. index: place of each node.
        reads: the nodes whose values a node needs. readers: the reverse.
        writes: the nodes whose storage a node writes.
        writers: the nodes that write each storage.
    """

    def __init__(self, graph: fx.Graph):
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.reads: dict[fx.Node, list[fx.Node]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        self.writes = {node: _written(node) for node in self.nodes}
        self.writers: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            found: dict[fx.Node, None] = {}
            for source in node.all_input_nodes:
                if not is_data(source) or source in _metadata_only(node):
                    continue
                found[source] = None
                written = self.writers.get(storage(source))
                if written and written[-1] is not source:
                    found[written[-1]] = None
            self.reads[node] = list(found)
            for source in found:
                self.readers[source].append(node)
            for target in self.writes[node]:
                self.writers.setdefault(storage(target), []).append(node)

    @functools.cached_property
    def _alive(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op == "output" or not found.isdisjoint(self.readers[node]):
                found.add(node)
        return found

    @functools.cached_property
    def valueless(self) -> list[fx.Node]:
        """Calls whose values reach no output: sizes, assertions, writes that nobody reads."""
        calls = ("call_function", "call_method")
        return [n for n in self.nodes if n not in self._alive and n.op in calls]

    @functools.cached_property
    def next_common(self) -> dict[fx.Node, fx.Node]:
        """The node through which everything that a node's value does must pass next, if any."""
        alive = self._alive
        found: dict[fx.Node, fx.Node] = {}
        depth: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            readers = [reader for reader in self.readers[node] if reader in alive]
            common = self._meet(readers, found, depth) if readers else None
            depth[node] = 0 if common is None else depth[common] + 1
            if common is not None:
                found[node] = common
        return found

    @staticmethod
    def _meet(
        nodes: list[fx.Node], above: dict[fx.Node, fx.Node], depth: dict[fx.Node, int]
    ) -> fx.Node | None:
        common: fx.Node | None = nodes[0]
        for node in nodes[1:]:
            other: fx.Node | None = node
            while common is not other:
                if common is None or other is None:
                    return None
                if depth[common] >= depth[other]:
                    common = above.get(common)
                else:
                    other = above.get(other)
        return common

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """Return the node and all that everything from it must pass, nearest first."""
        found = [node]
        while found[-1] in self.next_common:
            found.append(self.next_common[found[-1]])
        return found

    def after(self, node: fx.Node) -> set[fx.Node]:
        """Return the node and all that depends on its value."""
        found, waiting = {node}, [node]
        while waiting:
            for reader in self.readers[waiting.pop()]:
                if reader not in found:
                    found.add(reader)
                    waiting.append(reader)
        return found

    def only_from(self, node: fx.Node, after: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes of `after` that depend on nothing but `node` and constants."""
        found = {node}
        for other in sorted(after, key=self.index.__getitem__):
            if other is not node and all(
                read in found or self.is_constant(read) for read in self.reads[other]
            ):
                found.add(other)
        return found

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a call depends on no input and no weight."""
        return node in self._constants

    @functools.cached_property
    def _constants(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        calls = ("call_function", "call_method")
        for node in self.nodes:
            if node.op in calls and found.issuperset(self.reads[node]):
                found.add(node)
        return found


def storage(node: fx.Node) -> int:
    """Return what is equal for nodes that share memory."""
    value = meta_value(node)
    if not isinstance(value, torch.Tensor):
        return id(node)
    return int(value.untyped_storage()._cdata)


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)


def structure(
    inputs: dict[str, fx.Node], nodes: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> str:
    """Return a text that is equal for parts of graphs of equal operations, dtypes and sizes.

    Args:
        inputs: what feeds the nodes, by role. nodes: in graph order. outputs: among the nodes.
    """
    nodes = [*nodes]
    names = {node: f"%{i}" for i, node in enumerate([*inputs.values(), *nodes])}

    def plain(argument: fx.Node) -> Any:
        return names.get(argument, str(meta_value(argument)))

    lines = [f"{role} {meta_value(n).dtype}{hinted_shape(n)}" for role, n in inputs.items()]
    for node in nodes:
        args, kwargs = fx.node.map_arg(node.args, plain), fx.node.map_arg(node.kwargs, plain)
        lines.append(f"{names[node]} {node.op} {node.target} {args} {kwargs}")
    return "\n".join([*lines, f"-> {[names[node] for node in outputs]}"])


def _metadata_only(node: fx.Node) -> list[Any]:
    name = operation_name(node)
    if not node.args:
        return []
    if name == "getattr" and node.args[1:] in (("shape",), ("dtype",), ("device",)):
        return [node.args[0]]
    if name in _SHAPE_OF_FIRST and node.args[0] not in node.args[1:]:
        return [node.args[0]]
    if name in _SHAPE_OF_SECOND and len(node.args) > 1 and node.args[0] is not node.args[1]:
        return [node.args[1]]
    return []


def _written(node: fx.Node) -> list[fx.Node]:
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return []
    name = operation_name(node)
    targets: list[Any] = []
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        targets = [
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for i, argument in enumerate(schema)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    elif (
        name in _IN_PLACE_FUNCTIONS
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
    ):
        targets = [node.args[0] if node.args else node.kwargs.get("input")]
    targets.append(node.kwargs.get("out"))
    found: list[fx.Node] = []
    # Lists of tensors too, as of the _foreach functions.
    fx.node.map_arg(targets, found.append)
    return found
