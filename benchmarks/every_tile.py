"""Run every shipped tile of the Triton kernels once, for compute-sanitizer; needs a CUDA device.

compute-sanitizer --tool memcheck python benchmarks/every_tile.py
compute-sanitizer --tool memcheck python benchmarks/every_tile.py 1/4  # one of four parts
"""

import itertools
import sys

import torch

from fp4moe.formats import FORMATS
from fp4moe.kernels.measured import SHIPPED, read
from fp4moe.kernels.triton.kernel import TRITON, run_with
from fp4moe.kernels.triton.one_token import run_one_token
from fp4moe.kernels.triton.tiles import fitted
from fp4moe.testing import make_layer

TOKENS = (1, 37, 700)


def main() -> None:
    """Odd sizes, a strided input, ids outside the window, gated and not, once with biases."""
    configs = sorted({c for layer in read(SHIPPED) for c in layer.tiles.values()}, key=str)
    part, parts = map(int, sys.argv[1].split("/")) if sys.argv[1:] else (1, 1)
    configs = configs[part - 1 :: parts]
    one_token = [layer.one_token for layer in read(SHIPPED) if layer.one_token]
    one_token = one_token if torch.cuda.get_device_capability() >= (9, 0) else []
    gpt_oss = "silu(alpha=1.702,beta=1,limit=7)"
    forms = (("gelu_tanh", True), ("relu2", False), (gpt_oss, True))
    for format, (activation, gated) in itertools.product(FORMATS, forms):
        options = {"num_experts": 8, "expert_offset": 2, "biased": activation == gpt_oss}
        weights = make_layer(
            5, 336, 208, activation, gated, format=format, device="cuda", **options
        )
        prepared = TRITON.prepare(weights, hidden_alignment=256)
        for config in sorted({fitted(c, format, gated) for c in configs}, key=str):
            for tokens in TOKENS:
                x = torch.randn(tokens, 400, device="cuda").bfloat16()[:, 32:368]
                ids = torch.randint(-1, 9, (tokens, 4), device="cuda")
                routing_weights = torch.rand(tokens, 4, device="cuda")
                run_with(config, prepared.call(x, ids, routing_weights))
        for tiles in one_token if format == "nvfp4" else []:
            run_one_token(tiles, prepared.call(x[:1], ids[:1], routing_weights[:1]))
    torch.cuda.synchronize()
    print(f"{len(configs)} configs, each fitted to {len(FORMATS)} formats")


if __name__ == "__main__":
    if torch.cuda.is_available():
        main()
    else:
        sys.exit("every_tile: needs a CUDA device; there is none.")
