"""The range of streams of values: the largest magnitude, or a percentile in bounded memory.

The percentile comes from a histogram whose bins are fixed: a magnitude's own exponent and the four
bits behind it. Nothing is ever rescaled, and adding in any order gives the same counts.
"""

from __future__ import annotations

import math

import torch

__all__ = ["BINS_PER_OCTAVE", "Ranges"]

MANTISSA_BITS = 4
BINS_PER_OCTAVE = 2**MANTISSA_BITS
# 2^-32 to 2^32; what lies outside counts in the first or the last bin.
OCTAVES = 64
BINS = OCTAVES * BINS_PER_OCTAVE
SHIFT = 23 - MANTISSA_BITS
FIRST = (127 - OCTAVES // 2) << MANTISSA_BITS


class Ranges:
    """The ranges of `count` streams of values.

    Args:
        count: number of streams.
        percentile: None for the largest magnitude. Else, in 0 to 100, the percentile of the
            magnitudes that are not zero, rounded up to the next sixteenth of an octave (at most
            6.25 % more) but never above the largest; 8 kB a stream.
    """

    def __init__(self, count: int, percentile: float | None = None):
        self.percentile = percentile
        self.amax = torch.zeros(count, dtype=torch.float32, device="cpu")
        bins = 0 if percentile is None else BINS
        self.counts = torch.zeros(count, bins, dtype=torch.int64, device="cpu")

    def add(self, index: int, values: torch.Tensor) -> None:
        """Take values of any shape and float dtype into one stream; NaN stays visible."""
        if not values.numel():
            return
        magnitude = values.detach().abs().float().flatten()
        self.amax[index] = torch.maximum(self.amax[index], magnitude.amax().cpu())
        if self.percentile is not None:
            bins = (magnitude[magnitude > 0].view(torch.int32) >> SHIFT) - FIRST
            found = torch.bincount(bins.clamp(0, BINS - 1), minlength=BINS)
            self.counts[index] += found.cpu()

    def values(self) -> torch.Tensor:
        """Return the ranges, float32 [count]; 0 for a stream that held no value but 0."""
        if self.percentile is None:
            return self.amax.clone()
        below = self.counts.cumsum(1)
        totals = below[:, -1].tolist()
        wanted = [math.ceil(n * self.percentile / 100) for n in totals]
        column = torch.tensor(wanted, dtype=torch.int64, device="cpu").unsqueeze(1)
        first = torch.searchsorted(below, column).squeeze(1)
        upper_edge = ((first + FIRST + 1) << SHIFT).to(torch.int32).view(torch.float32)
        return torch.minimum(upper_edge, self.amax)
