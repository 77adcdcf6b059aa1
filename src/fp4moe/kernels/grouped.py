"""The product of rows with the packed matrices of their experts, and what stands between two.

triton     compute capability 8.0 or newer: weights are decoded in registers
reference  any device: the definition in plain torch, one expert's float weights at a time

What other kernels prepare cannot be read one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..activations import get_activation
from ..errors import check_choice, refuse
from ..formats import FORMATS
from ..layer import capability_name
from ..precision import without_autocast
from .base import DIFFERENTIABLE, current_capability
from .grouped_matrix import GroupedMatrix
from .triton.kernel import TRITON, interpreted
from .triton.layout import SLAB

__all__ = ["GROUPED_KERNELS", "check_grouped_device", "check_grouped_kernel"]
__all__ += ["combine", "combine_gradient", "input_gradient", "multiply", "size_multiple"]

GROUPED_KERNELS = ("triton", "reference")


def check_grouped_kernel(kernel: str, *, caller: str) -> None:
    """Raise UnsupportedError unless the kernel's layout can be read one matrix at a time."""
    if kernel not in GROUPED_KERNELS:
        refuse(
            caller,
            f"the two products of experts prepared for kernel {kernel} cannot be computed apart",
            "nothing reads one matrix in its layout",
            f"Load or replace the model with {' or '.join(DIFFERENTIABLE)}.",
        )


def check_grouped_device(kernel: str, device: torch.device, *, caller: str) -> None:
    """Raise UnsupportedError where the kernel does not run."""
    if kernel == "reference" or interpreted():
        return
    capability = current_capability(device)
    if not TRITON.devices.include(capability):
        refuse(
            caller,
            "kernel triton cannot run",
            f"x is on {device} ({capability_name(capability)}), and the kernel needs a device of "
            f"compute capability {TRITON.devices}",
            "Prepare the weights for another kernel.",
        )


def size_multiple(kernel: str, format: str) -> int:
    """Return what both sizes of a prepared matrix are multiples of."""
    check_choice("format", format, FORMATS, caller="grouped_mm")
    return SLAB if kernel == "triton" else FORMATS[format].multiple


def multiply(
    kernel: str,
    x: torch.Tensor,
    ids: torch.Tensor,
    matrix: GroupedMatrix,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return x[t] matrix[e]^T + bias[e], e = ids[t, k], as row t * K + k.

    Rows are zero where e is not local.

    Args:
        x: [T, columns or fewer], T > 0. ids: [T, K], global. bias: float32 [L, rows].

    Returns:
        [T * K, rows] in the dtype of x, summed in float32 and rounded once.
    """
    if kernel == "triton":
        from .triton.grouped import multiply_grouped

        return multiply_grouped(x, ids, matrix, bias)

    def apply(expert: int, rows: torch.Tensor) -> torch.Tensor:
        y = rows @ matrix.decoded(expert)[:, : rows.shape[1]].T
        return y if bias is None else y + bias[expert]

    each = x.float().repeat_interleave(ids.shape[1], 0)
    return _by_expert(each, ids.reshape(-1), matrix, matrix.rows, apply).to(x.dtype)


def input_gradient(
    kernel: str, grad: torch.Tensor, ids: torch.Tensor, matrix: GroupedMatrix, columns: int
) -> torch.Tensor:
    """Return the gradient of x [T, columns] by that of `multiply`'s result [T * K, rows]."""
    if kernel == "triton":
        from .triton.grouped import grouped_input_gradient

        return grouped_input_gradient(grad, ids, matrix, columns)

    def apply(expert: int, rows: torch.Tensor) -> torch.Tensor:
        return rows @ matrix.decoded(expert)[:, :columns]

    parts = _by_expert(grad.float(), ids.reshape(-1), matrix, columns, apply)
    return parts.view(*ids.shape, columns).sum(1).to(grad.dtype)


def combine(kernel: str, first: torch.Tensor, activation: str, halves: int) -> torch.Tensor:
    """Return what stands between two products, [N, I] of gate and up (or up) side by side.

    Computed in float32, rounded once to the dtype of first [N, halves * I].
    """
    if kernel == "triton":
        from .triton.combine import combine_rows

        return combine_rows(first, activation, halves)
    gate_up = first.float().chunk(halves, 1)
    return get_activation(activation).combine(*gate_up[::-1]).to(first.dtype)


def combine_gradient(
    kernel: str, grad: torch.Tensor, first: torch.Tensor, activation: str, halves: int
) -> torch.Tensor:
    """Return the gradient of first by that of `combine`'s result."""
    if kernel == "triton":
        from .triton.combine import combine_rows_gradient

        return combine_rows_gradient(grad, first, activation, halves)
    gate_up = first.float().chunk(halves, 1)
    parts = get_activation(activation).gradients(grad.float(), *gate_up[::-1])
    return torch.cat(parts[::-1], 1).to(first.dtype)


def _by_expert(
    rows: torch.Tensor,
    ids: torch.Tensor,
    matrix: GroupedMatrix,
    columns: int,
    apply: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return apply(expert, its rows) for every row, float32 [N, columns]; zero for no expert."""
    first, count = matrix.expert_offset, matrix.experts
    out = rows.new_zeros((rows.shape[0], columns))
    with without_autocast(rows.device):
        if rows.device.type == "cpu":
            for expert in torch.unique(ids).tolist():
                if first <= expert < first + count:
                    mine = (ids == expert).nonzero()[:, 0]
                    out[mine] = apply(expert - first, rows[mine])
            return out
        # Every expert takes all rows: no host synchronisation, safe under capture.
        for expert in range(count):
            mine = (ids == expert + first)[:, None]
            out = torch.where(mine, apply(expert, rows), out)
    return out
