"""Run a region, or what makes its dense weighting, on probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fp4moe.random_floats import random_normal

from ..find.region import Region
from ..graph.dataflow import hinted_shape, meta_value, result_node
from ..graph.execute import run_in_float32
from .probes import Probes, region_weighting

__all__ = ["compute", "dense_reason"]


def compute(gm: fx.GraphModule, region: Region, probes: Probes) -> tuple[torch.Tensor | None, str]:
    """Run the region; return its output as [T, H], or None and why not."""
    assert region.output is not None
    given = probes | {r: probes[r].clone() for r in ("hidden", "expert_ids")}
    if "routing_weights" in given:
        given["routing_weights"] = region_weighting(region, probes)
    values: dict[fx.Node, Any] = dict.fromkeys(region.numbers, 1.0)
    for role, node in region.inputs().items():
        name, _, number = role.partition(" ")
        stacked = given[role if name == "extra" else name]
        values[node] = stacked[int(number)] if number and name != "extra" else stacked
    versions = {role: given[role]._version for role in given}
    try:
        (actual,) = run_in_float32(gm, region.nodes, values, result_node(region.output))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return None, f"it does not run by itself on random numbers: {error}"
    changed = [role for role in given if given[role]._version != versions[role]]
    if changed:
        return None, f"it changes its input {', '.join(changed)} in place"
    width = probes["hidden"].shape[-1]
    if actual.numel() != probes["hidden"].numel() or actual.shape[-1] != width:
        return None, f"it returns {list(actual.shape)} for {list(probes['hidden'].shape)}"
    return actual.reshape(-1, width), ""


def dense_reason(gm: fx.GraphModule, region: Region, probes: Probes) -> str:
    """Why the dense weighting may weigh experts that were not chosen; "" where it cannot."""
    assert region.routing_weights is not None and region.expert_ids is not None
    if region.routing_weights not in region.support:
        return "its dense weighting does not come from the selection of experts"
    generator = torch.Generator("cpu").manual_seed(1)
    values: dict[fx.Node, Any] = {region.expert_ids: probes["expert_ids"]}
    inside = set(region.support)
    for node in region.support:
        for read in node.all_input_nodes:
            shape = hinted_shape(read)
            if read in inside or read in values or shape is None:
                continue
            if meta_value(read).is_floating_point():
                random = random_normal(generator, shape)
                values[read] = random.to(meta_value(read).device)
    try:
        (dense,) = run_in_float32(gm, region.support, values, region.routing_weights)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"its dense weighting does not run by itself on random numbers: {error}"
    ids = probes["expert_ids"].reshape(-1, probes["expert_ids"].shape[-1]).long()
    rest = dense.reshape(ids.shape[0], -1).scatter(1, ids, 0.0)
    return "" if not rest.any() else "its dense weighting weighs experts that were not selected"
