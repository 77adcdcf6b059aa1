"""The weights of one layer as a kernel reads them, and the interface of a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from ..errors import ShapeError, UnsupportedError
from ..experts import ExpertWeights
from ..formats.base import NVFP4
from ..layer import LayerSettings, MoeSpec, Routing, capability_name

__all__ = [
    "Kernel",
    "Operands",
    "PreparedWeights",
    "check_padding",
    "current_capability",
    "fold_output_scale",
    "logical_weights",
    "refuse_device",
    "sizes_to_pad",
    "unfold_output_scale",
]


class Operands(NamedTuple):
    """The operator's weight tensors, in its order. Shapes are those of the padded weights.

    Packed codes and block scales are bytes. What the four scales mean is the kernel's choice.
    """

    gate_up_packed: torch.Tensor
    gate_up_block_scale: torch.Tensor
    gate_up_global_scale: torch.Tensor
    down_packed: torch.Tensor
    down_block_scale: torch.Tensor
    down_global_scale: torch.Tensor
    hidden_scale: torch.Tensor
    intermediate_scale: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedWeights:
    """What `prepare` makes of ExpertWeights.

    Attributes:
        operands: what the operator takes.
        kept: logical tensors that `restore` needs and the operands no longer show to the last bit.
        metadata: `ExpertWeights.metadata()`.
    """

    operands: Operands
    kept: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    @property
    def settings(self) -> LayerSettings:
        """The operator's arguments behind the tensors."""
        return LayerSettings(*(self.metadata[name] for name in LayerSettings._fields))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return operands and kept tensors by name."""
        return {**self.operands._asdict(), **self.kept}

    def replaced(self, tensors: dict[str, torch.Tensor]) -> PreparedWeights:
        """Return the same with other tensors of the same names, such as moved ones."""
        return PreparedWeights(
            Operands(*(tensors[name] for name in Operands._fields)),
            {name: tensors[name] for name in self.kept},
            self.metadata,
        )


class Kernel(Protocol):
    """What every kernel offers."""

    name: str
    # Whether "auto" may choose it, whether it is `reference_w4a4` that it computes, and with which
    # intermediate_dtype.
    automatic: bool
    quantizes_activations: bool
    intermediate_dtype: torch.dtype

    def reasons_not_to_run(self, spec: MoeSpec) -> list[str]:
        """Return why it cannot run such a layer, padded; empty where it can."""

    def reasons_not_to_route(self, spec: MoeSpec, routing: Routing) -> list[str]:
        """Return why it cannot route by itself; empty where it can."""

    def reasons_without_padding(self, spec: MoeSpec) -> list[str]:
        """Return why it cannot run exactly this size."""

    def size_multiples(self, spec: MoeSpec, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""

    def prepare(
        self,
        weights: ExpertWeights,
        *,
        hidden_alignment: int,
        output_scale: torch.Tensor | None = None,
    ) -> PreparedWeights:
        """Lay the weights out; output_scale [L] multiplies each expert's output."""

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`: the logical weights, bit for bit, without this kernel's padding."""

    def run(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """Compute [T, H] of hidden's dtype, T > 0, from checked arguments."""

    def run_from_logits(
        self,
        hidden: torch.Tensor,
        router_logits: torch.Tensor,
        routing_bias: torch.Tensor,
        routing: Routing,
        operands: Operands,
        settings: LayerSettings,
    ) -> torch.Tensor:
        """The same, choosing the experts itself; routing_bias is [E], or [0] for none."""


def logical_weights(
    operands: Operands, settings: LayerSettings, hidden_size: int, intermediate_size: int
) -> ExpertWeights:
    """Read operands in the logical layout as ExpertWeights, without a copy."""
    tensors = {
        f"{gemm}.{part}": getattr(operands, f"{gemm}_{part}")
        for gemm in ("gate_up", "down")
        for part in ("packed", "block_scale", "global_scale")
    }
    for gemm in ("gate_up", "down"):
        tensors[f"{gemm}.block_scale"] = tensors[f"{gemm}.block_scale"].view(NVFP4.scale_dtype)
    tensors["hidden_scale"] = operands.hidden_scale
    tensors["intermediate_scale"] = operands.intermediate_scale
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    return ExpertWeights.from_tensors(tensors, {**settings._asdict(), **sizes})


def fold_output_scale(
    operands: Operands, output_scale: torch.Tensor | None
) -> tuple[Operands, dict[str, torch.Tensor]]:
    """Multiply down_global_scale by output_scale [L]; also return what the product hides."""
    if output_scale is None:
        return operands, {}
    kept = {"logical_down_global_scale": operands.down_global_scale}
    return operands._replace(down_global_scale=operands.down_global_scale * output_scale), kept


def unfold_output_scale(prepared: PreparedWeights) -> Operands:
    """Return the operands as they were before `fold_output_scale`."""
    scale = prepared.kept.get("logical_down_global_scale", prepared.operands.down_global_scale)
    return prepared.operands._replace(down_global_scale=scale)


def check_padding(kernel: str, operands: Operands, multiples: tuple[int, int]) -> None:
    """Raise ShapeError where the padded hidden or intermediate size is no such multiple."""
    sizes = (operands.down_packed.shape[1], operands.down_packed.shape[2] * 2)
    for what, size, multiple in zip(("hidden", "intermediate"), sizes, multiples, strict=True):
        if size % multiple:
            raise ShapeError(
                f"{kernel}: the padded {what} size must be a multiple of {multiple}; got {size}. "
                "Use its prepare(), which pads."
            )


def refuse_device(kernel: str, device: torch.device, wanted: str) -> NoReturn:
    """Raise: the tensors are on a device that the kernel cannot run on.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"{kernel}: hidden must be on a device of compute capability {wanted}; got {device} "
        f"({capability_name(current_capability(device))}). Prepare the weights for another kernel."
    )


def sizes_to_pad(spec: MoeSpec, multiples: tuple[int, int]) -> list[str]:
    """Return a reason for hidden_size and intermediate_size where it is no such multiple."""
    sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    return [
        f"{name} must be a multiple of {multiple} without padding, got {size}"
        for (name, size), multiple in zip(sizes.items(), multiples, strict=True)
        if size % multiple
    ]


def current_capability(device: torch.device | None = None) -> tuple[int, int] | None:
    """Return the CUDA compute capability of the device (default: the current); None on a CPU."""
    return query_capability(device)


def query_capability(device: torch.device | None) -> tuple[int, int] | None:
    """Ask torch; apart, so that a test can stand in another device for all callers at once."""
    if device is not None and device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
