"""PackedLinear, NVFP4Linear and FP8Linear: quantised Linears of a checkpoint, kept packed.

The forward decodes the whole weight in float32, casts it once and calls torch's linear: plain torch
operations, which torch.compile captures. Activations are never quantised, so input_scale is kept
for whoever wants it and not used. Not handled: training, kernels of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .errors import check_choice, must
from .formats import FORMATS, WeightFormat
from .formats.four_bits import e2m1_values, unpack_codes
from .formats.mx import e8m0_values
from .saving import PackedModule

__all__ = ["FP8Linear", "NVFP4Linear", "PackedLinear", "packed_linear"]

# What the parts of a stored matrix are called here: ModelOpt's names.
NAMES = {"packed": "weight", "block_scale": "weight_scale", "global_scale": "weight_scale_2"}


class PackedLinear(PackedModule):
    """A Linear whose weight stays as a number format stores it; `state_dict` has ModelOpt's names.

    A cast of the model moves codes and scales but never converts them. A forward makes temporaries
    of up to 12 bytes an element of the weight.

    Args:
        format: a name of `fp4moe.formats.FORMATS`.
        weight: the codes [out, in], or [out, in / 2] uint8 with two of four bits in a byte; blocks
            of a row are whole.
        weight_scale: the block scales: [out, in / 16] e4m3 (nvfp4), 0-d float32 (fp8), [out, 1]
            float32 (fp8_channel), [out / 128, in / 128] float32, rounded up (fp8_block), or
            [out, in / 32] uint8 (mxfp8, mxfp4).
        weight_scale_2: 0-d float32, the global scale (decode multiplier) of a format that has one.
        bias: [out] float, or None.
        input_scale: 0-d float32, kept but not used, or None.

    Raises:
        UnsupportedError: there is no such format.
        ShapeError: a shape, dtype or device does not fit; names the argument.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None
    codes: torch.Tensor

    def __init__(
        self,
        format: str,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        check_choice("format", format, FORMATS, caller=type(self).__name__)
        self.format = format
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        self.in_features, self.out_features = self.number_format.elements(columns), rows
        given = {"packed": weight, "block_scale": weight_scale, "global_scale": weight_scale_2}
        for part, (dtype, shape) in self._shapes().items():
            if (tensor := given[part]) is not None:
                self._hold(NAMES[part], tensor, dtype, shape, weight.device)
            elif shape != (0,):
                self._refuse(NAMES[part], f"be {dtype} {list(shape)}", "None")
        if weight_scale_2 is not None and not self.number_format.globally_scaled:
            rule = f"be None, since {format} has no global scale"
            self._refuse("weight_scale_2", rule, f"{list(weight_scale_2.shape)}")
        for name, tensor in (("bias", bias), ("input_scale", input_scale)):
            if tensor is None:
                self.register_buffer(name, None)
                continue
            floats = tensor.is_floating_point() and tensor.element_size() > 1
            if name == "bias" and not floats:
                self._refuse(name, "be bfloat16, float16 or float32", tensor.dtype)
            dtype = tensor.dtype if name == "bias" else torch.float32
            self._hold(name, tensor, dtype, (rows,) if name == "bias" else (), weight.device)
        if self.number_format.codes.columns == 2:
            # Code 8, minus zero, decodes to +0, as in ModelOpt.
            grid = e2m1_values(weight.device)
            self.register_buffer("codes", torch.cat((grid, 0 - grid)), persistent=False)

    @property
    def number_format(self) -> WeightFormat:
        """The number format of the weight."""
        return FORMATS[self.format]

    def _shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part; one number for the whole matrix is 0-d."""
        shapes = self.number_format.shapes(1, self.out_features, self.in_features)
        found = {part: (dtype, shape[1:] or ()) for part, (dtype, shape) in shapes.items()}
        scales = self.number_format.scales
        if scales and scales.rows is None and scales.columns is None:
            found["block_scale"] = (scales.dtype, ())
        if not self.number_format.globally_scaled:
            del found["global_scale"]
        return found

    def _hold(
        self,
        name: str,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        scales = self.number_format.scales
        block = scales.columns if scales and scales.rows == 1 and scales.columns else 1
        uneven = name == "weight" and self.in_features % block
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or uneven:
            rule = f"be {dtype} {list(shape)} on {device}"
            rule += f" with whole blocks of {block} columns" * bool(uneven)
            self._refuse(name, rule, f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}")
        self.register_buffer(name, tensor.detach())

    def _refuse(self, name: str, rule: str, got: object) -> None:
        advice = "Pass the tensors of one Linear as the checkpoint holds them."
        must(f"{type(self).__name__}: {name}", rule, got, advice)

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
        """Return the weight [out, in]: code x (block scale x global scale) in float32, one cast."""
        format, size = self.number_format, (self.out_features, self.in_features)
        if format.codes.columns == 2:
            values = self.codes[unpack_codes(self.weight).int()]
        else:
            values = self.weight.float()
        scale = self.weight_scale
        step = e8m0_values(scale) if scale.dtype == torch.uint8 else scale.float()
        if format.globally_scaled:
            step = step * self.weight_scale_2
        if step.ndim and tuple(step.shape) != (size[0], 1):
            assert format.scales is not None
            down, across = format.scales.rows or size[0], format.scales.columns or size[1]
            if (step.shape[0] * down, step.shape[1] * across) == size:
                blocks = values.view(step.shape[0], down, step.shape[1], across)
                return (blocks * step[:, None, :, None]).view(size).to(dtype)
            step = step.repeat_interleave(down, 0)[: size[0]]
            step = step.repeat_interleave(across, 1)[:, : size[1]]
        return (values * step).to(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [..., in] x weight^T + bias, in hidden's dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.dequantized(hidden.dtype), bias)

    def extra_repr(self) -> str:
        """One line: sizes, bias and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


class NVFP4Linear(PackedLinear):
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

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ):
        super().__init__("nvfp4", weight, weight_scale, weight_scale_2, bias, input_scale)


class FP8Linear(PackedLinear):
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
        rows = weight.shape[0] if weight.ndim == 2 else 0
        if weight_scale.ndim and weight_scale.shape != (rows, 1):
            must(
                f"{type(self).__name__}: weight_scale",
                f"be torch.float32 [] or [{rows}, 1] on {weight.device}",
                f"{weight_scale.dtype} {list(weight_scale.shape)} on {weight_scale.device}",
                "Pass the tensors of one Linear as the checkpoint holds them.",
            )
        format = "fp8_channel" if weight_scale.ndim else "fp8"
        super().__init__(format, weight, weight_scale, None, bias, input_scale)


def packed_linear(format: str, weight: torch.Tensor, scale: torch.Tensor, *others) -> PackedLinear:
    """Return a Linear of the class that bears the format's name; others as for PackedLinear.

    scale: block scales as `WeightFormat.shapes` has them; one number may have axes of one element.
    """
    if format in ("fp8", "fp8_channel"):
        scale = scale.reshape(()) if format == "fp8" else scale
        return FP8Linear(weight, scale, *others[1:])
    if format == "nvfp4":
        return NVFP4Linear(weight, scale, *others)
    return PackedLinear(format, weight, scale, *others)
