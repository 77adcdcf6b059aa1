"""What the rewrite is asked for, checked in one place for all that start it."""

from __future__ import annotations

from typing import NamedTuple

from fp4moe.errors import check_choice
from fp4moe.formats import DEFAULT_FORMAT, FORMATS
from fp4moe.kernels import DEFAULT_HIDDEN_ALIGNMENT, HIDDEN_ALIGNMENTS, ROUTINGS, check_kernel_name

from .report import ON_NO_MATCH

__all__ = ["RewriteSettings"]


class RewriteSettings(NamedTuple):
    """The arguments of `rewrite_moe`, see there."""

    kernel: str = "auto"
    verify: bool = True
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT
    routing: str = "given"
    format: str = DEFAULT_FORMAT

    def checked(self, on_no_match: str, *, caller: str) -> RewriteSettings:
        """Raise UnsupportedError unless each is one of its choices; returns the same."""
        check_kernel_name(self.kernel, caller=caller)
        for name, value, choices in (
            ("format", self.format, FORMATS),
            ("verify", self.verify, (True, False)),
            ("hidden_alignment", self.hidden_alignment, HIDDEN_ALIGNMENTS),
            ("routing", self.routing, ROUTINGS),
            ("on_no_match", on_no_match, ON_NO_MATCH),
        ):
            check_choice(name, value, choices, caller=caller)
        return self
