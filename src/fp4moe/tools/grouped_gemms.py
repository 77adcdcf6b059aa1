"""torch's FP8 grouped GEMM, the two of a layer alone, as a peer of `fp4moe bench`.

Rows are sorted and quantised beforehand, and nothing stands between the GEMMs: it is what a layer
of FP8 tensor cores could not go below with torch. Not handled here: a whole layer.
"""

from __future__ import annotations

import torch

from ..experts import ExpertWeights
from ..kernels import current_capability
from ..testing import relative_error

__all__ = ["GroupedGemms"]

E4M3 = torch.float8_e4m3fn
# Rows of an expert whose result is compared.
COMPARED = 64


class GroupedGemms:
    """The GEMMs of a layer with a scale for each row, or one for each matrix."""

    name = "scaled_grouped_mm x2"

    def __init__(self, weights: ExpertWeights) -> None:
        local = weights.local_experts
        self.weights = [weights.gate_up.packed.view(E4M3), weights.down.packed.view(E4M3)]
        self.scales = []
        for matrix, stored in zip(self.weights, (weights.gate_up, weights.down), strict=True):
            scale, rows = stored.block_scale[..., 0], matrix.shape[1]
            each = rows // scale.shape[1]
            self.scales.append(scale.repeat_interleave(each, 1).reshape(local, rows).contiguous())

    @staticmethod
    def reason(weights: ExpertWeights) -> str | None:
        """Return why it does not run, None where it does."""
        codes, scales = weights.number_format.codes, weights.number_format.scales
        if codes.dtype != E4M3 or scales is None or scales.columns is not None:
            return f"it has no form for {weights.format}"
        if current_capability() != (9, 0):
            return "it needs compute capability 9.0"
        if not hasattr(torch, "_scaled_grouped_mm"):
            return "this torch has no _scaled_grouped_mm"
        return None

    def calls(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what `run` takes: both inputs with their scales, and the ends of the groups.

        Args:
            x: [T, H]. ids: [T, K], all of experts that are here.
        """
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.weights[0].shape[0]).cumsum(0).int()
        first, first_scale = _quantized(x[order // ids.shape[1]].float())
        columns = self.weights[1].shape[2]
        generator = torch.Generator(x.device).manual_seed(2)
        middle = torch.randn(
            len(flat), columns, dtype=torch.float32, device=x.device, generator=generator
        )
        second, second_scale = _quantized(middle)
        return first, first_scale, second, second_scale, ends

    def run(self, *call: torch.Tensor) -> torch.Tensor:
        """Compute both GEMMs; returns the second's rows."""
        return self._both(*call)[1]

    def _both(self, *call: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, ends = call
        first, second = (
            torch._scaled_grouped_mm(
                inputs[2 * i],
                self.weights[i].transpose(1, 2),
                inputs[2 * i + 1],
                self.scales[i],
                offs=ends,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for i in range(2)
        )
        return first, second

    def error(self, *call: torch.Tensor) -> float:
        """Return the larger error of the two, of some rows of the largest group."""
        *inputs, ends = call
        sizes = ends.diff(prepend=ends.new_zeros(1))
        expert = int(sizes.argmax())
        end = int(ends[expert])
        rows = slice(max(end - int(sizes[expert]), end - COMPARED), end)
        errors = []
        for i, out in enumerate(self._both(*call)):
            x = inputs[2 * i].float()[rows] * inputs[2 * i + 1][rows, None]
            w = self.weights[i][expert].float() * self.scales[i][expert, :, None]
            errors.append(relative_error(out[rows], x @ w.T))
        return max(errors)


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 rows as e4m3, and a scale for each."""
    scale = (x.abs().amax(1) / 448).clamp(min=2.0**-20)
    return (x / scale[:, None]).clamp(-448, 448).to(E4M3), scale
