"""split_experts: experts shared by processes that have a batch of their own each.

Everything else of the model stays whole on every process. In one graph: gather the tokens of all,
run the experts that are here, scatter the sums (`fp4moe.parallel.Exchange`). For transformers the
same is an implementation of expert parallelism, by the name "fp4moe_gather".
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import must, refuse
from ..formats.base import as_bytes
from ..module import FusedExperts
from ..parallel import GATHER, Exchange, check_alike
from ..part import part_of_experts
from .block import carry_hooks, runs_own_forward

__all__ = ["GatheredExperts", "register_gather", "split_experts"]

Model = TypeVar("Model", bound=nn.Module)
# What is compared of the codes of a layer.
HEAD = 1 << 14


class GatheredExperts(FusedExperts):
    """Some experts of a layer, called with the tokens of this process and run on those of all.

    Args: exchange: with the processes that hold the other experts. Others as of FusedExperts.
    """

    def __init__(self, weights: Any, exchange: Exchange, kernel: str = "auto", **options: Any):
        super().__init__(weights, kernel, **options)
        self.exchange = exchange

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts of all processes; see `fp4moe.fused_moe` for the arguments."""
        return self.exchange(super().forward, hidden_states, top_k_index, top_k_weights)


def split_experts(model: Model, mesh: Any) -> Model:
    """Keep one part of the experts of every fused block on each process, in place.

    Each process has a batch of its own, and attention and whatever else whole. Every process must
    run the model with equally many tokens in every step, in the same order of layers; `generate`
    needs prompts of one shape and as many new tokens everywhere. Compiled with fullgraph=True the
    exchange is part of the one graph.

    Args:
        model: a module with fused experts (`replace_moe`, `from_pretrained`), the same everywhere.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` of one axis, or of two, along the second
            of which processes share a batch, as under tensor parallelism. The experts are dealt out
            over all of its processes.

    Returns:
        The same model.

    Raises:
        ShapeError: the mesh is none, or its processes do not divide the experts.
        UnsupportedError: no fused experts, or some that are split already.
        CheckpointError: processes have other weights. The model is as it was.
    """
    from torch.distributed.device_mesh import DeviceMesh

    known = isinstance(mesh, DeviceMesh) and mesh.get_coordinate() is not None
    if not known or not (mesh.ndim == 1 or (mesh.ndim == 2 and mesh.mesh_dim_names)):
        must(
            "split_experts: mesh",
            "be a DeviceMesh that this process is in, of one axis, or of two that have names",
            mesh if isinstance(mesh, DeviceMesh) else type(mesh).__name__,
            'Pass init_device_mesh("cuda", (number of processes,)).',
        )
    found = {path: m for path, m in model.named_modules() if isinstance(m, FusedExperts)}
    what = f"{type(model).__name__} cannot be split"
    if not found or "" in found:
        reason = "it holds no fused experts" if not found else "it is the fused experts themselves"
        refuse("split_experts", what, reason, "Call replace_moe first, on a whole model.")
    for path, module in found.items():
        if module.parts or not runs_own_forward(module):
            held = f"holds {module.parts[0]}" if module.parts else "has another forward"
            refuse("split_experts", what, f"{path} {held}", "Load the whole model.")
    whole = mesh if mesh.ndim == 1 else mesh._flatten()
    index, count = whole.get_local_rank(), whole.size()
    caller = "split_experts"
    parts = {
        path: part_of_experts(index, count, module.num_experts, caller=caller)
        for path, module in found.items()
    }
    advice = "Give every process the same model."
    check_alike(_digest(found), "split_experts: model", advice, whole.get_group())
    exchange = Exchange(whole.get_group(), mesh.get_group(1) if mesh.ndim == 2 else None)
    for path, module in found.items():
        options = {"hidden_alignment": module.hidden_alignment, "routing": module.routing}
        options |= {"top_k": module.top_k}
        kernel = module.requested_kernel
        part = parts[path]
        gathered = GatheredExperts(part.cut(module.weights), exchange, kernel, **options)
        gathered.parts = (part,)
        gathered.train(module.training)
        carry_hooks(module, gathered)
        model.set_submodule(path, gathered)
    return model


def _digest(found: dict[str, FusedExperts]) -> str:
    """A text that differs for other layers, and for other codes at their beginning."""
    digest = hashlib.sha256()
    for path, module in found.items():
        digest.update(f"{path} {module.layer}".encode())
        for name, tensor in module.prepared.tensors().items():
            head = as_bytes(tensor.reshape(-1))[:HEAD].cpu()
            digest.update(name.encode() + bytes(head.view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]


@functools.cache
def _gather_class() -> Any:
    from torch.distributed import get_process_group_ranks
    from transformers.distributed.expert_parallel import EPImplementation

    class GatherEP(EPImplementation):
        """The tokens of all processes on each, and the sums back: static sizes, one graph."""

        def __init__(self, experts, ep_mesh, tp_mesh):
            self.experts_forward = experts.forward
            # Packed experts know which global ids are theirs; transformers' own want local ones.
            self.packed = isinstance(experts, FusedExperts)
            self.num_local_experts = experts.num_experts
            self.start = ep_mesh.get_local_rank() * experts.num_experts
            shared = tp_mesh.size() > 1
            ranks = get_process_group_ranks(ep_mesh.get_group())
            if shared and not set(get_process_group_ranks(tp_mesh.get_group())) <= set(ranks):
                reason = "a process that shares its batch holds none of the experts"
                refuse(GATHER, "tokens cannot be exchanged", reason, "Pass a larger ep_size.")
            self.exchange = Exchange(ep_mesh.get_group(), tp_mesh.get_group() if shared else None)

        def __call__(self, hidden_states, top_k_index, top_k_weights):
            run = self.experts_forward if self.packed else self._run_local
            return self.exchange(run, hidden_states, top_k_index, top_k_weights)

        def _run_local(self, hidden, ids, weights):
            local = ids.long() - self.start
            other = (local < 0) | (local >= self.num_local_experts)
            local = local.masked_fill(other, self.num_local_experts)
            weights = weights.masked_fill(other, 0.0).to(hidden.dtype)
            return self.experts_forward(hidden, local, weights)

    return GatherEP


def register_gather() -> None:
    """Make ep_implementation="fp4moe_gather" known to transformers 5.23 and newer; repeatable."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    EPImplementationInterface.register(GATHER, _gather_class())
