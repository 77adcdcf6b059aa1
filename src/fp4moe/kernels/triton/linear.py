"""A quantised Linear on compute capability 8.0 and newer: layout, tiles, launches.

One launch, or two where K is split; no host synchronisation. Weights are decoded in registers; for
many tokens a full copy is decoded first and torch multiplies, see `COPY_TOKENS`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...formats import FORMATS
from ...padding import round_up
from ..base import current_capability
from ..linear_weight import LinearWeight, linear_shapes
from .kernel import REORDERS, Reorders, interpreted
from .layout import SLAB

__all__ = [
    "COPY_TOKENS",
    "LinearTile",
    "choose_tile",
    "decode_weight",
    "from_prepared",
    "padded",
    "processors",
    "run_linear",
    "run_with_tile",
    "steps_of",
    "to_prepared",
]

# From so many tokens on a full copy of the weight and torch's own product are faster.
COPY_TOKENS = 512
PROCESSORS = 132  # where there is no GPU to ask
SUM_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class LinearTile:
    """One program of a Linear; CHUNKS and the rest are explained in `linear_gemm`.

    Attributes:
        slots: tokens, a power of two; slots * chunks is at least 16.
        chunks: pieces of K side by side, a power of two.
        rows: rows of the weight; rows * chunks is 16 to 128. wgmma needs 64 and 4 warps.
        slabs: 64 columns of K each: 1, 2 or 4.
        warps, stages: as Triton's num_warps and num_stages.
        splits: programs along K; more than one take a second launch.
    """

    slots: int
    chunks: int
    rows: int
    slabs: int
    warps: int
    stages: int
    splits: int = 1

    def __str__(self) -> str:
        return ",".join(map(str, dataclasses.astuple(self)))


def padded(size: int) -> int:
    """Return the rows, or columns, of a prepared weight."""
    return round_up(size, SLAB)


def to_prepared(
    format: str, packed: torch.Tensor, block_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad codes [N, bytes] and block scales, both as bytes, and lay them out; fresh tensors."""
    rows, columns = packed.shape[0], FORMATS[format].elements(packed.shape[1])
    shapes = linear_shapes(format, padded(rows), padded(columns))
    packed, scale = _grown(packed, shapes["packed"]), _grown(block_scale, shapes["block_scale"])
    return _reordered(REORDERS[format][0], packed, scale)


def from_prepared(weight: LinearWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `to_prepared`: codes and block scales as bytes, bit for bit; fresh tensors."""
    packed, scale = _reordered(REORDERS[weight.format][1], weight.packed, weight.block_scale)
    shapes = linear_shapes(weight.format, weight.rows, weight.columns)
    return _cut(packed, shapes["packed"]), _cut(scale, shapes["block_scale"])


Shape = tuple[torch.dtype, tuple[int, ...]]


def _grown(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    out = tensor.new_zeros(shape[1])
    out[tuple(map(slice, tensor.shape))] = tensor
    return out


def _cut(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    return tensor[tuple(map(slice, shape[1]))].contiguous()


def _reordered(
    functions: Reorders, packed: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # By row tiles as if they were experts: the order is the same, and the scratch small.
    codes, scales = functions
    packed = codes(packed.view(-1, SLAB, packed.shape[1])).view(packed.shape)
    if scales is None:
        return packed, scale.clone()
    return packed, scales(scale.view(-1, SLAB, scale.shape[1])).view(scale.shape)


def run_linear(x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] weight^T + bias [T, N] in x's dtype, T > 0.

    bfloat16 and float16 are multiplied with exact weights and summed in float32, below COPY_TOKENS
    tokens; from there on with weights rounded once to x's dtype. float32 is never rounded: it is
    multiplied with a float32 copy, as torch multiplies float32.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] >= COPY_TOKENS:
        bias = bias if bias is None else bias.to(x.dtype)
        return F.linear(x, decode_weight(weight, x.dtype), bias)
    tile = choose_tile(x.shape[0], weight.rows, weight.columns, processors(x.device))
    return run_with_tile(tile, x, weight, bias)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(4096)
def choose_tile(tokens: int, rows: int, columns: int, processors: int) -> LinearTile:
    """Return the tile for a weight [rows, columns], by a rule measured with NVFP4 on an H200.

    Few tokens fill the N side with pieces of K, so that two programs a multiprocessor need no
    second launch; more tokens take splits along K.
    """
    rows, slabs = padded(rows), padded(columns) // SLAB
    if tokens <= 4:
        slots = 1 << (tokens - 1).bit_length()
        chunks, lines = 16 // slots, 128
        if rows * chunks < 1.5 * processors * lines:
            chunks, lines = min(2 * chunks, 16), 64
        return LinearTile(slots, chunks, lines // chunks, 1, 4, 4)
    if tokens <= 64:
        slots = max(16, 1 << (tokens - 1).bit_length())
        tile = LinearTile(slots, 1, 64, 2, 4, 3, 4 if slots == 16 else 3)
    else:
        tile = LinearTile(64, 1, 128, 1, 4, 3)
        programs = -(-rows // tile.rows) * -(-tokens // tile.slots)
        tile = dataclasses.replace(tile, splits=max(1, 2 * processors // programs))
    # A split has four slabs at least.
    return dataclasses.replace(tile, splits=max(1, min(tile.splits, slabs // 4)))


class Steps(NamedTuple):
    """How a tile goes through a weight.

    Attributes:
        constants: of the kernel, by name.
        slabs, steps, split_steps, splits: slabs of 64 columns; steps of CHUNKS * SLABS slabs; those
            of a split.
    """

    constants: dict[str, Any]
    slabs: int
    steps: int
    split_steps: int
    splits: int


@functools.lru_cache(4096)
def steps_of(tile: LinearTile, format: str, columns: int) -> Steps:
    """Return the steps, with no more slabs in one than the weight and its format allow."""
    slabs, size = padded(columns) // SLAB, tile.slabs

    def whole() -> bool:
        return columns % SLAB == 0 and slabs % (tile.chunks * size) == 0

    # fp8_block: a step's sum must not reach beyond a block of 128 columns.
    while size > slabs or (format == "fp8_block" and size > 1 + whole()):
        size //= 2
    steps = -(-slabs // (tile.chunks * size))
    split_steps = -(-steps // tile.splits)
    constants: dict[str, Any] = {
        "SLOTS": tile.slots,
        "CHUNKS": tile.chunks,
        "ROWS": tile.rows,
        "SLABS": size,
    }
    constants |= {"STAGES": tile.stages, "WHOLE": whole(), "FORMAT": format}
    return Steps(constants, slabs, steps, split_steps, -(-steps // split_steps))


def run_with_tile(
    tile: LinearTile, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute `run_linear` of bfloat16 or float16 x with a given tile."""
    from .linear_gemm import linear_kernel, sum_splits_kernel

    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, rows, total_rows = x.shape[0], weight.rows, weight.packed.shape[0]
    constants, slabs, steps, split_steps, splits = steps_of(tile, weight.format, weight.columns)
    out = x.new_empty((tokens, rows))
    target = out if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    grid = -(-total_rows // tile.rows) * -(-tokens // tile.slots), splits, 1
    with torch.cuda.device_of(x):
        capability = None if interpreted() else current_capability(x.device)
        linear_kernel[grid](
            x, x.stride(0), *_operands(weight), bias if splits == 1 else None, target, tokens,
            rows, weight.columns, total_rows, slabs, steps, split_steps, **constants,
            FP16=x.dtype == torch.float16, ASSEMBLY=capability is not None,
            WAIT=capability is not None and capability[0] == 9, num_warps=tile.warps,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(-(-out.numel() // SUM_BLOCK),)](
                target, bias, out, rows, out.numel(), SPLITS=splits, BLOCK=SUM_BLOCK
            )
    return out


def decode_weight(weight: LinearWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K], computed in float32 and rounded once."""
    from .linear_gemm import weight_kernel

    out = weight.packed.new_empty((weight.rows, weight.columns), dtype=dtype)
    slabs = padded(weight.columns) // SLAB
    size = 2 if slabs > 1 else 1
    with torch.cuda.device_of(out):
        weight_kernel[(weight.packed.shape[0] // SLAB * -(-slabs // size), 1, 1)](
            *_operands(weight), out, weight.rows, weight.columns, weight.packed.shape[0], slabs,
            ROWS=SLAB, SLABS=size, ASSEMBLY=not interpreted(), FORMAT=weight.format, num_warps=4,
        )  # fmt: skip
    return out


def _operands(weight: LinearWeight) -> tuple[Any, ...]:
    scale = weight.block_scale
    # A row of scales may be two bytes long, half a word.
    words = scale if scale.dtype == torch.float32 else scale.view(-1).view(torch.int32)
    return weight.packed.view(torch.int32), words, weight.global_scale
