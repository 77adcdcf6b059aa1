"""FP8: e4m3 codes with float32 scales, for a matrix, for each row, or for blocks of 128 x 128.

Bytes are those that ModelOpt exports on a CPU, in its order of operations: with one scale a matrix
the quotient is rounded to the dtype of the weight before e4m3, with more scales it is not. Scales
are amax / 448 in float32. Where nothing but zeros lies the scale is 1; ModelOpt's is, too, except
for a whole matrix, which it exports as NaN.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .base import Part, divide
from .scaled import E4M3_MAX, ScaledFormat, block_amax, to_e4m3

__all__ = ["FP8", "FP8_BLOCK", "FP8_CHANNEL"]

CODES = Part(torch.float8_e4m3fn, 1)
BLOCK = 128
# Smallest scale of a token, and smallest range of a block of activations, as in vLLM.
TOKEN_SCALE_MIN = 1.0 / (448 * 512)
BLOCK_RANGE_MIN = 1e-10


@dataclasses.dataclass(frozen=True)
class _Tensor(ScaledFormat):
    """One scale a matrix; gate and up have the same when quantised here, not in every file."""

    @property
    def activation_range(self) -> float:
        return E4M3_MAX

    def shared_scale(self, extremes: torch.Tensor) -> torch.Tensor:
        amax = extremes.abs().amax()
        scale = divide(amax, E4M3_MAX).clamp_(min=2.0**-149)
        return torch.where(amax == 0, 1.0, scale)

    def _encode(
        self, x: torch.Tensor, shared_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        quotient = (x.float() / shared_scale).to(x.dtype)
        return shared_scale.reshape(1, 1), to_e4m3(quotient.float())

    def round_activation(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """e4m3(x * (1 / scale)) * scale: kernels multiply by the float32 reciprocal."""
        return to_e4m3(x * (1.0 / scale)).float() * scale


@dataclasses.dataclass(frozen=True)
class _Blocks(ScaledFormat):
    """A scale for each block; a row is a block of 1 x K."""

    def _encode(
        self, x: torch.Tensor, shared_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.scales.rows or len(x), self.scales.columns or x.shape[1]
        amax = block_amax(x, rows, columns)
        # ModelOpt's lower bound: the smallest normal number of the weight's dtype.
        bounded = amax.clamp(min=torch.finfo(x.dtype).tiny).float()
        scale = divide(torch.where(amax == 0, E4M3_MAX, bounded), E4M3_MAX)
        factor = scale.repeat_interleave(rows, 0)[: len(x)]
        factor = factor.repeat_interleave(columns, 1)[:, : x.shape[1]]
        return scale, to_e4m3(x.float() / factor)

    def round_activation(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return _round_tokens(x) if self.scales.columns is None else _round_blocks(x, BLOCK)


def _round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Round each row [K] with a scale of its own, multiplying by the scale's reciprocal."""
    scale = divide(x.abs().amax(-1, keepdim=True), E4M3_MAX).clamp(min=TOKEN_SCALE_MIN)
    return to_e4m3(x * (1.0 / scale)).float() * scale


def _round_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Round each 1 x size of a row with a scale of its own, dividing by it; the last one is cut."""
    blocks = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = divide(amax.clamp(min=BLOCK_RANGE_MIN), E4M3_MAX)
    return (to_e4m3(blocks / scale).float() * scale).flatten(-2)[..., : x.shape[-1]]


FP8 = _Tensor("fp8", CODES, Part(torch.float32, None, None), False, 16)
FP8_CHANNEL = _Blocks("fp8_channel", CODES, Part(torch.float32, None, 1), False, 16)
FP8_BLOCK = _Blocks("fp8_block", CODES, Part(torch.float32, BLOCK, BLOCK), False, 16)
