"""The arguments of the operators by name; their order in the schemas is written here once.

Whoever reads or writes an operator's call, in a fake or in a graph, does so through these classes.
Tensors stand for nodes where the call is one of a graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .identity.float_weights import FloatWeights, StoredForm
from .kernels import BIASES, Layer, Operands, Routing

__all__ = [
    "ChooseArguments",
    "FloatMoeArguments",
    "FloatMoeBackwardArguments",
    "FloatMoeFromLogitsArguments",
    "MoeArguments",
    "MoeBackwardArguments",
    "MoeFromLogitsArguments",
    "Settings",
    "has_own_operator",
    "lacks_biases",
]

ROUTING, FLOATS = len(Routing._fields), len(FloatWeights._fields)
# The format that has operators of its own, for layers without biases.
OF_ITS_OWN = "nvfp4"
# The operands of these operators, and of those for all, in order.
NVFP4_OPERANDS = Operands._fields[:-2]
OPERANDS = (
    *NVFP4_OPERANDS[:3],
    "gate_up_bias",
    *NVFP4_OPERANDS[3:6],
    "down_bias",
    *NVFP4_OPERANDS[6:],
)
BIASES_LAST = operator.itemgetter(*map(OPERANDS.index, Operands._fields))


def has_own_operator(format: str, biased: bool) -> bool:
    """Return whether nvfp4_moe takes such a layer; else moe does, with empty tensors for none."""
    return format == OF_ITS_OWN and not biased


class Settings(NamedTuple):
    """What is said of a layer besides its tensors, and the kernel that prepared them."""

    activation: str
    gated: bool
    kernel: str
    num_experts: int
    expert_offset: int
    # Of the operators for all formats the first.
    format: str = "nvfp4"

    @classmethod
    def of_layer(cls, layer: Layer, kernel: str) -> Settings:
        """Return those of a layer that was prepared for a kernel."""
        settings = layer.activation, layer.gated, kernel, layer.num_experts, layer.expert_offset
        return cls(*settings, layer.format)

    @classmethod
    def of_floats(cls, weights: FloatWeights, form: StoredForm) -> Settings:
        """Return those of float weights, all experts of a layer."""
        experts = form.sizes(weights)[0]
        return cls(form.activation, form.gated, form.kernel, experts, 0, form.format)


def _read_operands(args: Sequence[Any], between: int) -> tuple[Operands, Sequence[Any], Settings]:
    """Return (operands, the `between` arguments behind them, settings) of either operator."""
    count = len(NVFP4_OPERANDS)
    if len(args) == count + between + 5:
        middle, settings = args[count : count + between], Settings(*args[count + between :])
        return Operands(*args[:count]), middle, settings
    count = len(OPERANDS)
    operands = Operands(*BIASES_LAST(args))
    middle, (format, *others) = args[count : count + between], args[count + between :]
    if _is_empty(operands.gate_up_bias) and _is_empty(operands.down_bias):
        operands = operands._replace(gate_up_bias=None, down_bias=None)
    return operands, middle, Settings(*others)._replace(format=format)


def _is_empty(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor):
        # A node of a graph: what it stands for.
        meta = getattr(tensor, "meta", {})
        tensor = meta.get("val", meta.get("example_value"))
    return isinstance(tensor, torch.Tensor) and tensor.shape == (0,)


def _flat(
    operands: Operands, middle: Sequence[Any], settings: Settings, nothing: Any
) -> tuple[Any, ...]:
    if has_own_operator(settings.format, operands.gate_up_bias is not None):
        return *operands.flat(), *middle, *settings[:-1]
    return _flat_with_biases(operands, middle, settings, nothing)


def _flat_with_biases(
    operands: Operands, middle: Sequence[Any], settings: Settings, nothing: Any
) -> tuple[Any, ...]:
    """Return them as the operators for all formats take them."""
    biased = operands.gate_up_bias is not None
    named = operands.named()
    if not biased:
        nothing = operands.hidden_scale.new_empty(0) if nothing is None else nothing
        named |= dict.fromkeys(BIASES, nothing)
    return *(named[name] for name in OPERANDS), *middle, settings.format, *settings[:-1]


def _name(operands: Operands, settings: Settings, ending: str) -> str:
    own = has_own_operator(settings.format, operands.gate_up_bias is not None)
    return ("nvfp4_moe" if own else "moe") + ending


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
    """Of fp4moe::nvfp4_moe and fp4moe::moe."""

    hidden: Any
    expert_ids: Any
    routing_weights: Any
    operands: Operands
    settings: Settings

    @classmethod
    def read(cls, args: Sequence[Any]) -> MoeArguments:
        """Return the arguments of a call."""
        hidden, ids, weights, *rest = args
        operands, _, settings = _read_operands(rest, 0)
        return cls(hidden, ids, weights, operands, settings)

    @property
    def name(self) -> str:
        """The operator that takes them: nvfp4_moe where that suffices."""
        return _name(self.operands, self.settings, "")

    @property
    def operator(self) -> Any:
        """That operator itself."""
        return getattr(torch.ops.fp4moe, self.name).default

    def flat(self, nothing: Any = None) -> tuple[Any, ...]:
        """Return them in the order of its schema.

        Args:
            nothing: of size 0, where `lacks_biases`; default a new tensor.
        """
        return *self[:-2], *_flat(self.operands, (), self.settings, nothing)


class MoeBackwardArguments(NamedTuple):
    """Of fp4moe::moe_backward."""

    grad: Any
    hidden: Any
    expert_ids: Any
    routing_weights: Any
    operands: Operands
    settings: Settings

    @classmethod
    def read(cls, args: Sequence[Any]) -> MoeBackwardArguments:
        """Return the arguments of a call."""
        return cls(args[0], *MoeArguments.read(args[1:]))

    def forward(self) -> MoeArguments:
        """Return the call whose gradients these are."""
        return MoeArguments(*self[1:])

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of its schema."""
        return *self[:-2], *_flat_with_biases(self.operands, (), self.settings, None)


class MoeFromLogitsArguments(NamedTuple):
    """Of fp4moe::nvfp4_moe_from_logits and fp4moe::moe_from_logits."""

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
        operands, routing, settings = _read_operands(rest, ROUTING)
        return cls(hidden, logits, bias, operands, Routing(*routing), settings)

    @property
    def name(self) -> str:
        """The operator that takes them: nvfp4_moe_from_logits where that suffices."""
        return _name(self.operands, self.settings, "_from_logits")

    @property
    def operator(self) -> Any:
        """That operator itself."""
        return getattr(torch.ops.fp4moe, self.name).default

    def flat(self, nothing: Any = None) -> tuple[Any, ...]:
        """Return them in the order of its schema; nothing as of `MoeArguments.flat`."""
        return *self[:-3], *_flat(self.operands, self.routing, self.settings, nothing)


def lacks_biases(given: MoeArguments | MoeFromLogitsArguments) -> bool:
    """Return whether the operator takes biases that are not there, as empty tensors."""
    biased = given.operands.gate_up_bias is not None
    return not biased and not has_own_operator(given.settings.format, biased)


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
        hidden, ids, routing_weights, *rest = args
        weights = FloatWeights(*map(tuple, rest[:FLOATS]))
        return cls(hidden, ids, routing_weights, weights, StoredForm(*rest[FLOATS:]))

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-2], *map(list, self.weights), *self.form


class FloatMoeBackwardArguments(NamedTuple):
    """Of fp4moe::float_moe_backward."""

    grad: Any
    hidden: Any
    expert_ids: Any
    routing_weights: Any
    weights: FloatWeights
    form: StoredForm

    @classmethod
    def read(cls, args: Sequence[Any]) -> FloatMoeBackwardArguments:
        """Return the arguments of a call."""
        return cls(args[0], *FloatMoeArguments.read(args[1:]))

    def forward(self) -> FloatMoeArguments:
        """Return the call whose gradients these are."""
        return FloatMoeArguments(*self[1:])

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return self.grad, *self.forward().flat()


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
        hidden, logits, bias, output_scale, *rest = args
        weights, rest = FloatWeights(*map(tuple, rest[:FLOATS])), rest[FLOATS:]
        routing, form = Routing(*rest[:ROUTING]), StoredForm(*rest[ROUTING:])
        return cls(hidden, logits, bias, output_scale, weights, routing, form)

    def flat(self) -> tuple[Any, ...]:
        """Return them in the order of the schema."""
        return *self[:-3], *map(list, self.weights), *self.routing, *self.form
