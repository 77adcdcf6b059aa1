"""The sampled hashes of `fp4moe.identity.fingerprint` for many tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["compare_kernel"]


@triton.jit
def compare_kernel(
    table,  # int64 [slots, 2]: address and number of 4-byte words
    expected,  # int64 [slots]
    changed,  # int32 [slots], in memory that the host reads
    SAMPLES: tl.constexpr,
    WORDS: tl.constexpr,
    SPREAD: tl.constexpr,
    MULTIPLIER: tl.constexpr,
):
    """Write 1 for each slot whose hash is not the expected one, else 0."""
    slot = tl.program_id(0)
    address = tl.load(table + 2 * slot)
    words = tl.load(table + 2 * slot + 1)
    sample = tl.arange(0, SAMPLES).to(tl.int64)
    run = sample // WORDS
    step = tl.maximum((words + SAMPLES - 1) // SAMPLES, 1)
    place = (run * step + run * SPREAD // 256 % step) * WORDS + sample % WORDS
    memory = address.to(tl.pointer_type(tl.int32))
    values = tl.load(memory + place, mask=place < words, other=0)
    found = tl.sum(values.to(tl.int64) * ((2 * sample + 1) * MULTIPLIER))
    tl.store(changed + slot, (found != tl.load(expected + slot)).to(tl.int32))
