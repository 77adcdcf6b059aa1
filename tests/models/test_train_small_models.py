"""The script that trains the small models: its experts, its tokenizer, and what it leaves."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from tiny_models import enlarge_experts
from trained_models import training_script
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SCRIPT = training_script()


@pytest.fixture(autouse=True)
def registered():
    ALL_EXPERTS_FUNCTIONS.register("dense", SCRIPT.dense_experts)


@pytest.mark.parametrize("name", list(SCRIPT.MODELS))
def test_dense_experts_are_the_models_own(name):
    model = enlarge_experts(SCRIPT.MODELS[name]())
    ids = torch.randint(1, 256, (2, 64))
    results = []
    for implementation in ("eager", "dense"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.float().square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        # float32 in another order: relative to the largest element of each tensor.
        limit = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def test_balance_is_one_where_all_experts_are_used_alike():
    experts = next(m for m in SCRIPT.gemma4().modules() if hasattr(m, "has_gate"))
    hidden = torch.randn(4, 128)
    even = torch.arange(16).view(4, 4)
    SCRIPT.dense_experts(experts, hidden, even, torch.full((4, 4), 0.25))
    assert experts.balance.item() == pytest.approx(1.0)
    same = torch.arange(4).expand(4, 4)
    SCRIPT.dense_experts(experts, hidden, same, torch.full((4, 4), 0.25))
    # Each of four experts is used 4 times its share, and has a quarter of the weight.
    assert experts.balance.item() == pytest.approx(4.0)


@pytest.mark.slow
def test_a_run_leaves_models_that_load(tmp_path, monkeypatch, capsys):
    options = ["--steps", "2", "--batch", "2", "--length", "64", "--device", "cpu"]
    options += ["--held-out-bytes", "1024", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_small_models.py", *options])
    SCRIPT.main()
    out = capsys.readouterr().out
    for name in SCRIPT.MODELS:
        folder = tmp_path / name
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert model.dtype == torch.bfloat16 and not any(info.values())
        assert sum(f.stat().st_size for f in folder.iterdir()) < 5e6
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "def f(x):\n\treturn 'é😀\x7f~ !'  # \r\n"
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
        readme = (folder / "README.md").read_text("utf-8")
        assert "--batch 2 --length 64" in readme and "2 steps" in readme
        assert f"{name}: " in out
    assert out.count("step      2") == 2


def test_bits_per_byte_of_a_model_that_knows_nothing():
    model = SCRIPT.nemotron_h()
    for parameter in model.parameters():
        parameter.data.zero_()
    data = torch.randint(0, 256, (200,), dtype=torch.uint8)
    assert SCRIPT.bits_per_byte(model, data, 64, 2) == pytest.approx(math.log2(256))
