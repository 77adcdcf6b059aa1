"""How a module holds the stacked weights and biases of its experts: names, order, orientation.

Read off the stamps of `use_experts_implementation`. A class without them (transformers' step3p7, or
a user's own) is known by the names of its parameters, and its own forward says the rest: it runs on
tiny experts whose output shows what it does with gate and up.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..experts import split_gate_up
from .named_activation import named_activation

__all__ = ["STAMPS", "Storage", "beyond_reasons", "holds_experts", "is_stamped"]
__all__ += ["possible_storages", "probe_forward"]

# What `use_experts_implementation` sets on every instance.
STAMPS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Of tiny experts; unlike, so that another orientation fails.
HIDDEN, INNER = 3, 2
Parts = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where a module of E experts keeps them.

    Attributes:
        gated: `gate_up_proj` or `up_proj`, beside `down_proj`.
        layout: order of the rows of gate_up_proj, see ExpertWeights.quantize.
        transposed: [E, in, out] instead of [E, out, in].
        biases: name of the bias by that of its weight; empty without.
    """

    gated: bool
    layout: str = "gate_up"
    transposed: bool = False
    biases: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, module: Any) -> Storage:
        """Read the stamps of a module."""
        layout = "gate_up" if module.is_concatenated else "gate_up_interleaved"
        first = "gate_up_proj" if module.has_gate else "up_proj"
        names = (first, "down_proj") if module.has_bias else ()
        biases = tuple((name, f"{name}_bias") for name in names)
        return cls(bool(module.has_gate), layout, bool(module.is_transposed), biases)

    @property
    def first(self) -> str:
        """Name of the weight of the first GEMM."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, weights first."""
        return (self.first, "down_proj", *dict(self.biases).values())

    def sizes(self, first: torch.Tensor) -> tuple[int, int]:
        """Return (hidden, intermediate) of the first weight."""
        rows, columns = first.shape[1:] if not self.transposed else first.shape[:0:-1]
        return columns, rows // (1 + self.gated)

    def shapes(self, experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter."""
        rows = {self.first: (1 + self.gated) * intermediate, "down_proj": hidden}
        columns = {self.first: hidden, "down_proj": intermediate}
        shapes: dict[str, tuple[int, ...]] = {
            name: (experts, *((columns[name], r) if self.transposed else (r, columns[name])))
            for name, r in rows.items()
        }
        return shapes | {bias: (experts, rows[weight]) for weight, bias in self.biases}

    def quantize_arguments(self, tensors: Parts) -> dict[str, Any]:
        """Return these parameters as arguments of ExpertWeights.quantize."""
        stem = self.first.removesuffix("_proj")
        biases = {
            f"{weight.removesuffix('_proj')}_bias": tensors[bias] for weight, bias in self.biases
        }
        weights = {stem: tensors[self.first], "down": tensors["down_proj"]}
        return {**weights, **biases, "layout": self.layout, "transposed": self.transposed}

    def split(self, tensors: Parts) -> dict[str, torch.Tensor]:
        """Return views as ExpertWeights.dequantize names them: gate and up [E, I, H], ..."""
        first, down = tensors[self.first], tensors["down_proj"]
        if self.transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        biases = {weight: tensors[bias] for weight, bias in self.biases}
        parts = {"up": first, "down": down}
        if self.gated:
            parts |= dict(zip(("gate", "up"), split_gate_up(first, self.layout), strict=True))
        if self.first in biases:
            bias = biases[self.first]
            parts["up_bias"] = bias
            if self.gated:
                pair = split_gate_up(bias[..., None], self.layout)
                parts |= {
                    name: half[..., 0]
                    for name, half in zip(("gate_bias", "up_bias"), pair, strict=True)
                }
        if "down_proj" in biases:
            parts["down_bias"] = biases["down_proj"]
        return parts

    def join(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Undo `split`: the parameters by name, contiguous."""

        def stacked(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            if self.layout == "gate_up":
                return torch.cat((gate, up), 1)
            return torch.stack((gate, up), 2).flatten(1, 2)

        first = stacked(parts["gate"], parts["up"]) if self.gated else parts["up"]
        named = {self.first: first, "down_proj": parts["down"]}
        if self.transposed:
            named = {name: tensor.transpose(1, 2) for name, tensor in named.items()}
        for weight, bias in self.biases:
            if weight == "down_proj":
                named[bias] = parts["down_bias"]
            elif self.gated:
                named[bias] = stacked(parts["gate_bias"], parts["up_bias"])
            else:
                named[bias] = parts["up_bias"]
        return {name: tensor.contiguous() for name, tensor in named.items()}


def is_stamped(module: nn.Module) -> bool:
    """Whether the module carries the stamps."""
    return all(hasattr(module, stamp) for stamp in STAMPS)


def holds_experts(module: nn.Module) -> bool:
    """Whether the module has stacked experts by its stamps, or by its parameters and forward."""
    return is_stamped(module) or _resembles(module)


def _resembles(module: nn.Module) -> bool:
    own = module._parameters
    stacks = {name for name, p in own.items() if p is not None and p.ndim == 3}
    # An adapter takes the parameters away, and what it makes of them is refused by name.
    parametrized = module._modules.get("parametrizations")
    stacks |= set() if parametrized is None else set(dict(parametrized.named_children()))
    if stacks not in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
        return False
    arguments = [*inspect.signature(type(module).forward).parameters.values()][1:]
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return len(arguments) == 3 and all(argument.kind is plain for argument in arguments)


def possible_storages(module: nn.Module) -> Iterator[Storage]:
    """Yield every form that the parameters of a module without stamps may have."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    gated = "gate_up_proj" in own
    first = "gate_up_proj" if gated else "up_proj"
    biases = tuple(
        (weight, name)
        for weight in (first, "down_proj")
        for name in (f"{weight}_bias", f"{weight.removesuffix('_proj')}_bias")
        if name in own
    )
    for transposed in (False, True):
        for layout in ("gate_up", "gate_up_interleaved")[: 1 + gated]:
            storage = Storage(gated, layout, transposed, biases)
            hidden, intermediate = storage.sizes(own[first])
            shapes = storage.shapes(own[first].shape[0], hidden, intermediate)
            if {name: tuple(p.shape) for name, p in own.items()} == shapes:
                yield storage


def probe_forward(module: Any, storage: Storage) -> tuple[str | None, str]:
    """Return what the module's own forward computes if it is stored so, as `named_activation` does.

    Raises:
        Exception: whatever the module's code raises.
    """
    # All of them are there, since a loop may look at experts that are not chosen.
    experts = module._parameters[storage.first].shape[0]
    tensors = {
        name: torch.zeros(shape, dtype=torch.float32, device="cpu")
        for name, shape in storage.shapes(experts, HIDDEN, INNER).items()
    }
    parts = storage.split(tensors)
    # Every gate is the first hidden value, every up the second; the first of INNER comes out.
    parts["up"][..., 1] = 1.0
    if storage.gated:
        parts["gate"][..., 0] = 1.0
    parts["down"][:, 0, 0] = 1.0
    probe = _holding(module, tensors)

    def combine(gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(up.shape[1], HIDDEN, dtype=torch.float32, device="cpu")
        hidden[:, 1] = up
        if gate is not None:
            hidden[:, 0] = gate
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device="cpu")
        weights = torch.ones(len(hidden), 1, dtype=torch.float32, device="cpu")
        return type(module).forward(probe, hidden, ids, weights)[:, 0][None]

    return named_activation(combine, storage.gated)


def beyond_reasons(module: nn.Module, storage: Storage) -> list[str]:
    """Return why the id behind the last expert may be one that adds to the output.

    Asked of tiny experts on a CPU: on a GPU an index beyond would end the process's use of it.
    """
    experts = getattr(module, storage.first).shape[0]
    shapes = storage.shapes(experts, HIDDEN, INNER).items()
    tensors = {n: torch.ones(shape, dtype=torch.float32, device="cpu") for n, shape in shapes}
    ids = torch.full((2, 1), experts, dtype=torch.int64, device="cpu")
    hidden, weights = (torch.ones(2, n, dtype=torch.float32, device="cpu") for n in (HIDDEN, 1))
    with torch.no_grad():
        try:
            result = type(module).forward(_holding(module, tensors), hidden, ids, weights)
        except (LookupError, RuntimeError, ValueError, AssertionError):  # it has no such id
            return []
    if bool((result == 0).all()):
        return []
    return [f"expert id {experts}, behind the last of its weights, adds to the output"]


def _holding(module: Any, tensors: Parts) -> Any:
    """Return a shallow copy of the module with these parameters."""
    probe = object.__new__(type(module))
    vars(probe).update(vars(module))
    probe._parameters = {
        name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }
    return probe
