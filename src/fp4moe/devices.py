"""Whether a device that a user names is there."""

from __future__ import annotations

from typing import NoReturn

import torch

from .errors import UnsupportedError, must

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
        _absent(device, caller, error)
    if chosen.type == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or chosen.type != accelerator.type or (chosen.index or 0) >= count:
        _absent(device, caller)
    return chosen


def _absent(device: object, caller: str, cause: BaseException | None = None) -> NoReturn:
    there = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        there += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    rule = f"be one of this machine, {', '.join(there)}"
    advice = "Name one of these, or none for the GPU if there is one."
    must(f"{caller}: device", rule, repr(str(device)), advice, error=UnsupportedError, cause=cause)
