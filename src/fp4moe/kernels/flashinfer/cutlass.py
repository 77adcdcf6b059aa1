"""Kernel `flashinfer_cutlass`: FlashInfer's CUTLASS NVFP4 fused experts (SM120/121, SM100/103).

Decides: layout and scales of the operands, every check that the library omits, the arguments of
`cutlass_fused_moe`. Not here: which activations and sizes it has (cutlass_rules.py).
Sources: FlashInfer 0.6.13 and 0.7.2; nothing of this has run on a Blackwell GPU yet, see `fp4moe
selftest`.
"""

from __future__ import annotations

import torch

from ...errors import UnsupportedError
from ...experts import ExpertWeights
from ...layer import LayerSettings, MoeSpec, Routing, capability_name
from ..base import (
    Operands,
    PreparedWeights,
    current_capability,
    logical_weights,
    refuse_device,
    sizes_to_pad,
)
from . import cutlass_rules as rules
from .block_scales import deinterleave_128x4, interleave_128x4
from .library import activation_names, flashinfer_settings, library, library_reasons
from .rows import inverse_index, permute_rows, up_gate_index
from .weights import (
    check_operands,
    kept_scales,
    local_ids,
    pad_columns,
    scale_operands,
    with_logical_scales,
)

__all__ = ["FLASHINFER_CUTLASS", "FlashInferCutlass", "merge_repeated"]

# Up to here one block sorts all tokens and keeps an id that is twice in a row; else only the first.
ONE_BLOCK_TOKENS, ONE_BLOCK_TOP_K, ONE_BLOCK_EXPERTS = 256, (1, 2, 4, 6, 8), 510


class FlashInferCutlass:
    """CUTLASS' fused experts behind the operator.

    Operands: rows of gate_up are [up; gate]; block scales are interleaved 128x4 per expert; scales
    as in flashinfer_weights.scale_operands. Gate, up and the intermediate are rounded to bfloat16.
    """

    name = "flashinfer_cutlass"
    automatic = True
    quantizes_activations = True
    intermediate_dtype = torch.bfloat16

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return why not: device, library, activation; any size is padded to one that fits."""
        names = None
        if spec.capability in rules.CAPABILITIES:
            reasons = list(library_reasons())
            names = None if reasons else activation_names()
        else:
            got = capability_name(spec.capability)
            reasons = [f"needs compute capability 12.0, 12.1, 10.0 or 10.3, got {got}"]
        return reasons + rules.reasons(spec.activation, spec.gated, names)

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return which size is no multiple of what the kernel takes."""
        return sizes_to_pad(spec, rules.size_multiples(spec.gated))

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return that it cannot."""
        return ["the CUTLASS experts take ids and weights, they do not route"]

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return rules.size_multiples(spec.gated)

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Pad, put up before gate, interleave block scales; the logical scales are kept beside."""
        metadata, kept = weights.metadata(), kept_scales(Operands(**weights.operands()))
        multiples = rules.size_multiples(weights.gated)
        weights = weights.unpadded().padded(
            hidden_multiple=multiples[0], intermediate_multiple=multiples[1]
        )
        padded = Operands(**weights.operands())
        packed, scale = padded.gate_up_packed, padded.gate_up_block_scale
        if weights.gated:
            index = up_gate_index(packed.shape[1])
            packed, scale = permute_rows(packed, index), permute_rows(scale, index)
        operands = padded._replace(
            gate_up_packed=packed.contiguous(),
            # Nothing is added: rows are a multiple of 128 and columns of 4.
            gate_up_block_scale=interleave_128x4(scale).view(scale.shape),
            down_packed=padded.down_packed.contiguous(),
            down_block_scale=interleave_128x4(padded.down_block_scale).view(
                padded.down_block_scale.shape
            ),
            **scale_operands(weights, output_scale),
        )
        return PreparedWeights(operands, kept, metadata)

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`."""
        laid_out, metadata = with_logical_scales(prepared), prepared.metadata
        first, second = (
            deinterleave_128x4(scale, scale.shape[1], scale.shape[2])
            for scale in (laid_out.gate_up_block_scale, laid_out.down_block_scale)
        )
        packed = laid_out.gate_up_packed
        if metadata["gated"]:
            back = inverse_index(up_gate_index(packed.shape[1]))
            packed, first = permute_rows(packed, back), permute_rows(first, back)
        logical = laid_out._replace(
            gate_up_packed=packed, gate_up_block_scale=first, down_block_scale=second
        )
        sizes = (metadata["hidden_size"], metadata["intermediate_size"])
        return logical_weights(logical, prepared.settings, *sizes).unpadded()

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Call cutlass_fused_moe on the local experts; ids are made local here."""
        self._check(hidden, operands, settings)
        flashinfer = library()
        local, hidden_padded, _ = operands.down_packed.shape
        first = settings.expert_offset
        ids = local_ids(expert_ids, first, local, base=first)
        weights = routing_weights.to(torch.float32).contiguous()
        if not sorts_in_one_block(ids.shape[0], ids.shape[1], local):
            ids, weights = merge_repeated(ids, weights)
        output = hidden.new_empty((hidden.shape[0], hidden_padded), dtype=torch.bfloat16)
        speed = flashinfer_settings()
        # 0.6.13 asks the current device, not that of the tensors, which architecture it is.
        with torch.cuda.device_of(hidden):
            flashinfer.call(
                "cutlass_fused_moe",
                # The fused one adds in bfloat16, in the order in which blocks end.
                {"use_fused_finalize": False},
                input=pad_columns(hidden, hidden_padded),
                token_selected_experts=ids,
                token_final_scales=weights,
                fc1_expert_weights=operands.gate_up_packed.view(torch.int64),
                fc2_expert_weights=operands.down_packed.view(torch.int64),
                output_dtype=torch.bfloat16,
                quant_scales=[
                    operands.hidden_scale.reshape(()),
                    operands.gate_up_block_scale.view(torch.int32),
                    operands.gate_up_global_scale,
                    operands.intermediate_scale,
                    operands.down_block_scale.view(torch.int32),
                    operands.down_global_scale,
                ],
                output=output,
                enable_pdl=speed.enable_pdl,
                tune_max_num_tokens=speed.tune_max_num_tokens,
                activation_type=self._activation(flashinfer, settings),
            )
        # This library writes whole padded rows.
        return output[:, : hidden.shape[1]].to(hidden.dtype).contiguous()

    def run_from_logits(self, *args: object) -> torch.Tensor:
        """Raise: it cannot route."""
        raise UnsupportedError(
            f"{self.name}: routing must be 'given'; got 'fused'. Route outside and call nvfp4_moe."
        )

    def _activation(self, flashinfer, settings: LayerSettings):
        name = rules.enum_name(settings.activation, settings.gated)
        return flashinfer.module.ActivationType[name]

    def _check(self, hidden: torch.Tensor, operands: Operands, settings: LayerSettings) -> None:
        if current_capability(hidden.device) not in rules.CAPABILITIES:
            refuse_device(self.name, hidden.device, "12.0, 12.1, 10.0 or 10.3")
        reasons = rules.reasons(settings.activation, settings.gated, activation_names())
        if reasons:
            raise UnsupportedError(
                f"{self.name}: activation must be one that the kernel has; got "
                f"{settings.activation}: {'; '.join(reasons)}. See fp4moe.why_not."
            )
        check_operands(self.name, operands, rules.size_multiples(settings.gated))


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
