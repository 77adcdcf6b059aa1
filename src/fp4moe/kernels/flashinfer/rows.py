"""Row orders of the TRT-LLM-Gen mixture-of-experts GEMMs, as indices with inverses.

An index says where a prepared row comes from: prepared[n] = logical[index[n]]. The same index holds
for packed weights, for their linear block scales and for biases. The orders are those of FlashInfer
0.6.13 and 0.7.2 for epilogue tiles of 128 rows; the tests compare them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ...errors import must
from ...padding import check_bytes, round_up
from .block_scales import TILE_ROWS

__all__ = [
    "down_row_index",
    "gate_interleave_index",
    "gate_up_row_index",
    "inverse_index",
    "permute_rows",
    "shuffle_index",
    "up_gate_index",
]

SHUFFLE_ROWS = 32


def shuffle_index(rows: int) -> torch.Tensor:
    """Return S, which deals 8 x 4 rows within every 32: S(n) = 32*(n//32) + 4*(n%8) + n%32//8.

    Args:
        rows: rows of the matrix, a positive multiple of 32.

    Returns:
        int64 [rows] on the CPU, a fresh tensor.

    Raises:
        ShapeError: rows is no positive multiple of 32.
    """
    _check_rows("shuffle_index", rows, SHUFFLE_ROWS)
    return _tensor(_shuffle(rows))


def gate_interleave_index(rows: int) -> torch.Tensor:
    """Return G, which alternates the rows of two halves: G(n) = n//2, plus rows/2 where n is odd.

    Arguments, result and errors are those of `up_gate_index`.
    """
    _check_rows("gate_interleave_index", rows, 2)
    return _tensor(_gate_interleave(rows))


def up_gate_index(rows: int) -> torch.Tensor:
    """Return the order that swaps two halves: [gate; up] becomes [up; gate].

    Args:
        rows: rows of both halves together, positive and even.

    Returns:
        int64 [rows] on the CPU, a fresh tensor.

    Raises:
        ShapeError: rows is not positive and even.
    """
    _check_rows("up_gate_index", rows, 2)
    return _tensor(_up_gate(rows))


def gate_up_row_index(rows: int, gated: bool) -> torch.Tensor:
    """Return the row order of the first GEMM: halves swapped and alternated (if gated), shuffled.

    Args:
        rows: padded rows in logical order, 2 * I for [gate; up] or I for up: a multiple of 128,
            since block scales are interleaved in tiles of 128 rows.
        gated: whether the rows are [gate; up].

    Returns:
        int64 [rows] on the CPU, a fresh tensor.

    Raises:
        ShapeError: rows is no positive multiple of 128.
    """
    _check_rows("gate_up_row_index", rows, TILE_ROWS, halves=1 + bool(gated))
    return _tensor(_gate_up(rows) if gated else _shuffle(rows))


def down_row_index(rows: int) -> torch.Tensor:
    """Return the row order of the second GEMM: shuffled; rows is the padded hidden size.

    Result and errors are those of `gate_up_row_index`.
    """
    _check_rows("down_row_index", rows, TILE_ROWS)
    return _tensor(_shuffle(rows))


def inverse_index(index: torch.Tensor) -> torch.Tensor:
    """Return the index that undoes another: inverse[index[n]] = n.

    Args:
        index: int64 [R] on the CPU, a permutation.

    Raises:
        ShapeError: index is no permutation, or not int64 on the CPU.
    """
    _check_permutation("inverse_index", index, index.numel())
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(index.numel(), dtype=torch.int64, device="cpu")
    return inverse


def permute_rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of every expert: out[e, n] = tensor[e, index[n]].

    Args:
        tensor: uint8 [L, R, C], any strides and device.
        index: int64 [R] on the CPU, a permutation.

    Returns:
        uint8 [L, R, C] on the device of tensor, contiguous, sharing no memory with it.

    Raises:
        ShapeError: tensor is not uint8 [L, R, C]; index is no permutation of its rows.
    """
    check_bytes("permute_rows", "tensor", tensor)
    _check_permutation("permute_rows", index, tensor.shape[1])
    out = torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device)
    index = index.to(tensor.device)
    # Expert by expert, since index_select copies its whole input where that has gaps.
    for expert in range(tensor.shape[0]):
        torch.index_select(tensor[expert], 0, index, out=out[expert])
    return out


def _check_rows(function: str, rows: int, multiple: int, halves: int = 1) -> None:
    if rows < 1 or rows % multiple:
        padded = max(round_up(rows, multiple), multiple)
        each = f", {padded // halves} in each half" if halves > 1 else ""
        must(
            f"{function}: rows",
            f"be a positive multiple of {multiple}",
            rows,
            f"Pad to {padded} rows{each}.",
        )


def _check_permutation(function: str, index: torch.Tensor, rows: int) -> None:
    got = f"{index.dtype} {list(index.shape)} on {index.device}"
    fits = index.dtype == torch.int64 and index.shape == (rows,) and index.device.type == "cpu"
    if fits:
        fits = torch.equal(index.sort().values, torch.arange(rows, dtype=torch.int64, device="cpu"))
        got = "a value twice or out of range"
    if not fits:
        must(
            f"{function}: index",
            f"be a permutation of {rows} rows, torch.int64 [{rows}] on cpu",
            got,
            "Pass gate_up_row_index or down_row_index of these rows.",
        )


# Cached as tuples: a tensor could be written to, or be made fake by the mode that is active.


@functools.cache
def _shuffle(rows: int) -> tuple[int, ...]:
    return tuple(n // 32 * 32 + n % 8 * 4 + n % 32 // 8 for n in range(rows))


@functools.cache
def _gate_interleave(rows: int) -> tuple[int, ...]:
    return tuple(n // 2 + n % 2 * (rows // 2) for n in range(rows))


@functools.cache
def _up_gate(rows: int) -> tuple[int, ...]:
    return (*range(rows // 2, rows), *range(rows // 2))


@functools.cache
def _gate_up(rows: int) -> tuple[int, ...]:
    swap, alternate = _up_gate(rows), _gate_interleave(rows)
    return tuple(swap[alternate[n]] for n in _shuffle(rows))


def _tensor(index: Sequence[int]) -> torch.Tensor:
    return torch.tensor(index, dtype=torch.int64, device="cpu")
