"""FP8 numbers against ModelOpt, compressed-tensors and transformers, and worked by hand."""

from __future__ import annotations

import types

import pytest
import torch
from allocated_bytes import AllocatedBytes
from modelopt_linear import modelopt_export
from refusals import assert_refused
from weight_cases import DTYPES, assert_same_bytes, quantized, weight_cases

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.formats import FORMATS, FP8, FP8_BLOCK, FP8_CHANNEL, scaled

NAMES = ["fp8", "fp8_channel", "fp8_block"]
E4M3 = torch.float8_e4m3fn


def values(*numbers):
    return torch.tensor(numbers).to(E4M3)


def test_a_matrix_worked_by_hand():
    # amax 896: scale 2. 17 / 2 = 8.5 lies between 8 and 9 and goes to the even mantissa, 8.
    x = torch.tensor([[896.0, -17.0, 3.0, 0.0] + [0.0] * 12, [1.0, 2.0**-8, -(2.0**-9), 19.0] * 4])
    q = quantized(FP8, x)
    assert q.block_scale.tolist() == [[2.0]]
    assert_same_bytes(q.packed[0, :4], values(448.0, -8.0, 1.5, 0.0))
    # Subnormals are multiples of 2^-9: 2^-9 is one; 2^-10 lies between 0 and it, and goes to 0.
    assert_same_bytes(q.packed[1, :4], values(0.5, 2.0**-9, -0.0, 10.0))
    decoded = FP8.dequantize(q, torch.float32)
    assert decoded[0, :4].tolist() == [896.0, -16.0, 3.0, 0.0]


def test_rows_and_blocks_worked_by_hand():
    x = torch.zeros(130, 144)
    x[0, 0], x[1, 143], x[129, 5] = 896.0, 112.0, -1792.0
    by_row, by_block = quantized(FP8_CHANNEL, x), quantized(FP8_BLOCK, x)
    # A row of zeros has scale 1.
    assert by_row.block_scale[[0, 1, 2, 129], 0].tolist() == [2.0, 0.25, 1.0, 4.0]
    assert by_block.block_scale.tolist() == [[2.0, 0.25], [4.0, 1.0]]
    for q in (by_row, by_block):
        assert q.packed[[0, 1, 129], [0, 143, 5]].float().tolist() == [448.0, 448.0, -448.0]
        assert q.packed.float().count_nonzero() == 3


def test_a_bfloat16_quotient_is_rounded_before_it_is_cast():
    # A quotient just above a tie of e4m3 is the tie itself in bfloat16, and goes to the even code.
    numbers = torch.arange(1, 4097).bfloat16().unique().float() / 7
    x = numbers[: len(numbers) // 16 * 16].view(-1, 16).bfloat16()
    ours = quantized(FP8, x)
    codes, scale = modelopt_export("fp8", x)
    assert_same_bytes(ours.packed, codes)
    in_float32 = (x.float() / scale).to(E4M3)
    assert (ours.packed.float() != in_float32.float()).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(256, 384), (200, 304)], ids=["whole blocks", "cut blocks"])
def test_bytes_are_those_that_modelopt_exports(name, dtype, shape):
    compared = 0
    for case, x in weight_cases(*shape, dtype).items():
        codes, scales = modelopt_export(name, x)
        ours = quantized(FORMATS[name], x)
        if name == "fp8" and not x.any():
            # 0 / 0: ModelOpt's codes are NaN. Ours are zeros of scale 1.
            assert codes.float().isnan().all() and scales == 0
            assert not ours.packed.float().any() and ours.block_scale == 1
            continue
        # A cast of torch 2.11 makes NaN of what newer ones saturate, as denormal scales need.
        over = codes.float().isnan()
        assert case == "denormal32" or not over.any()
        assert (ours.packed.float()[over].abs() == 448).all()
        codes = torch.where(over, ours.packed.float(), codes.float()).to(E4M3)
        assert_same_bytes(ours.packed, codes, case)
        assert torch.equal(ours.block_scale, scales.view(ours.block_scale.shape)), case
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", NAMES)
def test_an_amax_whose_scale_underflows(name):
    x = torch.zeros(2, 16)
    x[0, 3], x[1, 4] = 1e-43, -4e-44
    q = quantized(FORMATS[name], x)
    assert (q.block_scale > 0).all()
    y = FORMATS[name].dequantize(q, torch.float32)
    # Half a step of e4m3: a sixteenth of the value, or 2^-10 of the scale; 2^-149 is the last bit.
    atol = float(q.block_scale.amin()) * 2.0**-10 + 2.0**-149
    torch.testing.assert_close(y, x, rtol=1 / 16, atol=atol)
    assert y.count_nonzero() == 2


@pytest.mark.parametrize("name", NAMES)
def test_nearest_by_brute_force(name):
    format = FORMATS[name]
    x = torch.randn(96, 160)
    q = quantized(format, x)
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    scale = format.dequantize(
        type(q)(torch.ones(96, 160).to(E4M3), q.block_scale, q.global_scale), torch.float32
    )
    # A float32 quotient; an odd code loses a tie, by less than any distance that is none.
    distance = ((x / scale).abs().double()[..., None] - grid).abs()
    want = (distance + 1e-9 * (torch.arange(127) % 2)).argmin(-1).to(torch.uint8)
    assert torch.equal(q.packed.view(torch.uint8) & 127, want)
    assert torch.equal(q.packed.float() < 0, (x < 0) & (want > 0))


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_cast_to_float32(name):
    x = torch.randn(40, 64, dtype=torch.float64)
    ours, want = quantized(FORMATS[name], x), quantized(FORMATS[name], x.float())
    assert_same_bytes(ours.packed, want.packed)
    assert torch.equal(ours.block_scale, want.block_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "strategy"), [("fp8_channel", "channel"), ("fp8_block", "block")])
def test_compressed_tensors_differs_by_the_dtype_of_its_scale_alone(name, strategy, dtype):
    forward = pytest.importorskip(
        "compressed_tensors.quantization.lifecycle.forward", reason="optional package"
    )
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    options = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **block}
    args = QuantizationArgs(**options)
    x = torch.randn(256, 384).to(dtype)
    rows = 128 if block else 1
    blocks = x.view(256 // rows, rows, -1, 128 if block else 384)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    codes = forward.quantize(x, scale, zero, args, dtype=E4M3)
    ours = quantized(FORMATS[name], x)
    # Its scale has the dtype of the weight, amax / 448 rounded, and so has its quotient.
    assert torch.equal(ours.block_scale.to(dtype), scale)
    if dtype == torch.float32:
        assert_same_bytes(ours.packed, codes)
    else:
        assert (ours.packed.float() != codes.float()).any()
    # What it writes is read exactly: code x scale.
    read = type(ours)(codes, scale.float(), ours.global_scale)
    theirs = forward.dequantize(codes, scale.float(), zero, args, dtype=torch.float32)
    assert torch.equal(FORMATS[name].dequantize(read, torch.float32), theirs)


def transformers_fp8(scale_fmt):
    module = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="optional package"
    )
    config = types.SimpleNamespace(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    quantizer = types.SimpleNamespace(quantization_config=config)
    return module.Fp8Quantize(quantizer), module.Fp8Dequantize(quantizer)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_blocks_of_transformers_are_read_as_it_reads_them(scale_fmt):
    to_fp8, to_float = transformers_fp8(scale_fmt)
    x = torch.randn(256, 384).bfloat16()
    made = to_fp8._quantize_one("a.weight", x)
    codes, scale = made["a.weight"], made["a.weight_scale_inv"]
    ours = quantized(FP8_BLOCK, x)
    read = type(ours)(codes, scale.float(), ours.global_scale)
    theirs = to_float._dequantize_one(codes, scale, torch.float32)
    assert torch.equal(FP8_BLOCK.dequantize(read, torch.float32), theirs)
    if scale_fmt == "ue8m0":
        assert torch.equal(scale.float(), torch.exp2(ours.block_scale.log2().ceil()))
        return
    # Two roundings on the way to 1 / (448 / amax), and one more in the product, 2^-24 each.
    torch.testing.assert_close(scale, ours.block_scale, rtol=3 * 2.0**-24, atol=0)
    differs = codes.float() != ours.packed.float()
    ratio = x.float() / ours.block_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    step = torch.exp2(ratio.abs().clamp(min=2.0**-6).log2().floor() - 3)
    to_tie = ((ratio.abs() / step) % 1 - 0.5).abs()
    # A quotient of at most 16 steps, off by four roundings, is off by 16 x 4 x 2^-24 steps.
    assert (to_tie[differs] <= 64 * 2.0**-24).all()


@pytest.mark.parametrize("name", [*NAMES, "mxfp8", "mxfp4"])
def test_strides_and_pieces_do_not_matter(monkeypatch, name):
    format, x = FORMATS[name], torch.randn(300, 224).bfloat16()
    want = quantized(format, x)
    decoded = format.dequantize(want, torch.bfloat16)
    monkeypatch.setattr(scaled, "PIECE", 224 * 7)
    for view in (x, x.t().contiguous().t(), torch.stack((x, x), -1)[..., 0]):
        got = quantized(format, view)
        assert_same_bytes(got.packed, want.packed)
        assert torch.equal(got.block_scale, want.block_scale)
    assert torch.equal(format.dequantize(want, torch.bfloat16), decoded)
    assert torch.equal(format.dequantize(want, torch.float32).bfloat16(), decoded)


@pytest.mark.parametrize("name", [*NAMES, "mxfp8", "mxfp4"])
def test_scratch_is_bounded(monkeypatch, name):
    monkeypatch.setattr(scaled, "PIECE", 1 << 15)
    format = FORMATS[name]
    for rows in (512, 2048):
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        shared = format.shared_scale(torch.stack(torch.aminmax(x.float())))
        with AllocatedBytes(x, shared) as allocated:
            q = format.quantize(x, shared, "max")
        # A few float32 copies of a piece, whatever the rows.
        assert allocated.peak - q.packed.nbytes - q.block_scale.nbytes < 6 * 4 * (1 << 15)
        with AllocatedBytes(*q.parts().values()) as allocated:
            out = format.dequantize(q, torch.bfloat16)
        indices = 6 * 8 * rows
        assert allocated.peak - out.nbytes < 6 * 4 * (1 << 15) + indices


def test_gate_and_up_share_the_scale_of_the_larger_one():
    gate, up = torch.randn(2, 3, 48, 64).bfloat16()
    gate, down = gate * 5, torch.randn(3, 64, 48).bfloat16()
    up[1], gate[2] = 0, 0
    named = {"gate": gate, "up": up, "down": down, "activation": "silu"}
    weights = ExpertWeights.quantize(**named, format="fp8")
    both = torch.cat((gate, up), 1)
    for expert in range(3):
        codes, scale = modelopt_export("fp8", both[expert])
        assert_same_bytes(weights.gate_up.packed[expert], codes)
        assert weights.gate_up.block_scale[expert].flatten().tolist() == [scale.item()] * 2
    # A file may have them apart; both are read.
    apart = weights.gate_up.block_scale * torch.tensor([1.0, 3.0])[:, None]
    state = weights.state_dict() | {"gate_up.block_scale": apart}
    read = ExpertWeights.from_state_dict(state).dequantize()
    assert torch.equal(read["gate"], weights.dequantize()["gate"])
    scale = apart[:, 1:]
    assert torch.equal(read["up"], weights.gate_up.packed[:, 48:].float() * scale)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", [*NAMES, "mxfp8", "mxfp4"])
def test_inf_and_nan_are_refused(name, bad):
    x = torch.randn(300, 64)
    x[299, 63] = bad
    with pytest.raises(ShapeError, match=rf"^{name}: weight must be finite; got a largest"):
        FORMATS[name].quantize(x, torch.tensor(1.0), "max")
    with pytest.raises(ShapeError, match=r"^ExpertWeights.quantize: up of expert 0 must be finite"):
        ExpertWeights.quantize(up=x[None], down=x.t()[None], activation="relu2", format=name)


@pytest.mark.parametrize("name", [*NAMES, "mxfp8", "mxfp4"])
def test_refusals(name):
    format, one = FORMATS[name], torch.tensor(1.0)
    up = torch.randn(1, 32, 32)
    assert_refused(
        lambda: ExpertWeights.quantize(
            up=up, down=up, activation="relu2", format=name, method="mse"
        ),
        f"ExpertWeights.quantize: format {name} cannot be quantised with method 'mse', because its "
        "scales are defined by the largest magnitude alone. Pass method='max'.",
        UnsupportedError,
    )
    assert_refused(
        lambda: format.quantize(torch.randn(4, 24), one, "max"),
        f"{name}: weight must have columns that are a multiple of {format.multiple}; got 24. Pad "
        "them with zeros.",
    )
    assert_refused(
        lambda: format.quantize(torch.zeros(4, 32, dtype=torch.int8), one, "max"),
        f"{name}: weight must be float32, bfloat16, float16 or float64 [rows, columns]; got "
        "torch.int8 [4, 32]. Pass one matrix.",
    )
