"""Look at the values of tensors at each call, without waiting for the device.

On a CPU a look answers at once. On a GPU one launch compares all tensors with what they held when
they were packed, and the answer is read at the next call: whoever changes values behind torch's
back gets the old ones once.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .fingerprint import MULTIPLIER, SAMPLES, SPREAD, WORDS, sampled_hashes, slots

__all__ = ["ValueWatch"]

# A tensor and its `identity.Mark`.
Pairs = Sequence[tuple[torch.Tensor, Any]]


class ValueWatch:
    """The looks at one set of tensors, on one device or several."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, _Table] = {}
        # Threads may call one model at once.
        self._lock = threading.RLock()

    def read(self, pairs: Pairs) -> bool:
        """Mark as stale what the last look found changed; on a CPU, what is changed now.

        Returns whether there is any.
        """
        found = False
        for tensor, mark in pairs:
            if tensor.device.type != "cuda" and not torch.equal(
                mark.hashes, sampled_hashes(tensor)
            ):
                found = mark.stale = True
        with self._lock:
            for table in self._tables.values():
                found |= table.read()
        return found

    def look(self, pairs: Pairs) -> None:
        """Start a look at values on a GPU, behind what was launched before."""
        with self._lock:
            self._fill(pairs)
            self.look_again()

    def look_again(self) -> None:
        """Start a look at the same values as the last time, whose addresses have not changed."""
        with self._lock:
            for table in self._tables.values():
                table.launch()

    def note(self, pairs: Pairs) -> None:
        """Note what `look_beside` looks at on a GPU."""
        with self._lock:
            self._fill(pairs)

    def begin(self) -> None:
        """Mark the point in the streams at which the next `look_beside` begins."""
        with self._lock:
            for table in self._tables.values():
                table.begin()

    def look_beside(self) -> None:
        """Start a look beside what was launched since `begin`.

        The launch takes the host no time in which the device would have nothing to do.
        """
        with self._lock:
            for table in self._tables.values():
                table.launch_beside()

    def _fill(self, pairs: Pairs) -> None:
        on_gpu: dict[torch.device, list] = {}
        for pair in pairs:
            if pair[0].device.type == "cuda":
                on_gpu.setdefault(pair[0].device, []).append(pair)
        # Not those of devices whose tensors have been released, which have no memory any more.
        self._tables = {d: self._tables.get(d) or _Table(d) for d in on_gpu}
        for device, found in on_gpu.items():
            self._tables[device].fill(found)


class _Table:
    """Addresses and expected hashes on one GPU, and the answers in memory of the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known: list[tuple[int, torch.Tensor]] = []
        self.ranges: list[tuple[Any, int, int]] = []
        self.event, self.begun = torch.cuda.Event(), torch.cuda.Event()
        self.pending = False

    def __del__(self) -> None:
        # The device still writes into memory that the next owner would get.
        if self.pending:
            self.event.synchronize()

    def read(self) -> bool:
        """Mark what the last launch found; returns whether there was anything."""
        if not self.pending:
            return False
        self.pending = False
        # The look began with the last call. Whoever waits here is a whole call ahead of the device,
        # which has that call's work to do meanwhile.
        if not self.event.query():
            self.event.synchronize()
        if not self.answers.any():
            return False
        for mark, first, count in self.ranges:
            mark.stale |= bool(self.answers[first : first + count].any())
        return True

    def fill(self, pairs: Pairs) -> None:
        """Note what to look at."""
        known = [(tensor.data_ptr(), mark.hashes) for tensor, mark in pairs]
        if len(known) == len(self.known) and all(
            a[0] == b[0] and a[1] is b[1] for a, b in zip(known, self.known, strict=True)
        ):
            return
        if self.pending:
            self.event.synchronize()
        rows: list[tuple[int, int]] = []
        self.known, self.ranges = known, []
        for tensor, mark in pairs:
            start, words, count = slots(tensor)
            address = tensor.untyped_storage().data_ptr() + 4 * start
            borders = [words * i // count for i in range(count + 1)]
            self.ranges.append((mark, len(rows), count))
            rows += [(address + 4 * a, b - a) for a, b in itertools.pairwise(borders)]
        with torch.inference_mode(False):
            table = torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory()
            self.table = table.to(self.device, non_blocking=True)
            self.expected = torch.cat([mark.hashes for _tensor, mark in pairs])
            self.changed = torch.zeros(len(rows), dtype=torch.int32, device="cpu").pin_memory()
        self.answers = self.changed.numpy()

    def begin(self) -> None:
        self.begun.record(torch.cuda.current_stream(self.device))

    def launch_beside(self) -> None:
        """Compare on a stream of its own, behind what was launched before `begin`."""
        beside, current = _side_stream(self.device), torch.cuda.current_stream(self.device)
        beside.wait_event(self.begun)
        with torch.cuda.stream(beside):
            self.launch()
        # Whoever writes the weights, or frees them, does so behind the look.
        current.wait_event(self.event)

    def launch(self) -> None:
        """Compare on the device, behind what was launched before."""
        from ..kernels.triton.fingerprint import compare_kernel

        with torch.cuda.device(self.device):
            compare_kernel[(self.changed.numel(),)](
                self.table,
                self.expected,
                self.changed,
                SAMPLES=SAMPLES,
                WORDS=WORDS,
                SPREAD=SPREAD,
                MULTIPLIER=MULTIPLIER,
            )
            self.event.record()
        self.pending = True


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
