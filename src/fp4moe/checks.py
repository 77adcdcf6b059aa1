"""Argument checks that an operator and its fake share: shapes, dtypes and devices, never data."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .activations import ACTIVATIONS, get_activation
from .arguments import (
    ChooseArguments,
    FloatMoeArguments,
    FloatMoeBackwardArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeBackwardArguments,
    MoeFromLogitsArguments,
)
from .errors import UnsupportedError, check_choice, must
from .formats import FORMATS
from .identity.float_weights import SEPARATE, FloatWeights, StoredForm
from .kernels import FUSED_ROUTING_METHODS, HIDDEN_ALIGNMENTS, KERNELS, get_kernel
from .pack import GATE_UP_LAYOUTS

__all__ = ["check_choose_experts", "check_float_moe", "check_float_moe_from_logits", "check_moe"]
__all__ += ["check_float_moe_backward", "check_gradient", "check_moe_backward"]
__all__ += ["check_moe_from_logits"]

HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_DTYPES = (*HIDDEN_DTYPES, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_moe(given: MoeArguments) -> None:
    """Raise unless the arguments of `fp4moe::nvfp4_moe` or `fp4moe::moe` fit together."""
    name = given.name
    _check_choice(name, given.hidden, given.expert_ids, given.routing_weights)
    _check_weights(name, given)


def check_float_moe(given: FloatMoeArguments) -> None:
    """Raise unless the arguments of `fp4moe::float_moe` fit together."""
    _check_choice("float_moe", given.hidden, given.expert_ids, given.routing_weights)
    _check_floats("float_moe", given.hidden, given.weights, given.form)


def check_moe_backward(given: MoeBackwardArguments) -> None:
    """Raise unless the arguments of `fp4moe::moe_backward` fit together."""
    check_moe(given.forward())
    check_gradient("moe_backward", given)


def check_float_moe_backward(given: FloatMoeBackwardArguments) -> None:
    """Raise unless the arguments of `fp4moe::float_moe_backward` fit together."""
    check_float_moe(given.forward())
    check_gradient("float_moe_backward", given)


def check_gradient(name: str, given: MoeBackwardArguments | FloatMoeBackwardArguments) -> None:
    """Raise unless the gradient is like hidden, as the output is."""
    grad, hidden = given.grad, given.hidden
    if grad.shape != hidden.shape or grad.dtype != hidden.dtype or grad.device != hidden.device:
        rule = f"be {_describe(hidden)}, as hidden"
        must(f"{name}: grad", rule, _describe(grad), "Pass the gradient of the output.")


def _check_choice(name, hidden, expert_ids, routing_weights) -> None:
    _check_hidden(name, hidden)
    tokens = hidden.shape[0]
    if expert_ids.ndim != 2 or expert_ids.dtype not in ID_DTYPES or expert_ids.shape[0] != tokens:
        rule = f"be int32 or int64 [T, K] with T = {tokens}"
        must(f"{name}: expert_ids", rule, _describe(expert_ids), "Pass one row a token.")
    if routing_weights.dtype not in HIDDEN_DTYPES or routing_weights.shape != expert_ids.shape:
        rule = f"be float, of the shape of expert_ids {list(expert_ids.shape)}"
        must(f"{name}: routing_weights", rule, _describe(routing_weights), "Pass one weight an id.")
    if not hidden.device == expert_ids.device == routing_weights.device:
        got = f"{expert_ids.device} and {routing_weights.device}"
        rule = f"be on the device of hidden, {hidden.device}"
        must(f"{name}: expert_ids and routing_weights", rule, got, "Move them there.")


def check_choose_experts(given: ChooseArguments) -> None:
    """Raise unless the arguments of `fp4moe::choose_experts` fit together."""
    name, logits = "choose_experts", given.router_logits
    if logits.ndim != 2:
        advice = "Flatten the tokens to one axis."
        must(f"{name}: router_logits", "be float [T, E]", _describe(logits), advice)
    _check_logits(name, given, logits, *logits.shape)
    _check_output_scale(name, given.output_scale, logits, logits.shape[1])


def check_moe_from_logits(given: MoeFromLogitsArguments) -> None:
    """Raise unless those of `nvfp4_moe_from_logits` or `moe_from_logits` fit together."""
    name, hidden = given.name, given.hidden
    _check_hidden(name, hidden)
    _check_logits(name, given, hidden, hidden.shape[0], given.settings.num_experts)
    _check_weights(name, given)


def check_float_moe_from_logits(given: FloatMoeFromLogitsArguments) -> None:
    """Raise unless the arguments of `fp4moe::float_moe_from_logits` fit together."""
    name, hidden = "float_moe_from_logits", given.hidden
    _check_hidden(name, hidden)
    _check_floats(name, hidden, given.weights, given.form)
    num_experts = given.form.sizes(given.weights)[0]
    _check_logits(name, given, hidden, hidden.shape[0], num_experts)
    _check_output_scale(name, given.output_scale, hidden, num_experts)
    if given.output_scale.shape[0] and not FORMATS[given.form.format].globally_scaled:
        rule = f"be empty for {given.form.format}, which has no global scale that could take it"
        advice = "Multiply the routing weights by it and call float_moe."
        must(f"{name}: output_scale", rule, _describe(given.output_scale), advice)


def _check_output_scale(
    name: str, output_scale: torch.Tensor, beside: torch.Tensor, num_experts: int
) -> None:
    if (
        output_scale.shape not in ((0,), (num_experts,))
        or not output_scale.dtype.is_floating_point
        or output_scale.device != beside.device
    ):
        rule = f"be float, of length 0 or {num_experts}, on {beside.device}"
        advice = "Pass an empty tensor for none."
        must(f"{name}: output_scale", rule, _describe(output_scale), advice)


def _check_logits(
    name: str,
    given: ChooseArguments | MoeFromLogitsArguments | FloatMoeFromLogitsArguments,
    first: torch.Tensor,
    tokens: int,
    num_experts: int,
) -> None:
    """first: the argument on whose device the others must be."""
    router_logits, routing_bias = given.router_logits, given.routing_bias
    method, top_k, num_groups, top_groups, _scaling = given.routing
    expected = (tokens, num_experts)
    if router_logits.dtype not in HIDDEN_DTYPES or router_logits.shape != expected:
        rule = f"be float [T, E] = {list(expected)}"
        advice = "Pass the router's output before softmax or sigmoid."
        must(f"{name}: router_logits", rule, _describe(router_logits), advice)
    if method not in FUSED_ROUTING_METHODS:
        rule = f"be one of {', '.join(FUSED_ROUTING_METHODS)}"
        advice = "Route outside and call nvfp4_moe."
        must(f"{name}: routing_method", rule, repr(method), advice, error=UnsupportedError)
    bias_lengths = (0, num_experts) if method == "sigmoid_topk" else (0,)
    if (
        routing_bias.dtype not in HIDDEN_DTYPES
        or routing_bias.ndim != 1
        or routing_bias.shape[0] not in bias_lengths
    ):
        rule = f"be float of length {' or '.join(map(str, bias_lengths))} for {method}"
        advice = "Pass an empty tensor for none."
        must(f"{name}: routing_bias", rule, _describe(routing_bias), advice)
    size = num_experts // num_groups if num_groups > 0 else 0
    if size * num_groups != num_experts or (method != "sigmoid_topk" and num_groups != 1):
        rule = f"divide {num_experts} experts (1 unless sigmoid_topk)"
        must(f"{name}: num_groups", rule, num_groups, "Pass the model's n_group.")
    if not 1 <= top_groups <= num_groups or not 1 <= top_k <= top_groups * size:
        rule = f"satisfy 1 <= top_groups <= {num_groups} and 1 <= top_k <= top_groups x {size}"
        got = f"{top_groups} and {top_k}"
        must(f"{name}: top_groups and top_k", rule, got, "Pass the model's own.")
    if not first.device == router_logits.device == routing_bias.device:
        got = f"{router_logits.device} and {routing_bias.device}"
        rule = f"be on one device, {first.device}"
        must(f"{name}: router_logits and routing_bias", rule, got, "Move them there.")


def _check_hidden(name, hidden) -> None:
    if hidden.ndim != 2 or hidden.dtype not in HIDDEN_DTYPES:
        rule = "be bfloat16, float16 or float32 [T, H]"
        must(f"{name}: hidden", rule, _describe(hidden), "Flatten the tokens to one axis.")


def _check_floats(name, hidden, weights: FloatWeights, form: StoredForm) -> None:
    get_activation(form.activation, caller=name).check_gate(form.gated, caller=name)
    get_kernel(form.kernel, caller=name)
    for argument, value, choices in (
        ("format", form.format, FORMATS),
        ("layout", form.layout, ("", *GATE_UP_LAYOUTS, *SEPARATE)),
        ("hidden_alignment", form.hidden_alignment, HIDDEN_ALIGNMENTS),
    ):
        check_choice(argument, value, choices, caller=name)
    if not weights.first or not weights.down:
        got = f"{len(weights.first)} and {len(weights.down)}"
        must(f"{name}: first and down", "hold tensors", got, "Pass lists.")
    experts, hidden_size, intermediate = form.sizes(weights)
    if hidden.shape[1] != hidden_size:
        rule = f"have {hidden_size} columns, as its experts"
        must(f"{name}: hidden", rule, list(hidden.shape), "Pass this layer's input.")
    rows = intermediate * (2 if form.layout in GATE_UP_LAYOUTS else 1)
    up = (hidden_size, rows) if form.transposed else (rows, hidden_size)
    down = (intermediate, hidden_size) if form.down_transposed else (hidden_size, intermediate)
    shapes: dict[str, tuple[int, ...]] = {"first": up, "down": down}
    if form.layout in SEPARATE:
        shapes["second"] = up
    if weights.biased:
        biases = {"first": (rows,), "second": (rows,), "down": (hidden_size,)}
        shapes |= {f"{role}_bias": biases[role] for role in shapes}
    for role in ("second", "first_bias", "second_bias", "down_bias"):
        if (role in shapes) != bool(getattr(weights, role)):
            rule = f"hold {'tensors' if role in shapes else 'nothing'} for layout {form.layout!r}"
            count = len(getattr(weights, role))
            must(f"{name}: {role}", rule, count, "Pass what the layout says, all biases or none.")
    dtype = weights.down[0].dtype
    for role, one in shapes.items():
        group = getattr(weights, role)
        stacked = len(group) == 1 and group[0].ndim == len(one) + 1
        if not stacked and len(group) != experts:
            rule = f"hold one stacked tensor or {experts}, one an expert"
            must(f"{name}: {role}", rule, len(group), "Pass the weights of all experts.")
        shape = (experts, *one) if stacked else one
        for tensor in group:
            if (
                tensor.shape != shape
                or tensor.device != hidden.device
                or tensor.dtype != dtype
                or dtype not in FLOAT_DTYPES
            ):
                rule = f"be float {list(shape)} on {hidden.device}, of one dtype"
                must(f"{name}: {role}", rule, _describe(tensor), "Pass the weights of this layer.")


def _check_weights(name: str, given: MoeArguments | MoeFromLogitsArguments) -> None:
    operands: tuple[Any, ...] = given.operands
    gate_up_packed, down_packed = given.operands.gate_up_packed, given.operands.down_packed
    hidden = given.hidden
    activation, gated, kernel, num_experts, expert_offset, format = given.settings
    if activation not in ACTIVATIONS:
        get_activation(activation, caller=name).check_gate(gated, caller=name)
    if format not in FORMATS:
        check_choice("format", format, FORMATS, caller=name)
    if kernel not in KERNELS:
        get_kernel(kernel, caller=name)
    device, hidden_size = hidden.device, hidden.shape[1]
    if gate_up_packed.ndim != 3 or down_packed.ndim != 3:
        got = f"{list(gate_up_packed.shape)} and {list(down_packed.shape)}"
        advice = "Use ExpertWeights.quantize."
        must(f"{name}: gate_up_packed and down_packed", "have 3 axes", got, advice)
    local, hidden_padded, columns = down_packed.shape
    if not 0 < hidden_size <= hidden_padded:
        rule = f"have 1 to {hidden_padded} columns, as its experts"
        must(f"{name}: hidden", rule, list(hidden.shape), "Pass this layer's input.")
    if not 0 <= expert_offset <= num_experts - local:
        rule = f"lie in 0..{num_experts - local} ({local} of {num_experts} experts)"
        advice = "Pass the global id of the first local expert."
        must(f"{name}: expert_offset", rule, expert_offset, advice)
    intermediate = FORMATS[format].elements(columns)
    rows = intermediate * 2 if gated else intermediate
    biased = operands[-1] is not None or operands[-2] is not None
    sizes = local, rows, hidden_padded, intermediate
    # A symbolic size cannot be a key.
    plain = type(local) is type(hidden_padded) is type(columns) is int
    expected = (_expected if plain else _expected.__wrapped__)(format, gated, biased, *sizes)
    # This runs at every call of the operator.
    for tensor, (part, dtype, shape) in zip(operands, expected, strict=False):
        if not (
            tensor is not None
            and tensor.shape == shape
            and tensor.dtype == dtype
            and tensor.device == device
        ):
            rule, got = f"be {dtype} {list(shape)} on {device}", "none"
            got = got if tensor is None else _describe(tensor)
            must(f"{name}: {part}", rule, got, "Use ExpertWeights.quantize and .to.")


@functools.lru_cache(maxsize=1024)
def _expected(
    format: str,
    gated: bool,
    biased: bool,
    local: int,
    rows: int,
    hidden: int,
    intermediate: int,
) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
    """Return (name, dtype, shape) of each operand, in order."""
    halves = 2 if gated else 1
    sizes = {"gate_up": (local, rows, hidden, halves), "down": (local, hidden, intermediate)}
    found = [
        (f"{gemm}_{part}", torch.uint8 if dtype.itemsize == 1 else dtype, shape)
        for gemm, size in sizes.items()
        for part, (dtype, shape) in FORMATS[format].shapes(*size).items()
    ]
    scales = {"hidden_scale": (1,), "intermediate_scale": (local,)}
    biases = {"gate_up_bias": (local, rows), "down_bias": (local, hidden)} if biased else {}
    found += [(name, torch.float32, shape) for name, shape in {**scales, **biases}.items()]
    return tuple(found)
