"""MXFP8 and MXFP4 numbers against ModelOpt, compressed-tensors, transformers, and brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from modelopt_linear import modelopt_export
from weight_cases import DTYPES, assert_same_bytes, quantized, weight_cases

from fp4moe.formats import FORMATS, MXFP4, MXFP8, StoredMatrix
from fp4moe.formats.four_bits import unpack_codes
from fp4moe.formats.mx import e8m0_scales, e8m0_values

NAMES = ["mxfp8", "mxfp4"]
LARGEST = {"mxfp8": 448.0, "mxfp4": 6.0}
ABSENT = torch.empty(0)


def modelopt_tensor(name):
    module = f"modelopt.torch.quantization.qtensor.{name}_tensor"
    return getattr(pytest.importorskip(module, reason="optional package"), f"{name.upper()}QTensor")


def test_a_block_of_mxfp8_worked_by_hand():
    # amax 896 = 448 x 2: scale 2^1, byte 128. The next block: 450 > 448 needs 2^1, too; the third
    # has scale 2^-8: 1.75 / 2^-8 = 448.
    x = torch.zeros(1, 96)
    x[0, :4] = torch.tensor([896.0, -17.0, 3.0, 2.0**-9])
    x[0, 32], x[0, 64] = 450.0, -1.75
    q = quantized(MXFP8, x)
    assert q.block_scale.tolist() == [[128, 128, 119]]
    # 8.5 ties between 8 and 9; 2^-10 ties between 0 and 2^-9; both go to the even mantissa.
    assert q.packed[0, :4].float().tolist() == [448.0, -8.0, 1.5, 0.0]
    assert q.packed[0, [32, 64]].float().tolist() == [224.0, -448.0]
    decoded = MXFP8.dequantize(q, torch.float32)
    assert decoded[0, [0, 1, 2, 3, 32, 64]].tolist() == [896.0, -16.0, 3.0, 0.0, 448.0, -1.75]


def test_a_block_of_mxfp4_worked_by_hand():
    # Scale 1, so that the elements are the scaled values: a tie goes to the lower magnitude.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x = torch.tensor([[*ties, 6.0, *(-t for t in ties), -6.0, *[0.1] * 15, 0.0]])
    q = quantized(MXFP4, x)
    assert q.block_scale.tolist() == [[127]]
    assert q.packed[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    # Zero is written as -0, as in ModelOpt, and read as +0.
    assert unpack_codes(q.packed)[0, 16:].tolist() == [0] * 15 + [8]
    decoded = MXFP4.dequantize(q, torch.float32)[0]
    assert decoded[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert math.copysign(1.0, decoded[-1].item()) == 1.0
    above = torch.nextafter(x, x.sign() * 9)
    above[0, [7, 15]] = x[0, [7, 15]]
    assert unpack_codes(quantized(MXFP4, above).packed)[0, :8].tolist() == [1, 2, 3, 4, 5, 6, 7, 7]
    # 6.25 does not fit 6 x 2^0: the scale is 2, and 6.25 / 2 is nearest to 3.
    x[0, 7] = 6.25
    q = quantized(MXFP4, x)
    assert q.block_scale.tolist() == [[128]]
    assert unpack_codes(q.packed)[0, 7] == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_that_modelopt_exports(name, dtype):
    compared = 0
    for case, x in weight_cases(256, 384, dtype).items():
        codes, scales = modelopt_export(name, x)
        ours = quantized(FORMATS[name], x)
        assert_same_bytes(ours.packed, codes, case)
        assert_same_bytes(ours.block_scale, scales, case)
        compared += 1
    assert compared >= 9


@pytest.mark.parametrize("name", NAMES)
def test_decoded_as_modelopt_decodes(name):
    format = FORMATS[name]
    q = quantized(format, torch.randn(64, 128) * torch.exp2(torch.randint(-90, 90, (64, 1))))
    data = modelopt_tensor(name)(torch.Size((64, 128)), torch.float32, q.packed)
    theirs = data.dequantize(torch.float32, scale=q.block_scale, block_sizes={-1: 32})
    assert torch.equal(format.dequantize(q, torch.float32), theirs)


def smallest_power(amax: float, largest: float) -> int:
    exponent = -127
    while Fraction(amax) > Fraction(largest) * Fraction(2) ** exponent:
        exponent += 1
    return exponent + 127


@pytest.mark.parametrize("name", NAMES)
def test_scales_by_exact_fractions(name):
    largest = LARGEST[name]
    edges = largest * torch.exp2(torch.arange(-131.0, 119.0, 7.0))
    infinity = torch.tensor(torch.inf)
    amax = torch.cat(
        (
            edges,
            torch.nextafter(edges, infinity),
            torch.nextafter(edges, -infinity),
            torch.randn(64).abs() * torch.exp2(torch.randint(-140, 120, (64,)).float()),
            torch.tensor([0.0, 2.0**-149, torch.finfo(torch.float32).max]),
        )
    )
    want = [smallest_power(value, largest) for value in amax.tolist()]
    assert e8m0_scales(amax, largest).tolist() == want


@pytest.mark.parametrize("name", NAMES)
def test_float32_blocks_beyond_what_a_logarithm_can_tell(name):
    # ModelOpt asks a float32 log2, which for such a block gives the edge's own power.
    edge = torch.tensor(LARGEST[name] * 2.0**-14)
    x = torch.zeros(1, 32)
    x[0, 0] = torch.nextafter(edge, torch.tensor(1.0))
    codes, scales = modelopt_export(name, x)
    ours = quantized(FORMATS[name], x)
    assert (ours.block_scale - scales).tolist() == [[1]]
    got = FORMATS[name].dequantize(ours, torch.float32)[0, 0]
    theirs = FORMATS[name].dequantize(StoredMatrix(codes, scales, ABSENT), torch.float32)[0, 0]
    assert got == theirs == edge


def test_every_scale_byte():
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    got = e8m0_values(every).double()
    want = [2.0 ** (byte - 127) for byte in range(255)]
    assert got[:255].tolist() == want
    assert got[255].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_nearest_by_brute_force(name):
    format = FORMATS[name]
    x = (torch.randn(64, 96) * 3).round(decimals=1)  # ties are common
    q = quantized(format, x)
    scale = torch.exp2(q.block_scale.double() - 127).repeat_interleave(32, 1)
    distance = x.double() / scale
    if name == "mxfp8":
        codes, grid = q.packed.view(torch.uint8), torch.arange(127, dtype=torch.uint8)
        grid = grid.view(torch.float8_e4m3fn).double()
        loses = 1e-12 * (torch.arange(127) % 2)
    else:
        codes, grid = unpack_codes(q.packed), torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
        loses = 1e-12 * torch.arange(8)
    sign = len(grid) + (len(grid) % 2)
    want = ((distance.abs()[..., None] - grid).abs() + loses).argmin(-1)
    assert torch.equal(codes.long() % sign, want)
    assert torch.equal(codes >= sign, torch.signbit(x) if name == "mxfp8" else ~(x > 0))


@pytest.mark.parametrize(("name", "bits"), [("mxfp8", 8), ("mxfp4", 4)])
def test_scales_of_compressed_tensors_are_larger_or_smaller_by_rule(name, bits):
    utils = pytest.importorskip(
        "compressed_tensors.quantization.utils.mxfp_utils", reason="optional package"
    )
    amax = torch.randn(4096).abs().bfloat16().float()
    ours = e8m0_scales(amax, LARGEST[name]).int()
    theirs = utils.generate_mx_scales(amax, num_bits=bits).int()
    mantissa = 2 * torch.frexp(amax)[0]
    # Its scale moves up where the mantissa is 1.75 and more, ours where it is above 1.75, or 1.5.
    edge = 1.75 if name == "mxfp8" else 1.5
    want = (mantissa >= 1.75).int() - (mantissa > edge).int()
    assert torch.equal(theirs - ours, want)
    assert want.any()


def test_gpt_oss_blocks_are_read_as_transformers_reads_them():
    module = pytest.importorskip("transformers.integrations.mxfp4", reason="optional package")
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 4), dtype=torch.uint8)
    theirs = module.convert_moe_packed_tensors(blocks.clone(), scales.clone())
    ours = MXFP4.dequantize(StoredMatrix(blocks.flatten(-2), scales, ABSENT), torch.bfloat16, 2)
    assert torch.equal(ours.transpose(1, 2), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_transformers_are_read_as_it_reads_them(name):
    module = "transformers.integrations.finegrained_fp8"
    operation = pytest.importorskip(module, reason="optional package").Fp8Dequantize(None)
    q = quantized(FORMATS[name], torch.randn(64, 128))
    # It knows two codes in a byte by their dtype.
    codes = q.packed.view(torch.int8) if name == "mxfp4" else q.packed
    theirs = operation._dequantize_one(codes, q.block_scale, torch.float32)
    assert torch.equal(FORMATS[name].dequantize(q, torch.float32), theirs)


def test_mxfp4_needs_about_half_a_byte_and_mxfp8_one():
    for format, bits in ((MXFP4, 4.25), (MXFP8, 8.25)):
        q = quantized(format, torch.randn(64, 512))
        assert q.packed.nbytes + q.block_scale.nbytes == 64 * 512 * bits / 8
