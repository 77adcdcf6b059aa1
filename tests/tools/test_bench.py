"""`fp4moe bench` without a GPU: what it compares with is the same layer; what it says; refusals."""

from __future__ import annotations

import itertools

import torch

from fp4moe.testing import make_layer, relative_error
from fp4moe.tools import bench
from fp4moe.tools.cli import main
from fp4moe.tools.huggingface_experts import huggingface_experts
from fp4moe.tools.measure import candidates, families


def layer(name):
    shape = bench.SHAPES[name]
    return make_layer(4, 64, 48, shape.activation, shape.gated)


def test_hugging_face_computes_the_same_layer():
    for name, top_k in (("gemma4", 3), ("nano", 2)):
        weights = layer(name)
        x, ids = torch.randn(5, 64), torch.rand(5, 4).topk(top_k).indices
        routing_weights = torch.rand(5, top_k)
        expected = bench.float32_result(x, weights, ids, routing_weights)
        experts = huggingface_experts(name, top_k, weights).float()
        experts.config._experts_implementation = "batched_mm"
        got = experts(x, ids, routing_weights)
        # Values of NVFP4 codes and scales fit into bfloat16; the global scale's product does not:
        # 2^-9 for each weight, and sums of 64 and 48 of them average that.
        assert relative_error(got, expected) < 2.0**-8


def test_ratios_are_against_auto():
    rows = [
        {"shape": "nano", "format": "fp8", "kernel": kernel, "tokens": 1, "us": us}
        for kernel, us in (("auto", 10.0), ("humming", 15.0), ("batched_mm", 40.0))
    ]
    rows.append(rows[1] | {"tokens": 2, "us": 3.0})
    rows.append(rows[1] | {"format": "nvfp4"})
    assert list(bench.ratios(rows)) == [
        "nano   fp8              1 auto against: 1.50x humming, 4.00x batched_mm"
    ]


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        assert main(["bench", "--shape", "nano", "--tokens", "1", "--no-peers"]) == 0
        assert "nano" in capsys.readouterr().out
    else:
        for command in (["bench"], ["bench", "--tune"]):
            assert main(command) == 2
            said = capsys.readouterr().err
            assert said.startswith("bench: device must be a CUDA GPU; got a CPU.")


def test_tiles_to_try_fit_the_load():
    assert families(8, 128) == [("slot", 16, 0)]
    assert families(128 * 8, 128) == [("sorted", 16, 0), ("sorted", 32, 0)]
    for density in (64, 128):
        sizes = [slots + more for _, slots, more in families(128 * density, 128)]
        assert density in sizes and any(density < size < 1.3 * density for size in sizes)
    for slots, more in ((16, 0), (32, 16), (64, 0), (128, 32)):
        for tile in itertools.chain(*candidates(slots, more)):
            assert (tile.slots, tile.more) == (slots, more) and tile.warps in (4, 8)
