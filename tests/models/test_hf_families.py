"""replace_moe on the experts of real transformers classes, against Hugging Face's own eager code.

The float twin gets the dequantised values of the packed weights and runs the class's own forward.
"""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from float_twins import float_twin, fused_parts, stored
from tiny_models import (
    FAMILIES,
    MODELS,
    Block,
    enlarge_experts,
    experts_class,
    family,
    fingerprint,
    routed,
)

from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain, replace_moe

BUILDERS = {**MODELS, "gemma4_multimodal": tiny_models.gemma4_multimodal}
# Family -> what the error must say of each of its blocks.
REFUSED = {"muse_spark": ("it has a norm behind each expert",)}
# What their blocks compute; all others are plain.
SHIFTED, CLAMPED = "silu(alpha=1.702,beta=1,limit=1.5)", "silu(limit=1.5)"
ACTIVATIONS = {
    "deepseek_v4": {CLAMPED},
    "glm5_next": {CLAMPED},
    "gpt_oss": {SHIFTED},
    "hy_v4": {CLAMPED},
    "inkling2": {"silu_softcap(alpha=4,beta=25)"},
    "minimax_m3": {SHIFTED},
    "privacy_filter": {SHIFTED},
    "step3p7": {"silu", "silu_step(limit=1.5)"},
}
BIASED = ("gpt_oss", "privacy_filter")
UNKNOWN = ("llama4",)
# Without a head.
NOT_GENERATIVE = ("glm5_next", "privacy_filter", "step3p7")
REPLACED = [*BUILDERS, *(f for f in FAMILIES if f not in REFUSED and f not in UNKNOWN)]
IDS = torch.tensor([[17, 5, 99, 42, 7, 64, 23, 8, 71], [3, 88, 9, 120, 54, 31, 77, 6, 45]])


def build(name, implementation="grouped_mm", dtype=torch.float32):
    builder = BUILDERS.get(name)
    model = builder(implementation, dtype) if builder else family(name, implementation, dtype)
    return enlarge_experts(model)


def logits(model):
    with torch.no_grad():
        out = model(IDS, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_model_is_the_model_with_dequantised_weights(name, record_property):
    model = build(name)
    original, before = copy.deepcopy(model), explain(model)
    assert before.count("replaceable") == len(before.blocks) > 0

    assert replace_moe(model, progress=False) is model

    fused = fused_parts(model)
    assert [b.path for b in before.blocks] == [*fused]
    twin = float_twin(original, model)
    expected, actual = logits(twin), logits(model)
    # Both sum the same float32 products, at most 96 of them, in another order: 6e-8 * sqrt(96) a
    # GEMM if every rounding counts, and few do.
    assert relative(actual, expected) < 2e-6
    # The check would see half of the down weights 1 % off.
    for path in fused:
        twin.get_submodule(path).down_proj.data[..., ::2] *= 1.01
    assert relative(logits(twin), expected) > 1e-4
    # The weights are 10 % off in 4 bits; the rest of the model passes some of it on.
    error = relative(actual, logits(original))
    record_property("relative error", error)
    assert 1e-3 < error < 0.7

    after = explain(model)
    assert after.count("replaced") == len(after.blocks) == len(before.blocks)
    for old, new in zip(before.blocks, after.blocks, strict=True):
        for field in ("path", "activation", "gated", "num_experts", "hidden_size"):
            assert getattr(old, field) == getattr(new, field)
        assert old.intermediate_size == new.intermediate_size
        assert old.padded_sizes == new.padded_sizes
        # Float32: 4 bytes against 4 bits and an eighth of a byte; sizes here are multiples of 16.
        assert (6.0 if name in BIASED else 7.0) < old.nbytes / new.nbytes <= 64 / 9
        assert fused[new.path].layer.biased == (name in BIASED)
    found = {row.activation for row in after.blocks}
    assert ACTIVATIONS.get(name, found) == found
    assert name in ACTIVATIONS or not any("(" in text for text in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_packed_weights_are_the_nearest_codes_of_the_original_ones(name):
    model = build(name)
    original = copy.deepcopy(model)
    replace_moe(model, progress=False)
    for path, fused in fused_parts(model).items():
        module = original.get_submodule(path)
        for parameter, packed in stored(module, fused.weights.dequantize()).items():
            weight = getattr(module, parameter).detach()
            if parameter.endswith("_bias"):
                assert torch.equal(packed, weight)
                continue
            axis = 1 if getattr(module, "is_transposed", False) else 2
            blocks, found = (w.movedim(axis, 2).unflatten(2, (-1, 16)) for w in (weight, packed))
            amax = blocks.abs().amax(-1, keepdim=True)
            # e4m3 scales are off by up to 1/16. Codes 4 and 6 are 2 apart: an error of at most one
            # scale <= amax / 6 * 17/16.
            assert bool(((blocks - found).abs() <= 0.178 * amax).all())
            assert 0.05 < relative(packed, weight) < 0.13


@pytest.mark.slow
@pytest.mark.parametrize("name", [f for f in REPLACED if f not in NOT_GENERATIVE])
def test_generate_in_eager_mode_gives_the_twins_tokens(name):
    model = build(name)
    original = copy.deepcopy(model)
    replace_moe(model, progress=False)
    twin = float_twin(original, model)
    tokens = []
    for m in (model, twin):
        m.generation_config.eos_token_id = None
        mask = torch.ones_like(IDS)
        tokens.append(m.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert tokens[0].shape == (2, 13)
    assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strict", [True, False])
def test_families_that_compute_something_else_are_refused_untouched(name, strict, caplog):
    model = build(name)
    before, expected = fingerprint(model), logits(model)
    report = explain(model)
    assert report.count("not replaceable") == len(report.blocks) > 0
    if strict:
        with pytest.raises(UnsupportedError) as raised:
            replace_moe(model, progress=False)
        text = str(raised.value)
        count = f"{len(report.blocks)} of {len(report.blocks)} blocks cannot be replaced"
        assert text.startswith(f"replace_moe: {count}, because ")
        assert text.endswith("Pass strict=False to leave these as they are.")
    else:
        assert replace_moe(model, progress=False, strict=False) is model
        text = caplog.text
    for block in report.blocks:
        assert block.path in text
        assert len(block.reasons) == len(REFUSED[name])
        for reason, expected_reason in zip(block.reasons, REFUSED[name], strict=True):
            assert reason.startswith(expected_reason)
            assert reason in text
    assert fingerprint(model) == before
    assert torch.equal(logits(model), expected)


def test_experts_outside_the_interface_are_not_known():
    model = family("llama4", "eager")
    assert any("Experts" in type(m).__name__ for m in model.modules())
    before = fingerprint(model)
    assert explain(model).blocks == ()
    with pytest.raises(UnsupportedError, match="Llama4ForCausalLM cannot be changed"):
        replace_moe(model, progress=False)
    assert fingerprint(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_the_configured_implementation_does_not_matter(name, implementation):
    model, other = build(name, implementation), build(name)
    replace_moe(model, progress=False)
    replace_moe(other, progress=False)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["gemma4", "nemotron_h_latent", "mixtral", "aria", "gpt_oss", "privacy_filter", "step3p7"],
)
def test_half_precision_models(name, dtype):
    model = build(name, dtype=dtype)
    original = copy.deepcopy(model)
    replace_moe(model, progress=False)
    actual = logits(model)
    assert actual.dtype == logits(original).dtype
    twin = float_twin(original.float(), model)
    expected = logits(twin)
    errors = (actual - expected).float().norm(dim=-1) / expected.norm(dim=-1)
    # Every activation is rounded to 2^-9 (bfloat16) or 2^-12; two layers of some ten roundings. Of
    # most tokens: a router whose scores come near a tie may choose otherwise for one.
    assert errors.quantile(0.75) < (0.04 if dtype == torch.bfloat16 else 0.005)


def interleaved_gate(self, gate_up):
    return self.act_fn(gate_up[..., 0::2]) * gate_up[..., 1::2]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["ungated", "concatenated", "interleaved", "exchanged"])
def test_every_layout_that_the_stamps_can_name(form, transposed):
    interleaved = form in ("interleaved", "exchanged")
    stamps = {"is_transposed": transposed, "is_concatenated": not interleaved}
    experts = experts_class(has_gate=form != "ungated", **stamps)
    if form == "interleaved":
        experts._apply_gate = interleaved_gate
    model = Block(experts, "eager")
    original, inputs = copy.deepcopy(model), routed(20)
    if form == "exchanged":
        # The stamps say interleaved, the gate says concatenated.
        with pytest.raises(UnsupportedError, match=r"its _apply_gate is not act\(gate\) \* up"):
            replace_moe(model, progress=False)
        return
    replace_moe(model, progress=False)
    expected = original(*inputs)
    actual = model(*inputs)
    assert 0.02 < relative(actual, expected) < 0.3
    for name, weight in stored(original.experts, model.experts.weights.dequantize()).items():
        getattr(original.experts, name).data.copy_(weight)
    assert relative(actual, original(*inputs)) < 2e-6


def test_an_implementation_that_cannot_run_here_does_not_matter():
    """What replaces it needs nothing that it needs."""
    model = build("qwen3_moe", "eager")
    expected = logits(replace_moe(copy.deepcopy(model), progress=False))
    model.config._experts_implementation = "absent"
    with pytest.raises(KeyError, match="absent"):
        logits(model)
    replace_moe(model, progress=False)
    assert torch.equal(logits(model), expected)
    assert model.config._experts_implementation == "absent"
