"""ExpertWeights: the logical NVFP4 tensors of one mixture-of-experts layer.

Decides: row order (gate first, then up), one global scale per expert and GEMM, exact zero padding,
slicing.
Not handled here: kernel layouts (each kernel's `prepare`), checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from .activations import get_activation
from .errors import ShapeError
from .formats import NVFP4
from .quantize import NVFP4Values, dequantize_nvfp4, nvfp4_global_scale, quantize_nvfp4

__all__ = ["GATE_UP_LAYOUTS", "ExpertWeights", "split_gate_up"]

BLOCK = NVFP4.block_size
# How a stacked gate/up weight may order its 2 * intermediate_size output rows.
GATE_UP_LAYOUTS = ("gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved")
_TENSORS = ("packed", "block_scale", "global_scale")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def split_gate_up(gate_up: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gate, up) as views of gate_up [..., 2 * intermediate_size, hidden_size]."""
    if layout not in GATE_UP_LAYOUTS:
        raise ShapeError(
            f"split_gate_up: layout must be one of {', '.join(GATE_UP_LAYOUTS)}; got {layout!r}. "
            "Pass the order in which the rows are stored."
        )
    if layout.endswith("interleaved"):
        first, second = gate_up[..., 0::2, :], gate_up[..., 1::2, :]
    else:
        first, second = gate_up.chunk(2, dim=-2)
    return (first, second) if layout.startswith("gate") else (second, first)


@dataclasses.dataclass(frozen=True)
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
            raise ShapeError(
                "ExpertWeights: gate_up.packed and down.packed must have 3 axes; got "
                f"{list(self.gate_up.packed.shape)} and {list(self.down.packed.shape)}. Build it "
                "with ExpertWeights.quantize."
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
                raise ShapeError(
                    f"ExpertWeights: {name} must be {dtype} {list(expected[name])} on {device}; "
                    f"got {tensor.dtype} "
                    f"{list(tensor.shape)} on {tensor.device}. Build it with "
                    "ExpertWeights.quantize."
                )
        if not (0 < self.hidden_size <= hidden and 0 < self.intermediate_size <= intermediate):
            raise ShapeError(
                "ExpertWeights: hidden_size and intermediate_size must lie in 1 to the padded "
                f"{hidden} and {intermediate}; "
                f"got {self.hidden_size} and {self.intermediate_size}. Pass the unpadded sizes of "
                "the model."
            )
        if not 0 <= self.expert_offset <= self.num_experts - local:
            raise ShapeError(
                f"ExpertWeights: expert_offset must lie in 0..{self.num_experts - local} for "
                f"{local} of "
                f"{self.num_experts} experts; got {self.expert_offset}. Pass the global id of the "
                "first local expert."
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

    def metadata(self) -> dict[str, Any]:
        """Return what is not a tensor, as plain JSON values."""
        return {
            "format": NVFP4.name,
            "activation": self.activation,
            "gated": self.gated,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "expert_offset": self.expert_offset,
        }

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
        parts = _gate_and_up(up, gate, gate_up, layout, transposed)
        down = _oriented(down, transposed)
        _check_float_weights(parts, down)
        gated = len(parts) == 2
        experts, intermediate, hidden = parts["up"].shape
        i_padded, h_padded = _round_up(intermediate, BLOCK), _round_up(hidden, BLOCK)
        first = _empty(experts, (1 + gated) * i_padded, h_padded, down.device)
        second = _empty(experts, h_padded, i_padded, down.device)
        for expert in range(experts):
            shared_scale = _global_scale(parts, expert)
            for index, weight in enumerate(parts.values()):
                place = slice(index * i_padded, index * i_padded + i_padded)
                _quantize_into(first, expert, place, weight[expert], shared_scale, method)
            scale = _global_scale({"down": down}, expert)
            _quantize_into(second, expert, slice(0, h_padded), down[expert], scale, method)
        return cls(
            gate_up=first,
            down=second,
            activation=activation,
            gated=gated,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_experts=experts if num_experts is None else num_experts,
            expert_offset=expert_offset,
            hidden_scale=_scale("hidden_scale", hidden_scale, 1, down.device),
            intermediate_scale=_scale(
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
                raise ShapeError(
                    f"padded: {name} must be a multiple of {BLOCK}; got {multiple}. Round it up."
                )
        more_h = _round_up(self.hidden_padded, hidden_multiple) - self.hidden_padded
        more_i = (
            _round_up(self.intermediate_padded, intermediate_multiple) - self.intermediate_padded
        )
        if not more_h and not more_i:
            return self

        def grow(tensor: torch.Tensor, rows: int, columns: int, halves: int = 1) -> torch.Tensor:
            # float8 has no constant_pad; its zero is byte 0.
            bytes_ = tensor.view(torch.uint8).unflatten(1, (halves, -1))
            return F.pad(bytes_, (0, columns, 0, rows)).flatten(1, 2).view(tensor.dtype)

        halves = 1 + self.gated
        gate_up = NVFP4Values(
            grow(self.gate_up.packed, more_i, more_h // 2, halves),
            grow(self.gate_up.block_scale, more_i, more_h // BLOCK, halves),
            self.gate_up.global_scale,
        )
        down = NVFP4Values(
            grow(self.down.packed, more_h, more_i // 2),
            grow(self.down.block_scale, more_h, more_i // BLOCK),
            self.down.global_scale,
        )
        return dataclasses.replace(self, gate_up=gate_up, down=down)

    def slice_experts(self, start: int, stop: int) -> ExpertWeights:
        """Return local experts start..stop-1 as views; ids stay global through expert_offset."""
        if not 0 <= start < stop <= self.local_experts:
            raise ShapeError(
                "slice_experts: start and stop must satisfy 0 <= start < stop <= "
                f"{self.local_experts}; "
                f"got {start} and {stop}. Pass local indices."
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
            raise ShapeError(
                f"slice_intermediate: start and stop must be multiples of {BLOCK} with 0 <= start "
                "< stop <= "
                f"{self.intermediate_padded}; got {start} and {stop}. Move them to a block "
                "boundary."
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


def _gate_and_up(
    up: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_up: torch.Tensor | None,
    layout: str,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    if (gate_up is None) == (up is None) or (gate is not None and up is None):
        given = [n for n, t in (("up", up), ("gate", gate), ("gate_up", gate_up)) if t is not None]
        raise ShapeError(
            "ExpertWeights.quantize: arguments must be either gate_up, or up with an optional "
            f"gate; got {given}. "
            "Pass one of the two forms."
        )
    if gate_up is not None:
        if gate_up.ndim != 3 or gate_up.shape[-1 if transposed else -2] % 2:
            raise ShapeError(
                "ExpertWeights.quantize: gate_up must have shape [L, 2 * I, H] ([L, H, 2 * I] when "
                "transposed); "
                f"got {list(gate_up.shape)}. Stack gate and up on the output axis."
            )
        gate, up = split_gate_up(gate_up.transpose(-1, -2) if transposed else gate_up, layout)
    else:
        gate, up = (None if w is None else _oriented(w, transposed) for w in (gate, up))
    assert up is not None
    return {"up": up} if gate is None else {"gate": gate, "up": up}


def _oriented(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    # Below 2 axes there is nothing to transpose; the shape check names it.
    return weight.transpose(-1, -2) if transposed and weight.ndim > 1 else weight


def _check_float_weights(parts: dict[str, torch.Tensor], down: torch.Tensor) -> None:
    up = parts["up"]
    if up.ndim != 3:
        raise ShapeError(
            f"ExpertWeights.quantize: up must have shape [L, I, H]; got {list(up.shape)}. Stack "
            "the experts on axis 0."
        )
    experts, intermediate, hidden = up.shape
    if not experts * intermediate * hidden:
        raise ShapeError(
            f"ExpertWeights.quantize: up must not be empty; got {list(up.shape)}. Pass at least "
            "one expert with weights."
        )
    expected = {name: (experts, intermediate, hidden) for name in parts} | {
        "down": (experts, hidden, intermediate)
    }
    for name, tensor in {**parts, "down": down}.items():
        if tuple(tensor.shape) != expected[name]:
            raise ShapeError(
                f"ExpertWeights.quantize: {name} must have shape {list(expected[name])} to match "
                "up [L, I, H] = "
                f"{list(up.shape)}; got {list(tensor.shape)}. Check the order of the axes "
                "(transposed=)."
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ShapeError(
                f"ExpertWeights.quantize: {name} must be bfloat16, float16, float32 or float64; "
                f"got {tensor.dtype}. "
                "Dequantise it first."
            )
        if tensor.is_meta and up.is_meta:
            raise ShapeError(
                f"ExpertWeights.quantize: {name} must hold values; got a meta tensor. Load the "
                "checkpoint first."
            )
        if tensor.device != up.device:
            raise ShapeError(
                f"ExpertWeights.quantize: {name} must be on the device of up, {up.device}; got "
                f"{tensor.device}. Move it there."
            )


def _empty(experts: int, rows: int, columns: int, device: torch.device) -> NVFP4Values:
    # Zero bytes are zero codes and zero scales: what padding must hold.
    return NVFP4Values(
        torch.zeros(experts, rows, NVFP4.packed_columns(columns), dtype=torch.uint8, device=device),
        torch.zeros(
            experts, rows, NVFP4.scale_columns(columns), dtype=torch.uint8, device=device
        ).view(NVFP4.scale_dtype),
        torch.zeros(experts, dtype=torch.float32, device=device),
    )


def _global_scale(weights: dict[str, torch.Tensor], expert: int) -> torch.Tensor:
    # From the largest magnitude of all of them: an all-zero gate must not bring its scale of 1.
    ends = {name: torch.stack(torch.aminmax(w[expert])).float() for name, w in weights.items()}
    for name, pair in ends.items():
        if not bool(torch.isfinite(pair).all()):
            raise ShapeError(
                f"ExpertWeights.quantize: {name} of expert {expert} must be finite in float32; got "
                f"values from {float(pair[0])} to {float(pair[1])}. Find the layer that made them."
            )
    return nvfp4_global_scale(torch.stack(list(ends.values())))


def _quantize_into(
    out: NVFP4Values,
    expert: int,
    place: slice,
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    method: str,
) -> None:
    columns = _round_up(weight.shape[1], BLOCK)
    if columns != weight.shape[1]:
        weight = F.pad(weight, (0, columns - weight.shape[1]))
    values = quantize_nvfp4(weight, global_scale, method)
    rows = slice(place.start, place.start + weight.shape[0])
    out.packed[expert, rows] = values.packed
    out.block_scale.view(torch.uint8)[expert, rows] = values.block_scale.view(torch.uint8)
    out.global_scale[expert] = values.global_scale


def _scale(
    name: str, value: float | torch.Tensor, count: int, device: torch.device
) -> torch.Tensor:
    scale = torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(-1)
    if scale.numel() not in (1, count) or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ShapeError(
            f"ExpertWeights.quantize: {name} must be positive and finite, one value or {count}; "
            f"got {value}. "
            "Pass amax / (6 * 448), or 1.0 where it is unknown."
        )
    return scale.expand(count).clone()
