"""Kernels that depart from the definition in one place, for the tests of the self-test."""

from __future__ import annotations

import torch

from fp4moe.kernels import KERNELS, PreparedWeights
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.reference import reference_w4a4
from fp4moe.tools.selftest import run_selftest

__all__ = ["SIZES", "TOKENS", "DownBiasUnweighted", "Variant", "failed", "run"]

SIZES = {"hidden_size": 84, "intermediate_size": 40, "num_experts": 5, "top_k": 2}
GATED = {"gated": {"activation": "gelu_tanh", "gated": True, **SIZES}}
TOKENS = (0, 1, 7, 33)


class Variant(ReferenceKernel):
    """The W4A4 definition, from which a mutation departs in one place.

    Whatever a subclass changes in the operands is kept, so that `restore` stays right.
    """

    def __init__(self):
        super().__init__("reference_w4a4", reference_w4a4, automatic=False)

    def change(self, operands):
        return operands

    def prepare(self, weights, *, hidden_alignment):
        right = super().prepare(weights, hidden_alignment=hidden_alignment)
        kept = {f"logical_{name}": t for name, t in right.operands._asdict().items()}
        return PreparedWeights(self.change(right.operands), kept, right.layer)

    def restore(self, prepared):
        logical = {name.removeprefix("logical_"): t for name, t in prepared.kept.items()}
        operands = prepared.operands._replace(**logical)
        return super().restore(PreparedWeights(operands, {}, prepared.layer))


def run(monkeypatch, kernel, layers=GATED, **options):
    """Put a kernel in the place of reference_w4a4 and test it."""
    monkeypatch.setitem(KERNELS, "reference_w4a4", kernel)
    return run_selftest("reference_w4a4", device="cpu", layers=layers, tokens=TOKENS, **options)


def failed(report):
    return {row.check for row in report.failures}


class DownBiasUnweighted(Variant):
    def run(self, call):
        bias = call.operands.down_bias
        call = call._replace(operands=call.operands._replace(down_bias=bias * 0))
        local = call.expert_ids - call.layer.expert_offset
        inside = (local >= 0) & (local < len(bias))
        added = torch.where(inside[..., None], bias[local.clamp(0, len(bias) - 1)], 0.0).sum(1)
        out = super().run(call).float() + added[:, : call.hidden.shape[1]]
        return out.to(call.hidden.dtype)
