"""Kernel `humming`: NVFP4 weights and 16-bit activations on Turing, Ampere, Ada and Hopper.

Two GEMMs of humming-kernels over rows sorted by expert; sorting, activation and weighted sum are
those of kernels/triton. No host synchronisation, deterministic. Not here: layout and compilation,
see library.py. There is no W4A8 form: the library's FP8 kernels need block scales of 32 elements or
more, and NVFP4 has one per 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch

from ...formats import NVFP4
from ...layer import Layer
from ..base import Kernel, Layout, current_capability, each_matrix
from ..devices import Devices
from ..operands import Call, Operands, PreparedWeights
from .library import (
    GemmShape,
    HummingGemm,
    Interval,
    compile_gemm,
    library_reasons,
    pack_scales,
    pack_weights,
    unpack_scales,
    unpack_weights,
)

__all__ = ["HUMMING", "HummingKernel", "places_of"]

BFLOAT16_CAPABILITY = (8, 0)
# N in tiles of 128 for every tensor core, K in steps of 64: what the library's heuristics divide.
ROWS, COLUMNS = 128, 64
# Rows of activations are read 16 bytes at a time.
ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# What prepare compiles the weighted sum for: powers of two, the next one serves a top_k between.
WARM_TOP_K = (1, 2, 4, 8, 16, 32)
HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _multiples(layer: Layer, hidden_alignment: int) -> tuple[int, int]:
    # Gate and up are padded each, and together they are the rows of one GEMM.
    return ROWS, COLUMNS if layer.gated else ROWS


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view that starts inside another tensor: the library wants 16-byte addresses.

    Triton has a kernel of its own for other addresses, which `warm_up` would not have loaded.
    """
    return tensor.clone() if tensor.storage_offset() else tensor


_pack, _unpack = each_matrix(pack_weights, pack_scales), each_matrix(unpack_weights, unpack_scales)


def _apply(operands: Operands, layer: Layer) -> Operands:
    names = ("gate_up_global_scale", "down_global_scale", "gate_up_bias", "down_bias")
    named = operands.named()
    aligned = {name: _aligned(named[name]) for name in names if name in named}
    return _pack(operands, layer)._replace(**aligned)


class HummingKernel(Kernel):
    """humming-kernels behind the operator.

    Operands: codes and block scales in the library's layout, gate first; global scales and biases
    as they are. Biases are added in float32 to what the GEMMs have rounded.
    float32 and float16 input is rounded to bfloat16, on compute capability 7.5 all is float16.
    """

    name = "humming"
    needs = "humming-kernels 0.1.19, triton, cuda-bindings and a CUDA compiler"
    devices = Devices(
        ((7, 5),), up_to=(9, 0), why_not_newer="the layout there depends on the CUDA compiler"
    )
    biases = parameters = True
    layouts: ClassVar = {NVFP4.name: Layout(_multiples, _apply, _unpack)}

    def package_reasons(self) -> Sequence[str]:
        """Return what is wrong with package or toolchain."""
        return library_reasons()

    def run(self, call: Call) -> torch.Tensor:
        """Sort, GEMM, activation, GEMM, weighted sum, all on the current stream."""
        with torch.cuda.device_of(call.hidden):
            gemms = _gemms(call.hidden.shape[1], call.operands)
            slots, local = call.expert_ids.numel(), call.operands.down_packed.shape[0]
            # A guess of how many rows stay, for the size of the tiles; any is right.
            rows = max(1, slots * local // call.layer.num_experts)
            first, second = gemms
            return _compute(call, gemms, (first.interval(rows), second.interval(rows)))

    def warm_up(self, prepared: PreparedWeights) -> None:
        """Compile and load every kernel, which takes minutes the first time."""
        operands, layer = prepared.operands, prepared.layer
        device = operands.down_packed.device
        hidden = torch.zeros((1, layer.hidden_size), dtype=_dtype(device), device=device)
        with torch.cuda.device(device):
            gemms = _gemms(layer.hidden_size, operands)
            key = (*(g.shape for g in gemms), layer.activation, layer.gated, layer.biased, device)
            if key in _warm:
                return
            # No id is local: every kernel is loaded and none has rows.
            outside = torch.full((1, 1), -1, dtype=torch.int64, device=device)
            one = torch.ones((1, 1), dtype=torch.float32, device=device)
            for count in range(max(len(gemm.intervals) for gemm in gemms)):
                first, second = (g.intervals[min(count, len(g.intervals) - 1)] for g in gemms)
                _compute(prepared.call(hidden, outside, one), gemms, (first, second))
            _warm_up_rows(prepared, hidden, gemms)
            _warm_up_sorting({i.tile_rows for gemm in gemms for i in gemm.intervals}, prepared)
            _warm.add(key)


HUMMING = HummingKernel()
_warm: set[tuple] = set()


def _compute(
    call: Call, gemms: tuple[HummingGemm, HummingGemm], intervals: tuple[Interval, Interval]
) -> torch.Tensor:
    from ..triton.activation import activate_rows
    from ..triton.sort import sum_slots

    operands, (first, second) = call.operands, gemms
    ids = call.expert_ids.contiguous()
    weights = call.routing_weights.float().contiguous()
    window = call.layer.expert_offset, operands.down_packed.shape[0]
    # Sorted before gate and up run, so that nothing stands between the GEMMs.
    places = places_of(ids, window, intervals[0].tile_rows, intervals[1].tile_rows)
    x = _input(call.hidden, first)
    gate_up = x.new_empty((ids.numel(), first.shape.rows))
    top_k = ids.shape[1]
    first.run(x, gate_up, *operands[:3], place=places[0], top_k=top_k, interval=intervals[0])
    form = call.layer.activation, call.layer.gated
    middle = activate_rows(gate_up, *form, ids, window, operands.gate_up_bias)
    down = x.new_empty((ids.numel(), second.shape.rows - second.shape.cut_rows))
    second.run(middle, down, *operands[3:6], place=places[1], top_k=1, interval=intervals[1])
    out = call.hidden.new_empty(call.hidden.shape)
    return sum_slots(down, ids, window, out, weights, operands.down_bias)


def places_of(
    expert_ids: torch.Tensor, window: tuple[int, int], *tile_rows: int
) -> list[dict[str, torch.Tensor]]:
    """Sort slots t * K + k by expert, padded to whole tiles, for GEMMs of these tiles.

    Args:
        expert_ids: int32 or int64 [T, K], contiguous. window: first local expert and their number;
            slots of other experts are left out. tile_rows: rows of a tile, one for each GEMM.

    Returns:
        sorted_ids, expert_ids (of each tile) and num_tokens_padded for each GEMM, int32.
    """
    from ..triton.sort import sort_slots

    places = {}
    for rows in dict.fromkeys(tile_rows):
        order, tiles, number, _ = sort_slots(expert_ids, *window, rows, padded=True)
        places[rows] = {"sorted_ids": order, "expert_ids": tiles, "num_tokens_padded": number}
    return [places[rows] for rows in tile_rows]


def _warm_up_rows(
    prepared: PreparedWeights, hidden: torch.Tensor, gemms: tuple[HummingGemm, HummingGemm]
) -> None:
    from ..triton.activation import activate_rows
    from ..triton.sort import sum_slots

    operands, layer = prepared.operands, prepared.layer
    window = layer.expert_offset, operands.down_packed.shape[0]
    first, second = (gemm.shape.rows - gemm.shape.cut_rows for gemm in gemms)
    for kind in (torch.int64, torch.int32):
        nowhere = torch.full((1, 1), -1, dtype=kind, device=hidden.device)
        rows = hidden.new_empty((1, first))
        activate_rows(rows, layer.activation, layer.gated, nowhere, window, operands.gate_up_bias)
    for top_k, kind in itertools.product(WARM_TOP_K, (torch.int64, torch.int32)):
        nowhere = torch.full((1, top_k), -1, dtype=kind, device=hidden.device)
        weights = nowhere.float()
        rows = hidden.new_empty((top_k, second))
        for dtype in HIDDEN_DTYPES:
            sum_slots(rows, nowhere, window, hidden.to(dtype), weights, operands.down_bias)


def _warm_up_sorting(tile_rows: set[int], prepared: PreparedWeights) -> None:
    from ..triton.sort import MOST_SORTED_AT_ONCE

    window = prepared.layer.expert_offset, prepared.operands.down_packed.shape[0]
    device = prepared.operands.down_packed.device
    for count, kind in itertools.product((1, MOST_SORTED_AT_ONCE + 1), (torch.int64, torch.int32)):
        nowhere = torch.full((count, 1), -1, dtype=kind, device=device)
        places_of(nowhere, window, *tile_rows)


def _dtype(device: torch.device) -> torch.dtype:
    capability = current_capability(device)
    new = capability is not None and capability >= BFLOAT16_CAPABILITY
    return torch.bfloat16 if new else torch.float16


def _gemms(hidden_size: int, operands: Operands) -> tuple[HummingGemm, HummingGemm]:
    local, hidden, columns = operands.down_packed.shape
    cut = 0 if hidden_size % ALIGNED_COLUMNS else hidden - hidden_size
    device = operands.down_packed.device
    index = torch.cuda.current_device() if device.index is None else device.index
    rows = operands.gate_up_packed.shape[1]
    dtype = _dtype(device)
    return (
        compile_gemm(GemmShape(local, rows, hidden, 0, cut), dtype, index),
        compile_gemm(GemmShape(local, hidden, columns * 2, cut, 0), dtype, index),
    )


def _input(hidden: torch.Tensor, gemm: HummingGemm) -> torch.Tensor:
    x = hidden.to(gemm.dtype)
    missing = gemm.shape.columns - gemm.shape.cut_columns - x.shape[1]
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNED_BYTES else x
