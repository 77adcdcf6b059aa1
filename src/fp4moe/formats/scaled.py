"""Formats whose value is code x scale, with a scale for a block of rows and columns.

What FP8 and MX formats have in common: a matrix is read by pieces of rows, so that the float32
scratch is bounded, and its largest magnitudes come block by block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..errors import must
from .base import Part, StoredMatrix, WeightFormat, as_bytes

__all__ = ["E4M3_MAX", "ScaledFormat", "block_amax", "multiply_blocks", "to_e4m3"]

E4M3_MAX = 448.0
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements of a piece; its rows are a multiple of the rows of a block.
PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class ScaledFormat(WeightFormat):
    """A format without a global scale; a subclass encodes and decodes one piece of rows."""

    scales: Part

    def quantize(
        self, weight: torch.Tensor, shared_scale: torch.Tensor, method: str
    ) -> StoredMatrix:
        self.check_method(method, caller=self.name)
        self._check_weight(weight)
        rows, columns = weight.shape
        out = self.zeros(1, rows, columns, device=weight.device)
        codes, scales = as_bytes(out.packed[0]), as_bytes(out.block_scale[0])
        block = self.scales.rows or 1
        peaks = []
        for piece in _pieces(rows, columns, block):
            x = weight.detach()[piece].contiguous()
            x = x.float() if x.dtype == torch.float64 else x
            low, high = torch.aminmax(x)
            peaks.append(torch.maximum(high, -low).float())
            of_rows = slice(piece.start // block, -(-piece.stop // block))
            if self.scales.rows is None:
                of_rows = slice(0, 1)
            scale, code = self._encode(x, shared_scale)
            scales[of_rows], codes[piece] = scale.view(scales.dtype), code.view(codes.dtype)
        peak = float(torch.stack(peaks).amax())
        if not math.isfinite(peak):
            fix = "Replace inf and NaN (torch.nan_to_num), or find the layer that made them."
            must(f"{self.name}: weight", "be finite", f"a largest magnitude of {peak}", fix)
        return self.container(out.packed[0], out.block_scale[0], out.global_scale)

    def dequantize(self, stored: StoredMatrix, dtype: torch.dtype, halves: int = 1) -> torch.Tensor:
        """Decode code x scale in float32, then cast once.

        Args:
            stored: packed [..., rows, codes] and block_scale [..., row blocks, column blocks].
        """
        lead, (rows, width) = stored.packed.shape[:-2], stored.packed.shape[-2:]
        codes = stored.packed.reshape(-1, rows, width)
        scales = stored.block_scale.reshape(-1, *stored.block_scale.shape[-2:])
        columns = self.elements(width)
        out = torch.empty(len(codes), rows, columns, dtype=dtype, device=codes.device)
        each, blocks = rows // halves, scales.shape[1] // halves
        row = torch.arange(rows, dtype=torch.int64, device=codes.device)
        block = row // each * blocks + row % each // (self.scales.rows or each)
        for index in range(len(codes)):
            for piece in _pieces(rows, columns, 1):
                factor = self._decode_scales(scales[index][block[piece]])
                values = self._decode_codes(codes[index, piece])
                out[index, piece] = multiply_blocks(values, factor, self.scales.columns)
        return out.reshape(*lead, rows, columns)

    def _encode(
        self, x: torch.Tensor, shared_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and codes of rows x [R, K] in float32, bfloat16 or float16."""
        raise NotImplementedError

    def _decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Return new float32 [R, K]."""
        return codes.float()

    def _decode_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Return float32 of the same shape."""
        return scales

    def _check_weight(self, weight: torch.Tensor) -> None:
        if weight.dtype not in FLOAT_DTYPES or weight.ndim != 2 or not weight.numel():
            rule = "be float32, bfloat16, float16 or float64 [rows, columns]"
            got = f"{weight.dtype} {list(weight.shape)}"
            must(f"{self.name}: weight", rule, got, "Pass one matrix.")
        if weight.shape[1] % self.multiple:
            rule = f"have columns that are a multiple of {self.multiple}"
            must(f"{self.name}: weight", rule, weight.shape[1], "Pad them with zeros.")


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to e4m3, ties to even, saturated at 448; NaN stays.

    The cast alone saturates in some versions of torch and gives NaN in others.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def block_amax(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[R, K] -> the largest magnitudes [R / rows, K / columns], rounded up, in the dtype of x."""
    padding = 0, -x.shape[1] % columns, 0, -x.shape[0] % rows
    x = F.pad(x, padding) if any(padding) else x
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))


def multiply_blocks(x: torch.Tensor, factor: torch.Tensor, columns: int | None) -> torch.Tensor:
    """Multiply x [R, K] in place by factor [R, blocks]; columns: those of a block, None = all."""
    if columns is None:
        return x.mul_(factor)
    if x.shape[1] % columns:
        return x.mul_(factor.repeat_interleave(columns, 1)[:, : x.shape[1]])
    x.unflatten(1, (-1, columns)).mul_(factor.unsqueeze(-1))
    return x


def _pieces(rows: int, columns: int, block: int) -> Iterator[slice]:
    step = max(PIECE // max(columns, 1) // block, 1) * block
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))
