"""ModelOpt's exports: `hf_quant_config.json`, or `quantization_config` in config.json.

Names: `weight` (uint8 codes, or e4m3), `weight_scale` (e4m3 per 16 values, or one float32 for FP8),
`weight_scale_2` (the global scale, a decode multiplier), `input_scale`. Scalars are 0-d or [1].
The module lists hold damaged names for NemotronH, so they only announce algorithms here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .naming import FORMS, KNOWN, OTHER, Convention, fail, scale_form, strings

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
ALGORITHMS = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "FP8_PB_WO": "fp8_block",
    "FP8_BLOCK_SCALES": "fp8_block",
    "MXFP8": "mxfp8",
    "MXFP4": "mxfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
}
READ = ("nvfp4", "fp8")


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
    ignored = strings(inner.get("exclude_modules", inner.get("ignore")), "ignore")
    forms = _forms(inner)
    return Convention("ModelOpt", MODELOPT_PARTS, False, frozenset(forms), ignored)


def _forms(inner: Mapping[str, Any]) -> set[str]:
    algorithm = inner.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        form = _form(inner, "quant_algo")
        if form not in READ:
            # In a mixture it may be of modules that the model has no use for: see the plan.
            got = f"{algorithm!r}, which is {FORMS[form]} and not read yet"
            fail("have a known algorithm as quant_algo", got, OTHER)
        return {form}
    layers = inner.get("quantized_layers")
    if isinstance(layers, dict) and layers:
        found = set()
        for name, layer in layers.items():
            if not isinstance(layer, dict):
                rule = "have an object for each of quantized_layers"
                fail(rule, f"{layer!r} for {name!r}"[:100], "Check the configuration")
            found.add(_form(layer, f"quantized_layers[{name!r}]"))
        return found
    groups = inner.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        got = repr(layers)[:100]
        fail("name the algorithm of each of quantized_layers", got, "Check the configuration")
    found = set()
    for name, group in groups.items():
        if not isinstance(group, dict):
            fail("have objects in config_groups", repr(group)[:100], "Check the configuration")
        described = scale_form(group, f"config_groups[{name!r}]")
        found |= {described} if described else set()
    return found


def _form(entry: Mapping[str, Any], where: str) -> str:
    """The form of `quant_algo`, which ModelOpt writes in either case."""
    algorithm, size = entry.get("quant_algo"), entry.get("group_size")
    form = ALGORITHMS.get(algorithm.upper()) if isinstance(algorithm, str) else None
    if form is None:
        fail(f"have a known algorithm as {where}", repr(algorithm)[:100], KNOWN)
    if form == "nvfp4" and size not in (None, 16):
        fail("have NVFP4 blocks of 16", f"group_size {size!r} for {where}", KNOWN)
    return form
