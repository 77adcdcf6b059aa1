"""Write the tables of measured results; plots.py draws them.

    python benchmarks/tables.py benchmarks/results/h200.json
    python benchmarks/tables.py benchmarks/results/h200_skewed.json
    python benchmarks/tables.py benchmarks/results/h200_generate.json
    python benchmarks/tables.py benchmarks/results/h200_formats.json

Prints Markdown. The best peer is the fastest of Marlin, Humming as shipped and vLLM's bf16 Triton
kernel, measured with balanced routing on another H200 a day before, not in this run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from typing import Any

TITLES = {"gemma4": "Gemma4-26B-A4B", "nano": "Nemotron-3-Nano-30B"}
PEERS = {
    "gemma4": {1: 34.8, 4: 60.6, 16: 126, 64: 187, 256: 237, 1024: 368, 4096: 1132},
    "nano": {1: 38.0, 4: 69.3, 16: 164, 64: 276, 256: 355, 1024: 513, 4096: 1437},
}
SHORT = ("auto", "humming", "grouped_mm")
MODELS = {"gemma4": "Gemma4-26B-A4B", "nemotron": "Nemotron-3-Nano-30B"}
SETTINGS = {
    "huggingface": "Hugging Face",
    "replace_moe": "`replace_moe`",
    "fused": '`routing="fused"`',
    "backend": "`fp4moe.backend`",
}
# Experts alone: no activation, no quantisation of hidden and no weighted sum.
SCALED = "scaled_grouped_mm x2"
COLUMNS = ("auto", "triton", "humming", "grouped_mm", "grouped_mm compiled", "batched_mm")


def table(results: dict[str, Any], shape: str, short: bool = False) -> str:
    """Return microseconds by tokens and kernel, and the ratio of the best peer to auto.

    Args:
        results: of `fp4moe bench --json`.
        shape: a key of TITLES.
        short: only the kernels of SHORT, where a best peer is known.
    """
    rows, peers = results["rows"], results.get("routing", "balanced") == "balanced"
    us = {(row["kernel"], row["tokens"]): row["us"] for row in rows if row["shape"] == shape}
    floor = {row["tokens"]: row["floor_us"] for row in rows if row["shape"] == shape}
    if short:
        floor = {tokens: us for tokens, us in floor.items() if tokens in PEERS[shape]}
    columns = SHORT if short else COLUMNS
    kernels = [name for name in columns if any(name == kernel for kernel, _ in us)]
    titles = [f"{TITLES[shape]}, T", "floor", *kernels, *["best peer", "peer / auto"] * peers]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for tokens in floor:
        cells = [f"{us[name, tokens]:.1f}" if (name, tokens) in us else "" for name in kernels]
        cells = [str(tokens), f"{floor[tokens]:.1f}", *cells]
        if peers:
            peer = PEERS[shape].get(tokens)
            both = peer and ("auto", tokens) in us
            cells += [str(peer or ""), f"{peer / us['auto', tokens]:.2f}" if both else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_format(results: dict[str, Any], shape: str) -> str:
    """Return microseconds of auto by tokens and format, with the share of the floor, and peers.

    Args:
        results: of `fp4moe bench --format ... --json`. shape: a key of TITLES.
    """
    rows = [row for row in results["rows"] if row["shape"] == shape]
    own = {(r["format"], r["tokens"]): r for r in rows if r["kernel"] == "auto"}
    peer = {r["tokens"]: r["us"] for r in rows if r["kernel"] == SCALED and r["format"] == "fp8"}
    formats = list(dict.fromkeys(name for name, _ in own))
    titles = [f"{TITLES[shape]}, T", *(f"`{name}`" for name in formats), "torch, two FP8 GEMMs"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for tokens in dict.fromkeys(tokens for _, tokens in own):
        found = [own.get((name, tokens)) for name in formats]
        cells = [f"{r['us']:.1f} ({r['floor_us'] / r['us']:.2f})" if r else "" for r in found]
        other = f"{peer[tokens]:.1f}" if tokens in peer else ""
        lines.append(f"| {' | '.join([str(tokens), *cells, other])} |")
    return "\n".join(lines)


def whole_models(rows: list[dict[str, Any]], model: str, value: str = "decode_ms") -> str:
    """Return milliseconds by batch and setting, and how many times faster than Hugging Face.

    A ratio of numbers from two calls, which had other hosts, has a ~.

    Args:
        rows: of `benchmarks/generate.py --json`.
        model: a key of MODELS.
        value: "decode_ms", a step, or "prefill_ms".
    """
    found = {(r["batch"], r["setting"]): r for r in rows if r["model"] == model and r[value]}
    lines = [
        f"| {MODELS[model]}, batch | {' | '.join(SETTINGS.values())} |",
        "|" + "---|" * (len(SETTINGS) + 1),
    ]
    for batch in sorted({batch for batch, _ in found}):
        base = found.get((batch, "huggingface"))
        cells = []
        for setting in SETTINGS:
            own = found.get((batch, setting))
            cells.append(f"{own[value]:.2f}" if own else "")
            if own and base and setting != "huggingface":
                about = "~" * (own.get("call") != base.get("call"))
                cells[-1] += f" ({about}{base[value] / own[value]:.2f}x)"
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(rows: list[dict[str, Any]]) -> str:
    """Return the README's table: memory and a step of both models, and how much is gained.

    Args:
        rows: of `benchmarks/generate.py --json`.
    """
    found = {(r["model"], r["batch"], r["setting"]): r for r in rows}
    lines = ["| | Hugging Face, bf16 | `replace_moe`, NVFP4 | gain |", "|---|---|---|---|"]
    for model, title in MODELS.items():
        before, after = (found[model, 1, setting] for setting in ("huggingface", "replace_moe"))
        sizes = before["model_gib"], after["model_gib"]
        cells = [f"{size:.1f} GiB" for size in sizes]
        lines.append(f"| {title}, memory of the model | {' | '.join(cells)} "
                     f"| {sizes[0] / sizes[1]:.1f}x |")  # fmt: skip
        for batch in (1, 16, 64):
            before, after = (found[model, batch, s] for s in ("huggingface", "replace_moe"))
            about = "~" * (before.get("call") != after.get("call"))
            gain = f"{about}{before['decode_ms'] / after['decode_ms']:.1f}x"
            times = f"{before['decode_ms']:.1f} | {after['decode_ms']:.1f}"
            lines.append(f"| {title}, batch {batch}, ms a step | {times} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--short", action="store_true", help="the columns of docs/performance.md")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    for row in results["rows"]:
        if "kernel" in row:
            row["kernel"] = row["kernel"].removeprefix("peer:")
    if "setting" in results["rows"][0]:
        for value, model in itertools.product(("decode_ms", "prefill_ms"), MODELS):
            print(f"{value}\n\n{whole_models(results['rows'], model, value)}\n")
        print(gains(results["rows"]))
        return
    several = len({row.get("format") for row in results["rows"]}) > 1
    for shape in TITLES:
        made = by_format(results, shape) if several else table(results, shape, args.short)
        print(made, end="\n\n")


if __name__ == "__main__":
    main()
