"""Many ways of writing one mixture of experts, in plain torch, for tests of the passes.

A writer computes `experts(hidden [T, H], ids [T, K], weights [T, K]) -> [T, H]` from its own
parameters; `Model` puts a router and a shared expert around it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class Sizes:
    experts: int = 4
    top_k: int = 2
    hidden: int = 32
    intermediate: int = 48


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}


class Writer(nn.Module):
    """Stacked weights [E, out, in], gate and up in one tensor; `forward` says how."""

    gated_only = False

    def __init__(self, sizes: Sizes, activation: str, gated: bool, dtype=torch.float32):
        super().__init__()
        self.sizes, self.gated = sizes, gated
        self.act = ACTIVATIONS[activation]
        self.activation = activation
        generator = torch.Generator().manual_seed(3)
        shape = (sizes.experts, sizes.intermediate, sizes.hidden)
        parts = {
            "gate": torch.randn(shape, generator=generator) / sizes.hidden**0.5,
            "up": torch.randn(shape, generator=generator) / sizes.hidden**0.5,
            "down": torch.randn(shape, generator=generator).mT / sizes.intermediate**0.5,
        }
        if not gated:
            del parts["gate"]
        self.parts = {name: part.to(dtype) for name, part in parts.items()}
        self.build({name: part.contiguous() for name, part in self.parts.items()})

    def build(self, parts: dict[str, torch.Tensor]) -> None:
        """Keep the weights as this way of writing stores them."""
        first = torch.cat([parts["gate"], parts["up"]], 1) if self.gated else parts["up"]
        self.first, self.down = nn.Parameter(first), nn.Parameter(parts["down"])

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """[..., 2 * I] or [..., I] to [..., I]."""
        if not self.gated:
            return self.act(first)
        gate, up = first.chunk(2, -1)
        return self.act(gate) * up


class GroupedMM(Writer):
    """Sorted tokens and grouped_mm, as transformers 5.23 does."""

    def mm(self, x, weight, offs):
        return torch._grouped_mm(x.bfloat16(), weight.bfloat16().mT, offs=offs).to(x.dtype)

    def forward(self, hidden, ids, weights):
        top_k = ids.shape[-1]
        flat = ids.reshape(-1)
        order = flat.argsort()
        sorted_ids = flat[order]
        counts = torch.histc(
            sorted_ids.float(), bins=self.sizes.experts, min=0, max=self.sizes.experts - 1
        )
        offs = counts.cumsum(0, dtype=torch.int32)
        x = hidden[order // top_k]
        y = self.mm(self.inner(self.mm(x, self.first, offs)), self.down, offs)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return y[inverse].view(-1, top_k, hidden.shape[-1]).sum(1).to(hidden.dtype)


class GroupedMMSentinel(GroupedMM):
    """The form of transformers 5.17: ids beyond the experts are clamped and masked."""

    def forward(self, hidden, ids, weights):
        top_k, experts = ids.shape[-1], self.sizes.experts
        flat = ids.reshape(-1)
        order = flat.argsort()
        sorted_ids = flat[order]
        beyond = (sorted_ids >= experts).unsqueeze(-1)
        sorted_ids.clamp_(max=experts - 1)
        counts = torch.histc(sorted_ids.int().float(), bins=experts, min=0, max=experts - 1)
        offs = counts.cumsum(0, dtype=torch.int32)
        x = hidden[order // top_k].masked_fill_(beyond, 0.0)
        y = self.mm(self.inner(self.mm(x, self.first, offs)), self.down, offs)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        y = y.masked_fill(beyond, 0.0)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return y[inverse].view(-1, top_k, hidden.shape[-1]).sum(1).to(hidden.dtype)


class BatchedMM(Writer):
    """Gathered weights and bmm, as transformers 5.23 does."""

    def forward(self, hidden, ids, weights):
        top_k = self.sizes.top_k
        flat = ids.reshape(-1)
        x = hidden.repeat_interleave(top_k, dim=0)
        first = torch.bmm(self.first[flat], x.unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(self.down[flat], self.inner(first).unsqueeze(-1)).squeeze(-1)
        y = y * weights.reshape(-1).unsqueeze(-1)
        return y.view(-1, top_k, self.sizes.hidden).sum(1).to(hidden.dtype)


class Separate(Writer):
    """Gate and up as stacked tensors of their own."""

    def build(self, parts):
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part))

    def both(self, gate, up):
        return self.act(gate) * up if self.gated else self.act(up)


class GatherEinsum(Separate):
    """gpt-fast: weights gathered for each token, einsum over them."""

    def forward(self, hidden, ids, weights):
        up = torch.einsum("th,tkih->tki", hidden, self.up[ids])
        gate = torch.einsum("th,tkih->tki", hidden, self.gate[ids]) if self.gated else up
        y = torch.einsum("tki,tkhi->tkh", self.both(gate, up), self.down[ids])
        return (y * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


class DenseOneHot(Separate):
    """All experts on all tokens, weighted by a one-hot sum."""

    def forward(self, hidden, ids, weights):
        dense = (F.one_hot(ids, self.sizes.experts).to(weights.dtype) * weights[..., None]).sum(1)
        up = torch.einsum("th,eih->tei", hidden, self.up)
        gate = torch.einsum("th,eih->tei", hidden, self.gate) if self.gated else up
        y = torch.einsum("tei,ehi->teh", self.both(gate, up), self.down)
        return torch.einsum("teh,te->th", y, dense.to(y.dtype))


class DenseScatter(Writer):
    """Diffusers-like: bmm over all experts, weighted by a scattered [T, E]."""

    def forward(self, hidden, ids, weights):
        tokens = hidden.shape[0]
        dense = weights.new_zeros((tokens, self.sizes.experts))
        dense = dense.scatter(1, ids, weights).to(hidden.dtype)
        x = hidden.expand(self.sizes.experts, -1, -1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first.mT)), self.down.mT)
        return (y * dense.t().unsqueeze(-1)).sum(0)


class Interleaved(DenseScatter):
    """Gate and up in alternate rows."""

    gated_only = True

    def build(self, parts):
        super().build(parts)
        rows = torch.stack([parts["gate"], parts["up"]], 2).flatten(1, 2)
        self.first = nn.Parameter(rows)

    def inner(self, first):
        return self.act(first[..., 0::2]) * first[..., 1::2]


class Transposed(Writer):
    """Stored as [E, in, out], up before gate; bmm over all experts."""

    def build(self, parts):
        first = torch.cat([parts["up"], parts["gate"]], 1) if self.gated else parts["up"]
        self.first = nn.Parameter(first.mT.contiguous())
        self.down = nn.Parameter(parts["down"].mT.contiguous())

    def inner(self, first):
        if not self.gated:
            return self.act(first)
        up, gate = first.chunk(2, -1)
        return self.act(gate) * up

    def forward(self, hidden, ids, weights):
        mask = F.one_hot(ids, self.sizes.experts).to(hidden.dtype)
        dense = torch.einsum("tke,tk->et", mask, weights.to(hidden.dtype))
        x = hidden.unsqueeze(0).repeat(self.sizes.experts, 1, 1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first)), self.down)
        return (y * dense.unsqueeze(-1)).sum(dim=0)


class WeightedInput(Transposed):
    """Llama4-like: each expert's input is multiplied by its weight, zero where not chosen."""

    def forward(self, hidden, ids, weights):
        tokens, experts = hidden.shape[0], self.sizes.experts
        dense = weights.new_zeros((tokens, experts))
        dense = dense.scatter(1, ids, weights).t().reshape(-1, 1).to(hidden.dtype)
        x = (hidden.repeat(experts, 1) * dense).view(experts, tokens, -1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first)), self.down)
        return y.sum(0)


class DenseScores(Transposed):
    """Llama4: the sigmoid of scores scattered into minus infinity weighs the input."""

    def forward(self, hidden, ids, weights):
        tokens, experts = hidden.shape[0], self.sizes.experts
        scores = weights.new_full((tokens, experts), float("-inf")).scatter(1, ids, weights)
        scores = torch.sigmoid(scores).t().reshape(-1, 1).to(hidden.dtype)
        x = (hidden.repeat(experts, 1) * scores).view(experts, tokens, -1)
        y = torch.bmm(self.inner(torch.bmm(x, self.first)), self.down)
        return y.sum(0)


class Listed(Separate):
    """One small module for each expert."""

    def build(self, parts):
        self.experts = nn.ModuleList()
        for expert in range(self.sizes.experts):
            modules = nn.ModuleDict()
            for name, part in parts.items():
                linear = nn.Linear(part.shape[2], part.shape[1], bias=False, dtype=part.dtype)
                linear.weight = nn.Parameter(part[expert].clone())
                modules[name] = linear
            self.experts.append(modules)

    def one(self, expert, x):
        up = expert["up"](x)
        gate = expert["gate"](x) if self.gated else up
        return expert["down"](self.both(gate, up))


class LoopIndexAdd(Listed):
    """Mixtral: where, the expert on its tokens, index_add_."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        mask = F.one_hot(ids, self.sizes.experts).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            slot, token = torch.where(mask[index])
            y = self.one(expert, hidden[token]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(hidden.dtype))
        return out


class LoopMask(Listed):
    """DeepSeek-like: every expert on all tokens, multiplied by what it weighs."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            weight = (weights * (ids == index)).sum(-1, keepdim=True)
            out = out + self.one(expert, hidden) * weight.to(hidden.dtype)
        return out


class LoopWhere(Listed):
    """torch.where between the expert and zero, added in place."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            hit = ids == index
            weight = torch.where(hit, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
            y = self.one(expert, hidden) * weight.to(hidden.dtype)
            out += torch.where(hit.any(-1, keepdim=True), y, torch.zeros_like(y))
        return out


class LoopBoolean(Listed):
    """A boolean mask reads and writes the tokens of each expert."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            hit = ids == index
            chosen = hit.any(-1)
            weight = (weights * hit).sum(-1, keepdim=True)
            out[chosen] += (self.one(expert, hidden[chosen]) * weight[chosen]).to(hidden.dtype)
        return out


class SortSplit(Listed):
    """DeepSeek's inference: sort, split by the numbers of tokens, one expert after the other."""

    def forward(self, hidden, ids, weights):
        counts = F.one_hot(ids.reshape(-1), self.sizes.experts).sum(0).tolist()
        order = ids.reshape(-1).argsort()
        pieces = hidden[order // self.sizes.top_k].split(counts)
        y = torch.cat([self.one(e, x) for e, x in zip(self.experts, pieces, strict=True)])
        back = torch.empty_like(y)
        back[order] = y
        y = back.view(*ids.shape, self.sizes.hidden) * weights.unsqueeze(-1)
        return y.sum(1).to(hidden.dtype)


class StackedLoop(Writer):
    """A loop over slices of stacked weights, weighted by a dense column."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for index in range(self.sizes.experts):
            weight = (weights * (ids == index)).sum(-1, keepdim=True)
            y = F.linear(self.inner(F.linear(hidden, self.first[index])), self.down[index])
            out = out + y * weight.to(hidden.dtype)
        return out


WRITERS: dict[str, type[Writer]] = {
    "grouped_mm": GroupedMM,
    "grouped_mm, 5.17": GroupedMMSentinel,
    "batched_mm": BatchedMM,
    "gather and einsum": GatherEinsum,
    "dense, one-hot": DenseOneHot,
    "dense, scatter": DenseScatter,
    "interleaved": Interleaved,
    "transposed": Transposed,
    "weighted input": WeightedInput,
    "sigmoid of scores": DenseScores,
    "loop, index_add": LoopIndexAdd,
    "loop, masks": LoopMask,
    "loop, where": LoopWhere,
    "loop, boolean": LoopBoolean,
    "loop over slices": StackedLoop,
    "sort and split": SortSplit,
}


class Model(nn.Module):
    """A writer with what stands around it in a model.

    Args:
        writer: the experts. router: whether ids and weights are computed from hidden inside.
        batched: whether hidden is [B, S, H]. shared: whether a shared expert is added.
    """

    def __init__(self, writer, router=True, batched=False, shared=False):
        super().__init__()
        sizes = writer.sizes
        self.experts, self.batched = writer, batched
        self.gate = self.linear(sizes.experts) if router else None
        self.shared = self.linear(sizes.hidden) if shared else None
        self.requires_grad_(False)

    def linear(self, out):
        made = nn.Linear(self.experts.sizes.hidden, out, bias=False)
        weight = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(out))
        made.weight = nn.Parameter(weight / made.in_features**0.5)
        return made.to(next(self.experts.parameters()).dtype)

    def forward(self, hidden, ids=None, weights=None):
        x = hidden.flatten(0, -2) if self.batched else hidden
        if self.gate is not None:
            probabilities = self.gate(x).float().softmax(-1)
            weights, ids = torch.topk(probabilities, self.experts.sizes.top_k, dim=-1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = self.experts(x, ids, weights)
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(hidden.shape) if self.batched else y


class Alone(nn.Module):
    """A model that takes hidden states only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden):
        return self.model(hidden)


def inputs(sizes: Sizes, tokens: int = 7, router: bool = True, batched: bool = False, dtype=None):
    """What `Model` takes."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (2, tokens, sizes.hidden) if batched else (tokens, sizes.hidden)
    hidden = torch.randn(shape, generator=generator).to(dtype or torch.float32)
    if router:
        return (hidden,)
    count = 2 * tokens if batched else tokens
    scores = torch.rand(count, sizes.experts, generator=generator)
    weights = torch.rand(count, sizes.top_k, generator=generator).to(hidden.dtype)
    return hidden, scores.argsort(1)[:, : sizes.top_k], weights


def capture_dynamo(model, args):
    """The graph that torch.compile hands to a backend, and its inputs."""
    found = []

    def backend(graph, values):
        found.append((graph, list(values)))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    return found[0]


@functools.lru_cache(maxsize=1)
def exported(model, args, strict=False):
    """The exported program, which several routes start from."""
    with torch.no_grad():
        return torch.export.export(model, args, strict=strict)


def capture_export(model, args, strict=False, decomposed=False):
    """The graph of an exported program, parameters as placeholders, and real values for it."""
    program = exported(model, args, strict)
    if decomposed:
        program = program.run_decompositions()
    stored = {**dict(model.named_parameters()), **dict(model.named_buffers()), **program.constants}
    given = iter(args)
    values = [
        stored[spec.target] if spec.target is not None else next(given)
        for spec in program.graph_signature.input_specs
    ]
    # A copy: the graph is about to be rewritten, the program is not.
    return torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph)), values


def capture_unlifted(model, args):
    """What ep.module() is: parameters as attributes."""
    return exported(model, args).module(), list(args)


def capture_symbolic(model, args):
    """torch.fx.symbolic_trace: no shapes, modules as nodes."""
    return torch.fx.symbolic_trace(Alone(model) if len(args) == 1 else model), list(args)


ROUTES = {
    "dynamo": capture_dynamo,
    "export strict": lambda model, args: capture_export(model, args, strict=True),
    "export": capture_export,
    "export decomposed": lambda model, args: capture_export(model, args, decomposed=True),
    "export module": capture_unlifted,
    "symbolic": capture_symbolic,
}


class LargestStorage(TorchDispatchMode):
    """The largest storage that any operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result
