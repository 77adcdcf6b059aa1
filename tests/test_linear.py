"""Quantised Linears: numbers against ModelOpt's own tensors, storage, casts, errors."""

from __future__ import annotations

import pytest
import torch

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS

E4M3 = torch.float8_e4m3fn


def nvfp4_parts(rows, columns):
    """A weight quantised by ModelOpt, and what ModelOpt decodes it to."""
    NVFP4QTensor = pytest.importorskip(
        "modelopt.torch.quantization.qtensor.nvfp4_tensor", reason="optional package"
    ).NVFP4QTensor
    weight = torch.randn(rows, columns)
    q, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    decoded = q.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return (q._quantized_data, scale, scale_2.reshape(())), decoded


def fp8_parts(rows, columns):
    FP8QTensor = pytest.importorskip(
        "modelopt.torch.quantization.qtensor.fp8_tensor", reason="optional package"
    ).FP8QTensor
    weight = torch.randn(rows, columns)
    scale = weight.abs().amax() / 448
    q, scale = FP8QTensor.quantize(weight, scales=scale)
    return (q._quantized_data, scale), q.dequantize(torch.float32, scale=scale)


MAKERS = {"nvfp4": (fp4moe.NVFP4Linear, nvfp4_parts), "fp8": (fp4moe.FP8Linear, fp8_parts)}


@pytest.fixture(params=MAKERS)
def kind(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 16), (33, 48), (5, 112)], ids=str)
def test_equals_a_linear_of_what_modelopt_decodes(kind, size, dtype):
    make, parts = kind
    stored, decoded = parts(*size)
    bias = torch.randn(size[0])
    linear = make(*stored, bias=bias)
    assert torch.equal(linear.dequantized(), decoded)
    hidden = torch.randn(2, 3, size[1]).to(dtype)
    expected = torch.nn.functional.linear(hidden, decoded.to(dtype), bias.to(dtype))
    actual = linear(hidden)
    assert actual.dtype == dtype
    # The very same call of torch on the very same numbers.
    assert torch.equal(actual, expected)


def test_block_worked_by_hand():
    packed = torch.tensor([[0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED, 0x0F]], dtype=torch.uint8)
    linear = fp4moe.NVFP4Linear(packed, torch.tensor([[2.0]]).to(E4M3), torch.tensor(0.5))
    ladder = [0.5, 1, 1.5, 2, 3, 4, 6]
    assert linear.dequantized()[0].tolist() == [*ladder, 0, *(-x for x in ladder), 0]
    assert not linear.dequantized().signbit()[0, 7]


def test_fp8_scale_of_each_row():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]]).to(E4M3)
    linear = fp4moe.FP8Linear(weight, torch.tensor([[2.0], [0.25]]))
    assert linear.dequantized().tolist() == [[2.0, -4.0], [0.75, 0.125]]


def test_casting_the_model_keeps_codes_and_scales(kind):
    make, parts = kind
    stored, decoded = parts(8, 32)
    linear = make(*stored, bias=torch.zeros(8), input_scale=torch.tensor(0.1))
    for cast in (linear.to(torch.bfloat16), linear.half(), linear.float(), linear.bfloat16()):
        assert torch.equal(cast.dequantized(), decoded)
    assert linear.bias.dtype == torch.bfloat16
    assert linear.input_scale == torch.tensor(0.1)
    assert linear.to("meta").weight.is_meta


def test_state_dict_is_packed_and_loads_again(kind):
    make, parts = kind
    stored, decoded = parts(8, 32)
    linear = make(*stored, bias=torch.randn(8), input_scale=torch.tensor(0.1))
    state = linear.state_dict()
    names = {"weight", "weight_scale", "bias", "input_scale"}
    assert set(state) == names | ({"weight_scale_2"} if make is fp4moe.NVFP4Linear else set())
    assert state["weight"].element_size() == 1
    other = make(*parts(8, 32)[0], bias=torch.zeros(8), input_scale=torch.tensor(0.2))
    other.load_state_dict(state)
    assert torch.equal(other.dequantized(), decoded)
    with pytest.raises(RuntimeError, match="weight_scale"):
        other.load_state_dict({k: v for k, v in state.items() if k != "weight_scale"})


def test_compiles_without_a_break(kind, fresh_dynamo):
    make, parts = kind
    stored, _ = parts(8, 32)
    linear = make(*stored)
    hidden = torch.randn(3, 32)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), linear(hidden))


@pytest.mark.parametrize(
    ("index", "change", "name"),
    [
        (0, lambda t: t.float(), "weight must be torch.uint8"),
        (0, lambda t: t[:, :-1], "weight must be"),
        (1, lambda t: t.float(), "weight_scale must be"),
        (1, lambda t: t[:-1], "weight_scale must be|weight must be"),
        (2, lambda t: t.reshape(1), "weight_scale_2 must be"),
        (2, lambda t: t.double(), "weight_scale_2 must be"),
        (1, lambda t: t.to("meta"), "on meta|on cpu"),
    ],
)
def test_refuses_tensors_that_do_not_fit(index, change, name):
    stored = list(nvfp4_parts(8, 32)[0])
    stored[index] = change(stored[index])
    with pytest.raises(ShapeError, match=f"NVFP4Linear: .*({name})"):
        fp4moe.NVFP4Linear(*stored)


def test_refuses_other_biases_and_scales():
    stored, _ = fp8_parts(8, 32)
    with pytest.raises(ShapeError, match=r"bias must be torch.float32 \[8\]"):
        fp4moe.FP8Linear(*stored, bias=torch.zeros(7))
    with pytest.raises(ShapeError, match="bias must be bfloat16"):
        fp4moe.FP8Linear(*stored, bias=torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ShapeError, match="input_scale must be"):
        fp4moe.FP8Linear(*stored, input_scale=torch.ones(1))
    with pytest.raises(ShapeError, match=r"weight_scale must be .* \[\] or \[8, 1\]"):
        fp4moe.FP8Linear(stored[0], torch.ones(8))


# Of every format: a weight as the format's own quantiser stores it.


def format_parts(form, rows, columns):
    format, weight = FORMATS[form], torch.randn(rows, columns)
    scale = format.shared_scale(torch.stack(torch.aminmax(weight)))
    stored = format.quantize(weight, scale, "max")
    number = form == "fp8"
    block_scale = stored.block_scale.reshape(()) if number else stored.block_scale
    parts = [stored.packed, block_scale]
    parts += [stored.global_scale] if format.globally_scaled else []
    return parts, format.dequantize(stored, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 32), (33, 96), (160, 192), (256, 128), (128, 160)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_equals_a_linear_of_what_it_stands_for(form, size, dtype):
    parts, decoded = format_parts(form, *size)
    bias = torch.randn(size[0])
    linear = fp4moe.PackedLinear(form, *parts, bias=bias)
    assert torch.equal(linear.dequantized(), decoded)
    hidden = torch.randn(2, 3, size[1]).to(dtype)
    expected = torch.nn.functional.linear(hidden, decoded.to(dtype), bias.to(dtype))
    assert torch.equal(linear(hidden), expected)
    assert f"format={form}" in repr(linear)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_kept_cast_saved_and_compiled(form, fresh_dynamo):
    parts, decoded = format_parts(form, 160, 192)
    linear = fp4moe.PackedLinear(form, *parts, input_scale=torch.tensor(0.1))
    for cast in (linear.bfloat16(), linear.float()):
        assert torch.equal(cast.dequantized(), decoded)
    names = {"weight", "weight_scale", "input_scale"}
    state = linear.state_dict()
    assert set(state) == names | ({"weight_scale_2"} if form == "nvfp4" else set())
    other = fp4moe.PackedLinear(form, *format_parts(form, 160, 192)[0], input_scale=torch.ones(()))
    other.load_state_dict(state)
    assert torch.equal(other.dequantized(), decoded)
    hidden = torch.randn(3, 192)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), linear(hidden))


@pytest.mark.parametrize("form", ["fp8_block", "mxfp8", "mxfp4"])
def test_each_format_refuses_tensors_that_do_not_fit(form):
    (weight, scale), _ = format_parts(form, 160, 192)
    plain = scale.float()
    for other in (scale[:-1], plain.double(), scale[None], scale.to("meta")):
        with pytest.raises(ShapeError, match=r"^PackedLinear: weight_scale must be torch\."):
            fp4moe.PackedLinear(form, weight, other)
    with pytest.raises(ShapeError, match=r"^PackedLinear: weight(_scale)? must be"):
        fp4moe.PackedLinear(form, weight[:, :-64], scale)
    with pytest.raises(ShapeError, match=r"weight_scale_2 must be None, since .* has no global"):
        fp4moe.PackedLinear(form, weight, scale, torch.ones(()))
    with pytest.raises(UnsupportedError, match=r"format must be one of nvfp4, .*; got 'fp7'"):
        fp4moe.PackedLinear("fp7", weight, scale)


def test_a_global_scale_is_asked_for():
    parts, _ = format_parts("nvfp4", 8, 32)
    with pytest.raises(ShapeError, match=r"weight_scale_2 must be torch.float32 .*; got None"):
        fp4moe.PackedLinear("nvfp4", *parts[:2])
