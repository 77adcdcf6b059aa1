"""What the epilogues compute, restated in float32 numpy in the order of the machine code.

x0 ("up") and x1 ("gate") are raw accumulators with their bias. Every operation is rounded to
float32; tanh, exp2 and the reciprocal are approximate in hardware and rounded to nearest here, as
in the simulated warp.
"""

from __future__ import annotations

import math

import numpy as np

from .values import E4M3, fused, nearest, special

__all__ = ["GATED", "gated", "mxfp8", "nvfp4", "phi_gelu_tanh", "phi_sigmoid", "relu2"]

F = np.float32
LOG2_E = F(math.log2(math.e))
CUBIC, SLOPE = F(0.044715), F(math.sqrt(2 / math.pi))


def phi_gelu_tanh(gate: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3))) / 2 of u = gate * factor."""
    u = gate * factor
    inner = fused(u, u * (u * CUBIC), u) * SLOPE
    return (special("TANH", inner) + F(1)) * F(0.5)


def phi_sigmoid(gate: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-u)) of u = gate * factor."""
    power = special("EX2", gate * (factor * LOG2_E) * F(-1))
    return special("RCP", power + F(1))


# By the activation's name in the file names of the kernels.
GATED = {"geGlu": phi_gelu_tanh, "swiGlu": phi_sigmoid}


def gated(activation: str, up: np.ndarray, gate: np.ndarray, given: dict[str, float]) -> np.ndarray:
    """Return scale_gate * (up + beta) * gate * phi(alpha * scale_gate * gate), both clamped.

    The limit holds for gate from above only; it, beta and the biases are in the units of the raw
    accumulators. Kernels of MX formats have no scale_gate: it is 1.
    """
    alpha, beta, limit = (F(given[name]) for name in ("alpha", "beta", "limit"))
    scale = F(given.get("scale_gate", 1.0))
    gate = np.where(gate > limit, limit, gate)
    up = np.clip(up, -limit, limit)
    return fused(up, scale, scale * beta) * (gate * GATED[activation](gate, scale * alpha))


def relu2(x: np.ndarray, given: dict[str, float]) -> np.ndarray:
    """Return relu(scale_act * x)^2; 0 where x is NaN."""
    positive = np.fmax(x * F(given.get("scale_act", 1.0)), F(0))
    return positive * positive


def nvfp4(block: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what is rounded to E2M1, and to the E4M3 block scale, of block [16, ...] * factor."""
    amax = np.fmax.reduce(np.abs(block))
    wanted = amax * F(factor) * F(1 / 6)
    scale = E4M3[nearest(wanted, E4M3)].astype(F)
    reciprocal = np.where(scale == 0, F(0), special("RCP", scale))
    return block * reciprocal * F(factor), wanted


def mxfp8(block: np.ndarray, other: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what is rounded to E4M3, and the block scale, of the 16 or 32 values of a warp.

    The scale is 2^(floor(log2(amax)) - 8): values of a block reach 512 and saturate at 448. `other`
    is the largest magnitude that another warp found in its half of the block.
    """
    amax = np.fmax(np.fmax.reduce(np.abs(block)), F(other))
    exponent = np.frexp(amax)[1] - 1
    scale = np.where(amax > 0, np.ldexp(F(1), exponent - 8), F(0))
    reciprocal = np.where(amax > 0, np.ldexp(F(1), 8 - exponent), F(0))
    return block * reciprocal, scale
