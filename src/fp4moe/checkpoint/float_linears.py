"""Which dense Linears of a float checkpoint are quantised beside its experts, by their names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from ..errors import UnsupportedError, must, refuse
from ..formats import FORMATS
from .float_experts import FLOATS, Experts, FloatMatrix
from .header import Spec

__all__ = ["KEPT", "NONE", "find_linears", "scale_group"]

CALLER = "quantize_checkpoint"
NONE = "none"
# A pattern passes by these and all inside, as ModelOpt does by default; a whole name reaches them.
KEPT = {"lm_head", "proj_out", "router", "gate", "shared_expert_gate"}
# Two axes as a Linear's weight has, but rows are looked up.
EMBEDDING = re.compile(r"(.*\.)?(\w*embed\w*|wte|wpe)")
# Programs that multiply these as one matrix want one global scale for them, as ModelOpt writes it.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def find_linears(
    shapes: Mapping[str, Spec], found: Sequence[Experts], linears: str | Sequence[str], form: str
) -> list[Experts]:
    """Return the Linears that names or patterns stand for, each group as experts of one.

    Args:
        shapes: key -> (dtype, shape) of the checkpoint that is read.
        found: its experts, which are none of these.
        linears: "none", or names and patterns of fnmatch of modules as the files name them.
        form: the format.

    Raises:
        UnsupportedError: a name or pattern stands for no Linear, or one cannot be quantised.
    """
    patterns = [linears] if isinstance(linears, str) else list(linears)
    if patterns == [NONE]:
        return []
    experts = tuple(f"{layer.module}." for layer in found)
    dense = {
        key.removesuffix(".weight"): shape
        for key, (dtype, shape) in shapes.items()
        if key.endswith(".weight") and len(shape) == 2 and dtype in FLOATS
        if not key.startswith(experts) and not EMBEDDING.fullmatch(key.removesuffix(".weight"))
    }
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in dense if fnmatch.fnmatchcase(name, pattern)}
        matches = {n for n in matches if n == pattern or KEPT.isdisjoint(n.split("."))}
        if not matches:
            refuse(
                CALLER,
                f"linears = {pattern!r} cannot be quantised",
                "no 2-D weight beside the experts has such a name in the files of src",
                "Pass names or patterns of its modules, as '*.self_attn.*'.",
            )
        chosen |= matches
    multiple = FORMATS[form].multiple
    for name in sorted(chosen):
        if dense[name][1] % multiple:
            must(
                f"{CALLER}: linears",
                f"have columns that are a multiple of {multiple} with format {form}",
                f"{dense[name][1]} in {name}",
                "Leave it out of linears.",
                error=UnsupportedError,
            )
    groups: dict[str, list[str]] = {}
    for name in (name for name in dense if name in chosen):
        groups.setdefault(scale_group(name, form), []).append(name)
    return [Experts(names[0], 1, [tuple(_part(n, dense[n]) for n in names)], [])
            for names in groups.values()]  # fmt: skip


def scale_group(name: str, form: str) -> str:
    """Return what is equal for Linears that share a global scale."""
    parent, _, leaf = name.rpartition(".")
    shared = FUSED if FORMATS[form].globally_scaled else ()
    return f"{parent}.{next((names[0] for names in shared if leaf in names), leaf)}"


def _part(name: str, shape: tuple[int, ...]) -> FloatMatrix:
    return FloatMatrix(name, f"{name}.weight", (), (shape[0], shape[1]), 0)
