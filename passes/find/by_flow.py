"""Propose regions of a graph that may be a mixture of experts, by data flow alone.

An integer selection [T, K] leads to all experts; where everything that depends on it meets again
is an output [T, H]. Going back from there, the region ends at the selection, at the latest float
tensor [T, K] (or dense [T, E]) and at the latest tensor of the output's size that all else comes
from.
What is left are the weights. No names of modules, no sequence of operations; numbers decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from ..graph.dataflow import Flow, elements, hinted_shape, meta_value, result_node
from .borders import close_region
from .region import Region, innermost_module
from .roles import find_weights

__all__ = ["propose_regions"]

# How many places behind the selection are tried as output.
TRIED_OUTPUTS = 8
# How many tensors [T, K] that depend on the selection are tried as weighting.
TRIED_WEIGHTINGS = 3
# Nodes of a region; a layer of 128 unrolled experts has about 3000.
LARGEST_REGION = 20_000


def propose_regions(
    flow: Flow, parameters: set[fx.Node], taken: set[fx.Node]
) -> Iterator[Iterator[Region]]:
    """Yield for each selection of experts its possible regions, the likeliest first.

    Args:
        flow: the graph. parameters: nodes known to be stored weights, whatever their shape.
        taken: nodes of regions that are decided already.
    """
    selections = {}
    for node in flow.nodes:
        shape = hinted_shape(node)
        if shape is not None and _is_selection(flow, node, shape, parameters):
            ids, shape = _narrowed(flow, node, shape)
            selections[ids] = shape
    for ids in selections:
        if ids not in taken:
            yield _regions_behind(flow, ids, selections, parameters, taken)


def _regions_behind(
    flow: Flow,
    ids: fx.Node,
    selections: dict[fx.Node, tuple[int, ...]],
    parameters: set[fx.Node],
    taken: set[fx.Node],
) -> Iterator[Region]:
    shape = selections[ids]
    tokens = elements(shape[:-1])
    search = _Search(flow, ids, tokens, shape[-1], flow.after(ids), parameters, set(selections))
    found = False
    for output in _outputs(flow, ids, tokens, search.after):
        here = False
        for region in search.regions(output):
            if taken.isdisjoint(region.nodes):
                here = True
                yield region
        if found and not here:
            break
        found |= here


def _is_selection(
    flow: Flow, node: fx.Node, shape: tuple[int, ...], parameters: set[fx.Node]
) -> bool:
    """Whether it is integers [..., K] that were not computed from other integers."""
    if len(shape) < 2 or 0 in shape or node in parameters or node.op == "get_attr":
        return False
    if meta_value(node).dtype not in (torch.int64, torch.int32):
        return False
    sources = [r for read in flow.reads[node] for r in _tensors_behind(flow, read)]
    if node.op == "placeholder":
        return True
    return bool(sources) and all(meta_value(s).is_floating_point() for s in sources)


def _narrowed(flow: Flow, node: fx.Node, shape: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
    """The part that is used, where only the first columns of a full sort are."""
    readers = flow.readers[node]
    if len(readers) == 1:
        narrow = hinted_shape(readers[0])
        if narrow and narrow[:-1] == shape[:-1] and narrow[-1] < shape[-1]:
            if meta_value(readers[0]).dtype in (torch.int64, torch.int32):
                return _narrowed(flow, readers[0], narrow)
    return node, shape


def _tensors_behind(flow: Flow, node: fx.Node) -> list[fx.Node]:
    value = meta_value(node)
    if isinstance(value, (tuple, list)):
        return [n for read in flow.reads[node] for n in _tensors_behind(flow, read)]
    return [node] if isinstance(value, torch.Tensor) else []


def _outputs(flow: Flow, ids: fx.Node, tokens: int, after: set[fx.Node]) -> Iterable[fx.Node]:
    """The first nodes that every path from the selection meets and that may be [T, H]."""

    def possible(node: fx.Node) -> bool:
        shape = hinted_shape(result_node(node))
        return (
            node in after
            and node.op != "output"
            and shape is not None
            and len(shape) >= 2
            and meta_value(result_node(node)).is_floating_point()
            and elements(shape[:-1]) == tokens
            and shape[-1] > 1
        )

    # A reader that leads to no such place (a loss, a counter) is no part of the layer.
    chains = [flow.chain(reader) for reader in flow.readers[ids] if reader.op != "output"]
    chains = [chain for chain in chains if any(map(possible, chain))]
    if not chains:
        return []
    shared = set(chains[0]).intersection(*chains[1:])
    return [node for node in chains[0] if node in shared and possible(node)][:TRIED_OUTPUTS]


@dataclasses.dataclass
class _Search:
    """Looks for the borders of a region behind one selection."""

    flow: Flow
    ids: fx.Node
    tokens: int
    top_k: int
    after: set[fx.Node]
    parameters: set[fx.Node]
    selections: set[fx.Node]

    def __post_init__(self) -> None:
        self.only_ids = self.flow.only_from(self.ids, self.after)

    def regions(self, output: fx.Node) -> Iterator[Region]:
        """The regions of that output: sparse weighting, from the latest on, then dense."""
        passed: set[fx.Node] = set()
        for _ in range(TRIED_WEIGHTINGS):
            closure = _Closure(self, output, set(), passed)
            region = closure.region()
            if region is not None:
                yield region
            # With one expert a token, or all, the weights of sorted pairs look like [T, K] too.
            later = closure.borders["routing"] & self.after
            if not later:
                break
            passed |= later
        closure = _Closure(self, output, closure.expert_counts() - {self.top_k}, set())
        region = closure.region()
        if region is not None and region.dense:
            yield region


class _Closure:
    """What an output is computed from, back to the borders."""

    def __init__(self, search: _Search, output: fx.Node, experts: set[int], passed: set[fx.Node]):
        self.search, self.flow, self.output = search, search.flow, output
        self.experts, self.passed = experts, passed
        self.width = (hinted_shape(result_node(output)) or (0,))[-1]
        self.inside: set[fx.Node] = set()
        self.borders: dict[str, set[fx.Node]] = {"hidden": set(), "routing": set()}
        self.sources: set[fx.Node] = set()
        self.foreign = False
        self.reads_ids = False
        self._walk(output)
        while not self.foreign and (node := self._to_expand()) is not None:
            for border in self.borders.values():
                border.discard(node)
            self._walk(node)

    def _to_expand(self) -> fx.Node | None:
        """The latest of several borders: the others may be where it comes from."""
        for border in self.borders.values():
            if len(border) > 1:
                return max(border, key=self.flow.index.__getitem__)
        hidden = self.borders["hidden"]
        return next(iter(hidden), None) if not self._may_be_experts() else None

    def _may_be_experts(self) -> bool:
        shapes = [hinted_shape(s) or () for s in self.sources]
        stacked = [s for s in shapes if len(s) == 3]
        return len([s for s in stacked or shapes if len(s) >= 2]) >= 2

    def _walk(self, start: fx.Node) -> None:
        waiting = [start]
        self.inside.add(start)
        while waiting and not self.foreign:
            node = waiting.pop()
            for read in self.flow.reads[node]:
                if read in self.inside or read in self.sources:
                    continue
                if read is self.search.ids:
                    self.reads_ids = True
                elif read in self.search.selections:
                    # A choice of groups comes before that of experts.
                    self.foreign = True
                elif (border := self._border(read)) is not None:
                    self.borders[border].add(read)
                elif read.op in ("placeholder", "get_attr"):
                    self._add_source(read)
                else:
                    self.inside.add(read)
                    waiting.append(read)
            self.foreign |= len(self.inside) > LARGEST_REGION

    def _add_source(self, node: fx.Node) -> None:
        value = meta_value(node)
        if not isinstance(value, torch.Tensor) or hinted_shape(node) is None:
            self.foreign = True
        elif value.is_floating_point() and value.ndim:
            self.sources.add(node)
        elif node.op == "get_attr":
            # A constant: a table of indices, a scalar.
            self.inside.add(node)
        else:
            self.foreign = True

    def _border(self, node: fx.Node) -> str | None:
        search, shape = self.search, hinted_shape(node)
        if shape is None or node in search.parameters or not meta_value(node).is_floating_point():
            return None
        if not self.flow.reads[node] and node.op not in ("placeholder", "get_attr"):
            return None
        count = elements(shape)
        if len(shape) >= 2 and shape[-1] == self.width and count == search.tokens * self.width:
            return "hidden" if node not in search.after else None
        if node in search.only_ids or node in self.passed or node.op == "get_attr":
            return None
        if count % search.tokens:
            return None
        columns = count // search.tokens
        if (
            len(shape) >= 2
            and columns == shape[-1]
            and (columns == search.top_k or columns in self.experts)
        ):
            return "routing"
        return None

    def expert_counts(self) -> set[int]:
        """How many experts the weights may be for."""
        shapes = [hinted_shape(s) or () for s in self.sources]
        stacked = {s[0] for s in shapes if len(s) == 3}
        return stacked or {shapes.count(s) for s in shapes if len(s) == 2} - {1}

    def region(self) -> Region | None:
        """The region, or None where it does not end at a hidden tensor and two weights or more."""
        if self.foreign or len(self.borders["hidden"]) != 1 or not self._may_be_experts():
            return None
        (hidden,) = self.borders["hidden"]
        routing = next(iter(self.borders["routing"]), None)
        if not self.reads_ids and routing is None:
            return None
        shape = hinted_shape(routing) if routing is not None else None
        region = Region(*innermost_module(self.output), [], by_flow=True)
        region.hidden, region.expert_ids, region.routing_weights = hidden, self.search.ids, routing
        region.dense = shape is not None and shape[-1] != self.search.top_k
        region.output = self.output
        sources = sorted(self.sources, key=self._first_use)
        found = find_weights(self.flow, self.inside, hidden, sources)
        if found is None:
            return None
        region.weights, region.extras = found
        if region.dense:
            region.support = self._support(region)
        if not self.reads_ids and not region.dense:
            return None
        close_region(self.flow, region, self.inside)
        return region

    def _support(self, region: Region) -> list[fx.Node]:
        """The nodes that make a dense weighting from the selection."""
        assert region.routing_weights is not None
        found, waiting = {region.routing_weights}, [region.routing_weights]
        while waiting:
            for read in self.flow.reads[waiting.pop()]:
                chosen = read in self.search.after and read is not self.search.ids
                if (chosen or self.flow.is_constant(read)) and read not in found:
                    found.add(read)
                    waiting.append(read)
        if region.routing_weights not in self.search.after:
            return []
        return sorted(found, key=self.flow.index.__getitem__)

    def _first_use(self, node: fx.Node) -> int:
        return min(self.flow.index[r] for r in self.flow.readers[node] if r in self.inside)
