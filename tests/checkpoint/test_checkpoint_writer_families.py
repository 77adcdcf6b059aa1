"""What quantize_checkpoint leaves alone, what it says, and where it may write."""

from __future__ import annotations

import fnmatch
import json
import logging
import pathlib
import subprocess
import sys

import checkpoint_makers as makers
import pytest
import torch
from raw_files import raw
from tiny_models import family

import fp4moe
from fp4moe.calibration.texts import encode, read_texts
from fp4moe.checkpoint import partial_run
from fp4moe.checkpoint.compressed_tensors import compressed_convention
from fp4moe.checkpoint.mtp import decoder_layers, mtp_module
from fp4moe.errors import CheckpointError, UnsupportedError


def save(name, directory):
    model = family(name, "eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    return directory


def add(source, target, further):
    """A copy of a checkpoint with the last layer once more, under another name."""

    def change(tensors):
        layer = [key for key in tensors if "model.layers.1." in key]
        tensors |= {key.replace("model.layers.1.", further): tensors[key].clone() for key in layer}
        tensors[f"{further}eh_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)

    return makers.rewrite(source, target, change)


# Numbered on, as GLM and DeepSeek; Qwen3-Next and Exaone; MiMo-V2; HY and MiMo; Ernie.
FURTHER = ["model.layers.2.", "mtp.layers.0.", "model.mtp.layers.0.", "model.mtp_layers.0."]
FURTHER += ["model.mtp_block.0."]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2"])
@pytest.mark.parametrize("further", FURTHER)
def test_further_layers_stay_as_they_are(name, further, tmp_path):
    source = add(save(name, tmp_path / "float"), tmp_path / "further", further)
    report = fp4moe.quantize_checkpoint(source, tmp_path / "packed", progress=False)
    plain = fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "plain", progress=False)
    assert report.layers == plain.layers != ()
    left = {key.partition(".experts.")[0] + ".experts" for key in report.left_as_they_are}
    assert all(module.startswith(further) for module in left) and left
    assert further in str(report) and "multi-token prediction" in str(report)
    before, after = (makers.load_tensors(folder) for folder in (source, tmp_path / "packed"))
    copied = [key for key in before if key.startswith(further)]
    assert copied and all(raw(before[key]) == raw(after[key]) for key in copied)
    # One pattern for all of it, as ModelOpt writes: model.layers.61*, mtp*.
    legacy = json.loads((tmp_path / "packed" / "hf_quant_config.json").read_text())
    patterns = legacy["quantization"]["exclude_modules"]
    matched = {p for p in patterns if any(fnmatch.fnmatch(key, p) for key in copied)}
    assert len(matched) == 1, matched
    assert all(fnmatch.fnmatch(key, *matched) for key in copied)
    quantised = [key for key in after if key.endswith("weight_scale")]
    assert not any(fnmatch.fnmatch(key, *matched) for key in quantised)


def test_further_layers_are_quantised_where_they_are_asked_for(tmp_path):
    source = add(save("glm4_moe", tmp_path / "float"), tmp_path / "further", "model.layers.2.")
    report = fp4moe.quantize_checkpoint(
        source, tmp_path / "packed", layers=r"layers\.2\.", progress=False
    )
    assert report.layers == ("model.layers.2.mlp.experts",) and not report.left_as_they_are


def test_the_layers_of_a_decoder_are_counted_in_its_own_configuration():
    text, vision = {"num_hidden_layers": 24}, {"num_hidden_layers": 27}
    assert decoder_layers({"text_config": text, "vision_config": vision}) == 24
    omni = {"thinker_config": {"text_config": text, "audio_config": vision}}
    assert decoder_layers(omni | {"talker_config": {"num_hidden_layers": 20}}) == 24
    assert decoder_layers({"layers_block_type": ["moe"]}) is None
    assert mtp_module("model.layers.24.mlp.experts", 24) == "model.layers.24"
    assert mtp_module("model.layers.23.mlp.experts", 24) is None
    assert mtp_module("model.visual.layers.26.mlp", 24) is None
    assert mtp_module("model.layers.24.mlp.experts", None) is None


@pytest.mark.parametrize("name", ["granitemoe", "granitemoeshared"])
def test_granites_own_names(name, tmp_path):
    save(name, tmp_path / "float")
    report = fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "packed", progress=False)
    assert [layer[-24:] for layer in report.layers] == ["block_sparse_moe.experts"] * 2
    logits = [
        makers.logits(fp4moe.from_pretrained(tmp_path / folder, progress=False))
        for folder in ("float", "packed")
    ]
    assert torch.equal(*logits), "equal bytes in the same kernel"
    packed = makers.load_tensors(tmp_path / "packed")
    assert "model.layers.0.block_sparse_moe.experts.7.w1.weight_scale_2" in packed
    assert "model.layers.0.block_sparse_moe.router.layer.weight" in packed


def test_experts_that_fp4moe_refuses_to_load_are_named(tmp_path, caplog):
    model = family("qwen2_moe", "eager", torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    # A gate of no known kind.
    model.config.hidden_act = "tanh"
    model.save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.WARNING, "fp4moe"):
        report = fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "out", progress=False)
    (reason,) = report.not_run_here
    assert reason in caplog.text and "for other programs" in str(report)
    with pytest.raises(UnsupportedError) as refused:
        fp4moe.from_pretrained(tmp_path / "out", progress=False)
    assert reason in str(refused.value)


def test_no_word_of_experts_that_load(tmp_path, caplog):
    save("qwen2_moe", tmp_path / "float")
    report = fp4moe.quantize_checkpoint(tmp_path / "float", tmp_path / "out", progress=False)
    assert report.not_run_here == () and "for other programs" not in caplog.text


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("source")
    makers.save_float("qwen3_moe", folder)
    return folder


SECOND = """
import sys, fp4moe
try:
    fp4moe.quantize_checkpoint(sys.argv[1], sys.argv[2], progress=False)
except fp4moe.errors.CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_is_at_work(source, tmp_path):
    target = str(tmp_path / "out")
    with partial_run.locked(target + ".partial", target):
        command = [sys.executable, "-c", SECOND, source, target]
        second = subprocess.run(command, capture_output=True, text=True)
        assert "cannot be written, because process" in second.stdout
        assert list((tmp_path / "out.partial").iterdir()) == [
            tmp_path / "out.partial" / partial_run.LOCK
        ]
    # Nothing is left of the lock, and one that a killed run left behind holds nobody up.
    (tmp_path / "out.partial" / partial_run.LOCK).write_text("1")
    fp4moe.quantize_checkpoint(source, target, progress=False)
    assert not list(tmp_path.rglob(partial_run.LOCK))
    with pytest.raises(CheckpointError, match="must not exist yet"):
        fp4moe.quantize_checkpoint(source, target, progress=False)


def test_a_run_that_ended_meanwhile_is_noticed(tmp_path, monkeypatch):
    """The lock was waited for in a directory that its holder has renamed."""
    partial, target = str(tmp_path / "out.partial"), str(tmp_path / "out")
    lock, seen = partial_run._lock, []

    def end_first(file, name):
        if not seen:
            seen.append(pathlib.Path(partial).rename(target))
        lock(file, name)

    monkeypatch.setattr(partial_run, "_lock", end_first)
    with (
        pytest.raises(CheckpointError, match="must not exist yet"),
        partial_run.locked(partial, target),
    ):
        pass


def test_an_empty_directory_is_accepted(source, tmp_path):
    (tmp_path / "out").mkdir()
    fp4moe.quantize_checkpoint(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="must not exist yet"):
        fp4moe.quantize_checkpoint(source, tmp_path / "link", progress=False)


def test_weights_that_are_not_sparse_may_say_so():
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    config = {"format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}}
    dense = compressed_convention(config | {"sparsity_config": {"format": "dense"}})
    assert dense == compressed_convention(config)
    with pytest.raises(CheckpointError, match="no sparsity_config"):
        compressed_convention(config | {"sparsity_config": {"format": "sparse-24-bitmask"}})


def test_a_byte_order_mark_is_no_text(tmp_path):
    lines = '{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "text.jsonl").write_text(lines, encoding="utf-8-sig")
    assert read_texts(tmp_path / "text.jsonl", caller="quantize") == ["one", "two"]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, 0

    def __call__(self, text, **options):
        self.read += len(text)
        return self.tokenizer(text, **options)


def bpe():
    """Merges across all that is not a blank, the longest word included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [pathlib.Path(module.__file__).read_text() for module in (json, logging)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "one word", "blanks", "short"])
@pytest.mark.parametrize("first", [1, 64, 512])
def test_a_long_text_gives_the_same_tokens_without_being_read(kind, first):
    tokenizer, text = bpe()
    texts = {"text": text * 4, "one word": "".join(text.split()) * 4, "blanks": " " * 10**5}
    text = texts.get(kind, "def f(): return 1")
    counting = Counting(tokenizer)
    got = encode(counting, text, first)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"][:first]
    assert got.tolist() == wanted
    if kind in ("text", "one word"):
        assert counting.read <= 16 * first + 1024 < len(text)
