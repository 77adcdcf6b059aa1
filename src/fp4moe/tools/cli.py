"""The command line: `fp4moe info`, `explain`, `quantize`, `evaluate`, `bench`, `selftest`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence

import torch

from ..errors import Fp4MoeError
from ..formats import FORMATS
from ..kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    HIDDEN_ALIGNMENTS,
    KERNELS,
    current_capability,
    why_not,
)
from ..report import format_table
from ..version import __version__
from . import bench, cli_evaluate, cli_explain, cli_quantize
from .measure import tune
from .selftest import LAYERS, TOKENS, run_selftest, selftest

__all__ = ["main"]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flashinfer-python",
    "torch-tensorrt",
    "humming-kernels",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (a result was wrong), 2 (an error of fp4moe)."""
    parser = argparse.ArgumentParser(
        prog="fp4moe",
        description="Mixture-of-experts operators on NVFP4, FP8 and MX weights for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"fp4moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, GPU, and which kernels run here and why not")
    cli_explain.add_parser(commands)
    command = commands.add_parser("selftest", help="does a kernel compute what it should here?")
    command.add_argument("--kernel", default="auto", help="auto or a kernel's name")
    command.add_argument("--device", help="cuda, cuda:1, cpu; default the GPU, if there is one")
    command.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    command.add_argument(
        "--hidden-alignment",
        type=int,
        choices=HIDDEN_ALIGNMENTS,
        default=DEFAULT_HIDDEN_ALIGNMENT,
        help="what the Blackwell kernel pads the hidden size to",
    )
    command.add_argument(
        "--format", nargs="+", choices=FORMATS, help="of the layers' weights; default all"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_parser(commands)
    cli_quantize.add_parser(commands)
    cli_evaluate.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            print(info())
        elif arguments.command == "bench":
            if arguments.tune:
                bench.require_gpu()
                bench.check_output(arguments.output, tuned=True)
                names = ("shape", "tokens", "output", "jobs", "format", "kernel")
                return tune(*(getattr(arguments, name) for name in names))
            return bench.run(arguments)
        elif arguments.command == "selftest":
            return 0 if _selftest(arguments) else 1
        elif arguments.command == "quantize":
            cli_quantize.run(arguments)
        elif arguments.command == "evaluate":
            cli_evaluate.run(arguments)
        else:
            cli_explain.run(arguments)
    except Fp4MoeError as error:
        # In one line, whatever a library wrote that is quoted in it.
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        print(f"{arguments.command}: out of memory: {why} Ask for less.", file=sys.stderr)
        return 2
    return 0


def _selftest(arguments: argparse.Namespace) -> bool:
    names = ("kernel", "device", "tokens", "hidden_alignment", "format")
    options = {name: getattr(arguments, name) for name in names}
    if not arguments.json:
        return selftest(**options)
    report = run_selftest(**options)
    print(json.dumps(report.to_dict(), indent=2))
    return report.passed


def info() -> str:
    """Return a text: versions, device, and each kernel with its reasons for the two main layers."""
    rows = [["fp4moe", __version__], ["python", platform.python_version()]]
    rows += [[name, _version(name)] for name in PACKAGES]
    capability = current_capability()
    if capability:
        name = torch.cuda.get_device_name()
        rows.append(["device", f"{name}, compute capability {capability[0]}.{capability[1]}"])
    else:
        rows.append(["device", f"CPU, {torch.get_num_threads()} threads"])
    lines = [format_table(["what", "version"], rows)]
    for layer, sizes in LAYERS.items():
        lines.append(f"\nKernels for a layer of {layer}:")
        table = []
        for kernel in KERNELS:
            reasons = why_not(kernel, **sizes)
            table.append([kernel, "no" if reasons else "yes", "; ".join(reasons)])
        lines.append(format_table(["kernel", "runs", "why not"], table))
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
