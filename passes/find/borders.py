"""Complete a region: add its loose ends, and find what forbids to cut it out of its graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..graph.dataflow import (
    Flow,
    hinted_shape,
    is_data,
    meta_value,
    operation_name,
    result_node,
    storage,
)
from .region import Region

__all__ = ["close_region"]


def close_region(flow: Flow, region: Region, inside: set[fx.Node]) -> None:
    """Set the nodes and aliases of a region and note why it cannot be cut out of its graph.

    Args:
        flow: the graph.
        region: has its inputs and its output; gets nodes, aliases, computed_weights and reasons.
        inside: the nodes between them; gets the loose ends too.
    """
    _add_loose_ends(flow, region, inside)
    region.nodes = sorted(inside, key=flow.index.__getitem__)
    region.computed_weights = tuple(_computed_weights(flow, region))
    region.aliases, leaks = _leaks(flow, region, inside)
    region.reasons += leaks
    region.reasons += _missing_experts(flow, region)
    region.reasons += _changed_inputs(flow, region)


def _add_loose_ends(flow: Flow, region: Region, inside: set[fx.Node]) -> None:
    """Add what hangs on the region and reaches no output: sizes, assertions, unread writes."""
    assert region.output is not None
    first, last = min(map(flow.index.__getitem__, inside)), flow.index[region.output]
    made = {storage(node) for node in inside}
    candidates = [node for node in flow.valueless if flow.index[node] > first]
    loose: set[fx.Node] = set()
    for node in reversed(candidates):
        if node in inside:
            continue
        written = flow.writes[node]
        local = flow.index[node] < last and all(storage(target) in made for target in written)
        if (local or not written) and all(user in inside or user in loose for user in node.users):
            loose.add(node)
    for node in candidates:
        if node in loose and not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)


def _computed_weights(flow: Flow, region: Region) -> Iterator[fx.Node]:
    """Yield the nodes that change the values of a weight; views, casts and copies do not."""
    from_weights = {*region.weight_nodes()}
    for node in region.nodes:
        reads = flow.reads[node]
        if not reads or not from_weights.issuperset(reads):
            continue
        from_weights.add(node)
        if operation_name(node) not in ("clone", "contiguous") and any(
            _alike(read, node) and storage(read) != storage(node) for read in reads
        ):
            yield node


def _alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether two tensors have the same shape and dtype."""
    shape = hinted_shape(first)
    same_shape = shape is not None and shape == hinted_shape(second)
    return same_shape and meta_value(first).dtype == meta_value(second).dtype


def _leaks(
    flow: Flow, region: Region, inside: set[fx.Node]
) -> tuple[tuple[fx.Node, ...], list[str]]:
    """Return (nodes that share the output's memory, why others that are read outside must stay)."""
    assert region.output is not None and region.hidden is not None
    aliases, reasons = [], []
    output, result = region.output, result_node(region.output)
    products = _behind(flow, region.nodes, region.hidden) & _behind(
        flow, region.nodes, *region.weight_nodes()
    )
    for node in region.nodes:
        readers = [user for user in node.users if user not in inside]
        if node is output or not readers:
            continue
        same = storage(node) == storage(result) and hinted_shape(node) == hinted_shape(result)
        if same and all(flow.index[user] > flow.index[output] for user in readers):
            aliases.append(node)
        elif node in products and not any(map(is_data, readers)):
            reasons.append(f"sizes of its intermediate {node.name} are used outside")
        elif not is_data(node) and any(source in products for source in node.all_input_nodes):
            names = ", ".join(source.name for source in node.all_input_nodes)
            reasons.append(f"sizes of its intermediate {names} are used outside")
        elif storage(node) in flow.writers or node in products:
            reasons.append(f"its intermediate {node.name} is used outside")
    return tuple(aliases), reasons


def _missing_experts(flow: Flow, region: Region) -> Iterator[str]:
    """Yield where experts are chosen or asked for that have no weights."""
    assert region.expert_ids is not None
    experts = region.weight_shape("first")[0]
    chosen = _behind(flow, region.nodes, region.expert_ids)
    for node in region.nodes:
        if node in chosen and hinted_shape(node) and _asks_beyond(flow, node, chosen, experts):
            yield f"{node.name} asks for experts beyond the {experts} that have weights"
    choices = _choices(flow, region.expert_ids)
    if choices is not None and choices > experts:
        yield f"its router chooses among {choices} experts, of which {experts} have weights"


def _choices(flow: Flow, ids: fx.Node) -> int | None:
    """How many scores the ids were selected from; None where the graph does not say."""
    node: fx.Node | None = ids
    while node is not None:
        reads = flow.reads[node]
        if operation_name(node) in ("topk", "sort", "argsort", "max", "argmax"):
            return (hinted_shape(reads[0]) or (None,))[-1]
        node = reads[0] if reads else None
    return None


def _asks_beyond(flow: Flow, node: fx.Node, chosen: set[fx.Node], experts: int) -> bool:
    """Whether a node compares ids with one that has no weights, as of experts that copy.

    Running it on such an id could end the process on a GPU, where an index is not checked.
    """
    name = operation_name(node)
    numbers = [arg for arg in node.args if isinstance(arg, int)]
    if name in ("eq", "ne"):
        # Decomposed, one_hot compares with a row of numbers.
        rows = [n for n in node.all_input_nodes if n not in chosen and flow.is_constant(n)]
        return max([*numbers, -1]) >= experts or any(
            (hinted_shape(row) or (0,))[-1] > experts for row in rows
        )
    if name == "one_hot":
        return max([*numbers, 0]) > experts
    columns = name.startswith("scatter") and node.args[1] in (1, -1)
    return columns and (hinted_shape(node) or (0,))[-1] > experts


def _changed_inputs(flow: Flow, region: Region) -> Iterator[str]:
    """Yield the writes to an input of the region between its first node and its output."""
    assert region.output is not None
    first, last = flow.index[region.nodes[0]], flow.index[region.output]
    inputs = {storage(node) for node in region.inputs().values()}
    for written in inputs & set(flow.writers):
        for writer in flow.writers[written]:
            if first < flow.index[writer] < last:
                yield f"one of its inputs is changed by {writer.name} meanwhile"


def _behind(flow: Flow, nodes: list[fx.Node], *sources: fx.Node) -> set[fx.Node]:
    """The sources and the nodes that depend on any of them."""
    dependent = set(sources)
    for node in nodes:
        if not dependent.isdisjoint(flow.reads[node]):
            dependent.add(node)
    return dependent
