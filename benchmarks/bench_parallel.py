"""One layer of experts on one card, and shared by the cards of several processes, checked.

    torchrun --nproc-per-node=2 benchmarks/bench_parallel.py
    torchrun --nproc-per-node=2 benchmarks/bench_parallel.py --shapes nano --tokens 1 64 4096
    torchrun --nproc-per-node=2 benchmarks/bench_parallel.py --cpu

Microseconds of one call in a replayed CUDA graph, the slowest process's median. TP: each process
holds a part of the intermediate columns; EP: a part of the experts. "+ sum" is with the all-reduce
behind it, as transformers has it. "own": each process brings T tokens of its own, which are
gathered, run and scattered: twice the tokens of the other columns with two processes. Every result
is compared with float32 on one card before its time is taken. Needs torch 2.11 and no transformers.
--cpu: a small layer with Gloo, wall time, to see that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from fp4moe.experts import ExpertWeights
from fp4moe.kernels import get_kernel
from fp4moe.layer import Layer
from fp4moe.models.split_experts import GatheredExperts
from fp4moe.module import FusedExperts
from fp4moe.parallel import Exchange
from fp4moe.part import part_of_experts, part_of_intermediate
from fp4moe.report import format_bytes, format_table
from fp4moe.testing import random_codes, relative_error
from fp4moe.tools.bench import SHAPES, float32_result
from fp4moe.tools.card import graph_us

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SMALL = Layer("silu", True, 64, 96, 8, 2)
# Routings that a graph goes through where few experts are hit: they must not stay in the L2 cache.
ROTATIONS = 8
# Rounding to bfloat16 is 2^-9 of a value at most: each process rounds its part, and the sum.
LIMIT = 3 * 2.0**-9
# Kernels that round activations round those of a part alike only where blocks are alike.
ROUNDED_LIMIT = 0.15

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(layer: Layer, tokens: int, seed: int, device: str) -> Case:
    """Return hidden [T, H] bf16, distinct random ids [T, K] and weights [T, K]; seed decides."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.hidden_size, generator=generator).bfloat16()
    ids = torch.rand(tokens, layer.num_experts, generator=generator).topk(layer.top_k or 1).indices
    weights = torch.rand(ids.shape, generator=generator)
    return hidden.to(device), ids.to(device), (weights / weights.sum(1, keepdim=True)).to(device)


def with_sum(experts: FusedExperts, *case: torch.Tensor) -> torch.Tensor:
    """Add up the outputs of all processes."""
    out = experts(*case)
    dist.all_reduce(out)
    return out


def microseconds(calls: list[Callable[[], torch.Tensor]], device: str) -> float:
    """Return the median time of one call, of the slowest process."""
    if device == "cpu":
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - begin) * 1e6)
        us = statistics.median(times[1:]) / len(calls)
    else:
        # Other threads of NCCL may look at events meanwhile.
        us = graph_us(calls, errors="thread_local")
    slowest = torch.tensor(us, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def measure(
    name: str, layer: Layer, all_tokens: list[int], device: str, until: float
) -> tuple[list[str], list[list[str]], str]:
    """Return header, rows, and a line on bytes."""
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    weights: ExpertWeights = random_codes(layer, device)
    of_columns = part_of_intermediate(
        rank, count, layer.intermediate_size, layer.format, caller="bench_parallel"
    )
    of_experts = part_of_experts(rank, count, layer.num_experts, caller="bench_parallel")
    whole = FusedExperts(weights, top_k=layer.top_k)
    tp, ep = (FusedExperts(p.cut(weights), top_k=layer.top_k) for p in (of_columns, of_experts))
    exchange = Exchange(dist.group.WORLD)
    own = GatheredExperts(of_experts.cut(weights), exchange, top_k=layer.top_k)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "one": whole,
        f"TP {count}": tp,
        f"TP {count} + sum": functools.partial(with_sum, tp),
        f"EP {count}": ep,
        f"EP {count} + sum": functools.partial(with_sum, ep),
        "own": own,
    }
    rows = []
    for tokens in all_tokens:
        late = torch.tensor(float(time.monotonic() > until), device=device)
        dist.all_reduce(late, dist.ReduceOp.MAX)
        if late:
            break
        cases = [
            make_case(layer, tokens, seed, device)
            for seed in range(ROTATIONS if tokens <= 16 else 1)
        ]
        mine = [make_case(layer, tokens, 100 * (rank + 1) + s, device) for s in range(len(cases))]
        kernel = get_kernel(whole.kernel)
        limit = ROUNDED_LIMIT if kernel.quantizes_activations else LIMIT
        row = [str(tokens)]
        shared, single = (
            float32_result(given[0][0], weights, *given[0][1:], kernel) for given in (cases, mine)
        )
        for way, call in ways.items():
            given, expected = (mine, single) if way == "own" else (cases, shared)
            got = call(*given[0])
            if way in (f"TP {count}", f"EP {count}"):
                got = got.float()
                dist.all_reduce(got)
            error = relative_error(got, expected)
            if not error <= limit:
                raise SystemExit(f"{name}, {tokens} tokens, {way}: error {error:.2g} > {limit:.2g}")
            row.append(f"{microseconds([functools.partial(call, *c) for c in given], device):.1f}")
        out = torch.zeros(tokens, layer.hidden_size, dtype=torch.bfloat16, device=device)
        calls = [functools.partial(_sum, out)] * len(cases)
        row.append(f"{microseconds(calls, device):.1f}")
        rows.append(row)
    sizes = {"one card": whole, "TP": tp, "EP": ep}
    held = ", ".join(f"{way} {format_bytes(m.nbytes)}" for way, m in sizes.items())
    title = f"{name}, kernels {whole.kernel}, {tp.kernel}, {ep.kernel}; bytes a process: {held}"
    return ["T", *ways, "sum"], rows, title


def _sum(out: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(out)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=[*TOKENS])
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=110, help="begins no row after these")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        print("bench_parallel: needs several processes, started by torchrun; nothing is measured.")
        return
    until = time.monotonic() + arguments.seconds
    local = int(os.environ["LOCAL_RANK"])
    device = "cpu" if arguments.cpu else f"cuda:{local}"
    if not arguments.cpu:
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if arguments.cpu else "nccl")
    layers = {"small": SMALL} if arguments.cpu else {n: SHAPES[n] for n in arguments.shapes}
    with torch.no_grad():
        for number, (name, layer) in enumerate(layers.items(), 1):
            layer = dataclasses.replace(layer, format=arguments.format)
            share = until - (until - time.monotonic()) * (1 - number / len(layers))
            header, rows, title = measure(name, layer, arguments.tokens, device, share)
            if dist.get_rank() == 0:
                print(f"{title}\n{format_table(header, rows)}\n", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
