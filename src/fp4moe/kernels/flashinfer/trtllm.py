"""Kernel `flashinfer_trtllm`: FlashInfer's TRT-LLM-Gen NVFP4 fused experts (SM100, SM103).

Decides: layout and scale scalars of the operands, every check that the C++ launcher omits, the
arguments of its two entries. Not here: which sizes have a kernel (trtllm_rules.py), which library
version (library.py). Sources: FlashInfer 0.6.13 and 0.7.2; nothing of this has run on a
Blackwell GPU yet, see `fp4moe selftest`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...activations import get_activation
from ...errors import refuse
from ...formats import NVFP4
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
from .rows import down_row_index, gate_up_row_index
from .weights import FlashInferKernel, local_ids, pad_columns, row_layout

__all__ = ["FLASHINFER_TRTLLM", "FlashInferTrtllm", "quantize_input"]

# Where the routed entry is told nothing, this pipeline sorts given ids (no maths of its own).
GIVEN_ROUTING = "Renormalize"
ROUTING_NAMES = {"softmax_topk": "RenormalizeNaive", "sigmoid_topk": "DeepSeekV3"}
# The launch grid has at most 65535 rows of one tile, which is 64 tokens or more at this size.
GRID_ROWS, SMALLEST_LARGE_TILE, MOST_TOKENS = 65535, 64, 1 << 18
# What is divided by a product of scales may be infinite below this. The least of a real layer is
# about 2^-33: weights up to 1e-3, an input up to 1, each over 2688.
SMALLEST_SCALE = 2.0**-100
# The finalize kernel writes rows of 16 bytes, unchecked in 0.6.13.
OUTPUT_MULTIPLE = 8


def _multiples(layer: Layer, hidden_alignment: int) -> tuple[int, int]:
    return rules.size_multiples(layer.activation, layer.gated, hidden_alignment)


def _row_order(gemm: str, rows: int, gated: bool) -> torch.Tensor:
    return gate_up_row_index(rows, gated) if gemm == "gate_up" else down_row_index(rows)


class FlashInferTrtllm(FlashInferKernel):
    """TRT-LLM-Gen's fused experts behind the operator.

    Operands: rows of gate_up are [up; gate], interleaved and shuffled; block scales are interleaved
    128x4; scales as in `FlashInferKernel.scale_operands`, but intermediate_scale is s_up * s_x /
    s_a where the layer is gated. Biases are in the order of the rows and in the units of the raw
    accumulators, to which they are added: gate_up_bias is divided by s_up * s_x, down_bias by s_a *
    s_down.
    """

    name = "flashinfer_trtllm"
    devices = Devices(((10, 0), (10, 3)))
    layouts: ClassVar = {NVFP4.name: row_layout(_multiples, _row_order)}
    intermediate_dtype = torch.float32
    routes = True

    def activation_reasons(self, layer: Layer, ready: bool) -> list[str]:
        """Return why no kernel computes the activation."""
        sizes = (layer.hidden_size, layer.intermediate_size)
        return rules.reasons(layer.activation, layer.gated, *sizes)

    def limit_reasons(self, layer: Layer) -> list[str]:
        """Return why the routing kernels cannot sort so many experts."""
        if not layer.top_k:
            return []
        return rules.routing_reasons(GIVEN_ROUTING, layer.num_experts, layer.top_k)

    def reasons_without_padding(self, layer: Layer) -> list[str]:
        """Return which padded size would have a kernel."""
        sizes = (layer.hidden_size, layer.intermediate_size)
        return rules.reasons(layer.activation, layer.gated, *sizes, padded=False)

    def reasons_not_to_route(self, layer: Layer, routing: Routing) -> list[str]:
        """Return why the routing kernel cannot do this."""
        return list(library_reasons() or routing_reasons(routing, layer.num_experts))

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases; the output of gate stays raw until the epilogue multiplies it.

        Raises:
            UnsupportedError: biases, beta or limit, and a scale next to 0.
        """
        scaled = super().scale_operands(operands, layer)
        first, second = scaled.gate_up_global_scale, scaled.down_global_scale
        biases = scaled.gate_up_bias, scaled.down_bias
        if biases[0] is not None and biases[1] is not None:
            _check_divisors(gate_up_global_scale=first, down_global_scale=second)
            raw = biases[0] / first.unsqueeze(1), biases[1] / second.unsqueeze(1)
            scaled = scaled._replace(gate_up_bias=raw[0], down_bias=raw[1])
        elif not get_activation(layer.activation).plain:
            _check_divisors(gate_up_global_scale=first)
        if not layer.gated:
            return scaled
        product = scaled.intermediate_scale * scaled.gate_up_global_scale
        return scaled._replace(intermediate_scale=product)

    def check(self, call: Call | LogitsCall) -> None:
        """Raise what the launcher would not: shapes and dtypes are checked by the operator."""
        super().check(call)
        if isinstance(call, LogitsCall):
            routing = call.routing
        else:
            routing = Routing("", call.expert_ids.shape[1])
        if reasons := routing_reasons(routing, call.layer.num_experts):
            refuse(
                call.caller,
                f"kernel {self.name} cannot route like this",
                "; ".join(reasons),
                "See fp4moe.why_not.",
            )

    def run(self, call: Call) -> torch.Tensor:
        """Call the routed entry; before FlashInfer 0.6.18 it takes bfloat16 routing weights."""
        flashinfer, local = library(), call.operands.down_packed.shape[0]
        ids = local_ids(call.expert_ids, call.layer.expert_offset, local)
        dtype = torch.float32 if flashinfer.float32_weights else torch.bfloat16
        weights = call.routing_weights.to(dtype).contiguous()

        def launch(rows: slice, arguments: dict[str, Any]) -> None:
            given = (ids[rows], weights[rows])
            packed = is_tuning() and not flashinfer.tunes_plain_ids
            flashinfer.call(
                "trtllm_fp4_block_scale_routed_moe",
                {"hidden_states_scale_layout": flashinfer.linear_scale_layout()},
                topk_ids=packed_routing(*given) if packed else given,
                routing_bias=None,
                top_k=ids.shape[1],
                n_group=None,
                topk_group=None,
                routed_scaling_factor=None,
                routing_method_type=flashinfer.routing_method(GIVEN_ROUTING),
                **arguments,
            )

        return self._run(flashinfer, call, ids.shape[1], launch)

    def run_from_logits(self, call: LogitsCall) -> torch.Tensor:
        """Call the entry that routes; weights are rounded to bfloat16 in the kernel."""
        flashinfer, routing = library(), call.routing
        # float32 logits: bfloat16 ones tie often, and the library breaks ties its own way.
        logits = call.router_logits.to(torch.float32).contiguous()
        bias, grouped = None, routing.num_groups > 1
        if routing.method == "sigmoid_topk":
            # Without groups the library reads a bias whether there is one or not.
            bias = call.routing_bias.to(torch.float32).contiguous()
            bias = bias if bias.numel() else logits.new_zeros(call.layer.num_experts)

        def launch(rows: slice, arguments: dict[str, Any]) -> None:
            flashinfer.call(
                "trtllm_fp4_block_scale_moe",
                {"hidden_states_scale_layout": flashinfer.linear_scale_layout()},
                routing_logits=logits[rows],
                routing_bias=bias,
                top_k=routing.top_k,
                n_group=routing.num_groups if grouped else None,
                topk_group=routing.top_groups if grouped else None,
                routed_scaling_factor=routing.scaling if bias is not None else None,
                routing_method_type=flashinfer.routing_method(ROUTING_NAMES[routing.method]),
                norm_topk_prob=True,
                **arguments,
            )

        return self._run(flashinfer, call, routing.top_k, launch)

    def _run(
        self,
        flashinfer: FlashInfer,
        call: Call | LogitsCall,
        top_k: int,
        launch: Callable[[slice, dict[str, Any]], None],
    ) -> torch.Tensor:
        hidden, operands = call.hidden, call.operands
        tokens, hidden_size = hidden.shape
        local, hidden_padded, _ = operands.down_packed.shape
        # A narrower output makes the library drop the padding itself.
        width = hidden_padded if hidden_size % OUTPUT_MULTIPLE else hidden_size
        output = hidden.new_empty((tokens, width), dtype=torch.bfloat16)
        fixed = _fixed_arguments(flashinfer, operands, call.layer)
        step = tokens_per_launch(local, top_k)
        with torch.cuda.device_of(hidden):
            for start in range(0, tokens, step):
                rows = slice(start, min(start + step, tokens))
                x, x_scale = quantize_input(
                    flashinfer, hidden[rows], hidden_padded, operands.hidden_scale
                )
                place = {"hidden_states": x, "hidden_states_scale": x_scale}
                launch(rows, {**fixed, **place, "output": output[rows]})
        return output[:, :hidden_size].to(hidden.dtype).contiguous()


def _check_divisors(**products: torch.Tensor) -> None:
    """Raise where a product of scales [L] is next to 0: biases, beta or limit are divided by it."""
    for name, product in products.items():
        too_small = product < SMALLEST_SCALE
        if bool(too_small.any()):
            refuse(
                "FusedExperts",
                "kernel flashinfer_trtllm cannot take these scales",
                f"biases, beta and limit are divided by {name} times the scale of the "
                f"activations, which is below {SMALLEST_SCALE:.1g} for local experts "
                f"{too_small.nonzero()[:, 0].tolist()}",
                "Use another kernel.",
            )


def _parameters(operands: Operands, layer: Layer) -> dict[str, torch.Tensor | None]:
    """Return alpha, and beta and limit in units of the raw accumulators, each [L] or None.

    The limit of gate may be in the same units as that of up, for they share a scale.
    """
    activation = get_activation(layer.activation)
    found: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    )
    scale = operands.gate_up_global_scale
    if activation.alpha != 1:
        found["gemm1_alpha"] = torch.full_like(scale, activation.alpha)
    if activation.beta:
        found["gemm1_beta"] = torch.full_like(scale, activation.beta).div_(scale)
    if activation.limit:
        found["gemm1_clamp_limit"] = torch.full_like(scale, activation.limit).div_(scale)
    return found


def _fixed_arguments(flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
    """Return what both entries take for every launch of a call."""
    speed = flashinfer_settings()
    name = rules.ACTIVATION_NAMES[get_activation(layer.activation).name, layer.gated]
    local, _, columns = operands.down_packed.shape
    return {
        "gemm1_weights": operands.gate_up_packed,
        "gemm1_weights_scale": operands.gate_up_block_scale.view(torch.float8_e4m3fn),
        "gemm1_bias": operands.gate_up_bias,
        **_parameters(operands, layer),
        "gemm2_weights": operands.down_packed,
        "gemm2_weights_scale": operands.down_block_scale.view(torch.float8_e4m3fn),
        "gemm2_bias": operands.down_bias,
        "output1_scale_scalar": operands.intermediate_scale,
        "output1_scale_gate_scalar": operands.gate_up_global_scale,
        "output2_scale_scalar": operands.down_global_scale,
        "num_experts": layer.num_experts,
        "intermediate_size": columns * 2,
        "local_expert_offset": layer.expert_offset,
        "local_num_experts": local,
        "do_finalize": True,
        "enable_pdl": speed.enable_pdl,
        "activation_type": flashinfer.activation(name),
        "tune_max_num_tokens": speed.tune_max_num_tokens,
    }


@functools.lru_cache(maxsize=1024)
def routing_reasons(routing: Routing, num_experts: int) -> tuple[str, ...]:
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


def quantize_input(
    flashinfer: FlashInfer, hidden: torch.Tensor, hidden_padded: int, encode_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes uint8 [T, Hp/2], block scales float8_e4m3fn [T, Hp/16], linear order).

    Args:
        hidden: [T, H], any float dtype; rounded to bfloat16. encode_scale: float32 [1], 1 / s_x.
    """
    x = pad_columns(hidden, hidden_padded)
    codes, scale = flashinfer.call(
        "fp4_quantize",
        {"enable_pdl": flashinfer_settings().enable_pdl},
        input=x,
        global_scale=encode_scale,
        sf_vec_size=16,
        sf_use_ue8m0=False,
        is_sf_swizzled_layout=False,
    )
    return codes, scale.view(torch.float8_e4m3fn).reshape(x.shape[0], hidden_padded // 16)


FLASHINFER_TRTLLM = FlashInferTrtllm()
