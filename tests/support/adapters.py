"""Adapters of PEFT on the weights of experts."""

from __future__ import annotations

import pytest


def lora(model, **options):
    """Wrap the model; the adapter changes its output from the start."""
    peft = pytest.importorskip("peft", reason="optional package")
    first = "up_proj" if "NemotronH" in type(model).__name__ else "gate_up_proj"
    targets = [f"experts.{first}", "experts.down_proj"]
    options = {"lora_alpha": 16, "target_modules": [], "target_parameters": targets} | options
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()
