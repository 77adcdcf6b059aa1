"""replace_moe(routing="fused"): the same choice and the same logits, or a reason and no change."""

from __future__ import annotations

import copy
import gc
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
from fp4moe.kernels.reference import REFERENCE
from fp4moe.models.replace import explain, replace_moe
from fp4moe.models.routers import ROUTERS, LogitsRouter
from fp4moe.module import FusedExperts
from fp4moe.routed import RoutedExperts
from fp4moe.routing import route

OPERATOR = torch.ops.fp4moe.nvfp4_moe_from_logits.default
IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71]])
EPS = torch.finfo(torch.float32).eps
PATHS = {"gemma4": "model.layers.{}", "qwen3_moe": "model.layers.{}.mlp"}
MODELS = {
    "gemma4": gemma4,
    "nemotron_h": nemotron_h,
    "nemotron_h_groups": nemotron_h,
    "nemotron_h_latent": nemotron_h_latent,
    "qwen3_moe": qwen3_moe,
}


def routers(model):
    known = (*ROUTERS, "LogitsRouter")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in known}


def build(name, dtype=torch.float32, seed=3):
    """A float model whose routing uses all that its router has."""
    model = enlarge_latent_experts(MODELS[name](dtype=dtype))
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
    kinds = [type(m) for m in fused.modules() if isinstance(m, FusedExperts)]
    assert kinds == [RoutedExperts, RoutedExperts]
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


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_weights_are_those_of_the_models_own_router(name, tokens):
    model = build(name)
    fused = replaced(copy.deepcopy(model))
    assert len(routers(model)) == 2
    for path, router in routers(model).items():
        x = torch.randn(tokens, 64)
        experts = fused.get_submodule(path.rpartition(".")[0]).experts
        with torch.no_grad():
            _, weights, ids = router(x)
            first, bias, scores = fused.get_submodule(path)(x)
            actual_ids, actual = route(scores, bias, experts.routing)
            output = experts(torch.randn(tokens, experts.metadata["hidden_size"]), scores, bias)
        assert output.shape[0] == tokens
        assert first is scores
        (ids, order), (actual_ids, actual_order) = ids.sort(), actual_ids.sort()
        assert torch.equal(actual_ids, ids)
        actual = (actual * experts.output_scale[route(scores, bias, experts.routing)[0]]).gather(
            1, actual_order
        )
        torch.testing.assert_close(actual, weights.gather(1, order), rtol=16 * EPS, atol=0)


def renormalising(model):
    for router in routers(model).values():
        if hasattr(router, "norm_topk_prob"):
            router.norm_topk_prob = True
    return model


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v3", "dots1", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "mellum"),
        *("mimo_v2_flash", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe"),
        *("qwen3_next", "solar_open"),
    ],
)
def test_every_class_of_the_table(name):
    model = renormalising(enlarge_latent_experts(family(name)))
    expected = logits(replaced(copy.deepcopy(model), "given"))
    assert relative(logits(replaced(model)), expected) <= LIMITS[torch.float32]


def test_a_multimodal_wrapper():
    model = gemma4_multimodal()
    expected = logits(replaced(copy.deepcopy(model), "given"))
    assert relative(logits(replaced(model)), expected) <= LIMITS[torch.float32]
    assert sum(isinstance(m, RoutedExperts) for m in model.modules()) == 2


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_operator_per_block(name, fresh_dynamo):
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
    assert targets.count(OPERATOR) == 2
    assert not any("topk" in str(target) for target in targets)


def test_a_router_keeps_its_tensors_and_gives_its_output_scale_to_the_experts():
    model = build("gemma4")
    before = dict(model.named_parameters())
    fused = replaced(model)
    router, experts = fused.model.layers[0].router, fused.model.layers[0].experts
    path = "model.layers.0.router"
    assert isinstance(router, LogitsRouter) and not router.training
    for name in ("scale", "proj.weight"):
        assert router.get_parameter(name) is before[f"{path}.{name}"]
    assert not hasattr(router, "per_expert_scale")
    assert torch.equal(experts.output_scale, before[f"{path}.per_expert_scale"].detach())
    keys = {k for k in fused.state_dict() if k.startswith("model.layers.0.router.")}
    assert keys == {f"{path}.scale", f"{path}.proj.weight"}
    names = {
        f"{n}.{t}" for n, m in fused.named_modules() for t, _ in m.named_buffers(recurse=False)
    }
    assert f"{path}.no_bias" in names


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_moves_the_routing_too(name):
    source = replaced(build(name))
    target = replaced(build(name, seed=4))
    assert relative(logits(target), logits(source)) > 0.01
    state = source.state_dict()
    assert sum(key.endswith("experts.output_scale") for key in state) == 2
    # Scales that are folded into the weights follow the loaded ones.
    target.load_state_dict(state)
    assert torch.equal(logits(target), logits(source))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in state.items())
    # Experts that wait on the meta device take the tensors themselves.
    experts = [m for m in target.modules() if isinstance(m, RoutedExperts)]
    others = [m for m in source.modules() if isinstance(m, RoutedExperts)]
    for module, own in zip(experts, others, strict=True):
        module.to("meta").load_state_dict(own.state_dict(), assign=True)
    assert torch.equal(logits(target), logits(source))


def test_the_backend_takes_it_as_fused_already(fresh_dynamo):
    model, capture = replaced(build("gemma4")), CapturingBackend()
    options = {"inner_backend": capture, "on_no_match": "error", "routing": "fused"}
    compiled = torch.compile(model, backend=fp4moe.backend, options=options, fullgraph=True)
    assert torch.equal(logits(compiled), logits(model)) and len(capture.graphs) == 1


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_casts(name):
    model = replaced(build(name))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    cast = model.to(torch.bfloat16)
    # Residual stream, attention and router now round to bfloat16; a lost scale would be O(1).
    assert relative(logits(cast), expected) < 0.2
    scales = [m.output_scale.dtype for m in cast.modules() if isinstance(m, RoutedExperts)]
    assert scales == [torch.float32] * 2


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


def router_hook(model, block):
    block.gate.register_forward_hook(lambda *args: None)


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


def records_logits(model, block):
    model.config.output_router_logits = True


def with_block(forward):
    def change(model, block):
        block.__class__ = type("ChangedBlock", (type(block),), {"forward": forward})

    return change


def flat(x):
    return x.view(-1, x.shape[-1])


def rescaled(self, x):
    _, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), ids, weights * 1.0).view(x.shape)


def cloned_ids(self, x):
    _, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), ids.clone(), weights).view(x.shape)


def used_afterwards(self, x):
    _, weights, ids = self.gate(flat(x))
    return (self.experts(flat(x), ids, weights) * weights.sum(-1, keepdim=True)).view(x.shape)


def returned(self, x):
    scores, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), ids, weights).view(x.shape), scores


def by_name(self, x):
    _, weights, ids = self.gate(flat(x))
    return self.experts(flat(x), top_k_index=ids, top_k_weights=weights).view(x.shape)


def swapped(self, x):
    ids = self.gate(flat(x))[2]
    return self.experts(flat(x), ids, self.gate(flat(x))[1]).view(x.shape)


def twice(self, x):
    _, weights, ids = self.gate(flat(x))
    y = self.experts(flat(x), ids, weights)
    return self.experts(y, ids, weights).view(x.shape)


def never(self, x):
    self.gate(flat(x))
    return x


def failing(self, x):
    _, weights, ids = self.gate(flat(x))
    self.experts(flat(x), ids, weights)
    raise RuntimeError("not today")


CHANGES = "its block changes the router's choice on its way to the experts"
REFUSED = {
    "unknown class": (
        with_router(__class__=OtherRouter),
        "gate (OtherRouter) beside it is no router of a class in fused_routing.ROUTERS",
    ),
    "not renormalised": (
        with_router(norm_topk_prob=False),
        "its router Qwen3MoeTopKRouter has norm_topk_prob=False, and kernels renormalise",
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
        "its router Qwen3MoeTopKRouter returns ids of shape [64, 1], not [64, 2]",
    ),
    "other count": (router_of_nine, "Qwen3MoeTopKRouter has logits of 9 experts, not 8"),
    "other attributes": (
        without_top_k,
        "its router Qwen3MoeTopKRouter is not of the known form: ",
    ),
    "hook": (
        router_hook,
        "in its router Qwen3MoeTopKRouter: it has forward hooks, which would be lost",
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
    "rescaled": (
        with_block(rescaled),
        "its block uses what the router returns elsewhere, too (in ",
    ),
    "cloned ids": (with_block(cloned_ids), "returns elsewhere, too (in torch.Tensor.clone)"),
    "afterwards": (with_block(used_afterwards), "elsewhere, too (in torch.Tensor.sum)"),
    "returned": (with_block(returned), "its block returns what the router returned"),
    "by name": (
        with_block(by_name),
        "its block does not hand (hidden, ids, weights) to the experts by position",
    ),
    "mixed": (with_block(swapped), "its block runs the router twice before the experts"),
    "twice": (with_block(twice), "its block runs the experts without running the router before"),
    "never": (with_block(never), "its block runs the router without the experts"),
    "failing": (with_block(failing), "its block could not be watched on random tokens: not today"),
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
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert len(hooks) == (case == "hook")
    with caplog.at_level(logging.WARNING, "fp4moe"):
        replaced(model, strict=False)
    assert reason in caplog.text
    assert isinstance(model.model.layers[0].mlp.experts, RoutedExperts)
    assert type(model.get_submodule(LAST)).__name__ == "Qwen3MoeExperts"


def test_changed_tensors_are_told_from_used_ones():
    # A tensor that the block made before the router ran passes through no function afterwards.
    def forward(self, x):
        other = torch.full((x.shape[0] * x.shape[1], 2), 0.5)
        _, _, ids = self.gate(flat(x))
        return self.experts(flat(x), ids, other).view(x.shape)

    model = build("qwen3_moe")
    with_block(forward)(model, model.model.layers[1].mlp)
    with pytest.raises(UnsupportedError, match=CHANGES):
        replaced(model)


def test_experts_of_dropped_groups_with_score_zero_are_not_those_of_the_kernel():
    model = build("nemotron_h_groups")
    router = next(iter(routers(model).values()))
    # With positive scores both agree: only the probe of negative ones can tell.
    router.e_score_correction_bias.zero_()
    assert replaced(copy.deepcopy(model))
    router.__class__ = renamed("NemotronHTopkRouter", NemotronHTopkRouter, masked_with_zero)
    with pytest.raises(UnsupportedError, match="does not choose as sigmoid_topk: experts "):
        replaced(model)


def test_a_model_that_records_router_logits_is_refused():
    model = build("qwen3_moe")
    records_logits(model, None)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match="its configuration sets output_router_logits"):
        replaced(model)
    assert fingerprint(model) == before


def test_a_loop_over_experts_is_refused():
    model = LoopModel(PlainSigmoid)
    before = fingerprint(model)
    text = "its block loops over a ModuleList and routes by itself; use routing='given'"
    with pytest.raises(UnsupportedError, match=text):
        replaced(model)
    assert fingerprint(model) == before


def test_a_layer_that_nothing_can_run_is_refused():
    # The block of Gemma4 is its decoder layer, which needs more than hidden states.
    layers = build("gemma4").model.layers
    before = fingerprint(layers)
    text = "its block could not be watched on random tokens: "
    with pytest.raises(UnsupportedError, match=text):
        replaced(layers)
    assert fingerprint(layers) == before


def test_limits_of_the_kernel_are_asked_before_anything_changes(monkeypatch):
    model = build("nemotron_h_groups")
    before = fingerprint(model)
    asked = []

    def reasons(spec, routing):
        asked.append((spec.num_experts, spec.top_k, *routing))
        return ["no groups of two"]

    monkeypatch.setattr(REFERENCE, "reasons_not_to_route", reasons)
    with pytest.raises(UnsupportedError, match=r"mixer.experts: reference: no groups of two\. "):
        replaced(model)
    assert asked == [(8, 2, "sigmoid_topk", 2, 4, 2, 2.5)] * 2
    assert fingerprint(model) == before


def test_blocks_with_the_models_own_router_stay_so():
    model = replaced(build("qwen3_moe"), "given")
    before = fingerprint(model)
    text = (
        "replace_moe: routing must be that of the blocks which are fused already; got 'fused', but "
        "model.layers.0.mlp.experts has 'given'. Load the float model again."
    )
    with pytest.raises(UnsupportedError) as raised:
        replaced(model)
    assert str(raised.value) == text
    assert fingerprint(model) == before
    fused = replaced(build("qwen3_moe"))
    before = fingerprint(fused)
    assert fingerprint(replaced(fused)) == before


def test_explain_says_who_routes():
    model = build("nemotron_h")
    replaced(model)
    rows = explain(model).blocks
    assert [row.module for row in rows] == ["RoutedExperts"] * 2
    assert all("the kernel routes (sigmoid_topk)" in row.reasons for row in rows)
    assert [row.top_k for row in rows] == [2, 2]
    given = explain(replaced(build("nemotron_h"), "given")).blocks
    assert not any("routes" in reason for row in given for reason in row.reasons)


def test_neither_float_experts_nor_routers_are_kept():
    model = build("gemma4")
    kept = [weakref.ref(m) for m in (*routers(model).values(), model.model.layers[0].experts)]
    assert isinstance(kept[0](), Gemma4TextRouter)
    gc.disable()
    try:
        replaced(model)
    finally:
        gc.enable()
    assert [reference() for reference in kept] == [None] * 3


def test_the_block_alone_is_enough():
    for name, kind in (("qwen3_moe", Qwen3MoeSparseMoeBlock), ("nemotron_h", NemotronHMoE)):
        block = next(m for m in build(name).modules() if isinstance(m, kind))
        x = torch.randn(1, 5, 64)
        with torch.no_grad():
            expected = replaced(copy.deepcopy(block), "given")(x)
            assert relative(replaced(block)(x), expected) <= LIMITS[torch.float32]
