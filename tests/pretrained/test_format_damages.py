"""FP8, MXFP8 and MXFP4 files that are damaged, mixed, of odd sizes, or of vendors' own names."""

from __future__ import annotations

import re

import checkpoint_makers as makers
import format_files as files
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe.errors import CheckpointError
from fp4moe.testing import relative_error

ROUNDING = 1e-6
SOURCES = {
    "fp8": ("modelopt", "FP8_DEFAULT_CFG"),
    "fp8_channel": ("compressed", "FP8_DYNAMIC"),
    "fp8_block": ("transformers", "ue8m0"),
    "mxfp8": ("compressed", "MXFP8"),
    "mxfp4": ("modelopt", "MXFP4_DEFAULT_CFG"),
}
E = "model.layers.0.mlp.experts.3.up_proj"
Q = "model.layers.1.self_attn.q_proj"


def load(directory, **options):
    return fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write a checkpoint of Qwen3-MoE once, when its format is first asked for."""
    made = {}

    def make(form):
        if form not in made:
            directory = tmp_path_factory.mktemp(form)
            with torch.random.fork_rng(devices=[]):
                files.save(SOURCES[form][0], "qwen3_moe", SOURCES[form][1], directory)
            made[form] = directory
        return made[form]

    return make


def scale_of(tensors, module):
    return next(key for key in tensors if key.startswith(f"{module}.weight_scale"))


def raw(tensor):
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def replace(tensors, key, tensor):
    tensors[key] = tensor.clone()


def poison(tensors, module):
    """NaN in the scale, as its dtype has it."""
    scale = tensors[scale_of(tensors, module)]
    scale.view(-1)[:1].fill_(torch.nan) if scale.dtype.itemsize > 1 else raw(scale).fill_(255)


def nan_code(tensors, module):
    raw(tensors[f"{module}.weight"])[0, 1] = 0xFF


DAMAGES = {
    "no scale": (lambda t: t.pop(scale_of(t, E)), "missing 1", rf"{E}\.weight_scale"),
    "no codes": (lambda t: t.pop(f"{E}.weight"), "missing 1", rf"{E}\.weight'"),
    "no scale of a Linear": (lambda t: t.pop(scale_of(t, Q)), "missing 1", rf"{Q}\.weight_scale"),
    "no expert": (
        lambda t: [t.pop(k) for k in list(t) if ".0.mlp.experts.3." in k],
        r"missing [69]",
        r"experts\.3\.",
    ),
    "codes of another shape": (
        lambda t: replace(
            t, f"{E}.weight", raw(t[f"{E}.weight"])[:-1].view(t[f"{E}.weight"].dtype)
        ),
        "wrong shape",
        rf"{E}\.weight",
    ),
    "codes of another dtype": (
        lambda t: replace(t, f"{E}.weight", raw(t[f"{E}.weight"]).int()),
        "wrong shape, dtype",
        rf"{E}\.weight",
    ),
    "scale of another dtype": (
        lambda t: replace(t, scale_of(t, E), raw(t[scale_of(t, E)]).to(torch.int32)),
        "wrong shape, dtype",
        rf"{E}\.weight_scale",
    ),
    "scale of another shape": (
        lambda t: replace(t, scale_of(t, E), t[scale_of(t, E)].expand(3, *t[scale_of(t, E)].shape)),
        "wrong shape",
        rf"{E}\.weight_scale",
    ),
    "a global scale": (
        lambda t: t.update({f"{E}.weight_scale_2": torch.ones(())}),
        "unexpected 1",
        rf"{E}\.weight_scale_2",
    ),
    "NaN in a scale": (
        lambda t: poison(t, E),
        "hold (block )?scales that are",
        rf"{E}\.weight_scale",
    ),
    "NaN in a Linear's scale": (
        lambda t: poison(t, Q),
        "hold (block )?scales",
        rf"{Q}\.weight_scale",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", SOURCES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_with_the_keys(written, tmp_path, form, damage):
    change, kind, key = DAMAGES[damage]
    directory = makers.rewrite(written(form), tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"{kind}.*{key}"):
        load(directory)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in SOURCES if form != "mxfp4"])
@pytest.mark.parametrize("module", [E, Q])
def test_codes_that_are_no_numbers_are_refused(written, tmp_path, form, module):
    directory = makers.rewrite(written(form), tmp_path, lambda t: nan_code(t, module))
    with pytest.raises(CheckpointError, match=rf"hold no NaN; got NaN in '{module}\.weight'"):
        load(directory)


@pytest.mark.parametrize("form", SOURCES)
def test_a_format_that_is_not_announced_is_refused(written, tmp_path, form):
    def other(name, content):
        inner = content.get("quantization") or content.get("quantization_config") or {}
        if inner.get("quant_method") == "compressed-tensors":
            group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}
            inner |= {"config_groups": {"a": group}, "format": "nvfp4-pack-quantized"}
        elif inner.get("quant_method") == "fp8":
            inner["weight_block_size"] = [1, 32]
        else:
            inner.pop("config_groups", None)
            inner["quant_algo"] = "NVFP4"
        return content

    directory = makers.rewrite(written(form), tmp_path, lambda tensors: None, other)
    with pytest.raises(CheckpointError, match=r"is of (FP8|MXFP8|MXFP4), which .* not announce"):
        load(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "nemotron_h"])
@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_sizes_that_are_no_multiples_of_16_are_padded(tmp_path, name, preset):
    with files.sizes(hidden_size=72, moe_intermediate_size=40):
        files.save_compressed(name, tmp_path, preset)
    model = load(tmp_path)
    weights = [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert {(w.hidden_padded, w.intermediate_padded) for w in weights} == {(80, 48)}
    expected = makers.logits(makers.reference_model(tmp_path))
    assert relative_error(makers.logits(model), expected) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_fp8_experts_beside_nvfp4_linears(tmp_path, registered, name):
    """One file of ModelOpt's with two algorithms, and a KV cache in FP8."""
    with files.sizes():
        makers.save_modelopt(name, tmp_path, "fp8 experts")
    config = makers.json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == "MIXED_PRECISION" and config["kv_cache_quant_algo"] == "FP8"
    model = load(tmp_path)
    weights = [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert [w.format for w in weights] == ["fp8"] * 2
    assert any(isinstance(m, fp4moe.NVFP4Linear) for m in model.modules())
    expected = makers.logits(makers.reference_model(tmp_path))
    assert relative_error(makers.logits(model), expected) < ROUNDING
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(makers.logits(plain), makers.logits(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_vendors_names_of_scales(written, tmp_path, name):
    files.save("transformers", name, "ue8m0", tmp_path / "usual")
    expected = makers.logits(load(tmp_path / "usual"))
    for end in (".scale", ".qscale_weight"):

        def change(tensors, end=end):
            for key in [key for key in tensors if key.endswith(".weight_scale_inv")]:
                tensors[key.replace(".weight_scale_inv", end)] = tensors.pop(key)

        other = makers.rewrite(tmp_path / "usual", tmp_path / end[1:], change)
        assert torch.equal(makers.logits(load(other)), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_deepseeks_experts_of_four_bits_beside_linears_of_eight(tmp_path, name):
    """Codes are signed bytes; the values by transformers' own function."""
    files.save("transformers", name, "ue8m0", tmp_path / "source")
    random = torch.Generator().manual_seed(0)

    def change(tensors):
        for key in [k for k in tensors if re.search(r"experts\.\d+\.\w+\.weight$", k)]:
            rows, columns = tensors[key].shape
            codes = torch.randint(256, (rows, columns // 2), generator=random).to(torch.uint8)
            powers = torch.randint(118, 124, (rows, columns // 32), generator=random)
            tensors[key] = codes.view(torch.int8)
            tensors[f"{key}_scale_inv"] = powers.to(torch.uint8).view(files.E8M0)

    makers.rewrite(tmp_path / "source", tmp_path / "four", change)
    entry = makers.json.loads((tmp_path / "four" / "config.json").read_text())
    files.announce(tmp_path / "four", entry["quantization_config"] | {"expert_dtype": "fp4"})
    model = load(tmp_path / "four")
    weights = [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert [w.format for w in weights] == ["mxfp4"] * 2
    linears = [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]
    assert {m.format for m in linears} == {"fp8_block"}
    expected = makers.logits(makers.reference_model(tmp_path / "four"))
    assert relative_error(makers.logits(model), expected) < ROUNDING


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_static_scales_of_transformers(tmp_path, name):
    """One scale a tensor and one for its input, as Mistral's files have them."""
    with files.sizes():
        makers.save_modelopt(name, tmp_path / "source", "FP8_DEFAULT_CFG")
    tensors = {
        key.replace(".weight_scale", ".weight_scale_inv").replace(
            ".input_scale", ".activation_scale"
        ): tensor
        for key, tensor in makers.load_tensors(tmp_path / "source").items()
    }
    makers.rewrite(tmp_path / "source", tmp_path / "other", lambda found: None)
    (tmp_path / "other" / "hf_quant_config.json").unlink()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    entry = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    files.announce(tmp_path / "other", entry)
    model, usual = load(tmp_path / "other"), load(tmp_path / "source")
    assert torch.equal(makers.logits(model), makers.logits(usual))
    pairs = [
        [m for m in one.modules() if isinstance(m, fp4moe.FusedExperts)] for one in (model, usual)
    ]
    for ours, theirs in zip(*pairs, strict=True):
        for found, wanted in zip(ours.activation_scales(), theirs.activation_scales(), strict=True):
            assert torch.equal(found, wanted) and bool((found != 1).all())


def test_deepseek_v4_under_its_own_names(tmp_path, registered):
    """Experts of four bits, the rest FP8 blocks, `.scale`, and a Linear that works by groups."""
    with files.sizes(intermediate_size=96, moe_intermediate_size=160):
        model = tiny_models.family("deepseek_v4", "eager", torch.float32)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "float")
    random, floats, packed = torch.Generator().manual_seed(0), {}, {}
    for key, weight in makers.load_tensors(tmp_path / "float").items():
        if not re.search(r"(experts\.\d+|shared_experts|attn)\.w\w+\.weight$", key):
            floats[key] = packed[key] = weight
            continue
        rows, columns = weight.shape
        four = re.search(r"experts\.\d+\.", key) is not None
        if four:
            codes = torch.randint(256, (rows, columns // 2), generator=random)
            codes, size = codes.to(torch.uint8).view(torch.int8), (rows, columns // 32)
        else:
            codes = (weight * 512).to(torch.float8_e4m3fn)
            size = -(-rows // 128), -(-columns // 128)
        powers = torch.randint(117, 120, size, generator=random).to(torch.uint8).view(files.E8M0)
        packed |= {key: codes, key.replace(".weight", ".scale"): powers}
        if four:
            floats[key] = makers._fine_grained(codes, powers)
        else:
            whole = powers.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            floats[key] = codes.float() * whole[:rows, :columns]
    makers.rewrite(tmp_path / "float", tmp_path / "values", lambda t: t.update(floats))
    makers.rewrite(tmp_path / "float", tmp_path / "packed", lambda t: (t.clear(), t.update(packed)))
    files.announce(
        tmp_path / "packed",
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
        | {"activation_scheme": "dynamic", "expert_dtype": "fp4"},
    )
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "values", dtype=torch.float32)
    model = load(tmp_path / "packed")
    weights = [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert [w.format for w in weights] == ["mxfp4"] * 2
    grouped = model.model.layers[0].self_attn.o_a_proj
    assert type(grouped) is type(expected.model.layers[0].self_attn.o_a_proj)
    assert torch.equal(grouped.weight, expected.model.layers[0].self_attn.o_a_proj.weight)
    assert {m.format for m in model.modules() if isinstance(m, fp4moe.PackedLinear)} == {
        "fp8_block"
    }
    assert relative_error(makers.logits(model), makers.logits(expected)) < ROUNDING
