"""Tiny checkpoints of FP8, MXFP8 and MXFP4, written and decoded by the tools themselves.

SIZES are blocks of 32, and one block of 128 and a part of another. What a tool writes comes back as
a float32 model by the tool's own decoding (`checkpoint_makers.reference_model`).
"""

from __future__ import annotations

import json
import pathlib
import re
from types import SimpleNamespace
from unittest import mock

import checkpoint_makers as makers
import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import save_file

SIZES = {"hidden_size": 192, "moe_intermediate_size": 160}
# Whole blocks, which transformers' own quantiser asks for.
WHOLE = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
WHOLE |= {"head_dim": 32, "num_key_value_heads": 4}
E8M0 = torch.float8_e8m0fnu
# Preset of each tool -> the format.
MODELOPT = {
    "FP8_DEFAULT_CFG": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "fp8_channel",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "fp8_block",
    "MXFP8_DEFAULT_CFG": "mxfp8",
    "MXFP4_DEFAULT_CFG": "mxfp4",
    "W4A8_MXFP4_FP8_CFG": "mxfp4",
}
COMPRESSED = {
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8_channel",
    "FP8_BLOCK": "fp8_block",
    "MXFP8": "mxfp8",
    "MXFP8A16": "mxfp8",
    "MXFP4A16": "mxfp4",
}
# dtype of weight_scale_inv.
FINE_GRAINED = {
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "ue8m0": E8M0,
}


def sizes(**changes):
    """Return a context in which tiny models have these sizes."""
    return mock.patch.dict(tiny_models.COMMON, changes or SIZES)


def of_modelopt(kind):
    """Return the sizes for ModelOpt, which needs whole blocks in a fused gate and up."""
    return SIZES | ({"moe_intermediate_size": 256} if kind.startswith("FP8_2D") else {})


def save(tool, name, kind, directory):
    """Write a checkpoint of a tiny model with one of the tables' kinds."""
    own = {"transformers": WHOLE, "modelopt": of_modelopt(kind)}
    with sizes(**own.get(tool, SIZES)):
        if tool == "modelopt":
            makers.save_modelopt(name, directory, kind)
        elif tool == "compressed":
            save_compressed(name, directory, kind)
        else:
            save_fine_grained(name, directory, kind)


def save_compressed(name, directory, preset):
    """compressed-tensors' own schemes, scales and compressor; inputs of FP8 have ranges."""
    pytest.importorskip("compressed_tensors", reason="optional package")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        maybe_pad_tensor_for_block_quant,
    )

    model = makers.linearise(makers.build(name))
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=["lm_head", "re:.*router.*", "re:.*latent.*", "re:.*mlp.gate$", "re:.*conv1d.*"],
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        args, weight = scheme.weights, module.weight.data
        if args.block_structure:
            weight = maybe_pad_tensor_for_block_quant(weight, tuple(args.block_structure))
            down, across = args.block_structure
            blocks = weight.unflatten(1, (-1, across)).unflatten(0, (-1, down)).movedim(1, 2)
            groups = blocks.flatten(-2)
        elif args.group_size:
            groups = weight.unflatten(1, (-1, args.group_size))
        else:
            groups = weight[:, None, :] if args.strategy == "channel" else weight.reshape(1, -1)
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "input_scale"):
            module.input_scale.data = torch.rand(1).to(module.input_scale.dtype) + 0.01
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    makers.save_state(name, model, directory)
    compressor.update_config(str(directory))


def save_fine_grained(name, directory, kind, stacked=False):
    """transformers' own quantiser of `quant_method: fp8`; scales then cast to the kind's dtype.

    stacked: gate and up of all experts in one tensor, as its own module has them.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    scale_fmt = "ue8m0" if kind == "ue8m0" else "float"
    options = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_fmt)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=options))
    model = makers.build(name)
    kept = r"embed|lm_head|router|mlp\.gate\.|conv1d|norm"
    makers.save_state(name, model if stacked else makers.linearise(model), directory)
    tensors = {}
    for key, tensor in makers.load_tensors(directory).items():
        found = {key: tensor} if re.search(kept, key) else quantizer._quantize_one(key, tensor)
        tensors |= {
            k: t.to(FINE_GRAINED[kind]) if k.endswith("_scale_inv") else t for k, t in found.items()
        }
    assert any(key.endswith("_scale_inv") and ".experts." in key for key in tensors)
    entry = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    announce(directory, entry | ({"scale_fmt": "ue8m0"} if kind == "ue8m0" else {}))
    save_file(tensors, pathlib.Path(directory) / "model.safetensors", metadata={"format": "pt"})


def save_gpt_oss(directory, packed):
    """gpt-oss' stacks of e2m1, random bytes and powers, beside what transformers saves.

    packed False: the same as floats, by transformers' own function.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with sizes():
        model = tiny_models.family("gpt_oss", "eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    tensors, random = makers.load_tensors(directory), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        experts, columns, rows = tensors.pop(key).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=random)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=random)
        blocks, scales = blocks.to(torch.uint8), scales.to(torch.uint8)
        if packed:
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        else:
            tensors[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, pathlib.Path(directory) / "model.safetensors", metadata={"format": "pt"})
    if packed:
        announce(directory, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def announce(directory, entry):
    """Write a quantization_config into config.json."""
    path = pathlib.Path(directory) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": entry}))


def reference_model(directory):
    """The float32 model of a checkpoint, see `checkpoint_makers.reference_model`."""
    config = json.loads((pathlib.Path(directory) / "config.json").read_text())
    if config["quantization_config"]["quant_method"] == "mxfp4":
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return makers.reference_model(directory)
