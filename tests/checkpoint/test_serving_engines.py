"""What vLLM and SGLang look for in a checkpoint, as a table, held against what is written.

The rows were read off vLLM 0.33.0 (layers/quantization/modelopt.py: from_config, is_layer_excluded,
create_weights; fused_moe/routed_experts.py: build_expert_params_mapping; the models' own mappers)
and SGLang 0.5.23 (layers/quantization/modelopt_quant.py, configs/model_config.py, the models'
load_weights). Neither is needed here, and neither reads experts of the other formats.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from tiny_models import enlarge_experts, family, gemma4, gemma4_multimodal, nemotron_h, qwen3_moe

import fp4moe

U8, E4M3, F32 = torch.uint8, torch.float8_e4m3fn, torch.float32


@dataclasses.dataclass(frozen=True)
class Model:
    """How an engine loads a class.

    root: what is in front of "layers", in the files and in the engine. layers: those with experts.
    experts: module of the engine below a layer. skipped: modules that must not be quantised.
    shards: projection -> (parameter, shard).
    """

    build: object
    root: tuple
    layers: tuple
    experts: str
    skipped: tuple
    shards: dict

    def engine_name(self, name):
        old, new = self.root
        return new + name.removeprefix(old) if name.startswith(old) else name


GATED = {"gate_proj": ("w13_", "w1"), "up_proj": ("w13_", "w3"), "down_proj": ("w2_", "w2")}
# Without a gate up takes its place.
PLAIN = {"up_proj": ("w13_", "w1"), "down_proj": ("w2_", "w2")}
ATTENTION = ("self_attn.q_proj", "self_attn.o_proj")
SAME = ("model.", "model.")
MODELS = {
    "gemma4": Model(gemma4, SAME, (0, 1), "experts", (*ATTENTION, "router.proj"), GATED),
    "gemma4_multimodal": Model(
        gemma4_multimodal,
        ("model.language_model.", "language_model.model."),
        (0, 1),
        "experts",
        (*ATTENTION, "router.proj", "mlp.up_proj"),
        GATED,
    ),
    "nemotron_h": Model(
        nemotron_h,
        ("backbone.", "model."),
        (1, 3),
        "mixer.experts",
        ("mixer.gate", "mixer.shared_experts.up_proj"),
        PLAIN,
    ),
    "qwen3_moe": Model(qwen3_moe, SAME, (0, 1), "mlp.experts", (*ATTENTION, "mlp.gate"), GATED),
    "deepseek_v3": Model(
        lambda: family("deepseek_v3"),
        SAME,
        (1,),
        "mlp.experts",
        ("self_attn.o_proj", "mlp.gate", "mlp.shared_experts.up_proj"),
        GATED,
    ),
}
# quant_algo -> leaf -> dtype and shape of one expert's [rows, columns]; a scale a matrix is one
# number. Both engines create these parameters.
LEAVES = {
    "NVFP4": {
        "weight": (U8, 1, 2),
        "weight_scale": (E4M3, 1, 16),
        "weight_scale_2": (F32,),
        "input_scale": (F32,),
    },
    "W4A16_NVFP4": {
        "weight": (U8, 1, 2),
        "weight_scale": (E4M3, 1, 16),
        "weight_scale_2": (F32,),
    },
    # Without input_scale both take 1.0 for it, which is no calibration.
    "FP8": {"weight": (E4M3, 1, 1), "weight_scale": (F32,), "input_scale": (F32,)},
    "MXFP8": {"weight": (E4M3, 1, 1), "weight_scale": (U8, 1, 32)},
}
# Engine -> the algorithms whose experts it loads, and where it puts them below the module.
ENGINES = {
    "vLLM": (set(LEAVES), "routed_experts."),
    "SGLang": ({"NVFP4", "W4A16_NVFP4", "FP8"}, ""),
}
WRITTEN = [("nvfp4", False), ("nvfp4", True), ("fp8", True), ("mxfp8", False)]


def excluded_by_vllm(prefix, patterns):
    """ModelOptQuantConfigBase.is_layer_excluded, after apply_vllm_mapper has split stars."""
    split = []
    for pattern in patterns:
        star = len(pattern) > 1 and pattern[-1] == "*" and pattern[-2] != "."
        split += [pattern[:-1], pattern[:-1] + ".*"] if star else [pattern]
    return any(
        pattern in prefix
        or pattern in prefix.removeprefix("language_model.")
        or fnmatch.fnmatch(prefix, pattern)
        or ("experts" in pattern and "experts" in prefix and prefix in pattern)
        for pattern in split
    )


def excluded_by_sglang(prefix, patterns):
    """ModelOptQuantConfig.is_layer_excluded: a whole name, with stars, or a part of it."""
    for pattern in patterns:
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        names = [prefix, prefix.removeprefix("language_model."), *prefix.split(".")]
        if any(expression.fullmatch(name) for name in names):
            return True
    return False


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """Name and directories of a model, one for each row of WRITTEN, as save_pretrained makes it."""
    found = {}
    for form, calibrated in WRITTEN:
        with files.sizes():
            model = enlarge_experts(MODELS[request.param].build())
        fp4moe.replace_moe(model, format=form, progress=False)
        if calibrated:
            for module in model.modules():
                if isinstance(module, fp4moe.FusedExperts):
                    module.set_activation_scales(0.5, 0.25)
        found[form, calibrated] = tmp_path_factory.mktemp("saved")
        model.save_pretrained(found[form, calibrated])
    return request.param, found


@pytest.mark.parametrize(("form", "calibrated"), WRITTEN)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_expert_tensor_fills_one_parameter(saved, engine, form, calibrated):
    name, directories = saved
    model, directory = MODELS[name], directories[form, calibrated]
    algorithms, below = ENGINES[engine]
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    algorithm = config["quant_algo"].upper()
    if algorithm not in algorithms:
        assert (engine, algorithm) == ("SGLang", "MXFP8")
        return
    wanted = {}
    sizes = {"w1": (160, 192), "w3": (160, 192), "w2": (192, 160)}
    for layer in model.layers:
        for parameter, shard in model.shards.values():
            for leaf, (dtype, *parts) in LEAVES[algorithm].items():
                shape = tuple(n // p for n, p in zip(sizes[shard], parts, strict=bool(parts)))
                for expert in range(8):
                    key = f"{model.root[1]}layers.{layer}.{model.experts}.{below}{parameter}{leaf}"
                    wanted[key, shard, expert] = (dtype, shape if parts else ())
    found = {}
    for key, tensor in makers.load_tensors(directory).items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)", key)
        if match is None or "shared" in match[1]:
            continue
        parameter, shard = model.shards[match[3]]
        module = model.engine_name(match[1])
        place = f"{module}.{below}{parameter}{match[4]}", shard, int(match[2])
        assert place not in found
        found[place] = tensor.dtype, tuple(tensor.shape)
    assert found == wanted


@pytest.mark.parametrize(("form", "calibrated"), WRITTEN)
def test_both_entries_have_what_the_engines_ask_for(saved, form, calibrated):
    _, directories = saved
    directory = directories[form, calibrated]
    current = json.loads((directory / "config.json").read_text())["quantization_config"]
    content = json.loads((directory / "hf_quant_config.json").read_text())
    legacy = content["quantization"]
    # How both know that it is theirs, and TensorRT-LLM.
    assert current["quant_method"] == "modelopt" and content["producer"]["name"] == "modelopt"
    assert current["quant_algo"] == legacy["quant_algo"]
    assert isinstance(current["ignore"], list) and current["ignore"] == legacy["exclude_modules"]
    # vLLM raises where hf_quant_config.json of NVFP4 lacks one of these.
    assert {"kv_cache_quant_algo", "exclude_modules"} <= set(legacy)
    blocks = {"nvfp4": 16, "mxfp8": 32}
    assert legacy.get("group_size") == blocks.get(form)
    if form == "mxfp8":
        assert "config_groups" not in current
        return
    (group,) = current["config_groups"].values()
    # vLLM takes "NVFP4" without input_activations for W4A16; SGLang reads the size of blocks here.
    assert ("input_activations" in group) == calibrated
    assert group["weights"].get("group_size") == blocks.get(form)
    algorithm = {("nvfp4", True): "NVFP4", ("nvfp4", False): "W4A16_NVFP4"}
    assert current["quant_algo"] == algorithm.get((form, calibrated), "FP8")


@pytest.mark.parametrize("excluded", [excluded_by_vllm, excluded_by_sglang])
def test_experts_alone_are_quantised(saved, excluded):
    name, directories = saved
    model = MODELS[name]
    config = json.loads((directories["nvfp4", False] / "config.json").read_text())
    patterns = [model.engine_name(p) for p in config["quantization_config"]["ignore"]]
    layer = f"{model.root[1]}layers.1."
    assert not excluded(f"{layer}{model.experts}", patterns)
    for module in model.skipped:
        assert excluded(f"{layer}{module}", patterns), module
    assert excluded("lm_head", patterns)


@pytest.mark.parametrize("form", ["fp8_channel", "fp8_block", "mxfp4"])
def test_formats_whose_experts_no_engine_loads(tmp_path, form):
    """vLLM gives ModelOpt's FP8 experts one scale each, and neither knows its MXFP4."""
    with files.sizes():
        model = fp4moe.replace_moe(qwen3_moe(), format=form, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not any(config["quant_algo"].upper() in read for read, _ in ENGINES.values())


def test_names_of_gpt_oss_that_no_engine_loads(tmp_path):
    """Both know its experts as stacks, or (vLLM, Quark's) as w1 to w3: fp4moe alone reads these."""
    with files.sizes():
        model = fp4moe.replace_moe(family("gpt_oss"), progress=False)
    model.save_pretrained(tmp_path)
    keys = [key for key in makers.load_tensors(tmp_path) if ".experts." in key]
    assert keys and not [k for k in keys if re.search(r"gate_up_proj|\.w[123]\.", k)]
    assert fp4moe.from_pretrained(tmp_path, progress=False).config.model_type == "gpt_oss"
