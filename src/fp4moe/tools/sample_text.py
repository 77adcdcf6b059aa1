"""Text that every machine has: the running interpreter's standard library, in two fixed parts.

The small models of the tests are trained on one part; the other is what `evaluate` reads by
default.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sysconfig

from ..errors import refuse

__all__ = ["is_held_out", "standard_library_text"]

# Packages of others, tests, and files that are tables rather than text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"}
PARTS = 16


def is_held_out(path: pathlib.PurePath) -> bool:
    """Whether a file, relative to the standard library, belongs to the held-out part.

    The name of the top-level module decides, so that a package stays in one part, and a module that
    becomes a package in another Python stays where it was.
    """
    name = path.parts[0].removesuffix(".py")
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % PARTS == 0


def standard_library_text(held_out: bool = True, directory: str | None = None) -> list[bytes]:
    """Return the sources of one part, a file an item, in the order of their names.

    Args:
        held_out: the part for measuring (about one in 16 modules), or the rest, for training.
        directory: where the library is; default that of the running interpreter.

    Raises:
        UnsupportedError: there are no sources.
    """
    root = pathlib.Path(directory or sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        here = pathlib.Path(folder).relative_to(root)
        names += [here / name for name in files if name.endswith(".py")]
    texts = [(root / name).read_bytes() for name in sorted(names) if is_held_out(name) == held_out]
    texts = [text for text in texts if text.strip()]
    if not texts:
        reason = "it holds no Python sources of this part"
        refuse("evaluate", f"no text can be taken from {root}", reason, "Pass a text of your own.")
    return texts
