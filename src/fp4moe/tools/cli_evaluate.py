"""The command `fp4moe evaluate MODEL`."""

from __future__ import annotations

import argparse
import json

from ..formats import DEFAULT_FORMAT, FORMATS
from ..formats.base import METHODS
from .evaluate import evaluate
from .help_text import add_command

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    command = add_command(
        subparsers,
        "evaluate",
        "Measure what quantised experts cost a model on text.",
        "The same tokens go through the bf16 model and through each format. The table shows\n"
        "perplexity, the change in bits a token with its standard error, and how often the\n"
        "most likely token is the same.",
        "fp4moe evaluate path/to/bf16\n"
        "fp4moe evaluate path/to/bf16 --format nvfp4 fp8 --tokens 65536 --text sample.txt",
    )
    command.add_argument("model", help="a directory or hub id: a bf16 model with its tokenizer")
    command.add_argument(
        "--text",
        metavar="FILE",
        help="a UTF-8 text; default: a part of Python's standard library",
    )
    command.add_argument("--tokens", type=int, default=16384, help="number of tokens to predict")
    command.add_argument("--length", type=int, default=512, help="tokens in one window of text")
    command.add_argument("--batch", type=int, default=4, help="windows in one call of the model")
    command.add_argument(
        "--calibrate",
        metavar="TEXT.jsonl",
        help="also measure rounded activations whose ranges come from this text; each line is an "
        'object with a "text"',
    )
    command.add_argument(
        "--percentile",
        type=float,
        help="percentile of the magnitudes, 0 to 100, that --calibrate takes as the range; "
        "default: the largest magnitude",
    )
    command.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=[DEFAULT_FORMAT],
        help="number formats of the experts; the model is loaded once for each",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default="max",
        help="how block scales are chosen: max (as ModelOpt does) or mse (slower, smaller error)",
    )
    command.add_argument(
        "--linears",
        nargs="+",
        metavar="NAME",
        default=["none"],
        help="dense Linears to quantise as well: names or patterns such as '*.self_attn.*'",
    )
    command.add_argument("--device", help="cuda, cuda:1 or cpu; default: the GPU, if there is one")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--no-progress", action="store_true", help="show no progress bars")


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
