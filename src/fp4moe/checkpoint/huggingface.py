"""What transformers' own methods store: `quant_method` "fp8", "mxfp8" and "mxfp4".

fp8 and mxfp8: `weight` (e4m3) and `weight_scale_inv`, which multiplies in spite of its name, for a
tensor, for blocks of 128 x 128, or for 32 columns (bytes); experts one by one or stacked;
`activation_scale` where it is static. `expert_dtype` "fp4" has experts of e2m1 with powers of two.
mxfp4, gpt-oss': stacks `gate_up_proj_blocks` [E, 2 * I, H / 32, 16] and `_scales`, the rows of gate
and up in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .naming import BLOCK, KNOWN, Convention, fail, strings

__all__ = ["HUGGINGFACE_METHODS", "huggingface_convention", "is_huggingface"]

HUGGINGFACE_METHODS = ("fp8", "mxfp8", "mxfp4")

SCALED = {"packed": "weight", "block_scale": "weight_scale_inv"}
# Format -> part -> its name.
FINE_GRAINED = {
    "fp8": SCALED | {"input_scale": "activation_scale"},
    "fp8_block": SCALED,
    "mxfp8": SCALED,
    "mxfp4": SCALED,
}
GPT_OSS = {"mxfp4": {"packed": "blocks", "block_scale": "scales"}}
# What vendors call a scale, as transformers renames it.
ALIASES = {"scale": "weight_scale_inv", "qscale_weight": "weight_scale_inv"}
SKIPPED = ("modules_to_not_convert", "ignored_layers")


def is_huggingface(quantization: Mapping[str, Any]) -> bool:
    """Whether this configuration is of a method that transformers has of its own."""
    return quantization.get("quant_method") in HUGGINGFACE_METHODS


def huggingface_convention(quantization: Mapping[str, Any]) -> Convention:
    """Read the configuration.

    Raises:
        CheckpointError: an entry is not known, or not of its kind.
    """
    method = quantization["quant_method"]
    ignored = tuple(name for key in SKIPPED for name in strings(quantization.get(key), key))
    if method == "mxfp4":
        return Convention("transformers", GPT_OSS, frozenset(GPT_OSS), ignored, interleaved=True)
    blocks = quantization.get("weight_block_size", BLOCK if method == "fp8" else [1, 32])
    forms = {"": "fp8", "[128, 128]": "fp8_block", "[1, 32]": "mxfp8"}
    form = forms.get("" if blocks is None else str(blocks))
    if form is None:
        rule = "have no weight_block_size, [128, 128] or [1, 32]"
        fail(rule, repr(blocks)[:100], KNOWN)
    choices = {
        "activation_scheme": ("dynamic", "static") if form == "fp8" else ("dynamic",),
        "fmt": ("e4m3",),
        "scale_fmt": ("float", "ue8m0"),
        "expert_dtype": ("fp8", "fp4"),
    }
    for name, known in choices.items():
        if (found := quantization.get(name) or known[0]) not in known:
            fail(f"have {name} {' or '.join(known)} with {form}", repr(found)[:100], KNOWN)
    if converted := strings(quantization.get("modules_to_convert"), "modules_to_convert"):
        fail("have no modules_to_convert, since embeddings stay float here", converted, KNOWN)
    found = {form} | ({"mxfp4"} if quantization.get("expert_dtype") == "fp4" else set())
    return Convention(
        "transformers",
        FINE_GRAINED,
        frozenset(found),
        ignored,
        aliases=ALIASES,
        rounding=frozenset({form}),
    )
