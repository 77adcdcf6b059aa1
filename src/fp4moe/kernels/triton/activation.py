"""The activations in Triton: inside a GEMM, or on rows that another library's GEMM wrote."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["activate", "activate_kernel", "activate_rows"]

COLUMNS = 1024


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply a name of `fp4moe.activations.ACTIVATIONS` to float32 values; NaN stays NaN."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
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
def activate_kernel(
    gate_up, out, columns, GATED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write act(gate) * up of rows [gate; up], or act(up), to out; grid [rows, column blocks]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    first = gate_up + row * columns * (1 + GATED)
    value = activate(tl.load(first + column, mask=mask, other=0).to(tl.float32), ACTIVATION)
    if GATED:
        value *= tl.load(first + columns + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=mask)


def activate_rows(gate_up: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Return act(gate) * up, or act(up), of rows [gate; up], computed in float32."""
    slots, columns = gate_up.shape
    columns = columns // 2 if gated else columns
    out = gate_up.new_empty((slots, columns))
    activate_kernel[(slots, -(-columns // COLUMNS))](
        gate_up, out, columns, GATED=gated, ACTIVATION=activation, COLUMNS=COLUMNS
    )
    return out
