"""PackedLinear, NVFP4Linear and FP8Linear: quantised Linears of a checkpoint, kept packed.

On compute capability 8.0 and newer the forward is `torch.ops.fp4moe.linear`; elsewhere it decodes
the whole weight in float32, casts it once and calls torch's linear. Activations are not quantised,
but by kernel "flashinfer", which nothing chooses by itself; input_scale is kept and not used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .errors import check_choice, must
from .formats import FORMATS, WeightFormat
from .formats.base import as_bytes
from .kernels.linear import prepare_linear, restore_linear, select_linear_kernel
from .kernels.linear_weight import LinearWeight, linear_shapes
from .linear_op import linear_operator
from .logical import Lent, logical_tensor
from .prepared import PREPARED, PreparedModule

__all__ = ["FP8Linear", "NVFP4Linear", "PackedLinear", "packed_linear"]

# What the parts of a stored matrix are called here: ModelOpt's names.
NAMES = {"packed": "weight", "block_scale": "weight_scale", "global_scale": "weight_scale_2"}


class PackedLinear(PreparedModule):
    """A Linear whose weight stays as a number format stores it; `state_dict` has ModelOpt's names.

    A cast of the model moves codes and scales but never converts them. The input gets a gradient,
    the weight does not. A float32 input is never rounded: it is multiplied with a float32 copy of
    the weight, which is made at each call. Kernel "reference" does so with every input. The copy
    takes up to 12 bytes for each element of the weight. With float16 inputs, MX weights beyond the
    range of float16 overflow, see `kernels.triton.decode_fp8`.

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
        kernel: "triton", "flashinfer" (NVFP4, quantises its input, too), "reference", or "auto" for
            what the device has, decided again when the module moves.

    Raises:
        UnsupportedError: there is no such format or kernel, or the kernel does not run there.
        ShapeError: a shape, dtype or device does not fit; names the argument.
    """

    prepared_weight: torch.Tensor
    prepared_weight_scale: torch.Tensor
    # Of size 0, for what a Linear does not have.
    prepared_absent: torch.Tensor
    weight_scale_2: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None

    weight = logical_tensor("weight")
    weight_scale = logical_tensor("weight_scale")

    _castable = frozenset({"bias"})

    def __init__(
        self,
        format: str,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_2: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        *,
        kernel: str = "auto",
    ):
        super().__init__()
        check_choice("format", format, FORMATS, caller=type(self).__name__)
        self.format = format
        self.requested_kernel = kernel
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        self.in_features, self.out_features = self.number_format.elements(columns), rows
        given = {"packed": weight, "block_scale": weight_scale, "global_scale": weight_scale_2}
        for part, (dtype, shape) in linear_shapes(format, rows, self.in_features).items():
            if (tensor := given[part]) is not None:
                if part == "global_scale" and not self.number_format.globally_scaled:
                    rule = f"be None, since {format} has no global scale"
                    self._refuse("weight_scale_2", rule, f"{list(tensor.shape)}")
                self._check(NAMES[part], tensor, dtype, shape, weight.device)
            elif part != "global_scale" or self.number_format.globally_scaled:
                self._refuse(NAMES[part], f"be {dtype} {list(shape)}", "None")
        for name, tensor in (("bias", bias), ("input_scale", input_scale)):
            if tensor is None:
                continue
            floats = tensor.is_floating_point() and tensor.element_size() > 1
            if name == "bias" and not floats:
                self._refuse(name, "be bfloat16, float16 or float32", tensor.dtype)
            dtype = tensor.dtype if name == "bias" else torch.float32
            self._check(name, tensor, dtype, (rows,) if name == "bias" else (), weight.device)
        others = {"weight_scale_2": weight_scale_2, "bias": bias, "input_scale": input_scale}
        for name in others:
            self.register_buffer(name, None)
        state = {name: tensor for name, tensor in others.items() if tensor is not None}
        state |= {"weight": weight, "weight_scale": weight_scale}
        self._take_state(state, self._select_kernel(weight.device))

    @property
    def number_format(self) -> WeightFormat:
        """The number format of the weight."""
        return FORMATS[self.format]

    def _check(
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

    def _refuse(self, name: str, rule: str, got: object) -> None:
        advice = "Pass the tensors of one Linear as the checkpoint holds them."
        must(f"{type(self).__name__}: {name}", rule, got, advice)

    def _device(self) -> torch.device:
        return self.prepared_weight.device

    def _select_kernel(self, device: torch.device) -> str:
        return select_linear_kernel(
            self.requested_kernel, device, self.format, caller=type(self).__name__
        )

    @property
    def prepared(self) -> LinearWeight:
        """What the kernel reads."""
        return LinearWeight(
            self.prepared_weight,
            self.prepared_weight_scale,
            self.prepared_absent if self.weight_scale_2 is None else self.weight_scale_2,
            self.format,
            self.out_features,
            self.in_features,
        )

    def _logical(self, prepared: LinearWeight) -> dict[str, torch.Tensor]:
        """Return codes and block scales as the checkpoint has them."""
        both = restore_linear(self.kernel, prepared)
        dtypes = self.number_format.dtypes()
        parts = zip(("packed", "block_scale"), both, strict=True)
        return {NAMES[part]: tensor.view(dtypes[part]) for part, tensor in parts}

    def _others(self) -> dict[str, torch.Tensor]:
        names = ("weight_scale_2", "bias", "input_scale")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def _state(self) -> dict[str, torch.Tensor]:
        return {**self._logical(self.prepared), **self._others()}

    def _blank_state(self) -> dict[str, torch.Tensor]:
        blank = self.prepared
        codes, scale = blank.packed.to("meta"), blank.block_scale.to("meta")
        return {**self._logical(blank._replace(packed=codes, block_scale=scale)), **self._others()}

    def _read_by_kernel(self) -> tuple[torch.Tensor, ...]:
        return (self.prepared_weight, self.prepared_weight_scale, *self._others().values())

    def _take_state(self, state: dict[str, torch.Tensor], kernel: str) -> None:
        self.kernel = kernel
        for name, tensor in self._prepared_state(state).items():
            held = name.startswith(PREPARED)
            self.register_buffer(name, tensor.detach(), persistent=not held)
        absent = self.prepared_weight.new_empty(0, dtype=torch.float32)
        self.register_buffer(PREPARED + "absent", absent, persistent=False)
        self._lent = Lent()
        self._place = self._device()

    def _prepared_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes, scale = (as_bytes(state[name]) for name in ("weight", "weight_scale"))
        codes, scale = prepare_linear(self.kernel, self.format, codes, scale)
        others = {n: tensor for n, tensor in state.items() if n not in ("weight", "weight_scale")}
        return {PREPARED + "weight": codes, PREPARED + "weight_scale": scale, **others}

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight [out, in]: code x (block scale x global scale) in float32, one cast."""
        weight = self.prepared
        packed, scale = restore_linear(self.kernel, weight)
        return weight._replace(packed=packed, block_scale=scale).decoded(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden [..., in] x weight^T + bias, in hidden's dtype, or autocast's."""
        if not torch.compiler.is_compiling() and self.prepared_weight.device != self._place:
            self._choose_again()
        trained = torch.is_grad_enabled() and hidden.requires_grad
        if self.kernel == "reference" and not trained:
            # Plain operations, which torch.compile fuses with what stands around them. Autograd
            # would keep the float weight; the operator saves codes.
            bias = None if self.bias is None else self.bias.to(hidden.dtype)
            return F.linear(hidden, self.prepared.decoded(hidden.dtype), bias)
        if not torch.compiler.is_compiling() and self._lent.marks:
            self._lent.check(self)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        weight = self.prepared
        return linear_operator(
            hidden,
            *weight[:3],
            self.prepared_absent if self.bias is None else self.bias,
            self.format,
            self.kernel,
            self.out_features,
        )

    def extra_repr(self) -> str:
        """One line: sizes, bias and format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, kernel={self.kernel}"
        )


class NVFP4Linear(PackedLinear):
    """A Linear whose weight stays NVFP4; `state_dict` holds ModelOpt's names.

    Args:
        weight: [out, in / 2] uint8, low nibble = even element; in is a multiple of 16.
        weight_scale: [out, in / 16] float8_e4m3fn.
        weight_scale_2: 0-d float32, the global scale (decode multiplier).
        bias: [out] float, or None.
        input_scale: 0-d float32, kept but not used, or None.
        kernel: as for PackedLinear.

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
        *,
        kernel: str = "auto",
    ):
        scales = weight_scale, weight_scale_2
        super().__init__("nvfp4", weight, *scales, bias, input_scale, kernel=kernel)


class FP8Linear(PackedLinear):
    """A Linear whose weight stays e4m3 with one scale, or one per output row.

    Args:
        weight: [out, in] float8_e4m3fn.
        weight_scale: float32 decode multiplier, 0-d or [out, 1].
        bias: [out] float, or None.
        input_scale: 0-d float32, kept but not used, or None.
        kernel: as for PackedLinear.

    Raises:
        ShapeError: a shape, dtype or device does not fit; names the argument.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        *,
        kernel: str = "auto",
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
        super().__init__(format, weight, weight_scale, None, bias, input_scale, kernel=kernel)


def packed_linear(
    format: str, weight: torch.Tensor, scale: torch.Tensor, *others, kernel: str = "auto"
) -> PackedLinear:
    """Return a Linear of the class that bears the format's name; others as for PackedLinear.

    scale: block scales as `WeightFormat.shapes` has them; one number may have axes of one element.
    """
    if format in ("fp8", "fp8_channel"):
        scale = scale.reshape(()) if format == "fp8" else scale
        return FP8Linear(weight, scale, *others[1:], kernel=kernel)
    if format == "nvfp4":
        return NVFP4Linear(weight, scale, *others, kernel=kernel)
    return PackedLinear(format, weight, scale, *others, kernel=kernel)
