"""What `import fp4moe` costs beyond `import torch`.

    python benchmarks/bench_import.py

Each is a process of its own; they take turns, and the shortest of several runs counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from machine import cpu_name

STATEMENTS = ("import torch", "import fp4moe")


def seconds(statement: str) -> float:
    """Time of a process that does only this."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    print(f"{cpu_name()}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    # The first run writes byte code and warms the file cache.
    for _ in range(repeats + 1):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    first, second = (min(times[statement][1:]) for statement in STATEMENTS)
    for statement, shortest in zip(STATEMENTS, (first, second), strict=True):
        print(f"{statement:16s}{shortest:8.3f} s, shortest of {repeats}")
    print(f"{'ratio':16s}{second / first:8.3f}")


if __name__ == "__main__":
    main()
