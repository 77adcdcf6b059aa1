"""Ways of writing experts with biases: everything around the products that `moe_writers` has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from moe_writers import Sizes
from torch import nn


def parts_of(sizes: Sizes, gated: bool = True, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Weights and biases of unit gain, as `fp4moe.moe_definition` names them."""
    generator = torch.Generator().manual_seed(5)
    experts, hidden, inner = sizes.experts, sizes.hidden, sizes.intermediate
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not gated:
        del shapes["gate"]
    parts = {}
    for name, (rows, columns) in shapes.items():
        weight = torch.randn(experts, rows, columns, generator=generator) / columns**0.5
        parts[name] = weight.to(dtype)
        parts[f"{name}_bias"] = torch.randn(experts, rows, generator=generator).to(dtype)
    return parts


class Biased(nn.Module):
    """Keeps what `stored` makes of the parts; `forward(hidden, ids, weights)` says how."""

    def __init__(self, parts: dict[str, torch.Tensor]):
        super().__init__()
        self.gated, self.experts = "gate" in parts, parts["up"].shape[0]
        for name, part in self.stored(parts).items():
            self.register_parameter(name, nn.Parameter(part.contiguous(), requires_grad=False))

    def stored(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gate before up in one tensor."""
        if not self.gated:
            names = {"up": "first", "up_bias": "first_bias"}
            return {names.get(name, name): part for name, part in parts.items()}
        first = torch.cat((parts["gate"], parts["up"]), 1)
        bias = torch.cat((parts["gate_bias"], parts["up_bias"]), 1)
        own = {"down": parts["down"], "down_bias": parts["down_bias"]}
        return {"first": first, "first_bias": bias, **own}

    def inner(self, first: torch.Tensor) -> torch.Tensor:
        """[..., 2 * I] or [..., I] to [..., I]."""
        if not self.gated:
            return F.silu(first)
        gate, up = first.chunk(2, -1)
        return F.silu(gate) * up


class Gathered(Biased):
    """Weights and biases gathered for each token."""

    def forward(self, hidden, ids, weights):
        first = torch.einsum("th,tkih->tki", hidden, self.first[ids]) + self.first_bias[ids]
        y = torch.einsum("tki,tkhi->tkh", self.inner(first), self.down[ids]) + self.down_bias[ids]
        return (y * weights.unsqueeze(-1)).sum(1)


class Dense(Biased):
    """All experts on all tokens by baddbmm, weighted by a scattered [T, E]."""

    def forward(self, hidden, ids, weights):
        dense = weights.new_zeros(hidden.shape[0], self.experts).scatter(1, ids, weights)
        x = hidden.expand(self.experts, -1, -1)
        first = torch.baddbmm(self.first_bias.unsqueeze(1), x, self.first.mT)
        y = torch.baddbmm(self.down_bias.unsqueeze(1), self.inner(first), self.down.mT)
        return (y * dense.t().unsqueeze(-1)).sum(0)


class Interleaved(Dense):
    """Gate and up in alternate rows, stored [E, in, out], as gpt-oss."""

    def stored(self, parts):
        first = torch.stack((parts["gate"], parts["up"]), 2).flatten(1, 2)
        bias = torch.stack((parts["gate_bias"], parts["up_bias"]), 2).flatten(1, 2)
        own = {"down": parts["down"].mT, "down_bias": parts["down_bias"]}
        return {"first": first.mT, "first_bias": bias, **own}

    def inner(self, first):
        return F.silu(first[..., ::2]) * first[..., 1::2]

    def forward(self, hidden, ids, weights):
        dense = weights.new_zeros(hidden.shape[0], self.experts).scatter(1, ids, weights)
        x = hidden.repeat(self.experts, 1).view(self.experts, -1, hidden.shape[-1])
        first = torch.bmm(x, self.first) + self.first_bias[..., None, :]
        y = torch.bmm(self.inner(first), self.down)
        y = y + self.down_bias[..., None, :]
        return (y * dense.t().unsqueeze(-1)).sum(0)


class Apart(Biased):
    """Gate and up as stacked tensors of their own."""

    def stored(self, parts):
        return parts

    def forward(self, hidden, ids, weights):
        up = torch.einsum("th,tkih->tki", hidden, self.up[ids]) + self.up_bias[ids]
        gate = torch.einsum("th,tkih->tki", hidden, self.gate[ids]) + self.gate_bias[ids]
        y = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, self.down[ids])
        return ((y + self.down_bias[ids]) * weights.unsqueeze(-1)).sum(1)


class Slices(Biased):
    """A loop over slices of stacked weights and biases."""

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for expert in range(self.experts):
            weight = (weights * (ids == expert)).sum(-1, keepdim=True)
            first = F.linear(hidden, self.first[expert], self.first_bias[expert])
            out = out + weight * F.linear(
                self.inner(first), self.down[expert], self.down_bias[expert]
            )
        return out


class Linears(Biased):
    """A ModuleList of experts, each of two or three Linears with bias."""

    def stored(self, parts):
        self.list = nn.ModuleList()
        names = [name for name in ("gate", "up", "down") if name in parts]
        for expert in range(self.experts):
            linears = nn.ModuleDict()
            for name in names:
                rows, columns = parts[name].shape[1:]
                linears[name] = nn.Linear(columns, rows, dtype=parts[name].dtype)
                linears[name].weight.data.copy_(parts[name][expert])
                linears[name].bias.data.copy_(parts[f"{name}_bias"][expert])
            self.list.append(linears.requires_grad_(False))
        return {}

    def one(self, expert, x):
        inner = expert["up"](x)
        if self.gated:
            inner = F.silu(expert["gate"](x)) * inner
        return expert["down"](inner if self.gated else F.silu(inner))

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        mask = F.one_hot(ids, self.experts).permute(2, 1, 0)
        for index, expert in enumerate(self.list):
            slot, token = torch.where(mask[index])
            out.index_add_(0, token, self.one(expert, hidden[token]) * weights[token, slot, None])
        return out


class StackedInGraph(Linears):
    """The weights and biases of a ModuleList, stacked at each call."""

    def forward(self, hidden, ids, weights):
        both = {
            name: [torch.stack([getattr(e[name], part) for e in self.list])[ids] for part in PARTS]
            for name in self.list[0]
        }

        def product(name, x, equation):
            return torch.einsum(equation, x, both[name][0]) + both[name][1]

        inner = product("up", hidden, "th,tkih->tki")
        if self.gated:
            inner = F.silu(product("gate", hidden, "th,tkih->tki")) * inner
        else:
            inner = F.silu(inner)
        y = product("down", inner, "tki,tkhi->tkh")
        return (y * weights.unsqueeze(-1)).sum(1)


class WeightedInput(Gathered):
    """The input is weighted, the biases are not."""

    def forward(self, hidden, ids, weights):
        x = hidden.unsqueeze(1) * weights.unsqueeze(-1)
        first = torch.einsum("tkh,tkih->tki", x, self.first[ids]) + self.first_bias[ids]
        y = torch.einsum("tki,tkhi->tkh", self.inner(first), self.down[ids]) + self.down_bias[ids]
        return y.sum(1)


PARTS = ("weight", "bias")
BIASED: dict[str, type[Biased]] = {
    "gathered": Gathered,
    "dense, baddbmm": Dense,
    "interleaved, transposed": Interleaved,
    "apart": Apart,
    "loop over slices": Slices,
    "list of Linears": Linears,
    "list, stacked in the graph": StackedInGraph,
    "weighted input": WeightedInput,
}
