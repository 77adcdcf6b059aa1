"""LoRA inside packed experts through PEFT: as PEFT's own on the dequantised float model."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json

import pytest
import torch
from float_twins import float_twin, fused_parts
from tiny_models import enlarge_experts, family, gemma4, nemotron_h, qwen3_moe

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.models.lora import LowRank, _low_rank, experts_with_adapters
from fp4moe.testing import make_layer, relative_error

peft = pytest.importorskip("peft", reason="optional package")

IDS = torch.arange(1, 25).reshape(2, 12)
# gpt_oss: rows of gate and up by turns, biases, parameters [E, in, out].
BUILDS = {
    "gemma4": gemma4,
    "qwen3_moe": qwen3_moe,
    "nemotron_h": nemotron_h,
    "gpt_oss": lambda: family("gpt_oss"),
}
# Two layers of experts and the rest of a model in float32, in another order.
LIMIT = 1e-5
pytestmark = [
    pytest.mark.usefixtures("registered_peft", "fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*RoPE scaling factor"),
]


@pytest.fixture(params=BUILDS)
def name(request):
    return request.param


@pytest.fixture
def original(name):
    return enlarge_experts(BUILDS[name]()).requires_grad_(False)


@pytest.fixture
def packed(original):
    return fp4moe.replace_moe(copy.deepcopy(original), progress=False)


@pytest.fixture
def twin(original, packed):
    return float_twin(original, packed)


def config_for(model, **options):
    first = "up_proj" if "NemotronH" in type(model).__name__ else "gate_up_proj"
    targets = [f"experts.{first}", "experts.down_proj"]
    options = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"]} | options
    return peft.LoraConfig(target_parameters=targets, init_lora_weights=False, **options)


def with_lora(model, **options):
    """The same adapter for every model of that name; it changes the output from the start."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, config_for(model, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def gradients(model, run=None):
    model.train()
    out = (model if run is None else run)(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: parameter.grad for n, parameter in trained.items()}
    model.zero_grad()
    return out.logits.detach(), found


def compare(got, expected):
    assert relative_error(got[0], expected[0]) < LIMIT
    assert list(got[1]) == list(expected[1]) and any("experts" in n for n in got[1])
    for name, gradient in expected[1].items():
        assert relative_error(got[1][name], gradient) < LIMIT, name


def test_outputs_and_gradients_are_those_of_peft(packed, twin):
    plain = logits(packed)
    adapted = with_lora(packed)
    expected = gradients(with_lora(twin))
    compare(gradients(adapted), expected)
    assert relative_error(expected[0], plain) > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    assert torch.equal(logits(adapted.unload()), plain)
    assert len(fused_parts(packed)) == 2


@pytest.mark.parametrize("name", ["gemma4", "gpt_oss"])
def test_files_are_those_of_peft_both_ways(name, original, packed, twin, tmp_path):
    ours, theirs = with_lora(copy.deepcopy(packed)), with_lora(copy.deepcopy(twin))
    for folder, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / folder)
    weights = [tmp_path / f / "adapter_model.safetensors" for f in ("ours", "theirs")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    configs = [json.loads((f.parent / "adapter_config.json").read_text()) for f in weights]
    assert configs[0] == configs[1] and len(configs[0]["target_parameters"]) == 2
    on_float = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path / "ours")
    on_packed = peft.PeftModel.from_pretrained(packed, tmp_path / "theirs")
    assert relative_error(logits(on_packed), logits(on_float)) < LIMIT
    assert torch.equal(logits(on_packed), logits(ours))
    # On the float model it merges, and what comes out can be packed.
    merged = peft.PeftModel.from_pretrained(twin, tmp_path / "ours").merge_and_unload()
    assert len(fused_parts(fp4moe.replace_moe(merged, progress=False))) == 2


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_several_adapters(packed, twin):
    results = []
    for model in map(with_lora, (packed, twin)):
        torch.manual_seed(2)
        model.add_adapter("second", config_for(model.base_model.model, r=5, use_rslora=True))
        found = [logits(model)]
        model.set_adapter("second")
        found.append(logits(model))
        model.base_model.set_adapter(["default", "second"])
        found.append(logits(model))
        model.delete_adapter("second")
        model.set_adapter("default")
        results.append([*found, logits(model)])
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < LIMIT
    first, second, both, again = results[0]
    assert torch.equal(first, again)
    assert relative_error(second, first) > 1e-2 and relative_error(both, first) > 1e-2


@pytest.mark.parametrize("name", ["gemma4"])
def test_one_of_the_two_projections(packed, twin):
    results = []
    for model in (packed, twin):
        torch.manual_seed(1)
        targets = {"target_parameters": ["experts.down_proj"], "target_modules": []}
        config = peft.LoraConfig(r=3, init_lora_weights=False, **targets)
        results.append(gradients(peft.get_peft_model(model, config)))
    compare(*results)


@pytest.mark.parametrize("name", ["qwen3_moe"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(packed, twin, reentrant):
    expected = gradients(with_lora(twin))
    model = with_lora(packed)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_one_graph():
    """In bfloat16: torch traces no other grouped product."""
    packed = fp4moe.replace_moe(qwen3_moe(dtype=torch.bfloat16), progress=False)
    model = with_lora(packed, r=8)
    expected = gradients(model)
    got = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.equal(got[0], expected[0])
    for name, gradient in expected[1].items():
        # Attention's traced backward rounds to bfloat16 elsewhere, and layer 0 is behind it.
        limit = 0 if "layers.1.mlp.experts" in name else 2.0**-6
        assert relative_error(got[1][name], gradient) <= limit, name


@pytest.mark.parametrize("rank", [3, 8])
def test_factors_lie_as_cuda_wants_them(rank):
    """The meta device has the checks of CUDA's grouped product: strides of whole 16 bytes."""
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    up = torch.empty(96, rank, 4, **meta).permute(2, 0, 1)
    change = LowRank(torch.empty(4, rank, 40, **meta), up, 0.5)
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match="stride"):
        torch.nn.functional.grouped_mm(torch.empty(9, rank, **meta), up.mT, offs=ends)
    assert _low_rank(torch.empty(9, 64, **meta), change, ends, 128, 2).shape == (9, 128)


# What a model does not show: ids, biases, and every activation's shape of a layer.


def adapters_for(weights, rank=4):
    layer, experts = weights.layer(), weights.local_experts
    rows = (1 + layer.gated) * layer.intermediate_size
    sizes = {
        "first": (layer.hidden_size, rows),
        "down": (layer.intermediate_size, layer.hidden_size),
    }
    return {
        name: [
            LowRank(
                (torch.randn(experts, rank, columns) / columns**0.5).requires_grad_(),
                (torch.randn(experts, rows, rank) / rank**0.5).requires_grad_(),
                0.5,
            )
        ]
        for name, (columns, rows) in sizes.items()
    }


def merged(weights, adapters):
    """The float weights that adapters make, by name; gate and up side by side."""
    parts = weights.dequantize()
    changes = {
        name: change.scaling * change.up @ change.down for name, (change,) in adapters.items()
    }
    halves = changes["first"].chunk(1 + weights.gated, 1)
    names = ("gate", "up") if weights.gated else ("up",)
    parts |= {n: parts[n] + half for n, half in zip(names, halves, strict=True)}
    return parts | {"down": parts["down"] + changes["down"]}


@pytest.mark.parametrize(("activation", "gated"), [
    ("silu(alpha=1.702,beta=1,limit=1.5)", True), ("gelu_tanh", True), ("relu2", False),
])  # fmt: skip
@pytest.mark.parametrize("format", ["nvfp4", "fp8_block"])
def test_ids_of_no_expert_and_experts_without_rows(activation, gated, format):
    # Sizes that the format pads, an expert without rows and one with most of them.
    weights = make_layer(5, 40, 24, activation, gated, biased=True, format=format)
    fused = fp4moe.FusedExperts(weights, "reference")
    fused.float_layout = "gate_up"
    adapters = adapters_for(weights)
    hidden, routing = torch.randn(7, 40, requires_grad=True), torch.rand(7, 3, requires_grad=True)
    ids = torch.tensor(
        [[3, 3, 3], [3, -1, 5], [0, 3, 1], [5, 5, -1], [4, 0, 3], [3, 1, 0], [1, 3, 4]]
    )
    leaves = [hidden, routing, *(t for (c,) in adapters.values() for t in c[:2])]
    got = experts_with_adapters(fused, hidden, ids, routing, adapters)
    parts = merged(weights, adapters)
    there, local = (ids >= 0) & (ids < 5), ids.clamp(0, 4)

    def product(name, x):
        return torch.einsum("tkrc,tkc->tkr", parts[name][local], x) + parts[f"{name}_bias"][local]

    x = hidden[:, None].expand(-1, 3, -1)
    gate = product("gate", x) if gated else None
    inner = fp4moe.Activation.parse(activation).combine(product("up", x), gate)
    expected = (product("down", inner) * (routing * there)[..., None]).sum(1)
    assert relative_error(got, expected) < LIMIT
    grad = torch.randn_like(got)
    found, wanted = (torch.autograd.grad(out, leaves, grad) for out in (got, expected))
    for actual, gradient in zip(found, wanted, strict=True):
        assert relative_error(actual, gradient) < LIMIT
    # Expert 2 has no rows, token 3 and its routing weights no expert.
    assert not any(t[2].any() for t in found[2:])
    assert not found[0][3].any() and not found[1][~there].any()
    assert not got[3].any()
    with torch.no_grad():
        spoilt = hidden.clone()
        spoilt[3] = torch.nan
        assert torch.equal(experts_with_adapters(fused, spoilt, ids, routing, adapters), got)
        nothing = experts_with_adapters(fused, hidden[:0], ids[:0], routing[:0], adapters)
    assert nothing.shape == (0, 40)


def test_half_types():
    """Products are rounded where PEFT's float model in that dtype rounds them."""
    weights = make_layer(4, 64, 48, "silu", True)
    fused, adapters = fp4moe.FusedExperts(weights, "reference"), adapters_for(weights)
    fused.float_layout = "gate_up"
    hidden, ids, routing = torch.randn(33, 64), torch.randint(0, 4, (33, 2)), torch.rand(33, 2)
    grad, results = torch.randn(33, 64).bfloat16(), []
    for dtype in (torch.float32, torch.bfloat16):
        x = hidden.to(dtype).requires_grad_()
        out = experts_with_adapters(fused, x, ids, routing, adapters)
        leaves = x, *(t for (change,) in adapters.values() for t in change[:2])
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
    # Hidden, A, B, both products of an adapter, their sums, the intermediate, the result, and as
    # much on the way back: some thirty roundings of 2^-9 each at random.
    for exact, got in zip(*results, strict=True):
        assert relative_error(got, exact) < 30**0.5 * 2.0**-9
    assert [t.dtype for t in results[1]] == [torch.bfloat16] * 2 + [torch.float32] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize(("activation", "gated"), [("gelu_tanh", True), ("relu2", False)])
def test_on_the_gpu(activation, gated, rank, dtype):
    """Kernel triton against the reference in float32 on a CPU, outputs and gradients."""
    weights = make_layer(8, 192, 96, activation, gated)
    adapters = adapters_for(weights, rank)
    hidden, routing = torch.randn(300, 192), torch.rand(300, 3)
    ids = torch.randint(-1, 9, (300, 3))
    grad, results = torch.randn(300, 192), []
    for device, kernel, kind in (("cpu", "reference", torch.float32), ("cuda", "triton", dtype)):
        fused = fp4moe.FusedExperts(weights.to(device), kernel)
        fused.float_layout = "gate_up"
        own = {
            name: [LowRank(*(t.detach().to(device).requires_grad_() for t in change[:2]), 0.5)]
            for name, (change,) in adapters.items()
        }
        x = hidden.to(device, kind).requires_grad_()
        r = routing.to(device).requires_grad_()
        out = experts_with_adapters(fused, x, ids.to(device), r, own)
        leaves = x, r, *(t for (c,) in own.values() for t in c[:2])
        found = torch.autograd.grad(out, leaves, grad.to(device, kind))
        results.append([t.cpu() for t in (out, *found)])
    for expected, got in zip(*results, strict=True):
        # Some twenty roundings to bfloat16 on the way, 2^-9 each at random; relu2 doubles one.
        assert relative_error(got, expected) < 2 * 20**0.5 * 2.0**-9


# Refusals.


def test_a_second_gradient_is_refused():
    weights = make_layer(2, 32, 32)
    fused, adapters = fp4moe.FusedExperts(weights, "reference"), adapters_for(weights)
    fused.float_layout = "gate_up"
    ids, routing = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    out = experts_with_adapters(fused, torch.randn(3, 32), ids, routing, adapters)
    trained = adapters["first"][0].down
    first = torch.autograd.grad(out.square().sum(), trained, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"^grouped_mm: its gradient has no gradient, "):
        first.square().sum().backward()


@pytest.mark.parametrize("name", ["gemma4"])
def test_merging_is_refused_before_anything_changes(packed):
    model = with_lora(packed)
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError) as raised:
            merge()
        text = str(raised.value)
        assert text.startswith("merge: an adapter cannot be merged into ")
        assert ".experts, because its weights are packed" in text
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_what_cannot_have_adapters_says_why(original, packed):
    w4a4 = fp4moe.replace_moe(copy.deepcopy(original), "reference_w4a4", progress=False)
    with pytest.raises(UnsupportedError, match=r'^register_peft: .*Load or replace .*"triton"'):
        with_lora(w4a4)
    split = copy.deepcopy(packed)
    for fused in fused_parts(split).values():
        fused.forward = functools.partial(type(fused).forward, fused)
    with pytest.raises(
        UnsupportedError, match=r"^register_peft: .* forward was replaced on the in"
    ):
        with_lora(split)
    for fused in fused_parts(packed).values():
        fused.float_layout = None
    with pytest.raises(UnsupportedError, match=r"^register_peft: the experts at .*one stacked par"):
        with_lora(packed)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        with_lora(fp4moe.replace_moe(original, progress=False), lora_dropout=0.1)


def test_registered_once_and_beside_nobody_else(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.lora import LoraModel

    fp4moe.register_peft()
    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", lambda package: "0.20.1")
        with pytest.raises(UnsupportedError, match=r"^register_peft: .* PEFT 0.20.1 wraps"):
            fp4moe.register_peft()

    class Another(LoraModel):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, Another)
    with pytest.raises(UnsupportedError, match=r"^register_peft: PEFT's LoRA cannot be extended"):
        fp4moe.register_peft()
