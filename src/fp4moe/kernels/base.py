"""What a kernel is: how it lays out the weights of a layer, and its base class.

A kernel writes its devices, package, layout, activations and `run`. Written here, once: reasons,
padding and layout of weights and the way back, the checks of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch

from ..activations import get_activation
from ..errors import must, refuse
from ..experts import ExpertWeights
from ..formats import FORMATS
from ..layer import HIDDEN_ALIGNMENTS, Layer, Routing, capability_name
from .devices import Devices
from .operands import SCALES, Call, LogitsCall, Operands, PreparedWeights

__all__ = [
    "DIFFERENTIABLE",
    "Kernel",
    "Layout",
    "current_capability",
    "each_matrix",
    "logical_layout",
    "logical_weights",
]


# What a user asks for to train beside the experts.
DIFFERENTIABLE = ('kernel="triton"', 'kernel="reference"')
Change = Callable[[Operands, Layer], Operands]


class Layout(NamedTuple):
    """How a kernel reads codes and block scales.

    Attributes:
        multiples: what hidden and intermediate size are padded to; takes the layer and the
            Blackwell kernel's hidden_alignment.
        apply, undo: from the logical order to this one and back, exact inverses that leave the four
            scales and the values of the biases alone. None: the kernel reads the logical tensors as
            they are.
    """

    multiples: Callable[[Layer, int], tuple[int, int]]
    apply: Change | None
    undo: Change | None


def logical_layout(multiple: int) -> Layout:
    """Return the logical layout, whose sizes are multiples of one block."""
    return Layout(lambda layer, hidden_alignment: (multiple, multiple), None, None)


def each_matrix(
    codes: Callable[[torch.Tensor], torch.Tensor], scales: Callable[[torch.Tensor], torch.Tensor]
) -> Change:
    """Return a change of both matrices: codes [L, N, K/2] and block scales [L, N, K/16]."""

    def change(operands: Operands, layer: Layer) -> Operands:
        return operands._replace(
            gate_up_packed=codes(operands.gate_up_packed),
            gate_up_block_scale=scales(operands.gate_up_block_scale),
            down_packed=codes(operands.down_packed),
            down_block_scale=scales(operands.down_block_scale),
        )

    return change


class Kernel:
    """Base of every kernel.

    A kernel writes the attributes and `run`. The methods from `package_reasons` to
    `run_from_logits` have defaults that it may replace; what follows is the same for all, but for
    what a kernel checks beside.
    """

    name: str
    # What has to be installed for it, in words.
    needs: str = ""
    # None: any device. Layouts by number format.
    devices: Devices | None = None
    layouts: ClassVar[Mapping[str, Layout]]
    # Whether "auto" may choose it for any layer, whether it is `reference_w4a4` that it computes,
    # and with which intermediate_dtype and product_dtype.
    automatic: bool = True
    # Whether it has biases, and every activation with alpha, beta and limit.
    biases: bool = False
    parameters: bool = False
    quantizes_activations: bool = False
    intermediate_dtype: torch.dtype = torch.bfloat16
    product_dtype: torch.dtype | None = None
    # Whether it can choose the experts itself, in `run_from_logits`.
    routes: bool = False
    # By formats that it lacks: why, and what would run.
    without_layout: ClassVar[Mapping[str, str]] = {}
    # Whether it computes gradients, in `gradients`.
    differentiable: bool = False

    def run(self, call: Call) -> torch.Tensor:
        """Compute [T, H] of hidden's dtype."""
        raise NotImplementedError

    def automatic_for(self, layer: Layer) -> bool:
        """Whether "auto" may choose it for this layer."""
        return self.automatic

    def gradients(self, call: Call, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of hidden and routing weights, of their dtypes, by the output's.

        Only where it is `differentiable`; refused otherwise.
        """
        refuse(
            "moe_backward",
            f"kernel {self.name} cannot compute gradients",
            "nothing reads the weights in its layout backwards",
            f"Load or replace the model with {' or '.join(DIFFERENTIABLE)}.",
        )

    def package_reasons(self) -> Sequence[str]:
        """Return what is wrong with the package or toolchain that it needs."""
        return ()

    def devices_for(self, format: str) -> Devices | None:
        """Return where it runs with weights of a number format that it has; None: anywhere."""
        return self.devices

    def intermediate_dtype_for(self, format: str) -> torch.dtype:
        """Return the intermediate_dtype of `reference_w4a4` with weights of a number format."""
        return self.intermediate_dtype

    def activation_reasons(self, layer: Layer, ready: bool) -> list[str]:
        """Return why it lacks the activation; ready: whether device and package will do."""
        if self.parameters or get_activation(layer.activation).plain:
            return []
        return [f"it has no activation with parameters, got {layer.activation}"]

    def limit_reasons(self, layer: Layer) -> list[str]:
        """Return which other limits the layer exceeds."""
        return []

    def reasons_not_to_route(self, layer: Layer, routing: Routing) -> list[str]:
        """Return why it cannot run behind logits; where it does not route, choose_experts does."""
        return []

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return what the scales, and the values of the biases, become.

        What a product replaces is kept beside it, so that `restore` finds it.
        """
        return operands

    def warm_up(self, prepared: PreparedWeights) -> None:
        """Load what the first call would, which may be one under capture."""

    def run_from_logits(self, call: LogitsCall) -> torch.Tensor:
        """Compute [T, H] of hidden's dtype; only where it `routes`."""
        raise NotImplementedError

    def reasons_not_to_run(
        self, layer: Layer, capability: tuple[int, int] | None, *, installed: bool = False
    ) -> list[str]:
        """Return why it cannot run such a layer, padded; empty where it can.

        Args:
            capability: of the device, None on a CPU.
            installed: take what it `needs` as installed, and do not look.
        """
        if layer.format not in self.layouts:
            why = self.without_layout.get(layer.format, "")
            return [f"it has no layout for {layer.format}, only for {', '.join(self.layouts)}{why}"]
        devices = self.devices_for(layer.format)
        reasons = devices.reasons(capability) if devices else []
        reasons = reasons or ([] if installed else list(self.package_reasons()))
        return [
            *reasons,
            *self.activation_reasons(layer, not reasons and not installed),
            *(["it has no biases"] if layer.biased and not self.biases else ()),
            *self.limit_reasons(layer),
        ]

    def reasons_without_padding(self, layer: Layer) -> list[str]:
        """Return why it cannot run exactly this size."""
        sizes = {"hidden_size": layer.hidden_size, "intermediate_size": layer.intermediate_size}
        multiples = self.size_multiples(layer, HIDDEN_ALIGNMENTS[0])
        return [
            f"{name} must be a multiple of {multiple} without padding, got {size}"
            for (name, size), multiple in zip(sizes.items(), multiples, strict=True)
            if size % multiple
        ]

    def size_multiples(self, layer: Layer, hidden_alignment: int) -> tuple[int, int]:
        """Return the multiples that hidden and intermediate size are padded to."""
        return self.layouts[layer.format].multiples(layer, hidden_alignment)

    def prepare(self, weights: ExpertWeights, *, hidden_alignment: int) -> PreparedWeights:
        """Pad the weights and lay them out; on a CUDA device warm up, too.

        Args:
            hidden_alignment: what the Blackwell kernel pads the hidden size to.
        """
        layer = weights.layer()
        apply = self.layouts[layer.format].apply
        if apply is not None:
            multiples = self.size_multiples(layer, hidden_alignment)
            weights = weights.unpadded().padded(
                hidden_multiple=multiples[0], intermediate_multiple=multiples[1]
            )
        operands = Operands(**weights.operands())
        operands = operands if apply is None else apply(operands, layer)
        prepared = PreparedWeights(*self._with_scales(operands, layer), layer)
        if weights.device.type == "cuda":
            self.warm_up(prepared)
        return prepared

    def restore(self, prepared: PreparedWeights) -> ExpertWeights:
        """Undo `prepare`: the logical weights, bit for bit, without this kernel's padding."""
        layer, undo = prepared.layer, self.layouts[prepared.layer.format].undo
        operands = _logical_scales(prepared)
        if undo is None:
            return logical_weights(operands, layer)
        return logical_weights(undo(operands, layer), layer).unpadded()

    def update_scales(
        self,
        prepared: PreparedWeights,
        hidden_scale: torch.Tensor,
        intermediate_scale: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the tensors of `prepared` that change with the scales of the activations.

        Args:
            hidden_scale: float32 [1]. intermediate_scale: float32 [L].
        """
        logical = _logical_scales(prepared)._replace(
            hidden_scale=hidden_scale, intermediate_scale=intermediate_scale
        )
        operands, kept = self._with_scales(logical, prepared.layer)
        changed = [name.removeprefix("logical_") for name in kept]
        names = dict.fromkeys((*SCALES, *changed))
        return {**{name: getattr(operands, name) for name in names}, **kept}

    def _with_scales(
        self, logical: Operands, layer: Layer
    ) -> tuple[Operands, dict[str, torch.Tensor]]:
        """Return the operands with their scales, and the logical tensors that these hide."""
        operands = self.scale_operands(logical, layer)
        changed = [n for n in logical.named() if getattr(operands, n) is not getattr(logical, n)]
        return operands, {f"logical_{name}": getattr(logical, name) for name in changed}

    def __call__(self, call: Call | LogitsCall) -> torch.Tensor:
        """Check a call outside the operators, then run it."""
        self.check(call)
        return self.run_from_logits(call) if isinstance(call, LogitsCall) else self.run(call)

    def check(self, call: Call | LogitsCall) -> None:
        """Raise where the device, the activation or the padding does not fit.

        An operator asks once for calls of equal metadata (shape, dtype, device, contiguity of the
        operands): nothing else may be looked at.
        """
        layer, operands = call.layer, call.operands
        self.check_device(call)
        if reasons := self.activation_reasons(layer, True):
            refuse(
                call.caller,
                f"kernel {self.name} cannot compute {layer.activation}",
                "; ".join(reasons),
                "See fp4moe.why_not.",
            )
        if operands.gate_up_bias is not None and not self.biases:
            refuse(
                call.caller,
                f"kernel {self.name} cannot add gate_up_bias and down_bias",
                "it has no biases",
                "Prepare the weights for another kernel.",
            )
        layout = self.layouts[layer.format]
        if layout.apply is None:
            return
        _, hidden_padded, columns = operands.down_packed.shape
        sizes = hidden_padded, FORMATS[layer.format].elements(columns)
        multiples = layout.multiples(layer, HIDDEN_ALIGNMENTS[0])
        for what, size, multiple in zip(("hidden", "intermediate"), sizes, multiples, strict=True):
            if size % multiple:
                rule = f"be a multiple of {multiple} for kernel {self.name}"
                advice = "Use its prepare(), which pads."
                must(f"{call.caller}: the padded {what} size", rule, size, advice)

    def check_device(self, call: Call | LogitsCall) -> None:
        """Raise where the kernel does not run on the device of hidden."""
        devices = self.devices_for(call.layer.format)
        if devices is None:
            return
        device = call.hidden.device
        capability = current_capability(device)
        if not devices.include(capability):
            refuse(
                call.caller,
                f"kernel {self.name} cannot run",
                f"hidden is on {device} ({capability_name(capability)}), and the kernel needs a "
                f"device of compute capability {devices}",
                "Prepare the weights for another kernel.",
            )


def logical_weights(operands: Operands, layer: Layer) -> ExpertWeights:
    """Read operands in the logical layout as ExpertWeights, without a copy."""
    tensors = {
        f"{gemm}.{part}": getattr(operands, f"{gemm}_{part}")
        for gemm in ("gate_up", "down")
        for part in ("packed", "block_scale", "global_scale")
    }
    dtypes = FORMATS[layer.format].dtypes()
    for name, tensor in tensors.items():
        dtype = dtypes[name.rpartition(".")[2]]
        tensors[name] = tensor if tensor.dtype == dtype else tensor.view(dtype)
    tensors["hidden_scale"] = operands.hidden_scale
    tensors["intermediate_scale"] = operands.intermediate_scale
    if operands.gate_up_bias is not None and operands.down_bias is not None:
        tensors |= {"gate_up.bias": operands.gate_up_bias, "down.bias": operands.down_bias}
    return ExpertWeights.from_tensors(tensors, layer.metadata())


def _logical_scales(prepared: PreparedWeights) -> Operands:
    """Return the operands with the logical scales and biases put back."""
    kept = {name.removeprefix("logical_"): tensor for name, tensor in prepared.kept.items()}
    return prepared.operands._replace(**kept)


def current_capability(device: torch.device | None = None) -> tuple[int, int] | None:
    """Return the CUDA compute capability of the device (default: the current); None on a CPU."""
    return query_capability(device)


def query_capability(device: torch.device | None) -> tuple[int, int] | None:
    """Ask torch; apart, so that a test can stand in another device for all callers at once."""
    if device is not None and device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
