"""Run the float instructions of a path as the 32 lanes of one warp do, for many samples at once.

Integers are simulated only where they are the bits of floats, or pointers that may be 0; whatever
else is unknown. A comparison of unknown integers holds, unless it asks whether they are equal. What
is not simulated: subnormal results are not flushed to zero, MUFU is exact, stack addresses that are
computed (the sums of split-K kernels) are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from .listing import Instruction
from .registers import REGISTER, Registers
from .values import E4M3, Value, apply, float_value, fused, nearest, special, unknown

__all__ = ["Warp"]

COMPARE = {
    "GT": np.greater,
    "GE": np.greater_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
SINGLE = {"FADD": np.add, "FMUL": np.multiply, "FFMA": fused}
PAIRS = {f"{name}2": function for name, function in SINGLE.items()}


class Warp(Registers):
    """What the warp read and converted, after `run`.

    Args:
        parameters, shared: see `Registers`.
        samples: how many inputs run at once; their magnitudes go from 2^-12 to 2^12, and the last
            one is zero.
        nan_share: how many of the accumulators are NaN.
    """

    def __init__(
        self, parameters: dict[str, float], *, samples: int, shared: float, nan_share: float = 0.0
    ) -> None:
        super().__init__(parameters, shared)
        # What each LDTM fetched: (row offset, column offset, floats [registers, 32, samples]).
        self.accumulators: list[tuple[int, int, np.ndarray]] = []
        # Each conversion of two floats: (format, high operand, low operand).
        self.conversions: list[tuple[str, Value, Value]] = []
        self._nan_share = nan_share
        self._random = np.random.default_rng(0)
        self._magnitudes = np.append(np.exp2(np.linspace(-12, 12, samples - 1)), 0.0)

    def run(self, path: Iterable[Instruction]) -> Warp:
        """Execute the instructions and return the warp."""
        with np.errstate(all="ignore"):
            for line in path:
                self.guard = True if line.guard is None else self.predicate(line.guard)
                if self.guard is not False:
                    self._execute(line)
        return self

    def _execute(self, line: Instruction) -> None:
        name, target = line.opcode, line.operands[0]
        # The uniform datapath has the same float instructions.
        name = name[1:] if name.startswith("UF") else name
        action: Callable[[Instruction], None] | None = getattr(self, f"_{name.lower()}", None)
        if action is not None:
            action(line)
        elif name in SINGLE:
            self.write(target, apply(SINGLE[name], *map(self.read, line.operands[1:])))
        elif name in PAIRS:
            halves = [[self.read(text, half) for text in line.operands[1:]] for half in (0, 1)]
            self.write(target, *(apply(PAIRS[name], *sources) for sources in halves))
        else:
            self._forget(line)

    def _forget(self, line: Instruction) -> None:
        """Make the targets unknown, but keep which parameters go into them."""
        for name in line.operands[:2]:
            if re.fullmatch(r"U?P\d", name):
                self.set_predicate(name, "EQ" not in line.parts)
        if REGISTER.match(line.operands[0]):
            value = unknown(*(self.read(text) for text in line.operands[1:] if "[" not in text))
            wide = bool({"WIDE", "64"} & set(line.parts))
            self.write(line.operands[0], *[value] * (1 + wide))

    # Floats, by opcode.

    def _ldtm(self, line: Instruction) -> None:
        """Fetch accumulators from tensor memory; the address holds rows above columns."""
        times = re.search(r"\.x(\d+)", ".".join(line.parts))
        offset = re.search(r"\+(0x[0-9a-f]+)\]", line.operands[1])
        place = int(offset[1], 16) if offset else 0
        shape = (4 * int(times[1]) if times else 4, 32, len(self._magnitudes))
        floats = (self._random.normal(0, 1, shape) * self._magnitudes).astype(np.float32)
        floats += 0.0  # a sum of nothing is not -0
        floats[self._random.random(shape) < self._nan_share] = np.nan
        self.accumulators.append((place >> 16, place & 0xFFFF, floats))
        self.write(line.operands[0], *map(float_value, floats))

    def _fmnmx(self, line: Instruction) -> None:
        function = np.fmax if line.operands[-1] == "!PT" else np.fmin
        value, *others = map(self.read, line.operands[1:-1])
        for other in others:
            value = apply(function, value, other)
        self.write(line.operands[0], value)

    _fmnmx3 = _fmnmx

    def _fsel(self, line: Instruction) -> None:
        first, second = map(self.read, line.operands[1:3])
        chosen = self.predicate(line.operands[3])
        if isinstance(chosen, bool):
            value = first if chosen else second
        elif first.bits is None or second.bits is None:
            value = unknown(first, second)
        else:
            value = Value(np.where(chosen, first.bits, second.bits))
        self.write(line.operands[0], value)

    def _fsetp(self, line: Instruction) -> None:
        """Compare; an opcode that ends in U also holds where one is NaN."""
        a, b = map(self.read, line.operands[2:4])
        result: np.ndarray | bool = True
        if a.bits is not None and b.bits is not None:
            unordered = np.isnan(a.floats) | np.isnan(b.floats)
            result = COMPARE[line.parts[1][:2]](a.floats, b.floats)
            result = result | unordered if line.parts[1].endswith("U") else result & ~unordered
            result = np.asarray(result)
        self.set_predicate(line.operands[0], result)

    def _mufu(self, line: Instruction) -> None:
        source = self.read(line.operands[1])
        self.write(line.operands[0], apply(lambda x: special(line.parts[1], x), source))

    def _shfl(self, line: Instruction) -> None:
        source = self.read(line.operands[2])
        if line.parts[1] != "BFLY" or source.bits is None:
            return self.write(line.operands[1], unknown(source))
        bits = np.broadcast_to(source.bits, (32, len(self._magnitudes)))
        self.write(line.operands[1], Value(bits[np.arange(32) ^ int(line.operands[3], 16)]))

    def _f2fp(self, line: Instruction) -> None:
        """Pack two floats, the second one low, or unpack two E4M3 to float16."""
        if "UNPACK_B" in line.parts:
            shift = 16 if line.operands[1].endswith(".H1") else 0
            return self.write(line.operands[0], _unpack(self.read(line.operands[1]), shift))
        kinds = ("E2M1", "E4M3", "E8", "BF16")
        kind = next((part for part in line.parts if part in kinds), "other")
        # Two bfloat16 fill the register; what is shorter leaves room for what was there.
        high, low, *merged = map(self.read, line.operands[1:4])
        self.conversions.append((kind, high, low))
        value = unknown(high, low, *merged)
        if kind == "E4M3" and not any(source.bits is None for source in (high, low, *merged)):
            upper, lower = (_to_e4m3(source) for source in (high, low))
            value = Value(merged[0].bits << 16 | upper << 8 | lower)
        self.write(line.operands[0], value)

    def _hadd2(self, line: Instruction) -> None:
        if "F32" not in line.parts:
            return self._forget(line)
        self.write(line.operands[0], apply(np.add, *map(self.read, line.operands[1:])))

    # Moves in disguise, and integers.

    def _imad(self, line: Instruction) -> None:
        if line.operands[1:3] == ("RZ", "RZ"):
            return self.write(line.operands[0], self.read(line.operands[3]))
        self._forget(line)

    def _hfma2(self, line: Instruction) -> None:
        if line.operands[1:3] != ("-RZ", "RZ"):
            return self._forget(line)
        high, low = (int(np.float16(text).view(np.uint16)) for text in line.operands[3:5])
        self.write(line.operands[0], Value(np.asarray(high << 16 | low, np.uint32)))

    def _isetp(self, line: Instruction) -> None:
        a, b = map(self.read, line.operands[2:4])
        different = a.bits is None or b.bits is None or bool(np.any(a.bits != b.bits))
        if "EX" in line.parts:  # the upper words; the last operand says how the lower ones compare
            different = different or self.predicate(line.operands[-1]) is True
        self.set_predicate(line.operands[0], different != (line.parts[1] == "EQ"))

    _uisetp = _isetp

    def _lop3(self, line: Instruction) -> None:
        a, b = map(self.read, line.operands[1:3])
        is_and = line.operands[3:5] == ("RZ", "0xc0")
        if not is_and or a.bits is None or b.bits is None:
            return self._forget(line)
        self.write(line.operands[0], Value(a.bits & b.bits))

    def _iadd3(self, line: Instruction) -> None:
        total = np.asarray(0, np.uint32)
        for text in line.operands[1:]:
            if text.endswith("PT"):
                continue
            source = self.read(text.lstrip("-"))
            if source.bits is None:
                return self._forget(line)
            total = total - source.bits if text.startswith("-") else total + source.bits
        self.write(line.operands[0], Value(total))


def _to_e4m3(source: Value) -> np.ndarray:
    assert source.bits is not None
    return nearest(source.floats, E4M3).astype(np.uint32) | source.bits >> 31 << 7


def _unpack(source: Value, shift: int) -> Value:
    if source.bits is None:
        return source
    values = np.concatenate((E4M3, [np.nan], -E4M3, [np.nan])).astype(np.float16)
    low, high = (
        values[source.bits >> place & 0xFF].view(np.uint16).astype(np.uint32)
        for place in (shift, shift + 8)
    )
    return Value(high << 16 | low)
