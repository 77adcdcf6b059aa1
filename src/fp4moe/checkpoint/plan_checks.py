"""Whether the tensors of one module are all there, with the dtypes and shapes that the model needs.

Headers only. What is wrong is collected, so that one error names all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..errors import CheckpointError, must, refuse
from ..formats import FORMATS
from .header import Spec
from .naming import FLOATS, OTHER, Convention, Matrix, form_words, listed, name_keys, row_block
from .stored import Spelling, needed_parts, spellings

__all__ = ["ExpertsFacts", "LinearFacts", "Problems", "check_biases", "check_experts"]
__all__ += ["check_linear"]


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
        # Experts module -> why it cannot be packed.
        self.refused: dict[str, str] = {}
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
                "hold experts and Linears that are float or of a known format",
                got,
                f"{OTHER}.",
                error=CheckpointError,
            )
        for path, reason in sorted(self.refused.items())[:1]:
            what = f"the experts {path} cannot be packed"
            refuse("from_pretrained", what, reason, f"{OTHER}.", error=CheckpointError)
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
    """Check one experts module, whose form is a format or "float"."""
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
    for expert, projection in whole:
        matrix = found.get((expert, projection), Matrix())
        middle = projection if expert is None else f"{expert}.{projection}"
        lead = (facts.num_experts,) if expert is None else ()
        rows, columns = facts.intermediate_size, facts.hidden_size
        halves = 2 if projection in ("gate_up_proj", "w13") else 1
        if projection == "down_proj":
            rows, columns = columns, rows
        if form != "float":
            scales = FORMATS[form].scales
            block = (scales.rows if scales else None) or 1
            if halves == 2 and rows % block and 2 * rows > block:
                problems.refused[path] = (
                    f"gate and up of {rows} rows lie in one stack, where a block of {block} rows "
                    "covers some of both"
                )
            stored = (lead, halves * rows, columns, halves)
            name = f"{path}.{middle}"
            _check_packed(form, matrix, name, stored, convention, shapes, problems)
            continue
        if "packed" not in matrix.keys:
            problems.missing.add(f"{path}.{middle}.weight")
        size = (columns, halves * rows) if facts.transposed and lead else (halves * rows, columns)
        _check_spec(matrix, "packed", Spelling(FLOATS, ((*lead, *size),)), shapes, problems)


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
            _check_spec(matrix, "bias", Spelling(FLOATS, (shape,)), shapes, problems)


def check_linear(
    path: str,
    facts: LinearFacts,
    form: str,
    matrix: Matrix,
    convention: Convention,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    """Check one quantised Linear of a format."""
    size = (), facts.out_features, facts.in_features, 1
    _check_packed(form, matrix, path, size, convention, shapes, problems)


def _check_packed(
    form: str,
    matrix: Matrix,
    name: str,
    size: tuple[tuple[int, ...], int, int, int],
    convention: Convention,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    """Check one matrix of a format; size: as the arguments of `spellings`."""
    format, names = FORMATS[form], convention.names.get(form, {})
    # An input scale may be missing: calibration writes none for an expert without tokens.
    for part in needed_parts(format):
        if part not in matrix.keys:
            problems.missing.add(f"{name}.{names.get(part, part)}")
    block, columns = row_block(format), size[2]
    if columns % block or not convention.announces(form) or not names:
        for key in matrix.keys.values():
            problems.wrong[key] = (
                f"has rows of {columns}, no multiple of {block}"
                if convention.announces(form) and names
                else f"is of {form_words(form).partition(' (')[0]}, which {convention.name} does "
                "not announce for this checkpoint"
            )
        return
    known = spellings(format, *size)
    for part, key in matrix.keys.items():
        if part not in names or matrix.leaves[part] not in (names[part], "weight"):
            problems.unexpected.add(key)
        else:
            _check_spec(matrix, part, known[part], shapes, problems)


def _check_spec(
    matrix: Matrix,
    part: str,
    known: Spelling,
    shapes: Mapping[str, Spec],
    problems: Problems,
) -> None:
    spec = matrix.spec(part, shapes)
    if spec is not None and not known.accepts(spec):
        got = f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"
        problems.wrong[matrix.keys[part]] = f"is {got}, must be {known}"
