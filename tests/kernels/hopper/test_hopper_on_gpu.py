"""Kernel `hopper` on a GPU of compute capability 9.0, against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_layers import compare, layer, relative

from fp4moe import FusedExperts
from fp4moe.kernels.hopper.kernel import HOPPER, run_with
from fp4moe.kernels.hopper.tiles import HopperTile
from fp4moe.kernels.triton.kernel import TRITON

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
# Three roundings to bfloat16 at most, each below 2^-9.
ROUNDED = 3 * 2.0**-9
GPT_OSS = "silu(alpha=1.702,beta=1,limit=0.5)"
TILES = {
    "small": (HopperTile(16, 3, 4), HopperTile(16, 2, 5)),
    "three": (HopperTile(80, 3, 3), HopperTile(80, 3, 3)),
    "odd": (HopperTile(136, 2, 3), HopperTile(136, 2, 3)),
    "large": (HopperTile(160, 2, 3), HopperTile(160, 2, 2)),
}
FORMATS = list(HOPPER.layouts)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(
    "activation, gated, tokens, dtype",
    [
        ("gelu_tanh", True, 1, torch.bfloat16),
        ("gelu", True, 5, torch.float32),
        ("relu2", False, 33, torch.float16),
        ("silu_step(limit=0.2)", True, 300, torch.bfloat16),
        ("silu_softcap(alpha=2,beta=3)", True, 64, torch.bfloat16),
        ("relu", False, 700, torch.bfloat16),
        ("identity", False, 90, torch.float16),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_results(format, activation, gated, tokens, dtype, tiles, poisoned_empty):
    # Padded to 384 and 256: row tiles that no group has, and columns behind the last.
    weights = layer(
        9, 336, 208, activation, gated, "cuda", num_experts=16, expert_offset=3, format=format
    )
    compare(TILES[tiles], weights, dtype, tokens, 5, ROUNDED, "cuda", run_with)


@pytest.mark.parametrize("activation, gated", [(GPT_OSS, True), ("relu2", False)])
@pytest.mark.parametrize("format", FORMATS)
def test_biases_and_parameters(format, activation, gated, poisoned_empty):
    weights = layer(5, 200, 328, activation, gated, "cuda", biased=True, format=format)
    compare(TILES["three"], weights, torch.bfloat16, 150, 3, ROUNDED, "cuda", run_with)


@pytest.mark.parametrize("tokens", [384, 1024, 2500])
@pytest.mark.parametrize("gated", [True, False])
def test_at_the_width_of_models(gated, tokens, poisoned_empty):
    """As kernel triton computes it, but for the order of sums; bits equal from run to run."""
    sizes = (128, 2816, 704, "gelu_tanh") if gated else (128, 2688, 1856, "relu2")
    prepared = TRITON.prepare(layer(*sizes, gated, "cuda"), hidden_alignment=256)
    hidden = (torch.randn(tokens, sizes[1], device="cuda") / 16).to(torch.bfloat16)
    ids = torch.rand(tokens, 128, device="cuda").topk(8).indices
    call = prepared.call(hidden, ids, torch.rand(tokens, 8, device="cuda"))
    got = HOPPER.run(call)
    # The sums' orders differ: where one falls on the other side of a rounding, by 2^-8 of itself.
    assert relative(got, TRITON.run(call)) < 2.0**-9
    assert torch.equal(got, HOPPER.run(call))
    strided = hidden.new_zeros(tokens, sizes[1] + 64)[:, : sizes[1]].copy_(hidden)
    assert torch.equal(got, HOPPER.run(call._replace(hidden=strided)))


def test_all_slots_at_one_expert_and_none():
    prepared = TRITON.prepare(layer(4, 256, 128, "silu", True, "cuda"), hidden_alignment=256)
    hidden = torch.randn(500, 256, device="cuda", dtype=torch.bfloat16) / 16
    weights = torch.rand(500, 2, device="cuda")
    ids = torch.full((500, 2), 3, device="cuda")
    call = prepared.call(hidden, ids, weights)
    assert relative(run_with(TILES["odd"], call), TRITON.run(call)) < 2.0**-9
    foreign = prepared.call(hidden, ids + 100, weights)
    assert torch.equal(run_with(TILES["odd"], foreign), torch.zeros_like(hidden))


def test_the_first_call_may_be_under_capture(fresh_dynamo):
    weights = layer(8, 192, 256, "silu", True, "cuda")
    experts = FusedExperts(weights, kernel="hopper", top_k=2)
    hidden = torch.randn(640, 192, device="cuda", dtype=torch.bfloat16)
    ids, routing = torch.randint(8, (640, 2), device="cuda"), torch.rand(640, 2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(hidden, ids, routing)
    graph.replay()
    assert torch.equal(out, experts(hidden, ids, routing))
    compiled = torch.compile(experts, fullgraph=True)
    assert torch.equal(out, compiled(hidden, ids, routing))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results += [experts(hidden, ids, routing) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, result) for result in results)
