"""An NVFP4 Linear by FlashInfer's mm_fp4 on a GPU that has it; README.md beside this says how."""

from __future__ import annotations

import pytest
import torch

import fp4moe
from fp4moe.formats import NVFP4
from fp4moe.kernels import current_capability
from fp4moe.kernels.flashinfer.linear import DEVICES
from fp4moe.testing import relative_error

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not DEVICES.include(current_capability()), reason="needs compute capability 10.x or 12.x"
    ),
]
# The output is rounded to 2^-9; approximate reciprocals move a few codes across a tie. Rounding all
# of the input anew would give 0.095 x sqrt(2).
LIMIT = 1e-2


@pytest.mark.parametrize("tokens", [1, 7, 128, 1000])
@pytest.mark.parametrize("size", [(100, 48), (2816, 4096), (8192, 2816), (10304, 2688)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers(size, dtype, tokens):
    weight = torch.randn(size, device="cuda") / size[1] ** 0.5
    bias = torch.randn(size[0], device="cuda")
    q = fp4moe.quantize_nvfp4(weight)
    parts = q.packed, q.block_scale, q.global_scale
    module = fp4moe.NVFP4Linear(*parts, bias, kernel="flashinfer")
    x = torch.randn(tokens, size[1], device="cuda").to(dtype)
    rounded = NVFP4.round_activation(x.float(), x.float().abs().amax() / 2688)
    want = rounded @ fp4moe.dequantize_nvfp4(q).T + bias.to(dtype).float()
    assert relative_error(module(x), want) < LIMIT
    assert torch.equal(module(x), module(x))


def test_a_captured_call():
    q = fp4moe.quantize_nvfp4(torch.randn(256, 128, device="cuda"))
    module = fp4moe.NVFP4Linear(q.packed, q.block_scale, q.global_scale, kernel="flashinfer")
    x = torch.randn(4, 128, device="cuda").bfloat16()
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = module(x)
    graph.replay()
    assert torch.equal(got, expected)
