"""Registers, predicates, parameters and memory of the simulated warp."""

from __future__ import annotations

import re

import numpy as np

from .listing import Instruction
from .values import Value, float_value, unknown

__all__ = ["PARAMETERS", "REGISTER", "Registers"]

# Offset in constant bank 0 of the pointer to each float (KernelParamsDecl.h in the wheel).
PARAMETERS = {
    0x6A8: "scale_c",
    0x6B0: "scale_act",
    0x6B8: "scale_gate",
    0x6C0: "limit",
    0x6C8: "alpha",
    0x6D0: "beta",
}
BIAS = 0x710
# At 0x348 is the address of bank 0 itself; the parameters begin at 0x380.
BANK, FIRST = 0x348, 0x380
REGISTER = re.compile(r"(U?R)(\d+|Z)")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
ADDRESS = re.compile(r"\[(?:U?R\d+\]\[)?(U?R\d+)(?:\.64)?(?:\+(0x[0-9a-f]+))?\]")
STACK = re.compile(r"\[(R\d+)(?:\+(0x[0-9a-f]+))?\]")
ZERO = float_value(0.0)
Predicate = np.ndarray | bool


class Registers:
    """The state of a warp, and the instructions that move it about.

    Args:
        parameters: value of each name in `PARAMETERS` that the kernel reads.
        shared: what every load from shared memory returns.
    """

    def __init__(self, parameters: dict[str, float], shared: float) -> None:
        self.parameters, self.shared = parameters, shared
        self.used: set[str] = set()
        self.guard: Predicate = True
        self._registers: dict[str, Value] = {}
        self._predicates: dict[str, Predicate] = {}
        # By base address and offset; the base is kept, so that its id stays its own.
        self._stack: dict[tuple[int, int], tuple[Value, Value]] = {}

    def read(self, text: str, half: int = 0) -> Value:
        """Return an operand; `half` picks the register of an .F32x2 operand."""
        negative = text.startswith("-") and not text[1:2].isdigit()
        text = text[1:] if negative else text
        absolute, text = text.startswith("|"), text.strip("|")
        constant, register = CONSTANT.match(text), REGISTER.match(text)
        if constant:
            value = self._parameter(int(constant[1], 16))
        elif register and register[2] == "Z":
            value = ZERO
        elif register:
            number = int(register[2]) + (half if ".F32x2" in text else 0)
            value = self._register(f"{register[1]}{number}")
        else:
            value = _immediate(text)
        for which in (0, 1):
            if f".H{which}_H{which}" in text:
                value = _half(value, which)
        if value.bits is None or not (absolute or negative):
            return value
        bits = value.bits & np.uint32(0x7FFFFFFF) if absolute else value.bits
        return Value(bits ^ np.uint32(0x80000000) if negative else bits)

    def write(self, register: str, *values: Value) -> None:
        """Set consecutive registers where the guard holds."""
        match = REGISTER.match(register)
        if not match or match[2] == "Z":
            return
        for offset, value in enumerate(values):
            name = f"{match[1]}{int(match[2]) + offset}"
            before = self._register(name)
            if not isinstance(self.guard, bool):
                if value.bits is None or before.bits is None:
                    value = unknown(value, before)
                else:
                    value = Value(np.where(self.guard, value.bits, before.bits))
            self._registers[name] = value

    def predicate(self, text: str) -> Predicate:
        """Return a predicate. One that is not known holds."""
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self._predicates.get(name, True)
        if not text.startswith("!"):
            return value
        return not value if isinstance(value, bool) else ~value

    def set_predicate(self, name: str, value: Predicate) -> None:
        """Set a predicate."""
        self._predicates[name] = value

    def _register(self, name: str) -> Value:
        # setdefault: an unknown base address must stay the same value.
        return self._registers.setdefault(name, Value(None))

    def _parameter(self, offset: int) -> Value:
        pointer = offset & ~7
        if pointer in PARAMETERS or pointer == BIAS:
            # Any number but 0: the pointer is given.
            return Value(np.asarray(offset, np.uint32), frozenset([pointer]))
        return Value(None, frozenset([offset]))

    # Instructions, by opcode.

    def _mov(self, line: Instruction) -> None:
        self.write(line.operands[0], self.read(line.operands[-1]))

    _umov = _r2ur = _mov

    def _cs2r(self, line: Instruction) -> None:
        value = ZERO if line.operands[1] == "SRZ" else Value(None)
        self.write(line.operands[0], *[value] * (1 if "32" in line.parts else 2))

    def _ldc(self, line: Instruction) -> None:
        constant = CONSTANT.match(line.operands[1])
        first = int(constant[1], 16) if constant else 0
        words = [self._parameter(first + 4 * word) for word in range(_words(line))]
        self.write(line.operands[0], *(words if constant else [Value(None)] * len(words)))

    _ldcu = _ldc

    def _ldg(self, line: Instruction) -> None:
        address, count = ADDRESS.search(line.operands[1]), _words(line)
        sources = self._register(address[1]).parameters if address else frozenset()
        values = [Value(None)] * count
        names = [PARAMETERS[source] for source in sources if source in PARAMETERS]
        if address and sources == {BANK}:
            first = FIRST + int(address[2] or "0", 16)
            values = [self._parameter(first + 4 * word) for word in range(count)]
        elif len(names) == 1:
            self.used.add(names[0])
            values = [float_value(self.parameters[names[0]])] * count
        self.write(line.operands[0], *values)

    _ld = _ldg

    def _lds(self, line: Instruction) -> None:
        self.write(line.operands[0], *[float_value(self.shared)] * _words(line))

    def _stl(self, line: Instruction) -> None:
        base, offset = self._stack_address(line.operands[0])
        register = REGISTER.match(line.operands[1])
        for word in range(_words(line)):
            name = line.operands[1]
            if register and register[2] != "Z":
                name = f"{register[1]}{int(register[2]) + word}"
            self._stack[id(base), offset + 4 * word] = base, self.read(name)

    def _ldl(self, line: Instruction) -> None:
        base, offset = self._stack_address(line.operands[1])
        places = [(id(base), offset + 4 * word) for word in range(_words(line))]
        nothing = base, Value(None)
        self.write(line.operands[0], *(self._stack.get(place, nothing)[1] for place in places))

    def _stack_address(self, text: str) -> tuple[Value, int]:
        match = STACK.fullmatch(text)
        # Any other form of address is a place of its own.
        return (self._register(match[1]), int(match[2] or "0", 16)) if match else (Value(None), 0)


def _immediate(text: str) -> Value:
    if re.fullmatch(r"0x[0-9a-f]+", text):
        return Value(np.asarray(int(text, 16) & 0xFFFFFFFF, np.uint32))
    if re.fullmatch(r"[+-]?(\d[\d.e+-]*|INF|QNAN)", text):
        return float_value(float(text.replace("QNAN", "nan")))
    return Value(None)


def _half(value: Value, which: int) -> Value:
    if value.bits is None:
        return value
    halves = (value.bits >> (16 * which) & 0xFFFF).astype(np.uint16).view(np.float16)
    return float_value(halves.astype(np.float32))


def _words(line: Instruction) -> int:
    return {"64": 2, "128": 4, "256": 8}.get(line.parts[-1], 1)
