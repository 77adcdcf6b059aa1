"""Writing NVFP4 checkpoints: equal to ModelOpt's own exports, and whole or not there at all."""

from __future__ import annotations

import copy
import fnmatch
import json
import math
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from raw_files import raw

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.errors import CheckpointError, ShapeError, UnsupportedError
from fp4moe.pretrained.load import from_pretrained
from fp4moe.testing import relative_error
from fp4moe.tools.cli import main

INDEX = "model.safetensors.index.json"


def mixtral(implementation, dtype):
    sizes = {k: v for k, v in tiny_models.COMMON.items() if k != "moe_intermediate_size"}
    config = transformers.MixtralConfig(**sizes, **tiny_models.LOCAL, num_hidden_layers=1)
    return tiny_models.finish(transformers.MixtralForCausalLM, config, implementation, dtype)


def many_experts(implementation, dtype):
    """More than ten, so that their names do not sort like their numbers."""
    config = transformers.Qwen3MoeConfig(
        **tiny_models.COMMON, num_experts=12, num_experts_per_tok=2, num_hidden_layers=1
    )
    return tiny_models.finish(transformers.Qwen3MoeForCausalLM, config, implementation, dtype)


MODELS = {
    "gemma4": tiny_models.gemma4,
    "gemma4_multimodal": tiny_models.gemma4_multimodal,
    "nemotron_h": tiny_models.nemotron_h,
    "nemotron_h_latent": tiny_models.nemotron_h_latent,
    "qwen3_moe": many_experts,
    "mixtral": mixtral,
}


def read_all(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the safetensors library reads it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(set(found) ^ set(wanted)) == []
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert raw(found[key]) == raw(tensor), key


def ranges(exported: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """The calibration that an export holds; one number per layer and GEMM."""
    found: dict[str, dict[bool, set[float]]] = {}
    for key, tensor in exported.items():
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.input_scale", key):
            is_down = match[2] in ("down_proj", "w2")
            found.setdefault(match[1], {}).setdefault(is_down, set()).add(tensor.item())
    pairs = {name: (scales[False], scales[True]) for name, scales in found.items()}
    return {name: (first.pop(), second.pop()) for name, (first, second) in pairs.items()}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A model as transformers saves it, in several files, and as ModelOpt exports it."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="optional package")
    export = pytest.importorskip("modelopt.torch.export", reason="optional package")
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param]("eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder / "float", max_shard_size="100KB")
    ids = torch.randint(1, 100, (2, 32), generator=torch.Generator().manual_seed(0))
    config = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    with warnings.catch_warnings():  # ModelOpt's own, some of which it would turn into failures
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(model, config, lambda model: model(input_ids=ids))
        export.export_hf_checkpoint(quantized, dtype=torch.bfloat16, export_dir=folder / "modelopt")
    yield folder / "float", folder / "modelopt"
    shutil.rmtree(folder)


@pytest.mark.slow
def test_modelopt_writes_the_same_tensors(exported, tmp_path):
    source, theirs = exported
    assert (source / INDEX).exists(), "the model must be in several files"
    wanted = read_all(theirs)
    report = fp4moe.quantize_checkpoint(
        source, tmp_path / "out", calibration=ranges(wanted), max_shard_bytes=50_000, progress=False
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same(read_all(tmp_path / "out"), wanted)
    layers = {match[1] for key in wanted if (match := re.match(r"(.*\.experts)\.\d+\.", key))}
    assert set(report.layers) == layers


@pytest.mark.slow
def test_modelopt_writes_the_same_configuration(exported, tmp_path):
    pytest.importorskip("modelopt", reason="optional package")
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    source, theirs = exported
    calibration = ranges(read_all(theirs))
    fp4moe.quantize_checkpoint(source, tmp_path / "out", calibration=calibration, progress=False)
    legacy = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    current = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert current == convert_hf_quant_config_format(legacy)
    wanted = json.loads((theirs / "hf_quant_config.json").read_text())
    assert legacy["producer"].items() >= wanted["producer"].items()
    ours, theirs_excluded = (
        set(c["quantization"].pop("exclude_modules")) for c in (legacy, wanted)
    )
    assert legacy["quantization"] == wanted["quantization"]
    # ModelOpt leaves a piece of transformers' regular expressions in NemotronH's names.
    if not any("sentinel" in name for name in theirs_excluded):
        assert theirs_excluded <= ours


def test_each_module_is_excluded_or_quantised(exported, tmp_path):
    source, _ = exported
    fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False)
    legacy = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    patterns = legacy["quantization"]["exclude_modules"]
    tensors = read_all(tmp_path / "out")
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if module != key and tensor.ndim == 2:
            excluded = any(fnmatch.fnmatch(module, pattern) for pattern in patterns)
            assert excluded == (f"{module}.weight_scale" not in tensors), module


@pytest.mark.slow
def test_what_is_written_loads_and_gives_the_logits_of_the_quantised_model(exported, tmp_path):
    source, _ = exported
    fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False)
    ids = torch.arange(1, 10)[None]
    logits = []
    for folder in (source, tmp_path / "out"):
        model = from_pretrained(folder, dtype=torch.bfloat16, progress=False)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits), "equal bytes in the same kernel"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """Gemma4 in several files, with the files that lie beside weights."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny_models.gemma4("eager", torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(f"content of {name}")
    for name in ("modeling_x.py", "pytorch_model.bin", "consolidated.safetensors", ".hidden"):
        (folder / name).write_text("not for the copy")
    (folder / "original").mkdir()
    return folder


def quantize(source, target, **options) -> dict[str, torch.Tensor]:
    fp4moe.quantize_checkpoint(source, target, progress=False, **options)
    return read_all(target)


def rewrite(source: pathlib.Path, target: pathlib.Path, change) -> pathlib.Path:
    """The source as one file, its tensors changed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    tensors = {}
    for name in set(index.values()):
        tensors |= safetensors.torch.load_file(source / name)
    change(tensors)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def test_weight_only_files_say_so(source, tmp_path):
    tensors = quantize(source, tmp_path / "out")
    assert not [key for key in tensors if key.endswith("input_scale")]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in config["config_groups"]["group_0"]


def test_what_is_copied(source, tmp_path):
    report = fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    names = {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"chat_template.jinja", "LICENSE", "generation_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    left = (".hidden", "consolidated.safetensors", "modeling_x.py", "original", "pytorch_model.bin")
    assert report.not_copied == left
    assert ", ".join(left) in str(report)
    assert not (tmp_path / "out.partial").exists()


def test_the_report_counts_bytes(source, tmp_path):
    report = fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False)
    with CheckpointFiles.open(source) as files:
        sizes = {k: math.prod(s) * d.itemsize for k, (d, s) in files.shapes.items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert report.source_bytes == sum(sizes.values())
    assert report.quantized_share == experts / sum(sizes.values())
    assert report.written_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def split_experts(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if ".experts." in key]:
        stack, layer = tensors.pop(key), key.rpartition(".")[0]
        for expert, weight in enumerate(stack):
            names = ["gate_proj", "up_proj"] if key.endswith("gate_up_proj") else ["down_proj"]
            for name, part in zip(names, weight.chunk(len(names)), strict=True):
                tensors[f"{layer}.{expert}.{name}.weight"] = part


@pytest.mark.parametrize("method", ["max", "mse"])
def test_gate_and_up_in_different_files_share_their_global_scale(source, tmp_path, method):
    single = rewrite(source, tmp_path / "single", split_experts)
    tensors = safetensors.torch.load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    weight_map = {}
    for number, wanted in enumerate(("gate_proj", "")):
        keys = [k for k in tensors if k not in weight_map and wanted in k]
        safetensors.torch.save_file({k: tensors[k] for k in keys}, single / f"{number}.safetensors")
        weight_map |= dict.fromkeys(keys, f"{number}.safetensors")
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = quantize(single, tmp_path / "a", method=method)
    assert_same(found, quantize(source, tmp_path / "b", method=method))
    name = "model.layers.1.experts.7.{}_proj.weight_scale_2"
    assert torch.equal(found[name.format("gate")], found[name.format("up")])


def test_mse_has_less_error_than_max(source, tmp_path):
    float_tensors = read_all(source_copy := rewrite(source, tmp_path / "one", lambda t: None))
    errors = {}
    for method in ("max", "mse"):
        found = quantize(source_copy, tmp_path / method, method=method)
        name = "model.layers.0.experts.3.down_proj.weight"
        parts = (found[f"{name}{end}"] for end in ("", "_scale", "_scale_2"))
        decoded = fp4moe.dequantize_nvfp4(fp4moe.NVFP4Values(*parts))
        weight = float_tensors["model.layers.0.experts.down_proj"][3].float()
        errors[method] = relative_error(decoded, weight)
    # Gaussian weights: 9.5 % and 8.1 % (docs/accuracy.md), within the spread of 3072 values.
    assert errors["mse"] < 0.95 * errors["max"] < 0.11


def test_the_files_keep_to_the_size_and_the_index(source, tmp_path):
    whole = quantize(source, tmp_path / "whole")
    assert_same(quantize(source, tmp_path / "many", max_shard_bytes=20_000), whole)
    with CheckpointFiles.open(tmp_path / "many") as files:
        assert len(files.shards) > 5
        for name, keys in files.shards.items():
            size = sum(files.tensor(key).nbytes for key in keys)
            assert size <= 20_000 or len(keys) == 1, name
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_the_data_is_aligned(source, tmp_path):
    quantize(source, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    header.pop("__metadata__")
    starts = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}
    assert all(starts[key] % sizes[header[key]["dtype"]] == 0 for key in starts)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, {0, 1}),
        (r"layers\.1\.", {1}),
        ([r"layers\.0\.experts$", "mtp"], {0, "mtp"}),
        ("experts", {0, 1, "mtp"}),
    ],
)
def test_layers_are_chosen_by_name(source, tmp_path, layers, chosen):
    def add_prediction(tensors):
        for name in ("gate_up_proj", "down_proj"):
            weight = tensors[f"model.layers.0.experts.{name}"]
            tensors[f"mtp.layers.0.experts.{name}"] = weight.clone()

    more = rewrite(source, tmp_path / "more", add_prediction)
    report = fp4moe.quantize_checkpoint(more, tmp_path / "out", layers=layers, progress=False)
    names = {"mtp": "mtp.layers.0.experts"} | {n: f"model.layers.{n}.experts" for n in (0, 1)}
    assert set(report.layers) == {names[choice] for choice in chosen}
    tensors = read_all(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for choice, name in names.items():
        ignored = [p for p in config["ignore"] if fnmatch.fnmatch(f"{name}.0.down_proj", p)]
        assert bool(ignored) == (choice not in chosen)
        assert (f"{name}.down_proj" in tensors) == (choice not in chosen)
        assert (f"{name}.0.down_proj.weight_scale" in tensors) == (choice in chosen)


def test_calibration_takes_the_names_of_the_model_and_numbers_per_expert(source, tmp_path):
    down = [0.5 + expert for expert in range(8)]
    calibration = {f"language_model.layers.{n}.experts": (0.25, down) for n in (0, 1)}
    tensors = quantize(source, tmp_path / "out", calibration=calibration)
    for expert in range(8):
        name = f"model.layers.1.experts.{expert}.{{}}_proj.input_scale"
        assert tensors[name.format("gate")] == tensors[name.format("up")] == 0.25
        assert tensors[name.format("down")] == down[expert]


@pytest.mark.parametrize(
    "calibration",
    [
        {},
        {"model.layers.0.experts": (1.0, 1.0)},
        {f"model.layers.{n}.experts": (1.0, [1.0, 2.0]) for n in (0, 1)},
        {f"model.layers.{n}.experts": (math.nan, 1.0) for n in (0, 1)},
        {f"model.layers.{n}.experts": (1.0, 0.0) for n in (0, 1)},
        {f"{p}model.layers.{n}.experts": (1.0, 1.0) for n in (0, 1) for p in ("", "model.")},
    ],
)
def test_calibration_that_does_not_fit_is_refused(source, tmp_path, calibration):
    with pytest.raises(ShapeError, match="calibration"):
        quantize(source, tmp_path / "out", calibration=calibration)
    assert list(tmp_path.iterdir()) == []


def set_nan(tensors):
    tensors["model.layers.1.experts.gate_up_proj"][5, 70, 3] = math.nan


def set_infinite(tensors):
    tensors["model.layers.0.experts.down_proj"][2, 0, 0] = -math.inf


def transpose(tensors):
    for key in [key for key in tensors if ".experts." in key]:
        tensors[key] = tensors[key].transpose(1, 2)


def add_bias(tensors):
    tensors["model.layers.0.experts.gate_up_proj_bias"] = torch.zeros(8, 96)


def make_integers(tensors):
    key = "model.layers.0.experts.down_proj"
    tensors[key] = tensors[key].to(torch.int8)


def drop_down(tensors):
    del tensors["model.layers.0.experts.down_proj"]


def drop_all(tensors):
    for key in [key for key in tensors if ".experts." in key]:
        del tensors[key]


def odd_columns(tensors):
    for key in [key for key in tensors if key.endswith("experts.down_proj")]:
        tensors[key] = tensors[key][:, :, :40]
        up = key.replace("down_proj", "gate_up_proj")
        tensors[up] = tensors[up][:, :80]


def drop_one(tensors):
    split_experts(tensors)
    del tensors["model.layers.0.experts.4.up_proj.weight"]


def drop_an_expert(tensors):
    split_experts(tensors)
    for name in ("gate", "up", "down"):
        del tensors[f"model.layers.0.experts.3.{name}_proj.weight"]


def name_twice(tensors):
    split_experts(tensors)
    key = "model.layers.0.experts.0.up_proj.weight"
    tensors["model.layers.0.experts.0.w3.weight"] = tensors[key].clone()


def shorten_one(tensors):
    split_experts(tensors)
    key = "model.layers.1.experts.6.gate_proj.weight"
    tensors[key] = tensors[key][:-1]


def mix_forms(tensors):
    down = tensors["model.layers.0.experts.down_proj"]
    tensors["model.layers.0.experts.0.down_proj.weight"] = down[0].clone()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (set_nan, CheckpointError, r"layers\.1\.experts\.gate_up_proj.* in expert 5"),
        (set_infinite, CheckpointError, r"layers\.0\.experts\.down_proj.*got values from -inf"),
        (transpose, UnsupportedError, r"gate_up_proj \[E, 2 \* I, H\]"),
        (add_bias, CheckpointError, "a bias for every stack or for none; got .*gate_up_proj_bias"),
        (make_integers, UnsupportedError, "bfloat16, float16 or float32"),
        (drop_down, CheckpointError, "must have up and down"),
        (drop_all, UnsupportedError, "of its .* tensors bears a known name"),
        (odd_columns, UnsupportedError, r"no multiples of 16 in 8 .*down_proj"),
        (drop_one, CheckpointError, r"got 1 \('model\.layers\.0\.experts\.4'\)"),
        (drop_an_expert, CheckpointError, "from 0 on; got 7"),
        (name_twice, CheckpointError, "two names of one projection"),
        (shorten_one, CheckpointError, r"experts\.6\.gate_proj"),
        (mix_forms, UnsupportedError, "it holds more than"),
    ],
)
def test_experts_that_cannot_be_written_are_refused(source, tmp_path, change, error, message):
    broken = rewrite(source, tmp_path / "broken", change)
    with pytest.raises(error, match=message):
        quantize(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "best"}, UnsupportedError),
        ({"layers": "("}, ShapeError),
        ({"layers": "nowhere"}, UnsupportedError),
        ({"max_shard_bytes": 0}, ShapeError),
        ({"max_shard_bytes": math.nan}, ShapeError),
    ],
)
def test_arguments_are_checked(source, tmp_path, options, error):
    with pytest.raises(error, match=next(iter(options))):
        quantize(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_source_is_refused(source, tmp_path):
    quantize(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must be a float checkpoint"):
        quantize(tmp_path / "out", tmp_path / "again")


def test_a_file_that_leads_elsewhere_is_not_copied(source, tmp_path):
    single = rewrite(source, tmp_path / "single", lambda tensors: None)
    (tmp_path / "secret").write_text("secret")
    (single / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*a link elsewhere"):
        quantize(single, tmp_path / "out")


def test_the_command_line(source, tmp_path, capsys):
    target = tmp_path / "out"
    command = ["quantize", str(source), str(target), "--method", "mse", "--layers", r"s\.1\."]
    assert main(command) == 0
    assert "1 experts layers" in capsys.readouterr().out
    wanted = quantize(source, tmp_path / "python", method="mse", layers=[r"s\.1\."])
    assert_same(read_all(target), wanted)
    assert main(command) == 2
    assert "must not exist yet" in capsys.readouterr().err
