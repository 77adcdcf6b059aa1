"""What was measured: which kernel is the fastest on a GPU, and with which tiles Triton is.

`measured.json` is shipped; `fp4moe bench --tune` measures this machine's GPU and writes the same
into a file of the user's, which comes first. Nothing is measured on a user's call. The files are
read once; `forget` reads them again and makes every choice anew.

A layer is prepared for one kernel, which then serves every number of tokens: "auto" takes the one
with the lowest geometric mean over the numbers of tokens that all were measured at. The tiles are
looked up for each number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import refuse
from ..formats import DEFAULT_FORMAT
from ..layer import Layer
from .triton.tiles import (
    Config,
    OneToken,
    fitted,
    fitted_w8a8,
    parse_config,
    parse_one_token,
)

__all__ = [
    "SHIPPED",
    "Measured",
    "choose_one_token",
    "choose_tiles",
    "fastest",
    "forget",
    "measurements",
    "read",
    "times_forgotten",
    "user_file",
]

SHIPPED = pathlib.Path(__file__).with_name("measured.json")
# So few slots that each may have programs of its own: no sorting, experts are read once a slot.
FEW_SLOTS = 48


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layer on one GPU.

    Attributes:
        gpu, capability: its name and (major, minor).
        gated, hidden_size, intermediate_size, num_experts, top_k: of the layer.
        us: microseconds, by kernel and number of tokens.
        tiles: config of `triton` by number of tokens. w8a8_tiles: of `triton_w8a8`.
        facts: date, command and versions, as the file has them.
        format: of the weights; a file that does not name one means NVFP4.
        one_token: tiles of `one_token`, where it is faster for one token than `tiles`; or None.
    """

    gpu: str
    capability: tuple[int, int]
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    us: Mapping[str, Mapping[int, float]]
    tiles: Mapping[int, Config]
    facts: Mapping[str, Any]
    format: str = DEFAULT_FORMAT
    w8a8_tiles: Mapping[int, Config] = dataclasses.field(default_factory=dict)
    one_token: OneToken | None = None

    def distance(self, hidden_size: int, intermediate_size: int, num_experts: int) -> float:
        """How unlike a layer is: 0 for equal sizes."""
        size = hidden_size * intermediate_size / (self.hidden_size * self.intermediate_size)
        return abs(math.log2(size)) + abs(math.log2(num_experts / self.num_experts))


def user_file() -> pathlib.Path:
    """Return where this user's measurements are: FP4MOE_MEASURED, or a file in the cache folder."""
    if named := os.environ.get("FP4MOE_MEASURED"):
        return pathlib.Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fp4moe" / "measured.json"


def read(path: pathlib.Path) -> list[Measured]:
    """Read a file of measurements.

    Raises:
        UnsupportedError: it is not such a file.
    """
    try:
        rows = json.loads(path.read_text())["measured"]
        return [_from_json(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the measurements in {path} cannot be read"
        advice = "Measure again with fp4moe bench --tune, or delete the file."
        refuse("FP4MOE_MEASURED", what, f"of {error!r}", advice, cause=error)


def _from_json(row: Mapping[str, Any]) -> Measured:
    sizes = ("gated", "hidden_size", "intermediate_size", "num_experts", "top_k")
    major, minor = row["capability"].split(".")
    return Measured(
        gpu=row["gpu"],
        capability=(int(major), int(minor)),
        **{name: row[name] for name in sizes},
        us={
            kernel: {int(t): float(us) for t, us in by_tokens.items()}
            for kernel, by_tokens in row["us"].items()
        },
        tiles=_tiles(row["tiles"]),
        facts=row["facts"],
        format=row.get("format", DEFAULT_FORMAT),
        w8a8_tiles=_tiles(row.get("w8a8_tiles", {})),
        one_token=parse_one_token(row["one_token"]) if "one_token" in row else None,
    )


def _tiles(row: Mapping[str, str]) -> dict[int, Config]:
    return {int(tokens): parse_config(text) for tokens, text in row.items()}


@functools.cache
def measurements() -> tuple[Measured, ...]:
    """Return the user's measurements and behind them the shipped ones."""
    own = user_file()
    return (*(read(own) if own.exists() else ()), *read(SHIPPED))


_times_forgotten = 0


def forget() -> None:
    """Forget what was read and chosen, after a file or FP4MOE_MEASURED has changed."""
    global _times_forgotten
    measurements.cache_clear()
    choose_tiles.cache_clear()
    choose_one_token.cache_clear()
    _times_forgotten += 1


def times_forgotten() -> int:
    """Return how often `forget` was called: a choice made under another number is void."""
    return _times_forgotten


def fastest(kernels: Sequence[str], layer: Layer, capability: tuple[int, int] | None) -> str:
    """Return the kernel to take among those that can run this, in order of preference.

    The first, unless it was measured on this capability and another one was faster there. The first
    too while a graph is traced: dynamo cannot trace the reading of a file.
    """
    if len(kernels) == 1 or torch.compiler.is_compiling():
        return kernels[0]
    found = [m for m in measurements() if m.capability == capability]
    found = [m for m in found if m.gated == layer.gated and kernels[0] in m.us]
    found = [m for m in found if m.format == layer.format]
    if not found:
        return kernels[0]
    sizes = layer.hidden_size, layer.intermediate_size, layer.num_experts
    nearest = min(found, key=lambda m: m.distance(*sizes))
    rivals = [kernel for kernel in kernels if kernel in nearest.us]
    tokens = set.intersection(*(set(nearest.us[kernel]) for kernel in rivals))
    if not tokens:
        return kernels[0]
    return min(rivals, key=lambda k: sum(math.log(nearest.us[k][t]) for t in sorted(tokens)))


@functools.lru_cache(maxsize=4096)
def choose_tiles(
    capability: tuple[int, int] | None,
    gated: bool,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_slots: int,
    format: str = DEFAULT_FORMAT,
    w8a8: bool = False,
) -> Config:
    """Return Triton's config: of the nearest layer, this GPU's if measured, at the nearest load.

    A format that was not measured takes that of NVFP4, where it fits (see `tiles.fitted`), with
    `triton_w8a8` that of another FP8 format.

    Args:
        capability: of the GPU; None in Triton's interpreter.
        gated, hidden_size, intermediate_size, num_experts: of the layer, sizes padded or not.
        num_slots: entries of expert_ids.
        format: of the weights. w8a8: for `triton_w8a8` instead of `triton`.
    """
    tiles = operator.attrgetter("w8a8_tiles" if w8a8 else "tiles")
    found = [m for m in measurements() if tiles(m)]
    own = [m for m in found if m.format == format]
    found = own or [m for m in found if w8a8 or m.format == DEFAULT_FORMAT]
    nearest = min(
        found,
        key=lambda m: (
            m.gated != gated,
            m.capability != capability,
            m.distance(hidden_size, intermediate_size, num_experts),
        ),
    )

    def unlike(item: tuple[int, Config]) -> tuple[bool, float]:
        tokens, config = item
        slots = tokens * nearest.top_k
        if num_slots <= FEW_SLOTS:
            return config.mode != "slot", abs(math.log2(num_slots / slots))
        density = num_slots / num_experts * nearest.num_experts / slots
        return config.mode == "slot", abs(math.log2(density))

    config = min(tiles(nearest).items(), key=unlike)[1]
    if w8a8:
        return config if nearest.capability == capability else fitted_w8a8(config, gated)
    return config if own else fitted(config, format, gated)


@functools.lru_cache(maxsize=4096)
def choose_one_token(
    capability: tuple[int, int] | None,
    gated: bool,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    format: str = DEFAULT_FORMAT,
) -> OneToken | None:
    """Return the tiles with which `one_token` runs one token; None where `choose_tiles` is faster.

    Only where that was measured: on this capability, with this format and form of layer, and with
    at least as many weights a token. What it saves is launches and waiting, while more weights take
    longer than with other tiles. The arguments are those of `choose_tiles`.
    """

    def weights(layer: Measured) -> int:
        return layer.top_k * layer.hidden_size * layer.intermediate_size

    least, found = top_k * hidden_size * intermediate_size, []
    for m in measurements():
        same = m.capability == capability and m.format == format and m.gated == gated
        if m.one_token is not None and same and weights(m) >= least:
            distance = m.distance(hidden_size, intermediate_size, num_experts)
            found.append((distance, m.one_token))
    if not found:
        return None
    tiles = min(found, key=lambda pair: pair[0])[1]
    return tiles if tiles.fits(hidden_size, intermediate_size, top_k) else None
