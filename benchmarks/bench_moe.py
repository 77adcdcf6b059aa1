"""One layer of experts on this GPU, checked, against its floor and Hugging Face: `fp4moe bench`.

    python benchmarks/bench_moe.py --shape gemma4 --tokens 1 16 256 4096

Arguments are those of `fp4moe bench`; without a GPU it says so and measures nothing.
"""

import sys

import torch

from fp4moe.tools.cli import main

if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("bench_moe: needs a CUDA device; there is none, so nothing is measured.")
        sys.exit(0)
    sys.exit(main(["bench", *sys.argv[1:]]))
