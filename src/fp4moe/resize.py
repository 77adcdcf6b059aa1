"""ExpertWeights of other sizes: padded, without padding, or a slice of the intermediate size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .errors import must
from .formats.base import NVFP4
from .formats.nvfp4 import NVFP4Values
from .pack import BLOCK

__all__ = ["resized", "slice_intermediate"]

# fp4moe.experts imports this.
ExpertWeights = Any


def resized(
    weights: ExpertWeights, resize: Callable[..., torch.Tensor], hidden: int, intermediate: int
) -> ExpertWeights:
    """Return the weights with these padded sizes; resize is a function of `fp4moe.padding`."""
    if (hidden, intermediate) == (weights.hidden_padded, weights.intermediate_padded):
        return weights

    def values(old: NVFP4Values, rows: int, columns: int, halves: int) -> NVFP4Values:
        scale = old.block_scale.view(torch.uint8)
        return NVFP4Values(
            resize(old.packed, rows, NVFP4.packed_columns(columns), halves),
            resize(scale, rows, NVFP4.scale_columns(columns), halves).view(NVFP4.scale_dtype),
            old.global_scale,
        )

    def bias(old: torch.Tensor | None, rows: int, halves: int) -> torch.Tensor | None:
        if old is None:
            return None
        # A float32 is 4 bytes, of which zero is 0.0.
        matrix = old[..., None].view(torch.uint8)
        return resize(matrix, rows, 4, halves).view(torch.float32)[..., 0]

    halves = 1 + weights.gated
    return dataclasses.replace(
        weights,
        gate_up=values(weights.gate_up, halves * intermediate, hidden, halves),
        down=values(weights.down, hidden, intermediate, 1),
        gate_up_bias=bias(weights.gate_up_bias, halves * intermediate, halves),
        down_bias=bias(weights.down_bias, hidden, 1),
    )


def slice_intermediate(weights: ExpertWeights, start: int, stop: int) -> ExpertWeights:
    """Return intermediate columns start..stop-1; only the first slice keeps the bias of down."""
    if not 0 <= start < stop <= weights.intermediate_padded or start % BLOCK or stop % BLOCK:
        must(
            "slice_intermediate: start and stop",
            f"be multiples of {BLOCK} with 0 <= start < stop <= {weights.intermediate_padded}",
            f"{start} and {stop}",
            "Move them to a block boundary.",
        )

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(1, (1 + weights.gated, -1))[:, :, start:stop].flatten(1, 2)

    first, down, down_bias = weights.gate_up, weights.down, weights.down_bias
    return dataclasses.replace(
        weights,
        gate_up=NVFP4Values(rows(first.packed), rows(first.block_scale), first.global_scale),
        down=NVFP4Values(
            down.packed[..., start // 2 : stop // 2],
            down.block_scale[..., start // BLOCK : stop // BLOCK],
            down.global_scale,
        ),
        gate_up_bias=None if weights.gate_up_bias is None else rows(weights.gate_up_bias),
        down_bias=torch.zeros_like(down_bias) if down_bias is not None and start else down_bias,
        intermediate_size=max(1, min(stop, weights.intermediate_size) - start),
    )
