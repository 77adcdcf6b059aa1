"""Two codes of four bits in a byte, low nibble = even element."""

from __future__ import annotations

import torch

from ..errors import must

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] uint8 codes below 16, K even -> [..., K / 2] uint8, low nibble = even element."""
    if codes.dtype != torch.uint8 or codes.ndim == 0 or codes.shape[-1] % 2:
        got = f"{codes.dtype} {tuple(codes.shape)}"
        must("pack_codes: codes", "be uint8 with an even last axis", got, "Cast or pad them.")
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """[..., K / 2] uint8 -> [..., K] uint8 codes below 16; the inverse of `pack_codes`."""
    if packed.dtype != torch.uint8 or packed.ndim == 0:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        must("unpack_codes: packed", "be uint8 with a last axis", got, "Cast or reshape it.")
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
