"""Every factory call of the package names dtype and device: the caller's defaults do not matter."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
# What torch's own device context turns to its device, and more of the default dtype.
FACTORIES = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
FACTORIES |= {"from_file", "rand", "randn", "randint", "randperm"}
# Layers take both as well.
LAYERS = {
    name
    for name, kind in vars(torch.nn).items()
    if isinstance(kind, type) and {"dtype", "device"} <= set(inspect.signature(kind).parameters)
}


def faults(source: str) -> list[str]:
    """Return "line: name" of each factory call that does not name both, or import of a factory."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.nn"):
            names = {alias.name for alias in node.names} & (FACTORIES | LAYERS)
            found += [f"{node.lineno}: import {name}" for name in sorted(names)]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        factory = owner == "torch" and name in FACTORIES
        layer = owner in ("torch.nn", "nn") and name in LAYERS
        keywords = {keyword.arg for keyword in node.keywords}
        if (factory or layer) and not {"dtype", "device"} <= keywords:
            found.append(f"{node.lineno}: {owner}.{name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_factory_call_names_dtype_and_device(file):
    assert faults(file.read_text()) == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ("torch.zeros(3)", ["1: torch.zeros"]),
        ("torch.zeros(3, dtype=torch.int8)", ["1: torch.zeros"]),
        ("torch.rand(3, device=x.device)", ["1: torch.rand"]),
        ("torch.tensor([1.0]).to(x)", ["1: torch.tensor"]),
        ("torch.as_tensor(x, torch.float32, device='cpu')", ["1: torch.as_tensor"]),
        ("\ny = f(torch.arange(torch.tensor(4)))", ["2: torch.arange", "2: torch.tensor"]),
        ("from torch import full, float32", ["1: import full"]),
        ("nn.Linear(2, 3)", ["1: nn.Linear"]),
        ("torch.full((3,), 1.0, dtype=torch.float32, device='cpu')", []),
        ("torch.zeros_like(x), x.new_zeros(3), tl.zeros([4], tl.float32)", []),
    ],
)
def test_what_the_rule_catches(source, expected):
    assert faults(source) == expected


def test_the_rule_knows_the_factories_and_finds_the_package():
    wanted = {
        "empty",
        "zeros",
        "ones",
        "full",
        "arange",
        "linspace",
        "logspace",
        "eye",
        "tensor",
        "as_tensor",
    }
    assert (
        wanted | {"rand", "randn", "randint", "randperm", "asarray", "empty_strided"} <= FACTORIES
    )
    assert {"Linear", "Embedding", "LayerNorm"} <= LAYERS
    assert len(FILES) > 100
