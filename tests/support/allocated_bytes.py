"""How much memory operators take while they run."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AllocatedBytes"]


class AllocatedBytes(TorchDispatchMode):
    """Peak bytes of live storages that operators return, inputs excluded."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in inputs}
        self.live: dict[int, torch.multiprocessing.reductions.StorageWeakRef] = {}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.live[key] = torch.multiprocessing.reductions.StorageWeakRef(storage)
                    self.sizes[key] = storage.nbytes()
        self.live = {k: ref for k, ref in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.sizes[k] for k in self.live))
        return out
