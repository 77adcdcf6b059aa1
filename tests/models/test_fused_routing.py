"""replace_moe(routing="fused"): routers that choose in one launch and return the same values."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from fused_routers import (
    EPS,
    FAMILIES,
    IDS,
    MODELS,
    build,
    fused_routers,
    logits,
    relative,
    replaced,
    routers,
)
from tiny_models import CapturingBackend, fingerprint, gemma4_multimodal
from torch._dynamo.backends.common import aot_autograd
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain
from fp4moe.models.routers import ROUTERS, FusedRouter

CHOOSE = torch.ops.fp4moe.choose_experts.default
EXPERTS = torch.ops.fp4moe.nvfp4_moe.default
# float32: two layers whose routing weights differ by 16 roundings, amplified no more than 4 times.
# bfloat16: Qwen3-MoE rounds its weights to half an eps, the others flip last bits of the output;
# four such roundings on the way.
LIMITS = {torch.float32: 2 * 4 * 16 * EPS, torch.bfloat16: 4 * 2**-8}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_models_own_router(name, dtype):
    model = build(name, dtype)
    expected = logits(replaced(copy.deepcopy(model), "given"))
    fused = replaced(model)
    assert len(fused_routers(fused)) == len(routers(model)) == 2
    assert relative(logits(fused), expected) <= LIMITS[dtype]


@pytest.mark.slow
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
            x = torch.randn(tokens, 64).to(dtype)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


class Watcher:
    """Its hook belongs to something that must not be copied."""

    def __init__(self):
        self.seen = []

    def note(self, module, args, results):
        self.seen.append(results)

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_a_router_keeps_its_tensors_class_and_hooks():
    model = build("gemma4")
    before, path = dict(model.named_parameters()), "model.layers.0.router"
    watcher = Watcher()
    model.model.layers[0].router.register_forward_hook(watcher.note)
    keys = {key for key in model.state_dict() if ".router." in key}
    fused = replaced(model)
    router = fused.model.layers[0].router
    assert isinstance(router, Gemma4TextRouter) and not router.training
    for name in ("scale", "proj.weight", "per_expert_scale"):
        assert router.get_parameter(name) is before[f"{path}.{name}"]
    assert {key for key in fused.state_dict() if ".router." in key} == keys
    logits(fused)
    assert [len(results) for results in watcher.seen] == [3]


def test_hooks_of_its_parts_are_not_run_by_the_check():
    model = build("gemma4")
    model.model.layers[1].router.proj.register_forward_hook(lambda *call: None)
    text = "parts of its router Gemma4TextRouter have forward hooks, which a check would run"
    with pytest.raises(UnsupportedError, match=text):
        replaced(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_that_of_a_model_with_its_own_router(name):
    source = replaced(build(name))
    for routing in ("given", "fused"):
        target = replaced(build(name, seed=4), routing)
        assert relative(logits(target), logits(source)) > 0.01
        target.load_state_dict(source.state_dict())
        assert relative(logits(target), logits(source)) <= LIMITS[torch.float32]


@pytest.mark.slow
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


def flat(x):
    return x.view(-1, x.shape[-1])


def rescaled(self, x):
    _, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), ids.clone(), weights * 1.5).view(x.shape)


def used_afterwards(self, x):
    scores, weights, ids = self.gate(flat(x))
    out = self.experts(flat(x), top_k_index=ids, top_k_weights=weights)
    factor, more = weights.sum(-1, keepdim=True), scores.sigmoid().sum(-1, keepdim=True)
    return (out * factor + more).view(x.shape)


def twice(self, x):
    ids = self.gate(flat(x))[2]
    y = self.experts(flat(x), ids, self.gate(flat(x))[1])
    return self.experts(y, ids, torch.full(ids.shape, 0.5)).view(x.shape)


@pytest.mark.slow
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
    with pytest.raises(UnsupportedError, match=r"1 of 2 blocks cannot be replaced, .*layers.1.mlp"):
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
