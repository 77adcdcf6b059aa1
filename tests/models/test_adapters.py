"""Adapters on experts: refused while something reads the float weights, right once merged."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import lora
from loop_models import MixtralOld, Model, OlmoeOld
from tiny_models import enlarge_experts, fingerprint, gemma4, nemotron_h, qwen3_moe
from torch import nn
from torch.nn.utils import parametrize

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.testing import relative_error

IDS = torch.arange(1, 25).reshape(2, 12)
BUILDS = {"qwen3_moe": qwen3_moe, "gemma4": gemma4, "nemotron_h": nemotron_h}
# PEFT 0.21 asks transformers 5.23 by a name of old.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
MERGE = "merge the adapter first (merge_and_unload())"


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(params=BUILDS)
def model(request):
    return enlarge_experts(BUILDS[request.param]())


def check_refused(model, reason):
    """Refused by name, and as it was."""
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        fp4moe.replace_moe(model, progress=False)
    assert reason in str(raised.value) and MERGE in str(raised.value)
    report = fp4moe.explain(model)
    assert report.count("not replaceable") == len(report.blocks) > 0
    assert all(any(reason in why for why in row.reasons) for row in report.blocks)
    assert fingerprint(model) == before


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_peft_adapters_on_experts_are_refused_before_anything_changes(model, state):
    wrapped = lora(model)
    if state == "merged":
        wrapped.merge_adapter()
    with wrapped.disable_adapter() if state == "disabled" else torch.no_grad():
        expected = logits(wrapped)
        check_refused(wrapped, "ParamWrapper around it holds an adapter that is not merged")
        assert torch.equal(logits(wrapped), expected)


def test_a_merged_adapter_is_packed_with_its_weights(model):
    merged = lora(model).merge_and_unload()
    expected = logits(merged)
    plain = logits(fp4moe.replace_moe(enlarge_experts(copy.deepcopy(merged)), progress=False))
    fused = fp4moe.replace_moe(merged, progress=False)
    # 16-bit activations and 4-bit weights: a tenth of a layer's output; without the adapter more.
    assert relative_error(logits(fused), expected) < 0.5 * relative_error(plain, expected)


@pytest.mark.usefixtures("registered")
def test_the_implementation_refuses_them_too(model):
    wrapped = lora(model)
    expected = logits(wrapped)
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    model.set_experts_implementation("fp4moe")
    with pytest.raises(
        UnsupportedError, match=r"^register_transformers: .* is parametrised, as unmerged adapters"
    ):
        logits(wrapped)
    assert wrapped.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in wrapped.state_dict().items())
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(wrapped), expected)
    merged = wrapped.merge_and_unload()
    direct = logits(fp4moe.replace_moe(copy.deepcopy(merged), progress=False))
    merged.set_experts_implementation("fp4moe")
    assert torch.equal(logits(merged), direct)


def test_adapters_elsewhere_do_not_matter():
    wrapped = lora(qwen3_moe(), target_modules=["q_proj"], target_parameters=None)
    expected = logits(fp4moe.replace_moe(copy.deepcopy(wrapped).merge_and_unload(), progress=False))
    fp4moe.replace_moe(wrapped, progress=False)
    # Merging rounds the projection once more.
    assert relative_error(logits(wrapped), expected) < 1e-4


class AddLowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.column = nn.Parameter(torch.randn(*weight.shape[:2], 1) / 10)
        self.row = nn.Parameter(torch.randn(weight.shape[0], 1, weight.shape[2]) / 10)

    def forward(self, weight):
        return weight + self.column @ self.row


@pytest.mark.usefixtures("registered")
def test_parametrised_weights_are_refused(model):
    experts = [m for m in model.modules() if hasattr(m, "is_transposed")]
    for module in experts:
        parametrize.register_parametrization(module, "down_proj", AddLowRank(module.down_proj))
    expected = logits(model)
    check_refused(model, "down_proj is parametrised")
    model.set_experts_implementation("fp4moe")
    with pytest.raises(UnsupportedError, match="down_proj is parametrised"):
        logits(model)
    for module in experts:
        parametrize.remove_parametrizations(module, "down_proj")
    fused = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
    assert torch.equal(logits(model), logits(fused))
    assert 0 < relative_error(logits(model), expected)


class OwnAdapter(nn.Module):
    """What people write by hand: the experts inside, read by the wrapper's forward."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.delta = nn.Parameter(torch.randn_like(experts.down_proj) / 10)

    def folded(self):
        return self.experts.down_proj + self.delta

    def forward(self, *args):
        return torch.func.functional_call(self.experts, {"down_proj": self.folded()}, args)


@pytest.mark.parametrize("build", [qwen3_moe, gemma4], ids=lambda f: f.__name__)
def test_a_wrapper_that_reads_the_weights_is_refused(build):
    model = build()
    for layer in model.model.layers:
        parent = layer.mlp if hasattr(layer.mlp, "experts") else layer
        parent.experts = OwnAdapter(parent.experts)
    check_refused(model, "OwnAdapter around it reads its down_proj")


@pytest.mark.parametrize(("block", "name"), [(MixtralOld, "w1"), (OlmoeOld, "up_proj")])
def test_adapters_on_the_linears_of_listed_experts_are_named(block, name):
    wrapped = lora(Model(block).eval(), target_modules=[name], target_parameters=None)
    check_refused(wrapped, f"expert 0's {name} is in an adapter (peft.tuners.lora.layer.Linear)")
    fp4moe.replace_moe(wrapped.merge_and_unload(), progress=False)
