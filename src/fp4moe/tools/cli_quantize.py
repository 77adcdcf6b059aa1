"""The command `fp4moe quantize SRC DST`."""

from __future__ import annotations

import argparse

from ..checkpoint.float_linears import NONE
from ..formats import DEFAULT_FORMAT, FORMATS
from ..formats.base import METHODS
from ..pretrained.quantize import quantize_checkpoint
from .help_text import add_command

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    command = add_command(
        subparsers,
        "quantize",
        "Write a copy of a float checkpoint whose experts are quantised.",
        "The copy has the layout of ModelOpt, which fp4moe, vLLM and SGLang read. Files go to\n"
        "DST.partial until all are written. If the command is interrupted, run it again: it\n"
        "continues where it stopped.",
        "fp4moe quantize path/to/bf16 path/to/nvfp4\n"
        "fp4moe quantize --format fp8 --calibrate texts.jsonl path/to/bf16 path/to/fp8",
        # src and dst are optional to argparse, since --layers takes what follows it; see `_paths`.
        usage="fp4moe quantize [-h] [options] src dst",
    )
    command.add_argument("src", nargs="?", help="a directory with safetensors and config.json")
    command.add_argument("dst", nargs="?", help="a directory that is new or empty")
    command.set_defaults(parser=command)
    command.add_argument(
        "--format", choices=FORMATS, default=DEFAULT_FORMAT, help="number format of the experts"
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default="max",
        help="how block scales are chosen: max (as ModelOpt does) or mse (slower, smaller error)",
    )
    command.add_argument(
        "--layers",
        nargs="+",
        action="extend",
        metavar="REGEX",
        help=r"quantise only layers whose name contains a match, such as 'layers\.[0-9]\.'; "
        "default: all",
    )
    command.add_argument(
        "--calibrate",
        metavar="TEXT.jsonl",
        help="record the ranges of activations on this text and store them as input_scale; each "
        'line is an object with a "text"',
    )
    command.add_argument(
        "--linears",
        action="append",
        metavar="NAME",
        help="also quantise dense Linears of this name or pattern, such as '*.self_attn.*'",
    )
    command.add_argument(
        "--max-shard-bytes",
        type=float,
        default=5e9,
        help="largest size of one weight file, in bytes",
    )
    command.add_argument("--no-progress", action="store_true", help="show no bar and no report")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    _paths(arguments)
    calibration = None
    if arguments.calibrate:
        from ..calibration.calibrate import scales_from_text

        calibration = scales_from_text(arguments.src, arguments.calibrate, format=arguments.format)
    quantize_checkpoint(
        arguments.src,
        arguments.dst,
        format=arguments.format,
        method=arguments.method,
        layers=arguments.layers,
        calibration=calibration,
        max_shard_bytes=arguments.max_shard_bytes,
        progress=not arguments.no_progress,
        linears=arguments.linears or NONE,
    )


def _paths(arguments: argparse.Namespace) -> None:
    """Give back the paths that --layers has taken: `quantize --layers 0 SRC DST`."""
    found = [path for path in (arguments.src, arguments.dst) if path is not None]
    layers = arguments.layers or []
    missing = 2 - len(found)
    if len(layers) < missing or (layers and len(layers) == missing):
        arguments.parser.error("the following arguments are required: src, dst")
    found += layers[len(layers) - missing :] if missing else []
    arguments.src, arguments.dst = found
    arguments.layers = layers[: len(layers) - missing] or None
