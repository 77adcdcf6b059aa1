"""Launch the GEMMs of `gemm.cu` on sorted slots."""

from __future__ import annotations

import ctypes
import functools

import torch

from ..operands import Call
from ..triton.layout import SLAB
from ..triton.sort import Sorted
from .compile import load_function
from .source import FORMATS, source_of
from .tiles import HopperTile, shared_bytes

__all__ = ["Arguments", "run_gemm"]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int


class Arguments(ctypes.Structure):
    """The structure of the same name in `gemm.cu`."""

    _fields_ = (
        ("tokens", _POINTER), ("token_stride", ctypes.c_longlong), ("order", _POINTER),
        ("tiles", _POINTER), ("num_tiles", _POINTER), ("words", _POINTER), ("scales", _POINTER),
        ("global_scale", _POINTER), ("bias", _POINTER), ("routing_weights", _POINTER),
        ("out", _POINTER), ("top_k", _INT), ("columns", _INT), ("rows", _INT), ("slabs", _INT),
        ("times_4", _INT), ("times_16", _INT), ("times_64", _INT),
    )  # fmt: skip


def run_gemm(
    call: Call,
    name: str,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    found: Sorted,
    tile: HopperTile,
    out: torch.Tensor,
) -> None:
    """Write the result of one GEMM for every slot whose id is local; other rows stay as they are.

    Args:
        name: "gate_up", whose result is activated, or "down", weighted by routing weights.
        tokens: [T, H] bfloat16 or float16 in rows of whole 16 bytes, or what gate_up wrote.
        weights: routing weights [T, K], float32, contiguous.
        found: the slots, sorted into tiles of `tile.slots`.
        out: [T * K, padded I or H], bfloat16, contiguous.
    """
    layer, operands, gate_up = call.layer, call.operands, name == "gate_up"
    packed, scale, factor, bias = (
        getattr(operands, f"{name}_{part}")
        for part in ("packed", "block_scale", "global_scale", "bias")
    )
    decoding = FORMATS[layer.format]
    source = source_of(
        tile, gate_up=gate_up, gated=layer.gated, activation=layer.activation,
        biased=bias is not None, half=tokens.dtype == torch.float16, format=layer.format,
    )  # fmt: skip
    function = load_function(
        source,
        shared_bytes(tile, decoding.words, decoding.scale_bytes, gate_up, layer.gated),
        tokens.device,
    )
    columns = operands.down_packed.shape[1] if gate_up else tokens.shape[1]
    arguments = Arguments(
        tokens.data_ptr(), tokens.stride(0), *(t.data_ptr() for t in found[:3]), packed.data_ptr(),
        scale.data_ptr(), factor.data_ptr(), None if bias is None else bias.data_ptr(),
        weights.data_ptr(), out.data_ptr(), weights.shape[1], tokens.shape[1], out.shape[1],
        columns // SLAB, 4, 16, 64,
    )  # fmt: skip
    function.launch(_multiprocessors(tokens.device), tile.threads, arguments)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
