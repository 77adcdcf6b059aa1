"""How a quantised checkpoint names its tensors: what ModelOpt's and compressed-tensors' share.

A matrix is one Linear, one projection of one expert, or one projection of all experts stacked.
Its form is read off its tensors (stored.py); the lists in the configuration only name the
algorithms.
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
from ..formats import WeightFormat
from .header import Spec, name_keys

__all__ = [
    "FLOAT",
    "FLOATS",
    "FORMS",
    "KNOWN",
    "OTHER",
    "Convention",
    "Matrix",
    "Names",
    "fail",
    "form_words",
    "listed",
    "name_keys",
    "row_block",
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
    f"Use a checkpoint of {', '.join(FORMS)}, or the float model, which "
    "from_pretrained(format=...) quantises"
)
# Tools that announce one of these write the other for some Linears.
ROWS_OR_TENSORS = frozenset({"fp8", "fp8_channel"})
Names = Mapping[str, Mapping[str, str]]


def fail(rule: str, got: object, fix: str) -> NoReturn:
    """Raise the CheckpointError of reading a checkpoint into a model."""
    must("from_pretrained: checkpoint", rule, got, f"{fix}.", error=CheckpointError)


@dataclasses.dataclass(frozen=True)
class Convention:
    """What a quantisation tool calls the tensors of one matrix, and what they mean.

    Attributes:
        name: the tool.
        names: format -> part -> name on disk. Parts are those of `WeightFormat`, and
            "input_scale", the static scale of the activations.
        forms: names of `FORMS`, as the configuration announces them.
        ignored: the configuration's patterns of modules left alone.
        reciprocal: names on disk of scales that are stored as encode multipliers.
        interleaved: a stack of gate and up has their rows in turn where the class has.
        aliases: other name on disk -> the one in names.
        rounding: formats whose activations are rounded too, as the configuration says.
    """

    name: str
    names: Names
    forms: frozenset[str]
    ignored: tuple[str, ...] = ()
    reciprocal: frozenset[str] = frozenset()
    interleaved: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounding: frozenset[str] = frozenset()

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """Name on disk -> part, in any format."""
        found = {leaf: part for row in self.names.values() for part, leaf in row.items()}
        return found | {other: found[leaf] for other, leaf in self.aliases.items()}

    def announces(self, form: str) -> bool:
        """Whether the configuration names a format, or its twin of rows or of tensors."""
        return form in self.forms or (
            form in ROWS_OR_TENSORS and bool(ROWS_OR_TENSORS & self.forms)
        )

    def rounds(self, form: str) -> bool:
        """Whether activations of a format, or of its twin of rows or of tensors, are rounded."""
        twins = ROWS_OR_TENSORS if form in ROWS_OR_TENSORS else {form}
        return bool(twins & self.rounding)

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
FLOAT = Convention("none", {"float": {"packed": "weight"}}, frozenset())


@dataclasses.dataclass
class Matrix:
    """The keys of one matrix by part, and the names on disk in which they end."""

    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    leaves: dict[str, str] = dataclasses.field(default_factory=dict)

    def spec(self, part: str, shapes: Mapping[str, Spec]) -> Spec | None:
        """Return dtype and shape of a part, None where there is none."""
        return shapes[self.keys[part]] if part in self.keys else None


def form_words(form: str) -> str:
    """How a refusal names a form, or a dtype that is none."""
    return FORMS.get(form, f"{form} weights of an unknown form")


def row_block(format: WeightFormat) -> int:
    """What the columns of a stored matrix are a multiple of: its blocks of a row are whole."""
    scales = format.scales
    return scales.columns if scales and scales.columns and scales.rows == 1 else 1


def scale_form(group: Mapping[str, Any], where: str) -> str | None:
    """Return the form that a `weights` entry of config_groups describes; None for no weights."""
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        fail(f"describe weights in {where} by an object", repr(weights)[:100], "Check config.json")
    bits, kind, size = (weights.get(k) for k in ("num_bits", "type", "group_size"))
    blocks = weights.get("block_structure")
    if blocks not in (None, BLOCK):
        fail(f"have blocks of {BLOCK} in {where}", f"block_structure {blocks!r}"[:100], KNOWN)
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
    fail(f"hold weights of a known format in {where}", got, KNOWN)


# Rows and columns that share a scale of fp8_block.
BLOCK = [128, 128]
KNOWN = f"Known are {', '.join(FORMS.values())}, and mixtures of these"


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
