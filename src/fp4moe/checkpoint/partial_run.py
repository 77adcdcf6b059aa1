"""The directory of an unfinished run: whose it is, what of it is done, whether the rest fits.

Named `<dst>.partial`. A journal holds the arguments and the source's fingerprint; a weight file
that has its name is done (safetensors_writer.py). config.json comes last, so nothing loads it
before. While a process writes there it holds a lock on a file, which the system lets go when it
dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any

from ..errors import CheckpointError, must, refuse
from .files import CheckpointFiles
from .header import name_keys, read_json, reading_for
from .safetensors_writer import TEMPORARY, sync_directory, write_file

__all__ = [
    "JOURNAL",
    "LOCK",
    "check_space",
    "check_target",
    "close_partial",
    "fingerprint",
    "locked",
    "open_partial",
    "was_closed",
]

JOURNAL, LOCK = "fp4moe_unfinished.json", "fp4moe_running.lock"
# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
logger = logging.getLogger("fp4moe")


def check_target(target: str) -> None:
    """Refuse what a rename cannot put a directory in place of; an empty directory is accepted.

    Raises:
        CheckpointError: it is there and not empty, a link, or where a disk is mounted.
    """
    if not os.path.lexists(target) or os.path.isfile(os.path.join(target, JOURNAL)):
        return
    if os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target):
        if not os.path.ismount(target):
            return
        must(
            "quantize_checkpoint: dst",
            "not be where a disk is mounted",
            repr(target),
            "Choose a name below it.",
            error=CheckpointError,
        )
    must(
        "quantize_checkpoint: dst",
        "not exist yet, or be an empty directory",
        repr(target),
        "Remove it, or choose another name.",
        error=CheckpointError,
    )


@contextlib.contextmanager
def locked(partial: str, target: str) -> Iterator[None]:
    """Keep other processes from writing the same checkpoint; makes the partial directory.

    Raises:
        CheckpointError: another process is at it, or see `check_target`.
    """
    while True:
        check_target(target)
        closed = os.path.isfile(os.path.join(target, JOURNAL))
        directory = target if closed else partial
        if not os.path.isdir(directory):
            os.makedirs(directory, exist_ok=True)
            sync_directory(os.path.dirname(directory))
        path = os.path.join(directory, LOCK)
        with open(path, "a+") as file:
            _lock(file, target)
            # Its last holder may have renamed or removed it meanwhile: then look again.
            if not _is_there(file, path) or closed != os.path.isfile(os.path.join(target, JOURNAL)):
                continue
            try:
                check_target(target)
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield
            finally:
                if _is_there(file, path):
                    os.remove(path)
            return


def _lock(file: IO[str], target: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        refuse(
            "quantize_checkpoint",
            f"{target!r} cannot be written",
            f"process {file.read().strip()} is writing it",
            "Wait for it, or end it: a call with the same arguments then goes on.",
            error=CheckpointError,
            cause=error,
        )
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "quantize_checkpoint: the file system of %r has no locks; let no other process write "
            "there",
            target,
        )


def _is_there(file: IO[str], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def fingerprint(files: CheckpointFiles, others: Collection[str]) -> str:
    """A hash of names, sizes and times of the source's files."""
    found = []
    for name in sorted({"config.json", *files.shards, *others}):
        info = os.stat(files.path(name))
        found.append((name, info.st_size, info.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def open_partial(partial: str, arguments: Mapping[str, Any], expected: Collection[str]) -> None:
    """Begin in the directory, or take over that of a killed run with the same arguments.

    Raises:
        CheckpointError: it is a run of something else, or holds files that are not `expected`.
    """
    # Files that a killed run had begun, and no others.
    begun = re.compile(rf"({'|'.join(map(re.escape, [JOURNAL, *expected]))})\.\d+{TEMPORARY}")
    old = {name for name in os.listdir(partial) if begun.fullmatch(name)}
    names = set(os.listdir(partial)) - old - {LOCK}
    journal = os.path.join(partial, JOURNAL)
    if not names:
        write_file(journal, json.dumps(dict(arguments), indent=2).encode())
        names = {JOURNAL}
    with reading_for("quantize_checkpoint"):
        before = read_json(journal) if JOURNAL in names else {}
    differing = sorted(key for key in arguments if before.get(key) != arguments[key])
    if differing or (others := names - set(expected) - {JOURNAL}):
        why = f"another {', '.join(differing)}" if differing else f"files {name_keys(others)}"
        must(
            "quantize_checkpoint: dst",
            "be new, or have a partial run of the same arguments",
            f"{why} in {partial!r}",
            "Call it as before, or remove that directory.",
            error=CheckpointError,
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
        refuse(
            "quantize_checkpoint",
            f"the weights cannot be written to {partial!r}",
            f"they need {needed} bytes and {free} are free",
            "Make room and call it again with the same arguments.",
            error=CheckpointError,
        )


def close_partial(partial: str, target: str) -> None:
    """Give the finished directory its name, then remove the lock and, last, the journal."""
    sync_directory(partial)
    os.rename(partial, target)
    sync_directory(os.path.dirname(target))
    _clear(target)


def was_closed(target: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a run of these arguments was killed between its last two steps; ends it if so.

    Raises:
        CheckpointError: it was a run of other arguments.
    """
    journal = os.path.join(target, JOURNAL)
    if not os.path.isfile(journal):
        return False
    with reading_for("quantize_checkpoint"):
        before = read_json(journal)
    if before != arguments:
        must(
            "quantize_checkpoint: dst",
            "not exist yet",
            repr(target),
            "Remove it, or choose another name.",
            error=CheckpointError,
        )
    _clear(target)
    return True


def _clear(target: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(target, LOCK))
    os.remove(os.path.join(target, JOURNAL))
