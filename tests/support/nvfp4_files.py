"""Tiny checkpoints in ModelOpt's layout, written and decoded by formulas of their own.

Beside the files come the values that they stand for, in float32, from a plain table of the codes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, enlarge_experts, family, gemma4_multimodal

import fp4moe

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRID = torch.cat([GRID, -GRID])
E4M3 = torch.float8_e4m3fn
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclasses.dataclass
class Made:
    """A checkpoint: floats in bfloat16, tensors as stored, and the values that they stand for.

    stacked: transformers' own files of this class hold the experts as stacks.
    """

    floats: dict[str, torch.Tensor]
    config: dict
    stacked: bool
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def write(self, directory, tensors=None, quantization=MODELOPT, config=None):
        """Write a directory with one file; returns its path."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        chosen = self.tensors if tensors is None else tensors
        save_file(chosen, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(
            json.dumps(self.config if config is None else config)
        )
        if quantization:
            (directory / "hf_quant_config.json").write_text(json.dumps(quantization))
        return directory

    def expected(self, directory):
        """Logits of transformers' own class with the values as float32 weights."""
        floats = {k: self.values.get(k, v).float() for k, v in self.floats.items()}
        if self.stacked:
            paths = sorted({EXPERT.fullmatch(k)[1] for k in floats if EXPERT.fullmatch(k)})
            for path, layer in zip(paths, stacks(floats), strict=True):
                floats |= {
                    f"{path}.gate_up_proj": torch.cat([layer["gate"], layer["up"]], 1),
                    f"{path}.down_proj": layer["down"],
                }
            floats = {k: v for k, v in floats.items() if not EXPERT.fullmatch(k)}
        model = getattr(transformers, self.config["architectures"][0])
        self.write(directory, floats, None)
        return logits(model.from_pretrained(directory, dtype=torch.float32))


def quantise(weight, scale):
    """Packed codes, e4m3 block scales and float32 values of [N, K] with a given global scale."""
    blocks = weight.reshape(len(weight), -1, 16)
    block_scale = (blocks.abs().amax(-1) / (6 * scale)).clamp(2**-9, 448).to(E4M3)
    step = (block_scale.float() * scale)[..., None]
    codes = (blocks[..., None] / step[..., None] - GRID).abs().argmin(-1)
    values = (GRID[codes] * step).reshape(weight.shape)
    codes = codes.reshape(weight.shape).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, block_scale, values


def make(name, directory, shared=True, also="", **changes):
    """Save a tiny model, then store its experts, and the weights that match `also`, as NVFP4.

    name: of a model, or one that is built already.
    shared: gate and up of an expert have one global scale. Every input scale is another number.
    """
    model = name if isinstance(name, torch.nn.Module) else _build(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    enlarge_experts(model).to(torch.bfloat16).save_pretrained(directory)
    config = json.loads((pathlib.Path(directory) / "config.json").read_text())
    saved = load_file(pathlib.Path(directory) / "model.safetensors")
    floats = _by_expert(saved)
    made = Made(floats, config, stacked=floats.keys() != saved.keys())
    made.tensors |= made.floats
    for count, (key, weight) in enumerate(sorted(made.floats.items())):
        if not (EXPERT.fullmatch(key) or (also and re.search(also, key))):
            continue
        head, largest = key.removesuffix("weight"), weight.float().abs().max()
        if shared and EXPERT.fullmatch(key) and "down_proj" not in key:
            twins = (re.sub("(gate|up)_proj", f"{n}_proj", key) for n in ("gate", "up"))
            largest = max(made.floats[k].float().abs().max() for k in twins if k in made.floats)
        packed, block_scale, made.values[key] = quantise(weight.float(), largest / 2688)
        made.tensors |= {
            key: packed,
            f"{head}weight_scale": block_scale,
            f"{head}weight_scale_2": largest / 2688,
            f"{head}input_scale": torch.tensor(0.01 + 1e-4 * count),
        }
    return made


def _build(name):
    if name == "gemma4_multimodal":
        return gemma4_multimodal("eager")
    return MODELS[name]("eager") if name in MODELS else family(name, "eager")


def _by_expert(tensors):
    """Gemma4's float stacks as ModelOpt names them: one matrix a projection and expert."""
    found = {}
    for key, tensor in tensors.items():
        head, _, projection = key.rpartition(".")
        if tensor.ndim != 3 or not head.endswith(".experts"):
            found[key] = tensor
            continue
        names = ("gate", "up") if projection == "gate_up_proj" else (projection[: -len("_proj")],)
        for expert, matrix in enumerate(tensor):
            for name, part in zip(names, matrix.chunk(len(names)), strict=True):
                found[f"{head}.{expert}.{name}_proj.weight"] = part.clone()
    return found


def stacks(values):
    """Projection -> [E, N, K] of each layer that has experts, in the order of the layers."""
    layers = {}
    for key, value in values.items():
        if match := EXPERT.fullmatch(key):
            path, expert, projection = match.groups()
            number = int(re.search(r"layers\.(\d+)", path)[1])
            layers.setdefault(number, {}).setdefault(projection[:-5], {})[int(expert)] = value
    return [
        {name: torch.stack([found[e] for e in sorted(found)]) for name, found in layer.items()}
        for _, layer in sorted(layers.items())
    ]


def decoded(weights):
    """Gate, up and down of fp4moe's experts by the table: code x block scale x global scale."""
    found = {}
    for name, part in (("gate_up", weights.gate_up), ("down", weights.down)):
        codes = torch.stack([part.packed & 15, part.packed >> 4], -1).flatten(-2).long()
        step = part.block_scale.float() * part.global_scale[:, None, None]
        found[name] = GRID[codes] * step.repeat_interleave(16, -1)
    rows = found.pop("gate_up")
    halves = rows.chunk(2, 1) if weights.gated else (rows,)
    found |= dict(zip(("gate", "up")[not weights.gated :], halves, strict=True))
    sizes = {"down": (weights.hidden_size, weights.intermediate_size)}
    other = (weights.intermediate_size, weights.hidden_size)
    return {k: v[:, : sizes.get(k, other)[0], : sizes.get(k, other)[1]] for k, v in found.items()}


def load(directory, **options):
    options = {"dtype": torch.float32, "progress": False, **options}
    return fp4moe.from_pretrained(directory, **options)


def experts(model):
    return [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


def logits(model):
    """Logits of some fixed tokens."""
    with torch.no_grad():
        return model(torch.arange(3, 10)[None]).logits.float()
