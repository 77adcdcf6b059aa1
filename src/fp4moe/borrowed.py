"""Process-wide state that is changed for a while and put back, by several threads at once."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Borrowed", "random_state_kept"]


class Borrowed:
    """State that the first thread to borrow it saves, and the last to give it back restores.

    Without a count, the second would save what the first has set, and leave it behind.

    Args:
        take: returns what is there, and may set something else.
        put_back: gets what `take` returned.
    """

    def __init__(self, take: Callable[[], Any], put_back: Callable[[Any], object]):
        self.take, self.put_back = take, put_back
        self.lock, self.borrowers, self.before = threading.Lock(), 0, None

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Borrow it for the context, which gets what was there before the first."""
        with self.lock:
            if not self.borrowers:
                self.before = self.take()
            self.borrowers += 1
        try:
            yield self.before
        finally:
            with self.lock:
                self.borrowers -= 1
                if not self.borrowers:
                    self.put_back(self.before)


@functools.cache
def _cuda_generator(index: int) -> Borrowed:
    generator = torch.cuda.default_generators[index]
    return Borrowed(generator.get_state, generator.set_state)


_cpu_generator = Borrowed(torch.get_rng_state, torch.set_rng_state)


@contextlib.contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Keep the random state of the CPU, and of a CUDA device, as it was."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cpu_generator.borrow())
        if device is not None and device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            stack.enter_context(_cuda_generator(index).borrow())
        yield
