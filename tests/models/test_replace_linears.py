"""replace_moe(linears=...): dense Linears are quantised beside the experts."""

from __future__ import annotations

import pytest
import torch
from tiny_models import gemma4, generate, nemotron_h, qwen3_moe
from torch import nn

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.models.replace import replace_moe

MAKERS = {"qwen3_moe": qwen3_moe, "gemma4": gemma4, "nemotron_h": nemotron_h}
ATTENTION = dict.fromkeys(MAKERS, "*.self_attn.*") | {"nemotron_h": "*.mixer.*_proj"}
IDS = torch.arange(3, 10)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, fp4moe.PackedLinear)}


def replaced(model, linears="none", **options):
    return replace_moe(model, progress=False, linears=linears, **options)


@pytest.mark.parametrize("form", ["nvfp4", "fp8_block"])
@pytest.mark.parametrize("name", ATTENTION)
def test_logits_are_those_of_dequantised_weights(name, form):
    model = replaced(MAKERS[name]().eval(), ATTENTION[name], format=form)
    found = packed(model)
    assert len(found) >= 4 and {m.format for m in found.values()} == {form}
    # The same experts, and float Linears that hold what the codes stand for.
    twin = replaced(MAKERS[name]().eval(), format=form)
    format, before = FORMATS[form], logits(twin)
    weights = {path: twin.get_submodule(path).weight.data for path in found}
    peaks = {path: weight.abs().max() for path, weight in weights.items()}
    for path, weight in weights.items():
        # q, k and v have one scale.
        parent, _, leaf = path.rpartition(".")
        others = (
            ("q_proj", "k_proj", "v_proj") if leaf in ("q_proj", "k_proj", "v_proj") else (leaf,)
        )
        peak = torch.stack([peaks[f"{parent}.{o}"] for o in others if f"{parent}.{o}" in peaks])
        scale = format.shared_scale(peak.max().reshape(1))
        weight.copy_(format.dequantize(format.quantize(weight, scale, "max"), torch.float32))
    # The same calls of torch on the same numbers.
    assert torch.equal(logits(model), logits(twin))
    assert not torch.equal(logits(model), before)
    again = replaced(MAKERS[name]().eval(), ATTENTION[name], format=form)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_pattern_passes_by_head_and_routers(name):
    model = MAKERS[name]().eval()
    plain = {p for p, m in model.named_modules() if type(m) is nn.Linear}
    replaced(model, ["*"])
    found = packed(model)
    left = {p for p, m in model.named_modules() if type(m) is nn.Linear}
    assert found and "lm_head" in left
    kept = {"lm_head", "router", "gate"}
    assert all(kept & set(p.split(".")) for p in left), left
    assert not any(kept & set(p.split(".")) for p in found), found
    assert set(found) | left <= plain
    # Nothing more to do: the same modules.
    assert packed(replaced(model, "*")) == found
    assert generate(model, IDS).shape[1] > IDS.shape[1]


def test_the_head_by_its_name():
    model = replaced(qwen3_moe().eval(), ["lm_head", "*.q_proj"])
    assert "lm_head" in packed(model) and len(packed(model)) == 1 + len(model.model.layers)


def nan(linear):
    linear.weight.data[0, 0] = float("nan")


def narrow(linear):
    linear.weight.data = linear.weight.data[:, :-1]
    linear.in_features -= 1


@pytest.mark.parametrize(
    ("linears", "damage", "text"),
    [
        ("*.q_pro", None, r"linears = '\*.q_pro' cannot be quantised, because no torch.nn.Linear"),
        ("model.layers.0.mlp.experts.0", None, "no torch.nn.Linear of"),
        ("*.q_proj", nan, "q_proj: its weight has inf or NaN"),
        ("*.q_proj", narrow, r"q_proj: in_features must be a multiple of 16, got \d+"),
        ("*.q_proj", lambda m: m.to("meta"), "q_proj: its weight is on the meta device"),
    ],
)
def test_refusals_leave_the_model_as_it_was(linears, damage, text):
    model = qwen3_moe().eval()
    if damage:
        damage(model.model.layers[0].self_attn.q_proj)
    before = list(model.modules())
    with pytest.raises(UnsupportedError, match=f"^replace_moe: .*{text}"):
        replaced(model, linears)
    assert list(model.modules()) == before


def test_a_tied_head_is_refused():
    model = qwen3_moe().eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UnsupportedError, match=r"lm_head: its weight is .*embed_tokens"):
        replaced(model, "lm_head")
