"""How the commands explain themselves: a summary, options with units and defaults, an example."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_command"]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and line breaks of examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default that is nothing, or that the text names itself, is not repeated.
        said = "default" in (action.help or "")
        if said or action.default in (None, False, [], ""):
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    details: str,
    examples: str,
    **options: Any,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        summary: one line for `fp4moe --help`. details: sentences for the command's own help.
        examples: lines to type.
    """
    lines = "".join(f"\n  {line}" for line in examples.splitlines())
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{details}",
        epilog=f"Examples:{lines}",
        formatter_class=_Formatter,
        **options,
    )
