"""Part: which of a layer's experts, or of its intermediate columns, one process holds.

The outputs of all parts of a layer sum to the whole. Intermediate columns are cut at the borders of
a format's blocks, so that every block keeps its scale and its codes. Linears are split by rows or
by columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from .errors import must
from .experts import ExpertWeights
from .formats import FORMATS
from .formats.base import Part as Grid
from .padding import round_up
from .resize import block_multiple

__all__ = ["COLUMNS", "EXPERTS", "INTERMEDIATE", "ROWS", "Part", "part_of_experts"]
__all__ += ["part_of_intermediate", "whole_count"]

EXPERTS, INTERMEDIATE = "experts", "intermediate columns"
# Of a Linear.
ROWS, COLUMNS = "output rows", "input columns"


@dataclasses.dataclass(frozen=True)
class Part:
    """Entries start to stop - 1 of `total`: part number `index` of `count`.

    Attributes:
        kind: EXPERTS or INTERMEDIATE; of a Linear ROWS or COLUMNS.
        total: experts of the layer, or its intermediate size without padding; sizes of a Linear.
    """

    kind: str
    index: int
    count: int
    start: int
    stop: int
    total: int

    def __str__(self) -> str:
        last = min(self.stop, self.total) - 1
        where = f"{self.start} to {last}" if last > self.start else f"{self.start}"
        return f"{self.kind} {where} of {self.total} (part {self.index + 1} of {self.count})"

    @property
    def size(self) -> int:
        """Entries, without padding."""
        return min(self.stop, self.total) - self.start

    def cut(self, weights: ExpertWeights) -> ExpertWeights:
        """Return this part of the weights of a whole layer, in memory of its own."""
        cut = weights.slice_experts if self.kind == EXPERTS else weights.slice_intermediate
        found = cut(self.start, self.stop)
        tensors = {name: t.clone() for name, t in found.tensors().items()}
        return ExpertWeights.from_tensors(tensors, found.metadata())

    def cut_stored(self, tensor: torch.Tensor, grid: Grid, *, down: bool = False) -> torch.Tensor:
        """Return a view of this part of a matrix [E, N, K] as `grid` stores it.

        down: whether the intermediate columns are its contraction axis.
        """
        if self.kind == EXPERTS:
            # One for all experts is not cut.
            return tensor[self.start : self.stop] if tensor.shape[0] == self.total else tensor
        down = down or self.kind == COLUMNS
        covered = grid.columns if down else grid.rows
        if covered is None:
            return tensor
        found = slice(self.start // covered, -(-self.stop // covered))
        return tensor[..., found] if down else tensor[:, found]


def whole_count(num_experts: int, parts: Iterable[Part]) -> int:
    """Return the experts of the whole layer, of which a module counts its own."""
    return next((part.total for part in parts if part.kind == EXPERTS), num_experts)


def part_of_experts(index: int, count: int, num_experts: int, *, caller: str) -> Part:
    """Return part `index` of `count` equal ranges of experts.

    Raises:
        ShapeError: they do not divide.
    """
    if num_experts % count:
        must(
            f"{caller}: the number of processes that share the experts",
            f"divide the {num_experts} experts of a layer",
            count,
            "Use as many processes as divide them.",
        )
    size = num_experts // count
    return Part(EXPERTS, index, count, index * size, (index + 1) * size, num_experts)


def part_of_intermediate(index: int, count: int, size: int, format: str, *, caller: str) -> Part:
    """Return part `index` of `count` ranges of the intermediate columns, in whole blocks.

    The first parts have one block more where the blocks do not divide.

    Raises:
        ShapeError: there are fewer blocks than parts.
    """
    multiple = block_multiple(format)
    blocks = -(-size // multiple)
    if blocks < count:
        must(
            f"{caller}: the number of processes that share the intermediate size {size}",
            f"be at most {blocks}, its blocks of {multiple} in {format}",
            count,
            "Use fewer processes, or share the experts (ep_size).",
        )
    each, more = divmod(blocks, count)
    start = index * each + min(index, more)
    stop = start + each + (index < more)
    padded = round_up(size, FORMATS[format].multiple)
    ends = start * multiple, min(stop * multiple, padded)
    return Part(INTERMEDIATE, index, count, *ends, size)
