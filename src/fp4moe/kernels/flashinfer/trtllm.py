"""Kernel `flashinfer_trtllm`: FlashInfer's TRT-LLM-Gen NVFP4 fused experts (SM100, SM103).

Decides: layout and scale scalars of the operands, every check that the C++ launcher omits, the
arguments of its two entries. Not here: which sizes have a kernel (trtllm_rules.py), which library
version (library.py). Sources: FlashInfer 0.6.13 and 0.7.2; nothing of this has run on a
Blackwell GPU yet, see `fp4moe selftest`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...errors import UnsupportedError
from ...experts import ExpertWeights
from ...layer import LayerSettings, MoeSpec, Routing, capability_name
from ..base import Operands, PreparedWeights, current_capability, logical_weights, refuse_device
from . import trtllm_rules as trtllm_gen
from .block_scales import deinterleave_128x4, interleave_128x4
from .library import (
    FlashInfer,
    flashinfer_settings,
    is_tuning,
    library,
    library_reasons,
    version_key,
)
from .rows import down_row_index, gate_up_row_index, inverse_index, permute_rows
from .weights import (
    check_operands,
    kept_scales,
    local_ids,
    pad_columns,
    scale_operands,
    with_logical_scales,
)

__all__ = ["FLASHINFER_TRTLLM", "FlashInferTrtllm", "quantize_input"]

CAPABILITIES = ((10, 0), (10, 3))
# Where the routed entry is told nothing, this pipeline sorts given ids (no maths of its own).
GIVEN_ROUTING = "Renormalize"
ROUTING_NAMES = {"softmax_topk": "RenormalizeNaive", "sigmoid_topk": "DeepSeekV3"}
# The launch grid has at most 65535 rows of one tile, which is 64 tokens or more at this size.
GRID_ROWS, SMALLEST_LARGE_TILE, MOST_TOKENS = 65535, 64, 1 << 18
# The finalize kernel writes rows of 16 bytes, unchecked in 0.6.13.
OUTPUT_MULTIPLE = 8


class FlashInferTrtllm:
    """TRT-LLM-Gen's fused experts behind the operator.

    Operands: rows of gate_up are [up; gate], interleaved and shuffled; block scales are interleaved
    128x4; with s_x = hidden_scale, s_a = intermediate_scale and s the global scales,
    gate_up_global_scale holds s_up * s_x, intermediate_scale s_up * s_x / s_a (gated) or 1 / s_a,
    down_global_scale s_a * s_down * output_scale, and hidden_scale 1 / s_x.
    """

    name = "flashinfer_trtllm"
    automatic = True
    quantizes_activations = True
    intermediate_dtype = torch.float32

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return why not: device, library, activation; any size is padded to one with a kernel."""
        if spec.capability in CAPABILITIES:
            reasons = list(library_reasons())
        else:
            got = capability_name(spec.capability)
            reasons = [f"needs compute capability 10.0 or 10.3, got {got}"]
        reasons += trtllm_gen.reasons(
            spec.activation, spec.gated, spec.hidden_size, spec.intermediate_size
        )
        if spec.top_k:
            reasons += trtllm_gen.routing_reasons(GIVEN_ROUTING, spec.num_experts, spec.top_k)
        return reasons

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which padded size would have a kernel."""
        return trtllm_gen.reasons(
            spec.activation, spec.gated, spec.hidden_size, spec.intermediate_size, padded=False
        )

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return why the routing kernel cannot do this."""
        if library_reasons():
            return list(library_reasons())
        return list(routing_reasons(routing, spec.num_experts))

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return trtllm_gen.size_multiples(spec.activation, spec.gated, hidden_alignment)

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Pad, reorder, shuffle and interleave; the logical scales are kept beside."""
        metadata, logical = weights.metadata(), weights
        multiples = trtllm_gen.size_multiples(weights.activation, weights.gated, hidden_alignment)
        weights = weights.unpadded().padded(
            hidden_multiple=multiples[0], intermediate_multiple=multiples[1]
        )
        padded = Operands(**weights.operands())
        indices = (
            gate_up_row_index(padded.gate_up_packed.shape[1], weights.gated),
            down_row_index(padded.down_packed.shape[1]),
        )
        scales = scale_operands(weights, output_scale)
        if weights.gated:
            # The output of gate stays raw until the epilogue multiplies it: see its formula.
            scales["intermediate_scale"] *= scales["gate_up_global_scale"]
        laid_out = padded._replace(**scales)
        for gemm, index in zip(("gate_up", "down"), indices, strict=True):
            packed, scale = (
                getattr(padded, f"{gemm}_packed"),
                getattr(padded, f"{gemm}_block_scale"),
            )
            shuffled = interleave_128x4(permute_rows(scale, index))
            laid_out = laid_out._replace(
                **{
                    f"{gemm}_packed": permute_rows(packed, index),
                    # Nothing is added: rows are a multiple of 128 and columns of 4.
                    f"{gemm}_block_scale": shuffled.view(scale.shape),
                }
            )
        return PreparedWeights(laid_out, kept_scales(Operands(**logical.operands())), metadata)

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        laid_out, metadata = prepared.operands, prepared.metadata
        indices = (
            gate_up_row_index(laid_out.gate_up_packed.shape[1], metadata["gated"]),
            down_row_index(laid_out.down_packed.shape[1]),
        )
        padded = with_logical_scales(prepared)
        for gemm, index in zip(("gate_up", "down"), indices, strict=True):
            packed = getattr(laid_out, f"{gemm}_packed")
            scale = getattr(laid_out, f"{gemm}_block_scale")
            linear = deinterleave_128x4(scale, scale.shape[1], scale.shape[2])
            back = inverse_index(index)
            padded = padded._replace(
                **{
                    f"{gemm}_packed": permute_rows(packed, back),
                    f"{gemm}_block_scale": permute_rows(linear, back),
                }
            )
        sizes = (metadata["hidden_size"], metadata["intermediate_size"])
        return logical_weights(padded, prepared.settings, *sizes).unpadded()

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Call the routed entry; before FlashInfer 0.6.18 it takes bfloat16 routing weights."""
        self._check(hidden, operands, settings, Routing("", expert_ids.shape[1]))
        flashinfer = library()
        ids = local_ids(expert_ids, settings.expert_offset, operands.down_packed.shape[0])
        dtype = torch.float32 if flashinfer.float32_weights else torch.bfloat16
        weights = routing_weights.to(dtype).contiguous()

        def call(rows: slice, arguments: dict[str, Any]) -> None:
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

        return self._run(flashinfer, hidden, operands, settings, ids.shape[1], call)

    def run_from_logits(
        self,
        hidden: torch.Tensor,
        router_logits: torch.Tensor,
        routing_bias: torch.Tensor,
        routing: Routing,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Call the entry that routes; weights are rounded to bfloat16 in the kernel."""
        self._check(hidden, operands, settings, routing)
        flashinfer = library()
        # float32 logits: bfloat16 ones tie often, and the library breaks ties its own way.
        logits = router_logits.to(torch.float32).contiguous()
        bias, grouped = None, routing.num_groups > 1
        if routing.method == "sigmoid_topk":
            # Without groups the library reads a bias whether there is one or not.
            bias = routing_bias.to(torch.float32).contiguous()
            bias = bias if bias.numel() else logits.new_zeros(settings.num_experts)

        def call(rows: slice, arguments: dict[str, Any]) -> None:
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

        return self._run(flashinfer, hidden, operands, settings, routing.top_k, call)

    def _run(
        self,
        flashinfer: FlashInfer,
        hidden: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
        top_k: int,
        call: Any,
    ) -> torch.Tensor:
        tokens, hidden_size = hidden.shape
        local, hidden_padded, columns = operands.down_packed.shape
        # A narrower output makes the library drop the padding itself.
        width = hidden_padded if hidden_size % OUTPUT_MULTIPLE else hidden_size
        output = hidden.new_empty((tokens, width), dtype=torch.bfloat16)
        speed = flashinfer_settings()
        fixed = {
            "gemm1_weights": operands.gate_up_packed,
            "gemm1_weights_scale": operands.gate_up_block_scale.view(torch.float8_e4m3fn),
            "gemm1_bias": None,
            "gemm1_alpha": None,
            "gemm1_beta": None,
            "gemm1_clamp_limit": None,
            "gemm2_weights": operands.down_packed,
            "gemm2_weights_scale": operands.down_block_scale.view(torch.float8_e4m3fn),
            "gemm2_bias": None,
            "output1_scale_scalar": operands.intermediate_scale,
            "output1_scale_gate_scalar": operands.gate_up_global_scale,
            "output2_scale_scalar": operands.down_global_scale,
            "num_experts": settings.num_experts,
            "intermediate_size": columns * 2,
            "local_expert_offset": settings.expert_offset,
            "local_num_experts": local,
            "do_finalize": True,
            "enable_pdl": speed.enable_pdl,
            "activation_type": flashinfer.activation(
                trtllm_gen.ACTIVATION_NAMES[settings.activation, settings.gated]
            ),
            "tune_max_num_tokens": speed.tune_max_num_tokens,
        }
        step = tokens_per_launch(local, top_k)
        with torch.cuda.device_of(hidden):
            for start in range(0, tokens, step):
                rows = slice(start, min(start + step, tokens))
                x, x_scale = quantize_input(
                    flashinfer, hidden[rows], hidden_padded, operands.hidden_scale
                )
                place = {"hidden_states": x, "hidden_states_scale": x_scale}
                call(rows, {**fixed, **place, "output": output[rows]})
        return output[:, :hidden_size].to(hidden.dtype).contiguous()

    def _check(
        self, hidden: torch.Tensor, operands: Operands, settings: LayerSettings, routing: Routing
    ) -> None:
        """Raise what the launcher would not: shapes and dtypes are checked by the operator."""
        if current_capability(hidden.device) not in CAPABILITIES:
            refuse_device(self.name, hidden.device, "10.0 or 10.3")
        form = (settings.activation, settings.gated)
        if form not in trtllm_gen.ACTIVATION_NAMES:
            sizes = (operands.down_packed.shape[1], operands.down_packed.shape[2] * 2)
            raise UnsupportedError(
                f"{self.name}: activation must be one that the kernel has; got "
                f"{settings.activation}: {'; '.join(trtllm_gen.reasons(*form, *sizes))}. See "
                "fp4moe.why_not."
            )
        multiples = trtllm_gen.size_multiples(*form, 128)
        check_operands(self.name, operands, multiples)
        reasons = routing_reasons(routing, settings.num_experts)
        if reasons:
            raise UnsupportedError(
                f"{self.name}: routing must be one with a kernel (0.6.13 would only warn); got "
                f"{'; '.join(reasons)}. See fp4moe.why_not."
            )


@functools.lru_cache(maxsize=1024)
def routing_reasons(routing: Routing, num_experts: int) -> tuple[str, ...]:
    """Return why the library's routing kernels cannot sort (method "") or choose like this."""
    method = ROUTING_NAMES.get(routing.method, GIVEN_ROUTING)
    newer = version_key(library().version) >= trtllm_gen.NEWER_TIERS_SINCE
    reasons = trtllm_gen.routing_reasons(
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
