"""experts_implementation="fp4moe": the same numbers through transformers' own registry."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from tiny_models import MODELS, gemma4

import fp4moe
from fp4moe.module import FusedExperts

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_replace_moe_and_frees_the_float_weights(name):
    model = MODELS[name]("fp4moe")
    replaced = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, replaced(IDS).logits)
    report = fp4moe.explain(model)
    assert report.count("replaced") == len(report.blocks) == 2
    assert not [
        n
        for n, _ in model.named_parameters()
        if "experts.gate_up" in n or ("up_proj" in n and ".experts." in n)
    ]


def test_a_model_can_be_switched_to_it():
    model = gemma4("grouped_mm")
    model.set_experts_implementation("fp4moe")
    with torch.no_grad():
        model(IDS)
    assert sum(isinstance(m, FusedExperts) for m in model.modules()) == 2


def test_after_one_eager_call_it_compiles_without_a_break(fresh_dynamo):
    model = gemma4("fp4moe")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(compiled(IDS).logits, expected)


def test_a_first_call_under_compile_packs_at_a_break_or_says_what_to_do(fresh_dynamo):
    model = gemma4("fp4moe")
    with torch.no_grad():
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"Call fp4moe.replace_moe\(model\)"
        ):
            torch.compile(model, backend="aot_eager", fullgraph=True)(IDS)
        torch._dynamo.reset()
        first = torch.compile(model, backend="aot_eager")(IDS).logits
        assert torch.equal(first, model(IDS).logits)


def test_experts_that_cannot_be_fused_are_refused_by_name():
    model = gemma4("fp4moe")
    experts = model.model.layers[0].experts
    experts.act_fn = torch.nn.Tanh()
    with pytest.raises(
        fp4moe.errors.UnsupportedError, match="got Gemma4TextExperts: its _apply_gate"
    ):
        model(IDS)
    assert experts.gate_up_proj.shape == (8, 96, 64)


@pytest.mark.parametrize("first", ["fp4moe", "transformers"])
def test_either_order_of_imports_registers_the_name(first):
    second = {"fp4moe": "transformers", "transformers": "fp4moe"}[first]
    code = (
        f"import {first}, {second}\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions\n"
        "assert 'fp4moe' in functions\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
