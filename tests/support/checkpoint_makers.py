"""Tiny checkpoints written by the real tools, and float models dequantised without fp4moe.

ModelOpt's export runs whole on a CPU. compressed-tensors compresses Linears, so the experts are
first laid out as Linears, as llm-compressor does.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import (
    enlarge_experts,
    gemma4,
    gemma4_multimodal,
    nemotron_h,
    nemotron_h_latent,
    qwen3_moe,
)

BUILDERS = {
    "gemma4": gemma4,
    "gemma4_multimodal": gemma4_multimodal,
    "nemotron_h": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}
E4M3 = {"num_bits": (4, 3), "axis": None}


def build(name, dtype=torch.bfloat16):
    """A tiny model whose experts show in the logits, ready to be saved."""
    model = enlarge_experts(BUILDERS[name]("eager", torch.float32)).to(dtype)
    model.config.architectures = [type(model).__name__]
    return model


def save_float(name, directory, dtype=torch.bfloat16, **options):
    """What transformers saves."""
    build(name, dtype).save_pretrained(directory, **options)


def modelopt_config(kind):
    """A preset, or FP8 beside NVFP4.

    "mixed": FP8 for what is not an expert (as the recipe of Nemotron Super); "fp8 experts": for
    experts alone. Both have an FP8 cache.
    """
    pytest.importorskip("modelopt", reason="optional package")
    import modelopt.torch.quantization as mtq

    if kind == "fp8 experts":
        config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
        for quantizer in ("weight", "input"):
            name = f"*mlp.experts*{quantizer}_quantizer*"
            for pattern in (name, name.replace("mlp.", "")):
                config["quant_cfg"].append({"quantizer_name": pattern, "cfg": E4M3, "enable": True})
        config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
        return config
    if kind != "mixed":
        return getattr(mtq, kind)
    config = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    for pattern in ("shared_experts", "in_proj", "out_proj", "mlp"):
        for quantizer in ("weight", "input"):
            name = f"*{pattern}*{quantizer}_quantizer"
            config["quant_cfg"].append({"quantizer_name": name, "cfg": E4M3, "enable": True})
    config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    return config


def save_modelopt(name, directory, kind="NVFP4_DEFAULT_CFG"):
    """nvidia-modelopt's own calibration and export."""
    pytest.importorskip("modelopt", reason="optional package")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = build(name)
    ids = torch.randint(1, 110, (2, 32), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # ModelOpt's own: of how it copies a scale, and of amax where there is none to calibrate.
        warnings.simplefilter("ignore")
        mtq.quantize(model, modelopt_config(kind), lambda m: m(ids))
        export_hf_checkpoint(model, export_dir=directory)


def linearise(model):
    """Lay the stacked experts out as Linears, expert by expert."""
    for path, module in list(model.named_modules()):
        if not hasattr(module, "is_transposed"):
            continue
        experts = torch.nn.Module()
        for index in range(module.down_proj.shape[0]):
            if module.has_gate:
                gate, up = module.gate_up_proj[index].chunk(2)
                weights = {"gate_proj": gate, "up_proj": up}
            else:
                weights = {"up_proj": module.up_proj[index]}
            expert = torch.nn.Module()
            for name, weight in {**weights, "down_proj": module.down_proj[index]}.items():
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = torch.nn.Parameter(weight.detach().clone())
                expert.add_module(name, linear)
            experts.add_module(str(index), expert)
        model.set_submodule(path, experts)
    return model


def save_compressed(name, directory, preset="NVFP4", shared=True, input_amax=3.0):
    """compressed-tensors' own parameters, scales and compressor.

    shared: gate and up of an expert are observed together, as llm-compressor does.
    """
    pytest.importorskip("compressed_tensors", reason="optional package")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = linearise(build(name))
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=["lm_head", "re:.*router.*", "re:.*latent.*", "re:.*vision.*"],
    )
    apply_quantization_config(model, config)
    for path, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        together = [module.weight.data]
        twin = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(path.rpartition(".")[2])
        parent = model.get_submodule(path.rpartition(".")[0])
        if shared and hasattr(parent, twin or ""):
            together.append(getattr(parent, twin).weight.data)
        ends = torch.stack([torch.stack(torch.aminmax(weight)) for weight in together])
        module.weight_global_scale.data = generate_gparam(
            ends.amin().reshape(1), ends.amax().reshape(1)
        )
        blocks = module.weight.data.unflatten(1, (-1, 16))
        module.weight_scale.data, _ = calculate_qparams(
            blocks.amin(-1),
            blocks.amax(-1),
            scheme.weights,
            global_scale=module.weight_global_scale,
        )
        if hasattr(module, "input_global_scale"):
            # Another range for each expert's down, as llm-compressor leaves them.
            number = re.search(r"experts\.(\d+)\.down", path)
            amax = torch.tensor([input_amax + (int(number[1]) if number else 0)])
            module.input_global_scale.data = generate_gparam(-amax, amax)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_state(name, model, directory)
    compressor.update_config(str(directory))


def save_state(name, model, directory):
    """Write a model as one file, under the names that its checkpoints have."""
    directory = pathlib.Path(directory)
    model.config.save_pretrained(directory)
    tensors = {k: t.contiguous() for k, t in model.state_dict().items()}
    if model.config.get_text_config().tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors = {
        ("backbone." if name.startswith("nemotron") else "") + k: t for k, t in tensors.items()
    }
    tensors = {k.replace("backbone.model.", "backbone."): t for k, t in tensors.items()}
    tensors = {k.replace("backbone.lm_head", "lm_head"): t for k, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load_tensors(directory):
    """Every tensor of a checkpoint by key."""
    found = {}
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(source, target, change, config=None):
    """Copy a checkpoint as one file with other tensors: `change(tensors)` edits the dictionary."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            target.joinpath(file.name).write_bytes(file.read_bytes())
    tensors = load_tensors(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        for name in ("config.json", "hf_quant_config.json"):
            path = target / name
            if path.exists():
                content = json.loads(path.read_text())
                path.write_text(json.dumps(config(name, content)))
    return target


def dequantise_matrix(tensors, module):
    """A matrix by its module's key: by the tool that wrote it, in float32."""
    pytest.importorskip("compressed_tensors", reason="optional package")
    pytest.importorskip("modelopt", reason="optional package")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    if f"{module}.weight_packed" in tensors:
        packed = tensors[f"{module}.weight_packed"]
        rows, columns = packed.shape
        values = unpack_fp4_from_uint8(packed, rows, columns * 2, dtype=torch.float32)
        scale = tensors[f"{module}.weight_scale"]
        if scale.dtype == torch.uint8:
            from compressed_tensors.quantization.lifecycle.forward import dequantize

            scale, args = torch.exp2(scale.float() - 127), _float_args(4, "group", group_size=32)
            return dequantize(values, scale, args=args, dtype=torch.float32)
        scale = scale.float()
        step = scale / tensors[f"{module}.weight_global_scale"]
        return values * step.repeat_interleave(16, 1)
    weight, scale = tensors[f"{module}.weight"], tensors.get(f"{module}.weight_scale")
    if f"{module}.weight_scale_inv" in tensors:
        return _fine_grained(weight, tensors[f"{module}.weight_scale_inv"])
    if scale is not None and scale.dtype == torch.uint8:
        return _mx(weight, scale)
    if scale is not None and scale.numel() > 1 and weight.dtype != torch.uint8:
        return _fp8(weight, scale)
    if weight.dtype == torch.uint8:
        shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
        return NVFP4QTensor(shape, torch.float32, weight).dequantize(
            torch.float32,
            scale=scale,
            double_scale=tensors[f"{module}.weight_scale_2"],
            block_sizes={-1: 16},
        )
    return weight.float() if scale is None else weight.float() * scale.float()


def _fp8(weight, scale):
    """By compressed-tensors a row or a block, which it pads; ModelOpt's scales have more axes."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor

    if scale.ndim == 4:
        stored = FP8QTensor(weight.shape, torch.float32, weight)
        with warnings.catch_warnings():  # ModelOpt's own, of how it indexes
            warnings.simplefilter("ignore")
            return stored.dequantize(
                torch.float32, scale=scale[:, 0, :, 0], block_sizes={0: 128, 1: 128}
            )
    if scale.ndim == 1:
        stored = FP8QTensor(weight.shape, torch.float32, weight)
        return stored.dequantize(torch.float32, scale=scale[:, None])
    rows = scale.shape == (len(weight), 1)
    args = _float_args(8, *(("channel",) if rows else ("block", [128, 128])))
    return dequantize(weight, scale.float(), args=args, dtype=torch.float32)


def _float_args(bits, strategy, blocks=None, **others):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits, type="float", strategy=strategy, block_structure=blocks, **others
    )


def _mx(weight, scale):
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor

    four = weight.dtype == torch.uint8
    shape = torch.Size((weight.shape[0], weight.shape[1] * (1 + four)))
    stored = (MXFP4QTensor if four else MXFP8QTensor)(shape, torch.float32, weight)
    return stored.dequantize(torch.float32, scale=scale, block_sizes={-1: 32}).float()


def _fine_grained(weight, scale):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)


def reference_model(directory):
    """A float32 model of the plain class that holds the dequantised weights."""
    tensors = load_tensors(directory)
    config = transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = getattr(transformers, config.architectures[0])(config).float().eval()
    modules = {re.sub(r"\.weight(_packed)?$", "", k) for k in tensors if ".weight" in k}
    floats = {m: dequantise_matrix(tensors, m) for m in modules if _is_matrix(tensors, m)}
    state = {
        f"{module}.weight": weight
        for module, weight in floats.items()
        if not re.search(r"experts\.\d+\.", module)
    }
    side = re.compile(r".*(_scale|_scale_2|_packed|_global_scale|_scale_inv)")
    for key, tensor in tensors.items():
        if key not in state and not side.fullmatch(key) and ".experts." not in key:
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    state |= {k: t.float() for k, t in tensors.items() if k.endswith("per_expert_scale")}
    for prefix in {m.split(".experts.")[0] for m in floats if re.search(r"\.experts\.\d+\.", m)}:
        count = 1 + max(
            int(m[len(prefix) + 9 :].split(".")[0])
            for m in floats
            if m.startswith(f"{prefix}.experts.")
        )
        stack = {
            name: torch.stack([floats[f"{prefix}.experts.{e}.{name}"] for e in range(count)])
            for name in ("gate_proj", "up_proj", "down_proj")
            if f"{prefix}.experts.0.{name}" in floats
        }
        if "gate_proj" in stack:
            both = (stack.pop("gate_proj"), stack.pop("up_proj"))
            stack["gate_up_proj"] = torch.cat(both, 1)
        state |= {f"{prefix}.experts.{name}": tensor for name, tensor in stack.items()}
    state = {re.sub("^backbone", "model", k): t for k, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def _is_matrix(tensors, module):
    return (
        f"{module}.weight_packed" in tensors
        or f"{module}.weight_scale" in tensors
        or f"{module}.weight_scale_inv" in tensors
        or (re.search(r"\.experts\.\d+\.", module) is not None and f"{module}.weight" in tensors)
    )


def logits(model, tokens=7):
    """Logits of some fixed tokens, float32."""
    ids = torch.arange(3, 3 + tokens)[None]
    with torch.no_grad():
        return model(ids).logits.float()
