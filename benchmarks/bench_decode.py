"""Tiles of `one_token` against those of mode "slot", one token: checked, then timed; needs a GPU.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --shapes gemma4 --gate-up 16,3,4 16,2,4 --down 32,3,8

Gate and up's tiles first, with one tile of down, then down's with the best of gate and up. A time
is the median of replays of a CUDA graph with eight routings, so that weights are not warm in L2.
Each result is compared with float32 on the same values and with a second run bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch

from fp4moe.kernels.measured import choose_tiles
from fp4moe.kernels.operands import Call
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.kernels.triton.one_token import run_one_token
from fp4moe.kernels.triton.tiles import parse_one_token
from fp4moe.testing import random_codes, relative_error
from fp4moe.tools import bench

# rows, slabs at once, warps.
GATE_UP = {"gemma4": "16,3,4 16,2,4 16,4,4 32,2,4", "nano": "32,3,4 32,2,4 32,4,4 16,3,4"}
DOWN = {"gemma4": "32,3,8 32,2,8 16,3,8 16,4,8", "nano": "32,2,8 32,3,8 16,3,8 16,4,8"}

Run = Callable[[Call], torch.Tensor]


class Layer:
    """Weights of a shape and eight calls of one token with them."""

    def __init__(self, name: str) -> None:
        self.shape = bench.SHAPES[name]
        weights = random_codes(self.shape, "cuda")
        prepared = TRITON.prepare(weights, hidden_alignment=256)
        x = torch.randn(1, self.shape.hidden_size, device="cuda").bfloat16()
        routings = [bench.routing(self.shape, 1, seed, 0.0) for seed in range(8)]
        self.calls = [prepared.call(x, *routed) for routed in routings]
        self.expected = bench.float32_result(x, weights, *routings[0])

    def us(self, label: str, run: Run) -> float:
        """Return microseconds of a call, or infinity, with a line, where it is wrong."""
        first = run(self.calls[0])
        error = relative_error(first, self.expected)
        same = all(torch.equal(first, run(self.calls[0])) for _ in range(5))
        if not error <= bench.LIMIT or not same:
            print(f"WRONG {label}: error {error:.1e}, equal runs {same}")
            return float("inf")
        return bench.graph_us([functools.partial(run, call) for call in self.calls])

    def slot(self) -> Run:
        """Return what runs with tiles of mode "slot"."""
        shape = self.shape
        config = choose_tiles(
            (9, 0), shape.gated, shape.hidden_size, shape.intermediate_size, shape.num_experts,
            bench.top_k(shape),
        )  # fmt: skip
        return functools.partial(run_with, config)

    def split(self, run: Run) -> str:
        """Return microseconds by kernel, from the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for call in self.calls * 3:
                run(call)
            torch.cuda.synchronize()
        found = [e for e in profile.key_averages() if "kernel" in e.key]
        return ", ".join(f"{e.key}: {e.device_time_total / e.count:.1f}" for e in found)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(GATE_UP), choices=list(GATE_UP))
    parser.add_argument("--gate-up", nargs="+", help="tiles instead of the table's")
    parser.add_argument("--down", nargs="+", help="tiles instead of the table's")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode: needs a CUDA device; there is none, so nothing is measured.")
        return 0
    for name in given.shapes:
        layer, timed = Layer(name), dict[str, float]()
        gate_ups, downs = given.gate_up or GATE_UP[name].split(), given.down or DOWN[name].split()
        print(f"{name}: slot {layer.us('slot', layer.slot()):.1f}")

        def us(gate_up: str, down: str, layer: Layer = layer, timed: dict = timed) -> float:
            text = f"{gate_up} {down}"
            run = functools.partial(run_one_token, parse_one_token(text))
            timed[text] = layer.us(text, run)
            return timed[text]

        best = min(gate_ups, key=lambda gate_up: us(gate_up, downs[0]))
        for down in downs[1:]:
            us(best, down)
        for text, time in sorted(timed.items(), key=lambda item: item[1]):
            print(f"  {text:20} {time:6.1f}")
        text = min(timed, key=timed.__getitem__)
        print(f"  {text}: {layer.split(functools.partial(run_one_token, parse_one_token(text)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
