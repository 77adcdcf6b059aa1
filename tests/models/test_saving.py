"""save_pretrained of packed models: the files of `fp4moe quantize` and of ModelOpt, and back.

What is expected never comes from the code that saves: quantize_checkpoint reads the float files of
transformers, and ModelOpt's exports are its own.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import checkpoint_makers as makers
import format_files as files
import loop_models
import pytest
import torch
import transformers
from saved_files import contents, indexed, logits, same_files
from tiny_models import enlarge_experts, family, gemma4, gemma4_multimodal, nemotron_h, qwen3_moe
from turned_kernel import layouts  # noqa: F401

import fp4moe
from fp4moe.errors import UnsupportedError
from fp4moe.formats import FORMATS

BUILDS = {"gemma4": gemma4, "nemotron_h": nemotron_h, "qwen3_moe": qwen3_moe}
# Names of their own: stacks, one by one, transposed and interleaved with biases, w1 to w3.
FAMILIES = ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "inkling2", "step3p7"]


def build(name, dtype=torch.float32):
    """In the sizes of format_files, which all formats can have."""
    with files.sizes():
        made = BUILDS[name](dtype=dtype) if name in BUILDS else family(name, dtype=dtype)
    return enlarge_experts(made)


def replaced(model, form="nvfp4", **options):
    return fp4moe.replace_moe(model, format=form, progress=False, **options)


def load(directory, **options):
    return fp4moe.from_pretrained(directory, progress=False, dtype=torch.float32, **options)


def experts(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, fp4moe.FusedExperts)}


def check_saved(model, float_directory, directory, **options):
    """Save a packed model, compare with quantize, load and save it again."""
    form = next(iter(experts(model).values())).layer.format
    fp4moe.quantize_checkpoint(
        float_directory, directory / "quantize", format=form, progress=False, **options
    )
    model.save_pretrained(directory / "saved", max_shard_size="100KB")
    tensors = same_files(directory / "saved", directory / "quantize")
    assert len(indexed(directory / "saved")) > 2
    again = load(directory / "saved")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(directory / "again")
    same_files(directory / "again", directory / "saved")
    return tensors


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[pytest.mark.slow] * (form not in ("nvfp4", "fp8_block")))
        for name in BUILDS
        for form in FORMATS
    ],
)
def test_the_files_are_those_of_quantize(tmp_path, name, form):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    check_saved(replaced(model, form), tmp_path / "float", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_names_of_its_own_files(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    check_saved(replaced(model), tmp_path / "float", tmp_path)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_other_dtypes_and_a_layout_of_its_own(tmp_path, name, layouts):  # noqa: F811
    model = build(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "quantize", progress=False)
    replaced(model).save_pretrained(tmp_path / "saved")
    tensors = same_files(tmp_path / "saved", tmp_path / "quantize")
    biases = {dtype for key, (dtype, *_) in tensors.items() if key.endswith("gate_proj.bias")}
    assert biases == ({torch.bfloat16} if name == "gpt_oss" else set())


# Qwen3-MoE's router does not renormalise here.
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_fused_routers_are_saved_as_those_of_the_model(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    check_saved(replaced(model, routing="fused"), tmp_path / "float", tmp_path)


@pytest.mark.parametrize("form", ["nvfp4", "fp8"])
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_activation_ranges_are_saved(tmp_path, name, form):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    with fp4moe.calibrate(replaced(model, form)):
        logits(model)
    ranges = {
        path: (hidden.item(), inner.tolist())
        for path, module in experts(model).items()
        for hidden, inner in [module.activation_scales()]
    }
    assert len({inner for _, each in ranges.values() for inner in each}) > 2
    tensors = check_saved(model, tmp_path / "float", tmp_path, calibration=ranges)
    assert sum(key.endswith(".input_scale") for key in tensors) == 16 * (2 + (name == "gemma4"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["NVFP4_DEFAULT_CFG", *files.MODELOPT, "mixed", "fp8 experts"])
def test_a_loaded_export_of_modelopt_is_saved_as_it_was(tmp_path, name, kind):
    files.save("modelopt", name, kind, tmp_path / "theirs")
    model = fp4moe.from_pretrained(tmp_path / "theirs", progress=False)
    model.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    (theirs, old, _), (ours, new, _) = contents(tmp_path / "theirs"), contents(tmp_path / "ours")
    # Ranges of an FP8 cache are not kept, and transformers has the routers' biases in float32.
    kept = {k for k in theirs if not k.endswith((".k_scale", ".v_scale"))}
    assert set(ours) == kept
    cast = {k for k in kept if k.endswith("e_score_correction_bias")}
    assert not [key for key in kept - cast if ours[key] != theirs[key]]
    algorithm = "mxfp4" if kind.startswith("W4A8_MXFP4") else old["quant_algo"]
    assert new["quant_algo"] == algorithm
    layers = {  # ModelOpt's names of NemotronH's modules have a damaged end
        module.partition(".\0")[0]: entry
        for module, entry in old.get("quantized_layers", {}).items()
    }
    assert new.get("quantized_layers", {}) == layers
    again = fp4moe.from_pretrained(tmp_path / "ours", progress=False)
    assert torch.equal(makers.logits(again), makers.logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FP8", "FP8_BLOCK", "MXFP4A16"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_a_loaded_checkpoint_of_another_tool_becomes_modelopts(tmp_path, name, kind):
    files.save("compressed", name, kind, tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    expected = makers.logits(files.reference_model(tmp_path / "theirs"))
    found = makers.logits(files.reference_model(tmp_path / "ours"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(makers.logits(load(tmp_path / "ours")), makers.logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_gate_and_up_with_scales_of_their_own_are_saved_as_folded(tmp_path, name):
    makers.save_compressed(name, tmp_path / "theirs", shared=False)
    model = load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    tensors, config, _ = contents(tmp_path / "ours")
    assert config["quant_algo"] == "NVFP4"
    pairs = {
        k: tensors[k.replace("gate", "up")] for k in tensors if "gate_proj.weight_scale_2" in k
    }
    assert len(pairs) >= 16
    # vLLM takes gate's for both.
    assert all(tensors[key] == up for key, up in pairs.items() if ".experts." in key)
    assert torch.equal(makers.logits(load(tmp_path / "ours")), makers.logits(model))
    expected = makers.logits(makers.reference_model(tmp_path / "theirs"))
    torch.testing.assert_close(makers.logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_copies_and_what_is_inside_are_saved_alike(tmp_path, name):
    model = replaced(build(name))
    model.save_pretrained(tmp_path / "first")
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.save_pretrained(tmp_path / str(number))
        same_files(tmp_path / str(number), tmp_path / "first")
    model.model.save_pretrained(tmp_path / "inner")
    inner = contents(tmp_path / "inner")[0]
    outer = contents(tmp_path / "first")[0]
    short = {key.removeprefix("model."): tensor for key, tensor in outer.items()}
    assert inner.items() <= short.items() and set(short) - set(inner) <= {"lm_head.weight"}
    assert torch.equal(logits(load(tmp_path / "inner")), logits(model.model))


def test_a_model_around_a_replaced_one_is_saved(tmp_path):
    with files.sizes():
        model = enlarge_experts(gemma4_multimodal())
    model.save_pretrained(tmp_path / "float")
    replaced(model.model.language_model)
    check_saved(model, tmp_path / "float", tmp_path)


@pytest.mark.slow
def test_another_process_saves_what_it_unpickles(tmp_path):
    code = "import sys, torch\nfor folder in sys.argv[1:]:\n"
    code += "    model = torch.load(folder + '/model.pt', weights_only=False)\n"
    code += "    model.save_pretrained(folder + '/there')\n"
    folders = [tmp_path / name for name in ("gemma4", "qwen3_moe")]
    for folder in folders:
        model = replaced(build(folder.name))
        model.save_pretrained(folder / "here")
        torch.save(model, folder / "model.pt")
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        same_files(folder / "there", folder / "here")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_experts_of_the_registered_implementation_are_saved(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    model.set_experts_implementation("fp4moe")
    logits(model)
    check_saved(model, tmp_path / "float", tmp_path)
    # What comes back from the packed weights is float, and saved with their rounding.
    model.set_experts_implementation("grouped_mm")
    back = logits(model)
    model.save_pretrained(tmp_path / "after")
    assert contents(tmp_path / "after")[1:] == (None, None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    torch.testing.assert_close(logits(again), back, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BUILDS)
def test_plain_transformers_loads_and_saves_it(tmp_path, name):
    model = replaced(build(name), "fp8_block")
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert len(experts(again)) == 2 and torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    same_files(tmp_path / "again", tmp_path / "saved")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_layers_that_stay_float_are_saved_as_floats(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "float")
    first, last = [p for p, m in model.named_modules() if hasattr(m, "is_transposed")]
    model.get_submodule(first).forward = lambda *args: args[0]
    replaced(model, strict=False)
    del model.get_submodule(first).forward
    pattern = last.removeprefix("model.").replace(".", r"\.")
    fp4moe.quantize_checkpoint(
        tmp_path / "float", tmp_path / "quantize", layers=pattern, progress=False
    )
    model.save_pretrained(tmp_path / "saved")
    same_files(tmp_path / "saved", tmp_path / "quantize")


class LoopConfig(transformers.PreTrainedConfig):
    model_type = "fp4moe_loops"


class LoopModel(transformers.PreTrainedModel):
    """A user's own model, whose blocks loop over lists of experts."""

    config_class = LoopConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = loop_models.Model(getattr(loop_models, config.block))
        self.post_init()

    def _init_weights(self, module):
        pass


@pytest.mark.parametrize("block", ["MixtralOld", "Qwen2Old", "NemotronRemote"])
def test_lists_of_experts_keep_the_names_of_their_linears(tmp_path, block):
    model = LoopModel(LoopConfig(block=block)).eval()
    model.save_pretrained(tmp_path / "float")
    fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "quantize", progress=False)
    replaced(model).save_pretrained(tmp_path / "saved")
    same_files(tmp_path / "saved", tmp_path / "quantize")


def test_lists_of_other_names_are_refused(tmp_path):
    model = replaced(LoopModel(LoopConfig(block="Plain")).eval())
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.mlps has no place .* known name\. "):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_arguments_of_save_pretrained(tmp_path):
    model = replaced(build("nemotron_h"))
    expected = logits(model)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "state", state_dict=state)
    same_files(tmp_path / "state", tmp_path / "plain")
    # A state dict that is given counts, of packed tensors too.
    changed = dict(state)
    path = next(iter(experts(model)))
    for key in ("lm_head.weight", f"{path}.down_packed"):
        changed[key] = torch.zeros_like(state[key])
    model.save_pretrained(tmp_path / "changed", state_dict=changed)
    other = load(tmp_path / "changed")
    assert not other.lm_head.weight.any() and not other.state_dict()[f"{path}.down_packed"].any()
    # The names of the class instead of those of its files.
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    assert any(key.startswith("model.layers.") for key in contents(tmp_path / "own")[0])
    assert torch.equal(logits(load(tmp_path / "own")), expected)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "hf_quant_config.json").exists()
    assert torch.equal(logits(model), expected) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_push_to_hub_uploads_what_is_saved(tmp_path, monkeypatch, name):
    from huggingface_hub import HfApi, ModelCard

    model, uploaded = replaced(build(name)), {}

    def commit(self, repo_id, operations, **options):
        for operation in operations:
            path = tmp_path / "hub" / operation.path_in_repo
            path.parent.mkdir(exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        uploaded[repo_id] = sorted(operation.path_in_repo for operation in operations)
        return repo_id

    class Repository:
        repo_id = "someone/model"

    # The hub alone is not there.
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **options: Repository())
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", lambda *args, **options: ModelCard("---\n---\n"))
    model.push_to_hub("someone/model")
    assert {"config.json", "hf_quant_config.json"} <= set(uploaded["someone/model"])
    model.save_pretrained(tmp_path / "saved")
    same_files(tmp_path / "hub", tmp_path / "saved")
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["quantization_config"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_on_a_packed_model_are_saved(tmp_path):
    peft = pytest.importorskip("peft", reason="optional package")
    model = replaced(build("qwen3_moe"))
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")
    assert torch.equal(logits(again), logits(wrapped))
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "own")
    assert {f.name for f in (tmp_path / "own").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "own" / "model.safetensors").exists()
