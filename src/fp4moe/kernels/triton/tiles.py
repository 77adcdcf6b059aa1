"""Tile sizes of the Triton kernels, as data; which serve a call is looked up in `measured`.

A slot is one entry of expert_ids.
"""

from __future__ import annotations

import dataclasses

__all__ = ["MODES", "Config", "Tile", "fitted", "fitted_w8a8", "parse_config"]

MODES = ("slot", "sorted", "few")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program of a GEMM.

    Attributes:
        slots: tokens on the N side: 16, 32, 64, 128 or 256.
        rows: weight rows, of gate and of up each: 16 to 256. wgmma needs 64 in all and 4 warps.
        slabs: 64 columns of K each: 1, 2 or 4.
        warps, stages: as Triton's num_warps and num_stages.
        more: further slots beside the power of two: 0, 16, 32 or 64; in mode "sorted" only.

    In mode "few" slots is 1; rows, 8 to 64 and gated 32 at most, are a power of two of sixteen
    lines of gate, up or down; slabs are loaded at once, any number of them; warps are the chunks
    of K, 4, 8 or 16; stages 2 unrolls the loop; and more 1 of down lets it begin while gate and up
    still run.
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


# Shared memory of a program that every target has: 8.6, 8.9 and 12.0 no more.
SHARED_BYTES = 99 * 1024


def fitted(config: Config, format: str, gated: bool) -> Config:
    """Return a config that was measured with NVFP4, as another format can run it.

    Codes of eight bits take twice the shared memory. fp8_block keeps the sum of each 128 columns
    apart: as many registers again, and no more than two slabs.
    """

    def fit(tile: Tile, parts: int) -> Tile:
        rows, slabs, slots = parts * tile.rows, tile.slabs, tile.slots
        if config.mode == "few":
            # What is loaded at once is in registers, and codes of eight bits take twice as many.
            halved = slabs if format == "mxfp4" else (slabs + 1) // 2
            return dataclasses.replace(tile, slabs=halved)
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
