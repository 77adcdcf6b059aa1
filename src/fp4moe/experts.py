"""ExpertWeights: the logical quantised tensors of one mixture-of-experts layer.

Decides: row order (gate first, then up), one global scale per expert and GEMM, exact zero padding,
slicing.
Not handled here: kernel layouts (each kernel's `prepare`), checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .activations import Activation, get_activation
from .errors import check_choice, must
from .formats import DEFAULT_FORMAT, FORMATS, StoredMatrix, WeightFormat
from .formats.base import SLOTS, as_bytes
from .layer import Layer
from .pack import (
    GATE_UP_LAYOUTS,
    activation_scale,
    gate_and_up,
    oriented,
    quantize_experts,
    split_gate_up,
    stack_biases,
)
from .padding import pad_matrix, round_up, trim_matrix
from .resize import resized, slice_experts, slice_intermediate

__all__ = ["GATE_UP_LAYOUTS", "ExpertWeights", "split_gate_up"]

_GEMMS = ("gate_up", "down")
_BIASES = ("gate_up.bias", "down.bias")


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The quantised experts of one layer, in checkpoint order with linear scales.

    With L local experts, M = 2 * I rows when gated (gate first, then up) or I rows (up), and Hp, Ip
    the padded sizes:

    Attributes:
        gate_up: of [L, M, Hp], the parts that `number_format.shapes(L, M, Hp, 1 + gated)` lists.
            NVFP4: packed [L, M, Hp/2] uint8, block_scale [L, M, Hp/16] e4m3, global_scale [L]
            float32.
        down: the same of [L, Hp, Ip].
        activation: text of an `fp4moe.Activation`, applied to gate (or to up when not
            gated).
        gated: whether gate_up has gate rows.
        hidden_size, intermediate_size: the sizes that the model means, without padding.
        num_experts: experts of the whole layer; L of them are here, from `expert_offset` on.
        expert_offset: global id of the first local expert.
        hidden_scale: float32 [1], decode multiplier of the quantised input (ModelOpt's
            input_scale) in formats with an `activation_range`.
        intermediate_scale: float32 [L], the same for the input of down. 1.0 means uncalibrated.
        format: name of the number format of gate_up and down.
        gate_up_bias, down_bias: float32, as long as the rows of gate_up [L, M] and of down
            [L, H]; None for a layer without biases.
        quantized_activations: as in `Layer`; what a checkpoint says.
    """

    gate_up: StoredMatrix
    down: StoredMatrix
    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_experts: int
    expert_offset: int
    hidden_scale: torch.Tensor
    intermediate_scale: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    format: str = DEFAULT_FORMAT
    quantized_activations: bool = False

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS, caller="ExpertWeights")
        activation = get_activation(self.activation, caller="ExpertWeights")
        activation.check_gate(self.gated, caller="ExpertWeights")
        object.__setattr__(self, "activation", str(activation))
        if self.gate_up.packed.ndim != 3 or self.down.packed.ndim != 3:
            got = f"{list(self.gate_up.packed.shape)} and {list(self.down.packed.shape)}"
            advice = "Build it with ExpertWeights.quantize."
            must("ExpertWeights: gate_up.packed and down.packed", "have 3 axes", got, advice)
        local, rows, _ = self.gate_up.packed.shape
        hidden, intermediate = self.hidden_padded, self.intermediate_padded
        halves = 1 + self.gated
        sizes = (local, halves * intermediate, hidden, halves), (local, hidden, intermediate)
        expected = {
            f"{gemm}.{part}": found
            for gemm, size in zip(_GEMMS, sizes, strict=True)
            for part, found in self.number_format.shapes(*size).items()
        }
        expected |= {
            "hidden_scale": (torch.float32, (1,)),
            "intermediate_scale": (torch.float32, (local,)),
            "gate_up.bias": (torch.float32, (local, rows)),
            "down.bias": (torch.float32, (local, hidden)),
        }
        device = self.gate_up.packed.device
        if (self.gate_up_bias is None) != (self.down_bias is None):
            must(
                "ExpertWeights: gate_up_bias and down_bias",
                "be given both or not at all",
                f"{self.gate_up_bias} and {self.down_bias}",
                "Pass zeros for the one that the layer lacks.",
            )
        for name, tensor in self.tensors().items():
            dtype, shape = expected[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
                rule = f"be {dtype} {list(shape)} on {device}"
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                must(f"ExpertWeights: {name}", rule, got, "Build it with ExpertWeights.quantize.")
        if not (0 < self.hidden_size <= hidden and 0 < self.intermediate_size <= intermediate):
            must(
                "ExpertWeights: hidden_size and intermediate_size",
                f"lie in 1 to the padded {hidden} and {intermediate}",
                f"{self.hidden_size} and {self.intermediate_size}",
                "Pass the unpadded sizes of the model.",
            )
        if not 0 <= self.expert_offset <= self.num_experts - local:
            rule = f"lie in 0..{self.num_experts - local} for {local} of {self.num_experts} experts"
            advice = "Pass the global id of the first local expert."
            must("ExpertWeights: expert_offset", rule, self.expert_offset, advice)

    @property
    def number_format(self) -> WeightFormat:
        """The number format of gate_up and down."""
        return FORMATS[self.format]

    @property
    def local_experts(self) -> int:
        """Number of experts whose weights are here (L)."""
        return self.gate_up.packed.shape[0]

    @property
    def biased(self) -> bool:
        """Whether gate, up and down have biases."""
        return self.gate_up_bias is not None

    @property
    def hidden_padded(self) -> int:
        """Hidden size with padding."""
        return self.number_format.elements(self.gate_up.packed.shape[2])

    @property
    def intermediate_padded(self) -> int:
        """Intermediate size with padding."""
        return self.number_format.elements(self.down.packed.shape[2])

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.gate_up.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by dotted name, in a fixed order."""
        named = {
            f"{gemm}.{part}": tensor
            for gemm in _GEMMS
            for part, tensor in getattr(self, gemm).parts().items()
        }
        scales = ("hidden_scale", "intermediate_scale")
        named |= {name: getattr(self, name) for name in scales}
        if self.gate_up_bias is not None and self.down_bias is not None:
            named |= {"gate_up.bias": self.gate_up_bias, "down.bias": self.down_bias}
        return named

    def operands(self) -> dict[str, torch.Tensor]:
        """Return the tensors as the operator takes them: 8-bit ones as bytes, dotless names."""
        return {name.replace(".", "_"): as_bytes(t) for name, t in self.tensors().items()}

    def metadata(self) -> dict[str, Any]:
        """Return what is not a tensor, as plain JSON values."""
        return self.layer().metadata()

    def layer(self, top_k: int | None = None) -> Layer:
        """Return what a kernel is asked to run, with so many experts a token."""
        return Layer(
            self.activation,
            self.gated,
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            top_k,
            self.expert_offset,
            self.format,
            self.biased,
            self.quantized_activations,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and metadata in one dictionary; `from_state_dict` reads it."""
        return {**self.tensors(), "metadata": self.metadata()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ExpertWeights:
        """Build the weights from `state_dict()`.

        Raises:
            ShapeError: a tensor or the metadata is missing, unexpected or does not fit.
        """
        metadata = dict(state.get("metadata", {}))
        names = {f"{gemm}.{part}" for gemm in _GEMMS for part in SLOTS}
        names |= {"hidden_scale", "intermediate_scale"}
        given = set(state) - {"metadata"}
        names |= given & set(_BIASES)
        if given != names or metadata.get("format") not in FORMATS:
            must(
                "ExpertWeights.from_state_dict: state",
                f"hold {sorted(names)} and metadata with a format of {', '.join(FORMATS)}",
                f"{state.get('metadata')}, without {names - given}, with {given - names}",
                "Pass what ExpertWeights.state_dict returned.",
            )
        return cls.from_tensors({name: state[name] for name in names}, metadata)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]
    ) -> ExpertWeights:
        """Build from `tensors()` and `metadata()` (its format entry is optional)."""
        fields = {"format": DEFAULT_FORMAT, **metadata}
        check_choice("format", fields["format"], FORMATS, caller="ExpertWeights.from_tensors")
        container = FORMATS[fields["format"]].container
        gate_up, down = (container(*(tensors[f"{g}.{part}"] for part in SLOTS)) for g in _GEMMS)
        return cls(
            gate_up=gate_up,
            down=down,
            hidden_scale=tensors["hidden_scale"],
            intermediate_scale=tensors["intermediate_scale"],
            gate_up_bias=tensors.get("gate_up.bias"),
            down_bias=tensors.get("down.bias"),
            **fields,
        )

    @classmethod
    def quantize(
        cls,
        *,
        down: torch.Tensor,
        up: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        gate_up: torch.Tensor | None = None,
        activation: str | Activation,
        format: str = DEFAULT_FORMAT,
        layout: str = "gate_up",
        transposed: bool = False,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        hidden_scale: float = 1.0,
        intermediate_scale: float | torch.Tensor = 1.0,
        method: str = "max",
        num_experts: int | None = None,
        expert_offset: int = 0,
    ) -> ExpertWeights:
        """Quantise the float weights of one layer, one expert at a time.

        Args:
            down: [L, H, I], any float dtype.
            up: [L, I, H]; with `gate` of the same shape the layer is gated.
            gate: [L, I, H] or None.
            gate_up: [L, 2 * I, H] instead of gate and up; `layout` says how its rows are ordered.
            activation: an `fp4moe.Activation`, or its name or text.
            format: a name of `fp4moe.formats.FORMATS`.
            layout: "gate_up", "up_gate", "gate_up_interleaved" (row 0 gate, row 1 up, ...) or
                "up_gate_interleaved".
            transposed: the weights are stored as [L, H, I] (up), [L, H, 2 * I] (gate_up) and [L, I,
                H] (down).
            gate_bias: [L, I], any float dtype. A bias that is left out is zero if another is given.
            up_bias: [L, I].
            gate_up_bias: [L, 2 * I] instead of these two, ordered as `layout` says.
            down_bias: [L, H].
            hidden_scale: decode multiplier of the quantised input, for formats with an
                `activation_range`; 1.0 = uncalibrated.
            intermediate_scale: the same for the input of down, one float or [L].
            method: one that the format has: "max", or for NVFP4 "mse", see `quantize_nvfp4`.
            num_experts: experts of the whole layer; default L.
            expert_offset: global id of the first expert given.

        Returns:
            Weights, H and I zero-padded to the format's multiple. Gate and up share what an
            expert has one of: NVFP4's global scale, FP8's scale.

        Raises:
            ShapeError: shapes, dtypes or devices disagree, or a value is inf or NaN; names the
                argument.
            UnsupportedError: an unknown name; a method or a scale that the format does not have.
        """
        activation = get_activation(activation, caller="ExpertWeights.quantize")
        check_choice("format", format, FORMATS, caller="ExpertWeights.quantize")
        parts = gate_and_up(up, gate, gate_up, layout, transposed)
        down = oriented(down, transposed)
        activation.check_gate(len(parts) == 2, caller="ExpertWeights.quantize")
        scheme = FORMATS[format]
        first, second = quantize_experts(scheme, parts, down, method)
        experts, intermediate, hidden = parts["up"].shape
        given = (gate_bias, up_bias, gate_up_bias, down_bias)
        biases = stack_biases(scheme, parts, down, *given, layout)
        return cls(
            gate_up=first,
            down=second,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            format=format,
            activation=str(activation),
            gated=len(parts) == 2,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_experts=experts if num_experts is None else num_experts,
            expert_offset=expert_offset,
            hidden_scale=activation_scale(format, "hidden_scale", hidden_scale, 1, down.device),
            intermediate_scale=activation_scale(
                format, "intermediate_scale", intermediate_scale, experts, down.device
            ),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return {"gate" (gated only), "up": [L, I, H], "down": [L, H, I]} without padding.

        With biases also "gate_bias" (gated only), "up_bias": [L, I] and "down_bias": [L, H].
        """
        format, names = self.number_format, ("gate", "up") if self.gated else ("up",)
        rows = format.dequantize(self.gate_up, dtype, len(names))[..., : self.hidden_size]
        halves = zip(names, rows.split(self.intermediate_padded, 1), strict=True)
        named = {name: half[:, : self.intermediate_size] for name, half in halves}
        down = format.dequantize(self.down, dtype)
        named["down"] = down[:, : self.hidden_size, : self.intermediate_size]
        return named | self.biases(dtype)

    def biases(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return what `dequantize` adds for biases; nothing without them."""
        if self.gate_up_bias is None or self.down_bias is None:
            return {}
        names = ("gate_bias", "up_bias") if self.gated else ("up_bias",)
        halves = self.gate_up_bias.to(dtype).split(self.intermediate_padded, 1)
        found = zip(names, halves, strict=True)
        named = {name: half[:, : self.intermediate_size] for name, half in found}
        return named | {"down_bias": self.down_bias.to(dtype)[:, : self.hidden_size]}

    def padded(self, *, hidden_multiple: int = 1, intermediate_multiple: int = 1) -> ExpertWeights:
        """Zero-pad H and I to multiples; exact, since padded codes are zero.

        Gate and up are padded each on its own, so that their boundary stays in the middle.
        """
        for name, multiple in (
            ("hidden_multiple", hidden_multiple),
            ("intermediate_multiple", intermediate_multiple),
        ):
            if multiple < 1 or (multiple > 1 and multiple % self.number_format.multiple):
                rule = f"be a multiple of {self.number_format.multiple}"
                must(f"ExpertWeights.padded: {name}", rule, multiple, "Round it up.")
        hidden = round_up(self.hidden_padded, hidden_multiple)
        intermediate = round_up(self.intermediate_padded, intermediate_multiple)
        return resized(self, pad_matrix, hidden, intermediate)

    def unpadded(self) -> ExpertWeights:
        """Undo `padded`: cut H and I to hidden_size and intermediate_size, rounded up.

        What is cut off is taken to be zero and not looked at: the host does not wait for a device.
        """
        multiple = self.number_format.multiple
        hidden = round_up(self.hidden_size, multiple)
        intermediate = round_up(self.intermediate_size, multiple)
        return resized(self, trim_matrix, hidden, intermediate)

    def slice_experts(self, start: int, stop: int) -> ExpertWeights:
        """Return local experts start..stop-1 as views; ids stay global through expert_offset."""
        return slice_experts(self, start, stop)

    def slice_intermediate(self, start: int, stop: int) -> ExpertWeights:
        """Return intermediate columns start..stop-1; the outputs of all slices sum to the whole.

        The slice that starts at 0 keeps the bias of down, the others have zeros.
        """
        return slice_intermediate(self, start, stop)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """Return the weights on another device."""
        return ExpertWeights.from_tensors(
            {k: v.to(device) for k, v in self.tensors().items()}, self.metadata()
        )
