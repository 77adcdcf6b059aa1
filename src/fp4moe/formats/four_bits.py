"""E2M1 codes of four bits, two in a byte, low nibble = even element."""

from __future__ import annotations

import torch

from ..errors import must

__all__ = ["e2m1_values", "pack_codes", "unpack_codes"]


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


def e2m1_values(device: torch.device) -> torch.Tensor:
    """Return the values of the codes 0 to 7, float32: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    # By arithmetic: no copy from the host is allowed while a CUDA graph is captured.
    code = torch.arange(8, dtype=torch.float32, device=device)
    return torch.where(code < 4, code / 2, torch.where(code < 6, code - 2, 2 * code - 8))
