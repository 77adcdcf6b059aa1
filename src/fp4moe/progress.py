"""Progress bars for a terminal; a log gets nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(over: Iterable[Any] | None = None, *, show: bool, **options: Any) -> tqdm:
    """Return tqdm's bar on stderr, silent unless `show` is true and stderr is a terminal.

    Args:
        over: what to go through, or None for a bar that the caller updates.
        show: whether the user wants a bar.
        **options: tqdm's own.
    """
    # None is tqdm's word for "not where the stream is no terminal".
    return tqdm(over, disable=None if show else True, **options)
