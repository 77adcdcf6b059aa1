"""MXFP8 and MXFP4: e4m3 or e2m1 codes, and a power of two for each 32 elements of a row.

Bytes are those of ModelOpt: the scale is the smallest power of two, 2^-127 at least, that no
element exceeds the largest code with (RCEIL). A block of zeros has scale byte 0. Found by integer
arithmetic, so a float32 block that lies above a power of two by less than a float32 log2 can tell,
gets the next power; ModelOpt keeps it and saturates, which no 16-bit weight meets.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from .base import Part
from .four_bits import e2m1_values, pack_codes, unpack_codes
from .scaled import E4M3_MAX, ScaledFormat, block_amax, multiply_blocks, to_e4m3

__all__ = ["MXFP4", "MXFP8", "e8m0_scales", "e8m0_values"]

BLOCK = 32
E2M1_MAX = 6.0


@dataclasses.dataclass(frozen=True)
class _MX(ScaledFormat):
    def _decode_scales(self, scales: torch.Tensor) -> torch.Tensor:
        return e8m0_values(scales)

    def round_activation(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Round to MXFP8, whatever the weights are."""
        blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = e8m0_scales(blocks.abs().amax(-1, keepdim=True), E4M3_MAX)
        code = to_e4m3(blocks * e8m0_values(254 - scales))
        return (code.float() * e8m0_values(scales)).flatten(-2)[..., : x.shape[-1]]


@dataclasses.dataclass(frozen=True)
class _MXFP8(_MX):
    def _encode(
        self, x: torch.Tensor, shared_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales, scaled = _scaled(x, E4M3_MAX)
        return scales, to_e4m3(scaled)


@dataclasses.dataclass(frozen=True)
class _MXFP4(_MX):
    def _encode(
        self, x: torch.Tensor, shared_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales, scaled = _scaled(x, E2M1_MAX)
        # As in ModelOpt, what is not above zero has the sign: 0 is written as -0.
        sign = (scaled <= 0).to(torch.uint8) << 3
        return scales, pack_codes(_e2m1_codes(scaled.abs_()) | sign)

    def _decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        values = e2m1_values(codes.device)
        return torch.cat((values, 0 - values))[unpack_codes(codes).int()]


def e8m0_values(scales: torch.Tensor) -> torch.Tensor:
    """Bytes -> 2^(byte - 127) in float32; 255 is NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def e8m0_scales(amax: torch.Tensor, element_max: float) -> torch.Tensor:
    """Return the bytes of the smallest 2^e, e >= -127, with amax <= element_max x 2^e.

    Args:
        amax: finite float32 magnitudes. element_max: 448 or 6, a float32.
    """
    mantissa, exponent = math.frexp(element_max)
    bits = amax.view(torch.int32)
    above = (bits & 0x7FFFFF) > int((2 * mantissa - 1) * 2**23)
    return ((bits >> 23) - (exponent - 1) + above).clamp(0, 254).to(torch.uint8)


def _e2m1_codes(magnitude: torch.Tensor) -> torch.Tensor:
    """Round float32 magnitudes up to 6 to codes 0 to 7; a tie goes to the lower one."""

    # ceil(x - 0.5) is the nearest integer, ties down. Steps are 0.5 below 2, 1 below 4, and 2.
    def steps(size: float, first: int) -> torch.Tensor:
        return (magnitude / size).sub_(0.5).ceil_().add_(first)

    codes = torch.minimum(torch.minimum(steps(0.5, 0), steps(1.0, 2)), steps(2.0, 4))
    return codes.to(torch.uint8)


def _scaled(x: torch.Tensor, element_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, K] -> scale bytes [R, K / 32] and x / scale [R, K] in float32, which is exact."""
    scales = e8m0_scales(block_amax(x, 1, BLOCK).float(), element_max)
    scaled = x.to(torch.float32, copy=True)
    return scales, multiply_blocks(scaled, e8m0_values(254 - scales), BLOCK)


MXFP8 = _MXFP8("mxfp8", Part(torch.float8_e4m3fn, 1), Part(torch.uint8, BLOCK), False, BLOCK)
MXFP4 = _MXFP4("mxfp4", Part(torch.uint8, 2), Part(torch.uint8, BLOCK), False, BLOCK)
