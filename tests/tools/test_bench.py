"""`fp4moe bench` without a GPU: what it compares with is the same layer; what it says; refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from fp4moe.testing import make_layer, relative_error
from fp4moe.tools import bench
from fp4moe.tools.card import Rates
from fp4moe.tools.cli import main
from fp4moe.tools.grouped_gemms import GroupedGemms
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


BYTES, OPERATIONS = 1e9, 1e15


@pytest.fixture
def on_cpu(monkeypatch):
    """`fp4moe bench` of small layers on a CPU, with a clock that notes what it is asked to time."""
    timed = []

    def clock(calls):
        timed.append([call() for call in calls])
        return 10.0

    small = dict(hidden_size=64, intermediate_size=48, num_experts=8, top_k=2)
    shapes = {name: dataclasses.replace(layer, **small) for name, layer in bench.SHAPES.items()}
    monkeypatch.setattr(bench, "SHAPES", shapes)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "graph_us", clock)
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "facts", dict)
    monkeypatch.setattr(bench, "card_rates", lambda: Rates(BYTES, OPERATIONS))
    return timed


def bench_rows(tmp_path, *arguments):
    path = tmp_path / "rows.json"
    code = main(["bench", "--kernel", "reference", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_peers_stand_in_the_same_table(on_cpu, tmp_path, capsys):
    code, found = bench_rows(tmp_path, "--peers", "--tokens", "5", "20")
    said = capsys.readouterr().out
    assert code == 0, said
    assert (found["copy_bytes_per_s"], found["bf16_operations_per_s"]) == (BYTES, OPERATIONS)
    assert "floors: a copy at 0.00 TB/s, bfloat16 products at 1000 TFLOP/s" in said
    peers = ["peer:grouped_mm", "peer:batched_mm", "peer:torch._grouped_mm x2"]
    expected = list(itertools.product(("gemma4", "nano"), ("reference", *peers), (5, 20)))
    assert [(row["shape"], row["kernel"], row["tokens"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert row.keys() == {"shape", "format", "kernel", "tokens", "us", "floor_us", "error"}
        assert row["us"] == 10.0
        # All 8 experts are hit by 20 tokens: codes of 4 bits, a byte for each 16 of them, and
        # two global scales; times have two decimals.
        expert = (3 if row["shape"] == "gemma4" else 2) * 64 * 48 * 4.5 / 8 + 2 * 4
        if row["tokens"] == 20:
            assert abs(row["floor_us"] - 8 * expert / BYTES * 1e6) <= 0.005
    for peer in ("humming", "deepgemm", "sonicmoe"):
        assert f"gemma4 nvfp4 peer:{peer}: left out, " in said
    # 5 tokens rotate through 8 routings, 20 have one.
    assert [len(calls) for calls in on_cpu] == [8, 1] * 8


def test_without_peers_there_are_none(on_cpu, tmp_path):
    code, found = bench_rows(tmp_path, "--no-peers", "--tokens", "5", "--shape", "nano")
    assert code == 0 and [row["kernel"] for row in found["rows"]] == ["reference"]


@pytest.mark.parametrize("kind", ["off by 2 percent", "NaN", "another token's"])
def test_a_wrong_peer_has_no_time(kind, on_cpu, tmp_path, capsys, monkeypatch):
    def wrong(*args, **kwargs):
        out = batched_mm_experts_forward(*args, **kwargs)
        bad = {
            "NaN": out / 0 * 0,
            "off by 2 percent": out * 1.02,
            "another token's": out.roll(1, 0),
        }
        return bad[kind]

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", wrong)
    code, found = bench_rows(tmp_path, "--tokens", "5", "--shape", "gemma4")
    kernels = [row["kernel"] for row in found["rows"]]
    assert code == 1 and len(on_cpu) == 3
    assert kernels == ["reference", "peer:grouped_mm", "peer:torch._grouped_mm x2"]
    assert "gemma4 nvfp4 T = 5 peer:batched_mm: wrong, error" in capsys.readouterr().out


def test_a_peer_that_fails_is_named_and_left_out(on_cpu, tmp_path, capsys, monkeypatch):
    def failing(*args, **kwargs):
        raise NotImplementedError("no such activation")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", failing)
    code, found = bench_rows(tmp_path, "--tokens", "5", "--shape", "gemma4")
    assert code == 0 and len(found["rows"]) == 3
    said = "T = 5 peer:grouped_mm: left out, NotImplementedError: no such activation"
    assert said in capsys.readouterr().out


def test_the_grouped_gemms_are_checked_before_they_are_timed(on_cpu, tmp_path, monkeypatch):
    exact = GroupedGemms.multiply
    monkeypatch.setattr(GroupedGemms, "multiply", lambda self, *args: exact(self, *args) * 1.02)
    code, found = bench_rows(tmp_path, "--tokens", "5", "--shape", "nano")
    assert code == 1 and len(found["rows"]) == 3


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
