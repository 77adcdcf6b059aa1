"""Float32 arithmetic as it is written, for comparisons, whatever the caller allows elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["float32_as_written", "without_autocast"]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep an ambient autocast from lowering products on that device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def float32_as_written(device: torch.device) -> Iterator[None]:
    """Without autocast on that device, and without TF32 or bfloat16 inside float32 products."""
    # Not torch.get_float32_matmul_precision, which raises once these were set.
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    settings = (torch.backends.cuda.matmul, onednn)
    before = [setting.fp32_precision for setting in settings]
    with without_autocast(device):
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                # "none" follows the setting above it, as before.
                setting.fp32_precision = "none"
                if setting.fp32_precision != value:
                    setting.fp32_precision = value
