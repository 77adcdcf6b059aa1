"""fp4moe::grouped_mm, rows times the packed matrices of their experts, and its backward.

What `fp4moe::moe` computes in one call, matrix by matrix, for whoever adds something in between, as
an adapter does. The gradient is that of the rows; packed weights and biases have none.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from .checks import HIDDEN_DTYPES, ID_DTYPES
from .errors import must, refuse
from .formats import FORMATS
from .kernels.grouped import (
    check_grouped_device,
    check_grouped_kernel,
    input_gradient,
    multiply,
    size_multiple,
)
from .kernels.grouped_matrix import GroupedMatrix
from .ops import TAGS, library

__all__ = ["backward_operator", "grouped_mm_operator"]

# x [T, columns] and expert_ids [T, K] -> [T * K, rows] of x's dtype: row t * K + k is of expert
# expert_ids[t, k], zero where it is not local. packed, block_scale, global_scale: of gate and up
# (halves = 2) or of one matrix, as fp4moe::moe takes them. bias: float32 [L, rows], or [0], none.
MATRIX = "Tensor packed, Tensor block_scale, Tensor global_scale, "
SETTINGS = "str format, str kernel, int halves, int expert_offset"
library.define(
    f"grouped_mm(Tensor x, Tensor expert_ids, {MATRIX}Tensor bias, {SETTINGS}) -> Tensor", tags=TAGS
)
library.define(
    # grad [T * K, rows] -> [T, columns], of grad's dtype.
    f"grouped_mm_backward(Tensor grad, Tensor expert_ids, {MATRIX}{SETTINGS}, int columns) "
    "-> Tensor",
    tags=TAGS,
)
library.define(
    "refuse_grouped_backward(Tensor grad, Tensor like) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
grouped_mm_operator = torch.ops.fp4moe.grouped_mm.default
backward_operator = torch.ops.fp4moe.grouped_mm_backward.default


def _must(caller: str, name: str, rule: str, got: torch.Tensor, advice: str) -> NoReturn:
    must(f"{caller}: {name}", rule, f"{got.dtype} {list(got.shape)} on {got.device}", advice)


def _checked_matrix(
    caller: str, rows: torch.Tensor, ids: torch.Tensor, *matrix: Any
) -> tuple[GroupedMatrix, str]:
    """Raise unless ids are [T, K] and the rest is a prepared matrix; return it and its kernel."""
    packed, block_scale, global_scale, format, kernel, halves, offset = matrix
    check_grouped_kernel(kernel, caller=caller)
    multiple = size_multiple(kernel, format)
    name = "grad" if caller.endswith("backward") else "x"
    if rows.ndim != 2 or rows.dtype not in HIDDEN_DTYPES or rows.device != packed.device:
        rule = f"be bfloat16, float16 or float32 with 2 axes on {packed.device}"
        _must(caller, name, rule, rows, "Flatten, cast or move it.")
    if ids.ndim != 2 or ids.dtype not in ID_DTYPES or ids.device != rows.device:
        rule = f"be int32 or int64 [T, K] on {rows.device}"
        _must(caller, "expert_ids", rule, ids, "Pass one row a token.")
    if halves not in (1, 2):
        must(
            f"{caller}: halves", "be 1, or 2 for gate and up", halves, "Pass how rows are stacked."
        )
    if packed.ndim != 3 or packed.shape[1] % halves:
        _must(caller, "packed", f"be [L, {halves} * N, bytes]", packed, "Pass a prepared matrix.")
    found = GroupedMatrix(packed, block_scale, global_scale, format, halves, offset)
    sizes = found.rows // halves, found.columns
    if any(size % multiple for size in sizes):
        rule = f"have sizes that are multiples of {multiple} for kernel {kernel}"
        _must(caller, "packed", rule, packed, "Use what the kernel prepared.")
    shapes = FORMATS[format].shapes(found.experts, found.rows, found.columns, halves)
    for part, (dtype, shape) in shapes.items():
        tensor = getattr(found, part)
        dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != rows.device:
            rule = f"be {dtype} {list(shape)} on {rows.device}"
            _must(caller, part, rule, tensor, "Use what the kernel prepared.")
        if not tensor.is_contiguous():
            _must(caller, part, "be contiguous", tensor, "Pass the prepared tensor itself.")
    return found, kernel


def _check(x: torch.Tensor, ids: torch.Tensor, *args: Any) -> tuple[GroupedMatrix, str]:
    *parts, bias, format, kernel, halves, offset = args
    given = *parts, format, kernel, halves, offset
    matrix, kernel = _checked_matrix("grouped_mm", x, ids, *given)
    if ids.shape[0] != x.shape[0]:
        _must("grouped_mm", "expert_ids", f"have {x.shape[0]} rows, as x", ids, "One row a token.")
    if not 0 < x.shape[1] <= matrix.columns:
        rule = f"have 1 to {matrix.columns} columns, as the matrices"
        _must("grouped_mm", "x", rule, x, "Pass the input of these matrices.")
    size = (matrix.experts, matrix.rows)
    if bias.dtype != torch.float32 or bias.shape not in ((0,), size) or bias.device != x.device:
        rule = f"be float32 {list(size)}, or [0] for none, on {x.device}"
        _must("grouped_mm", "bias", rule, bias, "Pass the prepared bias.")
    return matrix, kernel


def _grouped_mm(x: torch.Tensor, ids: torch.Tensor, *args: Any) -> torch.Tensor:
    matrix, kernel = _check(x, ids, *args)
    check_grouped_device(kernel, x.device, caller="grouped_mm")
    if not ids.numel():
        return x.new_empty((0, matrix.rows))
    bias = args[3]
    return multiply(kernel, x, ids, matrix, bias if bias.numel() else None)


def _grouped_mm_fake(x: torch.Tensor, ids: torch.Tensor, *args: Any) -> torch.Tensor:
    matrix, _ = _check(x, ids, *args)
    return x.new_empty((ids.shape[0] * ids.shape[1], matrix.rows))


def _check_backward(grad: torch.Tensor, ids: torch.Tensor, *args: Any) -> tuple[GroupedMatrix, str]:
    matrix, kernel = _checked_matrix("grouped_mm_backward", grad, ids, *args[:-1])
    rows = ids.shape[0] * ids.shape[1], matrix.rows
    if tuple(grad.shape) != rows:
        rule = f"be {list(rows)}, as the output"
        _must("grouped_mm_backward", "grad", rule, grad, "Pass the gradient of the output.")
    if not 0 < args[-1] <= matrix.columns:
        rule = f"lie in 1..{matrix.columns}"
        must("grouped_mm_backward: columns", rule, args[-1], "Pass the columns of x.")
    return matrix, kernel


def _backward(grad: torch.Tensor, ids: torch.Tensor, *args: Any) -> torch.Tensor:
    matrix, kernel = _check_backward(grad, ids, *args)
    check_grouped_device(kernel, grad.device, caller="grouped_mm_backward")
    if not ids.numel():
        return grad.new_zeros((ids.shape[0], args[-1]))
    return input_gradient(kernel, grad, ids, matrix, args[-1])


def _backward_fake(grad: torch.Tensor, ids: torch.Tensor, *args: Any) -> torch.Tensor:
    _check_backward(grad, ids, *args)
    return grad.new_empty((ids.shape[0], args[-1]))


def _refuse(grad: torch.Tensor, like: torch.Tensor) -> NoReturn:
    what, reason = "its gradient has no gradient", "it is computed by an operator of its own"
    refuse("grouped_mm", what, reason, "Detach the gradient, or train the float model.")


class _OfGroupedMm(torch.autograd.Function):
    """Saves the ids and the packed matrix, nothing decoded."""

    @staticmethod
    def forward(ctx, x, ids, packed, block_scale, global_scale, bias, *settings):
        ctx.save_for_backward(ids, packed, block_scale, global_scale)
        ctx.settings, ctx.columns = settings, x.shape[1]
        args = x, ids, packed, block_scale, global_scale, bias
        with torch._C._AutoDispatchBelowAutograd():
            return grouped_mm_operator(*args, *settings)

    @staticmethod
    def backward(ctx, grad):
        to_x = backward_operator(grad, *ctx.saved_tensors, *ctx.settings, ctx.columns)
        return to_x, *[None] * (5 + len(ctx.settings))


class _OfBackward(torch.autograd.Function):
    """A gradient of a gradient refuses when it runs."""

    @staticmethod
    def forward(ctx, grad, *args):
        ctx.save_for_backward(grad)
        ctx.count = len(args)
        with torch._C._AutoDispatchBelowAutograd():
            return backward_operator(grad, *args)

    @staticmethod
    def backward(ctx, gradient):
        (grad,) = ctx.saved_tensors
        refused = torch.ops.fp4moe.refuse_grouped_backward.default(gradient, grad)
        return refused, *[None] * ctx.count


def _autograd(function: Any, overload: Any) -> Any:
    def call(*args):
        if torch.is_grad_enabled() and args[0].requires_grad:
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return call


for _key in ("CPU", "CUDA"):
    library.impl("grouped_mm", _grouped_mm, _key)
    library.impl("grouped_mm_backward", _backward, _key)
    library.impl("refuse_grouped_backward", _refuse, _key)
library.impl("grouped_mm", _autograd(_OfGroupedMm, grouped_mm_operator), "Autograd")
library.impl("grouped_mm_backward", _autograd(_OfBackward, backward_operator), "Autograd")
torch.library.register_fake("fp4moe::grouped_mm", _grouped_mm_fake, lib=library)
torch.library.register_fake("fp4moe::grouped_mm_backward", _backward_fake, lib=library)


@torch.library.register_fake("fp4moe::refuse_grouped_backward", lib=library)
def _refuse_fake(grad, like):
    return torch.empty_like(like)
