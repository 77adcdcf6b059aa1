"""What a rewrite did: each block and its routing, matched or not, with the reason."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

from fp4moe.errors import refuse
from fp4moe.report import format_table

__all__ = ["ON_NO_MATCH", "BlockMatch", "RewriteReport", "RoutingMatch"]
__all__ += ["report_no_match"]

logger = logging.getLogger("fp4moe")
ON_NO_MATCH = ("warn", "error", "ignore")


@dataclasses.dataclass(frozen=True)
class BlockMatch:
    """One mixture-of-experts block of a graph.

    Attributes:
        path, module: dotted name and class of the module.
        rewritten: whether one operator stands in its place now.
        form: what it computes, where that is known.
        format, kernel: what its weights are packed into, and what runs it; None where it was left.
        reasons: why it was left; empty when rewritten.
    """

    path: str
    module: str
    rewritten: bool
    form: str | None
    format: str | None
    kernel: str | None
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RoutingMatch:
    """The routing in front of one operator.

    Attributes:
        path: dotted name of the experts module.
        method: what the routing computes, None where that is not known.
        fused: whether the kernel does it now, or, with a reason, choose_experts before the kernel.
        reasons: why the kernel cannot.
    """

    path: str
    method: str | None
    fused: bool
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """The blocks of one graph; `already_fused` operators were there before.

    `routing` names what stands in front of each operator, those from before included.
    """

    blocks: tuple[BlockMatch, ...]
    already_fused: int
    routing: tuple[RoutingMatch, ...] = ()

    @property
    def count(self) -> int:
        """Number of blocks rewritten."""
        return sum(block.rewritten for block in self.blocks)

    def with_subgraph(self, other: RewriteReport) -> RewriteReport:
        """Return this report with that of a graph inside a higher-order operator."""
        return RewriteReport(
            self.blocks + other.blocks,
            self.already_fused + other.already_fused,
            self.routing + other.routing,
        )

    @property
    def near_misses(self) -> tuple[BlockMatch, ...]:
        """Blocks that were left, with their reasons."""
        return tuple(block for block in self.blocks if not block.rewritten)

    def why_none(self) -> str:
        """Say why nothing was rewritten, without a full stop."""
        misses = [f"{b.path}: {'; '.join(b.reasons)}" for b in self.near_misses]
        return ". ".join(misses) or "nothing in it looks like a block of experts"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "count": self.count,
            "already_fused": self.already_fused,
            "blocks": [dataclasses.asdict(b) for b in self.blocks],
            "routing": [dataclasses.asdict(r) for r in self.routing],
        }

    def __str__(self) -> str:
        lines = []
        if self.blocks:
            header = ["block", "module", "rewritten", "form", "format", "kernel"]
            rows = [
                [b.path, b.module, "yes" if b.rewritten else "no"]
                + [cell or "-" for cell in (b.form, b.format, b.kernel)]
                for b in self.blocks
            ]
            lines.append(format_table(header, rows))
        lines += [f"{b.path}: {'; '.join(b.reasons)}" for b in self.near_misses]
        fused = f", {self.already_fused} already fused" if self.already_fused else ""
        lines.append(f"{self.count} of {len(self.blocks)} blocks rewritten{fused}")
        for match in self.routing:
            # Fused with a reason: choose_experts does it, not the kernel.
            chosen = "in one launch before the kernel" if match.reasons else "in the kernel"
            where = chosen if match.fused else "in the graph"
            why = f" ({'; '.join(match.reasons)})" if match.reasons else ""
            lines.append(f"{match.path}: routing {match.method or 'unknown'}, {where}{why}")
        return "\n".join(lines)


def report_no_match(
    report: RewriteReport,
    on_no_match: str,
    *,
    caller: str,
    refusal: tuple[str, str, str] | None = None,
) -> None:
    """Log the blocks that were left; where nothing is fused, do what on_no_match says.

    Args:
        refusal: what cannot be done, the reason and the advice, in place of the report's.

    Raises:
        UnsupportedError: nothing is fused, and on_no_match is "error".
    """
    if report.count or report.already_fused:
        for block in report.near_misses:
            why = "; ".join(block.reasons)
            logger.warning("fp4moe.%s: %s is left as it is: %s", caller, block.path, why)
        return
    ignore = "Pass on_no_match='ignore' to keep it as it is."
    what, reason, advice = refusal or (
        "no experts of the graph can be fused",
        report.why_none(),
        "",
    )
    if on_no_match == "error":
        refuse(caller, what, reason, f"{advice} {ignore}".lstrip())
    if on_no_match == "warn":
        text = f"fp4moe.{caller}: {what}, because {reason}. {advice}"
        warnings.warn(text.rstrip(), stacklevel=3)
