"""How activations are rounded, format by format, against the same rules written by loops.

NVFP4's rules are in tests/test_reference.py and tests/test_intermediate_quantiser.py.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fp4moe.formats import FORMATS, FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, MXFP8

ROUNDED = [FP8, FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4]
ONE = torch.tensor(1.0)
GRID = [*torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()]
every_format = pytest.mark.parametrize("format", ROUNDED, ids=lambda f: f.name)


@functools.cache
def e4m3(value: float) -> float:
    """Return the nearest of e4m3's values, by distance; ties to the even code."""
    best = min(range(127), key=lambda code: (abs(abs(value) - GRID[code]), code % 2))
    return math.copysign(GRID[best], value)


def tensor_row(row, scale):
    encode = np.float32(1) / np.float32(scale)
    return [np.float32(e4m3(float(x * encode))) * np.float32(scale) for x in row]


def token_row(row, scale):
    amax = max(abs(x) for x in row)
    scale = max(amax / np.float32(448), np.float32(1) / np.float32(448 * 512))
    return tensor_row(row, scale)


def block_row(row, scale):
    out = []
    for start in range(0, len(row), 128):
        block = row[start : start + 128]
        scale = max(max(abs(x) for x in block), np.float32(1e-10)) / np.float32(448)
        out += [np.float32(e4m3(float(x / scale))) * scale for x in block]
    return out


def mx_row(row, scale):
    """In exact fractions: only e4m3 rounds."""
    out = []
    for start in range(0, len(row), 32):
        block = [Fraction(float(x)) for x in row[start : start + 32]]
        power = Fraction(2) ** -127
        while max(abs(x) for x in block) > 448 * power:
            power *= 2
        out += [Fraction(e4m3(float(x / power))) * power for x in block]
    return [float(x) for x in out]


BY_LOOPS = {
    "fp8": tensor_row,
    "fp8_channel": token_row,
    "fp8_block": block_row,
    "mxfp8": mx_row,
    "mxfp4": mx_row,
}


def activations(columns):
    x = torch.randn(9, columns)
    x[1] *= 1e-5
    x[2] *= 1e4
    x[3] *= torch.exp2(torch.randint(-20, 8, (columns,)).float())
    x[4] = 0
    x[5, : columns // 2] = 0
    x[6] = (x[6] * 16).round() / 16  # ties
    x[7] *= 1e-40
    x[8] = 448.0
    return x


@every_format
@pytest.mark.parametrize("columns", [128, 32, 200, 72, 5], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("scale", [1.0, 0.0031, 2.0**-5], ids=str)
def test_the_rule_by_loops(format, columns, scale):
    x = activations(columns)
    got = format.round_activation(x, torch.tensor([scale]))
    with np.errstate(over="ignore"):
        want = [BY_LOOPS[format.name](row, scale) for row in x.numpy()]
    assert got.dtype == torch.float32 and got.shape == x.shape
    assert torch.equal(got, torch.tensor(np.array(want, dtype=np.float32)))
    assert torch.equal(
        format.round_activation(x.view(3, 3, -1), torch.tensor([scale])), got.view(3, 3, -1)
    )
    assert torch.equal(format.round_intermediate(x, torch.tensor(scale)), got)


def test_on_paper():
    x = torch.tensor([[896.0, -17.0, 3.0, 0.1]])
    # Scale 2: quotients 448, -8.5 (a tie, to 8), 1.5 and 0.05, whose neighbours in e4m3 are
    # 0.046875 and 0.05078125.
    assert FP8.round_activation(x, torch.tensor([2.0])).tolist() == [[896.0, -16.0, 3.0, 0.1015625]]
    # Scale 1 saturates.
    assert FP8.round_activation(x, ONE).tolist() == [[448.0, -16.0, 3.0, 0.1015625]]
    for format in (FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4):
        assert format.round_activation(x, ONE).tolist() == [[896.0, -16.0, 3.0, 0.1015625]]


def test_blocks_have_scales_of_their_own_and_tokens_one():
    x = torch.zeros(1, 160)
    x[0, 0], x[0, 40], x[0, 140] = 448.0 * 2**13, 1.0, 1.0
    # 1 / 2^13 is below half of e4m3's smallest value, 2^-9.
    assert FP8_CHANNEL.round_activation(x, ONE)[0, [40, 140]].tolist() == [0.0, 0.0]
    assert FP8_BLOCK.round_activation(x, ONE)[0, [40, 140]].tolist() == [0.0, 1.0]
    assert MXFP8.round_activation(x, ONE)[0, [40, 140]].tolist() == [1.0, 1.0]


@every_format
def test_the_scale_is_read_only_where_it_is_stored(format):
    x = torch.randn(3, 64)
    pair = [format.round_activation(x, torch.tensor([s])) for s in (1.0, 0.0123)]
    assert torch.equal(*pair) == (format.activation_range is None)


def test_what_scales_of_activations_express():
    ranges = {name: format.activation_range for name, format in FORMATS.items()}
    assert ranges == {
        "nvfp4": 2688.0,
        "fp8": 448.0,
        **dict.fromkeys(["fp8_channel", "fp8_block", "mxfp8", "mxfp4"]),
    }
    x = torch.randn(8, 64) * 100
    top = x.abs().max()
    rounded = FP8.round_activation(x, top / FP8.activation_range)
    # Nothing is cut off, half a step of e4m3 is a sixteenth; below 2^-6 it is 2^-10 of the scale.
    assert ((rounded - x).abs() <= x.abs() / 16 + top / 448 * 2.0**-10).all()


@every_format
def test_zeros_stay_and_nan_shows(format):
    x = torch.zeros(2, 64)
    x[1, 3] = torch.nan
    got = format.round_activation(x, ONE)
    assert not got[0].any()
    assert got[1, 3].isnan()


@pytest.mark.parametrize("columns", [32, 96])
def test_modelopt_rounds_to_mxfp8_alike(columns):
    module = "modelopt.torch.quantization.qtensor.mxfp8_tensor"
    tensor = pytest.importorskip(module, reason="optional package").MXFP8QTensor
    # Its log2 is exact enough for what 16 bits hold.
    x = activations(columns).bfloat16().float()
    q, scale = tensor.quantize(x.clone())
    assert torch.equal(MXFP8.round_activation(x, ONE), q.dequantize(torch.float32, scale=scale))
