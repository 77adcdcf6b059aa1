"""What `mkdocs build` fills in: the list of refusals and the help of the command line.

A page holds `<!-- generated: NAME -->` where the text goes.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import refusals


def command_line() -> str:
    """Return the help of `fp4moe` and of each of its commands, as a terminal shows it."""
    from fp4moe.tools.cli import make_parser

    parser, commands = make_parser()
    parts = [("fp4moe", parser), *((f"fp4moe {name}", p) for name, p in commands.choices.items())]
    return "\n".join(f"## {name}\n\n```text\n{p.format_help()}```\n" for name, p in parts)


GENERATED = {"refusals": refusals.document, "command line": command_line}


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fill in what is generated."""

    def fill(found: re.Match[str]) -> str:
        return GENERATED[found[1]]()

    return re.sub(r"<!-- generated: ([\w ]+) -->", fill, markdown)
