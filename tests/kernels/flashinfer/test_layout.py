"""Layouts of prepared weights: row orders, block-scale tiles, padding, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from refusals import assert_refused

from fp4moe.kernels.flashinfer.block_scales import deinterleave_128x4, interleave_128x4
from fp4moe.kernels.flashinfer.rows import (
    down_row_index,
    gate_interleave_index,
    gate_up_row_index,
    inverse_index,
    permute_rows,
    shuffle_index,
    up_gate_index,
)
from fp4moe.padding import pad_matrix, round_up, trim_matrix
from fp4moe.testing import make_layer


def random_bytes(*shape, device="cpu"):
    return torch.randint(1, 256, shape, dtype=torch.uint8).to(device)  # no zero: padding stands out


def with_other_strides(tensor):
    """The same bytes as three strided tensors, one of them at an odd address."""
    wide = torch.zeros(*tensor.shape[:2], 2 * tensor.shape[2] + 1, dtype=torch.uint8)
    wide[..., 1::2] = tensor
    shifted = torch.zeros(tensor.numel() + 1, dtype=torch.uint8)[1:].view(tensor.shape)
    shifted.copy_(tensor)
    return wide[..., 1::2], tensor.transpose(1, 2).contiguous().transpose(1, 2), shifted


# Row orders. Expected orders are written out or built by placing rows, never by the closed form.

SHUFFLED_32 = [
    *(0, 4, 8, 12, 16, 20, 24, 28),
    *(1, 5, 9, 13, 17, 21, 25, 29),
    *(2, 6, 10, 14, 18, 22, 26, 30),
    *(3, 7, 11, 15, 19, 23, 27, 31),
]


def shuffled(rows):
    """Read each 32 rows as 8 x 4 and write them column by column."""
    out = []
    for start in range(0, len(rows), 32):
        quads = [rows[start + 4 * i : start + 4 * i + 4] for i in range(8)]
        out += [quad[column] for column in range(4) for quad in quads]
    return out


def gated_rows(rows):
    """Deal up and gate rows in turn, then shuffle."""
    half = rows // 2
    dealt = [row for i in range(half) for row in (half + i, i)]
    return shuffled(dealt)


def test_32_rows_worked_by_hand():
    assert shuffle_index(32).tolist() == SHUFFLED_32
    assert shuffled(list(range(32))) == SHUFFLED_32
    assert gate_interleave_index(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert up_gate_index(6).tolist() == [3, 4, 5, 0, 1, 2]


def test_the_first_32_of_128_gated_rows_worked_by_hand():
    """Gate rows are 0..63, up rows 64..127; each 16 of both end up in eight-row groups."""
    assert gate_up_row_index(128, True)[:32].tolist() == [
        *(64, 66, 68, 70, 72, 74, 76, 78),
        *(0, 2, 4, 6, 8, 10, 12, 14),
        *(65, 67, 69, 71, 73, 75, 77, 79),
        *(1, 3, 5, 7, 9, 11, 13, 15),
    ]


@pytest.mark.parametrize("rows", [32, 96, 352, 704, 1376, 2688])
def test_shuffle_and_its_parts(rows):
    assert shuffle_index(rows).tolist() == shuffled(list(range(rows)))
    half = rows // 2
    assert gate_interleave_index(rows).tolist() == [
        row for i in range(half) for row in (i, half + i)
    ]
    assert up_gate_index(rows).tolist() == [*range(half, rows), *range(half)]


@pytest.mark.parametrize("rows", [128, 384, 1024, 1408, 1920, 2816, 3840])
def test_whole_orders(rows):
    assert gate_up_row_index(rows, True).tolist() == gated_rows(rows)
    assert gate_up_row_index(rows, False).tolist() == shuffled(list(range(rows)))
    assert down_row_index(rows).tolist() == shuffled(list(range(rows)))


@pytest.mark.parametrize("rows", [128, 1408, 3840])
def test_a_gate_row_stands_eight_rows_after_its_up_row(rows):
    index = gate_up_row_index(rows, True).view(-1, 2, 8)
    assert torch.equal(index[:, 0] - rows // 2, index[:, 1])
    # A tile of 32 prepared rows holds 16 neighbouring intermediate columns.
    columns = (index % (rows // 2)).view(-1, 32).sort(1).values[:, ::2]
    assert torch.equal(columns.flatten(), torch.arange(rows // 2))


INDICES = {
    "shuffle": lambda: shuffle_index(96),
    "interleave": lambda: gate_interleave_index(34),
    "swap": lambda: up_gate_index(34),
    "gated": lambda: gate_up_row_index(1408, True),
    "not gated": lambda: gate_up_row_index(1920, False),
    "down": lambda: down_row_index(2816),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_a_fresh_permutation(name):
    index = INDICES[name]()
    rows = len(index)
    assert index.dtype == torch.int64 and index.device.type == "cpu"
    assert sorted(index.tolist()) == list(range(rows))
    want = index.tolist()
    index.zero_()  # a caller may spoil what it got
    assert INDICES[name]().tolist() == want
    inverse = inverse_index(INDICES[name]())
    assert [want[n] for n in inverse.tolist()] == list(range(rows))
    assert torch.equal(inverse_index(inverse), INDICES[name]())


def test_indices_ignore_the_default_device():
    with torch.device("meta"):
        index = gate_up_row_index(640, True)  # of a size that no other test has cached
        inverse = inverse_index(index)
    assert index.tolist() == gated_rows(640)
    assert inverse[index].tolist() == list(range(640))


@pytest.mark.parametrize("shape", [(1, 128, 1), (3, 128, 7), (2, 384, 33), (0, 128, 4)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_permuting_rows_and_back(shape, gated):
    tensor = random_bytes(*shape)
    index = gate_up_row_index(shape[1], gated)
    before = tensor.clone()
    prepared = permute_rows(tensor, index)
    assert prepared.shape == tensor.shape and prepared.is_contiguous()
    for expert in range(shape[0]):
        for n, row in enumerate(index.tolist()):
            assert torch.equal(prepared[expert, n], before[expert, row])
    for other in with_other_strides(tensor):
        assert torch.equal(permute_rows(other, index), prepared)
    assert torch.equal(permute_rows(prepared, inverse_index(index)), before)
    assert torch.equal(tensor, before)


def test_permuting_in_no_order_still_copies():
    tensor = random_bytes(2, 5, 3)
    assert torch.equal(permute_rows(tensor, torch.arange(5)).zero_(), torch.zeros_like(tensor))
    assert tensor.ne(0).all()


# Block scales.


def offset(m, k, columns):
    """Where the GEMM reads the scale of row m, column k: its tiles counted one by one."""
    tiles_a_row = -(-columns // 4)
    tile = m // 128 * tiles_a_row + k // 4
    return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4


SCALE_SHAPES = [(1, 1, 1), (2, 128, 4), (3, 130, 5), (2, 33, 11), (1, 384, 44), (2, 256, 3)]


@pytest.mark.parametrize("shape", SCALE_SHAPES, ids=str)
def test_every_scale_is_where_the_gemm_reads_it(shape, poisoned_empty):
    scale = random_bytes(*shape)
    experts, rows, columns = shape
    tiles = interleave_128x4(scale)
    assert tiles.shape == (experts, -(-rows // 128) * 128, -(-columns // 4) * 4)
    assert tiles.is_contiguous() and tiles.dtype == torch.uint8
    for expert in range(experts):
        want = [0] * tiles[0].numel()  # what no scale is written to is padding
        for m in range(rows):
            for k in range(columns):
                want[offset(m, k, columns)] = int(scale[expert, m, k])
        assert tiles[expert].flatten().tolist() == want


@pytest.mark.parametrize("shape", [*SCALE_SHAPES, (0, 5, 5), (2, 0, 3), (2, 3, 0)], ids=str)
def test_scales_come_back(shape, poisoned_empty):
    scale = random_bytes(*shape)
    tiles = interleave_128x4(scale)
    for other in with_other_strides(scale):
        assert torch.equal(interleave_128x4(other), tiles)
    for other in (tiles, *with_other_strides(tiles)):
        back = deinterleave_128x4(other, *shape[1:])
        assert torch.equal(back, scale) and back.is_contiguous()


def test_one_tile_worked_by_hand():
    """Rows 0, 32, 64 and 96 share 16 bytes, four columns each."""
    scale = torch.arange(128, dtype=torch.uint8)[None, :, None] * torch.ones(4, dtype=torch.uint8)
    first = interleave_128x4(scale).flatten()[:32].tolist()
    rows = (0, 32, 64, 96, 1, 33, 65, 97)
    assert first == [row for row in rows for _ in range(4)]


# Padding.


@pytest.mark.parametrize("halves", [1, 2, 3])
@pytest.mark.parametrize("more", [(0, 0), (1, 0), (0, 1), (13, 5)], ids=str)
@pytest.mark.parametrize("size", [(2, 7, 5), (1, 1, 1), (0, 3, 2), (2, 0, 3)], ids=str)
def test_padding_and_trimming(halves, more, size, poisoned_empty):
    experts, rows, columns = size
    parts = [random_bytes(*size) for _ in range(halves)]
    tensor = torch.cat(parts, 1)
    target = halves * (rows + more[0]), columns + more[1]
    want = torch.zeros(experts, *target, dtype=torch.uint8)
    for number, part in enumerate(parts):
        start = number * (rows + more[0])
        want[:, start : start + rows, :columns] = part
    for given in (tensor, *with_other_strides(tensor)):
        padded = pad_matrix(given, *target, halves)
        assert torch.equal(padded, want) and padded.is_contiguous()
    for given in (padded, *with_other_strides(padded)):
        back = trim_matrix(given, halves * rows, columns, halves)
        assert torch.equal(back, tensor) and back.is_contiguous()
    padded.zero_(), back.zero_()
    assert tensor.ne(0).all()  # nothing is shared, also where nothing is added


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("multiples", [(128, 96), (256, 16), (16, 128)], ids=str)
def test_weights_are_padded_and_unpadded(gated, multiples):
    small = make_layer(3, 56, 40, gated=gated)
    big = small.padded(hidden_multiple=multiples[0], intermediate_multiple=multiples[1])
    assert (big.hidden_padded, big.intermediate_padded) == tuple(
        round_up(size, multiple) for size, multiple in zip((64, 48), multiples, strict=True)
    )
    back = big.unpadded()
    assert back.metadata() == small.metadata()
    for name, tensor in small.tensors().items():
        assert tensor.dtype == back.tensors()[name].dtype
        assert torch.equal(tensor.view(torch.uint8), back.tensors()[name].view(torch.uint8)), name
    assert small.unpadded() is small


def test_unpadding_cuts_what_padding_did_not_add():
    big = make_layer(3, 56, 40).padded(hidden_multiple=128)
    big.down.packed[:, 64:] = 1
    assert big.unpadded().down.packed.shape == (3, 64, 24)


# A whole layer.


def prepare(packed, scale, rows, columns, halves, index):
    packed = permute_rows(pad_matrix(packed, rows, columns // 2, halves), index)
    scale = permute_rows(pad_matrix(scale, rows, columns // 16, halves), index)
    return packed, interleave_128x4(scale)


def restore(packed, scale, rows, columns, halves, index):
    inverse = inverse_index(index)
    scale = deinterleave_128x4(scale, packed.shape[1], packed.shape[2] // 8)
    return (
        trim_matrix(permute_rows(packed, inverse), rows, columns // 2, halves),
        trim_matrix(permute_rows(scale, inverse), rows, columns // 16, halves),
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("intermediate", "hidden"), [(176, 80), (48, 2688)])
def test_every_step_of_a_layer_is_undone(gated, intermediate, hidden):
    halves = 1 + gated
    padded = round_up(intermediate, 64 if gated else 128), round_up(hidden, 256)
    for rows, columns, parts in (
        (intermediate * halves, hidden, halves),
        (hidden, intermediate, 1),
    ):
        first = parts == halves and columns == hidden
        target = (padded[0] * halves, padded[1]) if first else padded[::-1]
        index = gate_up_row_index(target[0], gated) if first else down_row_index(target[0])
        packed, scale = random_bytes(2, rows, columns // 2), random_bytes(2, rows, columns // 16)
        there = prepare(packed, scale, *target, parts, index)
        assert [t.shape for t in there] == [(2, target[0], target[1] // n) for n in (2, 16)]
        back = restore(*there, rows, columns, parts, index)
        assert torch.equal(back[0], packed) and torch.equal(back[1], scale)


def test_meta_tensors_give_shapes():
    packed, scale = (torch.empty(2, 352, n, dtype=torch.uint8, device="meta") for n in (40, 5))
    index = gate_up_row_index(384, True)
    there = prepare(packed, scale, 384, 256, 2, index)
    assert all(t.is_meta and t.dtype == torch.uint8 for t in there)
    assert [t.shape for t in there] == [(2, 384, 128), (2, 384, 16)]
    back = restore(*there, 352, 80, 2, index)
    assert all(t.is_meta for t in back) and [t.shape for t in back] == [packed.shape, scale.shape]


MEMORY = """
import os, torch
from fp4moe.kernels.flashinfer.block_scales import *
from fp4moe.kernels.flashinfer.rows import *
from fp4moe.padding import *
torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

calls = {
    "permute": lambda t: permute_rows(t, gate_up_row_index(t.shape[1], True)),
    "permute strided": lambda t: permute_rows(
        t.transpose(1, 2), gate_up_row_index(t.shape[2], True)
    ),
    "interleave": interleave_128x4,
    "interleave rest": lambda t: interleave_128x4(t[:, :-1, :-1]),
    "deinterleave": lambda t: deinterleave_128x4(t, t.shape[1] - 1, t.shape[2] - 1),
    "pad": lambda t: pad_matrix(t, t.shape[1] + 2, t.shape[2], 2),
    "trim": lambda t: trim_matrix(t, t.shape[1] - 2, t.shape[2], 2),
}
# Each in a copy of the process, whose peak starts at what it then has.
for name, call in calls.items():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    call(torch.ones(1, 1024, 1024, dtype=torch.uint8))  # what torch loads at the first call
    tensor = torch.ones(64, 1024, 1024, dtype=torch.uint8)
    before = status("VmRSS")
    out = call(tensor)
    print(status("VmHWM") - before, out.nbytes, name, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_beside_the_result_is_a_few_experts():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(lines) == 7
    for peak, result, name in ((int(a), int(b), name) for a, b, name in lines):
        # 64 experts of 1 MiB. Two staged experts, and 2 MiB of pages that the allocator rounds up
        # to; a copy of the whole would be 64 MiB more. The result was written: it is resident.
        assert result - 2**20 < peak < result + 4 * 2**20, name


# Refusals.


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


STACK = "Stack the experts on axis 0 and view the bytes as torch.uint8."
INDEX = "Pass gate_up_row_index or down_row_index of these rows."
REFUSED = {
    "shuffle": (
        lambda: shuffle_index(48),
        "shuffle_index: rows must be a positive multiple of 32; got 48. Pad to 64 rows.",
    ),
    "interleave": (
        lambda: gate_interleave_index(33),
        "gate_interleave_index: rows must be a positive multiple of 2; got 33. Pad to 34 rows.",
    ),
    "swap": (
        lambda: up_gate_index(0),
        "up_gate_index: rows must be a positive multiple of 2; got 0. Pad to 2 rows.",
    ),
    "gated": (
        lambda: gate_up_row_index(352, True),
        "gate_up_row_index: rows must be a positive multiple of 128; got 352. "
        "Pad to 384 rows, 192 in each half.",
    ),
    "not gated": (
        lambda: gate_up_row_index(1856, False),
        "gate_up_row_index: rows must be a positive multiple of 128; got 1856. Pad to 1920 rows.",
    ),
    "down": (
        lambda: down_row_index(-128),
        "down_row_index: rows must be a positive multiple of 128; got -128. Pad to 128 rows.",
    ),
    "index dtype": (
        lambda: inverse_index(torch.arange(4, dtype=torch.int32)),
        "inverse_index: index must be a permutation of 4 rows, torch.int64 [4] on cpu; "
        f"got torch.int32 [4] on cpu. {INDEX}",
    ),
    "index value": (
        lambda: inverse_index(torch.tensor([0, 2, 2])),
        "inverse_index: index must be a permutation of 3 rows, torch.int64 [3] on cpu; "
        f"got a value twice or out of range. {INDEX}",
    ),
    "index out of range": (
        lambda: permute_rows(zeros(1, 3, 2), torch.tensor([0, 1, 3])),
        "permute_rows: index must be a permutation of 3 rows, torch.int64 [3] on cpu; "
        f"got a value twice or out of range. {INDEX}",
    ),
    "index device": (
        lambda: permute_rows(zeros(1, 3, 2), torch.arange(3, device="meta")),
        "permute_rows: index must be a permutation of 3 rows, torch.int64 [3] on cpu; "
        f"got torch.int64 [3] on meta. {INDEX}",
    ),
    "index of other rows": (
        lambda: permute_rows(zeros(1, 64, 2), shuffle_index(32)),
        "permute_rows: index must be a permutation of 64 rows, torch.int64 [64] on cpu; "
        f"got torch.int64 [32] on cpu. {INDEX}",
    ),
    "permute float8": (
        lambda: permute_rows(zeros(1, 3, 2, dtype=torch.float8_e4m3fn), torch.arange(3)),
        "permute_rows: tensor must be torch.uint8 [L, R, C]; got torch.float8_e4m3fn [1, 3, 2]. "
        f"{STACK}",
    ),
    "deinterleave flat": (
        lambda: deinterleave_128x4(zeros(512), 128, 4),
        f"deinterleave_128x4: scale must be torch.uint8 [L, R, C]; got torch.uint8 [512]. {STACK}",
    ),
    "deinterleave other sizes": (
        lambda: deinterleave_128x4(zeros(2, 128, 8), 129, 5),
        "deinterleave_128x4: scale must be [L, 256, 8] for rows 129 and columns 5; "
        "got [2, 128, 8]. Pass the sizes before interleaving.",
    ),
    "pad 2-D": (
        lambda: pad_matrix(zeros(3, 2), 4, 4),
        f"pad_matrix: tensor must be torch.uint8 [L, R, C]; got torch.uint8 [3, 2]. {STACK}",
    ),
    "pad halves": (
        lambda: pad_matrix(zeros(1, 3, 2), 4, 4, 2),
        "pad_matrix: halves must divide the 3 rows of tensor; got 2. "
        "Pass 2 for stacked gate and up, otherwise 1.",
    ),
    "pad odd rows": (
        lambda: pad_matrix(zeros(1, 4, 2), 7, 4, 2),
        "pad_matrix: rows must be a multiple of 2 and at least 4; got 7. "
        "Pass the padded rows of all halves together.",
    ),
    "pad fewer columns": (
        lambda: pad_matrix(zeros(1, 4, 2), 4, 1),
        "pad_matrix: columns must be at least 2; got 1. Pass the padded columns in bytes.",
    ),
    "trim halves": (
        lambda: trim_matrix(zeros(1, 4, 2), 4, 2, 0),
        "trim_matrix: halves must divide the 4 rows of tensor; got 0. "
        "Pass 2 for stacked gate and up, otherwise 1.",
    ),
    "trim more rows": (
        lambda: trim_matrix(zeros(1, 4, 2), 5, 2),
        "trim_matrix: rows must be a multiple of 1 in 0 to 4; got 5. "
        "Pass the unpadded rows of all halves together.",
    ),
    "trim more columns": (
        lambda: trim_matrix(zeros(1, 4, 2), 4, 3),
        "trim_matrix: columns must lie in 0 to 2; got 3. Pass the unpadded columns in bytes.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    assert_refused(*REFUSED[case])


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
def test_gpu_equals_cpu(gated):
    packed, scale = random_bytes(3, 352, 40), random_bytes(3, 352, 5)
    index = gate_up_row_index(384, gated)
    want = prepare(packed, scale, 384, 256, 1 + gated, index)
    got = prepare(packed.cuda(), scale.cuda(), 384, 256, 1 + gated, index)
    assert all(t.is_cuda for t in got)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    back = restore(*got, 352, 80, 1 + gated, index)
    assert torch.equal(back[0].cpu(), packed) and torch.equal(back[1].cpu(), scale)
