"""ModelOpt's exports: `hf_quant_config.json`, or `quantization_config` in config.json.

Names: `weight` (codes), `weight_scale` (block scales; of blocks of rows with axes of one element),
`weight_scale_2` (the global scale, a decode multiplier), `input_scale`. Scalars are 0-d or [1].
The module lists hold damaged names for NemotronH, so they only announce algorithms here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..formats import FORMATS
from .naming import KNOWN, Convention, fail, row_block, scale_form, strings

__all__ = [
    "MODELOPT_METHODS",
    "MODELOPT_NAMES",
    "announces_nvfp4",
    "is_modelopt",
    "modelopt_convention",
    "resembles_modelopt",
]

# The names that it goes by as quant_method.
MODELOPT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
WEIGHTS_ONLY = "W4A16_NVFP4"


class Row(NamedTuple):
    """What ModelOpt calls a format: its algorithms, the first as written, and its parts.

    group_size is what it writes beside the algorithm.
    """

    algorithms: tuple[str, ...]
    names: Mapping[str, str]
    group_size: int | None = None


SCALED = {"packed": "weight", "block_scale": "weight_scale"}
STATIC = {"input_scale": "input_scale"}
ROWS = {
    "nvfp4": Row(("NVFP4", WEIGHTS_ONLY), SCALED | {"global_scale": "weight_scale_2"} | STATIC, 16),
    "fp8": Row(("FP8",), SCALED | STATIC),
    "fp8_channel": Row(("FP8_PER_CHANNEL_PER_TOKEN",), SCALED),
    "fp8_block": Row(("fp8_pb_wo", "FP8_PB_WO", "FP8_BLOCK_SCALES"), SCALED),
    "mxfp8": Row(("MXFP8",), SCALED, 32),
    "mxfp4": Row(("mxfp4", "W4A8_MXFP4_FP8"), SCALED),
}
MODELOPT_NAMES = {form: row.names for form, row in ROWS.items()}
# ModelOpt writes them in either case.
ALGORITHMS = {name.upper(): form for form, row in ROWS.items() for name in row.algorithms}


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
    # "WO" is weights only; what has no other name rounds activations by its rule.
    rounding = frozenset(forms & {"fp8", "fp8_channel"})
    return Convention("ModelOpt", MODELOPT_NAMES, frozenset(forms), ignored, rounding=rounding)


def _forms(inner: Mapping[str, Any]) -> set[str]:
    algorithm = inner.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        return {_form(inner, "quant_algo")}
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
    """The format of `quant_algo`."""
    algorithm, size = entry.get("quant_algo"), entry.get("group_size")
    form = ALGORITHMS.get(algorithm.upper()) if isinstance(algorithm, str) else None
    if form is None:
        fail(f"have a known algorithm as {where}", repr(algorithm)[:100], KNOWN)
    block = row_block(FORMATS[form])
    if block > 1 and size not in (None, block):
        rule = f"have {form.upper()} blocks of {block}"
        fail(rule, f"group_size {size!r} for {where}", KNOWN)
    return form
