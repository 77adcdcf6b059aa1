"""The operator: schema, shapes, strides, compilers, what leaks, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from refusals import assert_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fp4moe import ExpertWeights, fused_moe
from fp4moe.activations import ACTIVATIONS
from fp4moe.arguments import (
    FloatMoeArguments,
    FloatMoeFromLogitsArguments,
    MoeArguments,
    MoeFromLogitsArguments,
)
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import get_kernel
from fp4moe.ops import nvfp4_moe_arguments
from fp4moe.reference import moe_definition, reference, reference_w4a4
from fp4moe.testing import make_layer

OP = torch.ops.fp4moe.nvfp4_moe.default
REFUSE = torch.ops.fp4moe.refuse_backward.default
DEFINITIONS = {"reference": reference, "reference_w4a4": reference_w4a4}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
L, I, H, K = 6, 32, 48, 3  # noqa: E741


def expert_weights(gated=True, activation="silu", **kwargs):
    generator = torch.Generator().manual_seed(1)
    return make_layer(L, H, I, activation, gated, generator=generator, **kwargs)


WEIGHTS = expert_weights()


def routed(tokens, dtype=torch.float32, ids_dtype=torch.int64, experts=L):
    ids = torch.randint(0, experts, (tokens, K), dtype=ids_dtype)
    return torch.randn(tokens, H).to(dtype), ids, torch.rand(tokens, K).to(dtype)


def arguments(weights=WEIGHTS, kernel="reference"):
    prepared = get_kernel(kernel).prepare(weights, hidden_alignment=256)
    return nvfp4_moe_arguments(prepared, kernel)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("moe", MoeArguments),
        ("moe_from_logits", MoeFromLogitsArguments),
        ("nvfp4_moe", MoeArguments),
        ("nvfp4_moe_from_logits", MoeFromLogitsArguments),
        ("float_moe", FloatMoeArguments),
        ("float_moe_from_logits", FloatMoeFromLogitsArguments),
    ],
)
def test_arguments_are_in_the_order_of_the_schema(name, arguments):
    schema = getattr(torch.ops.fp4moe, name).default._schema
    args = [
        [argument.name] if str(argument.type) == "List[Tensor]" else argument.name
        for argument in schema.arguments
    ]
    given = arguments.read(args)
    # What the schemas for NVFP4 without biases leave out.
    absent = {"format": "nvfp4", "gate_up_bias": None, "down_bias": None}
    for part in given:
        for field, value in part._asdict().items() if isinstance(part, tuple) else ():
            if field not in args and [field] not in args and field in absent:
                assert value == absent[field]
                continue
            # The fields of a routing are shorter: `method` is the schema's `routing_method`.
            assert (value[0] if isinstance(value, tuple) else value) in (field, f"routing_{field}")
    if not name.startswith("float"):
        assert given.operator is getattr(torch.ops.fp4moe, name).default
    plain = {field: value for field, value in given._asdict().items() if isinstance(value, str)}
    assert all(field == value for field, value in plain.items()) and "hidden" in plain
    assert list(given.flat()) == args


def test_schema():
    schema = OP._schema
    kinds = [str(a.type) for a in schema.arguments]
    assert kinds == ["Tensor"] * 11 + ["str", "bool", "str", "int", "int"]
    assert [str(r.type) for r in schema.returns] == ["Tensor"]
    assert not schema.is_mutable
    assert all(a.alias_info is None for a in (*schema.arguments, *schema.returns))
    assert torch.Tag.pt2_compliant_tag in OP.tags and torch.Tag.needs_exact_strides in OP.tags
    assert str(REFUSE._schema) == "fp4moe::refuse_backward(Tensor grad, Tensor like) -> Tensor"


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_opcheck(activation, gated):
    opcheck(OP, (*routed(5), *arguments(expert_weights(gated, activation))))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_opcheck_of_sizes_and_types(dtype, tokens, kernel):
    x, ids, routing = routed(tokens, dtype, torch.int32)
    opcheck(OP, (x.t().contiguous().t(), ids, routing.float(), *arguments(kernel=kernel)))


def test_refuse_backward():
    """opcheck runs an operator, and this one only raises: its parts one by one."""
    refusal = r"^moe_backward: its gradients have no gradient, because .* Detach the gradient"
    with pytest.raises(UnsupportedError, match=refusal):
        REFUSE(torch.ones(2), torch.ones(2))
    like = torch.empty(7, 3, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        got = REFUSE(torch.empty(2), mode.from_tensor(like))
        assert (got.shape, got.dtype, got.stride()) == ((7, 3), torch.bfloat16, (3, 1))
    assert not REFUSE._schema.is_mutable


@pytest.mark.slow
@pytest.mark.parametrize("kernel", DEFINITIONS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_the_operator_is_the_definition(kernel, tokens, dtype, ids_dtype, poisoned_empty):
    x, ids, routing = routed(tokens, dtype, ids_dtype)
    for weights_dtype in DTYPES:
        args = x, ids, routing.to(weights_dtype)
        want = DEFINITIONS[kernel](x, WEIGHTS, ids, args[2])
        got = OP(*args, *arguments(kernel=kernel))
        assert got.dtype == dtype and got.shape == (tokens, H) and got.is_contiguous()
        assert torch.equal(got, want)
        assert torch.equal(fused_moe(x, WEIGHTS, ids, args[2], kernel=kernel), want)
    assert torch.equal(fused_moe(*args[:1], WEIGHTS, *args[1:]).isnan(), x.isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_activation(activation, gated):
    weights = expert_weights(gated, activation)
    x, ids, routing = routed(17)
    want = moe_definition(x, ids, routing, **weights.dequantize(), activation=activation)
    assert torch.equal(fused_moe(x, weights, ids, routing), want)


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    "columns of a wider one": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "strided columns": lambda t: torch.stack((t, t), -1)[..., 0],
    "offset": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view):
    args = routed(33)
    want = OP(*args, *arguments())
    turned = [VIEWS[view](t) for t in args]
    assert all(torch.equal(a, b) for a, b in zip(args, turned, strict=True))
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        mixed = [turned[i] if i in which else args[i] for i in range(3)]
        got = OP(*mixed, *arguments())
        assert torch.equal(got, want) and got.is_contiguous()


def test_expanded_arguments():
    x, ids, routing = (t[:1].expand(9, -1) for t in routed(1))
    got = OP(x, ids, routing, *arguments())
    # Not row against row: a CPU's GEMM may round the last rows in another way.
    assert got.is_contiguous()
    want = OP(x.contiguous(), ids.contiguous(), routing.contiguous(), *arguments())
    assert torch.equal(got, want)


def test_weights_of_any_stride():
    weights = expert_weights().slice_intermediate(16, 32).slice_experts(1, 5)
    packed = {k: v.contiguous() for k, v in weights.tensors().items()}
    tight = ExpertWeights.from_tensors(packed, weights.metadata())
    assert not weights.down.packed.is_contiguous()
    args = routed(9)
    assert torch.equal(OP(*args, *arguments(weights)), OP(*args, *arguments(tight)))


@pytest.mark.parametrize("kernel", DEFINITIONS)
@pytest.mark.parametrize("tokens", [0, 1, 63])
@pytest.mark.parametrize("view", [None, *VIEWS])
def test_fake_and_real_agree(kernel, tokens, view):
    for dtype in DTYPES:
        args = routed(tokens, dtype)
        args = args if view is None else tuple(VIEWS[view](t) for t in args)
        args = (*args, *arguments(kernel=kernel))
        real = OP(*args)
        with FakeTensorMode() as mode:
            fake = OP(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for what in ("shape", "dtype", "device", "layout", "requires_grad"):
            assert getattr(fake, what) == getattr(real, what), what
        assert fake.stride() == real.stride()
        assert fake.storage_offset() == real.storage_offset() == 0


def test_the_result_is_fresh_and_the_arguments_stay():
    for tokens, first in ((0, 0), (5, 0), (5, L)):  # no token, some work, no local id at all
        x, ids, routing = routed(tokens)
        args = x, ids + first, routing, *arguments()
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        one, two = OP(*args), OP(*args)
        storages = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        assert one.untyped_storage()._cdata not in storages
        assert one.untyped_storage()._cdata != two.untyped_storage()._cdata
        want = two.clone()
        one.fill_(7)
        assert torch.equal(two, want)
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Routing.


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_ids_outside_the_range_contribute_nothing(ids_dtype):
    weights = expert_weights(num_experts=L + 5, expert_offset=2)
    x, _, routing = routed(8)
    # -1, E, beyond, and the neighbours of the local range.
    outside = [-1, L + 5, 2**31 - 1, 1, L + 2, -(2**31), 0, -2]
    ids = torch.tensor([[3, o, 4] for o in outside], dtype=ids_dtype)
    got = fused_moe(x, weights, ids, routing)
    want = fused_moe(x, weights, ids[:, ::2], routing[:, ::2])
    assert torch.equal(got, want) and got.ne(0).all(1).all()
    assert fused_moe(x, weights, ids[:, 1:2], routing[:, 1:2]).eq(0).all()


def test_one_expert_with_all_tokens_and_five_without():
    x, _, routing = routed(63)
    ids = torch.full((63, K), 4)
    got = fused_moe(x, WEIGHTS, ids, routing)
    alone = WEIGHTS.slice_experts(4, 5)
    assert torch.equal(got, fused_moe(x, alone, ids, routing))
    once = fused_moe(x, WEIGHTS, ids[:, :1], routing.sum(1, keepdim=True))
    torch.testing.assert_close(got, once, rtol=1e-5, atol=1e-5)


def test_tokens_do_not_see_each_other():
    x, ids, routing = routed(20)
    want = fused_moe(x, WEIGHTS, ids, routing)
    for kernel, bad in (
        ("reference", math.nan),
        ("reference", math.inf),
        ("reference_w4a4", math.nan),
    ):
        want = fused_moe(x, WEIGHTS, ids, routing, kernel=kernel)
        spoiled = x.clone()
        spoiled[7, 5] = bad
        got = fused_moe(spoiled, WEIGHTS, ids, routing, kernel=kernel)
        others = torch.arange(20) != 7
        assert torch.equal(got[others], want[others])
        assert not got[7].isfinite().all()
    weighted = routing.clone()
    weighted[3, 1] = math.nan
    got = fused_moe(x, WEIGHTS, ids, weighted)
    assert got[3].isnan().all() and got[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_an_expert_without_tokens_is_not_seen(kernel):
    weights = expert_weights()
    weights.gate_up.global_scale[2] = math.inf
    weights.down.global_scale[2] = math.nan
    x, ids, routing = routed(20)
    ids[ids == 2] = 3
    got = fused_moe(x, weights, ids, routing, kernel=kernel)
    assert torch.equal(got, fused_moe(x, WEIGHTS, ids, routing, kernel=kernel))
    ids[4, 0] = 2
    got = fused_moe(x, weights, ids, routing, kernel=kernel)
    assert got.isfinite().all(1).tolist() == [t != 4 for t in range(20)]


def test_no_expert_per_token():
    x = torch.randn(4, H)
    empty = torch.zeros(4, 0)
    assert fused_moe(x, WEIGHTS, empty.long(), empty).eq(0).all()


# Modes.


def test_an_ambient_autocast_changes_nothing():
    args = routed(9)
    want = OP(*args, *arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = OP(*args, *arguments())
        compiled = torch.compile(OP, backend="aot_eager", fullgraph=True)(*args, *arguments())
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert torch.equal(compiled, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradient_modes(mode):
    x, ids, routing = routed(9)
    want = OP(x, ids, routing, *arguments())
    x.requires_grad_()
    routing.requires_grad_()
    with mode():
        got = OP(x, ids, routing, *arguments())
    assert torch.equal(got, want)
    assert got.requires_grad == (mode is contextlib.nullcontext)
    assert got.is_inference() == (mode is torch.inference_mode)
    if mode is torch.inference_mode:
        with mode():
            fresh = [t.detach().clone() for t in (x, ids, routing)]
            assert torch.equal(OP(*fresh, *arguments()), want)


def compiled_with(backend):
    return (lambda f: f) if backend is None else torch.compile(backend=backend, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "leaf, backend",
    [(leaf, b) for leaf in ("hidden", "routing_weights") for b in (None, "eager", "aot_eager")]
    + [("both", None), ("both", "aot_eager"), ("both", "inductor")],
)
def test_backward(leaf, backend, fresh_dynamo):
    x, ids, routing = routed(5)
    x.requires_grad_(leaf != "routing_weights")
    routing.requires_grad_(leaf != "hidden")
    parts = WEIGHTS.dequantize()

    def plain(x, routing):
        out = moe_definition(x * 2, ids, routing.sigmoid(), **parts, activation="silu")
        return out.square().mean()

    @compiled_with(backend)
    def loss(x, routing):
        return OP(x * 2, ids, routing.sigmoid(), *arguments()).square().mean()

    leaves = [tensor for tensor in (x, routing) if tensor.requires_grad]
    values = [function(x, routing) for function in (loss, plain)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, leaves) for value in values]
    for got, want in zip(*gradients, strict=True):
        # Sums of 48 * 32 * 3 float32 products in another order, relative to the largest.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_other_gradients_flow_past_the_operator(backend, fresh_dynamo):
    x, ids, routing = routed(5)
    x.requires_grad_()

    @compiled_with(backend)
    def loss(x):
        return (x * 3 + OP(x, ids, routing, *arguments()).detach()).sum()

    loss(x).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


# Compilers.


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, dtype",
    [("eager", torch.float32), ("aot_eager", torch.bfloat16), ("inductor", torch.bfloat16)],
    ids=str,
)
def test_compile_with_a_dynamic_number_of_tokens(backend, dtype, fresh_dynamo):
    weights = expert_weights(num_experts=L + 3, expert_offset=1)

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def model(x, ids, routing):
        return fused_moe(x, weights, ids, routing) + x

    def check(tokens):
        x, ids, routing = routed(tokens, dtype, experts=L + 3)
        want = fused_moe(x, weights, ids, routing) + x
        assert torch.equal(model(x, ids, routing), want)

    check(63)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 257, 64):
            check(tokens)
    for tokens in (0, 1):  # which torch specialises on
        check(tokens)


@pytest.mark.slow
def test_inductor_keeps_strides_and_hands_on_any(fresh_dynamo):
    def model(x, ids, routing):
        turned = (x + 1).t().contiguous().t()
        return OP(turned, ids.flip(1), (routing * 2).expand(-1, K), *arguments()).t() * 2

    x, ids, routing = routed(9)
    args = x, ids, routing[:, :1]
    compiled = torch.compile(model, fullgraph=True)(*args)
    want = model(*args)
    assert torch.equal(compiled, want) and compiled.stride() == want.stride()


class Layer(torch.nn.Module):
    """The operator with its weights as buffers, and something before and behind."""

    def __init__(self, weights, kernel):
        super().__init__()
        *tensors, activation, gated, kernel, num_experts, offset = arguments(weights, kernel)
        self.fields = (activation, gated, kernel, num_experts, offset)
        self.count = len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"t{i}", tensor)

    def forward(self, x, ids, routing):
        tensors = [self.get_buffer(f"t{i}") for i in range(self.count)]
        return x - OP(x * 2, ids, routing, *tensors, *self.fields)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_export_save_and_load(kernel, tmp_path, fresh_dynamo):
    layer = Layer(WEIGHTS, kernel)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(
        layer, routed(7), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})
    )
    nodes = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert nodes.count(OP) == 1
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    for module in (program.module(), loaded.module()):
        for count in (1, 2, 63, 257):
            args = routed(count)
            assert torch.equal(module(*args), layer(*args))
    decomposed = program.run_decompositions().module()
    assert torch.equal(decomposed(*args), layer(*args))


# Refusals.

COLUMNS = {
    "gate_up_packed": (3, torch.uint8, [6, 64, 24]),
    "gate_up_block_scale": (4, torch.uint8, [6, 64, 3]),
    "gate_up_global_scale": (5, torch.float32, [6]),
    "down_packed": (6, torch.uint8, [6, 48, 16]),
    "down_block_scale": (7, torch.uint8, [6, 48, 2]),
    "down_global_scale": (8, torch.float32, [6]),
    "hidden_scale": (9, torch.float32, [1]),
    "intermediate_scale": (10, torch.float32, [6]),
}
ARGUMENTS = ["hidden", "expert_ids", "routing_weights", *COLUMNS]
ARGUMENTS += ["activation", "gated", "kernel", "num_experts", "expert_offset"]
NAMES = "flashinfer_trtllm, flashinfer_cutlass, triton_w8a8, hopper, triton, humming, reference"
NAMES += ", reference_w4a4, flashinfer_trtllm_w4a16"

F32 = "torch.float32"
BAD = {
    "3-D hidden": (
        {"hidden": torch.zeros(1, 5, 48)},
        f"hidden must be bfloat16, float16 or float32 [T, H]; got {F32} [1, 5, 48] on cpu. "
        "Flatten the tokens to one axis.",
    ),
    "float64 hidden": (
        {"hidden": torch.zeros(5, 48, dtype=torch.float64)},
        "hidden must be bfloat16, float16 or float32 [T, H]; got torch.float64 [5, 48] on cpu. "
        "Flatten the tokens to one axis.",
    ),
    "wide hidden": (
        {"hidden": torch.zeros(5, 49)},
        "hidden must have 1 to 48 columns, as its experts; got [5, 49]. Pass this layer's input.",
    ),
    "no columns": (
        {"hidden": torch.zeros(5, 0)},
        "hidden must have 1 to 48 columns, as its experts; got [5, 0]. Pass this layer's input.",
    ),
    "float ids": (
        {"expert_ids": torch.zeros(5, 3)},
        f"expert_ids must be int32 or int64 [T, K] with T = 5; got {F32} [5, 3] on cpu. "
        "Pass one row a token.",
    ),
    "int16 ids": (
        {"expert_ids": torch.zeros(5, 3, dtype=torch.int16)},
        "expert_ids must be int32 or int64 [T, K] with T = 5; got torch.int16 [5, 3] on cpu. "
        "Pass one row a token.",
    ),
    "1-D ids": (
        {"expert_ids": torch.zeros(5, dtype=torch.int64)},
        "expert_ids must be int32 or int64 [T, K] with T = 5; got torch.int64 [5] on cpu. "
        "Pass one row a token.",
    ),
    "ids of other tokens": (
        {"expert_ids": torch.zeros(4, 3, dtype=torch.int64)},
        "expert_ids must be int32 or int64 [T, K] with T = 5; got torch.int64 [4, 3] on cpu. "
        "Pass one row a token.",
    ),
    "other top-k": (
        {"routing_weights": torch.zeros(5, 2)},
        f"routing_weights must be float, of the shape of expert_ids [5, 3]; got {F32} [5, 2] on "
        "cpu. Pass one weight an id.",
    ),
    "integer weights": (
        {"routing_weights": torch.zeros(5, 3, dtype=torch.int64)},
        "routing_weights must be float, of the shape of expert_ids [5, 3]; got torch.int64 [5, 3] "
        "on cpu. Pass one weight an id.",
    ),
    "ids elsewhere": (
        {"expert_ids": torch.zeros(5, 3, dtype=torch.int64, device="meta")},
        "expert_ids and routing_weights must be on the device of hidden, cpu; got meta and cpu. "
        "Move them there.",
    ),
    "weights elsewhere": (
        {"routing_weights": torch.zeros(5, 3, device="meta")},
        "expert_ids and routing_weights must be on the device of hidden, cpu; got cpu and meta. "
        "Move them there.",
    ),
    "2-D packed": (
        {"down_packed": torch.zeros(48, 16, dtype=torch.uint8)},
        "gate_up_packed and down_packed must have 3 axes; got [6, 64, 24] and [48, 16]. "
        "Use ExpertWeights.quantize.",
    ),
    "not gated": (
        {"gated": False},
        "gate_up_packed must be torch.uint8 [6, 32, 24] on cpu; got torch.uint8 [6, 64, 24] on "
        "cpu. Use ExpertWeights.quantize and .to.",
    ),
    "offset": (
        {"expert_offset": 1},
        "expert_offset must lie in 0..0 (6 of 6 experts); got 1. "
        "Pass the global id of the first local expert.",
    ),
    "negative offset": (
        {"expert_offset": -1, "num_experts": 9},
        "expert_offset must lie in 0..3 (6 of 9 experts); got -1. "
        "Pass the global id of the first local expert.",
    ),
}
for name, (index, dtype, shape) in COLUMNS.items():
    good = (*(None,) * 3, *arguments())[index]
    wrong = {
        "shape": torch.cat((good, good)) if len(shape) == 1 else good[..., :-1],
        "dtype": good.to(torch.int32),
        "device": good.to("meta"),
    }
    for what, tensor in wrong.items():
        if name == "down_packed" and what == "shape":
            continue  # it sets what is expected of the others
        BAD[f"{what} of {name}"] = (
            {name: tensor},
            f"{name} must be {dtype} {shape} on cpu; got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}. Use ExpertWeights.quantize and .to.",
        )


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    changed, message = BAD[case]
    named = dict(zip(ARGUMENTS, (*routed(5), *arguments()), strict=True)) | changed
    with pytest.raises(ShapeError) as error:
        OP(*named.values())
    assert str(error.value) == f"nvfp4_moe: {message}"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in named.values()]
        with pytest.raises(ShapeError) as error:
            OP(*fake)
    assert str(error.value) == f"nvfp4_moe: {message}"


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"activation": "tanh"},
            "nvfp4_moe: activation must be one of silu, gelu_tanh, gelu, relu2, relu, identity, "
            "silu_step, silu_softcap; got 'tanh'. Pass one of these names.",
        ),
        (
            {"kernel": "nope"},
            f"nvfp4_moe: kernel must be auto or one of {NAMES}; got 'nope'. "
            "Pass one of these names.",
        ),
        (
            {"kernel": "auto"},
            "nvfp4_moe: kernel must be the name of one kernel; got 'auto'.",
        ),
    ],
    ids=["activation", "kernel", "auto"],
)
def test_unknown_names(changed, message):
    named = dict(zip(ARGUMENTS, (*routed(5), *arguments()), strict=True)) | changed
    assert_refused(lambda: OP(*named.values()), message, UnsupportedError)


def test_refusals_of_fused_moe():
    x, ids, routing = routed(5)
    with pytest.raises(ShapeError) as error:
        fused_moe(x, WEIGHTS.tensors(), ids, routing)
    assert str(error.value) == (
        "fused_moe: weights must be ExpertWeights; got dict. Use ExpertWeights.quantize."
    )
    # Narrower than the layer is legal for the operator (padding), not here.
    with pytest.raises(ShapeError) as error:
        fused_moe(x[:, :40], WEIGHTS, ids, routing)
    assert str(error.value) == (
        "fused_moe: hidden must have shape [T, hidden_size] = [T, 48]; got [5, 40]. "
        "Pass the hidden states that these experts were made for."
    )
    with pytest.raises(ShapeError, match=r"^nvfp4_moe: hidden must be .* got .* \[1, 5, 48\] on"):
        fused_moe(x[None], WEIGHTS, ids, routing)
    with pytest.raises(UnsupportedError, match=r"^fused_moe: kernel must be auto or one of .*'x'"):
        fused_moe(x, WEIGHTS, ids, routing, kernel="x")


def test_narrow_hidden_is_padding():
    """A hidden size of 40 stored as 48: what is behind column 40 is not read."""
    weights = dataclasses.replace(WEIGHTS, hidden_size=40)
    x, ids, routing = routed(5)
    got = fused_moe(x[:, :40], weights, ids, routing)
    zeroed = torch.cat((x[:, :40], torch.zeros(5, 8)), 1)
    torch.testing.assert_close(
        got, fused_moe(zeroed, WEIGHTS, ids, routing)[:, :40], rtol=1e-5, atol=1e-5
    )


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gpu_equals_cpu(activation, gated):
    weights = expert_weights(gated, activation, num_experts=L + 3, expert_offset=1)
    for tokens in (0, 1, 63, 257):
        x, ids, routing = routed(tokens, experts=L + 3)
        want = fused_moe(x, weights, ids, routing, kernel="reference")
        got = fused_moe(
            x.cuda(), weights.to("cuda"), ids.cuda(), routing.cuda(), kernel="reference"
        )
        assert got.is_cuda and got.is_contiguous()
        # Sums of at most 48 terms in another order, and another exp, erf and tanh.
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_tokens_and_experts_do_not_leak():
    weights = expert_weights()
    weights.down.global_scale[2] = math.inf
    x, ids, routing = (t.cuda() for t in routed(20))
    ids[ids == 2] = 3
    ids[4, 0] = 2
    x[9] = math.nan
    got = fused_moe(x, weights.to("cuda"), ids, routing, kernel="reference")
    assert got.isfinite().all(1).tolist() == [t not in (4, 9) for t in range(20)]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_gpu_opcheck(kernel):
    args = [t.cuda() for t in routed(5, torch.bfloat16)]
    opcheck(OP, (*args, *arguments(WEIGHTS.to("cuda"), kernel)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_gpu_no_host_synchronisation(kernel):
    args = [t.cuda() for t in routed(63, torch.bfloat16)]
    fixed = arguments(WEIGHTS.to("cuda"), kernel)
    want = OP(*args, *fixed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = OP(*args, *fixed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DEFINITIONS)
def test_gpu_graph_capture(kernel):
    args = [t.cuda() for t in routed(63, torch.bfloat16)]
    fixed = arguments(WEIGHTS.to("cuda"), kernel)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OP(*args, *fixed)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = OP(*args, *fixed)
    for seed in range(3):
        torch.manual_seed(seed)
        for static, fresh in zip(args, routed(63, torch.bfloat16), strict=True):
            static.copy_(fresh)
        graph.replay()
        assert torch.equal(out, OP(*args, *fixed))
