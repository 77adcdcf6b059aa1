"""Machine code of the Hopper GEMMs: their main loop, and what it does to registers in flight."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str
    operands: list[str]


def disassemble(code: bytes) -> list[str]:
    """Lines of machine code and labels."""
    import triton

    bundled = pathlib.Path(triton.__file__).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(bundled / "backends" / "nvidia" / "bin" / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )


def main_loop(lines: list[str]) -> list[Instruction]:
    """The instructions from the label that the branch behind the last product goes to."""
    last = max(i for i, line in enumerate(lines) if "HGMMA" in line)
    end = next(i for i in range(last, len(lines)) if re.search(r"\bBRA\b", lines[i]))
    label = re.search(r"\(\.(L_x_\d+)\)", lines[end])[1]
    start = next(i for i, line in enumerate(lines) if line.startswith(f".{label}:"))
    found = []
    for line in lines[start : end + 1]:
        if match := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)\s*([^;]*);", line):
            found.append(Instruction(match[1], [x.strip() for x in match[2].split(",")]))
    return found


def _range(operand: str, width: int) -> set[int]:
    match = re.fullmatch(r"-?R(\d+)(?:\.\w+)*", operand)
    return set(range(int(match[1]), int(match[1]) + width)) if match else set()


def written(instruction: Instruction) -> set[int]:
    """Registers that an instruction other than a product writes; too many rather than too few."""
    name = instruction.name
    if name.startswith(("ST", "BRA", "SYNCS.ARRIVE", "BAR")) or not instruction.operands:
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    return _range(instruction.operands[0], width)


def overwritten_in_flight(loop: list[Instruction], slots: int) -> list[str]:
    """What writes a register that a product not yet waited for reads or writes; two rounds."""
    groups: list[set[int]] = [set()]
    faults = []
    for instruction in loop * 2:
        name, operands = instruction
        if name.startswith("HGMMA") and operands[0] != "RZ":
            groups[-1] |= _range(operands[0], slots // 2) | _range(operands[1], 4)
            if "gsb0" in operands:
                groups.append(set())
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands[-1], 0)
            groups = groups[max(0, len(groups) - 1 - left) :]
        elif hit := written(instruction) & set().union(*groups):
            faults.append(f"{name} {', '.join(operands)} writes {sorted(hit)}")
    return faults
