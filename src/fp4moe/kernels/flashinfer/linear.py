"""FlashInfer's `mm_fp4` for an NVFP4 Linear, on compute capability 10.x and 12.x: layout and call.

The input is rounded to bfloat16 (float16 stays) and quantised to NVFP4 at each call, as the kernels
of the experts do; its global scale is the largest magnitude of that input / 2688, found on the
device. So a row's result depends on the rows beside it. Not run on such hardware yet. Source:
FlashInfer 0.6.13 and 0.7.2, gemm_base.py and fp4_gemm_cutlass.cu.
"""

from __future__ import annotations

import torch

from ...errors import refuse
from ...formats import FORMATS, NVFP4
from ...layer import capability_name
from ...padding import round_up
from ..base import current_capability
from ..devices import Devices
from ..linear_weight import LinearWeight, linear_shapes
from .block_scales import deinterleave_128x4, interleave_128x4
from .library import library, library_reasons

__all__ = ["DEVICES", "from_prepared", "linear_reasons", "padded", "run_linear", "to_prepared"]

DEVICES = Devices(((10, 0), (10, 3), (12, 0), (12, 1)))
# The library takes rows and columns by 32. At these, block scales are whole tiles of 128 x 4.
ROWS, COLUMNS = 128, 64
# The one that runs on all of them and takes rows in the model's order.
BACKEND = "cutlass"
HALF_DTYPES = (torch.bfloat16, torch.float16)


def linear_reasons(format: str | None, capability: tuple[int, int] | None) -> list[str]:
    """Return why it cannot run a Linear of that format there; empty where it can."""
    if format not in (None, NVFP4.name):
        return [f"it has no layout for {format}, only for {NVFP4.name}"]
    return DEVICES.reasons(capability) or list(library_reasons())


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Return rows and columns of a prepared weight."""
    return round_up(rows, ROWS), round_up(columns, COLUMNS)


def to_prepared(
    packed: torch.Tensor, block_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad codes [N, K/2] and block scales [N, K/16], both as bytes, and interleave the scales."""
    rows, columns = packed.shape[0], FORMATS[NVFP4.name].elements(packed.shape[1])
    sizes = padded(rows, columns)
    codes = packed.new_zeros(sizes[0], sizes[1] // 2)
    codes[:rows, : packed.shape[1]] = packed
    scale = block_scale.new_zeros(sizes[0], sizes[1] // NVFP4.block_size)
    scale[:rows, : block_scale.shape[1]] = block_scale
    return codes, interleave_128x4(scale[None])[0]


def from_prepared(weight: LinearWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `to_prepared`: codes and block scales as bytes, bit for bit; fresh tensors."""
    shapes = linear_shapes(weight.format, weight.rows, weight.columns)
    rows, width = shapes["packed"][1]
    sizes = padded(weight.rows, weight.columns)
    linear = (sizes[0], sizes[1] // NVFP4.block_size)
    scale = deinterleave_128x4(weight.block_scale[None], *linear)[0]
    columns = shapes["block_scale"][1][1]
    return weight.packed[:rows, :width].clone(), scale[:rows, :columns].clone()


def run_linear(x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] weight^T + bias [T, N] in x's dtype, T > 0; x rounded to NVFP4.

    Summed in float32, rounded to bfloat16 (float16 for float16), then the bias is added.

    Raises:
        UnsupportedError: x is on another device than DEVICES.
    """
    capability = current_capability(x.device)
    if not DEVICES.include(capability):
        refuse(
            "linear",
            "kernel flashinfer cannot run",
            f"x is on {x.device} ({capability_name(capability)}), and the kernel needs a device of "
            f"compute capability {DEVICES}",
            "Prepare the weight for another kernel.",
        )
    dtype = x.dtype if x.dtype in HALF_DTYPES else torch.bfloat16
    rows = x.new_zeros(x.shape[0], padded(0, weight.columns)[1], dtype=dtype)
    rows[:, : weight.columns] = x
    # Tensors throughout: the host does not wait. All zeros have scale 1, as everywhere here.
    amax = rows.abs().amax().float().reshape(1)
    decode = torch.where(amax == 0, 1.0, amax / NVFP4.activation_range)
    found = library()
    codes, scale = found.call(
        "fp4_quantize", {}, input=rows, global_scale=decode.reciprocal(), is_sf_swizzled_layout=True
    )
    out = found.call(
        "mm_fp4",
        {},
        a=codes,
        b=weight.packed.T,
        a_descale=scale.view(-1, rows.shape[1] // NVFP4.block_size),
        b_descale=weight.block_scale.T,
        alpha=decode * weight.global_scale.reshape(1),
        out_dtype=dtype,
        block_size=NVFP4.block_size,
        use_8x4_sf_layout=False,
        backend=BACKEND,
        use_nvfp4=True,
    )[:, : weight.rows].to(x.dtype)
    return out.contiguous() if bias is None else out + bias.to(x.dtype)
