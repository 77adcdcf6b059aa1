"""What a register of the simulated warp holds, and arithmetic on it in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = [
    "E2M1",
    "E4M3",
    "Value",
    "apply",
    "float_value",
    "fused",
    "nearest",
    "special",
    "unknown",
]

# Magnitudes by code.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [
        (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
    ]
)[:127]
_ERF = np.vectorize(math.erf, otypes=[np.float64])
SPECIAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "TANH": np.tanh,
    "EX2": np.exp2,
    "RCP": np.reciprocal,
    # Not in the hardware: for the test that plants the other form of GELU.
    "ERF": _ERF,
}


@dataclass(frozen=True, eq=False)
class Value:
    """32 bits for each of 32 lanes and for each sample.

    `bits` is uint32, [32, samples] or []; None where an instruction is not simulated. `parameters`
    are the offsets of the kernel's parameters that went into an address.
    """

    bits: np.ndarray | None
    parameters: frozenset[int] = frozenset()

    @property
    def floats(self) -> np.ndarray:
        """The bits as float32."""
        assert self.bits is not None
        return self.bits.view(np.float32)


def float_value(x: np.ndarray | float) -> Value:
    """Return the value of float32 x."""
    return Value(np.asarray(x, np.float32).view(np.uint32))


def unknown(*sources: Value) -> Value:
    """Return a value of unknown bits that keeps the parameters of its sources."""
    return Value(None, frozenset().union(*(source.parameters for source in sources)))


def apply(function: Callable[..., np.ndarray], *sources: Value) -> Value:
    """Return the function of the sources' floats, unknown where one of them is."""
    if any(source.bits is None for source in sources):
        return unknown(*sources)
    return float_value(function(*(source.floats for source in sources)))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c of float32 as FFMA does, but for the rare double rounding of float64."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def special(function: str, x: np.ndarray) -> np.ndarray:
    """Return MUFU's function of float32 x, rounded to nearest: the hardware's is approximate."""
    return SPECIAL[function](x.astype(np.float64)).astype(np.float32)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the codes of |x| on a grid: a tie goes to the even code, what is above to the last."""
    magnitude = np.abs(x.astype(np.float64))
    middle = (grid[1:] + grid[:-1]) / 2
    code = np.searchsorted(middle, magnitude, side="left")
    tie = (code < len(middle)) & (magnitude == middle[np.minimum(code, len(middle) - 1)])
    return code + (tie & (code % 2 == 1))
