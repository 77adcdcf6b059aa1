"""Kernel `humming`: NVFP4 weights and 16-bit activations on Turing, Ampere, Ada and Hopper.

Two GEMMs of humming-kernels over rows sorted by expert; sorting, activation and weighted sum are
three Triton kernels of ours. Five launches, no host synchronisation, deterministic. Not here:
layout and compilation, see library.py. There is no W4A8 form: the library's FP8 kernels
need block scales of 32 elements or more, and NVFP4 has one per 16.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...experts import ExpertWeights
from ...layer import LayerSettings, MoeSpec, capability_name
from ..base import (
    Operands,
    PreparedWeights,
    check_padding,
    current_capability,
    fold_output_scale,
    logical_weights,
    refuse_device,
    sizes_to_pad,
    unfold_output_scale,
)
from ..torch_routing import RoutesInTorch
from .library import (
    GemmShape,
    HummingGemm,
    compile_gemm,
    library_reasons,
    pack_scales,
    pack_weights,
    unpack_scales,
    unpack_weights,
)

if TYPE_CHECKING:
    import triton
    import triton.language as tl

__all__ = ["HUMMING", "HummingKernel"]

OLDEST_CAPABILITY, NEWEST_CAPABILITY = (7, 5), (9, 0)
BFLOAT16_CAPABILITY = (8, 0)
# N in tiles of 128 for every tensor core, K in steps of 64: what the library's heuristics divide.
ROWS, COLUMNS = 128, 64
# Rows of activations are read 16 bytes at a time.
ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
SORT_CHUNK, BLOCK = 1024, 1024
SUM_BLOCK = 256
# What prepare compiles the weighted sum for: powers of two, the next one serves a top_k between.
WARM_TOP_K = (1, 2, 4, 8, 16, 32)
HIDDEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


GLOBAL_SCALES = ("gate_up_global_scale", "down_global_scale")


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view that starts inside another tensor: the library wants 16-byte addresses."""
    return tensor.clone() if tensor.storage_offset() else tensor


class HummingKernel(RoutesInTorch):
    """humming-kernels behind the operator.

    Operands: codes and block scales in the library's layout, gate first; global scales as they are,
    down_global_scale times output_scale. float32 and float16 input is rounded to bfloat16, on
    compute capability 7.5 all is float16.
    """

    name = "humming"
    automatic = True
    quantizes_activations = False
    intermediate_dtype = torch.bfloat16

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return why not: device, package or toolchain; any size and activation will do."""
        capability = spec.capability
        if capability is None or not OLDEST_CAPABILITY <= capability <= NEWEST_CAPABILITY:
            reason = f"needs compute capability 7.5 to 9.0, got {capability_name(capability)}"
            if capability and capability > NEWEST_CAPABILITY:
                reason += " (the layout there depends on the CUDA compiler)"
            return [reason]
        return list(library_reasons())

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which size is no multiple of a tile."""
        return sizes_to_pad(spec, _multiples(spec.gated))

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return _multiples(spec.gated)

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Pad and reorder; on a CUDA device compile too, which takes minutes the first time."""
        metadata = weights.metadata()
        hidden_multiple, intermediate_multiple = _multiples(weights.gated)
        padded = weights.unpadded().padded(
            hidden_multiple=hidden_multiple, intermediate_multiple=intermediate_multiple
        )
        operands, kept = fold_output_scale(Operands(**padded.operands()), output_scale)
        operands = operands._replace(
            gate_up_packed=pack_weights(operands.gate_up_packed),
            gate_up_block_scale=pack_scales(operands.gate_up_block_scale),
            down_packed=pack_weights(operands.down_packed),
            down_block_scale=pack_scales(operands.down_block_scale),
        )
        scales = {n: _aligned(getattr(operands, n)) for n in GLOBAL_SCALES}
        prepared = PreparedWeights(operands._replace(**scales), kept, metadata)
        if weights.device.type == "cuda":
            self._warm_up(prepared)
        return prepared

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        laid_out = unfold_output_scale(prepared)
        padded = laid_out._replace(
            gate_up_packed=unpack_weights(laid_out.gate_up_packed),
            gate_up_block_scale=unpack_scales(laid_out.gate_up_block_scale),
            down_packed=unpack_weights(laid_out.down_packed),
            down_block_scale=unpack_scales(laid_out.down_block_scale),
        )
        sizes = (prepared.metadata["hidden_size"], prepared.metadata["intermediate_size"])
        return logical_weights(padded, prepared.settings, *sizes).unpadded()

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Sort, GEMM, activation, GEMM, weighted sum, all on the current stream."""
        self._check(hidden, operands, settings)
        with torch.cuda.device_of(hidden):
            gemms = _gemms(hidden.shape[1], operands)
            slots, local = expert_ids.numel(), operands.down_packed.shape[0]
            # A guess of how many rows stay, for the size of the tiles; any is right.
            rows = max(1, slots * local // settings.num_experts)
            intervals = tuple(gemm.interval(rows) for gemm in gemms)
            expert_ids = expert_ids.contiguous()
            routing_weights = routing_weights.float().contiguous()
            window = (settings.expert_offset, local)
            places = sort_slots(expert_ids, window, tuple(i.tile_rows for i in intervals))
            return self._compute(
                hidden, expert_ids, routing_weights, operands, settings, gemms, intervals, places
            )

    def _compute(
        self, hidden, expert_ids, routing_weights, operands, settings, gemms, intervals, places
    ) -> torch.Tensor:
        slots, top_k = expert_ids.numel(), expert_ids.shape[1]
        first, second = gemms
        x = _input(hidden, first)
        gate_up = x.new_empty((slots, first.shape.rows))
        first.run(x, gate_up, *operands[:3], place=places[0], top_k=top_k, interval=intervals[0])
        middle = activate(gate_up, settings.activation, settings.gated)
        down = x.new_empty((slots, second.shape.rows - second.shape.cut_rows))
        second.run(middle, down, *operands[3:6], place=places[1], top_k=1, interval=intervals[1])
        window = (settings.expert_offset, operands.down_packed.shape[0])
        return weighted_sum(down, expert_ids, routing_weights, window, hidden)

    def _warm_up(self, prepared: PreparedWeights) -> None:
        """Compile and load every kernel, so that the first call may be one under capture."""
        operands, settings = prepared.operands, prepared.settings
        device, local = operands.down_packed.device, operands.down_packed.shape[0]
        hidden = torch.zeros(
            (1, prepared.metadata["hidden_size"]), dtype=_dtype(device), device=device
        )
        with torch.cuda.device(device):
            gemms = _gemms(hidden.shape[1], operands)
            key = (gemms[0].shape, gemms[1].shape, settings.activation, settings.gated, device)
            if key in _warm:
                return
            # No id is local: every kernel is loaded and none has rows.
            outside = torch.full((1, 1), -1, dtype=torch.int64, device=device)
            one = torch.ones((1, 1), dtype=torch.float32, device=device)
            for count in range(max(len(gemm.intervals) for gemm in gemms)):
                intervals = tuple(g.intervals[min(count, len(g.intervals) - 1)] for g in gemms)
                places = sort_slots(outside, (0, local), tuple(i.tile_rows for i in intervals))
                self._compute(hidden, outside, one, operands, settings, gemms, intervals, places)
            for ids in (outside, outside.int()):
                sort_slots(ids, (0, local), (8, 8))
                for top_k, dtype in itertools.product(WARM_TOP_K, HIDDEN_DTYPES):
                    nowhere = ids.expand(1, top_k).contiguous()
                    rows = hidden.new_empty((top_k, gemms[1].shape.rows - gemms[1].shape.cut_rows))
                    weights = one.expand(1, top_k).contiguous()
                    weighted_sum(rows, nowhere, weights, (0, local), hidden.to(dtype))
            _warm.add(key)

    def _check(self, hidden: torch.Tensor, operands: Operands, settings: LayerSettings) -> None:
        """Raise what the operator leaves to its kernel: device and padding."""
        capability = current_capability(hidden.device)
        if capability is None or not OLDEST_CAPABILITY <= capability <= NEWEST_CAPABILITY:
            refuse_device(self.name, hidden.device, "7.5 to 9.0")
        check_padding(self.name, operands, _multiples(settings.gated))


HUMMING = HummingKernel()
_warm: set[tuple] = set()


def _multiples(gated: bool) -> tuple[int, int]:
    # Gate and up are padded each, and together they are the rows of one GEMM.
    return ROWS, COLUMNS if gated else ROWS


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


def sort_slots(
    expert_ids: torch.Tensor, window: tuple[int, int], tile_rows: tuple[int, ...]
) -> list[dict[str, torch.Tensor]]:
    """Sort slots t * K + k by expert, padded to whole tiles, for GEMMs of different tiles at once.

    Args:
        expert_ids: int32 or int64 [T, K], contiguous. window: first local expert and their number;
            slots of other experts are left out. tile_rows: rows of a tile, one for each GEMM.

    Returns:
        sorted_ids, expert_ids (of each tile) and num_tokens_padded for each GEMM, int32.
    """
    first, local = window
    slots = expert_ids.numel()
    most = [min(slots * rows, slots + local * (rows - 1)) for rows in tile_rows]
    # A GEMM's part starts at a multiple of 16 bytes, as the library reads it.
    length = -(-max(most) // 64) * 64
    tiles = max(-(-m // rows) for m, rows in zip(most, tile_rows, strict=True))
    memory = torch.empty(
        len(tile_rows) * (length + tiles + 1), dtype=torch.int32, device=expert_ids.device
    )
    sorted_ids, tile_expert, total = memory.split([len(tile_rows) * n for n in (length, tiles, 1)])
    glue().sort[(local, len(tile_rows))](
        expert_ids,
        sorted_ids,
        tile_expert,
        total,
        first,
        slots,
        length,
        tiles,
        *tile_rows,
        LOCAL=local,
        BINS=max(32, _power_of_two(local + 1)),
        CHUNK=SORT_CHUNK,
        num_warps=8,
    )
    return [
        {
            "sorted_ids": sorted_ids[i * length : (i + 1) * length],
            "expert_ids": tile_expert[i * tiles : (i + 1) * tiles],
            "num_tokens_padded": total[i : i + 1],
        }
        for i in range(len(tile_rows))
    ]


def activate(gate_up: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """Return act(gate) * up, or act(up), of rows [gate; up], computed in float32."""
    slots, columns = gate_up.shape
    columns = columns // 2 if gated else columns
    out = gate_up.new_empty((slots, columns))
    grid = (slots, -(-columns // BLOCK))
    glue().activate[grid](gate_up, out, columns, GATED=gated, NAME=activation, BLOCK=BLOCK)
    return out


def weighted_sum(
    rows: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    window: tuple[int, int],
    like: torch.Tensor,
) -> torch.Tensor:
    """Return [T, H] of like's shape and dtype: the sum over local experts, in float32."""
    tokens, top_k = expert_ids.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    grid = (tokens, -(-out.shape[1] // SUM_BLOCK))
    glue().add[grid](
        rows,
        expert_ids,
        routing_weights,
        out,
        *window,
        out.shape[1],
        rows.shape[1],
        top_k,
        LANES=_power_of_two(top_k),
        BLOCK=SUM_BLOCK,
    )
    return out


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class Glue(NamedTuple):
    """The Triton kernels between the GEMMs."""

    sort: triton.JITFunction
    activate: triton.JITFunction
    add: triton.JITFunction


@functools.cache
def glue() -> Glue:
    """Define the Triton kernels: defined here, since importing this module must not need Triton."""
    global tl  # Triton looks names up among a module's globals
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["first", "slots", "length", "tiles", "rows0", "rows1"])
    def sort(
        ids,
        sorted_ids,
        tile_expert,
        total,
        first,
        slots,
        length,
        tiles,
        rows0,
        rows1,
        LOCAL: tl.constexpr,
        BINS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        # Each program counts everything and places one expert: no atomics, always the same order.
        expert, gemm = tl.program_id(0), tl.program_id(1)
        rows = tl.where(gemm == 0, rows0, rows1)
        counts = tl.zeros([BINS], tl.int32)
        for chunk in range(0, slots, CHUNK):
            slot = chunk + tl.arange(0, CHUNK)
            local = tl.load(ids + slot, mask=slot < slots, other=-1) - first
            inside = (slot < slots) & (local >= 0) & (local < LOCAL)
            counts += tl.histogram(tl.where(inside, local, LOCAL).to(tl.int32), BINS)
        bins = tl.arange(0, BINS)
        padded = tl.where(bins < LOCAL, (counts + rows - 1) // rows * rows, 0)
        start = tl.sum(tl.where(bins < expert, padded, 0))
        mine = tl.sum(tl.where(bins == expert, padded, 0))
        if expert == 0:
            tl.store(total + gemm, tl.sum(padded))
        if mine > 0:
            out = sorted_ids + gemm * length + start
            seen = 0
            for chunk in range(0, slots, CHUNK):
                slot = chunk + tl.arange(0, CHUNK)
                local = tl.load(ids + slot, mask=slot < slots, other=-1) - first
                hit = ((slot < slots) & (local == expert)).to(tl.int32)
                tl.store(out + seen + tl.cumsum(hit, 0) - 1, slot, mask=hit == 1)
                seen += tl.sum(hit)
            # A tile has 256 rows at most.
            tail = seen + tl.arange(0, 256)
            tl.store(out + tail, tl.zeros([256], tl.int32) + slots, mask=tail < mine)
            for chunk in range(0, mine // rows, 64):
                tile = chunk + tl.arange(0, 64)
                to = tile_expert + gemm * tiles + start // rows + tile
                tl.store(to, tl.zeros([64], tl.int32) + expert, mask=tile < mine // rows)

    @triton.jit
    def activate(x, y, columns, GATED: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < columns
        a = tl.load(x + row * columns * (1 + GATED) + column, mask=mask, other=0).to(tl.float32)
        if NAME == "silu":
            z = a * tl.sigmoid(a)
        elif NAME == "gelu_tanh":
            z = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        elif NAME == "gelu":
            z = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
        elif NAME == "relu2":
            z = tl.where(a < 0, 0.0, a * a)
        elif NAME == "relu":
            z = tl.where(a < 0, 0.0, a)
        else:
            tl.static_assert(NAME == "identity")
            z = a
        if GATED:
            z *= tl.load(x + row * columns * 2 + columns + column, mask=mask, other=0).to(
                tl.float32
            )
        tl.store(y + row * columns + column, z.to(y.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["first", "local", "top_k"])
    def add(
        x,
        ids,
        weights,
        y,
        first,
        local,
        columns,
        stride,
        top_k,
        LANES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(LANES):
            slot = row * top_k + k
            expert = tl.load(ids + slot, mask=k < top_k, other=-1) - first
            # Rows of other experts were never written: they may hold NaN.
            inside = (k < top_k) & (expert >= 0) & (expert < local)
            value = tl.load(x + slot * stride + column, mask=(column < columns) & inside, other=0)
            total += tl.load(weights + slot, mask=inside, other=0.0) * value.to(tl.float32)
        tl.store(y + row * columns + column, total.to(y.dtype.element_ty), mask=column < columns)

    return Glue(sort, activate, add)
