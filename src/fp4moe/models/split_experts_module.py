"""Float experts that transformers has split over processes, as candidates for replace_moe.

What a process holds is described and compared with the definition as a layer of its own. Experts
that are split by columns are then gathered one at a time, quantised whole and cut at the borders of
the format's blocks, so that every scale is that of one process.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..experts import ExpertWeights
from ..part import Part, part_of_experts, part_of_intermediate
from ..resize import stack_experts
from .block import Candidate, stored_activation_scales
from .sharding import Sharding
from .storage import Storage

__all__ = ["local_module", "split_candidate"]


def local_module(module: Any) -> Any:
    """Return a module of the same class that holds this process's tensors as plain ones."""
    local = object.__new__(type(module))
    vars(local).update(vars(module))
    # transformers' hook, and what tells its forward to mask the ids of others.
    vars(local).pop("forward", None)
    vars(local).pop("_is_expert_parallel", None)
    local._parameters = {
        name: None if p is None else nn.Parameter(_local(p.detach()), requires_grad=False)
        for name, p in module._parameters.items()
    }
    return local


def _local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def split_candidate(
    candidate: Candidate, path: str, module: Any, local: Any, sharding: Sharding
) -> Candidate:
    """Turn the candidate of `local_module(module)` into one for the whole, or add the reasons."""
    storage = candidate.storage
    candidate.module = module
    if candidate.reasons or storage is None:
        return candidate
    if reasons := sharding.reasons(path, list(storage.names)):
        candidate.reasons += reasons
        return candidate
    experts = sharding.splits_experts(path)
    candidate.reasons += _placement_reasons(module, storage, experts)
    if candidate.reasons:
        return candidate
    mesh = sharding.mesh_of(path)
    index, count = mesh.get_local_rank(), mesh.size()
    assert candidate.num_experts and candidate.intermediate_size and candidate.quantize
    quantize = candidate.quantize
    if experts:
        total = candidate.num_experts * count
        part = part_of_experts(index, count, total, caller="replace_moe")
        candidate.part = lambda format: part
    else:
        total = candidate.intermediate_size * count
        find = functools.partial(part_of_intermediate, index, count, total, caller="replace_moe")
        candidate.part = lambda format: find(format=format)
        quantize = functools.partial(
            _quantize_gathered, local, storage, str(candidate.activation), mesh.get_group(), find
        )

    def held(method: str, format: str) -> ExpertWeights:
        weights = quantize(method, format)
        if experts and not sharding.hands_local_ids(path):
            ids = {"num_experts": total, "expert_offset": part.start}
            weights = dataclasses.replace(weights, **ids)
        return weights

    candidate.quantize = held
    return candidate


def _placement_reasons(module: Any, storage: Storage, experts: bool) -> list[str]:
    """Return why the tensors are not split as transformers' own styles do it."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if not experts and storage.biases:
        return ["its biases are split by columns; load the model with fp4moe.from_pretrained"]
    rows, columns = (2, 1) if storage.transposed else (1, 2)
    by_columns = _StridedShard(rows, split_factor=2) if storage.gated else Shard(rows)
    wanted: dict[str, Any] = {n: Shard(0) for n in storage.names}
    if not experts:
        wanted = {storage.first: by_columns, "down_proj": Shard(columns)}
    reasons = []
    for name, placement in wanted.items():
        found = getattr(module._parameters[name], "placements", ())
        normal = tuple(_normal(one, 3) for one in found)
        if normal != (_normal(placement, 3),):
            reasons.append(f"{name} is placed as {found}, not as ({placement},)")
    return reasons


def _normal(placement: Any, axes: int) -> tuple[Any, ...]:
    """Class, axis from 0 on and split factor of a placement."""
    axis = getattr(placement, "dim", None)
    axis = None if axis is None else axis % axes
    return type(placement).__name__, axis, getattr(placement, "split_factor", None)


def _quantize_gathered(
    local: Any,
    storage: Storage,
    activation: str,
    group: Any,
    find: Any,
    method: str,
    format: str,
) -> ExpertWeights:
    """Quantise whole experts, one after the other, and keep this process's columns of each.

    A collective of the processes that share the experts.
    """
    part: Part = find(format=format)
    tensors = {name: getattr(local, name).detach() for name in storage.names}
    halves = storage.split(tensors)
    scales = stored_activation_scales(local, format)
    inner = scales.pop("intermediate_scale", None)

    def whole(matrix: torch.Tensor, axis: int) -> torch.Tensor:
        matrix = matrix.contiguous()
        found = [torch.empty_like(matrix) for _ in range(part.count)]
        dist.all_gather(found, matrix, group=group)
        return torch.cat(found, axis)[None]

    def one(expert: int) -> ExpertWeights:
        axes = {"gate": 0, "up": 0, "down": 1}
        given: dict[str, Any] = {n: whole(t[expert], axes[n]) for n, t in halves.items()}
        given |= scales if inner is None else {**scales, "intermediate_scale": inner[expert]}
        given |= {"activation": activation, "method": method, "format": format}
        with torch.no_grad():
            return part.cut(ExpertWeights.quantize(**given))

    return stack_experts(next(iter(halves.values())).shape[0], one)
