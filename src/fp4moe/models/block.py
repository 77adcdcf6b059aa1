"""A mixture-of-experts block found in a model, and the checks that every kind of block must pass.

The finders are `models/experts_module.py` (experts modules with Hugging Face's stamps) and
`models/module_list.py` (a Python loop over per-expert MLPs).
"""

from __future__ import annotations

import copy
import dataclasses
import dis
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..activations import get_activation
from ..experts import ExpertWeights
from ..formats import DEFAULT_FORMAT, FORMATS
from ..module import FusedExperts
from ..part import Part
from ..precision import float32_as_written
from ..random_floats import random_normal, random_uniform
from ..reference import moe_definition
from .named_activation import rms_error

if TYPE_CHECKING:
    from .storage import Storage

__all__ = [
    "ACTIVATION_SCALES",
    "MERGE",
    "Candidate",
    "as_default_scales",
    "carry_hooks",
    "runs_own_forward",
    "storage_reasons",
    "stored_activation_scales",
    "tensor_reasons",
    "value_reasons",
    "verify_against_definition",
]

# Where `calibrate` leaves (hidden_scale [1], intermediate_scale [L]) of the default format with a
# float module.
ACTIVATION_SCALES = "fp4moe_activation_scales"
MERGE = "merge the adapter first (merge_and_unload())"
ON_META = "is on the meta device (not loaded, or offloaded); load it onto a real device"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative RMS limit between a block and the definition on the same float weights: four roundings to
# the dtype (gate, up, their product, down) and cancellation in the sum give a few eps / 2; a wrong
# form gives 10 % and more.
VERIFY_LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclasses.dataclass
class Candidate:
    """One block.

    Attributes:
        path: dotted name of the module that is replaced.
        module: that module.
        parameters: its expert weights by dotted name below `path`.
        reasons: why it cannot be replaced; empty where it can.
        storage: how the module keeps stacked experts; None for a list of them.
        activation, gated, num_experts, top_k, hidden_size, intermediate_size: None where unknown.
        biased: whether gate, up or down has a bias.
        quantize: packs the weights, by method ("max" or "mse") and number format.
        build: makes the module that takes its place out of the fused experts.
        verify: runs the float block against the definition and returns the reasons where they
            differ.
        part: of experts that processes share: format -> which part of them this one gets.
    """

    path: str
    module: nn.Module
    parameters: dict[str, torch.Tensor]
    reasons: list[str] = dataclasses.field(default_factory=list)
    storage: Storage | None = None
    activation: str | None = None
    gated: bool | None = None
    biased: bool = False
    num_experts: int | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    quantize: Callable[[str, str], ExpertWeights] | None = None
    build: Callable[[FusedExperts], nn.Module] = lambda fused: fused
    verify: Callable[[], list[str]] | None = None
    part: Callable[[str], Part] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the expert weights as they are now."""
        return sum(p.nbytes for p in self.parameters.values())


def stored_activation_scales(
    module: nn.Module, format: str = DEFAULT_FORMAT
) -> dict[str, torch.Tensor]:
    """Return what `calibrate` left here as keywords of ExpertWeights.quantize.

    {} if there is nothing, or nothing that the format stores.
    """
    scales, to = getattr(module, ACTIVATION_SCALES, None), FORMATS[format].activation_range
    if scales is None or to is None:
        return {}
    ratio = (FORMATS[DEFAULT_FORMAT].activation_range or 1.0) / to
    return {"hidden_scale": scales[0] * ratio, "intermediate_scale": scales[1] * ratio}


def as_default_scales(scales: tuple[torch.Tensor, ...], format: str) -> tuple[torch.Tensor, ...]:
    """Return a format's activation scales as those of the default format, to be left here."""
    default = FORMATS[DEFAULT_FORMAT].activation_range or 1.0
    ratio = (FORMATS[format].activation_range or default) / default
    return tuple(scale * ratio for scale in scales)


def tensor_reasons(parameters: dict[str, torch.Tensor]) -> list[str]:
    """Return why these weights cannot be read: where and how they are stored."""
    reasons = []
    for name, parameter in parameters.items():
        if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            reasons.append(f"{name} is uninitialised; run the model once or load its weights")
        elif not parameter.numel():
            reasons.append(f"{name} is empty, {list(parameter.shape)}; mend the configuration")
        elif parameter.device.type == "meta":
            reasons.append(f"{name} {ON_META}")
        elif type(parameter.data) is not torch.Tensor:
            reasons.append(
                f"{name} is a {type(parameter.data).__name__}, not a plain tensor; gather or "
                "dequantise it first"
            )
        elif parameter.dtype not in FLOAT_DTYPES:
            reasons.append(
                f"{name} is {parameter.dtype}, not bfloat16, float16 or float32; dequantise it "
                "first"
            )
        elif parameter.untyped_storage().nbytes() == 0 and parameter.numel():
            reasons.append(f"{name} has no storage (it was released); load the model again")
    devices = {str(p.device) for p in parameters.values()}
    if len(devices) > 1:
        reasons.append(
            f"its weights are on several devices ({', '.join(sorted(devices))}); move them to one"
        )
    return reasons


def storage_reasons(module: nn.Module, parameters: dict[str, torch.Tensor]) -> list[str]:
    """Return why a module with these weights cannot be replaced: storage, and its hooks."""
    reasons = tensor_reasons(parameters)
    for part in module.modules():
        hooks = list(_accelerate_hooks(part))
        if any(getattr(hook, "offload", False) for hook in hooks):
            reasons.append("its weights are offloaded by accelerate; load the model onto a device")
            break
        others = part._forward_hooks or part._forward_pre_hooks
        if others or not all(_only_moves(hook) for hook in hooks):
            reasons.append(
                "it has forward hooks, which would be lost; remove them and register them again"
            )
            break
    return reasons


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _only_moves(hook: Any) -> bool:
    # Not a class derived from it, which may do more.
    return (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Put accelerate's hooks of a module, which move its inputs, on what takes its place."""
    for hook in _accelerate_hooks(old):
        from accelerate.hooks import add_hook_to_module

        hook = copy.copy(hook)
        # It knows tied weights by addresses, at which packed ones may lie by now.
        hook.tied_params_map = None
        add_hook_to_module(new, hook, append=True)


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call runs the class's forward, be it inside accelerate's hook or left by it."""
    hooked = "_hf_hook" in vars(module)
    forward = vars(module).get("_old_forward" if hooked else "forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def adapter_reasons(parent: nn.Module | None, module: nn.Module, names: list[str]) -> list[str]:
    """Return why packing would break an adapter that is at work on a module's parameters.

    Args:
        parent: the module that holds `module`, where it is known.
        module: what holds the parameters.
        names: their names.
    """
    wrapped = [n for n in names if parametrize.is_parametrized(module, n)]
    if wrapped:
        return [f"{', '.join(wrapped)} is parametrised, as unmerged adapters do it; {MERGE}"]
    if parent is None:
        return []
    kind = type(parent).__name__
    if getattr(parent, "base_layer", None) is module:
        return [f"{kind} around it holds an adapter that is not merged; {MERGE}"]
    held = {*vars(parent), *parent._parameters, *parent._buffers, *parent._modules}
    if read := sorted((_names_read(type(parent)) & set(names)) - held):
        return [f"{kind} around it reads its {', '.join(read)}; {MERGE}"]
    return []


def _names_read(kind: type) -> set[str]:
    """Return the names of the attributes that the methods of a class read once it is made."""
    members = [(n, member) for base in kind.__mro__ for n, member in vars(base).items()]
    functions = [
        inspect.unwrap(getattr(member, "fget", member)) for n, member in members if n != "__init__"
    ]
    return {
        str(instruction.argval)
        for function in functions
        if inspect.isfunction(function)
        for instruction in dis.get_instructions(function)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
    }


def value_reasons(candidate: Candidate) -> list[str]:
    """Return why the numbers forbid replacing: inf, NaN, or that it computes something else."""
    for name, parameter in candidate.parameters.items():
        for expert, weight in enumerate(
            parameter.detach() if parameter.ndim == 3 else parameter.detach().unsqueeze(0)
        ):
            if not bool(torch.isfinite(weight.abs().amax())):
                where = f"{name}, expert {expert}," if parameter.ndim == 3 else name
                return [f"{where} holds inf or NaN; load a sound checkpoint"]
    return candidate.verify() if candidate.verify else []


def verify_against_definition(
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    parts: dict[str, torch.Tensor],
    activation: str,
) -> list[str]:
    """Run a float block and the definition on a few tokens; return the reason where they differ.

    Args:
        forward: (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].
        parts: gate (gated only), up, down and their biases, as `moe_definition` takes them.
        activation: what it should be.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    up = parts["up"]
    experts, _, hidden_size = up.shape
    top_k = min(2, experts)
    hidden = random_normal(generator, (5, hidden_size)).to(up.device, up.dtype)
    ids = random_uniform(generator, (5, experts)).argsort(1)[:, :top_k].to(up.device)
    weights = random_uniform(generator, (5, top_k)).to(up.device)
    form = "gated " if "gate" in parts else ""
    limit = VERIFY_LIMIT[up.dtype]

    def check(hidden: torch.Tensor, ids: torch.Tensor, what: str) -> list[str]:
        with torch.no_grad(), float32_as_written(up.device):
            try:
                actual = forward(hidden, ids, weights).float()
            except Exception as raised:  # the model's code may raise anything
                return [f"its forward refuses five random {up.dtype} tokens: {raised}"]
            options: dict[str, Any] = {**parts, "activation": activation}
            expected = moe_definition(hidden.float(), ids, weights, **options)
        if actual.shape != expected.shape:
            return [f"its forward returns {list(actual.shape)} for {list(hidden.shape)} tokens"]
        error = rms_error(actual, expected)
        if error <= limit:
            return []
        return [
            f"it does not compute a {form}{activation} mixture of experts: relative error "
            f"{error:.2g} on {what}, limit {limit:g}"
        ]

    reasons = check(hidden, ids, "random tokens")
    if not reasons and not get_activation(activation).plain:
        # Of these tokens most gates and ups lie beyond limits and caps.
        first = up[ids[:, 0]].float()
        size = (first @ hidden.float()[..., None]).square().mean().sqrt()
        if bool(size > 0):
            reasons = check(hidden * (30 / size).to(hidden.dtype), ids, "large random tokens")
    return reasons
