"""Scales as tools leave them: gate and up apart, experts that calibration never saw."""

from __future__ import annotations

import checkpoint_makers as makers
import nvfp4_files as files
import pytest
import torch

from fp4moe.errors import CheckpointError
from fp4moe.testing import relative_error

GATED = ("qwen3_moe", "gemma4", "glm4_moe", "deepseek_v3")
# Both sides compute the same products in float32, in another order: a few units of 2^-24 a layer.
ROUNDING = 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GATED, "nemotron_h"])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_are_those_of_the_file(tmp_path, name, shared, caplog):
    made = files.make(name, tmp_path / "source", shared)
    model = files.load(made.write(tmp_path / "packed"))
    found = [files.decoded(weights) for weights in files.experts(model)]
    layers = files.stacks(made.values)
    assert len(found) == len(layers) > 0
    for ours, theirs in zip(found, layers, strict=True):
        assert set(ours) == set(theirs)
        if "gate" in theirs:
            assert torch.equal(ours["gate"], theirs["gate"])
        # What is divided out of up is multiplied into down: one factor an expert.
        factor = (theirs["up"].flatten(1).norm(dim=1) / ours["up"].flatten(1).norm(dim=1)).view(
            -1, 1, 1
        )
        assert bool((factor != 1).any()) == (not shared and "gate" in theirs)
        torch.testing.assert_close(ours["up"] * factor, theirs["up"], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours["down"] / factor, theirs["down"], rtol=1e-6, atol=0)
    expected = made.expected(tmp_path / "float")
    assert relative_error(files.logits(model), expected) < ROUNDING
    assert "global scales" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_up_enters_linearly_under_every_activation(tmp_path, name, activation):
    made = files.make(name, tmp_path / "source", shared=False, hidden_act=activation)
    model = files.load(made.write(tmp_path / "packed"))
    assert {w.activation for w in files.experts(model)} == {activation.replace("_pytorch", "")}
    expected = made.expected(tmp_path / "float")
    assert relative_error(files.logits(model), expected) < ROUNDING


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_quantised_activations_see_the_same_steps(tmp_path, name):
    """By a power of two everything moves exactly: the codes of the intermediate stay."""
    made = files.make(name, tmp_path / "source")
    other = dict(made.tensors)
    for key in made.tensors:
        if ".experts." in key and key.endswith(".up_proj.weight_scale_2"):
            other[key] = made.tensors[key] * 4
            scale = made.tensors[key.removesuffix("_2")].float() / 4
            other[key.removesuffix("_2")] = scale.to(files.E4M3)
            # e4m3 holds a quarter of each of these block scales.
            assert torch.equal(other[key.removesuffix("_2")].float(), scale)
    one, two = (
        files.load(made.write(tmp_path / folder, tensors), kernel="reference_w4a4")
        for folder, tensors in (("one", None), ("two", other))
    )
    for before, after in zip(files.experts(one), files.experts(two), strict=True):
        assert torch.equal(after.down.global_scale, before.down.global_scale * 4)
        assert torch.equal(after.intermediate_scale, before.intermediate_scale / 4)
    assert torch.equal(files.logits(one), files.logits(two))


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_compressed_tensors_that_observed_gate_and_up_alone(tmp_path, name):
    makers.save_compressed(name, tmp_path, shared=False)
    model = files.load(tmp_path)
    expected = makers.logits(makers.reference_model(tmp_path))
    assert relative_error(makers.logits(model), expected) < ROUNDING


@pytest.mark.parametrize("ratio", [1e-38, 1e38])
def test_scales_that_float32_cannot_fold_are_refused(tmp_path, ratio):
    made = files.make("qwen3_moe", tmp_path / "source")
    key = "model.layers.1.mlp.experts.2.up_proj.weight_scale_2"
    made.tensors[key] = torch.tensor(ratio)
    message = r"global scales of gate and up that are alike in model\.layers\.1\.mlp\.experts"
    with pytest.raises(CheckpointError, match=message):
        files.load(made.write(tmp_path / "packed"))


def unseen(tensors, pattern, value):
    """Other input scales for keys that contain one of the patterns; None removes them."""
    found = dict(tensors)
    for key in tensors:
        if key.endswith("input_scale") and any(part in key for part in pattern):
            found[key] = None if value is None else torch.tensor(value)
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def largest(tensors, path, projections):
    return max(
        float(tensor)
        for key, tensor in tensors.items()
        if key.startswith(path)
        and key.endswith("input_scale")
        and key.split(".")[-2] in projections
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", "nemotron_h"])
@pytest.mark.parametrize("value", [None, 0.0, torch.inf], ids=["missing", "0", "inf"])
@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
def test_experts_without_tokens_get_the_largest_range(tmp_path, name, value, kernel, caplog):
    made = files.make(name, tmp_path / "source")
    gone = ("experts.3.", "experts.5.down")
    tensors = unseen(made.tensors, gone, value)
    model = files.load(made.write(tmp_path / "some", tensors), kernel=kernel)
    assert "no activation range for 4 experts" in caplog.text
    assert len([r for r in caplog.records if "activation range" in r.message]) == 1
    paths = sorted({files.EXPERT.fullmatch(key)[1] for key in made.values})
    kept = unseen(made.tensors, gone, None)
    for path, weights in zip(paths, files.experts(model), strict=True):
        assert f"{path.replace('backbone', 'model')}: 3, 5" in caplog.text
        first = largest(kept, path, ("gate_proj", "up_proj"))
        down = largest(kept, path, ("down_proj",))
        assert weights.hidden_scale.tolist() == [pytest.approx(first, rel=1e-7)]
        for expert, scale in enumerate(weights.intermediate_scale.tolist()):
            own = kept.get(f"{path}.{expert}.down_proj.input_scale", torch.tensor(down))
            assert scale == float(own)
    if kernel == "reference":
        whole = files.load(made.write(tmp_path / "all"), kernel=kernel)
        assert torch.equal(files.logits(model), files.logits(whole))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize("value", [None, 0.0], ids=["missing", "0"])
def test_one_scale_of_gate_and_up_is_enough(tmp_path, name, value, caplog):
    made = files.make(name, tmp_path / "source")
    tensors = unseen(made.tensors, (".gate_proj.",), value)
    files.load(made.write(tmp_path / "some", tensors))
    assert "activation range" not in caplog.text


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_without_any_range_the_scales_are_one(tmp_path, name, caplog):
    made = files.make(name, tmp_path / "source")
    for value, experts in ((0.0, 16), (None, 0)):
        caplog.clear()
        tensors = unseen(made.tensors, (".experts.",), value)
        model = files.load(made.write(tmp_path / str(value), tensors))
        for weights in files.experts(model):
            assert weights.hidden_scale.tolist() == [1]
            assert weights.intermediate_scale.tolist() == [1] * 8
        assert (f"for {experts} experts" in caplog.text) == bool(experts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
@pytest.mark.parametrize("stored", [0.0, torch.inf], ids=str)
def test_reciprocals_of_no_range(tmp_path, name, stored, caplog):
    """llm-compressor divides by a range of 0."""
    makers.save_compressed(name, tmp_path / "whole")

    def change(tensors):
        for key in tensors:
            if ".experts.3." in key and key.endswith("input_global_scale"):
                tensors[key] = torch.tensor([stored])

    directory = makers.rewrite(tmp_path / "whole", tmp_path / "some", change)
    model, whole = files.load(directory), files.load(tmp_path / "whole")
    assert "no activation range for 2 experts" in caplog.text
    for ours, theirs in zip(files.experts(model), files.experts(whole), strict=True):
        others = [scale for e, scale in enumerate(theirs.intermediate_scale.tolist()) if e != 3]
        assert ours.intermediate_scale[3] == max(others)
    assert torch.equal(files.logits(model), files.logits(whole))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_zeros_in_the_scales_of_a_stack(tmp_path, name, caplog):
    made = files.make(name, tmp_path / "source")
    stacked = dict(made.tensors)
    for path in {files.EXPERT.fullmatch(key)[1] for key in made.values}:
        for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                parts = [stacked.pop(f"{path}.{e}.{projection}.{leaf}") for e in range(8)]
                values = torch.stack(
                    [p.view(torch.uint8) if leaf == "weight_scale" else p for p in parts]
                )
                if leaf == "input_scale":
                    values[3] = 0
                values = values.view(files.E4M3) if leaf == "weight_scale" else values
                stacked[f"{path}.{projection}.{leaf}"] = values
    model = files.load(made.write(tmp_path / "some", stacked))
    assert "no activation range for 2 experts" in caplog.text
    for weights in files.experts(model):
        assert weights.intermediate_scale[3] == weights.intermediate_scale.max()


@pytest.mark.parametrize("value", [torch.nan, -1.0], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_numbers_that_no_calibration_writes_are_refused(tmp_path, name, value):
    made = files.make(name, tmp_path / "source")
    tensors = unseen(made.tensors, ("experts.3.down",), value)
    message = r"input scales that are numbers and not negative; got .* in '.*experts\.3\.down_proj"
    with pytest.raises(CheckpointError, match=message):
        files.load(made.write(tmp_path / "some", tensors))


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("value", [0.0, torch.inf], ids=str)
def test_a_linear_without_tokens_keeps_no_scale(tmp_path, name, value):
    made = files.make(name, tmp_path / "source", also=r"self_attn\.o_proj\.weight")
    tensors = unseen(made.tensors, ("layers.1.self_attn.o_proj",), value)
    model = files.load(made.write(tmp_path / "some", tensors))
    layers = [layer.self_attn.o_proj for layer in model.model.layers]
    assert [layer.input_scale is None for layer in layers] == [False, True]
    expected = made.expected(tmp_path / "float")
    assert relative_error(files.logits(model), expected) < ROUNDING
