"""Float32 arithmetic as it is written, for comparisons, whatever the caller allows elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .borrowed import Borrowed

__all__ = ["float32_as_written", "without_autocast"]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep an ambient autocast from lowering products on that device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _settings() -> tuple[Any, Any]:
    # Not torch.get_float32_matmul_precision, which raises once these were set.
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _set_ieee() -> list[str]:
    before = [setting.fp32_precision for setting in _settings()]
    for setting in _settings():
        setting.fp32_precision = "ieee"
    return before


def _put_back(before: list[str]) -> None:
    for setting, value in zip(_settings(), before, strict=True):
        # "none" follows the setting above it, as before.
        setting.fp32_precision = "none"
        if setting.fp32_precision != value:
            setting.fp32_precision = value


# These are settings of the process, not of the thread.
_ieee = Borrowed(_set_ieee, _put_back)


@contextlib.contextmanager
def float32_as_written(device: torch.device) -> Iterator[None]:
    """Without autocast on that device, and without TF32 or bfloat16 inside float32 products."""
    with without_autocast(device), _ieee.borrow():
        yield
