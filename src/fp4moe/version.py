"""Versions, readable without torch: that of fp4moe, and of installed packages."""

from __future__ import annotations

import importlib.metadata

__version__ = "0.2.0"


def installed(package: str) -> str | None:
    """Return the version of an installed distribution without its local part, or None."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None
