"""Whatever is typed: one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from fuzzing import fuzz
from huggingface_hub import constants

import fp4moe
from fp4moe.errors import CheckpointError
from fp4moe.tools import cli_quantize
from fp4moe.tools.cli import main

hypothesis = pytest.importorskip("hypothesis", reason="optional package")
st = hypothesis.strategies


def call(arguments):
    """The exit code: main returns it, argparse raises it; anything else is a traceback."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return exit_.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint, configurations that cannot be built, and texts."""
    root = tmp_path_factory.mktemp("arguments")
    model = tiny_models.qwen3_moe("eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(root / "float")
    for name in ("broken", "empty"):
        (root / name).mkdir()
    (root / "broken" / "config.json").write_text("{not json")
    (root / "text.jsonl").write_text('{"text": "some words"}\n')
    (root / "damaged.jsonl").write_text("{\n")
    (root / "binary").write_bytes(bytes(range(256)))
    return root


NUMBERS = ["0", "1", "-1", "7", "nan", "inf", "1e400", str(2**70), "", "x", "0.5"]
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", ".", "..", "a/b/c", "-", "--", "*", "\0", "\ud800"])
)
FLAGS = {
    "info": [],
    "explain": ["--kernel", "--json"],
    "quantize": ["--method", "--layers", "--calibrate", "--max-shard-bytes", "--no-progress"],
    "evaluate": [
        *("--text", "--tokens", "--length", "--batch", "--calibrate", "--percentile", "--method"),
        *("--device", "--json", "--no-progress"),
    ],
    "bench": [
        *("--shape", "--tokens", "--kernel", "--routing", "--no-peers", "--json", "--commit"),
        *("--peers", "--tune", "--output", "--jobs"),
    ],
    "selftest": ["--kernel", "--device", "--hidden-alignment", "--json"],
}
WORDS = ["reference", "auto", "max", "mse", "nano", "cpu", "cuda", "cuda:9", "foo", "experts", "("]
# A run of the self test takes seconds: none of these gets as far.
REFUSED = ["selftest", "--tokens", "-3"]


@pytest.mark.slow
@hypothesis.given(data=st.data())
@fuzz(400)
def test_no_command_line_ends_in_a_traceback(data, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = data.draw(st.sampled_from(list(FLAGS)))
    names = ["float", "broken", "empty", "text.jsonl", "damaged.jsonl", "binary", "absent"]
    paths = [str(folder / name) for name in names]
    values = st.one_of(st.sampled_from([*paths, *NUMBERS, *WORDS]), TEXTS)
    arguments = list(REFUSED) if command == "selftest" else [command]
    for _ in range(data.draw(st.integers(0, 5))):
        flag = st.sampled_from(FLAGS[command]) if FLAGS[command] else values
        arguments.append(data.draw(st.one_of(flag, values)))
    assert call(arguments) in (0, 1, 2)


ODD = [0, -1, 1, 2.5, "abc", None, True, [], {}]
FIELDS = ("hidden_size", "num_attention_heads", "hidden_act", "num_experts", "architectures")
FIELDS += ("quantization_config", "rope_parameters", "dtype", "vocab_size")
CONFIGS = st.fixed_dictionaries(
    {"model_type": st.sampled_from(["qwen3_moe", "mixtral", "nemotron_h", "no_such"])},
    # So many layers as an integer may say would be built for ever.
    optional={"num_hidden_layers": st.sampled_from(ODD)}
    | {name: st.one_of(st.sampled_from([*ODD, 10**30]), st.integers(1, 64)) for name in FIELDS},
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's, of tensors without elements
@hypothesis.given(config=CONFIGS)
@fuzz(300)
def test_no_configuration_ends_in_a_traceback(config, tmp_path):
    small = {"vocab_size": 32, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(small | config))
    assert call(["explain", str(tmp_path)]) in (0, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["selftest", "--device", "cuda:99"], "device must be one of this machine"),
        (["selftest", "--device", "foo"], "device must be one of this machine"),
        (["evaluate", "FLOAT", "--device", "gpu7"], "device must be one of this machine"),
        (["evaluate", "FLOAT", "--device", "meta"], "device must be one of this machine"),
        (["evaluate", "broken"], "one with a tokenizer"),
        (["explain", "modles/gemma"], "no directory here"),
        (["explain", "my/nvfp4/model"], "no directory here"),
        (["explain", "ZERO"], "configuration that transformers can build"),
        (["explain", "WORD"], "configuration that transformers can build"),
        (["quantize", "FLOAT", ""], "dst must be a path"),
        (["quantize", "FLOAT", "\ud800"], "dst must be a path"),
        (["quantize", "absent", "x"], "be an existing directory"),
        (["quantize", "FLOAT", "x", "--calibrate", "damaged.jsonl"], "line 1 of"),
        (["quantize", "FLOAT", "x", "--calibrate", "\0"], "readable UTF-8 file"),
    ],
)
def test_one_line_and_code_2(arguments, said, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = json.loads((folder / "float" / "config.json").read_text())
    odd = {"ZERO": {"num_attention_heads": 0, "head_dim": None}, "WORD": {"hidden_size": "abc"}}
    for name, entries in odd.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | entries))
    places = {name: str(tmp_path / name) for name in odd} | {"FLOAT": str(folder / "float")}
    places |= {name: str(folder / name) for name in ("broken", "damaged.jsonl")}
    assert call([places.get(argument, argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["selftest", "--device", "cuda:99"], ["explain", "a/b/c"]])
def test_a_process_prints_no_traceback(arguments):
    command = [sys.executable, "-m", "fp4moe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("path", ["models/my/nvfp4", "modles/gemma", "nosuchmodel"])
def test_from_pretrained_of_a_mistyped_path(path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="which is no directory here"):
        fp4moe.from_pretrained(path)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        (["--layers", "0", "SRC", "DST"], ["0"]),
        (["--layers", "0", "1", "SRC", "DST"], ["0", "1"]),
        (["SRC", "DST", "--layers", "0", "1"], ["0", "1"]),
        (["SRC", "--layers", "0", "DST"], ["0"]),
        (["--layers", "0", "--layers", "1", "--no-progress", "SRC", "DST"], ["0", "1"]),
        (["--layers", "0", "--", "SRC", "DST"], ["0"]),
        (["SRC", "DST"], None),
    ],
)
def test_paths_behind_layers(arguments, layers, folder, tmp_path, monkeypatch):
    seen = {}

    def keep(src, dst, **options):
        seen.update(src=src, dst=dst, layers=options["layers"])

    monkeypatch.setattr(cli_quantize, "quantize_checkpoint", keep)
    assert call(["quantize", *arguments]) == 0
    assert seen == {"src": "SRC", "dst": "DST", "layers": layers}


@pytest.mark.parametrize(
    "arguments", [[], ["SRC"], ["--layers", "0"], ["--layers", "SRC", "DST"], ["SRC", "--layers"]]
)
def test_paths_that_are_missing(arguments, capsys):
    assert call(["quantize", *arguments]) == 2
    assert "required: src, dst" in capsys.readouterr().err or arguments[-1:] == ["--layers"]


def test_layers_before_the_paths_are_quantised(folder, tmp_path):
    target = tmp_path / "out"
    arguments = ["--layers", r"layers\.0\.", str(folder / "float"), str(target), "--no-progress"]
    assert call(["quantize", *arguments]) == 0
    config = json.loads((target / "hf_quant_config.json").read_text())["quantization"]
    assert "model.layers.1.mlp*" in config["exclude_modules"]
    assert "model.layers.0.mlp*" not in config["exclude_modules"]
