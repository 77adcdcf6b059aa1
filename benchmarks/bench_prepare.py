"""Speed and memory of laying out one layer's expert weights, after a bitwise round trip.

    python benchmarks/bench_prepare.py
    python benchmarks/bench_prepare.py --intermediate 1856 --hidden 2688 --ungated

GB/s counts the bytes of the unpadded NVFP4 weights once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from machine import cpu_name

from fp4moe.kernels.flashinfer.block_scales import deinterleave_128x4, interleave_128x4
from fp4moe.kernels.flashinfer.rows import (
    down_row_index,
    gate_up_row_index,
    inverse_index,
    permute_rows,
)
from fp4moe.padding import pad_matrix, round_up, trim_matrix

Matrices = dict[str, torch.Tensor]


class Layer:
    """Sizes and row orders of one layer's matrices; hidden is padded to a multiple of 256."""

    def __init__(self, hidden: int, intermediate: int, gated: bool) -> None:
        self.halves = {"gate_up": 1 + gated, "down": 1}
        self.sizes = {
            "gate_up": ((1 + gated) * intermediate, hidden),
            "down": (hidden, intermediate),
        }
        columns = round_up(intermediate, 64 if gated else 128)
        rows = round_up(hidden, 256)
        self.padded = {"gate_up": ((1 + gated) * columns, rows), "down": (rows, columns)}
        self.index = {
            "gate_up": gate_up_row_index(self.padded["gate_up"][0], gated),
            "down": down_row_index(rows),
        }

    def random(self, experts: int, device: torch.device) -> Matrices:
        return {
            f"{gemm} {part}": torch.randint(
                0, 256, (experts, rows, columns // each), dtype=torch.uint8, device=device
            )
            for gemm, (rows, columns) in self.sizes.items()
            for part, each in (("scales", 16), ("packed", 2))
        }

    def prepare(self, matrices: Matrices) -> Matrices:
        """Pad, reorder and interleave; scales first, so that their copies are gone at the peak."""
        out = {}
        for name, matrix in sorted(matrices.items(), key=lambda item: "packed" in item[0]):
            gemm, part = name.split()
            rows, columns = self.padded[gemm]
            columns //= 16 if part == "scales" else 2
            if matrix.shape[1:] != (rows, columns):
                matrix = pad_matrix(matrix, rows, columns, self.halves[gemm])
            matrix = permute_rows(matrix, self.index[gemm])
            out[name] = interleave_128x4(matrix) if part == "scales" else matrix
        return out

    def restore(self, matrices: Matrices) -> Matrices:
        out = {}
        for name, matrix in matrices.items():
            gemm, part = name.split()
            rows, columns = self.padded[gemm]
            if part == "scales":
                matrix = deinterleave_128x4(matrix, rows, columns // 16)
            matrix = permute_rows(matrix, inverse_index(self.index[gemm]))
            rows, columns = self.sizes[gemm]
            columns //= 16 if part == "scales" else 2
            if matrix.shape[1:] != (rows, columns):
                matrix = trim_matrix(matrix, rows, columns, self.halves[gemm])
            out[name] = matrix
        return out


def memory(device: torch.device, peak: bool) -> int:
    """Bytes in use now, or at most so far."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return used(device)
    name = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def best_seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def size(matrices: Matrices) -> int:
    return sum(matrix.nbytes for matrix in matrices.values())


def main() -> int:
    """Print the table; 1 where the round trip changes a byte."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--ungated", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    layer = Layer(args.hidden, args.intermediate, not args.ungated)
    layer.restore(layer.prepare(layer.random(1, device)))  # what the first call loads
    given = layer.random(args.experts, device)

    before = memory(device, peak=False)
    prepared: Matrices = {}
    first = best_seconds(lambda: prepared.update(layer.prepare(given)), device)
    peak = memory(device, peak=True) - before
    restored = layer.restore(prepared)
    if different := [name for name in given if not torch.equal(given[name], restored[name])]:
        print(
            f"bench_prepare: {', '.join(different)} came back changed; no speed is worth printing."
        )
        return 1
    del restored

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in prepared.items())
    print(f"{shapes}; the round trip is exact")
    gigabytes = size(given) / 1e9
    prepare = best_seconds(lambda: layer.prepare(given), device, args.repeats)
    restore = best_seconds(lambda: layer.restore(prepared), device, args.repeats)
    for label, time_ in (("prepare, first", first), ("prepare", prepare), ("restore", restore)):
        print(f"{label:16s} {time_:8.3f} s {gigabytes / time_:8.2f} GB/s")
    result = size(prepared) / 1e6
    print(f"peak over the input {peak / 1e6:.0f} MB; the result is {result:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
