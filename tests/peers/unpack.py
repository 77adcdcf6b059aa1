"""Unpack the sources of wheels, without what is compiled: python unpack.py WHEELS TARGET."""

from __future__ import annotations

import pathlib
import sys
import zipfile

# SGLang looks for its CUDA sources when it is imported.
SOURCES = (".py", ".cu", ".cuh")


def unpack(wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Extract sources and metadata of one wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target, [n for n in names if n.endswith(SOURCES) or ".dist-info/" in n])


if __name__ == "__main__":
    wheels, target = map(pathlib.Path, sys.argv[1:])
    for wheel in sorted(wheels.glob("*.whl")):
        unpack(wheel, target)
