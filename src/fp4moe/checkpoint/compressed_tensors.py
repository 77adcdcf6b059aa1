"""compressed-tensors' files, as llm-compressor writes them.

Names: `weight_packed` (codes of 4 bits) or `weight` (e4m3), `weight_scale`; NVFP4 has
`weight_global_scale` and `input_global_scale` ([1], the reciprocals of ModelOpt's), FP8
`input_scale` (a decode multiplier). Not handled: integers, sparsity, zero points, transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .naming import KNOWN, Convention, fail, scale_form, strings

__all__ = ["COMPRESSED_NAMES", "compressed_convention", "is_compressed_tensors", "is_read"]

PACKED = {"packed": "weight_packed", "block_scale": "weight_scale"}
PLAIN = {"packed": "weight", "block_scale": "weight_scale"}
STATIC = {"input_scale": "input_scale"}
GLOBAL = {"global_scale": "weight_global_scale", "input_scale": "input_global_scale"}
# Format -> what files of it call themselves, and its parts.
ROWS = {
    "nvfp4": ("nvfp4-pack-quantized", PACKED | GLOBAL),
    "fp8": ("float-quantized", PLAIN | STATIC),
    "fp8_channel": ("float-quantized", PLAIN | STATIC),
    "fp8_block": ("float-quantized", PLAIN),
    "mxfp8": ("mxfp8-quantized", PLAIN),
    "mxfp4": ("mxfp4-pack-quantized", PACKED),
}
COMPRESSED_NAMES = {form: names for form, (_, names) in ROWS.items()}
# Not a set: what a file says may be of any type.
KINDS = tuple(dict.fromkeys(kind for kind, _ in ROWS.values()))
MIXED = "mixed-precision"


def is_compressed_tensors(quantization: Mapping[str, Any]) -> bool:
    """Whether this configuration is compressed-tensors'."""
    return quantization.get("quant_method") == "compressed-tensors"


def is_read(quantization: Mapping[str, Any]) -> bool:
    """Whether files of this configuration hold weights of a format that is read here."""
    groups = quantization.get("config_groups")
    entries = [quantization, *(groups.values() if isinstance(groups, dict) else ())]
    return any(isinstance(entry, dict) and entry.get("format") in KINDS for entry in entries)


def compressed_convention(quantization: Mapping[str, Any]) -> Convention:
    """Read the configuration.

    Raises:
        CheckpointError: a format is unknown, or an entry is not of its kind.
    """
    overall = quantization.get("format")
    if overall != MIXED and overall not in KINDS:
        known = ", ".join(KINDS)
        fail("have a known format", repr(overall)[:100], f"Known are {known}, {MIXED}")
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
    forms, rounding = set(), set()
    for name, group in groups.items():
        if not isinstance(group, dict):
            fail("have objects in config_groups", repr(group)[:100], "Check config.json")
        form = scale_form(group, f"config_groups[{name!r}]")
        stored = group.get("format") or overall
        if form is not None and stored != ROWS[form][0]:
            got = f"format {stored!r} for {form} in {name!r}"
            fail("have a format that fits its weights", got, KNOWN)
        forms |= {form} if form else set()
        rounding |= {form} if form and group.get("input_activations") else set()
    ignored = strings(quantization.get("ignore"), "ignore")
    reciprocal = frozenset(GLOBAL.values())
    return Convention(
        "compressed-tensors",
        COMPRESSED_NAMES,
        frozenset(forms),
        ignored,
        reciprocal,
        rounding=frozenset(rounding),
    )
