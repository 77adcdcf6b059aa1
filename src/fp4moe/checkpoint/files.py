"""The files of a Hugging Face checkpoint directory: opened fail-closed, read one tensor at a time.

Only safetensors and JSON are read. Pickle files are never opened, Python files never imported.
Not handled here: what the tensors mean (quantisation formats, module names).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from ..errors import CheckpointError, must
from .header import READER, Spec, name_keys, read_header, read_json, reading_for, refuse_file

__all__ = ["INDEX", "PICKLES", "WEIGHTS", "CheckpointFiles"]

logger = logging.getLogger("fp4moe")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The shards of save_pretrained; other files, such as consolidated.safetensors, may be there.
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointFiles:
    """An opened checkpoint directory. Use `CheckpointFiles.open`, best in a `with` statement.

    Attributes:
        directory: the directory, as given.
        config: content of config.json.
        quantization: content of hf_quant_config.json, or else the "quantization_config" of
            config.json or of its text_config; None where there is none.
        shapes: key -> (dtype, shape) of every tensor.
        shards: file name -> its keys, both in the order of the index.
    """

    directory: str
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    shapes: Mapping[str, Spec]
    shards: Mapping[str, list[str]]

    def __init__(
        self,
        directory: str,
        config: dict[str, Any],
        quantization: dict[str, Any] | None,
        specs: dict[str, dict[str, Spec]],
        caller: str = "from_pretrained",
    ) -> None:
        self.caller = caller
        self.directory, self.config, self.quantization = directory, config, quantization
        self.shapes = MappingProxyType({k: s for shard in specs.values() for k, s in shard.items()})
        self.shards = MappingProxyType({name: list(shard) for name, shard in specs.items()})
        self._shard_of = {key: name for name, shard in specs.items() for key in shard}
        self._open: dict[str, Any] = {}

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], *, caller: str = "from_pretrained"
    ) -> CheckpointFiles:
        """Open a directory as `save_pretrained` or a hub download leaves it.

        Read are config.json, hf_quant_config.json, and model.safetensors or, where there is none,
        the files of model.safetensors.index.json. Links are followed, as transformers does: they
        belong to whoever made the directory. An index, which belongs to the checkpoint, names only
        files of the directory itself.

        Raises:
            CheckpointError: something is missing, extra, damaged, unsafe or not safetensors. All
                headers are checked; nothing has been read of the tensors.
        """
        with reading_for(caller):
            return cls._open_directory(os.fspath(directory), caller)

    @classmethod
    def _open_directory(cls, root: str, caller: str) -> CheckpointFiles:
        if not os.path.isdir(root):
            refuse_file("directory", "be an existing directory", repr(root), "Check the path")
        config = read_json(_resolve(root, "config.json"))
        quantization: dict[str, Any] | None
        if _exists(root, "hf_quant_config.json"):
            quantization = read_json(_resolve(root, "hf_quant_config.json"))
        else:
            quantization = config.get("quantization_config")
            text = config.get("text_config")
            if quantization is None and isinstance(text, dict):
                quantization = text.get("quantization_config")
        if not isinstance(quantization, dict | None):
            got = repr(quantization)[:100]
            refuse_file("quantization_config", "be a JSON object", got, "Check config.json")
        return cls(root, config, quantization, _read_specs(root), caller)

    def tensor(self, key: str) -> torch.Tensor:
        """Map one tensor into memory, as stored: no cast, no expansion, nothing read until used.

        Raises:
            CheckpointError: there is no such key, or the file has changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        name = self._shard_of.get(key)
        if name is None:
            must(
                f"{self.caller}: key",
                "be in the checkpoint",
                repr(key),
                "Look it up in shapes.",
                error=CheckpointError,
            )
        try:
            if name not in self._open:
                self._open[name] = safe_open(_resolve(self.directory, name), framework="pt")
            tensor = self._open[name].get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            must(
                f"{self.caller}: {name!r}",
                f"be readable by safetensors for {key!r}",
                error,
                "Download it again.",
                error=CheckpointError,
                cause=error,
            )
        if (tensor.dtype, tuple(tensor.shape)) != self.shapes[key]:
            must(
                f"{self.caller}: {key!r}",
                f"be {self.shapes[key]} as when it was opened",
                (tensor.dtype, tuple(tensor.shape)),
                "Open the checkpoint again.",
                error=CheckpointError,
            )
        return tensor

    def shard_of(self, key: str) -> str:
        """The name of the file that holds a key of `shapes`."""
        return self._shard_of[key]

    def path(self, name: str) -> str:
        """The path of a file of the directory that may be copied.

        Refused is a link to where none of the checkpoint's own files lies: a copy of what it leads
        to may be published.
        """
        path = _resolve(self.directory, name)
        own = {os.path.join(self.directory, file) for file in ("config.json", *self.shards)}
        homes = {os.path.dirname(os.path.realpath(file)) for file in own}
        homes.add(os.path.realpath(self.directory))
        if os.path.dirname(os.path.realpath(path)) not in homes:
            rule = "lie in the directory, or where config.json or the weights lie"
            refuse_file(repr(name), rule, "a link elsewhere", "Copy the file into the directory")
        return path

    def release(self, shard: str) -> None:
        """Forget the mapping of one file; its memory goes when no tensor of it is left."""
        self._open.pop(shard, None)

    def close(self) -> None:
        """Forget the mappings of all files. Tensors already handed out stay valid."""
        self._open.clear()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_specs(root: str) -> dict[str, dict[str, Spec]]:
    """File name -> key -> (dtype, shape), of the single file or of those in the index."""
    shards = {name for name in os.listdir(root) if SHARD.fullmatch(name)}
    if _exists(root, WEIGHTS):
        # transformers' rule; an index beside it is left over from a merge, or names just this file.
        if shards:
            logger.warning(
                "%s: %s is read, as transformers does; not read are the shards beside it: %s",
                READER.get(),
                WEIGHTS,
                name_keys(shards),
            )
        return {WEIGHTS: read_header(_resolve(root, WEIGHTS))}
    if not _exists(root, INDEX):
        _no_weights(root)
    weight_map = read_json(_resolve(root, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = repr(weight_map)[:100]
        refuse_file(INDEX, "have a weight_map from keys to file names", got, "Download it again")
    planned: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            got = repr(name)[:100]
            refuse_file(INDEX, f"name a file for {key!r}", got, "Download it again")
        planned.setdefault(name, []).append(key)
    if stale := shards - set(planned):
        refuse_file(
            INDEX, "name every shard", f"others beside it {name_keys(stale)}", "Remove the stale"
        )
    paths = {name: _resolve(root, name) for name in planned}
    found = {name: read_header(path) for name, path in paths.items()}
    _compare(planned, found)
    return {name: {key: found[name][key] for key in keys} for name, keys in planned.items()}


def _compare(planned: dict[str, list[str]], found: dict[str, dict[str, Spec]]) -> None:
    """Refuse files whose keys are not exactly those that the index says."""
    seen: dict[str, int] = {}
    for header in found.values():
        for key in header:
            seen[key] = seen.get(key, 0) + 1
    if twice := [key for key, count in seen.items() if count > 1]:
        refuse_file(
            "files", "hold each key once", f"in two or more: {name_keys(twice)}", "Keep one file"
        )
    for name, keys in planned.items():
        missing, extra = set(keys) - set(found[name]), set(found[name]) - set(keys)
        if missing or extra:
            got = f"missing {name_keys(missing)}, not in the index {name_keys(extra)}"
            rule = "hold exactly the keys that the index says"
            refuse_file(repr(name), rule, got, "Download the files and the index of one revision")


def _exists(root: str, name: str) -> bool:
    # lexists: a dangling link is a broken download, not an absent file.
    return os.path.lexists(os.path.join(root, name))


def _resolve(root: str, name: str) -> str:
    """The path of a regular file that the directory holds, itself or as a link."""
    plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and name not in ("", ".", "..")
    if not plain:
        refuse_file(
            "file names", "be plain names in the directory", repr(name), "Do not use this file"
        )
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        got = "no such file"
        if os.path.islink(path):
            got = f"a link to {os.path.realpath(path)!r}, where there is none"
        refuse_file(repr(name), "be there as a file", got, "Download it again")
    return path


def _no_weights(root: str) -> None:
    names = sorted(os.listdir(root))
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        rule = "hold safetensors; pickle files can run code and are never opened"
        fix = "Convert it with save_pretrained(safe_serialization=True) where you trust it"
        refuse_file("directory", rule, f"files {name_keys(pickles)}", fix)
    others = [name for name in names if name.endswith(".safetensors")]
    got = f"other safetensors files {name_keys(others)}" if others else "none"
    refuse_file("directory", f"hold {WEIGHTS} or {INDEX}", got, "Check the path and the download")
