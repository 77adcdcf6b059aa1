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
from .help_text import add_command
from .measure import tune
from .selftest import LAYERS, TOKENS, run_selftest, selftest

__all__ = ["main", "make_parser"]

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
    parser, _ = make_parser()
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


def make_parser() -> tuple[
    argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]
]:
    """Return the parser of the program, and its commands by name in `choices`."""
    parser = argparse.ArgumentParser(
        prog="fp4moe",
        description="Mixture-of-experts layers of PyTorch models on NVFP4, FP8 and MX weights.",
        epilog="`fp4moe COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"fp4moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_command(
        commands,
        "info",
        "Print versions, the GPU, and which kernels run here.",
        "For each kernel that does not run, the table says why. Please add this output when you\n"
        "report a problem.",
        "fp4moe info",
    )
    cli_explain.add_parser(commands)
    _add_selftest(commands)
    bench.add_parser(commands)
    cli_quantize.add_parser(commands)
    cli_evaluate.add_parser(commands)
    return parser, commands


def _add_selftest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = add_command(
        commands,
        "selftest",
        "Check that a kernel computes the right numbers on this machine.",
        "Each layer is compared with its definition in plain torch. The exit code is 1 if a\n"
        "result is wrong. On a GPU this takes a few minutes.",
        "fp4moe selftest\nfp4moe selftest --kernel triton --format nvfp4 fp8 --tokens 1 37",
    )
    command.add_argument(
        "--kernel", default="auto", help="auto, or the name of a kernel from fp4moe info"
    )
    command.add_argument("--device", help="cuda, cuda:1 or cpu; default: the GPU, if there is one")
    command.add_argument(
        "--tokens", type=int, nargs="+", default=TOKENS, help="numbers of tokens in one call"
    )
    command.add_argument(
        "--hidden-alignment",
        type=int,
        choices=HIDDEN_ALIGNMENTS,
        default=DEFAULT_HIDDEN_ALIGNMENT,
        help="multiple, in elements, to which the Blackwell kernel pads the hidden size",
    )
    command.add_argument(
        "--format", nargs="+", choices=FORMATS, help="number formats of the weights; default: all"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


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
