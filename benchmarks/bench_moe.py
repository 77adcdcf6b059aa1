"""One layer of experts against its floor, per number of tokens; checked before it is printed.

    python benchmarks/bench_moe.py --shape gemma4 --tokens 1 16 256 4096 --kernel triton
    python benchmarks/bench_moe.py --tokens 64 --config mode=scan gate_up.rows=32
    python benchmarks/bench_moe.py --tokens 256 --sweep gate_up.slots=16,32 gate_up.warps=4,8

A time is the median of replays of a CUDA graph; up to 16 tokens the graph holds 8 different
routings, so that no weights are warm. floor_us = max(bytes of the experts hit / 4.3 TB/s,
operations / 790 TFLOP/s). Bytes count 4.5 bits a weight.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable

import torch

from fp4moe import ExpertWeights
from fp4moe.activations import ACTIVATIONS
from fp4moe.kernels import KERNELS
from fp4moe.kernels.triton_configs import Config, Tile, choose_config
from fp4moe.kernels.triton_moe import TRITON, run_with
from fp4moe.quantize import NVFP4Values

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
BANDWIDTH, OPERATIONS = 4.3e12, 790e12
# bfloat16 rounds the intermediate, each slot's output and the sum: three times 2^-9, relative.
LIMIT = 6e-3
ROTATIONS, REPLAYS = 8, 30


@dataclasses.dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str
    gated: bool

    @property
    def weights_per_expert(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.intermediate


SHAPES = {
    "gemma4": Shape(128, 8, 2816, 704, "gelu_tanh", True),
    "nano": Shape(128, 6, 2688, 1856, "relu2", False),
}


def random_weights(shape: Shape) -> ExpertWeights:
    """Random codes and block scales; global scales keep values near 1."""
    generator = torch.Generator("cuda").manual_seed(0)

    def values(rows: int, columns: int) -> NVFP4Values:
        def draw(low: int, high: int, count: int) -> torch.Tensor:
            size = (shape.experts, rows, count)
            return torch.randint(
                low, high, size, dtype=torch.uint8, device="cuda", generator=generator
            )

        scale = draw(0x30, 0x41, columns // 16).view(torch.float8_e4m3fn)
        factor = torch.full((shape.experts,), columns**-0.5 / 3, device="cuda")
        return NVFP4Values(draw(0, 256, columns // 2), scale, factor)

    return ExpertWeights(
        gate_up=values((1 + shape.gated) * shape.intermediate, shape.hidden),
        down=values(shape.hidden, shape.intermediate),
        activation=shape.activation,
        gated=shape.gated,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        expert_offset=0,
        hidden_scale=torch.ones(1, device="cuda"),
        intermediate_scale=torch.ones(shape.experts, device="cuda"),
    )


def routing(shape: Shape, tokens: int, seed: int, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct random experts a token; skew > 0 prefers low ids."""
    generator = torch.Generator("cuda").manual_seed(seed)
    noise = torch.rand(tokens, shape.experts, device="cuda", generator=generator)
    noise -= skew * torch.linspace(0, 1, shape.experts, device="cuda")
    ids = noise.topk(shape.top_k).indices
    weights = torch.rand(tokens, shape.top_k, device="cuda", generator=generator)
    return ids, weights / weights.sum(1, keepdim=True)


def reference(x, weights: ExpertWeights, ids, routing_weights) -> torch.Tensor:
    """The layer in float32, expert by expert."""
    out = torch.zeros(x.shape, device=x.device)
    act = ACTIVATIONS[weights.activation].function
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        part = {k: v[0] for k, v in weights.slice_experts(expert, expert + 1).dequantize().items()}
        rows = x[token].float()
        y = rows @ part["up"].T
        y = act(rows @ part["gate"].T) * y if weights.gated else act(y)
        out.index_add_(0, token, (y @ part["down"].T) * routing_weights[token, slot, None])
    return out


def graph_us(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Median time of one call in a replayed graph of all of them, in microseconds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(REPLAYS)]
    for _ in range(3):
        graph.replay()
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) * 1e3 / len(calls)


def changed(config: Config, settings: list[str]) -> Config:
    """A config with `field=value` or `gate_up.field=value` replaced."""
    for setting in settings:
        path, text = setting.split("=", 1)
        value = {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        part, _, field = path.partition(".")
        if field:
            tile: Tile = dataclasses.replace(getattr(config, part), **{field: value})
            config = dataclasses.replace(config, **{part: tile})
        else:
            config = dataclasses.replace(config, **{part: value})
    return config


def warm(name: str, config: Config, tokens: int) -> None:
    """Compile a config's variants into Triton's cache, in a process of its own."""
    # 16 experts are a multiple of 16, as 128 are: the same specialisation.
    shape = dataclasses.replace(SHAPES[name], experts=16)
    prepared = TRITON.prepare(random_weights(shape), hidden_alignment=256)
    x = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
    run_with(config, x, *routing(shape, tokens, 0, 0.0), prepared.operands, prepared.settings)
    torch.cuda.synchronize()


def short(config: Config) -> str:
    tiles = (",".join(map(str, dataclasses.astuple(t))) for t in (config.gate_up, config.down))
    flags = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is True]
    registers = [f"registers={config.registers}"] if config.registers else []
    return " ".join([config.mode, *tiles, *flags, *registers])


def main() -> int:
    """Print one row per shape, tokens and kernel or config; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernel", nargs="+", default=["triton"])
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_moe: needs a CUDA device; there is none, so nothing is measured.")
        return 0

    choices = [[f"{s.split('=')[0]}={v}" for v in s.split("=")[1].split(",")] for s in args.sweep]
    variants = [list(settings) for settings in itertools.product(*choices)]

    def configs(shape: Shape, tokens: int) -> list[Config]:
        base = choose_config(tokens * shape.top_k, shape.experts, shape.top_k)
        base = changed(base, args.config)
        return list(dict.fromkeys(changed(base, settings) for settings in variants))

    failed: set[tuple] = set()
    if "triton" in args.kernel:
        work = {
            (name, config): tokens
            for name in args.shape
            for tokens in args.tokens
            for config in configs(SHAPES[name], tokens)
        }
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
            # As few tokens as the mode allows: a variant does not depend on their number.
            started = {
                pool.submit(warm, name, config, tokens if config.mode != "sorted" else 64): (
                    name,
                    config,
                )
                for (name, config), tokens in work.items()
            }
            for done in concurrent.futures.as_completed(started):
                if error := done.exception():
                    failed.add(started[done])
                    first = str(error).strip().splitlines()[:1]
                    print(f"{started[done][0]} {short(started[done][1])}: {first}", flush=True)

    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, skew {args.skew}")
    print(
        f"{'shape':7s}{'T':>6s} {'us':>8s} {'floor':>7s} {'share':>6s} {'GB/s':>6s} {'TFLOP/s':>8s}"
        f" {'error':>8s}  kernel"
    )
    rows, wrong = [], False
    for name in args.shape:
        shape, weights = SHAPES[name], random_weights(SHAPES[name])
        kernels = {k: KERNELS.get(k, TRITON) for k in args.kernel}
        prepared = {k: v.prepare(weights, hidden_alignment=256) for k, v in kernels.items()}
        for tokens in args.tokens:
            generator = torch.Generator("cuda").manual_seed(1)
            x = torch.randn(tokens, shape.hidden, device="cuda", generator=generator).bfloat16()
            count = ROTATIONS if tokens <= 16 else 1
            routings = [routing(shape, tokens, seed, args.skew) for seed in range(count)]
            expected = reference(x, weights, *routings[0])
            hit = statistics.mean(len(ids.unique()) for ids, _ in routings)
            size = hit * shape.weights_per_expert * 9 / 16
            operations = 2 * tokens * shape.top_k * shape.weights_per_expert
            floor = max(size / BANDWIDTH, operations / OPERATIONS) * 1e6
            for kernel in args.kernel:
                operands, settings = prepared[kernel].operands, prepared[kernel].settings
                runs: dict[str, Callable] = {kernel: kernels[kernel].run}
                if kernel == "triton":
                    runs = {
                        f"triton {short(config)}": functools.partial(run_with, config)
                        for config in configs(shape, tokens)
                        if (name, config) not in failed
                    }
                results = []
                for label, run in runs.items():
                    got = run(x, *routings[0], operands, settings)
                    again = run(x, *routings[0], operands, settings)
                    error = ((got.float() - expected).norm() / expected.norm()).item()
                    if not error <= LIMIT or not torch.equal(got, again):
                        print(f"{name} {tokens} {label}: error {error:.2e}, not printed")
                        wrong = True
                        continue
                    calls = [
                        functools.partial(run, x, ids, w, operands, settings) for ids, w in routings
                    ]
                    results.append((graph_us(calls), error, label))
                for us, error, label in sorted(results) if args.sweep else results:
                    print(
                        f"{name:7s}{tokens:6d} {us:8.1f} {floor:7.1f} {floor / us:6.2f} "
                        f"{size / us / 1e3:6.0f} {operations / us / 1e6:8.1f} {error:8.1e}  "
                        f"{label}",
                        flush=True,
                    )
                    rows.append(
                        {"shape": name, "kernel": label, "tokens": tokens, "us": round(us, 2)}
                        | {"floor_us": round(floor, 2), "error": error}
                    )
        del prepared, weights
    if args.json:
        facts = {"gpu": properties.name, "torch": torch.__version__, "rows": rows}
        with open(args.json, "w") as file:
            json.dump(facts, file, indent=1)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
