"""How a quantised Linear is computed: which kernel, its layout and the way back, one call.

triton      compute capability 8.0 or newer: weights are decoded in registers
flashinfer  10.x and 12.x, NVFP4, by name alone: the input is quantised, too; not run there yet
reference   any device: a decoded copy at each call, and torch's own product
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..errors import check_choice, refuse
from ..layer import capability_name
from .base import current_capability
from .flashinfer import linear as flashinfer
from .linear_weight import LinearWeight, linear_shapes
from .triton import linear as triton
from .triton.kernel import TRITON, interpreted

__all__ = [
    "LINEAR_KERNELS",
    "decode_linear_weight",
    "linear_operands",
    "multiply",
    "prepare_linear",
    "restore_linear",
    "select_linear_kernel",
]

LINEAR_KERNELS = ("triton", "flashinfer", "reference")


def select_linear_kernel(
    kernel: str, device: torch.device, format: str | None = None, *, caller: str
) -> str:
    """Return one of LINEAR_KERNELS; kernel: its name, or "auto" for what the device has.

    Args:
        format: of the weight; None does not ask whether the kernel has it.

    Raises:
        UnsupportedError: there is no such kernel, or it does not run there.
    """
    check_choice("kernel", kernel, ("auto", *LINEAR_KERNELS), caller=caller)
    if kernel == "reference" or device.type == "meta":
        return "reference" if kernel == "auto" else kernel
    capability = current_capability(device)
    if kernel == "flashinfer":
        if why := flashinfer.linear_reasons(format, capability):
            refuse(caller, "kernel flashinfer cannot run", "; ".join(why), 'Pass kernel="auto".')
        return kernel
    reasons = list(TRITON.package_reasons())
    if not reasons and not TRITON.devices.include(capability) and not interpreted():
        reasons = [f"needs compute capability {TRITON.devices}, got {capability_name(capability)}"]
    if kernel == "auto":
        return "reference" if reasons or device.type != "cuda" else "triton"
    if reasons:
        refuse(caller, "kernel triton cannot run", "; ".join(reasons), 'Pass kernel="auto".')
    return kernel


def prepare_linear(
    kernel: str, format: str, packed: torch.Tensor, block_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and block scales of the logical layout as a kernel reads them, as bytes."""
    if kernel == "reference":
        return packed, block_scale
    if kernel == "flashinfer":
        return flashinfer.to_prepared(packed, block_scale)
    return triton.to_prepared(format, packed, block_scale)


def restore_linear(kernel: str, weight: LinearWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `prepare_linear`, bit for bit."""
    if kernel == "reference":
        return weight.packed, weight.block_scale
    if kernel == "flashinfer":
        return flashinfer.from_prepared(weight)
    return triton.from_prepared(weight)


@functools.lru_cache(4096)
def linear_operands(
    kernel: str, format: str, rows: int, columns: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of what `prepare_linear` returns, and of the global scale."""
    if kernel == "triton":
        rows, columns = triton.padded(rows), triton.padded(columns)
    if kernel == "flashinfer":
        if why := flashinfer.linear_reasons(format, flashinfer.DEVICES.listed[0]):
            refuse("linear", "kernel flashinfer cannot run", "; ".join(why), "Pass another kernel.")
        rows, columns = flashinfer.padded(rows, columns)
    return {
        part: (torch.uint8 if dtype.itemsize == 1 else dtype, shape)
        for part, (dtype, shape) in linear_shapes(format, rows, columns).items()
    }


def multiply(
    kernel: str, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x [T, K] weight^T + bias [T, N] in x's dtype, T > 0."""
    if kernel == "triton":
        return triton.run_linear(x, weight, bias)
    if kernel == "flashinfer":
        return flashinfer.run_linear(x, weight, bias)
    return F.linear(x, weight.decoded(x.dtype), None if bias is None else bias.to(x.dtype))


def decode_linear_weight(kernel: str, weight: LinearWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K], computed in float32 and rounded once."""
    if kernel == "triton":
        return triton.decode_weight(weight, dtype)
    packed, scale = restore_linear(kernel, weight)
    return weight._replace(packed=packed, block_scale=scale).decoded(dtype)
