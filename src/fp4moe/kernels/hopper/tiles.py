"""How the GEMMs of kernel `hopper` are cut, and which tile serves a number of slots.

A rule, not a table: it was fitted to measurements of layers like Gemma4's and Nemotron's on one
H200 (benchmarks/results/h200_hopper.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math

__all__ = ["LEAST_DENSITY", "HopperTile", "choose_tile", "shared_bytes"]

# Slots an expert, on average: below, the Triton kernels are as fast or faster.
LEAST_DENSITY = 24
# A tile costs as much as its slots and this many more: its weights are decoded once.
TILE_COST = 80
# Few, since each is compiled at its first use. More sums than these do not fit into registers.
SLOTS = (32, 48, 64, 80, 96, 112, 128, 144, 152, 160)
MOST_STAGES = 8
# With three groups a thread has 160 registers: sums of so many slots fit.
MOST_SLOTS_OF_THREE = 80
SHARED_BYTES = 227 * 1024


@dataclasses.dataclass(frozen=True)
class HopperTile:
    """How a GEMM is cut.

    Attributes:
        slots: most slots of a work item, a multiple of 8.
        groups: groups of four warps that multiply, 2 or 3; each has 128 weight rows.
        stages: slabs of 64 columns that are on their way at once.
    """

    slots: int
    groups: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block: one group more, which loads."""
        return 128 * (self.groups + 1)

    def __str__(self) -> str:
        return f"{self.slots},{self.groups},{self.stages}"


def shared_bytes(tile: HopperTile, words: int, scale_bytes: int, gate_up: bool, gated: bool) -> int:
    """Return the shared memory of a block, as `gemm.cu` lays it out.

    Args:
        words, scale_bytes: of the format, see `source.Decoding`.
        gate_up: the first GEMM. gated: whether the layer has a gate.
    """
    weights = tile.groups * 2 * (64 * 16 * words + 64 * scale_bytes)
    staged = tile.groups * tile.slots * ((64 if gated and gate_up else 128) * 2 + 16)
    factors = 0 if gate_up else tile.groups * 4 * (-(-tile.slots // 128) * 128)
    return tile.stages * (tile.slots * 128 + weights) + staged + factors + 16 * tile.stages


@functools.lru_cache(maxsize=4096)
def choose_tile(
    density: float, words: int, scale_bytes: int, gate_up: bool, gated: bool
) -> HopperTile:
    """Return the tile for a density of slots an expert; the other arguments as `shared_bytes`."""
    slots = min(SLOTS, key=functools.partial(_cost, density))
    groups = 3 if slots <= MOST_SLOTS_OF_THREE else 2
    for stages in range(MOST_STAGES, 1, -1):
        tile = HopperTile(slots, groups, stages)
        if shared_bytes(tile, words, scale_bytes, gate_up, gated) <= SHARED_BYTES:
            return tile
    raise AssertionError("two stages of the largest tile fit")


def _cost(density: float, slots: int) -> float:
    """Tiles that an expert needs on average, times what one costs.

    An expert's slots are taken as normal with the variance of a Poisson distribution.
    """
    spread = math.sqrt(2 * density)
    tiles = sum(
        0.5 * math.erfc((full * slots + 0.5 - density) / spread)
        for full in range(math.ceil((density + 4 * spread) / slots))
    )
    return tiles * (slots + TILE_COST)
