"""Every error of the package is raised by fp4moe.errors, under the name that the user called."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

import fp4moe
from fp4moe.errors import Fp4MoeError, UnsupportedError, refuse

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = [
    *(f for f in (ROOT / "src").rglob("*.py") if f.name != "errors.py"),
    *(ROOT / "passes").rglob("*.py"),
]
CLASSES = {c.__name__ for c in (Fp4MoeError, *Fp4MoeError.__subclasses__())}
PUBLIC = {
    *fp4moe.__all__,
    # The command line.
    *("bench", "info", "quantize"),
    # Operators; a message of a kernel begins with that of the operator.
    *("moe", "moe_from_logits", "nvfp4_moe", "choose_experts", "float_moe"),
    *("float_moe_from_logits", "linear", "linear_weight", "moe_backward", "float_moe_backward"),
    *("grouped_mm", "grouped_mm_backward"),
    # Of fp4moe.passes, tensorrt, testing and reference.
    *("rewrite_exported", "rewrite_moe", "lowering_pass", "random_codes", "relative_error"),
    *("reference", "reference_w4a4", "reference_gradients", "reference_w4a4_gradients"),
    # Methods of transformers' and of PEFT's models.
    *("dequantize", "merge"),
    # What evaluate and calibrate return.
    *("EvaluationReport", "BlockRanges"),
    # What is set, not called.
    *("FP4MOE_MEASURED", "flashinfer-python"),
}
# Steps of a layout, of a file or of size rules; a user meets them only by calling them.
STEPS = {
    *("pad_matrix", "trim_matrix", "pack_codes", "unpack_codes", "deinterleave_128x4"),
    *("size_multiples", "token_tiles", "routing_tiers", "write_shard"),
}


def raised(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that raise: must, refuse, check_choice, or an error of the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in {"must", "refuse", "check_choice"} | CLASSES:
                yield node


def first_word(node: ast.expr) -> str | None:
    """What a message begins with, None where a caller passes it."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"[:.]", node.value)[0]
    return None


def begins(call: ast.Call) -> ast.expr:
    callers = [keyword.value for keyword in call.keywords if keyword.arg == "caller"]
    return callers[0] if callers else call.args[0]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('must("a: b", "be c", 1, "Do.")', "a"),
        ('must(f"a: {b}", "be c", 1, "Do.")', "a"),
        ('must(f"{caller}: b", "be c", 1, "Do.")', None),
        ('refuse("a", "b cannot", "c", "Do.")', "a"),
        ('check_choice("b", c, d, caller="a")', "a"),
        ('must("A.b: c", "be d", 1, "Do.")', "A"),
    ],
)
def test_the_first_word_is_found(line, word):
    (call,) = raised(ast.parse(line))
    assert first_word(begins(call)) == word


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_errors_are_raised_in_one_place_under_public_names(file):
    for call in raised(ast.parse(file.read_text("utf-8"))):
        assert call.func.id not in CLASSES, f"line {call.lineno}: call must or refuse"
        word = first_word(begins(call))
        assert word is None or word in PUBLIC | STEPS, f"line {call.lineno}: {word} is not public"


def test_callers_that_are_passed_are_public():
    """The names that functions are told to raise under, by `caller=`, and the defaults of it."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "caller":
                found.add(first_word(node.value))
            if isinstance(node, ast.FunctionDef):
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                found |= {first_word(d) for a, d in pairs if a.arg == "caller" and d is not None}
    assert len(found) > 20
    assert found - PUBLIC - STEPS == {None}


def test_a_refusal_is_one_sentence_and_an_advice():
    with pytest.raises(UnsupportedError) as error:
        refuse("f", "x cannot be done", "y is missing", "Install y.", cause=ValueError("z"))
    assert str(error.value) == "f: x cannot be done, because y is missing. Install y."
    assert isinstance(error.value.__cause__, ValueError)
