"""Blocks that loop in Python over a ModuleList of per-expert MLPs.

Structure proposes: two or more items with up, down (and gate) Linears, next to a router.
Numbers decide: `module_list_probe` asks the experts' and the block's own forward.
Not handled, with the reason: unequal experts, norms within experts, hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..borrowed import random_state_kept
from ..experts import ExpertWeights
from ..module import FusedExperts
from ..precision import float32_as_written
from ..resize import stack_experts
from .block import MERGE, Candidate, storage_reasons, stored_activation_scales
from .module_list_block import BlockForm, FusedMoeBlock
from .module_list_probe import FloatExperts, confirm_form, find_form, identify_expert

__all__ = ["find_module_lists", "untouched"]

# What an expert's Linears are called; the first row whose names are all there counts.
ROLE_NAMES: tuple[dict[str, str], ...] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "w1", "down": "w2"},
    {"up": "fc1", "down": "fc2"},
)
ROUTER_WORDS = ("gate", "rout")


def find_module_lists(model: nn.Module) -> list[Candidate]:
    """Return a candidate for each block that loops over a ModuleList of expert MLPs."""
    found = []
    for path, module in model.named_modules():
        lists = {n: roles for n, c in module.named_children() if (roles := _roles(c))}
        routed = {n: r for n in lists if (r := _router(module, n))}
        if routed:
            name = next(iter(routed))
            candidate = _describe(path, module, name, routed[name], lists[name])
            if len(lists) > 1:
                candidate.reasons.append(f"it has several lists of experts: {', '.join(lists)}")
            found.append(candidate)
    return found


def _roles(child: nn.Module) -> dict[str, str] | None:
    """Return which Linear is gate, up and down, if this is a list of MLPs."""
    if not isinstance(child, nn.ModuleList) or len(child) < 2:
        return None
    for roles in ROLE_NAMES:
        if all(_is_linear(getattr(e, n, None)) for e in child for n in roles.values()):
            return roles
    return None


def _is_linear(module: Any) -> bool:
    """Whether this is a Linear, or one in an adapter."""
    return isinstance(getattr(module, "base_layer", module), nn.Linear)


def _tensors(linear: Any) -> dict[str, torch.Tensor]:
    bias = getattr(linear, "bias", None)
    return {"weight": linear.weight} | ({} if bias is None else {"bias": bias})


def _router(block: nn.Module, experts: str) -> str | None:
    count = len(getattr(block, experts))
    for name, child in block.named_children():
        if name == experts or not any(word in name for word in ROUTER_WORDS):
            continue
        tensors = [*child.parameters(), *child.buffers()]
        if any(count in tensor.shape for tensor in tensors):
            return name
    return None


def _describe(
    path: str, block: nn.Module, name: str, router: str, roles: dict[str, str]
) -> Candidate:
    experts = list(getattr(block, name))
    parameters = {
        f"{name}.{i}.{n}.{part}": tensor
        for i, expert in enumerate(experts)
        for n in roles.values()
        for part, tensor in _tensors(getattr(expert, n)).items()
    }
    candidate = Candidate(path=path, module=block, parameters=parameters, gated="gate" in roles)
    up = getattr(experts[0], roles["up"])
    candidate.num_experts = len(experts)
    candidate.biased = any(key.endswith(".bias") for key in parameters)
    candidate.hidden_size, candidate.intermediate_size = up.in_features, up.out_features
    reasons = candidate.reasons
    reasons += storage_reasons(block, parameters)
    reasons += _block_reasons(path, block)
    unequal = _expert_reasons(experts, roles)
    reasons += unequal
    if not unequal:
        roles = _confirmed_roles(experts[0], roles)
        candidate.activation, why = _activation(experts, roles)
        reasons += [why] if why else []
    if reasons or candidate.activation is None:
        return candidate
    plan = _Plan(block, name, router, roles, candidate.activation, weakref.ref(candidate))
    candidate.quantize = functools.partial(_quantize, block, experts, roles, candidate.activation)
    candidate.build = plan.build
    candidate.verify = plan.verify
    return candidate


def _block_reasons(path: str, block: nn.Module) -> list[str]:
    reasons = []
    if not path:
        reasons.append("it is the model itself; wrap it in a module")
    arguments = list(inspect.signature(type(block).forward).parameters)[1:]
    if len(arguments) != 1:
        reasons.append(
            f"its forward takes ({', '.join(arguments)}), a fused block the hidden states alone"
        )
    replaced = [n for n, m in block.named_modules() if "forward" in vars(m)]
    if replaced:
        where = replaced[0] or type(block).__name__
        reasons.append(f"the forward of {where} was replaced on the instance; undo that first")
    return reasons


def _expert_reasons(experts: list[nn.Module], roles: dict[str, str]) -> list[str]:
    """Return what forbids fusing these experts, by what they hold."""
    reasons = []
    classes = {type(expert) for expert in experts}
    if len(classes) > 1:
        names = ", ".join(sorted(c.__name__ for c in classes))
        reasons.append(f"its experts are of several classes ({names})")
    up = getattr(experts[0], roles["up"])
    hidden, intermediate = up.in_features, up.out_features
    expected = {role: (intermediate, hidden) for role in roles} | {"down": (hidden, intermediate)}
    for index, expert in enumerate(experts):
        linears = {role: getattr(expert, n) for role, n in roles.items()}
        for role, linear in linears.items():
            where = f"expert {index}'s {roles[role]}"
            if hasattr(linear, "base_layer"):
                adapter = f"{type(linear).__module__}.{type(linear).__name__}"
                reasons.append(f"{where} is in an adapter ({adapter}); {MERGE}")
            elif type(linear) is not nn.Linear:
                reasons.append(f"{where} is a {type(linear).__name__}, not a plain Linear")
            elif (linear.out_features, linear.in_features) != expected[role]:
                size = [linear.out_features, linear.in_features]
                reasons.append(f"{where} is {size}, that of expert 0 {list(expected[role])}")
        known = {f"{n}.{p}" for n in roles.values() for p in ("weight", "bias")}
        tensors = [n for n, _ in (*expert.named_parameters(), *expert.named_buffers())]
        extra = [
            n for n in tensors if n not in known and n.rpartition(".")[0] not in roles.values()
        ]
        if extra:
            owner = expert.get_submodule(extra[0].rpartition(".")[0])
            reasons.append(
                f"expert {index} holds {extra[0]} ({type(owner).__name__}) beside its Linears"
            )
        if reasons:
            break
    return reasons


def _confirmed_roles(expert: nn.Module, roles: dict[str, str]) -> dict[str, str]:
    """Exchange gate and up where the names say one thing and the numbers the other."""
    if "gate" not in roles:
        return roles
    exchanged = {"gate": roles["up"], "up": roles["gate"], "down": roles["down"]}
    with random_state_kept():
        fits = [identify_expert(expert, r)[0] for r in (roles, exchanged)]
    return exchanged if fits[0] is None and fits[1] is not None else roles


def _activation(experts: list[nn.Module], roles: dict[str, str]) -> tuple[str | None, str]:
    """Return (activation, "") or (None, why the experts are no MLPs of ours)."""
    names = []
    # Experts may drop out at random while they train.
    with random_state_kept():
        for index, expert in enumerate(experts):
            name, why = identify_expert(expert, roles)
            if name is None:
                hint = "; it is in training mode, call eval() first" if expert.training else ""
                return None, f"expert {index} is a {type(expert).__name__} {why}{hint}"
            names.append(name)
    if len(set(names)) > 1:
        return None, f"its experts have several activations ({', '.join(sorted(set(names)))})"
    return names[0], ""


def _quantize(
    block: nn.Module,
    experts: list[nn.Module],
    roles: dict[str, str],
    activation: str,
    method: str,
    format: str,
) -> ExpertWeights:
    biased = any(getattr(e, n).bias is not None for e in experts for n in roles.values())
    options: dict[str, Any] = {"activation": activation, "method": method, "format": format}

    def quantized(index: int) -> ExpertWeights:
        linears = {r: getattr(experts[index], n) for r, n in roles.items()}
        weights = {r: linear.weight.detach()[None] for r, linear in linears.items()}
        if biased:
            # Those that lack one have zeros, as ExpertWeights does for a whole layer.
            weights |= {
                f"{r}_bias": weights[r].new_zeros(1, weights[r].shape[1])
                if linear.bias is None
                else linear.bias.detach()[None]
                for r, linear in linears.items()
            }
        return ExpertWeights.quantize(**weights, **options)

    with torch.no_grad():
        packed = stack_experts(len(experts), quantized)
        for name, scale in stored_activation_scales(block, format).items():
            getattr(packed, name).copy_(scale)
    return packed


@contextlib.contextmanager
def untouched(block: nn.Module, device: torch.device) -> Iterator[list[str]]:
    """Run without gradients; put random state and buffers back, and list the buffers changed."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    changed: list[str] = []
    with (
        torch.no_grad(),
        random_state_kept(device),
        float32_as_written(device),
    ):
        try:
            yield changed
        finally:
            for module, name, buffer, value in before:
                if module._buffers[name] is not buffer or not torch.equal(buffer, value):
                    changed.append(name)
                    module._buffers[name] = buffer
                    buffer.copy_(value)


@dataclasses.dataclass
class _Plan:
    """How to verify and replace one block; the form is known once it is verified."""

    block: nn.Module
    experts: str
    router: str
    roles: dict[str, str]
    activation: str
    # Weak: a cycle would keep the float weights until the next garbage collection.
    candidate: weakref.ref[Candidate]
    form: BlockForm | None = None

    def verify(self) -> list[str]:
        """Find the one form that fits; return the reasons where none does."""
        experts = list(getattr(self.block, self.experts))
        up = getattr(experts[0], self.roles["up"])
        width, device = up.in_features, up.weight.device
        with untouched(self.block, device) as changed:
            args = (self.experts, self.router, self.roles, self.activation, width)
            form, why = find_form(self.block, *args)
            if form is None:
                return [why]
            hidden_size = getattr(self.block, form.latent[0]).in_features if form.latent else width
            definition = FloatExperts(experts, self.roles, self.activation)
            form, reasons = confirm_form(self.block, form, definition, hidden_size)
        if changed:
            reasons.append(
                f"its forward changes {', '.join(changed)}, which a fused block would not"
            )
        if not reasons:
            self.form = form
            if candidate := self.candidate():
                candidate.top_k = form.top_k
        return reasons

    def build(self, fused: FusedExperts) -> nn.Module:
        """Return the block that takes the place of the old one."""
        if self.form is None and (reasons := self.verify()):
            raise RuntimeError(f"the block has changed since it was verified: {reasons[0]}")
        assert self.form is not None
        return FusedMoeBlock(self.block, self.form, fused)
