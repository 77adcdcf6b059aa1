"""One packed matrix for each expert, as a kernel reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import FORMATS
from .operands import Operands

__all__ = ["GroupedMatrix"]

PARTS = ("packed", "block_scale", "global_scale")


class GroupedMatrix(NamedTuple):
    """One matrix an expert [L, rows, columns], in a kernel's layout, sizes padded.

    Attributes:
        packed, block_scale, global_scale: as in `Operands`.
        format: a name of `fp4moe.formats.FORMATS`.
        halves: matrices that the rows consist of, 2 for gate and up.
        expert_offset: global id of the first one.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    format: str
    halves: int
    expert_offset: int

    @classmethod
    def of(
        cls, operands: Operands, gemm: str, format: str, halves: int, offset: int
    ) -> GroupedMatrix:
        """Return the matrix of a GEMM, "gate_up" or "down"."""
        packed, scale, global_scale = (getattr(operands, f"{gemm}_{part}") for part in PARTS)
        return cls(packed, scale, global_scale, format, halves, offset)

    @property
    def experts(self) -> int:
        """L, the local experts."""
        return self.packed.shape[0]

    @property
    def rows(self) -> int:
        """Of all halves."""
        return self.packed.shape[1]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return FORMATS[self.format].elements(self.packed.shape[2])

    def decoded(self, expert: int) -> torch.Tensor:
        """Return a local expert's matrix [rows, columns] of the logical layout, float32."""
        format = FORMATS[self.format]
        dtypes, parts = format.dtypes(), {}
        for name in PARTS:
            tensor = getattr(self, name)
            tensor = tensor[expert : expert + 1] if tensor.numel() else tensor
            dtype = dtypes[name]
            parts[name] = tensor if tensor.dtype == dtype else tensor.view(dtype)
        return format.dequantize(format.container(**parts), torch.float32, self.halves)[0]
