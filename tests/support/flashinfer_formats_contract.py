"""What TRT-LLM-Gen's functions for FP8, MXFP8 and MXFP4 experts expect of a call, for tests.

As flashinfer_contract.py, for the functions with FP8 in their name and for MXFP4 weights in the
FP4 functions. Read from the Python and C++ sources of 0.6.13 and 0.7.2.post1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from flashinfer_contract import (
    Call,
    VersionFeatures,
    check_biases,
    check_counts,
    check_enums,
    check_given_routing,
    check_logits_routing,
    check_output,
    check_parameters,
    check_switches,
    require,
)

__all__ = ["check_format_call", "format_of"]

E4M3, BYTE, BF16 = torch.float8_e4m3fn, torch.uint8, torch.bfloat16
# MXFP4 weights, 16-bit activations.
W4A16 = "mxfp4_w4a16"
# (intermediate size gated, not gated, hidden size) are multiples of these.
MULTIPLES = {
    "mxfp8": (128, 128, 256),
    "mxfp4": (128, 128, 256),
    W4A16: (128, 128, 256),
    "fp8_block": (128, 128, 128),
    "fp8": (64, 128, 128),
}
ACTIVATIONS = {name: ("Swiglu", "Relu2") for name in MULTIPLES}
ACTIVATIONS |= {"fp8_block": ("Swiglu",), W4A16: ("Swiglu",)}
PARAMETERS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
OUTPUT_SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
TENSOR_SCALARS = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
# Experts up to which a biased router may choose 8, else 22.
FEW_EXPERTS = 384


def format_of(kwargs: dict[str, Any]) -> str:
    """Return the number format that a call of any function is about."""
    kind = kwargs.get("fp8_quantization_type")
    if kind is not None:
        return {"MxFp8": "mxfp8", "DeepSeekFp8": "fp8_block"}[kind.name]
    if "output2_scales_scalar" in kwargs:
        return "fp8"
    return {E4M3: "mxfp4", BF16: W4A16}.get(kwargs["hidden_states"].dtype, "nvfp4")


def check_format_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    version_features: VersionFeatures,
    activation: str | None = None,
    parameters: dict[str, float] | None = None,
    tune_max_num_tokens: int | None = None,
) -> None:
    """Check a call of a function for experts of another format than NVFP4.

    Arguments as in `check_routed_call`.

    Raises:
        AssertionError: the call breaks a rule; the text names the argument.
    """
    format = format_of(kwargs)
    call = Call(function, args, kwargs, version_features, activation)
    check_counts(call)
    gated = check_enums(call)
    x = call["hidden_states"]
    tokens, hidden = x.shape
    require("hidden_states", tokens > 0, "have a token", tokens)
    call.tensor("hidden_states", x, (BF16 if format == W4A16 else E4M3,), (tokens, hidden))
    intermediate, local = call["intermediate_size"], call["local_num_experts"]
    multiple = MULTIPLES[format][0 if gated else 1]
    even = intermediate % multiple == 0
    require("intermediate_size", even, f"be a multiple of {multiple}", intermediate)
    even = hidden % MULTIPLES[format][2] == 0
    require("hidden_states", even, f"have {MULTIPLES[format][2]}n columns", hidden)
    name = version_features.activations(call["activation_type"]).name
    allowed = ACTIVATIONS[format]
    require("activation_type", name in allowed, f"be one of {allowed} for {format}", name)

    rows = intermediate * (1 + gated)
    sizes = (local, rows, hidden), (local, hidden, intermediate)
    CHECKS[format](call, tokens, *sizes)
    if format != "fp8":
        check_parameters(call, local, parameters, raw=True)
    if "fp8_quantization_type" in call.arguments:
        _check_by_library(call)
    check_switches(call, tune_max_num_tokens)
    if "output" in call.arguments:
        check_output(call, tokens, hidden)
        narrow = call["output"] is None or call["output"].shape[1] == hidden
        require("output", format in ("mxfp4", W4A16) or narrow, f"have {hidden} columns", "fewer")
    if "topk_ids" in call.arguments:
        check_given_routing(call, tokens)
        plain = isinstance(call["topk_ids"], tuple)
        block = format in ("mxfp8", "fp8_block")
        # 0.6.13 reads the tuple's first tensor as packed.
        require("topk_ids", not (plain and block), "be packed", "a tuple")
    else:
        check_logits_routing(call, tokens)
    if format in ("mxfp8", "fp8_block"):
        _check_block_routing(call)


def _check_by_library(call: Call) -> None:
    """Let the library's own check say which parameters go with which format and activation."""
    core = importlib.import_module("flashinfer.fused_moe.core")
    given = (call[n] for n in ("fp8_quantization_type", "activation_type", *PARAMETERS))
    try:
        core._validate_fp8_block_scale_gemm1_activation_params(*given)
    except ValueError as error:
        raise AssertionError(f"gemm1_clamp_limit and others must fit: {error}") from error


def _check_block_routing(call: Call) -> None:
    experts, top_k = call["num_experts"], call["top_k"]
    require("num_experts", experts % 4 == 0, "be a multiple of 4", experts)
    require("num_experts", experts > top_k, f"be above top_k {top_k}", experts)
    method = call.features.routing_methods(call["routing_method_type"]).name
    groups, kept = call["n_group"], call["topk_group"]
    if method != "DeepSeekV3":
        for name, value in (("n_group", groups), ("topk_group", kept)):
            require(name, value is None or value <= 1, f"be None or 1 for {method}", value)
        return
    require("n_group", bool(groups), "be at least 1 for DeepSeekV3", groups)
    require("topk_group", bool(kept) and kept <= min(4, groups), "be 1 to 4", kept)
    most = 8 if experts <= FEW_EXPERTS else 22
    require("top_k", top_k <= most, f"be up to {most} for {experts} experts", top_k)
    require("top_k", top_k < kept * experts // groups, "leave an expert out", top_k)


def _check_mx(call: Call, tokens: int, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    fp4 = "fp8_quantization_type" not in call.arguments
    codes, scales = (BYTE, E4M3) if fp4 else (E4M3, BYTE)
    for name, shape in (("gemm1_weights", first), ("gemm2_weights", second)):
        columns = shape[2] // 2 if fp4 else shape[2]
        call.tensor(name, call[name], (codes,), (*shape[:2], columns))
        _check_bytes(call, f"{name}_scale", scales, (*shape[:2], shape[2] // 32))
    if call["hidden_states"].dtype == BF16:
        scale = call["hidden_states_scale"]
        require("hidden_states_scale", scale is None, "be None for bfloat16", "a tensor")
    else:
        _check_bytes(call, "hidden_states_scale", scales, (tokens, first[2] // 32))
    if fp4:
        for name in OUTPUT_SCALARS:
            require(name, call[name] is None, "be None for MXFP4", "a tensor")
    else:
        require("use_shuffled_weight", call["use_shuffled_weight"] is True, "be True", False)
        require("weight_layout", call["weight_layout"] == 0, "be MajorK", call["weight_layout"])
    if "gemm1_bias" in call.arguments:
        check_biases(call, first[:2], second[:2])


def _check_bytes(call: Call, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    call.tensor(name, call[name], (dtype,), shape)
    top = int(call[name].view(BYTE).max())
    require(name, top < 255, "be numbers", "NaN")


def _check_blocks(call: Call, tokens: int, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    for name, shape in (("gemm1_weights", first), ("gemm2_weights", second)):
        call.tensor(name, call[name], (E4M3,), shape)
        blocks = (shape[0], shape[1] // 128, shape[2] // 128)
        call.tensor(f"{name}_scale", call[f"{name}_scale"], (torch.float32,), blocks)
    name, shape = "hidden_states_scale", (first[2] // 128, tokens)
    call.tensor(name, call[name], (torch.float32,), shape)
    require(name, bool((call[name] > 0).all()), "be above 0", "others")
    shuffled = call["use_shuffled_weight"]
    require("use_shuffled_weight", shuffled is False, "be False for plain rows", shuffled)
    require("weight_layout", call["weight_layout"] == 0, "be MajorK", call["weight_layout"])
    for name in ("gemm1_bias", "gemm2_bias"):
        require(name, call.arguments.get(name) is None, "be None: the runner refuses it", "others")


def _check_tensor(call: Call, tokens: int, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    call.tensor("gemm1_weights", call["gemm1_weights"], (E4M3,), first)
    call.tensor("gemm2_weights", call["gemm2_weights"], (E4M3,), second)
    for name in TENSOR_SCALARS:
        call.tensor(name, call[name], (torch.float32,), first[:1])
        require(name, bool(call[name].isfinite().all()), "be finite", call[name])
    on_input = call["use_routing_scales_on_input"]
    require("use_routing_scales_on_input", on_input is False, "be False", on_input)
    limit = call.arguments.get("gemm1_clamp_limit")
    require("gemm1_clamp_limit", limit is None, "be None but for SwigluStep", "a tensor")


CHECKS = {"mxfp8": _check_mx, "mxfp4": _check_mx, W4A16: _check_mx}
CHECKS |= {"fp8_block": _check_blocks, "fp8": _check_tensor}
