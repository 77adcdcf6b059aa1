"""What a quantised checkpoint may look like: names, scale conventions, configurations, key sets."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil

import checkpoint_makers as makers
import format_files as files
import pytest
import torch
from fuzzing import fuzz

import fp4moe
from fp4moe.checkpoint.compressed_tensors import compressed_convention
from fp4moe.checkpoint.modelopt import is_modelopt, modelopt_convention
from fp4moe.errors import CheckpointError
from fp4moe.testing import relative_error

hypothesis = pytest.importorskip("hypothesis", reason="optional package")
st = hypothesis.strategies

E4M3 = torch.float8_e4m3fn
GROUP = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}
EIGHT = {"weights": {"num_bits": 8, "type": "float"}}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    makers.save_modelopt("gemma4", directory, "NVFP4_EXPERTS_ONLY_CFG")
    return directory


def load(directory):
    return fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False)


def experts(model):
    return [m.weights for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


def assert_same_experts(actual, expected, ulps=0):
    for ours, theirs in zip(experts(actual), experts(expected), strict=True):
        assert ours.metadata() == theirs.metadata()
        for name, tensor in ours.tensors().items():
            wanted = theirs.tensors()[name]
            if tensor.dtype == torch.float32:
                steps = tensor.view(torch.int32) - wanted.view(torch.int32)
                assert int(steps.abs().max()) <= ulps, name
            else:
                assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name


def stack(tensors, names, separator="."):
    """Turn experts.<id>.<projection>.<name> into stacks of all experts of a layer."""
    layers = {key.split(".experts.")[0] for key in tensors if ".experts." in key}
    for layer in layers:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for name in names:
                keys = [f"{layer}.experts.{e}.{projection}.{name}" for e in range(8)]
                if keys[0] in tensors:
                    parts = [tensors.pop(key) for key in keys]
                    value = torch.stack(
                        [p.view(torch.uint8) if p.dtype == E4M3 else p for p in parts]
                    )
                    value = value.view(E4M3) if parts[0].dtype == E4M3 else value
                    tensors[f"{layer}.experts.{projection}{separator}{name}"] = value
    return layers


def to_compressed(directory, target):
    """Rewrite ModelOpt's files in compressed-tensors' convention, as its own converter does."""
    tensors = makers.load_tensors(directory)
    for key in list(tensors):
        head, _, leaf = key.rpartition(".")
        if leaf == "weight_scale_2":
            tensors[f"{head}.weight_global_scale"] = 1 / tensors.pop(key).reshape(1)
            tensors[f"{head}.weight_packed"] = tensors.pop(f"{head}.weight")
            name = f"{head}.input_scale"
            tensors[f"{head}.input_global_scale"] = 1 / tensors.pop(name).reshape(1)

    def change(found):
        found.clear()
        found.update(tensors)

    def config(name, content):
        content["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": GROUP},
        }
        return content

    makers.rewrite(directory, target, change, config)
    (target / "hf_quant_config.json").unlink()
    return target


@pytest.mark.slow
def test_both_scale_conventions_give_equal_experts(gemma, tmp_path):
    compressed = to_compressed(gemma, tmp_path / "compressed")
    # Codes and block scales bit for bit; 1 / (1 / x) in float32 is x or a neighbour of it.
    assert_same_experts(load(compressed), load(gemma), ulps=1)


@pytest.mark.slow
def test_scalars_of_one_element_are_read_as_scalars(gemma, tmp_path):
    def change(tensors):
        for key, tensor in tensors.items():
            if key.endswith(("_scale_2", "input_scale")):
                tensors[key] = tensor.reshape(1)

    assert_same_experts(load(makers.rewrite(gemma, tmp_path / "one", change)), load(gemma))


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("merged", [False, True])
def test_stacked_experts_are_those_of_single_ones(gemma, tmp_path, separator, merged):
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale")

    def change(tensors):
        for layer in stack(tensors, names, separator):
            for name in names if merged else ():
                keys = [f"{layer}.experts.{p}_proj{separator}{name}" for p in ("gate", "up")]
                gate, up = (tensors.pop(key) for key in keys)
                bytes_ = [t.view(torch.uint8) if t.dtype == E4M3 else t for t in (gate, up)]
                both = torch.cat(bytes_, 1) if gate.ndim == 3 else torch.stack(bytes_, 1)
                both = both.view(E4M3) if gate.dtype == E4M3 else both
                tensors[f"{layer}.experts.gate_up_proj{separator}{name}"] = both
            # ModelOpt names a stack's weight without ".weight".
            for projection in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
                old = f"{layer}.experts.{projection}{separator}weight"
                if separator == "_" and old in tensors:
                    tensors[f"{layer}.experts.{projection}"] = tensors.pop(old)

    stacked = makers.rewrite(gemma, tmp_path / "stacked", change)
    assert_same_experts(load(stacked), load(gemma))


def test_more_than_ten_experts_are_ordered_as_numbers(tmp_path):
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_experts=12,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    model.save_pretrained(tmp_path)
    down = load(tmp_path).model.layers[0].mlp.experts.weights.dequantize()["down"]
    expected = model.model.layers[0].mlp.experts.down_proj
    # One NVFP4 rounding keeps every expert nearest to itself.
    distance = torch.cdist(down.flatten(1), expected.detach().flatten(1))
    assert distance.argmin(1).tolist() == list(range(12))


@pytest.mark.slow
def test_input_scales_are_maxima_of_gate_and_up_and_single_for_down(tmp_path):
    makers.save_compressed("gemma4", tmp_path, input_amax=3.0)
    tensors = makers.load_tensors(tmp_path)
    key = "model.layers.1.experts.5.up_proj.input_global_scale"
    tensors[key] /= 4

    def change(found):
        found.update(tensors)

    directory = makers.rewrite(tmp_path, tmp_path / "other", change)
    weights = load(directory).model.layers[1].experts.weights
    assert weights.hidden_scale.tolist() == [float(1 / tensors[key])]
    single = [tensors[key.replace("5.up", f"{e}.down")] for e in range(8)]
    assert weights.intermediate_scale.tolist() == [float(1 / scale) for scale in single]
    assert len(set(weights.intermediate_scale.tolist())) > 4


@pytest.mark.parametrize(
    ("config", "forms"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"nvfp4"}),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, {"fp8"}),
        ({"quantization": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}, {"nvfp4"}),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}},
            },
            {"fp8", "nvfp4"},
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "config_groups": {"group_0": GROUP, "group_1": EIGHT},
            },
            {"fp8", "nvfp4"},
        ),
    ],
)
def test_modelopt_configurations(config, forms):
    assert is_modelopt(config)
    assert modelopt_convention(config).forms == forms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "INT4_AWQ"}, "known algorithm as quant_algo"),
        ({"group_size": 32}, "blocks of 16"),
        ({"ignore": "lm_head"}, "list of names as ignore"),
        ({"quant_algo": "MIXED_PRECISION"}, "algorithm of each of quantized_layers"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8"}}},
            r"known algorithm as quantized_layers\['a'\]; got 'W4A8'",
        ),
    ],
)
def test_modelopt_configurations_that_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        modelopt_convention({"quant_method": "modelopt", "quant_algo": "NVFP4", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pack-quantized"}, "known format"),
        ({"format": []}, "known format"),
        ({"config_groups": {"a": {"format": ["x"], **GROUP}}}, "format that fits"),
        ({"quantization_status": "frozen"}, "be compressed"),
        ({"sparsity_config": {"format": "sparse-24"}}, "no sparsity_config"),
        ({"transform_config": {"a": 1}}, "no transform_config"),
        ({"config_groups": {}}, "have config_groups"),
        (
            {"config_groups": {"a": {"weights": {**GROUP["weights"], "group_size": 32}}}},
            "for mxfp4",
        ),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}, "4-bit int"),
        ({"config_groups": {"a": EIGHT}}, "format that fits"),
    ],
)
def test_compressed_configurations_that_are_refused(change, message):
    config = {"format": "nvfp4-pack-quantized", "config_groups": {"group_0": GROUP}}
    assert compressed_convention(config).forms == {"nvfp4"}
    with pytest.raises(CheckpointError, match=message):
        compressed_convention({**config, **change})


def test_patterns_of_modules_left_alone():
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config["exclude_modules"] = ["lm_head", "model.layers.0.router*", "re:.*visual.*"]
    convention = modelopt_convention(config)
    for name in ("lm_head", "model.layers.0.router.proj", "model.visual.0"):
        assert convention.ignores(name)
    for name in ("model.lm_head", "model.layers.1.router.proj"):
        assert not convention.ignores(name)
    config["exclude_modules"] = ["re:("]
    with pytest.raises(CheckpointError, match="patterns in ignore"):
        modelopt_convention(config).ignores("lm_head")


def test_tensors_that_contradict_the_configuration_are_named(gemma, tmp_path, caplog):
    def config(name, content):
        if name == "hf_quant_config.json":
            content["quantization"]["exclude_modules"].append("model.layers.1.experts*")
        return content

    load(makers.rewrite(gemma, tmp_path / "odd", lambda tensors: None, config))
    assert "the configuration excludes modules whose tensors are quantised" in caplog.text


# Fuzzing: a few edits of the tensors of a real export, each a plain function of random numbers.


def drop(tensors, key, other, number):
    tensors.pop(key, None)


def copy_to(tensors, key, other, number):
    tensors[f"{other}.{number}"] = tensors[key].clone()


def rename(tensors, key, other, number):
    old, new = ("experts.", "up_proj", "weight", "layers.1", "_scale")[number % 5], str(number)
    tensors[key.replace(old, old + new, 1)] = tensors.pop(key)


def swap_names(tensors, key, other, number):
    tensors[key], tensors[other] = tensors[other], tensors[key]


def renumber(tensors, key, other, number):
    parts = key.split(".")
    parts = [str(number) if part.isdigit() and number % 2 else part for part in parts]
    tensors[".".join(parts)] = tensors.pop(key)


def reshape(tensors, key, other, number):
    tensor = tensors[key]
    tensors[key] = tensor.reshape(-1) if number % 2 else tensor[None].clone()


def cut(tensors, key, other, number):
    if tensors[key].ndim:
        tensors[key] = tensors[key][:-1].clone()


def cast(tensors, key, other, number):
    kinds = (torch.uint8, torch.float32, torch.float16, torch.int64, E4M3, torch.bool)
    tensors[key] = tensors[key].float().to(kinds[number % len(kinds)])


def poison(tensors, key, other, number):
    tensor = tensors[key]
    if tensor.is_floating_point():
        bad = torch.nan if number % 2 or tensor.dtype == E4M3 else torch.inf
        tensor.view(-1)[number % tensor.numel()] = bad
    else:
        tensors[f"{key}.extra"] = tensor.clone()


def add_ignored(tensors, key, other, number):
    tensors["mtp.layers.0.weight"] = torch.ones(number % 3)
    tensors["backbone.layers.2.mixer.k_proj.k_scale"] = torch.ones(())


EDITS = (
    *(drop, copy_to, rename, swap_names, renumber),
    *(reshape, cut, cast, poison, add_ignored),
)
EDIT = st.tuples(
    st.sampled_from(EDITS), st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 40)
)


PER_ROW = "FP8_PER_CHANNEL_PER_TOKEN_CFG"


def copy_files(name, directory):
    data = pathlib.Path(__file__).resolve().parents[1] / "data" / "llm_compressor"
    shutil.copytree(data / name, directory, dirs_exist_ok=True)


# How the files that are edited are written.
WRITTEN = {
    "modelopt NVFP4 and FP8": lambda d: makers.save_modelopt("nemotron_h_latent", d, "mixed"),
    "modelopt FP8": lambda d: files.save("modelopt", "qwen3_moe", "FP8_DEFAULT_CFG", d),
    "compressed FP8_BLOCK": lambda d: files.save("compressed", "gemma4", "FP8_BLOCK", d),
    "compressed MXFP8": lambda d: files.save("compressed", "nemotron_h", "MXFP8", d),
    "compressed MXFP4": lambda d: files.save("compressed", "qwen3_moe", "MXFP4A16", d),
    "transformers fp8": lambda d: files.save("transformers", "nemotron_h", "ue8m0", d),
    "gpt-oss": lambda d: files.save_gpt_oss(d, packed=True),
    "modelopt FP8 a row": lambda d: files.save("modelopt", "gemma4", PER_ROW, d),
    "llm-compressor FP8_DYNAMIC": lambda d: copy_files("nemotron_h_FP8_DYNAMIC", d),
    "llm-compressor NVFP4 and FP8": lambda d: copy_files("qwen3_moe_NVFP4_with_FP8", d),
}


@pytest.fixture(scope="module", params=WRITTEN)
def packed(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    with torch.random.fork_rng(devices=[]):
        WRITTEN[request.param](directory)
    return directory


@pytest.fixture(scope="module")
def as_written(packed):
    """Logits of what nobody has edited."""
    return makers.logits(load(packed))


@pytest.mark.slow
@fuzz(20)
@hypothesis.given(st.lists(EDIT, min_size=1, max_size=2))
def test_edited_key_sets_are_refused_or_equal(packed, as_written, tmp_path_factory, edits):
    swapped, casts = [], set()

    def change(tensors):
        for edit, first, second, number in edits:
            keys = sorted(tensors)
            key, other = keys[first % len(keys)], keys[second % len(keys)]
            if edit is swap_names:
                # Between tensors of one kind nobody can tell.
                same = tensors[key].shape == tensors[other].shape
                swapped.append(same and tensors[key].dtype == tensors[other].dtype)
            # To bytes and back: the dtype is right again, the values are not.
            swapped.append(edit is cast and key in casts)
            casts.add(key)
            edit(tensors, key, other, number)

    directory = tmp_path_factory.mktemp("edited")
    makers.rewrite(packed, directory, change)
    try:
        model = load(directory)
    except CheckpointError as error:
        assert str(error).startswith("from_pretrained: ")
    else:
        if not any(swapped):
            # A cast of a norm to float16 moves what was bfloat16 by nothing, or to a subnormal.
            assert relative_error(makers.logits(model), as_written) < 1e-3
    shutil.rmtree(directory)


JSON = st.sampled_from([None, 0, 17, -1.5, "", "NVFP4", "x" * 300, [], [1], {}, {"a": []}, True])


@pytest.mark.slow
@fuzz(20)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 1000), JSON), min_size=1, max_size=2))
def test_edited_quantisation_configurations_are_refused_or_equal(
    packed, as_written, tmp_path_factory, edits
):
    directory = pathlib.Path(tmp_path_factory.mktemp("edited"))
    for file in pathlib.Path(packed).iterdir():
        shutil.copy(file, directory)
    beside = (directory / "hf_quant_config.json").exists()
    path = directory / ("hf_quant_config.json" if beside else "config.json")
    content = json.loads(path.read_text())
    for number, value in edits:
        places = list(_places(content if beside else content["quantization_config"]))
        if places:
            container, key = places[number % len(places)]
            container[key] = copy.deepcopy(value)
    path.write_text(json.dumps(content))
    try:
        model = load(directory)
    except CheckpointError as error:
        assert str(error).startswith("from_pretrained: ")
    else:
        assert torch.equal(makers.logits(model), as_written)
    shutil.rmtree(directory)


def _places(content):
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from _places(content[key])
