"""FusedExperts: the experts of one layer, packed, as a module that calls the operator.

Its state_dict is always logical (checkpoint order, linear scales), whatever layout the kernel
prepared; buffers hold the prepared layout, are not persistent and have names of their own, so that
nobody who pairs state_dict and buffers by name mixes the two.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from torch import nn

from .arguments import has_own_operator
from .errors import must
from .experts import ExpertWeights
from .formats import DEFAULT_FORMAT
from .kernels import (
    BIASES,
    DEFAULT_HIDDEN_ALIGNMENT,
    Layer,
    Operands,
    PreparedWeights,
    check_kernel_name,
    current_capability,
    get_kernel,
    select_kernel,
)
from .logical import Lent, logical_tensor
from .ops import nvfp4_moe_arguments
from .pack import activation_scale
from .saving import PackedModule

__all__ = ["FusedExperts"]

# What the kernel reads: a buffer is called by this and the operand's name.
PREPARED = "prepared_"
# One thread prepares for another device, the others wait.
_choosing = threading.Lock()


class FusedExperts(PackedModule):
    """The experts of one layer: (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].

    The call signature is that of Hugging Face's experts modules.
    Casting the module (`.to(torch.bfloat16)`, `.half()`) moves it but never changes a dtype: its
    numbers are those of its format. `state_dict` may hand out copies: write to them only to load
    them again, and do not average buffers (`AveragedModel(use_buffers=True)`), which are codes.

    Args:
        weights: the quantised experts.
        kernel: "auto" or a kernel's name. "auto" is decided again when the module moves to another
            device.
        hidden_alignment: what the Blackwell kernel pads the hidden size to: 128, 256 or 512.
        top_k: experts per token where it is known; only `autotune` asks.

    Raises:
        UnsupportedError: no kernel runs these weights on their device; lists the reasons.
    """

    prepared_gate_up_packed: torch.Tensor
    prepared_gate_up_block_scale: torch.Tensor
    prepared_gate_up_global_scale: torch.Tensor
    prepared_down_packed: torch.Tensor
    prepared_down_block_scale: torch.Tensor
    prepared_down_global_scale: torch.Tensor
    prepared_hidden_scale: torch.Tensor
    prepared_intermediate_scale: torch.Tensor
    # Without biases of size 0, or not there where the operator takes none.
    prepared_gate_up_bias: torch.Tensor
    prepared_down_bias: torch.Tensor

    gate_up_packed = logical_tensor("gate_up_packed")
    gate_up_block_scale = logical_tensor("gate_up_block_scale")
    gate_up_global_scale = logical_tensor("gate_up_global_scale")
    down_packed = logical_tensor("down_packed")
    down_block_scale = logical_tensor("down_block_scale")
    down_global_scale = logical_tensor("down_global_scale")
    hidden_scale = logical_tensor("hidden_scale")
    intermediate_scale = logical_tensor("intermediate_scale")
    gate_up_bias = logical_tensor("gate_up_bias")
    down_bias = logical_tensor("down_bias")

    def __init__(
        self,
        weights: ExpertWeights,
        kernel: str = "auto",
        *,
        hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
        top_k: int | None = None,
    ):
        super().__init__()
        check_kernel_name(kernel, caller="FusedExperts")
        self.top_k = top_k
        self.requested_kernel = kernel
        self.hidden_alignment = hidden_alignment
        self._prepare(weights)

    def _select(self, layer: Layer, device: torch.device) -> str:
        capability = current_capability(device)
        return select_kernel(self.requested_kernel, layer, capability, caller=type(self).__name__)

    def _prepare(self, weights: ExpertWeights) -> None:
        self.kernel = self._select(weights.layer(), weights.device)
        self._hold(self._laid_out(weights))

    def _laid_out(self, weights: ExpertWeights) -> PreparedWeights:
        return get_kernel(self.kernel).prepare(weights, hidden_alignment=self.hidden_alignment)

    def _hold(self, prepared: PreparedWeights) -> None:
        for name in getattr(self, "_kept", ()):
            delattr(self, PREPARED + name)
        self.biased = prepared.layer.biased
        self._alone = has_own_operator(prepared.layer.format, self.biased)
        tensors = prepared.tensors()
        if not self._alone and not self.biased:
            tensors |= {name: tensors["hidden_scale"].new_empty(0) for name in BIASES}
        for name, tensor in tensors.items():
            self.register_buffer(PREPARED + name, tensor, persistent=False)
        self._lent = Lent()
        self.layer = prepared.layer
        self._kept = tuple(prepared.kept)
        arguments = nvfp4_moe_arguments(prepared, self.kernel)
        self._arguments = tuple(a for a in arguments if not isinstance(a, torch.Tensor))
        # The last step: other threads go by it.
        self._place = tensors["down_packed"].device

    @property
    def num_experts(self) -> int:
        """Experts of the whole layer."""
        return self.layer.num_experts

    @property
    def metadata(self) -> dict[str, Any]:
        """What is saved beside the tensors, see `ExpertWeights.metadata`."""
        return self.layer.metadata()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and scales."""
        return sum(tensor.nbytes for tensor in self.prepared.operands.flat())

    @property
    def weights(self) -> ExpertWeights:
        """The logical weights; undoes the kernel's layout."""
        return get_kernel(self.kernel).restore(self.prepared)

    def activation_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logical (hidden_scale [1], intermediate_scale [L]) without other work."""
        tensors = self.prepared.tensors()
        return tuple(  # type: ignore[return-value]
            tensors.get(f"logical_{name}", tensors[name])
            for name in ("hidden_scale", "intermediate_scale")
        )

    def set_activation_scales(
        self, hidden_scale: float | torch.Tensor, intermediate_scale: float | torch.Tensor
    ) -> None:
        """Set the global scales of the quantised activations, in place; see `fp4moe.calibrate`.

        Args:
            hidden_scale: decode multiplier of the input, one value.
            intermediate_scale: that of the input of down, one value or one a local expert.

        Raises:
            ShapeError: a value is not positive and finite, or there are too many or too few.
            UnsupportedError: the format has no such scales, and a value is not 1.
        """
        prepared, caller = self.prepared, f"{type(self).__name__}.set_activation_scales"
        count, device = prepared.operands.down_packed.shape[0], prepared.operands.down_packed.device
        format, given = self.layer.format, (device, caller)
        hidden = activation_scale(format, "hidden_scale", hidden_scale, 1, *given)
        inner = activation_scale(format, "intermediate_scale", intermediate_scale, count, *given)
        self._copy_tensors(get_kernel(self.kernel).update_scales(prepared, hidden, inner))

    @property
    def prepared(self) -> PreparedWeights:
        """What the kernel reads."""
        names = Operands._fields if self.biased else Operands._fields[:-2]
        return PreparedWeights(
            Operands(*(self.get_buffer(PREPARED + name) for name in names)),
            {name: self.get_buffer(PREPARED + name) for name in self._kept},
            self.layer,
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts; see `fp4moe.fused_moe` for the arguments."""
        if not torch.compiler.is_compiling():
            if self._lent.marks:
                self._lent.check(self)
            if self.prepared_down_packed.device != self._place:
                self._choose_again()
        # Spelled out: torch.compile follows attributes, and a call costs less so.
        gate_up = (
            self.prepared_gate_up_packed,
            self.prepared_gate_up_block_scale,
            self.prepared_gate_up_global_scale,
        )
        down = (
            self.prepared_down_packed,
            self.prepared_down_block_scale,
            self.prepared_down_global_scale,
        )
        scales = self.prepared_hidden_scale, self.prepared_intermediate_scale
        chosen = hidden_states, top_k_index, top_k_weights
        if self._alone:
            operands = *gate_up, *down, *scales
            return torch.ops.fp4moe.nvfp4_moe.default(*chosen, *operands, *self._arguments)
        biased = *gate_up, self.prepared_gate_up_bias, *down, self.prepared_down_bias, *scales
        return torch.ops.fp4moe.moe.default(*chosen, *biased, *self._arguments)

    def _choose_again(self) -> None:
        """Prepare for the device where accelerate has put the buffers one by one."""
        with _choosing:
            place = self.prepared_down_packed.device
            if place.type != "meta" and place != self._place:
                if (kernel := self._select(self.layer, place)) != self.kernel:
                    weights = self.weights
                    self.kernel = kernel
                    self._hold(self._laid_out(weights))
            self._place = place

    def _apply(self, fn, recurse: bool = True):
        before = self.prepared_gate_up_packed.device
        for name, tensor in self._buffers.items():
            assert tensor is not None
            result = fn(tensor)
            # A cast would destroy scales; take over the device only.
            self._buffers[name] = (
                result if result.dtype == tensor.dtype else tensor.to(result.device)
            )
        after = self.prepared_gate_up_packed.device
        if after not in (before, torch.device("meta")):
            kernel = self._select(self.layer, after)
            if kernel != self.kernel:
                weights = self.weights
                self.kernel = kernel
                self._hold(self._laid_out(weights))
        return self

    def _logical(self, prepared: PreparedWeights) -> dict[str, torch.Tensor]:
        """What the state_dict holds, by dotted name."""
        return get_kernel(self.kernel).restore(prepared).tensors()

    def get_extra_state(self) -> torch.Tensor:
        """Return the metadata as JSON bytes; a tensor, so that safetensors can hold it."""
        return torch.frombuffer(
            bytearray(json.dumps(self.metadata, sort_keys=True).encode()), dtype=torch.uint8
        )

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that loaded weights belong to a layer of this kind."""
        metadata = _metadata(state)
        if metadata != self.metadata:
            rule = f"equal that of this layer, {self.metadata}"
            advice = "Load into a model that was replaced in the same way."
            must("FusedExperts.load_state_dict: metadata", rule, metadata, advice)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._lent.check(self)
        logical = self._logical(self.prepared)
        logical = {name.replace(".", "_"): tensor for name, tensor in logical.items()}
        self._lent = Lent(logical, self.prepared.operands.flat())
        for name, tensor in logical.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        destination[prefix + nn.modules.module._EXTRA_STATE_KEY_SUFFIX] = self.get_extra_state()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # Shapes only: undoing the layout of the values takes a while.
        blank = {name: t.to("meta") for name, t in self.prepared.tensors().items()}
        own = self._logical(self.prepared.replaced(blank))
        assign = metadata.get("assign_to_params_buffers", False)
        names = {name.replace(".", "_"): name for name in own}
        extra = nn.modules.module._EXTRA_STATE_KEY_SUFFIX
        found = {short for short in names if prefix + short in state_dict}
        missing.extend(
            prefix + short for short in (*names, extra) if prefix + short not in state_dict
        )
        known = {prefix + short for short in (*names, extra)}
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        if not found:
            return
        # The lists that torch passes are those of the whole model: only this layer's errors count.
        wrong = []
        if prefix + extra in state_dict:
            format = _metadata(state_dict[prefix + extra]).get("format", DEFAULT_FORMAT)
            if format != self.layer.format:
                errors.append(
                    f"{prefix.removesuffix('.') or type(self).__name__}: the weights must be in "
                    f"this layer's format {self.layer.format!r}; got {format!r}. Load into a "
                    f"model that was replaced with format={format!r}."
                )
                return
        for short in sorted(found):
            given, tensor = state_dict[prefix + short], own[names[short]]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                wrong.append(
                    f"{prefix}{short} must be {tensor.dtype} {list(tensor.shape)}; got "
                    f"{given.dtype} {list(given.shape)}."
                )
        if self.prepared_gate_up_packed.is_meta and not assign:
            wrong.append(f"{prefix}: the layer is on the meta device; pass assign=True.")
        if wrong:
            errors.extend(wrong)
            return
        if prefix + extra in state_dict:
            self.set_extra_state(state_dict[prefix + extra])
        if len(found) < len(names):
            own = self._logical(self.prepared)
        loaded = {name: state_dict.get(prefix + short, own[name]) for short, name in names.items()}
        if assign:
            self._prepare(ExpertWeights.from_tensors(loaded, self.metadata))
            return
        device = self.prepared_gate_up_packed.device
        loaded = {name: tensor.to(device) for name, tensor in loaded.items()}
        self._copy_in(ExpertWeights.from_tensors(loaded, self.metadata))

    def _copy_in(self, weights: ExpertWeights) -> None:
        self._copy_tensors(self._laid_out(weights).tensors())

    def _copy_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            # copy_ keeps the storage that compiled graphs and CUDA graphs know.
            for name, tensor in tensors.items():
                self.get_buffer(PREPARED + name).copy_(tensor)
        self._lent = Lent()

    def extra_repr(self) -> str:
        """One line: sizes, activation, kernel."""
        layer = self.layer
        form = "gated " if layer.gated else ""
        return (
            f"{layer.num_experts} experts of {layer.hidden_size} x {layer.intermediate_size}, "
            f"{form}{layer.activation}, {layer.format}, kernel={self.kernel}"
        )


def _metadata(state: torch.Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.tolist()).decode())
