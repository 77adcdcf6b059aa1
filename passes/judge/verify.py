"""Ask a region's numbers what it computes.

The region runs in float32 on random tokens and random weights of its own sizes, and is compared
with the plain definition under every form; exactly one must fit. It fits again on large
inputs whose tokens all choose the same experts, where clamps and limited capacities show, and with
every expert. Where no activation without parameters fits, one with parameters is read off the
region (read.py) and has to fit in the same way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import fx

from fp4moe.activations import get_activation
from fp4moe.experts import split_gate_up

from ..find.region import Region
from ..graph.dataflow import meta_value
from ..graph.execute import undisturbed
from .forms import SEPARATE, Form, possible_forms
from .probes import (
    LARGE,
    LIMITED,
    Probes,
    checking_rounds,
    compared_tokens,
    make_probes,
    telling_rounds,
)
from .read import read_forms
from .run import compute, dense_reason

__all__ = ["Verdict", "judge_region"]

# Relative RMS limit. Float32 sums of H terms err by about sqrt(H) * 2^-24 = 3e-6 at H = 2816; the
# closest pair of forms, the two GELUs, differ by about 3e-4.
LIMIT = 3e-5
BIASES = ("first_bias", "second_bias", "down_bias")


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
        verdict, ranked = _judge(gm, region, probes, forms, verify)
        no_form = verdict.closest is not None and not verdict.error <= LIMIT
        if no_form and not region.extras:
            read = read_forms(gm, region, probes, ranked)
            if read:
                verdict, _ranked = _judge(gm, region, probes, read, verify)
        form = verdict.form
        why = dense_reason(gm, region, probes) if form is not None and region.dense else ""
        if not why:
            return verdict
        return dataclasses.replace(verdict, form=None, reason=f"{why}; its numbers fit {form}")


def _judge(
    gm: fx.GraphModule, region: Region, probes: Probes, forms: list[Form], verify: bool
) -> tuple[Verdict, list[Form]]:
    """Return what all rounds say about these forms, and them, on ordinary inputs closest first."""
    ranked: list[Form] = []
    errors: dict[Form, float] = {}
    large = LIMITED if any(map(_saturates, forms)) else LARGE
    checks = checking_rounds(probes, large) if verify else ()
    for how, asked in itertools.chain(telling_rounds(probes), checks):
        if "negative" in how and len(forms) == 1:
            continue
        actual, why = compute(gm, region, asked)
        if actual is None:
            return Verdict(None, why), ranked
        errors = {form: _or_inf(error) for form, error in _errors(forms, asked, actual).items()}
        ranked = ranked or sorted(forms, key=errors.__getitem__)
        closest = min(forms, key=errors.__getitem__)
        forms = [form for form in forms if errors[form] <= LIMIT]
        if not forms:
            reason = (
                f"its numbers fit no known form; closest is {closest} with relative error "
                f"{errors[closest]:.2g} {how}, limit {LIMIT:g}"
            )
            return Verdict(None, reason, closest, errors[closest]), ranked
    if len(forms) > 1:
        fitting = "; ".join(map(str, forms))
        return Verdict(None, f"it fits more than one form: {fitting}", forms[0], 0.0), ranked
    return Verdict(forms[0], "", forms[0], errors[forms[0]]), ranked


def _saturates(form: Form) -> bool:
    activation = get_activation(form.activation)
    return bool(activation.limit) or activation.name == "silu_softcap"


def _or_inf(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _forms(probes: Probes, region: Region) -> list[Form]:
    return list(
        possible_forms(
            region.weight_shape("first"),
            region.weight_shape("down"),
            probes["hidden"].shape[-1],
            apart="second" in region.weights,
            weighted=region.routing_weights is not None,
            biases=[(role, region.weight_shape(role)[-1]) for role in region.biases],
        )
    )


def _errors(forms: list[Form], probes: Probes, actual: torch.Tensor) -> dict[Form, float]:
    """Relative RMS error of the region against the definition, written out pair by pair.

    Without its bias first(w * x) is w * first(x): both weightings share one product.
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
            biases = {role: probes[role][expert] for role in BIASES if role in probes}
            for role in ("first", "second"):
                for transposed in {form.transposed for form in forms} if role in probes else ():
                    weight = probes[role][expert]
                    weight = weight.T if transposed else weight
                    products[role, transposed] = weight @ x[token]
            weight = weights[token, slot]
            for down_transposed in {form.down_transposed for form in forms}:
                places = [i for i, f in enumerate(forms) if f.down_transposed == down_transposed]
                inner = [_inner(forms[i], products, biases, weight) for i in places]
                down = probes["down"][expert]
                result = torch.stack(inner) @ (down if down_transposed else down.T)
                if "down_bias" in biases:
                    ones = torch.ones_like(weight)
                    factors = [weight if forms[i].weighting == "output" else ones for i in places]
                    result = result + torch.stack(factors)[:, None] * biases["down_bias"]
                expected[places, token] += result
    errors = (actual[picked] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return dict(zip(forms, errors.tolist(), strict=True))


def _inner(
    form: Form,
    products: dict[tuple[str, bool], torch.Tensor],
    biases: dict[str, torch.Tensor],
    weight: torch.Tensor,
) -> torch.Tensor:
    """What the down projection takes, [I], weighted."""
    activation = get_activation(form.activation)
    scale = weight if form.weighting == "input" else torch.ones_like(weight)

    def product(role: str) -> torch.Tensor:
        scaled, bias = products[role, form.transposed] * scale, biases.get(f"{role}_bias")
        return scaled if bias is None else scaled + bias

    first = product("first")
    if form.layout is None:
        inner = activation.combine(first)
    elif form.layout in SEPARATE:
        pair = first, product("second")
        gate, up = pair if form.layout == SEPARATE[0] else pair[::-1]
        inner = activation.combine(up, gate)
    else:
        gate, up = split_gate_up(first.unsqueeze(-1), form.layout)
        inner = activation.combine(up.squeeze(-1), gate.squeeze(-1))
    return inner if form.weighting == "input" else inner * weight
