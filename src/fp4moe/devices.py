"""Whether a device that a user names is there."""

from __future__ import annotations

import torch

from .errors import UnsupportedError

__all__ = ["present_device"]


def present_device(device: torch.device | str | None, *, caller: str) -> torch.device:
    """Return a device of this machine: the one given, else the current CUDA device, else the CPU.

    Raises:
        UnsupportedError: it is no device, or not there.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise _absent(device, caller) from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or chosen.type != accelerator.type or (chosen.index or 0) >= count:
        raise _absent(device, caller)
    return chosen


def _absent(device: object, caller: str) -> UnsupportedError:
    there = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        there += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return UnsupportedError(
        f"{caller}: device must be one of this machine, {', '.join(there)}; got {str(device)!r}. "
        "Name one of these, or none for the GPU if there is one."
    )
