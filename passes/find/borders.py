"""Complete a region: what hangs on its nodes, and what forbids to cut it out of its graph."""

from __future__ import annotations

from torch import fx

from ..graph.dataflow import Flow, hinted_shape, is_data, operation_name, result_node, storage
from .region import Region

__all__ = ["close_region"]


def close_region(flow: Flow, region: Region, inside: set[fx.Node]) -> None:
    """Add what hangs on the region, and say what leaves it besides its output."""
    assert region.output is not None and region.hidden is not None
    output, result = region.output, result_node(region.output)
    last = flow.index[output]
    made = {storage(node) for node in inside}
    # Sizes, assertions and writes that nobody reads.
    first = flow.index[min(inside, key=flow.index.__getitem__)]
    candidates = [node for node in flow.valueless if flow.index[node] > first]
    loose: set[fx.Node] = set()
    for node in reversed(candidates):
        if node in inside:
            continue
        local = flow.index[node] < last and all(storage(t) in made for t in flow.writes[node])
        if (local or not flow.writes[node]) and all(u in inside or u in loose for u in node.users):
            loose.add(node)
    for node in candidates:
        if node in loose and not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    region.nodes = sorted(inside, key=flow.index.__getitem__)
    products = _behind(flow, region.nodes, region.hidden) & _behind(
        flow, region.nodes, *region.weight_nodes()
    )
    for node in region.nodes:
        leaves = [user for user in node.users if user not in inside]
        if node is output or not leaves:
            continue
        same = storage(node) == storage(result) and hinted_shape(node) == hinted_shape(result)
        if same and all(flow.index[user] > last for user in leaves):
            region.aliases += (node,)
        elif not is_data(node) and any(source in products for source in node.all_input_nodes):
            names = ", ".join(source.name for source in node.all_input_nodes)
            region.reasons.append(f"sizes of its intermediate {names} are used outside")
        elif storage(node) in flow.writers or node in products:
            region.reasons.append(f"its intermediate {node.name} is used outside")
    assert region.expert_ids is not None
    chosen = _behind(flow, region.nodes, region.expert_ids)
    region.reasons += [
        f"{node.name} asks for experts beyond the {region.weight_shape('first')[0]} that have "
        "weights"
        for node in region.nodes
        if node in chosen and hinted_shape(node) and _asks_beyond(flow, region, node, chosen)
    ]
    choices, experts = _choices(flow, region.expert_ids), region.weight_shape("first")[0]
    if choices is not None and choices > experts:
        region.reasons.append(
            f"its router chooses among {choices} experts, of which {experts} have weights"
        )
    borders = {storage(node) for node in region.inputs().values()}
    for written in borders & set(flow.writers):
        for writer in flow.writers[written]:
            if first < flow.index[writer] < last:
                region.reasons.append(f"one of its inputs is changed by {writer.name} meanwhile")


def _choices(flow: Flow, ids: fx.Node) -> int | None:
    """How many scores the ids were selected from; None where the graph does not say."""
    node: fx.Node | None = ids
    while node is not None:
        reads = flow.reads[node]
        if operation_name(node) in ("topk", "sort", "argsort", "max", "argmax"):
            return (hinted_shape(reads[0]) or (None,))[-1]
        node = reads[0] if reads else None
    return None


def _asks_beyond(flow: Flow, region: Region, node: fx.Node, chosen: set[fx.Node]) -> bool:
    """Whether a node compares ids with one that has no weights, as of experts that copy.

    Running it on such an id could end the process on a GPU, where an index is not checked.
    """
    experts, name = region.weight_shape("first")[0], operation_name(node)
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


def _behind(flow: Flow, nodes: list[fx.Node], *sources: fx.Node) -> set[fx.Node]:
    """The nodes that depend on any of the sources."""
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(flow.reads[node]):
            found.add(node)
    return found
