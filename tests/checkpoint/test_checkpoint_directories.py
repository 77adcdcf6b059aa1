"""Directories as users have them: a stale index, links, caches on another disk; what is opened."""

from __future__ import annotations

import builtins
import collections
import json
import os
import pathlib

import nvfp4_files as files
import pytest
import torch
import transformers

import fp4moe
from fp4moe.errors import CheckpointError

MODELS = ("qwen3_moe", "nemotron_h")
INDEX = "model.safetensors.index.json"


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards(made, directory, tensors):
    """Two files and their index, as save_pretrained writes them."""
    made.write(directory, tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        files.save_file({k: tensors[k] for k in keys}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    write_index(directory, weight_map)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stored", ["float", "nvfp4"])
@pytest.mark.parametrize("index", ["of this file", "of shards that are gone", "not JSON"])
def test_one_file_counts_whatever_an_index_says(tmp_path, name, stored, index, caplog):
    made = files.make(name, tmp_path / "source")
    tensors, entry = (made.floats, None) if stored == "float" else (made.tensors, files.MODELOPT)
    usual = files.load(made.write(tmp_path / "usual", tensors, entry))
    directory = made.write(tmp_path / "both", tensors, entry)
    if index == "not JSON":
        (directory / INDEX).write_text("{")
    else:
        file = (
            "model.safetensors" if index == "of this file" else "model-00001-of-00001.safetensors"
        )
        write_index(directory, dict.fromkeys(tensors, file))
    assert torch.equal(files.logits(files.load(directory)), files.logits(usual))
    assert "not read" not in caplog.text


@pytest.mark.parametrize("name", MODELS)
def test_shards_beside_one_file_are_left_out_with_a_warning(tmp_path, name, registered, caplog):
    made = files.make(name, tmp_path / "source")
    other = {k: torch.zeros_like(v) for k, v in made.tensors.items()}
    directory = made.write(shards(made, tmp_path / "both", other))
    model = files.load(directory)
    assert "not read are the shards beside it: 2 ('model-00001" in caplog.text
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(model), files.logits(usual))
    assert torch.equal(files.logits(plain), files.logits(usual))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
def test_quantize_reads_one_file_with_its_index(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    saved = files.load_file(tmp_path / "source" / "model.safetensors")
    for folder, weight_map in (
        ("alone", None),
        ("both", dict.fromkeys(saved, "model.safetensors")),
    ):
        directory = made.write(tmp_path / folder, saved, None)
        if weight_map:
            write_index(directory, weight_map)
        fp4moe.quantize_checkpoint(directory, tmp_path / f"{folder} packed", progress=False)
    one, two = (files.load(tmp_path / f"{folder} packed") for folder in ("alone", "both"))
    assert torch.equal(files.logits(one), files.logits(two))


def links(directory, target):
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).symlink_to(file)
    return target


def cache(directory, root, blobs_elsewhere):
    """A Hugging Face cache; its blobs may be a link to another disk."""
    repository = root / "models--o--m"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    snapshot.mkdir(parents=True)
    real = root / "disk" if blobs_elsewhere else blobs
    real.mkdir()
    if blobs_elsewhere:
        blobs.symlink_to(real)
    for number, file in enumerate(sorted(directory.iterdir())):
        (real / f"{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


WAYS = {
    "links": lambda d, root: links(d, root / "links"),
    "links to links": lambda d, root: links(links(d, root / "links"), root / "more"),
    "cache": lambda d, root: cache(d, root, False),
    "blobs on another disk": lambda d, root: cache(d, root, True),
    "a linked cache": lambda d, root: links(cache(d, root, True), root / "links"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4"])
@pytest.mark.parametrize("way", WAYS)
def test_links_are_followed(tmp_path, name, way):
    made = files.make(name, tmp_path / "source")
    packed = WAYS[way](shards(made, tmp_path / "packed", made.tensors), tmp_path)
    usual = files.load(made.write(tmp_path / "usual"))
    assert torch.equal(files.logits(files.load(packed)), files.logits(usual))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_quantize_follows_links(tmp_path, way):
    made = files.make("qwen3_moe", tmp_path / "source")
    source = made.write(tmp_path / "float", made.floats, None)
    (source / "tokenizer.json").write_text("{}")
    linked = WAYS[way](source, tmp_path)
    for directory, target in ((source, "one"), (linked, "two")):
        fp4moe.quantize_checkpoint(directory, tmp_path / target, progress=False)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{}"
    one, two = (files.load(tmp_path / target) for target in ("one", "two"))
    assert torch.equal(files.logits(one), files.logits(two))


@pytest.mark.parametrize("name", MODELS)
def test_an_index_names_nothing_outside_the_directory(tmp_path, name):
    made = files.make(name, tmp_path / "source")
    directory = shards(made, tmp_path / "packed", made.tensors)
    (directory / "model-00001-of-00002.safetensors").rename(tmp_path / "out.safetensors")
    text = (directory / INDEX).read_text()
    for outside in (
        "../out.safetensors",
        str(tmp_path / "out.safetensors"),
        "..\\\\out.safetensors",
    ):
        (directory / INDEX).write_text(text.replace("model-00001-of-00002.safetensors", outside))
        with pytest.raises(CheckpointError, match=r"plain names in the directory"):
            files.load(directory)


@pytest.fixture
def opened(monkeypatch):
    """How often each weight file is opened by Python."""
    counts: collections.Counter[str] = collections.Counter()
    plain = builtins.open

    def spy(file, *args, **kwargs):
        if isinstance(file, str | os.PathLike) and os.fspath(file).endswith(".safetensors"):
            counts[pathlib.Path(file).name] += 1
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "gemma4"])
@pytest.mark.parametrize("stored", ["float", "nvfp4"])
def test_headers_are_read_once(tmp_path, name, stored, registered, opened):
    made = files.make(name, tmp_path / "source")
    if stored == "float":
        tensors = files.load_file(tmp_path / "source" / "model.safetensors")
        directory = shards(made, tmp_path / "some", tensors)
        (directory / "hf_quant_config.json").unlink()
        calls = [files.load]
    else:
        directory = shards(made, tmp_path / "some", made.tensors)
        calls = [files.load, transformers.AutoModelForCausalLM.from_pretrained]
    for call in calls:
        opened.clear()
        call(directory)
        assert opened == {f"model-0000{n}-of-00002.safetensors": 1 for n in (1, 2)}


def test_another_directory_is_opened_anew(tmp_path, opened):
    """What was opened for one call serves no other one."""
    made = files.make("qwen3_moe", tmp_path / "source")
    for folder in ("one", "two", "one"):
        opened.clear()
        directory = made.write(tmp_path / folder)
        model = files.load(directory)
        assert opened == {"model.safetensors": 1}
        assert model.config.quantization_config.options.files is None
