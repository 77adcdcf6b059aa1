"""Products with quantised weights on a CPU: decoded by blocks of rows that stay in its caches.

A few tokens wait for the decoding, not for the product, and torch decodes fastest by lookup: two
bytes of codes at once, in a table of 65536 entries. The weights have the bits of
`WeightFormat.dequantize`; in which order a product is summed is its own affair.
"""

from __future__ import annotations

import functools

import torch

from ..formats import StoredMatrix, WeightFormat
from ..formats.base import as_bytes
from ..formats.four_bits import e2m1_values, unpack_codes
from ..formats.mx import e8m0_values

__all__ = ["RowBlocks", "Scratch"]

CPU = torch.device("cpu")
# Elements of a block: for few rows of the other factor one that caches hold, for many a GEMM's.
FEW_ROWS, FEW, MANY = 64, 1 << 19, 1 << 21


class Scratch:
    """Memory that blocks are decoded in, by what it is for; fresh pages would cost time."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def of(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """Return a tensor [rows, columns] of any values."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns, dtype=dtype, device=CPU)
        return buffer[: rows * columns].view(rows, columns)


class RowBlocks:
    """A stored matrix [E, N, K] on a CPU, whose rows are decoded where they are used.

    Args:
        stored: codes and scales in the logical order. format: theirs.
        halves: matrices that the rows consist of, 2 for gate and up.
        scratch: what blocks are decoded in; matrices that are used by turns share one.
    """

    def __init__(
        self,
        stored: StoredMatrix,
        format: WeightFormat,
        halves: int = 1,
        scratch: Scratch | None = None,
    ) -> None:
        assert format.scales is not None
        self._table, self._code_dtype, self._unit = _code_table(format.codes.dtype)
        codes = as_bytes(stored.packed)
        # A view of two bytes begins at an even one.
        codes = codes.clone() if codes.storage_offset() % 2 else codes
        self._codes = codes.contiguous().view(torch.uint16)
        self._rows, self._columns = stored.packed.shape[1], format.elements(stored.packed.shape[2])
        self._scales, self._globals = as_bytes(stored.block_scale), stored.global_scale
        self._scale_bytes = _scale_values(format.scales.dtype)
        each = self._rows // halves
        # Which row of the scales each row has, where that is not its own.
        self._scale_rows: torch.Tensor | None = None
        if format.scales.rows != 1:
            row = torch.arange(self._rows, dtype=torch.int64, device=CPU)
            blocks = self._scales.shape[1] // halves
            self._scale_rows = row // each * blocks + row % each // (format.scales.rows or each)
        self._block = format.scales.columns
        self._scratch = scratch or Scratch()

    def product(self, x: torch.Tensor, expert: int, first: int, count: int) -> torch.Tensor:
        """Return x [n, K or fewer] times the rows first to first + count - 1: float32 [n, count].

        Columns that x lacks are padding.
        """
        rows, width = x.shape
        out = torch.empty(rows, count, dtype=torch.float32, device=CPU)
        step = max((FEW if rows <= FEW_ROWS else MANY) // self._columns, 1)
        step = min(step, self._rows)
        entries = self._codes.shape[2]
        index = self._scratch.of("index", torch.int32, step, entries)
        found = self._scratch.of("found", self._table.dtype, step, entries)
        values = self._scratch.of("values", torch.float32, step, self._columns)
        here = slice(first, first + count)
        scales = self._scales[expert]
        scales = scales[here] if self._scale_rows is None else scales[self._scale_rows[here]]
        table = self._scale_bytes
        if table is not None and self._globals.numel():
            table = table * self._globals[expert]
        if table is not None and self._unit != 1:
            table = table * self._unit
        start = 0
        for code, scale in zip(
            self._codes[expert, here].split(step), scales.split(step), strict=True
        ):
            n = len(code)
            if n < step:
                index, found, values = index[:n], found[:n], values[:n]
            index.copy_(code)
            torch.index_select(self._table, 0, index.view(-1), out=found.view(-1))
            values.copy_(found.view(self._code_dtype))
            if table is None:
                factor = scale.view(torch.float32)
            else:
                factor = table.index_select(0, scale.flatten().int()).view(scale.shape)
            self._multiply(values, factor)
            used = values if width == self._columns else values[:, :width]
            if rows == 1:
                torch.mv(used, x[0], out=out[0, start : start + n])
            else:
                torch.mm(x, used.T, out=out[:, start : start + n])
            start += n
        return out

    def _multiply(self, values: torch.Tensor, factor: torch.Tensor) -> None:
        if self._block is None:
            values.mul_(factor)
        elif values.shape[1] % self._block == 0:
            values.view(len(values), -1, self._block).mul_(factor.unsqueeze(-1))
        else:
            values.mul_(factor.repeat_interleave(self._block, 1)[:, : values.shape[1]])


@functools.cache
def _code_table(dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype, float]:
    """Return what each two bytes of codes stand for, of which dtype, and in which unit.

    Four e2m1 values are halves as int8, two e4m3 values bfloat16: both exactly.
    """
    with torch.inference_mode(False):
        if dtype == torch.uint8:
            grid = (2 * e2m1_values(CPU)).to(torch.int8)
            codes = unpack_codes(torch.arange(256, dtype=torch.uint8, device=CPU))
            byte, kind, unit = torch.cat((grid, -grid))[codes.int()].view(256, 2), torch.int8, 0.5
        else:
            byte = (
                torch.arange(256, dtype=torch.uint8, device=CPU)
                .view(dtype)
                .to(torch.bfloat16)
                .view(256, 1)
            )
            kind, unit = torch.bfloat16, 1.0
        low = byte.expand(256, *byte.shape)
        high = byte.unsqueeze(1).expand_as(low)
        return torch.cat((low, high), -1).contiguous().view(torch.int32).flatten(), kind, unit


@functools.cache
def _scale_values(dtype: torch.dtype) -> torch.Tensor | None:
    """Return the float32 value of each byte of a scale; None for scales that are float32."""
    if dtype.itemsize > 1:
        return None
    with torch.inference_mode(False):
        byte = torch.arange(256, dtype=torch.uint8, device=CPU)
        return e8m0_values(byte) if dtype == torch.uint8 else byte.view(dtype).float()
