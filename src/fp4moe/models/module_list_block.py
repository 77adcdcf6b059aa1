"""A block around fused experts: the forms that are known, and the module that computes one.

Not handled: experts that choose tokens, router noise, auxiliary losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..routing import sigmoid_topk, softmax_topk

__all__ = ["BlockForm", "FusedMoeBlock"]


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """What a block computes around its experts; names are those of its children.

    Attributes:
        experts, router: the list of experts, and what scores them.
        routing: "softmax" or "sigmoid" of the router's logits, or "given": it returns ids, weights.
        top_k: experts per token.
        renormalize, scaling, correction: see `fp4moe.routing`; correction is the selection bias.
        given: where ids and weights stand in the router's result.
        router_rank: 2: the router gets [T, H]; 3: [B, S, H]; 0: its weight is read, in float32.
        router_dtype: what its input is cast to; None: not cast.
        shared, shared_gate: expert of all tokens, and the Linear to 1 whose sigmoid weighs it.
        latent: Linears in front of and behind the experts.
        logits_rank: rank of the logits that are returned with the output; 0: output alone.
    """

    experts: str
    router: str
    routing: str
    top_k: int
    renormalize: bool = False
    scaling: float = 1.0
    correction: str | None = None
    given: tuple[int, int] = (0, 1)
    router_rank: int = 2
    router_dtype: torch.dtype | None = None
    shared: str | None = None
    shared_gate: str | None = None
    latent: tuple[str, str] | None = None
    logits_rank: int = 0

    def __str__(self) -> str:
        """Say it in words."""
        words = [f"{self.routing} routing, top {self.top_k}"]
        words += ["renormalised"] if self.renormalize else []
        words += [f"times {self.scaling:g}"] if self.scaling != 1 else []
        words += [f"selected with {self.correction}"] if self.correction else []
        words += [f"within {' and '.join(self.latent)}"] if self.latent else []
        words += [f"plus {self.shared}"] if self.shared else []
        return ", ".join(words) + (f" times {self.shared_gate}" if self.shared_gate else "")


class FusedMoeBlock(nn.Module):
    """A mixture-of-experts block of a known form: forward(hidden [T, H] or [B, S, H]).

    Keeps the children, parameters and buffers of `block` under their names, except its experts.
    Returns the output, or (output, router logits) where the block did.
    """

    def __init__(self, block: nn.Module, form: BlockForm, experts: nn.Module):
        super().__init__()
        for name, parameter in block._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in block._buffers.items():
            persistent = name not in block._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        for name, child in block._modules.items():
            self.add_module(name, experts if name == form.experts else child)
        self._form = form

    @property
    def form(self) -> BlockForm:
        """What this block computes around its experts."""
        return self._form

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """Route, apply the experts, and add the shared expert."""
        form = self._form
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        expert_ids, routing_weights, logits = self._route(hidden_states, tokens)
        x = tokens if form.latent is None else getattr(self, form.latent[0])(tokens)
        out = getattr(self, form.experts)(x, expert_ids, routing_weights)
        if form.latent is not None:
            out = getattr(self, form.latent[1])(out)
        if form.shared is not None:
            shared = getattr(self, form.shared)(tokens)
            if form.shared_gate is not None:
                shared = torch.sigmoid(getattr(self, form.shared_gate)(tokens)) * shared
            out = out + shared
        out = out.reshape(hidden_states.shape)
        if not form.logits_rank:
            return out
        whole = form.logits_rank == 3 and hidden_states.ndim == 3
        return out, logits.reshape(*hidden_states.shape[:-1], -1) if whole else logits

    def _route(
        self, hidden: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        form = self._form
        router = getattr(self, form.router)
        if form.router_rank == 0:
            bias = None if router.bias is None else router.bias.float()
            result = F.linear(tokens.float(), router.weight.float(), bias)
        else:
            x = tokens
            if form.router_rank == 3:
                x = hidden if hidden.ndim == 3 else tokens.unsqueeze(0)
            result = router(x if form.router_dtype is None else x.to(form.router_dtype))
        if form.routing == "given":
            ids, weights = (result[i].reshape(-1, form.top_k) for i in form.given)
            return ids, weights * form.scaling, weights
        logits = result.reshape(-1, result.shape[-1])
        options: dict[str, Any] = {"renormalize": form.renormalize, "scaling": form.scaling}
        if form.routing == "softmax":
            return *softmax_topk(logits, form.top_k, **options), logits
        bias = None if form.correction is None else getattr(self, form.correction)
        return *sigmoid_topk(logits, form.top_k, bias=bias, **options), logits

    def extra_repr(self) -> str:
        """Say the form in words."""
        return str(self._form)
