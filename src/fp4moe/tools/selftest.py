"""selftest: does a kernel compute its definition on this machine? A table, and True or False.

It runs the kernel through the operator on random layers (selftest_layers.py) of the two main
models, of every activation and format, and with biases; the checks are in selftest_checks.py.
Nothing here is timed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import torch

from ..activations import get_activation
from ..devices import present_device
from ..errors import check_choice, must, refuse
from ..formats import FORMATS
from ..kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    HIDDEN_ALIGNMENTS,
    KERNELS,
    Layer,
    check_kernel_name,
    choose_kernel,
    current_capability,
    why_not,
)
from ..report import format_table
from .selftest_checks import FAILED, NOT_SUPPORTED, OK, SKIPPED, Outcome, checks
from .selftest_layers import LAYERS, default_layers
from .selftest_subject import make_subject

__all__ = ["LAYERS", "SelftestReport", "SelftestRow", "default_layers", "run_selftest", "selftest"]

TOKENS = (0, 1, 7, 128, 8192)
HEADER = ["layer", "check", "tokens", "error", "limit", "verdict", "note"]
WIDTHS = [0, 22, 6, 8, 8, 13, 0]


@dataclasses.dataclass(frozen=True)
class SelftestRow:
    """One check of one layer.

    Attributes:
        tokens: number of tokens, None where the layer was not run.
        error, limit: relative RMS, or a count where the limit is 0; None where nothing is measured.
        verdict: "ok", "FAILED", "not supported" or "skipped".
        note: the reason, the error's text, or the worst token's error relative to the RMS.
    """

    layer: str
    check: str
    tokens: int | None
    error: float | None
    limit: float | None
    verdict: str
    note: str = ""

    def cells(self) -> list[str]:
        """Return the texts of the table's row."""
        numbers = ["-" if n is None else f"{n:.2g}" for n in (self.error, self.limit)]
        tokens = "-" if self.tokens is None else str(self.tokens)
        return [self.layer, self.check, tokens, *numbers, self.verdict, self.note]


@dataclasses.dataclass(frozen=True)
class SelftestReport:
    """All rows; `str()` is a table, `to_dict()` plain data."""

    kernel: str
    device: str
    rows: tuple[SelftestRow, ...]

    @property
    def passed(self) -> bool:
        """Whether no row failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[SelftestRow, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == FAILED)

    @property
    def summary(self) -> str:
        """One line."""
        verdicts = [row.verdict for row in self.rows]
        counts = (f"{verdicts.count(v)} {v}" for v in (OK, FAILED, NOT_SUPPORTED, SKIPPED))
        return f"{self.kernel} on {self.device}: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON (a NaN error as None)."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            if row["error"] != row["error"]:
                row["error"] = None
        return {
            "kernel": self.kernel,
            "device": self.device,
            "passed": self.passed,
            "rows": rows,
        }

    def __str__(self) -> str:
        table = format_table(HEADER, [row.cells() for row in self.rows])
        return f"{table}\n{self.summary}"


def run_selftest(
    kernel: str = "auto",
    *,
    device: torch.device | str | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: Sequence[int] = TOKENS,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    format: str | Sequence[str] | None = None,
    on_row: Callable[[SelftestRow], None] | None = None,
) -> SelftestReport:
    """Run every check on every layer and return all rows; `selftest` has the arguments.

    Args:
        on_row: called with each row as soon as it is there.

    Raises:
        UnsupportedError: no such kernel, alignment or format, or it runs none of the layers here.
        ShapeError: bad sizes or tokens, or a format beside layers.
    """
    device = present_device(device, caller="selftest")
    layers = _layers(device, layers, format)
    _check_arguments(kernel, tokens, hidden_alignment)
    kernel, refused = _choose(kernel, device, layers)
    rows: list[SelftestRow] = []

    def add(layer: str, check: str, count: int | None, outcome: Outcome) -> None:
        verdict, error, limit, note = outcome
        rows.append(SelftestRow(layer, check, count, error, limit, verdict, note))
        if on_row:
            on_row(rows[-1])

    on_device = torch.cuda.device(device if device.type == "cuda" else -1)
    with torch.no_grad(), on_device:
        for name, sizes in layers.items():
            if name in refused:
                add(name, "layer", None, Outcome(NOT_SUPPORTED, note=refused[name]))
                continue
            subject = make_subject(
                kernel,
                dict(sizes),
                device=device,
                tokens=tuple(tokens),
                hidden_alignment=hidden_alignment,
            )
            for check in checks(subject):
                add(name, check.name, check.tokens, _outcome(check.run))
    return SelftestReport(kernel, _describe(device), tuple(rows))


def selftest(
    kernel: str = "auto",
    *,
    device: torch.device | str | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: Sequence[int] = TOKENS,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    format: str | Sequence[str] | None = None,
    file: TextIO | None = None,
) -> bool:
    """Print a table of checks of a kernel while they run; return whether none failed.

    Args:
        kernel: a kernel's name, or "auto" for the most preferred one that runs any of the layers.
        device: default the current CUDA device; without one the CPU, with small layers.
        layers: sizes by name, as keywords of `fp4moe.why_not`; default both main models' layers,
            every other activation, three with parameters, one with biases, and of each other
            format one with a gate, one without and, for MX, gpt-oss' form with biases. A layer
            that the kernel cannot run is listed with the reasons and is no failure.
        tokens: numbers of tokens.
        hidden_alignment: 128, 256 or 512: what the Blackwell kernel pads the hidden size to.
        format: a name of `fp4moe.formats.FORMATS`, or several: only the default layers of these.
        file: where to print; default standard output.

    Raises:
        UnsupportedError: no such kernel, alignment or format, or it runs none of the layers here.
        ShapeError: bad sizes or tokens, or a format beside layers.
    """
    file = sys.stdout if file is None else file
    device = present_device(device, caller="selftest")
    layers = _layers(device, layers, format)
    widths = [max(map(len, ("layer", *layers))), *WIDTHS[1:]]

    def show(cells: list[str]) -> None:
        line = "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True))
        print(line.rstrip(), file=file, flush=True)

    if device.type != "cuda":
        print("no GPU: this tests the CPU's reference kernels only", file=file)
    header: list[list[str]] = [HEADER]

    def on_row(row: SelftestRow) -> None:
        # With the first row, so that a refused call prints no empty table.
        while header:
            show(header.pop())
        show(row.cells())

    report = run_selftest(
        kernel,
        device=device,
        layers=layers,
        tokens=tokens,
        hidden_alignment=hidden_alignment,
        on_row=on_row,
    )
    print(report.summary, file=file)
    return report.passed


def _layers(
    device: torch.device,
    layers: Mapping[str, Mapping[str, Any]] | None,
    format: str | Sequence[str] | None,
) -> Mapping[str, Mapping[str, Any]]:
    if format is None:
        return default_layers(device) if layers is None else layers
    formats = (format,) if isinstance(format, str) else tuple(format)
    if layers is not None:
        advice = 'Give each of the layers its "format" instead.'
        must("selftest: format", "be None where layers are given", repr(format), advice)
    if not formats:
        must("selftest: format", "name a format", "none", f"Known are {', '.join(FORMATS)}.")
    for one in formats:
        check_choice("format", one, FORMATS, caller="selftest")
    return default_layers(device, formats)


def _check_arguments(kernel: str, tokens: Sequence[int], hidden_alignment: int) -> None:
    check_kernel_name(kernel, caller="selftest")
    if not any(tokens) or min(tokens) < 0:
        rule = "be numbers of 0 or more, one of them above 0"
        must("selftest: tokens", rule, tuple(tokens), "Pass such as (0, 1, 7).")
    check_choice("hidden_alignment", hidden_alignment, HIDDEN_ALIGNMENTS, caller="selftest")


def _choose(
    kernel: str, device: torch.device, layers: Mapping[str, Mapping[str, Any]]
) -> tuple[str, dict[str, str]]:
    """Return the kernel for all layers, and the reasons by name of the layers that it cannot run.

    "auto" is the most preferred of the kernels that it means for any of the layers.
    """
    capability = current_capability(device)
    found = {}
    for name, sizes in layers.items():
        why_not("reference", **sizes)  # it can all: only the sizes are checked
        found[name] = Layer(**{**sizes, "activation": str(get_activation(sizes["activation"]))})
    automatic = {choose_kernel(kernel, layer, capability)[0] for layer in found.values()}
    chosen = next((name for name in KERNELS if name in automatic), None)
    refused = {
        name: "; ".join(choose_kernel(chosen or kernel, layer, capability)[1])
        for name, layer in found.items()
    }
    if chosen is None:
        listed = ". ".join(f"{name}: {why}" for name, why in refused.items()) or "no layers"
        what = f"kernel {kernel!r} cannot run a layer on {_describe(device)}"
        refuse("selftest", what, listed, "See fp4moe.why_not.")
    return chosen, {name: why for name, why in refused.items() if why}


def _outcome(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    # A report on a kernel: what it raises is a finding like any other, whatever the library.
    except Exception as error:
        return Outcome(FAILED, note=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    capability = current_capability(device)
    number = ".".join(map(str, capability)) if capability else "unknown"
    return f"{torch.cuda.get_device_name(device)} (compute capability {number})"
