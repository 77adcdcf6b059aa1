"""Quantised Linears on this GPU against bfloat16, checked, in microseconds.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --tune --formats nvfp4 --tokens 1 16 256
    python benchmarks/bench_linear.py --tune --near --seconds 110

A time is the median of replays of a CUDA graph that goes through copies of the weight, more than
the L2 cache holds. Every result is compared with float32 on the same values before its time is
printed. floor: the bytes of codes and scales at the speed of a copy on this card, or the operations
at that of a large bfloat16 product. From 256 tokens on both ways are timed, decoding in registers
and a decoded copy.
--tune prints the fastest tiles instead, best first; with --near only those that differ from the
rule's in one number, at the tokens and formats that the rule was not measured with, and with
--seconds it begins nothing that ends later and says what is left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import sys
import time

import torch
import torch.nn.functional as F

from fp4moe.formats import FORMATS
from fp4moe.formats.base import as_bytes
from fp4moe.kernels.linear_weight import LinearWeight
from fp4moe.kernels.triton.linear import (
    LinearTile,
    choose_tile,
    decode_weight,
    processors,
    run_with_tile,
    to_prepared,
)
from fp4moe.layer import Layer
from fp4moe.testing import random_codes, relative_error
from fp4moe.tools.card import card_rates, graph_us

SHAPES = ("8192x2816", "2816x4096", "10304x2688")
TOKENS = (1, 16, 256, 1024, 4096)
NEAR_TOKENS = (5, 8, 12, 15, 65, 96, 160, 256, 384, 511, 768, 1023)
NEAR_FORMATS = ("nvfp4", "fp8", "fp8_block", "mxfp8")
BOTH_FROM = 256
CACHE = 120e6  # bytes that a graph goes through
# Rounding of the output, and of the decoded copy: 2^-8 each at most, relative.
LIMIT = 2 * 2.0**-8


def sizes(shape: str) -> tuple[int, int]:
    """Return rows and columns of the weight."""
    rows, columns = map(int, shape.split("x"))
    return rows, columns


def make(shape: str, format: str) -> tuple[LinearWeight, torch.Tensor]:
    """Return random weights as the kernel reads them, and their values in float32."""
    rows, columns = sizes(shape)
    layer = Layer("silu", False, columns, rows, 1, format=format)
    stored = random_codes(layer, "cuda").gate_up
    values = FORMATS[format].dequantize(stored, torch.float32)[0]
    scale = as_bytes(stored.block_scale[0])
    scale = scale.reshape(()) if format == "fp8" else scale
    prepared = to_prepared(format, as_bytes(stored.packed[0]), scale)
    global_scale = stored.global_scale.reshape(-1)
    return LinearWeight(*prepared, global_scale, format, rows, columns), values


def rotated(weight: LinearWeight, tokens: int) -> list[LinearWeight]:
    """Copies of a weight, more than the cache holds."""
    count = min(int(CACHE // weight.packed.nbytes) + 1, 16 if tokens < BOTH_FROM else 3)
    return [
        weight._replace(packed=weight.packed.clone(), block_scale=weight.block_scale.clone())
        for _ in range(count)
    ]


def copied(x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
    """Multiply with a decoded copy."""
    return F.linear(x, decode_weight(weight, x.dtype))


def checked_us(call, weights: list[LinearWeight], expected: torch.Tensor) -> float:
    """Return microseconds of a call with each weight by turns; NaN, with a line, if wrong."""
    got = call(weight=weights[0])
    error = relative_error(got, expected)
    if not error <= LIMIT or not torch.equal(got, call(weight=weights[0])):
        print(f"wrong: error {error:.1e}, or runs differ: {call}")
        return float("nan")
    return graph_us([functools.partial(call, weight=weight) for weight in weights])


def candidates(tokens: int) -> list[LinearTile]:
    """Tiles worth a try."""
    if tokens <= 16:
        slots = max(1, 1 << (tokens - 1).bit_length())
        found = [
            LinearTile(s, c, r, k, 4, stages, splits)
            for s in {slots, 16}
            for c in (1, 2, 4, 8, 16)
            for r in {max(1, 64 // c), max(1, 128 // c)}
            for k, stages in ((1, 3), (1, 5), (2, 3), (2, 4), (4, 2))
            for splits in ((1,) if c > 2 else (1, 2, 4))
            if 16 <= s * c <= 64
        ]
        return found
    slots = [s for s in (16, 32, 64, 128, 256) if s <= 2 * tokens]
    return [
        LinearTile(s, c, r, k, warps, stages, splits)
        for s in slots
        for c, r in ((1, 64), (1, 128), (2, 32), (2, 64), (4, 16))
        for k, stages in ((1, 3), (1, 4), (2, 3))
        for warps in (4, 8)
        for splits in (1, 2, 3, 4)
        if s * c <= 256
        and (warps == 4 or s * c * c * r >= 64 * 128)
        and (warps == 8 or s * c * c * r <= 128 * 128)
        and (splits == 1 or tokens <= 512)
        and (k == 1 or s * c <= 64)
        and s * 8 >= tokens
    ]


def near(tile: LinearTile, tokens: int) -> list[LinearTile]:
    """Return a tile, and those that differ from it in one number and can run."""
    steps: dict[str, tuple[int, ...]] = {
        "slots": (tile.slots * 2, tile.slots // 2),
        "rows": (tile.rows * 2, tile.rows // 2),
        "slabs": (tile.slabs * 2, tile.slabs // 2),
        "warps": (12 - tile.warps,),
        "stages": (tile.stages + 1, tile.stages - 1),
        "splits": (tile.splits + 1, tile.splits - 1, tile.splits * 2),
    }
    found = [tile]
    found += [dataclasses.replace(tile, **{k: v}) for k, values in steps.items() for v in values]
    # More pieces of K side by side, of fewer rows.
    found += [
        dataclasses.replace(tile, chunks=tile.chunks * 2, rows=tile.rows // 2),
        dataclasses.replace(tile, chunks=tile.chunks // 2, rows=tile.rows * 2),
    ]
    return [
        t
        for t in dict.fromkeys(found)
        if min(t.slots, t.chunks, t.rows, t.slabs, t.splits) >= 1
        and 16 <= t.slots * t.chunks <= 256
        and 64 <= t.rows * t.chunks <= 128
        and t.slabs <= 4
        and 2 <= t.stages <= 5
        and (t.splits == 1 or t.splits * tokens <= 4096)
    ]


def compile_one(tile: LinearTile, shape: str, format: str) -> None:
    """Compile a tile into Triton's cache, in a process of its own."""
    weight, _ = make(shape, format)
    run_with_tile(tile, torch.zeros(1, weight.columns, device="cuda").bfloat16(), weight, None)
    torch.cuda.synchronize()


Work = list[tuple[LinearTile, str]]


def compile_all(work: Work, format: str, jobs: int, deadline: float) -> None:
    """Compile side by side; a tile that does not compile is left out when it is timed."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        # The count of splits is no constant, but whether there are any is.
        unique = {(str(t).rpartition(",")[0], min(t.splits, 2), shape): (t, shape)
                  for t, shape in work}  # fmt: skip
        started = [pool.submit(compile_one, tile, shape, format) for tile, shape in unique.values()]
        left = deadline - time.perf_counter()
        concurrent.futures.wait(started, max(left, 0) if math.isfinite(left) else None)
        pool.shutdown(cancel_futures=True)


def tune(given: argparse.Namespace) -> None:
    """Print the fastest tiles of each shape, format and number of tokens."""
    end = time.perf_counter() + (given.seconds or math.inf)
    for number, format in enumerate(given.formats):
        now = time.perf_counter()
        # What is left is shared by the formats that are left; half of it may compile.
        deadline = now + (end - now) / (len(given.formats) - number)
        rule = {
            (shape, count): choose_tile(count, *sizes(shape), processors(torch.device("cuda")))
            for shape in given.shapes
            for count in given.tokens
        }
        tiles = {
            case: near(tile, case[1]) if given.near else list({tile, *candidates(case[1])})
            for case, tile in rule.items()
        }
        work = [(tile, case[0]) for case, each in tiles.items() for tile in each]
        compile_all(work, format, given.jobs, now + (deadline - now) / 2)
        left = []
        for shape in given.shapes:
            weight, values = make(shape, format)
            for count in given.tokens:
                if time.perf_counter() > deadline:
                    left.append(f"{shape} T = {count}")
                    continue
                x = torch.randn(count, weight.columns, device="cuda").bfloat16()
                expected, weights = x.float() @ values.T, rotated(weight, count)
                timed = []
                for tile in tiles[shape, count]:
                    if time.perf_counter() > deadline:
                        left.append(f"{shape} T = {count} {tile}")
                        continue
                    try:
                        call = functools.partial(run_with_tile, tile, x, bias=None)
                        timed.append((checked_us(call, weights, expected), str(tile)))
                    except Exception as error:
                        print(f"left out: {tile}: {str(error).strip().splitlines()[:1]}")
                timed = [(us, tile) for us, tile in timed if not math.isnan(us)]
                first = str(rule[shape, count])
                own = next((us for us, tile in timed if tile == first), math.nan)
                best = ", ".join(f"{us:.1f} ({tile})" for us, tile in sorted(timed)[: given.best])
                line = f"{shape} {format} T = {count}: {best}; rule {own:.1f} ({first})"
                if count >= BOTH_FROM:
                    line += (
                        f"; copy {checked_us(functools.partial(copied, x), weights, expected):.1f}"
                    )
                print(line, flush=True)
        if left:
            print(f"{format}: no time for {len(left)}: {'; '.join(left)}")


def measure(shapes: list[str], formats: list[str], tokens: list[int]) -> None:
    """Print a line for each shape and format."""
    rate, operations = card_rates()
    print(
        f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s, "
        f"bfloat16 {operations / 1e12:.0f} TFLOP/s; us by tokens"
    )
    for shape in shapes:
        rows, columns = sizes(shape)
        plain = torch.randn(rows, columns, device="cuda").bfloat16()
        copies = [plain.clone() for _ in range(int(CACHE // plain.nbytes) + 1)]
        xs = {count: torch.randn(count, columns, device="cuda").bfloat16() for count in tokens}
        times = {n: graph_us([functools.partial(F.linear, x, w) for w in copies])
                 for n, x in xs.items()}  # fmt: skip
        print(f"{shape} bf16: " + ", ".join(f"{n}: {us:.1f}" for n, us in times.items()))
        del copies, plain
        for format in formats:
            weight, values = make(shape, format)
            parts, stored = [], weight.packed.nbytes + weight.block_scale.nbytes
            for count, x in xs.items():
                expected, weights = x.float() @ values.T, rotated(weight, count)
                tile = choose_tile(count, *sizes(shape), processors(x.device))
                call = functools.partial(run_with_tile, tile, x, bias=None)
                us = checked_us(call, weights, expected)
                floor = max(stored / rate, 2 * count * rows * columns / operations) * 1e6
                text = f"{count}: {us:.1f} ({tile}"
                if count >= BOTH_FROM:
                    call = functools.partial(copied, x)
                    text += f"; copy {checked_us(call, weights, expected):.1f}"
                parts.append(f"{text}; floor {floor:.1f})")
            print(f"{shape} {format}: " + ", ".join(parts), flush=True)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxCOLUMNS")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), help="default nvfp4 and fp8")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true", help="try tiles")
    parser.add_argument("--near", action="store_true", help="only those near the rule's")
    parser.add_argument(
        "--seconds", type=float, help="of --tune in all; default as long as it takes"
    )
    parser.add_argument("--best", type=int, default=3, help="tiles to print")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile with")
    given = parser.parse_args()
    given.formats = given.formats or (NEAR_FORMATS if given.near else ["nvfp4", "fp8"])
    given.tokens = given.tokens or (NEAR_TOKENS if given.near else TOKENS)
    if not torch.cuda.is_available():
        print("bench_linear: needs a CUDA device; there is none, so nothing is measured.")
        return 0
    started = time.perf_counter()
    if given.tune:
        tune(given)
    else:
        measure(given.shapes, given.formats, given.tokens)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
