"""What a rewrite did: each block, matched or not, with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from fp4moe.explain import format_table

__all__ = ["BlockMatch", "RewriteReport"]


@dataclasses.dataclass(frozen=True)
class BlockMatch:
    """One mixture-of-experts block of a graph.

    Attributes:
        path, module: dotted name and class of the module.
        rewritten: whether one operator stands in its place now.
        form: what it computes, where that is known. kernel: what runs it.
        reasons: why it was left; empty when rewritten.
    """

    path: str
    module: str
    rewritten: bool
    form: str | None
    kernel: str | None
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RewriteReport:
    """The blocks of one graph; `already_fused` operators were there before."""

    blocks: tuple[BlockMatch, ...]
    already_fused: int

    @property
    def count(self) -> int:
        """Number of blocks rewritten."""
        return sum(block.rewritten for block in self.blocks)

    @property
    def near_misses(self) -> tuple[BlockMatch, ...]:
        """Blocks that were left, with their reasons."""
        return tuple(block for block in self.blocks if not block.rewritten)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "count": self.count,
            "already_fused": self.already_fused,
            "blocks": [dataclasses.asdict(b) for b in self.blocks],
        }

    def __str__(self) -> str:
        lines = []
        if self.blocks:
            header = ["block", "module", "rewritten", "form", "kernel"]
            rows = [
                [b.path, b.module, "yes" if b.rewritten else "no", b.form or "-", b.kernel or "-"]
                for b in self.blocks
            ]
            lines.append(format_table(header, rows))
        lines += [f"{b.path}: {'; '.join(b.reasons)}" for b in self.near_misses]
        fused = f", {self.already_fused} already fused" if self.already_fused else ""
        lines.append(f"{self.count} of {len(self.blocks)} blocks rewritten{fused}")
        return "\n".join(lines)
