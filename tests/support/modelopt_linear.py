"""What ModelOpt exports for one Linear: its calibration, its scales and its codes."""

from __future__ import annotations

import warnings

import pytest
import torch

__all__ = ["PRESETS", "modelopt_export"]

# Name of our format -> ModelOpt's preset.
PRESETS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
}


def modelopt_export(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scales) that ModelOpt writes for a weight [N, K]."""
    quantization = pytest.importorskip("modelopt.torch.quantization", reason="optional package")
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    model = torch.nn.Sequential(linear)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those about weights of zeros
        linear.weight.copy_(weight)
        quantization.quantize(
            model,
            getattr(quantization, PRESETS[name]),
            lambda m: m(torch.ones(1, columns, dtype=weight.dtype)),
        )
        _export_quantized_weight(model[0], weight.dtype)
    return model[0].weight.detach(), model[0].weight_scale
