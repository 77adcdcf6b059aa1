"""Read an activation with parameters off a region's numbers.

Weights that are zero but for one column of gate and up, and a down projection that copies, turn the
region into a calculator: token t shows the activation of the numbers in column t.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from fp4moe.activations import get_activation, identify_activation, recognise
from fp4moe.experts import split_gate_up

from ..find.region import Region
from ..graph.dataflow import elements
from .forms import SEPARATE, Form
from .probes import Probes
from .run import compute

__all__ = ["read_forms"]


def read_forms(gm: fx.GraphModule, region: Region, probes: Probes, forms: list[Form]) -> list[Form]:
    """Return the forms whose activation has parameters, weighted in either way; empty if none.

    Args:
        gm: owns the region. probes: of its sizes.
        forms: what its shapes allow, the likeliest first; the first that can be read counts.
    """
    seen = set()
    for form in forms:
        stored = form.layout, form.transposed, form.down_transposed
        if stored in seen:
            continue
        seen.add(stored)
        found = _Reading(gm, region, probes, form).activation()
        if found is not None and not get_activation(found).plain:
            weightings = dict.fromkeys(f.weighting for f in forms)
            named = dataclasses.replace(form, activation=found)
            return [dataclasses.replace(named, weighting=weighting) for weighting in weightings]
    return []


class _Reading:
    """A region whose weights are chosen under one form of storage."""

    def __init__(self, gm: fx.GraphModule, region: Region, probes: Probes, form: Form):
        self.gm, self.region, self.probes, self.form = gm, region, probes, form
        hidden, down = probes["hidden"], probes["down"]
        self.hidden_size = hidden.shape[-1]
        self.intermediate_size = down.shape[1 if form.down_transposed else 2]
        self.tokens = min(elements(tuple(hidden.shape[:-1])), self.hidden_size)
        self.channels = min(self.hidden_size, self.intermediate_size)

    def activation(self) -> str | None:
        """Return the text of what stands between the products, None where it is not known."""
        if self.form.layout is None:
            return identify_activation(lambda up: self.combine(up, up))
        found = recognise(self.combine)
        return None if found is None else str(found)

    def combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return what the region computes of [1, N], as many numbers at a time as it has places."""
        pairs = torch.stack((gate[0], up[0])).split(self.tokens * self.channels, 1)
        return torch.cat([self._run(*pair) for pair in pairs])[None]

    def _run(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        probes, form = self.probes, self.form
        device, experts = probes["hidden"].device, probes["down"].shape[0]
        zeros = {role: torch.zeros_like(p) for role, p in probes.items() if role.endswith("_bias")}
        first, second = (self._columns(values).to(device) for values in (gate, up))
        given = {"first": second if form.layout is None else first}
        if form.layout in SEPARATE:
            pair = (first, second) if form.layout == SEPARATE[0] else (second, first)
            given = dict(zip(("first", "second"), pair, strict=True))
        elif form.layout is not None:
            rows = torch.arange(2 * self.intermediate_size, dtype=torch.int64, device=device)
            places = split_gate_up(rows[:, None], form.layout)
            given = {"first": first.new_empty(2 * self.intermediate_size, self.hidden_size)}
            for place, half in zip(places, (first, second), strict=True):
                given["first"][place[:, 0]] = half
        given = {role: weight.T if form.transposed else weight for role, weight in given.items()}
        sizes = self.hidden_size, self.intermediate_size
        copy = torch.eye(*sizes, dtype=torch.float32, device=device)
        given["down"] = copy.T if form.down_transposed else copy
        # Of each token's experts, which are alike, one counts.
        hidden = torch.zeros_like(probes["hidden"]).view(-1, self.hidden_size)
        unit = torch.eye(self.tokens, self.hidden_size, dtype=torch.float32, device=device)
        hidden[: self.tokens] = unit
        weights = {role: weight.expand(experts, -1, -1) for role, weight in given.items()}
        asked = probes | zeros | weights | {"hidden": hidden.view(probes["hidden"].shape)}
        repeated = probes["expert_ids"].shape[-1]
        if "routing_weights" in probes:
            asked["routing_weights"] = torch.zeros_like(probes["routing_weights"])
            asked["routing_weights"][..., 0] = 1.0
            repeated = 1
        actual, _why = compute(self.gm, self.region, asked)
        if actual is None:
            # Recognised as nothing.
            return torch.full_like(gate, float("nan"))
        shown = actual[: self.tokens, : self.channels].cpu() / repeated
        return shown.reshape(-1)[: gate.numel()]

    def _columns(self, values: torch.Tensor) -> torch.Tensor:
        """[I, H]: the numbers of token t in column t."""
        columns = values.new_zeros(self.tokens * self.channels)
        columns[: values.numel()] = values
        matrix = values.new_zeros(self.intermediate_size, self.hidden_size)
        matrix[: self.channels, : self.tokens] = columns.view(self.tokens, self.channels).T
        return matrix
