"""What a number format of stored weights is: its constants, its parts, and how it quantises.

A stored matrix [E, N, K] consists of three tensors at most: codes, block scales, global scale. Only
a format's name crosses an operator's schema.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ..errors import check_choice, refuse

__all__ = ["METHODS", "BlockScaledFormat", "Part", "StoredMatrix", "WeightFormat", "as_bytes"]
__all__ += ["divide"]

SLOTS = ("packed", "block_scale", "global_scale")
# Ways to choose scales: by the largest magnitude, or for the least squared error.
METHODS = ("max", "mse")


def divide(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return x / number, rounded once on every device; CUDA multiplies by a number's reciprocal."""
    return x / torch.full_like(x, number)


class Part(NamedTuple):
    """Codes or block scales of a stored matrix: a grid of entries, the last ones cut off.

    Attributes:
        dtype: of the tensor; one of 8 bits crosses an operator as uint8.
        columns: elements of the contraction axis that one entry covers; None: all of them.
        rows: output rows of gate, of up or of down that one entry covers; None: all of them.
    """

    dtype: torch.dtype
    columns: int | None
    rows: int | None = 1

    def shape(self, experts: int, rows: int, columns: int, halves: int) -> tuple[int, ...]:
        """Return its shape for `halves` matrices [experts, rows / halves, columns], stacked."""
        each = rows // halves
        down = -(-each // (self.rows or max(each, 1)))
        across = -(-columns // (self.columns or max(columns, 1)))
        return (experts, halves * down, across)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of 8-bit elements as uint8, a view; others as they are.

    Float8 cannot be copied, indexed or concatenated everywhere; its bytes can.
    """
    plain = tensor.dtype.itemsize > 1 or tensor.dtype == torch.uint8
    return tensor if plain else tensor.view(torch.uint8)


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """The tensors of one matrix, or of one an expert; an absent part has size 0.

    A plain container, so that an unsupported torch operation fails loudly.
    """

    packed: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in SLOTS}


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """A number format of weights; each has one file here.

    Attributes:
        name: what the format is called in schemas and reports.
        codes: the elements. scales: one factor for each block of elements, or None.
        globally_scaled: whether each expert's matrix has one more factor, float32.
        multiple: what both sizes of a stored matrix are multiples of.
        methods: those of METHODS that it has.
        activation_bits: of an activation that `round_activation` has rounded.
    """

    name: str
    codes: Part
    scales: Part | None
    globally_scaled: bool
    multiple: int
    methods: tuple[str, ...] = dataclasses.field(default=("max",), kw_only=True)
    activation_bits: int = dataclasses.field(default=8, kw_only=True)

    @property
    def weight_bits(self) -> int:
        """Bits of one element, without its scales."""
        return 8 * self.codes.dtype.itemsize // (self.codes.columns or 1)

    def shapes(
        self, experts: int, rows: int, columns: int, halves: int = 1
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return (dtype, shape) of each of SLOTS for a stored matrix [experts, rows, columns].

        Args:
            halves: matrices that the rows consist of, 2 for gate and up; scales lie apart in each.
        """
        size = experts, rows, columns, halves
        absent: tuple[torch.dtype, tuple[int, ...]] = (torch.float32, (0,))
        return {
            "packed": (self.codes.dtype, self.codes.shape(*size)),
            "block_scale": (self.scales.dtype, self.scales.shape(*size)) if self.scales else absent,
            "global_scale": (torch.float32, (experts,)) if self.globally_scaled else absent,
        }

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of each of SLOTS."""
        return {name: dtype for name, (dtype, _) in self.shapes(1, 1, 1).items()}

    def elements(self, packed_columns: int) -> int:
        """Return the elements in a row of so many columns of codes."""
        return packed_columns * (self.codes.columns or 1)

    def check_method(self, method: str, *, caller: str) -> None:
        """Raise UnsupportedError unless the format has that way to choose its scales."""
        check_choice("method", method, METHODS, caller=caller)
        if method not in self.methods:
            what = f"format {self.name} cannot be quantised with method {method!r}"
            reason = "its scales are defined by the largest magnitude alone"
            refuse(caller, what, reason, f"Pass method={self.methods[0]!r}.")

    @property
    def container(self) -> type[StoredMatrix]:
        """The class of stored matrices."""
        return StoredMatrix

    def zeros(
        self,
        experts: int,
        rows: int,
        columns: int,
        halves: int = 1,
        device: torch.device | None = None,
    ) -> StoredMatrix:
        """Return a matrix of zeros: zero bytes are zero codes."""
        parts = {
            name: torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)
            if dtype.itemsize == 1
            else torch.zeros(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in self.shapes(experts, rows, columns, halves).items()
        }
        return self.container(**parts)

    @property
    def activation_range(self) -> float | None:
        """The largest activation that a scale of 1 can express; None: the scale is not stored."""
        return None

    def shared_scale(self, extremes: torch.Tensor) -> torch.Tensor:
        """Return the float32 scale that gate and up of an expert share, 0-d.

        Args:
            extremes: finite float32 values, the smallest and the largest weight among them.
        """
        return torch.ones_like(extremes.reshape(-1)[0])

    def quantize(
        self, weight: torch.Tensor, shared_scale: torch.Tensor, method: str
    ) -> StoredMatrix:
        """Quantise one matrix [rows, columns] whose columns are a multiple of `multiple`.

        Args:
            shared_scale: of `shared_scale`; formats without one ignore it. method: one of
                `methods`.
        """
        raise NotImplementedError

    def dequantize(self, stored: StoredMatrix, dtype: torch.dtype, halves: int = 1) -> torch.Tensor:
        """Return the matrices [..., rows, columns]; halves: those that the rows consist of."""
        raise NotImplementedError

    def round_activation(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Round float32 x [..., K] as kernels of this format round their input.

        Args:
            scale: the decode multiplier; formats that compute theirs from x ignore it.
        """
        raise NotImplementedError

    def round_intermediate(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Round float32 x [..., K] as a first GEMM does that quantises its own output."""
        return self.round_activation(x, scale)


@dataclasses.dataclass(frozen=True)
class BlockScaledFormat(WeightFormat):
    """value = element code x block scale x global scale.

    Attributes:
        grid: the non-negative element values by code; the sign is the next higher bit.
        element_bits: bits of one element, its sign included.
        block_size: elements that share one block scale, along the contraction axis.
        scale_dtype: storage dtype of a block scale.
        scale_min: smallest block scale that a quantiser writes for a block with values.
        scale_max: largest block scale.
    """

    grid: tuple[float, ...]
    element_bits: int
    block_size: int
    scale_dtype: torch.dtype
    scale_min: float
    scale_max: float

    @property
    def element_max(self) -> float:
        """The largest element value."""
        return self.grid[-1]

    @property
    def activation_range(self) -> float:
        """element_max x scale_max."""
        return self.element_max * self.scale_max

    def packed_columns(self, columns: int) -> int:
        """Bytes that hold `columns` elements."""
        return columns * self.element_bits // 8

    def scale_columns(self, columns: int) -> int:
        """Block scales that `columns` elements need."""
        return columns // self.block_size
