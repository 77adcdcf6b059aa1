"""Graph passes of fp4moe; imported as fp4moe.passes, never as passes."""

# From the repository root `import passes` would load a second copy of every class and registration.
if __name__ != "fp4moe.passes":
    raise ImportError(
        f"passes: the package must be imported as fp4moe.passes; got {__name__}. "
        "Run `pip install -e .` and import that name."
    )

from .exported import rewrite_exported
from .report import BlockMatch, RewriteReport, RoutingMatch
from .rewrite import rewrite_moe

__all__ = ["BlockMatch", "RewriteReport", "RoutingMatch", "rewrite_exported", "rewrite_moe"]
