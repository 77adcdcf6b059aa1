"""The activations of an expert: one table, and how to recognise one from its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .errors import UnsupportedError, must

__all__ = ["ACTIVATIONS", "Activation", "get_activation", "identify_activation"]


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation; all of them map 0 to 0, so that zero padding is exact.

    Attributes:
        name: what schemas and options call it.
        function: the exact definition in torch, element by element.
        formula: the same for a reader.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]
    formula: str


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("silu", F.silu, "x * sigmoid(x)"),
        Activation("gelu_tanh", _gelu_tanh, "x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))"),
        Activation("gelu", F.gelu, "x/2 * (1 + erf(x / sqrt(2)))"),
        Activation("relu2", _relu2, "max(x, 0)^2"),
        Activation("relu", F.relu, "max(x, 0)"),
        Activation("identity", _identity, "x"),
    )
}


def get_activation(name: str, *, caller: str = "get_activation") -> Activation:
    """Return the activation of that name.

    Raises:
        UnsupportedError: no such activation; lists the known ones.
    """
    if name not in ACTIVATIONS:
        must(
            f"{caller}: activation",
            f"be one of {', '.join(ACTIVATIONS)}",
            repr(name),
            "Pass one of these names.",
            error=UnsupportedError,
        )
    return ACTIVATIONS[name]


def probe_values() -> torch.Tensor:
    """Return [1, 512] float32 in -40..40, dense near zero: clamps and both GELUs show."""
    wide = torch.linspace(-40.0, 40.0, 256, dtype=torch.float32, device="cpu")
    dense = torch.linspace(-4.0, 4.0, 256, dtype=torch.float32, device="cpu")
    return torch.cat((wide, dense)).reshape(1, -1)


def identify_activation(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Return the name of the activation that `function` computes, or None.

    Compared on float32 values in -40..40. The two GELUs differ by up to 4.7e-4, the limit is 2e-6
    of the largest value, about 16 float32 roundings.
    """
    probe = probe_values()
    with torch.no_grad():
        result = function(probe.clone())
        if not isinstance(result, torch.Tensor) or result.shape != probe.shape:
            return None
        for activation in ACTIVATIONS.values():
            expected = activation.function(probe)
            limit = 2e-6 * torch.clamp(expected.abs(), min=1.0)
            if bool(((result.float() - expected).abs() <= limit).all()):
                return activation.name
    return None
