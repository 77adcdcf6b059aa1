"""Every operator of fp4moe: schema, fake, dispatch. The table of contents of the package.

    fp4moe::moe                    the fused mixture of experts, ids and routing weights given
    fp4moe::choose_experts         ids and routing weights out of the router's logits
    fp4moe::moe_from_logits        as moe, and the kernel chooses the experts
    fp4moe::nvfp4_moe, fp4moe::nvfp4_moe_from_logits   both for NVFP4 without biases
    fp4moe::float_moe              as nvfp4_moe, on float weights whose packed ones it looks up, or
                                   packs where it has not seen them; see fp4moe.identity
    fp4moe::float_moe_from_logits  the same, and the kernel chooses the experts
    fp4moe::moe_backward           gradients of hidden and routing_weights through moe
    fp4moe::float_moe_backward     the same through float_moe
    fp4moe::refuse_backward        raises; stands in graphs where a gradient would be one of those

The operators are registered with `Library.impl`: less dispatch than `torch.library.custom_op`, see
benchmarks/bench_dispatch.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from . import checks
from .arguments import (
    ChooseArguments,
    FloatMoeArguments,
    FloatMoeBackwardArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeBackwardArguments,
    MoeFromLogitsArguments,
    Settings,
)
from .autograd import FUNCTIONS, check_frozen
from .errors import refuse
from .formats import FORMATS
from .identity.table import packed_now
from .kernels import (
    KERNELS,
    Call,
    Layer,
    LogitsCall,
    PreparedWeights,
    Routing,
)
from .kernels.choose import choose_experts

__all__ = [
    "nvfp4_moe_arguments",
    "nvfp4_moe_from_logits_arguments",
]

library = torch.library.Library("fp4moe", "DEF")
# Packed weights and block scales are read by their strides: no relayout by Inductor.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# hidden [T, H]; L local experts, M = 2I gated (gate first) or I. Shapes are those of the padded
# weights; block scales cross as their e4m3 bytes (uint8): opcheck, among others, cannot compare
# float8 tensors. kernel names the prepared layout; num_experts counts the whole layer.
WEIGHTS = (
    "Tensor gate_up_packed, Tensor gate_up_block_scale, Tensor gate_up_global_scale, "
    "Tensor down_packed, Tensor down_block_scale, Tensor down_global_scale, "
    "Tensor hidden_scale, Tensor intermediate_scale, "
)
SETTINGS = "str activation, bool gated, str kernel, int num_experts, int expert_offset"
library.define(
    # expert_ids [T, K] global; routing_weights [T, K].
    "nvfp4_moe(Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    f"{WEIGHTS}{SETTINGS}) -> Tensor",
    tags=TAGS,
)
# biases are float32 [L, M] and [L, Hp], or [0] for none; activation is the text of an Activation.
ALL_WEIGHTS = (
    "Tensor gate_up_packed, Tensor gate_up_block_scale, Tensor gate_up_global_scale, "
    "Tensor gate_up_bias, Tensor down_packed, Tensor down_block_scale, Tensor down_global_scale, "
    "Tensor down_bias, Tensor hidden_scale, Tensor intermediate_scale, "
)
library.define(
    "moe(Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    f"{ALL_WEIGHTS}str format, {SETTINGS}) -> Tensor",
    tags=TAGS,
)
# router_logits [T, E]; routing_bias [E], or [0] for none; routing_method of fp4moe.routing.
# output_scale [E], or [0] for none: a factor of what each expert adds.
ROUTING = "str routing_method, int top_k, int num_groups, int top_groups, float routing_scaling"
library.define(
    # int64 and float32, [T, K] each.
    f"choose_experts(Tensor router_logits, Tensor routing_bias, Tensor output_scale, {ROUTING}) "
    "-> (Tensor expert_ids, Tensor routing_weights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "nvfp4_moe_from_logits(Tensor hidden, Tensor router_logits, Tensor routing_bias, "
    f"{WEIGHTS}{ROUTING}, {SETTINGS}) -> Tensor",
    tags=TAGS,
)
library.define(
    "moe_from_logits(Tensor hidden, Tensor router_logits, Tensor routing_bias, "
    f"{ALL_WEIGHTS}{ROUTING}, str format, {SETTINGS}) -> Tensor",
    tags=TAGS,
)
# Lists: a layer has one stacked tensor a role, or one for each expert; second may be empty. What
# the settings mean: fp4moe.identity.float_weights.StoredForm.
FLOATS = (
    "Tensor[] first, Tensor[] second, Tensor[] down, "
    "Tensor[] first_bias, Tensor[] second_bias, Tensor[] down_bias, "
)
FORM = (
    "str format, str activation, str layout, bool transposed, bool down_transposed, str kernel, "
    "int hidden_alignment"
)
library.define(
    "float_moe(Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    f"{FLOATS}{FORM}) -> Tensor",
    tags=TAGS,
)
library.define(
    "float_moe_from_logits(Tensor hidden, Tensor router_logits, Tensor routing_bias, "
    f"Tensor output_scale, {FLOATS}{ROUTING}, {FORM}) -> Tensor",
    tags=TAGS,
)
# grad [T, H], of moe's output and of its dtype. The results are like hidden and routing_weights.
library.define(
    "moe_backward(Tensor grad, Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    f"{ALL_WEIGHTS}str format, {SETTINGS}) -> (Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "float_moe_backward(Tensor grad, Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    f"{FLOATS}{FORM}) -> (Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "refuse_backward(Tensor grad, Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _moe(given: MoeArguments) -> torch.Tensor:
    hidden, ids, weights, operands, settings = given
    layer = _checked_layer(given, (hidden, ids, weights), None)
    if not ids.numel():
        return hidden.new_zeros(hidden.shape)
    return KERNELS[settings.kernel].run(Call(hidden, ids, weights, operands, layer))


def _moe_from_logits(given: MoeFromLogitsArguments) -> torch.Tensor:
    hidden, logits, bias, operands, routing, settings = given
    layer = _checked_layer(given, (hidden, logits, bias), routing)
    if hidden.shape[0] == 0:
        return hidden.new_empty(hidden.shape)
    kernel = KERNELS[settings.kernel]
    if kernel.routes:
        return kernel.run_from_logits(LogitsCall(hidden, logits, bias, routing, operands, layer))
    ids, weights = choose_experts(logits, bias, routing, logits.new_empty(0))
    return kernel.run(Call(hidden, ids, weights, operands, layer))


# The layers of calls that have passed all checks, by what these look at.
_checked: dict[tuple, Layer] = {}
MOST_CHECKED = 1024
METADATA = operator.attrgetter("shape", "dtype", "device")
IS_THERE = functools.partial(operator.is_not, None)
IS_CONTIGUOUS = operator.methodcaller("is_contiguous")


def _checked_layer(
    given: MoeArguments | MoeFromLogitsArguments,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    routing: Routing | None,
) -> Layer:
    """Return the layer of a call that passes all checks, with the padded intermediate size.

    Checks look at metadata, never at values: a call whose equal has passed needs no second look.
    """
    there = tuple(filter(IS_THERE, given.operands))
    sizes = *map(METADATA, inputs), *map(METADATA, there), *map(IS_CONTIGUOUS, there)
    key = given.settings, routing, sizes
    layer = _checked.get(key)
    if layer is None:
        layer = _check(given, inputs, routing)
        if len(_checked) >= MOST_CHECKED:
            _checked.clear()
        _checked[key] = layer
    return layer


def _check(
    given: MoeArguments | MoeFromLogitsArguments,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    routing: Routing | None,
) -> Layer:
    hidden, second, _ = inputs
    operands, settings = given.operands, given.settings
    if isinstance(given, MoeArguments):
        checks.check_moe(given)
    else:
        checks.check_moe_from_logits(given)
    layer = Layer.of(
        settings,
        hidden_size=hidden.shape[1],
        intermediate_size=FORMATS[settings.format].elements(operands.down_packed.shape[2]),
        top_k=routing.top_k if routing else second.shape[1],
        biased=operands.gate_up_bias is not None,
    )
    if second.numel():
        call = (
            LogitsCall(*inputs, routing, operands, layer)
            if routing
            else Call(*inputs, operands, layer)
        )
        KERNELS[settings.kernel].check(call)
    return layer


def _moe_backward(given: MoeBackwardArguments) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_gradient("moe_backward", given)
    gradient, hidden, ids, weights, operands, settings = given
    layer = _checked_layer(given.forward(), (hidden, ids, weights), None)
    if not ids.numel():
        return hidden.new_zeros(hidden.shape), weights.new_zeros(weights.shape)
    call = Call(hidden, ids, weights, operands, layer)
    return KERNELS[settings.kernel].gradients(call, gradient)


def _choose_experts(given: ChooseArguments) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_choose_experts(given)
    return choose_experts(
        given.router_logits, given.routing_bias, given.routing, given.output_scale
    )


def _float_moe(given: FloatMoeArguments) -> torch.Tensor:
    checks.check_float_moe(given)
    hidden, ids, routing_weights, weights, form = given
    operands = packed_now(weights, form, caller="float_moe")
    settings = Settings.of_floats(weights, form)
    return _moe(MoeArguments(hidden, ids, routing_weights, operands, settings))


def _float_moe_backward(given: FloatMoeBackwardArguments) -> tuple[torch.Tensor, torch.Tensor]:
    checks.check_float_moe_backward(given)
    gradient, hidden, ids, routing_weights, weights, form = given
    operands = packed_now(weights, form, caller="float_moe_backward")
    settings = Settings.of_floats(weights, form)
    call = MoeBackwardArguments(gradient, hidden, ids, routing_weights, operands, settings)
    return _moe_backward(call)


def _float_moe_from_logits(given: FloatMoeFromLogitsArguments) -> torch.Tensor:
    checks.check_float_moe_from_logits(given)
    hidden, logits, bias, output_scale, weights, routing, form = given
    operands = packed_now(weights, form, output_scale, caller="float_moe_from_logits")
    settings = Settings.of_floats(weights, form)
    return _moe_from_logits(
        MoeFromLogitsArguments(hidden, logits, bias, operands, routing, settings)
    )


def _like_hidden(given: Any) -> torch.Tensor:
    return given.hidden.new_empty(given.hidden.shape)


def _like_chosen(given: ChooseArguments) -> tuple[torch.Tensor, torch.Tensor]:
    logits, shape = given.router_logits, (given.router_logits.shape[0], given.routing.top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


def _like_both(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weights = given.routing_weights
    return _like_hidden(given), weights.new_empty(weights.shape)


def _refuse_backward(grad: torch.Tensor, like: torch.Tensor) -> NoReturn:
    what, reason = "its gradients have no gradient", "they are computed by an operator of their own"
    refuse("moe_backward", what, reason, "Detach the gradient, or train the float model.")


@torch.library.register_fake("fp4moe::refuse_backward", lib=library)
def _refuse_backward_fake(grad, like):
    return torch.empty_like(like)


class _Operator(NamedTuple):
    """How an operator is read, run on tensors, checked on fakes, and what fakes come out."""

    read: Callable[[Sequence[Any]], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], None]
    result: Callable[[Any], Any]


def _register(name: str, own: _Operator) -> None:
    function = FUNCTIONS[name]
    second, third = function.inputs
    of_floats = name in ("float_moe", "float_moe_from_logits")
    overload = getattr(torch.ops.fp4moe, name).default

    def plain(*args):
        return own.run(own.read(args))

    def autograd(*args):
        if torch.is_grad_enabled():
            if of_floats:
                check_frozen(name, own.read(args).weights)
            if args[0].requires_grad or args[second].requires_grad or args[third].requires_grad:
                return function.apply(overload, *args)
        # A plain call skips the second dispatch; tracing and tensor subclasses take it.
        if type(args[0]) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
            return own.run(own.read(args))
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def fake(*args):
        given = own.read(args)
        own.check(given)
        return own.result(given)

    library.impl(name, plain, "CPU")
    library.impl(name, plain, "CUDA")
    library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"fp4moe::{name}", fake, lib=library)


_OF_MOE = _Operator(MoeArguments.read, _moe, checks.check_moe, _like_hidden)
_OF_MOE_FROM_LOGITS = _Operator(
    MoeFromLogitsArguments.read, _moe_from_logits, checks.check_moe_from_logits, _like_hidden
)
_OPERATORS = {
    "moe": _OF_MOE,
    "nvfp4_moe": _OF_MOE,
    "moe_from_logits": _OF_MOE_FROM_LOGITS,
    "nvfp4_moe_from_logits": _OF_MOE_FROM_LOGITS,
    "choose_experts": _Operator(
        ChooseArguments.read, _choose_experts, checks.check_choose_experts, _like_chosen
    ),
    "float_moe": _Operator(
        FloatMoeArguments.read, _float_moe, checks.check_float_moe, _like_hidden
    ),
    "moe_backward": _Operator(
        MoeBackwardArguments.read, _moe_backward, checks.check_moe_backward, _like_both
    ),
    "float_moe_backward": _Operator(
        FloatMoeBackwardArguments.read,
        _float_moe_backward,
        checks.check_float_moe_backward,
        _like_both,
    ),
    "float_moe_from_logits": _Operator(
        FloatMoeFromLogitsArguments.read,
        _float_moe_from_logits,
        checks.check_float_moe_from_logits,
        _like_hidden,
    ),
}
for _name, _operator in _OPERATORS.items():
    _register(_name, _operator)
for _key in ("CPU", "CUDA"):
    library.impl("refuse_backward", _refuse_backward, _key)


def nvfp4_moe_arguments(prepared: PreparedWeights, kernel: str) -> tuple:
    """Return nvfp4_moe's arguments behind routing_weights, for weights prepared for a kernel."""
    settings = Settings.of_layer(prepared.layer, kernel)
    return MoeArguments(None, None, None, prepared.operands, settings).flat()[3:]


def nvfp4_moe_from_logits_arguments(
    prepared: PreparedWeights, routing: Routing, kernel: str
) -> tuple:
    """Return nvfp4_moe_from_logits' arguments behind routing_bias."""
    settings = Settings.of_layer(prepared.layer, kernel)
    given = MoeFromLogitsArguments(None, None, None, prepared.operands, routing, settings)
    return given.flat()[3:]
