"""grouped_mm of kernel `triton` against the dequantised matrices, in the interpreter and on a GPU.

test_triton.py starts the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from triton_layers import MODES, compiled, interpreted, layer, relative

from fp4moe.activations import ACTIVATIONS
from fp4moe.formats import FORMATS
from fp4moe.kernels.grouped import combine, combine_gradient
from fp4moe.kernels.grouped_matrix import GroupedMatrix
from fp4moe.kernels.triton.kernel import TRITON

# One rounding to bfloat16 of the input (float32 only) and one of the sum; fp8_channel's gradient is
# rounded once more. The interpreter cuts, 2^-8 each; a GPU rounds, half of that.
CUT = 2 * 2.0**-8
GEMMS = {"gate_up": 2, "down": 1}


def compare(gemm, dtype, mode="sorted", tokens=3, top_k=2, device="cpu", **options):
    """Ids inside and outside the window, one twice in a row."""
    from fp4moe.kernels.triton.grouped import grouped_input_gradient, multiply_with

    window = {"num_experts": 4, "expert_offset": 1}
    weights = layer(2, 48, 112, "silu", True, device, **window, **options)
    prepared = TRITON.prepare(weights, hidden_alignment=256)
    matrix = GroupedMatrix.of(prepared.operands, gemm, weights.format, GEMMS[gemm], 1)
    bias = getattr(prepared.operands, f"{gemm}_bias")
    parts, columns = weights.dequantize(), 48 if gemm == "gate_up" else 112
    names = ("gate", "up") if gemm == "gate_up" else ("down",)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    ids = torch.randint(-1, 5, (tokens, top_k), device=device)
    ids[0] = 1
    there, local = (ids >= 1) & (ids < 3), (ids - 1).clamp(0, 1)
    mode, tile = MODES[mode].mode, MODES[mode].gate_up

    def each(rows, name):
        y = torch.einsum("tc,tkrc->tkr", rows, parts[name][local])
        if f"{name}_bias" in parts:
            y = y + parts[f"{name}_bias"][local]
        return torch.where(there[..., None], y, 0.0)

    got = multiply_with(mode, tile, x, ids, matrix, bias)
    assert got.dtype == dtype and got.shape == (tokens * top_k, matrix.rows)
    assert torch.equal(got, multiply_with(mode, tile, x, ids, matrix, bias))
    halves = got.view(tokens, top_k, len(names), -1)
    gradient, expected = torch.zeros_like(halves), torch.zeros(tokens, columns, device=device)
    for half, name in enumerate(names):
        rows = parts[name].shape[1]
        assert relative(halves[:, :, half, :rows], each(x.float(), name)) < CUT
        assert not halves[:, :, half, rows:].any()
        dy = torch.randn(tokens, top_k, rows, device=device).bfloat16()
        gradient[:, :, half, :rows] = dy
        masked = torch.where(there[..., None], dy.float(), 0.0)
        expected += torch.einsum("tkr,tkrc->tc", masked, parts[name][local])
    gradient = gradient.view(got.shape)
    to_x = grouped_input_gradient(gradient, ids, matrix, columns)
    assert to_x.dtype == dtype and relative(to_x, expected) < 1.5 * CUT
    assert not to_x[~there.any(1)].any()
    assert torch.equal(to_x, grouped_input_gradient(gradient, ids, matrix, columns))


@interpreted
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format, poisoned_empty):
    number = list(FORMATS).index(format)
    dtype, mode = (
        (torch.bfloat16, torch.float16, torch.float32)[number % 3],
        list(MODES)[number % 3],
    )
    gemm = "down" if format in ("nvfp4", "fp8_block") else "gate_up"
    compare(gemm, dtype, mode, format=format, biased=number % 2 == 0)


@interpreted
def test_one_row_a_token_and_one_token(poisoned_empty):
    compare("down", torch.bfloat16, top_k=1, tokens=20)
    compare("gate_up", torch.bfloat16, "slot", tokens=1)


ACTIVATED = [
    *((name, True) for name in ACTIVATIONS),
    ("silu(alpha=1.702)", False),
    ("relu2", False),
    ("silu(alpha=1.702,beta=1,limit=0.5)", True),
    ("silu_step(limit=0.2)", True),
    ("silu_softcap(alpha=0.6,beta=0.5)", True),
]


def compare_combined(activation, gated, dtype, rows, columns, device="cpu"):
    """As plain torch does it, which test_gradients.py compares with torch's own derivatives."""
    first = torch.randn(rows, (1 + gated) * columns, device=device).to(dtype)
    grad = torch.randn(rows, columns, device=device).to(dtype)
    form = activation, 1 + gated
    got = combine("triton", first, *form), combine_gradient("triton", grad, first, *form)
    wide = first.float(), grad.float()
    expected = (
        combine("reference", wide[0], *form),
        combine_gradient("reference", wide[1], wide[0], *form),
    )
    # One rounding to the dtype, in the interpreter a cut; the exponentials of two libraries.
    limit = max(torch.finfo(dtype).eps, 1e-5)
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == dtype and relative(actual, wanted) < limit


@interpreted
@pytest.mark.parametrize(("activation", "gated"), ACTIVATED)
def test_every_activation_between_the_products(activation, gated, poisoned_empty):
    dtype = (torch.bfloat16, torch.float32)[ACTIVATED.index((activation, gated)) % 2]
    compare_combined(activation, gated, dtype, 3, 700)


@interpreted
def test_through_the_operator(poisoned_empty):
    weights = layer(3, 64, 64, "silu", True)
    operands = TRITON.prepare(weights, hidden_alignment=256).operands
    matrix = GroupedMatrix.of(operands, "gate_up", "nvfp4", 2, 0)
    x, ids = torch.randn(4, 64).bfloat16().requires_grad_(), torch.randint(0, 3, (4, 2))
    operator = torch.ops.fp4moe.grouped_mm.default
    out = operator(x, ids, *matrix[:3], torch.empty(0), "nvfp4", "triton", 2, 0)
    parts = weights.dequantize()
    rows = torch.cat((parts["gate"], parts["up"]), 1)[ids]
    wide = x.detach().float().requires_grad_()
    expected = torch.einsum("tc,tkrc->tkr", wide, rows).flatten(0, 1)
    assert relative(out, expected) < CUT
    gradient = torch.randn(out.shape).bfloat16()
    got = torch.autograd.grad(out, x, gradient)[0]
    assert relative(got, torch.autograd.grad(expected, wide, gradient.float())[0]) < CUT


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_every_variant_compiles(capability, tmp_path, monkeypatch):
    """Formats and tiles are those of test_triton_gradients.py, which stores float32 sums."""
    from triton_layers import check_variants

    from fp4moe.kernels.triton.activation import activation_constants
    from fp4moe.kernels.triton.combine import combine_gradient_kernel, combine_rows_kernel
    from fp4moe.kernels.triton.gemm import gate_up_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"pointers": {"first": "*bf16", "grad": "*bf16"}}
    check_variants(
        [
            (kernel, {"GATED": gated, "BLOCK": 1024, **activation_constants(name)}, 4, pointers)
            for kernel in (combine_rows_kernel, combine_gradient_kernel)
            for name, gated in (("gelu_tanh", True), ("relu2", False))
        ],
        capability,
    )
    tile = MODES["sorted"].gate_up
    form = {"SLOTS": tile.slots, "ROWS": tile.rows, "SLABS": tile.slabs, "STAGES": tile.stages}
    form |= {"ACTIVATION": "sums", "ALPHA": 1.0, "BETA": 0.0, "LIMIT": 0.0, "MORE": 0, "MODE": 1}
    form |= {"WHOLE": True, "ASSEMBLY": True, "WAIT": False, "bias": None}
    check_variants(
        [
            (
                gate_up_kernel,
                form | {"FORMAT": format, "GATED": gated, "FP16": fp16},
                tile.warps,
                {"pointers": {"out": out}, "hidden": out},
            )
            for format, gated, out, fp16 in (
                ("nvfp4", True, "*bf16", False),
                ("fp8_block", False, "*bf16", False),
                ("mxfp8", False, "*fp16", True),
            )
        ],
        capability,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_on_the_gpu(tokens, gemm, format, poisoned_empty):
    for mode in MODES if tokens == 33 else ("sorted",):
        compare(gemm, torch.bfloat16, mode, tokens, device="cuda", format=format, biased=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("activation", "gated"), ACTIVATED)
def test_activations_on_the_gpu(activation, gated, poisoned_empty):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        compare_combined(activation, gated, dtype, 301, 704, "cuda")
