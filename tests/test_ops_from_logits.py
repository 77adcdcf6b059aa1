"""The operator that routes: shape, dtype, values, fake, refusals. Its reference kernels run here.

The kernels of FlashInfer are in with_flashinfer/, models that use it in test_fused_routing.py.
"""

from __future__ import annotations

import pytest
import torch
from fused_layers import layer

from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import Routing, get_kernel
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments
from fp4moe.routing import route, sigmoid_topk, softmax_topk

OP = torch.ops.fp4moe.nvfp4_moe_from_logits.default
GIVEN = torch.ops.fp4moe.nvfp4_moe.default
E, K = 8, 3
SOFTMAX = Routing("softmax_topk", K)
SIGMOID = Routing("sigmoid_topk", K, num_groups=4, top_groups=2, scaling=2.5)
NONE = torch.empty(0)
WEIGHTS = layer(48, 32, experts=E)


def inputs(tokens, dtype=torch.float32):
    hidden = torch.randn(tokens, WEIGHTS.hidden_size).to(dtype)
    return hidden, torch.randn(tokens, E)


def arguments(routing=SOFTMAX, kernel="reference"):
    prepared = get_kernel(kernel).prepare(WEIGHTS, hidden_alignment=256)
    return nvfp4_moe_from_logits_arguments(prepared, routing, kernel)


def given(kernel="reference"):
    return nvfp4_moe_arguments(get_kernel(kernel).prepare(WEIGHTS, hidden_alignment=256), kernel)


@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_routing_and_then_the_other_operator(kernel, tokens, dtype):
    hidden, logits = inputs(tokens, dtype)
    bias = torch.linspace(-0.3, 0.3, E)
    got = OP(hidden, logits, NONE, *arguments(kernel=kernel))
    assert got.shape == hidden.shape and got.dtype == dtype and got.is_contiguous()
    ids, weights = softmax_topk(logits, K, renormalize=True)
    assert torch.equal(got, GIVEN(hidden, ids, weights, *given(kernel)))
    got = OP(hidden, logits, bias, *arguments(SIGMOID, kernel))
    ids, weights = sigmoid_topk(
        logits, K, bias=bias, num_groups=4, top_groups=2, renormalize=True, scaling=2.5
    )
    assert torch.equal(got, GIVEN(hidden, ids, weights, *given(kernel)))


def test_route_by_hand():
    """Two experts of four: sigmoid(0) = 1/2 and sigmoid(log 3) = 3/4; a bias steers, no more."""
    logits = torch.tensor([[0.0, 1.0986123, -9.0, -9.0]])
    ids, weights = route(logits, torch.tensor([0.0, 0.0, 0.0, 2.0]), Routing("sigmoid_topk", 1))
    assert ids.tolist() == [[3]] and weights.tolist() == [[1.0]]
    ids, weights = route(logits, NONE, Routing("sigmoid_topk", 2, scaling=2.0))
    assert ids.tolist() == [[1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[1.2, 0.8]]), rtol=1e-6, atol=0)
    ids, weights = route(logits, NONE, Routing("softmax_topk", 2))
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing, bias", [(SOFTMAX, NONE), (SIGMOID, torch.zeros(E))])
def test_opcheck(dtype, routing, bias):
    hidden, logits = inputs(5, dtype)
    torch.library.opcheck(OP, (hidden, logits, bias, *arguments(routing)))
    logits.requires_grad_()
    torch.library.opcheck(
        OP,
        (hidden, logits, bias, *arguments(routing)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.slow
def test_compiled_without_a_break(fresh_dynamo):
    settings = arguments(SIGMOID)
    bias = torch.linspace(-0.3, 0.3, E)

    def model(hidden, logits):
        return OP(hidden, logits, bias, *settings) * 2

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 5):
        call = inputs(tokens)
        assert torch.equal(compiled(*call), model(*call))


GOOD = (*inputs(4), NONE, *arguments())
# Place in the schema, another value, the text of the refusal.
BAD = {
    "hidden": (0, torch.randn(4, 3, 2), ShapeError, "hidden must be bfloat16, float16 or float32"),
    "logits of another size": (
        1,
        torch.randn(4, 7),
        ShapeError,
        "router_logits must be float [T, E] = [4, 8]; got torch.float32 [4, 7] on cpu. Pass the "
        "router's output before softmax or sigmoid.",
    ),
    "integer logits": (1, torch.ones(4, E).long(), ShapeError, "router_logits must be float"),
    "a bias for softmax": (
        2,
        torch.ones(E),
        ShapeError,
        "routing_bias must be float of length 0 for softmax_topk; got torch.float32 [8] on cpu.",
    ),
    "method": (
        11,
        "topk_softmax",
        UnsupportedError,
        "routing_method must be one of softmax_topk, sigmoid_topk; got 'topk_softmax'. Route "
        "outside and call nvfp4_moe.",
    ),
    "top_k of 0": (12, 0, ShapeError, "top_groups and top_k must satisfy 1 <= top_groups <= 1"),
    "top_k of 9": (12, 9, ShapeError, "and 1 <= top_k <= top_groups x 8; got 1 and 9."),
    "groups for softmax": (13, 2, ShapeError, "num_groups must divide 8 experts (1 unless sigm"),
    "top_groups": (14, 2, ShapeError, "top_groups and top_k must satisfy 1 <= top_groups <= 1"),
    "activation": (16, "swish", UnsupportedError, "activation must be one of silu"),
    "kernel": (
        18,
        "nope",
        UnsupportedError,
        "_from_logits: kernel must be auto or one of",
    ),
    "device": (1, torch.randn(4, E, device="meta"), ShapeError, "be on one device, cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    place, value, kind, text = BAD[name]
    call = [*GOOD[:place], value, *GOOD[place + 1 :]]
    with pytest.raises(kind) as refusal:
        OP(*call)
    assert text in str(refusal.value)


def test_bad_groups():
    call = [*inputs(4), torch.ones(E), *arguments(SIGMOID)]
    for place, value, text in (
        (13, 3, "num_groups must divide 8 experts (1 unless sigmoid_topk); got 3."),
        (14, 5, "1 <= top_groups <= 4 and 1 <= top_k <= top_groups x 2; got 5 and 3."),
        (2, torch.ones(7), "routing_bias must be float of length 0 or 8 for sigmoid_topk; got"),
    ):
        bad = [*call[:place], value, *call[place + 1 :]]
        with pytest.raises(ShapeError) as refusal:
            OP(*bad)
        assert text in str(refusal.value) and "nvfp4_moe_from_logits: " in str(refusal.value)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_gpu_capture_without_host_synchronisation(routing):
    prepared = get_kernel("reference").prepare(WEIGHTS.to("cuda"), hidden_alignment=256)
    fixed = nvfp4_moe_from_logits_arguments(prepared, routing, "reference")
    bias = torch.zeros(E if routing.method == "sigmoid_topk" else 0, device="cuda")
    hidden, logits = (t.cuda() for t in inputs(33))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OP(hidden, logits, bias, *fixed)
    stream.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OP(hidden, logits, bias, *fixed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = OP(hidden, logits, bias, *fixed)
    for _ in range(2):
        other = inputs(33)
        hidden.copy_(other[0])
        logits.copy_(other[1])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, OP(hidden, logits, bias, *fixed))
        want = OP(*other, bias.cpu(), *arguments(routing))
        # Sums of 48 terms in another order, another exp.
        torch.testing.assert_close(out.cpu(), want, rtol=1e-4, atol=1e-5)
