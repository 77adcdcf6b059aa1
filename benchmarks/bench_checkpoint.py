"""Speed and peak memory of fp4moe.quantize_checkpoint on Gemma4-26B layers of random bfloat16.

    python benchmarks/bench_checkpoint.py --layers 2

GB counts the bfloat16 tensors that are read. The source is written first and is then in the page
cache as far as that holds it; the copy is on the disk (fsync) when the clock stops. Peak memory is
that of the process, with the pages of the source that it has mapped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import safetensors.torch
import torch
from machine import cpu_name

EXPERTS, HIDDEN, INTERMEDIATE = 128, 2816, 704


def write_source(folder: pathlib.Path, layers: int) -> tuple[int, int]:
    """One file per layer; returns the bytes of all tensors and of a layer."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gemma4_text"}')
    weight_map, size = {}, 0
    for layer in range(layers):
        name = f"model.layers.{layer}.experts"
        shapes = {
            f"{name}.gate_up_proj": (EXPERTS, 2 * INTERMEDIATE, HIDDEN),
            f"{name}.down_proj": (EXPERTS, HIDDEN, INTERMEDIATE),
        }
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
        for tensor in tensors.values():
            tensor.normal_(std=0.02)
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        safetensors.torch.save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return size * layers, size


def measure(source: str, target: str, method: str) -> None:
    """Run once in this process and print seconds, peak bytes and bytes before, as JSON."""
    import fp4moe

    before = peak_memory()
    start = time.perf_counter()
    fp4moe.quantize_checkpoint(source, target, method=method, max_shard_bytes=1e9, progress=False)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_memory(), before]))


def peak_memory() -> int:
    """Largest resident size of this process in bytes; ru_maxrss may be that of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="1.5 GB each")
    parser.add_argument("--methods", nargs="+", default=["max", "mse"])
    parser.add_argument("--directory", help="where to write; default the temporary directory")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return 0
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.directory))
    try:
        total, layer = write_source(folder / "source", args.layers)
        print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(f"{total / 1e9:.2f} GB bfloat16 in files of {layer / 1e9:.2f} GB, one layer each")
        for method in args.methods:
            # A process of its own each, for its own peak.
            command = [sys.executable, __file__, "--measure", folder / "source", folder / method]
            done = subprocess.run([*command, method], check=True, stdout=subprocess.PIPE)
            seconds, peak, before = json.loads(done.stdout)
            print(
                f"{method:4s} {seconds:7.1f} s, {total / 1e9 / seconds * 60:6.2f} GB/min, peak "
                f"{peak / 1e9:.2f} GB, {before / 1e9:.2f} GB of it before",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
