"""Opening a checkpoint: what safetensors wrote is read, everything else is a CheckpointError.

The fuzzed cases compare with the safetensors library, which parses the same bytes on its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import struct
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from fuzzing import fuzz

from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.errors import CheckpointError

hypothesis = pytest.importorskip("hypothesis", reason="optional package")
st = hypothesis.strategies

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.weight_scale": torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "c": torch.tensor(0.25),
    "d.weight_scale_inv": torch.arange(125, 129, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "empty": torch.empty(0, 7, dtype=torch.int64),
    "mask": torch.tensor([True, False]),
}
FUZZ = fuzz(150)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def write_single(folder: pathlib.Path, data: bytes | None = None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    data = safetensors.torch.save(TENSORS) if data is None else data
    (folder / "model.safetensors").write_bytes(data)
    return folder


def write_sharded(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    names, weight_map = list(TENSORS), {}
    for number, keys in enumerate((names[:2], names[2:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        safetensors.torch.save_file({key: TENSORS[key] for key in keys}, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    write_index(folder, {"metadata": {}, "weight_map": weight_map})
    return folder


def write_index(folder: pathlib.Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def read_index(folder: pathlib.Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        # Bytes, since NaN differs from itself.
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor)]
        assert torch.equal(*raw), key


def read_all(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    with CheckpointFiles.open(folder) as files:
        found = {key: files.tensor(key) for key in files.shapes}
        assert {k: (t.dtype, tuple(t.shape)) for k, t in found.items()} == dict(files.shapes)
        assert [key for keys in files.shards.values() for key in keys] == list(files.shapes)
    return found


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_tensor_is_read_as_it_was_written(tmp_path, write):
    assert_same(read_all(write(tmp_path / "model")), TENSORS)


def test_tensors_outlive_the_files(tmp_path):
    files = CheckpointFiles.open(write_single(tmp_path))
    tensor = files.tensor("a.weight")
    files.release("model.safetensors")
    files.close()
    assert torch.equal(tensor, TENSORS["a.weight"])
    assert torch.equal(files.tensor("c"), TENSORS["c"]), "a closed file opens again"


def test_the_shards_are_in_the_order_of_the_index(tmp_path):
    write_sharded(tmp_path)
    index = read_index(tmp_path)
    turned = dict(reversed(index["weight_map"].items()))
    write_index(tmp_path, {"weight_map": turned})
    with CheckpointFiles.open(tmp_path) as files:
        assert list(files.shapes) == list(turned)
        assert list(files.shards) == list(dict.fromkeys(turned.values()))


@pytest.mark.parametrize(
    ("config", "extra", "wanted"),
    [
        ({}, None, None),
        ({"quantization_config": {"quant_method": "modelopt"}}, None, {"quant_method": "modelopt"}),
        ({"quantization_config": {"a": 1}}, {"quantization": {}}, {"quantization": {}}),
    ],
)
def test_the_quantization_is_that_of_modelopt_first(tmp_path, config, extra, wanted):
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if extra is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(extra))
    with CheckpointFiles.open(tmp_path) as files:
        assert files.config == config and files.quantization == wanted


def test_infinity_in_a_configuration_is_read(tmp_path):
    write_single(tmp_path)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert CheckpointFiles.open(tmp_path).config == {"time_step_limit": [0.0, float("inf")]}


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "not JSON": b"{nope",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[]",
    "leading space": b" {}",
    "deep": b'{"a":' + b"[" * 100_000,
    "long number": b'{"a":' + b"1" * 5000 + b"}",
    "repeated key": b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2),
    "repeated field": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": []}}',
    "metadata": {"__metadata__": {"format": 3}, "a": ENTRY},
    "entry": {"a": [0, 8]},
    "missing field": {"a": {"dtype": "F32", "shape": [2]}},
    "extra field": {"a": ENTRY | {"device": "cuda"}},
    "unknown dtype": {"a": ENTRY | {"dtype": "F31"}},
    "dtype of torch": {"a": ENTRY | {"dtype": "float32"}},
    "dtype not a string": {"a": ENTRY | {"dtype": ["F32"]}},
    "four-bit dtype": {"a": ENTRY | {"dtype": "F4", "shape": [16]}},
    "negative shape": {"a": ENTRY | {"shape": [-1, -2]}},
    "fractional shape": {"a": ENTRY | {"shape": [2.0]}},
    "boolean shape": {"a": ENTRY | {"shape": [True, 2]}},
    "overflowing shape": {"a": ENTRY | {"shape": [2**33, 2**33, 2**62]}},
    "overflow behind a zero": {"a": ENTRY | {"shape": [0, 2**62, 8], "data_offsets": [0, 0]}},
    "too many axes": {"a": ENTRY | {"shape": [1] * 65 + [2]}},
    "wrong size": {"a": ENTRY | {"shape": [3]}},
    "backwards": {"a": ENTRY | {"data_offsets": [8, 0]}},
    "three offsets": {"a": ENTRY | {"data_offsets": [0, 8, 8]}},
    "beyond the file": {"a": ENTRY | {"shape": [4], "data_offsets": [0, 16]}},
    "negative offset": {"a": ENTRY | {"data_offsets": [-8, 0]}},
    "hole at the start": {"a": ENTRY | {"shape": [1], "data_offsets": [4, 8]}},
    "hole at the end": {"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "partial overlap": {"a": ENTRY, "b": ENTRY | {"shape": [1], "data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(tmp_path, header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_single(tmp_path, with_header(raw, bytes(8)))
    with pytest.raises(CheckpointError, match="must"):
        CheckpointFiles.open(tmp_path)


def test_the_header_of_these_cases_is_read_when_it_is_right(tmp_path):
    write_single(tmp_path, with_header(json.dumps({"a": ENTRY}).encode(), bytes(8)))
    assert_same(read_all(tmp_path), {"a": torch.zeros(2)})


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, -9, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    write_single(tmp_path, safetensors.torch.save(TENSORS)[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointFiles.open(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    data = safetensors.torch.save(TENSORS)
    write_single(tmp_path, struct.pack("<Q", length) + data[8:])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        CheckpointFiles.open(tmp_path)


def rename_first(folder: pathlib.Path, name: object) -> None:
    index = read_index(folder)
    index["weight_map"]["a.weight"] = name
    write_index(folder, index)


def drop_from_index(folder: pathlib.Path) -> None:
    index = read_index(folder)
    del index["weight_map"]["a.weight"]
    write_index(folder, index)


def add_to_index(folder: pathlib.Path) -> None:
    index = read_index(folder)
    index["weight_map"] |= {f"ghost{n:02}": "model-00001-of-00002.safetensors" for n in range(12)}
    write_index(folder, index)


def repeat_a_key(folder: pathlib.Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    keys = safetensors.torch.load_file(file) | {"a.weight": TENSORS["a.weight"]}
    safetensors.torch.save_file(keys, file)


def outside(folder: pathlib.Path) -> None:
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "out.safetensors")


def dangling_link(folder: pathlib.Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    file.unlink()
    file.symlink_to(folder.parent / "out.safetensors")


def make_a_pipe(folder: pathlib.Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()
    os.mkfifo(folder / "model-00001-of-00002.safetensors")


FAULTS: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    "missing file": (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "no such file"),
    "parent": (lambda f: (outside(f), rename_first(f, "../out.safetensors")), "plain names"),
    "absolute": (lambda f: rename_first(f, str(f / "config.json")), "plain names"),
    "backslash": (lambda f: rename_first(f, "..\\out.safetensors"), "plain names"),
    "NUL": (lambda f: rename_first(f, "a\0b"), "plain names"),
    "surrogate": (lambda f: rename_first(f, "\ud800"), "plain names"),
    "long name": (lambda f: rename_first(f, "a" * 5000), "no such file"),
    "not a name": (lambda f: rename_first(f, 3), "name a file"),
    "the directory": (lambda f: rename_first(f, "."), "plain names"),
    "another kind of file": (lambda f: rename_first(f, "config.json"), "safetensors file"),
    "dangling link": (dangling_link, "a link to '.*out.safetensors', where there is none"),
    "pipe": (make_a_pipe, "no such file"),
    "not in the index": (drop_from_index, r"not in the index 1 \('a\.weight'\)"),
    "only in the index": (add_to_index, r"missing 12 \('ghost00', .*'ghost09', \.\.\.\)"),
    "a shard too many": (
        lambda f: (f / "model-00003-of-00003.safetensors").touch(),
        r"name every shard; got others beside it 1 \('model-00003",
    ),
    "in two files": (repeat_a_key, r"two or more: 1 \('a\.weight'\)"),
    "no weight_map": (lambda f: write_index(f, {"metadata": {}}), "weight_map"),
    "empty weight_map": (lambda f: write_index(f, {"weight_map": {}}), "weight_map"),
    "weight_map a list": (lambda f: write_index(f, {"weight_map": ["a"]}), "weight_map"),
    "index a list": (lambda f: write_index(f, []), "JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "quantization a list": (
        lambda f: (f / "config.json").write_text('{"quantization_config": [1]}'),
        "quantization_config must",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_directory_is_refused(tmp_path, break_it, message):
    folder = write_sharded(tmp_path / "model")
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFiles.open(folder)


@pytest.mark.parametrize("path", ["absent", "model/config.json"])
def test_what_is_not_a_directory_is_refused(tmp_path, path):
    write_single(tmp_path / "model")
    with pytest.raises(CheckpointError, match="existing directory"):
        CheckpointFiles.open(tmp_path / path)


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in write_single(tmp_path / "model").iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert_same(read_all(snapshot), TENSORS)


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "MODEL.PTH", "weights.pkl"])
def test_pickle_files_are_never_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(CheckpointError, match="pickle files can run code"):
        CheckpointFiles.open(tmp_path)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(CheckpointError, match="safetensors file"):
        CheckpointFiles.open(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_other_names_of_weights_are_named(tmp_path):
    write_single(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"other safetensors files 1 \('adapter"):
        CheckpointFiles.open(tmp_path)


def test_an_unknown_key_and_a_changed_file_are_refused(tmp_path):
    files = CheckpointFiles.open(write_single(tmp_path))
    with pytest.raises(CheckpointError, match="key must be in the checkpoint; got 'nope'"):
        files.tensor("nope")
    write_single(tmp_path, safetensors.torch.save({"a.weight": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match="as when it was opened"):
        files.tensor("a.weight")


def check_like_the_library(folder: pathlib.Path, data: bytes) -> None:
    """Either CheckpointError, or what the safetensors library reads from the same bytes."""
    write_single(folder, data)
    try:
        found = read_all(folder)
    except CheckpointError:
        return
    # load() has no E8M0.
    assert_same(found, safetensors.torch.load_file(folder / "model.safetensors"))


@pytest.mark.slow
@FUZZ
@hypothesis.given(
    edits=st.lists(
        st.tuples(st.integers(0, 2**16), st.integers(0, 255), st.sampled_from("rid")), max_size=4
    ),
    cut=st.none() | st.integers(0, 700),
)
def test_fuzzed_bytes(tmp_path, edits, cut):
    data = bytearray(safetensors.torch.save(TENSORS))
    for place, value, kind in edits:
        # Bytes of the length and the header; the data may hold anything.
        place %= len(data) - 60
        data[place : place + (kind != "i")] = b"" if kind == "d" else bytes([value])
    check_like_the_library(tmp_path, bytes(data[:cut]))


@pytest.mark.slow
@FUZZ
@hypothesis.given(
    key=st.sampled_from([*TENSORS, "new", "__metadata__"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]),
    value=JSON
    | st.sampled_from(["F16", "BF16", "U8", "I64", "F4", "F8_E8M0", "bf16"])
    | st.lists(st.integers(-1, 80), max_size=3)
    | st.lists(st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**64]), max_size=4),
    text=st.booleans(),
)
def test_fuzzed_fields(tmp_path, key, field, value, text):
    raw = safetensors.torch.save(TENSORS)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    if field is None:
        header[key] = value
    else:
        header.setdefault(key, dict(ENTRY))[field] = value
    packed = json.dumps(header, ensure_ascii=text).encode("utf-8", "surrogatepass")
    check_like_the_library(tmp_path, with_header(packed, raw[end:]))


@FUZZ
@hypothesis.given(
    key=st.sampled_from([*TENSORS, "new"]),
    value=JSON
    | st.sampled_from(
        [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "./model-00001-of-00002.safetensors",
            "config.json",
            "..",
            "",
        ]
    ),
    drop=st.sets(st.sampled_from([*TENSORS]), max_size=2),
    whole=st.none() | JSON,
)
def test_fuzzed_index(tmp_path, key, value, drop, whole):
    index = read_index(write_sharded(tmp_path))
    index["weight_map"][key] = value
    for name in drop:
        index["weight_map"].pop(name, None)
    write_index(tmp_path, index if whole is None else whole)
    try:
        found = read_all(tmp_path)
    except CheckpointError:
        return
    assert_same(found, TENSORS)


@FUZZ
@hypothesis.given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_fuzzed_configuration(tmp_path, data):
    write_single(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    try:
        config = CheckpointFiles.open(tmp_path).config
    except CheckpointError:
        return
    assert repr(config) == repr(json.loads(data))
