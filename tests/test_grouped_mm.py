"""fp4moe::grouped_mm and its gradient, against the dequantised matrices in torch's own autograd."""

from __future__ import annotations

import pytest
import torch
from allocated_bytes import AllocatedBytes
from torch.library import opcheck

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.kernels import KERNELS, get_kernel
from fp4moe.kernels.grouped import GROUPED_KERNELS
from fp4moe.kernels.grouped_matrix import GroupedMatrix
from fp4moe.testing import make_layer, relative_error

E, OFFSET, LOCAL, H, I, T, K = 8, 2, 5, 48, 32, 9, 3  # noqa: E741
OPERATOR = torch.ops.fp4moe.grouped_mm.default
BACKWARD = torch.ops.fp4moe.grouped_mm_backward.default
# Sums of up to 3 * 64 float32 products in another order: 1e-7 each, by the root of their number.
EXACT = 1e-6
GEMMS = {"gate_up": 2, "down": 1}


def arguments(gemm="gate_up", dtype=torch.float32, tokens=T, biased=True, **options):
    """Those of the operator, and the float matrices [L, rows, columns] and biases behind them."""
    window = {"num_experts": E, "expert_offset": OFFSET}
    weights = make_layer(LOCAL, H, I, biased=biased, **window, **options)
    operands = get_kernel("reference").prepare(weights, hidden_alignment=256).operands
    matrix = GroupedMatrix.of(operands, gemm, weights.format, GEMMS[gemm], OFFSET)
    parts = weights.dequantize()
    names = ("gate", "up") if gemm == "gate_up" else ("down",)
    bias = getattr(operands, f"{gemm}_bias") if biased else torch.empty(0)
    # Sizes that the format pads: behind them everything is zero.
    floats = torch.zeros(LOCAL, matrix.rows, H if gemm == "gate_up" else I)
    for half, name in zip(floats.chunk(len(names), 1), names, strict=True):
        half[:, : parts[name].shape[1]] = parts[name]
    ids = torch.randint(-1, E + 1, (tokens, K))
    if tokens:
        ids[0] = OFFSET
    x = torch.randn(tokens, floats.shape[2]).to(dtype).requires_grad_()
    settings = weights.format, "reference", GEMMS[gemm], OFFSET
    return (x, ids, *matrix[:3], bias, *settings), floats


def definition(x, ids, floats, bias):
    local = ids - OFFSET
    there = ((local >= 0) & (local < LOCAL)).reshape(-1, 1)
    local = local.clamp(0, LOCAL - 1)
    y = torch.einsum("tc,tkrc->tkr", x, floats[local]).flatten(0, 1)
    return torch.where(there, y + bias[local].flatten(0, 1) if bias.numel() else y, 0.0)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, gemm):
    args, floats = arguments(gemm, format=format, biased=format != "fp8")
    got = OPERATOR(*args)
    wide = args[0].detach().requires_grad_()
    expected = definition(wide, args[1], floats, args[5])
    assert got.shape == expected.shape and relative_error(got, expected) < EXACT
    assert not got[(expected == 0).all(1)].any()
    grad = torch.randn_like(expected)
    to_x = torch.autograd.grad(got, args[0], grad)[0]
    assert relative_error(to_x, torch.autograd.grad(expected, wide, grad)[0]) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype):
    args, floats = arguments(dtype=dtype)
    got = OPERATOR(*args)
    wide = args[0].detach().float().requires_grad_()
    expected = definition(wide, args[1], floats, args[5])
    assert relative_error(got, expected.to(dtype)) < 0.1 * torch.finfo(dtype).eps
    grad = torch.randn_like(expected).to(dtype)
    to_x = torch.autograd.grad(got, args[0], grad)[0]
    wanted = torch.autograd.grad(expected, wide, grad.float())[0].to(dtype)
    assert to_x.dtype == dtype and relative_error(to_x, wanted) < 0.1 * torch.finfo(dtype).eps


def test_no_rows():
    args, _ = arguments(tokens=0)
    out = OPERATOR(*args)
    assert out.shape == (0, 2 * I)
    assert torch.autograd.grad(out.sum(), args[0])[0].shape == (0, H)


def test_strides_of_rows_and_gradient():
    args, _ = arguments()
    turned = args[0].detach().t().contiguous().t().requires_grad_()
    results = [torch.autograd.grad(OPERATOR(x, *args[1:]).sum(), x)[0] for x in (args[0], turned)]
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize(("gemm", "tokens"), [("gate_up", T), ("down", 0)])
def test_opcheck(gemm, tokens):
    args, _ = arguments(gemm, tokens=tokens, biased=gemm == "down")
    opcheck(OPERATOR, args)
    x, ids, *matrix = args
    grad = torch.randn(tokens * K, matrix[0].shape[1])
    opcheck(BACKWARD, (grad, ids, *matrix[:3], *matrix[4:], x.shape[1]))


def test_one_expert_is_float_at_a_time_and_nothing_float_is_saved():
    weights = make_layer(32, 128, 128)
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)
    matrix = GroupedMatrix.of(prepared.operands, "gate_up", "nvfp4", 2, 0)
    x, ids = torch.randn(4, 128, requires_grad=True), torch.arange(32).view(4, 8)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with (
        AllocatedBytes(*matrix[:3]) as allocated,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        out = OPERATOR(x, ids, *matrix[:3], torch.empty(0), "nvfp4", "reference", 2, 0)
        torch.autograd.grad(out.sum(), x)
    one = 2 * 128 * 128 * 4
    # All of them would be 32; the rows are 32 of 128 and of 256.
    assert allocated.peak < 4 * one
    assert sum(t.nbytes for t in saved) == ids.nbytes + sum(t.nbytes for t in matrix[:3])


# Refusals.


def test_a_second_gradient_is_refused():
    args, _ = arguments()
    first = torch.autograd.grad(OPERATOR(*args).square().sum(), args[0], create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"^grouped_mm: its gradient has no gradient, "):
        first.sum().backward()


@pytest.mark.parametrize("kernel", sorted(KERNELS.keys() - {*GROUPED_KERNELS}))
def test_other_kernels_name_those_that_have_it(kernel):
    args, _ = arguments()
    with pytest.raises(UnsupportedError) as raised:
        OPERATOR(*args[:7], kernel, *args[8:])
    text = str(raised.value)
    assert text.startswith("grouped_mm: the two products of experts prepared for kernel ")
    assert text.endswith('Load or replace the model with kernel="triton" or kernel="reference".')


@pytest.mark.parametrize(("place", "change", "text"), [
    (0, lambda x: x[:, :0], r"x must have 1 to 48 columns"),
    (0, lambda x: x.double(), r"x must be bfloat16, float16 or float32"),
    (1, lambda ids: ids[:-1], r"expert_ids must have 9 rows"),
    (1, lambda ids: ids.float(), r"expert_ids must be int32 or int64 \[T, K\]"),
    (3, lambda scale: scale[:-1], r"block_scale must be torch.uint8 \[5, 64, 3\]"),
    (5, lambda bias: bias[:, :-1], r"bias must be float32 \[5, 64\], or \[0\]"),
    (8, lambda halves: 3, r"halves must be 1, or 2 for gate and up; got 3"),
])  # fmt: skip
def test_wrong_arguments_are_named(place, change, text):
    args, _ = arguments()
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    args[place] = change(args[place])
    with pytest.raises(ShapeError, match=rf"^grouped_mm: {text}"):
        OPERATOR(*args)


def test_a_gradient_of_another_shape_is_refused():
    (_, ids, *matrix), _ = arguments()
    with pytest.raises(ShapeError, match=r"^grouped_mm_backward: grad must be \[27, 64\]"):
        BACKWARD(torch.randn(T, 2 * I), ids, *matrix[:3], *matrix[4:], H)
