"""The directory of an unfinished run: whose it is, what of it is done, whether the rest fits.

Named `<dst>.partial`. A journal holds the arguments and the source's fingerprint; a weight file
that has its name is done (shard_file.py). config.json comes last, so nothing loads it before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError
from .files import CheckpointFiles
from .header import name_keys, read_json
from .shard_file import TEMPORARY, sync_directory, write_file

__all__ = ["JOURNAL", "check_space", "close_partial", "fingerprint", "open_partial", "was_closed"]

JOURNAL = "fp4moe_unfinished.json"


def fingerprint(files: CheckpointFiles, others: Collection[str]) -> str:
    """A hash of names, sizes and times of the source's files."""
    found = []
    for name in sorted({"config.json", *files.shards, *others}):
        info = os.stat(files.path(name))
        found.append((name, info.st_size, info.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def open_partial(partial: str, arguments: Mapping[str, Any], expected: Collection[str]) -> None:
    """Make the directory, or take over that of a killed run with the same arguments.

    Raises:
        CheckpointError: it is a run of something else, or holds files that are not `expected`.
    """
    if not os.path.isdir(partial):
        os.makedirs(partial)
        sync_directory(os.path.dirname(partial))
    # Files that a killed run had begun, and no others.
    begun = re.compile(rf"({'|'.join(map(re.escape, [JOURNAL, *expected]))})\.\d+{TEMPORARY}")
    old = {name for name in os.listdir(partial) if begun.fullmatch(name)}
    names = set(os.listdir(partial)) - old
    journal = os.path.join(partial, JOURNAL)
    if not names:
        write_file(journal, json.dumps(dict(arguments), indent=2).encode())
        names = {JOURNAL}
    before = read_json(journal) if JOURNAL in names else {}
    differing = sorted(key for key in arguments if before.get(key) != arguments[key])
    if differing or (others := names - set(expected) - {JOURNAL}):
        why = f"another {', '.join(differing)}" if differing else f"files {name_keys(others)}"
        raise CheckpointError(
            f"quantize_checkpoint: dst must be new, or have a partial run of the same arguments; "
            f"got {why} in {partial!r}. Call it as before, or remove that directory."
        )
    for name in old:
        os.remove(os.path.join(partial, name))


def check_space(partial: str, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CheckpointError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise CheckpointError(
            f"quantize_checkpoint: dst must have {needed} bytes free; got {free} at {partial!r}. "
            "Make room and call it again with the same arguments."
        )


def close_partial(partial: str, target: str) -> None:
    """Give the finished directory its name, then remove the journal."""
    sync_directory(partial)
    os.rename(partial, target)
    sync_directory(os.path.dirname(target))
    os.remove(os.path.join(target, JOURNAL))


def was_closed(target: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a run of these arguments was killed between its last two steps; ends it if so.

    Raises:
        CheckpointError: `target` exists and is anything else.
    """
    if not os.path.lexists(target):
        return False
    journal = os.path.join(target, JOURNAL)
    if not os.path.isfile(journal) or read_json(journal) != arguments:
        raise CheckpointError(
            f"quantize_checkpoint: dst must not exist yet; got {target!r}. Remove it, or choose "
            "another name."
        )
    os.remove(journal)
    return True
