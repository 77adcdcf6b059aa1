"""Kernel `triton`: our own NVFP4 experts for compute capability 8.0 and newer.

Decides: layout of the operands, workspace, launches. Three to seven launches a call, no host
synchronisation; grids follow from shapes, as upper bounds. Tile sizes are in
`triton_configs`, and which to take in `measured`.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from ...experts import ExpertWeights
from ...layer import LayerSettings, MoeSpec, Routing, capability_name
from ..base import (
    Operands,
    PreparedWeights,
    current_capability,
    fold_output_scale,
    logical_weights,
    refuse_device,
    sizes_to_pad,
    unfold_output_scale,
)
from ..measured import choose_tiles
from .layout import SLAB, from_slabs, scales_from_slabs, scales_to_slabs, to_slabs
from .tiles import MODES, Config, Tile

__all__ = ["TRITON", "TritonKernel"]

OLDEST = (8, 0)
MOST_EXPERTS, MOST_TOP_K = 512, 32
COMBINE_COLUMNS = 1024
MOST_SORTED_AT_ONCE = 2048
PLACE_CHUNK, SCAN_BLOCK = 128, 2


class TritonKernel:
    """Triton kernels behind the operator.

    hidden bfloat16 or float16 is multiplied as it is, float32 is rounded to bfloat16; the
    intermediate is bfloat16, sums are float32.
    """

    name = "triton"
    automatic = True
    quantizes_activations = False
    intermediate_dtype = torch.bfloat16

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return why not: device, package, number of experts; any size is padded."""
        reasons = []
        if spec.capability is None or spec.capability < OLDEST:
            got = capability_name(spec.capability)
            reasons.append(f"needs compute capability 8.0 or newer, got {got}")
        elif not has_triton():
            reasons.append("needs the package triton, which torch for CUDA brings; not installed")
        if spec.num_experts > MOST_EXPERTS:
            reasons.append(f"num_experts must be at most {MOST_EXPERTS}, got {spec.num_experts}")
        if spec.top_k and spec.top_k > MOST_TOP_K:
            reasons.append(f"top_k must be at most {MOST_TOP_K}, got {spec.top_k}")
        return reasons

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which size is no multiple of a slab."""
        return sizes_to_pad(spec, (SLAB, SLAB))

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return SLAB, SLAB

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Pad to multiples of 64 and reorder into slabs."""
        padded = weights.unpadded().padded(hidden_multiple=SLAB, intermediate_multiple=SLAB)
        operands, kept = fold_output_scale(Operands(**padded.operands()), output_scale)
        operands = operands._replace(
            gate_up_packed=to_slabs(operands.gate_up_packed),
            gate_up_block_scale=scales_to_slabs(operands.gate_up_block_scale),
            down_packed=to_slabs(operands.down_packed),
            down_block_scale=scales_to_slabs(operands.down_block_scale),
        )
        return PreparedWeights(operands, kept, weights.metadata())

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        slabs = unfold_output_scale(prepared)
        operands = slabs._replace(
            gate_up_packed=from_slabs(slabs.gate_up_packed),
            gate_up_block_scale=scales_from_slabs(slabs.gate_up_block_scale),
            down_packed=from_slabs(slabs.down_packed),
            down_block_scale=scales_from_slabs(slabs.down_block_scale),
        )
        sizes = (prepared.metadata["hidden_size"], prepared.metadata["intermediate_size"])
        return logical_weights(operands, prepared.settings, *sizes).unpadded()

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Compute [T, H] with the tiles that were measured to be fast."""
        local, hidden_size, columns = operands.down_packed.shape
        config = choose_tiles(
            current_capability(hidden.device), settings.gated, hidden_size, columns * 2, local,
            expert_ids.numel(),
        )  # fmt: skip
        return run_with(config, hidden, expert_ids, routing_weights, operands, settings)

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return nothing: any method will do."""
        return []

    def run_from_logits(
        self,
        hidden: torch.Tensor,
        router_logits: torch.Tensor,
        routing_bias: torch.Tensor,
        routing: Routing,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Choose the experts in one launch, then `run`."""
        require_device(hidden)
        from .choose import choose_experts

        with torch.cuda.device_of(hidden):
            chosen = choose_experts(router_logits, routing_bias, routing)
        return self.run(hidden, *chosen, operands, settings)


@functools.cache
def has_triton() -> bool:
    """Whether the package triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def require_device(hidden: torch.Tensor) -> tuple[int, int] | None:
    """Return the compute capability of hidden's device; None in Triton's interpreter.

    Raises:
        UnsupportedError: Triton does not run there.
    """
    import triton

    capability = current_capability(hidden.device)
    if triton.knobs.runtime.interpret:
        return None
    if capability is None or capability < OLDEST:
        refuse_device("triton", hidden.device, "8.0 or newer")
    return capability


def run_with(
    config: Config,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    operands: Operands,
    settings: LayerSettings,
) -> torch.Tensor:
    """Compute [T, H], T > 0, with given tiles; `TritonKernel.run` otherwise.

    Raises:
        UnsupportedError: hidden is on a device that Triton does not run on.
    """
    capability = require_device(hidden)
    from . import gemm as triton_experts
    from . import sort as triton_routing

    tokens, hidden_size = hidden.shape
    num_slots, top_k = expert_ids.numel(), expert_ids.shape[1]
    local, hidden_padded, columns = operands.down_packed.shape
    intermediate = columns * 2
    x = hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, weights = expert_ids.contiguous(), routing_weights.to(torch.float32).contiguous()
    offset, mode = settings.expert_offset, MODES.index(config.mode)

    middle = x.new_empty((num_slots, intermediate), dtype=torch.bfloat16)
    out = hidden.new_empty((tokens, hidden_size))
    fixed = {"MODE": mode, "ASSEMBLY": capability is not None}
    fixed["WAIT"] = capability is not None and capability[0] == 9
    with torch.cuda.device_of(hidden):
        sort = functools.lru_cache(maxsize=1)(functools.partial(_sort, ids, offset, local))

        def find(tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
            """What a GEMM finds its slots by: order, tiles, their number, and its upper bound."""
            if config.mode == "sorted":
                return sort(tile.slots + tile.more)
            return ids, ids, ids, num_slots

        tile = config.gate_up
        order, tiles, count, most = find(tile)
        # Sorted before gate and up run, so that nothing stands between the GEMMs.
        sorted_down = find(config.down)
        slabs = hidden_padded // SLAB
        triton_experts.gate_up_kernel[(most * -(-intermediate // tile.rows),)](
            x, x.stride(0), ids, order, tiles, count,
            *_words(operands.gate_up_packed, operands.gate_up_block_scale),
            operands.gate_up_global_scale, middle, num_slots, top_k, hidden_size, intermediate,
            slabs, offset, local, **fixed, **_constants(tile),
            WHOLE=slabs % tile.slabs == 0 and hidden_size == hidden_padded,
            GATED=settings.gated, ACTIVATION=settings.activation, FP16=x.dtype == torch.float16,
        )  # fmt: skip

        tile = config.down
        down = *_words(operands.down_packed, operands.down_block_scale), operands.down_global_scale
        slabs, blocks = intermediate // SLAB, -(-hidden_padded // tile.rows)
        partial = x.new_empty((num_slots, hidden_padded), dtype=torch.bfloat16)
        order, tiles, count, most = sorted_down
        triton_experts.down_kernel[(most * blocks,)](
            middle, ids, order, tiles, count, *down, weights, partial, num_slots,
            hidden_padded, intermediate, slabs, offset, local, **fixed, **_constants(tile),
            WHOLE=slabs % tile.slabs == 0,
        )  # fmt: skip
        triton_routing.combine_kernel[(tokens, -(-hidden_size // COMBINE_COLUMNS))](
            partial, ids, out, hidden_padded, hidden_size, offset, local, TOP_K=top_k,
            TOP_K_PADDED=1 << (top_k - 1).bit_length(), COLUMNS=COMBINE_COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return out


def _sort(
    ids: torch.Tensor, offset: int, local: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Sort the slots into tiles: order, tiles, their number, and its upper bound."""
    from . import sort as triton_routing

    most = min(ids.numel(), -(-ids.numel() // slots) + local)
    order = ids.new_empty(most * slots, dtype=torch.int32)
    tiles = ids.new_empty(most, dtype=torch.int32)
    number = ids.new_empty(1, dtype=torch.int32)
    experts = 1 << local.bit_length()
    common = ids.numel(), offset, local
    if ids.numel() <= MOST_SORTED_AT_ONCE:
        triton_routing.sort_kernel[(local,)](
            ids, order, tiles, number, *common, EXPERTS=experts, SLOTS=slots,
            CHUNK=max(128, 1 << (ids.numel() - 1).bit_length()), num_warps=8,
        )  # fmt: skip
        return order, tiles, number, most
    chunks = -(-ids.numel() // PLACE_CHUNK)
    counts = ids.new_empty((chunks + 1) * experts, dtype=torch.int32)
    sizes = {"EXPERTS": experts, "CHUNK": PLACE_CHUNK, "num_warps": 4}
    triton_routing.count_kernel[(chunks,)](ids, counts, *common, **sizes)
    triton_routing.scan_kernel[(experts // SCAN_BLOCK,)](
        counts, chunks, EXPERTS=experts, BLOCK=SCAN_BLOCK, num_warps=4
    )
    triton_routing.place_kernel[(max(chunks, local),)](
        ids, counts, order, tiles, number, *common, chunks, SLOTS=slots, **sizes
    )
    return order, tiles, number, most


def _words(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return packed.view(torch.int32), scale.view(torch.int32)


def _constants(tile: Tile) -> dict[str, Any]:
    return {
        "SLOTS": tile.slots,
        "MORE": tile.more,
        "ROWS": tile.rows,
        "SLABS": tile.slabs,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


TRITON = TritonKernel()
