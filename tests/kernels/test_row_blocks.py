"""Decoding by blocks of rows: the bits of the formats' dequantize, and the definition's sums."""

import pytest
import torch

from fp4moe.formats import FORMATS
from fp4moe.kernels import row_blocks
from fp4moe.kernels.row_blocks import RowBlocks
from fp4moe.module import FusedExperts
from fp4moe.reference import reference
from fp4moe.testing import make_layer

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 5, 160, 288, 9


@pytest.fixture(params=[1 << 21, 1000], ids=["one block", "cut blocks"])
def block_size(request, monkeypatch):
    """Blocks of all rows, and of some rows of which the last ones are left over."""
    monkeypatch.setattr(row_blocks, "FEW", request.param)
    monkeypatch.setattr(row_blocks, "MANY", request.param)


def identity(size):
    return torch.eye(size, dtype=torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_and_scale_has_the_bits_of_dequantize(format, block_size):
    """A product with the identity has the weights themselves, for every byte that can be stored."""
    known = FORMATS[format]
    generator = torch.Generator().manual_seed(0)
    stored = known.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN, 2)
    codes, scales = stored.packed.view(torch.uint8), stored.block_scale
    codes.random_(0, 256, generator=generator)
    if scales.dtype == torch.float32:
        scales.uniform_(0.5, 2, generator=generator)
    else:
        # Scales have no sign, and 127 is NaN in e4m3; a product may flush what is below 2^-126.
        low, high = (20, 230) if scales.dtype == torch.uint8 else (0, 127)
        scales.view(torch.uint8).random_(low, high, generator=generator)
    if format.startswith(("fp8", "mxfp8")):
        codes[(codes & 127) == 127] = 0
    stored.global_scale.uniform_(0.5, 2, generator=generator)
    expected = known.dequantize(stored, torch.float32, 2)
    matrix = RowBlocks(stored, known, 2)
    for first, count in ((0, INTERMEDIATE), (INTERMEDIATE, INTERMEDIATE - 7), (3, 1)):
        got = matrix.product(identity(HIDDEN), 2, first, count).T
        assert torch.equal(got, expected[2, first : first + count])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gated", [True, False])
def test_the_layer_is_the_definition(format, gated, block_size):
    """Padded or not, with biases; float32 sums of up to 288 products, in any order.

    A product of n terms may be off by n 2^-24 of the sum of their magnitudes, which is about
    sqrt(n) of a result's size: two of them by 2 * 288^1.5 * 2^-24 = 6e-4 at the worst. Random
    roundings leave 2 * 288^0.5 * 2^-24 = 2e-6; five times that is the limit.
    """
    generator = torch.Generator().manual_seed(1)
    weights = make_layer(
        EXPERTS, 150, INTERMEDIATE - 8, "gelu_tanh", gated,
        format=format, biased=True, generator=generator,
    )  # fmt: skip
    x = torch.randn(TOKENS, 150, generator=generator, dtype=torch.float32)
    # Expert 4 has no token and -1 is nobody's.
    ids = torch.rand(TOKENS, 4, generator=generator).topk(2).indices
    ids[3, 1] = -1
    routing = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float32)
    for held in (weights, weights.padded(hidden_multiple=256, intermediate_multiple=256)):
        layer = FusedExperts(held, kernel="reference", top_k=2)
        for n in (0, 1, TOKENS):
            got, want = (
                layer(x[:n], ids[:n], routing[:n]),
                reference(x[:n], held, ids[:n], routing[:n]),
            )
            torch.testing.assert_close(
                got, want, rtol=0, atol=1e-5 * (float(want.abs().max()) if n else 1)
            )


def test_codes_that_begin_at_an_odd_byte():
    """As a tensor of a file may: two bytes are looked up at once, which begin at an even one."""
    known = FORMATS["nvfp4"]
    stored = known.quantize(torch.randn(1, 64), torch.ones(()), "max")
    shifted = torch.empty(33, dtype=torch.uint8)[1:].view(1, 1, 32)
    shifted.copy_(stored.packed)
    moved = known.container(shifted, stored.block_scale[None], torch.ones(1))
    got = RowBlocks(moved, known).product(identity(64), 0, 0, 1)[:, 0]
    assert torch.equal(got, known.dequantize(stored, torch.float32)[0])


def test_tables_survive_inference_mode():
    """The first call may be one under inference_mode; tables and scratch serve all later ones."""
    row_blocks._code_table.cache_clear()
    row_blocks._scale_values.cache_clear()
    layer = FusedExperts(make_layer(4, 32, 32), kernel="reference", top_k=2)
    inputs = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    with torch.inference_mode():
        expected = layer(*inputs)
    x = inputs[0].requires_grad_()
    got = layer(x, *inputs[1:])
    got.sum().backward()
    assert torch.equal(got, expected) and x.grad is not None
