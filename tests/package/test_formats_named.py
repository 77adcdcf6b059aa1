"""One format is spelled out only where it lives: in formats/, kernels/, and what has its name."""

from __future__ import annotations

import ast
import pathlib

from fp4moe import formats
from fp4moe.formats import FORMATS, WeightFormat

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Folders whose business a single format is: codes, layouts, and what files call them.
OF_A_FORMAT = ("formats", "kernels", "checkpoint")
# The public name.
OBJECTS_IN = {"__init__.py"}
# What is meant where a layer or a call does not say it; classes that bear a name; what files call
# a format.
NAMES_IN = {"arguments.py", "layer.py", "linear.py", "placeholder.py"}
# Measurements compare formats with NVFP4, and one peer has FP8 alone.
NAMES_IN |= {"measure.py", "grouped_gemms.py"}


def identifiers(source: str) -> set[str]:
    tree = ast.walk(ast.parse(source))
    found = [
        getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "name", None) for n in tree
    ]
    return {name for name in found if isinstance(name, str)}


def texts(source: str) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
    return {n.value for n in nodes if isinstance(n.value, str)}


def files_beyond() -> list[pathlib.Path]:
    package = ROOT / "src" / "fp4moe"
    files = [f for f in package.rglob("*.py") if f.relative_to(package).parts[0] not in OF_A_FORMAT]
    return files + list((ROOT / "passes").rglob("*.py"))


def test_the_check_sees_an_import_a_use_an_attribute_and_a_name():
    for line in ("from a import NVFP4", "x = NVFP4", "x = a.NVFP4.b"):
        assert "NVFP4" in identifiers(line)
    assert "NVFP4" not in identifiers('"""NVFP4"""')
    assert "fp8" in texts('x = y == "fp8"') and "fp8" not in texts('"""About fp8."""')


def test_every_format_has_an_object_of_its_name():
    assert {name.upper() for name in FORMATS} == {
        name for name, value in vars(formats).items() if isinstance(value, WeightFormat)
    }
    assert all(format.name == name for name, format in FORMATS.items())


def test_one_format_is_spelled_out_only_where_it_lives():
    files, objects = files_beyond(), {name.upper() for name in FORMATS}
    assert len(files) > 100
    assert {f.name for f in files if objects & identifiers(f.read_text("utf-8"))} == OBJECTS_IN
    assert {f.name for f in files if set(FORMATS) & texts(f.read_text("utf-8"))} <= NAMES_IN
