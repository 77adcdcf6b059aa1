"""Go back from an output to what it is computed from: the borders of a possible region."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set

import torch
from torch import fx

from ..graph.dataflow import Flow, elements, hinted_shape, meta_value, result_node
from .borders import close_region
from .region import Region, innermost_module
from .roles import find_weights

__all__ = ["Search"]

# How many tensors [T, K] that depend on the selection are tried as weighting.
TRIED_WEIGHTINGS = 3
# Nodes of a region; a layer of 128 unrolled experts has about 3000.
LARGEST_REGION = 20_000


@dataclasses.dataclass
class Search:
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

    def __init__(self, search: Search, output: fx.Node, experts: set[int], passed: set[fx.Node]):
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

    def _first_use(self, node: fx.Node) -> tuple[int, int]:
        """Return the place in the graph of the first node inside that reads it, and where there."""
        index = self.flow.index
        first = min((r for r in self.flow.readers[node] if r in self.inside), key=index.__getitem__)
        return index[first], self.flow.reads[first].index(node)
