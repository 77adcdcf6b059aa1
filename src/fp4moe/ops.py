"""Every operator of fp4moe: schema, fake, dispatch. The table of contents of the package.

    fp4moe::moe                    the fused mixture of experts, ids and routing weights given
    fp4moe::choose_experts         ids and routing weights out of the router's logits
    fp4moe::moe_from_logits        as moe, and the kernel chooses the experts
    fp4moe::nvfp4_moe, fp4moe::nvfp4_moe_from_logits   both for NVFP4 without biases
    fp4moe::float_moe              as nvfp4_moe, on float weights whose packed ones it looks up, or
                                   packs where it has not seen them; see fp4moe.identity
    fp4moe::float_moe_from_logits  the same, and the kernel chooses the experts
    fp4moe::refuse_backward        raises; stands in the backward graphs, for there is no gradient

The operators are registered with `Library.impl`: less dispatch than `torch.library.custom_op`, see
benchmarks/bench_dispatch.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import checks
from .arguments import (
    ChooseArguments,
    FloatMoeArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeFromLogitsArguments,
    Settings,
)
from .errors import refuse
from .formats import FORMATS
from .identity.table import packed_now
from .kernels import (
    KERNELS,
    Call,
    Layer,
    LogitsCall,
    Operands,
    PreparedWeights,
    Routing,
)
from .kernels.choose import choose_experts
from .routing import route_gradients

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
library.define(
    "refuse_backward(Tensor grad, Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("fp4moe::moe", lib=library)
@torch.library.register_fake("fp4moe::nvfp4_moe", lib=library)
def _moe_fake(*args):
    given = MoeArguments.read(args)
    checks.check_moe(given)
    return given.hidden.new_empty(given.hidden.shape)


@torch.library.register_fake("fp4moe::choose_experts", lib=library)
def _choose_experts_fake(*args):
    given = ChooseArguments.read(args)
    checks.check_choose_experts(given)
    logits, shape = given.router_logits, (given.router_logits.shape[0], given.routing.top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("fp4moe::moe_from_logits", lib=library)
@torch.library.register_fake("fp4moe::nvfp4_moe_from_logits", lib=library)
def _moe_from_logits_fake(*args):
    given = MoeFromLogitsArguments.read(args)
    checks.check_moe_from_logits(given)
    return given.hidden.new_empty(given.hidden.shape)


@torch.library.register_fake("fp4moe::float_moe", lib=library)
def _float_moe_fake(*args):
    given = FloatMoeArguments.read(args)
    checks.check_float_moe(given)
    return given.hidden.new_empty(given.hidden.shape)


@torch.library.register_fake("fp4moe::float_moe_from_logits", lib=library)
def _float_moe_from_logits_fake(*args):
    given = FloatMoeFromLogitsArguments.read(args)
    checks.check_float_moe_from_logits(given)
    return given.hidden.new_empty(given.hidden.shape)


def _moe(*args: Any) -> torch.Tensor:
    return _run(MoeArguments.read(args))


def _run(given: MoeArguments) -> torch.Tensor:
    checks.check_moe(given)
    hidden, ids, weights, operands, settings = given
    if not ids.numel():
        return hidden.new_zeros(hidden.shape)
    layer = _layer(hidden.shape[1], operands, ids.shape[1], settings)
    return KERNELS[settings.kernel](Call(hidden, ids, weights, operands, layer))


def _choose_experts(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = ChooseArguments.read(args)
    checks.check_choose_experts(given)
    logits, bias, output_scale, routing = given
    return choose_experts(logits, bias, routing, output_scale)


def _moe_from_logits(*args: Any) -> torch.Tensor:
    return _run_from_logits(MoeFromLogitsArguments.read(args))


def _run_from_logits(given: MoeFromLogitsArguments) -> torch.Tensor:
    checks.check_moe_from_logits(given)
    hidden, logits, bias, operands, routing, settings = given
    if hidden.shape[0] == 0:
        return hidden.new_empty(hidden.shape)
    layer = _layer(hidden.shape[1], operands, routing.top_k, settings)
    kernel = KERNELS[settings.kernel]
    if kernel.routes:
        return kernel.from_logits(LogitsCall(hidden, logits, bias, routing, operands, layer))
    chosen = choose_experts(logits, bias, routing, logits.new_empty(0))
    return kernel(Call(hidden, *chosen, operands, layer))


def _layer(hidden_size: int, operands: Operands, top_k: int, settings: Settings) -> Layer:
    biased = operands.gate_up_bias is not None
    intermediate = FORMATS[settings.format].elements(operands.down_packed.shape[2])
    return _cached_layer(hidden_size, intermediate, top_k, biased, settings)


@functools.lru_cache(maxsize=1024)
def _cached_layer(
    hidden_size: int, intermediate_size: int, top_k: int, biased: bool, settings: Settings
) -> Layer:
    """Return a call's layer, with the padded intermediate size: one object for equal numbers."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "top_k": top_k}
    return Layer.of(settings, biased=biased, **sizes)


def _float_moe(*args: Any) -> torch.Tensor:
    given = FloatMoeArguments.read(args)
    checks.check_float_moe(given)
    hidden, ids, routing_weights, weights, form = given
    operands = packed_now(weights, form, caller="float_moe")
    settings = Settings.of_floats(weights, form)
    return _run(MoeArguments(hidden, ids, routing_weights, operands, settings))


def _float_moe_from_logits(*args: Any) -> torch.Tensor:
    given = FloatMoeFromLogitsArguments.read(args)
    checks.check_float_moe_from_logits(given)
    hidden, logits, bias, output_scale, weights, routing, form = given
    operands = packed_now(weights, form, output_scale, caller="float_moe_from_logits")
    settings = Settings.of_floats(weights, form)
    return _run_from_logits(
        MoeFromLogitsArguments(hidden, logits, bias, operands, routing, settings)
    )


class _WithoutGradient(torch.autograd.Function):
    """An operator under autograd: the forward as it is, a backward that refuses when it runs."""

    @staticmethod
    def forward(ctx, operator, *args):
        ctx.count = len(args)
        # hidden, and routing weights or router logits: the float inputs that may need a gradient.
        ctx.places = [i for i in range(3) if ctx.needs_input_grad[i + 1]]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    @staticmethod
    def backward(ctx, *grads):
        refuse = torch.ops.fp4moe.refuse_backward.default
        result = [None] * (1 + ctx.count)
        for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
            result[1 + place] = refuse(grads[0], saved)
        return tuple(result)


class _WithRoutingGradient(torch.autograd.Function):
    """choose_experts under autograd."""

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


def _autograd(name: str, implementation: Callable) -> Callable:
    function = _WithRoutingGradient if name == "choose_experts" else _WithoutGradient
    operator = getattr(torch.ops.fp4moe, name).default

    def call(*args):
        if torch.is_grad_enabled() and (
            args[0].requires_grad or args[1].requires_grad or args[2].requires_grad
        ):
            return function.apply(operator, *args)
        # A plain call skips the second dispatch; tracing and tensor subclasses take it.
        if type(args[0]) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


def _refuse_backward(grad: torch.Tensor, like: torch.Tensor) -> NoReturn:
    refuse(
        "nvfp4_moe",
        "its backward cannot be called",
        "the operator has no gradient",
        "Train the float model, or detach the output of the experts.",
    )


@torch.library.register_fake("fp4moe::refuse_backward", lib=library)
def _refuse_backward_fake(grad, like):
    return torch.empty_like(like)


_IMPLEMENTATIONS: dict[str, Callable] = {
    "moe": _moe,
    "moe_from_logits": _moe_from_logits,
    "nvfp4_moe": _moe,
    "choose_experts": _choose_experts,
    "nvfp4_moe_from_logits": _moe_from_logits,
    "float_moe": _float_moe,
    "float_moe_from_logits": _float_moe_from_logits,
}
for _key in ("CPU", "CUDA"):
    library.impl("refuse_backward", _refuse_backward, _key)
    for _name, _implementation in _IMPLEMENTATIONS.items():
        library.impl(_name, _implementation, _key)
for _name, _implementation in _IMPLEMENTATIONS.items():
    library.impl(_name, _autograd(_name, _implementation), "Autograd")


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
