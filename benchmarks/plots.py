"""Draw the pictures of the documentation from the measured results.

    python benchmarks/plots.py [--out docs/images]

Reads h200.json, h200_formats.json, h200_generate.json and the table of small_models.md beside it.
Equal numbers give equal files.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
from typing import Any

import tables

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
IMAGES = RESULTS.parents[1] / "docs" / "images"
SHOWN = ("auto", "humming", "grouped_mm", "grouped_mm compiled", "batched_mm")
SIZES = {"gemma4": (128, 2816, 704, True), "nano": (128, 2688, 1856, False)}


def figure(columns: int, width: float = 10.0, height: float = 3.8) -> Any:
    """Return (figure, axes) whose file holds text as text and no date."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fp4moe", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), squeeze=False)


def title_of(results: dict[str, Any]) -> str:
    """Return the card, the date and the versions of a file."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['gpu']}, {results['date']}, {versions}"


def plain_numbers(axis: Any, across: Any, up: Any) -> None:
    """Put these ticks, written out, on logarithmic axes."""
    for ticks, place in ((across, axis.xaxis), (up, axis.yaxis)):
        place.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        place.set_ticks([], minor=True)
    axis.grid(True, linewidth=0.2)


def speed(results: dict[str, Any]) -> Any:
    """Microseconds of one layer over tokens, with the floor."""
    drawn, axes = figure(2)
    for axis, (shape, title) in zip(axes[0], tables.TITLES.items(), strict=True):
        rows = [row for row in results["rows"] if row["shape"] == shape]
        for kernel in SHOWN:
            points = [(row["tokens"], row["us"]) for row in rows if row["kernel"] == kernel]
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=kernel)
        floor = sorted({(row["tokens"], row["floor_us"]) for row in rows})
        axis.loglog(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
        axis.set(title=title, xlabel="tokens", ylabel="microseconds a layer")
        plain_numbers(axis, (1, 16, 256, 4096), (10, 100, 1000, 10000))
    axes[0][0].legend(fontsize=8)
    drawn.suptitle(title_of(results), fontsize=8)
    return drawn


def formats(results: dict[str, Any]) -> Any:
    """Microseconds of one layer over tokens, by number format; dashed: each format's floor."""
    drawn, axes = figure(2)
    for axis, (shape, title) in zip(axes[0], tables.TITLES.items(), strict=True):
        rows = [r for r in results["rows"] if r["shape"] == shape and r["kernel"] == "auto"]
        for format in dict.fromkeys(row["format"] for row in rows):
            own = sorted(
                (r["tokens"], r["us"], r["floor_us"]) for r in rows if r["format"] == format
            )
            tokens, us, floor = zip(*own, strict=True)
            (line,) = axis.loglog(tokens, us, marker="o", markersize=3, label=format)
            axis.loglog(tokens, floor, "--", linewidth=0.7, color=line.get_color())
        axis.set(title=title, xlabel="tokens", ylabel="microseconds a layer")
        plain_numbers(axis, (1, 16, 256, 4096), (10, 100, 1000, 10000))
    axes[0][0].legend(fontsize=8)
    drawn.suptitle(f"{title_of(results)}; dashed: the floor of each", fontsize=8)
    return drawn


def models(results: dict[str, Any]) -> Any:
    """Milliseconds a step of whole models, by batch."""
    drawn, axes = figure(2)
    for axis, (model, title) in zip(axes[0], tables.MODELS.items(), strict=True):
        rows = [row for row in results["rows"] if row["model"] == model and row["decode_ms"]]
        for setting, label in tables.SETTINGS.items():
            own = sorted((r["batch"], r["decode_ms"]) for r in rows if r["setting"] == setting)
            axis.loglog(*zip(*own, strict=True), marker="o", markersize=4, label=label.strip("`"))
        axis.set(title=title, xlabel="batch", ylabel="milliseconds a step")
        plain_numbers(axis, sorted({row["batch"] for row in rows}), (4, 8, 16, 32, 64, 128))
    axes[0][0].legend(fontsize=8)
    drawn.suptitle(title_of(results), fontsize=8)
    return drawn


def memory() -> Any:
    """Megabytes of one layer's experts, by format: exact sizes."""
    from fp4moe.formats import FORMATS

    drawn, axes = figure(2, height=3.0)
    for axis, (shape, (experts, hidden, inner, gated)) in zip(axes[0], SIZES.items(), strict=True):
        rows, halves = (1 + gated) * inner, 1 + gated
        sizes = {"bf16": 2.0 * experts * hidden * (rows + inner)}
        for name, format in FORMATS.items():
            parts = (format.shapes(experts, rows, hidden, halves),
                     format.shapes(experts, hidden, inner))  # fmt: skip
            sizes[name] = sum(d.itemsize * math.prod(n) for p in parts for d, n in p.values())
        bars = axis.barh(list(sizes), [size / 1e6 for size in sizes.values()], color="#00796b")
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=tables.TITLES[shape], xlabel="megabytes of one layer's experts")
        axis.invert_yaxis()
        axis.margins(x=0.15)
    return drawn


def accuracy(text: str) -> Any:
    """Bits per byte above bf16, with the standard error, by format.

    Args:
        text: small_models.md, whose table has a row for each format.
    """
    number = r"([+-][\d.]+) ± ([\d.]+)"
    row = rf"^\| (\w+) \| (W\dA\d+) \| [\d.]+ \| {number} \|[^|]*\| [\d.]+ \| {number} \|"
    rows = re.findall(row, text, re.MULTILINE)
    if not rows:
        raise SystemExit("plots: small_models.md must have the table of all formats")
    drawn, axes = figure(2, height=3.4)
    names = list(dict.fromkeys(row[0] for row in rows))
    for axis, title, at in zip(axes[0], ("Gemma4, small", "NemotronH, small"), (2, 4), strict=True):
        for shift, sixteen in ((-0.2, True), (0.2, False)):
            own = [row for row in rows if row[1].endswith("A16") == sixteen]
            places = [names.index(row[0]) + shift for row in own]
            axis.barh(
                places,
                [float(row[at]) for row in own],
                0.4,
                xerr=[float(row[at + 1]) for row in own],
                label="16-bit activations" if sixteen else "rounded activations",
            )
        axis.set(title=title, xlabel="bits per byte above bf16")
        axis.locator_params(axis="x", nbins=6)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.6)
    axes[0][0].legend(fontsize=8)
    return drawn


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=IMAGES)
    out = parser.parse_args().out
    layer, by_format, whole = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("h200", "h200_formats", "h200_generate")
    )
    made = {
        "speed": speed(layer),
        "formats": formats(by_format),
        "models": models(whole),
        "memory": memory(),
        "accuracy": accuracy((RESULTS / "small_models.md").read_text("utf-8")),
    }
    for name, drawn in made.items():
        drawn.tight_layout()
        drawn.savefig(out / f"{name}.svg", metadata={"Date": None})
        print(out / f"{name}.svg")


if __name__ == "__main__":
    main()
