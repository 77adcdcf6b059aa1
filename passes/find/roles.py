"""Tell which sources of a region are gate, up and down, and of which expert, by data flow.

Down is the weight that is multiplied with values that already depend on another weight. Stacked
weights have three axes; lists have one source of two axes for each expert, in the order of use.
A bias has one axis less, and meets the hidden states in or behind the product of its weight.
"""

from __future__ import annotations

from torch import fx

from ..graph.dataflow import Flow, hinted_shape

__all__ = ["find_weights"]

Weights = dict[str, tuple[fx.Node, ...]]


def find_weights(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, sources: list[fx.Node]
) -> tuple[Weights, tuple[fx.Node, ...]] | None:
    """Return (weights by role, other sources), or None where the roles cannot be told.

    Args:
        flow: the graph. inside: nodes of the region. hidden: its hidden states.
        sources: its float sources in the order of their first use.
    """
    shapes = {source: hinted_shape(source) or () for source in sources}
    axes = 3 if any(len(shape) == 3 for shape in shapes.values()) else 2
    candidates = [source for source in sources if len(shapes[source]) == axes]
    first, down = _levels(flow, inside, hidden, candidates)
    if not first or not down:
        return None
    weights = _stacked(first, down) if axes == 3 else _listed(first, down)
    if weights is None:
        return None
    for nodes in weights.values():
        if len({shapes[node] for node in nodes}) > 1:
            return None
    if axes == 3 and len({shapes[nodes[0]][0] for nodes in weights.values()}) > 1:
        return None
    others = [source for source in sources if len(shapes[source]) == axes - 1]
    weights |= _biases(flow, inside, hidden, weights, others)
    used = {node for nodes in weights.values() for node in nodes}
    return weights, tuple(source for source in sources if source not in used)


# A product: (its own weights, the weights that its other factor comes from).
Product = tuple[tuple[fx.Node, ...], frozenset[fx.Node]]


def _levels(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, sources: list[fx.Node]
) -> tuple[list[Product], list[Product]]:
    """The products of the hidden states with weights, and those of their results with others."""
    candidates = set(sources)
    # The weights that each node depends on.
    behind: dict[fx.Node, frozenset[fx.Node]] = {s: frozenset([s]) for s in sources}
    from_hidden = {hidden}
    first: list[Product] = []
    down: list[Product] = []
    multiplied: set[fx.Node] = set()
    for node in sorted(inside, key=flow.index.__getitem__):
        reads = [r for r in flow.reads[node] if r in inside or r in candidates or r is hidden]
        behind[node] = frozenset().union(*(behind.get(read, frozenset()) for read in reads))
        own: list[fx.Node] = []
        carried: frozenset[fx.Node] = frozenset()
        again: frozenset[fx.Node] = frozenset()
        for read in reads:
            if read in from_hidden:
                carried |= behind.get(read, frozenset())
            else:
                own += [s for s in sources if s in behind.get(read, frozenset()) - multiplied]
                again |= behind.get(read, frozenset())
        if not again.isdisjoint(carried):
            # One layer after the other, on the same weights.
            return [], []
        if any(read in from_hidden for read in reads):
            from_hidden.add(node)
            if own:
                multiplied.update(own)
                (down if carried else first).append((tuple(own), carried))
    return first, down


def _weights_of(products: list[Product]) -> list[fx.Node]:
    return [weight for own, _ in products for weight in own]


def _stacked(first: list[Product], down: list[Product]) -> Weights | None:
    """Roles of weights with an axis for the experts."""
    firsts, downs = _weights_of(first), _weights_of(down)
    if len(firsts) not in (1, 2) or len(downs) != 1:
        return None
    weights: Weights = {"first": (firsts[0],), "down": (downs[0],)}
    return weights if len(firsts) == 1 else {**weights, "second": (firsts[1],)}


def _listed(first: list[Product], down: list[Product]) -> Weights | None:
    """Roles of weights that each expert has for itself."""
    firsts, downs = _weights_of(first), _weights_of(down)
    ratio, rest = divmod(len(firsts), len(downs))
    if rest or ratio not in (1, 2) or len(downs) < 2:
        return None
    rows = _by_expert(first, down, ratio)
    names = ("first", "second")[:ratio]
    weights = {name: tuple(row[i] for row in rows) for i, name in enumerate(names)}
    flat = [node for nodes in weights.values() for node in nodes]
    if len(rows) != len(downs) or len(set(flat)) != len(flat):
        return None
    return weights | {"down": tuple(downs)}


def _by_expert(first: list[Product], down: list[Product], ratio: int) -> list[tuple[fx.Node, ...]]:
    """For each expert its up projection, or its gate and up in either order."""
    firsts = _weights_of(first)
    if all(len(carried) == ratio for _, carried in down):
        # Each expert by itself: its own down product says whose the others are.
        return [
            tuple(weight for weight in firsts if weight in carried)
            for own, carried in down
            for _ in own
        ]
    if ratio == 1:
        return [(weight,) for weight in firsts]
    # Stacked in the graph: all of one, then all of the other, if they have products apart.
    experts = len(firsts) // 2
    apart = len(first) == 2 and len(first[0][0]) == experts
    left, right = (firsts[:experts], firsts[experts:]) if apart else (firsts[::2], firsts[1::2])
    return list(zip(left, right, strict=True))


def _biases(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, weights: Weights, sources: list[fx.Node]
) -> Weights:
    """Roles of those sources that may be biases: one for each weight of a role, as long as it."""
    met = _meetings(flow, inside, hidden, weights, sources) if sources else {}
    found: Weights = {}
    for role, own in weights.items():
        biases = [source for source in sources if source in met and met[source][0] == role]
        if len(biases) != len(own):
            continue
        by_weight = {w: bias for bias in biases if len(met[bias][1]) == 1 for w in met[bias][1]}
        # Stacked in the graph, all meet all; the order of their use is that of the experts.
        by_weight = by_weight or dict(zip(own, biases, strict=True))
        *experts, rows, columns = hinted_shape(own[0]) or ()
        lengths = {(*experts, rows), (*experts, columns)}
        if set(by_weight) == set(own) and {hinted_shape(bias) for bias in biases} <= lengths:
            found[f"{role}_bias"] = tuple(by_weight[weight] for weight in own)
    return found


def _meetings(
    flow: Flow, inside: set[fx.Node], hidden: fx.Node, weights: Weights, sources: list[fx.Node]
) -> dict[fx.Node, tuple[str, frozenset[fx.Node]]]:
    """Where each source meets the hidden states: (role, the weights of that role behind it)."""
    roles = {weight: role for role, nodes in weights.items() for weight in nodes}
    behind: dict[fx.Node, frozenset[fx.Node]] = {weight: frozenset([weight]) for weight in roles}
    waiting: dict[fx.Node, frozenset[fx.Node]] = {s: frozenset([s]) for s in sources}
    from_hidden = {hidden}
    met: dict[fx.Node, tuple[str, frozenset[fx.Node]]] = {}
    for node in sorted(inside, key=flow.index.__getitem__):
        reads = flow.reads[node]
        behind[node] = frozenset().union(*(behind.get(read, frozenset()) for read in reads))
        carried = frozenset().union(*(waiting.get(read, frozenset()) for read in reads))
        if from_hidden.isdisjoint(reads):
            waiting[node] = carried
            continue
        from_hidden.add(node)
        if not carried:
            continue
        by_role = {role: frozenset(w for w in behind[node] if roles[w] == role) for role in weights}
        # The last product says whose it is; gate and up at once are none.
        last = [role for role in by_role if by_role[role] and role != "down"]
        role = "down" if by_role["down"] else last[0] if len(last) == 1 else ""
        for source in carried:
            # Met again, as by each expert's slice of a stacked one, it must be the same.
            same = source not in met or met[source][0] == role
            others = met[source][1] if source in met else frozenset()
            met[source] = (role if same else "", by_role.get(role, frozenset()) | others)
    return met
