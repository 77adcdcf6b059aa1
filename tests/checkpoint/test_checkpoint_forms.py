"""Quantised weights that nothing announces, each named as it is; every form beside others."""

from __future__ import annotations

import json
import re

import nvfp4_files as files
import pytest
import tiny_models
import torch
import transformers

import fp4moe
from fp4moe.checkpoint.compressed_tensors import compressed_convention
from fp4moe.checkpoint.modelopt import modelopt_convention
from fp4moe.checkpoint.values import _has_nan
from fp4moe.errors import CheckpointError, UnsupportedError
from fp4moe.testing import relative_error

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
    codes = (weight.float() * 256).to(files.E4M3)
    packed = torch.randint(256, (rows, columns // 2)).to(torch.uint8)
    powers = torch.randint(115, 122, (rows, columns // 32)).to(torch.uint8)
    one, blocks = torch.tensor(2.0**-7), torch.rand(-(-rows // 128), -(-columns // 128)) / 99
    each = torch.rand(rows) / 99
    return {
        "fp8": {"weight": codes, "weight_scale": one, "input_scale": one.clone()},
        "fp8, power of two": {"weight": codes, "weight_scale": one.to(E8M0)},
        "fp8_channel": {"weight": codes, "weight_scale": each},
        "fp8_channel, column": {"weight": codes, "weight_scale": each[:, None].bfloat16()},
        "fp8_block": {"weight": codes, "weight_scale": blocks.bfloat16()},
        "fp8_block, four axes": {"weight": codes, "weight_scale": blocks[:, None, :, None].clone()},
        "mxfp8": {"weight": codes, "weight_scale": powers},
        "mxfp8, e8m0": {"weight": codes, "weight_scale": powers.view(E8M0)},
        "mxfp4": {"weight": packed, "weight_scale": powers},
        "mxfp4, e8m0": {"weight": packed, "weight_scale": powers.view(E8M0)},
    }[form]


def values(form, parts):
    """The float32 weight that the tensors of `store` stand for, by formulas of their own."""
    codes, scale = parts["weight"], parts["weight_scale"]
    if codes.dtype == torch.uint8:
        weight = files.GRID[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    else:
        weight = codes.float()
    scale = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    blocks = {"fp8": weight.shape, "fp8_channel": (1, weight.shape[1]), "fp8_block": (128, 128)}
    down, across = blocks.get(form.split(",")[0], (1, 32))
    whole = scale.reshape(-(-weight.shape[0] // down), -(-weight.shape[1] // across))
    whole = whole.repeat_interleave(down, 0).repeat_interleave(across, 1)
    return weight * whole[: weight.shape[0], : weight.shape[1]]


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
ALGORITHMS = ["NVFP4", "FP8", "MXFP8", "FP8_BLOCK_SCALES", "mxfp4"]
MIXED = {
    "producer": {"name": "modelopt"},
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {name: {"quant_algo": name} for name in ALGORITHMS},
    },
}


def stored(made, form, pattern, found=None):
    """The packed checkpoint with the weights that match in another form; their values in found."""
    tensors = dict(made.tensors)
    for key, weight in made.floats.items():
        if re.search(pattern, key):
            head, parts = key.removesuffix("weight"), store(form, weight)
            for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                tensors.pop(f"{head}{leaf}", None)
            tensors |= {f"{head}{leaf}": value for leaf, value in parts.items()}
            if found is not None:
                found[key] = values(form, parts)
    return tensors


@pytest.fixture
def large(monkeypatch):
    """Sizes that are blocks of 32, and one block of 128 and a part of another."""
    for name, size in {"hidden_size": 192, "moe_intermediate_size": 160}.items():
        monkeypatch.setitem(tiny_models.COMMON, name, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("where", ["experts", "linears"])
@pytest.mark.parametrize("form", STORED)
def test_every_form_beside_others(tmp_path, large, name, where, form):
    made = files.make(name, tmp_path / "source")
    pattern = r"experts\.\d+\." if where == "experts" else r"[qo]_proj\.weight"
    tensors = stored(made, form, pattern, made.values)
    model = files.load(made.write(tmp_path / "other", tensors, MIXED))
    assert {w.format for w in files.experts(model)} == {
        form.split(",")[0] if where == "experts" else "nvfp4"
    }
    linears = [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]
    assert {m.format for m in linears} == ({form.split(",")[0]} if where == "linears" else set())
    # The same float32 products in another order: a few units of 2^-24 a layer.
    assert relative_error(files.logits(model), made.expected(tmp_path / "float")) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
@pytest.mark.parametrize("form", [form for form in STORED if "," not in form])
def test_experts_of_two_formats_are_named(tmp_path, large, name, form):
    made = files.make(name, tmp_path / "source")
    tensors = stored(made, form, r"experts\.\d+\.(gate|up)_proj\.")
    directory = made.write(tmp_path / "other", tensors, MIXED)
    message = (
        r"^from_pretrained: the experts model\.layers\.0\.(mlp\.)?experts cannot be packed, "
        rf"because all .* of one format, and the file has .*gate_proj, up_proj of {FORMS[form]}"
    )
    with pytest.raises(CheckpointError, match=message):
        files.load(directory)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_other_sizes_are_refused(tmp_path, large, name):
    made = files.make(name, tmp_path / "source")
    tensors = stored(made, "fp8_block", r"experts\.\d+\.")
    key = next(k for k in tensors if k.endswith("down_proj.weight_scale"))
    tensors[key] = torch.full((6, 5), 0.5)
    with pytest.raises(CheckpointError, match=r"is float32 \[6, 5\], must be .* \[2, 2\]"):
        files.load(made.write(tmp_path / "other", tensors, MIXED))


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
def test_algorithms_of_modelopt(algorithm, form):
    assert modelopt_convention({"quant_algo": algorithm}).forms == {form}
    if form.startswith("mx"):
        with pytest.raises(CheckpointError, match=rf"{form.upper()} blocks of 32"):
            modelopt_convention({"quant_algo": algorithm, "group_size": 16})


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


@pytest.mark.parametrize("form", GROUPS)
def test_formats_of_compressed_tensors(form):
    kind, weights = GROUPS[form]
    group = {"weights": {"type": "float", **weights}}
    entry = {"format": kind, "config_groups": {"group_0": group}}
    assert compressed_convention(entry).forms == {form.split(",")[0]}
    group["weights"]["block_structure"] = [64, 64]
    with pytest.raises(CheckpointError, match=r"have blocks of \[128, 128\]"):
        compressed_convention(entry)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24])
def test_every_code_that_is_no_number_is_found(size):
    """Codes are looked at eight at a time; torch decodes them one by one."""
    for byte in range(256):
        for place in range(size):
            codes = torch.randint(0, 127, (size,), dtype=torch.uint8)
            codes[place] = byte
            codes = codes.view(files.E4M3)
            assert _has_nan(codes) == bool(codes.float().isnan().any())
