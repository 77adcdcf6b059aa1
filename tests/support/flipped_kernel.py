"""A kernel with a layout of its own that runs on a CPU, and counts its calls."""

from __future__ import annotations

import collections
import dataclasses
import weakref

import pytest

from fp4moe import kernels, reference
from fp4moe.kernels.reference import ReferenceKernel


class FlippedKernel(ReferenceKernel):
    """The reference on codes whose bytes stand in reverse.

    `calls` counts methods by name; `made` refers weakly to each layout.
    """

    def __init__(self):
        super().__init__("flipped", reference.reference, automatic=True)
        self.calls = collections.Counter()
        self.made = []

    def _flip(self, operands):
        return operands._replace(
            gate_up_packed=operands.gate_up_packed.flip(2),
            down_packed=operands.down_packed.flip(2),
        )

    def reasons_not_to_run(self, layer, capability):
        self.calls["reasons_not_to_run"] += 1
        return super().reasons_not_to_run(layer, capability)

    def prepare(self, weights, **options):
        self.calls["prepare"] += 1
        prepared = super().prepare(weights, **options)
        operands = self._flip(prepared.operands)
        self.made.append(weakref.ref(operands.gate_up_packed))
        return dataclasses.replace(prepared, operands=operands)

    def restore(self, prepared):
        self.calls["restore"] += 1
        return super().restore(
            dataclasses.replace(prepared, operands=self._flip(prepared.operands))
        )

    def run(self, call):
        self.calls["run"] += 1
        return super().run(call._replace(operands=self._flip(call.operands)))


@pytest.fixture
def flipped(monkeypatch):
    """The kernel, known by its name."""
    kernel = FlippedKernel()
    monkeypatch.setitem(kernels.KERNELS, kernel.name, kernel)
    return kernel
