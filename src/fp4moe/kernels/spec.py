"""What a kernel is asked to run, before any tensor exists."""

from __future__ import annotations

import dataclasses

__all__ = ["HIDDEN_ALIGNMENTS", "ROUTINGS", "MoeSpec"]

# What the Blackwell kernel may pad the hidden size to, and who routes; only checked as yet.
HIDDEN_ALIGNMENTS = (128, 256, 512)
ROUTINGS = ("given",)


@dataclasses.dataclass(frozen=True)
class MoeSpec:
    """One layer on one kind of device.

    Attributes:
        activation: a name of `fp4moe.activations.ACTIVATIONS`.
        gated: whether the layer has gate weights.
        hidden_size, intermediate_size: as the model means them.
        num_experts, top_k: of the whole layer; top_k None where it is not known yet.
        capability: CUDA compute capability, None on a CPU.
    """

    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int | None
    capability: tuple[int, int] | None

    def __str__(self) -> str:
        device = ".".join(map(str, self.capability)) if self.capability else "CPU"
        return (
            f"{'gated ' if self.gated else ''}{self.activation}, {self.num_experts} experts of "
            f"{self.hidden_size} x {self.intermediate_size}, {device}"
        )
