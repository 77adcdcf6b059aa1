"""An NVFP4 Linear by FlashInfer's mm_fp4: layout, call and numbers, with an emulator on a CPU."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from flashinfer_mm_fp4 import check_mm_fp4_call, emulate_mm_fp4

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import NVFP4
from fp4moe.kernels.flashinfer.linear import from_prepared, padded, to_prepared
from fp4moe.kernels.linear_weight import LinearWeight
from fp4moe.linear import PackedLinear

SIZES = [(100, 48), (128, 64), (300, 176)]
DEVICES = [(10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.fixture
def mm_fp4(monkeypatch, emulated):
    """FlashInfer's GEMM: checked and computed on the CPU; returns the list of its calls."""
    import flashinfer

    real, calls = flashinfer.mm_fp4, []

    @functools.wraps(real)
    def stand_in(*args, **kwargs):
        check_mm_fp4_call(real, args, kwargs)
        calls.append(kwargs)
        return emulate_mm_fp4(**kwargs)

    monkeypatch.setattr(flashinfer, "mm_fp4", stand_in)
    return calls


def stored(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    return fp4moe.quantize_nvfp4(weight / columns**0.5)


def linear(rows, columns, bias=None):
    q = stored(rows, columns)
    parts = q.packed, q.block_scale, q.global_scale
    return fp4moe.NVFP4Linear(*parts, bias, kernel="flashinfer"), fp4moe.dequantize_nvfp4(q)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_layout_goes_there_and_back(size):
    q = stored(*size)
    scale = q.block_scale.view(torch.uint8)
    packed, tiles = to_prepared(q.packed, scale)
    rows, columns = padded(*size)
    assert packed.shape == (rows, columns // 2) and tiles.shape == (rows, columns // 16)
    assert packed.is_contiguous() and tiles.is_contiguous()
    back = from_prepared(LinearWeight(packed, tiles, q.global_scale, "nvfp4", *size))
    assert torch.equal(back[0], q.packed) and torch.equal(back[1], scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_computes_the_product_of_the_rounded_input(size, dtype, mm_fp4, claim):
    """With the format's own rounding, and the largest magnitude / 2688 as the global scale.

    Exact reciprocals on both sides may still move a value across a tie, one code in thousands;
    each moves a product by a sixth of one of K terms at most. The output is rounded to 2^-9.
    """
    claim((10, 0))
    rows, columns = size
    bias = torch.randn(rows)
    module, values = linear(rows, columns, bias)
    for tokens in (1, 5, 130):
        x = torch.randn(2, tokens, columns).to(dtype)
        half = x.to(dtype if dtype != torch.float32 else torch.bfloat16).float()
        scale = half.abs().amax() / 2688
        want = NVFP4.round_activation(half, scale) @ values.T + bias.to(dtype).float()
        got = module(x)
        assert got.shape == (2, tokens, rows) and got.dtype == dtype
        assert float((got.float() - want).norm() / want.norm()) < 2 * 2.0**-8
    assert len(mm_fp4) == 3 and mm_fp4[0]["b"].shape[1] == padded(rows, columns)[0]


@pytest.mark.parametrize("capability", DEVICES, ids=str)
def test_it_runs_there_by_name_and_is_never_chosen(capability, mm_fp4, claim):
    claim(capability)
    module, values = linear(128, 64)
    assert module.kernel == "flashinfer"
    assert torch.equal(module.dequantized(), values)
    state = module.state_dict()
    assert torch.equal(state["weight"], stored(128, 64).packed)
    # All zeros, and no tokens at all.
    assert torch.equal(module(torch.zeros(3, 64)), torch.zeros(3, 128))
    assert module(torch.zeros(0, 64)).shape == (0, 128)
    q = stored(128, 64)
    auto = fp4moe.NVFP4Linear(q.packed, q.block_scale, q.global_scale)
    assert auto.kernel != "flashinfer"


def test_gradients_are_those_of_the_decoded_weight(mm_fp4, claim):
    claim((12, 0))
    module, values = linear(100, 48)
    x = torch.randn(4, 48, requires_grad=True)
    gradient = torch.randn(4, 100)
    module(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ values)


def test_what_it_cannot_run_is_refused(claim):
    for capability in (None, (8, 0), (9, 0), (11, 0)):
        claim(capability)
        with pytest.raises(UnsupportedError, match="kernel flashinfer cannot run, because needs"):
            linear(128, 64)
    claim((10, 0))
    q = stored(128, 64)
    codes = torch.zeros(128, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="no layout for fp8, only for nvfp4"):
        PackedLinear("fp8", codes, torch.ones(()), kernel="flashinfer")
    module = fp4moe.NVFP4Linear(q.packed, q.block_scale, q.global_scale, kernel="flashinfer")
    claim(None)
    with pytest.raises(UnsupportedError, match=r"x is on cpu .*, and the kernel needs a device of"):
        module(torch.zeros(1, 64))
    with pytest.raises(ShapeError, match="linear: packed must be"):
        torch.ops.fp4moe.linear(
            torch.zeros(1, 96), *module.prepared[:3], torch.zeros(0), "nvfp4", "flashinfer", 128
        )


@pytest.mark.parametrize("damage", ["row-major b", "linear scales", "no alpha", "odd size"])
def test_the_contract_catches_wrong_calls(damage, mm_fp4, claim):
    """Each of them the library would take, or fail at, on a GPU only."""
    claim((10, 0))
    module, _ = linear(128, 64)
    module(torch.randn(3, 64))
    (call,) = mm_fp4
    real = importlib.import_module("flashinfer.gemm.gemm_base").mm_fp4
    wrong = {
        "row-major b": {"b": call["b"].contiguous()},
        "linear scales": {"a_descale": call["a_descale"][:3]},
        "no alpha": {"alpha": torch.ones(2)},
        "odd size": {"b": call["b"].T[:100].T, "b_descale": call["b_descale"].T[:100].T},
    }[damage]
    check_mm_fp4_call(real, (), call)
    with pytest.raises((AssertionError, ValueError)):
        check_mm_fp4_call(real, (), call | wrong)
