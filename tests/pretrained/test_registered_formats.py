"""After register_transformers AutoModel reads, and refuses, what fp4moe.from_pretrained does."""

from __future__ import annotations

import json

import checkpoint_makers as makers
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fp4moe
from fp4moe.checkpoint.modelopt import MODELOPT_METHODS, is_modelopt
from fp4moe.errors import CheckpointError

TOOL = {"producer": {"name": "modelopt", "version": "0.31.0"}}
FIELDS = {"quant_algo": "NVFP4", "ignore": ["lm_head"], **TOOL}
FILE = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}, **TOOL}
pytestmark = pytest.mark.usefixtures("registered")

REAL_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module", params=["gemma4", "qwen3_moe"])
def packed(request, tmp_path_factory):
    """What fp4moe writes, whose entries the tests then change."""
    root = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        makers.save_float(request.param, root / "float")
    fp4moe.quantize_checkpoint(root / "float", root / "packed", progress=False)
    return root / "packed"


def announce(packed, target, entry, file):
    """The same tensors, announced in config.json and hf_quant_config.json; None leaves it out."""
    directory = makers.rewrite(packed, target, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    if entry is not None:
        config["quantization_config"] = entry
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hf_quant_config.json").unlink()
    if file is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps(file))
    return directory


READ = [
    *((FIELDS | {"quant_method": method}, None) for method in MODELOPT_METHODS),
    (FIELDS, None),
    (FIELDS, FILE),
    ({"quant_algo": "NVFP4", **TOOL}, None),
    (FILE, None),
    (None, FILE),
    (REAL_FP8, FILE),
    (REAL_FP8, {"quantization": {"quant_algo": "W4A16_NVFP4"}}),
    ({"quant_method": "no_such_tool"}, FILE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "file"), READ)
def test_both_read_it(packed, tmp_path, entry, file):
    directory = announce(packed, tmp_path, entry, file)
    ours = fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert sum(isinstance(module, fp4moe.FusedExperts) for module in plain.modules()) == 2
    assert torch.equal(makers.logits(plain), makers.logits(ours))


REFUSED = [
    ({"quant_method": "modelopt_fp8", **FIELDS}, None, "'modelopt_fp8'"),
    ({"quant_method": "petit_nvfp4"}, None, "'petit_nvfp4'"),
    ({"quant_method": "no_such_tool", "quant_algo": "NVFP4"}, None, "'no_such_tool'"),
    ({"quant_algo": "W4A8_AWQ", **TOOL}, None, "'W4A8_AWQ'"),
    (None, FILE | {"quantization": {"quant_algo": "MXFP9"}}, "'MXFP9'"),
    (REAL_FP8, FILE | {"quantization": {"quant_algo": "NVFP4_AWQ"}}, "'NVFP4_AWQ'"),
]


@pytest.mark.parametrize(("entry", "file", "said"), REFUSED)
def test_both_refuse_it_by_name(packed, tmp_path, entry, file, said):
    directory = announce(packed, tmp_path, entry, file)
    for load in (fp4moe.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=said):
            load(directory)


OTHERS = [
    REAL_FP8,
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "mxfp4"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
]
NOBODYS = [{"bits": 4, "group_size": 64}, {"quant_method": "no_such_tool"}]
OF_FP8 = FILE | {"quantization": {"quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("entry", "file"),
    [*((entry, None) for entry in OTHERS + NOBODYS), *((entry, OF_FP8) for entry in OTHERS)],
)
def test_entries_of_other_quantizers_stay_as_they_are(packed, tmp_path, entry, file):
    config = AutoConfig.from_pretrained(announce(packed, tmp_path, entry, file))
    assert config.quantization_config == entry
    assert not is_modelopt(config.quantization_config)


def test_a_float_checkpoint_stays_float(packed):
    model = AutoModelForCausalLM.from_pretrained(packed.with_name("float"))
    assert not any(isinstance(module, fp4moe.FusedExperts) for module in model.modules())
