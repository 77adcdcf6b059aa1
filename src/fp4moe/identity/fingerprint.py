"""Fingerprints of a tensor's values, for writes that change neither its version nor its storage.

`parameter.data += delta`, which adapters do when they merge, is such a write. Two kinds:

    sampled_hashes   512 words for each 16 experts, at every call; taken on the device
    full_hashes      all values, when something is compiled

Both are sums of the values' bits times odd numbers, modulo 2^64.
"""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["SAMPLES", "full_hashes", "sampled_hashes", "slots"]

# A slot is a part of a tensor of which so many 4-byte words are read, in runs of 128 bytes: what a
# look costs a GPU is how many pages it touches (30,000 in Gemma4-26B took 0.1 ms).
SAMPLES = 512
WORDS = 32
EXPERTS_PER_SLOT = 16
MULTIPLIER = 0x1E3779B97F4A7C15
SPREAD = 2654435761


def slots(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return (first word, words, number of slots) of the memory that a tensor spans.

    The slots share the words evenly. What is less than a word at either end is left out.
    """
    size = tensor.element_size()
    start = -(-tensor.storage_offset() * size // 4)
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    stop = (tensor.storage_offset() + last + 1) * size // 4
    count = -(-tensor.shape[0] // EXPERTS_PER_SLOT) if tensor.ndim > 2 else 1
    return start, max(stop - start, 0) if tensor.numel() else 0, max(count, 1)


def sampled_hashes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the hash of each slot, int64 [slots], on the tensor's device."""
    start, words, count = slots(tensor)
    with torch.inference_mode(False), torch.no_grad():
        if not words:
            return torch.zeros(count, dtype=torch.int64, device=tensor.device)
        memory = torch.empty(0, dtype=torch.int32, device=tensor.device)
        memory.set_(tensor.untyped_storage(), start, (words,), (1,))
        index, factors = _samples(words, count, tensor.device)
        return (memory[index].long() * factors).sum(1)


@functools.lru_cache(maxsize=64)
def _samples(words: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which words to read and what to multiply them by, both int64 [slots, SAMPLES]."""
    sample = torch.arange(SAMPLES, dtype=torch.int64, device=device)
    slot = torch.arange(count + 1, dtype=torch.int64, device=device) * words // count
    length = slot.diff()[:, None]
    run = sample // WORDS
    # Rounded up, so that the samples reach the end.
    step = (-(-length // SAMPLES)).clamp(min=1)
    place = (run * step + run * SPREAD // 256 % step) * WORDS + sample % WORDS
    factors = torch.where(place < length, (2 * sample + 1) * MULTIPLIER, 0)
    return (slot[:-1, None] + place).clamp(max=words - 1), factors


def full_hashes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a hash of all values, int64 [rows of the first axis]; sees rows that change places."""
    with torch.inference_mode(False), torch.no_grad():
        size = tensor.element_size()
        same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        rows = torch.atleast_1d(tensor.detach().view(same_size))
        sums = rows.sum(-1, dtype=torch.int64) if rows.ndim > 1 else rows.long()
        others = math.prod(sums.shape[1:])
        sums = sums.reshape(sums.shape[0], others)
        factors = 2 * torch.arange(others, dtype=torch.int64, device=sums.device) + 1
        return (sums * (factors * MULTIPLIER)).sum(1)
