"""Propose regions of a graph that may be a mixture of experts, by data flow alone.

An integer selection [T, K] leads to all experts; where everything that depends on it meets again
is an output [T, H]. Going back from there, the region ends at the selection, at the latest float
tensor [T, K] (or dense [T, E]) and at the latest tensor of the output's size that all else comes
from.
What is left are the weights. No names of modules, no sequence of operations; numbers decide.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Set

import torch
from torch import fx

from ..graph.dataflow import (
    Flow,
    elements,
    hinted_shape,
    meta_value,
    operation_name,
    result_node,
)
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
    flow: Flow, parameters: Set[fx.Node] = frozenset(), taken: Set[fx.Node] = frozenset()
) -> Iterator[Iterator[Region]]:
    """Yield for each selection of experts its possible regions, the likeliest first.

    Args:
        flow: the graph. parameters: nodes known to be stored weights, whatever their shape.
        taken: nodes of regions that are decided already; may grow between two selections.
    """
    selections = {}
    for node in flow.nodes:
        shape = hinted_shape(node)
        if shape is not None and _is_selection(flow, node, shape, parameters):
            ids, shape = _used_columns(flow, node, shape)
            selections[ids] = shape
    for ids, shape in selections.items():
        layers = _Layers(flow, ids, shape, parameters, set(selections), taken)
        while ids not in taken and layers.readers:
            yield layers.regions(layers.readers)
            layers.advance()


class _Layers:
    """The layers of one selection: as a rule one, several where they share their routing.

    Attributes:
        readers: nodes that read the selection and lead to a possible output, less those of layers
            that were looked at.
    """

    def __init__(
        self,
        flow: Flow,
        ids: fx.Node,
        shape: tuple[int, ...],
        parameters: Set[fx.Node],
        selections: set[fx.Node],
        taken: Set[fx.Node],
    ):
        self.flow, self.ids, self.taken = flow, ids, taken
        self.tokens, self.top_k = elements(shape[:-1]), shape[-1]
        self.parameters, self.selections = parameters, selections
        # A reader that leads to no possible output (a loss, a counter) is no part of a layer.
        after = flow.after(ids)
        chains = {
            reader: [n for n in flow.chain(reader) if n in after and _is_output(n, self.tokens)]
            for reader in flow.readers[ids]
        }
        self.outputs = {r: _without_casts(flow, chain) for r, chain in chains.items() if chain}
        self.readers = list(self.outputs)
        self.several = False
        self.looked_at: set[fx.Node] = set()

    def regions(self, readers: list[fx.Node]) -> Iterator[Region]:
        """Yield the possible regions of the layer that the first of the readers belongs to."""
        shared = self._shared(readers)
        found_any = False
        for output in shared:
            found = False
            for region in self._search(readers).regions(output):
                if self.taken.isdisjoint(region.nodes):
                    # Without roles it is only a near miss.
                    found |= bool(region.weights)
                    yield region
            if found_any and not found:
                break
            found_any |= found
        if not found_any and len(readers) > 1:
            self.several = True
            yield from self._of_first_reader(readers, set(shared))

    def _of_first_reader(self, readers: list[fx.Node], shared: set[fx.Node]) -> Iterator[Region]:
        """Yield regions that end where only some of the readers meet; of stacked weights only.

        Of experts in a list, the first few would look like a whole layer.
        """
        for output in self.outputs[readers[0]][:TRIED_OUTPUTS]:
            if output in shared:
                break
            group = [reader for reader in readers if output in self.outputs[reader]]
            for region in self._search(group).regions(output):
                stacked = all(len(nodes) == 1 for nodes in region.weights.values())
                if region.weights and stacked and self.taken.isdisjoint(region.nodes):
                    self.looked_at = set(region.nodes)
                    yield region

    def advance(self) -> None:
        """Leave the layer whose regions were yielded; there is a next one where several are."""
        first, before = self.readers[0], len(self.readers)
        self.readers = [reader for reader in self.readers if reader not in self.taken]
        if not self.several:
            self.readers = []
        elif len(self.readers) == before:
            done = self.looked_at | {first}
            self.readers = [reader for reader in self.readers if reader not in done]
        self.several = False

    def _search(self, readers: list[fx.Node]) -> _Search:
        after = {self.ids}.union(*(self.flow.after(reader) for reader in readers))
        sizes = (self.tokens, self.top_k)
        return _Search(self.flow, self.ids, *sizes, after, self.parameters, self.selections)

    def _shared(self, readers: list[fx.Node]) -> list[fx.Node]:
        """The first possible outputs that every path from these readers meets."""
        first, *others = (self.outputs[reader] for reader in readers)
        shared = set(first).intersection(*others)
        return [node for node in first if node in shared][:TRIED_OUTPUTS]


def _without_casts(flow: Flow, chain: list[fx.Node]) -> list[fx.Node]:
    """The chain less what is only cast by its next node: the cast belongs to the layer."""
    cast = {
        node
        for node, following in itertools.pairwise(chain)
        if operation_name(following) in ("to", "_to_copy")
        and flow.reads[following] == [node]
        and flow.readers[node] == [following]
    }
    return [node for node in chain if node not in cast]


def _is_output(node: fx.Node, tokens: int) -> bool:
    """Whether it may be the output [T, H] of a layer."""
    shape = hinted_shape(result_node(node))
    return (
        node.op != "output"
        and shape is not None
        and len(shape) >= 2
        and meta_value(result_node(node)).is_floating_point()
        and elements(shape[:-1]) == tokens
        and shape[-1] > 1
    )


def _is_selection(
    flow: Flow, node: fx.Node, shape: tuple[int, ...], parameters: Set[fx.Node]
) -> bool:
    """Whether it is integers [..., K] that were not computed from other integers."""
    if len(shape) < 2 or 0 in shape or node in parameters or node.op == "get_attr":
        return False
    if meta_value(node).dtype not in (torch.int64, torch.int32):
        return False
    if node.op == "placeholder":
        return True
    sources = [tensor for read in flow.reads[node] for tensor in _tensors_behind(flow, read)]
    return bool(sources) and all(meta_value(source).is_floating_point() for source in sources)


def _used_columns(
    flow: Flow, node: fx.Node, shape: tuple[int, ...]
) -> tuple[fx.Node, tuple[int, ...]]:
    """Return the selection and its shape: the slice where only K columns of a full sort are used.

    A selection that is used as it is comes back unchanged.
    """
    readers = flow.readers[node]
    if len(readers) == 1:
        sliced = hinted_shape(readers[0])
        if sliced and sliced[:-1] == shape[:-1] and sliced[-1] < shape[-1]:
            if meta_value(readers[0]).dtype in (torch.int64, torch.int32):
                return _used_columns(flow, readers[0], sliced)
    return node, shape


def _tensors_behind(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The node if it is a tensor; if it is a tuple of results, the tensors it comes from."""
    value = meta_value(node)
    if isinstance(value, (tuple, list)):
        return [tensor for read in flow.reads[node] for tensor in _tensors_behind(flow, read)]
    return [node] if isinstance(value, torch.Tensor) else []


@dataclasses.dataclass
class _Search:
    """Looks for the regions of one selection.

    Attributes:
        flow: the graph. ids: the selection, [T, K]. tokens: T. top_k: K.
        after: all that depends on the selection.
        parameters: stored weights. selections: all selections of the graph.
        only_ids: nodes that depend on nothing but the selection and constants.
    """

    flow: Flow
    ids: fx.Node
    tokens: int
    top_k: int
    after: set[fx.Node]
    parameters: Set[fx.Node]
    selections: set[fx.Node]

    def __post_init__(self) -> None:
        self.only_ids = self.flow.only_from(self.ids, self.after)

    def regions(self, output: fx.Node) -> Iterator[Region]:
        """Yield the regions of that output: sparse weighting, from the latest on, then dense."""
        passed: set[fx.Node] = set()
        for _ in range(TRIED_WEIGHTINGS):
            closure = _Closure(self, output, set(), passed)
            if (region := closure.region()) is not None:
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
    """What an output is computed from, back to hidden states, selection, weighting and weights.

    Args:
        search: for one selection. output: where to start.
        experts: numbers of columns that make a float tensor a dense weighting.
        passed: tensors that look like the weighting and are taken for none.

    Attributes:
        inside: the nodes in between. sources: the weights and other stored float tensors.
        borders: candidates for the hidden states and for the weighting.
        numbers: Python numbers that may change from call to call.
        foreign: whether it reads what no layer of experts reads.
    """

    def __init__(self, search: _Search, output: fx.Node, experts: set[int], passed: set[fx.Node]):
        self.search, self.flow, self.output = search, search.flow, output
        self.experts, self.passed = experts, passed
        self.width = (hinted_shape(result_node(output)) or (0,))[-1]
        self.inside: set[fx.Node] = set()
        self.borders: dict[str, set[fx.Node]] = {"hidden": set(), "routing": set()}
        self.sources: set[fx.Node] = set()
        self.numbers: set[fx.Node] = set()
        self.foreign = False
        self.reads_ids = False
        self._walk(output)
        while not self.foreign and (node := self._no_border()) is not None:
            for border in self.borders.values():
                border.discard(node)
            self._walk(node)

    def _no_border(self) -> fx.Node | None:
        """Return a candidate that belongs inside, None when the borders are settled.

        Of several candidates it is the last in graph order: the others may be its inputs.
        """
        for border in self.borders.values():
            if len(border) > 1:
                return max(border, key=self.flow.index.__getitem__)
        hidden = self.borders["hidden"]
        return next(iter(hidden), None) if not self._may_be_experts() else None

    def _may_be_experts(self) -> bool:
        """Whether there are two weights or more: stacked ones if any is, else matrices."""
        shapes = [hinted_shape(source) or () for source in self.sources]
        stacked = [shape for shape in shapes if len(shape) == 3]
        return len([shape for shape in stacked or shapes if len(shape) >= 2]) >= 2

    def _walk(self, start: fx.Node) -> None:
        """Add the node and all that it needs, up to the borders."""
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
                elif self._is_number(read):
                    self.numbers.add(read)
                elif (border := self._border(read)) is not None:
                    self.borders[border].add(read)
                elif read.op in ("placeholder", "get_attr"):
                    self._add_source(read)
                else:
                    self.inside.add(read)
                    waiting.append(read)
            self.foreign |= len(self.inside) > LARGEST_REGION

    def _is_number(self, node: fx.Node) -> bool:
        """Whether it is a Python float that is given or read from a tensor, not made of sizes."""
        if not isinstance(meta_value(node), (float, torch.SymFloat)):
            return False
        reads = map(meta_value, self.flow.reads[node])
        return node.op == "placeholder" or any(isinstance(r, torch.Tensor) for r in reads)

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
        """Return which border the node may be: "hidden", "routing" or None."""
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
        columns, rest = divmod(count, search.tokens)
        is_matrix = len(shape) >= 2 and columns == shape[-1] and not rest
        return "routing" if is_matrix and columns in {search.top_k, *self.experts} else None

    def expert_counts(self) -> set[int]:
        """Return how many experts the weights may be for."""
        shapes = [hinted_shape(source) or () for source in self.sources]
        stacked = {shape[0] for shape in shapes if len(shape) == 3}
        return stacked or {shapes.count(shape) for shape in shapes if len(shape) == 2} - {1}

    def region(self) -> Region | None:
        """Return the region, None where it does not end at hidden states and two weights or more.

        Where several stacked weights cannot be told apart, it has a reason and no weights.
        """
        if self.foreign or len(self.borders["hidden"]) != 1 or not self._may_be_experts():
            return None
        (hidden,) = self.borders["hidden"]
        routing = next(iter(self.borders["routing"]), None)
        if not self.reads_ids and routing is None:
            return None
        shape = hinted_shape(routing) if routing is not None else None
        region = Region(*innermost_module(self.output), [])
        region.hidden, region.expert_ids, region.routing_weights = hidden, self.search.ids, routing
        region.dense = shape is not None and shape[-1] != self.search.top_k
        region.output = self.output
        region.numbers = tuple(sorted(self.numbers, key=self.flow.index.__getitem__))
        sources = sorted(self.sources, key=self._first_use)
        roles = find_weights(self.flow, self.inside, hidden, sources)
        if roles is None:
            return self._without_roles(region, sources)
        region.weights, region.extras = roles
        if region.dense:
            region.support = self._support(region)
        if not self.reads_ids and not region.dense:
            return None
        names = ", ".join(node.name for node in region.numbers)
        if names:
            region.reasons.append(f"it reads {names}, a number that may change from call to call")
        close_region(self.flow, region, self.inside)
        return region

    def _without_roles(self, region: Region, sources: list[fx.Node]) -> Region | None:
        stacked = [node for node in sources if len(hinted_shape(node) or ()) == 3]
        if len({(hinted_shape(node) or ())[0] for node in stacked}) != 1:
            return None
        names = ", ".join(f"{node.name} {list(hinted_shape(node) or ())}" for node in stacked)
        region.nodes = sorted(self.inside, key=self.flow.index.__getitem__)
        region.reasons.append(
            f"its weights {names} are not one up projection, or gate and up, followed by one down "
            "projection"
        )
        return region

    def _support(self, region: Region) -> list[fx.Node]:
        """Return the nodes that make a dense weighting from the selection, in graph order."""
        if region.routing_weights is None or region.routing_weights not in self.search.after:
            return []
        support, waiting = {region.routing_weights}, [region.routing_weights]
        while waiting:
            for read in self.flow.reads[waiting.pop()]:
                chosen = read in self.search.after and read is not self.search.ids
                if (chosen or self.flow.is_constant(read)) and read not in support:
                    support.add(read)
                    waiting.append(read)
        return sorted(support, key=self.flow.index.__getitem__)

    def _first_use(self, node: fx.Node) -> int:
        """Return the place in the graph of the first node inside that reads it."""
        return min(self.flow.index[r] for r in self.flow.readers[node] if r in self.inside)
