"""ModelOpt's exports: `hf_quant_config.json`, or `quantization_config` in config.json.

Names: `weight` (uint8 codes, or e4m3), `weight_scale` (e4m3 per 16 values, or one float32 for FP8),
`weight_scale_2` (the global scale, a decode multiplier), `input_scale`. Scalars are 0-d or [1].
The module lists hold damaged names for NemotronH, so they only announce algorithms here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .conventions import KNOWN, Convention, fail, scale_form, strings

__all__ = [
    "MODELOPT_METHODS",
    "MODELOPT_PARTS",
    "announces_nvfp4",
    "is_modelopt",
    "modelopt_convention",
    "resembles_modelopt",
]

# The names that it goes by as quant_method.
MODELOPT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")

MODELOPT_PARTS = {
    "weight": "weight",
    "weight_scale": "scale",
    "weight_scale_2": "global_scale",
    "input_scale": "input_scale",
}
ALGORITHMS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "FP8": "fp8"}


def is_modelopt(quantization: Mapping[str, Any]) -> bool:
    """Whether this configuration is ModelOpt's, in either of its two places."""
    method = quantization.get("quant_method")
    if method is None:
        producer = quantization.get("producer")
        named = isinstance(producer, dict) and producer.get("name") == "modelopt"
        return named or isinstance(quantization.get("quantization"), dict)
    return method in MODELOPT_METHODS


def resembles_modelopt(quantization: Mapping[str, Any]) -> bool:
    """Whether a tool of ModelOpt's kind wrote this, under whatever quant_method."""
    method = quantization.get("quant_method")
    named = isinstance(method, str) and ("modelopt" in method or "nvfp4" in method.lower())
    plain = {key: value for key, value in quantization.items() if key != "quant_method"}
    return named or "quant_algo" in plain or is_modelopt(plain)


def announces_nvfp4(quantization: Mapping[str, Any]) -> bool:
    """Whether ModelOpt's configuration names an algorithm of NVFP4 weights, read here or not."""
    inner = quantization.get("quantization", quantization)
    entries = [inner] if isinstance(inner, dict) else []
    layers = entries[0].get("quantized_layers") if entries else None
    entries += layers.values() if isinstance(layers, dict) else []
    return any("NVFP4" in str(e.get("quant_algo")) for e in entries if isinstance(e, dict))


def modelopt_convention(quantization: Mapping[str, Any]) -> Convention:
    """Read the configuration.

    Raises:
        CheckpointError: an algorithm is unknown, or an entry is not of its kind.
    """
    inner = quantization.get("quantization", quantization)
    if not isinstance(inner, dict):
        fail("have an object as quantization", repr(inner)[:100], "Check hf_quant_config.json")
    size = inner.get("group_size")
    if size not in (None, 16):
        fail("have NVFP4 blocks of 16", f"group_size {size!r}", KNOWN)
    ignored = strings(inner.get("exclude_modules", inner.get("ignore")), "ignore")
    forms = _forms(inner)
    return Convention("ModelOpt", MODELOPT_PARTS, False, frozenset(forms), ignored)


def _forms(inner: Mapping[str, Any]) -> set[str]:
    algorithm = inner.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        return {_form(algorithm, "quant_algo")}
    layers = inner.get("quantized_layers")
    if isinstance(layers, dict) and layers:
        found = set()
        for name, layer in layers.items():
            if not isinstance(layer, dict):
                rule = "have an object for each of quantized_layers"
                fail(rule, f"{layer!r} for {name!r}"[:100], "Check the configuration")
            found.add(_form(layer.get("quant_algo"), f"quantized_layers[{name!r}]"))
            if layer.get("group_size") not in (None, 16):
                got = f"group_size {layer['group_size']!r} for {name!r}"
                fail("have NVFP4 blocks of 16", got, KNOWN)
        return found
    groups = inner.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        got = repr(layers)[:100]
        fail("name the algorithm of each of quantized_layers", got, "Check the configuration")
    found = set()
    for name, group in groups.items():
        if not isinstance(group, dict):
            fail("have objects in config_groups", repr(group)[:100], "Check the configuration")
        form = scale_form(group, f"config_groups[{name!r}]")
        found |= {form} if form else set()
    return found


def _form(algorithm: object, where: str) -> str:
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        fail(f"have a known algorithm as {where}", repr(algorithm)[:100], KNOWN)
    return ALGORITHMS[algorithm]
