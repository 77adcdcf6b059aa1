"""FusedExperts: the experts of one layer, packed, as a module that calls the operator.

Its state_dict is always logical (checkpoint order, linear scales), whatever layout the kernel
prepared.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from .errors import ShapeError
from .experts import ExpertWeights
from .formats import NVFP4
from .kernels import MoeSpec, check_kernel_name, current_capability, get_kernel, select_kernel
from .ops import nvfp4_moe_arguments

__all__ = ["FusedExperts"]


class FusedExperts(nn.Module):
    """The experts of one layer: (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].

    The call signature is that of Hugging Face's experts modules.
    Casting the module (`.to(torch.bfloat16)`, `.half()`) moves it but never changes a dtype: its
    numbers are NVFP4.

    Args:
        weights: the quantised experts.
        kernel: "auto" or a kernel's name. "auto" is decided again when the module moves to another
            device.

    Raises:
        UnsupportedError: no kernel runs these weights on their device; lists the reasons.
    """

    gate_up_packed: torch.Tensor

    def __init__(self, weights: ExpertWeights, kernel: str = "auto"):
        super().__init__()
        check_kernel_name(kernel, caller="FusedExperts")
        self.requested_kernel = kernel
        self._prepare(weights)

    def _prepare(self, weights: ExpertWeights) -> None:
        spec = MoeSpec(
            activation=weights.activation,
            gated=weights.gated,
            hidden_size=weights.hidden_size,
            intermediate_size=weights.intermediate_size,
            num_experts=weights.num_experts,
            top_k=None,
            capability=current_capability(weights.device),
        )
        self.kernel = select_kernel(self.requested_kernel, spec, caller="FusedExperts")
        prepared = get_kernel(self.kernel).prepare(weights)
        self.metadata = prepared.metadata()
        for name, tensor in prepared.operands().items():
            self.register_buffer(name, tensor)
        self._arguments = nvfp4_moe_arguments(prepared, self.kernel)[len(prepared.tensors()) :]

    @property
    def num_experts(self) -> int:
        """Experts of the whole layer."""
        return self.metadata["num_experts"]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def weights(self) -> ExpertWeights:
        """The logical weights."""
        return get_kernel(self.kernel).restore(self._prepared())

    def _prepared(self) -> ExpertWeights:
        tensors = {}
        for gemm in ("gate_up", "down"):
            tensors[f"{gemm}.packed"] = self.get_buffer(f"{gemm}_packed")
            tensors[f"{gemm}.block_scale"] = self.get_buffer(f"{gemm}_block_scale").view(
                NVFP4.scale_dtype
            )
            tensors[f"{gemm}.global_scale"] = self.get_buffer(f"{gemm}_global_scale")
        tensors |= {name: self.get_buffer(name) for name in ("hidden_scale", "intermediate_scale")}
        return ExpertWeights.from_tensors(tensors, self.metadata)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts; see `fp4moe.fused_moe` for the arguments."""
        return torch.ops.fp4moe.nvfp4_moe.default(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_packed,
            self.gate_up_block_scale,
            self.gate_up_global_scale,
            self.down_packed,
            self.down_block_scale,
            self.down_global_scale,
            self.hidden_scale,
            self.intermediate_scale,
            *self._arguments,
        )

    def _apply(self, fn, recurse: bool = True):
        before = self.gate_up_packed.device
        weights = self.weights
        moved = {}
        for name, tensor in weights.tensors().items():
            result = fn(tensor)
            # A cast would destroy scales; take over the device only.
            moved[name] = result if result.dtype == tensor.dtype else tensor.to(result.device)
        weights = ExpertWeights.from_tensors(moved, weights.metadata())
        if weights.device.type == "meta" or weights.device == before:
            self._buffers.update(get_kernel(self.kernel).prepare(weights).operands())
        else:
            self._prepare(weights)
        return self

    def get_extra_state(self) -> torch.Tensor:
        """Return the metadata as JSON bytes; a tensor, so that safetensors can hold it."""
        return torch.frombuffer(
            bytearray(json.dumps(self.metadata, sort_keys=True).encode()), dtype=torch.uint8
        )

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Check that loaded weights belong to a layer of this kind."""
        metadata: dict[str, Any] = json.loads(bytes(state.tolist()).decode())
        if metadata != self.metadata:
            raise ShapeError(
                "FusedExperts.load_state_dict: metadata must equal that of this layer, "
                f"{self.metadata}; got {metadata}. "
                "Load into a model that was replaced in the same way."
            )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self.weights.tensors().items():
            destination[prefix + name.replace(".", "_")] = tensor if keep_vars else tensor.detach()
        destination[prefix + nn.modules.module._EXTRA_STATE_KEY_SUFFIX] = self.get_extra_state()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        own = self.weights.tensors()
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
        for short in sorted(found):
            given, tensor = state_dict[prefix + short], own[names[short]]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                wrong.append(
                    f"{prefix}{short} must be {tensor.dtype} {list(tensor.shape)}; got "
                    f"{given.dtype} {list(given.shape)}."
                )
        if self.gate_up_packed.is_meta and not assign:
            wrong.append(f"{prefix}: the layer is on the meta device; pass assign=True.")
        if wrong:
            errors.extend(wrong)
            return
        if prefix + extra in state_dict:
            self.set_extra_state(state_dict[prefix + extra])
        loaded = {name: state_dict.get(prefix + short, own[name]) for short, name in names.items()}
        if assign:
            self._prepare(ExpertWeights.from_tensors(loaded, self.metadata))
            return
        loaded = {name: tensor.to(own[name].device) for name, tensor in loaded.items()}
        prepared = get_kernel(self.kernel).prepare(
            ExpertWeights.from_tensors(loaded, self.metadata)
        )
        with torch.no_grad():
            # copy_ keeps the storage that compiled graphs and CUDA graphs know.
            for name, tensor in prepared.operands().items():
                self.get_buffer(name).copy_(tensor)

    def extra_repr(self) -> str:
        """One line: sizes, activation, kernel."""
        m = self.metadata
        form = "gated " if m["gated"] else ""
        return (
            f"{m['num_experts']} experts of {m['hidden_size']} x {m['intermediate_size']}, "
            f"{form}{m['activation']}, "
            f"nvfp4, kernel={self.kernel}"
        )
