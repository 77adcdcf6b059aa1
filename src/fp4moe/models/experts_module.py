"""Hugging Face experts modules: those that `use_experts_implementation` has stamped.

Reads the stamps (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`, ...), asks `act_fn`
and `_apply_gate` for their numbers, and compares the class's own forward with the definition.
Not handled, with the reason: biases, a gate that is not act(gate) * up (clamps), norms behind an
expert, expert parallelism.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..activations import ACTIVATIONS, identify_activation, probe_values
from ..experts import ExpertWeights, split_gate_up
from .block import (
    Candidate,
    adapter_reasons,
    runs_own_forward,
    storage_reasons,
    stored_activation_scales,
    verify_against_definition,
)

__all__ = ["describe_experts", "find_experts", "float_parameters", "is_experts_module"]
__all__ += ["STAMPS"]

# What `use_experts_implementation` sets on every instance.
STAMPS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

# Where `experts_implementation="fp4moe"` keeps the fused experts of a module.
FUSED_CHILD = "fp4moe"
TOP_K_NAMES = (
    "num_experts_per_tok",
    "top_k_experts",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k",
)


def is_experts_module(module: nn.Module) -> bool:
    """Whether the module carries the decorator's stamps and is not fused already."""
    stamped = all(hasattr(module, stamp) for stamp in STAMPS)
    return stamped and FUSED_CHILD not in module._modules


def find_experts(model: nn.Module) -> list[Candidate]:
    """Return a candidate for each stamped experts module."""
    found = [describe_experts(path, m) for path, m in model.named_modules() if is_experts_module(m)]
    reason = _half_loaded(model)
    for candidate in found:
        parent, _, name = candidate.path.rpartition(".")
        if name:
            around, names = model.get_submodule(parent), [*candidate.parameters]
            wrapped = adapter_reasons(around, candidate.module, names)
            candidate.reasons += [why for why in wrapped if why not in candidate.reasons]
        if reason:
            candidate.reasons.append(reason)
        if not candidate.path:
            candidate.reasons.append("it is the model itself; wrap it in a module")
    return found


def _half_loaded(model: nn.Module) -> str | None:
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None:
        return None
    # transformers skips methods that it does not know and leaves the experts at random values.
    return (
        f"the model says that it was loaded from a {method!r} checkpoint, which transformers "
        "cannot read: its float experts "
        "are random; load a bfloat16 checkpoint"
    )


def describe_experts(path: str, module: Any) -> Candidate:
    """Read one stamped experts module."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    tensors = {n: getattr(module, n, None) for n in (name, "down_proj")}
    lazy: dict[str, torch.Tensor] = {
        n: p for n, p in tensors.items() if isinstance(p, nn.UninitializedParameter)
    }
    parameters = {
        n: p
        for n, p in tensors.items()
        if n not in lazy and isinstance(p, torch.Tensor) and p.ndim == 3
    }
    candidate = Candidate(
        path=path, module=module, parameters=parameters, gated=bool(module.has_gate)
    )
    config = module.config
    candidate.top_k = next(
        (getattr(config, n) for n in TOP_K_NAMES if isinstance(getattr(config, n, None), int)), None
    )
    reasons = candidate.reasons
    if len(parameters) != 2:
        if not lazy:
            reasons.append(f"it has no 3-D parameters {name} and down_proj")
        reasons += storage_reasons(module, lazy)
        return candidate
    first, down = parameters[name], parameters["down_proj"]
    rows, columns = (2, 1) if module.is_transposed else (1, 2)
    candidate.num_experts, candidate.hidden_size = first.shape[0], first.shape[columns]
    candidate.intermediate_size = first.shape[rows] // (2 if module.has_gate else 1)
    reasons += storage_reasons(module, parameters)
    reasons += adapter_reasons(None, module, [*parameters])
    if not runs_own_forward(module):
        reasons.append("its forward was replaced on the instance; undo that first")
    if module.has_bias:
        reasons.append("its experts have biases, which the operator does not add")
    if getattr(module, "has_post_expert_norm", False):
        reasons.append("it has a norm behind each expert")
    if getattr(module, "_is_expert_parallel", False):
        reasons.append("it is split by expert parallelism; replace it before it is distributed")
    candidate.activation, why = _activation(module)
    if why:
        reasons.append(why)
    if reasons or candidate.activation is None:
        return candidate
    layout = "gate_up" if module.is_concatenated else "gate_up_interleaved"
    stacked = {"gate_up": first} if module.has_gate else {"up": first}
    candidate.quantize = functools.partial(
        _quantize,
        module=module,
        stacked=stacked,
        down=down,
        layout=layout,
        transposed=module.is_transposed,
        activation=candidate.activation,
    )
    candidate.verify = functools.partial(_verify, module, first, down, layout, candidate.activation)
    return candidate


def _quantize(method: str, *, module: nn.Module, stacked: dict, **options: Any) -> ExpertWeights:
    options |= stored_activation_scales(module)
    with torch.no_grad():
        return ExpertWeights.quantize(**stacked, method=method, **options)


def _verify(
    module: Any, first: torch.Tensor, down: torch.Tensor, layout: str, activation: str
) -> list[str]:
    first, down = first.detach(), down.detach()
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    gate, up = split_gate_up(first, layout) if module.has_gate else (None, first)
    # The class's own loop, whatever implementation is configured, and what a subclass adds to it.
    eager = object.__new__(type(module))
    vars(eager).update(vars(module))
    eager.config = _EagerConfig(module.config)
    forward = functools.partial(type(module).forward, eager)
    return verify_against_definition(forward, up=up, down=down, gate=gate, activation=activation)


def float_parameters(
    module: Any, weights: ExpertWeights, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return packed weights as the stamped module would hold them, by parameter name."""
    parts = weights.dequantize(dtype)
    if not module.has_gate:
        first = parts["up"]
    elif module.is_concatenated:
        first = torch.cat((parts["gate"], parts["up"]), 1)
    else:
        first = torch.stack((parts["gate"], parts["up"]), 2).flatten(1, 2)
    named = {"gate_up_proj" if module.has_gate else "up_proj": first, "down_proj": parts["down"]}
    if module.is_transposed:
        named = {name: tensor.transpose(1, 2) for name, tensor in named.items()}
    return {name: tensor.contiguous() for name, tensor in named.items()}


class _EagerConfig:
    """A configuration that asks for the class's own forward; else that of the model."""

    _experts_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _activation(module: Any) -> tuple[str | None, str]:
    """Return (activation, "") or (None, why it is none of ours)."""
    known = ", ".join(ACTIVATIONS)
    if not module.has_gate:
        name = identify_activation(module.act_fn)
        return name, "" if name else f"its act_fn is not one of the activations {known}"
    probe = probe_values()
    # Every gate meets every sign and size of up.
    gate, up = probe, probe.flip(1)
    stacked = (
        torch.cat((gate, up), 1)
        if module.is_concatenated
        else torch.stack((gate, up), 2).flatten(1)
    )
    try:
        with torch.no_grad():
            result = module._apply_gate(stacked)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return None, f"its _apply_gate refuses a float32 [1, {stacked.shape[1]}] probe: {error}"
    for name, activation in ACTIVATIONS.items():
        expected = activation.function(gate) * up
        # 16 float32 roundings of a gate times |up| <= 40; the two GELUs differ by 4.7e-4 times
        # |up|.
        limit = 2e-6 * 40 * torch.clamp(expected.abs(), min=1.0)
        if result.shape == expected.shape and bool(((result - expected).abs() <= limit).all()):
            return name, ""
    return (
        None,
        f"its _apply_gate is not act(gate) * up with one of the activations {known} (a clamp or a "
        "variant?)",
    )
