"""The quantiser of the intermediate follows TRT-LLM-Gen's machine code, bit for bit.

`tests/blackwell/machine_code` reads the order of operations from the machine code. Here it is
restated in numpy, with the roundings to E4M3 and E2M1 done in integers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flashinfer_emulator import quantize_intermediate

from fp4moe.experts import ExpertWeights
from fp4moe.formats import NVFP4
from fp4moe.formats.four_bits import pack_codes
from fp4moe.formats.nvfp4 import NVFP4Values
from fp4moe.reference import reference_w4a4

F = np.float32
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_to_bits(value, mantissa_bits, smallest_exponent):
    """Round finite float32 to a shorter binary format, ties to even, by whole multiples of a step.

    Every product with a power of two is exact in float64, and so is rint.
    """
    value = np.asarray(value, np.float64)
    _, exponent = np.frexp(value)  # 0.5 <= mantissa < 1
    step = np.exp2(np.maximum(exponent - 1, smallest_exponent) - float(mantissa_bits))
    return np.rint(value / step) * step


def by_machine_code(block, factor):
    """Return (elements, block scale) of one block of 16 float32, every operation in float32."""
    amax = np.abs(block).max()
    wanted = F(F(amax * factor) * F(1 / 6))
    scale = F(min(round_to_bits(wanted, 3, -6), 448.0))
    reciprocal = F(0) if scale == 0 else F(1) / scale
    scaled = ((block * reciprocal).astype(F) * factor).astype(F)
    return np.clip(round_to_bits(scaled, 1, 0), -6, 6).astype(F), scale


def dequantised(values, scale):
    out = np.empty_like(values)
    encode = F(1) / F(scale)
    for row, column in np.ndindex(values.shape[0], values.shape[1] // 16):
        place = row, slice(16 * column, 16 * column + 16)
        element, block_scale = by_machine_code(values[place], encode)
        out[place] = element * (block_scale * F(scale))
    return out


def test_the_roundings_of_the_restatement():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert round_to_bits(ties, 1, 0).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert round_to_bits(GRID, 1, 0).tolist() == list(GRID)
    # The smallest E4M3 value is 2^-9; half of it is a tie that goes to 0.
    assert round_to_bits([2.0**-10, 2.0**-10 * 1.5], 3, -6).tolist() == [0.0, 2.0**-9]
    finite = torch.arange(127).byte().view(torch.float8_e4m3fn).double()
    between = (finite[1:] + finite[:-1]) / 2
    for value in (finite, between):
        by_torch = value.float().to(torch.float8_e4m3fn).double()
        assert round_to_bits(value, 3, -6).tolist() == by_torch.tolist()


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9, 1e-4, 1e-9, 300.0], ids=str)
def test_bit_for_bit(scale):
    values = torch.randn(64, 48) * torch.exp2(torch.randint(-20, 12, (64, 1)).float())
    values[0], values[1, 16:32] = 0, -0.0
    values[2:20] = values[2:20].mul(8).round() / 8  # ties
    want = dequantised(values.numpy(), scale)
    got = NVFP4.round_intermediate(values, torch.tensor([scale]))
    assert got.numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("factor", [1.0, 2.7, 300.0, 2.0**-9], ids=str)
def test_the_emulator_has_the_same_order(factor):
    values = torch.randn(64, 48)
    codes, scales = quantize_intermediate(values, torch.tensor(factor))
    elements = torch.tensor(GRID + tuple(-g for g in GRID))[codes.long()]
    for row, column in np.ndindex(64, 3):
        place = row, slice(16 * column, 16 * column + 16)
        element, scale = by_machine_code(values[place].numpy(), F(factor))
        assert scales.view(torch.float8_e4m3fn)[row, column].float() == scale
        assert elements[place].numpy().tobytes() == element.tobytes()


def test_a_block_on_paper():
    # amax 3, decode multiplier 1/4: 3 * 4 / 6 = 2, an E4M3 value; elements are x / 2 * 4.
    x = torch.tensor([[3.0, 0.125, 0.375, 0.625, -0.875, 1.25, -1.75, 2.5] + [0.0] * 8])
    # 6, 0.25, 0.75, 1.25, -1.75, 2.5, -3.5, 5 times the step 2 / 4; ties go to the even code.
    want = [[3.0, 0.0, 0.5, 0.5, -1.0, 1.0, -2.0, 2.0] + [0.0] * 8]
    assert NVFP4.round_intermediate(x, torch.tensor([0.25])).tolist() == want


THIRD = torch.tensor([1.0 / 3.0])


def test_the_order_decides_a_tie():
    # Block scale e4m3(2.5 * 3 / 6) = 1.25. (0.3125 / 1.25) * 3 is 0.75 in float32 too, a tie that
    # goes to 1; fp4_quantize divides by 1.25 * fl(1/3), more than 1.25 / 3, which leads to 0.5.
    x = torch.tensor([[2.5, 0.3125] + [0.0] * 14])
    step = 1.25 * THIRD
    want = [[6.0, 1.0] + [0.0] * 14]
    assert torch.equal(NVFP4.round_intermediate(x, THIRD), torch.tensor(want) * step)
    want[0][1] = 0.5
    assert torch.equal(NVFP4.round_activation(x, THIRD), torch.tensor(want) * step)


def matrix(rows, columns, codes):
    """NVFP4 [1, rows, columns] of block scale and global scale 1; codes by (row, column)."""
    dense = torch.zeros(1, rows, columns, dtype=torch.uint8)
    for place, code in codes.items():
        dense[0][place] = code
    ones = torch.ones(1, rows, columns // 16).to(torch.float8_e4m3fn)
    return NVFP4Values(pack_codes(dense), ones, torch.ones(1))


@pytest.mark.parametrize(
    ("dtype", "element"), [(torch.float32, 1.0), (torch.bfloat16, 0.5)], ids=["gemm", "cutlass"]
)
def test_the_layer_takes_the_quantiser_of_its_kernel(dtype, element):
    """The block on paper as a layer: up is 4 and 0.5 times 0.625, down takes the second row."""
    weights = ExpertWeights(
        gate_up=matrix(16, 16, {(0, 0): GRID.index(4.0), (1, 0): GRID.index(0.5)}),
        down=matrix(16, 16, {(0, 1): GRID.index(1.0)}),
        activation="identity",
        gated=False,
        hidden_size=16,
        intermediate_size=16,
        num_experts=1,
        expert_offset=0,
        hidden_scale=torch.ones(1),
        intermediate_scale=THIRD,
    )
    # The block scale of the input is 3.75 / 6 = 0.625, its elements are 1 and 6.
    x = torch.tensor([[0.625, 3.75] + [0.0] * 14])
    args = x, weights, torch.zeros(1, 1, dtype=torch.int), torch.ones(1, 1)
    got = reference_w4a4(*args, intermediate_dtype=dtype)
    assert got[0, 0] == (element * 1.25 * THIRD).bfloat16().float()
    assert not got[0, 1:].any()
