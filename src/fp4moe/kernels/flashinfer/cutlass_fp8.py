"""FP8 weights and activations with one scale a matrix for FlashInfer's CUTLASS kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...activations import get_activation
from ...errors import refuse
from ...formats import FORMATS
from ...layer import Layer
from ..devices import Devices
from ..operands import Operands
from .cutlass_entry import CutlassEntry
from .weights import round_to_e4m3, row_layout, up_first

__all__ = ["Fp8CutlassEntry"]

# 16 in all kernels, 32 in those of compute capability 10.x that write without shared memory.
MULTIPLE = 32
# Gate's scale over up's must lie between this and its reciprocal: float32 has room for it then.
SMALLEST_RATIO = 2.0**-40
# Arguments in units of up.
OF_UP = ("swiglu_beta", "situ_linear_beta")


class Fp8CutlassEntry(CutlassEntry):
    """e4m3 x e4m3, with static scales of the activations.

    The library has one scale for gate and up together, which is gate's here: what is up's is then
    r = s_gate / s_up times as large, and so is the intermediate, until r is taken out where it is
    quantised. With a limit on both, r must be 1.

    Operands: rows of gate_up are [up; gate]. With s the scales of the weights, s_x = hidden_scale
    and s_a = intermediate_scale (decode multipliers): gate_up_block_scale is, in memory, s_gate *
    s_x [L] and r [L], without a gate s_up * s_x [L]; hidden_scale [1] is 1 / s_x;
    intermediate_scale [L] is 1 / (s_a * r); down_block_scale [L, 1, 1] is s_a * s_down. Biases are
    in the order of the rows, those of up times r. Gate and up are rounded to bfloat16, and so is
    each expert's output; the intermediate is not before it becomes e4m3.
    """

    format = FORMATS["fp8"].name
    devices = Devices(((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)))
    intermediate_dtype = torch.float32
    layout = row_layout(lambda layer, hidden_alignment: (MULTIPLE, MULTIPLE), up_first, tiled=False)

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return the scales as products.

        Raises:
            UnsupportedError: gate and up have scales that differ, and a limit or by too much.
        """
        weight, inner = operands.gate_up_block_scale, operands.intermediate_scale
        first, bias, encode = weight[:, 0, 0], operands.gate_up_bias, inner.reciprocal()
        product = first * operands.hidden_scale
        if layer.gated:
            ratio = torch.where(first == weight[:, 1, 0], 1.0, first / weight[:, 1, 0])
            _check_ratio(ratio, layer)
            product, encode = torch.cat((product, ratio)), encode / ratio
            if bias is not None:
                half = bias.shape[1] // 2
                bias = torch.cat((bias[:, :half] * ratio.unsqueeze(1), bias[:, half:]), 1)
        return operands._replace(
            gate_up_block_scale=product.view(weight.shape),
            gate_up_bias=bias,
            hidden_scale=operands.hidden_scale.reciprocal(),
            intermediate_scale=encode,
            down_block_scale=operands.down_block_scale * inner.view(-1, 1, 1),
        )

    def arguments(self, hidden: torch.Tensor, operands: Operands) -> dict[str, Any]:
        """Return the input in e4m3, the weights and four scales."""
        local, hidden_padded, _ = operands.down_packed.shape
        encode = operands.hidden_scale
        return {
            "input": round_to_e4m3(hidden, hidden_padded, encode),
            "fc1_expert_weights": operands.gate_up_packed.view(torch.float8_e4m3fn),
            "fc2_expert_weights": operands.down_packed.view(torch.float8_e4m3fn),
            "quant_scales": [
                operands.gate_up_block_scale.view(-1)[:local],
                operands.intermediate_scale,
                operands.down_block_scale.view(-1),
                encode.reciprocal().reshape(()),
            ],
        }

    def parameters(
        self, values: Mapping[str, float], operands: Operands
    ) -> dict[str, torch.Tensor]:
        """Return alpha, beta and limit [L]; what is up's in units of the kernel's up."""
        found = super().parameters(values, operands)
        # Only gated activations have parameters.
        ratio = operands.gate_up_block_scale.view(-1)[operands.down_packed.shape[0] :]
        return {n: value * ratio if n in OF_UP else value for n, value in found.items()}


def _check_ratio(ratio: torch.Tensor, layer: Layer) -> None:
    """Raise where the scales of gate and up [L] are further apart than the library can express."""
    if ratio.is_meta:
        return
    if get_activation(layer.activation).limit:
        wrong, why = ratio != 1, f"one limit and one scale hold for both in {layer.activation}"
    else:
        wrong = ~((ratio >= SMALLEST_RATIO) & (ratio <= 1 / SMALLEST_RATIO))
        why = "one of them is next to 0 beside the other"
    if bool(wrong.any()):
        refuse(
            "FusedExperts",
            "kernel flashinfer_cutlass cannot take gate and up whose scales differ so",
            f"{why}, and they do for local experts {wrong.nonzero()[:, 0].tolist()}",
            "Use kernel triton.",
        )
