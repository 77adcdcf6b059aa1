"""benchmarks/bench_linear.py: tiles that it tries can run, and it says where there is no GPU."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

from fp4moe.kernels.triton.linear import choose_tile, steps_of

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_linear(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_linear

    return bench_linear


def test_tiles_near_the_rule_can_run(bench_linear):
    for shape in bench_linear.SHAPES:
        rows, columns = bench_linear.sizes(shape)
        for tokens in bench_linear.NEAR_TOKENS:
            rule = choose_tile(tokens, rows, columns, 132)
            found = bench_linear.near(rule, tokens)
            assert found[0] == rule and 5 <= len(found) == len(set(found)) <= 16
            for tile in found:
                for number in (tile.slots, tile.chunks, tile.rows, tile.slabs, tile.warps):
                    assert number & (number - 1) == 0 < number
                # The limits of LinearTile, and a count of steps that covers K.
                assert tile.slots * tile.chunks >= 16 and 16 <= tile.rows * tile.chunks <= 128
                constants, slabs, steps, split_steps, splits = steps_of(tile, "nvfp4", columns)
                assert tile.chunks * constants["SLABS"] * steps >= slabs
                assert split_steps * splits >= steps > split_steps * (splits - 1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(FOLDER / "bench_linear.py"), "--tune", "--near"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "needs a CUDA device" in done.stdout
