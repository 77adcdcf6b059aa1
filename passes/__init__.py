"""Graph passes of fp4moe; imported as fp4moe.passes, never as passes."""

# From the repository root `import passes` would load a second copy of every class and registration.
if __name__ != "fp4moe.passes":
    raise ImportError(
        f"passes: the package must be imported as fp4moe.passes; got {__name__}. "
        "Run `pip install -e .` and import that name."
    )

from .exported import rewrite_exported
from .find.region import Region, find_regions
from .graph.show import show_graph
from .judge.forms import Hypothesis
from .judge.verify import verify_region
from .report import BlockMatch, RewriteReport, RoutingMatch
from .rewrite import rewrite_moe
from .routing.fuse import fuse_routing

__all__ = [
    "BlockMatch",
    "Hypothesis",
    "Region",
    "RewriteReport",
    "RoutingMatch",
    "find_regions",
    "fuse_routing",
    "rewrite_exported",
    "rewrite_moe",
    "show_graph",
    "verify_region",
]
