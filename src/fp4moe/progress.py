"""Progress bars for a terminal; a log gets nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from .borrowed import Borrowed

__all__ = ["progress_bar", "transformers_bars"]


def progress_bar(over: Iterable[Any] | None = None, *, show: bool, **options: Any) -> tqdm:
    """Return tqdm's bar on stderr, silent unless `show` is true and stderr is a terminal.

    Args:
        over: what to go through, or None for a bar that the caller updates.
        show: whether the user wants a bar.
        **options: tqdm's own.
    """
    # None is tqdm's word for "not where the stream is no terminal".
    return tqdm(over, disable=None if show else True, **options)


def _hide_transformers_bars() -> Callable[[], object]:
    from huggingface_hub import utils
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        return lambda: None
    # transformers hides and shows the bars of downloads with its own.
    hub_hidden = utils.are_progress_bars_disabled()
    logging.disable_progress_bar()

    def show_again() -> None:
        logging.enable_progress_bar()
        if hub_hidden:
            utils.disable_progress_bars()

    return show_again


_hidden = Borrowed(_hide_transformers_bars, lambda show_again: show_again())


def transformers_bars() -> contextlib.AbstractContextManager[Any]:
    """Keep transformers' own bars to terminals, too, inside the context."""
    return contextlib.nullcontext() if sys.stderr.isatty() else _hidden.borrow()
