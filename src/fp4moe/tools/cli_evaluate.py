"""The command `fp4moe evaluate MODEL`."""

from __future__ import annotations

import argparse
import json

from ..formats import DEFAULT_FORMAT, FORMATS
from ..formats.base import METHODS
from .evaluate import evaluate

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    command = subparsers.add_parser(
        "evaluate", help="perplexity of a bf16 model, and what quantised experts change"
    )
    command.add_argument("model", help="a directory or a hub id, in bf16, with its tokenizer")
    command.add_argument(
        "--text", metavar="FILE", help="UTF-8; default a part of Python's standard library"
    )
    command.add_argument("--tokens", type=int, default=16384, help="how many to predict")
    command.add_argument("--length", type=int, default=512, help="tokens of a window")
    command.add_argument("--batch", type=int, default=4, help="windows at a time")
    command.add_argument(
        "--calibrate",
        metavar="TEXT.jsonl",
        help="adds rounded activations with ranges that were recorded on this text",
    )
    command.add_argument(
        "--percentile", type=float, help="of the magnitudes, as range; default the largest"
    )
    command.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=[DEFAULT_FORMAT],
        help="of the experts' weights; the model is loaded for each",
    )
    command.add_argument("--method", choices=METHODS, default="max", help="of the weights")
    command.add_argument(
        "--linears",
        nargs="+",
        metavar="NAME",
        default=["none"],
        help="dense Linears to quantise, too: names and patterns, as '*.self_attn.*'",
    )
    command.add_argument("--device", help="cuda, cuda:1, cpu; default the GPU, if there is one")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    names = (
        "format",
        "text",
        "tokens",
        "length",
        "batch",
        "calibrate",
        "percentile",
        "method",
        "linears",
        "device",
    )
    options = {name: getattr(arguments, name) for name in names}
    report = evaluate(arguments.model, **options, progress=not arguments.no_progress)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
