"""The kernels, one file or folder each, and the choice among them."""

from __future__ import annotations

from ..layer import (
    DEFAULT_HIDDEN_ALIGNMENT,
    FUSED_ROUTING_METHODS,
    HIDDEN_ALIGNMENTS,
    ROUTINGS,
    Layer,
    Routing,
)
from .base import DIFFERENTIABLE, Kernel, current_capability
from .operands import BIASES, Call, LogitsCall, Operands, PreparedWeights
from .select import (
    KERNELS,
    check_kernel_name,
    choice_state,
    choose_kernel,
    get_kernel,
    select_kernel,
    why_not,
)

__all__ = [
    "BIASES",
    "DEFAULT_HIDDEN_ALIGNMENT",
    "DIFFERENTIABLE",
    "FUSED_ROUTING_METHODS",
    "HIDDEN_ALIGNMENTS",
    "KERNELS",
    "ROUTINGS",
    "Call",
    "Kernel",
    "Layer",
    "LogitsCall",
    "Operands",
    "PreparedWeights",
    "Routing",
    "check_kernel_name",
    "choice_state",
    "choose_kernel",
    "current_capability",
    "get_kernel",
    "select_kernel",
    "why_not",
]
