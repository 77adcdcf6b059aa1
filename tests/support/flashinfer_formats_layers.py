"""Layers of FP8, MXFP8 and MXFP4 for FlashInfer's kernels, and what they should compute.

Kernel and `reference_w4a4` round the same values to e4m3; a value next to a tie may differ by a
step of 2^-3 of its size, and outputs are rounded to bfloat16 (2^-9): LIMIT. FP8 blocks round three
times before the second product; a flipped code of gate or up is felt in one token, up to 1 %.
"""

from __future__ import annotations

import dataclasses

import torch
from fused_layers import with_biases

from fp4moe.activations import get_activation
from fp4moe.experts import ExpertWeights
from fp4moe.formats import FORMATS, StoredMatrix
from fp4moe.kernels import Routing, get_kernel
from fp4moe.kernels.flashinfer.library import library
from fp4moe.kernels.operands import LogitsCall
from fp4moe.reference import reference_w4a4
from fp4moe.routing import route
from fp4moe.testing import make_layer

__all__ = ["FORMS", "FROM_LOGITS", "GIVEN", "LIMIT", "RELU2", "SILU", "TRTLLM", "expected"]
__all__ += [
    "expected_of_cutlass",
    "float_matrices",
    "from_logits",
    "layer",
    "weights_of",
    "with_scales",
]

TRTLLM = get_kernel("flashinfer_trtllm")
LIMIT = 4e-3
GIVEN = {
    "mxfp8": "trtllm_fp8_block_scale_routed_moe",
    "mxfp4": "trtllm_fp4_block_scale_routed_moe",
    "fp8": "trtllm_fp8_per_tensor_scale_routed_moe",
    "fp8_block": "trtllm_fp8_block_scale_routed_moe",
}
FROM_LOGITS = {format: name.replace("_routed", "") for format, name in GIVEN.items()}
SILU, RELU2 = ("silu", True), ("relu2", False)
FORMS = [(f, *form) for f in GIVEN for form in (SILU, RELU2) if (f, *form) != ("fp8_block", *RELU2)]


def layer(
    format, hidden=256, intermediate=192, activation="silu", gated=True, biased=False, **more
):
    """Random experts; static scales of activations, where there are some, differ from 1."""
    seed = more.pop("seed", 0)
    experts = more.pop("experts", 4)
    if FORMATS[format].activation_range is not None:
        more |= {"hidden_scale": 4.5 / 448}
        more |= {"intermediate_scale": torch.linspace(0.5, 2.0, experts) * 3 / 448}
    sizes = experts, hidden, intermediate
    generator = torch.Generator().manual_seed(seed)
    form = {"format": format, "generator": generator, **more}
    weights = make_layer(*sizes, activation, gated, **form)
    return with_biases(weights, seed) if biased else weights


def expected(weights, call):
    """reference_w4a4 with the routing weights that the function can take."""
    x, ids, routing = call
    if weights.format in ("mxfp8", "fp8_block") or not library().float32_weights:
        routing = routing.bfloat16().float()
    if weights.format == "fp8_block":
        return with_rounded_gate_and_up(x, weights, ids, routing)
    return reference_w4a4(x, weights, ids, routing)


def with_rounded_gate_and_up(x, weights, ids, routing):
    """The definition with what DeepSeek's first product writes: gate and up in e4m3 blocks."""
    format, parts = FORMATS["fp8_block"], weights.dequantize()
    one = torch.ones(1)
    rows = format.round_activation(x.bfloat16().float(), one)
    out = torch.zeros(x.shape)
    for expert in range(weights.local_experts):
        gate, up = (
            format.round_activation(rows @ parts[n][expert].float().T, one) for n in ("gate", "up")
        )
        y = format.round_activation(get_activation(weights.activation).combine(up, gate), one)
        y = (y @ parts["down"][expert].float().T).bfloat16().float()
        weight = (routing * (ids == expert + weights.expert_offset)).sum(1, keepdim=True)
        out += weight * y
    return out.to(x.dtype)


def expected_of_cutlass(weights, call, rounds=False):
    """The definition as CUTLASS computes FP8; rounds: gate, up and so on to bfloat16, too."""
    x, ids, routing = call
    blocks, parts, out = weights.format == "fp8_block", weights.dequantize(), torch.zeros(x.shape)

    def quantised(value, scale):
        if not blocks:
            return FORMATS["fp8"].round_activation(value, scale)
        padded = torch.nn.functional.pad(value, (0, -value.shape[1] % 128))
        encode = 448 / padded.unflatten(1, (-1, 128)).abs().amax(2).repeat_interleave(128, 1)
        encode = encode[:, : value.shape[1]].nan_to_num(posinf=1.0)
        return (value * encode).to(torch.float8_e4m3fn).float() / encode

    def rounded(value):
        return value.bfloat16().float() if rounds else value

    def bias(name, expert):
        return parts[name][expert].bfloat16().float() if name in parts else 0.0

    rows = quantised(x.bfloat16().float(), weights.hidden_scale)
    for expert in range(weights.local_experts):
        up, gate = (
            rounded(rows @ parts[name][expert].T) + bias(f"{name}_bias", expert)
            if name in parts
            else None
            for name in ("up", "gate")
        )
        y = get_activation(weights.activation).combine(up, gate)
        y = quantised(rounded(y) if blocks else y, weights.intermediate_scale[expert])
        y = (y @ parts["down"][expert].T).bfloat16().float() + bias("down_bias", expert)
        hit = ids == expert + weights.expert_offset
        out += torch.where(hit, routing, 0.0).sum(1, keepdim=True) * y
    return out.to(x.dtype)


def with_scales(weights, gate, up):
    """Return the FP8 layer with gate's and up's scales of each expert times these."""
    factors = torch.tensor([gate, up], dtype=torch.float32).view(1, 2, 1)
    scale = weights.gate_up.block_scale * factors
    return dataclasses.replace(
        weights, gate_up=dataclasses.replace(weights.gate_up, block_scale=scale)
    )


def from_logits(weights, count=9, routing=None, biased_router=0, change=None, device="cpu"):
    """Return (the kernel's result, the call) with experts chosen by the library.

    change: of the operands, before the call.
    """
    generator = torch.Generator().manual_seed(0)
    routing = routing or Routing("softmax_topk", 3)
    x = torch.randn(count, weights.hidden_size, generator=generator).bfloat16()
    experts = weights.num_experts
    # Distinct bfloat16 numbers: neither ties nor the rounding of a bias choose.
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(count)])
    logits = logits.float() / 2 - 2
    bias = torch.linspace(-0.05, 0.05, biased_router).bfloat16().float()
    prepared = TRTLLM.prepare(weights.to(device), hidden_alignment=256)
    operands = prepared.operands if change is None else change(prepared.operands)
    given = (tensor.to(device) for tensor in (x, logits, bias))
    call = LogitsCall(*given, routing, operands, weights.layer(routing.top_k))
    ids, routing_weights = route(logits, bias, routing)
    return TRTLLM(call), (x, ids, routing_weights)


def weights_of(format, first, second, gated=True, **scales):
    """Return a layer of FlashInfer's codes and scales, whose halves are [up; gate]."""

    def swapped(tensor):
        plain = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        return torch.cat(plain.chunk(2, 1)[::-1], 1).view(tensor.dtype) if gated else tensor

    absent = torch.empty(0)
    experts, hidden, intermediate = second[0].shape
    return ExpertWeights(
        gate_up=StoredMatrix(*map(swapped, first), absent),
        down=StoredMatrix(*second, absent),
        activation="silu" if gated else "relu2",
        gated=gated,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=experts,
        expert_offset=0,
        format=format,
        hidden_scale=scales.get("hidden_scale", torch.ones(1)),
        intermediate_scale=scales.get("intermediate_scale", torch.ones(experts)),
    )


def float_matrices(gated, experts=3, hidden=256, intermediate=384):
    generator = torch.Generator().manual_seed(0)
    shapes = (experts, intermediate * (1 + gated), hidden), (experts, hidden, intermediate)
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    sizes = {"num_local_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate}
    return made, sizes
