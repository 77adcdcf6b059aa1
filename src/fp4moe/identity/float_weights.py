"""Float expert weights as a model stores them, and what to pack them into."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..experts import ExpertWeights
from ..resize import stack_experts

__all__ = ["SEPARATE", "FloatWeights", "StoredForm", "pack_float"]

# Gate and up as tensors of their own, in the order of their use.
SEPARATE = ("gate, up", "up, gate")


class FloatWeights(NamedTuple):
    """The float weights of one layer: one stacked tensor [E, ...] a role, or E tensors of 2 axes.

    Attributes:
        first: gate_up, up, or one of gate and up.
        second: the other of gate and up where they are apart; else ().
        down: the down projection.
        first_bias, second_bias, down_bias: their biases, [E, N] or E tensors [N]; () without.
    """

    first: tuple[torch.Tensor, ...]
    second: tuple[torch.Tensor, ...]
    down: tuple[torch.Tensor, ...]
    first_bias: tuple[torch.Tensor, ...] = ()
    second_bias: tuple[torch.Tensor, ...] = ()
    down_bias: tuple[torch.Tensor, ...] = ()

    @property
    def biased(self) -> bool:
        """Whether there are biases."""
        return bool(self.first_bias or self.second_bias or self.down_bias)

    def flat(self) -> tuple[torch.Tensor, ...]:
        """Return all tensors, in order."""
        return tuple(tensor for group in self for tensor in group)

    def roles(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Return the tensors by role, without absent ones."""
        return {role: group for role, group in self._asdict().items() if group}


class StoredForm(NamedTuple):
    """What float weights mean, and what they are packed into: plain values that a graph can hold.

    Attributes:
        format: the number format.
        activation: the text of an `fp4moe.Activation`.
        layout: a name of GATE_UP_LAYOUTS, one of SEPARATE, or "" without a gate.
        transposed: gate and up are stored [E, H, ...]. down_transposed: down is stored [E, I, H].
        kernel: whose layout. hidden_alignment: of the Blackwell kernel.
    """

    format: str
    activation: str
    layout: str
    transposed: bool
    down_transposed: bool
    kernel: str
    hidden_alignment: int

    @property
    def gated(self) -> bool:
        """Whether there are gate and up."""
        return bool(self.layout)

    def describe(self) -> str:
        """Return it in words, for messages."""
        form = f"gated ({self.layout}) " if self.gated else ""
        both = self.transposed + 2 * self.down_transposed
        stored = ("", ", transposed first", ", transposed down", ", transposed weights")[both]
        return f"{form}{self.activation}{stored} in {self.format} with {self.kernel}"

    def sizes(self, weights: FloatWeights) -> tuple[int, int, int]:
        """Return (experts, hidden size, intermediate size)."""
        down = weights.down[0]
        experts = len(weights.down) if down.ndim == 2 else down.shape[0]
        hidden, intermediate = down.shape[-2:]
        if self.down_transposed:
            hidden, intermediate = intermediate, hidden
        return experts, hidden, intermediate


def pack_float(weights: FloatWeights, form: StoredForm) -> ExpertWeights:
    """Quantise float weights.

    Raises:
        ShapeError: a weight holds inf or NaN.
    """
    # Plain views: the caller's parameters may require gradients.
    plain = FloatWeights(*(tuple(w.detach() for w in group) for group in weights))
    if plain.down[0].ndim == 3:
        return _stacked({role: group[0] for role, group in plain.roles().items()}, form)
    roles = plain.roles().items()
    return stack_experts(
        len(plain.down),
        lambda expert: _stacked({role: group[expert][None] for role, group in roles}, form),
    )


def _stacked(weights: dict[str, torch.Tensor], form: StoredForm) -> ExpertWeights:
    first = weights["first"].mT if form.transposed else weights["first"]
    down = weights["down"].mT if form.down_transposed else weights["down"]
    named: dict[str, Any] = {"down": down, "activation": form.activation, "format": form.format}
    if "down_bias" in weights:
        named["down_bias"] = weights["down_bias"]
    if "second" in weights:
        second = weights["second"].mT if form.transposed else weights["second"]
        pair = (first, second) if form.layout == SEPARATE[0] else (second, first)
        named |= {"gate": pair[0], "up": pair[1]}
        if "first_bias" in weights:
            biases = weights["first_bias"], weights["second_bias"]
            biases = biases if form.layout == SEPARATE[0] else biases[::-1]
            named |= {"gate_bias": biases[0], "up_bias": biases[1]}
        return ExpertWeights.quantize(**named)
    name = "gate_up" if form.gated else "up"
    named |= {name: first} | ({"layout": form.layout} if form.gated else {})
    if "first_bias" in weights:
        named[f"{name}_bias"] = weights["first_bias"]
    return ExpertWeights.quantize(**named)
