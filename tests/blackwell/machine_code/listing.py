"""Read what nvdisasm prints: instructions, and a path through them."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Instruction", "Listing"]

CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>\S+)\s+)?(?P<name>\S+)(?P<rest>[^;]*);")
LABEL = re.compile(r"([.$][\w.$]+):")
TARGET = re.compile(r"\.L_x_\d+|\$[\w.$]+")
# Commas inside of brackets do not separate operands.
COMMA = re.compile(r",(?![^\[(]*[\])])")


@dataclass(frozen=True)
class Instruction:
    """One line: `guard` is the predicate without its @, `parts` the opcode split at its dots."""

    guard: str | None
    parts: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        """The opcode without modifiers."""
        return self.parts[0]


class Listing:
    """The instructions of a cubin's kernel and the labels among them."""

    def __init__(self, text: str) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        inside = False
        for line in text.splitlines():
            label = LABEL.match(line.strip())
            if label and label[1].startswith(".text."):
                # The other function returns the size of the shared memory.
                inside = not label[1].endswith("GetSmemSize")
            elif label and inside:
                self.labels[label[1]] = len(self.code)
            elif inside and (match := CODE.match(line)):
                operands = tuple(
                    part.strip().replace(".reuse", "") for part in COMMA.split(match["rest"])
                )
                parts = tuple(match["name"].split("."))
                self.code.append(Instruction(match["guard"], parts, operands))

    def conversions(self, kind: str) -> list[int]:
        """Return the places where two floats are converted to `kind` ("E2M1", "E4M3")."""
        return [
            place
            for place, line in enumerate(self.code)
            if line.opcode == "F2FP" and kind in line.parts and "F32" in line.parts
        ]

    def path_to(self, place: int) -> list[Instruction]:
        """Return the instructions of a path from the entry to `place`.

        Depth first, and what follows a branch before its target: whatever is done only where an
        optional pointer is given is on the path.

        Raises:
            ValueError: no path leads there.
        """
        came_from: dict[int, int | None] = {}
        waiting: list[tuple[int, int | None]] = [(0, None)]
        while waiting:
            here, before = waiting.pop()
            if here in came_from or here >= len(self.code):
                continue
            came_from[here] = before
            if here == place:
                path: list[Instruction] = []
                at: int | None = here
                while at is not None:
                    path.append(self.code[at])
                    at = came_from[at]
                return path[::-1]
            waiting += [(after, here) for after in reversed(self._after(here))]
        raise ValueError(f"no path leads to instruction {place}")

    def _after(self, here: int) -> list[int]:
        line = self.code[here]
        always = line.guard is None
        if line.opcode in ("EXIT", "RET") and always:
            return []
        if line.opcode not in ("BRA", "BRX", "CALL"):
            return [here + 1]
        names = TARGET.findall(" ".join(line.operands))
        targets = [self.labels[name] for name in names if name in self.labels]
        # BRA.U and `BRA P0, target` depend on a predicate too.
        always = always and (line.parts == ("BRA",) and len(line.operands) == 1)
        return targets if always or line.opcode == "BRX" else [here + 1, *targets]
