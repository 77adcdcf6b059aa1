"""How a quantised checkpoint names its tensors: what ModelOpt's and compressed-tensors' share.

A matrix is one Linear, one projection of one expert, or one projection of all experts stacked.
Its form is read off its tensors; the lists in the configuration only name the algorithms.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError, must
from .header import Spec, name_keys

__all__ = [
    "FLOAT",
    "FLOATS",
    "FORMS",
    "KNOWN",
    "OTHER",
    "Convention",
    "Matrix",
    "fail",
    "form_of",
    "form_words",
    "listed",
    "name_keys",
    "scale_form",
    "strings",
]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What a matrix can be stored as: the form, and how a refusal names it.
FORMS = {
    "nvfp4": "NVFP4 (e2m1, an e4m3 scale per 16 values)",
    "fp8": "FP8 (e4m3, one scale per tensor)",
    "fp8_channel": "FP8 (e4m3, one scale per row)",
    "fp8_block": "FP8 (e4m3, one scale per block)",
    "mxfp8": "MXFP8 (e4m3, a power of two per 32 values)",
    "mxfp4": "MXFP4 (e2m1, a power of two per 32 values)",
}
OTHER = (
    "Use an NVFP4 checkpoint, or the float model, whose experts from_pretrained quantises to NVFP4"
)
# Scales of MX blocks: bytes that are exponents.
POWERS = (torch.uint8, torch.float8_e8m0fnu)


def fail(rule: str, got: object, fix: str) -> NoReturn:
    """Raise the CheckpointError of reading a checkpoint into a model."""
    must("from_pretrained: checkpoint", rule, got, f"{fix}.", error=CheckpointError)


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a quantisation tool calls the tensors of one matrix, and what they mean.

    Attributes:
        name: the tool.
        parts: name on disk -> part: "weight", "scale" (a block scale beside 4-bit codes, an FP8
            scale beside e4m3), "global_scale", "input_scale", "fp8_input_scale".
        reciprocal: global and NVFP4 input scales are stored as encode multipliers.
        forms: names of `FORMS`, as the configuration announces them.
        ignored: the configuration's patterns of modules left alone.
    """

    name: str
    parts: Mapping[str, str]
    reciprocal: bool
    forms: frozenset[str]
    ignored: tuple[str, ...] = ()

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        found = [
            f"(?:{p[3:]})" if p.startswith("re:") else f"(?:{fnmatch.translate(p)})"
            for p in self.ignored
        ]
        try:
            return re.compile("|".join(found) or "(?!)")
        except re.error as error:
            fail("have patterns in ignore that can be read", str(error), "Check the configuration")

    def ignores(self, module: str) -> bool:
        """Whether a pattern (`*` wildcards, or `re:` and an expression) names the module."""
        return self._pattern.match(module) is not None


# A checkpoint without quantisation: only weights.
FLOAT = Convention("none", {"weight": "weight"}, False, frozenset())


@dataclasses.dataclass
class Matrix:
    """The keys of one matrix by part."""

    keys: dict[str, str] = dataclasses.field(default_factory=dict)

    def spec(self, part: str, shapes: Mapping[str, Spec]) -> Spec | None:
        """Return dtype and shape of a part, None where there is none."""
        return shapes[self.keys[part]] if part in self.keys else None


def form_of(matrix: Matrix, shapes: Mapping[str, Spec]) -> str | None:
    """Return a name of `FORMS`, "float" or another dtype; None where the weight is missing."""
    weight, scale = (matrix.spec(part, shapes) for part in ("weight", "scale"))
    if weight is None:
        return None
    if weight[0] == torch.uint8:
        return "mxfp4" if scale is not None and scale[0] in POWERS else "nvfp4"
    if weight[0] != torch.float8_e4m3fn:
        return "float" if weight[0] in FLOATS else str(weight[0]).removeprefix("torch.")
    *rows, columns = weight[1]
    stack = tuple(rows[:-1])
    shape = () if scale is None else scale[1]
    if shape in {(), (1,), stack, (*stack, 1), (*stack, 1, 1)} - {(1, 1)}:
        return "fp8"
    if scale is not None and scale[0] in POWERS and shape == (*rows, columns // 32):
        return "mxfp8"
    return "fp8_channel" if shape in {tuple(rows), (*rows, 1)} else "fp8_block"


def form_words(form: str) -> str:
    """How a refusal names a form, or a dtype that is none."""
    return FORMS.get(form, f"{form} weights of an unknown form")


def scale_form(group: Mapping[str, Any], where: str) -> str | None:
    """Return the form that a `weights` entry of config_groups describes; None for no weights."""
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        fail(f"describe weights in {where} by an object", repr(weights)[:100], "Check config.json")
    bits, kind, size = (weights.get(k) for k in ("num_bits", "type", "group_size"))
    strategies = {"channel": "fp8_channel", "block": "fp8_block"}
    forms = {
        (4, 16): "nvfp4",
        (4, None): "nvfp4",
        (4, 32): "mxfp4",
        (8, 32): "mxfp8",
        (8, None): strategies.get(str(weights.get("strategy")), "fp8"),
    }
    plain = kind == "float" and weights.get("symmetric", True) and isinstance(size, int | None)
    if plain and isinstance(bits, int) and (bits, size) in forms:
        return forms[bits, size]
    got = f"{bits}-bit {kind} with group_size {size}"
    fail(f"hold NVFP4 (group size 16) or FP8 weights in {where}", got, KNOWN)


KNOWN = "Known are NVFP4, W4A16_NVFP4, FP8 and mixtures of these (MIXED_PRECISION)"


def strings(value: object, name: str) -> tuple[str, ...]:
    """Return a list of strings from the configuration, None as empty."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        fail(f"have a list of names as {name}", repr(value)[:100], "Check config.json")
    return tuple(value)


def listed(kind: str, keys: Collection[str]) -> str:
    """One part of an error: how many keys are of a kind, and the first ten."""
    return f"{kind} {name_keys(keys)}"
