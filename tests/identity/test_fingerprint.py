"""Fingerprints of values: the definition in Python's integers, and the kernel in the interpreter.

The interpreter's cases are started by test_the_interpreter_agrees of test_triton.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os

import pytest
import torch

from fp4moe.identity import fingerprint
from fp4moe.identity.fingerprint import SAMPLES, full_hashes, sampled_hashes, slots

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter, see the docstring",
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CONSTANTS = ("SAMPLES", "WORDS", "SPREAD", "MULTIPLIER")


def signed(number):
    """A sum modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def memory(tensor):
    """All bytes of a tensor's storage, writable through the result."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def words_of(tensor):
    """The whole aligned words between a tensor's first element and its last, as integers."""
    size = tensor.element_size()
    places = torch.arange(tensor.untyped_storage().nbytes() // size)
    places = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    first, stop = int(places.min()) * size, (int(places.max()) + 1) * size
    data = memory(tensor).numpy().tobytes()
    return [
        int.from_bytes(data[at : at + 4], "little", signed=True)
        for at in range(-(-first // 4) * 4, stop - 3, 4)
    ]


def sampled_places(length):
    """A run of 32 words in each part of 1 to n runs, 16 parts at most, none twice."""
    part = max(math.ceil(length / 512), 1)
    for number in range(16):
        inside = (number * 2654435761 >> 8) % part
        yield from range((number * part + inside) * 32, (number * part + inside + 1) * 32)


def plain_sampled(tensor):
    words = words_of(tensor)
    count = -(-tensor.shape[0] // 16) if tensor.ndim > 2 else 1
    hashes = []
    for slot in range(count):
        part = words[len(words) * slot // count : len(words) * (slot + 1) // count]
        total = sum(
            part[place] * (2 * number + 1) * 0x1E3779B97F4A7C15
            for number, place in enumerate(sampled_places(len(part)))
            if place < len(part)
        )
        hashes.append(signed(total))
    return hashes


def plain_full(tensor):
    """Sums along the last axis, times odd numbers in the order of the axes between."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    rows = tensor.contiguous().view(bits)
    width = rows.shape[-1] if rows.ndim > 1 else 1
    values = rows.flatten().tolist()
    each = len(values) // rows.shape[0]
    return [
        signed(
            sum(
                value * (2 * (place // width) + 1) * 0x1E3779B97F4A7C15
                for place, value in enumerate(values[start : start + each])
            )
        )
        for start in range(0, len(values), each)
    ]


def tensors(dtype):
    """By name: below a run, around SAMPLES words, several slots, odd lengths, and views."""
    big = torch.randn(40, 21, 131).to(dtype)
    yield "one element", torch.randn(1).to(dtype)
    yield "below a run", torch.randn(5).to(dtype)
    yield "matrix", torch.randn(33, 65).to(dtype)
    yield "as many words as samples", torch.randn(SAMPLES * 4 // big.element_size()).to(dtype)
    yield "long", torch.randn(50_001).to(dtype)
    yield "experts", big
    yield "few experts", torch.randn(17, 3, 5).to(dtype)
    yield "transposed", big.mT
    yield "experts last", torch.randn(131, 21, 18).to(dtype).permute(2, 0, 1)
    yield "every other", big[1::2, :, ::3]
    yield "odd offset", torch.randn(4001).to(dtype)[1:]
    yield "expanded", torch.randn(17, 1, 7).to(dtype).expand(-1, 6, -1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_hashes_are_as_defined(dtype):
    for name, tensor in tensors(dtype):
        got = sampled_hashes(tensor)
        assert got.dtype == torch.int64 and got.tolist() == plain_sampled(tensor), name
        got = full_hashes(tensor)
        assert got.dtype == torch.int64 and got.tolist() == plain_full(tensor), name


@pytest.mark.parametrize("length", [1, 7, 8, 9, 511, 512, 513, 1023, 1024, 50_001])
def test_samples_are_distinct_and_all_words_where_there_are_no_more(length):
    places = [place for place in sampled_places(length) if place < length]
    assert len(set(places)) == len(places)
    if length <= SAMPLES:
        assert sorted(places) == list(range(length))
    else:
        # All but the last of parts of equal size, the last one of which may be cut.
        part = 32 * math.ceil(length / 512)
        assert {place // part for place in places} >= set(range(length // part))
        assert len(places) >= SAMPLES // 2


@pytest.mark.parametrize(
    "shape", [(0,), (0, 4), (4, 0), (0, 4, 4), (40, 0, 8), (40, 8, 0)], ids=str
)
def test_tensors_without_elements(shape):
    assert sampled_hashes(torch.empty(shape)).eq(0).all()
    assert sampled_hashes(torch.empty(shape)).shape == (3 if len(shape) > 2 and shape[0] else 1,)
    assert full_hashes(torch.empty(shape)).tolist() == [0] * shape[0]


def test_a_scalar():
    assert full_hashes(torch.tensor(1.5)).tolist() == plain_full(torch.tensor([1.5]))
    assert sampled_hashes(torch.tensor(1.5)).tolist() == plain_sampled(torch.tensor([1.5]))


def test_experts_and_rows_that_change_places_are_seen():
    weight = torch.randn(6, 10, 12)
    before, sampled = full_hashes(weight), sampled_hashes(weight)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert torch.equal(full_hashes(weight[order]), before[order])
    rows = weight[:, [1, 0, *range(2, 10)]]
    assert full_hashes(rows).ne(before).all()
    for changed in (weight[order], rows):
        assert not torch.equal(sampled_hashes(changed), sampled)


def test_one_changed_bit_anywhere_changes_the_full_hash():
    weight = torch.randn(3, 4, 5).bfloat16()
    before = full_hashes(weight)
    bits = weight.view(torch.int16)
    for place in itertools.product(range(3), range(4), range(5)):
        bits[place] ^= 1
        assert full_hashes(weight).ne(before).tolist() == [i == place[0] for i in range(3)]
        bits[place] ^= 1


def compared(rows, expected):
    """What the kernel writes, over numbers that it never writes."""
    from fp4moe.kernels.triton.fingerprint import compare_kernel

    changed = torch.full_like(expected, 7, dtype=torch.int32)
    table = torch.tensor(rows, device=expected.device)
    constants = {name: getattr(fingerprint, name) for name in CONSTANTS}
    compare_kernel[(len(expected),)](table, expected, changed, **constants)
    return changed.tolist()


def rows_of_table(tensor):
    """(address, words) of each slot."""
    start, words, count = slots(tensor)
    address = tensor.untyped_storage().data_ptr() + 4 * start
    borders = [words * i // count for i in range(count + 1)]
    return [(address + 4 * a, b - a) for a, b in itertools.pairwise(borders)]


def check_agreement(dtype, device):
    everything = [(name, tensor.to(device)) for name, tensor in tensors(dtype)]
    everything.append(("empty", torch.empty(40, 0, 8, device=device)))
    for name, tensor in everything:
        rows, expected = rows_of_table(tensor), sampled_hashes(tensor)
        assert compared(rows, expected) == [0] * len(expected), name
        assert compared(rows, expected + 1) == [1] * len(expected), name
    # All in one launch.
    rows = [row for _, tensor in everything for row in rows_of_table(tensor)]
    expected = torch.cat([sampled_hashes(tensor) for _, tensor in everything])
    assert compared(rows, expected) == [0] * len(expected)


def check_sampled_words(shape, device):
    tensor = torch.randn(shape, device=device)
    rows, expected = rows_of_table(tensor), sampled_hashes(tensor)
    bits, first = tensor.view(torch.int32).view(-1), 0
    for slot, (_, words) in enumerate(rows):
        places = [place for place in sampled_places(words) if place < words]
        for place in (places[0], places[len(places) // 2], places[-1]):
            bits[first + place] ^= 1
            wanted = [int(i == slot) for i in range(len(rows))]
            assert compared(rows, expected) == wanted, (slot, place)
            bits[first + place] ^= 1
        first += words
    assert compared(rows, expected) == [0] * len(rows)


SHAPES = [(3,), (511,), (513,), (50_001,), (40, 21, 131)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees(dtype):
    check_agreement(dtype, "cpu")


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_sees_one_sampled_word(shape):
    check_sampled_words(shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees_on_the_gpu(dtype):
    check_agreement(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_sees_one_sampled_word_on_the_gpu(shape):
    check_sampled_words(shape, "cuda")
