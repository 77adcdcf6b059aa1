"""Compare the epilogue of a kernel, run by the simulated warp, with the formulas, bit for bit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from . import formulas
from .listing import Listing
from .warp import Warp

__all__ = ["FAMILIES", "SETTINGS", "Family", "Findings", "examine"]


@dataclass(frozen=True)
class Family:
    """The kernels of one first GEMM: its formats and its activation.

    Args:
        types: how their file names begin: output, weights and input, and more where needed.
        activation: "geGlu", "swiGlu" or "relu2".
        count: how many there are in the wheel.
    """

    types: str
    activation: str
    count: int

    @property
    def output(self) -> str:
        """The format that the outputs are converted to."""
        return "E2M1" if self.types.startswith("E2m1") else "E4M3"

    @property
    def block_scale(self) -> str | None:
        """The format that their block scales are converted to; None where there are none."""
        if self.output == "E2M1":
            return "E4M3"
        return "E8" if self.types.startswith("Mx") else None

    @property
    def gated(self) -> bool:
        """Whether up and gate are among the rows."""
        return self.activation in formulas.GATED

    @property
    def parameters(self) -> set[str]:
        """Which floats the epilogue reads; MX formats have no scale but the block scales."""
        names = {"alpha", "beta", "limit"} if self.gated else set()
        if self.block_scale == "E8":
            return names
        return names | {"scale_c", "scale_gate" if self.gated else "scale_act"}

    @property
    def has_token_scale(self) -> bool:
        """Whether accumulators are multiplied by a scale per token; else a bias is added."""
        return "Btok" in self.types


FAMILIES = [
    Family("E2m1_E2m1E2m1", "geGlu", 57),
    Family("E2m1_E2m1E2m1", "swiGlu", 45),
    Family("E2m1_E2m1E2m1", "relu2", 57),
    Family("E4m3_E4m3E4m3_Fp32_BtokBfloat16", "swiGlu", 40),
    Family("E4m3_E4m3E4m3_Fp32_BtokBfloat16", "relu2", 40),
    Family("E4m3_MxE2m1E4m3", "swiGlu", 20),
    Family("E4m3_MxE2m1E4m3", "relu2", 20),
    Family("MxE4m3_MxE4m3MxE4m3", "swiGlu", 200),
    Family("MxE4m3_MxE4m3MxE4m3", "relu2", 200),
    Family("MxE4m3_MxE2m1MxE4m3", "swiGlu", 200),
    Family("MxE4m3_MxE2m1MxE4m3", "relu2", 200),
]

PLAIN = {
    "scale_c": 0.37,
    "scale_act": 0.3,
    "scale_gate": 0.4,
    "alpha": 1.0,
    "beta": 0.0,
    "limit": float(np.finfo(np.float32).max),
}
# The parameters, what shared memory holds (None: what changes nothing), and the share of NaN.
SETTINGS: dict[str, tuple[dict[str, float], float | None, float]] = {
    "plain": (PLAIN, None, 0.0),
    "alpha and beta": (PLAIN | {"alpha": 1.702, "beta": 0.7}, None, 0.0),
    "limit": (PLAIN | {"limit": 1.5}, None, 0.0),
    "shared": (PLAIN | {"limit": 1.5, "beta": 0.7}, 0.25, 0.0),
    "nan": (PLAIN, None, 0.01),
}


@dataclass
class Findings:
    """What was found in one kernel.

    Args:
        wrong: settings in which an output or a block scale differs from the formula in any bit.
        parameters: which floats it reads.
        block_scales: the least and the largest before they are rounded, in the plain setting.
    """

    wrong: list[str] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)
    block_scales: tuple[float, float] | None = None


def examine(text: str, family: Family) -> Findings:
    """Run a kernel's epilogue in each of `SETTINGS` and compare.

    Args:
        text: what nvdisasm prints.
    """
    listing = Listing(text)
    path = listing.path_to(listing.conversions(family.output)[-1])
    findings = Findings()
    for setting, (every, shared, nan_share) in SETTINGS.items():
        given = {name: value for name, value in every.items() if name in family.parameters}
        if shared is None:
            shared = 1.0 if family.has_token_scale else 0.0
        warp = Warp(given, samples=24, shared=shared, nan_share=nan_share).run(path)
        with np.errstate(all="ignore"):
            outputs, scales = _expected(warp, family, given, shared)
        same = _bits(outputs) == _converted(warp, family.output)
        if family.block_scale:
            same &= _bits((x,) for x in scales) == _converted(warp, family.block_scale, single=True)
        findings.parameters |= warp.used
        if not same:
            findings.wrong.append(setting)
        if setting == "plain" and scales:
            findings.block_scales = float(np.min(scales)), float(np.max(scales))
    return findings


def _converted(warp: Warp, kind: str, *, single: bool = False) -> Counter[bytes | None]:
    """Count the operands of conversions by their bits, as pairs or single; None is unknown."""
    pairs = [(high, low) for name, high, low in warp.conversions if name == kind]
    groups = [(value,) for pair in pairs for value in pair] if single else pairs
    known = [group for group in groups if all(value.bits is not None for value in group)]
    counts: Counter[bytes | None] = Counter(
        _bits(tuple(value.floats for value in group) for group in known)
    )
    return counts + Counter({None: len(groups) - len(known)})


def _bits(groups: Iterable[tuple[np.ndarray, ...]]) -> Counter[bytes | None]:
    counts: Counter[bytes | None] = Counter()
    for group in groups:
        stacked = np.stack(np.broadcast_arrays(*group)).astype(np.float32)
        # A NaN is a NaN, whatever its bits.
        stacked[np.isnan(stacked)] = np.nan
        counts[stacked.tobytes()] += 1
    return counts


def _expected(
    warp: Warp, family: Family, given: dict[str, float], shared: float
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Return (high, low) of each conversion, in any order, and the block scales.

    LDTM.16dp256bit gives lane l, in registers 4 j and 4 j + 1, two columns (tokens) of row l // 4,
    in 4 j + 2 and 4 j + 3 the same of row l // 4 + 8. Two of them fetch 32 rows of the GEMM.
    """
    pairs, scales = [], []
    fetched = iter(warp.accumulators)
    for (row, column, first), (row_16, column_16, second) in zip(fetched, fetched, strict=True):
        # Where both are 0 the address is in a register; the order is the same.
        if (row, row_16) not in ((0, 16), (0, 0)) or column != column_16:
            raise ValueError("two LDTM must fetch rows 0 to 15 and 16 to 31 of the same columns")
        for register, token in itertools.product(range(0, len(first), 4), (0, 1)):
            places = (register + token, register + token + 2)
            # Rows i, i + 8, i + 16 and i + 24, i = lane // 4.
            rows = np.stack([part[place] for part in (first, second) for place in places])
            outputs, scale = _outputs(family, rows, given, shared)
            # The feature with the even number is the low one.
            pairs += [(outputs[k + 1], outputs[k]) for k in range(0, len(outputs), 2)]
            scales += [] if scale is None else [scale]
    return pairs, scales


def _outputs(
    family: Family, rows: np.ndarray, given: dict[str, float], shared: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a lane's outputs [features, 32, samples] and its block's scale, before they round.

    Rows i, i + 8, i + 16, i + 24 are up[f], gate[f], up[f + 1], gate[f + 1], f = 2 i; without a
    gate they are features 4 i to 4 i + 3.
    """
    held = np.float32(shared)
    x = rows * held if family.has_token_scale else rows + held
    if family.gated:
        features = formulas.gated(family.activation, x[0::2], x[1::2], given)
    else:
        features = formulas.relu2(x, given)
    if family.block_scale is None:
        return features * np.float32(given["scale_c"]), None
    if family.output == "E2M1":
        outputs, scale = formulas.nvfp4(_block(features, 16), given["scale_c"])
    else:
        # With a gate, half of the block of 32 is another warp's.
        size, other = (16, shared) if family.gated else (32, 0.0)
        outputs, scale = formulas.mxfp8(_block(features, size), other)
    return outputs[: len(features)], scale


def _block(features: np.ndarray, size: int) -> np.ndarray:
    """Return [size, 32, samples]: the features of the lanes of one block, a lane's own first.

    Lanes 4 apart hold the next features of the same tokens. A block begins where i is a multiple of
    the lanes that share it.
    """
    lanes = [np.arange(32) ^ (4 * k) for k in range(size // len(features))]
    return np.concatenate([features[:, lane] for lane in lanes])
