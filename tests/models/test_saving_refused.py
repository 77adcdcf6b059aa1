"""What cannot be saved is refused by name before a file is there; transformers knows the rest."""

from __future__ import annotations

import copy

import format_files as files
import pytest
import torch
import transformers
from saved_files import logits
from tiny_models import enlarge_experts, gemma4, nemotron_h, qwen3_moe
from turned_kernel import KERNELS, TurnedKernel

import fp4moe
from fp4moe.errors import UnsupportedError

BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}


def replaced(name="qwen3_moe", **options):
    with files.sizes():
        return fp4moe.replace_moe(enlarge_experts(BUILDS[name]()), progress=False, **options)


def experts(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, fp4moe.FusedExperts)}


def check_refused(model, directory, reason, advice=""):
    """Neither method leaves anything, nor does it change the model."""
    before = {name: vars(model).get(name) for name in ("hf_quantizer", "_weight_conversions")}
    for name in ("save_pretrained", "push_to_hub"):
        target = directory / name
        with pytest.raises(UnsupportedError) as raised:
            getattr(model, name)(str(target))
        text = str(raised.value)
        start = f"{name}: a {type(model).__name__} with packed weights cannot be written, because "
        assert text.startswith(start) and reason in text and advice in text, text
        assert not target.exists()
    for name, value in before.items():
        assert vars(model).get(name) is value


def part_of_the_experts(model, path):
    weights = experts(model)[path].weights.slice_experts(2, 6)
    return "holds 4 of 8 experts", fp4moe.FusedExperts(weights)


def part_of_the_columns(model, path):
    weights = experts(model)[path].weights.slice_intermediate(0, 80)
    return "holds 8 experts of 192 x 80, unlike those of its configuration", fp4moe.FusedExperts(
        weights
    )


def ranges_of_one_layer(model, path):
    module = experts(model)[path]
    module.set_activation_scales(0.5, 0.25)
    return f"{path} has activation ranges and ", module


def on_meta(model, path):
    return "is on the meta device, not loaded or offloaded", experts(model)[path].to("meta")


@pytest.mark.parametrize(
    "change", [part_of_the_experts, part_of_the_columns, ranges_of_one_layer, on_meta]
)
@pytest.mark.parametrize("name", BUILDS)
def test_packed_modules_that_files_cannot_hold(tmp_path, name, change):
    model = replaced(name)
    path = list(experts(model))[-1]
    reason, module = change(model, path)
    model.set_submodule(path, module)
    check_refused(model, tmp_path, reason)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_padded_columns(tmp_path, name):
    # 48 columns, which replace_moe pads to blocks of 32.
    model = fp4moe.replace_moe(BUILDS[name](), progress=False, format="mxfp8")
    check_refused(model, tmp_path, "its columns are no multiples of 32", "Keep model.state_dict()")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_a_model_that_its_configuration_does_not_build(tmp_path, name):
    model = replaced(name)
    model.config.num_hidden_layers = 1
    model.config.layer_types = (getattr(model.config, "layer_types", None) or ["full"])[-1:]
    check_refused(model, tmp_path, "its class has no float experts at model.layers.1.")
    model.config.vocab_size = -1
    check_refused(model, tmp_path, "its class cannot be asked for the names of float weights")


def test_floats_on_the_meta_device(tmp_path):
    model = replaced()
    model.lm_head.to("meta")
    check_refused(model, tmp_path, "lm_head.weight is on the meta device", "Load the model onto")


def test_another_quantizer(tmp_path):
    model = replaced()

    class Other:
        """What another library's quantizer would be."""

    model.hf_quantizer = Other()
    check_refused(model, tmp_path, "Other has quantised the rest of it")


def test_distributed_checkpoints(tmp_path):
    with pytest.raises(UnsupportedError, match="a distributed checkpoint has no place for them"):
        replaced().save_pretrained(tmp_path / "out", distributed_checkpoint=True)
    assert not (tmp_path / "out").exists()


def test_written_copies_of_a_state_dict(tmp_path, monkeypatch):
    monkeypatch.setitem(KERNELS, "reference", TurnedKernel())
    model = replaced()
    next(t for k, t in model.state_dict().items() if k.endswith("down_packed")).zero_()
    with pytest.raises(UnsupportedError, match=r"of its state_dict\(\) were written to"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BUILDS)
def test_transformers_takes_it_for_quantised(tmp_path, name):
    model = replaced(name)
    for again in (model, copy.deepcopy(model)):
        assert again.is_quantized and again.hf_quantizer.is_compileable
        for cast in ("half", "float"):
            with pytest.raises(ValueError, match="is not supported for quantized model"):
                getattr(again, cast)()
        with pytest.raises(UnsupportedError, match=r"^dequantize: .* its float experts are gone"):
            again.dequantize()
        # As for other quantizers, whose modules keep their dtypes.
        expected = logits(again)
        codes = {p: m.weights.gate_up.packed for p, m in experts(again).items()}
        again.to(torch.float16).to(torch.float32)
        for path, module in experts(again).items():
            assert torch.equal(module.weights.gate_up.packed, codes[path])
        torch.testing.assert_close(logits(again), expected, rtol=0.02, atol=0.02)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(model, arguments)
    model.save_pretrained(tmp_path / "saved")
    loaded = fp4moe.from_pretrained(tmp_path / "saved", progress=False)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(loaded, arguments)


def test_float_models_are_none_of_this(tmp_path):
    model = qwen3_moe()
    config = model.config
    replaced_model = fp4moe.replace_moe(copy.deepcopy(model), progress=False)
    assert not hasattr(model, "hf_quantizer") and not hasattr(config, "quantization_config")
    assert not hasattr(replaced_model.config, "quantization_config")
    wrapped = torch.nn.Sequential(torch.nn.Linear(2, 2), copy.deepcopy(model))
    fp4moe.replace_moe(wrapped, progress=False)
    assert wrapped[1].is_quantized and not hasattr(wrapped[1].model, "is_quantized")
    model.save_pretrained(tmp_path / "float")
    model.float().half()
