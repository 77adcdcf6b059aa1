"""Pack a weight once, however many graphs see it: prefill, decode, recompiled ones.

Entries live as long as the first weight and hold for one state of both weights (identity, version,
storage).
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fp4moe.errors import UnsupportedError
from fp4moe.experts import ExpertWeights
from fp4moe.kernels import PreparedWeights, get_kernel

from .verify import Hypothesis

__all__ = ["PackedExperts", "pack_once", "weight_state"]

_numbers = itertools.count()
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """The prepared weights of one block.

    Attributes:
        name: unique stem of the attributes that hold them.
        weights: in the layout of `kernel`.
        states: `weight_state` of the two float weights when they were packed.
    """

    name: str
    weights: PreparedWeights
    kernel: str
    states: tuple[tuple, tuple]


def weight_state(weight: torch.Tensor) -> tuple:
    """Return what tells of changed values: the version, and the address (None once released)."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr() if weight.untyped_storage().nbytes() else None


def _same(before: tuple, now: tuple) -> bool:
    # A released weight has no address; its version still tells of writes.
    return before[0] == now[0] and now[1] in (before[1], None)


def pack_once(
    first: torch.Tensor,
    down: torch.Tensor,
    form: Hypothesis,
    kernel: str,
    hidden_alignment: int,
) -> PackedExperts:
    """Return the packed weights, from the cache where neither weight has changed since.

    Raises:
        UnsupportedError: the float storage was released and was packed in another form.
        ShapeError: a weight holds inf or NaN.
    """
    entries = _packed.setdefault(first, {})
    key = (form, kernel, hidden_alignment)
    if key in entries:
        down_reference, packed = entries[key]
        if down_reference() is down and all(
            _same(old, weight_state(w)) for old, w in zip(packed.states, (first, down), strict=True)
        ):
            return packed
    if not first.untyped_storage().nbytes() or not down.untyped_storage().nbytes():
        raise UnsupportedError(
            "pack_once: weights must have storage; got weights released by release_weights=True "
            "that were packed for "
            f"{[f'{f} with {k}' for f, k, _ in entries]} and are asked for as {form} with "
            f"{kernel}. Load the model again."
        )
    # Views of the storage, so that the cache keeps no parameter alive.
    stacked = (
        {"gate_up": first.detach(), "layout": form.layout} if form.gated else {"up": first.detach()}
    )
    with torch.no_grad():
        weights = ExpertWeights.quantize(
            **stacked, down=down.detach(), activation=form.activation, transposed=form.transposed
        )
    packed = PackedExperts(
        name=f"fp4moe_{next(_numbers)}",
        weights=get_kernel(kernel).prepare(weights, hidden_alignment=hidden_alignment),
        kernel=kernel,
        states=(weight_state(first), weight_state(down)),
    )
    entries[key] = (weakref.ref(down), packed)
    return packed
