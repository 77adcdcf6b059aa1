"""The weights of a layer as a kernel reads them, and one call of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ..layer import Layer, Routing

__all__ = ["BIASES", "SCALES", "Call", "LogitsCall", "Operands", "PreparedWeights"]


class Operands(NamedTuple):
    """The operator's weight tensors. Shapes are those of the padded weights.

    Packed codes and block scales are bytes. What the four scales mean, and the order of the biases
    [L, M] and [L, H], is the kernel's choice.
    """

    gate_up_packed: torch.Tensor
    gate_up_block_scale: torch.Tensor
    gate_up_global_scale: torch.Tensor
    down_packed: torch.Tensor
    down_block_scale: torch.Tensor
    down_global_scale: torch.Tensor
    hidden_scale: torch.Tensor
    intermediate_scale: torch.Tensor
    # None without biases, float32.
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are there, by name."""
        return {name: t for name, t in zip(self._fields, self, strict=True) if t is not None}

    def flat(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that are there."""
        return self if self.gate_up_bias is not None else self[:-2]  # type: ignore[return-value]


SCALES = ("gate_up_global_scale", "down_global_scale", "hidden_scale", "intermediate_scale")
BIASES = ("gate_up_bias", "down_bias")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedWeights:
    """What `prepare` makes of ExpertWeights.

    Attributes:
        operands: what the operator takes.
        kept: logical scales and biases, as `logical_<operand>`, that cannot be recovered from the
            operands; biases in the order of the operands.
        layer: sizes as the model means them.
    """

    operands: Operands
    kept: dict[str, torch.Tensor]
    layer: Layer

    @property
    def metadata(self) -> dict[str, Any]:
        """`ExpertWeights.metadata()`."""
        return self.layer.metadata()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return operands and kept tensors by name."""
        return {**self.operands.named(), **self.kept}

    def replaced(self, tensors: dict[str, torch.Tensor]) -> PreparedWeights:
        """Return the same with other tensors of the same names, such as moved ones."""
        return PreparedWeights(
            Operands(**{name: tensors[name] for name in self.operands.named()}),
            {name: tensors[name] for name in self.kept},
            self.layer,
        )

    def call(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, routing_weights: torch.Tensor
    ) -> Call:
        """Return a call of a kernel with these weights."""
        return Call(hidden, expert_ids, routing_weights, self.operands, self.layer)


class Call(NamedTuple):
    """Checked arguments of a kernel.

    Attributes:
        hidden: [T, H], T > 0. expert_ids, routing_weights: [T, K].
        operands, layer: the weights; sizes of the layer may be padded ones.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    routing_weights: torch.Tensor
    operands: Operands
    layer: Layer

    @property
    def caller(self) -> str:
        """The operator that the user called, for messages."""
        return "moe"


class LogitsCall(NamedTuple):
    """Checked arguments of a kernel that chooses the experts itself.

    Attributes:
        hidden: [T, H], T > 0. router_logits: [T, E]. routing_bias: [E], or [0] for none.
        routing: how to choose. operands, layer: as in `Call`.
    """

    hidden: torch.Tensor
    router_logits: torch.Tensor
    routing_bias: torch.Tensor
    routing: Routing
    operands: Operands
    layer: Layer

    @property
    def caller(self) -> str:
        """The operator that the user called, for messages."""
        return "moe_from_logits"
