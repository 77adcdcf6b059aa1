"""fp4moe::choose_experts: values, dtypes, gradients, fake, refusals. On a GPU: test_triton.py."""

from __future__ import annotations

import pytest
import torch

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import Routing
from fp4moe.routing import route, sigmoid_topk, softmax_topk

OP = torch.ops.fp4moe.choose_experts.default
EPS = torch.finfo(torch.float32).eps
E, K = 8, 3
NONE = torch.empty(0)
BIAS = torch.linspace(-0.3, 0.3, E)
SCALE = torch.linspace(0.25, 2.0, E)
SOFTMAX = Routing("softmax_topk", K)
SIGMOID = Routing("sigmoid_topk", K, num_groups=4, top_groups=2, scaling=2.5)
# bias, output_scale, routing.
CASES = {
    "softmax": (NONE, NONE, SOFTMAX),
    "softmax scaled": (NONE, SCALE, SOFTMAX._replace(scaling=1.5)),
    "sigmoid": (BIAS, NONE, SIGMOID),
    "sigmoid scaled": (BIAS, SCALE, SIGMOID),
    "sigmoid without a bias": (NONE, SCALE.bfloat16(), Routing("sigmoid_topk", 1)),
}
CASE = pytest.mark.parametrize("bias, scale, routing", CASES.values(), ids=CASES)


def formula(logits, bias, scale, routing):
    """The weights by another way than fp4moe.routing: of each expert first, then of the chosen."""
    scores = logits.double()
    soft = routing.method == "softmax_topk"
    scores = scores.exp() if soft else scores.sigmoid()
    ids = route(logits, bias, routing)[0]
    chosen = torch.zeros_like(scores).scatter(1, ids, 1) * scores
    weights = chosen / chosen.sum(1, keepdim=True) * routing.scaling
    return ids, (weights * scale.double() if scale.numel() else weights).gather(1, ids)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CASE
def test_ids_and_weights(bias, scale, routing, dtype, tokens):
    logits = torch.randn(tokens, E).to(dtype)
    ids, weights = OP(logits, bias, scale, *routing)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    wanted_ids, wanted = formula(logits, bias, scale, routing)
    assert torch.equal(ids, wanted_ids) and weights.shape == (tokens, routing.top_k)
    torch.testing.assert_close(weights.double(), wanted, rtol=16 * EPS, atol=0)


def test_the_methods_are_those_of_the_routing_module():
    logits = torch.randn(9, E)
    got = OP(logits, NONE, SCALE, *SOFTMAX)
    want = softmax_topk(logits, K, renormalize=True, per_expert_scale=SCALE)
    assert all(map(torch.equal, got, want))
    got = OP(logits.T.contiguous().T, BIAS, NONE, *SIGMOID)
    want = sigmoid_topk(logits, K, bias=BIAS, num_groups=4, top_groups=2, scaling=2.5)
    assert all(map(torch.equal, got, want))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@CASE
def test_opcheck(bias, scale, routing, dtype):
    logits = torch.randn(5, E).to(dtype)
    torch.library.opcheck(OP, (logits, bias, scale, *routing))
    # Not test_aot_dispatch_dynamic: it adds up outputs, and integers first cannot take floats.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (logits.requires_grad_(), bias, scale.clone().requires_grad_(scale.numel() > 0))
    torch.library.opcheck(OP, (*given, *routing), test_utils=tests)


def gradients(choose, logits, scale, upstream):
    logits, scale = logits.clone().requires_grad_(), scale.clone()
    scale.requires_grad_(scale.numel() > 0)
    (choose(logits, scale) * upstream).sum().backward()
    return logits.grad, scale.grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@CASE
def test_gradients_are_those_of_torchs_own_operations(bias, scale, routing, compiled, fresh_dynamo):
    logits, upstream = torch.randn(6, E), torch.randn(6, routing.top_k)

    def chosen(logits, scale):
        ids, weights = OP(logits, bias, scale, *routing)
        assert not ids.requires_grad
        return weights

    if compiled:
        chosen = torch.compile(chosen, backend="aot_eager", fullgraph=True)
    got = gradients(chosen, logits, scale, upstream)
    want = gradients(lambda x, s: route(x, bias, routing, s)[1], logits, scale, upstream)
    assert (got[1] is None) == (not scale.numel())
    # At most 16 roundings, relative to what is multiplied: upstream, a scaling and a scale.
    largest = float(upstream.abs().max()) * 2.5 * 2.0
    for one, other in zip(got, want, strict=True):
        if one is not None:
            assert one.dtype == other.dtype
            assert (one - other).abs().max() <= 16 * torch.finfo(one.dtype).eps * largest
    if routing.top_k > 1:
        assert got[0].abs().max() > 1e-3


def test_compiled_for_any_number_of_tokens(fresh_dynamo):
    def model(logits):
        ids, weights = OP(logits * 2, BIAS, SCALE, *SIGMOID)
        return ids + 1, weights * 2

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 5):
        logits = torch.randn(tokens, E)
        assert all(map(torch.equal, compiled(logits), model(logits)))


GOOD = (torch.randn(4, E), NONE, NONE, *SOFTMAX)
# Place in the schema, another value, the kind and the text of the refusal.
BAD = {
    "one axis": (0, torch.randn(E), ShapeError, "router_logits must be float [T, E]; got"),
    "integers": (0, torch.ones(4, E).long(), ShapeError, "router_logits must be float [T, E]"),
    "a bias for softmax": (1, BIAS, ShapeError, "routing_bias must be float of length 0 for"),
    "a long scale": (2, torch.ones(9), ShapeError, "output_scale must be float, of length 0 or 8"),
    "an integer scale": (2, torch.ones(E).long(), ShapeError, "output_scale must be float, of"),
    "a scale elsewhere": (2, torch.ones(E, device="meta"), ShapeError, "output_scale must be"),
    "method": (3, "topk_softmax", UnsupportedError, "routing_method must be one of softmax_topk"),
    "top_k of 0": (4, 0, ShapeError, "top_groups and top_k must satisfy 1 <= top_groups <= 1"),
    "top_k of 9": (4, 9, ShapeError, "and 1 <= top_k <= top_groups x 8; got 1 and 9."),
    "groups for softmax": (5, 2, ShapeError, "num_groups must divide 8 experts (1 unless sigm"),
    "bias elsewhere": (1, torch.empty(0, device="meta"), ShapeError, "on one device, cpu; got"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_of_the_kernel_and_of_its_fake(case):
    place, value, kind, text = BAD[case]
    call = [*GOOD]
    call[place] = value
    with pytest.raises(kind) as raised:
        OP(*call)
    assert str(raised.value).startswith("choose_experts: ") and text in str(raised.value)
    if isinstance(value, torch.Tensor) and value.is_meta:
        return
    fakes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in call]
    with pytest.raises(kind) as again:
        OP(*fakes)
    assert str(again.value).replace("meta", "cpu") == str(raised.value)
