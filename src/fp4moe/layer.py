"""What a kernel is asked to run, before any tensor exists."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

__all__ = [
    "DEFAULT_HIDDEN_ALIGNMENT",
    "FUSED_ROUTING_METHODS",
    "HIDDEN_ALIGNMENTS",
    "ROUTINGS",
    "LayerSettings",
    "MoeSpec",
    "Routing",
    "capability_name",
]

# What the Blackwell kernel may pad the hidden size to, and who routes: the model or the kernel.
HIDDEN_ALIGNMENTS = (128, 256, 512)
DEFAULT_HIDDEN_ALIGNMENT = 256
ROUTINGS = ("given", "fused")
# Functions of fp4moe.routing that a kernel may compute itself, both renormalising.
FUSED_ROUTING_METHODS = ("softmax_topk", "sigmoid_topk")


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
        device = capability_name(self.capability).removeprefix("a ")
        return (
            f"{'gated ' if self.gated else ''}{self.activation}, {self.num_experts} experts of "
            f"{self.hidden_size} x {self.intermediate_size}, {device}"
        )


def capability_name(capability: tuple[int, int] | None) -> str:
    """Return "9.0" and the like, "a CPU" for None."""
    return ".".join(map(str, capability)) if capability else "a CPU"


class LayerSettings(NamedTuple):
    """The operator's arguments behind its tensors, without the kernel's name."""

    activation: str
    gated: bool
    num_experts: int
    expert_offset: int


class Routing(NamedTuple):
    """How a kernel routes by itself, see `fp4moe.routing`.

    Attributes:
        method: one of FUSED_ROUTING_METHODS, with renormalize=True.
        top_k: experts per token.
        num_groups, top_groups: groups of experts and how many of them stay; 1 and 1 without.
        scaling: factor of every weight.
    """

    method: str
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0
