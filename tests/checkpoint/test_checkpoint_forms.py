"""Quantised weights that nothing announces, and forms that are not read: each named as it is."""

from __future__ import annotations

import json
import re

import nvfp4_files as files
import pytest
import torch
import transformers

from fp4moe.errors import CheckpointError, UnsupportedError

MODELS = ("qwen3_moe", "nemotron_h")
E8M0 = torch.float8_e8m0fnu
NOWHERE = "announce the quantisation of its weights in a configuration; got no announcement and "


def cast(made, dtype, pattern=r"\.experts\."):
    """The floats of a checkpoint, those of the experts in another dtype."""
    integer = dtype in (torch.uint8, torch.int8, torch.int32)
    return {
        key: (value.sign() if integer and dtype.is_signed else value.abs() if integer else value)
        .float()
        .to(dtype)
        if re.search(pattern, key)
        else value
        for key, value in made.floats.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, E8M0],
    ids=str,
)
@pytest.mark.parametrize("where", ["experts", "linears"])
def test_unannounced_dtypes_are_named(tmp_path, name, dtype, where):
    made = files.make(name, tmp_path / "source")
    pattern = r"\.experts\." if where == "experts" else r"[qo]_proj\.weight"
    directory = made.write(tmp_path / "bare", cast(made, dtype, pattern), None)
    with pytest.raises(CheckpointError) as raised:
        files.load(directory)
    message = str(raised.value)
    assert re.search(rf"{NOWHERE}{str(dtype)[6:]} in \d \('model\.layers\.", message)
    assert "hf_quant_config.json" in message and "text_config" in message
    assert (".experts'" if where == "experts" else "_proj'") in message


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tool", ["modelopt", "compressed-tensors"])
def test_packed_experts_without_a_configuration_are_refused(tmp_path, name, tool):
    made = files.make(name, tmp_path / "source", also=r"o_proj\.weight")
    tensors = made.tensors
    if tool != "modelopt":
        packed = {key for key in made.values}
        tensors = {f"{k}_packed" if k in packed else k: v for k, v in tensors.items()}
    with pytest.raises(CheckpointError, match=rf"{NOWHERE}.*uint8 in \d+ \('model\.layers\."):
        files.load(made.write(tmp_path / "bare", tensors, None))


@pytest.mark.parametrize("name", [*MODELS, "glm4_moe"])
def test_float64_weights_are_read(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    wide = {k: v.double() for k, v in made.floats.items()}
    model = files.load(made.write(tmp_path / "wide", wide, None))
    usual = files.load(made.write(tmp_path / "usual", made.floats, None))
    for ours, theirs in zip(files.experts(model), files.experts(usual), strict=True):
        for key, tensor in ours.tensors().items():
            other = theirs.tensors()[key]
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(files.logits(model), files.logits(usual))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_float64_is_refused_before_it_is_loaded(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    wide = {k: v.double() for k, v in made.floats.items()}
    directory = made.write(tmp_path / "wide", wide, None, made.config | {"dtype": "float64"})
    with pytest.raises(UnsupportedError, match=r"dtype must be bfloat16.*float64.*config\.json"):
        files.load(directory, dtype="auto")
    files.load(directory, dtype=torch.bfloat16)


def qwen3_vl():
    text = transformers.Qwen3VLMoeTextConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["gemma4_multimodal", "qwen3_vl"])
def test_a_configuration_inside_text_config_is_read(tmp_path, name, registered):
    source = qwen3_vl() if name == "qwen3_vl" else name
    made = files.make(source, tmp_path / "source")
    entry = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    config = json.loads(json.dumps(made.config))
    config["text_config"]["quantization_config"] = entry
    nested = made.write(tmp_path / "nested", None, None, config)
    beside = files.load(made.write(tmp_path / "beside"))
    model = files.load(nested)
    plain = type(model).from_pretrained(nested, dtype=torch.float32)
    for one, two, three in zip(*map(files.experts, (model, plain, beside)), strict=True):
        assert torch.equal(one.gate_up.packed, three.gate_up.packed)
        assert torch.equal(two.gate_up.packed, three.gate_up.packed)
    assert torch.equal(files.logits(model), files.logits(beside))


def store(form, weight):
    """One matrix [N, K] of a form as its tools write it: names behind the module and tensors."""
    rows, columns = weight.shape
    codes, packed = (
        weight.float().to(files.E4M3),
        torch.zeros(rows, columns // 2, dtype=torch.uint8),
    )
    powers = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
    one, blocks = torch.tensor(0.5), torch.full((-(-rows // 32), -(-columns // 32)), 0.5)
    return {
        "fp8": {"weight": codes, "weight_scale": one, "input_scale": one.clone()},
        "fp8, power of two": {"weight": codes, "weight_scale": one.to(E8M0)},
        "fp8_channel": {"weight": codes, "weight_scale": torch.full((rows,), 0.5)},
        "fp8_channel, column": {"weight": codes, "weight_scale": torch.full((rows, 1), 0.5)},
        "fp8_block": {"weight": codes, "weight_scale": blocks.bfloat16()},
        "fp8_block, four axes": {"weight": codes, "weight_scale": blocks[:, None, :, None].clone()},
        "mxfp8": {"weight": codes, "weight_scale": powers},
        "mxfp8, e8m0": {"weight": codes, "weight_scale": powers.view(E8M0)},
        "mxfp4": {"weight": packed, "weight_scale": powers},
        "mxfp4, e8m0": {"weight": packed, "weight_scale": powers.view(E8M0)},
    }[form]


FORMS = {
    "fp8": r"FP8 \(e4m3, one scale per tensor\)",
    "fp8_channel": r"FP8 \(e4m3, one scale per row\)",
    "fp8_block": r"FP8 \(e4m3, one scale per block\)",
    "mxfp8": r"MXFP8 \(e4m3, a power of two per 32 values\)",
    "mxfp4": r"MXFP4 \(e2m1, a power of two per 32 values\)",
}
STORED = [
    *("fp8", "fp8, power of two", "fp8_channel", "fp8_channel, column", "fp8_block"),
    *("fp8_block, four axes", "mxfp8", "mxfp8, e8m0", "mxfp4", "mxfp4, e8m0"),
]
MIXED = {
    "producer": {"name": "modelopt"},
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "a": {"quant_algo": "NVFP4"},
            "b": {"quant_algo": "FP8"},
            "c": {"quant_algo": "MXFP8", "group_size": 32},
        },
    },
}


def stored(made, form, pattern):
    """The packed checkpoint with the weights that match in another form."""
    tensors = dict(made.tensors)
    for key, weight in made.floats.items():
        if re.search(pattern, key):
            head = key.removesuffix("weight")
            for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                tensors.pop(f"{head}{leaf}", None)
            tensors |= {f"{head}{leaf}": value for leaf, value in store(form, weight).items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
@pytest.mark.parametrize("form", STORED)
def test_experts_of_other_forms_are_named(tmp_path, name, form):
    made = files.make(name, tmp_path / "source")
    # Of Gemma4's experts one half only.
    half = r"(gate|up)_proj\." if name == "gemma4" else ""
    tensors = stored(made, form, rf"experts\.\d+\.{half}")
    directory = made.write(tmp_path / "other", tensors, MIXED)
    message = rf"got {FORMS[form.split(',')[0]]} in 2 \('model\.layers\.0\..*experts'.*not read"
    with pytest.raises(CheckpointError, match=message):
        files.load(directory)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", STORED[4:])
def test_linears_of_other_forms_are_named(tmp_path, name, form):
    made = files.make(name, tmp_path / "source")
    directory = made.write(tmp_path / "other", stored(made, form, r"o_proj\.weight"), MIXED)
    with pytest.raises(CheckpointError, match=rf"got {FORMS[form.split(',')[0]]} in \d \('model"):
        files.load(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("form", STORED)
def test_a_form_that_is_not_read_closes_no_checkpoint_that_has_no_use_for_it(tmp_path, name, form):
    made = files.make(name, tmp_path / "source")
    weight = next(v for k, v in made.floats.items() if k.endswith("experts.0.up_proj.weight"))
    unused = {f"mtp.layers.0.mlp.experts.0.up_proj.{k}": v for k, v in store(form, weight).items()}
    directory = made.write(tmp_path / "more", made.tensors | unused, MIXED)
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(files.load(directory)), files.logits(usual))


@pytest.mark.parametrize(
    ("algorithm", "form"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel"),
        ("fp8_pb_wo", "fp8_block"),
        ("FP8_BLOCK_SCALES", "fp8_block"),
        ("MXFP8", "mxfp8"),
        ("mxfp4", "mxfp4"),
        ("W4A8_MXFP4_FP8", "mxfp4"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_algorithms_of_modelopt_are_named(tmp_path, name, algorithm, form):
    made = files.make(name, tmp_path / "source")
    entry = {"quant_algo": algorithm, "group_size": 32}
    quantization = {"producer": {"name": "modelopt"}, "quantization": entry}
    with pytest.raises(
        CheckpointError, match=rf"got '{algorithm}', which is {FORMS[form]} and not"
    ):
        files.load(made.write(tmp_path / "other", None, quantization))


@pytest.mark.parametrize(
    ("entry", "form"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8_channel"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_methods_of_transformers_are_named(tmp_path, name, entry, form):
    made = files.make(name, tmp_path / "source")
    config = made.config | {"quantization_config": entry}
    with pytest.raises(CheckpointError, match=f"'{entry['quant_method']}', which is {FORMS[form]}"):
        files.load(made.write(tmp_path / "other", made.floats, None, config))


GROUPS = {
    "fp8": ("float-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8_channel, column": ("float-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
    ),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", GROUPS)
def test_formats_of_compressed_tensors_are_named(tmp_path, name, form):
    made = files.make(name, tmp_path / "source")
    kind, weights = GROUPS[form]
    entry = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"weights": {"type": "float", **weights}}},
    }
    tensors = stored(made, form, r"experts\.\d+\.")
    tensors = {
        f"{k}_packed"
        if kind.startswith("mxfp4") and v.dtype == torch.uint8 and k[-1] == "t"
        else k: v
        for k, v in tensors.items()
    }
    config = made.config | {"quantization_config": entry}
    message = rf"got {FORMS[form.split(',')[0]]} in 2 \('model\.layers"
    with pytest.raises(CheckpointError, match=message):
        files.load(made.write(tmp_path / "other", tensors, None, config))
