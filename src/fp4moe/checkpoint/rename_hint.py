"""What to do about keys that differ from the model's names by one part, such as a prefix."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Collection

__all__ = ["rename_hint"]

# Pairs are compared one by one; a part that differs shows in any few of them.
SAMPLE = 64


def rename_hint(
    unexpected: Collection[str], missing: Collection[str], name: Callable[[str], str]
) -> str:
    """Return the mapping that turns unexpected keys into all missing names, "" where none does.

    name: key -> its name in the model, as the class itself renames it.
    """
    heads = {_head(key): key for key in sorted(unexpected)}
    targets = {_head(entry) for entry in missing}
    pairs = collections.Counter(
        pair
        for key in list(heads.values())[:SAMPLE]
        for source in (key, name(key))
        if (pair := _pair(_head(source), targets))
    )
    for (pattern, new), _ in pairs.most_common(5):
        renamed = {_head(name(re.sub(pattern, new, key))): head for head, key in heads.items()}
        if targets <= set(renamed):
            first, mapping = min(targets), {pattern: new}
            return (
                f"its names differ from the model's, {renamed[first]!r} for {first!r}; pass "
                f"key_mapping={mapping!r} if it is a checkpoint of this very model"
            )
    return ""


def _head(name: str) -> str:
    """The module of experts that a name lies in, or the whole name: tools stack experts or not."""
    head, found, _ = f"{name}.".partition(".experts.")
    return f"{head}.experts" if found else name


def _pair(source: str, targets: Collection[str]) -> tuple[str, str] | None:
    """The pattern and its replacement that turn a key into the name that it resembles most.

    None where numbers differ: other layers are no other names.
    """
    old, new, suffix = source.split("."), [""], 0
    for target in sorted(targets):
        parts = target.split(".")
        count = _common(old[::-1], parts[::-1])
        if count > suffix:
            new, suffix = parts, count
    if not suffix:
        return None
    old, new = old[: len(old) - suffix], new[: len(new) - suffix]
    prefix = _common(old, new)
    if any(part.isdigit() for part in old[prefix:] + new[prefix:]):
        return None
    inner, outer = ("".join(f"{part}." for part in parts[prefix:]) for parts in (old, new))
    if inner and prefix:
        return rf"\.{re.escape(inner)}", f".{outer}"
    start = "".join(f"{part}." for part in old[:prefix])
    return f"^{re.escape(start + inner)}", start + outer


def _common(first: list[str], second: list[str]) -> int:
    """How many parts both begin with."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
