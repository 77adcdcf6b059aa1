"""The layers of a self-test: sizes by name, as keywords of `fp4moe.why_not`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..activations import ACTIVATIONS
from ..formats import DEFAULT_FORMAT, FORMATS

__all__ = ["LAYERS", "default_layers"]

# The two layers that the package is built for.
LAYERS: dict[str, dict[str, Any]] = {
    "Gemma4-26B-A4B": {
        "activation": "gelu_tanh",
        "gated": True,
        "hidden_size": 2816,
        "intermediate_size": 704,
        "num_experts": 128,
        "top_k": 8,
    },
    "Nemotron-3-Nano-30B": {
        "activation": "relu2",
        "gated": False,
        "hidden_size": 2688,
        "intermediate_size": 1856,
        "num_experts": 128,
        "top_k": 6,
    },
}
# Multiples of no kernel's tile, and a hidden size that is none of 8.
ODD = {"hidden_size": 2740, "intermediate_size": 1000, "num_experts": 16}
SMALL = {"hidden_size": 84, "intermediate_size": 40, "num_experts": 7, "top_k": 3}
# The forms of gpt-oss, Step and Inkling. Limits and caps show, as they are about the values' size.
FORMS: dict[str, dict[str, Any]] = {
    "clamped silu with biases": {"activation": "silu(alpha=1.702,beta=1,limit=1)", "biased": True},
    "silu_step": {"activation": "silu_step(limit=1)"},
    "silu_softcap": {"activation": "silu_softcap(alpha=2,beta=2)"},
}
# gpt-oss' form, also of formats with scales as gpt-oss has: powers of two.
BIASED = "clamped silu with biases"
# More than one block of 128 x 128, and the last ones are cut off.
BLOCKS = {**SMALL, "hidden_size": 150, "intermediate_size": 136}


def default_layers(
    device: torch.device, formats: Iterable[str] = tuple(FORMATS)
) -> dict[str, dict[str, Any]]:
    """Return the layers of a run by name; on a CPU the same forms at sizes that take seconds."""
    on_gpu = device.type == "cuda"
    layers: dict[str, dict[str, Any]] = {}
    for format in formats:
        layers |= _every_activation(on_gpu) if format == DEFAULT_FORMAT else _of(format, on_gpu)
    # The two main ones first: they are what most people wait for.
    return dict(sorted(layers.items(), key=lambda layer: layer[0] not in LAYERS))


def _every_activation(on_gpu: bool) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for model, sizes in LAYERS.items():
        form = "gated" if sizes["gated"] else "not gated"
        if on_gpu:
            layers[model] = sizes
            layers[f"odd sizes, {form}"] = {**sizes, **ODD}
        else:
            layers[f"{sizes['activation']}, {form}"] = {**sizes, **SMALL}
        others = {a: {"activation": a} for a in ACTIVATIONS if a != sizes["activation"]}
        small = {"num_experts": 16} if on_gpu else SMALL
        for other, changes in (others | (FORMS if sizes["gated"] else {})).items():
            layers[f"{other}, {form}"] = {**sizes, **small, **changes}
    return layers


def _of(format: str, on_gpu: bool) -> dict[str, dict[str, Any]]:
    """Return one layer with a gate and one without, in activations that most kernels have."""
    gated, plain = LAYERS.values()
    forms = {
        "silu, gated": {**gated, "activation": "silu"},
        f"{plain['activation']}, not gated": plain,
    }
    scales = FORMATS[format].scales
    if scales and scales.dtype == torch.uint8:
        forms[f"{BIASED}, gated"] = {**gated, **FORMS[BIASED]}
    in_blocks = scales is not None and scales.rows not in (None, 1)
    small = {"num_experts": 16} if on_gpu else BLOCKS if in_blocks else SMALL
    return {f"{format}: {n}": {**sizes, **small, "format": format} for n, sizes in forms.items()}
