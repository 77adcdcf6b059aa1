"""What `flashinfer_trtllm` knows of a number format: layout, scales, arguments of two functions.

A format's own file overrides what is its own. Sources: FlashInfer 0.6.13 and 0.7.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ...activations import get_activation
from ...layer import Layer
from ..base import Layout
from ..operands import Operands
from . import trtllm_rules as rules
from .cutlass import enum_name
from .library import FlashInfer, version_key
from .rows import down_row_index, gate_up_row_index
from .weights import row_layout

# How experts come to be chosen by the library.
ROUTES = "routing='fused' in replace_moe and fp4moe.backend"

__all__ = ["Entry", "another", "fp4_weights", "padded_sizes", "raw_parameters", "shuffled_rows"]


def another(layer: Layer) -> str:
    """Return what runs such a layer where its format's kernels do not."""
    form = layer.activation, layer.gated
    names = ["kernel triton"]
    if layer.format == "fp8" and enum_name(*form) is not None:
        names.insert(0, "kernel flashinfer_cutlass")
    if not rules.reasons(*form, layer.hidden_size, layer.intermediate_size):
        names.insert(0, "format nvfp4")
    return "take " + ", ".join(names[:-1]) + " or " * (len(names) > 1) + names[-1]


def padded_sizes(layer: Layer, hidden_alignment: int) -> tuple[int, int]:
    """Return the multiples of hidden and intermediate size."""
    return rules.size_multiples(layer.activation, layer.gated, hidden_alignment, layer.format)


def shuffled_rows(**options: Any) -> Layout:
    """Return the layout with interleaved gate and up and shuffled rows; options: `row_layout`."""

    def order(gemm: str, rows: int, gated: bool) -> torch.Tensor:
        return gate_up_row_index(rows, gated) if gemm == "gate_up" else down_row_index(rows)

    return row_layout(padded_sizes, order, **options)


class Entry:
    """How the library takes one number format.

    Attributes:
        format: its name. kind: its name in `trtllm_rules.FORMATS` where that is another.
        given, from_logits: functions for experts that were chosen, and for router logits.
        layout: of codes and block scales.
        biased: which of the two take biases.
        packed_ids: whether `given` takes an id and a bfloat16 weight in one int32 only, in some
            version.
        drops_padding: whether a narrower output makes the library drop padded columns.
        parameters_since: the version that takes alpha, beta and limit, where not every known one
            does.
        one_group: whether a router without groups is told so by 1, not by None.
    """

    format: ClassVar[str]
    kind: ClassVar[str | None] = None
    given: ClassVar[str]
    from_logits: ClassVar[str]
    layout: ClassVar[Layout]
    biased: ClassVar[tuple[str, ...]] = ()
    packed_ids: ClassVar[bool] = False
    drops_padding: ClassVar[bool] = False
    one_group: ClassVar[bool] = False
    parameters_since: ClassVar[str | None] = None

    def scale_operands(self, operands: Operands, layer: Layer) -> Operands:
        """Return scales and biases as the kernel takes them."""
        return operands

    def quantize_input(
        self, flashinfer: FlashInfer, hidden: torch.Tensor, columns: int, operands: Operands
    ) -> dict[str, Any]:
        """Return the arguments that hidden [T, H] becomes, padded to so many columns."""
        raise NotImplementedError

    def weights(self, flashinfer: FlashInfer, operands: Operands, layer: Layer) -> dict[str, Any]:
        """Return the arguments that operands and activation become, for both functions."""
        raise NotImplementedError

    def parameter_reasons(self, layer: Layer, flashinfer: FlashInfer) -> list[str]:
        """Return why alpha, beta and limit cannot be handed over."""
        since = self.parameters_since
        if since is None or get_activation(layer.activation).plain:
            return []
        if version_key(flashinfer.version) >= version_key(since):
            return []
        return [
            f"the installed FlashInfer takes no alpha, beta and limit with {self.format} weights: "
            f"install flashinfer-python {since}, or {another(layer)}"
        ]

    def bias_reasons(
        self, layer: Layer, flashinfer: FlashInfer | None, *, routes: bool
    ) -> list[str]:
        """Return why biases cannot be added.

        Args:
            flashinfer: the installed library; None takes every argument as known.
            routes: whether the library chooses the experts.
        """
        name = self.from_logits if routes else self.given
        if name not in self.biased:
            only = "".join(f", only {other}" for other in self.biased)
            with_it = f"pass {ROUTES}, or " * bool(only)
            what = f"{name} has no biases with {self.format} weights{only}"
            return [f"{what}; {with_it}{another(layer)}"]
        if flashinfer is not None and "gemm1_bias" not in flashinfer.arguments[name]:
            return [f"the installed FlashInfer has no biases in {name}: install 0.7.2.post1"]
        return []

    def reasons_without_function(self, layer: Layer, flashinfer: FlashInfer) -> list[str]:
        """Return why experts that were chosen cannot be handed over."""
        if self.given in flashinfer.arguments:
            return []
        return [
            f"the installed FlashInfer has no {self.given}, which takes experts that were chosen: "
            f"install flashinfer-python 0.7.2.post1, pass {ROUTES}, or {another(layer)}"
        ]


def raw_parameters(operands: Operands, layer: Layer) -> dict[str, torch.Tensor | None]:
    """Return alpha, beta and limit in the model's units, each float32 [L] or None."""
    activation, like = get_activation(layer.activation), operands.intermediate_scale
    values = {
        "gemm1_alpha": activation.alpha if activation.alpha != 1 else None,
        "gemm1_beta": activation.beta or None,
        "gemm1_clamp_limit": activation.limit or None,
    }
    return {n: None if v is None else torch.full_like(like, v) for n, v in values.items()}


def fp4_weights(
    operands: Operands,
    parameters: dict[str, torch.Tensor | None],
    scalars: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> dict[str, Any]:
    """Return the weights as both functions for codes of four bits take them.

    Args:
        parameters: alpha, beta and limit by name. scalars: output1, output1's gate, output2.
    """
    names = "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"
    return {
        "gemm1_weights": operands.gate_up_packed,
        "gemm1_weights_scale": operands.gate_up_block_scale.view(torch.float8_e4m3fn),
        "gemm1_bias": operands.gate_up_bias,
        **parameters,
        "gemm2_weights": operands.down_packed,
        "gemm2_weights_scale": operands.down_block_scale.view(torch.float8_e4m3fn),
        "gemm2_bias": operands.down_bias,
        **dict(zip(names, scalars, strict=True)),
    }
