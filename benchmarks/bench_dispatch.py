"""What a call costs before any arithmetic: T = 0, of the operator and of what users call.

    python benchmarks/bench_dispatch.py

The operator is compared with two bare ones, which have the same schema, check nothing and return
torch.empty: one registered with Library.impl (the floor), one with torch.library.custom_op.
`fused_moe`, which looks up kernel and layout at each call, is compared with `FusedExperts.forward`,
which has them. Times are the shortest of several repeats, in microseconds a call.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import torch
from machine import cpu_name

from fp4moe import ExpertWeights, FusedExperts, fused_moe
from fp4moe.kernels import get_kernel
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.testing import make_layer

OP = torch.ops.fp4moe.nvfp4_moe.default
LIBRARY = torch.library.Library("fp4moe_bench", "DEF")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2816, 704, 4, 8
WIDTH = 36
MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def bare_operators() -> dict[str, Callable[..., torch.Tensor]]:
    """Operators of the same schema that do nothing, by how they are registered."""
    schema = str(OP._schema).removeprefix("fp4moe::nvfp4_moe")

    def empty(hidden, *args):
        return hidden.new_empty(hidden.shape)

    LIBRARY.define(f"impl{schema}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl("impl", empty, key)
    torch.library.custom_op("fp4moe_bench::custom_op", empty, mutates_args=(), schema=schema)
    registered = torch.ops.fp4moe_bench
    return {"Library.impl": registered.impl.default, "custom_op": registered.custom_op.default}


def microseconds(call: Callable[..., object], args: tuple, calls: int) -> float:
    """Time of one call, the mean of a run of `calls`."""
    start = time.perf_counter()
    for _ in range(calls):
        call(*args)
    return (time.perf_counter() - start) / calls * 1e6


def problem(call: Callable[..., torch.Tensor], args: tuple) -> str:
    """What is wrong with the result of a call; empty where nothing is."""
    hidden, got = args[0], call(*args)
    if (got.shape, got.dtype, got.device) != (hidden.shape, hidden.dtype, hidden.device):
        return f"gave {got.dtype} {list(got.shape)} on {got.device} for {list(hidden.shape)}"
    return ""


def users_calls(weights: ExpertWeights, kernel: str) -> dict[str, Callable[..., torch.Tensor]]:
    """What a user calls with (hidden, ids, routing weights), by name."""

    def function(hidden, expert_ids, routing_weights):
        return fused_moe(hidden, weights, expert_ids, routing_weights, kernel=kernel)

    forward = FusedExperts(weights, kernel).forward
    return {f"FusedExperts.forward {kernel}": forward, f"fused_moe {kernel}": function}


def print_ratio(label: str, times: dict[str, float], to: dict[str, float]) -> None:
    """Print a row of quotients."""
    ratios = (times[mode] / to[mode] for mode in MODES)
    print(f"{'ratio ' + label:{WIDTH}s}" + "".join(f"{ratio:12.2f}" for ratio in ratios))


def main() -> int:
    """Print the table; 1 where an operator returns the wrong thing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)

    weights = make_layer(EXPERTS, HIDDEN, INTERMEDIATE, device=device)
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)

    def call_arguments(tokens: int) -> tuple:
        return (
            torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=device),
            torch.randint(0, EXPERTS, (tokens, TOP_K), device=device),
            torch.rand(tokens, TOP_K, dtype=torch.bfloat16, device=device),
            *nvfp4_moe_arguments(prepared, "reference"),
        )

    operators = {"fp4moe::nvfp4_moe": OP, **bare_operators()}
    calls = users_calls(weights, "reference") | users_calls(weights, "auto")
    for label, call in {**operators, **calls}.items():
        for tokens in (0, 3):
            arguments = call_arguments(tokens)
            if found := problem(call, arguments[:3] if label in calls else arguments):
                print(f"bench_dispatch: {label} {found}; no time is worth printing.")
                return 1

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"T = 0, shortest of {args.repeats} runs of {args.calls} calls, microseconds a call")
    print(f"{'':{WIDTH}s}" + "".join(f"{mode:>12s}" for mode in MODES))
    times: dict[str, dict[str, float]] = {label: {} for label in (*operators, *calls)}
    for mode, context in MODES.items():
        with context():
            arguments = call_arguments(0)  # in inference mode these are inference tensors
            # They take turns, so that a busy moment hits all of them; the first is warm-up.
            for repeat in range(args.repeats + 1):
                for label, call in {**operators, **calls}.items():
                    given = arguments[:3] if label in calls else arguments
                    run = microseconds(call, given, args.calls)
                    best = times[label].get(mode, run) if repeat > 1 else run
                    times[label][mode] = min(best, run)
    for label, row in times.items():
        print(f"{label:{WIDTH}s}" + "".join(f"{row[mode]:12.2f}" for mode in MODES))
    for label in list(operators)[1:]:
        print_ratio(f"operator to {label}", times["fp4moe::nvfp4_moe"], times[label])
    for kernel in ("reference", "auto"):
        forward, function = users_calls(weights, kernel)
        print_ratio(f"{function} to forward", times[function], times[forward])
    return 0


if __name__ == "__main__":
    sys.exit(main())
