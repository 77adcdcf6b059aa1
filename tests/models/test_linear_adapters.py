"""LoRA on packed Linears through PEFT: as PEFT's own on Linears of the dequantised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from float_twins import float_twin
from tiny_models import enlarge_experts, qwen3_moe
from torch import nn

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.testing import relative_error

peft = pytest.importorskip("peft", reason="optional package")

IDS = torch.arange(1, 25).reshape(2, 12)
# A model of two layers in float32, in another order.
LIMIT = 1e-5
pytestmark = [
    pytest.mark.usefixtures("registered_peft"),
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.*is deprecated"),
]


def packed_linears(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, fp4moe.PackedLinear)}


@pytest.fixture(params=["nvfp4", "fp8_block"])
def pair(request):
    """A model whose experts and attention are packed, and its float twin."""
    original = enlarge_experts(qwen3_moe()).requires_grad_(False)
    options = {"format": request.param, "linears": "*_proj", "progress": False}
    packed = fp4moe.replace_moe(copy.deepcopy(original), **options)
    twin = float_twin(original, packed)
    for path, linear in packed_linears(packed).items():
        twin.get_submodule(path).weight.data.copy_(linear.dequantized())
    assert len(packed_linears(packed)) == 8
    return packed, twin


def with_lora(model, **options):
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def gradients(model):
    out = model.train()(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: parameter.grad for n, parameter in trained.items()}
    model.zero_grad()
    return out.logits.detach(), found


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def compare(got, expected):
    assert relative_error(got[0], expected[0]) < LIMIT
    assert list(got[1]) == list(expected[1]) and len(got[1])
    for name, gradient in expected[1].items():
        assert relative_error(got[1][name], gradient) < LIMIT, name


def test_outputs_gradients_and_files_are_those_of_peft(pair, tmp_path):
    packed, twin = pair
    plain = logits(packed)
    ours, theirs = with_lora(packed, use_rslora=True), with_lora(twin, use_rslora=True)
    compare(gradients(ours), gradients(theirs))
    for folder, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / folder)
    files = [tmp_path / f / "adapter_model.safetensors" for f in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()
    expected = logits(ours)
    again = ours.unload()
    assert torch.equal(logits(again), plain) and not torch.equal(expected, plain)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "theirs")
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("pair", ["nvfp4"], indirect=True)
def test_experts_and_linears_together(pair):
    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    compare(*(gradients(with_lora(model, **targets)) for model in pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["reference"])
def test_no_float_weight_is_kept_for_the_backward(kernel, dtype):
    linear = nn.Linear(96, 160, bias=False)
    packed = fp4moe.replace_moe(
        nn.ModuleDict({"dense": linear, "moe": qwen3_moe().model.layers[0].mlp}),
        kernel,
        linears=["dense"],
        progress=False,
    )["dense"]
    weights = sum(t.nbytes for t in (packed.prepared_weight, packed.prepared_weight_scale))
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(7, 96, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = packed(x)
    # The float weight is 8, and with bfloat16 3.6, times as many bytes.
    assert sum(t.nbytes for t in saved) <= weights + 8
    gradient = torch.randn_like(out)
    got = torch.autograd.grad(out, x, gradient)[0]
    expected = gradient.float() @ packed.dequantized()
    # The weight, and the sum, are rounded to the dtype.
    assert relative_error(got, expected) < 2 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert relative_error(packed(x), out) < torch.finfo(dtype).eps


@pytest.mark.parametrize("pair", ["nvfp4"], indirect=True)
def test_merging_is_refused_before_anything_changes(pair):
    model = with_lora(pair[0])
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(
            UnsupportedError, match=r"^merge: an adapter cannot be merged into mode"
        ):
            merge()
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="variant"):
        with_lora(model.unload(), use_dora=True)
