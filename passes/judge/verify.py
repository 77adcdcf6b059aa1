"""Ask a region's numbers what it computes.

The region runs in float32 on random tokens and random weights of its own sizes, and is compared
with the plain definition under every form; exactly one must fit. It fits again on large
inputs whose tokens all choose the same experts, where clamps and limited capacities show, and with
every expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import fx

from fp4moe.activations import ACTIVATIONS
from fp4moe.experts import split_gate_up
from fp4moe.random_floats import random_normal

from ..find.region import Region
from ..graph.dataflow import hinted_shape, meta_value, result_node
from ..graph.execute import run_in_float32, undisturbed
from .forms import SEPARATE, Form, possible_forms
from .probes import (
    Probes,
    checking_rounds,
    compared_tokens,
    make_probes,
    region_weighting,
    telling_rounds,
)

__all__ = ["Verdict", "judge_region"]

# Relative RMS limit. Float32 sums of H terms err by about sqrt(H) * 2^-24 = 3e-6 at H = 2816; the
# closest pair of forms, the two GELUs, differ by about 3e-4.
LIMIT = 3e-5


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a region's numbers say.

    Attributes:
        form: the one form that fits, or None. reason: why there is none.
        closest: the form that came closest. error: its relative RMS error.
    """

    form: Form | None
    reason: str
    closest: Form | None = None
    error: float = math.inf


def judge_region(gm: fx.GraphModule, region: Region, verify: bool = True) -> Verdict:
    """Compare a region with the definition under every form that its shapes allow.

    Args:
        gm: owns the region. verify: False leaves out the rounds on large inputs and on experts that
            the first round did not choose.
    """
    with undisturbed(meta_value(region.inputs()["hidden"]).device):
        probes = make_probes(region)
        forms = list(_forms(probes, region))
        if not forms:
            shapes = [f"{list(region.weight_shape(role))}" for role in region.weights]
            return Verdict(
                None,
                f"weights {' and '.join(shapes)} fit no gated or plain form for hidden size "
                f"{probes['hidden'].shape[-1]}",
            )
        checks = checking_rounds(probes) if verify else ()
        for how, asked in itertools.chain(telling_rounds(probes), checks):
            if "negative" in how and len(forms) == 1:
                continue
            actual, why = _compute(gm, region, asked)
            if actual is None:
                return Verdict(None, why)
            errors = _errors(forms, asked, actual)
            closest = min(forms, key=lambda form: _or_inf(errors[form]))
            forms = [form for form in forms if errors[form] <= LIMIT]
            if not forms:
                return Verdict(
                    None,
                    f"its numbers fit no known form; closest is {closest} with relative error "
                    f"{errors[closest]:.2g} {how}, limit {LIMIT:g}",
                    closest,
                    errors[closest],
                )
        if len(forms) > 1:
            fitting = "; ".join(map(str, forms))
            return Verdict(None, f"it fits more than one form: {fitting}", forms[0], 0.0)
        why = _dense_reason(gm, region, probes) if region.dense else ""
        why = f"{why}; its numbers fit {forms[0]}" if why else ""
        return Verdict(None if why else forms[0], why, forms[0], errors[forms[0]])


def _or_inf(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _compute(gm: fx.GraphModule, region: Region, probes: Probes) -> tuple[torch.Tensor | None, str]:
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


def _dense_reason(gm: fx.GraphModule, region: Region, probes: Probes) -> str:
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


def _forms(probes: Probes, region: Region) -> list[Form]:
    return list(
        possible_forms(
            region.weight_shape("first"),
            region.weight_shape("down"),
            probes["hidden"].shape[-1],
            apart="second" in region.weights,
            weighted=region.routing_weights is not None,
        )
    )


def _errors(forms: list[Form], probes: Probes, actual: torch.Tensor) -> dict[Form, float]:
    """Relative RMS error of the region against the definition, written out pair by pair.

    Without weights in between, first(w * x) is w * first(x): both weightings share one product.
    """
    count = actual.shape[0]
    picked = compared_tokens(probes)
    x = probes["hidden"].reshape(count, -1)[picked]
    ids = probes["expert_ids"].reshape(count, -1)[picked].tolist()
    weights = torch.ones(len(ids), len(ids[0]), dtype=torch.float32, device=x.device)
    if "routing_weights" in probes:
        weights = probes["routing_weights"].reshape(count, -1)[picked]
    expected = torch.zeros(len(forms), *x.shape, dtype=torch.float32, device=x.device)
    for token, experts in enumerate(ids):
        for slot, expert in enumerate(experts):
            products: dict[tuple[str, bool], torch.Tensor] = {}
            for role in ("first", "second"):
                for transposed in {form.transposed for form in forms} if role in probes else ():
                    weight = probes[role][expert]
                    weight = weight.T if transposed else weight
                    products[role, transposed] = weight @ x[token]
            weight = weights[token, slot]
            for down_transposed in {form.down_transposed for form in forms}:
                places = [i for i, f in enumerate(forms) if f.down_transposed == down_transposed]
                inner = torch.stack([_inner(forms[i], products, weight) for i in places])
                down = probes["down"][expert]
                expected[places, token] += inner @ (down if down_transposed else down.T)
    errors = (actual[picked] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return dict(zip(forms, errors.tolist(), strict=True))


def _inner(
    form: Form, products: dict[tuple[str, bool], torch.Tensor], weight: torch.Tensor
) -> torch.Tensor:
    """What the down projection takes, [I], weighted."""
    act = ACTIVATIONS[form.activation].function
    scale = weight if form.weighting == "input" else torch.ones_like(weight)
    first = products["first", form.transposed] * scale
    if form.layout is None:
        inner = act(first)
    elif form.layout in SEPARATE:
        pair = first, products["second", form.transposed] * scale
        gate, up = pair if form.layout == SEPARATE[0] else pair[::-1]
        inner = act(gate) * up
    else:
        gate, up = split_gate_up(first.unsqueeze(-1), form.layout)
        inner = act(gate.squeeze(-1)) * up.squeeze(-1)
    return inner if form.weighting == "input" else inner * weight
