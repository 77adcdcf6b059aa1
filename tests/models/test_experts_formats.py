"""experts_implementation="fp4moe_<format>": transformers' registry in each number format."""

from __future__ import annotations

import copy

import checkpoint_makers as makers
import pytest
import torch
from tiny_models import enlarge_experts, family, gemma4, nemotron_h, qwen3_moe
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.formats import FORMATS
from fp4moe.module import FusedExperts
from fp4moe.testing import relative_error

pytestmark = pytest.mark.usefixtures("registered")

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))
BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "gpt_oss": lambda: family("gpt_oss")}
# Relative errors of one weight: a step of the grid is at most this part of it, halved.
LARGEST = {"nvfp4": 0.13, "mxfp4": 0.17}


def name_of(format):
    return "fp4moe" if format == "nvfp4" else f"fp4moe_{format}"


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def formats_of(model):
    return [m.layer.format for m in model.modules() if isinstance(m, FusedExperts)]


def fused(model, format):
    return fp4moe.replace_moe(copy.deepcopy(model), format=format, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", BUILDS)
def test_it_equals_replace_moe(name, format):
    model = enlarge_experts(BUILDS[name]())
    wanted = fused(model, format)
    model.set_experts_implementation(name_of(format))
    assert torch.equal(logits(model), logits(wanted))
    assert formats_of(model) == [format] * 2
    assert {block.format for block in fp4moe.explain(model).blocks} == {format}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_again(format, caplog):
    model = enlarge_experts(qwen3_moe())
    before = {n: p.clone() for n, p in model.named_parameters() if ".experts." in n}
    packed = logits(fused(model, format))
    for _ in range(2):
        caplog.clear()
        model.set_experts_implementation(name_of(format))
        # What went back is on the grid of the format, and packs to what it was.
        torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-4)
        assert not caplog.records
        model.set_experts_implementation("grouped_mm")
        assert relative_error(logits(model), packed) < 1e-5
        (record,) = caplog.records
        assert f"carry the rounding of {format}; load the model again" in record.getMessage()
        for key, value in before.items():
            error = relative_error(model.get_parameter(key), value)
            assert 0 < error < LARGEST.get(format, 0.04)


@pytest.mark.parametrize(("first", "second"), [("fp8", "mxfp4"), ("nvfp4", "fp8_block")])
def test_from_one_format_to_another(first, second):
    model = enlarge_experts(qwen3_moe())
    model.set_experts_implementation(name_of(first))
    logits(model)
    floats = copy.deepcopy(model)
    floats.set_experts_implementation("grouped_mm")
    logits(floats)
    wanted = logits(fused(floats, second))
    model.set_experts_implementation(name_of(second))
    assert torch.equal(logits(model), wanted)
    assert formats_of(model) == [second] * 2
    # Two models of one class at a time, each in its own.
    floats.set_experts_implementation(name_of(first))
    logits(floats)
    assert (formats_of(model), formats_of(floats)) == ([second] * 2, [first] * 2)


@pytest.mark.parametrize(
    ("first", "second", "ratio"), [("fp8", "nvfp4", 6), ("nvfp4", "fp8", 1 / 6)]
)
def test_calibrated_ranges_go_along(first, second, ratio):
    """A scale of NVFP4 expresses 6 times what one of FP8 does, so for one range it is a sixth."""
    model = enlarge_experts(qwen3_moe())
    model.set_experts_implementation(name_of(first))
    logits(model)
    for part in (m for m in model.modules() if isinstance(m, FusedExperts)):
        part.set_activation_scales(0.5, 0.25)
    # fp8_channel has none, and loses none.
    for name in (name_of(second), name_of("fp8_channel"), "grouped_mm", name_of(second)):
        model.set_experts_implementation(name)
        logits(model)
    for part in (m for m in model.modules() if isinstance(m, FusedExperts)):
        hidden, inner = part.activation_scales()
        torch.testing.assert_close(hidden, torch.full((1,), 0.5 / ratio))
        torch.testing.assert_close(inner, torch.full((8,), 0.25 / ratio))


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_by_name_in_from_pretrained(format, tmp_path):
    makers.save_float("nemotron_h", tmp_path)
    options = {"dtype": torch.float32, "experts_implementation": name_of(format)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    wanted = fp4moe.from_pretrained(tmp_path, dtype=torch.float32, format=format, progress=False)
    assert torch.equal(logits(model), logits(wanted))


@pytest.mark.slow
def test_it_compiles_after_one_eager_call(fresh_dynamo):
    model = enlarge_experts(gemma4("fp4moe_fp8"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = logits(model)
    assert torch.equal(logits(compiled), expected)
