"""A module whose buffers hold a kernel's layout and whose state_dict is logical all the same.

Buffers that hold a layout are not persistent and have names of their own, so that nobody who pairs
state_dict and buffers by name mixes the two. Moving to a device whose kernel is another one
prepares again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from .logical import Lent
from .part import Part
from .saving import PackedModule

__all__ = ["PREPARED", "PreparedModule"]

# What the kernel reads: a buffer is called by this and the operand's name.
PREPARED = "prepared_"
# One thread prepares for another device, the others wait.
_choosing = threading.Lock()
EXTRA = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


class PreparedModule(PackedModule):
    """Base of FusedExperts and PackedLinear: casts, moves, state_dict and loading.

    A subclass writes the methods that raise here. "State" is what the state_dict holds, by name.
    """

    kernel: str
    # Which part is here, where processes share the module; two where they share it twice.
    parts: tuple[Part, ...] = ()
    _lent: Lent
    # Where the buffers were prepared. The last that is set, since other threads go by it.
    _place: torch.device
    # Of the state: ordinary numbers, which a cast converts and a load from another float dtype.
    _castable: ClassVar[frozenset[str]] = frozenset()

    def _device(self) -> torch.device:
        """Where the weights are."""
        raise NotImplementedError

    def _select_kernel(self, device: torch.device) -> str:
        """Return the kernel for a device."""
        raise NotImplementedError

    def _state(self) -> dict[str, torch.Tensor]:
        """Undo the layout."""
        raise NotImplementedError

    def _blank_state(self) -> dict[str, torch.Tensor]:
        """Return the same on the meta device: undoing the layout of the values takes a while."""
        raise NotImplementedError

    def _read_by_kernel(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that the kernel reads."""
        raise NotImplementedError

    def _take_state(self, state: dict[str, torch.Tensor], kernel: str) -> None:
        """Hold other tensors, prepared for a kernel."""
        raise NotImplementedError

    def _prepared_state(self, state: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return a state as it is held now, by the names of the buffers."""
        raise NotImplementedError

    def _reason_not_to_load(self, extra_state: torch.Tensor) -> str | None:
        """Return why nothing of a state_dict with such an extra state fits."""
        return None

    @property
    def _has_extra_state(self) -> bool:
        return type(self).get_extra_state is not nn.Module.get_extra_state

    def _choose_again(self) -> None:
        """Prepare for the device where accelerate has put the buffers one by one."""
        with _choosing:
            place = self._device()
            if place.type != "meta" and place != self._place:
                if (kernel := self._select_kernel(place)) != self.kernel:
                    self._take_state(self._state(), kernel)
            self._place = place

    def _apply(self, fn, recurse: bool = True):
        before = self._device()
        for name, tensor in self._buffers.items():
            if tensor is None:
                continue
            result = fn(tensor)
            # A cast would destroy codes and scales; take over the device only.
            keep = name in self._castable or result.dtype == tensor.dtype
            self._buffers[name] = result if keep else tensor.to(result.device)
        after = self._device()
        if after not in (before, torch.device("meta")):
            kernel = self._select_kernel(after)
            if kernel != self.kernel:
                self._take_state(self._state(), kernel)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._lent.check(self)
        state = self._state()
        self._lent = Lent(state, self._read_by_kernel())
        for name, tensor in state.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        if self._has_extra_state:
            destination[prefix + EXTRA] = self.get_extra_state()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        own = self._blank_state()
        assign = metadata.get("assign_to_params_buffers", False)
        keys = [prefix + name for name in (*own, *([EXTRA] if self._has_extra_state else []))]
        found = {name for name in own if prefix + name in state_dict}
        missing.extend(key for key in keys if key not in state_dict)
        unexpected.extend(
            key for key in state_dict if key.startswith(prefix) and key not in set(keys)
        )
        if not found:
            return
        extra = state_dict.get(prefix + EXTRA) if self._has_extra_state else None
        if extra is not None and (reason := self._reason_not_to_load(extra)):
            errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {reason}")
            return
        # The lists that torch passes are those of the whole model: only this layer's errors count.
        wrong = []
        for name in sorted(found):
            given, tensor = state_dict[prefix + name], own[name]
            same = given.dtype == tensor.dtype or (
                name in self._castable and given.is_floating_point()
            )
            if given.shape != tensor.shape or not same:
                wrong.append(
                    f"{prefix}{name} must be {tensor.dtype} {list(tensor.shape)}; got "
                    f"{given.dtype} {list(given.shape)}."
                )
        if self._device().type == "meta" and not assign:
            wrong.append(f"{prefix}: the layer is on the meta device; pass assign=True.")
        if wrong:
            errors.extend(wrong)
            return
        if extra is not None:
            self.set_extra_state(extra)
        if len(found) < len(own):
            own = self._state()
        loaded = {name: state_dict.get(prefix + name, own[name]) for name in own}
        if assign:
            device = next(loaded[name].device for name in own if name in found)
            self._take_state(loaded, self._select_kernel(device))
            return
        loaded = {name: tensor.to(self._device()) for name, tensor in loaded.items()}
        self._copy_tensors(self._prepared_state(loaded))

    def _copy_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy into buffers by name."""
        with torch.no_grad():
            # copy_ keeps the storage that compiled graphs and CUDA graphs know.
            for name, tensor in tensors.items():
                self.get_buffer(name).copy_(tensor)
        self._lent = Lent()
