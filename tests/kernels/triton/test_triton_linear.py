"""A quantised Linear in Triton: layout, results in the interpreter and on a GPU, compilation.

The interpreter's cases are started by test_triton.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from triton_layers import HAS_TRITON, INTERPRETED, check_variants, compiled, interpreted

import fp4moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.formats.base import as_bytes
from fp4moe.kernels.linear_weight import LinearWeight
from fp4moe.kernels.triton import linear as launches
from fp4moe.kernels.triton.linear import (
    LinearTile,
    choose_tile,
    decode_weight,
    from_prepared,
    run_linear,
    run_with_tile,
    steps_of,
    to_prepared,
)

if HAS_TRITON and not INTERPRETED:
    from fp4moe.kernels.triton import linear_gemm

# Unit roundoffs; the interpreter cuts float32 to bfloat16 instead of rounding.
ROUNDOFF = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}
TILES = {
    "plain": LinearTile(16, 1, 64, 1, 4, 3),
    "one token": LinearTile(1, 16, 8, 1, 4, 3),
    "chunks": LinearTile(4, 4, 16, 2, 4, 3),
    "splits": LinearTile(16, 2, 32, 1, 4, 3, 2),
    "rows behind the end": LinearTile(16, 1, 128, 4, 4, 2, 3),
}
# Multiples of 64 and not, one slab and more, fewer than a step has.
SIZES = [(33, 96), (70, 320)]


def stored(form, rows, columns, device="cpu"):
    """Codes, block scale and global scale of random weights, and their values in float32."""
    format = FORMATS[form]
    weight = torch.randn(rows, columns, device=device)
    found = format.quantize(weight, format.shared_scale(torch.stack(torch.aminmax(weight))), "max")
    scale = found.block_scale
    if scale.dtype == torch.float32 and form != "fp8":
        scale = scale * (0.5 + torch.rand_like(scale))
        found = type(found)(found.packed, scale, found.global_scale)
    values = format.dequantize(found, torch.float32)
    scale = scale.reshape(()) if form == "fp8" else scale
    return (found.packed, scale, found.global_scale), values


def prepared(form, rows, columns, device="cpu"):
    (packed, scale, global_scale), values = stored(form, rows, columns, device)
    both = to_prepared(form, as_bytes(packed), as_bytes(scale))
    return LinearWeight(*both, global_scale, form, rows, columns), values


def linear(form, rows, columns, device="cpu", bias=None, **keywords):
    (packed, scale, global_scale), values = stored(form, rows, columns, device)
    global_scale = global_scale if FORMATS[form].globally_scaled else None
    module = fp4moe.PackedLinear(form, packed, scale, global_scale, bias, **keywords)
    return module, values


def check(got, x, values, bias, rounded_weights=False):
    """Compare with float64: one rounding of the result, float32 sums, and maybe of the weights."""
    wide, weight = x.double(), values.double()
    expected = F.linear(wide, weight, None if bias is None else bias.double())
    largest = F.linear(wide.abs(), weight.abs()).norm() / expected.norm()
    unit = ROUNDOFF.get(x.dtype, 0.0)
    limit = unit + (x.shape[-1] + 2) * 2.0**-24 * largest + rounded_weights * unit * largest
    error = (got.double() - expected).norm() / expected.norm()
    assert got.dtype == x.dtype and got.shape == expected.shape
    assert error <= limit, (error, limit)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [(1, 32), *SIZES], ids=str)
def test_the_layout_has_an_exact_inverse(form, size):
    (packed, scale, global_scale), _ = stored(form, *size)
    both = to_prepared(form, as_bytes(packed), as_bytes(scale))
    back = from_prepared(LinearWeight(*both, global_scale, form, *size))
    assert torch.equal(back[0], as_bytes(packed)) and torch.equal(back[1], as_bytes(scale))


@interpreted
@pytest.mark.parametrize("number", range(len(TILES)), ids=list(TILES))
@pytest.mark.parametrize("form", FORMATS)
def test_each_tile_equals_a_linear_in_float64(form, number):
    both = (number + list(FORMATS).index(form)) % 2
    dtype = (torch.bfloat16, torch.float16)[both]
    # Every format and every tile meets each size.
    for size in SIZES[both::2]:
        weight, values = prepared(form, *size)
        bias = torch.randn(size[0])
        # Rows with a stride of their own; more than one tile of tokens with one token a tile.
        x = torch.randn(2, size[1] + 16).to(dtype)[:, : size[1]]
        check(run_with_tile(list(TILES.values())[number], x, weight, bias), x, values, bias)


@interpreted
@pytest.mark.parametrize("form", FORMATS)
def test_a_decoded_copy_is_the_weight(form):
    for size in SIZES:
        weight, values = prepared(form, *size)
        # With a global scale the products stand in another order: one rounding more.
        torch.testing.assert_close(
            decode_weight(weight, torch.float32), values, rtol=2**-23, atol=0
        )


@interpreted
def test_many_tokens_and_float32_take_a_copy(monkeypatch):
    monkeypatch.setattr(launches, "COPY_TOKENS", 4)
    weight, values = prepared("nvfp4", 48, 128)
    bias = torch.randn(48)
    calls = []
    monkeypatch.setattr(launches, "run_with_tile", lambda *args: calls.append(args))
    for x in (torch.randn(4, 128).bfloat16(), torch.randn(1, 128)):
        check(run_linear(x, weight, bias), x, values, bias, rounded_weights=True)
    assert not calls
    run_linear(torch.randn(3, 128).bfloat16(), weight, bias)
    assert len(calls) == 1


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64, 65, 200, 512, 1023])
@pytest.mark.parametrize("size", [(1, 32), (2816, 4096), (10304, 2688), (262144, 2816)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_the_rule_gives_tiles_that_can_run(form, size, tokens):
    tile = choose_tile(tokens, *size, 132)
    constants, slabs, steps, split_steps, splits = steps_of(tile, form, size[1])
    width, whole = constants["SLABS"], constants["WHOLE"]
    for number in (tile.slots, tile.chunks, tile.rows, width):
        assert number & (number - 1) == 0 < number
    assert tile.slots * tile.chunks >= 16 and 64 <= tile.rows * tile.chunks <= 128
    assert width <= slabs == -(-size[1] // 64)
    assert whole == (size[1] % (64 * tile.chunks * width) == 0)
    # All slabs, and no split without a step.
    assert tile.chunks * width * steps >= slabs > tile.chunks * width * (steps - 1)
    assert split_steps * splits >= steps > split_steps * (splits - 1)
    if form == "fp8_block":
        assert width == 1 or (width == 2 and whole)
    # The scratch of splits stays small.
    assert splits == 1 or splits * tokens <= 4096


@interpreted
@pytest.mark.parametrize("form", FORMATS)
def test_the_module_is_logical_outside_and_prepared_inside(form):
    bias = torch.randn(48)
    plain, values = linear(form, 48, 160, bias=bias)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    module, _ = linear(form, 48, 160, bias=torch.zeros(48), kernel="triton")
    assert (plain.kernel, module.kernel) == ("reference", "triton")
    module.load_state_dict(state)
    held = dict(module.named_buffers())
    assert not torch.equal(
        held["prepared_weight"].view(-1)[:8], as_bytes(plain.weight).view(-1)[:8]
    )
    assert not {"weight", "weight_scale"} & set(held)
    for name, tensor in module.state_dict().items():
        assert (
            torch.equal(as_bytes(tensor), as_bytes(state[name]))
            and tensor.dtype == state[name].dtype
        )
    assert torch.equal(module.dequantized(), plain.dequantized())
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((160,), (2, 3, 160)):
            x = torch.randn(*shape).to(dtype)
            check(module(x), x, values, bias)
    x = torch.randn(3, 160)
    torch.testing.assert_close(module(x), plain(x))
    assert module(x[:0].bfloat16()).shape == (0, 48)
    twin = copy.deepcopy(module).half()
    assert twin.bias.dtype == torch.float16 and torch.equal(twin.dequantized(), values)
    assert "kernel=triton" in repr(module)


@interpreted
def test_a_write_to_the_handed_out_state_is_refused():
    module, _ = linear("nvfp4", 64, 64, kernel="triton")
    state = module.state_dict()
    state["weight"].zero_()
    with pytest.raises(UnsupportedError, match=r"weight of its state_dict\(\) were written to"):
        module(torch.randn(1, 64).bfloat16())
    module.load_state_dict(state)
    assert not module(torch.randn(1, 64).bfloat16()).any()
    with pytest.raises(UnsupportedError, match="weight cannot be set alone"):
        module.weight = state["weight"]


@interpreted
def test_gradients_of_input_and_bias():
    # Not bfloat16, which the interpreter cuts where it decodes the weight.
    bias = torch.randn(48)
    module, values = linear("nvfp4", 48, 96, bias=bias, kernel="triton")
    module.bias.requires_grad_()
    x = torch.randn(2, 3, 96).half().requires_grad_()
    seed = torch.randn(2, 3, 48).half()
    module(x).backward(seed)
    weight = values.half()
    expected = seed @ weight
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(module.bias.grad, seed.float().sum((0, 1)))


def operands(module):
    absent = module.prepared_absent
    bias = absent if module.bias is None else module.bias
    return (*module.prepared[:3], bias, module.format, module.kernel, module.out_features)


@interpreted
@pytest.mark.parametrize("form", ["nvfp4", "fp8", "fp8_block", "mxfp4"])
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_opcheck(form, kernel):
    module, _ = linear(form, 48, 96, bias=torch.randn(48), kernel=kernel)
    weights = [as_bytes(t) for t in module.prepared[:3]]
    x = torch.randn(2, 3, 96).bfloat16()
    settings = operands(module)[4:]
    for given in (x, x[:, :0], x.clone().requires_grad_()):
        opcheck(torch.ops.fp4moe.linear.default, (given, *weights, module.bias, *settings))
    opcheck(torch.ops.fp4moe.linear_weight.default, (*weights, *settings, 96, torch.bfloat16))


@interpreted
def test_the_operator_refuses_what_does_not_fit():
    module, _ = linear("nvfp4", 48, 96, kernel="triton")
    op, x, args = torch.ops.fp4moe.linear.default, torch.randn(2, 96).bfloat16(), operands(module)
    for place, wrong, text in (
        (0, args[0][:, :-1], "linear: packed must be torch.uint8"),
        (1, args[1].float(), "linear: block_scale must be torch.uint8"),
        (2, torch.ones(2), "linear: global_scale must be torch.float32"),
        (3, torch.ones(47), r"linear: bias must be float \[48\], or \[0\] for none"),
        (4, "fp7", "linear: format must be one of"),
        (5, "cutlass", "linear: kernel must be one of"),
        (6, 200, "linear: packed must be"),
    ):
        changed = [*args[:place], wrong, *args[place + 1 :]]
        with pytest.raises((ShapeError, UnsupportedError), match=text):
            op(x, *changed)
    with pytest.raises(ShapeError, match="linear: packed must be"):
        op(torch.randn(2, 32).bfloat16(), *args)
    with pytest.raises(ShapeError, match="linear: x must be float"):
        op(torch.ones(2, 96, dtype=torch.int32), *args)


@interpreted
def test_compiled_and_exported(fresh_dynamo):
    module, values = linear("nvfp4", 48, 96, bias=torch.randn(48), kernel="triton")
    module.state_dict()  # its watch must not break the graph
    compiled_module = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    # Not bfloat16, which the interpreter cuts where it decodes a weight for the backward.
    x = torch.randn(3, 96).half()
    for given in (x, x[:2], x[:1]):
        assert torch.equal(compiled_module(given), module(given))
    trained = x.clone().requires_grad_()
    compiled_module(trained).float().sum().backward()
    torch.testing.assert_close(trained.grad, torch.ones(3, 48).half() @ values.half())
    tokens = torch.export.Dim("tokens", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"fp4moe.linear.default"}
    longer = torch.randn(5, 96).half()
    assert torch.equal(program.module()(longer), module(longer))


@interpreted
def test_autocast_is_that_of_a_linear():
    module, _ = linear("nvfp4", 48, 96, kernel="triton")
    x = torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.bfloat16()))
        assert module(x).dtype == F.linear(x, torch.randn(48, 96)).dtype == torch.bfloat16


@compiled
def test_triton_is_refused_where_it_does_not_run():
    with pytest.raises(UnsupportedError, match=r"^PackedLinear: kernel triton cannot run, because"):
        linear("nvfp4", 64, 64, kernel="triton")
    with pytest.raises(UnsupportedError, match="PackedLinear: kernel must be one of auto"):
        linear("nvfp4", 64, 64, kernel="marlin")


def variants():
    """(kernel, constants, warps, further) of the tiles that the rule gives."""
    shapes = [(8192, 2816), (200, 160)]
    for number, form in enumerate(FORMATS):
        scales = "*i32" if form in ("nvfp4", "mxfp8", "mxfp4") else "*fp32"
        # The largest tiles need most registers and memory; NVFP4 has all of them.
        others = (4, 16, 32, 64) if form == "nvfp4" else ()
        for rows, columns in shapes[: 2 if others else 1]:
            for tokens in (1, *others, 511):
                tile = choose_tile(tokens, rows, columns, 132)
                steps, fp16 = steps_of(tile, form, columns), number % 2 == 1
                constants = steps.constants | {"FP16": fp16, "ASSEMBLY": True, "WAIT": False}
                constants |= {"bias": None} if steps.splits > 1 else {}
                pointers = {"scales": scales, "x": "*fp16" if fp16 else "*bf16"}
                pointers["out"] = "*fp32" if steps.splits > 1 else pointers["x"]
                yield linear_gemm.linear_kernel, constants, tile.warps, {"pointers": pointers}
        constants = {"ROWS": 64, "SLABS": 2, "ASSEMBLY": True, "FORMAT": form}
        yield linear_gemm.weight_kernel, constants, 4, {"pointers": {"scales": scales}}
    for splits in (2, 8):
        constants = {"SPLITS": splits, "BLOCK": 1024}
        yield linear_gemm.sum_splits_kernel, constants, 4, {"pointers": {"partial": "*fp32"}}


@compiled
@pytest.mark.parametrize(
    "capability",
    [pytest.param(t, marks=() if t == 90 else pytest.mark.slow) for t in (80, 89, 90, 100, 120)],
)
def test_every_variant_compiles(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_variants(variants(), capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 100, 600, 2000])
@pytest.mark.parametrize("form", FORMATS)
def test_on_the_gpu(form, tokens, dtype, poisoned_empty):
    for size in ((1, 32), (200, 1376), (704, 2816)):
        bias = torch.randn(size[0], device="cuda")
        module, values = linear(form, *size, device="cuda", bias=bias)
        assert module.kernel == "triton"
        x = torch.randn(tokens, size[1], device="cuda").to(dtype)
        check(module(x), x, values, bias, rounded_weights=tokens >= launches.COPY_TOKENS)
        assert torch.equal(module(x), module(x))
        moved = copy.deepcopy(module).cpu()
        assert moved.kernel == "reference" and torch.equal(moved.dequantized(), values.cpu())
        again = moved.cuda()
        assert again.kernel == "triton" and torch.equal(again(x), module(x))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100, 2000])
def test_in_a_cuda_graph(tokens):
    module, values = linear("nvfp4", 704, 2816, device="cuda")
    x = torch.zeros(tokens, 2816, device="cuda", dtype=torch.bfloat16)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    check(out, x, values, None, rounded_weights=tokens >= launches.COPY_TOKENS)
    assert torch.equal(out, module(x))
