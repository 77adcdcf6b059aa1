"""FlashInfer's CUTLASS FP8 mixtures of experts on a CPU, for tests: call rules and numbers.

One scale a matrix, and scales for 128 x 128 weights, as flashinfer_cutlass_emulator.py does NVFP4.
Written from the sources of FlashInfer 0.6.13 and 0.7.2; no layout or quantiser of fp4moe is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flashinfer_cutlass_emulator import (
    ACTIVATIONS,
    PAIRED,
    bound_call,
    check_biases,
    check_memory,
    check_parameters,
    check_routing,
    parameters_of,
    require,
)

__all__ = ["check_cutlass_fp8_call", "emulate_cutlass_fp8", "is_fp8_call"]

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
BLOCK_FLAG = "use_deepseek_fp8_block_scale"
# Of both sizes; 16 at least, and 32 in what compute capability 10.x may choose.
MULTIPLE, BLOCK = 32, 128


def is_fp8_call(kwargs: dict[str, Any]) -> bool:
    """Whether a call of cutlass_fused_moe has FP8 weights."""
    return kwargs["fc1_expert_weights"].dtype == E4M3


def check_cutlass_fp8_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return every argument by name, or raise.

    Raises:
        TypeError: no such parameter in the signature of `function`, or one is missing.
        CallError: the kernel would refuse the call, or read something else than is meant.
    """
    call = bound_call(function, args, kwargs, own=BLOCK_FLAG)
    blocks = call[BLOCK_FLAG]
    require(isinstance(blocks, bool), f"{BLOCK_FLAG} must be a bool; got {blocks}")
    fc1, fc2, x = call["fc1_expert_weights"], call["fc2_expert_weights"], call["input"]
    rule = "weights must be float8_e4m3fn [L, M, H] and [L, H, I]"
    require(fc1.dtype == fc2.dtype == E4M3 and fc1.ndim == fc2.ndim == 3, rule)
    activation = getattr(call["activation_type"], "name", "")
    known = {*ACTIVATIONS, *PAIRED}
    require(activation in known, "activation_type must be an enum member the kernel has")
    experts, hidden, intermediate = fc2.shape
    rows = intermediate * (1 + _is_gated(activation))
    shape = (experts, rows, hidden)
    require(fc1.shape == shape, f"fc1_expert_weights must be {list(shape)}; got {list(fc1.shape)}")
    multiple = BLOCK if blocks else MULTIPLE
    rule = f"sizes must be multiples of {multiple}; got hidden {hidden}, intermediate "
    require(hidden % multiple == 0 == intermediate % multiple, rule + str(intermediate))
    wanted = torch.bfloat16 if blocks else E4M3
    require(x.dtype == wanted, f"input must be {wanted}; got {x.dtype}")
    require(call["output_dtype"] == torch.bfloat16, "output_dtype must be bfloat16")
    require(call["input_sf"] is None, "input_sf must be None: only block-scaled inputs have some")
    require(x.ndim == 2 and len(x) > 0, "input must be [T, H] with T > 0: null data pointer")
    require(x.shape[1] == hidden, f"input must have {hidden} columns; got {x.shape[1]}")
    check_routing(call, experts)
    first = (experts, rows // BLOCK, hidden // BLOCK)
    second = (experts, hidden // BLOCK, intermediate // BLOCK)
    one, each = ((),), ((experts,),)
    _check_scales(call, ((first,), (second,)) if blocks else (each, one + each, each, one), blocks)
    check_parameters(call, activation, experts)
    check_biases(call, (experts, rows), (experts, hidden))
    output = call["output"]
    if output is not None:
        rule = f"output must be bfloat16 {[len(x), hidden]}; no narrower one is allowed"
        require(output.dtype == torch.bfloat16 and output.shape == (len(x), hidden), rule)
        check_memory("output", output, x.device)
    return call


def _is_gated(activation: str) -> bool:
    return activation in PAIRED or ACTIVATIONS[activation][0]


def _check_scales(
    call: dict[str, Any], shapes: tuple[tuple[tuple[int, ...], ...], ...], blocks: bool
) -> None:
    scales = call["quant_scales"]
    require(len(scales) == len(shapes), f"quant_scales must hold {len(shapes)} tensors")
    for index, (scale, allowed) in enumerate(zip(scales, shapes, strict=True)):
        name = f"quant_scales[{index}]"
        check_memory(name, scale, call["input"].device)
        require(scale.dtype == torch.float32, f"{name} must be float32; got {scale.dtype}")
        rule = " or ".join(str(list(shape)) for shape in allowed)
        require(scale.shape in allowed, f"{name} must be {rule}; got {list(scale.shape)}")
        require(bool(scale.isfinite().all()), f"{name} must be finite")
        sound = scale >= 0 if blocks else scale > 0
        require(bool(sound.all()), f"{name} must be {'at least' if blocks else 'above'} 0")
    if blocks:
        tiny = (scales[0] > 0) & (scales[0] < 1e-10)
        require(not bool(tiny.any()), "quant_scales[0] must hold none below 1e-10: NaN comes of it")


def emulate_cutlass_fp8(*, round_between: bool = True, **call: Any) -> torch.Tensor:
    """Compute what the kernel computes, without fused finalize.

    Args:
        round_between: round what the kernel rounds to bfloat16 between the products: gate and up,
            in blocks also the intermediate. False for comparisons with a definition that does not.
        call: the arguments of the library's function, by name, after `check_cutlass_fp8_call`.

    Returns:
        [T, H] bfloat16, `output` itself where it is given.
    """
    blocks, scales = call.get(BLOCK_FLAG, False), call["quant_scales"]
    fc1, fc2, x = call["fc1_expert_weights"], call["fc2_expert_weights"], call["input"]
    experts, hidden, intermediate = fc2.shape
    activation = call["activation_type"].name
    first = call.get("ep_rank", 0) * experts
    ids = call["token_selected_experts"].long() - first
    rows = _in_blocks(x.double()) if blocks else x.double()

    def matrix(codes: torch.Tensor, index: int, expert: int) -> torch.Tensor:
        values = codes[expert].double()
        if not blocks:
            return values
        scale = scales[index][expert].double()
        return values * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    def factor(index: int, expert: int) -> torch.Tensor:
        return torch.ones(()) if blocks else scales[index].expand(experts)[expert]

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16().float() if round_between else value.float()

    result = torch.zeros(len(x), hidden)
    # Slot by slot, as the finalize kernel adds.
    for slot in range(ids.shape[1]):
        for expert in range(experts):
            hit = (ids[:, slot] == expert).nonzero()[:, 0]
            if not hit.numel():
                continue
            both = rounded(rows[hit] @ matrix(fc1, 0, expert).T * factor(0, expert))
            if call.get("fc1_expert_biases") is not None:
                both = both + call["fc1_expert_biases"][expert].float()
            linear, activated = both[:, :intermediate], both[:, -intermediate:]
            if activation in PAIRED:
                combine = PAIRED[activation]
                y = combine(activated, linear, *parameters_of(call, activation, expert))
            else:
                gated, function = ACTIVATIONS[activation]
                y = function(activated) * linear if gated else function(activated)
            y = _in_blocks(rounded(y)) if blocks else _to_e4m3(y * factor(1, expert)).double()
            y = (y @ matrix(fc2, 1, expert).T * factor(2, expert)).bfloat16().float()
            if call.get("fc2_expert_biases") is not None:
                y = y + call["fc2_expert_biases"][expert].float()
            result[hit] += y * call["token_final_scales"][hit, slot, None]
    if call.get("output") is not None:
        return call["output"].copy_(result)
    return result.bfloat16()


def _to_e4m3(value: torch.Tensor) -> torch.Tensor:
    return value.float().clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _in_blocks(value: torch.Tensor) -> torch.Tensor:
    """Round [N, K] in blocks of 1 x 128: codes are x times 448 / amax, whose reciprocal is kept."""
    parts = value.float().unflatten(1, (-1, BLOCK))
    largest = parts.abs().amax(-1, keepdim=True)
    encode = torch.where(largest == 0, 1.0, E4M3_MAX / largest)
    return (_to_e4m3(parts * encode).double() * (1 / encode).double()).flatten(1)
