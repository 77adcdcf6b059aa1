"""A change of the machine code is noticed: each is planted in the text of a disassembly."""

from __future__ import annotations

import re

import numpy as np
import pytest

from . import formulas
from .cubins import disassemble, kernel_names
from .epilogue import FAMILIES, Family, examine
from .values import special

BY_NAME = {(family.types.partition("_")[0], family.activation): family for family in FAMILIES}
GELU = BY_NAME["E2m1", "geGlu"]
# sqrt(2 / pi), 0.044715 and tanh become 1 / sqrt(2), 0 and erf: the other form of GELU.
ERF = {
    "0.79788458347320556641": "0.70710676908493041992",
    "0.044714998453855514526": "0",
    "MUFU.TANH": "MUFU.ERF",
}
LOG2_E, QUICK = "1.4426950216293334961", "2.4554669857025146484"  # the second times 1.702
# Output, activation, and what is replaced by what (regular expressions).
CHANGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "the form with erf": ("E2m1", "geGlu", ERF),
    "a bit of 0.044715": ("E2m1", "geGlu", {"0.044714998453855514526": "0.0447150021791458129"}),
    "a limit below the gate": ("E2m1", "geGlu", {r"-3.40282346638528859812e\+38": "-1.5"}),
    "nibbles swapped": ("E2m1", "geGlu", {r"(E2M1\S+ R\d+), ([^,]+), ([^,]+),": r"\1, \3, \2,"}),
    "1.702 in the exponent": ("E2m1", "swiGlu", {LOG2_E: QUICK}),
    "a bit of 1/6": ("E2m1", "swiGlu", {"0.16666667163372039795": "0.16666668653488159"}),
    "another neighbour": ("E2m1", "relu2", {"0x8, 0x1f": "0x10, 0x1f"}),
    "no guard of 0": ("E2m1", "relu2", {"FSETP.NEU.FTZ.AND": "FSETP.GEU.FTZ.AND"}),
    "FP8 with 1.702": ("E4m3", "swiGlu", {LOG2_E: QUICK}),
    "FP8 without relu": ("E4m3", "relu2", {"FMNMX.FTZ": "NOP"}),
    "scales not truncated": ("MxE4m3", "swiGlu", {"0x7f800000": "0x7fc00000"}),
    "scales twice as large": ("MxE4m3", "relu2", {"0.00390625": "0.0078125"}),
}


def kernel(family: Family) -> str:
    """Return the disassembly of the family's last kernel, one for few tokens."""
    return disassemble(kernel_names(family.types, family.activation)[-1])


def planted(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text, count = re.subn(old, new, text)
        assert count
    return text


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_change_is_noticed(change: str) -> None:
    output, activation, changes = CHANGES[change]
    family = BY_NAME[output, activation]
    text = kernel(family)
    assert examine(text, family).wrong == []
    assert examine(planted(text, changes), family).wrong


def test_the_form_with_erf_would_be_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted kernel computes GELU with erf and nothing else has changed."""

    def phi_gelu(gate: np.ndarray, factor: np.ndarray) -> np.ndarray:
        inner = gate * factor * np.float32(0.5**0.5)
        return (special("ERF", inner) + np.float32(1)) * np.float32(0.5)

    monkeypatch.setitem(formulas.GATED, "geGlu", phi_gelu)
    text = kernel(GELU)
    assert examine(planted(text, ERF), GELU).wrong == []
    assert set(examine(text, GELU).wrong) == {"plain", "alpha and beta", "limit", "shared", "nan"}


def test_a_missing_store_is_noticed() -> None:
    """One conversion less, or one that is done twice, is another set of outputs."""
    text = kernel(GELU)
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if "E2M1" in line)
    once, twice = lines[:place] + lines[place + 1 :], lines[: place + 1] + lines[place:]
    for changed in (once, twice):
        assert examine("\n".join(changed), GELU).wrong
