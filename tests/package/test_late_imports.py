"""`import fp4moe` loads the operators and little else; every other name comes when it is used."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import pytest

import fp4moe

# The operators and what they need; a module that is added here is paid for by every import.
EAGER = {
    "activations",
    "arguments",
    "autograd",
    "borrowed",
    "checks",
    "errors",
    "experts",
    "formats",
    "fused",
    "grouped_mm",
    "identity",
    "kernels",
    "layer",
    "linear",
    "linear_op",
    "logical",
    "module",
    "ops",
    "part",
    "pack",
    "padding",
    "precision",
    "prepared",
    "reference",
    "reference_gradients",
    "resize",
    "routing",
    "saving",
    "version",
}
# What torch loads late itself, or some versions of it do.
HEAVY_IN_TORCH = (
    "torch._dynamo",
    "torch._export",
    "torch._functorch.aot_autograd",
    "torch._inductor",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
)


def run(code: str, folder: pathlib.Path) -> object:
    """Run code in a process of its own, away from the repository; what it prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_importing_fp4moe_loads_the_operators_and_little_else(tmp_path):
    loaded = run(
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"  # what torch brings by itself
        "import fp4moe\n"
        "after = sorted(set(sys.modules) - before)\n"
        "for name in ('nvfp4_moe', 'nvfp4_moe_from_logits', 'refuse_backward'):\n"
        "    getattr(torch.ops.fp4moe, name).default\n"
        "print(json.dumps(after))",
        tmp_path,
    )
    ours = {name.removeprefix("fp4moe.") for name in loaded if name.startswith("fp4moe.")}
    whole = ("formats.", "identity.", "kernels.")
    assert {name for name in ours if not name.startswith(whole)} == EAGER
    others = {name for name in loaded if name.split(".")[0] != "fp4moe"}
    packages = {name.split(".")[0] for name in others} - {"torch"}
    assert packages <= sys.stdlib_module_names
    assert [name for name in others if name.startswith(HEAVY_IN_TORCH)] == []


@pytest.mark.slow
def test_every_name_comes_and_is_listed(tmp_path):
    """In an order of its own each: a star, one after the other from the end, dir()."""
    starred, one_by_one, listed = run(
        "import json, fp4moe\n"
        "listed = dir(fp4moe)\n"
        "one_by_one = {n: getattr(fp4moe, n) for n in reversed(fp4moe.__all__)}\n"
        "starred = {}\n"
        "exec('from fp4moe import *', starred)\n"
        "del starred['__builtins__']\n"
        "assert all(starred[n] is v for n, v in one_by_one.items())\n"
        "print(json.dumps([sorted(starred), sorted(one_by_one), listed]))",
        tmp_path,
    )
    assert starred == one_by_one == sorted(fp4moe.__all__)
    assert set(fp4moe.__all__) <= set(listed)


def test_functions_and_folders_do_not_share_names():
    """Else the folder, once something in it is imported, would take the function's place."""
    for name in fp4moe.__all__:
        value = getattr(fp4moe, name)
        if not isinstance(value, types.ModuleType):
            assert importlib.util.find_spec(f"fp4moe.{name}") is None, name


@pytest.mark.slow
def test_submodules_are_attributes_and_other_names_are_not(tmp_path):
    names = ["passes", "tensorrt", "calibration", "compile", "checkpoint", "tools"]
    assert run(
        f"import fp4moe, json\nprint(json.dumps([getattr(fp4moe, n).__name__ for n in {names}]))",
        tmp_path,
    ) == [f"fp4moe.{name}" for name in names]
    for name in ("no_such_name", "__wrapped__", "__main__"):
        with pytest.raises(AttributeError, match=f"^module 'fp4moe' has no attribute '{name}'$"):
            getattr(fp4moe, name)


def test_a_function_can_be_replaced_and_put_back(monkeypatch):
    before = fp4moe.calibrate
    monkeypatch.setattr(fp4moe, "calibrate", len)
    assert fp4moe.calibrate is len
    monkeypatch.undo()
    assert fp4moe.calibrate is before
