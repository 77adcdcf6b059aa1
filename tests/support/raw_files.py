"""The bytes of a checkpoint's tensors."""

from __future__ import annotations

import torch


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
