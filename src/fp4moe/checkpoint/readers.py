"""Whose quantisation a configuration describes: the list of tools that are read here.

A tool is two functions in a file beside this one: whether it wrote a configuration, and what it
calls its tensors. Adding one is a row of READERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .compressed_tensors import compressed_convention, is_compressed_tensors
from .huggingface import huggingface_convention, is_huggingface
from .modelopt import is_modelopt, modelopt_convention
from .naming import FLOAT, FORMS, OTHER, Convention, fail

__all__ = ["READERS", "convention_of"]

Quantization = Mapping[str, Any]
# The first that says yes reads.
READERS: list[tuple[Callable[[Quantization], bool], Callable[[Quantization], Convention]]] = [
    (is_modelopt, modelopt_convention),
    (is_compressed_tensors, compressed_convention),
    (is_huggingface, huggingface_convention),
]
# What other methods of transformers store, for the refusal.
METHODS = {"fbgemm_fp8": "fp8_channel"}


def convention_of(quantization: Mapping[str, Any] | None) -> Convention:
    """Read a quantization configuration; None is a float checkpoint.

    Raises:
        CheckpointError: the tool, or what it announces, is unknown.
    """
    if quantization is None:
        return FLOAT
    for is_of, convention in READERS:
        if is_of(quantization):
            return convention(quantization)
    method = quantization.get("quant_method")
    form = METHODS.get(method) if isinstance(method, str) else None
    got = f"quant_method {method!r}"
    if form is not None:
        rule = "hold a quantisation that is read here"
        fail(rule, f"{got}, which is {FORMS[form]} and not read yet", OTHER)
    known = (
        "Known are ModelOpt's and compressed-tensors' files, quant_method fp8, mxfp8 and mxfp4, "
        "and float checkpoints"
    )
    fail("be quantised by a known tool", got, known)
