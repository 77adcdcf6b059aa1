"""NVFP4 weights and activations for TRT-LLM-Gen."""

from __future__ import annotations

from typing import Any

import torch

from ...activations import get_activation
from ...errors import refuse
from ...formats import NVFP4
from ...layer import Layer
from ..operands import Operands
from .library import FlashInfer, flashinfer_settings
from .trtllm_entry import Entry, fp4_weights, shuffled_rows
from .weights import pad_columns, scale_products

__all__ = ["Nvfp4Entry", "quantize_input"]

# What is divided by a product of scales may be infinite below this. The least of a real layer is
# about 2^-33: weights up to 1e-3, an input up to 1, each over 2688.
SMALLEST_SCALE = 2.0**-100


class Nvfp4Entry(Entry):
    """NVFP4 x NVFP4.

    Operands: rows of gate_up are [up; gate], interleaved and shuffled; block scales are interleaved
    128x4; scales as in `scale_products`, but intermediate_scale is s_up * s_x / s_a where the layer
    is gated. Biases are in the order of the rows and in the units of the raw accumulators, to which
    they are added: gate_up_bias is divided by s_up * s_x, down_bias by s_a * s_down.
    """

    format = NVFP4.name
    given, from_logits = "trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"
    biased = (given, from_logits)
    layout = shuffled_rows()
    drops_padding = True

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases; the output of gate stays raw until the epilogue multiplies it.

        Raises:
            UnsupportedError: biases, beta or limit, and a scale next to 0.
        """
        scaled = scale_products(operands)
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

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return codes uint8 [T, Hp/2] and block scales e4m3 [T, Hp/16]."""
        codes, scale = quantize_input(flashinfer, hidden, columns, operands.hidden_scale)
        return {"hidden_states": codes, "hidden_states_scale": scale}

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the weights, and the three scalars of the epilogues."""
        first, second = operands.gate_up_global_scale, operands.down_global_scale
        scalars = operands.intermediate_scale, first, second
        return fp4_weights(operands, _parameters(operands, layer), scalars)


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
