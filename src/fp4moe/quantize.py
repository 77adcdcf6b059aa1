"""NVFP4 quantise, dequantise, pack and unpack in plain torch.

Bit-exact with ModelOpt's NVFP4QTensor: E2M1 ties to even, E4M3 block scales in [2^-9, 448], a block of
zeros gets scale 1, low nibble = even element. Not handled here: padding, kernel layouts.
"""

from __future__ import annotations

import dataclasses

import torch

from .errors import ShapeError, UnsupportedError
from .formats import NVFP4

__all__ = ["NVFP4Values", "dequantize_nvfp4", "nvfp4_global_scale", "pack_codes", "quantize_nvfp4", "unpack_codes"]


@dataclasses.dataclass(frozen=True)
class NVFP4Values:
    """An NVFP4 tensor; a plain container, so that an unsupported torch operation fails loudly.

    Attributes:
        packed: [..., K / 2] uint8, two codes a byte, low nibble = even element.
        block_scale: [..., K / 16] float8_e4m3fn, linear order.
        global_scale: float32 decode multiplier, 0-d or one per leading index.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor


def quantize_nvfp4(x, global_scale=None, method="max"):
    if global_scale is None:
        global_scale = nvfp4_global_scale(x)
    g = global_scale.reshape(global_scale.shape + (1,) * (x.ndim - global_scale.ndim))
    blocks = x.float().unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1)
    if not bool(torch.isfinite(amax).all()):
        raise ShapeError("quantize_nvfp4: x must be finite; got inf or NaN.")
    scale = amax / (6.0 * g)
    scale = torch.where(scale == 0, 1.0, scale).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    y = (blocks / (scale.float() * g).unsqueeze(-1)).flatten(-2)
    a = y.abs()
    code = torch.minimum((2 * a).round(), torch.minimum(a.round() + 2, (a / 2).round() + 4)).clamp(max=7)
    code = code.to(torch.uint8) + (y < 0).to(torch.uint8) * 8
    return NVFP4Values(pack_codes(code), scale, global_scale)


def nvfp4_global_scale(x, dim=None):
    amax = x.abs().amax() if dim is None else x.abs().amax(dim)
    g = amax.float() / 2688.0
    return torch.where(g == 0, 1.0, g)


def pack_codes(codes):
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_codes(packed):
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize_nvfp4(q, dtype=torch.float32):
    grid = torch.tensor(NVFP4.grid, device=q.packed.device)
    grid = torch.cat((grid, -grid))
    g = q.global_scale.reshape(q.global_scale.shape + (1,) * (q.packed.ndim - q.global_scale.ndim))
    v = grid[unpack_codes(q.packed).int()].unflatten(-1, (-1, 16))
    return (v * (q.block_scale.float() * g).unsqueeze(-1)).flatten(-2).to(dtype)
