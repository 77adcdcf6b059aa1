"""torch's grouped GEMMs, the two of a layer alone, as peers of `fp4moe bench`.

Rows are sorted, and for FP8 quantised, beforehand, and nothing stands between the GEMMs: it is what
a layer made of them could not go below. Not handled here: a whole layer.
"""

from __future__ import annotations

import torch

from ..experts import ExpertWeights
from ..kernels import current_capability
from ..testing import relative_error

__all__ = ["GEMMS", "GroupedGemms", "ScaledGroupedGemms"]

E4M3 = torch.float8_e4m3fn
# Rows of an expert whose result is compared.
COMPARED = 64


class GroupedGemms:
    """`torch._grouped_mm` of both, bfloat16: the limit of bfloat16 experts."""

    name = "torch._grouped_mm x2"

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights, experts = [], range(weights.local_experts)
        for stored, halves in ((weights.gate_up, 1 + weights.gated), (weights.down, 1)):
            decode, kind = weights.number_format.dequantize, type(stored)
            values = [
                decode(
                    kind(
                        **{k: v[e : e + 1] if v.numel() else v for k, v in stored.parts().items()}
                    ),
                    torch.bfloat16,
                    halves,
                )
                for e in experts
            ]
            self.weights.append(torch.cat(values))

    @classmethod
    def reason(cls, weights: ExpertWeights) -> str | None:
        """Return why it does not run, None where it does."""
        if not hasattr(torch, "_grouped_mm"):
            return "this torch has no _grouped_mm"
        capability = current_capability()
        if capability is not None and capability < (8, 0):
            return f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
        return None

    def calls(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what `run` takes: the rows of both GEMMs, and the ends of the groups.

        Args:
            x: [T, H]. ids: [T, K], all of experts that are here.
        """
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.weights[0].shape[0]).cumsum(0).int()
        columns = self.weights[1].shape[2]
        generator = torch.Generator(x.device).manual_seed(2)
        middle = torch.randn(
            len(flat), columns, dtype=torch.float32, device=x.device, generator=generator
        )
        return (*self.inputs(x[order // ids.shape[1]].float()), *self.inputs(middle), ends)

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return float32 rows as one GEMM takes them."""
        return (x.bfloat16(),)

    def values(self, call: tuple[torch.Tensor, ...], i: int, rows: slice) -> torch.Tensor:
        """Return the values of some rows that GEMM i takes, in float32."""
        return call[i][rows].float()

    def weight_values(self, i: int, expert: int) -> torch.Tensor:
        """Return an expert's weight in GEMM i, in float32."""
        return self.weights[i][expert].float()

    def multiply(self, call: tuple[torch.Tensor, ...], i: int) -> torch.Tensor:
        """Return the rows of GEMM i, bfloat16."""
        return torch._grouped_mm(call[i], self.weights[i].transpose(1, 2), offs=call[-1])

    def run(self, *call: torch.Tensor) -> torch.Tensor:
        """Compute both GEMMs; returns the second's rows."""
        self.multiply(call, 0)
        return self.multiply(call, 1)

    def error(self, *call: torch.Tensor) -> float:
        """Return the larger error of the two, of some rows of the largest group."""
        ends = call[-1]
        sizes = ends.diff(prepend=ends.new_zeros(1))
        expert = int(sizes.argmax())
        end = int(ends[expert])
        rows = slice(max(end - int(sizes[expert]), end - COMPARED), end)
        return max(
            relative_error(
                self.multiply(call, i)[rows],
                self.values(call, i, rows) @ self.weight_values(i, expert).T,
            )
            for i in range(2)
        )


class ScaledGroupedGemms(GroupedGemms):
    """`torch._scaled_grouped_mm` of both: e4m3, a scale for each row, or one for each matrix."""

    name = "scaled_grouped_mm x2"

    def __init__(self, weights: ExpertWeights) -> None:
        local = weights.local_experts
        self.weights = [weights.gate_up.packed.view(E4M3), weights.down.packed.view(E4M3)]
        self.scales = []
        for matrix, stored in zip(self.weights, (weights.gate_up, weights.down), strict=True):
            scale, rows = stored.block_scale[..., 0], matrix.shape[1]
            each = rows // scale.shape[1]
            self.scales.append(scale.repeat_interleave(each, 1).reshape(local, rows).contiguous())

    @classmethod
    def reason(cls, weights: ExpertWeights) -> str | None:
        """Return why it does not run, None where it does."""
        codes, scales = weights.number_format.codes, weights.number_format.scales
        if codes.dtype != E4M3 or scales is None or scales.columns is not None:
            return f"it has no form for {weights.format}"
        if current_capability() != (9, 0):
            return "it needs compute capability 9.0"
        if not hasattr(torch, "_scaled_grouped_mm"):
            return "this torch has no _scaled_grouped_mm"
        return None

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return float32 rows as e4m3, and a scale for each."""
        scale = (x.abs().amax(1) / 448).clamp(min=2.0**-20)
        return (x / scale[:, None]).clamp(-448, 448).to(E4M3), scale

    def values(self, call: tuple[torch.Tensor, ...], i: int, rows: slice) -> torch.Tensor:
        """Return the values of some rows that GEMM i takes, in float32."""
        return call[2 * i].float()[rows] * call[2 * i + 1][rows, None]

    def weight_values(self, i: int, expert: int) -> torch.Tensor:
        """Return an expert's weight in GEMM i, in float32."""
        return self.weights[i][expert].float() * self.scales[i][expert, :, None]

    def multiply(self, call: tuple[torch.Tensor, ...], i: int) -> torch.Tensor:
        """Return the rows of GEMM i, bfloat16."""
        return torch._scaled_grouped_mm(
            call[2 * i],
            self.weights[i].transpose(1, 2),
            call[2 * i + 1],
            self.scales[i],
            offs=call[-1],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


GEMMS = (GroupedGemms, ScaledGroupedGemms)
