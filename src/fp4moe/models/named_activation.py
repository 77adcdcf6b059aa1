"""What stands between two GEMMs, by its numbers; of what is none of ours, the closest."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..activations import ACTIVATIONS, Activation, identify_activation, probe_values, recognise

__all__ = ["named_activation", "rms_error"]


def named_activation(
    combine: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor], gated: bool
) -> tuple[str | None, str]:
    """Return (activation, "") of what stands between two GEMMs, or (None, the closest and how far).

    combine: (gate, up) float32 [1, N] -> [1, N]; gate is None where not gated.
    """
    if gated:
        found = recognise(combine)
        name = None if found is None else str(found)
    else:
        name = identify_activation(lambda x: combine(None, x))
    if name is not None:
        return name, ""
    up = probe_values()
    gate = up.flip(-1) if gated else None
    with torch.no_grad():
        result = combine(gate, up.clone())
    inner = up if gate is None else gate
    near = inner.abs() <= 4
    form = "act(gate) * up" if gated else "act(up)"
    if result.shape != up.shape:
        return None, f"is of shape {list(result.shape)}, not {form}"
    expected = {name: Activation(name).combine(up, gate) for name in ACTIVATIONS}
    # Far values must not hide which activation it is.
    closest = min(expected, key=lambda name: rms_error(result[near], expected[name][near]))
    error = rms_error(result, expected[closest])
    return None, (
        f"is not {form} with one of our activations; closest is {closest}, relative error "
        f"{error:.2g} (a norm, a clamp or a variant?)"
    )


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return RMS of the difference over that of expected; infinite for NaN and other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    difference, size = (actual.float() - expected.float()).norm(), expected.float().norm()
    error = float(difference / size) if bool(size != 0) else float(difference)
    return error if error == error else float("inf")
