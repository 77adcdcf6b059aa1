"""`fp4moe bench`: one layer of experts against its floor and against its peers, in microseconds.

Every result is compared with float32 on the same values, and ours with a second run bit for bit,
before its time is printed. A time is the median of replays of a CUDA graph; up to 16 tokens the
graph holds 8 different routings, so that weights are not warm. floor = max(bytes of codes and block
scales of the experts hit, at the bandwidth of a copy; operations at the rate of a bfloat16
product), both as measured on this card in this run and printed first.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..activations import get_activation
from ..errors import UnsupportedError, must
from ..experts import ExpertWeights
from ..formats import DEFAULT_FORMAT, FORMATS
from ..kernels import KERNELS, Kernel, Layer, choose_kernel, current_capability, measured
from ..kernels.reference import REFERENCE
from ..module import FusedExperts
from ..testing import random_codes, relative_error
from .card import Rates, card_rates, graph_us
from .grouped_gemms import GEMMS
from .help_text import add_command
from .peers import FAILURES, PREFIX, Contender, peers
from .selftest import LAYERS

__all__ = ["SHAPES", "TOKENS", "add_parser", "graph_us", "run"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
DEVICE = "cuda"
# bfloat16 rounds the intermediate, each slot's output and the sum: three times 2^-9, relative.
LIMIT = 6e-3
# Sums of e4m3 products are right to 2^-11 on Hopper, so that some codes of the intermediate differ.
ROUNDED_LIMIT = 12e-3
ROTATIONS = 8
SKEW = 3.0


SHAPES = {
    name: Layer(**LAYERS[model])
    for name, model in (("gemma4", "Gemma4-26B-A4B"), ("nano", "Nemotron-3-Nano-30B"))
}


def top_k(shape: Layer) -> int:
    """Return the experts a token, which every shape here names."""
    assert shape.top_k is not None
    return shape.top_k


def shape_of(name: str, format: str) -> Layer:
    """Return a layer of SHAPES with weights of a format."""
    return dataclasses.replace(SHAPES[name], format=format)


def weights_per_expert(shape: Layer) -> int:
    """Return how many weights an expert has."""
    return (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size


def bytes_per_expert(shape: Layer) -> float:
    """Return the bytes of an expert's codes and block scales, as the format stores them."""
    rows = (2 if shape.gated else 1) * shape.intermediate_size
    sizes = (rows, shape.hidden_size, 1 + shape.gated), (shape.hidden_size, shape.intermediate_size)
    stored = [FORMATS[shape.format].shapes(1, *size).values() for size in sizes]
    return sum(d.itemsize * math.prod(n) for parts in stored for d, n in parts)


def routing(shape: Layer, tokens: int, seed: int, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct random experts a token; skew > 0 prefers low ids."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    noise = torch.rand(
        tokens, shape.num_experts, dtype=torch.float32, device=DEVICE, generator=generator
    )
    noise -= skew * torch.linspace(0, 1, shape.num_experts, dtype=torch.float32, device=DEVICE)
    ids = noise.topk(top_k(shape)).indices
    weights = torch.rand(ids.shape, dtype=torch.float32, device=DEVICE, generator=generator)
    return ids, weights / weights.sum(1, keepdim=True)


def float32_result(
    x: torch.Tensor,
    weights: ExpertWeights,
    ids: torch.Tensor,
    routing_weights: torch.Tensor,
    kernel: Kernel = REFERENCE,
) -> torch.Tensor:
    """The layer in float32, expert by expert; input and intermediate rounded as the kernel does."""
    rounds = kernel.quantizes_activations
    if rounds:
        x = weights.number_format.round_activation(x.bfloat16().float(), weights.hidden_scale)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    combine = get_activation(weights.activation).combine
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        part = {k: v[0] for k, v in weights.slice_experts(expert, expert + 1).dequantize().items()}
        rows = x[token].float()
        gate, up, down = (part.get(name) for name in ("gate", "up", "down"))
        assert up is not None and down is not None
        gate_rows = None if gate is None else F.linear(rows, gate, part.get("gate_bias"))
        y = combine(F.linear(rows, up, part.get("up_bias")), gate_rows)
        if rounds:
            y = y.to(kernel.intermediate_dtype).float()
            y = weights.number_format.round_activation(y, weights.intermediate_scale[expert])
        y = F.linear(y, down, part.get("down_bias"))
        out.index_add_(0, token, y * routing_weights[token, slot, None])
    return out


def contenders(
    name: str, shape: Layer, weights: ExpertWeights, kernels: list[str], with_peers: bool
) -> Iterator[Contender]:
    """Yield our kernels, then the peers."""

    def make(kernel: str) -> Contender:
        module = FusedExperts(weights, kernel=kernel, top_k=shape.top_k)
        return Contender(kernel, lambda tokens: module, True)

    yield from (make(kernel) for kernel in kernels)
    if with_peers:
        yield from peers(name, shape, weights)


def measure(
    name: str,
    kernels: list[str],
    all_tokens: list[int],
    skew: float,
    with_peers: bool,
    format: str = DEFAULT_FORMAT,
    rates: Rates | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender and number of tokens.

    `wrong` where a result is, `left_out` with the reason where a peer cannot be timed.

    Args:
        with_peers: others' kernels, too, and torch's grouped GEMMs alone.
        rates: what the floor is made of; default `card_rates`.
    """
    shape, rates = shape_of(name, format), rates or card_rates()
    weights = random_codes(shape, DEVICE)
    cases = {}
    for tokens in all_tokens:
        generator = torch.Generator(DEVICE).manual_seed(1)
        x = torch.randn(
            tokens, shape.hidden_size, dtype=torch.float32, device=DEVICE, generator=generator
        ).bfloat16()
        count = ROTATIONS if tokens <= 16 else 1
        routings = [routing(shape, tokens, seed, skew) for seed in range(count)]
        cases[tokens] = x, routings, float32_result(x, weights, *routings[0])
    rounded: dict[int, torch.Tensor] = {}
    for peer in contenders(name, shape, weights, kernels, with_peers):
        about = {"shape": name, "format": format, "kernel": peer.name}
        if peer.reason:
            yield about | {"left_out": peer.reason}
            continue
        for tokens, (x, routings, expected) in cases.items():
            row = about | {"tokens": tokens}
            call = peer.make(tokens)
            if call is None:
                continue
            own = KERNELS.get(getattr(call, "kernel", peer.name), REFERENCE)
            if own.quantizes_activations:
                if tokens not in rounded:
                    rounded[tokens] = float32_result(x, weights, *routings[0], own)
                expected = rounded[tokens]
            inputs = [(x, ids, w if peer.ours else w.to(x)) for ids, w in routings]
            try:
                yield row | _checked(call, peer.ours, own, inputs, expected, shape, rates)
            except FAILURES as problem:
                if peer.ours:
                    raise
                yield row | {"left_out": " ".join(f"{type(problem).__name__}: {problem}".split())}
    for kind in GEMMS if with_peers else ():
        about = {"shape": name, "format": format, "kernel": PREFIX + kind.name}
        if reason := kind.reason(weights):
            yield about | {"left_out": reason}
            continue
        pair = kind(weights)
        for tokens, (x, routings, _) in cases.items():
            calls = [pair.calls(x, ids) for ids, _ in routings]
            error = pair.error(*calls[0])
            result = about | {"tokens": tokens, "error": error}
            if not error <= 2 * LIMIT:
                yield result | {"wrong": True}
                continue
            us = graph_us([functools.partial(pair.run, *call) for call in calls])
            yield result | _timed(shape, [ids for ids, _ in routings], us, rates)


def _checked(
    call: Callable,
    ours: bool,
    own: Kernel,
    inputs: Sequence[tuple[torch.Tensor, ...]],
    expected: torch.Tensor,
    shape: Layer,
    rates: Rates,
) -> dict[str, Any]:
    """Return error and time of a call, or that its result is wrong, without a time."""
    with torch.no_grad():
        got, again = (call(*inputs[0]) for _ in range(2))
        error = relative_error(got, expected)
        # Hugging Face rounds more often, and its sums are atomic: only ours must be equal.
        limit = ROUNDED_LIMIT if own.quantizes_activations or not ours else LIMIT
        if not error <= limit or (ours and not torch.equal(got, again)):
            return {"error": error, "wrong": True}
        us = graph_us([functools.partial(call, *each) for each in inputs])
    return {"error": error} | _timed(shape, [ids for _, ids, _ in inputs], us, rates)


def _timed(shape: Layer, ids: list[torch.Tensor], us: float, rates: Rates) -> dict[str, float]:
    """Return what a time means for the experts that these routings [T, K] hit."""
    hit = statistics.mean(len(each.unique()) for each in ids)
    size = hit * bytes_per_expert(shape)
    operations = 2 * ids[0].numel() * weights_per_expert(shape)
    floor = max(size / rates.bandwidth, operations / rates.operations) * 1e6
    times = {"us": round(us, 2), "floor_us": round(floor, 2)}
    return times | {"gbs": size / us / 1e3, "tflops": operations / us / 1e6}


def add_parser(commands: Any) -> None:
    """Add `bench` to the subcommands of `fp4moe`."""
    command = add_command(
        commands,
        "bench",
        "Time the kernels on this GPU, after checking their results.",
        "Times are microseconds for one layer of experts: the median of replayed CUDA graphs.",
        "fp4moe bench --shape gemma4 --tokens 1 64 --json rows.json\nfp4moe bench --tune",
    )
    own, help = list(SHAPES), "layers of these models"
    command.add_argument("--shape", nargs="+", choices=SHAPES, default=own, help=help)
    own, help = [DEFAULT_FORMAT], "number formats of the weights"
    command.add_argument("--format", nargs="+", choices=FORMATS, default=own, help=help)
    tokens, help = list(TOKENS), "numbers of tokens in one call"
    command.add_argument("--tokens", nargs="+", type=_positive, default=tokens, help=help)
    command.add_argument("--kernel", nargs="+", default=[], help="default: auto and all that run")
    kinds, help = ("balanced", "skewed"), "whether experts get alike many tokens, or some get most"
    command.add_argument("--routing", choices=kinds, default="balanced", help=help)
    flag, help = argparse.BooleanOptionalAction, "others' kernels in the same run"
    command.add_argument("--peers", action=flag, default=True, help=help)
    command.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    command.add_argument("--commit", default="", help="a note on the version measured")
    command.add_argument("--tune", action="store_true", help="measure tiles and kernels for auto")
    command.add_argument("--output", help="file that --tune writes; default: one in your home")
    help = "processes that compile for --tune"
    command.add_argument("--jobs", type=_positive, default=8, help=help)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("a number of 1 or more")
    return number


_positive.__name__ = "number of 1 or more"  # argparse names it: "invalid ... value: '0'"


def check_output(path: str | None, *, tuned: bool = False) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Args:
        path: of --json, or with `tuned` of --output, whose earlier measurements are kept.

    Raises:
        UnsupportedError: it cannot be opened, or holds something else than measurements.
    """
    if not path:
        return
    try:
        if tuned:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            if os.path.exists(path):
                measured.read(pathlib.Path(path))
        with open(path + ".unfinished" if tuned else path, "a"):
            pass
    except (OSError, ValueError) as error:
        must(
            "bench: --json and --output",
            "be files that can be written",
            f"{path!r}: {error}",
            "Choose another.",
            error=UnsupportedError,
            cause=error,
        )


def facts() -> dict[str, Any]:
    """GPU, versions and date of a measurement."""
    names = ("torch", "triton", "transformers", "humming-kernels")
    versions = {}
    for name in names:
        if importlib.util.find_spec(name.replace("-kernels", "")):
            versions[name] = importlib.metadata.version(name)
    today = datetime.date.today().isoformat()
    return {"gpu": torch.cuda.get_device_name(), "date": today, "versions": versions}


def require_gpu() -> None:
    """Raise UnsupportedError without a CUDA device."""
    if not torch.cuda.is_available():
        advice = "Run it where the model is to run."
        must("bench: device", "be a CUDA GPU", "a CPU", advice, error=UnsupportedError)


def run(arguments: argparse.Namespace) -> int:
    """Print a row per shape, kernel and number of tokens; 1 where a result was wrong.

    Raises:
        UnsupportedError: there is no CUDA device, or a kernel does not run here.
    """
    require_gpu()
    check_output(arguments.json)
    skew = SKEW if arguments.routing == "skewed" else 0.0
    about = facts() | {"routing": arguments.routing, "commit": arguments.commit}
    rates = card_rates()
    about |= {"copy_bytes_per_s": rates.bandwidth, "bf16_operations_per_s": rates.operations}
    print(json.dumps(about))
    print(
        f"floors: a copy at {rates.bandwidth / 1e12:.2f} TB/s, bfloat16 products at "
        f"{rates.operations / 1e12:.0f} TFLOP/s, as measured on this card"
    )
    print(
        f"{'shape':7s}{'format':12s}{'T':>6s} {'us':>8s} {'floor':>7s} {'share':>6s} {'GB/s':>6s}"
        f" {'TFLOP/s':>8s}"
        f" {'error':>8s}  kernel"
    )
    rows, wrong = [], False
    for name, format in itertools.product(arguments.shape, arguments.format):
        kernels = arguments.kernel or ["auto", *runnable(shape_of(name, format))]
        if arguments.peers:
            kernels = [kernel for kernel in kernels if kernel != "humming"]
        measured_rows = measure(
            name, kernels, arguments.tokens, skew, arguments.peers, format, rates
        )
        for row in measured_rows:
            if "left_out" in row:
                where = f" T = {row['tokens']}" if "tokens" in row else ""
                print(f"{name} {format}{where} {row['kernel']}: left out, {row['left_out']}")
                continue
            if row.pop("wrong", False):
                print(
                    f"{name} {format} T = {row['tokens']} {row['kernel']}: wrong, error "
                    f"{row['error']:.1e}"
                )
                wrong = True
                continue
            print(
                f"{name:7s}{format:12s}{row['tokens']:6d} {row['us']:8.1f} {row['floor_us']:7.1f} "
                f"{row['floor_us'] / row['us']:6.2f} {row.pop('gbs'):6.0f} "
                f"{row.pop('tflops'):8.1f} {row['error']:8.1e}  {row['kernel']}",
                flush=True,
            )
            rows.append(row)
            if arguments.json:
                text = json.dumps(about | {"rows": rows}, indent=1)
                pathlib.Path(arguments.json).write_text(text + "\n")
    for line in ratios(rows):
        print(line)
    return int(wrong)


def runnable(shape: Layer) -> list[str]:
    """The GPU kernels that run here; the references are no contenders."""
    names = [name for name in KERNELS if not name.startswith("reference")]
    return [name for name in names if choose_kernel(name, shape, current_capability())[0]]


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines with how many times faster auto is than the others, in this run."""
    keys = ("shape", "format", "kernel", "tokens")
    us = {tuple(row[key] for key in keys): row["us"] for row in rows}
    others = [k for k in dict.fromkeys(row["kernel"] for row in rows) if k != "auto"]
    for shape, format, kernel, tokens in us:
        if kernel == "auto":
            times = {other: us.get((shape, format, other, tokens)) for other in others}
            own = us[shape, format, kernel, tokens]
            parts = [f"{time / own:.2f}x {other}" for other, time in times.items() if time]
            yield f"{shape:7s}{format:12s}{tokens:6d} auto against: {', '.join(parts)}"
