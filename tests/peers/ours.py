"""Our side: the calls that fp4moe's FlashInfer kernels make for a checkpoint's layer."""

from __future__ import annotations

import torch
from gpu import Call, recorded

from fp4moe import ExpertWeights
from fp4moe.kernels import Routing, get_kernel
from fp4moe.ops import nvfp4_moe_arguments, nvfp4_moe_from_logits_arguments

__all__ = ["our_calls", "our_calls_from_logits"]

TRTLLM = "flashinfer_trtllm"


def our_calls(
    weights: ExpertWeights,
    tokens: tuple[torch.Tensor, ...],
    kernel: str = TRTLLM,
    hidden_alignment: int = 256,
) -> list[tuple[str, Call]]:
    """Return the calls for hidden, ids and routing weights."""
    prepared = get_kernel(kernel).prepare(weights, hidden_alignment=hidden_alignment)
    with recorded() as calls:
        torch.ops.fp4moe.nvfp4_moe(*tokens, *nvfp4_moe_arguments(prepared, kernel))
    return calls


def our_calls_from_logits(
    weights: ExpertWeights,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor,
    routing: Routing,
) -> list[tuple[str, Call]]:
    """Return the calls where the kernel routes."""
    prepared = get_kernel(TRTLLM).prepare(weights, hidden_alignment=256)
    arguments = nvfp4_moe_from_logits_arguments(prepared, routing, TRTLLM)
    with recorded() as calls:
        torch.ops.fp4moe.nvfp4_moe_from_logits(hidden, logits, bias, *arguments)
    return calls
