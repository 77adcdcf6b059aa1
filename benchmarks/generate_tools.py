"""What benchmarks/generate.py measures with: a backend that counts, a clock, the table."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fp4moe
from fp4moe.identity.value_watch import ValueWatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def without_looks() -> Iterator[None]:
    """Look at no float weight's values meanwhile."""
    looks = {
        "read": lambda self, pairs: False,
        "begin": lambda self: None,
        "look_beside": lambda self: None,
    }
    before = {name: getattr(ValueWatch, name) for name in looks}
    for name, nothing in looks.items():
        setattr(ValueWatch, name, nothing)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(ValueWatch, name, function)


class Backend:
    """fp4moe.backend with a kernel's name; counts the blocks fused in each graph."""

    def __init__(self, kernel: str, inner: str):
        self.options = {"kernel": kernel, "inner_backend": inner}
        self.blocks: list[int] = []

    def __call__(self, graph_module: Any, inputs: Any, *, mode: str | None = None) -> Callable:
        compiled = fp4moe.backend(graph_module, inputs, options=self.options, mode=mode)
        self.blocks.append(sum("fp4moe." in str(n.target) for n in graph_module.graph.nodes))
        return compiled

    def __deepcopy__(self, memo: dict) -> Backend:
        # generate() copies its configuration, and compiles again for another backend.
        return self

    def require(self, blocks: int) -> None:
        """Raise SystemExit unless every graph has so many fused blocks."""
        if set(self.blocks) != {blocks}:
            raise SystemExit(
                f"generate: graphs must have {blocks} fused blocks; got {self.blocks}. Not timed."
            )


class Clock:
    """A logits processor that changes nothing and notes when it is called."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self()

    def __call__(self, ids: Any = None, scores: Any = None) -> Any:
        if DEVICE == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        return scores

    def milliseconds(self) -> list[float]:
        """To the first token, and from token to token."""
        pairs = list(itertools.pairwise(self.marks))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table; x says how many times faster than huggingface."""
    base = {(row["model"], row["batch"]): row for row in rows if row["setting"] == "huggingface"}
    print(
        f"{'model':9s}{'setting':12s}batch prefill_ms     x  decode_ms     x  tokens/s peak_gib"
        " model_gib of_bf16   error"
    )
    for row in rows:
        other = base.get((row["model"], row["batch"]), {})
        cells = []
        for key in ("prefill_ms", "decode_ms"):
            value, slower = row[key], other.get(key)
            cells.append(f"{value:10.2f}" if value else f"{'-':>10}")
            cells.append(f"{slower / value:5.2f}" if value and slower else f"{'-':>5}")
        print(
            f"{row['model']:9s}{row['setting']:12s}{row['batch']:5d} {' '.join(cells)} "
            f"{row['tokens_per_s']:9.1f} {row['peak_gib'] or '-':>8} {row['model_gib']:9.2f} "
            f"{row['of_bf16']:7.3f} {row['logits_error']:7.1e}  {row['note']}",
            flush=True,
        )
    us = {(row["model"], row["batch"], row["setting"]): row["decode_ms"] for row in rows}
    for model, batch, setting in us:
        experts = us.get((model, batch, "replace_moe"))
        if setting == "linears" and experts:
            ratio = us[model, batch, setting] / experts
            print(f"{model} batch {batch}: with Linears {ratio:.3f} of a step with experts alone")


def write(path: str | None, rows: list[dict[str, Any]]) -> None:
    import transformers

    if path:
        gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
        facts = {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__}
        Path(path).write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
