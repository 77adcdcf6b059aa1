"""The layer pair by pair of token and expert, in torch's own autograd and any float dtype."""

from __future__ import annotations

import math

import torch

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
# Of gate and up, or of up alone; written out, not taken from fp4moe.activations.
PLAIN = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * torch.erfc(-x / math.sqrt(2)),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "identity": lambda x: x,
}
PAIRED = {
    "silu(alpha=1.702,beta=1,limit=1.5)": lambda g, u: (
        g.clip(max=1.5) / (1 + torch.exp(-1.702 * g.clip(max=1.5))) * (u.clip(-1.5, 1.5) + 1)
    ),
    "gelu_tanh(limit=0.75)": lambda g, u: (
        PLAIN["gelu_tanh"](g.clip(max=0.75)) * u.clip(-0.75, 0.75)
    ),
    "silu_step(limit=0.5)": lambda g, u: PLAIN["silu"](g).clip(max=0.5) * u.clip(-0.5, 0.5),
    "silu_softcap(alpha=1.5,beta=2)": lambda g, u: (
        1.5 * torch.tanh(g / 1.5) / (1 + torch.exp(-g)) * 2 * torch.tanh(u / 2)
    ),
}


def combine(activation, up, gate):
    if activation in PAIRED:
        return PAIRED[activation](gate, up)
    return PLAIN[activation](up) if gate is None else PLAIN[activation](gate) * up


def pairwise(hidden, weights, expert_ids, routing_weights, rounded=None):
    """[T, H] of hidden's dtype; rounded(name, value, expert): what stands for a rounded value."""
    rounded = rounded or (lambda name, value, expert: value)
    parts = {name: part.to(hidden.dtype) for name, part in weights.dequantize().items()}
    local = expert_ids - weights.expert_offset
    token, slot = ((local >= 0) & (local < weights.local_experts)).nonzero(as_tuple=True)
    expert = local[token, slot]

    def product(name, x):
        y = torch.einsum("pnk,pk->pn", parts[name][expert], x)
        return y + parts[f"{name}_bias"][expert] if f"{name}_bias" in parts else y

    x = rounded("hidden", hidden, None)[token]
    gate = product("gate", x) if "gate" in parts else None
    inner = combine(weights.activation, product("up", x), gate)
    y = rounded("output", product("down", rounded("inner", inner, expert)), expert)
    out = torch.zeros_like(hidden)
    return out.index_add(0, token, y * routing_weights[token, slot, None])
