"""A run of quantize_checkpoint that is killed or fails: nothing loadable stays, a rerun ends it."""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.errors import CheckpointError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """Gemma4 in several files, and a file that is copied."""
    folder = tmp_path_factory.mktemp("source")
    tiny_models.gemma4("eager", torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("content")
    return folder


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def quantize(source, target, **options) -> None:
    fp4moe.quantize_checkpoint(source, target, progress=False, **options)


def stop_early(source, target) -> pathlib.Path:
    """The partial directory of a run that met NaN in its last layer."""
    broken = target.parent / "broken"
    shutil.copytree(source, broken)
    key = "model.layers.1.experts.gate_up_proj"
    (file,) = [f for f in broken.glob("*.safetensors") if key in safetensors.torch.load_file(f)]
    tensors = safetensors.torch.load_file(file)
    tensors[key][5, 70, 3] = math.nan
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match="finite"):
        quantize(broken, target, max_shard_bytes=20_000)
    return pathlib.Path(f"{target}.partial")


def test_a_partial_run_cannot_be_loaded(source, tmp_path):
    partial = stop_early(source, tmp_path / "out")
    assert list(partial.glob("model-*.safetensors"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointFiles.open(partial)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(partial)


@pytest.mark.parametrize(
    ("options", "differing"), [({"method": "mse"}, "method, source"), ({}, "source")]
)
def test_a_partial_run_of_something_else_is_refused(source, tmp_path, options, differing):
    partial = stop_early(source, tmp_path / "out")
    before = contents(partial)
    with pytest.raises(CheckpointError, match=f"got another {differing} in"):
        quantize(source, tmp_path / "out", max_shard_bytes=20_000, **options)
    assert contents(partial) == before


def test_a_directory_of_someone_else_is_refused(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    for name in ("thesis.tex", "thesis.1.tmp"):
        (tmp_path / "out.partial" / name).write_text("mine")
    with pytest.raises(CheckpointError, match="remove that directory"):
        quantize(source, tmp_path / "out")
    assert len(list((tmp_path / "out.partial").iterdir())) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="must not exist yet"):
        quantize(source, tmp_path / "out")


def test_too_little_space_is_found_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"they need \d{6} bytes and 1000 are free"):
        quantize(source, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors*"))
    monkeypatch.undo()
    quantize(source, tmp_path / "out")


def test_a_directory_that_cannot_be_made_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"\d{6} bytes of weights cannot be written.*file/out"
    ):
        quantize(source, tmp_path / "file" / "out")


# One process imports everything; its children are killed where the audit hook says, or are given
# a limit of file size, which the kernel enforces like a full disk.
CHILDREN = """
import json, os, resource, signal, sys
import torch
import fp4moe
from fp4moe.models.from_config import model_on_meta

source, folder, shard_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
model_on_meta(source, caller="test")  # imports the model's class as well


def child(target, event=None, count=0, limit=None):
    number = os.fork()
    if number:
        return os.waitpid(number, 0)[1]
    seen = 0

    def kill(name, arguments):
        nonlocal seen
        if name == event and folder in str(arguments[0]):
            seen += 1
            if seen > count:
                os.kill(os.getpid(), signal.SIGKILL)

    if event:
        sys.addaudithook(kill)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = 0
    try:
        fp4moe.quantize_checkpoint(source, target, max_shard_bytes=shard_bytes, progress=False)
    except fp4moe.errors.CheckpointError as error:
        print(error, flush=True)
        code = 3
    os._exit(code)


assert child(f"{folder}/whole") == 0
kills = 0
for event in ("os.rename", "open", "os.remove"):
    count = 0
    while True:
        target = f"{folder}/{event}{count}"
        if child(target, event, count) == 0:
            break
        kills += 1
        # The last rename has been when it is there; what may be left is the journal.
        assert not os.path.exists(target) or "config.json" in os.listdir(target), target
        assert child(target) == 0, target
        count += 1
    # Killed again and again, each time one event later.
    target, count = f"{folder}/{event}", 0
    while child(target, event, count):
        count += 1
target = f"{folder}/limited"
assert os.waitstatus_to_exitcode(child(target, limit=shard_bytes // 2)) == 3
assert not os.path.exists(target)
print(sorted(os.listdir(target + ".partial")))
assert child(target) == 0
print("kills", kills)
"""


@pytest.mark.slow
def test_killed_and_failed_runs_go_on_and_give_the_same_bytes(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, source, tmp_path, "110000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    failure, partial, kills = done.stdout.splitlines()
    assert re.search(
        r"\d{6} bytes of weights cannot be written.*File too large.*it goes on", failure
    )
    assert "config.json" not in partial and ".tmp" not in partial
    assert int(kills.split()[1]) > 20
    wanted = contents(tmp_path / "whole")
    assert len([name for name in wanted if name.startswith("model-")]) == 3
    folders = [path for path in tmp_path.iterdir() if path.name != "whole"]
    assert len(folders) > 20
    for folder in folders:
        assert contents(folder) == wanted, folder.name
