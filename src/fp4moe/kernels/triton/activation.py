"""The activations in Triton: inside a GEMM, or on rows that another library's GEMM wrote."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ...activations import get_activation

__all__ = ["activate", "activate_kernel", "activate_rows", "activation_constants", "combine"]
__all__ += ["combine_gradients", "slope"]

COLUMNS = 1024


@functools.lru_cache(maxsize=256)
def activation_constants(text: str) -> dict[str, Any]:
    """Return what `combine` takes as constexpr, of the text of an `fp4moe.Activation`."""
    activation = get_activation(text)
    return {
        "ACTIVATION": activation.name,
        "ALPHA": activation.alpha,
        "BETA": activation.beta,
        "LIMIT": activation.limit,
    }


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Apply a name of `fp4moe.activations.ACTIVATIONS` to float32 values; NaN stays NaN."""
    if ACTIVATION == "silu":
        if ALPHA == 1:
            x = x * tl.sigmoid(x)
        else:
            x = x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return x


@triton.jit
def _at_most(x, LIMIT: tl.constexpr):
    return tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(x, LIMIT: tl.constexpr):
    return tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    # Near 0 the difference cancels; below 1/8 the series to x^5 is right to 2^-22.
    series = x * (1.0 + x * x * (-1.0 / 3 + x * x * (2.0 / 15)))
    return tl.where(tl.abs(x) < 0.125, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def combine(
    up, gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """Compute `fp4moe.Activation.combine` of float32 values; gate: None without."""
    if gate is None:
        value = activate(up, ACTIVATION, ALPHA)
    elif ACTIVATION == "silu_softcap":
        value = ALPHA * _tanh(gate / ALPHA) * tl.sigmoid(gate) * (BETA * _tanh(up / BETA))
    elif ACTIVATION == "silu_step":
        value = _at_most(activate(gate, "silu", 1.0), LIMIT) * _within(up, LIMIT)
    else:
        if LIMIT > 0:
            gate, up = _at_most(gate, LIMIT), _within(up, LIMIT)
        value = activate(gate, ACTIVATION, ALPHA)
        value *= up + BETA if BETA != 0 else up
    return value


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(ALPHA * x)
        x = share * (1.0 + ALPHA * x * (1.0 - share))
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (x + 0.134145 * x * x * x)
        x = share * (1.0 + inner * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        x = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "relu2":
        x = 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def combine_gradients(
    gradient, up, gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Compute `fp4moe.Activation.gradients` of float32 values: of up and gate."""
    if ACTIVATION == "silu_softcap":
        share, capped, cap = tl.sigmoid(gate), _tanh(gate / ALPHA), _tanh(up / BETA)
        to_up = ALPHA * capped * share * (1.0 - cap * cap)
        to_gate = share * (1.0 - capped * capped + ALPHA * capped * (1.0 - share)) * (BETA * cap)
    elif ACTIVATION == "silu_step":
        value = activate(gate, "silu", 1.0)
        to_up = tl.where(tl.abs(up) <= LIMIT, _at_most(value, LIMIT), 0.0)
        to_gate = tl.where(value <= LIMIT, slope(gate, "silu", 1.0) * _within(up, LIMIT), 0.0)
    elif LIMIT > 0:
        below, inside = _at_most(gate, LIMIT), _within(up, LIMIT)
        to_up = tl.where(tl.abs(up) <= LIMIT, activate(below, ACTIVATION, ALPHA), 0.0)
        to_gate = tl.where(gate <= LIMIT, slope(below, ACTIVATION, ALPHA) * (inside + BETA), 0.0)
    else:
        to_up = activate(gate, ACTIVATION, ALPHA)
        to_gate = slope(gate, ACTIVATION, ALPHA) * (up + BETA)
    return gradient * to_up, gradient * to_gate


@triton.jit(do_not_specialize=["expert_offset"])
def activate_kernel(
    gate_up, ids, bias, out, columns, expert_offset, local_experts,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    LIMIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write combine(up, gate) of rows [gate; up], or of rows [up], to out; grid [rows, blocks].

    ids: global expert of each row. bias: None, or float32 [experts, as a row], added before; rows
    of ids that are not local hold nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    first = gate_up + row * columns * (1 + GATED)
    value = tl.load(first + column, mask=mask, other=0).to(tl.float32)
    if bias is not None:
        expert = tl.load(ids + row).to(tl.int64) - expert_offset
        inside = (expert >= 0) & (expert < local_experts)
        # Not a scalar condition & a block's: triton 3.9's interpreter makes that one of integers.
        mask = column < tl.where(inside, columns, 0)
        bias += expert * columns * (1 + GATED)
        value += tl.load(bias + column, mask=mask, other=0)
    if GATED:
        up = tl.load(first + columns + column, mask=mask, other=0).to(tl.float32)
        if bias is not None:
            up += tl.load(bias + columns + column, mask=mask, other=0)
        value = combine(up, value, ACTIVATION, ALPHA, BETA, LIMIT)
    else:
        value = combine(value, None, ACTIVATION, ALPHA, BETA, LIMIT)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)


def activate_rows(
    gate_up: torch.Tensor,
    activation: str,
    gated: bool,
    ids: torch.Tensor | None = None,
    window: tuple[int, int] = (0, 0),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return combine(up, gate) of rows [gate; up], or of rows [up], computed in float32.

    Args:
        gate_up: [T * K, columns]. activation: text of an `fp4moe.Activation`.
        ids, window, bias: with biases [L, columns] in float32, the expert ids [T, K], contiguous
            and global, and the first local expert and their number.
    """
    slots, columns = gate_up.shape
    columns = columns // 2 if gated else columns
    out = gate_up.new_empty((slots, columns))
    activate_kernel[(slots, -(-columns // COLUMNS))](
        gate_up, None if bias is None else ids, bias, out, columns, *window, GATED=gated,
        COLUMNS=COLUMNS, **activation_constants(activation),
    )  # fmt: skip
    return out
