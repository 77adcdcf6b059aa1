"""What this GPU itself can do: times of replayed graphs, its copy bandwidth, its matrix rate."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = ["Rates", "card_rates", "copy_bandwidth", "graph_us", "matrix_rate"]

REPLAYS = 30
COPIED = 1 << 30
# Rows, columns and depth of the product that is timed: large enough to fill any card.
MATRIX = 8192


class Rates(NamedTuple):
    """What a floor is made of.

    Attributes:
        bandwidth: bytes a second of a copy, read and written.
        operations: multiplications and additions a second of a bfloat16 product.
    """

    bandwidth: float
    operations: float


def graph_us(calls: list[Callable[[], torch.Tensor]], *, errors: str = "global") -> float:
    """Return the median time of one call in a replayed graph of all of them, in microseconds.

    Args:
        errors: capture_error_mode of torch.cuda.graph.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=errors):
        for call in calls:
            call()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(REPLAYS)]
    for _ in range(3):
        graph.replay()
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) * 1e3 / len(calls)


def copy_bandwidth() -> float:
    """Return bytes a second of a copy of 1 GiB, read and written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_us([lambda: target.copy_(source)]) * 1e6


def matrix_rate() -> float:
    """Return operations a second of torch's bfloat16 product of two large random matrices."""
    size = MATRIX, MATRIX
    a, b = (torch.randn(size, dtype=torch.float32, device="cuda").bfloat16() for _ in range(2))
    return 2 * MATRIX**3 / graph_us([lambda: a @ b]) * 1e6


@functools.cache
def card_rates() -> Rates:
    """Measure both once in a process, on the current device."""
    return Rates(copy_bandwidth(), matrix_rate())
