"""The activation between two products of experts, and its gradient, in one Triton launch each.

Rows are gate and up side by side, or up alone; computed in float32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activation import activation_constants, combine, combine_gradients, slope

__all__ = [
    "combine_gradient_kernel",
    "combine_rows",
    "combine_rows_gradient",
    "combine_rows_kernel",
]

BLOCK = 1024


@triton.jit
def _place(columns, total, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's elements in [rows, columns] and in [rows, PARTS * columns], and whether."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at + at // columns * ((PARTS - 1) * columns), at < total


@triton.jit(do_not_specialize=["total"])
def combine_rows_kernel(
    first, out, columns, total, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write combine(up, gate) of first [rows, gate, up] to out [rows, columns]; grid [blocks]."""
    PARTS: tl.constexpr = 2 if GATED else 1
    at, wide, mask = _place(columns, total, PARTS, BLOCK)
    up = tl.load(first + wide + (PARTS - 1) * columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(first + wide, mask=mask, other=0.0).to(tl.float32)
        value = combine(up, gate, ACTIVATION, ALPHA, BETA, LIMIT)
    else:
        value = combine(up, None, ACTIVATION, ALPHA, BETA, LIMIT)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total"])
def combine_gradient_kernel(
    grad, first, out, columns, total, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of first, of its shape, by that of `combine_rows_kernel`'s result."""
    PARTS: tl.constexpr = 2 if GATED else 1
    at, wide, mask = _place(columns, total, PARTS, BLOCK)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(first + wide + (PARTS - 1) * columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(first + wide, mask=mask, other=0.0).to(tl.float32)
        to_up, to_gate = combine_gradients(g, up, gate, ACTIVATION, ALPHA, BETA, LIMIT)
        tl.store(out + wide, to_gate.to(out.dtype.element_ty), mask=mask)
    else:
        to_up = g * slope(up, ACTIVATION, ALPHA)
    tl.store(out + wide + (PARTS - 1) * columns, to_up.to(out.dtype.element_ty), mask=mask)


def combine_rows(first: torch.Tensor, activation: str, halves: int) -> torch.Tensor:
    """Return [N, I] of first [N, halves * I], in its dtype."""
    columns = first.shape[1] // halves
    out = first.new_empty((first.shape[0], columns))
    with torch.cuda.device_of(first):
        combine_rows_kernel[(-(-out.numel() // BLOCK),)](
            first.contiguous(), out, columns, out.numel(), GATED=halves == 2, BLOCK=BLOCK,
            **activation_constants(activation),
        )  # fmt: skip
    return out


def combine_rows_gradient(
    grad: torch.Tensor, first: torch.Tensor, activation: str, halves: int
) -> torch.Tensor:
    """Return the gradient of first by grad [N, I]."""
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(first):
        combine_gradient_kernel[(-(-grad.numel() // BLOCK),)](
            grad.contiguous(), first.contiguous(), out, grad.shape[1], grad.numel(),
            GATED=halves == 2, BLOCK=BLOCK, **activation_constants(activation),
        )  # fmt: skip
    return out
