"""RoutedExperts: fused experts whose kernel also chooses the experts."""

from __future__ import annotations

import torch

from .errors import UnsupportedError, must
from .experts import ExpertWeights
from .kernels import (
    DEFAULT_HIDDEN_ALIGNMENT,
    Layer,
    PreparedWeights,
    Routing,
    check_kernel_name,
    current_capability,
    get_kernel,
)
from .logical import logical_tensor
from .module import FusedExperts
from .ops import nvfp4_moe_from_logits_arguments
from .saving import PackedModule

__all__ = ["RoutedExperts"]


class RoutedExperts(FusedExperts):
    """Fused experts whose kernel also chooses them: (hidden, router logits, bias) -> [T, H].

    It stands where FusedExperts does, behind a router that returns its logits; see
    `models/routers.py`.

    Args:
        weights, kernel, hidden_alignment: see FusedExperts.
        routing: how to choose.
        output_scale: [E] factor of each expert's output (Gemma4's per_expert_scale), folded into
            the weights' scales; None is 1.

    Raises:
        UnsupportedError: the kernel cannot run these weights or this routing; lists the reasons.
    """

    prepared_output_scale: torch.Tensor
    output_scale = logical_tensor("output_scale")

    def __init__(
        self,
        weights: ExpertWeights,
        routing: Routing,
        kernel: str = "auto",
        *,
        hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
        output_scale: torch.Tensor | None = None,
    ):
        PackedModule.__init__(self)
        check_kernel_name(kernel, caller="RoutedExperts")
        self.routing, self.top_k = routing, routing.top_k
        self.requested_kernel = kernel
        self.hidden_alignment = hidden_alignment
        if output_scale is None:
            output_scale = torch.ones(
                weights.num_experts, dtype=torch.float32, device=weights.device
            )
        if output_scale.shape != (weights.num_experts,):
            must(
                "RoutedExperts: output_scale",
                f"have shape [{weights.num_experts}], one value an expert",
                list(output_scale.shape),
                "Pass the router's per_expert_scale.",
            )
        scale = output_scale.detach().float().clone()
        self.register_buffer("prepared_output_scale", scale, persistent=False)
        self._prepare(weights)

    def _select(self, layer: Layer, device: torch.device) -> str:
        name = super()._select(layer, device)
        reasons = get_kernel(name).reasons_not_to_route(layer, self.routing)
        if reasons:
            where = layer.on(current_capability(device))
            must(
                "RoutedExperts: routing",
                f"be one that kernel {name} can do ({where})",
                f"{self.routing}: {'; '.join(reasons)}",
                "Use routing='given'.",
                error=UnsupportedError,
            )
        return name

    def _local_output_scale(self, layer: Layer, local_experts: int) -> torch.Tensor:
        first = layer.expert_offset
        return self.prepared_output_scale[first : first + local_experts]

    def _operator_arguments(self, prepared: PreparedWeights) -> tuple:
        return nvfp4_moe_from_logits_arguments(prepared, self.routing, self.kernel)

    def _logical(self, prepared: PreparedWeights) -> dict[str, torch.Tensor]:
        return {**super()._logical(prepared), "output_scale": self.prepared_output_scale}

    def _take(self, loaded: dict[str, torch.Tensor]) -> None:
        if self.prepared_output_scale.is_meta:
            self.prepared_output_scale = loaded["output_scale"]
            return
        with torch.no_grad():
            self.prepared_output_scale.copy_(loaded["output_scale"])

    def forward(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, routing_bias: torch.Tensor
    ) -> torch.Tensor:
        """Choose and apply the experts; see torch.ops.fp4moe.nvfp4_moe_from_logits."""
        if not torch.compiler.is_compiling() and self._lent.marks:
            self._lent.check(self)
        return torch.ops.fp4moe.nvfp4_moe_from_logits.default(
            hidden_states, router_logits, routing_bias, *self._operands(), *self._arguments
        )
