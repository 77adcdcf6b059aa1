"""fp4moe.testing: what its layers look like, and what an error counts."""

from __future__ import annotations

import math

import pytest
import torch

from fp4moe.errors import ShapeError
from fp4moe.formats import FORMATS
from fp4moe.layer import Layer
from fp4moe.reference import reference
from fp4moe.testing import float_weights, make_layer, random_codes, relative_error


def test_weights_have_the_sizes_dtype_and_scale_that_are_said():
    named = float_weights(3, 200, 120, dtype=torch.float16)
    assert {name: tuple(w.shape) for name, w in named.items()} == {
        "up": (3, 120, 200),
        "down": (3, 200, 120),
        "gate": (3, 120, 200),
    }
    assert all(w.dtype == torch.float16 for w in named.values())
    for weight in named.values():
        rms = weight.float().square().mean((1, 2)).sqrt() * weight.shape[2] ** 0.5
        # Sizes from 0.5 to 1.5; the RMS of 24,000 normal values is off by 1/sqrt(48,000) = 0.5 %,
        # times ten.
        assert ((rms > 0.475) & (rms < 1.575)).all() and len(set(rms.tolist())) == 3
    assert "gate" not in float_weights(1, 16, 16, gated=False)


def test_one_generator_gives_one_layer_and_options_reach_quantize():
    def made(seed, **options):
        return make_layer(
            2, 40, 24, "relu2", False, generator=torch.Generator().manual_seed(seed), **options
        )

    first, again, other = made(1), made(1), made(2)
    assert torch.equal(first.gate_up.packed, again.gate_up.packed)
    assert not torch.equal(first.gate_up.packed, other.gate_up.packed)
    assert first.metadata() == {
        "format": "nvfp4",
        "activation": "relu2",
        "gated": False,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_experts": 2,
        "expert_offset": 0,
    }
    part = made(1, num_experts=9, expert_offset=4, hidden_scale=0.5)
    assert (part.num_experts, part.expert_offset, part.hidden_scale.item()) == (9, 4, 0.5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_random_codes_are_a_layer_whose_outputs_are_near_1(format, gated):
    layer = Layer("gelu_tanh" if gated else "relu2", gated, 256, 128, 4, format=format)
    weights = random_codes(layer)
    assert weights.layer() == layer
    ids = torch.rand(200, 4).topk(2).indices
    out = reference(torch.randn(200, 256), weights, ids, torch.full((200, 2), 0.5))
    assert 0.1 < out.square().mean().sqrt() < 10


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_reaches_quantize(format):
    generator = torch.Generator().manual_seed(0)
    weights = make_layer(2, 64, 32, format=format, generator=generator)
    generator = torch.Generator().manual_seed(0)
    floats = float_weights(2, 64, 32, generator=generator)
    assert weights.format == format
    for name, got in weights.dequantize().items():
        # The coarsest are four bits: 1 / 6 of a block's largest value at each of them.
        assert 0.01 < relative_error(got, floats[name]) < 0.15


@pytest.mark.parametrize("gated", [True, False])
def test_random_codes_have_the_biases_of_the_layer(gated):
    layer = Layer("silu", gated, 64, 32, 3, biased=True)
    weights = random_codes(layer)
    assert weights.layer(2).biased and not random_codes(Layer("silu", gated, 64, 32, 3)).biased
    assert weights.gate_up_bias.shape == (3, 32 * (1 + gated)) and weights.down_bias.shape == (
        3,
        64,
    )
    # 288 values at least: the deviation of their deviation is below 0.5 / sqrt(2 * 288) = 0.021.
    both = torch.cat((weights.gate_up_bias.flatten(), weights.down_bias.flatten()))
    assert abs(float(both.std()) - 0.5) < 0.1


def test_random_codes_pad_nothing():
    with pytest.raises(ShapeError) as raised:
        random_codes(Layer("silu", True, 40, 64, 2))
    assert str(raised.value) == (
        "random_codes: hidden_size and intermediate_size must be multiples of 16; got 40 and 64. "
        "Round them up, or use make_layer, which pads."
    )


def test_an_error_is_a_ratio_of_norms():
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    actual = expected + torch.tensor([[0.0, 0.3], [0.4, 0.0]])
    assert relative_error(actual, expected) == pytest.approx(0.1, rel=1e-6)
    # A difference below float32 shows where both are float64; bfloat16 is not rounded further.
    wanted = torch.ones(10, dtype=torch.float64)
    assert relative_error(wanted + 1e-12, wanted) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(torch.ones(4).bfloat16() * 1.0078125, torch.ones(4)) == 0.0078125


def test_an_error_beside_nothing_and_of_nan():
    zeros, some = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
    assert relative_error(zeros, zeros) == 0
    assert relative_error(some, zeros) == math.inf
    nan = torch.tensor([math.nan, 1.0, 1.0])
    assert all(
        math.isnan(relative_error(*pair)) for pair in ((nan, some), (some, nan), (nan, zeros))
    )


@pytest.mark.parametrize("other", [(3, 1), (1,), (0, 3)], ids=str)
def test_shapes_that_would_be_broadcast_are_refused(other):
    with pytest.raises(ShapeError, match="relative_error: actual and expected must have one"):
        relative_error(torch.zeros(other), torch.zeros(other if 0 in other else (3, 3)))
