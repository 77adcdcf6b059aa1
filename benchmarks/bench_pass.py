"""How long the pass takes beside the compiler: a Gemma4 graph of 30 layers with 128 experts each.

    python benchmarks/bench_pass.py [--hidden 2816 --intermediate 704] [--inductor]

Widths are small by default, as the cost hangs on the number of nodes; only the one verification
grows with them. All layers share one layer's expert weights, so that they fit into memory. Packing,
done once for each weight however often it is compiled, is timed apart. The last rows verify one
block at its real width, in a process whose peak memory is read before and after.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import pathlib
import re
import time
import warnings

import torch
from machine import cpu_name

import fp4moe
from fp4moe.passes import rewrite_moe
from fp4moe.passes.find.by_flow import propose_regions
from fp4moe.passes.graph.dataflow import Flow
from fp4moe.passes.judge.verify import judge_region


def model(layers: int, hidden: int, intermediate: int) -> torch.nn.Module:
    """Gemma4 with random bf16 weights; every layer has the expert weights of the first."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * intermediate,
        moe_intermediate_size=intermediate,
        num_experts=128,
        top_k_experts=8,
        enable_moe_block=True,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        sliding_window=32,
        pad_token_id=0,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        built = Gemma4ForCausalLM(config)
    first = built.model.layers[0].experts
    for layer in built.model.layers:
        layer.experts.gate_up_proj, layer.experts.down_proj = first.gate_up_proj, first.down_proj
    built = built.bfloat16().to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return built


def captured(built: torch.nn.Module):
    """The graph that dynamo hands to a backend, and its inputs."""
    found = []

    def backend(graph, values):
        found.append((graph, values))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(built, backend=backend, fullgraph=True)(torch.arange(9)[None])
    return found[0]


def verify_at_real_width(implementation: str) -> None:
    """Print what one verification takes at 128 experts of 2816 x 704."""
    warnings.simplefilter("ignore")
    built = model(1, 2816, 704)
    built.set_experts_implementation(implementation)
    graph, _ = captured(built)
    (regions,) = propose_regions(Flow(graph.graph))
    region = next(regions)
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    # Building the model had a peak of its own.
    reset.write_text("5")
    peak, start = re.compile(r"VmHWM:\s+(\d+)"), time.perf_counter()
    before = int(peak.search(status.read_text())[1])
    verdict = judge_region(graph, region)
    seconds = time.perf_counter() - start
    grown = int(peak.search(status.read_text())[1]) - before
    if verdict.form is None:
        raise RuntimeError(f"bench_pass: the block must be recognised; got {verdict.reason}")
    print(
        f"verification, {implementation}, 128 experts, H 2816, I 704, bf16: {seconds:.1f} s, peak "
        f"memory + {grown / 1000:.0f} MB"
    )


def main() -> None:
    """Print the time of the pass with and without packing, and Inductor's own if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=64)
    parser.add_argument("--inductor", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    built = model(args.layers, args.hidden, args.intermediate)
    start = time.perf_counter()
    graph, values = captured(built)
    dynamo = time.perf_counter() - start
    print(f"{cpu_name()}, torch {torch.__version__}, fp4moe {fp4moe.__version__}")
    print(
        f"{args.layers} layers, {len(graph.graph.nodes)} nodes, H {args.hidden}, "
        f"I {args.intermediate}; capture by dynamo {dynamo:.1f} s"
    )
    for name in ("pass and packing", "pass"):
        again = copy.copy(graph)
        again.graph = copy.deepcopy(graph.graph)
        start = time.perf_counter()
        with torch.no_grad():
            report = rewrite_moe(again, values)
        seconds = time.perf_counter() - start
        if report.count != args.layers:
            raise RuntimeError(f"bench_pass: all blocks must be rewritten; got\n{report}")
        print(f"{name}: {seconds:.2f} s, {report.count} blocks")
    if args.inductor:
        torch._dynamo.reset()
        start = time.perf_counter()
        with torch.no_grad():
            torch.compile(built, fullgraph=True)(torch.arange(9)[None])
        print(f"torch.compile with Inductor, without the pass: {time.perf_counter() - start:.1f} s")
    del built, graph, values, again
    for implementation in ("grouped_mm", "batched_mm"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(verify_at_real_width, (implementation,))


if __name__ == "__main__":
    main()
