"""FP8 experts of FlashInfer's CUTLASS on a GPU that has them; README.md beside this says how."""

from __future__ import annotations

import pytest
import torch
from flashinfer_formats_layers import expected_of_cutlass, layer
from fused_layers import tokens

from fp4moe import FusedExperts
from fp4moe.kernels import current_capability, get_kernel
from fp4moe.testing import relative_error

CUTLASS = get_kernel("flashinfer_cutlass")
CAPABILITY = current_capability()
FP8S = [
    format for format in ("fp8", "fp8_block") if CUTLASS.devices_for(format).include(CAPABILITY)
]

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not FP8S, reason="needs compute capability 8.9, 9.0, 10.x or 12.x"),
]
# Sums in another order move values across a rounding boundary of bfloat16, and a few of these
# across one of e4m3. Rounding all of them anew would give 0.027 x sqrt(2).
LIMIT = 2e-2
FORMS = [("silu", True), ("gelu", True), ("relu2", False), ("identity", False)]
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"


def compare(weights, count):
    call = tokens(count, weights)
    got = FusedExperts(weights.to("cuda"), CUTLASS.name)(*(tensor.cuda() for tensor in call))
    assert relative_error(got.cpu(), expected_of_cutlass(weights, call, rounds=True)) < LIMIT


@pytest.mark.parametrize("count", [1, 7, 128, 1000])
@pytest.mark.parametrize("hidden, intermediate", [(256, 192), (2688, 1856), (2816, 704)])
@pytest.mark.parametrize("activation, gated", FORMS)
@pytest.mark.parametrize("format", FP8S or ["fp8"])
def test_numbers(format, activation, gated, hidden, intermediate, count):
    compare(layer(format, hidden, intermediate, activation, gated, experts=8), count)


@pytest.mark.parametrize("format", FP8S or ["fp8"])
def test_gpt_oss(format):
    compare(layer(format, 2880, 2880, OPENAI, experts=8, biased=True), 128)


@pytest.mark.parametrize("format", FP8S or ["fp8"])
def test_an_expert_twice_in_a_row(format):
    weights = layer(format, 256, 192, experts=8)
    x, ids, routing = tokens(300, weights)
    ids[:, 1] = ids[:, 0]
    module = FusedExperts(weights.to("cuda"), CUTLASS.name)
    got = module(x.cuda(), ids.cuda(), routing.cuda()).cpu()
    want = expected_of_cutlass(weights, (x, ids, routing), rounds=True)
    assert relative_error(got, want) < LIMIT
    assert torch.equal(module(x.cuda(), ids.cuda(), routing.cuda()).cpu(), got)
