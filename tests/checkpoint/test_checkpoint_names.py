"""Names that tools and vendors give to tensors: read, left out with a note, or told apart."""

from __future__ import annotations

import ast
import logging
import re

import nvfp4_files as files
import pytest
import torch

from fp4moe.errors import CheckpointError
from fp4moe.testing import relative_error


def move(tensors, pattern, to):
    return {re.sub(pattern, to, key): tensor for key, tensor in tensors.items()}


def beside(made, layer, prefix):
    """A copy of a layer's tensors under another prefix, and a matrix that no layer has."""
    head = next(k.split(f"layers.{layer}.")[0] for k in made.tensors if f"layers.{layer}." in k)
    start = f"{head}layers.{layer}."
    copies = {
        prefix + key.removeprefix(start): tensor.clone()
        for key, tensor in made.tensors.items()
        if key.startswith(start)
    }
    return copies | {f"{prefix}eh_proj.weight": torch.zeros(64, 128)}


# Model, its last layer's number, and what its configuration calls the count.
COUNTED = [
    ("glm4_moe", "num_nextn_predict_layers"),
    ("deepseek_v3", "num_nextn_predict_layers"),
    ("qwen3_moe", "num_nextn_predict_layers"),
    ("qwen3_moe", "mtp_num_hidden_layers"),
    ("minimax_m2", "num_mtp_modules"),
    ("dots1", "num_nextn_predict_layers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), COUNTED)
@pytest.mark.parametrize("layers", [1, 2])
def test_prediction_layers_behind_the_last_are_left_out(tmp_path, name, count, layers, caplog):
    caplog.set_level(logging.INFO, "fp4moe")
    made = files.make(name, tmp_path / "source")
    more = {}
    for number in range(2, 2 + layers):
        more |= beside(made, 1, f"model.layers.{number}.")
    config = made.config | {"num_mtp_layers": layers} if "num_mtp_layers" in made.config else None
    config = config or made.config | {count: layers}
    directory = made.write(tmp_path / "more", made.tensors | more, config=config)
    model = files.load(directory)
    assert f"not loaded, as the model has no use for them: {len(more)} (" in caplog.text
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(model), files.logits(usual))
    # A layer more than the configuration counts is no prediction layer.
    wrong = made.tensors | more | beside(made, 1, f"model.layers.{2 + layers}.")
    with pytest.raises(CheckpointError, match=rf"unexpected \d+ \('model\.layers\.{2 + layers}\."):
        files.load(made.write(tmp_path / "wrong", wrong, config=config))


def test_a_count_inside_text_config(tmp_path):
    made = files.make("gemma4_multimodal", tmp_path / "source")
    prefix = "model.language_model.layers.2."
    more = beside(made, 1, prefix)
    text = made.config["text_config"] | {"num_nextn_predict_layers": 1}
    config = made.config | {"text_config": text}
    model = files.load(made.write(tmp_path / "more", made.tensors | more, config=config))
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(model), files.logits(usual))
    # Without the count they are layers that the model lacks.
    with pytest.raises(CheckpointError, match=rf"unexpected \d+ \('{re.escape(prefix)}"):
        files.load(made.write(tmp_path / "wrong", made.tensors | more))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gemma4", "deepseek_v3"])
@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.mtp.layers.0.", "model.mtp_layers.3."])
def test_prediction_layers_by_name_are_left_out(tmp_path, name, prefix, caplog):
    caplog.set_level(logging.INFO, "fp4moe")
    made = files.make(name, tmp_path / "source")
    directory = made.write(tmp_path / "more", made.tensors | beside(made, 1, prefix))
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(files.load(directory)), files.logits(usual))
    assert f"'{prefix}eh_proj.weight'" in caplog.text


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gemma4"])
def test_numbers_behind_the_projection(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    tensors = move(made.tensors, r"experts\.(\d+)\.(\w+_proj)\.", r"experts.\2.\1.")
    assert any("experts.up_proj.3.weight" in key for key in tensors)
    model = files.load(made.write(tmp_path / "other", tensors))
    for ours, theirs in zip(files.experts(model), files.stacks(made.values), strict=True):
        for projection, values in files.decoded(ours).items():
            assert torch.equal(values, theirs[projection])
    # The same expert under both names is there twice.
    key = next(k for k in made.tensors if k.endswith("experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"duplicated 2 \('.*3\.up_proj.*up_proj\.3"):
        files.load(made.write(tmp_path / "twice", tensors | {key: made.tensors[key].clone()}))


ATTENTION = [
    *("k_proj.k_scale", "v_proj.v_scale", "k_proj.k_bias", "v_proj.v_bias", "k_scale", "v_scale"),
    *("q_scale", "k_zero_point", "v_zero_point", "kv_scale", "prob_scale", "k_proj.output_scale"),
    *("q_proj.q_scale", "output_scale"),
]


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "glm4_moe"])
def test_what_a_quantised_attention_needs_is_left_out(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    attention = {k.split("k_proj.")[0] for k in made.tensors if "k_proj.weight" in k}
    more = {f"{head}{leaf}": torch.zeros(1, 2, 1, 16) for head in attention for leaf in ATTENTION}
    model = files.load(made.write(tmp_path / "more", made.tensors | more))
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(model), files.logits(usual))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
@pytest.mark.parametrize(
    "leaf", ["k_proj.pre_quant_scale", "k_proj.bias", "k_bias", "o_proj.k_bias"]
)
def test_what_changes_the_numbers_is_refused(tmp_path, name, leaf):
    made = files.make(name, tmp_path / "source")
    head = next(k.split("k_proj.")[0] for k in made.tensors if "k_proj.weight" in k)
    directory = made.write(tmp_path / "more", made.tensors | {f"{head}{leaf}": torch.ones(64)})
    with pytest.raises(CheckpointError, match=rf"unexpected 1 \('.*{re.escape(leaf)}'\)"):
        files.load(directory)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_the_size_beside_a_packed_weight_is_left_out(tmp_path, name):
    made = files.make(name, tmp_path / "source", also=r"o_proj\.weight")
    tensors = {}
    for key, tensor in made.tensors.items():
        head, _, leaf = key.rpartition(".")
        if key in made.values:
            tensors[f"{head}.weight_packed"] = tensor
            tensors[f"{head}.weight_shape"] = torch.tensor(made.values[key].shape)
        elif leaf in ("weight_scale_2", "input_scale"):
            names = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
            tensors[f"{head}.{names[leaf]}"] = tensor.reciprocal().reshape(1)
        else:
            tensors[key] = tensor
    entry = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}
        },
    }
    config = made.config | {"quantization_config": entry}
    model = files.load(made.write(tmp_path / "packed", tensors, None, config))
    expected = made.expected(tmp_path / "float")
    # 1 / (1 / x) in float32 is x or a neighbour of it; the rest as in test_checkpoint_scales.py.
    assert relative_error(files.logits(model), expected) < 5e-6
    alone = {k: v for k, v in tensors.items() if not k.endswith("3.up_proj.weight_packed")}
    with pytest.raises(CheckpointError, match=r"unexpected \d+ .*3\.up_proj\.weight_shape"):
        files.load(made.write(tmp_path / "alone", alone, None, config))


PREFIXES = {
    "in front": (r"^", "language_model."),
    "experts below": (r"\.experts\.", ".moe.experts."),
    "in the middle": (r"^(model|backbone)\.", r"\1.text_model."),
    "another": (r"^(model|backbone)\.layers\.", "transformer.h."),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gemma4", "glm4_moe"])
@pytest.mark.parametrize("where", PREFIXES)
def test_a_prefix_that_differs_is_told_with_its_cure(tmp_path, name, where):
    made = files.make(name, tmp_path / "source")
    directory = made.write(tmp_path / "other", move(made.tensors, *PREFIXES[where]))
    with pytest.raises(CheckpointError, match=r"its names differ from the model's") as raised:
        files.load(directory)
    mapping = ast.literal_eval(re.search(r"key_mapping=(\{.*\}) if it is", str(raised.value))[1])
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(
        files.logits(files.load(directory, key_mapping=mapping)), files.logits(usual)
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_other_names_get_no_advice(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    tensors = move(made.tensors, r"layers\.1\.", "layers.7.")
    with pytest.raises(CheckpointError, match=r"use a complete checkpoint of this very model\.$"):
        files.load(made.write(tmp_path / "other", tensors))
