"""Argument checks that an operator and its fake share: shapes, dtypes and devices, never data."""

from __future__ import annotations

from typing import NoReturn

import torch

from .activations import ACTIVATIONS, get_activation
from .errors import ShapeError
from .formats import NVFP4
from .kernels import KERNELS, get_kernel

__all__ = ["check_moe"]

BLOCK = NVFP4.block_size
HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


def _fail(argument: str, rule: str, got: object, advice: str) -> NoReturn:
    raise ShapeError(f"nvfp4_moe: {argument} must {rule}; got {got}. {advice}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_moe(
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
) -> None:
    """Raise unless the arguments of `fp4moe::nvfp4_moe` fit together."""
    if activation not in ACTIVATIONS:
        get_activation(activation, caller="nvfp4_moe")
    if kernel not in KERNELS:
        get_kernel(kernel)
    device = hidden.device
    if hidden.ndim != 2 or hidden.dtype not in HIDDEN_DTYPES:
        _fail(
            "hidden",
            "be bfloat16, float16 or float32 [T, H]",
            _describe(hidden),
            "Flatten the tokens to one axis.",
        )
    tokens, hidden_size = hidden.shape
    if expert_ids.ndim != 2 or expert_ids.dtype not in ID_DTYPES or expert_ids.shape[0] != tokens:
        _fail(
            "expert_ids",
            f"be int32 or int64 [T, K] with T = {tokens}",
            _describe(expert_ids),
            "Pass one row a token.",
        )
    if routing_weights.dtype not in HIDDEN_DTYPES or routing_weights.shape != expert_ids.shape:
        _fail(
            "routing_weights",
            f"be float, of the shape of expert_ids {list(expert_ids.shape)}",
            _describe(routing_weights),
            "Pass one weight an id.",
        )
    if gate_up_packed.ndim != 3 or down_packed.ndim != 3:
        got = f"{list(gate_up_packed.shape)} and {list(down_packed.shape)}"
        _fail("gate_up_packed and down_packed", "have 3 axes", got, "Use ExpertWeights.quantize.")
    local, hidden_padded, columns = down_packed.shape
    if not 0 < hidden_size <= hidden_padded:
        _fail(
            "hidden",
            f"have 1 to {hidden_padded} columns, as its experts",
            list(hidden.shape),
            "Pass this layer's input.",
        )
    if not 0 <= expert_offset <= num_experts - local:
        rule = f"lie in 0..{num_experts - local} ({local} of {num_experts} experts)"
        _fail("expert_offset", rule, expert_offset, "Pass the global id of the first local expert.")
    rows = columns * 4 if gated else columns * 2
    # One expression: this runs at every call of the operator.
    if not (
        gate_up_packed.shape == (local, rows, hidden_padded // 2)
        and gate_up_block_scale.shape == (local, rows, hidden_padded // BLOCK)
        and down_block_scale.shape == (local, hidden_padded, columns * 2 // BLOCK)
        and (local,) == gate_up_global_scale.shape == down_global_scale.shape
        and intermediate_scale.shape == (local,)
        and hidden_scale.shape == (1,)
        and torch.uint8 == gate_up_packed.dtype == gate_up_block_scale.dtype
        and torch.uint8 == down_packed.dtype == down_block_scale.dtype
        and torch.float32 == gate_up_global_scale.dtype == down_global_scale.dtype
        and torch.float32 == hidden_scale.dtype == intermediate_scale.dtype
        and device == gate_up_packed.device == gate_up_block_scale.device
        and device == gate_up_global_scale.device == down_packed.device
        and device == down_block_scale.device == down_global_scale.device
        and device == hidden_scale.device == intermediate_scale.device
    ):
        scales, packed = torch.float32, torch.uint8
        _fail_at_first(
            device,
            ("gate_up_packed", gate_up_packed, packed, (local, rows, hidden_padded // 2)),
            (
                "gate_up_block_scale",
                gate_up_block_scale,
                packed,
                (local, rows, hidden_padded // BLOCK),
            ),
            ("gate_up_global_scale", gate_up_global_scale, scales, (local,)),
            ("down_packed", down_packed, packed, (local, hidden_padded, columns)),
            (
                "down_block_scale",
                down_block_scale,
                packed,
                (local, hidden_padded, columns * 2 // BLOCK),
            ),
            ("down_global_scale", down_global_scale, scales, (local,)),
            ("hidden_scale", hidden_scale, scales, (1,)),
            ("intermediate_scale", intermediate_scale, scales, (local,)),
        )
    if not device == expert_ids.device == routing_weights.device:
        got = f"{expert_ids.device} and {routing_weights.device}"
        rule = f"be on the device of hidden, {device}"
        _fail("expert_ids and routing_weights", rule, got, "Move them there.")


def _fail_at_first(device: torch.device, *expected: tuple) -> None:
    for name, tensor, dtype, shape in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            rule = f"be {dtype} {list(shape)} on {device}"
            _fail(name, rule, _describe(tensor), "Use ExpertWeights.quantize and .to.")
