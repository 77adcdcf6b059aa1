"""Tests are collected where optional packages are absent: none is imported at a module's top."""

from __future__ import annotations

import ast
import pathlib

TESTS = pathlib.Path(__file__).parents[1]
OPTIONAL = {"accelerate", "compressed_tensors", "expecttest", "flashinfer", "humming"}
OPTIONAL |= {"hypothesis", "matplotlib", "modelopt", "peft", "torch_tensorrt", "triton"}


def at_the_top(file):
    """Packages that importing a test module imports without a condition."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


def test_no_optional_package_is_imported_at_the_top():
    # `make peers` brings what it needs.
    files = sorted(file for file in TESTS.rglob("*.py") if "peers" not in file.parts)
    found = {file.name: OPTIONAL & set(at_the_top(file)) for file in files}
    assert len(found) > 50 and {name: names for name, names in found.items() if names} == {}
