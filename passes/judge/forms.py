"""What a region may compute: every form that the shapes of its weights allow."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from fp4moe.activations import ACTIVATIONS
from fp4moe.experts import GATE_UP_LAYOUTS
from fp4moe.identity.float_weights import SEPARATE, StoredForm

__all__ = ["SEPARATE", "Form", "possible_forms"]


@dataclasses.dataclass(frozen=True)
class Form:
    """What a region may compute.

    Attributes:
        gated: whether there are gate and up.
        layout: the order of their rows, or of the two tensors; None when not gated.
        transposed: gate and up are stored [E, H, ...].
        activation: the text of an `fp4moe.Activation`.
        down_transposed: down is stored [E, I, H].
        weighting: "output", or "input": the hidden states are multiplied by the routing weights.
        biased: whether there are biases.
    """

    gated: bool
    layout: str | None
    transposed: bool
    activation: str
    down_transposed: bool = False
    weighting: str = "output"
    biased: bool = False

    def stored(self, kernel: str, hidden_alignment: int, format: str) -> StoredForm:
        """Return what the weights mean and what to pack them into, as the operator takes it."""
        return StoredForm(
            format,
            self.activation,
            self.layout or "",
            self.transposed,
            self.down_transposed,
            kernel,
            hidden_alignment,
        )

    def __str__(self) -> str:
        form = f"gated ({self.layout}) " if self.gated else ""
        if self.transposed and self.down_transposed:
            stored = ", transposed weights"
        else:
            stored = ", transposed gate and up" if self.gated else ", transposed up"
            stored = stored if self.transposed else ""
            stored += ", transposed down" if self.down_transposed else ""
        weighted = ", weighted input" if self.weighting == "input" else ""
        return f"{form}{self.activation}{stored}{', biases' * self.biased}{weighted}"


def possible_forms(
    first: tuple[int, ...],
    down: tuple[int, ...],
    hidden_size: int,
    *,
    apart: bool,
    weighted: bool,
    biases: Sequence[tuple[str, int]] = (),
) -> Iterator[Form]:
    """Yield the forms that fit the shapes, with each activation that has no parameters.

    Args:
        first, down: [E, rows, columns] of gate_up (or up, or each of gate and up) and of down.
        hidden_size: H. apart: gate and up are two tensors. weighted: there are routing weights.
        biases: the role and the length of each.
    """
    for transposed, down_transposed in ((False, False), (True, True), (False, True), (True, False)):
        rows, hidden_in = (first[2], first[1]) if transposed else first[1:]
        intermediate, hidden_out = (down[1], down[2]) if down_transposed else (down[2], down[1])
        if hidden_in != hidden_size or hidden_out != hidden_size:
            continue
        if any(n != (hidden_size if role == "down_bias" else rows) for role, n in biases):
            continue
        if apart:
            layouts: tuple[str | None, ...] = SEPARATE if rows == intermediate else ()
        else:
            layouts = {2 * intermediate: GATE_UP_LAYOUTS, intermediate: (None,)}.get(rows, ())
        for layout, activation in itertools.product(layouts, ACTIVATIONS):
            # act(gate) * up with the identity is the same in either order.
            if activation == "identity" and layout is not None and layout.startswith("up"):
                continue
            stored = layout, transposed, activation, down_transposed
            form = Form(layout is not None, *stored, biased=bool(biases))
            yield form
            # Without a gate the identity does not care where it is weighted.
            if weighted and (form.gated or activation != "identity"):
                yield dataclasses.replace(form, weighting="input")
