"""compressed-tensors' `nvfp4-pack-quantized` files, as llm-compressor writes them.

Names: `weight_packed` (uint8), `weight_scale` (e4m3), `weight_global_scale` and
`input_global_scale` ([1], the reciprocals of ModelOpt's); FP8 layers of mixed files have `weight`
(e4m3), `weight_scale` and `input_scale` (decode multipliers). Not handled: other formats, sparsity,
zero points, transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .naming import KNOWN, Convention, fail, scale_form, strings

__all__ = ["COMPRESSED_PARTS", "compressed_convention", "is_compressed_tensors", "is_nvfp4"]

COMPRESSED_PARTS = {
    "weight_packed": "weight",
    "weight": "weight",
    "weight_scale": "scale",
    "weight_global_scale": "global_scale",
    "input_global_scale": "input_scale",
    "input_scale": "fp8_input_scale",
}
FORMATS = {
    "nvfp4-pack-quantized": ("nvfp4",),
    "float-quantized": ("fp8", "fp8_channel", "fp8_block"),
    "mxfp8-quantized": ("mxfp8",),
    "mxfp4-pack-quantized": ("mxfp4",),
}
MIXED = "mixed-precision"


def is_compressed_tensors(quantization: Mapping[str, Any]) -> bool:
    """Whether this configuration is compressed-tensors'."""
    return quantization.get("quant_method") == "compressed-tensors"


def is_nvfp4(quantization: Mapping[str, Any]) -> bool:
    """Whether files of this configuration hold NVFP4 weights: the ones read here."""
    if quantization.get("format") == "nvfp4-pack-quantized":
        return True
    groups = quantization.get("config_groups")
    return isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("format") == "nvfp4-pack-quantized"
        for group in groups.values()
    )


def compressed_convention(quantization: Mapping[str, Any]) -> Convention:
    """Read the configuration.

    Raises:
        CheckpointError: a format is unknown, or an entry is not of its kind.
    """
    overall = quantization.get("format")
    if overall != MIXED and overall not in FORMATS:
        fail("have a known format", repr(overall)[:100], f"Known are {', '.join(FORMATS)}, {MIXED}")
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        fail("be compressed", f"quantization_status {status!r}", "Save it compressed")
    for name in ("sparsity_config", "transform_config"):
        # llm-compressor writes {"format": "dense"} where nothing is sparse.
        dense = name == "sparsity_config" and quantization.get(name) == {"format": "dense"}
        if quantization.get(name) and not dense:
            fail(f"have no {name}", repr(quantization[name])[:100], KNOWN)
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        fail("have config_groups", repr(groups)[:100], "Check config.json")
    forms = set()
    for name, group in groups.items():
        if not isinstance(group, dict):
            fail("have objects in config_groups", repr(group)[:100], "Check config.json")
        form = scale_form(group, f"config_groups[{name!r}]")
        stored = group.get("format") or overall
        if form is not None and form not in FORMATS.get(str(stored), ()):
            got = f"format {stored!r} for {form} in {name!r}"
            fail("have a format that fits its weights", got, KNOWN)
        forms |= {form} if form else set()
    ignored = strings(quantization.get("ignore"), "ignore")
    parts = COMPRESSED_PARTS
    return Convention("compressed-tensors", parts, True, frozenset(forms), ignored)
