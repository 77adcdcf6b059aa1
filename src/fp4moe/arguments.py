"""The arguments of the operators by name; their order in the schemas is written here once.

Whoever reads or writes an operator's call, in a fake or in a graph, does so through these classes.
Tensors stand for nodes where the call is one of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .identity.float_weights import FloatWeights, StoredForm
from .kernels import Layer, Operands, Routing

__all__ = [
    "ChooseArguments",
    "FloatMoeArguments",
    "FloatMoeFromLogitsArguments",
    "MoeArguments",
    "MoeFromLogitsArguments",
    "Settings",
]

OPERANDS, ROUTING = len(Operands._fields), len(Routing._fields)


class Settings(NamedTuple):
    """What is said of a layer besides its tensors, and the kernel that prepared them."""

    activation: str
    gated: bool
    kernel: str
    num_experts: int
    expert_offset: int

    @classmethod
    def of_layer(cls, layer: Layer, kernel: str) -> Settings:
        """Return those of a layer that was prepared for a kernel."""
        return cls(layer.activation, layer.gated, kernel, layer.num_experts, layer.expert_offset)

    @classmethod
    def of_floats(cls, weights: FloatWeights, form: StoredForm) -> Settings:
        """Return those of float weights, all experts of a layer."""
        return cls(form.activation, form.gated, form.kernel, form.sizes(weights)[0], 0)


class ChooseArguments(NamedTuple):
    """Of fp4moe::choose_experts."""

    router_logits: Any
    routing_bias: Any
    output_scale: Any
    routing: Routing

    @classmethod
    def read(cls, args: Sequence[Any]) -> ChooseArguments:
        """Return the arguments of a call."""
        logits, bias, output_scale, *routing = args
        return cls(logits, bias, output_scale, Routing(*routing))


class MoeArguments(NamedTuple):
    """Of fp4moe::nvfp4_moe."""

    hidden: Any
    expert_ids: Any
    routing_weights: Any
    operands: Operands
    settings: Settings

    @classmethod
    def read(cls, args: Sequence[Any]) -> MoeArguments:
        """Return the arguments of a call."""
        hidden, ids, weights, *rest = args
        return cls(hidden, ids, weights, Operands(*rest[:OPERANDS]), Settings(*rest[OPERANDS:]))

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-2], *self.operands, *self.settings


class MoeFromLogitsArguments(NamedTuple):
    """Of fp4moe::nvfp4_moe_from_logits."""

    hidden: Any
    router_logits: Any
    routing_bias: Any
    operands: Operands
    routing: Routing
    settings: Settings

    @classmethod
    def read(cls, args: Sequence[Any]) -> MoeFromLogitsArguments:
        """Return the arguments of a call."""
        hidden, logits, bias, *rest = args
        operands, rest = Operands(*rest[:OPERANDS]), rest[OPERANDS:]
        return cls(
            hidden, logits, bias, operands, Routing(*rest[:ROUTING]), Settings(*rest[ROUTING:])
        )

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-3], *self.operands, *self.routing, *self.settings


class FloatMoeArguments(NamedTuple):
    """Of fp4moe::float_moe."""

    hidden: Any
    expert_ids: Any
    routing_weights: Any
    weights: FloatWeights
    form: StoredForm

    @classmethod
    def read(cls, args: Sequence[Any]) -> FloatMoeArguments:
        """Return the arguments of a call."""
        hidden, ids, routing_weights, first, second, down, *form = args
        weights = FloatWeights(tuple(first), tuple(second), tuple(down))
        return cls(hidden, ids, routing_weights, weights, StoredForm(*form))

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-2], *map(list, self.weights), *self.form


class FloatMoeFromLogitsArguments(NamedTuple):
    """Of fp4moe::float_moe_from_logits."""

    hidden: Any
    router_logits: Any
    routing_bias: Any
    output_scale: Any
    weights: FloatWeights
    routing: Routing
    form: StoredForm

    @classmethod
    def read(cls, args: Sequence[Any]) -> FloatMoeFromLogitsArguments:
        """Return the arguments of a call."""
        hidden, logits, bias, output_scale, first, second, down, *rest = args
        weights = FloatWeights(tuple(first), tuple(second), tuple(down))
        routing, form = Routing(*rest[:ROUTING]), StoredForm(*rest[ROUTING:])
        return cls(hidden, logits, bias, output_scale, weights, routing, form)

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-3], *map(list, self.weights), *self.routing, *self.form
