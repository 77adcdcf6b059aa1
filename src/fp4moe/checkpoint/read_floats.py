"""Float experts of a checkpoint, quantised one after the other while they are read; and biases.

No more than one expert, or one stack, is there as floats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ..errors import CheckpointError, ShapeError, refuse
from ..experts import ExpertWeights
from ..pack import split_gate_up
from ..part import EXPERTS, INTERMEDIATE, Part
from ..resize import stack_experts
from .files import CheckpointFiles
from .naming import fail
from .plan import ExpertsPlan
from .values import FIX

__all__ = ["experts_here", "quantize_experts", "read_biases"]


def experts_here(plan: ExpertsPlan, part: Part | None) -> range:
    """The experts that are read."""
    if part is not None and part.kind == EXPERTS:
        return range(part.start, part.stop)
    return range(plan.facts.num_experts)


def quantize_experts(
    files: CheckpointFiles,
    path: str,
    plan: ExpertsPlan,
    device: torch.device,
    dtype: torch.dtype,
    part: Part | None,
) -> ExpertWeights:
    """Read and quantise one experts module, or one part of it, cut from whole experts.

    Args: as of `read_experts`.
    """
    facts, here = plan.facts, experts_here(plan, part)
    stacks = {
        name: files.tensor(matrix.keys["packed"])
        for (expert, name), matrix in plan.matrices.items()
        if expert is None
    }
    biases = read_biases(files, plan, dtype, here)

    def one(index: int) -> ExpertWeights:
        expert = here[index]
        floats = {
            name: tensor[expert : expert + 1].to(device, dtype) for name, tensor in stacks.items()
        } or {
            name: files.tensor(plan.matrices[expert, name].keys["packed"]).to(device, dtype)[None]
            for name in ("gate_proj", "up_proj", "down_proj")[not facts.gated :]
        }
        floats |= {name: b[index : index + 1].to(device) for name, b in biases.items()}
        weights = _quantize_one(floats, facts, bool(stacks), f"{path}, expert {expert}")
        return part.cut(weights) if part is not None and part.kind == INTERMEDIATE else weights

    weights = stack_experts(len(here), one)
    return dataclasses.replace(weights, num_experts=facts.num_experts, expert_offset=here.start)


def read_biases(
    files: CheckpointFiles, plan: ExpertsPlan, dtype: torch.dtype, here: range
) -> dict[str, torch.Tensor]:
    """Those that there are of gate_bias, up_bias [L, I] and down_bias [L, H], cast to dtype."""
    found: dict[str, torch.Tensor] = {}
    for (expert, name), key in plan.biases.items():
        if expert is not None and expert not in here:
            continue
        bias = files.tensor(key).to(dtype, copy=True)
        if not bool(torch.isfinite(bias).all()):
            fail("hold finite numbers", f"inf or NaN in {key!r}", FIX)
        stem = name.removesuffix("_proj")
        if expert is not None:
            size = (len(here), *bias.shape)
            whole = found.setdefault(f"{stem}_bias", bias.new_zeros(size))
            whole[expert - here.start] = bias
            continue
        bias = bias[here.start : here.stop]
        if stem == "gate_up":
            pair = split_gate_up(bias[..., None], plan.facts.layout)
            found |= {"gate_bias": pair[0][..., 0], "up_bias": pair[1][..., 0]}
        else:
            found[f"{stem}_bias"] = bias
    return found


def _quantize_one(
    floats: Mapping[str, torch.Tensor], facts, stacked: bool, where: str
) -> ExpertWeights:
    named = {name.removesuffix("_proj"): tensor for name, tensor in floats.items()}
    layout = facts.layout
    if "w13" in named:
        # Inkling's own name for gate and up, row by row.
        named["gate_up"], layout = named.pop("w13"), "gate_up_interleaved"
    try:
        return ExpertWeights.quantize(
            **named,  # type: ignore[arg-type]
            activation=facts.activation,
            layout=layout,
            transposed=facts.transposed and stacked,
            format=facts.format,
        )
    except ShapeError as error:
        refuse(
            "from_pretrained",
            f"the weights of {where} cannot be quantised",
            str(error).rstrip("."),
            "Check the checkpoint.",
            error=CheckpointError,
            cause=error,
        )
