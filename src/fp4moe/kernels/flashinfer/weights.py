"""What both FlashInfer kernels share: scale scalars, local ids, checks of prepared operands."""

from __future__ import annotations

import torch

from ...errors import ShapeError
from ...experts import ExpertWeights
from ..base import Operands, PreparedWeights, check_padding

__all__ = ["check_operands", "kept_scales", "local_ids", "pad_columns", "with_logical_scales"]

_SCALES = ("gate_up_global_scale", "down_global_scale", "hidden_scale", "intermediate_scale")


def kept_scales(operands: Operands) -> dict[str, torch.Tensor]:
    """Return the logical scales by the names under which PreparedWeights keeps them."""
    return {f"logical_{name}": getattr(operands, name) for name in _SCALES}


def with_logical_scales(prepared: PreparedWeights) -> Operands:
    """Return the operands with the logical scales put back."""
    return prepared.operands._replace(
        **{name: prepared.kept[f"logical_{name}"] for name in _SCALES}
    )


def scale_operands(
    weights: ExpertWeights, output_scale: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the four scale operands, float32 contiguous.

    With s_x = hidden_scale, s_a = intermediate_scale and s the global scales (decode multipliers):
    gate_up_global_scale [L] = s_up * s_x turns an accumulator into its value, hidden_scale [1] =
    1 / s_x and intermediate_scale [L] = 1 / s_a encode, down_global_scale [L] = s_a * s_down *
    output_scale.
    """
    down = weights.intermediate_scale * weights.down.global_scale
    return {
        "gate_up_global_scale": weights.gate_up.global_scale * weights.hidden_scale,
        "intermediate_scale": weights.intermediate_scale.reciprocal(),
        "down_global_scale": down if output_scale is None else down * output_scale,
        "hidden_scale": weights.hidden_scale.reciprocal(),
    }


def local_ids(expert_ids: torch.Tensor, first: int, count: int, base: int = 0) -> torch.Tensor:
    """Return int32 [T, K] contiguous: ids minus base, and -1 for ids outside first..first+count-1.

    An id that is not local would index the library's histograms unchecked.
    """
    inside = (expert_ids >= first) & (expert_ids < first + count)
    ids = expert_ids - base if base else expert_ids
    return torch.where(inside, ids, -1).to(torch.int32).contiguous()


def pad_columns(hidden: torch.Tensor, columns: int) -> torch.Tensor:
    """Return hidden [T, H] as contiguous bfloat16 [T, columns], zeros behind H."""
    x = hidden.to(torch.bfloat16)
    if x.shape[1] != columns:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    # One row may carry any first stride; at stride 1 the quantiser would take it for transposed.
    return x.contiguous().as_strided(x.shape, (columns, 1))


def check_operands(kernel: str, operands: Operands, multiples: tuple[int, int]) -> None:
    """Raise what the library's launcher leaves unchecked; the operator has checked the rest.

    Args:
        multiples: of the padded hidden and intermediate size.
    """
    check_padding(kernel, operands, multiples)
    for name, tensor in zip(Operands._fields, operands, strict=True):
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{kernel}: {name} must be contiguous; got strides {tensor.stride()}. Use its "
                "prepare()."
            )
