"""The operators under autograd: gradients of hidden, and of routing weights or router logits.

Weights are frozen. What a kernel computes is used as it is; its backward is `fp4moe::moe_backward`,
or `float_moe_backward` where the packed weights are those of float ones, as they are then. A kernel
that has none refuses when it runs. Inputs alone are saved; gate and up are computed again.
"""

from __future__ import annotations

from typing import Any

import torch

from .arguments import (
    ChooseArguments,
    FloatMoeArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeBackwardArguments,
    MoeFromLogitsArguments,
)
from .errors import refuse
from .identity.float_weights import FloatWeights
from .kernels import Routing
from .routing import route_gradients

__all__ = ["FUNCTIONS", "check_frozen"]

ops = torch.ops.fp4moe


def _call(ctx: Any, operator: Any, args: tuple, floats: int) -> Any:
    """Run an operator below autograd; save its tensors, of which the first are hidden and so on.

    floats: how many of the arguments behind the tensors are lists of tensors.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    rest = args[len(tensors) :]
    ctx.lists = [len(group) for group in rest[:floats]]
    ctx.rest = rest[floats:]
    ctx.count = len(args)
    ctx.save_for_backward(*tensors, *(t for group in rest[:floats] for t in group))
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _saved(ctx: Any) -> tuple:
    """Return the arguments that `_call` was given."""
    saved = list(ctx.saved_tensors)
    groups: list[list[torch.Tensor]] = []
    for length in reversed(ctx.lists):
        groups.append(saved[len(saved) - length :])
        del saved[len(saved) - length :]
    return *saved, *reversed(groups), *ctx.rest


def _result(ctx: Any, *gradients: torch.Tensor | None) -> tuple:
    """Fill up what a backward returns: the operator itself, then its arguments."""
    return None, *gradients, *[None] * (ctx.count - len(gradients))


def _choose(
    logits: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.choose_experts.default(logits, bias, scale, *routing)


class _OfMoe(torch.autograd.Function):
    """moe and nvfp4_moe."""

    # Beside the first argument, those that may need a gradient.
    inputs = (2, 2)

    @staticmethod
    def forward(ctx, operator, *args):
        return _call(ctx, operator, args, 0)

    @staticmethod
    def backward(ctx, gradient):
        given = MoeBackwardArguments(gradient, *MoeArguments.read(_saved(ctx)))
        to_hidden, to_weights = ops.moe_backward.default(*given.flat())
        return _result(ctx, to_hidden, None, to_weights)


class _OfMoeFromLogits(torch.autograd.Function):
    """moe_from_logits and nvfp4_moe_from_logits: the experts are chosen once more."""

    inputs = (1, 1)

    @staticmethod
    def forward(ctx, operator, *args):
        return _call(ctx, operator, args, 0)

    @staticmethod
    def backward(ctx, gradient):
        given = MoeFromLogitsArguments.read(_saved(ctx))
        hidden, logits, bias, operands, routing, settings = given
        nothing = logits.new_empty(0)
        ids, weights = _choose(logits, bias, nothing, routing)
        call = MoeBackwardArguments(gradient, hidden, ids, weights, operands, settings)
        to_hidden, to_weights = ops.moe_backward.default(*call.flat())
        to_logits, _ = route_gradients(to_weights, logits, nothing, ids, routing)
        return _result(ctx, to_hidden, to_logits)


class _OfFloatMoe(torch.autograd.Function):
    """float_moe."""

    inputs = (2, 2)

    @staticmethod
    def forward(ctx, operator, *args):
        return _call(ctx, operator, args, len(FloatWeights._fields))

    @staticmethod
    def backward(ctx, gradient):
        to_hidden, to_weights = ops.float_moe_backward.default(gradient, *_saved(ctx))
        return _result(ctx, to_hidden, None, to_weights)


class _OfFloatMoeFromLogits(torch.autograd.Function):
    """float_moe_from_logits; the factor of an expert's output is one of its routing weight here."""

    inputs = (1, 3)

    @staticmethod
    def forward(ctx, operator, *args):
        return _call(ctx, operator, args, len(FloatWeights._fields))

    @staticmethod
    def backward(ctx, gradient):
        given = FloatMoeFromLogitsArguments.read(_saved(ctx))
        hidden, logits, bias, scale, weights, routing, form = given
        ids, routing_weights = _choose(logits, bias, scale, routing)
        call = FloatMoeArguments(hidden, ids, routing_weights, weights, form)
        to_hidden, to_weights = ops.float_moe_backward.default(gradient, *call.flat())
        to_logits, to_scale = route_gradients(to_weights, logits, scale, ids, routing)
        return _result(ctx, to_hidden, to_logits, None, to_scale)


class _OfChooseExperts(torch.autograd.Function):
    """choose_experts."""

    inputs = (2, 2)

    @staticmethod
    def forward(ctx, operator, *args):
        with torch._C._AutoDispatchBelowAutograd():
            ids, weights = operator(*args)
        ctx.routing = ChooseArguments.read(args).routing
        ctx.save_for_backward(args[0], args[2], ids)
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx, _ids, gradient):
        logits, scale, ids = ctx.saved_tensors
        to_logits, to_scale = route_gradients(gradient, logits, scale, ids, ctx.routing)
        return None, to_logits, None, to_scale, *[None] * len(ctx.routing)


class _OfBackward(torch.autograd.Function):
    """moe_backward and float_moe_backward: a gradient of a gradient refuses when it runs."""

    # The gradient is the first; hidden and the routing weights.
    inputs = (1, 3)

    @staticmethod
    def forward(ctx, operator, *args):
        ctx.count = len(args)
        ctx.places = [i for i in (0, *_OfBackward.inputs) if ctx.needs_input_grad[i + 1]]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    @staticmethod
    def backward(ctx, gradient, _):
        result: list[Any] = [None] * (1 + ctx.count)
        for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            result[1 + place] = ops.refuse_backward.default(gradient, saved)
        return tuple(result)


# By the name of the operator.
FUNCTIONS: dict[str, Any] = {
    "moe": _OfMoe,
    "nvfp4_moe": _OfMoe,
    "moe_from_logits": _OfMoeFromLogits,
    "nvfp4_moe_from_logits": _OfMoeFromLogits,
    "float_moe": _OfFloatMoe,
    "float_moe_from_logits": _OfFloatMoeFromLogits,
    "choose_experts": _OfChooseExperts,
    "moe_backward": _OfBackward,
    "float_moe_backward": _OfBackward,
}


def check_frozen(name: str, weights: FloatWeights) -> None:
    """Raise UnsupportedError where float weights require the gradient that they would not get."""
    if any(tensor.requires_grad for tensor in weights.flat()):
        refuse(
            name,
            "expert weights cannot have a gradient",
            "the operator computes with packed ones, which are frozen",
            "Call requires_grad_(False) on them, or train the float model.",
        )
