"""replace_moe(routing="fused"): routers that return the same in one launch, or a reason and no change."""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import pickle
import weakref

import pytest
import torch
from loop_models import Model as LoopModel
from loop_models import PlainSigmoid
from tiny_models import (
    CapturingBackend,
    enlarge_latent_experts,
    family,
    fingerprint,
    gemma4,
    gemma4_multimodal,
    nemotron_h,
    nemotron_h_latent,
    qwen3_moe,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE, NemotronHTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain, replace_moe
from fp4moe.models.routers import ROUTERS, FusedRouter

CHOOSE = torch.ops.fp4moe.choose_experts.default
EXPERTS = torch.ops.fp4moe.nvfp4_moe.default
IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71]])
EPS = torch.finfo(torch.float32).eps
MODELS = {
    "gemma4": gemma4,
    "nemotron_h": nemotron_h,
    "nemotron_h_groups": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}


FAMILIES = (
    *("deepseek_v3", "dots1", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "mellum"),
    *("mimo_v2_flash", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_next", "solar_open"),
)


def routers(model):
    known = {n: getattr(type(m), "kind", type(m)).__name__ for n, m in model.named_modules()}
    return {n: model.get_submodule(n) for n, kind in known.items() if kind in ROUTERS}


def fused_routers(model):
    return [m for m in model.modules() if isinstance(m, FusedRouter)]


def build(name, dtype=torch.float32, seed=3):
    """A float model whose routing uses all that its router has."""
    make = MODELS.get(name) or functools.partial(family, name)
    model = enlarge_latent_experts(make(dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    for router in routers(model).values():
        shape = dict(router.named_parameters())
        for parameter in (shape.get("weight"), shape.get("proj.weight")):
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(values * parameter.shape[1] ** -0.5)
        if hasattr(router, "per_expert_scale"):
            router.per_expert_scale.data.uniform_(0.5, 2, generator=generator)
            router.scale.data.uniform_(0.5, 2, generator=generator)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.data.normal_(generator=generator)
            router.routed_scaling_factor = 2.5
        if hasattr(router, "norm_topk_prob"):
            router.norm_topk_prob = True
        if name.endswith("groups"):
            router.num_group, router.topk_group = 4, 2
    return model


def replaced(model, routing="fused", **options):
    return replace_moe(model, "reference", progress=False, routing=routing, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# float32: two layers whose routing weights differ by 16 roundings, amplified no more than 4 times.
# bfloat16: Qwen3-MoE rounds its weights to half an eps, the others flip last bits of the output;
# four such roundings on the way.
LIMITS = {torch.float32: 2 * 4 * 16 * EPS, torch.bfloat16: 4 * 2**-8}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_models_own_router(name, dtype):
    model = build(name, dtype)
    expected = logits(replaced(copy.deepcopy(model), "given"))
    fused = replaced(model)
    assert len(fused_routers(fused)) == len(routers(model)) == 2
    assert relative(logits(fused), expected) <= LIMITS[dtype]


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("gemma4", "per_expert_scale", 1.0),
        ("gemma4", "scale", 1.0),
        ("nemotron_h", "e_score_correction_bias", 0.0),
        ("nemotron_h", "routed_scaling_factor", 1.0),
        ("nemotron_h_groups", "topk_group", 4),
        ("qwen3_moe", "top_k", 1),
    ],
)
def test_the_limits_would_show_each_part_of_the_routing(name, attribute, value):
    model = build(name)
    expected = logits(replaced(copy.deepcopy(model), "given"))
    for router in routers(model).values():
        present = getattr(router, attribute)
        if isinstance(present, torch.Tensor):
            present.data.fill_(value)
        else:
            setattr(router, attribute, value)
    assert relative(logits(replaced(model)), expected) > 100 * LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", [*MODELS, *FAMILIES])
def test_a_router_returns_what_the_models_own_returns(name, dtype):
    model = build(name, dtype)
    fused = replaced(copy.deepcopy(model))
    assert routers(model)
    for path, router in routers(model).items():
        other = fused.get_submodule(path)
        assert isinstance(other, FusedRouter) and isinstance(other, type(router))
        for tokens in (0, 1, 33):
            x = torch.randn(tokens, router.state_dict().popitem()[1].shape[-1]).to(dtype)
            with torch.no_grad():
                own, new = router(x), other(x)
            assert [(t.dtype, t.shape) for t in new] == [(t.dtype, t.shape) for t in own]
            assert torch.equal(new[0], own[0])
            # A few routers leave the order of their experts open (sorted=False).
            (ids, order), (new_ids, new_order) = own[2].sort(), new[2].sort()
            assert torch.equal(new_ids, ids)
            # 16 roundings in float32, and a cast that may fall to either side.
            rtol = 16 * EPS + (torch.finfo(dtype).eps if own[1].dtype == dtype else 0)
            weights, new_weights = own[1].gather(1, order), new[1].gather(1, new_order)
            torch.testing.assert_close(new_weights, weights, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_of_the_table(name):
    model = build(name)
    expected = logits(replaced(copy.deepcopy(model), "given"))
    assert relative(logits(replaced(model)), expected) <= LIMITS[torch.float32]


def test_the_table_is_covered():
    seen = {
        type(r).__name__ for name in (*MODELS, *FAMILIES) for r in routers(build(name)).values()
    }
    assert seen == set(ROUTERS)


def test_a_multimodal_wrapper():
    model = gemma4_multimodal()
    expected = logits(replaced(copy.deepcopy(model), "given"))
    assert relative(logits(replaced(model)), expected) <= LIMITS[torch.float32]
    assert len(fused_routers(model)) == 2


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_two_operators_per_block(name, fresh_dynamo):
    model = replaced(build(name))
    expected = logits(model)
    inner = CapturingBackend()
    backend = aot_autograd(fw_compiler=inner)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    # Decompositions may sum in another order.
    assert relative(logits(compiled), expected) <= LIMITS[torch.float32]
    assert not torch._dynamo.utils.counters["graph_break"]
    (graph,) = inner.graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(CHOOSE) == targets.count(EXPERTS) == 2
    assert not any(word in str(target) for target in targets for word in ("topk", "sigmoid.def"))


def test_a_router_keeps_its_tensors_class_and_hooks():
    model = build("gemma4")
    before, path = dict(model.named_parameters()), "model.layers.0.router"
    seen = []
    model.model.layers[0].router.register_forward_hook(lambda *call: seen.append(call[2]))
    keys = {key for key in model.state_dict() if ".router." in key}
    fused = replaced(model)
    router = fused.model.layers[0].router
    assert isinstance(router, Gemma4TextRouter) and not router.training
    for name in ("scale", "proj.weight", "per_expert_scale"):
        assert router.get_parameter(name) is before[f"{path}.{name}"]
    assert {key for key in fused.state_dict() if ".router." in key} == keys
    logits(fused)
    assert len(seen) == 1 and len(seen[0]) == 3


def test_hooks_of_its_parts_are_not_run_by_the_check():
    model = build("gemma4")
    model.model.layers[1].router.proj.register_forward_hook(lambda *call: None)
    text = "parts of its router Gemma4TextRouter have forward hooks, which a check would run"
    with pytest.raises(UnsupportedError, match=text):
        replaced(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_that_of_a_model_with_its_own_router(name):
    source = replaced(build(name))
    for routing in ("given", "fused"):
        target = replaced(build(name, seed=4), routing)
        assert relative(logits(target), logits(source)) > 0.01
        target.load_state_dict(source.state_dict())
        assert relative(logits(target), logits(source)) <= LIMITS[torch.float32]


@pytest.mark.parametrize("name", MODELS)
def test_the_backend_hands_the_choice_to_the_kernel(name, fresh_dynamo):
    model, capture = replaced(build(name)), CapturingBackend()
    options = {"inner_backend": capture, "on_no_match": "error", "routing": "fused"}
    compiled = torch.compile(model, backend=fp4moe.backend, options=options, fullgraph=True)
    # Gemma4's factor per expert moves into the scale of down.
    assert relative(logits(compiled), logits(model)) <= LIMITS[torch.float32]
    (graph,) = capture.graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fp4moe.nvfp4_moe_from_logits.default) == 2
    assert CHOOSE not in targets and EXPERTS not in targets


def test_recorded_router_logits_are_those_of_the_models_own():
    model = build("qwen3_moe")
    fused = replaced(copy.deepcopy(model))
    own = replaced(model, "given")
    with torch.no_grad():
        expected, actual = (m(IDS, output_router_logits=True).router_logits for m in (own, fused))
    assert len(actual) == len(expected) == 2
    assert all(
        relative(a, e) <= LIMITS[torch.float32] for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_casts(name):
    model = replaced(build(name))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)
    cast = model.to(torch.bfloat16)
    # Residual stream, attention and router now round to bfloat16; a lost scale would be O(1).
    assert relative(logits(cast), expected) < 0.2


# What makes the last block impossible, and what is said about it.


class OtherRouter(Qwen3MoeTopKRouter):
    """The right numbers under a name that nobody knows."""


def renamed(name, base, forward):
    """A subclass that computes something else under the name of its base."""
    return type(name, (base,), {"forward": forward})


def flatter(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights * 0.99, ids


def smallest(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, -hidden)
    return -first, weights, ids


def more(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights[:, :1], ids[:, :1]


def masked_with_zero(self, hidden):
    first = nn.functional.linear(hidden.view(-1, 64).float(), self.weight.float())
    scores = first.sigmoid()
    choice = scores + self.e_score_correction_bias
    kept = choice.view(-1, 4, 2).sum(-1).topk(2).indices
    mask = torch.zeros(len(first), 4).scatter(1, kept, 1).repeat_interleave(2, 1)
    ids = (choice * mask).topk(2).indices
    weights = scores.gather(1, ids)
    return first, 2.5 * weights / weights.sum(-1, keepdim=True), ids


def with_router(**settings):
    def change(model, block):
        for name, value in settings.items():
            setattr(block.gate, name, value)

    return change


def router_forward(model, block):
    block.gate.forward = block.gate.forward


def router_on_meta(model, block):
    block.gate.to("meta")


def router_zero(model, block):
    block.gate.weight.data.zero_()


def router_nan(model, block):
    block.gate.weight.data.fill_(torch.nan)


def router_of_nine(model, block):
    block.gate.weight = nn.Parameter(torch.randn(9, 64))


def router_elsewhere(model, block):
    model.far = block.gate
    del block.gate
    block.__dict__["gate"] = model.far


def two_routers(model, block):
    block.second_gate = copy.deepcopy(block.gate)


def without_top_k(model, block):
    del block.gate.top_k


def other_dtype(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first, weights.double(), ids


def probabilities(self, hidden):
    first, weights, ids = Qwen3MoeTopKRouter.forward(self, hidden)
    return first.softmax(-1), weights, ids


REFUSED = {
    "unknown class": (
        with_router(__class__=OtherRouter),
        "gate (OtherRouter) beside it is no router of a class in fp4moe.models.routers.ROUTERS",
    ),
    "not renormalised": (
        with_router(norm_topk_prob=False),
        "its router Qwen3MoeTopKRouter has norm_topk_prob=False, and the operator renormalises",
    ),
    "other weights": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, flatter)),
        "its router Qwen3MoeTopKRouter does not weight as softmax_topk: ",
    ),
    "other experts": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, smallest)),
        "its router Qwen3MoeTopKRouter does not choose as softmax_topk: experts ",
    ),
    "other shape": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, more)),
        "its router Qwen3MoeTopKRouter returns ids of torch.int64 [64, 1], not torch.int64 [64, 2]",
    ),
    "other count": (router_of_nine, "Qwen3MoeTopKRouter has logits of 9 experts, not 8"),
    "other attributes": (
        without_top_k,
        "its router Qwen3MoeTopKRouter is not of the known form: ",
    ),
    "other dtype": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, other_dtype)),
        "returns weights of torch.float64 [64, 2], not torch.float32 [64, 2]",
    ),
    "other logits": (
        with_router(__class__=renamed("Qwen3MoeTopKRouter", Qwen3MoeTopKRouter, probabilities)),
        "does not return its logits, or their softmax, as others of its class",
    ),
    "forward": (
        router_forward,
        "the forward of its router Qwen3MoeTopKRouter was replaced on the instance",
    ),
    "meta": (router_on_meta, "in its router Qwen3MoeTopKRouter: weight is on the meta device"),
    "zero": (router_zero, "scores experts alike for all but 0 of 64 random tokens in torch.float"),
    "NaN": (router_nan, "scores experts alike for all but 0 of 64 random tokens in torch.float32"),
    "elsewhere": (router_elsewhere, "its parent Qwen3MoeSparseMoeBlock holds no router beside it"),
    "two routers": (two_routers, "its parent has several routers: gate, second_gate"),
}
LAST = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("case", REFUSED)
def test_a_block_that_cannot_route_in_the_kernel_is_refused(case, caplog):
    change, reason = REFUSED[case]
    model = build("qwen3_moe")
    change(model, model.model.layers[1].mlp)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError) as raised:
        replaced(model)
    text = str(raised.value)
    assert text.startswith(
        "replace_moe: model must have only blocks that can be replaced; got 1 of"
    )
    assert f"{LAST}: " in text and reason in text
    assert "model.layers.0" not in text
    assert fingerprint(model) == before
    with caplog.at_level(logging.WARNING, "fp4moe"):
        replaced(model, strict=False)
    assert reason in caplog.text
    assert len(fused_routers(model.model.layers[0])) == 1
    assert type(model.get_submodule(LAST)).__name__ == "Qwen3MoeExperts"


def flat(x):
    return x.view(-1, x.shape[-1])


def rescaled(self, x):
    _, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), ids.clone(), weights * 1.5).view(x.shape)


def used_afterwards(self, x):
    scores, weights, ids = self.gate(flat(x))
    out = self.experts(flat(x), top_k_index=ids, top_k_weights=weights)
    return (out * weights.sum(-1, keepdim=True) + scores.sigmoid().sum(-1, keepdim=True)).view(
        x.shape
    )


def twice(self, x):
    ids = self.gate(flat(x))[2]
    y = self.experts(flat(x), ids, self.gate(flat(x))[1])
    return self.experts(y, ids, torch.full(ids.shape, 0.5)).view(x.shape)


@pytest.mark.parametrize("forward", [rescaled, used_afterwards, twice])
def test_a_block_may_use_what_the_router_returns_as_it_likes(forward, fresh_dynamo):
    model = build("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.__class__ = type("ChangedBlock", (type(layer.mlp),), {"forward": forward})
    expected = logits(replaced(copy.deepcopy(model), "given"))
    fused = replaced(model)
    assert len(fused_routers(fused)) == 2
    assert relative(logits(fused), expected) <= LIMITS[torch.float32]
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert relative(logits(compiled), expected) <= LIMITS[torch.float32]


def test_experts_of_dropped_groups_with_score_zero_are_not_those_of_the_kernel():
    model = build("nemotron_h_groups")
    router = next(iter(routers(model).values()))
    # With positive scores both agree: only the probe of negative ones can tell.
    router.e_score_correction_bias.zero_()
    assert replaced(copy.deepcopy(model))
    router.__class__ = renamed("NemotronHTopkRouter", NemotronHTopkRouter, masked_with_zero)
    with pytest.raises(UnsupportedError, match="does not choose as sigmoid_topk: experts "):
        replaced(model)


def test_a_loop_over_experts_is_refused():
    model = LoopModel(PlainSigmoid)
    before = fingerprint(model)
    text = "its block loops over a ModuleList and routes by itself; use routing='given'"
    with pytest.raises(UnsupportedError, match=text):
        replaced(model)
    assert fingerprint(model) == before


def test_routers_may_be_fused_later():
    model = replaced(build("qwen3_moe"), "given")
    expected = logits(model)
    assert not fused_routers(model)
    assert len(fused_routers(replaced(model))) == 2
    assert relative(logits(model), expected) <= LIMITS[torch.float32]
    before = fingerprint(model)
    assert fingerprint(replaced(model)) == before
    # One that cannot be fused is named.
    other = replaced(build("qwen3_moe"), "given")
    other.model.layers[1].mlp.gate.norm_topk_prob = False
    with pytest.raises(UnsupportedError, match=r"got 1 of 2 that cannot\. model\.layers\.1\.mlp"):
        replaced(other)
    assert not fused_routers(other)


def test_explain_says_who_routes():
    model = build("nemotron_h")
    replaced(model)
    rows = explain(model).blocks
    assert all("its router chooses in one launch (sigmoid_topk)" in row.reasons for row in rows)
    assert [row.top_k for row in rows] == [2, 2]
    given = explain(replaced(build("nemotron_h"), "given")).blocks
    assert not any("launch" in reason for row in given for reason in row.reasons)


def test_float_experts_are_not_kept():
    model = build("gemma4")
    kept = weakref.ref(model.model.layers[0].experts)
    gc.disable()
    try:
        replaced(model)
    finally:
        gc.enable()
    assert kept() is None


def test_the_block_alone_is_enough():
    for name, kind in (("qwen3_moe", Qwen3MoeSparseMoeBlock), ("nemotron_h", NemotronHMoE)):
        block = next(m for m in build(name).modules() if isinstance(m, kind))
        x = torch.randn(1, 5, 64)
        with torch.no_grad():
            expected = replaced(copy.deepcopy(block), "given")(x)
            assert relative(replaced(block)(x), expected) <= LIMITS[torch.float32]
