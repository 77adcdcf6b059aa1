"""experts_implementation="fp4moe": the same numbers through transformers' own registry."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from tiny_models import (
    MODELS,
    Block,
    enlarge_experts,
    experts_class,
    family,
    gemma4,
    keep_layers,
    nemotron_h,
    qwen3_moe,
    routed,
)
from transformers.integrations.moe import ExpertsInterface

import fp4moe
from fp4moe.module import FusedExperts
from fp4moe.testing import relative_error

pytestmark = pytest.mark.usefixtures("registered")

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_replace_moe_and_frees_the_float_weights(name):
    model = MODELS[name]("fp4moe")
    replaced = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, replaced(IDS).logits)
    report = fp4moe.explain(model)
    assert report.count("replaced") == len(report.blocks) == 2
    assert not [
        n
        for n, _ in model.named_parameters()
        if "experts.gate_up" in n or ("up_proj" in n and ".experts." in n)
    ]


def test_a_model_can_be_switched_to_it():
    model = gemma4("grouped_mm")
    model.set_experts_implementation("fp4moe")
    with torch.no_grad():
        model(IDS)
    assert sum(isinstance(m, FusedExperts) for m in model.modules()) == 2


@pytest.mark.slow
def test_after_one_eager_call_it_compiles_without_a_break(fresh_dynamo):
    model = keep_layers(gemma4("fp4moe"), 0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(compiled(IDS).logits, expected)


@pytest.mark.slow
def test_a_first_call_under_compile_packs_at_a_break_or_says_what_to_do(fresh_dynamo):
    model = keep_layers(gemma4("fp4moe"), 0)
    with torch.no_grad():
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"Call fp4moe.replace_moe\(model\)"
        ):
            torch.compile(model, backend="aot_eager", fullgraph=True)(IDS)
        torch._dynamo.reset()
        first = torch.compile(model, backend="aot_eager")(IDS).logits
        assert torch.equal(first, model(IDS).logits)


def test_experts_that_cannot_be_fused_are_refused_by_name():
    model = gemma4("fp4moe")
    experts = model.model.layers[0].experts
    experts.act_fn = torch.nn.Tanh()
    with pytest.raises(
        fp4moe.errors.UnsupportedError,
        match="cannot be fused, because its _apply_gate",
    ):
        model(IDS)
    assert experts.gate_up_proj.shape == (8, 96, 64)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fp4moe, transformers", "transformers, fp4moe"])
def test_importing_registers_nothing_with_transformers(order):
    code = (
        "import sys\n"
        f"import {order}\n"
        "from transformers import PreTrainedModel\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "ours = [f for f in sys.meta_path if type(f).__module__.startswith('fp4moe')]\n"
        "assert not ours and 'fp4moe' not in ALL_EXPERTS_FUNCTIONS\n"
        "assert not {'fp4moe', 'modelopt'} & {*AUTO_QUANTIZER_MAPPING}\n"
        "assert not hasattr(PreTrainedModel.save_pretrained, 'for_fp4moe')\n"
        "fp4moe.register_transformers()\n"
        "assert 'fp4moe' in ALL_EXPERTS_FUNCTIONS and 'modelopt' in AUTO_QUANTIZER_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_registration_transformers_names_what_it_knows(monkeypatch):
    others = {k: v for k, v in ExpertsInterface._global_mapping.items() if k != "fp4moe"}
    monkeypatch.setattr(ExpertsInterface, "_global_mapping", others)
    with pytest.raises(ValueError, match='Specified `experts_implementation="fp4moe"` is not'):
        qwen3_moe().set_experts_implementation("fp4moe")


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def gpt_oss(implementation="grouped_mm", dtype=torch.float32):
    model = family("gpt_oss", implementation, dtype)
    for module in model.modules():
        if hasattr(module, "router"):
            # No two scores so near that 16 bits exchange them.
            module.router.bias.data.copy_(torch.arange(8))
    return model


BUILDS = {"gemma4": gemma4, "gpt_oss": gpt_oss, "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_four_threads_at_a_first_call_and_at_the_first_call_back(name, hasty):
    model = enlarge_experts(BUILDS[name]())
    expected = logits(fp4moe.replace_moe(copy.deepcopy(model), progress=False))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            model.set_experts_implementation("fp4moe")
            for result in pool.map(logits, [model] * 4):
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
            assert fp4moe.explain(model).count("replaced") == 2
            model.set_experts_implementation("grouped_mm")
            first, *others = pool.map(logits, [model] * 4)
            assert all(torch.equal(result, first) for result in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_again(name, dtype, caplog):
    model = enlarge_experts(BUILDS[name](dtype=dtype))
    frozen = next(n for n, _ in model.named_parameters() if n.endswith("down_proj"))
    model.get_parameter(frozen).requires_grad_(False)
    described = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    buffers = [n for n, _ in model.named_buffers()]
    modules = [n for n, _ in model.named_modules()]
    twin = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
    packed, dense = logits(twin), None
    for _ in range(2):
        caplog.clear()
        model.set_experts_implementation("fp4moe")
        # The weights that went back are on the grid of NVFP4, and pack to what they were.
        torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-4)
        assert not caplog.records
        model.set_experts_implementation("grouped_mm")
        back = logits(model)
        (record,) = caplog.records
        assert "experts_implementation='grouped_mm'" in record.getMessage()
        assert "carry the rounding of nvfp4; load the model again" in record.getMessage()
        logits(model)
        assert len(caplog.records) == 1
        assert sorted(
            (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
        ) == sorted(described)
        assert [n for n, _ in model.named_buffers()] == buffers
        assert [n for n, _ in model.named_modules()] == modules
        assert not any(m._forward_pre_hooks for m in model.modules())
        # The same experts, decoded: what is left is the arithmetic of 16 bits.
        error = relative_error(back, packed)
        assert error < (1e-5 if dtype == torch.float32 else 4e-2)
        # The largest weight, divided and multiplied by 2688 in float32, moves by its last bit.
        if dense is not None:
            torch.testing.assert_close(back, dense, rtol=1e-4, atol=1e-5)
        dense = back


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"is_transposed": True},
        {"is_concatenated": False},
        {"has_gate": False},
        {"has_bias": True},
        {"has_bias": True, "has_gate": False, "is_transposed": True},
        {"has_bias": True, "is_concatenated": False, "is_transposed": True},
    ],
    ids=str,
)
def test_every_stored_form_comes_back_in_its_own_places(form):
    kind = experts_class(**form)
    if not form.get("is_concatenated", True):
        kind._apply_gate = lambda self, x: self.act_fn(x[..., ::2]) * x[..., 1::2]
    block = Block(kind, "fp4moe")
    block.experts.config._experts_implementation = "eager"
    before = {n: p.clone() for n, p in block.experts.named_parameters()}
    inputs = routed(9)
    expected = block(*inputs)
    block.experts.config._experts_implementation = "fp4moe"
    block(*inputs)
    assert not [*block.parameters()]
    block.experts.config._experts_implementation = "eager"
    result = block(*inputs)
    for name, value in block.experts.named_parameters():
        # Half a step of the coarsest part of the grid, between 4 and 6, of a block's scale.
        assert value.shape == before[name].shape
        if name.endswith("_bias"):
            assert torch.equal(value, before[name])
            continue
        assert 0 < relative_error(value, before[name]) < 0.13
    assert relative_error(result, expected) < 0.3


def test_weights_come_back_in_the_dtype_that_the_model_has_by_then():
    model = enlarge_experts(qwen3_moe("fp4moe"))
    logits(model)
    model.to(torch.bfloat16)
    packed = logits(model)
    model.set_experts_implementation("grouped_mm")
    assert relative_error(logits(model), packed) < 4e-2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_copies_of_a_packed_model_go_back_alone():
    model = enlarge_experts(qwen3_moe("fp4moe"))
    packed = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_experts_implementation("eager")
        torch.testing.assert_close(logits(other), packed, rtol=1e-4, atol=1e-5)
        assert not [m for m in other.modules() if isinstance(m, FusedExperts)]
    assert fp4moe.explain(model).count("replaced") == 2
    assert torch.equal(logits(model), packed)


def test_calibrated_ranges_survive_the_way_back():
    model = enlarge_experts(qwen3_moe("fp4moe"))
    logits(model)
    for part in (m for m in model.modules() if isinstance(m, FusedExperts)):
        part.set_activation_scales(0.5, 0.25)
    for name in ("grouped_mm", "fp4moe"):
        model.set_experts_implementation(name)
        logits(model)
    for part in (m for m in model.modules() if isinstance(m, FusedExperts)):
        hidden, inner = part.activation_scales()
        assert hidden.tolist() == [0.5] and inner.tolist() == [0.25] * 8


@pytest.mark.slow
def test_a_compiled_model_goes_back_at_a_break(fresh_dynamo):
    model = keep_layers(enlarge_experts(gemma4("fp4moe")), 0)
    packed = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(logits(compiled), packed)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(compiled), packed, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(compiled), logits(model))


def test_hooks_of_accelerate_stay_where_they_are():
    hooks = pytest.importorskip("accelerate.hooks", reason="optional package")
    model = enlarge_experts(qwen3_moe())
    expected = logits(fp4moe.replace_moe(copy.deepcopy(model), progress=False))
    hooks.attach_execution_device_hook(model, "cpu")
    model.set_experts_implementation("fp4moe")
    assert torch.equal(logits(model), expected)
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
