"""What a call of the operator costs before any arithmetic: T = 0, against two bare operators.

    python benchmarks/bench_dispatch.py

The bare ones have the same schema, check nothing and return torch.empty: one registered with
Library.impl (the floor), one with torch.library.custom_op. Times are the shortest of several
repeats, in microseconds a call.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable

import torch
from machine import cpu_name

from fp4moe import ExpertWeights
from fp4moe.kernels import get_kernel
from fp4moe.ops import nvfp4_moe_arguments

OP = torch.ops.fp4moe.nvfp4_moe.default
LIBRARY = torch.library.Library("fp4moe_bench", "DEF")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2816, 704, 4, 8
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


def main() -> int:
    """Print the table; 1 where an operator returns the wrong thing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)

    weights = ExpertWeights.quantize(
        up=torch.randn(EXPERTS, INTERMEDIATE, HIDDEN),
        gate=torch.randn(EXPERTS, INTERMEDIATE, HIDDEN),
        down=torch.randn(EXPERTS, HIDDEN, INTERMEDIATE),
        activation="silu",
    ).to(device)
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)

    def call_arguments(tokens: int) -> tuple:
        return (
            torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device=device),
            torch.randint(0, EXPERTS, (tokens, TOP_K), device=device),
            torch.rand(tokens, TOP_K, dtype=torch.bfloat16, device=device),
            *nvfp4_moe_arguments(prepared, "reference"),
        )

    operators = {"fp4moe::nvfp4_moe": OP, **bare_operators()}
    for label, operator in operators.items():
        for tokens in (0, 3):
            if found := problem(operator, call_arguments(tokens)):
                print(f"bench_dispatch: {label} {found}; no time is worth printing.")
                return 1

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"T = 0, shortest of {args.repeats} runs of {args.calls} calls, microseconds a call")
    print(f"{'':20s}" + "".join(f"{mode:>12s}" for mode in MODES))
    times: dict[str, dict[str, float]] = {label: {} for label in operators}
    for mode, context in MODES.items():
        with context():
            arguments = call_arguments(0)  # in inference mode these are inference tensors
            # They take turns, so that a busy moment hits all of them; the first is warm-up.
            for repeat in range(args.repeats + 1):
                for label, operator in operators.items():
                    run = microseconds(operator, arguments, args.calls)
                    best = times[label].get(mode, run) if repeat > 1 else run
                    times[label][mode] = min(best, run)
    for label, row in times.items():
        print(f"{label:20s}" + "".join(f"{row[mode]:12.2f}" for mode in MODES))
    for label in list(operators)[1:]:
        ratios = (times["fp4moe::nvfp4_moe"][mode] / times[label][mode] for mode in MODES)
        print(f"{'ratio to ' + label:20s}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
