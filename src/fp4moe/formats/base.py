"""Block-scaled number formats as data: the single source of their constants.

value = element code x block scale x global scale. Only a format's name crosses an operator's
schema.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["NVFP4", "BlockScaledFormat"]


@dataclasses.dataclass(frozen=True)
class BlockScaledFormat:
    """One block-scaled format.

    Attributes:
        name: what the format is called in schemas and reports.
        grid: the non-negative element values by code; the sign is the next higher bit.
        element_bits: bits of one element, its sign included.
        block_size: elements that share one block scale, along the contraction axis.
        scale_dtype: storage dtype of a block scale.
        scale_min: smallest block scale that a quantiser writes for a block with values.
        scale_max: largest block scale.
    """

    name: str
    grid: tuple[float, ...]
    element_bits: int
    block_size: int
    scale_dtype: torch.dtype
    scale_min: float
    scale_max: float

    @property
    def element_max(self) -> float:
        """The largest element value."""
        return self.grid[-1]

    @property
    def amax_per_global_scale(self) -> float:
        """The largest magnitude that a global scale of 1 can express: element_max x scale_max."""
        return self.element_max * self.scale_max

    def packed_columns(self, columns: int) -> int:
        """Bytes that hold `columns` elements."""
        return columns * self.element_bits // 8

    def scale_columns(self, columns: int) -> int:
        """Block scales that `columns` elements need."""
        return columns // self.block_size


# E2M1 elements, E4M3 block scales (subnormal minimum 2^-9), one float32 global scale per tensor.
NVFP4 = BlockScaledFormat(
    name="nvfp4",
    grid=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    element_bits=4,
    block_size=16,
    scale_dtype=torch.float8_e4m3fn,
    scale_min=2.0**-9,
    scale_max=448.0,
)
