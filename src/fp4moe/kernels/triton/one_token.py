"""Run experts for one token: two launches, and no sum after them; see `one_token_gemm`."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import refuse
from ...formats import FORMATS
from ..operands import Call
from .activation import activation_constants
from .layout import SLAB, words_of
from .one_token_gemm import one_token_down_kernel, one_token_gate_up_kernel
from .registers import ASSEMBLY
from .tiles import OneToken, OneTokenTile

__all__ = ["constants_of", "run_one_token"]


def constants_of(tile: OneTokenTile, parts: int) -> dict[str, Any]:
    """Return a tile's constants; parts: 2 for gate and up, 1 otherwise."""
    return {
        "CHUNKS": tile.warps,
        "TILES": tile.rows * parts // 16,
        "GROUP": tile.slabs,
        "num_warps": tile.warps,
    }


def run_one_token(tiles: OneToken, call: Call) -> torch.Tensor:
    """Compute [1, H] of one token with NVFP4 weights; on compute capability 9.0 and newer."""
    operands, layer, hidden = call.operands, call.layer, call.hidden
    x = hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden
    x, ids = x.contiguous(), call.expert_ids.contiguous()
    weights = call.routing_weights.to(torch.float32).contiguous()
    tokens, top_k = ids.shape
    hidden_size, (local, hidden_padded, columns) = x.shape[1], operands.down_packed.shape
    intermediate = FORMATS[layer.format].elements(columns)
    if (tokens, layer.format) != (1, "nvfp4") or not tiles.fits(hidden_size, intermediate, top_k):
        what = f"tiles {tiles} cannot run {tokens} tokens of {layer.format} with top_k {top_k}"
        reason = f"they are for one of nvfp4, sizes {hidden_size} and {intermediate} that fit them"
        refuse(call.caller, what, reason, "Take tiles of choose_tiles.")
    middle = x.new_empty((top_k, intermediate), dtype=torch.bfloat16)
    out = hidden.new_empty(hidden.shape)
    # down begins as soon as every program of gate and up has, in a stream and in a CUDA graph.
    # Until it waits for their end it reads ids and weights alone, written before gate and up, an
    # ordinary launch, began. Every program of down waits, and writes after that: what follows, an
    # ordinary launch or one that waits itself, comes after both, so that `middle` and `out` are
    # used in the order of the stream, as the allocator expects. Launch nothing in between.
    early = {"launch_pdl": True} if ASSEMBLY.value else {}
    with torch.cuda.device_of(hidden):
        one_token_gate_up_kernel[(intermediate // tiles.gate_up.rows, top_k)](
            x, ids, *words_of(operands.gate_up_packed, operands.gate_up_block_scale),
            operands.gate_up_global_scale, operands.gate_up_bias, middle, hidden_size,
            layer.expert_offset, local, INTERMEDIATE=intermediate, SLABS=hidden_padded // SLAB,
            **constants_of(tiles.gate_up, 1 + layer.gated), WHOLE=hidden_size == hidden_padded,
            GATED=layer.gated, **activation_constants(layer.activation),
            FP16=x.dtype == torch.float16,
        )  # fmt: skip
        one_token_down_kernel[(hidden_padded // tiles.down.rows,)](
            middle, ids, *words_of(operands.down_packed, operands.down_block_scale),
            operands.down_global_scale, operands.down_bias, weights, out, hidden_size,
            layer.expert_offset, local, TOP_K=top_k, HIDDEN_PADDED=hidden_padded,
            SLABS=intermediate // SLAB, **constants_of(tiles.down, 1), **early,
        )  # fmt: skip
    return out
