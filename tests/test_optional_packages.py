"""Tests are collected where optional packages are absent: none is imported at a module's top."""

from __future__ import annotations

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
OPTIONAL = {"accelerate", "compressed_tensors", "expecttest", "flashinfer", "humming"}
OPTIONAL |= {"hypothesis", "matplotlib", "modelopt", "peft", "torch_tensorrt", "triton"}


def at_the_top(file):
    """Packages that importing a test module imports without a condition."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.name)
def test_no_optional_package_is_imported_at_the_top(file):
    assert OPTIONAL.isdisjoint(at_the_top(file))
