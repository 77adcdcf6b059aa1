"""Gradients of hidden and routing weights in Triton, from the weights as the forward reads them.

Four launches beside the sorting. Gate and up are computed again; then weights are multiplied from
the other side: a program takes SLABS * 64 columns of one expert's matrix, for the slots of a tile,
and sums over its rows, ROWS at a time, which it decodes as the forward does and transposes:

    inner_gradient_kernel     of the output through down and the activation, to gate and up
    hidden_gradient_kernel    of gate and up through their weights, to a slot's hidden

Sums are float32, in one order; gradients of gate, up and a slot's hidden are bfloat16 in between.
Scratch a slot: float32 sums and bfloat16 gradients of gate and up, 6 bytes a row of them, and
bfloat16 hidden, 2 bytes a padded column; nothing for each expert.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..base import current_capability
from ..grouped_matrix import GroupedMatrix
from ..operands import Call
from .activation import activation_constants, combine, combine_gradients, slope
from .gemm import UNSPECIALIZED, _add_dot, find_work, gate_up_kernel
from .layout import SLAB
from .sort import Sorted, sort_slots, sum_slots
from .tiles import MODES, Config, Tile
from .weights import load_weights, row_factor

__all__ = ["gradients_with", "hidden_gradient_kernel", "inner_gradient_kernel", "slot_gradients"]
__all__ += ["slot_sums", "tile_for"]


@triton.jit
def _tile_scale(
    scales, expert, first, slab, total_rows, slabs, PARTS: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """The scale that 64 rows from `first` on share in the columns of a slab; fp8 and fp8_block."""
    half = total_rows // PARTS
    part = expert.to(tl.int64) * PARTS + first // half
    if FORMAT == "fp8":
        at = part
    else:
        at = (part * ((half + 127) // 128) + first % half // 128) * ((slabs + 1) // 2) + slab // 2
    return tl.load(scales + at)


@triton.jit
def _product(
    x, at, valid, columns, words, scales, global_scale, expert, slab, total_rows, slabs,
    PARTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Sum of weights [rows, SLABS * 64] times x [SLOTS, rows] over all rows: [SLABS * 64, SLOTS].

    at: where each slot's x begins, int64. columns: of x; behind them it is zero.
    """
    acc = tl.zeros((SLABS * 64, SLOTS), dtype=tl.float32)
    for first in tl.range(0, total_rows, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        mask = valid[:, None] & (row < columns)[None, :]
        d = tl.load(x + at[:, None] + row[None, :], mask=mask, other=0.0)
        w = load_weights(
            words, scales, expert, row, total_rows, slab, slabs,
            SLABS, ROWS, WHOLE, False, ASSEMBLY, FORMAT,
        )  # fmt: skip
        if FORMAT == "fp8_channel":
            # Rows are what is summed over: their scales cannot wait until the end.
            scale = tl.load(scales + expert.to(tl.int64) * total_rows + row)
            d = (d.to(tl.float32) * scale[None, :]).to(d.dtype)
        if FORMAT == "fp8" or FORMAT == "fp8_block":
            scale = _tile_scale(scales, expert, first, slab, total_rows, slabs, PARTS, FORMAT)
            part = _add_dot(tl.trans(w), tl.trans(d), tl.zeros_like(acc), ASSEMBLY, WAIT)
            acc += part * scale
        else:
            acc = _add_dot(tl.trans(w), tl.trans(d), acc, ASSEMBLY, WAIT)
    if FORMAT == "nvfp4" or FORMAT == "mxfp4" or FORMAT == "mxfp8":
        acc *= row_factor(scales, global_scale, expert, 0, total_rows, PARTS, False, FORMAT)
    return acc


@triton.jit
def _inner_gradient_tile(
    grad, stride_token, words, scales, global_scale, bias, sums, routing_weights, to_sums,
    to_weights, slot, expert, block, top_k, hidden_size, hidden_padded, intermediate, slabs,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, LIMIT: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    there = tl.maximum(slot, 0)
    token = (there // top_k).to(tl.int64) * stride_token
    to_inner = _product(
        grad, token, slot >= 0, hidden_size, words, scales, global_scale, expert, block * SLABS,
        hidden_padded, slabs, 1, SLOTS, ROWS, SLABS, STAGES, WHOLE, ASSEMBLY, WAIT, FORMAT,
    )  # fmt: skip
    column = block * SLABS * 64 + tl.arange(0, SLABS * 64)
    mask = (column < intermediate)[:, None] & (slot >= 0)[None, :]
    PARTS: tl.constexpr = 2 if GATED else 1
    at = (there.to(tl.int64) * PARTS * intermediate)[None, :] + column[:, None]
    factor = tl.load(routing_weights + there, mask=slot >= 0, other=0.0)[None, :]
    up = tl.load(sums + at + (PARTS - 1) * intermediate, mask=mask, other=0.0)
    out = to_sums.dtype.element_ty
    if GATED:
        gate = tl.load(sums + at, mask=mask, other=0.0)
        inner = combine(up, gate, ACTIVATION, ALPHA, BETA, LIMIT)
        to_up, to_gate = combine_gradients(
            to_inner * factor, up, gate, ACTIVATION, ALPHA, BETA, LIMIT
        )
        tl.store(to_sums + at, to_gate.to(out), mask=mask)
    else:
        inner = combine(up, None, ACTIVATION, ALPHA, BETA, LIMIT)
        to_up = to_inner * factor * slope(up, ACTIVATION, ALPHA)
    tl.store(to_sums + at + (PARTS - 1) * intermediate, to_up.to(out), mask=mask)
    to_weight = tl.sum(tl.where(mask, to_inner * inner, 0.0), 0)
    if bias is not None:
        # Once a slot.
        for first in range(0, tl.where(block == 0, hidden_size, 0), ROWS):
            row = first + tl.arange(0, ROWS)
            inside = row < hidden_size
            added = tl.load(
                bias + expert.to(tl.int64) * hidden_padded + row, mask=inside, other=0.0
            )
            dy = tl.load(
                grad + token[:, None] + row[None, :],
                mask=(slot >= 0)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            to_weight += tl.sum(dy.to(tl.float32) * added[None, :], 1)
    blocks = tl.cdiv(intermediate, SLABS * 64)
    tl.store(to_weights + there.to(tl.int64) * blocks + block, to_weight, mask=slot >= 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def inner_gradient_kernel(
    grad, stride_token, ids, order, tiles, num_tiles, words, scales, global_scale, bias, sums,
    routing_weights, to_sums, to_weights, num_slots, top_k, hidden_size, hidden_padded,
    intermediate, slabs, expert_offset, local_experts,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, LIMIT: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up, and each column block's part of the routing weight's.

    Grid: [tiles * column blocks]. grad: bfloat16 [T, hidden_size]. words, scales, bias: of down.
    sums, to_sums: [slots, gate and up], or [slots, up]. to_weights: float32 [slots, blocks].
    """
    block, expert, slot, _ = find_work(
        ids, order, tiles, num_tiles, intermediate, num_slots, expert_offset, local_experts,
        1, SLOTS, 0, SLABS * 64,
    )  # fmt: skip
    if expert >= 0:
        _inner_gradient_tile(
            grad, stride_token, words, scales, global_scale, bias, sums, routing_weights, to_sums,
            to_weights, slot, expert, block, top_k, hidden_size, hidden_padded, intermediate, slabs,
            SLOTS, ROWS, SLABS, STAGES, WHOLE, GATED, ACTIVATION, ALPHA, BETA, LIMIT, ASSEMBLY,
            WAIT, FORMAT,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def hidden_gradient_kernel(
    to_sums, ids, order, tiles, num_tiles, words, scales, global_scale, out,
    num_slots, total_rows, hidden_padded, slabs, expert_offset, local_experts,
    PARTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SLABS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, ASSEMBLY: tl.constexpr, WAIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Write each slot's part of the gradient of hidden to out [slots, hidden_padded].

    Grid: [tiles * column blocks]. words, scales: of gate and up, PARTS of total_rows in all.
    """
    block, expert, slot, _ = find_work(
        ids, order, tiles, num_tiles, hidden_padded, num_slots, expert_offset, local_experts,
        1, SLOTS, 0, SLABS * 64,
    )  # fmt: skip
    if expert >= 0:
        there = tl.maximum(slot, 0).to(tl.int64)
        value = _product(
            to_sums, there * total_rows, slot >= 0, total_rows, words, scales, global_scale, expert,
            block * SLABS, total_rows, slabs, PARTS, SLOTS, ROWS, SLABS, STAGES, WHOLE, ASSEMBLY,
            WAIT, FORMAT,
        )  # fmt: skip
        column = block * SLABS * 64 + tl.arange(0, SLABS * 64)
        mask = (column < hidden_padded)[:, None] & (slot >= 0)[None, :]
        at = out + (there * hidden_padded)[None, :] + column[:, None]
        tl.store(at, value.to(out.dtype.element_ty), mask=mask)


def tile_for(slots: int, experts: int) -> Tile:
    """Return the tile of both gradients, by how many slots an expert has if all are hit alike."""
    each = slots / experts
    return Tile(16 if each <= 16 else 32 if each <= 32 else 64, rows=64, slabs=2, warps=4, stages=3)


def gradients_with(
    config: Config, tile: Tile, call: Call, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both gradients with given tiles, config for gate and up again; T > 0."""
    hidden, ids, layer = call.hidden, call.expert_ids.contiguous(), call.layer
    weights = call.routing_weights.to(torch.float32).contiguous()
    grad = gradient.to(torch.bfloat16)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    form = layer.format, 1 + layer.gated, layer.expert_offset
    gate_up = GroupedMatrix.of(call.operands, "gate_up", *form)
    down = GroupedMatrix.of(call.operands, "down", layer.format, 1, layer.expert_offset)
    intermediate, window = down.columns, (layer.expert_offset, down.experts)
    with torch.cuda.device_of(hidden):
        sums = hidden.new_empty((ids.numel(), gate_up.rows), dtype=torch.float32)
        given = hidden, ids, gate_up, call.operands.gate_up_bias
        slot_sums(config.mode, config.gate_up, *given, sums)
        found = sort_slots(ids, *window, tile.slots)
        blocks = -(-intermediate // (tile.slabs * SLAB))
        to_sums = sums.new_empty(sums.shape, dtype=torch.bfloat16)
        # Zero where an id is not local.
        to_weights = sums.new_zeros((ids.numel(), blocks))
        slabs = intermediate // SLAB
        inner_gradient_kernel[(found.most * blocks,)](
            grad, grad.stride(0), ids, *found[:3], *_weights(down), call.operands.down_bias, sums,
            weights, to_sums, to_weights, ids.numel(), ids.shape[1], hidden.shape[1], down.rows,
            intermediate, slabs, *window, WHOLE=slabs % tile.slabs == 0, GATED=layer.gated,
            **activation_constants(layer.activation), **_constants(tile, hidden.device, down),
        )  # fmt: skip
        partial = slot_gradients(tile, to_sums, ids, gate_up, found)
        to_hidden = sum_slots(partial, ids, window, hidden.new_empty(hidden.shape))
    return to_hidden, to_weights.sum(1).view(ids.shape).to(call.routing_weights.dtype)


def slot_gradients(
    tile: Tile, grad: torch.Tensor, ids: torch.Tensor, matrix: GroupedMatrix, found: Sorted
) -> torch.Tensor:
    """Return grad matrix[e] of every slot, bfloat16 [slots, columns], unwritten without an expert.

    Args:
        grad: bfloat16 [slots, rows], contiguous. found: the slots in tiles of `tile.slots`.
    """
    columns = matrix.columns
    slabs = columns // SLAB
    out = grad.new_empty((grad.shape[0], columns))
    hidden_gradient_kernel[(found.most * -(-slabs // tile.slabs),)](
        grad, ids, *found[:3], *_weights(matrix), out, ids.numel(), matrix.rows, columns, slabs,
        matrix.expert_offset, matrix.experts, PARTS=matrix.halves,
        WHOLE=slabs % tile.slabs == 0, **_constants(tile, grad.device, matrix),
    )  # fmt: skip
    return out


def slot_sums(
    mode: str, tile: Tile, hidden: torch.Tensor, ids: torch.Tensor, matrix: GroupedMatrix,
    bias: torch.Tensor | None, out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Write matrix[e] hidden[t] + bias[e] of every slot, gate first, to out, and return it.

    Args:
        mode, tile: of `Config`. ids: contiguous.
        out: [slots, rows], contiguous; stays as it is without an expert.
    """
    x = hidden.to(torch.bfloat16) if hidden.dtype == torch.float32 else hidden
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, slabs = matrix.rows // matrix.halves, matrix.columns // SLAB
    window = matrix.expert_offset, matrix.experts
    # Where a program's number is its slot nothing is read.
    found = Sorted(ids, ids, ids, ids.numel())
    if mode == "sorted":
        found = sort_slots(ids, *window, tile.slots + tile.more)
    gate_up_kernel[(found.most * -(-rows // tile.rows),)](
        x, x.stride(0), ids, *found[:3], *_weights(matrix), bias, out, ids.numel(), ids.shape[1],
        x.shape[1], rows, slabs, *window, MODE=MODES.index(mode), MORE=tile.more,
        WHOLE=slabs % tile.slabs == 0 and x.shape[1] == matrix.columns, GATED=matrix.halves == 2,
        ACTIVATION="sums", ALPHA=1.0, BETA=0.0, LIMIT=0.0, FP16=x.dtype == torch.float16,
        **_constants(tile, x.device, matrix),
    )  # fmt: skip
    return out


def _constants(tile: Tile, device: torch.device, matrix: GroupedMatrix) -> dict[str, Any]:
    capability = None if triton.knobs.runtime.interpret else current_capability(device)
    wait = capability is not None and capability[0] == 9
    sizes = {"SLOTS": tile.slots, "ROWS": tile.rows, "SLABS": tile.slabs, "STAGES": tile.stages}
    form = {"ASSEMBLY": capability is not None, "WAIT": wait, "FORMAT": matrix.format}
    return {**sizes, **form, "num_warps": tile.warps}


def _weights(matrix: GroupedMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the words, the scales and the global scales that kernels read."""
    scale = matrix.block_scale
    words = scale if scale.dtype == torch.float32 else scale.view(-1).view(torch.int32)
    return matrix.packed.view(torch.int32), words, matrix.global_scale
