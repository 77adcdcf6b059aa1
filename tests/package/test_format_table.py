"""The table of what runs where is what the kernels say, on any machine."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from fp4moe import why_not
from fp4moe.formats import FORMATS
from fp4moe.kernels import KERNELS
from fp4moe.kernels import base as kernel_base

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "formats.md"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "format_table.py"
    spec = importlib.util.spec_from_file_location("format_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_what_the_kernels_say(script):
    made = script.document()
    assert COMMITTED.read_text("utf-8") == made, "run benchmarks/format_table.py, see its head"
    assert [line[3:] for line in made.splitlines() if line.startswith("## ")] == [
        *FORMATS,
        "Reasons",
    ]


@pytest.mark.parametrize("reasons", [(), ("it is not installed",)])
@pytest.mark.parametrize("here", [None, (9, 0)])
def test_it_hangs_on_no_machine(script, monkeypatch, reasons, here):
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "package_reasons", lambda: reasons)
    monkeypatch.setattr(kernel_base, "query_capability", lambda device: here)
    assert script.document() == COMMITTED.read_text("utf-8")


@pytest.mark.parametrize("format", FORMATS)
def test_each_cell_is_what_why_not_says(script, format):
    """But for packages, and what an installed one lacks."""
    for name, kernel in KERNELS.items():
        packages = kernel.package_reasons()
        for _, activation, gated, biased in script.ACTIVATIONS:
            layer = script.layer_of(format, activation, gated, biased)
            sizes = {n: getattr(layer, f"{n}") for n in ("hidden_size", "intermediate_size")}
            sizes |= {"num_experts": layer.num_experts, "top_k": layer.top_k}
            form = {"activation": activation, "gated": gated, "biased": biased, "format": format}
            for device in script.DEVICES[1:]:
                whys = why_not(name, **form, **sizes, capability=device)
                whys = [w for w in whys if w not in packages and "the installed" not in w]
                word, reasons = script.verdict(kernel, layer, device)
                refused = word in (script.REFUSED, script.FUSED)
                assert refused == bool(whys), (name, activation, device)
                if word == script.FUSED:
                    routed = why_not(name, **form, **sizes, capability=device, routing="fused")
                    routed = [w for w in routed if w not in packages and "the installed" not in w]
                    assert routed == reasons == []
                assert all(any(w.startswith(r.split(" (")[0]) for w in whys) for r in reasons)


def test_what_has_run_is_said_of_kernels_that_run_there(script):
    for (name, format), devices in script.HAS_RUN.items():
        layer = script.layer_of(format, "silu", True, False)
        for device in devices:
            assert script.verdict(KERNELS[name], layer, device) == (script.RUNS, [])
