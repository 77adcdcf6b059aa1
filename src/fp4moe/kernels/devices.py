"""The compute capabilities that a kernel runs on."""

from __future__ import annotations

from typing import NamedTuple

from ..layer import capability_name

__all__ = ["Devices"]


class Devices(NamedTuple):
    """Compute capabilities that a kernel runs on.

    Attributes:
        listed: each of them; the oldest alone where a range is meant.
        or_newer: whether all newer ones will do. up_to: the newest of a range.
        why_not_newer: what is wrong with those above up_to.
    """

    listed: tuple[tuple[int, int], ...]
    or_newer: bool = False
    up_to: tuple[int, int] | None = None
    why_not_newer: str = ""

    def __str__(self) -> str:
        *names, last = map(capability_name, self.listed)
        if self.or_newer:
            return f"{last} or newer"
        if self.up_to:
            return f"{last} to {capability_name(self.up_to)}"
        return f"{', '.join(names)} or {last}" if names else last

    def include(self, capability: tuple[int, int] | None) -> bool:
        """Return whether the kernel runs there; None is a CPU."""
        if capability is None or not (self.or_newer or self.up_to):
            return capability in self.listed
        return self.listed[0] <= capability <= (self.up_to or capability)

    def reasons(self, capability: tuple[int, int] | None) -> list[str]:
        """Return why not there."""
        if self.include(capability):
            return []
        reason = f"needs compute capability {self}, got {capability_name(capability)}"
        if capability and self.up_to and capability > self.up_to:
            reason += f" ({self.why_not_newer})"
        return [reason]
