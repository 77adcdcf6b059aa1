"""Imports point one way, and heavy packages stay in the one module that needs them.

LAYERS is the table to extend when a module is added. Names are relative to fp4moe; a package stands
for everything in it.
"""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {"fp4moe": ROOT / "src" / "fp4moe", "fp4moe.passes": ROOT / "passes"}

# Lowest first. A module imports from lower layers and, without a cycle, from its own; never from a
# higher one. "" is fp4moe/__init__.py.
LAYERS: list[set[str]] = [
    {"borrowed", "devices", "errors", "layer", "precision", "progress", "random_floats", "report"}
    | {"saving", "version"},
    {"activations", "formats", "padding", "routing"},
    {"experts", "pack", "part", "resize"},
    {"reference", "reference_gradients", "testing"},
    {"kernels"},
    {"identity"},
    {"arguments", "autograd", "checks", "grouped_mm", "linear_op", "ops"},
    {"fused", "linear", "logical", "module", "parallel", "prepared"},
    {"checkpoint"},
    {"models"},
    {"calibration", "pretrained"},
    {"passes"},
    {"compile", "tensorrt"},
    {"tools"},
    {""},
    {"__main__"},
]

# Further limits, for names that a lower layer would allow: passes work on graphs, not on modules.
MAY_NOT_IMPORT: dict[str, set[str]] = {
    "passes": {"calibration", "checkpoint", "models", "module", "pretrained"},
}

# The only modules that may import a heavy package at their top level. Anywhere else the import
# stands inside the function that needs it, or under TYPE_CHECKING.
HEAVY: dict[str, set[str]] = {
    "accelerate": set(),
    "compressed_tensors": set(),
    "flashinfer": set(),
    "humming": set(),
    "modelopt": set(),
    "pandas": set(),
    "peft": {"models.peft_lora"},
    "safetensors": set(),
    "scipy": set(),
    "tensorrt": set(),
    "torch_tensorrt": set(),
    "transformers": set(),
    "triton": {
        f"kernels.triton.{name}"
        for name in (
            *("activation", "arrange", "backward", "choose", "combine", "decode_fp8"),
            *("decode_mxfp4", "decode_nvfp4", "fingerprint", "gemm", "gemm_w8a8", "linear_gemm"),
            *("one_token_gemm", "registers", "round_e4m3", "sort", "weights"),
        )
    },
}


@dataclasses.dataclass(frozen=True)
class Import:
    target: str  # a module of ours by its full name, or a top-level package of others
    line: int
    top_level: bool  # runs when the module is imported
    for_types: bool  # under `if TYPE_CHECKING:`


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its full name."""
    found = {}
    for name, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = [name, *file.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = file
    return found


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(source: str, module: str, is_package: bool, ours: set[str]) -> list[Import]:
    """What a module imports, wherever the statement stands in it."""
    found = []

    def add(name: str, line: int, top_level: bool, for_types: bool) -> None:
        target = name if name.split(".")[0] == "fp4moe" else name.split(".")[0]
        found.append(Import(target, line, top_level, for_types))

    def visit(node: ast.AST, top_level: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node.lineno, top_level, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *filter(None, [base])])
            for alias in node.names:  # `from . import x` may name a module or something in it
                name = f"{base}.{alias.name}"
                add(name if name in ours else base, node.lineno, top_level, for_types)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            top_level = False
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                visit(child, top_level, True)
            for child in node.orelse:
                visit(child, top_level, for_types)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, top_level, for_types)

    visit(ast.parse(source), True, False)
    return list(dict.fromkeys(found))


def imports() -> dict[str, list[Import]]:
    files = modules()
    return {
        name: imports_of(file.read_text("utf-8"), name, file.name == "__init__.py", set(files))
        for name, file in files.items()
    }


def group(module: str) -> str:
    """The name by which LAYERS knows a module: fp4moe.kernels.triton -> kernels."""
    return [*module.split("."), ""][1]


def problems(graph: dict[str, list[Import]]) -> list[str]:
    """Every import that the tables above forbid."""
    rank = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = [
        f"{module}: add {group(module)!r} to LAYERS in tests/package/test_imports.py"
        for module in graph
        if group(module) not in rank
    ]
    for module, imported in graph.items():
        if group(module) not in rank:
            continue
        for item in imported:
            where = f"{module}:{item.line} imports {item.target}"
            if item.target in HEAVY:
                runs = item.top_level and not item.for_types
                if runs and module.removeprefix("fp4moe.") not in HEAVY[item.target]:
                    found.append(f"{where} at its top level; see HEAVY")
            elif item.target.split(".")[0] == "fp4moe" and group(item.target) in rank:
                if rank[group(item.target)] > rank[group(module)]:
                    found.append(f"{where}, which is in a higher layer; see LAYERS")
                if group(item.target) in MAY_NOT_IMPORT.get(group(module), set()):
                    found.append(f"{where}; see MAY_NOT_IMPORT")
    ours = {
        module: {item.target for item in imported if item.target in graph} - {module}
        for module, imported in graph.items()
    }
    try:
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        found.append("imports form a cycle: " + " <- ".join(error.args[1]))
    return found


def test_imports_point_one_way_and_heavy_packages_stay_home():
    found = problems(imports())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "fragment"),
    [
        ("fp4moe.ops", "from .models.replace import replace_moe", "higher layer"),
        ("fp4moe.ops", "def f():\n    from fp4moe import passes", "higher layer"),
        ("fp4moe.ops", "import fp4moe", "higher layer"),
        ("fp4moe.kernels.reference", "from ..ops import nvfp4_moe", "higher layer"),
        ("fp4moe.passes.rewrite", "from fp4moe.module import FusedExperts", "MAY_NOT_IMPORT"),
        ("fp4moe.module", "try:\n    import transformers.utils\nfinally:\n    pass", "see HEAVY"),
        ("fp4moe.kernels.fast", "class C:\n    from triton import language", "see HEAVY"),
        ("fp4moe.surprise", "", "add 'surprise' to LAYERS"),
        ("fp4moe.checkpoint.read", "from ..models.block import Block", "higher layer"),
        ("fp4moe.activations", "from .routing import a", "cycle"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, fragment: str):
    ours = {"fp4moe", "fp4moe.models.replace", "fp4moe.ops", "fp4moe.passes", "fp4moe.routing"}
    ours.add(module)
    graph = {name: [] for name in ours}
    back = "from .activations import b"
    graph["fp4moe.routing"] = imports_of(back, "fp4moe.routing", False, ours)
    graph[module] = imports_of(source, module, False, ours)
    (problem,) = problems(graph)
    assert fragment in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fp4moe.compile.backend", "from ..passes import rewrite_moe"),
        ("fp4moe.passes.rewrite", "from fp4moe.ops import nvfp4_moe\nfrom .plan import Planner"),
        ("fp4moe.module", "def f():\n    import transformers"),
        ("fp4moe.module", "if TYPE_CHECKING:\n    import transformers\nelse:\n    import torch"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str):
    assert problems({module: imports_of(source, module, False, {module})}) == []
