"""Call a compiled graph whose inputs are packed weights with the float weights of the moment."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..identity.table import Mark, PackedFloats, capturing, find_packed, has_storage
from ..identity.value_watch import ValueWatch
from ..passes.lift import LiftedGraph, PackedInput

__all__ = ["WithPackedInputs"]

logger = logging.getLogger("fp4moe")


@dataclasses.dataclass
class _Model:
    """One set of float weights that has come in.

    Attributes:
        entries: its packed weights, which die with the floats and not with the graph.
        seen: (position, identity of storage, address, version) of each float at the last call.
        on_gpu: whether all of them are.
        watch: looks at their values.
    """

    entries: list[weakref.ref[PackedFloats]] = dataclasses.field(default_factory=list)
    seen: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    on_gpu: bool = False
    watch: ValueWatch = dataclasses.field(default_factory=ValueWatch)


class WithPackedInputs:
    """What a backend returns: takes the inputs of the original graph.

    Args:
        compiled: of `lifted`, which has layers.
        release: free float weights that the graph does not read otherwise, once they are packed.
    """

    def __init__(self, compiled: Callable, lifted: LiftedGraph, *, release: bool):
        # Not its example inputs, which would live as long as the graph.
        self.compiled, self.kept, self.layers = compiled, lifted.kept, lifted.layers
        self.release = release
        self.models: dict[int, _Model] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self.lock:
            entries, watch = self._entries(args)
        packed: list[torch.Tensor] = []
        for entry, layer in zip(entries, self.layers, strict=True):
            packed += entry.operands(layer.scale(args), caller="backend").flat()
        inputs = [args[i] for i in self.kept] + packed
        if watch is None:
            return self.compiled(*inputs)
        watch.begin()
        outputs = self.compiled(*inputs)
        watch.look_beside()
        return outputs

    def _entries(self, args: Sequence[Any]) -> tuple[list[PackedFloats], ValueWatch | None]:
        """The packed weights of all layers, and what looks at the values of the float ones."""
        first = args[self.layers[0].floats.first[0]]
        if capturing(first.device):
            return self._find(args), None
        place = first.untyped_storage()._cdata
        model = self.models.get(place)
        if model is None:
            # Models that are gone go.
            alive = {p: m for p, m in self.models.items() if all(e() for e in m.entries)}
            self.models = {**alive, place: (model := _Model())}
        known = [entry for reference in model.entries if (entry := reference()) is not None]
        if len(known) == len(self.layers):
            changed = model.watch.read(() if model.on_gpu else self._pairs(known, args))
            if not changed and _unchanged(model.seen, args):
                return known, model.watch
        found = self._find(args)
        for entry, layer in zip(found, self.layers, strict=True):
            # Made here, so that the watch sees the factors per expert, too.
            entry.operands(layer.scale(args), caller="backend")
            if self.release:
                self._release(entry, layer, args)
        pairs = self._pairs(found, args)
        model.entries = [weakref.ref(entry) for entry in found]
        model.seen = [_see(i, args[i]) for layer in self.layers for i in layer.positions]
        model.on_gpu = all(tensor.device.type == "cuda" for tensor, _mark in pairs)
        model.watch.note(pairs)
        return found, model.watch

    def _find(self, args: Sequence[Any]) -> list[PackedFloats]:
        return [
            find_packed(layer.weights(args), layer.form, caller="backend") for layer in self.layers
        ]

    def _pairs(
        self, entries: Sequence[PackedFloats], args: Sequence[Any]
    ) -> list[tuple[torch.Tensor, Mark]]:
        return [
            pair
            for entry, layer in zip(entries, self.layers, strict=True)
            for pair in entry.watched(layer.weights(args).flat(), layer.scale(args))
        ]

    def _release(self, entry: PackedFloats, layer: PackedInput, args: Sequence[Any]) -> None:
        flat = layer.weights(args).flat()
        for number, (place, weight) in enumerate(zip(layer.floats.flat(), flat, strict=True)):
            why = ""
            if place not in layer.unused:
                why = "which the graph still uses"
            elif weight.untyped_storage().nbytes() > weight.nbytes:
                why = "whose storage others share"
            elif has_storage(weight):
                entry.release(flat, number)
            if why:
                logger.warning(
                    "fp4moe.backend: %s keeps a weight %s, %s", layer.path, list(weight.shape), why
                )


def _see(position: int, tensor: torch.Tensor) -> tuple[int, int, int, int]:
    storage = tensor.untyped_storage()
    address = tensor.data_ptr() if storage.nbytes() else 0
    return position, storage._cdata, address, 0 if tensor.is_inference() else tensor._version


def _unchanged(seen: Sequence[tuple[int, int, int, int]], args: Sequence[Any]) -> bool:
    return all(_see(each[0], args[each[0]]) == each for each in seen)
