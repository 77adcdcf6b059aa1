"""The weight of one quantised Linear, as a kernel reads it, and its values in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import FORMATS
from ..formats.base import as_bytes
from ..formats.four_bits import e2m1_values, unpack_codes
from ..formats.mx import e8m0_values

__all__ = ["LinearWeight", "linear_shapes"]


class LinearWeight(NamedTuple):
    """Codes and scales of a weight [rows, columns].

    Attributes:
        packed: codes [rows, bytes of a row].
        block_scale: bytes [rows, blocks], float32 [rows, 1] (fp8_channel), float32
            [rows / 128, columns / 128], rounded up (fp8_block), or float32 [] (fp8).
        global_scale: one float32, or of size 0 for a format that has none.
        format: a name of `fp4moe.formats.FORMATS`.
        rows, columns: the Linear's sizes; a kernel's layout may be padded.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    format: str
    rows: int
    columns: int

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of the logical layout [rows, columns].

        Code x (block scale x global scale) in float32, one cast; plain operations, which
        torch.compile captures and a CUDA graph, too.
        """
        format, size = FORMATS[self.format], (self.rows, self.columns)
        if format.codes.columns == 2:
            # Code 8, minus zero, decodes to +0, as in ModelOpt.
            grid = e2m1_values(self.packed.device)
            values = torch.cat((grid, 0 - grid))[unpack_codes(self.packed).int()]
        else:
            values = self.packed.view(format.codes.dtype).float()
        assert format.scales is not None
        scale = as_bytes(self.block_scale)
        if format.scales.dtype == torch.uint8:
            step = e8m0_values(scale)
        else:
            step = scale.view(format.scales.dtype).float()
        if format.globally_scaled:
            step = step * self.global_scale.reshape(())
        if step.ndim and tuple(step.shape) != (size[0], 1):
            down, across = format.scales.rows or size[0], format.scales.columns or size[1]
            if (step.shape[0] * down, step.shape[1] * across) == size:
                blocks = values.view(step.shape[0], down, step.shape[1], across)
                return (blocks * step[:, None, :, None]).view(size).to(dtype)
            step = step.repeat_interleave(down, 0)[: size[0]]
            step = step.repeat_interleave(across, 1)[:, : size[1]]
        return (values * step).to(dtype)


def linear_shapes(
    format: str, rows: int, columns: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of codes, block scale and global scale; one number is 0-d."""
    known = FORMATS[format]
    shapes = known.shapes(1, rows, columns)
    found = {part: (dtype, shape[1:] or ()) for part, (dtype, shape) in shapes.items()}
    if known.scales and known.scales.rows is None and known.scales.columns is None:
        found["block_scale"] = (known.scales.dtype, ())
    if not known.globally_scaled:
        found["global_scale"] = (torch.float32, (0,))
    return found
