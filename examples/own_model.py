"""A small decoder of one's own, written as GPT-fast writes its Mixtral, through fp4moe.backend.

Nothing in the model mentions fp4moe: the backend recognises the experts by their numbers.

Run: python examples/own_model.py
"""

from __future__ import annotations

import logging
import time

import torch
import torch.nn.functional as F
from torch import nn

import fp4moe

VOCABULARY, HIDDEN, INNER, HEADS, LAYERS = 256, 128, 192, 4, 2
EXPERTS, TOP_K, LENGTH = 8, 2, 32


class Attention(nn.Module):
    """Causal attention with a cache of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        shape = (HEADS, LENGTH, HIDDEN // HEADS)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(len(x), HEADS, -1).transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
        keys = self.keys.index_copy(1, position, k)
        values = self.values.index_copy(1, position, v)
        self.keys.copy_(keys)
        self.values.copy_(values)
        mask = torch.arange(LENGTH, device=x.device) <= position[:, None]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(out.transpose(0, 1).reshape(len(x), HIDDEN))


class Experts(nn.Module):
    """The experts of GPT-fast: gather the chosen weights, then einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / HIDDEN**0.5)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.softmax(self.router(x), dim=-1)
        weights, ids = torch.topk(scores, TOP_K, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        gated = F.silu(torch.einsum("ti,taoi->tao", x, self.gate[ids]))
        inner = torch.einsum("ti,taoi->tao", x, self.up[ids])
        out = torch.einsum("tao,taio->tai", gated * inner, self.down[ids])
        return torch.einsum("tai,ta->ti", out, weights)


class Decoder(nn.Module):
    """Embedding, layers of attention and experts, head; positions come with the call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(LENGTH, HIDDEN)
        self.attention = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.experts = nn.ModuleList(Experts() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.positions(position)
        for attention, experts in zip(self.attention, self.experts, strict=True):
            x = x + attention(F.rms_norm(x, (HIDDEN,)), position)
            x = x + experts(F.rms_norm(x, (HIDDEN,)))
        return self.head(F.rms_norm(x, (HIDDEN,)))


@torch.no_grad()
def generate(model, prompt: torch.Tensor, new_tokens: int) -> list[int]:
    """Return the likeliest tokens behind the prompt, one call each."""
    position = torch.arange(len(prompt), device=prompt.device)
    logits, tokens = model(prompt, position), []
    for step in range(new_tokens):
        token = logits[-1:].argmax(-1)
        tokens.append(token.item())
        logits = model(token, position[-1:] + 1 + step)
    return tokens


def main() -> None:
    """Generate with the float model and with the compiled one, and compare."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder().to(device).eval()
    prompt = torch.randint(VOCABULARY, (8,), device=device)
    print(f"float:    {generate(model, prompt, 12)}")

    # The report of the backend is a message of this logger.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fp4moe").setLevel(logging.INFO)
    options = {"inner_backend": "aot_eager", "on_no_match": "error"}
    compiled = torch.compile(model, backend=fp4moe.backend, fullgraph=True, options=options)
    start = time.perf_counter()
    print(f"compiled: {generate(compiled, prompt, 12)}")
    print(f"{time.perf_counter() - start:.0f} s with compiling, on {device}")

    # The compiled model computes what this one does: the same weights, rounded to NVFP4.
    for layer in model.experts:
        weights = fp4moe.ExpertWeights.quantize(
            gate=layer.gate, up=layer.up, down=layer.down, activation="silu"
        )
        for name, rounded in weights.dequantize().items():
            getattr(layer, name).data.copy_(rounded)
    print(f"rounded:  {generate(model, prompt, 12)}")


if __name__ == "__main__":
    main()
