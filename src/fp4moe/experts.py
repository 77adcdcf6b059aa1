"""ExpertWeights: the logical NVFP4 tensors of one mixture-of-experts layer.

Decides: row order (gate first, then up), one global scale per expert and GEMM, exact zero padding,
slicing.
Not handled here: kernel layouts (each kernel's `prepare`), checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .activations import get_activation
from .errors import ShapeError, must
from .formats.base import NVFP4
from .formats.nvfp4 import NVFP4Values, dequantize_nvfp4
from .layer import Layer
from .pack import (
    BLOCK,
    GATE_UP_LAYOUTS,
    activation_scale,
    gate_and_up,
    oriented,
    quantize_experts,
    split_gate_up,
)
from .padding import pad_matrix, round_up, trim_matrix

__all__ = ["GATE_UP_LAYOUTS", "ExpertWeights", "split_gate_up"]

_TENSORS = ("packed", "block_scale", "global_scale")


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The quantised experts of one layer, in checkpoint order with linear scales.

    With L local experts, M = 2 * I rows when gated (gate first, then up) or I rows (up), and Hp, Ip
    the padded sizes:

    Attributes:
        gate_up: packed [L, M, Hp/2] uint8, block_scale [L, M, Hp/16] e4m3, global_scale [L]
            float32.
        down: packed [L, Hp, Ip/2], block_scale [L, Hp, Ip/16], global_scale [L].
        activation: a name of `fp4moe.activations.ACTIVATIONS`, applied to gate (or to up when not
            gated).
        gated: whether gate_up has gate rows.
        hidden_size, intermediate_size: the sizes that the model means, without padding.
        num_experts: experts of the whole layer; L of them are here, from `expert_offset` on.
        expert_offset: global id of the first local expert.
        hidden_scale: float32 [1], decode multiplier of the quantised input (ModelOpt's
            input_scale).
        intermediate_scale: float32 [L], the same for the input of down. 1.0 means uncalibrated.
    """

    gate_up: NVFP4Values
    down: NVFP4Values
    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_experts: int
    expert_offset: int
    hidden_scale: torch.Tensor
    intermediate_scale: torch.Tensor

    def __post_init__(self) -> None:
        get_activation(self.activation, caller="ExpertWeights")
        if self.gate_up.packed.ndim != 3 or self.down.packed.ndim != 3:
            must(
                "ExpertWeights: gate_up.packed and down.packed",
                "have 3 axes",
                f"{list(self.gate_up.packed.shape)} and {list(self.down.packed.shape)}",
                "Build it with ExpertWeights.quantize.",
            )
        local, rows, _ = self.gate_up.packed.shape
        hidden, intermediate = self.hidden_padded, self.intermediate_padded
        expected = {
            "gate_up.packed": (local, (1 + self.gated) * intermediate, hidden // 2),
            "gate_up.block_scale": (local, rows, hidden // BLOCK),
            "gate_up.global_scale": (local,),
            "down.packed": (local, hidden, intermediate // 2),
            "down.block_scale": (local, hidden, intermediate // BLOCK),
            "down.global_scale": (local,),
            "hidden_scale": (1,),
            "intermediate_scale": (local,),
        }
        dtypes = {"packed": torch.uint8, "block_scale": NVFP4.scale_dtype}
        device = self.gate_up.packed.device
        for name, tensor in self.tensors().items():
            dtype = dtypes.get(name.rpartition(".")[2], torch.float32)
            if (
                tuple(tensor.shape) != expected[name]
                or tensor.dtype != dtype
                or tensor.device != device
            ):
                must(
                    f"ExpertWeights: {name}",
                    f"be {dtype} {list(expected[name])} on {device}",
                    f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}",
                    "Build it with ExpertWeights.quantize.",
                )
        if not (0 < self.hidden_size <= hidden and 0 < self.intermediate_size <= intermediate):
            must(
                "ExpertWeights: hidden_size and intermediate_size",
                f"lie in 1 to the padded {hidden} and {intermediate}",
                f"{self.hidden_size} and {self.intermediate_size}",
                "Pass the unpadded sizes of the model.",
            )
        if not 0 <= self.expert_offset <= self.num_experts - local:
            must(
                "ExpertWeights: expert_offset",
                f"lie in 0..{self.num_experts - local} for {local} of {self.num_experts} experts",
                self.expert_offset,
                "Pass the global id of the first local expert.",
            )

    @property
    def local_experts(self) -> int:
        """Number of experts whose weights are here (L)."""
        return self.gate_up.packed.shape[0]

    @property
    def hidden_padded(self) -> int:
        """Hidden size with padding."""
        return self.gate_up.packed.shape[2] * 2

    @property
    def intermediate_padded(self) -> int:
        """Intermediate size with padding."""
        return self.down.packed.shape[2] * 2

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
            f"{gemm}.{part}": getattr(getattr(self, gemm), part)
            for gemm in ("gate_up", "down")
            for part in _TENSORS
        }
        return named | {
            "hidden_scale": self.hidden_scale,
            "intermediate_scale": self.intermediate_scale,
        }

    def operands(self) -> dict[str, torch.Tensor]:
        """Return the tensors as the operator takes them: block scales as bytes, dotless names."""
        return {
            name.replace(".", "_"): t.view(torch.uint8) if t.dtype == NVFP4.scale_dtype else t
            for name, t in self.tensors().items()
        }

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
        names = {f"{gemm}.{part}" for gemm in ("gate_up", "down") for part in _TENSORS}
        names |= {"hidden_scale", "intermediate_scale"}
        given = set(state) - {"metadata"}
        if given != names or metadata.pop("format", None) != NVFP4.name:
            raise ShapeError(
                f"ExpertWeights.from_state_dict: state must hold {sorted(names)} and nvfp4 "
                "metadata; missing "
                f"{sorted(names - given)}, unexpected {sorted(given - names)}, metadata "
                f"{state.get('metadata')}. "
                "Pass what ExpertWeights.state_dict returned."
            )
        return cls.from_tensors({name: state[name] for name in names}, metadata)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]
    ) -> ExpertWeights:
        """Build from `tensors()` and `metadata()` (its format entry is optional)."""
        fields = {key: value for key, value in metadata.items() if key != "format"}
        gate_up, down = (
            NVFP4Values(*(tensors[f"{g}.{part}"] for part in _TENSORS)) for g in ("gate_up", "down")
        )
        return cls(
            gate_up=gate_up,
            down=down,
            hidden_scale=tensors["hidden_scale"],
            intermediate_scale=tensors["intermediate_scale"],
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
        activation: str,
        layout: str = "gate_up",
        transposed: bool = False,
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
            activation: a name of `fp4moe.activations.ACTIVATIONS`.
            layout: "gate_up", "up_gate", "gate_up_interleaved" (row 0 gate, row 1 up, ...) or
                "up_gate_interleaved".
            transposed: the weights are stored as [L, H, I] (up), [L, H, 2 * I] (gate_up) and [L, I,
                H] (down).
            hidden_scale: decode multiplier of the quantised input in the W4A4 path; 1.0 =
                uncalibrated.
            intermediate_scale: the same for the input of down, one float or [L].
            method: "max" or "mse", see `quantize_nvfp4`.
            num_experts: experts of the whole layer; default L.
            expert_offset: global id of the first expert given.

        Returns:
            Weights whose H and I are zero-padded to multiples of 16. An expert's gate and up share
            one global scale.

        Raises:
            ShapeError: shapes, dtypes or devices disagree, or a value is inf or NaN; names the
                argument.
        """
        get_activation(activation, caller="ExpertWeights.quantize")
        parts = gate_and_up(up, gate, gate_up, layout, transposed)
        down = oriented(down, transposed)
        first, second = quantize_experts(parts, down, method)
        experts, intermediate, hidden = parts["up"].shape
        return cls(
            gate_up=first,
            down=second,
            activation=activation,
            gated=len(parts) == 2,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_experts=experts if num_experts is None else num_experts,
            expert_offset=expert_offset,
            hidden_scale=activation_scale("hidden_scale", hidden_scale, 1, down.device),
            intermediate_scale=activation_scale(
                "intermediate_scale", intermediate_scale, experts, down.device
            ),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return {"gate" (gated only), "up": [L, I, H], "down": [L, H, I]} without padding."""
        rows = dequantize_nvfp4(self.gate_up, dtype)[..., : self.hidden_size]
        halves = dict(
            zip(
                ("gate", "up") if self.gated else ("up",),
                rows.split(self.intermediate_padded, 1),
                strict=True,
            )
        )
        named = {name: half[:, : self.intermediate_size] for name, half in halves.items()}
        named["down"] = dequantize_nvfp4(self.down, dtype)[
            :, : self.hidden_size, : self.intermediate_size
        ]
        return named

    def padded(
        self, *, hidden_multiple: int = BLOCK, intermediate_multiple: int = BLOCK
    ) -> ExpertWeights:
        """Zero-pad H and I to multiples; exact, since padded codes and scales are zero.

        Gate and up are padded each on its own, so that their boundary stays in the middle.
        """
        for name, multiple in (
            ("hidden_multiple", hidden_multiple),
            ("intermediate_multiple", intermediate_multiple),
        ):
            if multiple < BLOCK or multiple % BLOCK:
                must(f"padded: {name}", f"be a multiple of {BLOCK}", multiple, "Round it up.")
        hidden = round_up(self.hidden_padded, hidden_multiple)
        intermediate = round_up(self.intermediate_padded, intermediate_multiple)
        return self._resized(pad_matrix, hidden, intermediate)

    def unpadded(self) -> ExpertWeights:
        """Undo `padded`: cut H and I to hidden_size and intermediate_size, rounded up to 16.

        What is cut off is taken to be zero and not looked at: the host does not wait for a device.
        """
        hidden = round_up(self.hidden_size, BLOCK)
        intermediate = round_up(self.intermediate_size, BLOCK)
        return self._resized(trim_matrix, hidden, intermediate)

    def _resized(
        self, resize: Callable[..., torch.Tensor], hidden: int, intermediate: int
    ) -> ExpertWeights:
        if (hidden, intermediate) == (self.hidden_padded, self.intermediate_padded):
            return self

        def values(old: NVFP4Values, rows: int, columns: int, halves: int) -> NVFP4Values:
            scale = old.block_scale.view(torch.uint8)
            return NVFP4Values(
                resize(old.packed, rows, NVFP4.packed_columns(columns), halves),
                resize(scale, rows, NVFP4.scale_columns(columns), halves).view(NVFP4.scale_dtype),
                old.global_scale,
            )

        halves = 1 + self.gated
        return dataclasses.replace(
            self,
            gate_up=values(self.gate_up, halves * intermediate, hidden, halves),
            down=values(self.down, hidden, intermediate, 1),
        )

    def slice_experts(self, start: int, stop: int) -> ExpertWeights:
        """Return local experts start..stop-1 as views; ids stay global through expert_offset."""
        if not 0 <= start < stop <= self.local_experts:
            must(
                "slice_experts: start and stop",
                f"satisfy 0 <= start < stop <= {self.local_experts}",
                f"{start} and {stop}",
                "Pass local indices.",
            )
        return dataclasses.replace(
            self,
            gate_up=NVFP4Values(*(getattr(self.gate_up, p)[start:stop] for p in _TENSORS)),
            down=NVFP4Values(*(getattr(self.down, p)[start:stop] for p in _TENSORS)),
            intermediate_scale=self.intermediate_scale[start:stop],
            expert_offset=self.expert_offset + start,
        )

    def slice_intermediate(self, start: int, stop: int) -> ExpertWeights:
        """Return intermediate columns start..stop-1; the outputs of all slices sum to the whole."""
        if not 0 <= start < stop <= self.intermediate_padded or start % BLOCK or stop % BLOCK:
            must(
                "slice_intermediate: start and stop",
                f"be multiples of {BLOCK} with 0 <= start < stop <= {self.intermediate_padded}",
                f"{start} and {stop}",
                "Move them to a block boundary.",
            )

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(1, (1 + self.gated, -1))[:, :, start:stop].flatten(1, 2)

        return dataclasses.replace(
            self,
            gate_up=NVFP4Values(
                rows(self.gate_up.packed), rows(self.gate_up.block_scale), self.gate_up.global_scale
            ),
            down=NVFP4Values(
                self.down.packed[..., start // 2 : stop // 2],
                self.down.block_scale[..., start // BLOCK : stop // BLOCK],
                self.down.global_scale,
            ),
            intermediate_size=max(1, min(stop, self.intermediate_size) - start),
        )

    def to(self, device: torch.device | str) -> ExpertWeights:
        """Return the weights on another device."""
        return ExpertWeights.from_tensors(
            {k: v.to(device) for k, v in self.tensors().items()}, self.metadata()
        )
