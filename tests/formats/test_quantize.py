"""NVFP4 numbers against two libraries, a block worked by hand, and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from allocated_bytes import AllocatedBytes
from refusals import assert_refused

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import NVFP4
from fp4moe.formats import nvfp4 as quantize
from fp4moe.formats.four_bits import e2m1_values, pack_codes, unpack_codes
from fp4moe.formats.nvfp4 import (
    NVFP4Values,
    dequantize_nvfp4,
    nvfp4_global_scale,
    quantize_nvfp4,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E4M3_VALUES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def student_t(*shape):
    return torch.randn(shape) / (torch.randn(4, *shape).square().mean(0)).sqrt()


def assert_same(ours: NVFP4Values, theirs: NVFP4Values) -> None:
    torch.testing.assert_close(ours.packed, theirs.packed, rtol=0, atol=0)
    assert ours.block_scale.dtype == theirs.block_scale.dtype == torch.float8_e4m3fn
    scales = [v.block_scale.contiguous().view(torch.uint8) for v in (ours, theirs)]
    torch.testing.assert_close(*scales, rtol=0, atol=0)
    torch.testing.assert_close(ours.global_scale, theirs.global_scale, rtol=0, atol=0)


def modelopt_tensor():
    name = "modelopt.torch.quantization.qtensor.nvfp4_tensor"
    return pytest.importorskip(name, reason="optional package").NVFP4QTensor


def modelopt_quantize(x, global_scale=None):
    scale = None if global_scale is None else torch.as_tensor(global_scale, dtype=torch.float32)
    q, block_scale, scale = modelopt_tensor().quantize(
        x.clone(), NVFP4.block_size, weights_scaling_factor_2=scale
    )
    return NVFP4Values(q._quantized_data, block_scale, scale)


def modelopt_dequantize(q):
    shape = torch.Size((*q.packed.shape[:-1], q.packed.shape[-1] * 2))
    return modelopt_tensor()(shape, torch.float32, q.packed).dequantize(
        torch.float32, scale=q.block_scale, double_scale=q.global_scale, block_sizes={-1: 16}
    )


def squared_errors(x, q):
    """Per-block squared error in float64, [blocks]."""
    d = dequantize_nvfp4(q).double() - x.double()
    return d.square().unflatten(-1, (-1, 16)).sum(-1).flatten()


def test_block_worked_by_hand():
    # Block scale 1, so the elements are the scaled values: ties go to the even code.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    codes = [0, 2, 2, 4, 4, 6, 6]
    x = torch.tensor([*ties, 6.0, *(-t for t in ties), -6.0])
    q = quantize_nvfp4(x, 1.0)
    assert q.block_scale.float().tolist() == [1.0]
    assert q.packed.tolist() == [0x20, 0x42, 0x64, 0x76, 0xA8, 0xCA, 0xEC, 0xFE]
    assert unpack_codes(q.packed).tolist() == [*codes, 7, *(c + 8 for c in codes), 15]
    above = torch.nextafter(x, x.sign() * 9)
    above[[7, 15]] = x[[7, 15]]
    assert quantize_nvfp4(above, 1.0).packed.tolist() == [
        *(0x21, 0x43, 0x65, 0x77),
        *(0xA9, 0xCB, 0xED, 0xFF),
    ]
    below = torch.nextafter(x, torch.zeros(()))
    below[[7, 15]] = x[[7, 15]]
    assert quantize_nvfp4(below, 1.0).packed.tolist() == [
        *(0x10, 0x32, 0x54, 0x76),
        *(0x98, 0xBA, 0xDC, 0xFE),
    ]


def test_signs_of_zero_and_saturation():
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([-tiny, tiny, -0.0, 0.0, 6.0, -6.0] + [0.0] * 10)
    assert quantize_nvfp4(x, 1.0).packed.tolist() == [0x08, 0x00, 0xF7, 0, 0, 0, 0, 0]
    # A global scale 1e6 times too small: the block scale stops at 448 and elements at 6.
    q = quantize_nvfp4(torch.tensor([1e6, -1e6] * 8), 1e-3)
    assert q.block_scale.float().tolist() == [448.0]
    assert q.packed.tolist() == [0xF7] * 8
    # Minus zero decodes to plus zero, as in ModelOpt.
    zero = dequantize_nvfp4(quantize_nvfp4(x, 1.0))[0]
    assert math.copysign(1.0, zero.item()) == 1.0


def tensors():
    """Named float32 tensors [4, 6, 64]; every dtype casts them."""
    normal = torch.randn(4, 6, 64)
    yield "normal", normal
    yield "heavy", student_t(4, 6, 64) ** 3
    yield "tiny", normal * 1e-6
    yield "denormal32", normal * 1e-42
    yield "denormal16", normal * 1e-39
    yield "huge32", normal / normal.abs().max() * 3.3e38
    yield "huge16", normal / normal.abs().max() * 6.5e4
    yield "wide", normal * torch.exp2(torch.randint(-40, 14, (4, 6, 64)).float())
    yield "constant", torch.full((4, 6, 64), -0.3)
    zeros = normal.clone()
    zeros[:, ::2, 16:48] = 0
    zeros[0, 0, ::3] = -0.0
    yield "zero blocks", zeros
    yield "minus zero", torch.where(normal > 0, normal, -0.0)
    yield "few bits", (normal * 4).round() / 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ndim", [2, 3])
def test_bit_equal_to_modelopt(dtype, ndim):
    compared = 0
    for name, x in tensors():
        x = x.to(dtype)
        x = x.flatten(0, 1) if ndim == 2 else x
        if not torch.isfinite(x).all():
            continue
        amax = float(x.abs().max())
        given = [1.0, 0.37, 1e-4, amax / 2688 * 1.7, amax / 2688 * 0.1, 3e-39, 1e-44, 1e36]
        computed = [None] if amax / 2688 > 2**-149 else []
        for g in computed + [v for v in given if v > 2**-149]:
            ours, theirs = quantize_nvfp4(x, g), modelopt_quantize(x, g)
            assert_same(ours, theirs)
            assert torch.equal(dequantize_nvfp4(ours), modelopt_dequantize(theirs)), (name, g)
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_zero(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    for g in (1.0, 2.0**-20):
        assert_same(quantize_nvfp4(x, g), modelopt_quantize(x, g))
    q = quantize_nvfp4(x)
    assert q.global_scale.item() == 1.0
    assert torch.equal(dequantize_nvfp4(q), x.float())


def test_amax_that_underflows():
    x = torch.zeros(2, 16)
    x[0, 3], x[1, 4] = 1e-43, -4e-44
    q = quantize_nvfp4(x)
    assert q.global_scale.item() == 2.0**-149
    y = dequantize_nvfp4(q)
    assert torch.isfinite(y).all()
    assert abs(y[0, 3] / x[0, 3] - 1) < 1 / 16  # one e4m3 rounding of the block scale
    assert y.count_nonzero() == 2


def test_float64_is_cast_to_float32():
    x = torch.randn(3, 64, dtype=torch.float64)
    assert_same(quantize_nvfp4(x), quantize_nvfp4(x.float()))


def test_one_global_scale_per_leading_index():
    x = torch.randn(3, 4, 64).bfloat16() * torch.tensor([1, 10, 0.01]).bfloat16()[:, None, None]
    per_expert = nvfp4_global_scale(x, dim=(1, 2))
    for g in (per_expert, nvfp4_global_scale(x, dim=2)):
        q = quantize_nvfp4(x, g)
        assert q.global_scale.shape == g.shape
        for e in range(3):
            row = g[e] if g.ndim == 1 else g[e][:, None]
            assert_same(
                NVFP4Values(q.packed[e], q.block_scale[e], row), modelopt_quantize(x[e], row)
            )
        want = torch.stack([dequantize_nvfp4(quantize_nvfp4(x[e], g[e])) for e in range(3)])
        assert torch.equal(dequantize_nvfp4(q), want)
    alone = [quantize_nvfp4(x[e]).global_scale for e in range(3)]
    assert torch.equal(per_expert, torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_casts_once(dtype):
    q = quantize_nvfp4(torch.randn(5, 48))
    assert torch.equal(dequantize_nvfp4(q, dtype), dequantize_nvfp4(q).to(dtype))


@pytest.mark.parametrize("global_scale", [2.0**-9, 2.0**-3, 1.0, 3e-4, 0.0017])
def test_agrees_with_compressed_tensors(global_scale):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.helpers", reason="optional package"
    )
    x = torch.randn(64, 256)
    q = quantize_nvfp4(x, global_scale)
    theirs = helpers.quantize_and_pack_fp4(
        x, q.block_scale.float(), global_scale=1 / torch.tensor([global_scale])
    )
    ours = helpers.unpack_fp4_from_uint8(q.packed, *x.shape, torch.float32)
    other = helpers.unpack_fp4_from_uint8(theirs, *x.shape, torch.float32)
    step = (q.block_scale.float() * global_scale).repeat_interleave(16, 1)
    assert torch.equal(ours * step, dequantize_nvfp4(q))
    assert torch.equal(helpers.pack_fp4_to_uint8(ours), q.packed)
    differs = ours != other
    if math.log2(global_scale).is_integer():
        assert not differs.any()
    # Three roundings of the steps (one ours, two theirs), 2^-24 each, are 1.5 x 1.75 ulp at most;
    # the last one cannot cross a boundary, which float32 represents, but moves y by half an ulp.
    y = (x / step).abs()
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ulp = torch.nextafter(bounds, torch.tensor(9.0)) - bounds
    near = ((y[..., None] - bounds).abs() <= 4 * ulp).any(-1)
    assert not (differs & ~near).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_grid_value_by_brute_force(dtype):
    x = (torch.randn(32, 64) * 3).round(decimals=1).to(dtype)
    g = 0.25  # with few decimals and a power of two, ties are common
    q = quantize_nvfp4(x, g)
    y = x.float() / (q.block_scale.float() * g).repeat_interleave(16, 1)
    grid = torch.tensor(NVFP4.grid)
    distance = (y.abs().double()[..., None] - grid.double()).abs()
    # An odd code loses a tie; 1e-12 is below every distance that is not a tie in float32.
    code = (distance + 1e-12 * (torch.arange(8) % 2)).argmin(-1)
    want = code + 8 * (y < 0)
    assert torch.equal(unpack_codes(q.packed).long(), want)


@pytest.mark.parametrize("weights", [torch.randn, student_t], ids=["gaussian", "student_t4"])
def test_mse_lowers_the_error(weights):
    x = weights(256, 512).bfloat16()
    g = nvfp4_global_scale(x)
    plain = squared_errors(x, quantize_nvfp4(x, g))
    better = squared_errors(x, quantize_nvfp4(x, g, method="mse"))
    assert (better <= plain).all()
    ratio = (better.sum() / plain.sum()).item()
    print(f"squared error of mse / max: {ratio:.4f}")
    assert ratio < 0.85


@pytest.mark.parametrize("weights", [torch.randn, student_t], ids=["gaussian", "student_t4"])
def test_mse_window_against_every_block_scale(weights):
    x = weights(64, 256)
    g = nvfp4_global_scale(x)
    window = squared_errors(x, quantize_nvfp4(x, g, method="mse"))
    plain = squared_errors(x, quantize_nvfp4(x, g))
    blocks = x.view(-1, 16).double()
    best = torch.full_like(plain, math.inf)
    grid = torch.tensor(NVFP4.grid).double()
    for step in E4M3_VALUES * g:
        a = (blocks.abs().float() / step).double()
        value = grid[(a[..., None] - grid).abs().argmin(-1)] * step.double()
        best = torch.minimum(best, (value - blocks.abs()).square().sum(-1))
    gain = (plain.sum() - window.sum()) / (plain.sum() - best.sum())
    print(f"the window has {gain:.5f} of the gain of all 126 block scales")
    assert gain > 0.999


def test_mse_edge_cases():
    zeros = torch.zeros(2, 32)
    assert_same(quantize_nvfp4(zeros, 0.5, "mse"), quantize_nvfp4(zeros, 0.5))
    exact = torch.tensor(NVFP4.grid).repeat(4)  # no error: a tie keeps the code of "max"
    assert_same(quantize_nvfp4(exact, 1.0, "mse"), quantize_nvfp4(exact, 1.0))
    for name, x in tensors():
        for g in (None, 1e-44, 1e36):
            plain, mse = quantize_nvfp4(x, g), quantize_nvfp4(x, g, "mse")
            assert (squared_errors(x, mse) <= squared_errors(x, plain)).all(), (name, g)


MESSAGES = {
    "inf": (
        lambda: quantize_nvfp4(torch.tensor([math.inf] + [0.0] * 15)),
        "quantize_nvfp4: x must be finite; got a largest magnitude of inf. "
        "Replace inf and NaN (torch.nan_to_num), or find the layer that made them.",
    ),
    "nan, scale given": (
        lambda: quantize_nvfp4(torch.tensor([-math.nan] + [7.0] * 31).bfloat16(), 1.0),
        "quantize_nvfp4: x must be finite; got a largest magnitude of nan. "
        "Replace inf and NaN (torch.nan_to_num), or find the layer that made them.",
    ),
    "nan, global scale": (
        lambda: nvfp4_global_scale(torch.tensor([[math.nan, 1.0]]), dim=1),
        "nvfp4_global_scale: x must be finite; got a largest magnitude of nan. "
        "Replace inf and NaN (torch.nan_to_num), or find the layer that made them.",
    ),
    "columns": (
        lambda: quantize_nvfp4(torch.zeros(2, 24)),
        "quantize_nvfp4: x must have a last axis that is a multiple of 16; got shape (2, 24). "
        "Pad the last axis with zeros.",
    ),
    "0-d": (
        lambda: quantize_nvfp4(torch.zeros(())),
        "quantize_nvfp4: x must have a last axis that is a multiple of 16; got shape (). "
        "Pad the last axis with zeros.",
    ),
    "dtype": (
        lambda: quantize_nvfp4(torch.zeros(16, dtype=torch.int32)),
        "quantize_nvfp4: x must be a float32, bfloat16, float16 or float64 tensor; "
        "got torch.int32. Cast it first.",
    ),
    "scale shape": (
        lambda: quantize_nvfp4(torch.zeros(2, 16), torch.ones(3)),
        "quantize_nvfp4: global_scale must be a number or have the shape of leading axes of x; "
        "got (3,) for x (2, 16). Pass one scale per leading index, or a 0-d tensor.",
    ),
    "scale of every element": (
        lambda: quantize_nvfp4(torch.zeros(2, 16), torch.ones(2, 16)),
        "quantize_nvfp4: global_scale must be a number or have the shape of leading axes of x; "
        "got (2, 16) for x (2, 16). Pass one scale per leading index, or a 0-d tensor.",
    ),
    "scale zero": (
        lambda: quantize_nvfp4(torch.zeros(2, 16), torch.tensor([1.0, 0.0])),
        "quantize_nvfp4: global_scale must be finite and above 0 in float32; got 0.0. "
        "Pass the decode multiplier, amax / (6 x 448), or None.",
    ),
    "scale nan": (
        lambda: quantize_nvfp4(torch.zeros(2, 16), math.nan),
        "quantize_nvfp4: global_scale must be finite and above 0 in float32; got nan. "
        "Pass the decode multiplier, amax / (6 x 448), or None.",
    ),
    "packed": (
        lambda: dequantize_nvfp4(NVFP4Values(torch.zeros(2, 8), torch.zeros(2, 1), torch.ones(()))),
        "dequantize_nvfp4: q must hold uint8 packed [..., K / 2] and block_scale [..., K / 16]; "
        "got torch.float32 (2, 8) and (2, 1). Rebuild q with quantize_nvfp4.",
    ),
    "result dtype": (
        lambda: dequantize_nvfp4(quantize_nvfp4(torch.zeros(2, 16)), torch.int8),
        "dequantize_nvfp4: dtype must be a floating dtype; got torch.int8. "
        "Use torch.float32 or torch.bfloat16.",
    ),
    "odd codes": (
        lambda: pack_codes(torch.zeros(3, dtype=torch.uint8)),
        "pack_codes: codes must be uint8 with an even last axis; got torch.uint8 (3,). "
        "Cast or pad them.",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_error_messages(case):
    assert_refused(*MESSAGES[case])


def test_unknown_method_names_the_known_ones():
    with pytest.raises(UnsupportedError) as error:
        quantize_nvfp4(torch.zeros(16), method="min")
    assert str(error.value) == (
        "quantize_nvfp4: method must be one of max, mse; got 'min'. Choose one of these."
    )


@pytest.mark.parametrize("where", [0, 1000, 4095])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_inf_anywhere_is_found(monkeypatch, where, dtype):
    monkeypatch.setattr(quantize, "PIECE_BLOCKS", 32)
    x = torch.randn(64, 64).to(dtype)
    x.view(-1)[where] = -math.inf
    for g in (None, 1.0):
        with pytest.raises(ShapeError, match="must be finite"):
            quantize_nvfp4(x, g)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 16), (2, 0)])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_empty(shape, method):
    for g in (None, 0.5, torch.ones(shape[0])):
        q = quantize_nvfp4(torch.empty(shape), g, method)
        assert q.packed.shape == (*shape[:-1], shape[-1] // 2)
        assert q.block_scale.shape == (*shape[:-1], shape[-1] // 16)
        assert dequantize_nvfp4(q).shape == shape


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last axis strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "misaligned": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
    "column slice": lambda x: torch.cat((x, x), -1)[..., 64:128],
    "reversed storage": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_strides_and_chunks_do_not_matter(monkeypatch, dtype, chunk, method):
    x = torch.randn(3, 5, 64).to(dtype)
    scales = [None, nvfp4_global_scale(x, dim=(1, 2)), nvfp4_global_scale(x, dim=2)]
    want = [quantize_nvfp4(x, g, method) for g in scales]
    decoded = [dequantize_nvfp4(q) for q in want]
    monkeypatch.setattr(quantize, "CHUNK_BLOCKS", {"cpu": chunk, "other": chunk})
    monkeypatch.setattr(quantize, "PIECE_BLOCKS", 2 * chunk + 1)
    for i, g in enumerate(scales):
        assert_same(quantize_nvfp4(x, g, method), want[i])
        assert torch.equal(dequantize_nvfp4(want[i]), decoded[i])
        for view in STRIDES.values():
            assert torch.equal(view(x), x)
            assert_same(quantize_nvfp4(view(x), g, method), want[i])


def test_expanded_input_and_strided_parts():
    row = torch.randn(1, 64)
    assert_same(quantize_nvfp4(row.expand(7, 64)), quantize_nvfp4(row.repeat(7, 1)))
    q = quantize_nvfp4(torch.randn(6, 64))
    turned = NVFP4Values(q.packed.t().contiguous().t(), q.block_scale[:], q.global_scale)
    assert torch.equal(dequantize_nvfp4(turned), dequantize_nvfp4(q))


def test_every_output_byte_is_written(poisoned_empty):
    x = torch.randn(3, 5, 48)
    for method in quantize.METHODS:
        q = quantize_nvfp4(x, method=method)
        assert torch.isfinite(q.block_scale.float()).all()
        assert_same(quantize_nvfp4(x.clone(), method=method), q)
    assert_same(quantize_nvfp4(x), modelopt_quantize(x))
    assert torch.isfinite(dequantize_nvfp4(q)).all()


def test_parameters_are_accepted():
    weight = torch.nn.Parameter(torch.randn(4, 32))
    assert_same(quantize_nvfp4(weight), quantize_nvfp4(weight.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("view", ["contiguous", "transposed"])
def test_scratch_is_bounded(monkeypatch, method, view):
    monkeypatch.setattr(quantize, "CHUNK_BLOCKS", {"cpu": 512, "other": 512})
    monkeypatch.setattr(quantize, "PIECE_BLOCKS", 2048)
    peaks = []
    for experts in (2, 6):
        x = torch.randn(experts, 128, 512, dtype=torch.bfloat16)
        x = x if view == "contiguous" else x.transpose(0, 1).contiguous().transpose(0, 1)
        with AllocatedBytes(x) as allocated:
            q = quantize_nvfp4(x, method=method)
        peaks.append(allocated.peak - q.packed.nbytes - q.block_scale.nbytes)
        with AllocatedBytes(q.packed, q.block_scale, q.global_scale) as allocated:
            out = dequantize_nvfp4(q)
        assert allocated.peak - out.nbytes < 512 * 16 * 16
    # Scratch depends on the two constants alone, in bytes per element of a chunk and of a piece.
    assert peaks[1] <= peaks[0] * 1.02
    assert peaks[0] < 512 * 16 * 64 + 2048 * 16 * 8


def test_scratch_at_the_real_constants():
    x = torch.randn(2, 1024, 2816).bfloat16()
    with AllocatedBytes(x) as allocated:
        q = quantize_nvfp4(x)
    scratch = allocated.peak - q.packed.nbytes - q.block_scale.nbytes
    print(f"scratch {scratch / 1e6:.1f} MB")
    assert scratch < 100e6


def test_pack_and_unpack_are_inverses():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = unpack_codes(packed)
    assert codes.shape == (4, 128)
    assert codes[0, :6].tolist() == [0, 0, 1, 0, 2, 0]
    assert codes[1, 0:2].tolist() == [0x0, 0x4]
    assert torch.equal(pack_codes(codes), packed)


def test_grid_from_arithmetic_is_the_format_s_grid():
    assert tuple(e2m1_values(torch.device("cpu")).tolist()) == NVFP4.grid
