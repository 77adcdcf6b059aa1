"""Whether the tensors of one module are all there, with the dtypes and shapes that the model needs.

Headers only. What is wrong is collected, so that one error names all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch

from ..errors import CheckpointError, must
from ..formats import NVFP4
from .header import Spec
from .naming import FLOATS, OTHER, Convention, Matrix, form_words, listed, name_keys

__all__ = ["ExpertsFacts", "LinearFacts", "Problems", "check_biases", "check_experts"]
__all__ += ["check_linear"]

NVFP4_NEEDED = ("weight", "scale", "global_scale")
FP8_PARTS = {"weight", "scale", "input_scale", "fp8_input_scale"}


@dataclasses.dataclass(frozen=True)
class ExpertsFacts:
    """What the model says of one experts module: E experts, gate and up [I, H], down [H, I].

    layout and transposed tell how a float stack of gate and up is stored, as in
    ExpertWeights.quantize; biases are the model's weights that have one; format is what a float
    one is quantised to.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    layout: str = "gate_up"
    transposed: bool = False
    top_k: int | None = None
    biases: tuple[str, ...] = ()
    format: str = "nvfp4"

    @property
    def biased(self) -> bool:
        """Whether there are any biases."""
        return bool(self.biases)


@dataclasses.dataclass(frozen=True)
class LinearFacts:
    """What the model says of one Linear."""

    out_features: int
    in_features: int
    bias: bool


class Problems:
    """What is wrong with the tensors of a checkpoint, by kind."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.unexpected: set[str] = set()
        self.duplicated: set[str] = set()
        self.wrong: dict[str, str] = {}
        self.unread: dict[str, set[str]] = {}
        self.hint = ""

    def check(self) -> None:
        """Raise one CheckpointError for all of them."""
        if self.unread:
            got = ", ".join(
                f"{form_words(form)} in {name_keys(paths)}"
                for form, paths in sorted(self.unread.items())
            )
            must(
                "from_pretrained: checkpoint",
                "hold NVFP4 or float experts, and NVFP4, FP8 (one scale per tensor or row) or "
                "float Linears",
                got,
                f"These are not read yet. {OTHER}.",
                error=CheckpointError,
            )
        parts = [
            listed(kind, keys)
            for kind, keys in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("duplicated", self.duplicated),
                ("of a wrong shape, dtype or form", self.wrong),
            )
            if keys
        ]
        if parts:
            details = "; ".join(f"{key!r} {why}" for key, why in sorted(self.wrong.items())[:3])
            must(
                "from_pretrained: checkpoint",
                "hold exactly the tensors of the model",
                f"{'; '.join(parts)}{(f' ({details})' if details else '')}",
                "Nothing was loaded: "
                f"{self.hint or 'use a complete checkpoint of this very model'}.",
                error=CheckpointError,
            )


def check_experts(
    path: str,
    facts: ExpertsFacts,
    form: str,
    found: dict[tuple[int | None, str], Matrix],
    convention: Convention,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    """Check one experts module, whose form is "nvfp4" or "float"."""
    stacked = {projection for expert, projection in found if expert is None}
    whole: set[tuple[int | None, str]]
    if stacked:
        separate = {"gate_proj", "up_proj"} if facts.gated else {"up_proj"}
        first = separate if stacked & separate or not facts.gated else {"gate_up_proj"}
        if form == "float" and facts.gated and "w13" in stacked:
            first = {"w13"}
        whole = {(None, projection) for projection in first | {"down_proj"}}
    else:
        names = ("gate_proj", "up_proj", "down_proj")[not facts.gated :]
        whole = {(expert, name) for expert in range(facts.num_experts) for name in names}
    for which in set(found) - whole:
        problems.unexpected |= set(found[which].keys.values())
    on_disk = {part: name for name, part in reversed(list(convention.parts.items()))}
    for expert, projection in whole:
        matrix = found.get((expert, projection), Matrix())
        # An input scale may be missing: calibration writes none for an expert without tokens.
        needed = set(NVFP4_NEEDED if form == "nvfp4" else ("weight",))
        middle = projection if expert is None else f"{expert}.{projection}"
        for part in needed - set(matrix.keys):
            problems.missing.add(f"{path}.{middle}.{on_disk[part]}")
        lead = (facts.num_experts,) if expert is None else ()
        rows, columns = facts.intermediate_size, facts.hidden_size
        if projection in ("gate_up_proj", "w13"):
            rows *= 2
        if projection == "down_proj":
            rows, columns = columns, rows
        if form == "nvfp4":
            _check_nvfp4(matrix, lead, rows, columns, projection, convention, shapes, problems)
        else:
            transposed = facts.transposed and expert is None
            size = (columns, rows) if transposed else (rows, columns)
            _check_spec(matrix, "weight", FLOATS, {(*lead, *size)}, shapes, problems)


def check_biases(
    path: str,
    facts: ExpertsFacts,
    found: Mapping[tuple[int | None, str], str],
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    """Check the biases of one experts module: stacks as the model has them, or one by one."""
    stacked = any(expert is None for expert, _ in found)
    rows = {"gate_up_proj": 2 * facts.intermediate_size, "down_proj": facts.hidden_size}
    whole: dict[tuple[int | None, str], tuple[int, ...]] = {}
    for weight in facts.biases:
        parts = ("gate_proj", "up_proj") if weight == "gate_up_proj" and not stacked else (weight,)
        for part in parts:
            size = rows.get(part, facts.intermediate_size)
            if stacked:
                whole[None, part] = (facts.num_experts, size)
            else:
                whole |= {(expert, part): (size,) for expert in range(facts.num_experts)}
    problems.unexpected |= {key for which, key in found.items() if which not in whole}
    for (expert, part), shape in whole.items():
        key = found.get((expert, part))
        if key is None:
            suffix = f"{part}_bias" if expert is None else f"{expert}.{part}.bias"
            problems.missing.add(f"{path}.{suffix}")
        else:
            matrix = Matrix({"bias": key})
            _check_spec(matrix, "bias", FLOATS, {shape}, shapes, problems)


def _check_nvfp4(
    matrix: Matrix,
    lead: tuple[int, ...],
    rows: int,
    columns: int,
    projection: str,
    convention: Convention,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    if columns % NVFP4.block_size or "nvfp4" not in convention.forms:
        for key in matrix.keys.values():
            problems.wrong[key] = (
                f"is of NVFP4, which {convention.name} does not announce for this checkpoint"
                if "nvfp4" not in convention.forms
                else f"has rows of {columns}, no multiple of {NVFP4.block_size}"
            )
        return
    for part in set(matrix.keys) - {*NVFP4_NEEDED, "input_scale"}:
        problems.unexpected.add(matrix.keys[part])
    packed = (*lead, rows, NVFP4.packed_columns(columns))
    scales = (*lead, rows, NVFP4.scale_columns(columns))
    single: set[tuple[int, ...]] = {(), (1,)}
    for count in lead:
        single |= {(count,), (count, 1), (count, 1, 1)}
        if projection == "gate_up_proj":
            single.add((count, 2))
    _check_spec(matrix, "weight", (torch.uint8,), {packed}, shapes, problems)
    _check_spec(matrix, "scale", (NVFP4.scale_dtype,), {scales}, shapes, problems)
    for part in ("global_scale", "input_scale"):
        _check_spec(matrix, part, FLOATS, single, shapes, problems)


def check_linear(
    path: str,
    facts: LinearFacts,
    form: str | None,
    matrix: Matrix,
    convention: Convention,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    """Check one quantised Linear of form "nvfp4" or "fp8"; None is one whose weight is missing."""
    rows, columns = facts.out_features, facts.in_features
    on_disk = {part: name for name, part in reversed(list(convention.parts.items()))}
    needed = ("weight", "scale") if form == "fp8" else NVFP4_NEEDED
    for part in set(needed) - set(matrix.keys):
        problems.missing.add(f"{path}.{on_disk[part]}")
    if form in ("nvfp4", None):
        _check_nvfp4(matrix, (), rows, columns, "", convention, shapes, problems)
        return
    if not {"fp8", "fp8_channel"} & convention.forms:
        for key in matrix.keys.values():
            problems.wrong[key] = (
                f"is of FP8, which {convention.name} does not announce for this checkpoint"
            )
        return
    for part in set(matrix.keys) - FP8_PARTS:
        problems.unexpected.add(matrix.keys[part])
    scales = {(), (1,), (rows,), (rows, 1)}
    _check_spec(matrix, "weight", (torch.float8_e4m3fn,), {(rows, columns)}, shapes, problems)
    _check_spec(matrix, "scale", FLOATS, scales, shapes, problems)
    for part in ("input_scale", "fp8_input_scale"):
        _check_spec(matrix, part, FLOATS, {(), (1,)}, shapes, problems)


def _check_spec(
    matrix: Matrix,
    part: str,
    dtypes: Collection[torch.dtype],
    allowed: set[tuple[int, ...]],
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    spec = matrix.spec(part, shapes)
    if spec is not None and (spec[0] not in dtypes or spec[1] not in allowed):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sizes = " or ".join(str(list(shape)) for shape in sorted(allowed))
        got = f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"
        problems.wrong[matrix.keys[part]] = f"is {got}, must be {kinds} {sizes}"
