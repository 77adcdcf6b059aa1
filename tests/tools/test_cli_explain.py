"""`fp4moe explain DIR` says what from_pretrained does with that directory."""

from __future__ import annotations

import json

import checkpoint_makers as makers
import pytest
import torch
import transformers
from tiny_models import COMMON, enlarge_experts, family, finish

import fp4moe
from fp4moe.errors import CheckpointError
from fp4moe.tools.cli import main
from fp4moe.tools.cli_explain import explain_source

MODELOPT = {"quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.31.0"}}


def fused(directory):
    """The blocks that from_pretrained packs."""
    model = fp4moe.from_pretrained(directory, progress=False)
    return {n for n, m in model.named_modules() if isinstance(m, fp4moe.FusedExperts)}


def loadable(report):
    return {block.path for block in report.blocks if block.status == "loadable"}


def save_own(name, directory):
    """What fp4moe itself writes."""
    source = directory.with_name(directory.name + "_float")
    makers.save_float(name, source)
    fp4moe.quantize_checkpoint(source, directory, progress=False)


def entry(directory, change):
    """Edit the quantization entry of config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = change(config.get("quantization_config"))
    path.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "gemma4_multimodal", "nemotron_h", "qwen3_moe"])
@pytest.mark.parametrize("save", [save_own, makers.save_compressed])
def test_the_blocks_are_those_that_from_pretrained_packs(save, name, tmp_path):
    if save is makers.save_compressed and name == "gemma4_multimodal":
        name = "nemotron_h_latent"
    directory = tmp_path / "packed"
    directory.mkdir()
    save(name, directory)
    report = explain_source(str(directory))
    assert loadable(report) == fused(directory) == {block.path for block in report.blocks}
    assert len(report.blocks) == 2
    assert "NVFP4" in report.checkpoint and "packs 2 of its blocks" in str(report)
    assert report.to_dict()["checkpoint"] == report.checkpoint
    # What is stored: half a byte a value, a byte for 16, and a few scales.
    values = sum(b.num_experts * (2 + b.gated) * 48 * b.hidden_size for b in report.blocks)
    assert values * 9 // 16 <= report.nbytes < values * 9 // 16 * 1.02
    # The same by the configuration alone, as of a hub id.
    for file in directory.glob("*.safetensors"):
        file.unlink()
    assert loadable(explain_source(str(directory))) == loadable(report)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_experts_that_are_left_in_float_are_not_loadable(name, tmp_path):
    makers.save_float(name, tmp_path / "float")
    target = tmp_path / "packed"
    fp4moe.quantize_checkpoint(tmp_path / "float", target, layers=r"layers\.0\.", progress=False)
    report = explain_source(str(target))
    assert loadable(report) == fused(target) == {report.blocks[0].path}
    assert report.blocks[1].status == "replaceable"
    assert "not packed in this checkpoint" in report.blocks[1].reasons[0]


@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_a_quantisation_that_is_only_in_hf_quant_config(name, tmp_path):
    save_own(name, tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert loadable(explain_source(str(tmp_path / "packed"))) == fused(tmp_path / "packed") != set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "[64, 64]"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        (MODELOPT | {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'pack-quantized'"),
        ({"bits": 4, "group_size": 64}, "quant_method None"),
    ],
)
def test_a_quantisation_that_is_not_read_is_named(name, written, said, tmp_path):
    makers.save_float(name, tmp_path)
    entry(tmp_path, lambda old: written)
    with pytest.raises(CheckpointError) as refused:
        fp4moe.from_pretrained(tmp_path, progress=False)
    report = explain_source(str(tmp_path))
    assert said in report.checkpoint and said in str(refused.value)
    assert {block.status for block in report.blocks} == {"not replaceable"}


def test_a_damaged_quantised_checkpoint_is_refused_as_from_pretrained_does(tmp_path):
    save_own("qwen3_moe", tmp_path / "packed")
    key = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    broken = makers.rewrite(tmp_path / "packed", tmp_path / "broken", lambda t: t.pop(key))
    assert f"missing 1 ('{key}')" in explain_source(str(broken)).checkpoint


def qwen3_vl_moe():
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = COMMON | {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | {"num_position_embeddings": 16},
    )
    return finish(transformers.Qwen3VLMoeForConditionalGeneration, config, "eager", torch.bfloat16)


@pytest.mark.parametrize("build", [qwen3_vl_moe, lambda: makers.build("gemma4_multimodal")])
def test_classes_that_are_multimodal_only(build, tmp_path):
    model = enlarge_experts(build())
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    report = explain_source(str(tmp_path))
    assert report.model == type(model).__name__ and report.checkpoint is None
    assert {b.path for b in report.blocks if b.status == "replaceable"} == fused(tmp_path) != set()


@pytest.mark.parametrize("name", ["deepseek_v4", "hy_v4"])
def test_packed_experts_with_a_clamp(name, tmp_path):
    model = family(name, "eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "float")
    fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "packed", progress=False)
    report = explain_source(str(tmp_path / "packed"))
    loaded = fp4moe.from_pretrained(tmp_path / "packed", progress=False)
    experts = {p: m for p, m in loaded.named_modules() if isinstance(m, fp4moe.FusedExperts)}
    assert loadable(report) == set(experts) != set()
    assert {m.layer.activation for m in experts.values()} <= {"silu(limit=1.5)", "silu(limit=10)"}


def test_the_format_is_that_asked_for_or_stored(tmp_path, capsys):
    source = tmp_path / "float"
    makers.save_float("qwen3_moe", source)
    fp4moe.quantize_checkpoint(source, tmp_path / "packed", progress=False)
    for directory, options, wanted in (
        (source, [], "nvfp4"),
        (source, ["--format", "fp8_block"], "fp8_block"),
        (tmp_path / "packed", ["--format", "fp8_block"], "nvfp4"),
    ):
        assert main(["explain", str(directory), "--json", *options]) == 0
        blocks = json.loads(capsys.readouterr().out)["blocks"]
        assert {block["format"] for block in blocks} == {wanted}
