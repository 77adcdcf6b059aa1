"""FusedExperts: the experts of one layer, packed, as a module that calls the operator.

Its state_dict is always logical (checkpoint order, linear scales), whatever layout the kernel
prepared; buffers hold the prepared layout, are not persistent and have names of their own, so that
nobody who pairs state_dict and buffers by name mixes the two.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from .arguments import has_own_operator
from .errors import check_choice, must
from .experts import ExpertWeights
from .formats import DEFAULT_FORMAT
from .kernels import (
    BIASES,
    DEFAULT_HIDDEN_ALIGNMENT,
    ROUTINGS,
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
from .prepared import PREPARED, PreparedModule

__all__ = ["FusedExperts"]


class FusedExperts(PreparedModule):
    """The experts of one layer: (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].

    It is called like Hugging Face's experts modules. A cast (`.to(torch.bfloat16)`, `.half()`) may
    move the module but never changes a dtype, since its numbers are those of its format.
    `state_dict` may return copies: change them only to load them again. Do not average buffers
    (`AveragedModel(use_buffers=True)`): they are codes.

    Args:
        weights: the quantised experts.
        kernel: "auto", or the name of a kernel. "auto" chooses again when the module moves to
            another device.
        hidden_alignment: 128, 256 or 512, the multiple to which the Blackwell kernel pads the
            hidden size.
        top_k: experts per token, if known. Only `autotune` needs it.
        routing: "given", or "fused" if `fp4moe.backend` will let the kernel choose the experts.
            Then a kernel asked for by name may be one that takes no ids.

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
        routing: str = "given",
    ):
        super().__init__()
        check_kernel_name(kernel, caller="FusedExperts")
        check_choice("routing", routing, ROUTINGS, caller="FusedExperts")
        self.top_k = top_k
        # How the float module stacked gate and up, where adapters of its parameters fit; see
        # ExpertWeights.quantize.
        self.float_layout: str | None = None
        self.requested_kernel = kernel
        self.hidden_alignment = hidden_alignment
        self.routing = routing
        self._prepare(weights)

    def _select(self, layer: Layer, device: torch.device) -> str:
        capability = current_capability(device)
        layer = dataclasses.replace(layer, kernel_routes=self.routing == "fused")
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
        changed = get_kernel(self.kernel).update_scales(prepared, hidden, inner)
        self._copy_tensors({PREPARED + name: tensor for name, tensor in changed.items()})

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

    def look_again(self) -> None:
        """Do what `forward` does first, for who reads `prepared` instead of calling it."""
        if self._lent.marks:
            self._lent.check(self)
        if self.prepared_down_packed.device != self._place:
            self._choose_again()

    def _device(self) -> torch.device:
        return self.prepared_gate_up_packed.device

    def _select_kernel(self, device: torch.device) -> str:
        return self._select(self.layer, device)

    def _state(self) -> dict[str, torch.Tensor]:
        return {_short(name): t for name, t in self._logical(self.prepared).items()}

    def _blank_state(self) -> dict[str, torch.Tensor]:
        return {_short(name): t for name, t in self._logical(self._blank()).items()}

    def _blank(self) -> PreparedWeights:
        prepared = self.prepared
        return prepared.replaced({name: t.to("meta") for name, t in prepared.tensors().items()})

    def _read_by_kernel(self) -> tuple[torch.Tensor, ...]:
        return self.prepared.operands.flat()

    def _take_state(self, state: dict[str, torch.Tensor], kernel: str) -> None:
        weights = self._weights_of(state)
        self.kernel = kernel
        self._hold(self._laid_out(weights))

    def _prepared_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = self._laid_out(self._weights_of(state)).tensors()
        return {PREPARED + name: tensor for name, tensor in tensors.items()}

    def _weights_of(self, state: dict[str, torch.Tensor]) -> ExpertWeights:
        named = {name: state[_short(name)] for name in self._logical(self._blank())}
        return ExpertWeights.from_tensors(named, self.metadata)

    def _logical(self, prepared: PreparedWeights) -> dict[str, torch.Tensor]:
        """What the state_dict holds, by dotted name."""
        return get_kernel(self.kernel).restore(prepared).tensors()

    def get_extra_state(self) -> torch.Tensor:
        """Return the metadata as JSON bytes; a tensor, so that safetensors can hold it."""
        return torch.frombuffer(
            bytearray(json.dumps(self._saved(), sort_keys=True).encode()), dtype=torch.uint8
        )

    def _saved(self) -> dict[str, Any]:
        """The metadata, and whose part of the layer the weights are."""
        return self.metadata | ({"parts": [*map(str, self.parts)]} if self.parts else {})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that loaded weights belong to a layer of this kind."""
        metadata = _metadata(state)
        if metadata != self._saved():
            rule = f"equal that of this layer, {self._saved()}"
            advice = "Load into a model that was replaced in the same way."
            must("FusedExperts.load_state_dict: metadata", rule, metadata, advice)

    def _reason_not_to_load(self, extra_state: torch.Tensor) -> str | None:
        own, format = self.layer.format, _metadata(extra_state).get("format", DEFAULT_FORMAT)
        if format == own:
            return None
        return (
            f"the weights must be in this layer's format {own!r}; got {format!r}. Load into a "
            f"model that was replaced with format={format!r}."
        )

    def extra_repr(self) -> str:
        """One line: sizes, activation, kernel."""
        layer = self.layer
        form = "gated " if layer.gated else ""
        return (
            f"{layer.num_experts} experts of {layer.hidden_size} x {layer.intermediate_size}, "
            f"{form}{layer.activation}, {layer.format}, kernel={self.kernel}"
        )


def _short(name: str) -> str:
    """Return the name in the state_dict of a tensor of ExpertWeights."""
    return name.replace(".", "_")


def _metadata(state: torch.Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.tolist()).decode())
