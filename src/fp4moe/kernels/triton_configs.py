"""Tile sizes of the Triton kernels, as data: which for how many slots, and how many per expert.

A slot is one entry of expert_ids. First guesses for an H200, not measured yet: tune them with
benchmarks/bench_moe.py.
"""

from __future__ import annotations

import dataclasses

__all__ = ["MODES", "TABLE", "Config", "Tile", "choose_config", "sort_chunk"]

MODES = ("slot", "scan", "sorted")
# Mode "scan" holds all ids in registers.
MOST_SCANNED = 512


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program of a GEMM.

    Attributes:
        slots: tokens on the N side: 16, 32, 64 or 128.
        rows: weight rows, of gate and of up each: 16, 32, 64 or 128. wgmma needs 64 and 4 warps.
        slabs: 64 columns of K each: 1, 2 or 4.
        warps, stages: as Triton's num_warps and num_stages.
    """

    slots: int
    rows: int
    slabs: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to run a layer.

    Attributes:
        mode: how programs find their slots, see `triton_experts`.
        gate_up, down: the GEMMs' tiles.
        direct: the second GEMM sums a token's slots itself; down.slots must reach top_k then.
        float32_partial: else the slots' outputs are rounded to bfloat16 before their sum.
        registers: most registers a thread, 0 for the compiler's choice.
    """

    mode: str
    gate_up: Tile
    down: Tile
    direct: bool = False
    float32_partial: bool = False
    registers: int = 0


_DECODE = Config("slot", Tile(16, 64, 4, 4, 3), Tile(16, 128, 1, 4, 4))
_SPARSE = Config("sorted", Tile(16, 64, 1, 4, 4), Tile(16, 128, 1, 4, 4))
# (most slots, most slots per expert, config), the first that fits.
TABLE: tuple[tuple[float, float, Config], ...] = (
    (40, float("inf"), _DECODE),
    (float("inf"), 10, _SPARSE),
    (float("inf"), 40, Config("sorted", Tile(32, 64, 1, 4, 4), Tile(32, 128, 1, 4, 4))),
    (float("inf"), 128, Config("sorted", Tile(64, 64, 1, 4, 4), Tile(64, 64, 1, 4, 4))),
    (
        float("inf"),
        float("inf"),
        Config("sorted", Tile(128, 64, 1, 4, 4), Tile(128, 64, 1, 4, 4)),
    ),
)


def choose_config(num_slots: int, num_experts: int, top_k: int) -> Config:
    """Return the row of TABLE for a call, with room for top_k where the sum is direct."""
    per_expert = num_slots / num_experts
    config = next(c for most, dense, c in TABLE if num_slots <= most and per_expert <= dense)
    if config.direct and config.down.slots < top_k:
        return dataclasses.replace(config, down=dataclasses.replace(config.down, slots=32))
    return config


def sort_chunk(num_slots: int) -> int:
    """Return how many ids the sort reads at once."""
    return min(4096, max(128, 1 << (num_slots - 1).bit_length()))
