"""Gradients of hidden and routing weights, against torch's own of the formula; the refusals."""

from __future__ import annotations

import pytest
import torch
from allocated_bytes import AllocatedBytes
from pairwise import PAIRED, PLAIN, pairwise
from torch.library import opcheck

import fp4moe
from fp4moe.activations import Activation
from fp4moe.arguments import FloatMoeBackwardArguments, MoeBackwardArguments, Settings
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.identity.float_weights import FloatWeights, StoredForm
from fp4moe.kernels import KERNELS, Routing, get_kernel
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments
from fp4moe.reference_gradients import reference_gradients
from fp4moe.routing import route
from fp4moe.testing import make_layer, relative_error

E, OFFSET, LOCAL, H, I, T, K = 8, 2, 5, 48, 32, 9, 3  # noqa: E741
OF_MOE = torch.ops.fp4moe.moe.default
NVFP4 = torch.ops.fp4moe.nvfp4_moe.default
BACKWARD = torch.ops.fp4moe.moe_backward.default
OF_FLOATS = torch.ops.fp4moe.float_moe_backward.default
# Sums of up to 9 * 48 float32 products in another order: 1e-7 each, by the root of their number.
EXACT = 1e-6


def weights_of(activation="silu", gated=True, **options):
    options = {"num_experts": E, "expert_offset": OFFSET} | options
    return make_layer(
        LOCAL, H, I, activation, gated, generator=torch.Generator().manual_seed(3), **options
    )


def inputs(dtype=torch.float32, tokens=T):
    """Ids in and outside the window, -1 and E, and one expert twice for a token."""
    ids = torch.randint(-1, E + 1, (tokens, K))
    if tokens:
        ids[0] = OFFSET
    hidden, routing = torch.randn(tokens, H).to(dtype), torch.rand(tokens, K).to(dtype)
    return hidden.requires_grad_(), ids, routing.requires_grad_()


def arguments(weights, kernel="reference"):
    prepared = get_kernel(kernel).prepare(weights, hidden_alignment=256)
    return nvfp4_moe_arguments(prepared, kernel)


def backward_arguments(weights, kernel="reference", **options):
    hidden, ids, routing = inputs(**options)
    prepared = get_kernel(kernel).prepare(weights, hidden_alignment=256)
    settings = Settings.of_layer(prepared.layer, kernel)
    grad = torch.randn(hidden.shape).to(hidden.dtype)
    given = grad, hidden.detach(), ids, routing.detach(), prepared.operands, settings
    return MoeBackwardArguments(*given).flat()


def gradients(function, hidden, routing):
    out = function()
    torch.manual_seed(7)
    return torch.autograd.grad(out, (hidden, routing), torch.randn_like(out))


def check(got, expected, limit=EXACT):
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
        assert relative_error(actual, wanted) < limit


CASES = [(name, gated) for name in PLAIN for gated in (True, False)]
CASES += [(name, True) for name in PAIRED]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("activation, gated", CASES)
def test_every_activation(activation, gated, biased):
    weights = weights_of(activation, gated, biased=biased)
    hidden, ids, routing = inputs()
    operator = OF_MOE if biased else NVFP4
    got = gradients(lambda: operator(hidden, ids, routing, *arguments(weights)), hidden, routing)
    expected = gradients(lambda: pairwise(hidden, weights, ids, routing), hidden, routing)
    check(got, expected)
    outside = (ids < OFFSET) | (ids >= OFFSET + LOCAL)
    assert outside.any() and not got[1][outside].any()
    assert not got[0][outside.all(1)].any()


@pytest.mark.parametrize("activation, gated", CASES)
def test_slopes_are_torchs_own(activation, gated):
    """Also at the limits, where a clamp passes the gradient on, and at 0."""
    ends = torch.tensor([0.0, 0.5, -0.5, 0.75, -0.75, 1.5, -1.5, 30.0, -30.0])
    values = torch.cat((ends, torch.linspace(-4, 4, 41))).double()
    up, gate = (v.flatten().requires_grad_() for v in torch.meshgrid(values, values, indexing="ij"))
    leaves = (up, gate) if gated else (up,)
    known = Activation.parse(activation)
    gradient = torch.randn(up.shape, dtype=torch.float64)
    got = known.gradients(gradient, *(leaf.detach() for leaf in leaves))
    expected = torch.autograd.grad(known.combine(*leaves), leaves, gradient)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format):
    weights = weights_of("gelu_tanh", format=format, biased=True)
    hidden, ids, routing = inputs()
    got = gradients(lambda: OF_MOE(hidden, ids, routing, *arguments(weights)), hidden, routing)
    check(got, gradients(lambda: pairwise(hidden, weights, ids, routing), hidden, routing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype):
    weights = weights_of("silu")
    hidden, ids, routing = inputs(dtype)
    got = gradients(lambda: NVFP4(hidden, ids, routing, *arguments(weights)), hidden, routing)
    wide = [t.detach().float().requires_grad_() for t in (hidden, routing)]
    out = pairwise(wide[0], weights, ids, wide[1])
    torch.manual_seed(7)
    expected = torch.autograd.grad(out, wide, torch.randn(out.shape, dtype=dtype).float())
    check(got, [t.to(dtype) for t in expected], 0.1 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("activation, gated", [("silu", True), ("relu2", False), *CASES[-4:]])
def test_gradcheck_in_float64(activation, gated):
    weights = weights_of(activation, gated, biased=True)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, ids, routing):
            ctx.save_for_backward(hidden, ids, routing)
            return pairwise(hidden, weights, ids, routing)

        @staticmethod
        def backward(ctx, gradient):
            hidden, ids, routing = ctx.saved_tensors
            to_hidden, to_routing = reference_gradients(gradient, hidden, weights, ids, routing)
            return to_hidden, None, to_routing

    hidden, ids, routing = inputs(torch.float64, tokens=3)
    torch.autograd.gradcheck(Layer.apply, (hidden, ids, routing))


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "mxfp4"])
def test_w4a4_passes_its_rounding_through(format):
    scales = {"hidden_scale": 0.01, "intermediate_scale": 0.002} if format == "nvfp4" else {}
    weights = weights_of("silu", format=format, **scales)
    number_format = weights.number_format

    def straight(name, value, expert):
        if name == "hidden":
            result = number_format.round_activation(value.detach(), weights.hidden_scale)
        elif name == "output":
            result = value.detach().bfloat16().float()
        else:
            result = torch.empty_like(value)
            for e in range(LOCAL):
                rows, scale = expert == e, weights.intermediate_scale[e]
                result[rows] = number_format.round_intermediate(value.detach()[rows], scale)
        return value + (result - value.detach())

    hidden, ids, routing = inputs()
    hidden = hidden.detach().bfloat16().float().requires_grad_()
    operator = NVFP4 if format == "nvfp4" else OF_MOE
    args = arguments(weights, "reference_w4a4")
    got = gradients(lambda: operator(hidden, ids, routing, *args), hidden, routing)
    expected = gradients(lambda: pairwise(hidden, weights, ids, routing, straight), hidden, routing)
    plain = gradients(lambda: pairwise(hidden, weights, ids, routing), hidden, routing)
    # A sum on the edge between two codes goes either way in another order: one of thousands.
    check(got, expected, 1e-3)
    assert relative_error(plain[1], expected[1]) > 1e-2


@pytest.mark.parametrize("routing", [
    Routing("softmax_topk", K), Routing("sigmoid_topk", K, 4, 2, scaling=2.5)
], ids=lambda r: r.method)  # fmt: skip
def test_from_logits(routing):
    weights = weights_of(num_experts=LOCAL + 3, expert_offset=0)
    hidden, _, _ = inputs()
    logits = torch.randn(T, E, requires_grad=True)
    bias = torch.linspace(-0.3, 0.3, E) if routing.method == "sigmoid_topk" else torch.empty(0)
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)
    args = nvfp4_moe_from_logits_arguments(prepared, routing, "reference")
    fused = torch.ops.fp4moe.nvfp4_moe_from_logits.default
    got = gradients(lambda: fused(hidden, logits, bias, *args), hidden, logits)

    def apart():
        ids, chosen = route(logits, bias, routing)
        return pairwise(hidden, weights, ids, chosen)

    check(got, gradients(apart, hidden, logits))


def float_layer():
    stacked = torch.randn(E, 2 * I, H) / 7, torch.randn(E, H, I) / 6
    form = StoredForm("nvfp4", "silu", "gate_up", False, False, "reference", 256)
    weights = fp4moe.ExpertWeights.quantize(
        gate_up=stacked[0], down=stacked[1], layout="gate_up", activation="silu"
    )
    return FloatWeights(stacked[:1], (), stacked[1:]), form, weights


def test_of_float_weights():
    floats, form, weights = float_layer()
    hidden, ids, routing = inputs()
    args = *map(list, floats), *form
    operator = torch.ops.fp4moe.float_moe.default
    got = gradients(lambda: operator(hidden, ids, routing, *args), hidden, routing)
    check(got, gradients(lambda: pairwise(hidden, weights, ids, routing), hidden, routing))


def test_of_float_weights_from_logits_with_an_output_scale():
    floats, form, weights = float_layer()
    routing = Routing("softmax_topk", K)
    hidden, _, _ = inputs()
    logits, scale = torch.randn(T, E, requires_grad=True), torch.rand(E, requires_grad=True)
    operator = torch.ops.fp4moe.float_moe_from_logits.default
    args = *map(list, floats), *routing, *form
    leaves = hidden, logits, scale
    out = operator(hidden, logits, torch.empty(0), scale, *args)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    ids, chosen = route(logits, None, routing)
    out = pairwise(hidden, weights, ids, chosen * scale[ids])
    check(got, torch.autograd.grad(out, leaves, grad))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
@pytest.mark.parametrize("name", ["moe", "nvfp4_moe"])
def test_opcheck_with_gradients(name, kernel):
    weights = weights_of(biased=name == "moe")
    opcheck(getattr(torch.ops.fp4moe, name).default, (*inputs(), *arguments(weights, kernel)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_opcheck_of_the_backward(tokens, dtype):
    for options in ({}, {"biased": True}, {"format": "fp8_block"}):
        opcheck(BACKWARD, backward_arguments(weights_of(**options), tokens=tokens, dtype=dtype))


@pytest.mark.slow
def test_opcheck_of_the_backward_of_floats():
    floats, form, _ = float_layer()
    hidden, ids, routing = (t.detach() for t in inputs())
    opcheck(OF_FLOATS, (torch.randn(T, H), hidden, ids, routing, *map(list, floats), *form))


def test_one_expert_is_float_at_a_time():
    weights = make_layer(32, 128, 128)
    call = (
        get_kernel("reference")
        .prepare(weights, hidden_alignment=256)
        .call(torch.randn(4, 128), torch.arange(32).view(4, 8), torch.rand(4, 8))
    )
    with AllocatedBytes(*call.operands.flat()) as allocated:
        get_kernel("reference").gradients(call, torch.randn(4, 128))
    # An expert's three matrices, and as much again while one is decoded; all would be 32 of them.
    assert allocated.peak < 4 * (3 * 128 * 128 * 4)


def test_no_tokens():
    hidden, ids, routing = inputs(tokens=0)
    out = NVFP4(hidden, ids, routing, *arguments(weights_of()))
    to_hidden, to_routing = torch.autograd.grad(out.sum(), (hidden, routing))
    assert to_hidden.shape == (0, H) and to_routing.shape == (0, K)


def test_strides_of_the_gradient_and_of_hidden():
    weights = weights_of()
    hidden, ids, routing = inputs()
    turned = hidden.detach().t().contiguous().t().requires_grad_()
    results = []
    for leaf in (hidden, turned):
        out = NVFP4(leaf, ids, routing, *arguments(weights))
        # The gradient of a sum is one number, expanded.
        results.append(torch.autograd.grad(out.sum(), (leaf, routing)))
    check(*results)


def test_arguments_are_in_the_order_of_the_schemas():
    for name, cls in (("", MoeBackwardArguments), ("float_", FloatMoeBackwardArguments)):
        schema = getattr(torch.ops.fp4moe, f"{name}moe_backward").default._schema
        args = [[a.name] if str(a.type) == "List[Tensor]" else a.name for a in schema.arguments]
        assert list(cls.read(args).flat()) == args
        assert not schema.is_mutable and len(schema.returns) == 2


# Refusals.


def test_a_second_gradient_is_refused():
    hidden, ids, routing = inputs()
    out = NVFP4(hidden, ids, routing, *arguments(weights_of()))
    first, _ = torch.autograd.grad(out.square().sum(), (hidden, routing), create_graph=True)
    with pytest.raises(UnsupportedError, match=r"^moe_backward: its gradients have no gradient, "):
        first.sum().backward()


@pytest.mark.parametrize("kernel", [n for n, k in KERNELS.items() if not k.differentiable])
def test_kernels_without_a_backward_name_those_that_have_one(kernel):
    weights = weights_of()
    prepared = get_kernel("reference").prepare(weights, hidden_alignment=256)
    hidden, ids, routing = inputs()
    with pytest.raises(UnsupportedError) as raised:
        get_kernel(kernel).gradients(prepared.call(hidden, ids, routing), torch.randn(T, H))
    text = str(raised.value)
    assert text.startswith(f"moe_backward: kernel {kernel} cannot compute gradients, because ")
    assert text.endswith('Load or replace the model with kernel="triton" or kernel="reference".')


def test_float_weights_that_need_a_gradient_are_refused():
    floats, form, _ = float_layer()
    hidden, ids, routing = inputs()
    floats.down[0].requires_grad_()
    args = *map(list, floats), *form
    operator = torch.ops.fp4moe.float_moe.default
    with pytest.raises(UnsupportedError, match=r"^float_moe: expert weights cannot have a gradi"):
        operator(hidden, ids, routing, *args)
    with torch.no_grad():
        operator(hidden, ids, routing, *args)


def test_a_gradient_of_another_shape_is_refused():
    grad, *rest = backward_arguments(weights_of())
    with pytest.raises(ShapeError, match=r"^moe_backward: grad must be torch.float32 \[9, 48\]"):
        BACKWARD(grad[:, :-1], *rest)
