"""fp4moe::linear, one quantised Linear, and fp4moe::linear_weight, its weight decoded.

A backward multiplies with the decoded weight: the gradients of x and of bias, never of the codes.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import check_choice, must
from .formats import FORMATS
from .kernels.linear import LINEAR_KERNELS, decode_linear_weight, linear_operands, multiply
from .kernels.linear_weight import LinearWeight
from .ops import TAGS, library

__all__ = ["linear_operator"]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NAMES = ("packed", "block_scale", "global_scale")

# x [..., K] -> [..., N] of x's dtype. packed and block_scale: as `kernels.linear_operands` has them
# for the kernel, scales of 8 bits as bytes; fp8's is 0-d. global_scale: 0-d or [1], or [0] for a
# format without one. bias: [N] float, or [0] for none. kernel: the layout, and who computes.
library.define(
    "linear(Tensor x, Tensor packed, Tensor block_scale, Tensor global_scale, Tensor bias, "
    "str format, str kernel, int out_features) -> Tensor",
    tags=TAGS,
)
library.define(
    # [N, K] of a dtype.
    "linear_weight(Tensor packed, Tensor block_scale, Tensor global_scale, str format, "
    "str kernel, int out_features, int in_features, ScalarType dtype) -> Tensor",
    tags=TAGS,
)
linear_operator = torch.ops.fp4moe.linear.default
weight_operator = torch.ops.fp4moe.linear_weight.default


def _checked_weight(
    caller: str,
    operands: tuple[torch.Tensor, ...],
    format: str,
    kernel: str,
    rows: int,
    columns: int,
) -> LinearWeight:
    """Raise unless the operands are those of such a weight."""
    check_choice("format", format, FORMATS, caller=caller)
    check_choice("kernel", kernel, LINEAR_KERNELS, caller=caller)
    expected = linear_operands(kernel, format, rows, columns)
    for name, tensor in zip(NAMES, operands, strict=True):
        dtype, shape = expected[name]
        same = tensor.shape == shape or (name == "global_scale" and tensor.shape == (1,) != shape)
        if tensor.dtype != dtype or not same or tensor.device != operands[0].device:
            rule = f"be {dtype} {list(shape)} on {operands[0].device}"
            _must(caller, name, rule, tensor, f"Prepare the weight for kernel {kernel}.")
        if not tensor.is_contiguous():
            _must(caller, name, "be contiguous", tensor, "Pass the prepared tensor itself.")
    packed, block_scale, global_scale = operands
    return LinearWeight(packed, block_scale, global_scale, format, rows, columns)


def _must(caller: str, name: str, rule: str, got: torch.Tensor, advice: str) -> None:
    must(f"{caller}: {name}", rule, f"{got.dtype} {list(got.shape)} on {got.device}", advice)


def _check(
    x: torch.Tensor, packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor,
    bias: torch.Tensor, format: str, kernel: str, out_features: int,
) -> LinearWeight:  # fmt: skip
    if x.ndim == 0 or x.dtype not in FLOAT_DTYPES or x.device != packed.device:
        rule = f"be float [..., in] on {packed.device}"
        _must("linear", "x", rule, x, "Cast or move it.")
    operands = packed, block_scale, global_scale
    # The last axis is that of the weight, never symbolic.
    weight = _checked_weight("linear", operands, format, kernel, out_features, int(x.shape[-1]))
    fits = bias.shape in ((0,), (out_features,)) and bias.dtype in FLOAT_DTYPES
    if not fits or bias.device != x.device:
        rule = f"be float [{out_features}], or [0] for none, on {x.device}"
        _must("linear", "bias", rule, bias, "Pass one value an output.")
    return weight


def _linear(x: torch.Tensor, *args: Any) -> torch.Tensor:
    weight = _check(x, *args)
    bias = args[3]
    if not x.numel():
        return x.new_empty((*x.shape[:-1], weight.rows))
    flat = x.reshape(-1, weight.columns)
    out = multiply(args[5], flat, weight, bias if bias.numel() else None)
    return out.view(*x.shape[:-1], weight.rows)


def _linear_fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    weight = _check(x, *args)
    return x.new_empty((*x.shape[:-1], weight.rows))


def _weight_of(args: tuple[Any, ...]) -> tuple[str, LinearWeight, torch.dtype]:
    *operands, format, kernel, rows, columns, dtype = args
    weight = _checked_weight("linear_weight", tuple(operands), format, kernel, rows, columns)
    if dtype not in FLOAT_DTYPES:
        advice = "Pass the dtype of the product."
        must("linear_weight: dtype", "be a float of 16 bits or more", dtype, advice)
    return kernel, weight, dtype


def _linear_weight(*args: Any) -> torch.Tensor:
    return decode_linear_weight(*_weight_of(args))


def _linear_weight_fake(*args: Any) -> torch.Tensor:
    _, weight, dtype = _weight_of(args)
    return weight.packed.new_empty((weight.rows, weight.columns), dtype=dtype)


class _LinearGradient(torch.autograd.Function):
    """fp4moe::linear under autograd."""

    @staticmethod
    def forward(ctx, x, packed, block_scale, global_scale, bias, *settings):
        ctx.save_for_backward(packed, block_scale, global_scale)
        ctx.settings, ctx.columns, ctx.bias = settings, x.shape[-1], (bias.shape, bias.dtype)
        with torch._C._AutoDispatchBelowAutograd():
            return linear_operator(x, packed, block_scale, global_scale, bias, *settings)

    @staticmethod
    def backward(ctx, grad):
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            weight = weight_operator(*ctx.saved_tensors, *ctx.settings, ctx.columns, grad.dtype)
            to_x = grad @ weight
        if ctx.needs_input_grad[4]:
            shape, dtype = ctx.bias
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
            to_bias = to_bias.to(dtype) if shape[0] else to_bias.new_zeros(0, dtype=dtype)
        return to_x, None, None, None, to_bias, None, None, None


def _autograd(*args: Any) -> torch.Tensor:
    if torch.is_grad_enabled() and (args[0].requires_grad or args[4].requires_grad):
        return _LinearGradient.apply(*args)
    # A plain call skips the second dispatch; tracing and tensor subclasses take it.
    if type(args[0]) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
        return _linear(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_operator(*args)


for _key in ("CPU", "CUDA"):
    library.impl("linear", _linear, _key)
    library.impl("linear_weight", _linear_weight, _key)
library.impl("linear", _autograd, "Autograd")
torch.library.register_fake("fp4moe::linear", _linear_fake, lib=library)
torch.library.register_fake("fp4moe::linear_weight", _linear_weight_fake, lib=library)
