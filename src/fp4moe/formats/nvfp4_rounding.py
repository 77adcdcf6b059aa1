"""How kernels round activations to NVFP4; weights are quantised in nvfp4.py."""

from __future__ import annotations

import torch

from .base import BlockScaledFormat

__all__ = ["round_activation", "round_intermediate"]


def round_activation(
    format: BlockScaledFormat, x: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Round float32 x [..., K] to NVFP4 as FlashInfer's fp4_quantize does.

    `scale` is the decode multiplier (ModelOpt's input_scale). Block scale = e4m3(amax / 6 / scale),
    saturated at 448; a block whose scale rounds to 0 becomes 0. It differs from the weights'
    quantiser, which never writes scale 0.
    """
    blocks = _blocks(format, x)
    block_scale = _to_e4m3(
        format, blocks.abs().amax(-1, keepdim=True) / scale * (1.0 / format.element_max)
    )
    reciprocal = torch.where(block_scale > 0, 1.0 / (block_scale * scale), 0.0)
    element = _to_e2m1(format, blocks * reciprocal)
    return (element * (block_scale * scale)).flatten(-2)[..., : x.shape[-1]]


def round_intermediate(
    format: BlockScaledFormat, x: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Round float32 x [..., K] to NVFP4 as the first GEMM of TRT-LLM-Gen does with its output.

    `scale` is the decode multiplier. It differs from `round_activation` in the order of the
    float32 operations only, hence in ties: block scale = e4m3((amax * (1 / scale)) * (1 / 6)),
    element = e2m1((x * (1 / block scale)) * (1 / scale)). The machine code of flashinfer-cubin
    0.6.13 says so (tests/blackwell/machine_code).
    """
    # The kernel's factor also holds the scales of up and of the input, which are in x here.
    encode = 1.0 / scale
    blocks = _blocks(format, x)
    block_scale = _to_e4m3(
        format, blocks.abs().amax(-1, keepdim=True) * encode * (1.0 / format.element_max)
    )
    # Exact; the hardware's MUFU.RCP is approximate.
    reciprocal = torch.where(block_scale > 0, 1.0 / block_scale, 0.0)
    element = _to_e2m1(format, blocks * reciprocal * encode)
    return (element * (block_scale * scale)).flatten(-2)[..., : x.shape[-1]]


def _blocks(format: BlockScaledFormat, x: torch.Tensor) -> torch.Tensor:
    padding = -x.shape[-1] % format.block_size
    return torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, format.block_size))


def _to_e4m3(format: BlockScaledFormat, x: torch.Tensor) -> torch.Tensor:
    return x.clamp(max=format.scale_max).to(format.scale_dtype).float()


def _to_e2m1(format: BlockScaledFormat, x: torch.Tensor) -> torch.Tensor:
    magnitude = x.abs()
    # Spacing of the E2M1 grid: 0.5 below 2, 1 below 4, 2 above; round() goes to the even code at a
    # tie.
    step = torch.full_like(magnitude, 2.0)
    step = step.masked_fill(magnitude < 4, 1.0).masked_fill(magnitude < 2, 0.5)
    return ((magnitude / step).round() * step).clamp(max=format.element_max).copysign(x)
