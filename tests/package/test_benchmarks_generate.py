"""benchmarks/generate.py runs on a CPU with small models, and says so where a part of it fails."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "generate.py"
SETTINGS = ("huggingface", "replace_moe", "linears", "fused", "backend")


def run(path: pathlib.Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--new-tokens", "3", "--batch", "2"]
    command += ["--json", str(path / "rows.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, json.loads((path / "rows.json").read_text())["rows"]


@pytest.mark.slow
def test_both_models_in_every_setting(tmp_path):
    done, rows = run(tmp_path, "--one-process")
    assert done.returncode == 0, done.stderr
    expected = [(model, s) for model in ("gemma4", "nemotron") for s in SETTINGS]
    assert [(row["model"], row["setting"]) for row in rows] == expected
    for row in rows:
        assert row["batch"] == 2 and row["decode_ms"] > 0 and row["prefill_ms"] > 0
        # huggingface keeps its bytes, replaced experts have 4.5 of 16 bits, backend has both.
        packed = (0.28, 0.99)
        limits = {
            "huggingface": (1, 1),
            "replace_moe": packed,
            "linears": packed,
            "fused": packed,
            "backend": (1, 1.29),
        }
        low, high = limits[row["setting"]]
        assert low <= row["of_bf16"] <= high
    # NVFP4 against bf16 experts cannot give the same logits; the same weights differ by roundings.
    errors = {(row["model"], row["setting"]): row["logits_error"] for row in rows}
    for model in ("gemma4", "nemotron"):
        assert errors[model, "backend"] > 1e-3 + errors[model, "replace_moe"]
    assert done.stdout.count("logits against replace_moe") == 2
    # Attention and MLP of two layers, one of which has no v_proj; Mamba and two shared experts.
    for linears in (13, 6):
        assert f"worst of {linears} Linears" in done.stdout
    sizes = {(row["model"], row["setting"]): row["of_bf16"] for row in rows}
    for model in ("gemma4", "nemotron"):
        assert sizes[model, "linears"] < sizes[model, "replace_moe"]
        assert f"{model} batch 2: with Linears " in done.stdout


@pytest.mark.slow
def test_a_setting_that_fails_says_so_and_the_others_go_on(tmp_path):
    arguments = ["--model", "gemma4", "--settings", "replace_moe", "huggingface"]
    done, rows = run(tmp_path, *arguments, "--kernel", "flashinfer_trtllm")
    assert done.returncode == 1
    assert "gemma4 replace_moe: not complete, exit code 1" in done.stdout
    assert "UnsupportedError" in done.stderr
    assert [row["setting"] for row in rows] == ["huggingface"]
