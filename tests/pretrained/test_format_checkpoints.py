"""Checkpoints of FP8, MXFP8 and MXFP4 of the real tools, loaded: logits and what is there."""

from __future__ import annotations

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.errors import CheckpointError, UnsupportedError
from fp4moe.kernels import KERNELS
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.pretrained.placeholder import convention_of
from fp4moe.reference import reference, reference_w4a4
from fp4moe.testing import relative_error

# Both sides compute the same products in float32, in another order: a few units of 2^-24 a layer.
ROUNDING = 1e-6
MODELS = ("qwen3_moe", "gemma4", "nemotron_h")
CASES = [
    *(("modelopt", kind, form) for kind, form in files.MODELOPT.items()),
    *(("compressed", kind, form) for kind, form in files.COMPRESSED.items()),
    *(("transformers", kind, "fp8_block") for kind in files.FINE_GRAINED),
]
# FP8 of these is of the weights alone; the others' activations are rounded, too.
WEIGHTS_ONLY = ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",)


def load(directory, **options):
    return fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False, **options)


def experts(model):
    return [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tool", "kind", "form"), CASES)
def test_logits_equal_the_tools_own_dequantisation(tmp_path, registered, name, tool, kind, form):
    files.save(tool, name, kind, tmp_path)
    expected = makers.logits(files.reference_model(tmp_path))
    model = load(tmp_path)
    assert [m.layer.format for m in experts(model)] == [form] * 2
    if form.startswith("fp8"):
        rounded = kind not in WEIGHTS_ONLY
        assert all(m.layer.quantized_activations == rounded for m in experts(model))
        assert all(m.kernel == "reference" for m in experts(model))
    linears = [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]
    assert len(linears) >= 4 and {m.format for m in linears} == {form}
    assert relative_error(makers.logits(model), expected) < ROUNDING
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(experts(plain)) == 2
    assert torch.equal(makers.logits(plain), makers.logits(model))
    # The experts count for more than the limit: without them the logits are others.
    for module in experts(model):
        module.prepared_down_block_scale.zero_()
    assert relative_error(makers.logits(model), expected) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        ("modelopt", "FP8_DEFAULT_CFG"),
        ("modelopt", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        ("transformers", "float"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_activations_are_rounded_where_the_checkpoint_says_so(tmp_path, name, tool, kind):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    files.save(tool, name, kind, tmp_path)
    plain = experts(load(tmp_path, kernel="triton", device_map="cuda"))
    assert {m.kernel for m in plain} == {"triton"}
    for module in experts(load(tmp_path, device_map="cuda")):
        assert module.kernel == "triton_w8a8"
        layer = module.layer
        hidden = torch.randn(33, layer.hidden_size, device="cuda")
        ids = torch.rand(33, layer.num_experts, device="cuda").topk(2).indices
        routing_weights = torch.rand(33, 2, device="cuda")
        expected = reference_w4a4(
            hidden,
            module.weights,
            ids,
            routing_weights,
            intermediate_dtype=torch.bfloat16,
            product_dtype=torch.float32,
        )
        # Limits: see test_triton_w8a8.py.
        got = module(hidden, ids, routing_weights)
        assert relative_error(got, expected) < 3 * 2.0**-9 + 0.1 * 2.0**-4


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "kind"), [("modelopt", "FP8_DEFAULT_CFG"), ("compressed", "FP8")])
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_static_scales_of_inputs(tmp_path, tool, kind, name):
    files.save(tool, name, kind, tmp_path)
    tensors = makers.load_tensors(tmp_path)
    for path, module in load(tmp_path).named_modules():
        if not isinstance(module, fp4moe.FusedExperts):
            continue
        scales = {
            p: [float(tensors[f"{path}.{e}.{p}_proj.input_scale"]) for e in range(8)]
            for p in ("gate", "up", "down")
        }
        hidden, inner = module.activation_scales()
        assert hidden.tolist() == [max(scales["gate"] + scales["up"])]
        assert inner.tolist() == scales["down"]


def test_gate_and_up_keep_scales_of_their_own(tmp_path):
    files.save("compressed", "qwen3_moe", "FP8", tmp_path)
    tensors = makers.load_tensors(tmp_path)
    weights = load(tmp_path).model.layers[1].mlp.experts.weights
    for half, name in enumerate(("gate", "up")):
        stored = [
            tensors[f"model.layers.1.mlp.experts.{e}.{name}_proj.weight_scale"] for e in range(8)
        ]
        assert weights.gate_up.block_scale[:, half, 0].tolist() == [float(s) for s in stored]
    assert bool((weights.gate_up.block_scale[:, 0] != weights.gate_up.block_scale[:, 1]).any())


@pytest.mark.slow
@pytest.mark.parametrize("kind", files.FINE_GRAINED)
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "nemotron_h"])
def test_stacks_of_transformers_are_those_of_single_experts(tmp_path, name, kind):
    files.save("transformers", name, kind, tmp_path / "single")
    with files.sizes(**files.WHOLE):
        files.save_fine_grained(name, tmp_path / "stacked", kind, stacked=True)
    keys = makers.load_tensors(tmp_path / "stacked")
    first = "up_proj" if name == "nemotron_h" else "gate_up_proj"
    assert any(key.endswith(f".experts.{first}_scale_inv") for key in keys)
    models = [load(tmp_path / folder) for folder in ("single", "stacked")]
    assert torch.equal(*(makers.logits(model) for model in models))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_blocks_that_gate_and_up_share_are_refused(tmp_path, name):
    files.save("compressed", name, "FP8_BLOCK", tmp_path / "single")

    def change(tensors):
        for layer in {key.split(".experts.")[0] for key in tensors if ".experts." in key}:
            for leaf, end in (("weight", ""), ("weight_scale", "_weight_scale")):
                keys = [
                    [f"{layer}.experts.{e}.{p}_proj.{leaf}" for p in ("gate", "up", "down")]
                    for e in range(8)
                ]
                found = [[tensors.pop(k) for k in each] for each in keys]
                plain = [
                    [
                        t.view(torch.uint8) if t.ndim == 2 and t.dtype.itemsize == 1 else t
                        for t in each
                    ]
                    for each in found
                ]
                both = torch.stack([torch.cat(each[:2]) for each in plain])
                down = torch.stack([each[2] for each in plain])
                for stack, tensor in (("gate_up", both), ("down", down)):
                    dtype = found[0][0].dtype
                    tensors[f"{layer}.experts.{stack}_proj{end}"] = tensor.view(dtype)

    makers.rewrite(tmp_path / "single", tmp_path / "stacked", change)
    message = (
        "cannot be packed, because gate and up of 160 rows lie in one stack, where a block of 128"
    )
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "stacked")


def test_gpt_oss(tmp_path, registered):
    files.save_gpt_oss(tmp_path / "packed", packed=True)
    files.save_gpt_oss(tmp_path / "float", packed=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    expected = makers.logits(plain)
    model = load(tmp_path / "packed")
    weights = [m.weights for m in experts(model)]
    assert [w.format for w in weights] == ["mxfp4"] * 2 and all(w.biased for w in weights)
    assert relative_error(makers.logits(model), expected) < ROUNDING
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert len(experts(other)) == 2
    assert torch.equal(makers.logits(other), makers.logits(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_who_passes_a_configuration_of_transformers_gets_its_quantizer(tmp_path, registered, name):
    files.save("transformers", name, "float", tmp_path)
    asked = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=asked
    )
    assert not experts(model)
    # Weights and sums in bfloat16, 2^-9 each.
    assert relative_error(makers.logits(model), makers.logits(load(tmp_path))) < 2e-2


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("change", "forms"),
    [
        ({}, {"fp8_block"}),
        ({"weight_block_size": None, "activation_scheme": "static"}, {"fp8"}),
        ({"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, {"mxfp8"}),
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, {"mxfp8"}),
        ({"expert_dtype": "fp4"}, {"fp8_block", "mxfp4"}),
        ({"ignored_layers": ["lm_head"]}, {"fp8_block"}),
        ({"quant_method": "mxfp4"}, {"mxfp4"}),
    ],
)
def test_configurations_of_transformers(change, forms):
    convention = convention_of(FP8 | change)
    assert convention.forms == forms
    assert convention.ignores("lm_head") == ("ignored_layers" in change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [64, 64]}, r"\[128, 128\] or \[1, 32\]; got \[64, 64\]"),
        ({"activation_scheme": "static"}, "activation_scheme dynamic with fp8_block; got 'static'"),
        ({"fmt": "e5m2"}, "fmt e4m3 with fp8_block; got 'e5m2'"),
        ({"scale_fmt": 3}, "scale_fmt float or ue8m0"),
        ({"modules_to_not_convert": "lm_head"}, "list of names as modules_to_not_convert"),
        ({"modules_to_convert": ["model.embed_tokens"]}, "since embeddings stay float"),
        ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8', which is FP8 .*per row"),
    ],
)
def test_configurations_of_transformers_that_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        convention_of(FP8 | change)


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_a_kernel_is_asked_for_the_format_before_weights_are_read(tmp_path, monkeypatch, name):
    files.save("compressed", name, "FP8", tmp_path)

    def only(*formats):
        kernel = ReferenceKernel("reference", reference, automatic=True)
        kernel.layouts = {form: kernel.layouts[form] for form in formats}
        monkeypatch.setitem(KERNELS, "reference", kernel)
        return "reference"

    assert len(experts(load(tmp_path, kernel=only("fp8")))) == 2
    read = []
    monkeypatch.setattr(CheckpointFiles, "tensor", lambda self, key: read.append(key))
    with pytest.raises(UnsupportedError, match="it has no layout for fp8, only for nvfp4"):
        load(tmp_path, kernel=only("nvfp4"))
    assert read == []
