"""The arguments of the operators by name, in the order of their schemas.

Whoever reads an operator's call, in a fake or in a graph, does so through these classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .identity.float_weights import FloatWeights, StoredForm
from .kernels import Operands, Routing

__all__ = [
    "FloatMoeArguments",
    "FloatMoeFromLogitsArguments",
    "MoeArguments",
    "MoeFromLogitsArguments",
]


class _Packed:
    """What the operators on packed weights share."""

    @property
    def operands(self: Any) -> Operands:
        """The weight tensors."""
        return Operands(
            self.gate_up_packed,
            self.gate_up_block_scale,
            self.gate_up_global_scale,
            self.down_packed,
            self.down_block_scale,
            self.down_global_scale,
            self.hidden_scale,
            self.intermediate_scale,
        )


class _Float:
    """What the operators on float weights share."""

    @property
    def weights(self: Any) -> FloatWeights:
        """The weights of the layer."""
        return FloatWeights(tuple(self.first), tuple(self.second), tuple(self.down))

    @property
    def form(self: Any) -> StoredForm:
        """What the weights mean."""
        return StoredForm(*(getattr(self, name) for name in StoredForm._fields))


class _Routed:
    """What the operators that choose the experts share."""

    @property
    def routing(self: Any) -> Routing:
        """How the experts are chosen."""
        return Routing(
            self.routing_method,
            self.top_k,
            self.num_groups,
            self.top_groups,
            self.routing_scaling,
        )


class _MoeArguments(NamedTuple):
    hidden: Any
    expert_ids: Any
    routing_weights: Any
    gate_up_packed: Any
    gate_up_block_scale: Any
    gate_up_global_scale: Any
    down_packed: Any
    down_block_scale: Any
    down_global_scale: Any
    hidden_scale: Any
    intermediate_scale: Any
    activation: str
    gated: bool
    kernel: str
    num_experts: int
    expert_offset: int


class MoeArguments(_MoeArguments, _Packed):
    """Of fp4moe::nvfp4_moe: tensors, or nodes of a graph."""

    __slots__ = ()


class _MoeFromLogitsArguments(NamedTuple):
    hidden: Any
    router_logits: Any
    routing_bias: Any
    gate_up_packed: Any
    gate_up_block_scale: Any
    gate_up_global_scale: Any
    down_packed: Any
    down_block_scale: Any
    down_global_scale: Any
    hidden_scale: Any
    intermediate_scale: Any
    routing_method: str
    top_k: int
    num_groups: int
    top_groups: int
    routing_scaling: float
    activation: str
    gated: bool
    kernel: str
    num_experts: int
    expert_offset: int


class MoeFromLogitsArguments(_MoeFromLogitsArguments, _Packed, _Routed):
    """Of fp4moe::nvfp4_moe_from_logits."""

    __slots__ = ()


class _FloatMoeArguments(NamedTuple):
    hidden: Any
    expert_ids: Any
    routing_weights: Any
    first: Any
    second: Any
    down: Any
    format: str
    activation: str
    layout: str
    transposed: bool
    down_transposed: bool
    kernel: str
    hidden_alignment: int


class FloatMoeArguments(_FloatMoeArguments, _Float):
    """Of fp4moe::float_moe; first, second and down are lists."""

    __slots__ = ()


class _FloatMoeFromLogitsArguments(NamedTuple):
    hidden: Any
    router_logits: Any
    routing_bias: Any
    output_scale: Any
    first: Any
    second: Any
    down: Any
    routing_method: str
    top_k: int
    num_groups: int
    top_groups: int
    routing_scaling: float
    format: str
    activation: str
    layout: str
    transposed: bool
    down_transposed: bool
    kernel: str
    hidden_alignment: int


class FloatMoeFromLogitsArguments(_FloatMoeFromLogitsArguments, _Float, _Routed):
    """Of fp4moe::float_moe_from_logits."""

    __slots__ = ()
