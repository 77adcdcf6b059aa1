"""Experts modules with stacked weights: those that `use_experts_implementation` has stamped, and
others of the same parameters and forward.

Reads how they are stored (models/storage.py), asks `act_fn`, `_apply_gate` or, without stamps, the
forward for its numbers, and compares the class's own forward with the definition. Not handled, with
the reason: a gate that is no `fp4moe.Activation`, norms behind an expert, expert parallelism.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..experts import ExpertWeights
from .block import (
    Candidate,
    adapter_reasons,
    runs_own_forward,
    storage_reasons,
    stored_activation_scales,
    verify_against_definition,
)
from .named_activation import named_activation
from .sharding import Sharding
from .split_experts_module import local_module, split_candidate
from .storage import (
    STAMPS,
    Storage,
    beyond_reasons,
    holds_experts,
    is_stamped,
    possible_storages,
    probe_forward,
)

__all__ = ["describe_experts", "find_experts", "float_parameters", "is_experts_module"]
__all__ += ["STAMPS", "is_stacked_experts"]

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
    return is_stamped(module) and FUSED_CHILD not in module._modules


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether it is an experts module, with stamps or without, and not fused already."""
    return holds_experts(module) and FUSED_CHILD not in module._modules


def find_experts(model: nn.Module) -> list[Candidate]:
    """Return a candidate for each experts module."""
    modules = {path: m for path, m in model.named_modules() if is_stacked_experts(m)}
    config = getattr(model, "config", None)
    sharding = Sharding.of(model)
    found = [_describe(path, m, config, sharding) for path, m in modules.items()]
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


def _describe(path: str, module: Any, config: Any, sharding: Sharding | None) -> Candidate:
    if sharding is None or not sharding.is_done or sharding.style(path) is None:
        return describe_experts(path, module, config)
    local = local_module(module)
    return split_candidate(describe_experts(path, local, config), path, module, local, sharding)


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


def describe_experts(path: str, module: Any, config: Any = None) -> Candidate:
    """Read one experts module; config is that of the model, for a module without its own."""
    stamped = is_stamped(module)
    gated = bool(module.has_gate) if stamped else "gate_up_proj" in module._parameters
    names = ("gate_up_proj" if gated else "up_proj", "down_proj")
    tensors = {n: getattr(module, n, None) for n in names}
    lazy: dict[str, torch.Tensor] = {
        n: p for n, p in tensors.items() if isinstance(p, nn.UninitializedParameter)
    }
    parameters = {
        n: p
        for n, p in tensors.items()
        if n not in lazy and isinstance(p, torch.Tensor) and p.ndim == 3
    }
    candidate = Candidate(path=path, module=module, parameters=parameters, gated=gated)
    candidate.top_k = _top_k(getattr(module, "config", config))
    reasons = candidate.reasons
    if len(parameters) != 2:
        if not lazy:
            reasons.append(f"it has no 3-D parameters {names[0]} and down_proj")
        reasons += storage_reasons(module, lazy)
        return candidate
    candidate.num_experts = parameters[names[0]].shape[0]
    reasons += adapter_reasons(None, module, [*parameters])
    storage: Storage | None = Storage.of(module) if stamped else None
    if storage is None and reasons:
        return candidate
    if storage is None:
        storage, candidate.activation, why = _by_its_forward(module)
        reasons += [why] if why else []
        # For the sizes alone, where no form fits.
        storage = storage or next(possible_storages(module), None)
        if storage is None:
            return candidate
    for _, name in storage.biases:
        if isinstance(bias := getattr(module, name, None), torch.Tensor):
            parameters[name] = bias
    candidate.storage, candidate.biased = storage, bool(storage.biases)
    candidate.hidden_size, candidate.intermediate_size = storage.sizes(parameters[storage.first])
    reasons += storage_reasons(module, parameters)
    if not runs_own_forward(module):
        reasons.append("its forward was replaced on the instance; undo that first")
    if getattr(module, "has_post_expert_norm", False):
        reasons.append("it has a norm behind each expert")
    if getattr(module, "_is_expert_parallel", False):
        reasons.append("it is split by expert parallelism; replace it before it is distributed")
    reasons += _shape_reasons(candidate, storage)
    if stamped:
        candidate.activation, why = _activation(module, storage)
        reasons += [why] if why else []
    if reasons or candidate.activation is None:
        return candidate
    options = {"module": module, "storage": storage, "activation": candidate.activation}
    candidate.quantize = functools.partial(_quantize, **options)
    candidate.verify = functools.partial(_verify, **options)
    return candidate


def _top_k(config: Any) -> int | None:
    for owner in (config, getattr(config, "text_config", None)):
        for name in TOP_K_NAMES:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def _shape_reasons(candidate: Candidate, storage: Storage) -> list[str]:
    """Return which parameters do not go with the first one."""
    assert candidate.num_experts is not None and candidate.hidden_size is not None
    assert candidate.intermediate_size is not None
    sizes = candidate.num_experts, candidate.hidden_size, candidate.intermediate_size
    shapes = {n: tuple(p.shape) for n, p in candidate.parameters.items()}
    wanted = storage.shapes(*sizes)
    return [
        f"{name} is {list(shapes[name]) if name in shapes else 'missing'}, which with "
        f"{storage.first} {list(shapes[storage.first])} must be {list(shape)}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape and name != storage.first
    ]


def _by_its_forward(module: Any) -> tuple[Storage | None, str | None, str]:
    """Return (storage, activation, "") of a module without stamps, or (None, None, reason)."""
    whys: list[str] = []
    for storage in possible_storages(module):
        try:
            name, why = probe_forward(module, storage)
        except Exception as error:  # the model's code may raise anything
            whys.append(f"its forward cannot be asked for its numbers: {error}")
            continue
        if name is not None:
            return storage, name, ""
        whys.append(f"what its forward computes {why}")
    held = {name: list(p.shape) for name, p in module._parameters.items() if p is not None}
    return None, None, whys[0] if whys else f"its parameters {held} are no weights of experts"


def _tensors(module: Any, storage: Storage) -> dict[str, torch.Tensor]:
    return {name: getattr(module, name).detach() for name in storage.names}


def _quantize(
    method: str, format: str, *, module: Any, storage: Storage, activation: str
) -> ExpertWeights:
    options = storage.quantize_arguments(_tensors(module, storage))
    options |= stored_activation_scales(module, format)
    with torch.no_grad():
        return ExpertWeights.quantize(
            **options, activation=activation, method=method, format=format
        )


def _verify(module: Any, storage: Storage, activation: str) -> list[str]:
    # The class's own loop, whatever implementation is configured, and what a subclass adds to it.
    eager = object.__new__(type(module))
    vars(eager).update(vars(module))
    stamped = is_stamped(module)
    if stamped:
        eager.config = _EagerConfig(module.config)
    forward = functools.partial(type(module).forward, eager)
    parts = storage.split(_tensors(module, storage))
    reasons = verify_against_definition(forward, parts, activation)
    return reasons if stamped or reasons else beyond_reasons(module, storage)


def float_parameters(
    module: Any, weights: ExpertWeights, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return packed weights as the stamped module would hold them, by parameter name."""
    return Storage.of(module).join(weights.dequantize(dtype))


class _EagerConfig:
    """A configuration that asks for the class's own forward; else that of the model."""

    _experts_implementation = "eager"

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _activation(module: Any, storage: Storage) -> tuple[str | None, str]:
    """Return (activation, "") or (None, why it is none of ours)."""
    method = "_apply_gate" if storage.gated else "act_fn"

    def combine(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        if gate is None:
            return module.act_fn(up)
        rows = {"gate": gate[..., None], "up": up[..., None], "down": up[..., None]}
        stacked = Storage(True, storage.layout).join(rows)["gate_up_proj"]
        return module._apply_gate(stacked[..., 0])

    try:
        name, why = named_activation(combine, storage.gated)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return None, f"its {method} refuses a float32 probe of shape [1, N]: {error}"
    return name, f"its {method} {why}" if why else ""
