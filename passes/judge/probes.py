"""The random numbers that a region is asked with.

The experts' weights are overlapping windows of one small buffer, so that 128 experts cost the
memory of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fp4moe.activations import FAR
from fp4moe.random_floats import random_normal, random_uniform

from ..find.region import Region
from ..graph.dataflow import elements, hinted_shape, meta_value

__all__ = ["Probes", "compared_tokens", "make_probes", "region_weighting"]
__all__ += ["LARGE", "LIMITED", "checking_rounds", "telling_rounds"]

# Rows of the output that are compared.
COMPARED_TOKENS = 16
# Distance of two experts' windows; odd, so that rows of different experts never coincide.
EXPERT_SHIFT = 97
# Standard deviation 10,000 before the activation, where limits of any use show.
LARGE = FAR / 1.5
# Standard deviation 72, for what has a limit: in larger sums roundings hide what is below it.
LIMITED = 48.0

Probes = dict[str, torch.Tensor]


def make_probes(region: Region) -> Probes:
    """Random inputs of the region's own sizes, on its own device."""
    generator = torch.Generator("cpu").manual_seed(0)
    nodes = region.inputs()
    device = meta_value(nodes["hidden"]).device
    hidden_shape, ids_shape = (hinted_shape(nodes[n]) for n in ("hidden", "expert_ids"))
    assert hidden_shape is not None and ids_shape is not None
    tokens, top_k = elements(ids_shape[:-1]), ids_shape[-1]
    experts = region.weight_shape("first")[0]
    # Distinct experts of each token, as a router gives them.
    ids = random_uniform(generator, (tokens, experts)).argsort(1)[:, :top_k]
    if top_k > experts:
        ids = torch.randint(
            experts, (tokens, top_k), generator=generator, dtype=torch.int64, device="cpu"
        )
    probes = {
        "hidden": random_normal(generator, hidden_shape),
        "expert_ids": ids.reshape(ids_shape).to(meta_value(nodes["expert_ids"]).dtype),
    }
    if region.routing_weights is not None:
        shape = ids_shape if region.dense else hinted_shape(region.routing_weights) or ids_shape
        probes["routing_weights"] = random_uniform(generator, shape) + 0.1
    for i, extra in enumerate(region.extras):
        # Small, so that the form without them comes closest.
        probes[f"extra {i}"] = 0.1 * random_normal(generator, hinted_shape(extra) or ())
    for role in region.weights:
        if role in region.biases:
            probes[role] = random_normal(generator, region.weight_shape(role))
            continue
        experts, rows, columns = region.weight_shape(role)
        buffer = random_normal(generator, (EXPERT_SHIFT * (experts - 1) + rows * columns,))
        # Standard deviation 1.5 before the activation, where its forms differ most.
        buffer *= 1.5 * hidden_shape[-1] ** -0.5
        # as_strided windows survive .to(device) only by a copy; the buffer is moved instead.
        shape = (experts, rows, columns)
        probes[role] = buffer.to(device).as_strided(shape, (EXPERT_SHIFT, columns, 1))
    windows = region.weights.keys() - region.biases.keys()
    return {n: p if n in windows else p.to(device) for n, p in probes.items()}


def compared_tokens(probes: Probes) -> torch.Tensor:
    """Which rows of the output are compared."""
    ids = probes["expert_ids"]
    count = elements(tuple(ids.shape[:-1]))
    return (
        torch.linspace(0, count - 1, min(COMPARED_TOKENS, count), dtype=torch.float32, device="cpu")
        .long()
        .to(ids.device)
    )


def other_experts(probes: Probes) -> Iterator[Probes]:
    """Yield probes until every expert has been chosen by a token that is compared.

    An unrolled loop may treat one expert apart.
    """
    ids, rows = probes["expert_ids"], compared_tokens(probes)
    experts, top_k = probes["down"].shape[0], ids.shape[-1]
    flat = ids.reshape(-1, top_k)
    unseen = set(range(experts)) - set(flat[rows].flatten().tolist())
    places = torch.arange(rows.numel() * top_k, dtype=torch.int64, device=ids.device) % experts
    while unseen:
        # Neighbours in a list without repetition: no token gets an expert twice.
        pool = sorted(range(experts), key=lambda expert: expert not in unseen)
        changed = flat.clone()
        changed[rows] = ids.new_tensor(pool)[places].reshape(-1, top_k)
        unseen -= set(changed[rows].flatten().tolist())
        yield probes | {"expert_ids": changed.reshape(ids.shape)}


def telling_rounds(probes: Probes) -> Iterator[tuple[str, Probes]]:
    """Yield (how they are drawn, probes) that tell the forms apart, the second where need be."""
    yield "on random inputs", probes
    if "routing_weights" in probes:
        # They tell where the weights are applied, for an activation such as relu.
        yield (
            "with negative routing weights",
            probes | {"routing_weights": -probes["routing_weights"]},
        )


def checking_rounds(probes: Probes, large: float) -> Iterator[tuple[str, Probes]]:
    """Yield (how they are drawn, probes) where clamps, capacities and odd experts show.

    Args:
        large: LARGE or LIMITED.
    """
    yield "on large inputs of which all choose the same experts", large_and_skewed(probes, large)
    for others in other_experts(probes):
        yield "on experts not chosen before", others


def large_and_skewed(probes: Probes, large: float) -> Probes:
    """Large inputs of which all choose the same experts."""
    # The other way round too: one token whose ids happen to ascend would hide that a region sorts.
    ids = probes["expert_ids"].flip(-1)
    same = ids.reshape(-1, ids.shape[-1])[:1].expand(elements(tuple(ids.shape[:-1])), -1)
    return probes | {
        "hidden": probes["hidden"] * large,
        "expert_ids": same.reshape(ids.shape).contiguous(),
    }


def region_weighting(region: Region, probes: Probes) -> torch.Tensor:
    """The routing weights as the region takes them."""
    weights, ids = probes["routing_weights"], probes["expert_ids"]
    if not region.dense:
        return weights.clone()
    assert region.routing_weights is not None
    shape = hinted_shape(region.routing_weights)
    assert shape is not None
    flat = weights.new_zeros(weights.numel() // weights.shape[-1], shape[-1])
    rows = ids.reshape(-1, ids.shape[-1]).long()
    return flat.scatter(1, rows, weights.reshape(rows.shape)).reshape(shape)
