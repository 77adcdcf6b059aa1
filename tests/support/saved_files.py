"""What is in a directory that was saved, for comparing two of them bit by bit."""

from __future__ import annotations

import json
import pathlib

import torch
from checkpoint_makers import load_tensors
from raw_files import raw


def contents(directory):
    """Key -> dtype, shape and bytes of every tensor, and both quantisation entries."""
    directory = pathlib.Path(directory)
    tensors = {k: (t.dtype, tuple(t.shape), raw(t)) for k, t in load_tensors(directory).items()}
    beside = directory / "hf_quant_config.json"
    config = json.loads((directory / "config.json").read_text())
    return (
        tensors,
        config.get("quantization_config"),
        json.loads(beside.read_text()) if beside.exists() else None,
    )


def same_files(first, second):
    """Assert that two directories hold the same; returns the tensors."""
    (ours, *configs), (theirs, *others) = contents(first), contents(second)
    assert ours.keys() == theirs.keys()
    different = [key for key, tensor in theirs.items() if ours[key] != tensor]
    assert not different, different[:5]
    assert configs == others
    return ours


def indexed(directory):
    """Assert that the index names every tensor of every file; returns the names of the files."""
    directory = pathlib.Path(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert set(index.values()) == set(files) and set(index) == set(load_tensors(directory))
    return files


def logits(model):
    """Of two rows of tokens; hidden states of a model without a head."""
    with torch.no_grad():
        found = model(torch.arange(1, 25).reshape(2, 12), use_cache=False)
    return found.logits if "logits" in found else found.last_hidden_state
