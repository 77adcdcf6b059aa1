"""One format is spelled out only where it lives: in formats/, kernels/, and what has its name."""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Folders whose business a single format is: codes, layouts, and what files call them.
OF_A_FORMAT = ("formats", "kernels", "checkpoint")
# The public name, and random codes, which are those of one format.
NAMED = {"__init__.py", "testing.py"}


def identifiers(source: str) -> set[str]:
    tree = ast.walk(ast.parse(source))
    found = [
        getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None) for n in tree
    ]
    return {name for name in found if isinstance(name, str)}


def test_the_check_sees_an_import_a_use_and_an_attribute():
    for line in ("from a import NVFP4", "x = NVFP4", "x = a.NVFP4.b"):
        assert "NVFP4" in identifiers(line)
    assert "NVFP4" not in identifiers('"""NVFP4"""')


def test_one_format_is_spelled_out_only_where_it_lives():
    package = ROOT / "src" / "fp4moe"
    files = [f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in OF_A_FORMAT]
    files += (ROOT / "passes").rglob("*.py")
    assert len(files) > 100
    named = {f.name for f in files if "NVFP4" in identifiers(f.read_text("utf-8"))}
    assert named == NAMED
