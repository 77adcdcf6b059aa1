"""Checkpoints of families with clamped gates and biases: written, and read again."""

from __future__ import annotations

import re

import checkpoint_makers as makers
import pytest
import torch
import transformers
from float_twins import float_twin
from packaging.version import Version
from raw_files import raw
from tiny_models import COMMON, FAMILIES, enlarge_experts, family, finish, routed

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.checkpoint.modelopt import MODELOPT_NAMES
from fp4moe.checkpoint.naming import Convention, Matrix
from fp4moe.checkpoint.plan import ExpertsPlan
from fp4moe.checkpoint.plan_checks import ExpertsFacts
from fp4moe.checkpoint.read import read_experts
from fp4moe.errors import CheckpointError, UnsupportedError
from fp4moe.reference import moe_definition, reference
from fp4moe.testing import relative_error

NAMES = ["deepseek_v4", "hy_v4", "gpt_oss", "inkling2", "minimax_m3", "privacy_filter"]
NAMES += ["beam", "glm5_next", "step3p7"]
BIASED = ("gpt_oss", "privacy_filter")
# The classes that checkpoints on the hub name, around the text models: other names on disk.
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
WHOLE = {
    "minimax_m3": ("MiniMaxM3SparseForConditionalGeneration", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", {"image_size": 28, "patch_size": 14}),
}
IDS = torch.arange(3, 12)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False)[0]


def whole(name):
    """A small model of text and vision."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("needs transformers 5.23")
    kind = getattr(transformers, WHOLE[name][0])
    text = {**COMMON, "num_hidden_layers": 2, **FAMILIES[name][1]}
    vision = {**VISION, "num_hidden_layers": 1, **WHOLE[name][1]}
    config = kind.config_class(text_config=text, vision_config=vision)
    return finish(kind, config, "eager", torch.float32)


def save(model, directory):
    model = enlarge_experts(model).to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A float checkpoint, and what is written of it."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    save(family("gpt_oss", "eager"), folder / "float")
    fp4moe.quantize_checkpoint(folder / "float", folder / "packed", progress=False)
    return folder


def load(directory, **options):
    options = {"dtype": torch.float32, "kernel": "reference", "progress": False, **options}
    return fp4moe.from_pretrained(directory, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *(f"{name} whole" for name in WHOLE)])
def test_what_is_written_is_the_model_with_dequantised_weights(name, tmp_path):
    name, _, rest = name.partition(" ")
    save(whole(name) if rest else family(name, "eager"), tmp_path / "float")
    report = fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "packed", progress=False)
    assert report.layers and report.not_run_here == ()
    model = load(tmp_path / "packed")
    assert fp4moe.explain(model).count("replaced") == len(report.layers)
    assert torch.equal(logits(model), logits(load(tmp_path / "float"))), "equal bytes, one kernel"
    original = type(model).from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    twin = float_twin(original, model)
    # As in test_hf_families: the same float32 products, in another order.
    assert relative_error(logits(model), logits(twin)) < 2e-6
    assert relative_error(logits(model), logits(original)) > 1e-3
    biases = [key for key in makers.load_tensors(tmp_path / "packed") if EXPERT_BIAS.search(key)]
    assert bool(biases) == (name in BIASED)


EXPERT_BIAS = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.bias")


def test_biases_are_written_bit_for_bit(gpt_oss):
    before, after = (makers.load_tensors(gpt_oss / name) for name in ("float", "packed"))
    found = {key: match for key in after if (match := EXPERT_BIAS.fullmatch(key))}
    assert len(found) == 2 * 8 * 3
    for key, match in found.items():
        path, expert, role = match[1], int(match[2]), match[3]
        stack = before[f"{path}.{'down' if role == 'down' else 'gate_up'}_proj_bias"][expert]
        # gpt-oss interleaves gate and up.
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[role]
        assert after[key].dtype == torch.bfloat16 and raw(after[key]) == raw(stack[rows])


def test_biases_may_stay_stacked_beside_packed_experts(gpt_oss, tmp_path):
    before = makers.load_tensors(gpt_oss / "float")

    def change(tensors):
        for key in [key for key in tensors if EXPERT_BIAS.fullmatch(key)]:
            del tensors[key]
        tensors |= {key: tensor for key, tensor in before.items() if key.endswith("proj_bias")}

    makers.rewrite(gpt_oss / "packed", tmp_path, change)
    assert torch.equal(logits(load(tmp_path)), logits(load(gpt_oss / "packed")))


def test_calibration_goes_with_biases(gpt_oss, tmp_path):
    model = transformers.GptOssForCausalLM.from_pretrained(gpt_oss / "float", dtype=torch.float32)
    with fp4moe.calibrate(model) as report, torch.no_grad():
        model(torch.randint(3, 120, (4, 64), generator=torch.Generator().manual_seed(0)))
    scales = {b.path: (b.hidden_scale, b.intermediate_scale) for b in report.blocks}
    fp4moe.quantize_checkpoint(
        gpt_oss / "float", tmp_path / "out", calibration=scales, progress=False
    )
    loaded = load(tmp_path / "out")
    for path, (hidden, intermediate) in scales.items():
        found = loaded.get_submodule(path).activation_scales()
        torch.testing.assert_close(found[0].item(), hidden)
        torch.testing.assert_close(found[1].tolist(), list(intermediate))
    assert torch.equal(logits(loaded), logits(load(gpt_oss / "packed")))


FIRST = "model.layers.1.mlp.experts.5.up_proj"


def drop_a_bias(tensors):
    del tensors[f"{FIRST}.bias"]


def shorten_a_bias(tensors):
    tensors[f"{FIRST}.bias"] = tensors[f"{FIRST}.bias"][:-1].clone()


def nan_in_a_bias(tensors):
    tensors[f"{FIRST}.bias"][3] = torch.nan


def other_scale(tensors):
    tensors[f"{FIRST}.weight_scale_2"] *= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_bias, rf"missing 1 \('{re.escape(FIRST)}\.bias'\)"),
        (shorten_a_bias, r"is bfloat16 \[95\], must be"),
        (nan_in_a_bias, rf"inf or NaN in '{re.escape(FIRST)}\.bias'"),
        # Its up is clamped and shifted: the quotient cannot move into down.
        (other_scale, "global scales of gate and up that are alike in model.layers.1.mlp.experts"),
    ],
)
def test_broken_files_are_refused(gpt_oss, tmp_path, change, message):
    makers.rewrite(gpt_oss / "packed", tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_biases_of_a_model_without_any_are_refused(tmp_path):
    save(family("qwen2_moe", "eager"), tmp_path / "float")
    fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "packed", progress=False)
    key = "model.layers.0.mlp.experts.0.up_proj.bias"

    def change(tensors):
        tensors[key] = torch.zeros(48)

    makers.rewrite(tmp_path / "packed", tmp_path / "odd", change)
    with pytest.raises(CheckpointError, match=f"unexpected 1 .*{re.escape(key)}"):
        load(tmp_path / "odd")


def test_a_bias_of_one_stack_alone_is_not_written(gpt_oss, tmp_path):
    key = "model.layers.0.mlp.experts.down_proj_bias"
    makers.rewrite(gpt_oss / "float", tmp_path / "odd", lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match="a bias for every stack or for none"):
        fp4moe.quantize_checkpoint(tmp_path / "odd", tmp_path / "out", progress=False)


def test_a_norm_behind_each_expert_stays_refused(tmp_path):
    save(family("muse_spark", "eager"), tmp_path / "float")
    with pytest.raises(UnsupportedError, match="it has a norm behind each expert"):
        load(tmp_path / "float")


def test_unlike_scales_move_into_down_and_the_bias(gpt_oss, tmp_path):
    """Of a plain gate: up's scale is doubled in the file, so up and what is added to it differ."""
    makers.rewrite(gpt_oss / "packed", tmp_path, other_scale)
    path = FIRST.rpartition(".")[0].rpartition(".")[0]
    projections = ("gate_proj", "up_proj", "down_proj")
    parts = MODELOPT_NAMES["nvfp4"]
    matrices, biases = {}, {}
    for which in ((expert, name) for expert in range(8) for name in projections):
        module = f"{path}.{which[0]}.{which[1]}"
        keys = {part: f"{module}.{leaf}" for part, leaf in parts.items() if part != "input_scale"}
        matrices[which] = Matrix(keys)
        biases[which] = f"{module}.bias"
    facts = ExpertsFacts(8, 64, 96, "silu", True, biases=("gate_up_proj", "down_proj"))
    plan = ExpertsPlan(facts, "nvfp4", matrices, biases)
    convention = Convention("ModelOpt", MODELOPT_NAMES, frozenset({"nvfp4"}))
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    found = {}
    for folder in (tmp_path, gpt_oss / "packed"):
        with CheckpointFiles.open(folder) as files:
            found[folder] = read_experts(files, path, plan, convention, **options)
    assert [found[folder].folded for folder in found] == [1, 0]
    read, before = (found[folder].weights for folder in found)
    wanted = before.dequantize()
    wanted["up"][5] *= 2
    hidden, ids, weights = routed(40)
    expected = moe_definition(hidden, ids, weights, **wanted, activation="silu")
    # Doubling is exact; what is left is the order of float32 sums.
    torch.testing.assert_close(reference(hidden, read, ids, weights), expected)
    assert not torch.allclose(reference(hidden, before, ids, weights), expected, rtol=1e-2)
