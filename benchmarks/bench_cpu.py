"""Kernel `reference` on a CPU against transformers' eager bfloat16 experts: the ratio of times.

    python benchmarks/bench_cpu.py --tokens 1 4 64 --threads 2

One layer of Gemma4-26B-A4B, or of Nemotron-3-Nano, with random codes. Both run by turns on the same
routings in one process; a ratio below 1 says that `reference` is faster. ratio: median over the
turns of its time by theirs, so that what else the machine does meanwhile meets both; us: each
one's shortest. Every result is compared with the definition in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

import torch
from machine import cpu_name

from fp4moe.formats import FORMATS
from fp4moe.layer import Layer
from fp4moe.module import FusedExperts
from fp4moe.reference import reference
from fp4moe.testing import random_codes, relative_error
from fp4moe.tools.bench import SHAPES, top_k
from fp4moe.tools.huggingface_experts import huggingface_experts

# Rounding of the output to bfloat16, 2^-9 relative; theirs rounds weights and intermediate, too.
LIMIT, THEIR_LIMIT = 2.0**-8, 12e-3
ROUTINGS = 6


def case(shape: Layer, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden [T, H] bfloat16, distinct random experts [T, K] and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator, dtype=torch.float32)
    scores = torch.rand(tokens, shape.num_experts, generator=generator, dtype=torch.float32)
    weights, ids = scores.topk(top_k(shape))
    return x.bfloat16(), ids, (weights / weights.sum(1, keepdim=True))


def small(shape: Layer) -> Layer:
    """Return a layer of the same kind that a test can afford."""
    return dataclasses.replace(shape, hidden_size=64, intermediate_size=48, num_experts=8, top_k=2)


def measure(name: str, shape: Layer, all_tokens: list[int], turns: int) -> bool:
    """Print a line for each number of tokens; False where a result is wrong."""
    weights = random_codes(shape, "cpu")
    ours = FusedExperts(weights, kernel="reference", top_k=shape.top_k)
    theirs = huggingface_experts(name, top_k(shape), weights)
    theirs.config._experts_implementation = "eager"
    for tokens in all_tokens:
        cases = [case(shape, tokens, seed) for seed in range(ROUTINGS)]
        x, ids, routing = cases[0]
        expected = reference(x.float(), weights, ids, routing)
        errors = [relative_error(ours(*cases[0]), expected)]
        errors.append(relative_error(theirs(x, ids, routing.to(x)), expected))
        what = f"{name} {shape.format} T = {tokens}"
        if not (errors[0] <= LIMIT and errors[1] <= THEIR_LIMIT):
            print(f"{what}: wrong, errors {errors[0]:.1e} and {errors[1]:.1e}; not timed")
            return False
        times: list[tuple[float, float]] = []
        for _ in range(turns):
            for x, ids, routing in cases:
                start = time.perf_counter()
                ours(x, ids, routing)
                middle = time.perf_counter()
                theirs(x, ids, routing.to(x))
                times.append((middle - start, time.perf_counter() - middle))
        ratio = statistics.median(mine / other for mine, other in times)
        best = [min(each) * 1e6 for each in zip(*times, strict=True)]
        print(f"{what}: ratio {ratio:.2f}; us {best[0]:.0f} and {best[1]:.0f}", flush=True)
    return True


def main() -> int:
    """Parse the command line and measure; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gemma4"])
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["nvfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 64])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, help="of torch; default its own choice")
    parser.add_argument("--small", action="store_true", help="small sizes: that it runs, no more")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    right = True
    with torch.no_grad():
        for name in given.shape:
            for format in given.format:
                shape = dataclasses.replace(SHAPES[name], format=format)
                shape = small(shape) if given.small else shape
                right &= measure(name, shape, given.tokens, given.turns)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
