"""Writing a safetensors file whose tensors are known before any of them is there.

The header is written first, tensors in any order after it, each once. A file has its name only
when it is whole and on the disk: until then it is `<name>.<process id>.tmp`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Iterator

import torch

from ..errors import must
from .header import DTYPES, Spec, name_keys

__all__ = ["TEMPORARY", "ShardLayout", "copy_file", "sync_directory", "write_file", "write_shard"]

TEMPORARY = ".tmp"
COPIED = 1 << 20  # bytes of a file that are copied at a time
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Where the tensors of one file are.

    Attributes:
        name: name of the file.
        header: length and JSON, padded to 8 bytes: the first bytes of the file.
        places: key -> (first byte in the file, dtype, shape).
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    size: int

    @classmethod
    def of(cls, name: str, specs: dict[str, Spec]) -> ShardLayout:
        """Place the tensors as the safetensors library does: larger dtypes first, for alignment."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, position = {}, 0
        for key in sorted(specs, key=lambda key: (-specs[key][0].itemsize, key)):
            dtype, shape = specs[key]
            end = position + math.prod(shape) * dtype.itemsize
            entries[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
            offsets[key], position = position, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        places = {key: (start + offset, *specs[key]) for key, offset in offsets.items()}
        return cls(name, len(text).to_bytes(8, "little") + text, places, start + position)

    def is_finished(self, directory: str) -> bool:
        """Whether the file is there under its name, with this header and this size."""
        path = os.path.join(directory, self.name)
        if not os.path.isfile(path) or os.path.getsize(path) != self.size:
            return False
        with open(path, "rb") as file:
            return file.read(len(self.header)) == self.header


def write_shard(
    directory: str, layout: ShardLayout, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write one file from (key, tensor) pairs in any order, each of the layout once.

    Raises:
        ShapeError: a tensor is missing, repeated, unknown, or of another dtype or shape.
        OSError: the disk is full, read-only or gone; nothing of the file stays.
    """
    missing = dict(layout.places)
    with _new_file(os.path.join(directory, layout.name)) as file:
        _write(file, layout.header)
        for key, tensor in tensors:
            place = missing.pop(key, None)
            if place is None or place[1:] != (tensor.dtype, tuple(tensor.shape)):
                wanted = "a new key of the layout" if place is None else f"{place[1:]}"
                must(
                    f"write_shard: {key!r}",
                    f"be {wanted}",
                    f"{tensor.dtype} {list(tensor.shape)}",
                    "Make the layout from the same tensors.",
                )
            file.seek(place[0])
            _write(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if missing:
            must(
                "write_shard: tensors",
                f"fill {layout.name}",
                f"none for {name_keys(missing)}",
                "Make the layout from the same tensors.",
            )


def write_file(path: str, content: bytes) -> None:
    """Write a small file; it has its name only when it is whole and on the disk."""
    with _new_file(path) as file:
        _write(file, content)


def copy_file(source: str, path: str) -> None:
    """Copy a file; the copy has its name only when it is whole and on the disk."""
    with open(source, "rb") as old, _new_file(path) as new:
        while chunk := old.read(COPIED):
            _write(new, chunk)


def sync_directory(directory: str) -> None:
    """Wait until the names in a directory are on the disk."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[io.FileIO]:
    temporary = f"{path}.{os.getpid()}{TEMPORARY}"
    file = open(temporary, "wb", buffering=0)  # no buffer: closing it cannot fail a second time
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write(file: io.FileIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:  # one call writes at most 2 GiB
        left = left[file.write(left) :]
