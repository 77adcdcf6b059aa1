"""FP8, MXFP8 and MXFP4 experts on a Blackwell GPU; README.md beside this says how to run it."""

from __future__ import annotations

import pytest
import torch
from flashinfer_formats_layers import FORMS, GIVEN, TRTLLM, expected, from_logits, layer
from fused_layers import tokens

from fp4moe import FusedExperts
from fp4moe.formats import FORMATS
from fp4moe.kernels import current_capability
from fp4moe.reference import reference
from fp4moe.testing import relative_error

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        current_capability() not in ((10, 0), (10, 3)),
        reason="needs compute capability 10.0 or 10.3",
    ),
]
# Approximate reciprocals, and sums in another order, move values across a rounding boundary of
# e4m3. Rounding all of them anew would give 0.027 x sqrt(2), a wrong layout more than 0.2.
LIMIT = 2e-2
SIZES = [(256, 192), (2688, 1856), (2816, 704), (2880, 2880)]
OPENAI = "silu(alpha=1.702,beta=1,limit=0.7)"


def library():
    from fp4moe.kernels.flashinfer.library import library

    return library()


@pytest.mark.parametrize("count", [1, 7, 128, 1000])
@pytest.mark.parametrize("hidden, intermediate", SIZES)
@pytest.mark.parametrize("format, activation, gated", FORMS)
def test_numbers(format, activation, gated, hidden, intermediate, count):
    weights = layer(format, hidden, intermediate, activation, gated, experts=8)
    call = tokens(count, weights)
    want = expected(weights, call)
    if GIVEN[format] in library().arguments:
        got = FusedExperts(weights.to("cuda"), TRTLLM.name)(*(t.cuda() for t in call))
        assert relative_error(got.cpu(), want) < LIMIT
    got, call = from_logits(weights, count, device="cuda")
    assert relative_error(got.cpu(), expected(weights, call)) < LIMIT


@pytest.mark.parametrize("count", [1, 128])
def test_gpt_oss(count):
    weights = layer("mxfp4", 2880, 2880, OPENAI, experts=8, biased=True)
    call = tokens(count, weights)
    got = FusedExperts(weights.to("cuda"), TRTLLM.name)(*(t.cuda() for t in call))
    assert relative_error(got.cpu(), expected(weights, call)) < LIMIT


@pytest.mark.parametrize("count", [1, 128])
def test_gpt_oss_with_16_bit_activations(count):
    weights = layer("mxfp4", 2880, 2880, OPENAI, experts=8, biased=True)
    call = tokens(count, weights)
    got = FusedExperts(weights.to("cuda"), "flashinfer_trtllm_w4a16")(*(t.cuda() for t in call))
    # Roundings to bfloat16 alone: a third of rounding to e4m3 would show.
    assert relative_error(got.cpu(), reference(call[0], weights, *call[1:])) < 1e-2


def test_the_librarys_mxfp8():
    """But for blocks whose largest value is 448 x 2^k, where its reciprocal is approximate."""
    x = torch.randn(128, 2688, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = library().module.mxfp8_quantize(x.cuda(), is_sf_swizzled_layout=False)
    scale = scale.view(torch.float8_e8m0fnu).float().cpu().view(128, -1).repeat_interleave(32, 1)
    want = FORMATS["mxfp8"].round_activation(x.float(), torch.ones(1))
    differ = (codes.cpu().float() * scale - want).ne(0)
    assert differ.float().mean() < 1e-2
