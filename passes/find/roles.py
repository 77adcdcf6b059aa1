"""Tell which sources of a region are gate, up and down, and whose expert they are, by data flow.

Down is what multiplies values that already come from another weight. Stacked weights have three
axes; lists have one source of two axes for each expert, in the order of their use.
"""

from __future__ import annotations

from torch import fx

from ..graph.dataflow import Flow, hinted_shape

__all__ = ["find_weights"]

Weights = dict[str, tuple[fx.Node, ...]]


def find_weights(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, sources: list[fx.Node]
) -> tuple[Weights, tuple[fx.Node, ...]] | None:
    """Return (weights by role, other sources), or None where they are no experts' weights.

    Args:
        flow: the graph. inside: nodes of the region. hidden: what it reads.
        sources: its float sources in the order of their first use.
    """
    shapes = {source: hinted_shape(source) or () for source in sources}
    axes = 3 if any(len(shape) == 3 for shape in shapes.values()) else 2
    candidates = [source for source in sources if len(shapes[source]) == axes]
    first, down = _levels(flow, inside, hidden, candidates)
    if not first or not down:
        return None
    chosen = _stacked(first, down) if axes == 3 else _listed(first, down)
    if chosen is None:
        return None
    for nodes in chosen.values():
        if len({shapes[node] for node in nodes}) > 1:
            return None
    if axes == 3 and len({shapes[node[0]][0] for node in chosen.values()}) > 1:
        return None
    used = {node for nodes in chosen.values() for node in nodes}
    return chosen, tuple(source for source in sources if source not in used)


# A product: (its own weights, the weights that its other factor comes from).
Product = tuple[tuple[fx.Node, ...], frozenset[fx.Node]]


def _levels(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, sources: list[fx.Node]
) -> tuple[list[Product], list[Product]]:
    """The products of the hidden states with weights, and those of their results with others."""
    candidates = set(sources)
    behind: dict[fx.Node, frozenset[fx.Node]] = {s: frozenset([s]) for s in sources}
    active = {hidden}
    first: list[Product] = []
    down: list[Product] = []
    seen: set[fx.Node] = set()
    for node in sorted(inside, key=flow.index.__getitem__):
        reads = [r for r in flow.reads[node] if r in inside or r in candidates or r is hidden]
        behind[node] = frozenset().union(*(behind.get(read, frozenset()) for read in reads))
        own: list[fx.Node] = []
        carried: frozenset[fx.Node] = frozenset()
        for read in reads:
            if read in active:
                carried |= behind.get(read, frozenset())
            else:
                own += [s for s in sources if s in behind.get(read, frozenset()) - seen]
        if any(read in active for read in reads):
            active.add(node)
            if own:
                seen.update(own)
                (down if carried else first).append((tuple(own), carried))
    return first, down


def _stacked(first: list[Product], down: list[Product]) -> Weights | None:
    firsts = [source for own, _ in first for source in own]
    downs = [source for own, _ in down for source in own]
    if len(firsts) not in (1, 2) or len(downs) != 1:
        return None
    chosen: Weights = {"first": (firsts[0],), "down": (downs[0],)}
    return chosen if len(firsts) == 1 else {**chosen, "second": (firsts[1],)}


def _listed(first: list[Product], down: list[Product]) -> Weights | None:
    firsts = [source for own, _ in first for source in own]
    downs = [source for own, _ in down for source in own]
    ratio, rest = divmod(len(firsts), len(downs))
    if rest or ratio not in (1, 2) or len(downs) < 2:
        return None
    rows: list[tuple[fx.Node, ...]] = []
    if all(len(carried) == ratio for _, carried in down):
        # Each expert by itself: its own down product says whose the others are.
        for own, carried in down:
            rows += [tuple(s for s in firsts if s in carried)] * len(own)
    elif ratio == 1:
        rows = [(source,) for source in firsts]
    else:
        # Stacked in the graph: all of one, then all of the other, if they have products apart.
        apart = len(first) == 2 and len(first[0][0]) == len(downs)
        half = len(downs)
        left, right = (firsts[:half], firsts[half:]) if apart else (firsts[::2], firsts[1::2])
        rows = list(zip(left, right, strict=True))
    names = ("first", "second")[:ratio]
    weights = {name: tuple(row[i] for row in rows) for i, name in enumerate(names)}
    flat = [node for nodes in weights.values() for node in nodes]
    if len(rows) != len(downs) or len(set(flat)) != len(flat):
        return None
    return weights | {"down": tuple(downs)}
