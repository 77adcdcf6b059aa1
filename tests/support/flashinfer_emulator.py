"""FlashInfer's TRT-LLM-Gen NVFP4 mixture of experts on a CPU, for tests.

Takes the very tensors that the library would get, undoes their layout byte by byte and computes
what the kernels compute. Written from the library's sources (0.6.13, 0.7.2.post1) and, for the
epilogue, from the machine code of its kernels (blackwell/machine_code). Independent of fp4moe: no
layout, quantiser or reference is shared.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch

__all__ = ["emulate_fp4_quantize", "emulate_moe", "emulate_routed_moe", "in_model_order"]
__all__ += ["quantize_intermediate", "route", "tile_offsets", "unpack_topk"]

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Midpoints of the grid; where the upper neighbour has the even code, the tie rounds up.
MIDPOINTS = {0.25: False, 0.75: True, 1.25: False, 1.75: True, 2.5: False, 3.5: True, 5.0: False}
SIXTH = torch.tensor(1.0 / 6.0)
E4M3_MAX = 448.0
UNUSED = {"do_finalize": True, "routing_bias": None}
NO_PARAMETERS = (1.0, 0.0, math.inf)


def emulate_fp4_quantize(
    input: torch.Tensor,
    global_scale: torch.Tensor,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    **defaults: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed [T, K/2] uint8, block scales uint8) as fp4_quantize does for NVFP4.

    Args:
        input: [T, K] bfloat16 or float16, K a multiple of 16.
        global_scale: [1] float32, the encode multiplier (reciprocal of the decode one).
        is_sf_swizzled_layout: scales in 128x4 tiles, padded with zeros; else [T, K/16].

    The GPU's approximate reciprocals are exact here, which can move a value across a tie.

    Raises:
        AssertionError: a format or layout that is not emulated.
    """
    assert input.dtype in (torch.bfloat16, torch.float16), f"input must be half; got {input.dtype}"
    # A first stride of 1 makes the library transpose, even where the tensor is contiguous.
    assert input.stride(-2) != 1, "input must not look column-major; got a row stride of 1"
    assert input.shape[-1] % 16 == 0, f"input must have 16n columns; got {input.shape[-1]}"
    nvfp4 = sf_vec_size == 16 and not sf_use_ue8m0 and not is_sf_8x4_layout
    assert nvfp4, "only NVFP4 in linear or 128x4 layout is emulated"
    changed = {k: v for k, v in defaults.items() if v not in (None, False, "cuda")}
    assert not changed.keys() - {"enable_pdl"}, f"arguments must keep defaults; got {changed}"
    assert global_scale.numel() == 1, f"global_scale must be [1]; got {list(global_scale.shape)}"
    codes, scale = _quantize(input.float(), global_scale.float().reshape(()))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed, _swizzle(scale) if is_sf_swizzled_layout else scale


def emulate_routed_moe(
    *, topk_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor], **kwargs: Any
) -> list[torch.Tensor]:
    """Return [output] as trtllm_fp4_block_scale_routed_moe does, from the same arguments.

    topk_ids is (ids int32 [T, K], weights [T, K]), or int32 with the id above a bfloat16 weight.
    """
    return [_experts(*unpack_topk(topk_ids), **kwargs)]


def unpack_topk(
    topk_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and float32 weights of what a function takes as chosen experts."""
    if isinstance(topk_ids, tuple):
        return topk_ids[0], topk_ids[1].float()
    # The upper half of a float32 is a bfloat16.
    return topk_ids >> 16, (topk_ids << 16).view(torch.float32)


def emulate_moe(
    *,
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None = None,
    norm_topk_prob: bool = True,
    **kwargs: Any,
) -> list[torch.Tensor]:
    """Return [output] as trtllm_fp4_block_scale_moe does, which routes from the logits."""
    enums = importlib.import_module("flashinfer.tllm_enums")
    ids, weights = route(
        enums.RoutingMethodType(kwargs["routing_method_type"]).name,
        routing_logits.float(),
        routing_bias,
        top_k=kwargs["top_k"],
        groups=kwargs.get("n_group") or 0,
        kept_groups=kwargs.get("topk_group") or 0,
        factor=1.0
        if kwargs.get("routed_scaling_factor") is None
        else kwargs["routed_scaling_factor"],
        normalise=norm_topk_prob,
    )
    return [_experts(ids, weights, **kwargs)]


def route(
    method: str,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    top_k: int,
    groups: int = 0,
    kept_groups: int = 0,
    factor: float = 1.0,
    normalise: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids [T, K], weights [T, K] float32 holding bfloat16 values) of a routing method.

    Args:
        method: a member's name of RoutingMethodType.
        logits: [T, E] float32. bias: [E], used by DeepSeekV3 and MiniMax2 only.
        factor: routed_scaling_factor. normalise: norm_topk_prob.
    """
    scores, epsilon = logits, 1e-20
    if method in ("DeepSeekV3", "MiniMax2"):
        plain = logits.sigmoid()
        grouped = method == "DeepSeekV3" and groups > 1
        offset = torch.zeros(logits.shape[1]) if bias is None else bias.float()
        # Only the kernel with groups keeps the bias in the type of the weights.
        scores = plain + (offset.bfloat16().float() if grouped else offset)
        if grouped:
            scores = _mask_groups(scores, groups, kept_groups)
        ids = _top(scores, top_k)
        chosen = plain.gather(1, ids)
        # 0.6.13 adds nothing for DeepSeekV3, which is NaN where every chosen score underflows.
        weights = chosen * factor / (chosen.sum(1, keepdim=True) + epsilon)
    elif method in ("Renormalize", "RenormalizeNaive"):
        ids = _top(logits, top_k)
        weights = logits.gather(1, ids).softmax(1)
    elif method == "Default":
        scores = logits.softmax(1)
        ids = _top(scores, top_k)
        weights = scores.gather(1, ids)
    elif method in ("Sigmoid", "SigmoidRenorm"):
        scores = logits.sigmoid()
        ids = _top(scores, top_k)
        weights = scores.gather(1, ids)
        if method == "SigmoidRenorm" and normalise:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=epsilon)
    elif method in ("Llama4", "TopK", "TopKSigmoid"):
        assert top_k == 1 or method != "Llama4", f"top_k must be 1 for Llama4; got {top_k}"
        ids = _top(logits, top_k)
        weights = logits.gather(1, ids)
        weights = weights if method == "TopK" else weights.sigmoid()
    else:
        raise AssertionError(f"routing_method_type must be a known method; got {method}")
    return ids, weights.bfloat16().float()


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    # The kernels break ties towards the smaller id; topk promises nothing.
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _mask_groups(scores: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    split = scores.unflatten(1, (groups, -1))
    best = _top(split.topk(2, -1).values.sum(-1), kept)
    keep = torch.zeros(split.shape[:2], dtype=torch.bool).scatter(1, best, True)
    return split.masked_fill(~keep.unsqueeze(-1), -math.inf).flatten(1)


def _experts(
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    output1_scale_scalar: torch.Tensor,
    output1_scale_gate_scalar: torch.Tensor,
    output2_scale_scalar: torch.Tensor,
    local_expert_offset: int,
    local_num_experts: int,
    activation_type: int,
    gemm1_bias: torch.Tensor | None = None,
    gemm1_alpha: torch.Tensor | None = None,
    gemm1_beta: torch.Tensor | None = None,
    gemm1_clamp_limit: torch.Tensor | None = None,
    gemm2_bias: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    _refuse(others)
    enums = importlib.import_module("flashinfer.tllm_enums")
    activation = enums.ActivationType(activation_type).name
    x = _decode(hidden_states, hidden_states_scale.view(torch.uint8))
    tokens, hidden = x.shape
    rows = torch.zeros(*ids.shape, hidden)
    for expert in range(local_num_experts):
        token, slot = (ids == expert + local_expert_offset).nonzero(as_tuple=True)
        if not len(token):
            continue
        first = _prepared(gemm1_weights[expert], gemm1_weights_scale[expert], activation != "Relu2")
        second = _prepared(gemm2_weights[expert], gemm2_weights_scale[expert], False)
        raw = (x[token] @ first.T).float()
        if gemm1_bias is not None:
            raw = raw + in_model_order(gemm1_bias[expert], activation != "Relu2")
        given = [
            torch.tensor(default) if tensor is None else tensor[expert]
            for tensor, default in zip(
                (gemm1_alpha, gemm1_beta, gemm1_clamp_limit), NO_PARAMETERS, strict=True
            )
        ]
        value = _epilogue(activation, raw, output1_scale_gate_scalar[expert], *given)
        codes, scale = quantize_intermediate(value, output1_scale_scalar[expert])
        y = (_decode_codes(codes, scale) @ second.T).float()
        if gemm2_bias is not None:
            y = y + in_model_order(gemm2_bias[expert], False)
        rows[token, slot] = (y * output2_scale_scalar[expert]).bfloat16().float()

    total = torch.zeros(tokens, hidden)
    for k in range(ids.shape[1]):
        here = ids[:, k] - local_expert_offset
        local = (here >= 0) & (here < local_num_experts)
        total += weights[:, k].where(local, torch.zeros(())).unsqueeze(1) * rows[:, k]
    if output is None:
        return total.bfloat16()
    return output.copy_(total[:, : output.shape[1]])


def _refuse(others: dict[str, Any]) -> None:
    routing = {"num_experts", "top_k", "n_group", "topk_group", "routing_method_type"}
    routing |= {"routed_scaling_factor", "intermediate_size", "enable_pdl"}
    routing |= {"tune_max_num_tokens", "hidden_states_scale_layout"}
    for name, value in others.items():
        if name not in routing and value is not UNUSED.get(name):
            raise AssertionError(f"{name} must be {UNUSED.get(name)}; got {value}")


def _epilogue(
    activation: str,
    raw: torch.Tensor,
    gate_scale: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    limit: torch.Tensor,
) -> torch.Tensor:
    """Apply the activation to raw accumulators; of a gated layer the first half is up.

    beta and limit are in units of the accumulators. What is returned lacks the factor
    `output1_scale_scalar`.
    """
    if activation == "Relu2":
        return (raw * gate_scale).clamp(min=0).square()
    up, raw_gate = raw.chunk(2, 1)
    up, raw_gate = up.minimum(limit).maximum(-limit), raw_gate.minimum(limit)
    # One rounding, as FFMA has.
    up = (up.double() * gate_scale.double() + (gate_scale * beta).double()).float()
    gate = raw_gate * (gate_scale * alpha)
    if activation == "Swiglu":
        return up * (raw_gate / (1 + torch.exp(-gate)))
    assert activation == "Geglu", f"activation_type must have an NVFP4 kernel; got {activation}"
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return up * (raw_gate * (0.5 * (1 + torch.tanh(inner))))


def _quantize(x: torch.Tensor, encode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes [T, K] and block scales [T, K/16], both uint8, of float32 x [T, K]."""
    blocks = x.unflatten(1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (encode * (largest * SIXTH)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    reciprocal = torch.where(largest > 0, 1.0 / (scale.float() * (1.0 / encode)), 0.0)
    return _codes(blocks * reciprocal).flatten(1), scale.view(torch.uint8).squeeze(-1)


def quantize_intermediate(
    value: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block scales, as `_quantize`, of float32 value [T, K] times factor [].

    In the order of the kernels' machine code; their approximate reciprocal is exact here.
    """
    blocks = value.unflatten(1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = ((largest * factor) * SIXTH).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    reciprocal = torch.where(scale.float() == 0, 0.0, 1.0 / scale.float())
    return _codes(blocks * reciprocal * factor).flatten(1), scale.view(torch.uint8).squeeze(-1)


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    code = torch.zeros(scaled.shape, dtype=torch.uint8)
    for midpoint, up in MIDPOINTS.items():
        code += scaled.abs() >= midpoint if up else scaled.abs() > midpoint
    code[scaled.isnan()] = 7
    code |= scaled.signbit().to(torch.uint8) << 3
    return code


def _decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return _decode_codes(torch.stack((packed & 15, packed >> 4), -1).flatten(-2), scale)


def _decode_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return codes [..., K] times their block scales [..., K/16], exactly, in float64."""
    values = torch.cat((E2M1, -E2M1)).double()[codes.long()]
    return values * scale.view(torch.float8_e4m3fn).double().repeat_interleave(16, -1)


def _prepared(packed: torch.Tensor, scale: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return one expert's matrix in the model's row order, float64: [up ; gate] or plain."""
    rows, columns = scale.shape
    assert rows % 128 == 0 and columns % 4 == 0, f"scales must fill 128x4 tiles; got {scale.shape}"
    linear = scale.view(torch.uint8).flatten()[tile_offsets(rows, columns)]
    return in_model_order(_decode(packed, linear), interleaved)


def in_model_order(prepared: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return the rows of one expert's matrix, or its bias, in the model's order."""
    rows, plain = len(prepared), torch.empty_like(prepared)
    plain[[_source_row(row, rows, interleaved) for row in range(rows)]] = prepared
    return plain


def _source_row(row: int, rows: int, interleaved: bool) -> int:
    """Return which row of the model's matrix the prepared matrix holds at `row`."""
    block, within = divmod(row, 32)
    source = 32 * block + 4 * (within % 8) + within // 8
    if not interleaved:
        return source
    pair, second = divmod(source, 2)
    return pair + second * (rows // 2)


def tile_offsets(rows: int, columns: int) -> torch.Tensor:
    """Return [rows, columns]: where the scale of (row, column) lies in tiles of 128 by 4."""
    m, k = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    tile = (m // 128) * (columns // 4) + k // 4
    return tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4


def _swizzle(scale: torch.Tensor) -> torch.Tensor:
    rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    flat = torch.zeros(rows * columns, dtype=torch.uint8)
    flat[tile_offsets(rows, columns)[: scale.shape[0], : scale.shape[1]]] = scale
    return flat.reshape(rows, columns)
