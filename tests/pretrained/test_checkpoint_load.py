"""Checkpoints of the real tools, loaded: logits, what is refused, memory, both ways to load."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import checkpoint_makers as makers
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import fp4moe
from fp4moe.errors import CheckpointError, UnsupportedError
from fp4moe.models.routers import FusedRouter
from fp4moe.testing import relative_error

# Both sides compute the same products in float32; the tools divide by a scale where fp4moe
# multiplies (compressed-tensors), and sum in another order: a few units of 2^-24 a layer.
ROUNDING = 5e-6

# name -> (maker, NVFP4Linears, FP8Linears).
CHECKPOINTS = {
    "modelopt gemma4": (lambda d: makers.save_modelopt("gemma4", d), 14, 0),
    "modelopt gemma4 W4A16": (
        lambda d: makers.save_modelopt("gemma4", d, "W4A16_NVFP4_CFG"),
        14,
        0,
    ),
    "modelopt gemma4 multimodal": (
        lambda d: makers.save_modelopt("gemma4_multimodal", d, "NVFP4_EXPERTS_ONLY_CFG"),
        0,
        0,
    ),
    "modelopt gemma4 mixed": (lambda d: makers.save_modelopt("gemma4", d, "mixed"), 0, 6),
    "modelopt nemotron": (lambda d: makers.save_modelopt("nemotron_h", d), 10, 0),
    "modelopt nemotron latent mixed": (
        lambda d: makers.save_modelopt("nemotron_h_latent", d, "mixed"),
        0,
        6,
    ),
    "modelopt qwen3": (lambda d: makers.save_modelopt("qwen3_moe", d), 8, 0),
    "compressed gemma4": (lambda d: makers.save_compressed("gemma4", d), 14, 0),
    "compressed gemma4 W4A16": (lambda d: makers.save_compressed("gemma4", d, "NVFP4A16"), 14, 0),
    "compressed nemotron latent": (lambda d: makers.save_compressed("nemotron_h_latent", d), 10, 0),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a checkpoint once, when it is first asked for."""
    made: dict[str, pathlib.Path] = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("checkpoint")
            with torch.random.fork_rng(devices=[]):
                CHECKPOINTS[name][0](directory)
            # Not before: where a tool is missing, each test is skipped, not the first alone.
            made[name] = directory
        return made[name]

    return make


def load(directory, dtype=torch.float32, **options):
    return fp4moe.from_pretrained(directory, dtype=dtype, progress=False, **options)


def kinds(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_independent_dequantisation(checkpoint, registered, name):
    directory = checkpoint(name)
    reference = makers.reference_model(directory)
    expected = makers.logits(reference)
    model = load(directory)
    assert type(model) is type(reference) and not model.training
    assert len(kinds(model, fp4moe.FusedExperts)) == 2
    assert len(kinds(model, fp4moe.NVFP4Linear)) == CHECKPOINTS[name][1]
    assert len(kinds(model, fp4moe.FP8Linear)) == CHECKPOINTS[name][2]
    assert relative_error(makers.logits(model), expected) < ROUNDING
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(makers.logits(plain), makers.logits(model))
    # The experts count for more than the limit: without them the logits are others.
    for module in model.modules():
        if isinstance(module, fp4moe.FusedExperts):
            module.prepared_down_global_scale.zero_()
    assert relative_error(makers.logits(model), expected) > 1e-2


def without_configuration(name, content):
    return {k: v for k, v in content.items() if (name, k) != ("config.json", "quantization_config")}


@pytest.mark.slow
def test_plain_transformers_reads_hf_quant_config(checkpoint, registered, tmp_path):
    directory = checkpoint("modelopt gemma4")
    bare = makers.rewrite(directory, tmp_path, lambda tensors: None, without_configuration)
    assert "quantization_config" not in json.loads((bare / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(bare, dtype=torch.float32)
    assert torch.equal(makers.logits(plain), makers.logits(load(directory)))
    # The rest of a directory without that file is left alone.
    (bare / "hf_quant_config.json").unlink()
    assert not hasattr(AutoConfig.from_pretrained(bare), "quantization_config")


@pytest.mark.parametrize("name", ["gemma4", "nemotron"])
def test_the_rest_is_loaded_as_transformers_does(checkpoint, tmp_path, name):
    source = f"modelopt {name}"
    model = load(checkpoint(source), dtype="auto")
    makers.save_float("gemma4" if name == "gemma4" else "nemotron_h", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == plain.dtype == torch.bfloat16
    compared = 0
    ours = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    for key, tensor in (plain.state_dict(keep_vars=True) | dict(plain.named_buffers())).items():
        if key in ours and ours[key].dtype == tensor.dtype:
            assert torch.equal(ours[key], tensor), key
            assert ours[key].requires_grad == tensor.requires_grad
            compared += 1
    # What is not quantised: norms, embeddings, router, rotary and e_score_correction_bias buffers.
    assert compared >= 15
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == plain.config.tie_word_embeddings
    generated = model.generate(torch.tensor([[2, 5, 7]]), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 6)


@pytest.mark.slow
def test_loaded_model_compiles_without_a_break(checkpoint, fresh_dynamo):
    model = load(checkpoint("modelopt nemotron"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        assert relative_error(compiled(ids).logits, makers.logits(model)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h_latent", "qwen3_moe", "gemma4_multimodal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float_checkpoints_are_quantised_as_replace_moe_does(tmp_path, name, dtype):
    makers.save_float(name, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    fp4moe.replace_moe(expected, progress=False)
    model = load(tmp_path, dtype=dtype)
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8)), key


def test_experts_in_a_module_list_are_replaced_after_loading(tmp_path):
    config = transformers.MixtralConfig(
        **{**makers_common(), "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    model = transformers.MixtralForCausalLM(config)
    model.config.architectures = ["MixtralForCausalLM"]
    model.save_pretrained(tmp_path)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**makers_common()))
    dense.save_pretrained(tmp_path / "dense")
    assert len(kinds(load(tmp_path), fp4moe.FusedExperts)) == 2
    with pytest.raises(UnsupportedError, match="none of its modules is a known block of experts"):
        load(tmp_path / "dense")


def makers_common():
    return {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }


def test_some_float_experts_in_a_quantised_checkpoint_stay_float(checkpoint, tmp_path):
    """As a recipe that leaves a layer alone; the float layer is stored stacked, as in the model."""
    source = checkpoint("modelopt gemma4")
    whole = makers.reference_model(source)

    def change(tensors):
        for key in [k for k in tensors if k.startswith("model.layers.1.experts.")]:
            del tensors[key]
        experts = whole.model.layers[1].experts
        for name in ("gate_up_proj", "down_proj"):
            tensors[f"model.layers.1.experts.{name}"] = getattr(experts, name).detach().clone()

    model = load(makers.rewrite(source, tmp_path / "mixed", change))
    assert len(kinds(model, fp4moe.FusedExperts)) == 1
    error = relative_error(makers.logits(model), makers.logits(whole))
    assert error < ROUNDING


def test_an_expert_lost_from_a_float_layer_is_refused(checkpoint, tmp_path):
    """There transformers merges the experts; 5.17 would take a stack that is too short."""
    source = checkpoint("modelopt qwen3")
    whole = makers.reference_model(source).model.layers[1].mlp.experts

    def change(tensors, lost=()):
        for key in [k for k in tensors if k.startswith("model.layers.1.mlp.experts.")]:
            del tensors[key]
        for expert in set(range(8)) - set(lost):
            gate, up = whole.gate_up_proj[expert].detach().chunk(2)
            down = whole.down_proj[expert].detach()
            for name, weight in {"gate": gate, "up": up, "down": down}.items():
                key = f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"
                tensors[key] = weight.clone()

    assert (
        len(kinds(load(makers.rewrite(source, tmp_path / "a", change)), fp4moe.FusedExperts)) == 1
    )
    directory = makers.rewrite(source, tmp_path / "b", lambda tensors: change(tensors, lost=[7]))
    with pytest.raises(CheckpointError, match=r"missing 3.*experts\.7\.down_proj\.weight"):
        load(directory)


@pytest.mark.parametrize("name", ["modelopt gemma4", "modelopt nemotron"])
def test_routers_that_choose_in_one_launch(checkpoint, name):
    directory = checkpoint(name)
    model, expected = load(directory, routing="fused"), load(directory)
    assert len(kinds(model, FusedRouter)) == len(kinds(model, fp4moe.FusedExperts)) == 2
    assert relative_error(makers.logits(model), makers.logits(expected)) < ROUNDING
    assert model.state_dict().keys() == expected.state_dict().keys()


def test_routers_that_are_not_known_are_refused(checkpoint):
    with pytest.raises(UnsupportedError) as raised:
        load(checkpoint("modelopt qwen3"), routing="fused", norm_topk_prob=False)
    text = str(raised.value)
    assert re.match(r"from_pretrained: the routing of \d+ blocks cannot be fused, because ", text)
    assert "mlp.experts: its router Qwen3MoeTopKRouter has norm_topk_prob=False" in text


def test_options_reach_the_experts(checkpoint):
    directory = checkpoint("modelopt nemotron")
    model = load(directory, kernel="reference_w4a4", hidden_alignment=128, device_map="cpu")
    (first, _) = kinds(model, fp4moe.FusedExperts)
    assert (first.kernel, first.hidden_alignment, first.top_k) == ("reference_w4a4", 128, 2)
    assert float(first.activation_scales()[0]) != 1
    with pytest.raises(UnsupportedError, match="hidden_alignment must be one of"):
        load(directory, hidden_alignment=100)
    with pytest.raises(UnsupportedError, match="kernel must be"):
        load(directory, kernel="none")
    for name, value in {"quantization_config": {"a": 1}, "state_dict": {"a": 1}}.items():
        with pytest.raises(UnsupportedError, match=f"{name} must not be given"):
            load(directory, **{name: value})
    with pytest.raises(UnsupportedError, match="use_safetensors must not be False"):
        load(directory, use_safetensors=False)
    with pytest.raises(UnsupportedError, match="device_map cannot name the disk"):
        load(directory, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps_and_loading_info(checkpoint, device_map):
    model, info = load(
        checkpoint("modelopt gemma4"), device_map=device_map, output_loading_info=True
    )
    assert not any(info[name] for name in ("unexpected_keys", "mismatched_keys", "error_msgs"))
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == model.device.type for tensor in tensors)


def test_other_compressed_tensors_formats_stay_with_transformers(registered):
    from transformers.quantizers.auto import AutoHfQuantizer

    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    made = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
    assert type(made).__module__.startswith("transformers.")
    config["format"] = "nvfp4-pack-quantized"
    made = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
    assert type(made).__module__.startswith("fp4moe.")


def test_names_of_the_hub_are_downloaded_without_pickles(checkpoint, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(checkpoint("modelopt nemotron"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load("someone/model", revision="abc", token="t", cache_dir="c", local_files_only=True)
    assert {
        k: asked[k] for k in ("name", "revision", "token", "cache_dir", "local_files_only")
    } == {
        "name": "someone/model",
        "revision": "abc",
        "token": "t",
        "cache_dir": "c",
        "local_files_only": True,
    }
    assert not any(p.endswith((".py", ".bin", ".pt")) for p in asked["allow_patterns"])
    for path in ("/nowhere/at/all", "./nowhere", __file__):
        with pytest.raises(CheckpointError, match="path_or_id must be a directory or the name"):
            load(path)


def test_code_of_a_checkpoint_runs_only_when_trusted(checkpoint, tmp_path):
    source = checkpoint("modelopt nemotron")

    def config(name, content):
        return content | {"auto_map": {"AutoConfig": "evil.Config"}} if name[0] == "c" else content

    directory = makers.rewrite(source, tmp_path / "evil", lambda tensors: None, config)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert kinds(load(directory), fp4moe.FusedExperts)
    assert not (tmp_path / "ran").exists()


E = "model.layers.0.experts.3"
DAMAGES = {
    "missing expert": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{E}.")],
        "missing 9",
        E,
    ),
    "missing scale": (
        lambda t: t.pop(f"{E}.up_proj.weight_scale"),
        "missing",
        f"{E}.up_proj.weight_scale",
    ),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "missing", "model.norm.weight"),
    "one expert too many": (
        lambda t: t.update(
            {
                k.replace("experts.3", "experts.8"): v.clone()
                for k, v in t.items()
                if k.startswith(E)
            }
        ),
        "unexpected",
        "experts.8",
    ),
    "unknown tensor": (
        lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(2)}),
        "unexpected",
        "mlp.extra",
    ),
    "twice": (
        lambda t: t.update(
            {f"{E.replace('3', '03')}.up_proj.weight": t[f"{E}.up_proj.weight"].clone()}
        ),
        "duplicated",
        "experts.03",
    ),
    "shape": (
        lambda t: t.update({f"{E}.up_proj.weight": t[f"{E}.up_proj.weight"][:-1].clone()}),
        "wrong shape",
        f"{E}.up_proj.weight",
    ),
    "shape of a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(63)}),
        "wrong shape",
        "model.norm.weight",
    ),
    "dtype": (
        lambda t: t.update({f"{E}.up_proj.weight_scale": t[f"{E}.up_proj.weight_scale"].float()}),
        "wrong shape, dtype",
        f"{E}.up_proj.weight_scale",
    ),
    "float expert among packed ones": (
        lambda t: t.update({f"{E}.up_proj.weight": torch.ones(48, 64)}),
        "wrong shape",
        f"{E}.up_proj.weight",
    ),
    "NaN block scale": (
        lambda t: t[f"{E}.up_proj.weight_scale"].view(torch.uint8)[4, 1].fill_(0x7F),
        "block scales",
        f"{E}.up_proj.weight_scale",
    ),
    "negative block scale": (
        lambda t: t[f"{E}.down_proj.weight_scale"].view(torch.uint8)[4, 1].fill_(0x80 + 56),
        "block scales",
        f"{E}.down_proj.weight_scale",
    ),
    "infinite global scale": (
        lambda t: t[f"{E}.up_proj.weight_scale_2"].fill_(torch.inf),
        "inf in",
        f"{E}.up_proj.weight_scale_2",
    ),
    "global scale 0": (
        lambda t: t["model.layers.1.mlp.up_proj.weight_scale_2"].fill_(0),
        "above 0",
        "model.layers.1.mlp.up_proj.weight_scale_2",
    ),
    "NaN input scale": (
        lambda t: t[f"{E}.down_proj.input_scale"].fill_(torch.nan),
        "nan in",
        f"{E}.down_proj.input_scale",
    ),
    "NaN norm": (
        lambda t: t["model.norm.weight"][3].fill_(torch.nan),
        "inf or NaN",
        "model.norm.weight",
    ),
    "Linear without its scale": (
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight_scale_2"),
        "missing",
        "model.layers.1.self_attn.q_proj.weight_scale_2",
    ),
    "quantised router": (
        lambda t: t.update({"model.layers.1.router.scale_weight_scale": torch.ones(())}),
        "unexpected",
        "scale_weight_scale",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_with_the_keys(checkpoint, tmp_path, registered, damage):
    change, kind, key = DAMAGES[damage]
    directory = makers.rewrite(checkpoint("modelopt gemma4"), tmp_path / "damaged", change)
    for loads in (load, lambda d: AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=kind) as raised:
            loads(directory)
        assert key in str(raised.value)


def test_the_first_ten_keys_and_the_count_are_named(checkpoint, tmp_path):
    def change(tensors):
        for key in list(tensors):
            if ".experts." in key and key.endswith("weight_scale"):
                del tensors[key]

    directory = makers.rewrite(checkpoint("modelopt gemma4"), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError) as raised:
        load(directory)
    message = str(raised.value)
    assert "48" in message and message.count(".weight_scale'") == 10


def test_inf_in_a_float_expert_is_refused(tmp_path):
    makers.save_float("qwen3_moe", tmp_path / "source")

    def change(tensors):
        tensors["model.layers.1.mlp.experts.5.up_proj.weight"][0, 0] = torch.inf

    directory = makers.rewrite(tmp_path / "source", tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts, expert 5 .*finite"):
        load(directory)


@pytest.mark.parametrize(
    "algorithm", ["W4A8_AWQ", "NVFP4_AWQ", "INT4_AWQ", None, 4, {"a": 1}], ids=str
)
def test_unknown_algorithms_are_refused(checkpoint, tmp_path, algorithm, registered):
    def config(name, content):
        inner = content["quantization" if name[0] == "h" else "quantization_config"]
        inner["quant_algo"] = algorithm
        return content

    directory = makers.rewrite(
        checkpoint("modelopt nemotron"), tmp_path / "other", lambda tensors: None, config
    )
    for loads in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="must have a known algorithm as quant_algo"):
            loads(directory)


def test_only_the_legacy_file_is_enough_for_fp4moe(checkpoint, tmp_path):
    def config(name, content):
        return {k: v for k, v in content.items() if k != "quantization_config"}

    source = checkpoint("modelopt gemma4")
    directory = makers.rewrite(source, tmp_path / "legacy", lambda tensors: None, config)
    assert torch.equal(makers.logits(load(directory)), makers.logits(load(source)))


MEASURE = """
import gc, sys, torch, transformers, fp4moe
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

warm, directory = sys.argv[1:]
fp4moe.from_pretrained(warm, progress=False)
gc.collect()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = fp4moe.from_pretrained(directory, progress=False)
held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(status("VmHWM") - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_peak_memory_is_below_the_largest_shard_and_one_layer(tmp_path):
    config = transformers.Qwen3MoeConfig(
        **{**makers_common(), "num_hidden_layers": 6, "hidden_size": 512, "head_dim": 32},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=768,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(tmp_path / "large", max_shard_size="25MB")
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert sum(shards) > 5 * max(shards)
    del model
    makers.save_float("qwen3_moe", tmp_path / "warm")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "warm"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"peak {peak / 1e6:.1f} MB, shard {max(shards) / 1e6:.1f}, layer {layer / 1e6:.1f}")
    assert peak < max(shards) + layer
