"""What FlashInfer's TRT-LLM-Gen NVFP4 mixture of experts expects of a call, for tests.

The launcher checks little and reads out of bounds where sizes are wrong, so these checks stand in
for it. Read from the Python, C++ and CUDA sources of 0.6.13 and 0.7.2.post1. Every violation is an
AssertionError `<argument> must <rule>; got <value>`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

__all__ = ["Call", "VersionFeatures", "check_biases", "check_counts", "check_enums"]
__all__ += ["check_given_routing", "check_logits_call", "check_logits_routing", "check_output"]
__all__ += ["check_parameters", "check_routed_call", "check_switches", "installed_features"]
__all__ += ["require", "takes"]

# Gated or not, of the activations that have NVFP4 kernels in both versions.
GATED = {"Swiglu": True, "Geglu": True, "Relu2": False}
# (experts, top_k) up to which a routing method is compiled.
METHOD_LIMITS = {"Renormalize": (2048, 32), "RenormalizeNaive": (2048, 32)}
METHOD_LIMITS |= {"DeepSeekV3": (1024, 32), "MiniMax2": (1024, 32), "Llama4": (128, 1)}
OTHER_LIMITS = (256, 8)
BIASED = ("DeepSeekV3", "MiniMax2")
# What the epilogue of Swiglu takes, and which scalar turns it into the model's units.
PARAMETERS = {
    "alpha": ("gemm1_alpha", None),
    "beta": ("gemm1_beta", "output1_scale_gate_scalar"),
    "limit": ("gemm1_clamp_limit", "output1_scale_gate_scalar"),
}
ABSENT = (
    *("per_token_scale", "routing_replay_out", "gemm1_lora_delta"),
    *("num_fused_shared_experts", "valid_hidden_size", "valid_intermediate_size"),
)
SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
LARGEST_TUNED = 8192


@dataclasses.dataclass(frozen=True)
class VersionFeatures:
    """What differs between library versions without showing in a signature.

    Attributes:
        activations, routing_methods: the library's enums, whose numbers moved.
        linear_scales: its name for row-major block scales.
        float32_routing_weights: whether unpacked weights may be float32; else it reads them as
            bfloat16 whatever they are.
    """

    activations: type[IntEnum]
    routing_methods: type[IntEnum]
    linear_scales: IntEnum
    float32_routing_weights: bool


def installed_features() -> VersionFeatures:
    """Read the features off the installed library: its enums and its launcher's source."""
    enums = importlib.import_module("flashinfer.tllm_enums")
    root = pathlib.Path(str(enums.__file__)).parent
    launcher = root / "data" / "csrc" / "trtllm_fused_moe_kernel_launcher.cu"
    return VersionFeatures(
        enums.ActivationType,
        enums.RoutingMethodType,
        enums.SfLayout.layout_linear,
        "mDtypeExpW" in launcher.read_text(),
    )


def takes(function: str, argument: str) -> bool:
    """Whether a function of the installed flashinfer.fused_moe has this argument."""
    found = getattr(importlib.import_module("flashinfer.fused_moe"), function)
    return argument in inspect.signature(found).parameters


def check_routed_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    version_features: VersionFeatures,
    activation: str | None = None,
    parameters: dict[str, float] | None = None,
    tune_max_num_tokens: int | None = None,
) -> None:
    """Check a call of trtllm_fp4_block_scale_routed_moe, where the caller has routed.

    Args:
        function: the library's own function; only its signature is used.
        args, kwargs: the call.
        version_features: of the library that `function` is from.
        activation: the member of ActivationType that the caller means, default any.
        parameters: alpha, beta and limit that the caller means, in the model's units; those that
            are left out must be absent. Default any.
        tune_max_num_tokens: what the caller's user asked for; default a power of two up to 8192.

    Raises:
        AssertionError: the call breaks a rule; the text names the argument.
    """
    call = Call(function, args, kwargs, version_features, activation)
    check_given_routing(call, _check_common(call, tune_max_num_tokens, parameters))


def check_given_routing(call: Call, tokens: int) -> None:
    """Check ids and weights that the caller chose."""
    first = call["local_expert_offset"]
    last = first + call["local_num_experts"]
    shape = (tokens, call["top_k"])
    routing = call["topk_ids"]
    if isinstance(routing, tuple):
        require("topk_ids", len(routing) == 2, "be (ids, weights)", len(routing))
        ids, weights = routing
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        dtypes += (torch.float32,) * call.features.float32_routing_weights
        call.tensor("topk_ids[1]", weights, dtypes, shape)
        call.tensor("topk_ids[0]", ids, (torch.int32,), shape)
    else:
        call.tensor("topk_ids", routing, (torch.int32,), shape)
        ids = routing >> 16
        negative = int((routing & 0x8000 != 0).sum())
        require("topk_ids", negative == 0, "pack no negative weight", f"{negative} of them")
    outside = ids[(ids != -1) & ((ids < first) | (ids >= last))].tolist()
    require("topk_ids", not outside, f"be -1 or in {first}..{last - 1}", outside)
    for name in ("routing_bias", "n_group", "topk_group"):
        require(name, call[name] is None, "be None where the caller routes", call[name])
    _check_factor(call, False)


def check_logits_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    version_features: VersionFeatures,
    activation: str | None = None,
    parameters: dict[str, float] | None = None,
    routing_method: str | None = None,
    tune_max_num_tokens: int | None = None,
) -> None:
    """Check a call of trtllm_fp4_block_scale_moe, which routes from logits.

    Arguments as in `check_routed_call`; routing_method is the member of RoutingMethodType that the
    caller means, default any.

    Raises:
        AssertionError: the call breaks a rule; the text names the argument.
    """
    call = Call(function, args, kwargs, version_features, activation)
    tokens = _check_common(call, tune_max_num_tokens, parameters)
    check_logits_routing(call, tokens, routing_method)


def check_logits_routing(call: Call, tokens: int, routing_method: str | None = None) -> None:
    """Check logits, bias and groups where the library chooses; routing_method as above."""
    experts, top_k = call["num_experts"], call["top_k"]
    method = call.features.routing_methods(call["routing_method_type"]).name
    meant = routing_method in (None, method)
    require("routing_method_type", meant, f"be {routing_method}", method)
    floats = (torch.float32, torch.bfloat16)
    call.tensor("routing_logits", call["routing_logits"], floats, (tokens, experts))
    most_experts, most_top_k = METHOD_LIMITS.get(method, OTHER_LIMITS)
    require("num_experts", experts <= most_experts, f"be up to {most_experts}", experts)
    require("top_k", top_k <= most_top_k, f"be up to {most_top_k} for {method}", top_k)

    bias, groups, kept = call["routing_bias"], call["n_group"], call["topk_group"]
    grouped = method == "DeepSeekV3" and groups is not None and groups > 1
    if bias is not None:
        require("routing_bias", method in BIASED, f"be None for {method}", "a tensor")
        call.tensor("routing_bias", bias, floats, (experts,))
    else:
        # Without groups the kernel reads the bias through the pointer unasked.
        needed = method in BIASED and not grouped
        require("routing_bias", not needed, f"be a tensor for {method}", None)
    for name, value in (("n_group", groups), ("topk_group", kept)):
        given = type(value) is int and value >= 1 and method == "DeepSeekV3"
        require(name, value is None or given, "be None, or positive for DeepSeekV3", value)
    require("topk_group", (groups is None) == (kept is None), "come with n_group", kept)
    if grouped:
        fits = experts % groups == 0 and experts % 4 == 0 and experts // groups <= 32
        rule = f"be up to 8 and split {experts} experts evenly into groups of up to 32"
        require("n_group", groups <= 8 and fits and experts <= 512, rule, groups)
        require("topk_group", kept <= min(4, groups), f"be up to {min(4, groups)}", kept)
        most = min(kept * experts // groups, 22)
        require("top_k", top_k <= most, f"be up to {most} in these groups", top_k)
    _check_factor(call, method in BIASED)
    free = call["norm_topk_prob"] is True or method == "SigmoidRenorm"
    require("norm_topk_prob", free, f"be True for {method}", call["norm_topk_prob"])


class Call:
    """The bound arguments of one call."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        features: VersionFeatures,
        activation: str | None,
    ) -> None:
        require("arguments", not args, "all be keywords", f"{len(args)} positional")
        try:
            bound = inspect.signature(function).bind(**kwargs)
        except TypeError as error:
            raise AssertionError(f"arguments must fit the signature; got {error}") from error
        bound.apply_defaults()
        self.arguments = bound.arguments
        self.features = features
        self.activation = activation
        self.device = self["hidden_states"].device

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def tensor(
        self, name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
    ) -> None:
        assert isinstance(value, torch.Tensor), f"{name} must be a tensor; got {value}"
        require(name, value.dtype in dtypes, f"be of {dtypes}", value.dtype)
        require(name, tuple(value.shape) == shape, f"be {shape}", tuple(value.shape))
        require(name, value.is_contiguous(), "be contiguous", value.stride())
        require(name, value.device == self.device, f"be on {self.device}", value.device)


def require(name: str, holds: bool, rule: str, got: object) -> None:
    assert holds, f"{name} must {rule}; got {got}"


def _check_common(
    call: Call, tune_max_num_tokens: int | None, parameters: dict[str, float] | None
) -> int:
    hidden_states = call["hidden_states"]
    require("hidden_states", hidden_states.ndim == 2, "have 2 axes", hidden_states.ndim)
    tokens, hidden = hidden_states.shape[0], hidden_states.shape[1] * 2
    require("hidden_states", tokens > 0, "have a token: the launcher divides by it", tokens)
    check_counts(call)
    local = call["local_num_experts"]
    gated = check_enums(call)
    intermediate = call["intermediate_size"]
    multiple = 64 if gated else 128
    even = intermediate % multiple == 0
    require("intermediate_size", even, f"be a multiple of {multiple}", intermediate)
    require("hidden_states", hidden % 128 == 0, "hold a multiple of 128 columns", hidden)
    rows = intermediate * (1 + gated)
    _check_fp4(call, "hidden_states", "hidden_states_scale", (tokens, hidden))
    _check_fp4(call, "gemm1_weights", "gemm1_weights_scale", (local, rows, hidden))
    _check_fp4(call, "gemm2_weights", "gemm2_weights_scale", (local, hidden, intermediate))
    for name in SCALARS:
        call.tensor(name, call[name], (torch.float32,), (local,))
        require(name, bool(call[name].isfinite().all()), "be finite", call[name])
    check_parameters(call, local, parameters)
    check_biases(call, (local, rows), (local, hidden))

    check_switches(call, tune_max_num_tokens)
    linear = call.features.linear_scales
    layout = call.arguments.get("hidden_states_scale_layout", linear)
    require("hidden_states_scale_layout", layout == linear, f"be {linear!r}", layout)
    check_output(call, tokens, hidden)
    return tokens


def check_switches(call: Call, tune_max_num_tokens: int | None) -> None:
    """Check what every function takes and fp4moe leaves alone."""
    for name in ABSENT:
        require(name, call.arguments.get(name) is None, "be None", call.arguments.get(name))
    require("do_finalize", call["do_finalize"] is True, "be True", call["do_finalize"])
    pdl = call["enable_pdl"]
    require("enable_pdl", pdl is None or type(pdl) is bool, "be None or a bool", pdl)
    _check_tuning(call, tune_max_num_tokens)


def check_counts(call: Call) -> None:
    """Check the numbers of experts."""
    for name in ("num_experts", "top_k", "intermediate_size", "local_num_experts"):
        require(name, type(call[name]) is int and call[name] > 0, "be positive", call[name])
    experts, local = call["num_experts"], call["local_num_experts"]
    offset = call["local_expert_offset"]
    inside = type(offset) is int and 0 <= offset <= experts - local
    require("local_expert_offset", inside, f"be in 0..{experts - local}", offset)
    require("top_k", call["top_k"] <= experts, f"be up to {experts}", call["top_k"])


def check_enums(call: Call) -> bool:
    for name, enum in (
        ("activation_type", call.features.activations),
        ("routing_method_type", call.features.routing_methods),
    ):
        known = isinstance(call[name], int) and call[name] in list(enum)
        require(name, known, f"be a value of {enum.__name__}", call[name])
    activation = call.features.activations(call["activation_type"]).name
    allowed = tuple(name for name in GATED if call.activation in (None, name))
    require("activation_type", activation in allowed, f"be one of {allowed}", activation)
    unspecified = call["routing_method_type"] == call.features.routing_methods["Unspecified"]
    require("routing_method_type", not unspecified, "be specified", "Unspecified")
    return GATED[activation]


def check_parameters(
    call: Call, local: int, meant: dict[str, float] | None, raw: bool = False
) -> None:
    """Check alpha, beta and limit; raw: that the library takes them in the model's units."""
    swiglu = call["activation_type"] == call.features.activations["Swiglu"]
    for name, (argument, scalar) in PARAMETERS.items():
        value = call[argument]
        if meant is not None:
            given = value is not None
            require(argument, given == (name in meant), f"be there for {meant} only", given)
        if value is None:
            continue
        # The entries for other formats refuse others; this one does not look.
        require(argument, swiglu, "be None but for Swiglu", "a tensor")
        call.tensor(argument, value, (torch.float32,), (local,))
        require(argument, bool(value.isfinite().all()), "be finite", value)
        if name == "limit":
            require(argument, bool((value > 0).all()), "be above 0", value)
        if meant is not None:
            physical = value if scalar is None or raw else value * call[scalar]
            # Two roundings of a quotient and one of the product.
            near = torch.full_like(physical, meant[name])
            right = torch.allclose(physical, near, rtol=2.0**-21, atol=0.0)
            unit = f" in units of 1 / {scalar}" if scalar and not raw else ""
            require(argument, right, f"be {meant[name]}{unit}", physical)


def check_biases(call: Call, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    for name, shape in (("gemm1_bias", first), ("gemm2_bias", second)):
        if call[name] is not None:
            call.tensor(name, call[name], (torch.float32,), shape)
            require(name, bool(call[name].isfinite().all()), "be finite", "others")


def _check_fp4(call: Call, packed: str, scale: str, shape: tuple[int, ...]) -> None:
    *outer, columns = shape
    call.tensor(packed, call[packed], (torch.uint8,), (*outer, columns // 2))
    call.tensor(scale, call[scale], (torch.float8_e4m3fn,), (*outer, columns // 16))
    # The tensor cores read unsigned scales: a sign would be dropped, and 0x7f is NaN.
    top = int(call[scale].view(torch.uint8).max())
    require(scale, top < 0x7F, "be finite and not negative", f"byte {top:#x}")


def _check_tuning(call: Call, asked: int | None) -> None:
    got = call["tune_max_num_tokens"]
    if asked is not None:
        require("tune_max_num_tokens", got == asked, f"be {asked}", got)
        return
    fits = type(got) is int and 0 < got <= LARGEST_TUNED and got & (got - 1) == 0
    rule = f"be a power of two up to {LARGEST_TUNED}"
    require("tune_max_num_tokens", fits, rule, got)


def _check_factor(call: Call, used: bool) -> None:
    factor = call["routed_scaling_factor"]
    fine = factor is None or (isinstance(factor, float) and (used or factor == 1.0))
    rule = "be None or a float" if used else "be None or 1.0, for it is ignored here"
    require("routed_scaling_factor", fine, rule, factor)


def check_output(call: Call, tokens: int, hidden: int) -> None:
    output = call["output"]
    if output is None:
        return
    width = min(int(output.shape[-1]), hidden)
    call.tensor("output", output, (torch.bfloat16,), (tokens, width))
    taken = output.untyped_storage().data_ptr()
    for name, value in call.arguments.items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if name != "output" and isinstance(tensor, torch.Tensor):
                fresh = tensor.untyped_storage().data_ptr() != taken
                require("output", fresh, "have memory of its own", f"that of {name}")
