"""Layouts equal FlashInfer's own, bit for bit: its row orders on a CPU, its tiles on a GPU.

This folder must not become a package: tests/ is on sys.path, and would then hide FlashInfer.
"""

from __future__ import annotations

import importlib.metadata
import types
import warnings

import pytest
import torch

from fp4moe.kernels.flashinfer.block_scales import interleave_128x4
from fp4moe.kernels.flashinfer.rows import (
    down_row_index,
    gate_interleave_index,
    gate_up_row_index,
    permute_rows,
    shuffle_index,
    up_gate_index,
)

try:
    importlib.metadata.version("flashinfer-python")
except importlib.metadata.PackageNotFoundError:
    installed = False
else:
    installed = True
pytestmark = pytest.mark.skipif(not installed, reason="needs flashinfer-python")

EPILOGUE_ROWS = 128
# Gemma4 (704), NemotronH (1856 padded to 1920, 960 of two ranks to 1024), and other ranks' parts.
INTERMEDIATE = [64, 192, 384, 704, 1024, 1920]
HIDDEN = [128, 384, 1024, 2688, 2816]


@pytest.fixture(scope="module")
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import flashinfer
        from flashinfer.fused_moe import core

    return types.SimpleNamespace(
        shuffle=flashinfer.shuffle_matrix_a,
        interleave_gate=flashinfer.reorder_rows_for_gated_act_gemm,
        interleave_scales=flashinfer.nvfp4_block_scale_interleave,
        first_indices=core._maybe_get_cached_w3_w1_permute_indices,
        second_indices=core.get_w2_permute_indices_with_cache,
    )


def bytes_(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def first_rows(intermediate, gated):
    return intermediate * (1 + gated)


def halves_swapped(matrix):
    gate, up = matrix.chunk(2)
    return torch.cat((up, gate))


FIRST = [
    (intermediate, gated)
    for intermediate in INTERMEDIATE
    for gated in (True, False)
    if first_rows(intermediate, gated) % 128 == 0
]


@pytest.mark.parametrize(("intermediate", "gated"), FIRST)
@pytest.mark.parametrize("scale_block", [None, 16], ids=["packed", "scales"])
def test_rows_of_the_first_gemm(library, intermediate, gated, scale_block):
    matrix = bytes_(first_rows(intermediate, gated), 13)
    # A fresh cache: the keys of 0.6.13 tell neither gated from not gated nor tile from tile.
    theirs = library.first_indices({}, matrix, EPILOGUE_ROWS, scale_block, is_gated_act_gemm=gated)
    swapped = halves_swapped(matrix) if gated else matrix
    ours = permute_rows(matrix[None], gate_up_row_index(len(matrix), gated))[0]
    assert torch.equal(ours, swapped[theirs])


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("scale_block", [None, 16], ids=["packed", "scales"])
def test_rows_of_the_second_gemm(library, hidden, scale_block):
    matrix = bytes_(hidden, 13)
    theirs = library.second_indices({}, matrix, EPILOGUE_ROWS, scale_block)
    assert torch.equal(down_row_index(hidden), theirs)
    assert torch.equal(permute_rows(matrix[None], theirs)[0], matrix[theirs])


@pytest.mark.parametrize("rows", [32, 96, 352, 704, 1408, 2688, 2816, 3840])
def test_parts_of_the_row_order(library, rows):
    matrix = bytes_(rows, 5)
    assert torch.equal(matrix[shuffle_index(rows)], library.shuffle(matrix, EPILOGUE_ROWS))
    assert torch.equal(matrix[gate_interleave_index(rows)], library.interleave_gate(matrix))


@pytest.mark.parametrize("intermediate", [64, 704, 1920])
def test_gated_rows_step_by_step(library, intermediate):
    gate, up = bytes_(intermediate, 7), bytes_(intermediate, 7)
    theirs = library.shuffle(library.interleave_gate(torch.cat((up, gate))), EPILOGUE_ROWS)
    logical = torch.cat((gate, up))
    assert torch.equal(logical[gate_up_row_index(2 * intermediate, True)], theirs)
    assert torch.equal(logical[up_gate_index(2 * intermediate)], torch.cat((up, gate)))


SCALE_SHAPES = [(1, 1, 1), (3, 130, 5), (2, 384, 44), (5, 1408, 176), (2, 2816, 44)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SCALE_SHAPES, ids=str)
def test_gpu_tiles_of_block_scales(library, shape):
    scale = bytes_(*shape)
    theirs = library.interleave_scales(scale.cuda()).cpu()
    assert torch.equal(interleave_128x4(scale).flatten(), theirs)
    assert torch.equal(interleave_128x4(scale.cuda()).cpu().flatten(), theirs)
