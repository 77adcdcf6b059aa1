"""Kernel `flashinfer_cutlass`: FlashInfer's CUTLASS fused experts.

NVFP4 (SM120/121, SM100/103), FP8 with one scale a matrix (SM89 to SM121), FP8 in blocks (SM90); the
library has none for a scale a row. Decides: which activations it has, every check that the library
omits, the call of `cutlass_fused_moe`. Not here: layout, scales and sizes of a number format
(cutlass_<format>.py).
Sources: FlashInfer 0.6.13 and 0.7.2; nothing of this has run on a GPU yet, see `fp4moe selftest`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from ...activations import get_activation
from ...layer import Layer
from ..devices import Devices
from ..operands import Call, Operands
from .cutlass_entry import CutlassEntry
from .cutlass_fp8 import Fp8CutlassEntry
from .cutlass_fp8_block import Fp8BlockCutlassEntry
from .cutlass_nvfp4 import Nvfp4CutlassEntry
from .library import FlashInfer, flashinfer_settings, library
from .weights import FlashInferKernel, local_ids

__all__ = ["ENTRIES", "FLASHINFER_CUTLASS", "GATED", "PARAMETERS", "UNGATED"]
__all__ += ["FlashInferCutlass", "activation_reasons", "enum_name", "merge_repeated"]

# Our activation -> member of ActivationType; `Geglu` and `Gelu` are erf, `GegluTanh` is tanh. Their
# numbers differ between versions.
GATED = {
    "silu": "Swiglu",
    "gelu_tanh": "GegluTanh",
    "gelu": "Geglu",
    "silu_step": "SwigluStep",
    "silu_softcap": "Situ",
}
UNGATED = {
    "relu2": "Relu2",
    "relu": "Relu",
    "silu": "Silu",
    "gelu": "Gelu",
    "identity": "Identity",
}
# With a gate: our parameters -> arguments of the library, [L] float32 each, in the model's units.
PARAMETERS = {
    "silu": {"alpha": "swiglu_alpha", "beta": "swiglu_beta", "limit": "swiglu_limit"},
    "silu_step": {"limit": "swiglu_limit"},
    "silu_softcap": {"alpha": "situ_beta", "beta": "situ_linear_beta"},
}
# Up to here one block sorts all tokens and keeps an id that is twice in a row; else only the first.
ONE_BLOCK_TOKENS, ONE_BLOCK_TOP_K, ONE_BLOCK_EXPERTS = 256, (1, 2, 4, 6, 8), 510


@functools.lru_cache(maxsize=1024)
def enum_name(activation: str, gated: bool) -> str | None:
    """Return the member of FlashInfer's ActivationType that computes this; None without one.

    Args:
        activation: name or text. gated: as in `Layer`.
    """
    found = get_activation(activation)
    if not found.plain and not (gated and found.name in PARAMETERS):
        return None
    return (GATED if gated else UNGATED).get(found.name)


@functools.lru_cache(maxsize=1024)
def parameters(activation: str) -> Mapping[str, float]:
    """Return the arguments of the library that a gated activation needs; none for plain ones."""
    found = get_activation(activation)
    names = {} if found.plain else PARAMETERS[found.name]
    given = {argument: getattr(found, name) for name, argument in names.items()}
    without = {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": 0.0}
    needed = {argument: v for argument, v in given.items() if v != without.get(argument)}
    return MappingProxyType(needed)


def activation_reasons(activation: str, gated: bool, flashinfer: FlashInfer | None) -> list[str]:
    """Return why the kernel cannot compute an activation, on any device; empty where it can.

    Args:
        activation, gated: as in `Layer`.
        flashinfer: the installed library; None takes every member and argument as known.
    """
    name, gate = enum_name(activation, gated), "with" if gated else "without"
    if name is None:
        known = ", ".join(GATED if gated else UNGATED)
        only = f", with alpha, beta or limit only {', '.join(PARAMETERS)}" * gated
        return [f"activation must be one of {known} {gate} a gate{only}, got {activation}"]
    if flashinfer is None:
        return []
    missing = [] if name in flashinfer.activation_names else [f"ActivationType.{name}"]
    known_arguments = flashinfer.arguments["cutlass_fused_moe"]
    missing += [f"argument {n}" for n in parameters(activation) if n not in known_arguments]
    return [
        f"the installed FlashInfer has no {what}, which {activation} {gate} a gate needs: install "
        "a newer flashinfer-python"
        for what in missing
    ]


ENTRIES: dict[str, CutlassEntry] = {
    entry.format: entry
    for entry in (Nvfp4CutlassEntry(), Fp8CutlassEntry(), Fp8BlockCutlassEntry())
}


class FlashInferCutlass(FlashInferKernel):
    """CUTLASS' fused experts behind the operator; operands are described in each `CutlassEntry`.

    Biases are rounded to bfloat16 and added in float32 to what was rounded to bfloat16.
    """

    name = "flashinfer_cutlass"
    layouts: ClassVar = {name: entry.layout for name, entry in ENTRIES.items()}
    # What gate, up and an expert's output are rounded to.
    product_dtype = torch.bfloat16

    def intermediate_dtype_for(self, format: str) -> torch.dtype:
        """Return what the format's kernels round the intermediate to before they quantise it."""
        return ENTRIES[format].intermediate_dtype

    def devices_for(self, format: str) -> Devices:
        """Return what the library compiles the format's kernels for."""
        return ENTRIES[format].devices

    def automatic_for(self, layer: Layer) -> bool:
        """Whether "auto" may choose the format's kernels, which quantise activations."""
        return layer.format in ENTRIES and ENTRIES[layer.format].automatic

    def activation_reasons(self, layer: Layer, ready: bool) -> list[str]:
        """Return why the kernel cannot compute the activation."""
        return activation_reasons(layer.activation, layer.gated, library() if ready else None)

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases as the format's entry has them."""
        return ENTRIES[layer.format].scale_operands(operands, layer)

    def run(self, call: Call) -> torch.Tensor:
        """Call cutlass_fused_moe on the local experts; ids are made local here."""
        hidden, operands, layer = call.hidden, call.operands, call.layer
        flashinfer, entry = library(), ENTRIES[layer.format]
        local, hidden_padded, _ = operands.down_packed.shape
        first = layer.expert_offset
        ids = local_ids(call.expert_ids, first, local, base=first)
        weights = call.routing_weights.to(torch.float32).contiguous()
        if not sorts_in_one_block(ids.shape[0], ids.shape[1], local):
            ids, weights = merge_repeated(ids, weights)
        output = hidden.new_empty((hidden.shape[0], hidden_padded), dtype=torch.bfloat16)
        speed = flashinfer_settings()
        name = enum_name(layer.activation, layer.gated)
        # 0.6.13 asks the current device, not that of the tensors, which architecture it is.
        with torch.cuda.device_of(hidden):
            flashinfer.call(
                "cutlass_fused_moe",
                # The fused one adds in bfloat16, in the order in which blocks end.
                {"use_fused_finalize": False},
                **entry.arguments(hidden, operands),
                token_selected_experts=ids,
                token_final_scales=weights,
                output_dtype=torch.bfloat16,
                output=output,
                enable_pdl=speed.enable_pdl,
                tune_max_num_tokens=speed.tune_max_num_tokens,
                activation_type=flashinfer.module.ActivationType[name],
                **entry.parameters(parameters(layer.activation), operands),
                **_biases(operands),
            )
        # This library writes whole padded rows.
        return output[:, : hidden.shape[1]].to(hidden.dtype).contiguous()


def _biases(operands: Operands) -> dict[str, torch.Tensor]:
    """Return the biases in the dtype of the output, as the library wants them, if there are any."""
    if operands.gate_up_bias is None or operands.down_bias is None:
        return {}
    return {
        "fc1_expert_biases": operands.gate_up_bias.to(torch.bfloat16),
        "fc2_expert_biases": operands.down_bias.to(torch.bfloat16),
    }


def sorts_in_one_block(tokens: int, top_k: int, experts: int) -> bool:
    """Whether the library sorts tokens with the one kernel that allows an id twice in a row."""
    return tokens <= ONE_BLOCK_TOKENS and top_k in ONE_BLOCK_TOP_K and experts <= ONE_BLOCK_EXPERTS


def merge_repeated(
    expert_ids: torch.Tensor, routing_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give an id's first place in a row the sum of its weights, and -1 to its other places.

    The library's other sort keeps the first place only, and then reads an unset row.

    Args:
        expert_ids: [T, K] int32. routing_weights: [T, K] float32.
    """
    same = expert_ids.unsqueeze(2) == expert_ids.unsqueeze(1)
    earlier = same.tril(-1).any(2)
    # where, not a product: a weight that is not counted must not pass on inf or NaN.
    weights = torch.where(same, routing_weights.unsqueeze(1), 0.0).sum(2)
    return torch.where(earlier, -1, expert_ids), weights


FLASHINFER_CUTLASS = FlashInferCutlass()
