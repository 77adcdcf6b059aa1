"""Whole layers of experts as ModelOpt exports them from transformers' models, byte for byte."""

from __future__ import annotations

import warnings

import pytest
import torch
from checkpoint_makers import load_tensors
from modelopt_linear import PRESETS
from tiny_models import enlarge_experts
from transformers import (
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from weight_cases import assert_same_bytes

from fp4moe.experts import ExpertWeights

# Two blocks of 128 along each axis: ModelOpt 0.47 cannot export one.
SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 64, "head_dim": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def qwen3_moe():
    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=1, num_experts=4)
    return Qwen3MoeForCausalLM(config), "model.layers.0.mlp.experts", "silu"


def nemotron_h():
    config = NemotronHConfig(
        **SIZES,
        layers_block_type=["full_attention", "moe"],
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=256,
    )
    return NemotronHForCausalLM(config), "model.layers.1.mixer.experts", "relu2"


def export(model, name, directory):
    quantization = pytest.importorskip("modelopt.torch.quantization", reason="optional package")
    from modelopt.torch.export import export_hf_checkpoint

    model.config.architectures = [type(model).__name__]
    ids = torch.randint(0, 64, (4, 64))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize(model, getattr(quantization, PRESETS[name]), lambda m: m(ids))
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)
    return load_tensors(directory)


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen3_moe, nemotron_h], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", PRESETS)
def test_experts_are_those_that_modelopt_exports(name, make, tmp_path):
    model, path, activation = make()
    model = enlarge_experts(model).bfloat16().eval()
    experts = model.get_submodule(path)
    floats = {n: p.detach().clone() for n, p in experts.named_parameters()}
    up = {n.removesuffix("_proj"): floats[n] for n in floats if n != "down_proj"}
    down = floats["down_proj"]
    weights = ExpertWeights.quantize(**up, down=down, activation=activation, format=name)
    written = export(model, name, tmp_path)
    halves = ("gate", "up") if weights.gated else ("up",)
    codes = dict(zip(halves, weights.gate_up.packed.chunk(len(halves), 1), strict=True))
    scales = dict(zip(halves, weights.gate_up.block_scale.chunk(len(halves), 1), strict=True))
    codes["down"], scales["down"] = weights.down.packed, weights.down.block_scale
    prefix = next(k for k in written if ".experts.0." in k).split(".experts.")[0] + ".experts"
    compared = 0
    for expert in range(4):
        for part in codes:
            key = f"{prefix}.{expert}.{part}_proj"
            assert_same_bytes(codes[part][expert], written[f"{key}.weight"], key)
            scale = written[f"{key}.weight_scale"].view(scales[part][expert].shape)
            assert_same_bytes(scales[part][expert], scale, key)
            compared += 1
    assert compared == 4 * len(codes)
