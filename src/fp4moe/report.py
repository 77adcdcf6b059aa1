"""What `fp4moe.explain` returns: one row for each mixture-of-experts block, and a table of them."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["BlockReport", "ModelReport", "format_bytes", "format_table"]


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """One block.

    Attributes:
        path, module: dotted name and class of the module.
        status: "replaced", "replaceable" or "not replaceable"; of a quantised checkpoint also
            "loadable": from_pretrained packs it as it is stored.
        reasons: why it cannot be replaced; else notes, on calibration for one.
        activation, gated, num_experts, top_k, hidden_size, intermediate_size: None where unknown.
        format: number format of the weights, or what they would be packed into.
        padded_sizes: (hidden, intermediate) as the kernel stores them.
        kernel: what runs it, or would.
        nbytes: bytes of the expert weights as they are now.
    """

    path: str
    module: str
    status: str
    reasons: tuple[str, ...]
    activation: str | None
    gated: bool | None
    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    format: str | None
    padded_sizes: tuple[int, ...] | None
    kernel: str | None
    nbytes: int


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The blocks of one model; `str()` is a table, `to_dict()` plain data.

    Attributes:
        model: name of its class.
        blocks: in module order.
        checkpoint: what `fp4moe explain` says of a quantised directory; None for a model.
    """

    model: str
    blocks: tuple[BlockReport, ...]
    checkpoint: str | None = None

    def count(self, status: str) -> int:
        """Number of blocks with that status."""
        return sum(block.status == status for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all expert weights."""
        return sum(block.nbytes for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        blocks = [dataclasses.asdict(block) for block in self.blocks]
        data: dict[str, Any] = {"model": self.model, "blocks": blocks}
        return data if self.checkpoint is None else data | {"checkpoint": self.checkpoint}

    def __str__(self) -> str:
        last = [] if self.checkpoint is None else [self.checkpoint]
        if not self.blocks:
            return "\n".join([f"{self.model}: no mixture-of-experts block", *last])
        header = [
            "block",
            "module",
            "status",
            "experts",
            "top-k",
            "H x I",
            "padded",
            "activation",
            "format",
            "kernel",
            "bytes",
        ]
        rows = []
        for b in self.blocks:
            sizes = f"{b.hidden_size} x {b.intermediate_size}" if b.hidden_size else "?"
            padded = " x ".join(map(str, b.padded_sizes)) if b.padded_sizes else "-"
            activation = f"{'gated ' if b.gated else ''}{b.activation or '?'}"
            cells = [
                b.path,
                b.module,
                b.status,
                b.num_experts,
                b.top_k or "-",
                sizes,
                padded,
                activation,
            ]
            rows.append(
                [str(c) for c in (*cells, b.format or "-", b.kernel or "-", format_bytes(b.nbytes))]
            )
        lines = [format_table(header, rows)]
        notes: dict[str, list[str]] = {}
        for b in self.blocks:
            for reason in b.reasons:
                notes.setdefault(reason, []).append(b.path or b.module)
        lines += [f"{_few(paths)}: {reason}" for reason, paths in notes.items()]
        kinds = ("replaced", "loadable", "replaceable", "not replaceable")
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in kinds if self.count(kind))
        lines.append(
            f"{self.model}: {len(self.blocks)} blocks ({counts}), experts "
            f"{format_bytes(self.nbytes)}"
        )
        return "\n".join(lines + last)


def _few(paths: list[str]) -> str:
    return ", ".join(paths) if len(paths) <= 2 else f"{paths[0]} and {len(paths) - 1} more"


def format_bytes(count: int) -> str:
    """Return a size in decimal units, as disks and GPUs are sold: 1.43 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Align the columns with two blanks between them."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )
