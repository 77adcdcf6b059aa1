"""Blocks that loop over a ModuleList of expert MLPs: found, told apart, replaced, or refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from loop_models import (
    INNER,
    STYLES,
    DeepseekOld,
    E,
    Gated,
    H,
    K,
    MixtralOld,
    NemotronLatent,
    NemotronRemote,
    OlmoeOld,
    OpenAiOld,
    Plain,
    PlainSigmoid,
    Qwen2Old,
    SortedInference,
    UpBiasAlone,
    loop,
    make_model,
    weights_first,
)
from torch import nn

from fp4moe.errors import UnsupportedError
from fp4moe.models import module_list
from fp4moe.models.module_list import find_module_lists
from fp4moe.models.module_list_block import FusedMoeBlock
from fp4moe.models.replace import explain, replace_moe
from fp4moe.module import FusedExperts
from fp4moe.reference import moe_definition
from fp4moe.testing import relative_error

STYLES += [NemotronRemote, NemotronLatent, Plain, PlainSigmoid, OpenAiOld, UpBiasAlone]


def experts_name(block):
    return next(n for n, c in block.named_children() if isinstance(c, FusedExperts))


class Dequantised(nn.Module):
    """The definition on unpacked weights, under the name of one of the original experts."""

    def __init__(self, fused):
        super().__init__()
        self.parts, self.activation = fused.weights.dequantize(), fused.weights.activation

    def forward(self, hidden, ids, weights):
        return moe_definition(hidden, ids, weights, **self.parts, activation=self.activation)


def load_dequantised(original, replaced):
    """Put the packed numbers into the original model, whose own loop then uses them."""
    for old, new in zip(original.blocks, replaced.blocks, strict=True):
        name = experts_name(new)
        parts = getattr(new, name).weights.dequantize()
        roles = module_list._roles(getattr(old, name))
        with torch.no_grad():
            for index, expert in enumerate(getattr(old, name)):
                for role, linear in roles.items():
                    getattr(expert, linear).weight.copy_(parts[role][index])
                    if getattr(expert, linear).bias is not None:
                        bias = parts[f"{role}_bias"][index]
                        assert torch.equal(getattr(expert, linear).bias, bias), "as it is"
    return original


def old_experts(block):
    return block.mlps if hasattr(block, "mlps") else block.experts


def tensor(result):
    return result[0] if isinstance(result, tuple) else result


def replaced(make, dtype=torch.float32):
    return replace_moe(make_model(make, dtype), kernel="reference", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
def test_autocast_around_it_refuses_nothing(make):
    with torch.autocast("cpu", torch.bfloat16):
        replaced(make)


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
@torch.no_grad()
def test_replaced_model_computes_the_dequantised_weights(make):
    original = make_model(make)
    model = replace_moe(copy.deepcopy(original), kernel="reference", progress=False)
    assert all(type(block) is FusedMoeBlock for block in model.blocks)
    for x in (torch.randn(2, 4, H), torch.randn(1, 1, H), torch.randn(1, 70, H)):
        loose = tensor(original.blocks[0](x))
        assert relative_error(tensor(model.blocks[0](x)), loose) < 0.3
    exact = load_dequantised(original, model)
    for x in (torch.randn(2, 4, H), torch.randn(1, 1, H), torch.randn(1, 70, H)):
        assert relative_error(model(x), exact(x)) < 1e-5
    result, expected = model.blocks[0](x), exact.blocks[0](x)
    assert isinstance(result, tuple) == isinstance(expected, tuple)
    if isinstance(result, tuple):
        assert torch.equal(result[1], expected[1])
    flat = tensor(model.blocks[0](x.reshape(-1, H)))
    assert relative_error(flat, tensor(result).reshape(-1, H)) < 1e-6
    assert tensor(model.blocks[0](x[:, :0])).shape == (1, 0, H)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", STYLES)
@torch.no_grad()
def test_half_precision(make, dtype):
    original = make_model(make, dtype)
    model = replace_moe(copy.deepcopy(original), kernel="reference", progress=False)
    x = torch.randn(2, 4, H, dtype=dtype)
    result = tensor(model.blocks[0](x))
    assert result.dtype == dtype
    assert relative_error(result, tensor(load_dequantised(original, model).blocks[0](x))) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
def test_float_weights_are_freed_at_once(make):
    model = make_model(make)
    weights = [weakref.ref(next(old_experts(b)[0].parameters())) for b in model.blocks]
    blocks = [weakref.ref(block) for block in model.blocks]
    gc.disable()
    try:
        replace_moe(model, kernel="reference", progress=False)
        assert [w() is None for w in weights + blocks] == [True] * 4
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
def test_router_and_shared_parts_stay_as_they_were(make):
    model = make_model(make)
    name = "mlps" if hasattr(model.blocks[0], "mlps") else "experts"
    kept = {k: v for k, v in model.state_dict().items() if f".{name}." not in k}
    parts = {k: m for k, m in model.named_modules() if k.count(".") > 1 and f".{name}" not in k}
    replace_moe(model, kernel="reference", progress=False)
    after = {k: v for k, v in model.state_dict().items() if f".{name}." not in k}
    assert list(after) == list(kept)
    assert all(after[k].data_ptr() == v.data_ptr() for k, v in kept.items())
    assert parts and all(model.get_submodule(k) is m for k, m in parts.items())
    assert all(isinstance(getattr(block, name), FusedExperts) for block in model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
@torch.no_grad()
def test_copies_compute_the_same(make):
    model, x = replaced(make), torch.randn(2, 3, H)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    other = replaced(make)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
@torch.no_grad()
def test_compiles_to_one_operator_per_block(make, fresh_dynamo):
    model, x = replaced(make), torch.randn(2, 3, H)
    # With biases it is the operator that takes them.
    operators = (torch.ops.fp4moe.nvfp4_moe.default, torch.ops.fp4moe.moe.default)
    counts = []

    def backend(graph, example_inputs):
        counts.append(sum(node.target in operators for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-6
    assert counts == [2]


@pytest.mark.slow
@pytest.mark.parametrize("make", STYLES)
def test_explain_before_and_after(make):
    model = make_model(make)
    rows = explain(model, kernel="reference").blocks
    assert [row.status for row in rows] == ["replaceable"] * 2
    ungated = issubclass(make, NemotronRemote)
    width = make.width if ungated else H
    for row in rows:
        assert (row.num_experts, row.top_k, row.gated) == (E, K, not ungated)
        assert (row.hidden_size, row.intermediate_size) == (width, INNER)
        clamped = "silu(alpha=1.702,beta=1,limit=1.5)" if make is OpenAiOld else "silu"
        assert row.activation == ("relu2" if ungated else clamped)
    replace_moe(model, kernel="reference", progress=False)
    assert find_module_lists(model) == []
    assert [row.status for row in explain(model).blocks] == ["replaced"] * 2


FORMS = {
    MixtralOld: "softmax routing, top 2, renormalised",
    OlmoeOld: "softmax routing, top 2",
    Qwen2Old: "softmax routing, top 2, plus shared_expert times shared_expert_gate",
    DeepseekOld: "given routing, top 2, plus shared_experts",
    Plain: "softmax routing, top 2, renormalised",
    OpenAiOld: "softmax routing, top 2, renormalised",
    PlainSigmoid: "sigmoid routing, top 2, renormalised, times 1.7, selected with selection_bias",
}


@pytest.mark.slow
@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms(make, dtype):
    assert str(replaced(make, dtype).blocks[0].form) == FORMS[make]


def only(make, **options):
    """OlmoeOld-like block whose experts `make` builds from their index."""

    class Block(OlmoeOld):
        def __init__(self):
            super().__init__(**options)
            self.experts = nn.ModuleList(make(index) for index in range(E))

    return Block


class Normed(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(INNER)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Clamped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Dropped(Gated):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class MyLinear(nn.Linear):
    pass


def with_own_linear(_):
    expert = Gated()
    expert.up_proj = MyLinear(H, INNER, bias=False)
    return expert


def block_with(base=Plain, **methods):
    return type("Block", (base,), methods)


def counting(self, x):
    self.seen = tokens = x.reshape(-1, H)
    return Plain.forward(self, tokens).reshape(x.shape)


def cosine(self, logits):
    values, ids = logits.cos().topk(K)
    return ids, values


def softcap(self, logits):
    return Plain.route(self, 30 * torch.tanh(logits / 30))


def expert_choice(self, logits):
    return Plain.route(self, logits.softmax(0))


def limited(self, x):
    """Drop what exceeds 20 tokens per expert."""
    tokens = x.reshape(-1, H)
    ids, weights = self.route(self.router(tokens))
    place = F.one_hot(ids.flatten(), E).cumsum(0).gather(1, ids.flatten()[:, None])
    weights = torch.where(place.view(ids.shape) <= 20, weights, 0.0)
    return loop(self.mlps, tokens, ids, weights).reshape(x.shape)


def three_results(self, x):
    return Plain.forward(self, x), None, None


def probabilities(self, hidden_states):
    out, logits = OlmoeOld.forward(self, hidden_states)
    return out, logits.softmax(-1)


def with_mask(self, x, mask=None):
    return Plain.forward(self, x)


class TwoLists(Plain):
    def __init__(self):
        super().__init__()
        self.others = nn.ModuleList(Gated() for _ in range(E))


class Counter(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def hooked():
    block = Plain()
    block.register_forward_hook(lambda module, args, result: result * 2)
    return block


def tied():
    block = Plain()
    block.mlps[1] = block.mlps[0]
    return block


def patched():
    block = Plain()
    block.mlps[2].forward = lambda x: x
    return block


NEAR_MISSES = {
    "odd size": (
        only(lambda i: Gated(intermediate=INNER + 16 * (i == 3))),
        "expert 3's gate_proj is",
    ),
    "odd class": (only(lambda i: Clamped() if i == 2 else Gated()), r"classes \(Clamped, Gated\)"),
    "odd activation": (
        only(lambda i: Gated(act=nn.GELU() if i == 4 else None)),
        r"several activations \(gelu, silu\)",
    ),
    "unknown activation": (only(lambda i: Gated(act=nn.Tanh())), "closest is .*relative error"),
    "clamp": (only(lambda i: Clamped()), r"expert 0 is a Clamped .*closest is silu, .*a clamp"),
    "norm": (only(lambda i: Normed()), r"norm.weight \(LayerNorm\)"),
    "own linear": (only(with_own_linear), "up_proj is a MyLinear"),
    "scaled": (
        block_with(finish=lambda self, out: out * 1.01),
        r"closest is softmax routing, top 2, renormalised with relative error 0.01,",
    ),
    "clamped output": (block_with(finish=lambda self, out: out.clamp(-3, 3)), "none of the forms"),
    "unknown routing": (block_with(route=cosine), "none of the forms .* relative error"),
    "softcap": (block_with(route=softcap), "none of the forms .* relative error"),
    "expert choice": (block_with(route=expert_choice), "none of the forms"),
    "clamped logits": (
        block_with(route=lambda self, logits: Plain.route(self, logits.clamp(-4, 4))),
        "none of the forms .* closest is softmax routing, top 2, renormalised",
    ),
    "norm in front": (
        block_with(forward=lambda self, x: Plain.forward(self, F.layer_norm(x, (H,)))),
        "none of the forms",
    ),
    "residual": (block_with(forward=lambda self, x: x + Plain.forward(self, x)), "none of the"),
    "weights first": (block_with(forward=weights_first), "none of the forms"),
    "capacity": (block_with(forward=limited), "none of the forms .* top 2, renormalised"),
    "router by keyword": (
        block_with(forward=lambda self, x: Plain.forward(self, x) + self.router(input=x).sum()),
        "by keyword",
    ),
    "three results": (block_with(forward=three_results), "returns a tuple of 3"),
    "probabilities": (block_with(OlmoeOld, forward=probabilities), "second result is not"),
    "arguments": (block_with(forward=with_mask), r"takes \(x, mask\)"),
    "sets state": (block_with(forward=counting), "sets seen"),
    "counts": (Counter, "changes calls"),
    "two lists": (TwoLists, "several lists of experts: mlps, others"),
    "hook": (hooked, "forward hooks"),
    "tied": (tied, "shares its storage"),
    "patched": (patched, "mlps.2 was replaced on the instance"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_and_unchanged(name):
    make, reason = NEAR_MISSES[name]
    model = make_model(make)
    modules = dict(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=f"blocks.0: .*{reason}"):
        replace_moe(model, kernel="reference", progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[k] is m for k, m in modules.items())
    assert not any(module.training for module in after.values())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [row.status for row in explain(model).blocks] == ["not replaceable"] * 2


@pytest.mark.parametrize("make", [MixtralOld, SortedInference, only(lambda i: Dropped())])
def test_training_mode_is_refused_where_it_matters(make):
    model = make_model(make).train()
    random = torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=r"training mode, call eval\(\) first"):
        replace_moe(model, kernel="reference", progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    replace_moe(model.eval(), kernel="reference", progress=False)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_the_two_gelus_are_told_apart_in_bfloat16(name):
    act = nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")
    model = make_model(only(lambda i: Gated(act=act)), torch.bfloat16)
    assert [c.activation for c in find_module_lists(model)] == [name] * 2


def test_top_1_renormalised_forms_are_one():
    def first(self, logits):
        return logits.topk(1)[1], torch.ones(len(logits), 1)

    model = make_model(block_with(route=first))
    replace_moe(model, kernel="reference", progress=False)
    assert model.blocks[0].form.top_k == 1


@pytest.mark.parametrize("top_k", [3, E])
@torch.no_grad()
def test_top_k_without_an_attribute(top_k):
    def route(self, logits):
        values, ids = logits.topk(top_k)
        return ids, values.softmax(-1)

    model = make_model(block_with(route=route))
    replace_moe(model, kernel="reference", progress=False)
    assert model.blocks[0].form.top_k == top_k


def test_router_that_reads_float32():
    def forward(self, x):
        tokens = x.reshape(-1, H)
        logits = F.linear(tokens.float(), self.router.weight.float(), self.router.bias.float())
        ids, weights = self.route(logits)
        return loop(self.mlps, tokens, ids, weights.to(x.dtype)).reshape(x.shape)

    model = make_model(block_with(forward=forward), torch.bfloat16)
    replace_moe(model, kernel="reference", progress=False)
    assert model.blocks[0].form.router_rank == 0

    def forward_router(self, x):
        tokens = x.reshape(-1, H)
        ids, weights = self.route(self.router(tokens.float()))
        return loop(self.mlps, tokens, ids, weights.to(x.dtype)).reshape(x.shape)

    mixed = make_model(block_with(forward=forward_router), torch.bfloat16)
    for block in mixed.blocks:
        block.router.float()
    replace_moe(mixed, kernel="reference", progress=False)
    assert mixed.blocks[0].form.router_dtype == torch.float32
    assert mixed(torch.randn(1, 3, H, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_gate_and_up_by_what_they_do_and_not_by_name():
    original = make_model(only(lambda i: Swapped()))
    model = replace_moe(copy.deepcopy(original), kernel="reference", progress=False)
    x = torch.randn(1, 70, H)
    assert relative_error(model.blocks[0](x)[0], original.blocks[0](x)[0]) < 0.3
    gate = model.blocks[0].experts.weights.dequantize()["gate"][0]
    assert relative_error(gate, original.blocks[0].experts[0].up_proj.weight) < 0.2


def test_meta_weights_are_described_and_refused():
    model = make_model(MixtralOld).to("meta")
    row = explain(model).blocks[0]
    assert row.status == "not replaceable" and "meta device" in row.reasons[0]
    assert (row.activation, row.num_experts) == ("silu", E)


def test_a_non_strict_replacement_leaves_the_odd_block():
    model = make_model(Plain)
    model.blocks[0].mlps[0].forward = lambda x: x
    replace_moe(model, kernel="reference", strict=False, progress=False)
    assert [type(block) for block in model.blocks] == [Plain, FusedMoeBlock]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(H, H)
        self.mlp = Gated()


class Holder(nn.Module):
    def __init__(self, items, router=True):
        super().__init__()
        self.items = nn.ModuleList(items)
        if router:
            self.gate = nn.Linear(H, max(1, len(self.items)))


NO_MOE = {
    "layers": lambda: Holder([Layer(), Layer()]),
    "heads": lambda: Holder([nn.Linear(H, H) for _ in range(3)]),
    "one expert": lambda: Holder([Gated()]),
    "no router": lambda: Holder([Gated(), Gated()], router=False),
    "a gate of another size": lambda: Holder([Gated() for _ in range(E)]),
    "one item is no expert": lambda: Holder([Gated(), Layer()]),
    "empty": lambda: Holder([]),
}


@pytest.mark.parametrize("name", NO_MOE)
def test_other_lists_are_no_candidates(name):
    model = nn.Sequential(NO_MOE[name]())
    if name == "a gate of another size":
        model[0].gate = nn.Linear(H, E + 1)
    assert find_module_lists(model) == []
