"""Tiles of mode "few" against what is shipped, for T = 1 to 8: checked, then timed; needs a GPU.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --shapes gemma4 --tokens 1 4 --seconds 60

Gate and up's tiles first, with one tile of down, then down's with the best of gate and up. A time
is the median of replays of a CUDA graph with eight routings, so that weights are not warm in L2.
Each result is compared with float32 on the same values and with a second run bit for bit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import sys
import time

import torch

from fp4moe.kernels.measured import choose_tiles
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.kernels.triton.tiles import Config, parse_config
from fp4moe.testing import random_codes, relative_error
from fp4moe.tools import bench

# rows, slabs at once, chunks; with u unrolled. Sixteen lines of gate, up or down are a tile.
GATE_UP = {
    "gemma4": "8,6,8 8,3,8 8,2,8u 16,2,8u 16,3,8u 16,3,8 16,6,8u 8,4,4u 8,3,4u 8,6,4u 16,3,4u "
    "16,2,4u 16,4,4 32,2,4u 8,3,16u 16,3,16u",
    "nano": "16,6,8 16,3,8 16,2,8u 32,2,8u 32,3,8u 32,3,8 32,6,8u 16,4,4u 16,3,4u 16,6,4u 32,3,4u "
    "32,2,4u 32,4,4 64,2,4u 16,3,16u 32,3,16u",
}
DOWN = {
    "gemma4": "16,6,8u 16,4,8u 16,3,8u 16,2,8u 16,11,8u 16,4,8 32,3,8u 32,2,8u 32,4,8 16,6,16u "
    "16,3,16u 32,3,16u",
    "nano": "16,4,8u 16,3,8u 16,2,8u 16,4,8 16,3,8 32,2,8u 32,3,8 32,2,8 16,4,16u 16,3,16u 16,3,16 "
    "16,6,16",
}


def tile(text: str, chained: bool = False) -> str:
    """Return the text of a tile of mode "few"."""
    more = ",1" if chained else ""
    rows, slabs, chunks = text.rstrip("u").split(",")
    return f"1,{rows},{slabs},{chunks},{1 + text.endswith('u')}{more}"


def config(gate_up: str, down: str, chained: bool) -> Config:
    """Return the config of two tiles of the tables."""
    return parse_config(f"few {tile(gate_up)} {tile(down, chained)}")


def compile_one(name: str, one: Config) -> None:
    """Compile a config into Triton's cache, in a process of its own."""
    # 16 experts are a multiple of 16, as 128 are: the same specialisation.
    shape = dataclasses.replace(bench.SHAPES[name], num_experts=16)
    prepared = TRITON.prepare(random_codes(shape, "cuda"), hidden_alignment=256)
    x = torch.zeros(1, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
    run_with(one, prepared.call(x, *bench.routing(shape, 1, 0, 0.0)))
    torch.cuda.synchronize()


class Layer:
    """Weights of a shape and calls with them."""

    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name, self.shape = name, bench.SHAPES[name]
        weights = random_codes(self.shape, "cuda")
        prepared = TRITON.prepare(weights, hidden_alignment=256)
        self.calls, self.expected = {}, {}
        for count in tokens:
            x = torch.randn(count, self.shape.hidden_size, device="cuda").bfloat16()
            routings = [bench.routing(self.shape, count, seed, 0.0) for seed in range(8)]
            self.calls[count] = [prepared.call(x, *routed) for routed in routings]
            self.expected[count] = bench.float32_result(x, weights, *routings[0])

    def us(self, one: Config, count: int) -> float:
        """Return microseconds of a call, or infinity, with a line, where it is wrong or fails."""
        calls = self.calls[count]
        try:
            first = run_with(one, calls[0])
            error = relative_error(first, self.expected[count])
            same = all(torch.equal(first, run_with(one, calls[0])) for _ in range(5))
            if not error <= bench.LIMIT or not same:
                print(f"WRONG {self.name} T = {count} {one}: error {error:.1e}, equal runs {same}")
                return float("inf")
            return bench.graph_us([functools.partial(run_with, one, call) for call in calls])
        except Exception as error:
            print(f"left out {one}: {str(error).strip().splitlines()[-1:]}")
            return float("inf")

    def shipped(self, count: int) -> Config:
        """Return the config that a call takes today."""
        shape = self.shape
        return choose_tiles(
            (9, 0), shape.gated, shape.hidden_size, shape.intermediate_size, shape.num_experts,
            count * bench.top_k(shape),
        )  # fmt: skip

    def split(self, one: Config, count: int) -> str:
        """Return microseconds by kernel, from the profiler."""
        calls = self.calls[count]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in calls * 3:
                run_with(one, call)
            torch.cuda.synchronize()
        found = [e for e in profile.key_averages() if "kernel" in e.key]
        return ", ".join(f"{e.key}: {e.device_time_total / e.count:.1f}" for e in found)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["gemma4", "nano"], choices=list(GATE_UP))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--tune", nargs="+", type=int, default=[1, 4], help="tokens to tune at")
    parser.add_argument("--best", type=int, default=3, help="configs to time at all tokens")
    parser.add_argument("--gate-up", nargs="+", help="tiles instead of the tables'")
    parser.add_argument("--down", nargs="+", help="tiles instead of the tables'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile with")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode: needs a CUDA device; there is none, so nothing is measured.")
        return 0
    started = time.perf_counter()
    tables = {
        name: (given.gate_up or GATE_UP[name].split(), given.down or DOWN[name].split())
        for name in given.shapes
    }
    work = []
    for name, (gate_ups, downs) in tables.items():
        for chained in (True, False):
            work += [(name, config(one, downs[0], chained)) for one in gate_ups]
            work += [(name, config(gate_ups[0], one, chained)) for one in downs]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, context) as pool:
        for done in [pool.submit(compile_one, *one) for one in work]:
            if error := done.exception():
                print(f"not compiled: {str(error).strip().splitlines()[-1:]}")
    print(f"compiled {len(work)} configs: {time.perf_counter() - started:.0f} s", flush=True)
    for name, (gate_ups, downs) in tables.items():
        layer = Layer(name, given.tokens)
        timed: dict[Config, dict[int, float]] = {}
        for count in given.tune:
            was = layer.us(layer.shipped(count), count)
            print(f"{name} T = {count}: shipped {was:.1f} ({layer.shipped(count)})")
            found = sorted((layer.us(config(g, downs[0], True), count), g) for g in gate_ups)
            print("  gate_up: " + "  ".join(f"{g} {us:.1f}" for us, g in found), flush=True)
            best = [g for _, g in found[:2]]
            pairs = [(layer.us(config(g, d, True), count), g, d) for g in best for d in downs]
            pairs.sort()
            print("  down: " + "  ".join(f"{g}|{d} {us:.1f}" for us, g, d in pairs), flush=True)
            for _, g, d in pairs[: given.best]:
                timed[config(g, d, True)] = {}
                timed[config(g, d, False)] = {}
        for one, row in timed.items():
            row |= {count: layer.us(one, count) for count in given.tokens}
        shipped = {count: layer.us(layer.shipped(count), count) for count in given.tokens}
        print(f"  {'shipped':44}" + "".join(f" T={t}: {us:6.1f}" for t, us in shipped.items()))
        for one, row in sorted(timed.items(), key=lambda item: item[1][given.tokens[0]]):
            print(f"  {one!s:44}" + "".join(f" T={t}: {us:6.1f}" for t, us in row.items()))
        for count in given.tune:
            one = min(timed, key=lambda c: timed[c][count])
            print(f"  profile T = {count} {one}: {layer.split(one, count)}", flush=True)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        del layer
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
