"""Whose weights are these? One table of packed weights for all graphs, by the floats' identity.

A graph outlives the weights it was compiled with and serves other modules of the same class, so it
holds none. It hands its float weights over here, where their storages tell whose they are. An entry
lives as long as the storages. Weights that changed are packed again, into the same memory, which
CUDA graphs may know.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import refuse
from ..kernels import Operands, PreparedWeights, get_kernel
from .fingerprint import full_hashes, sampled_hashes
from .float_weights import FloatWeights, StoredForm, pack_float
from .value_watch import ValueWatch

__all__ = ["Mark", "PackedFloats", "capturing", "find_packed", "has_storage", "packed_now"]


class Mark:
    """What a tensor was when its values were taken over.

    Attributes:
        place: identity of its storage.
        hashes: `sampled_hashes` of that time.
        stale: whether a later look has found other values.
    """

    def __init__(self, tensor: torch.Tensor):
        self.settle(tensor)
        self.take(tensor)

    def settle(self, tensor: torch.Tensor) -> None:
        """Note which memory this is."""
        # The weak reference keeps the address of the storage from being given to another.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = self.storage.cdata
        self.geometry = _geometry(tensor)

    def take(self, tensor: torch.Tensor) -> None:
        """Note the values as they are now."""
        self.version = _version(tensor)
        self.hashes = sampled_hashes(tensor)
        self.full = full_hashes(tensor)
        self.stale = False

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this is the same memory, seen in the same way."""
        place = tensor.untyped_storage()._cdata
        return self.place == place and self.geometry == _geometry(tensor)

    def is_current(self, tensor: torch.Tensor) -> bool:
        """Whether nothing has been written since, as far as its version and the looks tell."""
        return not self.stale and self.version == _version(tensor)

    def same_values(self, tensor: torch.Tensor) -> bool:
        """Compare all values, which waits for the device. Released memory cannot have changed."""
        return not has_storage(tensor) or torch.equal(self.full, full_hashes(tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _geometry(tensor: torch.Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def has_storage(tensor: torch.Tensor) -> bool:
    """Whether its memory is there; not after `release_weights`."""
    return bool(tensor.untyped_storage().nbytes())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing can be packed then and no number read."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclasses.dataclass(eq=False)
class PackedFloats:
    """The packed weights of one layer.

    Attributes:
        key: its place in the table. form: what the floats mean.
        prepared: in the layout of the form's kernel.
        marks: of the float tensors, in order.
        watch: looks at the floats' values where nobody looks for several layers at once.
    """

    key: tuple
    form: StoredForm
    prepared: PreparedWeights
    marks: list[Mark]
    watch: ValueWatch = dataclasses.field(default_factory=ValueWatch)
    _scaled: dict[tuple, tuple[Mark, Operands]] = dataclasses.field(default_factory=dict)
    _finalizers: dict[int, weakref.finalize] = dataclasses.field(default_factory=dict)

    def is_of(self, flat: Sequence[torch.Tensor]) -> bool:
        """Whether these floats are the ones that were packed, whatever they hold now."""
        return all(mark.is_of(t) for mark, t in zip(self.marks, flat, strict=True))

    def is_current(self, flat: Sequence[torch.Tensor]) -> bool:
        """Whether these floats are the ones that were packed, unwritten as far as is known."""
        return self.is_of(flat) and all(
            mark.is_current(t) for mark, t in zip(self.marks, flat, strict=True)
        )

    def same_values(self, flat: Sequence[torch.Tensor]) -> bool:
        """Compare all values, which waits for the device."""
        return all(mark.same_values(t) for mark, t in zip(self.marks, flat, strict=True))

    def watched(
        self, flat: Sequence[torch.Tensor], output_scale: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, Mark]]:
        """Pair each tensor, whose memory is there, with its mark."""
        pairs = [(t, m) for t, m in zip(flat, self.marks, strict=True) if has_storage(t)]
        scaled = None if output_scale is None else self._scaled.get(_place(output_scale))
        if output_scale is not None and scaled is not None:
            pairs.append((output_scale, scaled[0]))
        return pairs

    def operands(self, output_scale: torch.Tensor | None, *, caller: str) -> Operands:
        """Return what the kernel reads, each expert's output multiplied by output_scale [E].

        None and an empty output_scale multiply by nothing.
        """
        if output_scale is None or not output_scale.numel():
            return self.prepared.operands
        key = _place(output_scale)
        mark, operands = self._scaled.get(key, (None, None))
        if mark is not None and operands is not None and mark.is_current(output_scale):
            return operands
        _refuse_capture(output_scale.device, caller)
        with _lock, torch.inference_mode(False), torch.no_grad():
            plain = self.prepared.operands
            # With every kernel this operand multiplies an expert's output.
            factor = output_scale.detach().float()
            scaled = {"down_global_scale": plain.down_global_scale * factor}
            if plain.down_bias is not None:
                scaled["down_bias"] = plain.down_bias * factor[:, None]
            if mark is None or operands is None:
                mark, operands = Mark(output_scale), plain._replace(**scaled)
                self._scaled[key] = mark, operands
            else:
                for name, product in scaled.items():
                    getattr(operands, name).copy_(product)
                mark.take(output_scale)
            return operands

    def pack_again(self, weights: FloatWeights) -> None:
        """Pack changed floats into the memory of the old ones."""
        known = self.prepared.tensors()
        for name, tensor in _prepare(weights, self.form).tensors().items():
            known[name].copy_(tensor)
        for mark, tensor in zip(self.marks, weights.flat(), strict=True):
            mark.take(tensor)
        # Their products hold the old scales.
        for mark, _operands in self._scaled.values():
            mark.stale = True

    def enter(self, flat: Sequence[torch.Tensor]) -> None:
        """Stand in the table until any of the floats dies: they cannot all come again then."""
        _table[self.key] = self
        for mark, tensor in zip(self.marks, flat, strict=True):
            if mark.place not in self._finalizers:
                found = weakref.finalize(tensor.untyped_storage(), _forget, weakref.ref(self))
                found.atexit = False
                self._finalizers[mark.place] = found

    def release(self, flat: Sequence[torch.Tensor], place: int) -> None:
        """Free the memory of a float; its identity and shape stay.

        Writing to it or saving it raises then, where torch would crash or save nothing.
        """
        tensor = flat[place]
        storage = tensor.untyped_storage()
        if storage.nbytes() and not storage.resizable():
            # Memory-mapped checkpoints: the mapping goes with its last user, hence other memory.
            with _lock:
                self._finalizers.pop(self.marks[place].place).detach()
                _table.pop(self.key, None)
                tensor.data = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
                self.marks[place].settle(tensor)
                self.key = _key(flat, self.form)
                self.enter(flat)
        tensor.untyped_storage().resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(tensor)


_lock = threading.RLock()
_table: dict[tuple, PackedFloats] = {}


def find_packed(
    weights: FloatWeights, form: StoredForm, *, caller: str, thorough: bool = False
) -> PackedFloats:
    """Return the packed weights of these floats, packed now where they are new or have changed.

    Args:
        weights: of one layer. form: what they mean.
        caller: what the user called, for errors.
        thorough: compare all values, which waits for the device; for a new compilation.

    Raises:
        UnsupportedError: there is something to pack inside a CUDA-graph capture, or after
            `release_weights`.
        ShapeError: a weight holds inf or NaN.
    """
    flat = weights.flat()
    key = _key(flat, form)
    entry = _table.get(key)
    if entry is not None and not thorough and entry.is_current(flat):
        return entry
    _refuse_capture(flat[0].device, caller)
    with _lock, torch.inference_mode(False), torch.no_grad():
        entry = _table.get(key)
        if entry is None or not entry.is_of(flat):
            _refuse_released(flat, form, caller)
            marks = [Mark(tensor) for tensor in flat]
            entry = PackedFloats(key, form, _prepare(weights, form), marks)
            entry.enter(flat)
        elif not entry.is_current(flat) or (thorough and not entry.same_values(flat)):
            _refuse_released(flat, form, caller)
            entry.pack_again(weights)
        return entry


def packed_now(
    weights: FloatWeights,
    form: StoredForm,
    output_scale: torch.Tensor | None = None,
    *,
    caller: str,
) -> Operands:
    """Return what the kernel reads for these floats, after a look at their values."""
    flat = weights.flat()
    entry = _table.get(_key(flat, form))
    look = not capturing(flat[0].device)
    if look and entry is not None and entry.is_of(flat):
        entry.watch.read(entry.watched(flat, output_scale))
    entry = find_packed(weights, form, caller=caller)
    operands = entry.operands(output_scale, caller=caller)
    if look:
        entry.watch.look(entry.watched(flat, output_scale))
    return operands


def _key(flat: Sequence[torch.Tensor], form: StoredForm) -> tuple:
    return (*_place(flat[0]), len(flat), form)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _prepare(weights: FloatWeights, form: StoredForm) -> PreparedWeights:
    quantized = pack_float(weights, form)
    return get_kernel(form.kernel).prepare(quantized, hidden_alignment=form.hidden_alignment)


def _refuse_capture(device: torch.device, caller: str) -> None:
    if capturing(device):
        what = "expert weights cannot be packed"
        reason = "a CUDA graph is being captured, and they are new or have changed"
        refuse(caller, what, reason, "Run the model once outside the capture to warm it up.")


def _refuse_released(flat: Sequence[torch.Tensor], form: StoredForm, caller: str) -> None:
    if not all(has_storage(tensor) for tensor in flat):
        place = _place(flat[0])
        known = [key[-1].describe() for key in list(_table) if key[:2] == place]
        what = f"the experts cannot be packed as {form.describe()}"
        reason = f"release_weights=True has released their floats, which were packed as {known}"
        refuse(caller, what, reason, "Load the model again.")


def _forget(reference: weakref.ref[PackedFloats]) -> None:
    entry = reference()
    if entry is not None and _table.get(entry.key) is entry:
        del _table[entry.key]
