"""What both FlashInfer kernels share: layout, scale scalars, ids, the input, checks of operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from ...errors import must
from ...formats import FORMATS
from ...layer import Layer
from ...padding import round_up
from ..base import Kernel, Layout
from ..operands import Call, LogitsCall, Operands
from .block_scales import deinterleave_128x4, interleave_128x4
from .library import library_reasons
from .rows import inverse_index, permute_rows, up_gate_index

__all__ = ["E4M3_MAX", "FlashInferKernel", "local_ids", "pad_columns", "round_to_e4m3"]
__all__ += ["row_layout", "scale_products", "swap_halves", "up_first"]

E4M3_MAX = 448.0

# (gemm, rows, gated) -> the index of `rows`, None where they stay in place.
RowOrder = Callable[[str, int, bool], torch.Tensor | None]


def row_layout(
    multiples: Callable[[Layer, int], tuple[int, int]],
    order: RowOrder,
    *,
    tiled: bool = True,
    pad_byte: int = 0,
) -> Layout:
    """Return a layout with rows in another order and, if tiled, block scales interleaved 128x4.

    Nothing is added to the block scales: rows are multiples of 128 and columns of 4.

    Args:
        tiled: whether there is a block scale for each row; else the scales stay as they are.
        pad_byte: the block scale of what the layout was padded with.
    """

    def apply(operands: Operands, layer: Layer) -> Operands:
        for gemm in ("gate_up", "down"):
            packed, scale = _matrix(operands, gemm)
            index = order(gemm, packed.shape[1], layer.gated)
            if tiled and pad_byte:
                scale = _with_padding(scale, gemm, layer, pad_byte)
            if index is not None:
                packed = permute_rows(packed, index)
                scale = permute_rows(scale, index) if tiled else scale
            if tiled:
                scale = interleave_128x4(scale).view(scale.shape)
            operands = _with_matrix(operands, gemm, packed.contiguous(), scale)
            operands = _with_bias(operands, gemm, index)
        return operands

    def undo(operands: Operands, layer: Layer) -> Operands:
        for gemm in ("gate_up", "down"):
            packed, scale = _matrix(operands, gemm)
            if tiled:
                scale = deinterleave_128x4(scale, scale.shape[1], scale.shape[2])
            index = order(gemm, packed.shape[1], layer.gated)
            if index is not None:
                index = inverse_index(index)
                packed = permute_rows(packed, index)
                scale = permute_rows(scale, index) if tiled else scale
            operands = _with_matrix(operands, gemm, packed, scale)
            operands = _with_bias(operands, gemm, index)
        return operands

    return Layout(multiples, apply, undo)


def up_first(gemm: str, rows: int, gated: bool) -> torch.Tensor | None:
    """Return the row order [up; gate], which only gate and up have."""
    return up_gate_index(rows) if gated and gemm == "gate_up" else None


def swap_halves(operands: Operands, layer: Layer) -> Operands:
    """Turn [gate; up] into [up; gate] or back, in codes, block scales and biases."""
    tensors = {name: tensor.contiguous() for name, tensor in operands.named().items()}
    for name, tensor in tensors.items():
        if layer.gated and name in ("gate_up_packed", "gate_up_block_scale", "gate_up_bias"):
            tensors[name] = torch.cat(tensor.chunk(2, 1)[::-1], 1)
    return operands._replace(**tensors)


def _with_padding(scale: torch.Tensor, gemm: str, layer: Layer, byte: int) -> torch.Tensor:
    """Return block scales [L, N, K / b] with `byte` where the weights are padding."""
    format = FORMATS[layer.format]
    sizes = [round_up(n, format.multiple) for n in (layer.intermediate_size, layer.hidden_size)]
    rows, columns = sizes if gemm == "gate_up" else sizes[::-1]
    halves = 1 + (layer.gated and gemm == "gate_up")
    filled = scale.clone()
    parts = filled.unflatten(1, (halves, -1))
    parts[:, :, rows:] = byte
    parts[..., format.scales.shape(1, rows, columns, 1)[2] :] = byte  # type: ignore[union-attr]
    return filled


def _matrix(operands: Operands, gemm: str) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(operands, f"{gemm}_packed"), getattr(operands, f"{gemm}_block_scale")


def _with_matrix(
    operands: Operands, gemm: str, packed: torch.Tensor, scale: torch.Tensor
) -> Operands:
    return operands._replace(**{f"{gemm}_packed": packed, f"{gemm}_block_scale": scale})


def _with_bias(operands: Operands, gemm: str, index: torch.Tensor | None) -> Operands:
    """Reorder the bias as the rows of its matrix, where there is one."""
    bias: torch.Tensor | None = getattr(operands, f"{gemm}_bias")
    if bias is None:
        return operands
    rows = bias if index is None else bias.index_select(1, index.to(bias.device))
    return operands._replace(**{f"{gemm}_bias": rows.contiguous()})


class FlashInferKernel(Kernel):
    """The part of a kernel that FlashInfer's have in common."""

    needs = "flashinfer-python 0.6.13 or newer"
    biases = True
    quantizes_activations = True
    without_layout: ClassVar = {
        "fp8_channel": "; FlashInfer 0.6.13 has no kernel with a scale for each row, and what 0.7 "
        "has was not read; take kernel triton"
    }

    def package_reasons(self) -> tuple[str, ...]:
        """Return why the installed FlashInfer cannot be used."""
        return library_reasons()

    def check(self, call: Call | LogitsCall) -> None:
        """Raise what the library's launcher leaves unchecked; the operator has checked the rest."""
        super().check(call)
        for name, tensor in call.operands.named().items():
            if not tensor.is_contiguous():
                must(
                    f"{call.caller}: {name}",
                    f"be contiguous for kernel {self.name}",
                    f"strides {tensor.stride()}",
                    "Use its prepare().",
                )


def scale_products(operands: Operands) -> Operands:
    """Return NVFP4 operands with the four scales, float32 contiguous.

    With s_x = hidden_scale, s_a = intermediate_scale and s the global scales (decode
    multipliers): gate_up_global_scale [L] = s_up * s_x turns an accumulator into its value,
    hidden_scale [1] = 1 / s_x and intermediate_scale [L] = 1 / s_a encode, down_global_scale
    [L] = s_a * s_down.
    """
    return operands._replace(
        gate_up_global_scale=operands.gate_up_global_scale * operands.hidden_scale,
        intermediate_scale=operands.intermediate_scale.reciprocal(),
        down_global_scale=operands.intermediate_scale * operands.down_global_scale,
        hidden_scale=operands.hidden_scale.reciprocal(),
    )


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


def round_to_e4m3(hidden: torch.Tensor, columns: int, encode: torch.Tensor) -> torch.Tensor:
    """Return e4m3(hidden * encode) as [T, columns], zeros behind H.

    Args:
        hidden: [T, H], any float dtype; rounded to bfloat16. encode: float32 [1], the reciprocal of
            the decode multiplier.
    """
    scaled = pad_columns(hidden, columns).float() * encode
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
