"""What `flashinfer_cutlass` knows of a number format: devices, layout, scales, arguments.

A format's own file overrides what is its own. Sources: FlashInfer 0.6.13 and 0.7.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...layer import Layer
from ..base import Layout
from ..devices import Devices
from ..operands import Operands

__all__ = ["CutlassEntry"]


class CutlassEntry:
    """How the library takes one number format.

    Attributes:
        format: its name.
        devices: what the library compiles its kernels for.
        automatic: whether "auto" may choose them.
        layout: of codes, scales and biases.
        intermediate_dtype: what the intermediate is rounded to before it is quantised.
    """

    format: ClassVar[str]
    devices: ClassVar[Devices]
    automatic: ClassVar[bool] = False
    layout: ClassVar[Layout]
    intermediate_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases as the kernel takes them."""
        return operands

    def arguments(self, hidden: torch.Tensor, operands: Operands) -> dict[str, Any]:
        """Return the arguments that hidden [T, H], weights and scales become."""
        raise NotImplementedError

    def parameters(
        self, values: Mapping[str, float], operands: Operands
    ) -> dict[str, torch.Tensor]:
        """Return the arguments of an activation, float32 [L] each, from the model's numbers."""
        like = operands.intermediate_scale
        return {name: torch.full_like(like, value) for name, value in values.items()}
