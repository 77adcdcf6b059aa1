"""Tiny models of four real classes, and what their experts are in each number format."""

from __future__ import annotations

import copy
import functools

import torch
from float_twins import fused_parts, stored
from tiny_models import MODELS, enlarge_experts, family, keep_layers

import fp4moe
from fp4moe.formats import FORMATS

# One MoE layer of each; gpt-oss has biases, interleaved rows and transposed weights.
KEPT = {"gemma4": (0,), "nemotron_h": (1, 2), "qwen3_moe": (0,), "gpt_oss": (0,)}
IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71], [3, 88, 9, 120, 54, 31, 77, 6, 45]])
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))
# Elements that a block scale covers: rows, columns; 0 for all.
BLOCKS = {
    "nvfp4": (1, 16),
    "fp8": (0, 0),
    "fp8_channel": (1, 0),
    "fp8_block": (128, 128),
    "mxfp8": (1, 32),
    "mxfp4": (1, 32),
}
assert set(BLOCKS) == set(FORMATS)


@functools.cache
def _template(name, whole):
    build = MODELS.get(name) or functools.partial(family, name)
    model = enlarge_experts(build()).requires_grad_(False)
    return model if whole else keep_layers(model, *KEPT[name])


def float_model(name, whole=False):
    """A model whose experts show in its logits; one layer of experts unless whole."""
    return copy.deepcopy(_template(name, whole))


def replaced(name, format, whole=False, **options):
    return fp4moe.replace_moe(float_model(name, whole), format=format, progress=False, **options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def decoded(packed, scale, factor, format):
    """Codes [E, N, *] of one matrix -> float32, the definition of the format written again."""
    if packed.dtype == torch.uint8:
        codes = E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]
    else:
        codes = packed.float()
    rows, columns = (
        size or extent for size, extent in zip(BLOCKS[format], codes.shape[1:], strict=True)
    )
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    scale = scale.repeat_interleave(rows, 1)[:, : codes.shape[1]]
    scale = scale.repeat_interleave(columns, 2)[:, :, : codes.shape[2]]
    return codes * scale * (factor[:, None, None] if factor.numel() else 1)


def decoded_parts(weights):
    """What `ExpertWeights.dequantize` returns, by the definitions here."""
    format, inner, width = weights.format, weights.intermediate_size, weights.hidden_size
    halves, parts = 1 + weights.gated, {}
    first = [t.chunk(halves, 1) for t in (weights.gate_up.packed, weights.gate_up.block_scale)]
    for name, codes, scale in zip(("gate", "up")[-halves:], *first, strict=True):
        matrix = decoded(codes, scale, weights.gate_up.global_scale, format)
        parts[name] = matrix[:, :inner, :width]
    parts["down"] = decoded(*weights.down.parts().values(), format)[:, :width, :inner]
    if weights.biased:
        biases = weights.gate_up_bias.chunk(halves, 1)
        names = [f"{name}_bias" for name in ("gate", "up")[-halves:]]
        parts |= {n: bias[:, :inner] for n, bias in zip(names, biases, strict=True)}
        parts["down_bias"] = weights.down_bias[:, :width]
    return parts


@functools.cache
def expected(name, format, whole=False):
    """Logits of Hugging Face's own loop on the decoded weights."""
    model, twin = replaced(name, format, whole), float_model(name, whole)
    for path, fused in fused_parts(model).items():
        module = twin.get_submodule(path)
        for part, weight in stored(module, decoded_parts(fused.weights)).items():
            getattr(module, part).data.copy_(weight)
    twin.set_experts_implementation("eager")
    return logits(twin)
