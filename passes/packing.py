"""Pack a weight once, however many graphs see it: prefill, decode, recompiled ones.

Entries live as long as the first weight and hold for one state of all its weights (identity,
version, storage).
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fp4moe.errors import UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.kernels import PreparedWeights, get_kernel

from .hypotheses import SEPARATE, Hypothesis

__all__ = ["PackedExperts", "pack_once", "weight_state"]

_numbers = itertools.count()
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """The prepared weights of one block.

    Attributes:
        name: unique stem of the attributes that hold them.
        weights: in the layout of `kernel`.
        states: `weight_state` of each float weight when it was packed.
    """

    name: str
    weights: PreparedWeights
    kernel: str
    states: tuple[tuple, ...]


def weight_state(weight: torch.Tensor) -> tuple:
    """Return what tells of changed values: the version, and the address (None once released)."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr() if weight.untyped_storage().nbytes() else None


def _same(before: tuple, now: tuple) -> bool:
    # A released weight has no address; its version still tells of writes.
    return before[0] == now[0] and now[1] in (before[1], None)


def pack_once(
    weights: dict[str, tuple[torch.Tensor, ...]],
    form: Hypothesis,
    kernel: str,
    hidden_alignment: int,
) -> PackedExperts:
    """Return the packed weights, from the cache where no weight has changed since.

    Args:
        weights: by role as in `Region.weights`: one stacked tensor, or one for each expert.
        form: what the roles mean. kernel: which layout. hidden_alignment: of the Blackwell kernel.

    Raises:
        UnsupportedError: the float storage was released and was packed in another form.
        ShapeError: a weight holds inf or NaN.
    """
    flat = [weight for group in weights.values() for weight in group]
    entries = _packed.setdefault(flat[0], {})
    key = (form, kernel, hidden_alignment, len(flat))
    if key in entries:
        references, packed = entries[key]
        if all(old() is weight for old, weight in zip(references, flat[1:], strict=True)) and all(
            _same(old, weight_state(w)) for old, w in zip(packed.states, flat, strict=True)
        ):
            return packed
    if not all(weight.untyped_storage().nbytes() for weight in flat):
        raise UnsupportedError(
            "pack_once: weights must have storage; got weights released by release_weights=True "
            "that were packed for "
            f"{[f'{f} with {k}' for f, k, *_ in entries]} and are asked for as {form} with "
            f"{kernel}. Load the model again."
        )
    with torch.no_grad():
        quantized = _quantize(weights, form)
        prepared = get_kernel(kernel).prepare(quantized, hidden_alignment=hidden_alignment)
    packed = PackedExperts(
        name=f"fp4moe_{next(_numbers)}",
        weights=prepared,
        kernel=kernel,
        states=tuple(weight_state(weight) for weight in flat),
    )
    # The first weight is the key; it must not be kept alive by its own entry.
    entries[key] = ([weakref.ref(weight) for weight in flat[1:]], packed)
    return packed


def _quantize(weights: dict[str, tuple[torch.Tensor, ...]], form: Hypothesis) -> ExpertWeights:
    # Views of the storage, so that the cache keeps no parameter alive.
    plain = {role: [w.detach() for w in group] for role, group in weights.items()}
    if len(plain["down"]) == 1:
        return _quantize_stacked({role: group[0] for role, group in plain.items()}, form)
    # One expert after the other: only packed tensors are ever stacked.
    metadata: dict[str, Any] = {}
    packed: dict[str, torch.Tensor] = {}
    count = len(plain["down"])
    for expert in range(count):
        one = _quantize_stacked({role: group[expert][None] for role, group in plain.items()}, form)
        for name, tensor in one.tensors().items():
            if name == "hidden_scale":
                packed[name] = tensor
                continue
            if expert == 0:
                packed[name] = tensor.new_empty((count, *tensor.shape[1:]))
            packed[name][expert] = tensor[0]
        metadata = one.metadata() | {"num_experts": count}
    return ExpertWeights.from_tensors(packed, metadata)


def _quantize_stacked(weights: dict[str, torch.Tensor], form: Hypothesis) -> ExpertWeights:
    first = weights["first"].mT if form.transposed else weights["first"]
    down = weights["down"].mT if form.down_transposed else weights["down"]
    named: dict[str, Any] = {"down": down, "activation": form.activation}
    if "second" in weights:
        second = weights["second"].mT if form.transposed else weights["second"]
        pair = (first, second) if form.layout == SEPARATE[0] else (second, first)
        named |= {"gate": pair[0], "up": pair[1]}
    elif form.gated:
        named |= {"gate_up": first, "layout": form.layout}
    else:
        named |= {"up": first}
    return ExpertWeights.quantize(**named)
