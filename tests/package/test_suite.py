"""The tests themselves: what `make quick` runs, and that no test file is a library of another."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def expression(text: str) -> list[str]:
    return re.findall(r'-m "([^"]*)"', text)


def test_the_makefile_the_guide_and_the_markers_agree(pytestconfig):
    recipe = (ROOT / "Makefile").read_text().split("\nquick:")[1].split("\n\n")[0]
    (run,) = expression(recipe)
    assert expression((ROOT / "CONTRIBUTING.md").read_text()) == [run]
    left_out = re.findall(r"not (\w+)", run)
    assert " and ".join(f"not {name}" for name in left_out) == run
    assert set(left_out) <= {line.split(":")[0] for line in pytestconfig.getini("markers")}


def is_left_out(node: ast.AST) -> bool:
    marks = (f"pytest.mark.{name}" for name in ("slow", "gpu"))
    return any(re.search(rf"\b{mark}\b", ast.unparse(node)) for mark in marks)


def quick_tests(file: pathlib.Path) -> list[str]:
    """The test functions of a file that `make quick` runs, by their marks."""
    found = []

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                if any(map(is_left_out, node.decorator_list)):
                    continue
                if isinstance(node, ast.ClassDef):
                    visit(node.body)
                elif node.name.startswith("test_"):
                    found.append(node.name)

    body = ast.parse(file.read_text("utf-8")).body
    marks = [
        n for n in body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n.targets)
    ]
    if not any(map(is_left_out, marks)):
        visit(body)
    return found


def folders() -> list[str]:
    """The folders of the sources, as the tests have them."""
    roots = [(ROOT / "src" / "fp4moe", ""), (ROOT / "passes", "passes")]
    found = [
        str(pathlib.PurePath(name, file.parent.relative_to(folder)))
        for folder, name in roots
        for file in folder.rglob("__init__.py")
    ]
    return sorted({name for name in found if (TESTS / name).is_dir()})


@pytest.mark.parametrize("folder", folders())
def test_quick_runs_something_of_every_folder(folder):
    assert any(map(quick_tests, (TESTS / folder).glob("test_*.py"))), folder


def test_every_folder_of_sources_has_its_tests():
    packages = {p.parent.name for p in (ROOT / "src" / "fp4moe").glob("*/__init__.py")} | {"passes"}
    assert packages <= set(folders())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_a(): pass", ["test_a"]),
        ("@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass", ["test_b"]),
        ("@pytest.mark.gpu\nclass TestA:\n    def test_a(self): pass", []),
        ("pytestmark = [pytest.mark.slow]\ndef test_a(): pass", []),
    ],
)
def test_marks_are_read(source, expected, tmp_path):
    (tmp_path / "test_it.py").write_text(source)
    assert quick_tests(tmp_path / "test_it.py") == expected


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.slow
def test_no_test_file_imports_another():
    wrong, files = [], {file.stem for file in TESTS.rglob("test_*.py")}
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            else:
                continue
            wrong += [f"{file.relative_to(ROOT)}: {name}" for name in names if last(name) in files]
    assert not wrong
