"""Kernels `flashinfer_trtllm` and `flashinfer_trtllm_w4a16`: TRT-LLM-Gen (SM100, SM103).

FlashInfer's fused experts. The second is for MXFP4 weights with bfloat16 activations; the library
tells it by the dtype of the input.

Decides: every check that the C++ launchers omit, launches, routing. Not here: layout, scales and
arguments of a number format (trtllm_<format>.py), which sizes have a kernel (trtllm_rules.py),
which library version (library.py). Sources: FlashInfer 0.6.13 and 0.7.2; nothing of this has run on
a Blackwell GPU yet, see `fp4moe selftest`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...activations import get_activation
from ...errors import refuse
from ...formats import FORMATS, NVFP4
from ...layer import Layer, Routing
from ..devices import Devices
from ..operands import Call, LogitsCall, Operands
from . import trtllm_rules as rules
from .library import (
    FlashInfer,
    flashinfer_settings,
    is_tuning,
    library,
    library_reasons,
    version_key,
)
from .trtllm_entry import Entry, another
from .trtllm_fp8 import Fp8Entry
from .trtllm_fp8_block import Fp8BlockEntry
from .trtllm_mxfp4 import Mxfp4Bf16Entry, Mxfp4Entry
from .trtllm_mxfp8 import Mxfp8Entry
from .trtllm_nvfp4 import Nvfp4Entry
from .weights import FlashInferKernel, local_ids

__all__ = ["ENTRIES", "FLASHINFER_TRTLLM", "FLASHINFER_TRTLLM_W4A16", "FlashInferTrtllm"]

# Where the routed entry is told nothing, this pipeline sorts given ids (no maths of its own).
GIVEN_ROUTING = "Renormalize"
ROUTING_NAMES = {"softmax_topk": "RenormalizeNaive", "sigmoid_topk": "DeepSeekV3"}
# The launch grid has at most 65535 rows of one tile, which is 64 tokens or more at this size.
GRID_ROWS, SMALLEST_LARGE_TILE, MOST_TOKENS = 65535, 64, 1 << 18
# The finalize kernel writes rows of 16 bytes, unchecked in 0.6.13.
OUTPUT_MULTIPLE = 8


ENTRIES: dict[str, Entry] = {
    entry.format: entry
    for entry in (Nvfp4Entry(), Fp8Entry(), Fp8BlockEntry(), Mxfp8Entry(), Mxfp4Entry())
}


class FlashInferTrtllm(FlashInferKernel):
    """TRT-LLM-Gen's fused experts behind the operator; operands are described in each `Entry`."""

    name = "flashinfer_trtllm"
    devices = Devices(((10, 0), (10, 3)))
    entries: ClassVar = ENTRIES
    layouts: ClassVar = {name: entry.layout for name, entry in ENTRIES.items()}
    intermediate_dtype = torch.float32
    routes = True

    def activation_reasons(self, layer: Layer, ready: bool) -> list[str]:
        """Return why no kernel computes the activation."""
        if found := self._size_reasons(layer, padded=True):
            return found
        return self.entries[layer.format].parameter_reasons(layer, library()) if ready else []

    def limit_reasons(self, layer: Layer) -> list[str]:
        """Return why biases, or the routing kernels' limits, are in the way of chosen experts."""
        entry, found = self.entries[layer.format], []
        if layer.biased:
            found += entry.bias_reasons(layer, None, routes=layer.kernel_routes)
        if layer.top_k:
            sizes = layer.num_experts, layer.top_k
            found += rules.routing_reasons(GIVEN_ROUTING, *sizes)
            found += rules.block_routing_reasons(GIVEN_ROUTING, *sizes) if entry.one_group else []
        return found

    def reasons_not_to_run(
        self, layer: Layer, capability: tuple[int, int] | None, *, installed: bool = False
    ) -> list[str]:
        """Return why it cannot run such a layer: all that is known before the router is."""
        reasons = super().reasons_not_to_run(layer, capability, installed=installed)
        if reasons or installed:
            return reasons
        entry, routes = self.entries[layer.format], layer.kernel_routes
        reasons = [] if routes else entry.reasons_without_function(layer, library())
        if layer.biased and not reasons:
            reasons = entry.bias_reasons(layer, library(), routes=routes)
        return reasons

    def reasons_without_padding(self, layer: Layer) -> list[str]:
        """Return which padded size would have a kernel."""
        return self._size_reasons(layer, padded=False) if layer.format in self.entries else []

    def _size_reasons(self, layer: Layer, padded: bool) -> list[str]:
        sizes = (layer.hidden_size, layer.intermediate_size)
        kind = self.entries[layer.format].kind or layer.format
        found = rules.reasons(layer.activation, layer.gated, *sizes, kind, padded)
        if padded and layer.format != NVFP4.name:
            found = [f"{why}; {another(layer)}" for why in found]
        return found

    def reasons_not_to_route(self, layer: Layer, routing: Routing) -> list[str]:
        """Return why the function that routes cannot do this."""
        if found := library_reasons():
            return list(found)
        entry = self.entries[layer.format]
        reasons = list(routing_reasons(routing, layer.num_experts, entry.one_group))
        if layer.biased:
            reasons += entry.bias_reasons(layer, library(), routes=True)
        return reasons

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases as the format's entry has them."""
        return self.entries[layer.format].scale_operands(operands, layer)

    def check(self, call: Call | LogitsCall) -> None:
        """Raise what the launcher would not: shapes and dtypes are checked by the operator."""
        super().check(call)
        entry, flashinfer = self.entries[call.layer.format], library()
        routes, reasons = isinstance(call, LogitsCall), list[str]()
        if isinstance(call, LogitsCall):
            routing = call.routing
        else:
            routing = Routing("", call.expert_ids.shape[1])
            reasons = entry.reasons_without_function(call.layer, flashinfer)
        if call.operands.gate_up_bias is not None and not reasons:
            reasons = entry.bias_reasons(call.layer, flashinfer, routes=routes)
        what = "run" if reasons else "route like this"
        reasons += routing_reasons(routing, call.layer.num_experts, entry.one_group)
        if reasons:
            refuse(
                call.caller,
                f"kernel {self.name} cannot {what}",
                "; ".join(reasons),
                "See fp4moe.why_not.",
            )

    def run(self, call: Call) -> torch.Tensor:
        """Call the function for chosen experts.

        It takes bfloat16 routing weights before FlashInfer 0.6.18, and always with packed ids.
        """
        flashinfer, local = library(), call.operands.down_packed.shape[0]
        entry = self.entries[call.layer.format]
        ids = local_ids(call.expert_ids, call.layer.expert_offset, local)
        dtype = torch.float32 if flashinfer.float32_weights else torch.bfloat16
        weights = call.routing_weights.to(dtype).contiguous()

        def routing(rows: slice) -> dict[str, Any]:
            given = (ids[rows], weights[rows])
            packed = entry.packed_ids or (is_tuning() and not flashinfer.tunes_plain_ids)
            return {
                "topk_ids": packed_routing(*given) if packed else given,
                "routing_bias": None,
                "top_k": ids.shape[1],
                "n_group": None,
                "topk_group": None,
                "routed_scaling_factor": None,
                "routing_method_type": flashinfer.routing_method(GIVEN_ROUTING),
            }

        return self._run(flashinfer, entry.given, call, ids.shape[1], routing)

    def run_from_logits(self, call: LogitsCall) -> torch.Tensor:
        """Call the function that routes; weights are rounded to bfloat16 in the kernel."""
        flashinfer, routing, entry = library(), call.routing, self.entries[call.layer.format]
        # float32 logits: bfloat16 ones tie often, and the library breaks ties its own way.
        logits = call.router_logits.to(torch.float32).contiguous()
        groups: tuple[int, int] | tuple[None, None] = None, None
        bias = None
        if routing.num_groups > 1 or (entry.one_group and routing.method == "sigmoid_topk"):
            groups = routing.num_groups, routing.top_groups
        if routing.method == "sigmoid_topk":
            # Without groups the library reads a bias whether there is one or not.
            bias = call.routing_bias.to(torch.float32).contiguous()
            bias = bias if bias.numel() else logits.new_zeros(call.layer.num_experts)

        def arguments(rows: slice) -> dict[str, Any]:
            return {
                "routing_logits": logits[rows],
                "routing_bias": bias,
                "top_k": routing.top_k,
                "n_group": groups[0],
                "topk_group": groups[1],
                "routed_scaling_factor": routing.scaling if bias is not None else None,
                "routing_method_type": flashinfer.routing_method(ROUTING_NAMES[routing.method]),
                "norm_topk_prob": True,
            }

        return self._run(flashinfer, entry.from_logits, call, routing.top_k, arguments)

    def _run(
        self,
        flashinfer: FlashInfer,
        function: str,
        call: Call | LogitsCall,
        top_k: int,
        routing: Callable[[slice], dict[str, Any]],
    ) -> torch.Tensor:
        hidden, operands, entry = call.hidden, call.operands, self.entries[call.layer.format]
        tokens, hidden_size = hidden.shape
        local, hidden_padded, _ = operands.down_packed.shape
        drops = entry.drops_padding and hidden_size % OUTPUT_MULTIPLE == 0
        width = hidden_size if drops else hidden_padded
        output = hidden.new_empty((tokens, width), dtype=torch.bfloat16)
        fixed = _fixed_arguments(entry, flashinfer, operands, call.layer)
        optional: dict[str, Any] = {}
        if self.quantizes_activations:
            optional["hidden_states_scale_layout"] = flashinfer.linear_scale_layout()
        step = tokens_per_launch(local, top_k)
        with torch.cuda.device_of(hidden):
            for start in range(0, tokens, step):
                rows = slice(start, min(start + step, tokens))
                result = flashinfer.call(
                    function,
                    {**optional, "output": output[rows]},
                    **routing(rows),
                    **entry.quantize_input(flashinfer, hidden[rows], hidden_padded, operands),
                    **fixed,
                )
                if "output" not in flashinfer.arguments[function]:
                    output[rows] = result[0] if isinstance(result, list | tuple) else result
        return output[:, :hidden_size].to(hidden.dtype).contiguous()


class FlashInferTrtllmW4A16(FlashInferTrtllm):
    """The same with 16-bit activations; a name of its own, for only that crosses an operator."""

    name = "flashinfer_trtllm_w4a16"
    automatic = False
    entries: ClassVar = {Mxfp4Bf16Entry.format: Mxfp4Bf16Entry()}
    layouts: ClassVar = {name: entry.layout for name, entry in entries.items()}
    quantizes_activations = False
    intermediate_dtype = torch.bfloat16


def _fixed_arguments(
    entry: Entry, flashinfer: FlashInfer, operands: Operands, layer: Layer
) -> dict[str, Any]:
    """Return what a function takes for every launch of a call."""
    speed = flashinfer_settings()
    name = rules.ACTIVATION_NAMES[get_activation(layer.activation).name, layer.gated]
    local, _, columns = operands.down_packed.shape
    return {
        **entry.weights(flashinfer, operands, layer),
        "num_experts": layer.num_experts,
        "intermediate_size": FORMATS[layer.format].elements(columns),
        "local_expert_offset": layer.expert_offset,
        "local_num_experts": local,
        "do_finalize": True,
        "enable_pdl": speed.enable_pdl,
        "activation_type": flashinfer.activation(name),
        "tune_max_num_tokens": speed.tune_max_num_tokens,
    }


@functools.lru_cache(maxsize=1024)
def routing_reasons(routing: Routing, num_experts: int, one_group: bool = False) -> tuple[str, ...]:
    """Return why the library's routing kernels cannot sort (method "") or choose like this."""
    method = ROUTING_NAMES.get(routing.method, GIVEN_ROUTING)
    newer = version_key(library().version) >= rules.NEWER_TIERS_SINCE
    reasons = rules.routing_reasons(
        method,
        num_experts,
        routing.top_k,
        routing.num_groups,
        routing.top_groups,
        newer=newer,
    )
    if one_group:
        groups = routing.num_groups, routing.top_groups
        reasons += rules.block_routing_reasons(method, num_experts, routing.top_k, *groups)
    if method != "DeepSeekV3" and routing.scaling != 1.0:
        reasons.append(f"{method} has no scaling factor, got {routing.scaling}")
    return tuple(reasons)


def packed_routing(expert_ids: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
    """Return int32 [T, K], (id << 16) | bits of the bfloat16 weight, as the library also takes."""
    bits = routing_weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (expert_ids << 16) | bits


def tokens_per_launch(local_experts: int, top_k: int) -> int:
    """Return how many tokens one launch may take, so that its grid stays in bounds."""
    rows = (GRID_ROWS - local_experts) * SMALLEST_LARGE_TILE
    return max(1, min(MOST_TOKENS, rows // top_k))


FLASHINFER_TRTLLM = FlashInferTrtllm()
FLASHINFER_TRTLLM_W4A16 = FlashInferTrtllmW4A16()
