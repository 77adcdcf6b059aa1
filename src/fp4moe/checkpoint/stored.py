"""Which format the tensors of one matrix are of, and what dtypes and shapes a file may give them.

Codes and scales of 8 bits lie as `WeightFormat.shapes` says. Scales that are numbers may be of any
float dtype, with or without axes of one element; one may stand for all experts of a stack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..formats import DEFAULT_FORMAT, FORMATS, WeightFormat
from ..padding import round_up
from .header import Spec
from .naming import FLOATS, Matrix, row_block

__all__ = ["Spelling", "form_of", "forms_of", "needed_parts", "preferred", "spellings"]
__all__ += ["stored_bytes"]

E8M0 = torch.float8_e8m0fnu
# How a file may store the numbers of a part of this dtype; powers of two are numbers, too.
SCALE_DTYPES = {torch.float32: (*FLOATS, E8M0), torch.uint8: (torch.uint8, E8M0)}


class Spelling(NamedTuple):
    """The dtypes and shapes that a part may be stored with."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]

    def accepts(self, spec: Spec) -> bool:
        """Whether a tensor of this dtype and shape is one."""
        return spec[0] in self.dtypes and spec[1] in self.shapes

    def __str__(self) -> str:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{kinds} {' or '.join(str(list(shape)) for shape in self.shapes)}"


def needed_parts(format: WeightFormat) -> list[str]:
    """The parts that a matrix of this format cannot be without."""
    return [part for part, (_, shape) in format.shapes(1, 1, 1).items() if shape != (0,)]


@functools.lru_cache(maxsize=1024)
def spellings(
    format: WeightFormat, lead: tuple[int, ...], rows: int, columns: int, halves: int = 1
) -> dict[str, Spelling]:
    """How a file may store each part of [*lead, rows, columns], and a static input scale.

    Kept, since thousands of experts are alike.

    Args:
        lead: (experts,) of a stack, else ().
        halves: matrices that the rows of a stack consist of, 2 for gate and up.
    """
    found: dict[str, Spelling] = {}
    shapes = format.shapes(lead[0] if lead else 1, rows, columns, halves)
    powers = shapes["block_scale"][0] == torch.uint8
    for part in needed_parts(format):
        dtype, shape = shapes[part]
        if dtype == torch.float32:
            sizes = _grids(lead, *shape[1:]) if part == "block_scale" else _numbers(lead, halves)
            kinds = SCALE_DTYPES[dtype] if part == "block_scale" else FLOATS
            found[part] = Spelling(kinds, sizes)
            continue
        sizes = (shape if lead else shape[1:],)
        if part == "block_scale":
            kinds = SCALE_DTYPES.get(dtype, (dtype,))
        elif dtype == torch.uint8 and powers:
            # DeepSeek's bytes have a sign, gpt-oss' blocks an axis of their own.
            kinds = (torch.uint8, torch.int8)
            if lead:
                sizes = (*sizes, (*lead, rows, columns // 32, 16))
        else:
            kinds = (dtype,)
        found[part] = Spelling(kinds, sizes)
    found["input_scale"] = Spelling(FLOATS, _numbers(lead, halves))
    return found


def _numbers(lead: tuple[int, ...], halves: int) -> tuple[tuple[int, ...], ...]:
    """One number a matrix, or for all; gate and up of a stack may have one each."""
    each = [(*lead, 1, 1)[:axes] for axes in range(len(lead), 4)] if lead else []
    return tuple(dict.fromkeys(((), (1,), *each, *([(*lead, halves)] if halves > 1 else ()))))


def _grids(lead: tuple[int, ...], rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of blocks, with or without axes of one element; one of a matrix may be of all."""
    grids = [(*lead, rows, columns), (*lead, rows, 1, columns, 1)]
    if columns == 1:
        grids.append((*lead, rows))
    if rows * columns == 1 or (lead and (rows, columns) == (2, 1)):
        grids += _numbers(lead, 1)
    return tuple(dict.fromkeys(grids))


def forms_of(matrix: Matrix, shapes: Mapping[str, Spec]) -> list[str]:
    """Return the names of all formats that these codes and block scales can be of."""
    weight, scale = (matrix.spec(part, shapes) for part in ("packed", "block_scale"))
    return [] if weight is None or scale is None else list(_forms_of(weight, scale))


@functools.lru_cache(maxsize=1024)
def _forms_of(weight: Spec, scale: Spec) -> tuple[str, ...]:
    if len(weight[1]) not in (2, 3, 4):
        return ()
    *lead, rows, packed_columns = weight[1]
    if len(lead) == 2:
        *lead, rows, packed_columns = lead[0], lead[1], rows * packed_columns
    found = []
    for name, format in FORMATS.items():
        columns = format.elements(packed_columns)
        for halves in (1, 2) if lead and rows % 2 == 0 else (1,):
            known = spellings(format, tuple(lead), rows, columns, halves)
            whole = columns % row_block(format) == 0
            if whole and known["packed"].accepts(weight) and known["block_scale"].accepts(scale):
                found.append(name)
                break
    return tuple(found)


def preferred(forms: Iterable[str], announced: Collection[str]) -> str:
    """Return the first of these formats that is announced, else the first; DEFAULT_FORMAT of none.

    One block, one row and one tensor may look alike.
    """
    known = list(forms)
    return next((form for form in known if form in announced), (known or [DEFAULT_FORMAT])[0])


def form_of(
    matrix: Matrix, shapes: Mapping[str, Spec], announced: Collection[str] = ()
) -> str | None:
    """Return a name of `FORMS`, "float" or another dtype; None where the weight is missing."""
    if forms := forms_of(matrix, shapes):
        return preferred(forms, announced)
    weight, scale = (matrix.spec(part, shapes) for part in ("packed", "block_scale"))
    if weight is None:
        return None
    powers = scale is not None and scale[0] in SCALE_DTYPES[torch.uint8]
    if weight[0] == torch.uint8 or (weight[0] == torch.int8 and powers):
        likely = ["mxfp4", "nvfp4"] if powers else ["nvfp4", "mxfp4"]
    elif weight[0] == torch.float8_e4m3fn:
        likely = ["mxfp8"] if powers else ["fp8", "fp8_channel", "fp8_block", "mxfp8"]
    else:
        return "float" if weight[0] in FLOATS else str(weight[0]).removeprefix("torch.")
    return preferred(likely, announced)


def stored_bytes(facts: Any, form: str = DEFAULT_FORMAT, biased: bool = False) -> int:
    """Return what the weights of a layer take in a format, without a kernel's padding.

    Args:
        facts: has num_experts, gated, hidden_size and intermediate_size.
        biased: count biases, too.
    """
    format = FORMATS[form]
    inner, outer = (
        round_up(n, format.multiple) for n in (facts.intermediate_size, facts.hidden_size)
    )
    halves = 1 + facts.gated
    shapes = [
        *format.shapes(facts.num_experts, halves * inner, outer, halves).values(),
        *format.shapes(facts.num_experts, outer, inner).values(),
    ]
    if biased:
        shapes.append((torch.float32, (facts.num_experts, halves * inner + outer)))
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes)
