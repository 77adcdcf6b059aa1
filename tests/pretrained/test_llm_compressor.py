"""Checkpoints that llm-compressor itself has written (tests/data/README.md), loaded."""

from __future__ import annotations

import json
import logging
import pathlib

import checkpoint_makers as makers
import pytest
import torch
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.testing import relative_error
from fp4moe.tools.cli_explain import explain_source

FILES = pathlib.Path(__file__).resolve().parents[1] / "data" / "llm_compressor"
# Schemes: the format of the experts, and of the other Linears.
FORMATS = {
    "FP8": ("fp8", "fp8"),
    "FP8_DYNAMIC": ("fp8_channel", "fp8_channel"),
    "FP8_BLOCK": ("fp8_block", "fp8_block"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "NVFP4A16": ("nvfp4", "nvfp4"),
    "MXFP8": ("mxfp8", "mxfp8"),
    "MXFP4A16": ("mxfp4", "mxfp4"),
    "NVFP4_with_FP8": ("nvfp4", "fp8_channel"),
}
NAMES = sorted(folder.name for folder in FILES.iterdir())
SCHEME = {n: max((s for s in FORMATS if n.endswith(f"_{s}")), key=len) for n in NAMES}
# The same products in float32, in another order: a few units of 2^-24.
ROUNDING = 1e-6


def load(name):
    return fp4moe.from_pretrained(FILES / name, dtype=torch.float32, progress=False)


def parts(model, kind):
    return {path: m for path, m in model.named_modules() if isinstance(m, kind)}


def test_the_files_are_the_tools_own():
    assert set(SCHEME.values()) == set(FORMATS)
    for name, scheme in SCHEME.items():
        recipe = (FILES / name / "recipe.yaml").read_text()
        # Of two modifiers the tool writes the last alone.
        last = "FP8_DYNAMIC" if "_with_" in scheme else scheme
        assert "QuantizationModifier" in recipe and f"scheme: {last}\n" in recipe
        config = json.loads((FILES / name / "config.json").read_text())
        assert config["quantization_config"]["version"] == "0.19.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_tools_own_dequantisation(name, registered, caplog):
    with caplog.at_level(logging.WARNING, "fp4moe"):
        model = load(name)
    assert not [record for record in caplog.records if record.name == "fp4moe"]
    experts, others = FORMATS[SCHEME[name]]
    (layer,) = parts(model, fp4moe.FusedExperts).values()
    assert layer.layer.format == experts
    linears = parts(model, fp4moe.PackedLinear).values()
    assert len(linears) >= 4 and {linear.format for linear in linears} == {others}
    expected = makers.logits(makers.reference_model(FILES / name))
    assert relative_error(makers.logits(model), expected) < ROUNDING
    plain = AutoModelForCausalLM.from_pretrained(FILES / name, dtype=torch.float32)
    assert torch.equal(makers.logits(plain), makers.logits(model))
    # The experts count for more than the limit.
    layer.prepared_down_block_scale.zero_()
    assert relative_error(makers.logits(model), expected) > 1e-2


@pytest.mark.parametrize("name", [n for n in NAMES if SCHEME[n] in ("FP8", "NVFP4")])
def test_ranges_of_activations(name):
    """NVFP4's are stored as reciprocals, FP8's as they are; gate and up share the largest."""
    tensors = makers.load_tensors(FILES / name)
    model = load(name)
    ((path, layer),) = parts(model, fp4moe.FusedExperts).items()
    path = path.replace("model.", "backbone.", 1) if name.startswith("nemotron") else path
    leaf = "input_scale" if SCHEME[name] == "FP8" else "input_global_scale"

    def stored(projection):
        found = [float(tensors[f"{path}.{e}.{projection}.{leaf}"]) for e in range(4)]
        return found if leaf == "input_scale" else [1 / value for value in found]

    hidden, inner = layer.activation_scales()
    gate = stored("gate_proj") if layer.layer.gated else []
    torch.testing.assert_close(hidden, torch.tensor([max(gate + stored("up_proj"))]))
    torch.testing.assert_close(inner, torch.tensor(stored("down_proj")))
    assert bool((hidden != 1).all() and (inner != 1).all())


def test_scales_of_a_cache_are_left_out(caplog):
    name = "qwen3_moe_NVFP4_with_FP8"
    assert "model.layers.0.self_attn.k_scale" in makers.load_tensors(FILES / name)
    with caplog.at_level(logging.INFO, "fp4moe"):
        load(name)
    (record,) = [r for r in caplog.records if "not loaded" in r.getMessage()]
    assert "self_attn.k_scale" in record.getMessage() and "v_scale" in record.getMessage()


@pytest.mark.parametrize("name", ["gemma4_FP8_BLOCK", "nemotron_h_FP8_DYNAMIC"])
def test_explain_says_what_is_read(name):
    (block,) = explain_source(str(FILES / name)).blocks
    assert (block.status, block.format) == ("loadable", FORMATS[SCHEME[name]][0])
