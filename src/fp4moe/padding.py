"""Zero padding of byte matrices and its inverse; gate and up rows are padded each on their own.

A zero byte is a code of zero, or two, in every format, whatever its scale: padding is exact.
"""

from __future__ import annotations

import torch

from .errors import must

__all__ = ["check_bytes", "pad_matrix", "round_up", "trim_matrix"]


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not below size."""
    return -(-size // multiple) * multiple


def check_bytes(function: str, argument: str, tensor: torch.Tensor) -> None:
    """Raise ShapeError unless the tensor is uint8 with 3 axes."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 3:
        rule = "be torch.uint8 [L, R, C]"
        advice = "Stack the experts on axis 0 and view the bytes as torch.uint8."
        must(f"{function}: {argument}", rule, f"{tensor.dtype} {list(tensor.shape)}", advice)


def pad_matrix(tensor: torch.Tensor, rows: int, columns: int, halves: int = 1) -> torch.Tensor:
    """Zero-pad every expert's matrix at the end of each half's rows and of the columns.

    Args:
        tensor: uint8 [L, R, C], any strides.
        rows: rows of the result, all halves together.
        columns: columns of the result, in bytes.
        halves: equal parts that the rows consist of: 2 for stacked gate and up, otherwise 1.

    Returns:
        uint8 [L, rows, columns], contiguous, sharing no memory with tensor.

    Raises:
        ShapeError: tensor is not uint8 [L, R, C]; halves does not divide R and rows; rows or
            columns are below those of tensor.
    """
    _check_halves("pad_matrix", tensor, halves)
    experts, old_rows, old_columns = tensor.shape
    if rows % halves or rows < old_rows:
        rule = f"be a multiple of {halves} and at least {old_rows}"
        must("pad_matrix: rows", rule, rows, "Pass the padded rows of all halves together.")
    if columns < old_columns:
        rule = f"be at least {old_columns}"
        must("pad_matrix: columns", rule, columns, "Pass the padded columns in bytes.")
    out = torch.zeros((experts, rows, columns), dtype=torch.uint8, device=tensor.device)
    _corner(out, halves, old_rows, old_columns).copy_(_split(tensor, halves))
    return out


def trim_matrix(tensor: torch.Tensor, rows: int, columns: int, halves: int = 1) -> torch.Tensor:
    """Undo `pad_matrix`: keep the first rows of each half and the first columns.

    What is cut off is not looked at, since that would make the host wait for the device.

    Args:
        tensor: uint8 [L, R, C], any strides.
        rows: rows of the result, all halves together.
        columns: columns of the result, in bytes.
        halves: equal parts that the rows consist of, as for `pad_matrix`.

    Returns:
        uint8 [L, rows, columns], contiguous, sharing no memory with tensor.

    Raises:
        ShapeError: tensor is not uint8 [L, R, C]; halves does not divide R and rows; rows or
            columns are above those of tensor.
    """
    _check_halves("trim_matrix", tensor, halves)
    experts, old_rows, old_columns = tensor.shape
    if rows % halves or not 0 <= rows <= old_rows:
        rule = f"be a multiple of {halves} in 0 to {old_rows}"
        must("trim_matrix: rows", rule, rows, "Pass the unpadded rows of all halves together.")
    if not 0 <= columns <= old_columns:
        rule = f"lie in 0 to {old_columns}"
        must("trim_matrix: columns", rule, columns, "Pass the unpadded columns in bytes.")
    out = torch.empty((experts, rows, columns), dtype=torch.uint8, device=tensor.device)
    _split(out, halves).copy_(_corner(tensor, halves, rows, columns))
    return out


def _check_halves(function: str, tensor: torch.Tensor, halves: int) -> None:
    check_bytes(function, "tensor", tensor)
    if halves < 1 or tensor.shape[1] % halves:
        rule = f"divide the {tensor.shape[1]} rows of tensor"
        must(f"{function}: halves", rule, halves, "Pass 2 for stacked gate and up, otherwise 1.")


def _split(tensor: torch.Tensor, halves: int) -> torch.Tensor:
    return tensor.unflatten(1, (halves, tensor.shape[1] // halves))


def _corner(tensor: torch.Tensor, halves: int, rows: int, columns: int) -> torch.Tensor:
    return _split(tensor, halves)[:, :, : rows // halves, :columns]
