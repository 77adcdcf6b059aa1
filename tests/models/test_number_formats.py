"""replace_moe(format=...): each number format on real classes, its state_dict, what is refused."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from float_twins import fused_parts
from format_models import KEPT, expected, float_model, logits, replaced
from loop_models import MixtralOld, make_model

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.formats import FORMATS
from fp4moe.identity.float_weights import FloatWeights, StoredForm, pack_float
from fp4moe.testing import relative_error

NAMES = list(KEPT)
OTHERS = [name for name in FORMATS if name != "nvfp4"]
# Both multiply the same float32 values and sum at most 96 products in another order, which is
# 6e-8 * sqrt(96) = 6e-7 where no rounding cancels another.
LIMIT = 1e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_replaced_is_the_model_with_decoded_weights(name, format):
    model = replaced(name, format)
    actual = logits(model)
    assert {m.layer.format for m in fused_parts(model).values()} == {format}
    assert relative_error(actual, expected(name, format)) < LIMIT
    # The weights of another format would be seen, and those of the float model.
    others = [expected(name, "nvfp4" if format != "nvfp4" else "fp8"), logits(float_model(name))]
    assert all(relative_error(actual, other) > 100 * LIMIT for other in others)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_one_by_one_are_those_of_a_stack(format):
    """Of a ModuleList, and of a graph whose experts are tensors of their own."""
    model = make_model(MixtralOld)
    experts = next(m for m in model.modules() if hasattr(m, "experts")).experts
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    lists = {r: [getattr(e, n).weight.detach() for e in experts] for r, n in names.items()}
    stacks = {role: torch.stack(tensors) for role, tensors in lists.items()}
    wanted = ExpertWeights.quantize(**stacks, activation="silu", format=format)
    form = StoredForm(format, "silu", "gate, up", False, False, "reference", 256)
    floats = FloatWeights(*(tuple(lists[role]) for role in names))
    fp4moe.replace_moe(model, format=format, progress=False)
    fused = next(iter(fused_parts(model).values()))
    for found in (fused.weights, pack_float(floats, form)):
        assert found.metadata() == wanted.metadata()
        for name, tensor in wanted.tensors().items():
            got = found.tensors()[name]
            assert got.dtype == tensor.dtype and got.shape == tensor.shape, name
            assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_goes_through_a_file(format):
    model, file = replaced("qwen3_moe", format), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = float_model("qwen3_moe")
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    fp4moe.replace_moe(other, format=format, progress=False)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.slow
def test_state_of_another_format_is_refused_by_name():
    states = {f: replaced("qwen3_moe", f).state_dict() for f in FORMATS}
    for here, there in itertools.permutations(FORMATS, 2):
        if "fp8" not in (here, there) and "nvfp4" not in (here, there):
            continue
        model = replaced("qwen3_moe", here)
        before = logits(model)
        text = rf"layers\.0\.mlp\.experts: .* format '{here}'; got '{there}'.*format='{there}'"
        with pytest.raises(RuntimeError, match=text):
            model.load_state_dict(states[there])
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("format", FORMATS)
def test_explain_names_the_format(format):
    model = float_model("gemma4")
    (before,) = fp4moe.explain(model, format=format).blocks
    assert (before.status, before.format) == ("replaceable", format)
    fp4moe.replace_moe(model, format=format, progress=False)
    report = fp4moe.explain(model)
    (after,) = report.blocks
    assert (after.status, after.format, after.kernel) == ("replaced", format, "reference")
    header, row = str(report).splitlines()[:2]
    assert row[header.index("format") :].split()[0] == format
    # Scales that are not stored need no calibration.
    stored = format in ("nvfp4", "fp8")
    assert bool([r for r in after.reasons if "calibrated" in r]) == stored
    (module,) = fused_parts(model).values()
    assert format in repr(module) and after.nbytes == module.nbytes


def test_models_of_one_class_in_all_formats_at_once():
    models = {f: replaced("qwen3_moe", f) for f in FORMATS}
    for format in [*FORMATS, *reversed(FORMATS)]:
        assert relative_error(logits(models[format]), expected("qwen3_moe", format)) < LIMIT


@pytest.mark.parametrize("format", FORMATS)
def test_calibrated_ranges_become_the_scales_of_the_format(format):
    model = float_model("qwen3_moe")
    with fp4moe.calibrate(model) as calibration:
        logits(model)
    fp4moe.replace_moe(model, format=format, progress=False)
    (module,) = fused_parts(model).values()
    (block,) = calibration.blocks
    largest = {"nvfp4": 6 * 448, "fp8": 448}.get(format)
    hidden, inner = module.activation_scales()
    wanted = torch.tensor([block.hidden_range, *block.intermediate_ranges])
    wanted = torch.ones_like(wanted) if largest is None else wanted / largest
    torch.testing.assert_close(torch.cat((hidden, inner)), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("present, asked", [("nvfp4", "fp8"), ("mxfp8", "nvfp4")])
def test_blocks_that_are_fused_keep_their_format(present, asked):
    model = replaced("qwen3_moe", present)
    text = f"the blocks cannot get format '{asked}', because .* is fused already, with '{present}'"
    with pytest.raises(UnsupportedError, match=text):
        fp4moe.replace_moe(model, format=asked)
    assert fp4moe.replace_moe(model, format=present) is model


def test_a_method_that_the_format_lacks_is_refused():
    with pytest.raises(UnsupportedError, match=r"^replace_moe: format fp8 cannot .*'mse'"):
        replaced("qwen3_moe", "fp8", method="mse")


SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 8, "top_k": 2}
ENTRIES = {
    "replace_moe": lambda f: replaced("qwen3_moe", f),
    "explain": lambda f: fp4moe.explain(float_model("qwen3_moe"), format=f),
    "backend": lambda f: torch.compile(
        float_model("qwen3_moe"), backend=fp4moe.backend, options={"format": f}
    )(torch.tensor([[1, 2]])),
    "inductor_options": lambda f: fp4moe.inductor_options(format=f),
    "rewrite_moe": lambda f: fp4moe.passes.rewrite_moe(
        torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), [torch.ones(1, 2)], format=f
    ),
    "rewrite_exported": lambda f: fp4moe.passes.rewrite_exported(
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), format=f
    ),
    "why_not": lambda f: fp4moe.why_not("auto", activation="silu", gated=True, **SIZES, format=f),
    "evaluate": lambda f: fp4moe.evaluate("no/such/model", format=f),
}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_names_are_refused_everywhere(entry):
    with pytest.raises(Exception, match=rf"{entry}: format must be one of .*got 'int4'") as caught:
        ENTRIES[entry]("int4")
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, UnsupportedError)
    known = str(error).split("one of ")[1].split(";")[0]
    assert known == ", ".join(FORMATS)
