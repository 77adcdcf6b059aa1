"""Kernels `reference` and `reference_w4a4`: the definition itself, without a layout of its own.

On a CPU `reference` decodes the experts by blocks of rows, each once, and multiplies as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .. import reference as definition
from .. import reference_gradients as derivative
from ..activations import get_activation
from ..experts import ExpertWeights
from ..formats import FORMATS
from .base import Kernel, logical_layout, logical_weights
from .operands import Call
from .row_blocks import RowBlocks, Scratch

__all__ = ["REFERENCE", "REFERENCE_W4A4", "ReferenceKernel"]

Definition = Callable[[torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor], torch.Tensor]
Derivative = Callable[
    [torch.Tensor, torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]


class _InBlocks(definition.Definition):
    """A definition whose weights are decoded where they are used."""

    def times(self, rows: torch.Tensor, part: definition.Parts, name: str) -> torch.Tensor:
        """Return rows [N, K] times the weight of that name."""
        return part[name](rows)  # type: ignore[operator]


def compute_in_blocks(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute `fp4moe.reference.reference` on a CPU; only the order of its sums may differ."""
    halves, size = 1 + weights.gated, weights.intermediate_size
    scratch = Scratch()
    first = RowBlocks(weights.gate_up, weights.number_format, halves, scratch)
    second = RowBlocks(weights.down, weights.number_format, 1, scratch)
    up = (halves - 1) * weights.intermediate_padded
    biases = weights.biases()

    def load(expert: int) -> definition.Parts:
        def times(matrix: RowBlocks, start: int, count: int) -> Callable:
            return lambda rows: matrix.product(rows, expert, start, count)

        part: dict[str, Any] = {name: bias[expert] for name, bias in biases.items()}
        part |= {"up": times(first, up, size), "down": times(second, 0, weights.hidden_size)}
        return part | ({"gate": times(first, 0, size)} if weights.gated else {})

    defined = _InBlocks(load, get_activation(weights.activation, caller="reference"))
    inputs = hidden, expert_ids, routing_weights, defined
    return definition.run_definition(*inputs, weights.local_experts, weights.expert_offset)


class ReferenceKernel(Kernel):
    """A definition of `fp4moe.reference` behind the operator: any device, size and activation."""

    layouts: ClassVar = {name: logical_layout(f.multiple) for name, f in FORMATS.items()}
    intermediate_dtype = torch.float32
    biases = parameters = True

    def __init__(
        self, name: str, compute: Definition, automatic: bool, derive: Derivative | None = None
    ):
        self.name = name
        self.automatic = automatic
        self.quantizes_activations = compute is definition.reference_w4a4
        self.differentiable = derive is not None
        self._compute, self._derive = compute, derive

    def run(self, call: Call) -> torch.Tensor:
        """Compute [T, H]; see `fp4moe.reference`."""
        with torch.no_grad():
            # The layer's intermediate size may be the padded one: what lies behind it is zero.
            weights = logical_weights(call.operands, call.layer)
            in_blocks = self._compute is definition.reference and call.hidden.device.type == "cpu"
            compute = compute_in_blocks if in_blocks else self._compute
            return compute(call.hidden, weights, call.expert_ids, call.routing_weights)

    def gradients(self, call: Call, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both gradients; see `fp4moe.reference_gradients`."""
        if self._derive is None:
            return super().gradients(call, gradient)
        with torch.no_grad():
            weights = logical_weights(call.operands, call.layer)
            chosen = call.expert_ids, call.routing_weights
            return self._derive(gradient, call.hidden, weights, *chosen)


REFERENCE = ReferenceKernel(
    "reference", definition.reference, automatic=True, derive=derivative.reference_gradients
)
# Never chosen by itself: it is there to judge Blackwell's accuracy without one.
REFERENCE_W4A4 = ReferenceKernel(
    "reference_w4a4",
    definition.reference_w4a4,
    automatic=False,
    derive=derivative.reference_w4a4_gradients,
)
