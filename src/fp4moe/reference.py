"""The definition of the operator, in plain torch and float32.

    out[t] = sum_k routing_weights[t, k] * (
        down[e] combine(gate[e] x[t] + gate_bias[e], up[e] x[t] + up_bias[e]) + down_bias[e]
    ),  e = expert_ids[t, k]

`moe_definition` takes float weights, `reference` and `reference_w4a4` quantised ones. Each hit
expert is computed once for all its tokens. Nothing is rounded between the two GEMMs, except by
`reference_w4a4`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .activations import Activation, get_activation
from .errors import must
from .experts import ExpertWeights
from .precision import without_autocast

__all__ = [
    "Definition",
    "definition_of",
    "moe_definition",
    "reference",
    "reference_w4a4",
    "rounded_input",
    "run_definition",
    "sum_over_experts",
]

Parts = dict[str, torch.Tensor]
# expert index -> gate (gated only), up, down and their biases by name, float32 and without padding.
LoadExpert = Callable[[int], Parts]


class Definition(NamedTuple):
    """What one expert computes, in float32, or in float64 for rows of it.

    Attributes:
        load: what an expert's weights are.
        activation: what stands between the products.
        intermediate_dtype, quantise, intermediate_scale: what `reference_w4a4` rounds to, and how;
            nothing is rounded without.
        product_dtype: what gate, up and biases are rounded to; None as intermediate_dtype.
    """

    load: LoadExpert
    activation: Activation
    intermediate_dtype: torch.dtype | None = None
    quantise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    intermediate_scale: torch.Tensor | None = None
    product_dtype: torch.dtype | None = None

    def up_and_gate(self, part: Parts, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the activation combines, [N, I] each: up, and gate where there is one."""
        return tuple(self._product(rows, part, n) for n in ("up", "gate") if n in part)

    def down(self, expert: int, part: Parts, inner: torch.Tensor) -> torch.Tensor:
        """Return an expert's output [N, H] of what the activation gave."""
        if self.intermediate_dtype is not None:
            inner = inner.to(self.intermediate_dtype).float()
        if self.intermediate_scale is None or self.quantise is None:
            return self._product(inner, part, "down")
        y = self._product(self.quantise(inner, self.intermediate_scale[expert]), part, "down")
        return y.bfloat16().float() if self._products == torch.float32 else y

    @property
    def _products(self) -> torch.dtype | None:
        return self.product_dtype or self.intermediate_dtype

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self._products
        return value if dtype is None else value.to(dtype).float()

    def _product(self, rows: torch.Tensor, part: Parts, name: str) -> torch.Tensor:
        y = self._rounded(self.times(rows, part, name))
        bias = part.get(f"{name}_bias")
        return y if bias is None else y + self._rounded(bias)

    def times(self, rows: torch.Tensor, part: Parts, name: str) -> torch.Tensor:
        """Return rows [N, K] times the weight of that name, in the dtype of rows."""
        return rows @ part[name].to(rows.dtype).T


def sum_over_experts(
    expert_ids: torch.Tensor, routing_weights: torch.Tensor, first: int, count: int, apply: Callable
) -> torch.Tensor | None:
    """Return sum_k routing_weights[t, k] * apply(e, tokens), e in first..first+count-1, float32.

    On a CPU only experts that are hit run, on their own tokens. Elsewhere every expert runs on all
    tokens: no host synchronisation, safe under capture. None when nothing is hit.
    """
    weights = routing_weights.float()
    out: torch.Tensor | None = None
    if expert_ids.device.type == "cpu":
        for expert in torch.unique(expert_ids).tolist():
            if first <= expert < first + count:
                token, slot = (expert_ids == expert).nonzero(as_tuple=True)
                y = apply(expert - first, token) * weights[token, slot].unsqueeze(-1)
                out = y.new_zeros(expert_ids.shape[0], y.shape[1]) if out is None else out
                out.index_add_(0, token, y)
        return out
    for expert in range(count):
        hit = expert_ids == expert + first
        per_token = torch.where(hit, weights, 0.0).sum(1, keepdim=True)
        # where, not a product: a token that is not routed here must not pass on inf or NaN.
        y = torch.where(hit.any(1, keepdim=True), apply(expert, slice(None)) * per_token, 0.0)
        out = y if out is None else out.add_(y)
    return out


def moe_definition(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str | Activation,
    expert_offset: int = 0,
) -> torch.Tensor:
    """Compute the layer from float weights.

    Args:
        hidden: [T, H]. expert_ids: [T, K] global ids. routing_weights: [T, K], used as given.
        up, gate: [L, I, H]. down: [L, H, I]. gate_bias, up_bias: [L, I]. down_bias: [L, H].
        activation: an `fp4moe.Activation`, or its name or text.
        expert_offset: global id of expert 0 here; ids outside contribute nothing.

    Returns:
        [T, H] in the dtype of hidden, computed and summed in float32, cast once.
    """

    parts = {
        "gate": gate,
        "up": up,
        "down": down,
        "gate_bias": gate_bias,
        "up_bias": up_bias,
        "down_bias": down_bias,
    }

    def load(expert: int) -> Parts:
        return {name: part[expert].float() for name, part in parts.items() if part is not None}

    defined = Definition(load, get_activation(activation, caller="reference"))
    return run_definition(hidden, expert_ids, routing_weights, defined, up.shape[0], expert_offset)


def reference(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute the layer with activations as they are and dequantised weights, of any format.

    Args:
        hidden: [T, H] bfloat16, float16 or float32. weights: the quantised experts.
        expert_ids: [T, K] global ids. routing_weights: [T, K], used as given.

    Returns:
        [T, H] in the dtype of hidden.
    """
    defined = definition_of(weights, caller="reference")
    args = defined, weights.local_experts, weights.expert_offset
    return run_definition(hidden, expert_ids, routing_weights, *args)


def reference_w4a4(
    hidden: torch.Tensor,
    weights: ExpertWeights,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    *,
    intermediate_dtype: torch.dtype = torch.float32,
    product_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute the layer as kernels do that round input and intermediate by the weights' format.

    NVFP4 to NVFP4 (W4A4), FP8 formats and MXFP8 to themselves, MXFP4 to MXFP8; see each format's
    `round_activation`. The input is rounded to bfloat16 and then with `hidden_scale`, the
    intermediate with `intermediate_scale`, where the format stores such scales; each expert's
    output is rounded to bfloat16 before the weighted sum in float32. `intermediate_dtype` is what
    the intermediate is rounded to before it is quantised, `product_dtype` (default: the same) what
    gate, up and each bias are: float32 both in TRT-LLM-Gen, which quantises by the format's
    `round_intermediate`; bfloat16 both in CUTLASS, which quantises by `round_activation` and adds
    biases after the rounding; bfloat16 and float32 in `triton_w8a8`. Else as `reference`. Source:
    FlashInfer 0.7.2, fp4_quantize and CUTLASS' activation and finalize kernels; the machine code of
    TRT-LLM-Gen.
    """
    x = rounded_input(hidden, weights)
    dtypes = intermediate_dtype, product_dtype
    defined = definition_of(weights, *dtypes, caller="reference_w4a4")
    args = defined, weights.local_experts, weights.expert_offset, "reference_w4a4"
    return run_definition(x, expert_ids, routing_weights, *args).to(hidden.dtype)


def rounded_input(hidden: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Return hidden in float32 as `reference_w4a4` rounds it."""
    rounded = hidden.to(torch.bfloat16).float()
    return weights.number_format.round_activation(rounded, weights.hidden_scale)


def definition_of(
    weights: ExpertWeights,
    intermediate_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    *,
    caller: str,
) -> Definition:
    """Return what these experts compute: `reference`, or `reference_w4a4` of intermediate_dtype."""
    activation = get_activation(weights.activation, caller=caller)
    if intermediate_dtype is None:
        return Definition(_loader(weights), activation)
    format = weights.number_format
    in_epilogue = intermediate_dtype == torch.float32
    quantise = format.round_intermediate if in_epilogue else format.round_activation
    rounding = intermediate_dtype, quantise, weights.intermediate_scale, product_dtype
    return Definition(_loader(weights), activation, *rounding)


def _loader(weights: ExpertWeights) -> LoadExpert:
    def load(expert: int) -> Parts:
        parts = weights.slice_experts(expert, expert + 1).dequantize()
        return {name: part[0] for name, part in parts.items()}

    return load


def run_definition(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    routing_weights: torch.Tensor,
    defined: Definition,
    local_experts: int,
    expert_offset: int,
    caller: str = "reference",
) -> torch.Tensor:
    """Compute the layer [T, H] that `defined` is, in the dtype of hidden; see `moe_definition`."""
    if (
        hidden.ndim != 2
        or expert_ids.shape != routing_weights.shape
        or expert_ids.shape[:1] != hidden.shape[:1]
    ):
        rule = "be [T, H], [T, K] and [T, K]"
        got = f"{list(hidden.shape)}, {list(expert_ids.shape)} and {list(routing_weights.shape)}"
        must(f"{caller}: hidden, expert_ids and routing_weights", rule, got, "Flatten the tokens.")
    x = hidden.float()

    def apply(expert: int, token: torch.Tensor | slice) -> torch.Tensor:
        part = defined.load(expert)
        inner = defined.activation.combine(*defined.up_and_gate(part, x[token]))
        return defined.down(expert, part, inner)

    # float32 is part of the definition.
    with without_autocast(hidden.device):
        out = sum_over_experts(expert_ids, routing_weights, expert_offset, local_experts, apply)
    return hidden.new_zeros(hidden.shape) if out is None else out.to(hidden.dtype)
