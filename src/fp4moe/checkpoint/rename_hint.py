"""What to do about keys that differ from the model's names by one part, such as a prefix."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection

__all__ = ["rename_hint"]

# Pairs are compared one by one; a part that differs shows in any few of them.
SAMPLE = 64


def rename_hint(unexpected: Collection[str], missing: Collection[str]) -> str:
    """Return advice that maps the unexpected keys to all missing names, "" where none does."""
    sources, targets = ({_head(name) for name in names} for names in (unexpected, missing))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for source in sorted(sources)[:SAMPLE]:
        if pair := _pair(source, targets):
            counts[pair] += 1
    for (pattern, new), _ in counts.most_common(3):
        renamed = {re.sub(pattern, new, source): source for source in sources}
        if targets <= set(renamed):
            name = min(targets)
            return (
                f"its names differ from the model's, {renamed[name]!r} for {name!r}; pass "
                f"key_mapping={ {pattern: new}!r} if it is a checkpoint of this very model"
            )
    return ""


def _head(name: str) -> str:
    """The module of experts that a name lies in, or the whole name: tools stack experts or not."""
    head, found, _ = f"{name}.".partition(".experts.")
    return f"{head}.experts" if found else name


def _pair(source: str, targets: Collection[str]) -> tuple[str, str] | None:
    """The pattern and its replacement that turn a key into the name that it resembles most."""
    old, best, suffix = source.split("."), [""], 0
    for target in targets:
        new = target.split(".")
        count = _common(old[::-1], new[::-1])
        if (count, target) > (suffix, ".".join(best)):
            best, suffix = new, count
    if not suffix:
        return None
    old, new = old[: len(old) - suffix], best[: len(best) - suffix]
    prefix = _common(old, new)
    inner, outer = ".".join(old[prefix:]), ".".join(new[prefix:])
    if inner and prefix:
        return rf"\.{re.escape(inner)}\.", f".{outer}." if outer else "."
    start = "".join(f"{part}." for part in old[:prefix])
    inner = f"{inner}." if inner else ""
    return f"^{re.escape(start + inner)}", f"{start}{outer}." if outer else start


def _common(first: list[str], second: list[str]) -> int:
    """How many parts both begin with."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
