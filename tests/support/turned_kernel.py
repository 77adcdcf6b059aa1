"""A kernel for a CPU whose layout is not the logical one, though of the same shapes and dtypes.

Rows lie in reverse. Whoever takes a prepared tensor for a logical one, or the reverse, gets other
numbers and no error.
"""

from __future__ import annotations

import dataclasses

import pytest

from fp4moe import reference as definition
from fp4moe.kernels import KERNELS, Operands
from fp4moe.kernels.reference import ReferenceKernel


def turned(operands: Operands) -> Operands:
    """Reverse the rows of codes and block scales; its own inverse."""
    matrices = {n: t.flip(1) for n, t in operands.named().items() if t.ndim == 3}
    return operands._replace(**matrices)


class TurnedKernel(ReferenceKernel):
    """The reference behind such a layout."""

    def __init__(self):
        super().__init__("reference", definition.reference, automatic=True)

    def prepare(self, weights, **options):
        prepared = super().prepare(weights, **options)
        return dataclasses.replace(prepared, operands=turned(prepared.operands))

    def restore(self, prepared):
        return super().restore(dataclasses.replace(prepared, operands=turned(prepared.operands)))

    def run(self, call):
        return super().run(call._replace(operands=turned(call.operands)))


@pytest.fixture(params=["logical layout", "layout of its own"])
def layouts(request, monkeypatch):
    """Run the test with the reference kernel and with that one in its place."""
    if request.param == "layout of its own":
        monkeypatch.setitem(KERNELS, "reference", TurnedKernel())
    return request.param
