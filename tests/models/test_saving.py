"""save_pretrained refuses packed weights before it writes; everything else that saves goes on."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import enlarge_experts, gemma4, gemma4_multimodal, nemotron_h, qwen3_moe

import fp4moe
from fp4moe.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("registered")

IDS = torch.arange(1, 25).reshape(2, 12)
BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def replaced(model):
    return fp4moe.replace_moe(model, progress=False)


def implemented(model):
    model.set_experts_implementation("fp4moe")
    logits(model)
    return model


def check_refused(model, directory, path=""):
    for name in ("save_pretrained", "push_to_hub"):
        target = directory / name
        with pytest.raises(UnsupportedError) as raised:
            getattr(model, name)(str(target))
        text = str(raised.value)
        assert text.startswith(f"{name}: a {type(model).__name__} whose ")
        assert path in text and "fp4moe.quantize_checkpoint" in text
        assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", [replaced, implemented])
@pytest.mark.parametrize("name", BUILDS)
def test_packed_models_and_what_is_in_them_refuse(name, way, tmp_path):
    model = way(enlarge_experts(BUILDS[name]()))
    expected = logits(model)
    check_refused(model, tmp_path, "experts")
    check_refused(model.model, tmp_path, "layers.")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_refused(other, tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), expected)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(again), expected)


def test_a_model_around_a_replaced_one_refuses(tmp_path):
    model = gemma4_multimodal()
    replaced(model.model.language_model)
    check_refused(model, tmp_path, "model.language_model.layers.0.experts")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_a_model_that_another_process_packed_refuses(name, tmp_path):
    torch.save(replaced(BUILDS[name]()), tmp_path / "model.pt")
    code = (
        "import torch, transformers\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "try:\n"
        f"    model.save_pretrained({str(tmp_path / 'saved')!r})\n"
        "except NotImplementedError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("UnsupportedError save_pretrained: "), done.stderr
    assert "is packed cannot be written" in done.stdout
    assert not (tmp_path / "saved").exists()


def test_float_models_are_saved_as_ever(tmp_path):
    model = enlarge_experts(qwen3_moe())
    expected = logits(model)
    model.save_pretrained(tmp_path / "before")
    implemented(model)
    check_refused(model, tmp_path)
    # What comes back from the packed weights is float, and saved with their rounding.
    model.set_experts_implementation("grouped_mm")
    back = logits(model)
    model.save_pretrained(tmp_path / "after")
    for folder, value in (("before", expected), ("after", back)):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(again), value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_on_a_packed_model_are_saved(tmp_path):
    peft = pytest.importorskip("peft", reason="optional package")
    model = replaced(enlarge_experts(qwen3_moe()))
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")
    assert torch.equal(logits(again), logits(wrapped))
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "own")
    assert {f.name for f in (tmp_path / "own").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "own" / "model.safetensors").exists()
