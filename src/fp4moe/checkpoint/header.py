"""The header of a safetensors file and the JSON files beside it, checked before anything uses them.

The format is the one of the safetensors README: 8 bytes of little-endian length, that many bytes
of JSON, then the data, which the tensors cover without holes or overlaps.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import json
import math
import os
import stat
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NoReturn

import torch

from ..errors import CheckpointError, must

__all__ = ["DTYPES", "Spec", "name_keys", "read_header", "read_json", "reading_for", "refuse_file"]

# The function that the user called: it opens the file that is read now.
READER = contextvars.ContextVar("READER", default="from_pretrained")
Spec = tuple[torch.dtype, tuple[int, ...]]

# The limit of the safetensors library; a longer "header" is an attack or another kind of file.
MAX_JSON_BYTES = 100_000_000
MAX_AXES = 64
MAX_ELEMENTS = 2**63 - 1

# The dtypes that are whole bytes and that torch has; F4 and F6 are none of them.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@contextlib.contextmanager
def reading_for(caller: str) -> Iterator[None]:
    """Let the errors of reading begin with the function that the user called."""
    token = READER.set(caller)
    try:
        yield
    finally:
        READER.reset(token)


def refuse_file(argument: str, rule: str, got: object, fix: str) -> NoReturn:
    """Raise the CheckpointError of opening a checkpoint."""
    must(f"{READER.get()}: {argument}", rule, got, f"{fix}.", error=CheckpointError)


def name_keys(keys: Collection[str]) -> str:
    """The count of the keys and the first ten, quoted."""
    shown = ", ".join(repr(key) for key in sorted(keys)[:10])
    more = ", ..." if len(keys) > 10 else ""
    return f"{len(keys)} ({shown}{more})"


def read_json(path: str) -> dict[str, Any]:
    """Read a file that holds one JSON object without repeated keys.

    Raises:
        CheckpointError: it cannot be read, is too long, or is anything else.
    """
    name = os.path.basename(path)
    with _opened(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        refuse_file(name, f"have at most {MAX_JSON_BYTES} bytes", "more", "Download it again")
    return _parse(name, data)


def read_header(path: str) -> dict[str, Spec]:
    """Read and check the header of a safetensors file.

    Returns:
        Key -> (dtype, shape), in the order of the header.

    Raises:
        CheckpointError: anything about the header or the length of the file is not right.
    """
    name = os.path.basename(path)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_JSON_BYTES, size - 8):
            got = f"{size} bytes and a header of {length}"
            refuse_file(name, "be a complete safetensors file", got, "Download it again")
        data = file.read(length)
    if data[:1] != b"{":
        refuse_file(name, "have a header that begins with {", repr(data[:1]), "Download it again")
    header = _parse(name, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        got = repr(metadata)[:100]
        refuse_file(name, "have a __metadata__ of strings", got, "Write it with safetensors")
    specs: dict[str, Spec] = {}
    places: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        dtype, shape, begin, end = _entry(name, key, entry)
        specs[key] = (dtype, shape)
        places.append((begin, end, key))
    position = 0
    for begin, end, key in sorted(places):
        if begin != position:
            rule = f"hold tensors without holes or overlaps; {key!r} must begin at byte {position}"
            refuse_file(name, rule, begin, "Download it again")
        position = end
    if position != size - 8 - length:
        rule = f"hold {position} bytes of data, as its header says"
        refuse_file(name, rule, size - 8 - length, "Download it again")
    return specs


def _entry(name: str, key: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Check one tensor's entry; returns its dtype, shape, first byte and last byte + 1."""
    fix = "Download it again, or write it with safetensors"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse_file(f"{name}: {key!r}", "have dtype, shape, data_offsets", repr(entry)[:100], fix)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        rule = f"have a dtype of {', '.join(DTYPES)}"
        refuse_file(f"{name}: the dtype of {key!r}", rule, repr(entry["dtype"])[:100], fix)
    shape, offsets = entry["shape"], entry["data_offsets"]
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        # bool is an int in Python, but not in JSON.
        plain = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not plain or (field == "data_offsets" and len(numbers) != 2):
            got = repr(numbers)[:100]
            refuse_file(f"{name}: the {field} of {key!r}", "be integers of 0 or more", got, fix)
    # Zeros are left out: torch multiplies the other sizes for the strides.
    if len(shape) > MAX_AXES or math.prod(n for n in shape if n) > MAX_ELEMENTS:
        rule = f"have at most {MAX_AXES} axes and {MAX_ELEMENTS} elements"
        refuse_file(f"{name}: the shape of {key!r}", rule, repr(shape)[:100], fix)
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        rule = f"take {math.prod(shape) * dtype.itemsize} bytes, as its shape and dtype say"
        refuse_file(f"{name}: {key!r}", rule, f"bytes {begin} to {end}", fix)
    return dtype, tuple(shape), begin, end


def _parse(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # both of JSON and of UTF-8 are ValueErrors
        must(
            f"{READER.get()}: {name}",
            "hold JSON without repeated keys",
            str(error)[:200],
            "Download it again.",
            error=CheckpointError,
            cause=error,
        )
    if not isinstance(value, dict):
        refuse_file(name, "hold a JSON object", type(value).__name__, "Download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"repeated keys {name_keys({k for k, n in counts.items() if n > 1})}")
    return found


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a regular file once; what cannot be read becomes a CheckpointError."""
    try:
        # A pipe would wait for ever, a device has no end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            refuse_file(
                repr(os.path.basename(path)), "be a regular file", "something else", "Remove it"
            )
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        must(
            f"{READER.get()}: {os.path.basename(path)!r}",
            "be a readable file",
            error,
            "Check that the download is complete.",
            error=CheckpointError,
            cause=error,
        )
