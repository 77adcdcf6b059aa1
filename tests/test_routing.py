"""fp4moe.routing against hand-worked numbers and the router classes of transformers."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from fp4moe import routing
from fp4moe.errors import ShapeError
from fp4moe.routing import ROUTING_METHODS

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 64, 16, 4
LN2, LN3, LN4, LN9 = (math.log(x) for x in (2, 3, 4, 9))
Routed = tuple[torch.Tensor, torch.Tensor]

# One call of every method and branch, for the properties that all share.
CALLS: dict[str, Callable[[torch.Tensor], Routed]] = {
    "softmax_topk": lambda x: routing.softmax_topk(x, 4),
    "softmax_topk_scaled": lambda x: routing.softmax_topk(
        x,
        4,
        renormalize=True,
        scaling=2.5,
        per_expert_scale=torch.linspace(0.5, 2, 16).to(x.device),
    ),
    "grouped_softmax_topk": lambda x: routing.grouped_softmax_topk(
        x, 4, num_groups=4, top_groups=2, scaling=16.0
    ),
    "topk_softmax": lambda x: routing.topk_softmax(x, 4),
    "sigmoid_topk": lambda x: routing.sigmoid_topk(x, 4, renormalize=False),
    "sigmoid_topk_grouped": lambda x: routing.sigmoid_topk(
        x, 4, bias=torch.linspace(-1, 1, 16).to(x.device), num_groups=4, top_groups=2, scaling=2.5
    ),
    "topk_sigmoid": lambda x: routing.topk_sigmoid(x, 4),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def log(*values: float) -> torch.Tensor:
    """Logits [1, E] whose softmax is in proportion to the values."""
    return torch.tensor([values]).log()


def tolerance(terms: int = TOP_K) -> float:
    """Relative float32 error of a weight, twice over, as both sides round.

    Equal scores go into a sum of so many terms in any order, a division and two products.
    """
    return 2 * (terms + 2) * 2.0**-24


def assert_routed(got: Routed, want_ids: list[int], want_weights: list[float]) -> None:
    ids, weights = got
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert ids.tolist() == [want_ids]
    torch.testing.assert_close(weights, torch.tensor([want_weights]), rtol=1e-6, atol=0)


def by_id(ids: torch.Tensor, weights: torch.Tensor) -> Routed:
    ids, order = ids.sort(dim=-1)
    return ids, weights.gather(1, order)


def assert_same(got: Routed, want: Routed, rtol: float) -> None:
    got, want = by_id(*got), by_id(*want)
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], want[1].float(), rtol=rtol, atol=0)


# Hand-worked examples.


def test_softmax_topk_by_hand() -> None:
    logits = log(1, 2, 3, 4)  # p = 0.1, 0.2, 0.3, 0.4
    scale = torch.tensor([1.0, 1.0, 2.0, 0.5])
    route = routing.softmax_topk
    assert_routed(route(logits, 2), [3, 2], [0.4, 0.3])
    assert_routed(route(logits, 2, scaling=10.0), [3, 2], [4.0, 3.0])
    assert_routed(route(logits, 2, renormalize=True), [3, 2], [0.57142857, 0.42857143])
    assert_routed(route(logits, 2, per_expert_scale=scale), [3, 2], [0.2, 0.6])
    both = route(logits, 2, renormalize=True, per_expert_scale=scale)
    assert_routed(both, [3, 2], [0.28571429, 0.85714286])


def test_grouped_softmax_topk_by_hand() -> None:
    logits = log(
        8, 1, 6, 5
    )  # p = 0.4, 0.05 | 0.3, 0.25: the maximum is in group 0, the larger sum in 1
    route = functools.partial(routing.grouped_softmax_topk, num_groups=2)
    assert_routed(route(logits, 2, top_groups=1), [0, 1], [0.4, 0.05])
    assert_routed(route(logits, 2, top_groups=1, scaling=16.0), [0, 1], [6.4, 0.8])
    assert_routed(route(logits, 2, top_groups=1, group_score_experts=2), [2, 3], [0.3, 0.25])
    assert_routed(route(logits, 2, top_groups=2), [0, 2], [0.4, 0.3])
    renormalized = route(logits, 2, top_groups=1, renormalize=True)
    assert_routed(renormalized, [0, 1], [0.88888889, 0.11111111])


def test_grouped_softmax_topk_never_takes_a_dropped_group() -> None:
    logits = torch.tensor([[-200.0, -1.0, -200.0, 0.0]])  # p of expert 2 underflows to 0
    got = routing.grouped_softmax_topk(logits, 2, num_groups=2, top_groups=1)
    assert_routed(got, [3, 2], [0.73105858, 0.0])


def test_topk_softmax_by_hand() -> None:
    assert_routed(routing.topk_softmax(log(1, 2, 3, 4), 2), [3, 2], [0.57142857, 0.42857143])


def test_sigmoid_topk_by_hand() -> None:
    logits = torch.tensor([[LN9, -LN4, LN3, 0.0]])  # s = 0.9, 0.2 | 0.75, 0.5
    route = routing.sigmoid_topk
    assert_routed(route(logits, 2), [0, 2], [0.54545455, 0.45454545])
    assert_routed(route(logits, 2, renormalize=False), [0, 2], [0.9, 0.75])
    assert_routed(route(logits, 2, epsilon=0.35), [0, 2], [0.45, 0.375])
    # The pair sums are 1.1 and 1.25: group 1 stays, although the best expert is in group 0.
    assert_routed(route(logits, 2, num_groups=2, scaling=2.5), [2, 3], [1.5, 1.0])
    # s + bias = 0.9, 0.2, 0.75, 0.8; the weights remain unbiased.
    bias = torch.tensor([0.0, 0.0, 0.0, 0.3])
    assert_routed(route(logits, 2, bias=bias), [0, 3], [0.64285714, 0.35714286])


def test_sigmoid_topk_masked_score() -> None:
    logits = torch.tensor([[LN9, -LN4, LN3, 0.0]])
    bias = torch.full((4,), -1.0)  # c = -0.1, -0.8 | -0.25, -0.5: group 1 stays, all of it negative
    route = functools.partial(routing.sigmoid_topk, bias=bias, num_groups=2, renormalize=False)
    assert_routed(route(logits, 2), [2, 3], [0.75, 0.5])
    ids, weights = by_id(*route(logits, 2, masked_score=0.0))
    assert_routed((ids, weights), [0, 1], [0.9, 0.2])


def test_sigmoid_topk_epsilon_keeps_nan_away() -> None:
    logits = torch.full((1, 4), -200.0)  # the sigmoid underflows to 0
    assert routing.sigmoid_topk(logits, 2)[1].tolist() == [[0.0, 0.0]]
    assert routing.sigmoid_topk(logits, 2, epsilon=0.0)[1].isnan().all()


def test_sigmoid_topk_default_epsilon_by_hand() -> None:
    logits = torch.full((1, 4), -20 * math.log(10))  # s = 1e-20, as small as epsilon
    _, weights = routing.sigmoid_topk(logits, 2)
    torch.testing.assert_close(weights, torch.full((1, 2), 1 / 3), rtol=1e-5, atol=0)


def test_topk_sigmoid_by_hand() -> None:
    logits = torch.tensor([[LN3, -LN3, 0.0, LN9]])
    assert_routed(routing.topk_sigmoid(logits, 1), [3], [0.9])
    assert_routed(routing.topk_sigmoid(logits, 3), [3, 0, 2], [0.9, 0.75, 0.5])


# The router classes of transformers.


class Case(NamedTuple):
    """A router of models/<model>, the fields of its config, and the method that it should equal."""

    model: str
    router: str
    fields: dict[str, object]
    method: str
    arguments: dict[str, object]


SIZES = {"num_experts_per_tok": TOP_K, "num_experts": EXPERTS}
LOCAL_SIZES = {"num_experts_per_tok": TOP_K, "num_local_experts": EXPERTS}
ROUTED_SIZES = {"num_experts_per_tok": TOP_K, "n_routed_experts": EXPERTS}
SCALED = ROUTED_SIZES | {"routed_scaling_factor": 2.5}


def softmax(model: str, prefix: str, fields: dict[str, object], **arguments: object) -> Case:
    return Case(model, f"{prefix}TopKRouter", fields, "softmax_topk", arguments)


def grouped(
    model: str, prefix: str, groups: int, kept: int, norm: bool, method: str, **arguments: object
) -> Case:
    """A router of the DeepSeek-V3 family: these fields and arguments go together."""
    fields = SCALED | {"n_group": groups, "topk_group": kept, "norm_topk_prob": norm}
    arguments |= {"num_groups": groups, "top_groups": kept, "renormalize": norm, "scaling": 2.5}
    return Case(model, f"{prefix}TopkRouter", fields, method, arguments)


def deepseek_v2(topk_method: str, method: str, **arguments: object) -> Case:
    fields = SCALED | {"topk_method": topk_method, "n_group": 4, "topk_group": 2}
    return Case("deepseek_v2", "DeepseekV2TopkRouter", fields, method, arguments | {"scaling": 2.5})


CASES = {
    "mixtral": softmax("mixtral", "Mixtral", LOCAL_SIZES, renormalize=True),
    "minimax": softmax("minimax", "MiniMax", LOCAL_SIZES, renormalize=True),
    "deepseek_v2_greedy": deepseek_v2("greedy", "softmax_topk"),
    "deepseek_v2_groups": deepseek_v2(
        "group_limited_greedy", "grouped_softmax_topk", num_groups=4, top_groups=2
    ),
    "axk2_groups": grouped("axk2", "AXK2", 4, 2, True, "sigmoid_topk", masked_score=0.0),
    "minimax_m2": Case(
        "minimax_m2", "MiniMaxM2TopKRouter", LOCAL_SIZES, "sigmoid_topk", {"epsilon": 0.0}
    ),
    "gpt_oss": Case("gpt_oss", "GptOssTopKRouter", LOCAL_SIZES, "topk_softmax", {}),
}
for norm in (False, True):
    end = "_norm" if norm else ""
    for model, prefix in (("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"), ("olmoe", "Olmoe")):
        fields = SIZES | {"norm_topk_prob": norm}
        CASES[f"{model}{end}"] = softmax(model, prefix, fields, renormalize=norm)
    CASES[f"mistral4_groups{end}"] = grouped(
        "mistral4", "Mistral4", 4, 2, norm, "grouped_softmax_topk", group_score_experts=2
    )
    for model, prefix in (
        ("deepseek_v3", "DeepseekV3"),
        ("nemotron_h", "NemotronH"),
        ("glm4_moe", "Glm4Moe"),
    ):
        CASES[f"{model}{end}"] = grouped(model, prefix, 1, 1, norm, "sigmoid_topk")
        CASES[f"{model}_groups{end}"] = grouped(model, prefix, 4, 2, norm, "sigmoid_topk")


def transformers_classes(model: str, router: str, config: str) -> tuple[type, type]:
    package = f"transformers.models.{model}"
    modeling = importlib.import_module(f"{package}.modeling_{model}")
    configuration = importlib.import_module(f"{package}.configuration_{model}")
    return getattr(modeling, router), getattr(configuration, config)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_same_as_transformers(case: Case) -> None:
    prefix = case.router.removesuffix("Router")[: -len("TopK")]
    router_class, config_class = transformers_classes(case.model, case.router, f"{prefix}Config")
    router = router_class(config_class(hidden_size=HIDDEN, **case.fields))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    # Wide and centred below 0, so that biased scores are negative and the selection changes.
    random_bias = torch.empty(EXPERTS).normal_(-0.5, 0.4)
    arguments, inputs = dict(case.arguments), [torch.randn(TOKENS, HIDDEN)]
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.copy_(random_bias)
        arguments["bias"] = random_bias
    elif case.model == "minimax_m2":  # the block holds the bias and hands it over
        inputs.append(random_bias)
        arguments["bias"] = random_bias
    with torch.no_grad():
        logits, weights, ids = router(*inputs)
    route = functools.partial(ROUTING_METHODS[case.method], logits, TOP_K)
    assert_same(route(**arguments), (ids, weights), tolerance())

    # Would the comparison notice if the bias or the groups had no effect?
    neutral = [{"bias": None}] if "bias" in arguments else []
    if arguments.get("num_groups", 1) != 1:
        neutral.append({"top_groups": arguments["num_groups"]})
    for change in neutral:
        other, _ = route(**(arguments | change))
        assert not torch.equal(other.sort().values, ids.sort().values)


def test_same_as_gemma4() -> None:
    router_class, config_class = transformers_classes(
        "gemma4", "Gemma4TextRouter", "Gemma4TextConfig"
    )
    fields = {"num_experts": EXPERTS, "top_k_experts": TOP_K, "enable_moe_block": True}
    router = router_class(config_class(hidden_size=HIDDEN, **fields))
    torch.nn.init.normal_(router.proj.weight, std=2.0)
    torch.nn.init.normal_(router.scale, mean=1.0, std=0.3)
    torch.nn.init.normal_(router.per_expert_scale, mean=1.0, std=0.3)
    logits: list[torch.Tensor] = []  # the router returns probabilities instead
    router.proj.register_forward_hook(lambda _module, _args, output: logits.append(output))
    with torch.no_grad():
        _, weights, ids = router(torch.randn(TOKENS, HIDDEN))
    scale = router.per_expert_scale.detach()
    got = routing.softmax_topk(logits[0], TOP_K, renormalize=True, per_expert_scale=scale)
    assert_same(got, (ids, weights), tolerance())


@pytest.mark.parametrize("top_k", [1, 3])
def test_same_as_llama4(top_k: int) -> None:
    router_class, config_class = transformers_classes("llama4", "Llama4Router", "Llama4TextConfig")
    fields = {"num_local_experts": EXPERTS, "num_experts_per_tok": top_k}
    router = router_class(config_class(hidden_size=HIDDEN, **fields))
    with torch.no_grad():
        scores, logits = router(torch.randn(TOKENS, HIDDEN))
    ids, weights = routing.topk_sigmoid(logits, top_k)
    want = scores.gather(1, ids)
    assert int((scores > 0).sum()) == ids.numel()  # so these k are the router's k
    torch.testing.assert_close(weights, want, rtol=tolerance(), atol=0)


# Properties.


def test_topk_softmax_is_softmax_topk_renormalized() -> None:
    logits = 3 * torch.randn(TOKENS, EXPERTS)
    want = routing.softmax_topk(logits, TOP_K, renormalize=True)
    # Both take exp of the same logit - maximum (2 units each), one of them sums over all experts.
    assert_same(routing.topk_softmax(logits, TOP_K), want, tolerance(EXPERTS + 2 * TOP_K))


@pytest.mark.parametrize("method", ROUTING_METHODS)
def test_ties(method: str) -> None:
    grouped_method = method in ("grouped_softmax_topk", "sigmoid_topk")
    groups = {"num_groups": 4, "top_groups": 2} if grouped_method else {}
    logits = torch.zeros(8, EXPERTS)
    logits[:4, 5] = 5.0  # one clear winner in half of the tokens, a tie otherwise
    ids, weights = ROUTING_METHODS[method](logits, TOP_K, **groups)
    assert all(len(set(row)) == TOP_K for row in ids.tolist())
    assert ids.min() >= 0 and ids.max() < EXPERTS
    assert (ids[:4, 0] == 5).all()
    assert (weights[:4, 1:] == weights[:4, 1:2]).all() and (weights[:4, 0] > weights[:4, 1]).all()
    assert (weights[4:] == weights[4:, :1]).all()


def test_tied_weights_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, LN2, 0.0]])  # p = 0.2, 0.2, 0.4, 0.2
    for route in (functools.partial(routing.softmax_topk, renormalize=True), routing.topk_softmax):
        ids, weights = route(logits, 2)
        assert ids[0, 0] == 2 and ids[0, 1] in (0, 1, 3)
        torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]]))


@every_call
def test_no_tokens(call: Callable[[torch.Tensor], Routed]) -> None:
    ids, weights = call(torch.empty(0, EXPERTS))
    assert ids.shape == weights.shape == (0, 4)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32


@every_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_float32(call: Callable[[torch.Tensor], Routed], dtype: torch.dtype) -> None:
    logits = torch.randn(TOKENS, EXPERTS).to(dtype)
    got, want = call(logits), call(logits.float())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[1].dtype == torch.float32


@every_call
def test_any_device_without_sync(call: Callable[[torch.Tensor], Routed]) -> None:
    ids, weights = call(torch.empty(5, EXPERTS, device="meta"))
    assert ids.device.type == weights.device.type == "meta"
    assert ids.shape == weights.shape == (5, 4)


@every_call
def test_strided_logits_stay_as_they_are(call: Callable[[torch.Tensor], Routed]) -> None:
    logits = torch.randn(EXPERTS, 6).T
    before = logits.clone()
    got, want = call(logits), call(logits.contiguous())
    assert torch.equal(logits, before)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.slow
@every_call
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_into_one_graph(call: Callable[[torch.Tensor], Routed]) -> None:
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 7, 33):
            logits = torch.randn(tokens, EXPERTS)
            got, want = compiled(logits), call(logits)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=tolerance(), atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_inductor() -> None:
    call, logits = CALLS["sigmoid_topk_grouped"], torch.randn(7, EXPERTS)
    got = torch.compile(call, fullgraph=True)(logits)
    # Its own sigmoid may be a few units off eager's, in the weight and in the sum.
    assert_same(got, call(logits), tolerance(TOP_K + 8))


@pytest.mark.gpu
@every_call
def test_same_on_gpu(call: Callable[[torch.Tensor], Routed]) -> None:
    logits = torch.randn(TOKENS, EXPERTS)
    ids, weights = call(logits.cuda())
    assert ids.is_cuda and weights.is_cuda
    # The device's exp may be a few units off, in the weight and in the sum over the experts.
    assert_same((ids.cpu(), weights.cpu()), call(logits), tolerance(EXPERTS + 8))


def test_methods_are_a_frozen_table_of_public_names() -> None:
    for name, function in ROUTING_METHODS.items():
        assert getattr(routing, name) is function and name in routing.__all__
    with pytest.raises(TypeError):
        ROUTING_METHODS["mine"] = routing.softmax_topk  # type: ignore[index]


# Errors.

X = torch.zeros(3, 8)
FLATTEN = "Flatten the router's output to [T, E]."
PER_TOKEN = "Pass the model's experts per token."
N_GROUP = "Pass the model's n_group."
ERRORS = [
    (
        lambda: routing.softmax_topk(torch.zeros(2, 3, 8), 2),
        "softmax_topk: logits must be a 2-D float tensor [T, E]; got shape (2, 3, 8), "
        f"torch.float32. {FLATTEN}",
    ),
    (
        lambda: routing.topk_softmax(torch.zeros(3, 8, dtype=torch.int32), 2),
        "topk_softmax: logits must be a 2-D float tensor [T, E]; got shape (3, 8), torch.int32. "
        f"{FLATTEN}",
    ),
    (
        lambda: routing.topk_sigmoid(X, 0),
        f"topk_sigmoid: top_k must lie in 1..8, the experts; got 0. {PER_TOKEN}",
    ),
    (
        lambda: routing.topk_softmax(X, 9),
        f"topk_softmax: top_k must lie in 1..8, the experts; got 9. {PER_TOKEN}",
    ),
    (
        lambda: routing.softmax_topk(X, 2, per_expert_scale=torch.ones(7)),
        "softmax_topk: per_expert_scale must have shape (8,); got (7,). "
        "Pass one value for each expert.",
    ),
    (
        lambda: routing.sigmoid_topk(X, 2, bias=torch.ones(1, 8)),
        "sigmoid_topk: bias must have shape (8,); got (1, 8). Pass one value for each expert.",
    ),
    (
        lambda: routing.sigmoid_topk(X, 2, num_groups=3),
        "sigmoid_topk: num_groups must divide 8 experts into groups of 2 or more; got 3. "
        f"{N_GROUP}",
    ),
    (
        lambda: routing.sigmoid_topk(X, 2, num_groups=8),
        "sigmoid_topk: num_groups must divide 8 experts into groups of 2 or more; got 8. "
        f"{N_GROUP}",
    ),
    (
        lambda: routing.grouped_softmax_topk(X, 2, num_groups=0, top_groups=1),
        "grouped_softmax_topk: num_groups must divide 8 experts into groups of 1 or more; got 0. "
        f"{N_GROUP}",
    ),
    (
        lambda: routing.sigmoid_topk(X, 2, num_groups=4, top_groups=5),
        "sigmoid_topk: top_groups must lie in 1..4, the groups; got 5. "
        "Pass the model's topk_group.",
    ),
    (
        lambda: routing.grouped_softmax_topk(X, 5, num_groups=4, top_groups=2),
        "grouped_softmax_topk: top_k must be at most 4, the experts kept; got 5. Keep more groups.",
    ),
    (
        lambda: routing.grouped_softmax_topk(
            X, 2, num_groups=4, top_groups=2, group_score_experts=0
        ),
        "grouped_softmax_topk: group_score_experts must be at least 1; got 0. "
        "Pass 1 to score a group by its maximum.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call: Callable[[], Routed], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        call()
    assert str(caught.value) == message
