"""What a GPU would do, for the peers and for us: two functions computed here, the rest recorded.

FlashInfer's own functions are replaced once and for the whole process, before a peer is imported,
since both peers keep what they find.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from flashinfer_emulator import emulate_fp4_quantize

__all__ = ["CUTLASS", "FROM_LOGITS", "QUANTIZE", "ROUTED", "Call", "block_scale_interleave"]
__all__ += ["install", "quantize", "recorded"]

ROUTED, FROM_LOGITS = "trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"
CUTLASS, QUANTIZE = "cutlass_fused_moe", "fp4_quantize"

Call = dict[str, Any]
_calls: list[tuple[str, Call]] = []
_signatures: dict[str, inspect.Signature] = {}


def block_scale_interleave(unswizzled_sf: torch.Tensor) -> torch.Tensor:
    """Return bytes [M, K] in tiles of 128 x 4, padded with zeros, as one row.

    Byte (m, k) goes to offset ((m // 128) * (K / 4) + k // 4) * 512 + (m % 32) * 16
    + (m % 128) // 32 * 4 + k % 4: get_sf_out_offset_128x4 in FlashInfer's CUDA sources.
    """
    scales = unswizzled_sf.view(torch.uint8).numpy()
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    m, k = np.indices(scales.shape)
    tile = (m // 128) * (columns // 4) + k // 4
    offset = tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4
    laid_out = np.zeros(rows * columns, np.uint8)
    laid_out[offset] = scales
    return torch.from_numpy(laid_out)


def quantize(hidden: torch.Tensor, scale: torch.Tensor, swizzled: bool) -> tuple[torch.Tensor, ...]:
    """Record and compute the quantisation of hidden [T, H] with the encode scale `scale`.

    vLLM hands one scale per expert, all equal, of which the GPU reads the first.
    """
    _calls.append((QUANTIZE, {"hidden": hidden.clone(), "scale": scale.clone()}))
    first = scale.reshape(-1)[:1]
    return emulate_fp4_quantize(hidden, first, 16, False, swizzled)


def _fp4_quantize(
    input: torch.Tensor,
    global_scale: torch.Tensor,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    **how: Any,
) -> tuple[torch.Tensor, ...]:
    # How it is computed changes no number.
    assert not how.keys() - {"enable_pdl", "backend"}, how
    assert (sf_vec_size, sf_use_ue8m0, is_sf_8x4_layout) == (16, False, False)
    return quantize(input, global_scale, is_sf_swizzled_layout)


def install() -> None:
    """Replace FlashInfer's GPU functions; their signatures are kept and checked at each call."""
    import flashinfer
    import flashinfer.fused_moe

    if _signatures:
        return

    def record(name: str, returns_list: bool) -> None:
        _signatures[name] = inspect.signature(getattr(flashinfer.fused_moe, name))

        def function(*args: Any, **kwargs: Any) -> Any:
            bound = _signatures[name].bind(*args, **kwargs)
            bound.apply_defaults()
            _calls.append((name, dict(bound.arguments)))
            output = bound.arguments["output"]
            if output is None:
                rows, columns = bound.arguments["hidden_states"].shape
                output = torch.empty(rows, columns * 2, dtype=torch.bfloat16)
            return [output.zero_()] if returns_list else output.zero_()

        function.__signature__ = _signatures[name]
        setattr(flashinfer.fused_moe, name, function)

    record(ROUTED, True)
    record(FROM_LOGITS, True)
    record(CUTLASS, False)
    _fp4_quantize.__signature__ = inspect.signature(flashinfer.fp4_quantize)
    flashinfer.fp4_quantize = _fp4_quantize
    flashinfer.block_scale_interleave = block_scale_interleave
    flashinfer.nvfp4_block_scale_interleave = block_scale_interleave


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, Call]]]:
    """Yield the list of calls (name, arguments with defaults) that are made inside."""
    install()
    _calls.clear()
    made: list[tuple[str, Call]] = []
    yield made
    made.extend(_calls)
    _calls.clear()
