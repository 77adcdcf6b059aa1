"""Kernel `hopper`: quantised experts on compute capability 9.0, for many tokens at a time.

Operands and layout are those of kernel `triton`, which also serves what this one does not: few
slots an expert, and tokens whose rows are no multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...formats import FORMATS as WEIGHT_FORMATS
from ..base import Kernel
from ..devices import Devices
from ..operands import Call, LogitsCall
from ..triton.kernel import TritonKernel
from .tiles import LEAST_DENSITY, HopperTile, choose_tile

__all__ = ["HOPPER", "HopperKernel", "run_with", "tiles_for"]


class HopperKernel(TritonKernel):
    """CUDA kernels behind the operator; numbers as `TritonKernel` describes them."""

    name = "hopper"
    needs = "triton and NVRTC"
    devices = Devices(((9, 0),))
    layouts: ClassVar = {
        name: layout for name, layout in TritonKernel.layouts.items() if name != "fp8_block"
    }
    without_layout: ClassVar = {
        "fp8_block": "; its sums of 128 columns have a scale each, take kernel triton"
    }

    def package_reasons(self) -> Sequence[str]:
        """Return that triton or NVRTC is not there."""
        from .compile import nvrtc

        if reasons := super().package_reasons():
            return reasons
        if nvrtc() is None:
            return ("needs NVRTC, which torch for CUDA brings; it was not found",)
        return ()

    def check_device(self, call: Call | LogitsCall) -> None:
        """Raise where it does not run; Triton's interpreter is of no use to it."""
        Kernel.check_device(self, call)

    def run(self, call: Call) -> torch.Tensor:
        """Compute [T, H], with the Triton kernels where `tiles_for` says so."""
        tiles = tiles_for(call)
        return super().run(call) if tiles is None else run_with(tiles, call)


def tiles_for(call: Call) -> tuple[HopperTile, HopperTile] | None:
    """Return the tiles of both GEMMs; None where the Triton kernels are to run."""
    from .source import FORMATS

    hidden, layer = call.hidden, call.layer
    density = call.expert_ids.numel() / layer.num_experts
    # Rows are copied by 16 bytes; a row of float32 is rounded first, into one that is aligned.
    aligned = hidden.shape[1] % 8 == 0 and (
        hidden.dtype == torch.float32
        or hidden.stride(1) != 1
        or (hidden.stride(0) % 8 == 0 and hidden.data_ptr() % 16 == 0)
    )
    if density < LEAST_DENSITY or not aligned:
        return None
    decoding = FORMATS[layer.format]
    first, second = (
        choose_tile(density, decoding.words, decoding.scale_bytes, gate_up, layer.gated)
        for gate_up in (True, False)
    )
    return first, second


def run_with(tiles: tuple[HopperTile, HopperTile], call: Call) -> torch.Tensor:
    """Compute [T, H], T > 0, with given tiles of equal slots; hidden's rows as `tiles_for` asks."""
    from ..triton.sort import sort_slots, sum_slots
    from .gemm import run_gemm

    hidden, operands = call.hidden, call.operands
    x = hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    ids = call.expert_ids.contiguous()
    weights = call.routing_weights.to(torch.float32).contiguous()
    local, hidden_padded, columns = operands.down_packed.shape
    window = call.layer.expert_offset, local
    middle_shape = ids.numel(), WEIGHT_FORMATS[call.layer.format].elements(columns)
    with torch.cuda.device_of(hidden):
        found = sort_slots(ids, *window, tiles[0].slots)
        middle = x.new_empty(middle_shape, dtype=torch.bfloat16)
        partial = middle.new_empty((ids.numel(), hidden_padded))
        run_gemm(call, "gate_up", x, weights, found, tiles[0], middle)
        run_gemm(call, "down", middle, weights, found, tiles[1], partial)
        return sum_slots(partial, ids, window, hidden.new_empty(hidden.shape))


HOPPER = HopperKernel()
