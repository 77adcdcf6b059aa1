"""Tile sizes of the Triton kernels, as data; which serve a call is looked up in `measured`.

A slot is one entry of expert_ids.
"""

from __future__ import annotations

import dataclasses

__all__ = ["MODES", "Config", "OneToken", "OneTokenTile", "Tile", "fitted", "fitted_w8a8"]
__all__ += ["parse_config", "parse_one_token"]

MODES = ("slot", "sorted")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program of a GEMM.

    Attributes:
        slots: tokens on the N side: 16, 32, 64, 128 or 256.
        rows: weight rows, of gate and of up each: 16 to 256. wgmma needs 64 in all and 4 warps.
        slabs: 64 columns of K each: 1, 2 or 4.
        warps, stages: as Triton's num_warps and num_stages.
        more: further slots beside the power of two: 0, 16, 32 or 64; in mode "sorted" only.
    """

    slots: int
    rows: int
    slabs: int
    warps: int
    stages: int
    more: int = 0

    def __str__(self) -> str:
        return ",".join(map(str, dataclasses.astuple(self)[: None if self.more else -1]))


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to run a layer.

    Attributes:
        mode: how programs find their slots, see `gemm`.
        gate_up, down: the GEMMs' tiles.
    """

    mode: str
    gate_up: Tile
    down: Tile

    def __str__(self) -> str:
        return f"{self.mode} {self.gate_up} {self.down}"


@dataclasses.dataclass(frozen=True)
class OneTokenTile:
    """One program of `one_token_gemm`.

    Attributes:
        rows: weight rows, of gate and of up each: 16 or 32.
        slabs: 64 columns of K each, loaded together.
        warps: each has a chunk of K for itself: 4 or 8.
    """

    rows: int
    slabs: int
    warps: int

    def __str__(self) -> str:
        return ",".join(map(str, dataclasses.astuple(self)))


# Slabs of a chunk, which are unrolled: so many were measured.
MOST_UNROLLED = 22


@dataclasses.dataclass(frozen=True)
class OneToken:
    """How `one_token` runs a layer: the tiles of its two launches."""

    gate_up: OneTokenTile
    down: OneTokenTile

    def __str__(self) -> str:
        return f"{self.gate_up} {self.down}"

    def fits(self, hidden_size: int, intermediate_size: int, top_k: int) -> bool:
        """Whether programs can be made for these sizes, padded or not."""
        slabs = (-(-hidden_size // 64), top_k * -(-intermediate_size // 64))
        warps = (self.gate_up.warps, self.down.warps)
        chunks = (-(-s // w) for s, w in zip(slabs, warps, strict=True))
        return top_k <= self.down.warps and max(chunks) <= MOST_UNROLLED


# Shared memory of a program that every target has: 8.6, 8.9 and 12.0 no more.
SHARED_BYTES = 99 * 1024


def fitted(config: Config, format: str, gated: bool) -> Config:
    """Return a config that was measured with NVFP4, as another format can run it.

    Codes of eight bits take twice the shared memory. fp8_block keeps the sum of each 128 columns
    apart: as many registers again, and no more than two slabs.
    """

    def fit(tile: Tile, parts: int) -> Tile:
        rows, slabs, slots = parts * tile.rows, tile.slabs, tile.slots
        if format == "fp8_block":
            slabs = min(slabs, 2)
            # At most 80 values a thread in each sum: a second program an SM needs registers, too.
            while rows * (slots + tile.more) > 80 * 32 * tile.warps and slots > 16:
                slots //= 2
        code_bytes = 32 if format in ("nvfp4", "mxfp4") else 64
        weights, tokens = slabs * rows * (code_bytes + 4), slabs * (slots + tile.more) * 128
        # Triton holds one step less of weights than of tokens.
        stages = max(1, min(tile.stages, (SHARED_BYTES + weights) // (weights + tokens)))
        return dataclasses.replace(tile, slots=slots, slabs=slabs, stages=stages)

    if format == "nvfp4":
        return config
    return Config(config.mode, fit(config.gate_up, 1 + gated), fit(config.down, 1))


def fitted_w8a8(config: Config, gated: bool) -> Config:
    """Return a config of `triton_w8a8` that was measured on Hopper, as every target can run it."""

    def fit(tile: Tile, parts: int) -> Tile:
        step = 64 * tile.slabs * (parts * tile.rows + tile.slots + tile.more)
        return dataclasses.replace(tile, stages=max(1, min(tile.stages, SHARED_BYTES // step)))

    return Config(config.mode, fit(config.gate_up, 1 + gated), fit(config.down, 1))


def parse_config(text: str) -> Config:
    """Return the config that `str` wrote.

    Raises:
        ValueError: it is no such text.
    """
    config = None
    try:
        mode, *tiles = text.split()
        gate_up, down = (Tile(*map(int, tile.split(","))) for tile in tiles)
        config = Config(mode, gate_up, down)
    except (TypeError, ValueError):
        pass  # said below
    if (
        config is None
        or config.mode not in MODES
        or str(config) != text
        or (config.mode == "slot" and (config.gate_up.more or config.down.more))
    ):
        example = "sorted 16,64,1,4,4 64,128,1,4,4,16"
        raise ValueError(f"{text!r} is no mode with two tiles, as in {example!r}")
    return config


def parse_one_token(text: str) -> OneToken:
    """Return the tiles that `str` wrote.

    Raises:
        ValueError: it is no such text.
    """
    found = None
    try:
        gate_up, down = (OneTokenTile(*map(int, tile.split(","))) for tile in text.split(" "))
        found = OneToken(gate_up, down)
    except (TypeError, ValueError):
        pass  # said below
    if (
        found is None
        or str(found) != text
        or any(t.rows not in (16, 32) for t in (found.gate_up, found.down))
        or any(t.warps not in (4, 8) or t.slabs < 1 for t in (found.gate_up, found.down))
    ):
        raise ValueError(f"{text!r} is no pair of tiles, as in '16,3,4 32,3,8'")
    return found
