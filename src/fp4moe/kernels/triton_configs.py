"""Tile sizes of the Triton kernels, as data; which serve a call is looked up in `measured`.

A slot is one entry of expert_ids.
"""

from __future__ import annotations

import dataclasses

from ..errors import UnsupportedError

__all__ = ["MODES", "Config", "Tile", "parse_config"]

MODES = ("slot", "scan", "sorted")
# Mode "scan" holds all ids in registers.
MOST_SCANNED = 512
FLAGS = ("direct", "float32_partial")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program of a GEMM.

    Attributes:
        slots: tokens on the N side: 16, 32, 64, 128 or 256.
        rows: weight rows, of gate and of up each: 16 to 128. wgmma needs 64 in all and 4 warps.
        slabs: 64 columns of K each: 1, 2 or 4.
        warps, stages: as Triton's num_warps and num_stages.
    """

    slots: int
    rows: int
    slabs: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return ",".join(map(str, dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to run a layer.

    Attributes:
        mode: how programs find their slots, see `triton_experts`.
        gate_up, down: the GEMMs' tiles.
        direct: the second GEMM sums a token's slots itself; down.slots must reach top_k then.
        float32_partial: else the slots' outputs are rounded to bfloat16 before their sum.
    """

    mode: str
    gate_up: Tile
    down: Tile
    direct: bool = False
    float32_partial: bool = False

    def __str__(self) -> str:
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        return " ".join([self.mode, str(self.gate_up), str(self.down), *flags])


def parse_config(text: str) -> Config:
    """Return the config that `str` wrote.

    Raises:
        UnsupportedError: it is no such text.
    """
    config = None
    try:
        mode, gate_up, down, *flags = text.split()
        tiles = [Tile(*map(int, part.split(","))) for part in (gate_up, down)]
        config = Config(mode, tiles[0], tiles[1], *(flag in flags for flag in FLAGS))
    except (TypeError, ValueError):
        pass  # said below
    if config is None or config.mode not in MODES or str(config) != text:
        raise UnsupportedError(
            "parse_config: text must be a mode, two tiles of five numbers, and flags, as in "
            f"'sorted 16,64,1,4,4 16,128,1,4,4'; got {text!r}. Measure again with fp4moe bench "
            "--tune."
        )
    return config
