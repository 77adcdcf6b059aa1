"""LoRA beside frozen packed experts: the gradients are those of the dequantised float model."""

from __future__ import annotations

import copy

import pytest
import torch
from float_twins import float_twin
from tiny_models import enlarge_experts, gemma4, keep_layers, nemotron_h

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.kernels.reference import REFERENCE
from fp4moe.testing import relative_error

peft = pytest.importorskip("peft", reason="optional package")

IDS = torch.arange(1, 25).reshape(2, 12)
BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
# The router is a Linear in one family, a parameter in the other.
TARGETS = {
    "gemma4": {"target_modules": [*ATTENTION, "router.proj"]},
    "nemotron_h": {"target_modules": ATTENTION, "target_parameters": ["mixer.gate.weight"]},
}
# Two layers of experts and the rest of a model in float32, in another order.
LIMIT = 1e-5
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing.*is deprecated"),
]


def with_lora(model, name, **targets):
    """The same adapter for every model of that name; it changes the output from the start."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **(TARGETS[name] | targets))
    return peft.get_peft_model(model, config).train()


def gradients(model, run=None):
    run = model if run is None else run
    loss = run(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    found = {name: parameter.grad for name, parameter in trained.items()}
    model.zero_grad()
    return loss.detach(), found


def compare(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=LIMIT, atol=0)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert relative_error(got[1][name], gradient) < LIMIT, name


@pytest.fixture(params=BUILDS)
def name(request):
    return request.param


@pytest.fixture
def original(name):
    return enlarge_experts(BUILDS[name]()).requires_grad_(False)


@pytest.fixture
def replaced(original):
    return fp4moe.replace_moe(copy.deepcopy(original), progress=False)


@pytest.fixture
def expected(name, original, replaced):
    return gradients(with_lora(float_twin(original, replaced), name))


def test_replaced(name, replaced, expected):
    model = with_lora(replaced, name)
    compare(gradients(model), expected)
    packed = [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]
    assert packed and not any(list(m.parameters()) for m in packed)
    assert any("router" in n or "gate" in n for n in expected[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, replaced, expected, reentrant):
    model = with_lora(replaced, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(gradients(model), expected)


# An adapter of a parameter is a graph break of PEFT's, which leaves the experts of no graph whole.
LINEARS = {"target_parameters": None}
# One layer of experts, for NemotronH attention behind it: what is compiled.
ONE_BLOCK = {"gemma4": (0,), "nemotron_h": (1, 2)}


@pytest.fixture
def one_block(name, original):
    return keep_layers(original, *ONE_BLOCK[name])


@pytest.fixture
def of_linears(name, one_block):
    replaced = fp4moe.replace_moe(copy.deepcopy(one_block), progress=False)
    return gradients(with_lora(float_twin(one_block, replaced), name, **LINEARS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gemma4", "backend"),
        ("gemma4", "fused routing"),
        ("nemotron_h", "backend"),
        ("gemma4", "inductor_options"),
    ],
)
def test_compiled(name, one_block, of_linears, way):
    model = with_lora(one_block, name, **LINEARS)
    if way != "inductor_options":
        options = {"inner_backend": "aot_eager", "on_no_match": "error"}
        options |= {"routing": "fused"} if way == "fused routing" else {}
        run = torch.compile(model, backend=fp4moe.backend, options=options)
    else:
        run = torch.compile(model, options=fp4moe.inductor_options(on_no_match="error"))
    compare(gradients(model, run), of_linears)
    assert all(p.grad is None for n, p in model.named_parameters() if "experts" in n)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nemotron_h"])
@pytest.mark.parametrize("way", ["replaced", "backend"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_gradient_checkpointing(name, one_block, of_linears, way):
    if way == "replaced":
        fp4moe.replace_moe(one_block, progress=False)
    model = with_lora(one_block, name, **LINEARS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "replaced":
        run = torch.compile(model, backend="aot_eager")
    else:
        # Checkpointing splits the graph: pieces have no experts.
        options = {"inner_backend": "aot_eager", "on_no_match": "ignore"}
        run = torch.compile(model, backend=fp4moe.backend, options=options)
    compare(gradients(model, run), of_linears)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4"])
def test_a_kernel_without_gradients_stays_float(name, one_block, monkeypatch):
    monkeypatch.setattr(REFERENCE, "differentiable", False)
    model = with_lora(one_block, name, **LINEARS)
    options = {"inner_backend": "aot_eager"}
    with pytest.warns(UserWarning, match=r"which kernel reference does not give; ask for kernel="):
        got = gradients(model, torch.compile(model, backend=fp4moe.backend, options=options))
    compare(got, gradients(model))


def test_routers_in_one_launch(name, original, expected):
    fused = fp4moe.replace_moe(original, routing="fused", progress=False)
    compare(gradients(with_lora(fused, name)), expected)


@pytest.mark.usefixtures("registered")
def test_the_implementation(name, original, expected):
    """It packs as replace_moe does; what is to be trained it refuses, and leaves as it was."""
    original.set_experts_implementation("fp4moe")
    for module in original.modules():
        if hasattr(module, "down_proj") and module.down_proj.__class__ is torch.nn.Parameter:
            module.down_proj.requires_grad_()
    reason = r"^register_transformers: the experts of .* cannot be trained, .* down_proj require"
    with pytest.raises(UnsupportedError, match=reason):
        original.train()(IDS, use_cache=False)
    compare(gradients(with_lora(original, name)), expected)


def test_steps_lower_the_loss(name, replaced):
    model = with_lora(replaced, name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Of 12 tokens: no step of eight makes it larger by chance.
    assert losses[-1] < 0.98 * losses[0]
