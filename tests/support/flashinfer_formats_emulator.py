"""TRT-LLM-Gen's FP8, MXFP8 and MXFP4 mixtures of experts on a CPU, for tests.

As flashinfer_emulator.py, whose routing and row orders it uses: takes the very tensors that the
library would get, undoes their layout and computes what the kernels compute, in float64 products.
Independent of fp4moe: no layout, quantiser or reference is shared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from flashinfer_emulator import E2M1, in_model_order, route, tile_offsets, unpack_topk
from flashinfer_formats_contract import format_of

__all__ = ["emulate_format", "emulate_mxfp8_quantize"]

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
SIGNED = torch.cat((E2M1, -E2M1)).double()
# The activation kernel for DeepSeek's format keeps its scales above this.
SMALLEST_NORMAL = 2.0**-126


def emulate_mxfp8_quantize(
    input: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes e4m3 [T, K], scale bytes uint8 [T * K / 32]) as mxfp8_quantize does.

    Its approximate reciprocal is exact here. Linear layout only.
    """
    assert input.dtype in (torch.bfloat16, torch.float16), f"input must be half; got {input.dtype}"
    assert input.stride(-2) != 1, "input must not look column-major; got a row stride of 1"
    assert alignment == 32 and input.shape[-1] % 32 == 0, "input must have 32n columns"
    assert not is_sf_swizzled_layout, "only the linear layout is emulated"
    codes, scale = _to_mxfp8(input.double())
    return codes, scale.flatten()


def emulate_format(name: str, **call: Any) -> list[torch.Tensor] | torch.Tensor:
    """Return what the library's function of that name does, from the same arguments."""
    enums = importlib.import_module("flashinfer.tllm_enums")
    if "routing_logits" in call:
        factor = call["routed_scaling_factor"]
        ids, weights = route(
            enums.RoutingMethodType(call["routing_method_type"]).name,
            call["routing_logits"].float(),
            call["routing_bias"],
            top_k=call["top_k"],
            groups=call["n_group"] or 0,
            kept_groups=call["topk_group"] or 0,
            factor=1.0 if factor is None else factor,
        )
    else:
        ids, weights = unpack_topk(call["topk_ids"])
    activation = enums.ActivationType(call["activation_type"]).name
    total = _run(FORMATS[format_of(call)](call, activation), ids, weights, call)
    output = call.get("output")
    if output is not None:
        output.copy_(total[:, : output.shape[1]])
    else:
        output = total.bfloat16()
    return [output] if "fp4" in name else output


class _Experts:
    """The weights of a call in the model's order, and what happens between the two products."""

    def __init__(self, call: dict[str, Any], activation: str):
        self.call, self.activation = call, activation
        self.gated = activation != "Relu2"

    def input(self) -> torch.Tensor:
        """Return hidden [T, H] as the product sees it, float64."""
        raise NotImplementedError

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        """Return one expert's matrix, float64; of gemm1 the first half is up."""
        raise NotImplementedError

    def between(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the input of the second product from the first's accumulators."""
        raise NotImplementedError

    def out(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the expert's output before it is rounded."""
        return raw

    def parameter(self, name: str, expert: int, default: float) -> float:
        tensor = self.call.get(name)
        return default if tensor is None else tensor[expert].item()

    def activate(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        """Apply the activation to values in the model's units."""
        if not self.gated:
            return raw.clamp(min=0).square()
        alpha, beta = (
            self.parameter(f"gemm1_{n}", expert, v) for n, v in (("alpha", 1), ("beta", 0))
        )
        limit = self.parameter("gemm1_clamp_limit", expert, math.inf)
        up, gate = raw.chunk(2, 1)
        up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
        return (up + beta) * gate / (1 + torch.exp(-alpha * gate))

    def bias(self, name: str, expert: int, interleaved: bool) -> torch.Tensor | float:
        tensor = self.call.get(name)
        return 0.0 if tensor is None else in_model_order(tensor[expert], interleaved).double()


class _Mx(_Experts):
    """MXFP8 and MXFP4 weights with MXFP8 activations."""

    def input(self) -> torch.Tensor:
        return _from_mxfp8(self.call["hidden_states"], self.call["hidden_states_scale"])

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        codes, scale = self.call[name][expert], self.call[f"{name}_scale"][expert]
        rows, columns = scale.shape
        linear = scale.view(torch.uint8).flatten()[tile_offsets(rows, columns)]
        if codes.dtype == torch.uint8:
            nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
            values = SIGNED[nibbles.long()] * _powers(linear).repeat_interleave(32, -1)
        else:
            values = _from_mxfp8(codes, linear)
        return in_model_order(values, self.gated and name == "gemm1_weights")

    def between(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        value = self.activate(raw + self.bias("gemm1_bias", expert, self.gated), expert)
        return _from_mxfp8(*_to_mxfp8(value.float().double()))

    def out(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        return raw + self.bias("gemm2_bias", expert, False)


class _MxBf16(_Mx):
    """MXFP4 weights with bfloat16 activations: nothing is quantised."""

    def input(self) -> torch.Tensor:
        return self.call["hidden_states"].double()

    def between(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        value = self.activate(raw + self.bias("gemm1_bias", expert, self.gated), expert)
        return value.bfloat16().double()


class _Tensor(_Experts):
    """FP8 with three scalars; those of the first product are in units of its accumulators."""

    def input(self) -> torch.Tensor:
        return self.call["hidden_states"].double()

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        interleaved = self.gated and name == "gemm1_weights"
        return in_model_order(self.call[name][expert].double(), interleaved)

    def between(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        scale = self.call["output1_scales_scalar"][expert].double()
        gate_scale = self.call["output1_scales_gate_scalar"][expert].double()
        if self.gated:
            up, gate = raw.chunk(2, 1)
            value = up * gate * gate_scale / (1 + torch.exp(-gate * gate_scale))
        else:
            value = (raw * gate_scale).clamp(min=0).square()
        return _to_e4m3(value * scale).double()

    def out(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        return raw * self.call["output2_scales_scalar"][expert].double()


class _Blocks(_Experts):
    """FP8 in blocks: the first product is rounded, then a kernel applies SwiGLU and rounds."""

    def input(self) -> torch.Tensor:
        scale = self.call["hidden_states_scale"].double().T.repeat_interleave(128, 1)
        return self.call["hidden_states"].double() * scale

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        scale = self.call[f"{name}_scale"][expert].double()
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return self.call[name][expert].double() * scale

    def between(self, raw: torch.Tensor, expert: int) -> torch.Tensor:
        return _in_blocks(self.activate(_in_blocks(raw), expert))


FORMATS: dict[str, Callable[[dict[str, Any], str], _Experts]] = {
    "mxfp8": _Mx,
    "mxfp4": _Mx,
    "mxfp4_w4a16": _MxBf16,
    "fp8": _Tensor,
    "fp8_block": _Blocks,
}


def _run(
    experts: _Experts, ids: torch.Tensor, weights: torch.Tensor, call: dict[str, Any]
) -> torch.Tensor:
    x, first = experts.input(), call["local_expert_offset"]
    rows = torch.zeros(*ids.shape, x.shape[1])
    for expert in range(call["local_num_experts"]):
        token, slot = (ids == expert + first).nonzero(as_tuple=True)
        if len(token):
            raw = x[token] @ experts.matrix("gemm1_weights", expert).T
            y = experts.between(raw, expert) @ experts.matrix("gemm2_weights", expert).T
            rows[token, slot] = experts.out(y, expert).bfloat16().float()
    here = (ids >= first) & (ids < first + call["local_num_experts"])
    return (rows * weights.where(here, torch.zeros(())).unsqueeze(-1)).sum(1)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).float().to(E4M3)


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Round to e4m3 with a float32 scale for 128 values of a token."""
    blocks = x.float().unflatten(1, (-1, 128))
    scale = (blocks.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_NORMAL)
    return (_to_e4m3(blocks / scale).double() * scale).flatten(1)


def _powers(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale.view(torch.uint8).double() - 127)


def _to_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [T, K] and bytes [T, K / 32]: the least power of two that does not saturate."""
    blocks = x.unflatten(1, (-1, 32))
    largest = blocks.abs().amax(-1)
    exponent = torch.log2(largest / E4M3_MAX).ceil().clamp(-127, 127)
    codes = _to_e4m3(blocks * torch.exp2(-exponent).unsqueeze(-1))
    return codes.flatten(1), (exponent + 127).to(torch.uint8)


def _from_mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * _powers(scale).repeat_interleave(32, -1)
