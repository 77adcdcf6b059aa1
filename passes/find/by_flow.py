"""Propose regions of a graph that may be a mixture of experts, by data flow alone.

An integer selection [T, K] leads to all experts; where everything that depends on it meets again
is an output [T, H]. Going back from there, the region ends at the selection, at the latest float
tensor [T, K] (or dense [T, E]) and at the latest tensor of the output's size that all else comes
from.
What is left are the weights. No names of modules, no sequence of operations; numbers decide.
"""

from __future__ import annotations

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
from .closure import Search
from .region import Region

__all__ = ["propose_regions"]

# How many places behind the selection are tried as output.
TRIED_OUTPUTS = 8
LOOK_UPS = ("getitem", "index", "index_select", "embedding")


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

    def _search(self, readers: list[fx.Node]) -> Search:
        after = {self.ids}.union(*(self.flow.after(reader) for reader in readers))
        sizes = (self.tokens, self.top_k)
        return Search(self.flow, self.ids, *sizes, after, self.parameters, self.selections)

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
    """Whether it is integers [..., K] that were not computed from others, or were looked up."""
    if len(shape) < 2 or 0 in shape or node in parameters or node.op == "get_attr":
        return False
    if meta_value(node).dtype not in (torch.int64, torch.int32):
        return False
    if node.op == "placeholder":
        return True
    reads = flow.reads[node]
    sources = [tensor for read in reads for tensor in _tensors_behind(flow, read)]
    if bool(sources) and all(meta_value(source).is_floating_point() for source in sources):
        return True
    # A router may know each token's experts: stored integers [V, K], looked up.
    if len(reads) != 2 or operation_name(node) not in LOOK_UPS:
        return False
    table = hinted_shape(reads[0]) or ()
    stored = reads[0].op in ("placeholder", "get_attr")
    return stored and len(table) == 2 and table[1] == shape[-1]


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
