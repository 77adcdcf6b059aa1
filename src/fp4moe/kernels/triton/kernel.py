"""Kernel `triton`: our own quantised experts for compute capability 8.0 and newer.

Decides: layout of the operands, workspace, launches. Two to seven launches a call, no host
synchronisation; grids follow from shapes, as upper bounds. Tile sizes are in `tiles`, and which to
take in `measured`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...formats import FORMATS
from ...layer import Layer
from ..base import Change, Kernel, Layout, current_capability, each_matrix
from ..devices import Devices
from ..measured import choose_one_token, choose_tiles
from ..operands import Call, LogitsCall
from .layout import SLAB, from_slabs, scales_from_slabs, scales_to_slabs, to_slabs, words_of
from .layout_fp8 import fp8_from_slabs, fp8_to_slabs, powers_from_slabs, powers_to_slabs
from .tiles import MODES, Config, OneToken, Tile

if TYPE_CHECKING:
    from .sort import Sorted

__all__ = ["REORDERS", "TRITON", "TritonKernel", "constants_of", "find_slots", "interpreted"]
__all__ += ["run_with"]

MOST_EXPERTS, MOST_TOP_K = 512, 32


Reorder = Callable[[torch.Tensor], torch.Tensor]
# Of codes, and of block scales; None leaves these as they are.
Reorders = tuple[Reorder, Reorder | None]
# Format -> how its parts are laid out in slabs, and back.
REORDERS: dict[str, tuple[Reorders, Reorders]] = {
    "nvfp4": ((to_slabs, scales_to_slabs), (from_slabs, scales_from_slabs)),
    "mxfp4": ((to_slabs, powers_to_slabs), (from_slabs, powers_from_slabs)),
    "mxfp8": ((fp8_to_slabs, powers_to_slabs), (fp8_from_slabs, powers_from_slabs)),
    **dict.fromkeys(
        ("fp8", "fp8_channel", "fp8_block"), ((fp8_to_slabs, None), (fp8_from_slabs, None))
    ),
}


def _layout(apply: Reorders, undo: Reorders) -> Layout:
    """Return the layout in slabs, of functions for codes and for block scales."""

    def change(codes: Reorder, scales: Reorder | None) -> Change:
        return each_matrix(codes, scales or torch.Tensor.contiguous)

    return Layout(lambda layer, hidden_alignment: (SLAB, SLAB), change(*apply), change(*undo))


class TritonKernel(Kernel):
    """Triton kernels behind the operator.

    hidden bfloat16 or float16 is multiplied as it is, float32 is rounded to bfloat16; the
    intermediate is bfloat16, sums are float32. Weights are exact, but for the ends of the range of
    MX scales, see `decode_fp8` and `decode_mxfp4`: with float16 hidden, rows of MXFP8 whose largest
    magnitude is below 1e-4 are rounded, and those above 448 overflow.
    """

    name = "triton"
    needs = "triton"
    devices = Devices(((8, 0),), or_newer=True)
    biases = parameters = differentiable = True
    layouts: ClassVar = {name: _layout(*both) for name, both in REORDERS.items()}

    def package_reasons(self) -> Sequence[str]:
        """Return that triton is not installed, where it is not."""
        if has_triton():
            return ()
        return ("needs the package triton, which torch for CUDA brings; not installed",)

    def limit_reasons(self, layer: Layer) -> list[str]:
        """Return which number is too large: of experts, or of experts a token."""
        limits = {"num_experts": MOST_EXPERTS, "top_k": MOST_TOP_K}
        sizes = {"num_experts": layer.num_experts, "top_k": layer.top_k or 1}
        return [
            f"{name} must be at most {most}, got {sizes[name]}"
            for name, most in limits.items()
            if sizes[name] > most
        ]

    def check_device(self, call: Call | LogitsCall) -> None:
        """Raise where Triton does not run; its interpreter runs anywhere."""
        if not interpreted():
            super().check_device(call)

    def run(self, call: Call) -> torch.Tensor:
        """Compute [T, H] with the tiles that were measured to be fast."""
        if tiles := _one_token_tiles(call):
            from .one_token import run_one_token

            return run_one_token(tiles, call)
        return run_with(_measured_tiles(call), call)

    def gradients(self, call: Call, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both gradients; see `backward`."""
        from .backward import gradients_with, tile_for

        tile = tile_for(call.expert_ids.numel(), call.operands.down_packed.shape[0])
        return gradients_with(_measured_tiles(call), tile, call, gradient)


def _measured_tiles(call: Call) -> Config:
    local, hidden_size, columns = call.operands.down_packed.shape
    return choose_tiles(
        current_capability(call.hidden.device), call.layer.gated, hidden_size,
        FORMATS[call.layer.format].elements(columns), local, call.expert_ids.numel(),
        call.layer.format,
    )  # fmt: skip


def _one_token_tiles(call: Call) -> OneToken | None:
    tokens, top_k = call.expert_ids.shape
    if tokens != 1:
        return None
    local, hidden_size, columns = call.operands.down_packed.shape
    return choose_one_token(
        current_capability(call.hidden.device), call.layer.gated, hidden_size,
        FORMATS[call.layer.format].elements(columns), local, top_k, call.layer.format,
    )  # fmt: skip


@functools.cache
def has_triton() -> bool:
    """Whether the package triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels."""
    import triton

    return triton.knobs.runtime.interpret


def run_with(config: Config, call: Call) -> torch.Tensor:
    """Compute [T, H], T > 0, with given tiles; `TritonKernel.run` otherwise."""
    from .sort import sum_slots

    hidden = call.hidden
    x = hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    ids = call.expert_ids.contiguous()
    weights = call.routing_weights.to(torch.float32).contiguous()
    window = call.layer.expert_offset, call.operands.down_packed.shape[0]
    out = hidden.new_empty(hidden.shape)
    capability = None if interpreted() else current_capability(hidden.device)
    form: dict[str, Any] = {"MODE": MODES.index(config.mode), "ASSEMBLY": capability is not None}
    form["FORMAT"] = call.layer.format
    form["WAIT"] = capability is not None and capability[0] == 9
    with torch.cuda.device_of(hidden):
        first, second = find_slots(config, ids, window)
        middle = _gate_up(call, x, ids, first, {**form, **constants_of(config.gate_up)})
        partial = _down(call, middle, ids, weights, second, {**form, **constants_of(config.down)})
        return sum_slots(partial, ids, window, out)


def find_slots(config: Config, ids: torch.Tensor, window: tuple[int, int]) -> tuple[Sorted, Sorted]:
    """Sort for both GEMMs before the first runs, so that nothing stands between them."""
    from .sort import Sorted, sort_slots

    if config.mode != "sorted":
        # Not read: a program's number is its slot.
        unsorted = Sorted(ids, ids, ids, ids.numel())
        return unsorted, unsorted
    first, second = (tile.slots + tile.more for tile in (config.gate_up, config.down))
    once = sort_slots(ids, *window, first)
    return once, once if first == second else sort_slots(ids, *window, second)


def _gate_up(
    call: Call, x: torch.Tensor, ids: torch.Tensor, found: Sorted, constants: dict[str, Any]
) -> torch.Tensor:
    from .activation import activation_constants
    from .gemm import gate_up_kernel

    operands, layer = call.operands, call.layer
    (local, hidden_padded, columns), hidden_size = operands.down_packed.shape, x.shape[1]
    intermediate, slabs = FORMATS[layer.format].elements(columns), hidden_padded // SLAB
    middle = x.new_empty((ids.numel(), intermediate), dtype=torch.bfloat16)
    gate_up_kernel[(found.most * -(-intermediate // constants["ROWS"]),)](
        x, x.stride(0), ids, *found[:3],
        *words_of(operands.gate_up_packed, operands.gate_up_block_scale),
        operands.gate_up_global_scale, operands.gate_up_bias, middle, ids.numel(), ids.shape[1],
        hidden_size, intermediate, slabs, layer.expert_offset, local, **constants,
        WHOLE=slabs % constants["SLABS"] == 0 and hidden_size == hidden_padded,
        GATED=layer.gated, **activation_constants(layer.activation), FP16=x.dtype == torch.float16,
    )  # fmt: skip
    return middle


def _down(
    call: Call,
    middle: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    found: Sorted,
    constants: dict[str, Any],
) -> torch.Tensor:
    from .gemm import down_kernel

    operands = call.operands
    (local, hidden_padded, _), (slots, intermediate) = operands.down_packed.shape, middle.shape
    slabs = intermediate // SLAB
    partial = middle.new_empty((slots, hidden_padded))
    down_kernel[(found.most * -(-hidden_padded // constants["ROWS"]),)](
        middle, ids, *found[:3], *words_of(operands.down_packed, operands.down_block_scale),
        operands.down_global_scale, operands.down_bias, weights, partial, slots, hidden_padded,
        intermediate, slabs, call.layer.expert_offset, local, **constants,
        WHOLE=slabs % constants["SLABS"] == 0,
    )  # fmt: skip
    return partial


def constants_of(tile: Tile) -> dict[str, Any]:
    return {
        "SLOTS": tile.slots,
        "MORE": tile.more,
        "ROWS": tile.rows,
        "SLABS": tile.slabs,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


TRITON = TritonKernel()
