"""NVFP4Linear and FP8Linear: quantised Linears of a checkpoint, kept packed.

The forward decodes the whole weight in float32, casts it once and calls torch's linear: plain torch
operations, which torch.compile captures. Activations are never quantised, so input_scale is kept
for whoever wants it and not used. Not handled: training, kernels of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .errors import must
from .formats import NVFP4
from .saving import PackedModule

__all__ = ["FP8Linear", "NVFP4Linear"]

FP8 = torch.float8_e4m3fn
Buffers = dict[str, tuple[torch.Tensor, torch.dtype, tuple[tuple[int, ...], ...]]]


class _PackedLinear(PackedModule):
    """What both have in common: buffers that a cast of the model moves but never converts."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    in_features: int
    out_features: int

    def _hold(self, buffers: Buffers) -> None:
        device = buffers["weight"][0].device
        for name, (tensor, dtype, shapes) in buffers.items():
            shape = tuple(tensor.shape)
            if tensor.dtype != dtype or shape not in shapes or tensor.device != device:
                rule = " or ".join(str(list(s)) for s in shapes)
                must(
                    f"{type(self).__name__}: {name}",
                    f"be {dtype} {rule} on {device}",
                    f"{tensor.dtype} {list(shape)} on {tensor.device}",
                    "Pass the tensors of one Linear as the checkpoint holds them.",
                )
            self.register_buffer(name, tensor.detach())

    def _hold_optional(self, bias: torch.Tensor | None, input_scale: torch.Tensor | None) -> None:
        if bias is not None and (not bias.is_floating_point() or bias.element_size() < 2):
            must(
                f"{type(self).__name__}: bias",
                "be bfloat16, float16 or float32",
                bias.dtype,
                "Cast it first.",
            )
        buffers: Buffers = {"weight": (self.weight, self.weight.dtype, (tuple(self.weight.shape),))}
        if bias is not None:
            buffers["bias"] = (bias, bias.dtype, ((self.out_features,),))
        if input_scale is not None:
            buffers["input_scale"] = (input_scale, torch.float32, ((),))
        self._hold(buffers)
        for name, tensor in (("bias", bias), ("input_scale", input_scale)):
            if tensor is None:
                self.register_buffer(name, None)

    def _apply(self, fn, recurse: bool = True):
        for name, tensor in self._buffers.items():
            if tensor is None:
                continue
            result = fn(tensor)
            # A cast would destroy codes and scales; only the bias is an ordinary number.
            keep = name == "bias" or result.dtype == tensor.dtype
            self._buffers[name] = result if keep else tensor.to(result.device)
        return self

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight [out, in]; products in float32, one cast."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [..., in] x weight^T + bias, in hidden's dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.dequantized(hidden.dtype), bias)

    def extra_repr(self) -> str:
        """One line: sizes and bias."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class NVFP4Linear(_PackedLinear):
    """A Linear whose weight stays NVFP4; `state_dict` holds ModelOpt's names.

    A forward makes a temporary of 12 bytes an element of the weight.

    Args:
        weight: [out, in / 2] uint8, low nibble = even element; in is a multiple of 16.
        weight_scale: [out, in / 16] float8_e4m3fn.
        weight_scale_2: 0-d float32, the global scale (decode multiplier).
        bias: [out] float, or None.
        input_scale: 0-d float32, kept but not used, or None.

    Raises:
        ShapeError: a shape, dtype or device does not fit; names the argument.
    """

    weight_scale_2: torch.Tensor
    codes: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        columns = weight_scale.shape[-1] if weight_scale.ndim else 0
        rows = weight.shape[0] if weight.ndim else 0
        self.in_features, self.out_features = columns * NVFP4.block_size, rows
        packed = (rows, NVFP4.packed_columns(self.in_features))
        self._hold(
            {
                "weight": (weight, torch.uint8, (packed,)),
                "weight_scale": (weight_scale, NVFP4.scale_dtype, ((rows, columns),)),
                "weight_scale_2": (weight_scale_2, torch.float32, ((),)),
            }
        )
        self._hold_optional(bias, input_scale)
        # Code 8, minus zero, decodes to +0, as in ModelOpt.
        grid = torch.tensor(NVFP4.grid, dtype=torch.float32, device=weight.device)
        values = torch.cat((grid, 0 - grid))
        self.register_buffer("codes", values, persistent=False)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight [out, in]: e2m1 x (block scale x global scale) in float32, one cast."""
        pairs = torch.stack((self.weight & 15, self.weight >> 4), -1).int()
        values = self.codes[pairs].view(self.out_features, -1, NVFP4.block_size)
        step = self.weight_scale.float() * self.weight_scale_2
        return (values * step.unsqueeze(-1)).flatten(1).to(dtype)


class FP8Linear(_PackedLinear):
    """A Linear whose weight stays e4m3 with one scale, or one per output row.

    Args:
        weight: [out, in] float8_e4m3fn.
        weight_scale: float32 decode multiplier, 0-d or [out, 1].
        bias: [out] float, or None.
        input_scale: 0-d float32, kept but not used, or None.

    Raises:
        ShapeError: a shape, dtype or device does not fit; names the argument.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        self.in_features, self.out_features = columns, rows
        self._hold(
            {
                "weight": (weight, FP8, ((rows, columns),)),
                "weight_scale": (weight_scale, torch.float32, ((), (rows, 1))),
            }
        )
        self._hold_optional(bias, input_scale)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight [out, in]: e4m3 x scale in float32, one cast."""
        return (self.weight.float() * self.weight_scale).to(dtype)
