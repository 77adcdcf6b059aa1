"""Every operator of fp4moe: schema, fake, dispatch. The table of contents of the package.

    fp4moe::nvfp4_moe          the fused mixture of experts, expert ids and routing weights given
    fp4moe::refuse_backward    raises; stands in the backward graph of nvfp4_moe, which has no
    gradient

The operators are registered with `Library.impl`: less dispatch than `torch.library.custom_op`, see
benchmarks/bench_dispatch.py.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from . import checks
from .errors import ShapeError, UnsupportedError
from .experts import ExpertWeights
from .formats import NVFP4
from .kernels import MoeSpec, current_capability, get_kernel, select_kernel
from .quantize import NVFP4Values

__all__ = ["fused_moe", "nvfp4_moe_arguments"]

library = torch.library.Library("fp4moe", "DEF")
# Packed weights and block scales are read by their strides: no relayout by Inductor.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

library.define(
    # hidden [T, H]; expert_ids [T, K] global; routing_weights [T, K]; L local experts, M = 2I gated
    # (gate first) or I. Block scales cross as their e4m3 bytes (uint8): opcheck, among others,
    # cannot compare float8 tensors.
    "nvfp4_moe(Tensor hidden, Tensor expert_ids, Tensor routing_weights, "
    "Tensor gate_up_packed, Tensor gate_up_block_scale, Tensor gate_up_global_scale, "
    "Tensor down_packed, Tensor down_block_scale, Tensor down_global_scale, "
    "Tensor hidden_scale, Tensor intermediate_scale, "
    # kernel names the prepared layout of the weights; num_experts counts the whole layer.
    "str activation, bool gated, str kernel, int num_experts, int expert_offset) -> Tensor",
    tags=TAGS,
)
library.define(
    "refuse_backward(Tensor grad, Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake("fp4moe::nvfp4_moe", lib=library)
def _nvfp4_moe_fake(hidden, expert_ids, routing_weights, *args):
    checks.check_moe(hidden, expert_ids, routing_weights, *args)
    return hidden.new_empty(hidden.shape)


def _nvfp4_moe(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    gate_up_packed: torch.Tensor,
    gate_up_block_scale: torch.Tensor,
    gate_up_global_scale: torch.Tensor,
    down_packed: torch.Tensor,
    down_block_scale: torch.Tensor,
    down_global_scale: torch.Tensor,
    hidden_scale: torch.Tensor,
    intermediate_scale: torch.Tensor,
    activation: str,
    gated: bool,
    kernel: str,
    num_experts: int,
    expert_offset: int,
) -> torch.Tensor:
    checks.check_moe(
        hidden,
        expert_ids,
        routing_weights,
        gate_up_packed,
        gate_up_block_scale,
        gate_up_global_scale,
        down_packed,
        down_block_scale,
        down_global_scale,
        hidden_scale,
        intermediate_scale,
        activation,
        gated,
        kernel,
        num_experts,
        expert_offset,
    )
    if hidden.shape[0] == 0:
        return hidden.new_empty(hidden.shape)
    weights = ExpertWeights(
        gate_up=NVFP4Values(
            gate_up_packed, gate_up_block_scale.view(NVFP4.scale_dtype), gate_up_global_scale
        ),
        down=NVFP4Values(down_packed, down_block_scale.view(NVFP4.scale_dtype), down_global_scale),
        activation=activation,
        gated=gated,
        hidden_size=hidden.shape[1],
        intermediate_size=down_packed.shape[2] * 2,
        num_experts=num_experts,
        expert_offset=expert_offset,
        hidden_scale=hidden_scale,
        intermediate_scale=intermediate_scale,
    )
    return get_kernel(kernel).run(hidden, weights, expert_ids, routing_weights)


class _WithoutGradient(torch.autograd.Function):
    """The operator under autograd: the forward as it is, a backward that refuses when it runs."""

    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(args[0], args[2])
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fp4moe.nvfp4_moe.default(*args)

    @staticmethod
    def backward(ctx, *grads):
        refuse = torch.ops.fp4moe.refuse_backward.default
        hidden, routing_weights = (
            refuse(grads[0], saved) if needed else None
            for saved, needed in zip(
                ctx.saved_tensors, (ctx.needs_input_grad[0], ctx.needs_input_grad[2]), strict=True
            )
        )
        return hidden, None, routing_weights, *(None,) * 13


def _nvfp4_moe_autograd(*args):
    if torch.is_grad_enabled() and (args[0].requires_grad or args[2].requires_grad):
        return _WithoutGradient.apply(*args)
    # A plain call skips the second dispatch; tracing and tensor subclasses take it.
    if type(args[0]) is torch.Tensor and not torch._C._len_torch_dispatch_stack():
        return _nvfp4_moe(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fp4moe.nvfp4_moe.default(*args)


def _refuse_backward(grad: torch.Tensor, like: torch.Tensor) -> NoReturn:
    raise UnsupportedError(
        "nvfp4_moe: backward must not be called, the operator has no gradient; got a loss that "
        "depends on its output. "
        "Train the float model, or detach the output of the experts."
    )


@torch.library.register_fake("fp4moe::refuse_backward", lib=library)
def _refuse_backward_fake(grad, like):
    return torch.empty_like(like)


for _key in ("CPU", "CUDA"):
    library.impl("nvfp4_moe", _nvfp4_moe, _key)
    library.impl("refuse_backward", _refuse_backward, _key)
library.impl("nvfp4_moe", _nvfp4_moe_autograd, "Autograd")


def nvfp4_moe_arguments(weights: ExpertWeights, kernel: str) -> tuple:
    """Return the operator's arguments behind routing_weights, for weights prepared for a kernel."""
    return (
        *weights.operands().values(),
        weights.activation,
        weights.gated,
        kernel,
        weights.num_experts,
        weights.expert_offset,
    )


def fused_moe(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    kernel: str = "auto",
) -> torch.Tensor:
    """Apply the selected experts to each token and sum them by routing weight.

    out[t] = sum_k routing_weights[t, k] * expert(expert_ids[t, k], hidden[t])

    Args:
        hidden: [T, H], bfloat16, float16 or float32, any strides; T may be 0.
        weights: the quantised experts of the layer, on the device of hidden.
        expert_ids: [T, K], int32 or int64 global ids. An id that is not local, such as -1,
            contributes nothing.
        routing_weights: [T, K] float, used as given.
        kernel: "auto" or a kernel's name, see `fp4moe.why_not`.

    Returns:
        [T, H] in the dtype of hidden, a fresh tensor; summed in float32 and cast once.

    Raises:
        ShapeError: a shape, dtype or device does not fit. UnsupportedError: no kernel runs this;
            lists the reasons.
    """
    if not isinstance(weights, ExpertWeights):
        raise ShapeError(
            f"fused_moe: weights must be ExpertWeights; got {type(weights).__name__}. Use "
            "ExpertWeights.quantize."
        )
    if hidden.ndim == 2 and hidden.shape[1] != weights.hidden_size:
        raise ShapeError(
            f"fused_moe: hidden must have shape [T, hidden_size] = [T, {weights.hidden_size}]; got "
            f"{list(hidden.shape)}. "
            "Pass the hidden states that these experts were made for."
        )
    spec = MoeSpec(
        activation=weights.activation,
        gated=weights.gated,
        hidden_size=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        num_experts=weights.num_experts,
        top_k=expert_ids.shape[-1] if expert_ids.ndim else None,
        capability=current_capability(hidden.device),
    )
    name = select_kernel(kernel, spec, caller="fused_moe")
    prepared = get_kernel(name).prepare(weights)
    return torch.ops.fp4moe.nvfp4_moe.default(
        hidden, expert_ids, routing_weights, *nvfp4_moe_arguments(prepared, name)
    )
