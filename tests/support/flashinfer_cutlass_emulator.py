"""FlashInfer's CUTLASS NVFP4 mixture of experts on a CPU, for tests: call rules and numbers.

Written from the sources of FlashInfer 0.6.13 and 0.7.2 and independent of fp4moe: undoes the layout
by byte addresses and quantises by searching the grid. Where the library reads on without a check
(strides, columns of the input, NaN padding), `check_cutlass_call` refuses.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALF_DTYPES = (torch.bfloat16, torch.float16)
PACKED_DTYPES = (torch.uint8, torch.int64)

ACTIVATIONS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Swiglu": (True, lambda x: x / (1 + torch.exp(-x))),
    "Geglu": (True, lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "GegluTanh": (True, lambda x: F.gelu(x, approximate="tanh")),
    "Gelu": (False, lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "Relu": (False, lambda x: x.clamp(min=0)),
    "Silu": (False, lambda x: x / (1 + torch.exp(-x))),
    "Relu2": (False, lambda x: x.clamp(min=0) ** 2),
    "Identity": (False, lambda x: x),
}
# Of gate, up and each expert's alpha, beta and limit; SwigluBias is Swiglu with any of the three.
PAIRED: dict[str, Callable[..., torch.Tensor]] = {
    "Swiglu": lambda g, u, a, b, c: (
        g.clamp(max=c) / (1 + torch.exp(-a * g.clamp(max=c))) * (u.clamp(-c, c) + b)
    ),
    "SwigluStep": lambda g, u, a, b, c: (g / (1 + torch.exp(-g))).clamp(max=c) * u.clamp(-c, c),
    "Situ": lambda g, u, a, b, c: (
        a * torch.tanh(g / a) / (1 + torch.exp(-g)) * (b * torch.tanh(u / b))
    ),
}
# Which arguments an activation has, and what an absent one means.
PARAMETERS: dict[str, dict[str, float]] = {
    "Swiglu": {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": math.inf},
    "SwigluStep": {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": 7.0},
    "Situ": {"situ_beta": 4.0, "situ_linear_beta": 25.0},
}
# The kernel of this one reads only its limit.
UNREAD = {"SwigluStep": ("swiglu_alpha", "swiglu_beta")}

_ROUTING = ("token_selected_experts", "token_final_scales")
TENSORS = ("input", *_ROUTING, "fc1_expert_weights", "fc2_expert_weights")
_REQUIRED = (*TENSORS, "output_dtype", "quant_scales")
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("fc1_expert_biases", "fc2_expert_biases", "input_sf")),
    **dict.fromkeys(("swiglu_alpha", "swiglu_beta", "swiglu_limit")),
    **{"tp_size": 1, "tp_rank": 0, "ep_size": 1, "ep_rank": 0},
    **{"cluster_size": 1, "cluster_rank": 0, "output": None, "enable_alltoall": False},
    **{"use_deepseek_fp8_block_scale": False, "use_w4_group_scaling": False},
    **{"use_mxfp8_act_scaling": False, "min_latency_mode": False, "use_packed_weights": False},
    **{"tune_max_num_tokens": 8192, "enable_pdl": None, "activation_type": None},
    "swizzled_input_sf": True,
}
_NEWER: dict[str, Any] = {
    **{"use_wfp4afp8_humming": False, "use_fused_finalize": True, "profile_ids": None},
    **{"workspace_buffer": None, "backend": "cutlass"},
    **dict.fromkeys(("clamped_relu2_limit", "situ_beta", "situ_linear_beta")),
}
# What another path of the library would do, each at the value that leaves it off.
OFF = {
    name: default
    for name, default in {**_DEFAULTS, **_NEWER}.items()
    if name.startswith(("clamped", "tp", "cluster", "use_", "min", "enable_a"))
    and name != "use_fused_finalize"
}
OFF["backend"] = "cutlass"


class CallError(ValueError):
    """The call breaks a rule of the kernel."""


def stand_in(*, newer: bool) -> Callable[..., list[torch.Tensor]]:
    """Return a function with the parameters of 0.6.13, or of 0.7.2, that emulates the kernel.

    Like the library's it returns a list that starts with the output, whatever its annotation says.
    """

    def cutlass_fused_moe(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [emulate_cutlass_moe(**check_cutlass_call(cutlass_fused_moe, args, kwargs))]

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = {**_DEFAULTS, **(_NEWER if newer else {})}
    parameters = [inspect.Parameter(name, keyword) for name in _REQUIRED]
    parameters += [inspect.Parameter(n, keyword, default=d) for n, d in defaults.items()]
    cutlass_fused_moe.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return cutlass_fused_moe


def bound_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], own: str = ""
) -> dict[str, Any]:
    """Return every argument by name; what is off must be, but for `own`, and tensors dense."""
    require(not args, "arguments are positional: their order differs between versions")
    bound = inspect.signature(function).bind(**kwargs)
    bound.apply_defaults()
    call = dict(bound.arguments)
    for name, off in OFF.items():
        value = call.get(name, off)
        require(name == own or value is off or value == off, f"{name} must be {off}")
    for name in TENSORS:
        check_memory(name, call[name], call["input"].device)
    return call


def check_cutlass_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return every argument by name, or raise.

    Raises:
        TypeError: no such parameter in the signature of `function`, or one is missing.
        CallError: the kernel would refuse the call, or read something else than is meant.
    """
    call = bound_call(function, args, kwargs)
    fc1, fc2 = call["fc1_expert_weights"], call["fc2_expert_weights"]
    rule = "weights must be int64 [L, M, H / 16] and [L, H, I / 16]; uint8 selects INT4"
    require(torch.int64 == fc1.dtype == fc2.dtype and fc1.ndim == fc2.ndim == 3, rule)
    activation = getattr(call["activation_type"], "name", "")
    known = {*ACTIVATIONS, *PAIRED}
    require(activation in known, "activation_type must be an enum member the kernel has")
    gated = activation in PAIRED or ACTIVATIONS[activation][0]
    experts, hidden, intermediate = fc2.shape[0], fc2.shape[1], fc2.shape[2] * 16
    rows = intermediate * (1 + gated)
    shape = (experts, rows, hidden // 16)
    require(fc1.shape == shape, f"fc1_expert_weights must be {list(shape)}; got {list(fc1.shape)}")
    rule = f"sizes must be multiples of 32; got hidden {hidden}, intermediate {intermediate}"
    require(hidden % 32 == 0 and intermediate % 32 == 0, rule)
    rule = f"block scales of {intermediate} ungated rows are checked and read differently"
    require(gated or _up(intermediate, 64) == _up(intermediate, 128), rule)
    _check_input(call, hidden)
    check_routing(call, experts)
    _check_scales(call, rows, hidden, intermediate, experts, gated)
    check_parameters(call, activation, experts)
    check_biases(call, (experts, rows), (experts, hidden))
    output = call["output"]
    if output is not None:
        dtype, size = call["output_dtype"], (len(call["input"]), hidden)
        rule = f"output must be {dtype} {list(size)}; no narrower one is allowed"
        require(output.dtype == dtype and output.shape == size, rule)
        check_memory("output", output, call["input"].device)
    return call


def emulate_cutlass_moe(*, round_between: bool = True, **call: Any) -> torch.Tensor:
    """Compute what the kernel computes, without fused finalize.

    Args:
        round_between: round the result of the first GEMM and the intermediate to the output dtype,
            as the kernel does; False for comparisons with a definition that does not.
        call: the arguments of the library's function, by name, after `check_cutlass_call`.

    Returns:
        [T, H] of output_dtype, `output` itself where it is given.
    """
    scales, dtype = call["quant_scales"], call["output_dtype"]
    fc2 = call["fc2_expert_weights"]
    experts, hidden, intermediate = fc2.shape[0], fc2.shape[1], fc2.shape[2] * 16
    activation = call["activation_type"].name
    combine = PAIRED.get(activation)
    gated, function = (True, None) if combine else ACTIVATIONS[activation]
    rows = intermediate * (1 + gated)
    tokens = call["input"].shape[0]
    result = torch.zeros(tokens, hidden)
    first = call.get("ep_rank", 0) * experts
    ids = call["token_selected_experts"].long() - first

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float() if round_between else x

    # Slot by slot, as the finalize kernel adds.
    for slot in range(ids.shape[1]):
        for expert in range(experts):
            hit = (ids[:, slot] == expert).nonzero()[:, 0]
            if not hit.numel():
                continue
            x = _input_rows(call, hit, expert)
            weight = _decode(call["fc1_expert_weights"][expert], scales[1], expert, rows, hidden)
            both = rounded((x @ weight.T) * scales[2][expert])
            if call.get("fc1_expert_biases") is not None:
                both = both + call["fc1_expert_biases"][expert].float()
            linear, activated = both[:, :intermediate], both[:, -intermediate:]
            if combine is not None:
                y = combine(activated, linear, *parameters_of(call, activation, expert))
            else:
                y = function(activated) * linear if gated else function(activated)
            y = rounded(y)
            y = quantize(y, scales[3].expand(experts)[expert])
            weight = _decode(fc2[expert], scales[4], expert, hidden, intermediate)
            y = ((y @ weight.T) * scales[5][expert]).to(dtype).float()
            if call.get("fc2_expert_biases") is not None:
                y = y + call["fc2_expert_biases"][expert].float()
            result[hit] += y * call["token_final_scales"][hit, slot, None]
    if call.get("output") is not None:
        return call["output"].copy_(result)
    return result.to(dtype)


def parameters_of(call: dict[str, Any], activation: str, expert: int) -> list[float]:
    """Return alpha, beta and limit of one expert; caps of Situ as alpha and beta."""
    given = [
        default if call.get(name) is None else float(call[name][expert])
        for name, default in PARAMETERS[activation].items()
    ]
    return given + [math.inf] * (3 - len(given))


def quantize(x: torch.Tensor, encode: torch.Tensor) -> torch.Tensor:
    """Round [N, K] float32 to code x block scale; `encode` multiplies and is not undone."""
    blocks = x.reshape(len(x), -1, 16)
    scale = (encode * (blocks.abs().amax(-1, keepdim=True) * (1 / 6))).clamp(max=448.0)
    scale = scale.to(torch.float8_e4m3fn).float()
    # A product with the reciprocal, as the kernel has it: a division decides some ties otherwise.
    scaled = (blocks * torch.where(scale > 0, 1 / (scale * (1 / encode)), 0.0)).double()
    # Even codes first: argmin takes the first of two equal distances.
    order = torch.tensor([GRID[code] for code in (0, 2, 4, 6, 1, 3, 5, 7)]).double()
    nearest = order[(scaled.abs().unsqueeze(-1) - order).abs().argmin(-1)]
    return (nearest.copysign(scaled).float() * scale).reshape(x.shape)


def scale_address(row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
    """Return where the block scale of (row, column) lies, in bytes; `columns` a multiple of 4."""
    tile = (row // 128) * (columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


def _decode(
    packed: torch.Tensor, block_scale: torch.Tensor, expert: int, rows: int, size: int
) -> torch.Tensor:
    """One expert's matrix [rows, size] in float32, without its global scale."""
    columns = _up(size, 64) // 16
    flat = block_scale.view(torch.uint8).flatten()
    where = scale_address(torch.arange(rows)[:, None], torch.arange(size // 16), columns)
    scale = flat[expert * _up(rows, 128) * columns + where].view(torch.float8_e4m3fn).float()
    return _codes(packed.view(torch.uint8)) * scale.repeat_interleave(16, 1)


def _codes(packed: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*GRID, *(-value for value in GRID)])
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), -1).flatten(-2)


def _input_rows(call: dict[str, Any], hit: torch.Tensor, expert: int) -> torch.Tensor:
    x, size = call["input"], call["fc2_expert_weights"].shape[1]
    if x.dtype in HALF_DTYPES:
        encode = call["quant_scales"][0].expand(call["fc2_expert_weights"].shape[0])[expert]
        return quantize(x[hit].float(), encode)
    columns = _up(size, 64) // 16
    column = torch.arange(size // 16)
    if call.get("swizzled_input_sf", True):
        where = scale_address(hit[:, None], column, columns)
    else:
        where = hit[:, None] * columns + column
    scale = call["input_sf"].view(torch.uint8).flatten()[where].view(torch.float8_e4m3fn).float()
    return _codes(x.view(torch.uint8)[hit]) * scale.repeat_interleave(16, 1)


def _check_input(call: dict[str, Any], hidden: int) -> None:
    x, sf, dtype = call["input"], call["input_sf"], call["output_dtype"]
    require(dtype in HALF_DTYPES, f"output_dtype must be bfloat16 or float16; got {dtype}")
    require(x.ndim == 2 and len(x) > 0, "input must be [T, H] with T > 0: null data pointer")
    if x.dtype in HALF_DTYPES:
        require(x.dtype == dtype, f"input is read as {dtype}, the output_dtype; got {x.dtype}")
        columns = hidden
        require(sf is None, "input_sf must be None where the kernel quantises the input")
    else:
        require(x.dtype in PACKED_DTYPES, f"input of {x.dtype} would be read as packed FP4")
        columns = hidden // (2 if x.dtype == torch.uint8 else 16)
        rows = _up(len(x), 128) if call["swizzled_input_sf"] else len(x)
        needed = rows * _up(hidden, 64) // 16
        require(sf is not None, "packed input needs input_sf")
        rule = f"input_sf must hold {needed} bytes; got {sf.dtype} {list(sf.shape)}"
        require(sf.element_size() == 1 and sf.numel() == needed, rule)
        check_memory("input_sf", sf, x.device)
    require(x.shape[1] == columns, f"input must have {columns} columns; got {x.shape[1]}")


def check_routing(call: dict[str, Any], experts: int) -> None:
    tokens = len(call["input"])
    ids, weights = call["token_selected_experts"], call["token_final_scales"]
    require(ids.dtype == torch.int32, f"token_selected_experts must be int32; got {ids.dtype}")
    require(weights.dtype == torch.float32, "token_final_scales must be float32")
    require(ids.ndim == 2 and len(ids) == tokens, f"token_selected_experts must be [{tokens}, K]")
    require(weights.shape == ids.shape, "token_final_scales must have the shape of the ids")
    size, rank = call["ep_size"], call["ep_rank"]
    require(0 <= rank < size, f"ep_rank must lie in 0..{size - 1}; got {rank}")
    local = ids.long() - rank * experts
    for slot in range(1, ids.shape[1]):
        repeated = (local[:, :slot] == local[:, slot, None]).any(1)
        inside = (local[:, slot] >= 0) & (local[:, slot] < experts)
        require(not bool((repeated & inside).any()), "an id is repeated: only the first counts")


def _check_scales(
    call: dict[str, Any], rows: int, hidden: int, intermediate: int, experts: int, gated: bool
) -> None:
    scales = call["quant_scales"]
    require(len(scales) == 6, f"quant_scales must hold 6 tensors; got {len(scales)}")
    shapes = {
        1: (experts, _up(intermediate, 64) * (1 + gated), _up(hidden, 64) // 64),
        2: (experts,),
        4: (experts, _up(hidden, 128), _up(intermediate, 64) // 64),
        5: (experts,),
    }
    for index, scale in enumerate(scales):
        name = f"quant_scales[{index}]"
        check_memory(name, scale, call["input"].device)
        dtype = torch.int32 if index in (1, 4) else torch.float32
        require(scale.dtype == dtype, f"{name} must be {dtype}; got {scale.dtype}")
        allowed = (shapes[index],) if index in shapes else ((), (experts,))
        rule = " or ".join(str(list(shape)) for shape in allowed)
        require(scale.shape in allowed, f"{name} must be {rule}; got {list(scale.shape)}")
        if index in (1, 4):
            nan = (scale.view(torch.uint8) & 0x7F) == 0x7F
            require(not bool(nan.any()), f"{name} must not hold NaN, not in its padding either")
        else:
            positive = bool(((scale > 0) & scale.isfinite()).all())
            require(positive, f"{name} must be finite and above 0")
    one = call["input"].dtype in HALF_DTYPES or scales[0].ndim == 0
    require(one, "quant_scales[0] must be 0-d where the input is packed")


def check_parameters(call: dict[str, Any], activation: str, experts: int) -> None:
    taken = PARAMETERS.get(activation, {}).keys() - set(UNREAD.get(activation, ()))
    for name in sorted({name for names in PARAMETERS.values() for name in names}):
        value = call.get(name)
        if value is None:
            continue
        require(name in taken, f"{name} must be None for {activation}: it is not read")
        check_memory(name, value, call["input"].device)
        rule = f"{name} must be float32 [{experts}]; got {value.dtype} {list(value.shape)}"
        require(value.dtype == torch.float32 and value.shape == (experts,), rule)
        require(bool(value.isfinite().all()), f"{name} must be finite")
        if name != "swiglu_beta":
            require(bool((value > 0).all()), f"{name} must be above 0")


def check_biases(call: dict[str, Any], first: tuple[int, ...], second: tuple[int, ...]) -> None:
    names = ("fc1_expert_biases", "fc2_expert_biases")
    absent = [call[name] is None for name in names]
    require(absent[0] == absent[1], f"{' and '.join(names)} must be both there or neither")
    for name, shape in zip(names, (first, second), strict=True):
        if call[name] is not None:
            dtype = call["output_dtype"]
            rule = f"{name} must be {dtype} {list(shape)}; got {call[name].dtype}"
            rule += f" {list(call[name].shape)}"
            require(call[name].dtype == dtype and call[name].shape == shape, rule)
            check_memory(name, call[name], call["input"].device)


def check_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    require(tensor.is_contiguous(), f"{name} must be contiguous: strides are not looked at")
    require(tensor.device == device, f"{name} must be on {device}; got {tensor.device}")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise CallError(f"cutlass_fused_moe: {rule}")
