"""PEFT and Trainer on loaded models: trained small ones, whose experts are packed as they load."""

from __future__ import annotations

import pytest
import torch
from trained_models import SMALL_MODELS
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fp4moe
from fp4moe.testing import relative_error

peft = pytest.importorskip("peft", reason="optional package")

TARGETS = {
    "small_gemma4": ["q_proj", "o_proj", "router.proj"],
    "small_nemotron_h": ["q_proj", "o_proj", "in_proj", "shared_experts.down_proj"],
}
TEXT = b"def run(self, *args):\n    return self.function(*args)\n\n\n" * 4
IDS = torch.tensor(list(TEXT))[None, :96]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.*is deprecated"),
    # PEFT says so of every merge into a model whose embeddings are tied.
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]


@pytest.fixture(params=SMALL_MODELS)
def name(request):
    return request.param


def loaded(name):
    return fp4moe.from_pretrained(SMALL_MODELS[name], dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def loss(model):
    with torch.no_grad():
        return model.eval()(IDS, labels=IDS, use_cache=False).loss


def arguments(folder, **options):
    options |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(folder, max_steps=6, learning_rate=2e-3, logging_steps=1, **options)


@pytest.mark.slow
def test_trainer_trains_an_adapter_that_saves_loads_and_merges(name, tmp_path):
    model = loaded(name)
    before = logits(model)
    packed = {n: b.clone() for n, b in model.named_buffers() if "prepared_" in n}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS[name]))
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = Trainer(wrapped, arguments(tmp_path, gradient_checkpointing=True), train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    after = logits(wrapped)
    assert relative_error(after, before) > 1e-2
    assert packed and all(torch.equal(model.get_buffer(n), b) for n, b in packed.items())
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(name), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    # The product of A and B in one matrix: another order of float32 sums.
    assert relative_error(logits(again.merge_and_unload()), after) < 1e-4


def test_trainer_asks_for_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(loaded("small_gemma4"), arguments(tmp_path))


def test_adapters_inside_packed_experts_want_register_peft():
    model = loaded("small_gemma4")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        peft.get_peft_model(model, config)


@pytest.mark.slow
@pytest.mark.usefixtures("registered_peft")
@pytest.mark.parametrize("name", ["small_gemma4"])
def test_trainer_trains_adapters_inside_packed_experts(name, tmp_path):
    model = loaded(name)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets)
    wrapped = peft.get_peft_model(model, config)
    before = logits(wrapped)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = Trainer(wrapped, arguments(tmp_path), train_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    after = logits(wrapped)
    assert relative_error(after, before) > 1e-2
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(name), tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    # The float model, whose experts were not rounded, takes the same file and gains as much.
    floats = AutoModelForCausalLM.from_pretrained(SMALL_MODELS[name], dtype=torch.float32)
    plain = loss(floats)
    assert loss(peft.PeftModel.from_pretrained(floats, tmp_path / "adapter")) < 0.9 * plain
