"""`fp4moe bench --tune`: measure Triton's tiles and every kernel, and write what "auto" reads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import refuse
from ..experts import ExpertWeights
from ..formats import DEFAULT_FORMAT, FORMATS
from ..kernels import KERNELS, Layer, PreparedWeights, current_capability, measured
from ..kernels.measured import FEW_SLOTS
from ..kernels.operands import Call
from ..kernels.triton import kernel, w8a8
from ..kernels.triton.layout import SLAB
from ..kernels.triton.tiles import Config, Tile
from ..testing import random_codes, relative_error
from . import bench

__all__ = ["tune"]

_SIZES = ("gated", "hidden_size", "intermediate_size", "num_experts", "top_k")
RUNS = 5  # of the winner, which must agree bit for bit


def candidates(slots: int, more: int) -> tuple[list[Tile], list[Tile]]:
    """Tiles to try for gate and up, and for down, with so many slots a tile."""

    def tile(rows: int, slabs: int, warps: int, stages: int) -> Tile:
        return Tile(slots, rows, slabs, warps, stages, more)

    gate_up = [tile(r, 1, 4, s) for r in (32, 64, 128) for s in (3, 4, 5)]
    down = [tile(r, 1, 4, s) for r in (64, 128) for s in (3, 4, 5)]
    if slots <= 16:
        more_k = [tile(r, k, 4, s) for r in (32, 64, 128) for k, s in ((2, 3), (2, 5), (4, 3))]
        return gate_up + more_k, down + more_k
    if slots >= 64:
        wide = [tile(r, 1, 8, s) for r in (64, 128) for s in (3, 4)]
        return gate_up + wide, down + wide + [tile(256, 1, 8, s) for s in (2, 3)]
    return gate_up, down


def w8a8_candidates(slots: int, more: int) -> tuple[list[Tile], list[Tile]]:
    """The same for `triton_w8a8`, whose steps are 128 columns."""

    def tile(rows: int, warps: int, stages: int) -> Tile:
        return Tile(slots, rows, 2, warps, stages, more)

    stages = (3, 4, 5) if slots + more <= 128 else (3, 4)
    gate_up = [tile(r, 4, s) for r in (32, 64) for s in stages]
    down = [tile(r, 4, s) for r in (64, 128) for s in stages]
    if slots + more >= 64:
        gate_up += [tile(64, 8, s) for s in stages]
        down += [tile(128, 8, s) for s in stages]
    if slots + more >= 96:
        # What comes from L2 is the limit: the larger the tile, the less of it.
        gate_up += [tile(128, 8, s) for s in (3, 4)]
        down += [tile(256, 8, s) for s in (3, 4)]
    return gate_up, down


class Tuned(NamedTuple):
    """A kernel whose tiles are measured, and the entry of the file that they go to."""

    name: str
    entry: str
    candidates: Callable[[int, int], tuple[list[Tile], list[Tile]]]
    run_with: Callable[[Config, Call], torch.Tensor]


TUNED = (
    Tuned("triton", "tiles", candidates, kernel.run_with),
    Tuned("triton_w8a8", "w8a8_tiles", w8a8_candidates, w8a8.run_with),
)


def families(slots: int, num_experts: int) -> list[tuple[str, int, int]]:
    """(mode, slots a tile, further slots) worth a try for so many slots in all."""
    if slots <= FEW_SLOTS:
        return [("slot", 16, 0)]
    density = slots / num_experts
    sizes = [(n, 0) for n in (16, 32, 64, 128, 256)]
    sizes += [(32, 16), (64, 16), (64, 32), (64, 64), (128, 16), (128, 32), (128, 64)]
    # Larger tiles than about 100 slots need more registers than they save loads.
    low, high = min(density / 4, 96), max(density * 4, 16)
    return [("sorted", n, more) for n, more in sizes if low <= n + more <= high]


def compile_one(number: int, shape: Layer, config: Config) -> None:
    """Compile a config into Triton's cache, in a process of its own."""
    # 16 experts are a multiple of 16, as 128 are: the same specialisation.
    small = dataclasses.replace(shape, num_experts=16)
    tuned = TUNED[number]
    prepared = KERNELS[tuned.name].prepare(random_codes(small, "cuda"), hidden_alignment=256)
    x = torch.zeros(64, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
    ids, weights = bench.routing(small, 64, 0, 0.0)
    tuned.run_with(config, prepared.call(x, ids, weights))
    torch.cuda.synchronize()


def compile_all(number: int, shape: Layer, tokens: list[int], jobs: int) -> set[Config]:
    """Compile what will be measured, side by side; return what compiles and runs."""
    configs = set()
    for count in tokens:
        for mode, *size in families(count * bench.top_k(shape), shape.num_experts):
            gate_up, down = TUNED[number].candidates(*size)
            configs |= {Config(mode, tile, down[0]) for tile in gate_up}
            configs |= {Config(mode, gate_up[0], tile) for tile in down}
    scales = FORMATS[shape.format].scales
    if scales is not None and scales.dtype == torch.float32 and scales.columns is not None:
        # Such scales multiply a step's sum, which must not reach beyond a block.
        most = scales.columns // SLAB
        configs = {c for c in configs if max(c.gate_up.slabs, c.down.slabs) <= most}
    good = set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        started = {pool.submit(compile_one, number, shape, config): config for config in configs}
        for done in concurrent.futures.as_completed(started):
            if error := done.exception():
                print(f"left out: {started[done]}: {str(error).strip().splitlines()[:1]}")
            else:
                good.add(started[done])
    return good


def tune_tiles(
    number: int, name: str, tokens: list[int], jobs: int, format: str = DEFAULT_FORMAT
) -> dict[int, Config]:
    """Return the fastest config for each number of tokens; none where the kernel does not run.

    number: of TUNED.
    """
    shape = bench.shape_of(name, format)
    tuned = TUNED[number]
    if KERNELS[tuned.name].reasons_not_to_run(shape, current_capability()):
        return {}
    weights = random_codes(shape, "cuda")
    good = compile_all(number, shape, tokens, jobs)
    prepared = KERNELS[tuned.name].prepare(weights, hidden_alignment=256)
    tiles = {}
    for count in tokens:
        tiles[count] = tune_tokens(tuned, shape, count, prepared, weights, good)
        print(f"{name} {format} {tuned.name} T = {count}: {tiles[count]}", flush=True)
    return tiles


def tune_tokens(
    tuned: Tuned,
    shape: Layer,
    tokens: int,
    prepared: PreparedWeights,
    weights: ExpertWeights,
    good: set[Config],
) -> Config:
    """Return the fastest config: gate and up first, then down."""
    x = torch.randn(tokens, shape.hidden_size, dtype=torch.float32, device="cuda").bfloat16()
    count = bench.ROTATIONS if tokens <= 16 else 1
    routings = [bench.routing(shape, tokens, seed, 0.0) for seed in range(count)]
    calls = [prepared.call(x, *routed) for routed in routings]

    def us(config: Config) -> float:
        return bench.graph_us([functools.partial(tuned.run_with, config, call) for call in calls])

    best: tuple[float, Config] | None = None
    for mode, *size in families(tokens * bench.top_k(shape), shape.num_experts):
        gate_up, down = tuned.candidates(*size)
        first_gate_up = gate_up[0]
        gate_up = [tile for tile in gate_up if Config(mode, tile, down[0]) in good]
        down = [tile for tile in down if Config(mode, first_gate_up, tile) in good]
        if not gate_up or not down:
            continue
        first = min(gate_up, key=lambda tile: us(Config(mode, tile, down[0])))
        timed = [(us(config), config) for config in (Config(mode, first, tile) for tile in down)]
        best = min([*timed, *([best] if best else [])], key=lambda pair: pair[0])
    if best is None:
        what = f"no tiles can be chosen for {tokens} tokens"
        refuse("bench", what, "none of them compiles", "See the lines above.")
    runs = [tuned.run_with(best[1], calls[0]) for _ in range(RUNS)]
    own = KERNELS[tuned.name]
    error = relative_error(runs[0], bench.float32_result(x, weights, *routings[0], own))
    limit = bench.ROUNDED_LIMIT if own.quantizes_activations else bench.LIMIT
    if not error <= limit or not all(torch.equal(runs[0], other) for other in runs):
        what = f"{best[1]} cannot be measured"
        reason = f"its error is {error:.1e} with a limit of {limit}, or its runs differ"
        refuse("bench", what, reason, "Report this GPU and the versions.")
    return best[1]


def tune(
    names: list[str],
    tokens: list[int],
    output: str | None,
    jobs: int,
    formats: Sequence[str] = (DEFAULT_FORMAT,),
    kernels: Sequence[str] = (),
) -> int:
    """Measure and write; other layers and GPUs in the file stay. Returns 1 for a wrong result.

    Args:
        names: keys of bench.SHAPES.
        tokens: numbers of tokens to measure at.
        output: the file; default the user's own.
        jobs: processes that compile.
        formats: names of `fp4moe.formats.FORMATS`.
        kernels: which to measure; default all that run. The tiles of others stay as they were.

    Raises:
        UnsupportedError: there is no CUDA device, or nothing compiles.
    """
    bench.require_gpu()
    path = pathlib.Path(output) if output else measured.user_file()
    rows = json.loads(path.read_text())["measured"] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    # The kernels are then measured with the tiles just found.
    os.environ["FP4MOE_MEASURED"] = str(unfinished)
    wrong = False
    for name, format in itertools.product(names, formats):
        row = _describe(bench.shape_of(name, format))
        same = ("gpu", "capability", *_SIZES)
        earlier = [
            other
            for other in rows
            if all(other[key] == row[key] for key in same)
            and other.get("format", DEFAULT_FORMAT) == format
        ]
        rows = [other for other in rows if other not in earlier]
        rows.append(row)
        # Tiles for one token are not measured here.
        row |= {key: old[key] for old in earlier for key in ("one_token",) if key in old}
        for number, tuned in enumerate(TUNED):
            if kernels and tuned.name not in kernels:
                row |= {key: old[key] for old in earlier for key in (tuned.entry,) if key in old}
                continue
            found = tune_tiles(number, name, tokens, jobs, format)
            if found or tuned.entry == "tiles":
                row[tuned.entry] = {t: str(c) for t, c in found.items()}
        _write(unfinished, rows)
        timed = list(kernels) or bench.runnable(bench.shape_of(name, format))
        for result in bench.measure(name, timed, tokens, 0.0, False, format):
            what = f"{name} {format} T = {result['tokens']} {result['kernel']}"
            if result.get("wrong"):
                print(f"{what}: wrong result")
                wrong = True
                continue
            row["us"].setdefault(result["kernel"], {})[str(result["tokens"])] = result["us"]
            print(f"{what}: {result['us']} us", flush=True)
        _write(unfinished, rows)
    if wrong:
        print(f"not written, since a result was wrong: {path}")
        return 1
    unfinished.replace(path)
    print(f"written: {path}")
    return 0


def _describe(shape: Layer) -> dict[str, Any]:
    major, minor = current_capability() or (0, 0)
    sizes = {name: getattr(shape, name) for name in _SIZES}
    facts = bench.facts() | {"command": "fp4moe bench --tune"}
    return {
        "gpu": facts.pop("gpu"),
        "capability": f"{major}.{minor}",
        **sizes,
        "format": shape.format,
        "facts": facts,
        "us": {},
        "tiles": {},
    }


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"measured": rows}, indent=1) + "\n")
    measured.forget()
