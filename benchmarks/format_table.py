"""Write what runs where: number format x activation x kernel x device, by the kernels' reasons.

    python benchmarks/format_table.py > benchmarks/results/formats.md

The same on every machine: packages are taken as installed. A test compares the file with this.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fp4moe.activations import Activation
from fp4moe.formats import FORMATS
from fp4moe.kernels import KERNELS, Kernel, Layer
from fp4moe.layer import capability_name

__all__ = ["document", "layer_of", "verdict"]

Capability = tuple[int, int] | None
DEVICES: tuple[Capability, ...] = (None, (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
# (hidden, intermediate, experts, top-k): Gemma4-26B-A4B where gated, Nemotron-3-Nano where not.
GATED, UNGATED = (2816, 704, 128, 8), (2688, 1856, 128, 6)
GPT_OSS = Activation("silu", alpha=1.702, beta=1.0, limit=7.0)
# Title, activation, whether it is gated, whether there are biases.
ACTIVATIONS: tuple[tuple[str, str, bool, bool], ...] = (
    ("gated silu", "silu", True, False),
    ("gated gelu_tanh", "gelu_tanh", True, False),
    ("gated gelu", "gelu", True, False),
    ("gated relu2", "relu2", True, False),
    ("gpt-oss (silu with alpha, beta, limit and biases)", str(GPT_OSS), True, True),
    ("gated silu with a limit", str(Activation("silu", limit=7.0)), True, False),
    ("gated silu_step", str(Activation("silu_step", limit=7.0)), True, False),
    ("gated silu_softcap", str(Activation("silu_softcap", alpha=4.0, beta=25.0)), True, False),
    ("relu2", "relu2", False, False),
    ("relu2 with biases", "relu2", False, True),
    ("relu", "relu", False, False),
    ("silu", "silu", False, False),
    ("gelu", "gelu", False, False),
    ("gelu_tanh", "gelu_tanh", False, False),
    ("identity", "identity", False, False),
)
# Where a kernel has run, by format. Plain torch runs wherever torch does.
HAS_RUN: dict[tuple[str, str], set[Capability]] = {
    **{("triton", format): {(9, 0)} for format in FORMATS},
    **{("hopper", format): {(9, 0)} for format in FORMATS if format != "fp8_block"},
    **{("triton_w8a8", format): {(9, 0)} for format in ("fp8", "fp8_channel", "fp8_block")},
    ("humming", "nvfp4"): {(9, 0)},
}
ANYWHERE = ("reference", "reference_w4a4")
RUNS, PROVED, FUSED, REFUSED = "runs", "proved", "proved, fused", "refused"
HEAD = """# What runs where, by number format

Written by `python benchmarks/format_table.py`; the test-suite compares it with the kernels.
Layers are those of Gemma4-26B-A4B (2816 x 704) with a gate and of Nemotron-3-Nano (2688 x 1856)
without, padded where a kernel wants it.

* *runs*: it has run on such a device, and its numbers were compared.
* *proved*: it has not. The tests compile it for that device, or hold its calls against the
  library's contract and an emulator of its kernels.
* *proved, fused*: the same, but only where the kernel chooses the experts (`routing="fused"`).
* numbers: refused, for the reasons of these numbers below.

Packages are taken as installed:
"""


def layer_of(format: str, activation: str, gated: bool, biased: bool) -> Layer:
    """Return the layer that a row is about."""
    sizes = GATED if gated else UNGATED
    return Layer(activation, gated, *sizes, format=format, biased=biased)


def verdict(kernel: Kernel, layer: Layer, capability: Capability) -> tuple[str, list[str]]:
    """Return (RUNS, PROVED, FUSED or REFUSED, the reasons); they leave out what the column says."""
    reasons = kernel.reasons_not_to_run(layer, capability, installed=True)
    if not reasons:
        ran = HAS_RUN.get((kernel.name, layer.format), ())
        return RUNS if kernel.name in ANYWHERE or capability in ran else PROVED, []
    routed = dataclasses.replace(layer, kernel_routes=True)
    if kernel.routes and not kernel.reasons_not_to_run(routed, capability, installed=True):
        return FUSED, []
    if reasons[0].startswith("needs compute capability"):
        return REFUSED, [re.sub(r", got (a CPU|[\d.]+)", "", reasons[0])]
    return REFUSED, reasons


def document() -> str:
    """Return the whole text."""
    reasons: list[str] = []
    needs = [f"`{k.name}` needs {k.needs}." for k in KERNELS.values() if k.needs]
    parts = [HEAD + "\n".join(f"* {each}" for each in needs)]
    parts += [f"## {format}\n\n{_table(format, reasons)}" for format in FORMATS]
    listed = "\n".join(f"{number}. {why}" for number, why in enumerate(reasons, 1))
    return "\n\n".join([*parts, f"## Reasons\n\n{listed}\n"])


def _table(format: str, reasons: list[str]) -> str:
    """Return the table of one format; `reasons` gets those that are new."""
    devices = [capability_name(device).removeprefix("a ") for device in DEVICES]
    lines = [_line("kernel", "activations", *devices), "|---" * (2 + len(devices)) + "|"]
    for kernel in KERNELS.values():
        # Activations of equal verdicts share a row.
        rows: dict[tuple[str, ...], list[tuple[str, list[list[str]]]]] = {}
        for title, *form in ACTIVATIONS if format in kernel.layouts else ():
            found = [verdict(kernel, layer_of(format, *form), device) for device in DEVICES]
            words, whys = zip(*found, strict=True)
            rows.setdefault(words, []).append((title, list(whys)))
        for words, members in rows.items():
            titles = ", ".join(title for title, _ in members)
            cells = [
                _numbers([whys[i] for _, whys in members], reasons) if word == REFUSED else word
                for i, word in enumerate(words)
            ]
            everything = len(members) == len(ACTIVATIONS)
            lines.append(_line(f"`{kernel.name}`", "all" if everything else titles, *cells))
    without = [f"`{k.name}`" for k in KERNELS.values() if format not in k.layouts]
    if without:
        lines.append(f"\nRefused by {', '.join(without)}: no layout for it.")
    return "\n".join(lines)


def _numbers(whys: list[list[str]], reasons: list[str]) -> str:
    """Return the numbers of some reasons, which join the others where they are new."""
    flat = dict.fromkeys(why for each in whys for why in each)
    reasons += [why for why in flat if why not in reasons]
    return ", ".join(str(number) for number in sorted(1 + reasons.index(why) for why in flat))


def _line(*cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(document(), end="")
