"""Kernels `reference` and `reference_w4a4`: the definition itself, without a layout of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from .. import reference as definition
from .. import reference_gradients as derivative
from ..experts import ExpertWeights
from ..formats import FORMATS
from .base import Kernel, logical_layout, logical_weights
from .operands import Call

__all__ = ["REFERENCE", "REFERENCE_W4A4", "ReferenceKernel"]

Definition = Callable[[torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor], torch.Tensor]
Derivative = Callable[
    [torch.Tensor, torch.Tensor, ExpertWeights, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]


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
            return self._compute(call.hidden, weights, call.expert_ids, call.routing_weights)

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
