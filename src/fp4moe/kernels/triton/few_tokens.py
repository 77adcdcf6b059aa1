"""Run experts for few tokens: two launches, and no sum after them; see `few_tokens_gemm`."""

from __future__ import annotations

from typing import Any

import torch

from ...formats import FORMATS
from ..operands import Call
from .layout import SLAB
from .tiles import Config, Tile

__all__ = ["run_few_tokens"]


def _constants(tile: Tile, parts: int) -> dict[str, Any]:
    return {
        "CHUNKS": tile.warps,
        "TILES": tile.rows * parts // 16,
        "GROUP": tile.slabs,
        "UNROLLED": tile.stages == 2,
        "num_warps": tile.warps,
    }


def run_few_tokens(
    config: Config,
    call: Call,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    form: dict[str, Any],
) -> torch.Tensor:
    """Write [T, H] to out and return it.

    Args:
        config: of mode "few".
        call: for the operands and the layer.
        x: bfloat16 or float16 [T, H], columns contiguous.
        ids, weights: [T, K], contiguous; weights float32.
        form: constants of both kernels: ASSEMBLY, FORMAT and CHAINED.
    """
    from .activation import activation_constants
    from .few_tokens_gemm import few_down_kernel, few_gate_up_kernel
    from .kernel import words_of

    operands, layer, hidden_size = call.operands, call.layer, x.shape[1]
    local, hidden_padded, columns = operands.down_packed.shape
    intermediate = FORMATS[layer.format].elements(columns)
    tokens, top_k = ids.shape
    # A compute capability below 9.0 knows no launch that overlaps another one.
    launch = {"launch_pdl": True} if form["CHAINED"] else {}
    middle = x.new_empty((ids.numel(), intermediate), dtype=torch.bfloat16)
    few_gate_up_kernel[(intermediate // config.gate_up.rows, ids.numel())](
        x, x.stride(0), ids, *words_of(operands.gate_up_packed, operands.gate_up_block_scale),
        operands.gate_up_global_scale, operands.gate_up_bias, middle, ids.numel(), hidden_size,
        layer.expert_offset, local, TOP_K=top_k, INTERMEDIATE=intermediate,
        SLABS=hidden_padded // SLAB, **_constants(config.gate_up, 1 + layer.gated), **form,
        WHOLE=hidden_size == hidden_padded, GATED=layer.gated,
        **activation_constants(layer.activation), FP16=x.dtype == torch.float16,
    )  # fmt: skip
    few_down_kernel[(hidden_padded // config.down.rows, tokens)](
        middle, ids, *words_of(operands.down_packed, operands.down_block_scale),
        operands.down_global_scale, operands.down_bias, weights, out, hidden_size,
        layer.expert_offset, local, TOP_K=top_k, HIDDEN_PADDED=hidden_padded,
        SLABS=intermediate // SLAB, **_constants(config.down, 1), **form, **launch,
    )  # fmt: skip
    return out
