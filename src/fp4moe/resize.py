"""ExpertWeights of other sizes: padded, without padding, slices, and stacks of single experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .errors import must
from .formats import FORMATS, StoredMatrix
from .formats.base import as_bytes

__all__ = ["block_multiple", "resized", "slice_experts", "slice_intermediate", "stack_experts"]

# fp4moe.experts imports this.
ExpertWeights = Any


def resized(
    weights: ExpertWeights, resize: Callable[..., torch.Tensor], hidden: int, intermediate: int
) -> ExpertWeights:
    """Return the weights with these padded sizes; resize is a function of `fp4moe.padding`."""
    if (hidden, intermediate) == (weights.hidden_padded, weights.intermediate_padded):
        return weights

    format = weights.number_format

    def matrix(old: StoredMatrix, rows: int, columns: int, halves: int) -> StoredMatrix:
        shapes = format.shapes(weights.local_experts, rows, columns, halves)
        parts = old.parts()
        for name, (dtype, shape) in shapes.items():
            if len(shape) == 3:
                size = dtype.itemsize
                found = resize(parts[name].view(torch.uint8), shape[1], shape[2] * size, halves)
                parts[name] = found.view(dtype)
        return format.container(**parts)

    def bias(old: torch.Tensor | None, rows: int, halves: int) -> torch.Tensor | None:
        if old is None:
            return None
        # A float32 is 4 bytes, of which zero is 0.0.
        matrix = old[..., None].view(torch.uint8)
        return resize(matrix, rows, 4, halves).view(torch.float32)[..., 0]

    halves = 1 + weights.gated
    return dataclasses.replace(
        weights,
        gate_up=matrix(weights.gate_up, halves * intermediate, hidden, halves),
        down=matrix(weights.down, hidden, intermediate, 1),
        gate_up_bias=bias(weights.gate_up_bias, halves * intermediate, halves),
        down_bias=bias(weights.down_bias, hidden, 1),
    )


def slice_experts(weights: ExpertWeights, start: int, stop: int) -> ExpertWeights:
    """Return local experts start..stop-1 as views; ids stay global through expert_offset."""
    if not 0 <= start < stop <= weights.local_experts:
        rule = f"satisfy 0 <= start < stop <= {weights.local_experts}"
        got = f"{start} and {stop}"
        must("ExpertWeights.slice_experts: start and stop", rule, got, "Pass local indices.")

    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None or not tensor.numel() else tensor[start:stop]

    container = weights.number_format.container
    return dataclasses.replace(
        weights,
        gate_up=container(**{n: part(t) for n, t in weights.gate_up.parts().items()}),
        down=container(**{n: part(t) for n, t in weights.down.parts().items()}),
        intermediate_scale=weights.intermediate_scale[start:stop],
        gate_up_bias=part(weights.gate_up_bias),
        down_bias=part(weights.down_bias),
        expert_offset=weights.expert_offset + start,
    )


def block_multiple(name: str) -> int:
    """Return of what intermediate columns a slice consists in a format: its widest block."""
    format = FORMATS[name]
    # A block of scales that lies in two slices would be in neither.
    _, columns, rows_of_block = format.scales or format.codes
    return max(format.multiple, columns or 1, rows_of_block or 1)


def slice_intermediate(weights: ExpertWeights, start: int, stop: int) -> ExpertWeights:
    """Return intermediate columns start..stop-1; only the first slice keeps the bias of down."""
    format = weights.number_format
    multiple = block_multiple(weights.format)
    stop_multiple = format.multiple if stop == weights.intermediate_padded else multiple
    if (
        not 0 <= start < stop <= weights.intermediate_padded
        or start % multiple
        or stop % stop_multiple
    ):
        must(
            "ExpertWeights.slice_intermediate: start and stop",
            f"be multiples of {multiple} with 0 <= start < stop <= {weights.intermediate_padded}",
            f"{start} and {stop}",
            "Move them to a block boundary.",
        )

    def rows(tensor: torch.Tensor, covered: int | None = 1) -> torch.Tensor:
        if covered is None:
            return tensor
        of_half = slice(start // covered, -(-stop // covered))
        return tensor.unflatten(1, (1 + weights.gated, -1))[:, :, of_half].flatten(1, 2)

    first, down = weights.gate_up.parts(), weights.down.parts()
    for name, part in (("packed", format.codes), ("block_scale", format.scales)):
        if part is not None:
            first[name] = rows(first[name], part.rows)
            if part.columns is not None:
                of_row = slice(start // part.columns, -(-stop // part.columns))
                down[name] = down[name][..., of_row]
    down_bias = weights.down_bias
    return dataclasses.replace(
        weights,
        gate_up=format.container(**first),
        down=format.container(**down),
        gate_up_bias=None if weights.gate_up_bias is None else rows(weights.gate_up_bias),
        down_bias=torch.zeros_like(down_bias) if down_bias is not None and start else down_bias,
        intermediate_size=max(1, min(stop, weights.intermediate_size) - start),
    )


def stack_experts(count: int, one: Callable[[int], ExpertWeights]) -> ExpertWeights:
    """Return a layer of experts that are made one after the other, each a layer of one.

    Only packed tensors are ever stacked. The scale of the input, and absent parts, are the last's.
    """
    packed: dict[str, torch.Tensor] = {}
    for expert in range(count):
        weights = one(expert)
        for name, tensor in weights.tensors().items():
            if name == "hidden_scale" or not tensor.numel():
                packed[name] = tensor
                continue
            if expert == 0:
                packed[name] = tensor.new_empty((count, *tensor.shape[1:]))
            as_bytes(packed[name][expert]).copy_(as_bytes(tensor[0]))
    return weights.from_tensors(packed, weights.metadata() | {"num_experts": count})
