"""What a kernel is asked to run, before any tensor exists."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

__all__ = [
    "DEFAULT_HIDDEN_ALIGNMENT",
    "FUSED_ROUTING_METHODS",
    "HIDDEN_ALIGNMENTS",
    "ROUTINGS",
    "Layer",
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
class Layer:
    """One mixture-of-experts layer, before any tensor exists.

    Attributes:
        activation: the canonical text of an `fp4moe.Activation`.
        gated: whether the layer has gate weights.
        hidden_size, intermediate_size: as the model means them; the operator knows them padded.
        num_experts, top_k: of the whole layer; top_k None where it is not known yet.
        expert_offset: global id of the first expert that is here.
        format: the number format of the weights.
        biased: whether gate, up and down have biases.
        quantized_activations: whether the checkpoint was made for activations that are rounded by
            the format's rule (W8A8), which lets "auto" take a kernel that rounds them.
        kernel_routes: whether the kernel is to choose the experts itself.
    """

    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int | None = None
    expert_offset: int = 0
    format: str = "nvfp4"
    biased: bool = False
    quantized_activations: bool = False
    kernel_routes: bool = False

    @classmethod
    def of(cls, facts: object, **others: Any) -> Layer:
        """Return the layer that an object's attributes of these names describe, with others."""
        names = (field.name for field in dataclasses.fields(cls))
        own = {name: getattr(facts, name) for name in names if hasattr(facts, name)}
        return cls(**{**own, **others})

    def metadata(self) -> dict[str, Any]:
        """Return what is saved beside the tensors, as plain JSON values."""
        return {
            "format": self.format,
            "activation": self.activation,
            "gated": self.gated,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "expert_offset": self.expert_offset,
            **({"quantized_activations": True} if self.quantized_activations else {}),
        }

    def __str__(self) -> str:
        return (
            f"{'gated ' if self.gated else ''}{self.activation}{' with biases' * self.biased}, "
            f"{self.num_experts} experts of {self.hidden_size} x {self.intermediate_size}"
        )

    def on(self, capability: tuple[int, int] | None) -> str:
        """Return it in words, with the device."""
        return f"{self}, {capability_name(capability).removeprefix('a ')}"


def capability_name(capability: tuple[int, int] | None) -> str:
    """Return "9.0" and the like, "a CPU" for None."""
    return ".".join(map(str, capability)) if capability else "a CPU"


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
