"""Scales have the same bits on every device: nothing is divided by a plain number.

CUDA multiplies by the reciprocal of a number, which rounds twice. The comparison on a GPU is
test_expert_formats.py; this finds the cause on a CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp4moe.formats import FORMATS


class NumbersDividedBy(TorchDispatchMode):
    """Notes the numbers, other than powers of two, that tensors are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            number = args[1]
            plain = isinstance(number, float | int)
            cpu_beside = isinstance(number, torch.Tensor) and number.is_cpu and not number.ndim
            if (plain or (cpu_beside and args[0].ndim)) and math.frexp(float(number))[0] != 0.5:
                self.found.append(float(number))
        return function(*args, **(kwargs or {}))


def test_a_number_is_noticed():
    with NumbersDividedBy() as noted:
        torch.ones(3) / 448.0
        torch.ones(3).div_(6)
        torch.ones(3) / 4.0
        torch.ones(3) / torch.full((3,), 448.0)
    assert noted.found == [448.0, 6.0]


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_scales_are_not_divided_by_numbers(format):
    weight = torch.randn(48, 256)
    with NumbersDividedBy() as noted:
        shared = format.shared_scale(torch.stack(torch.aminmax(weight)))
        # What two matrices share is a tensor on the device of the weights.
        scale = torch.full((), float(shared)) if shared.numel() else shared
        format.quantize(weight, scale, "max")
        format.round_activation(weight, torch.ones(1))
        format.round_intermediate(weight, torch.ones(1))
    assert not [number for number in noted.found if number in (6.0, 448.0, 2688.0)]
