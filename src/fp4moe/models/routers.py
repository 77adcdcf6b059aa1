"""Routers that choose in one launch: fp4moe::choose_experts instead of a model's own torch code.

A fused router is the same module with the same tensors and hooks, and it returns what the model's
own does, so that blocks may use the values as they like. Whether a router is one of these is asked
in routing_plan.py. Not handled: weights that are not renormalised.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from ..kernels import Routing

__all__ = ["ROUTERS", "FusedRouter", "RouterForm", "fuse_router", "fused_copy", "read_routing"]

Logits = Callable[[Any, torch.Tensor], torch.Tensor]


def _linear_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden.reshape(-1, router.weight.shape[1]), router.weight)


def _float32_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.reshape(-1, router.weight.shape[1])
    return linear(hidden.to(torch.float32), router.weight.to(torch.float32))


def _normed_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)


@dataclasses.dataclass(frozen=True)
class RouterForm:
    """How the routers of some classes route, and the attributes that hold what it takes.

    Attributes:
        method: one of FUSED_ROUTING_METHODS.
        logits: (router, hidden) -> [T, E], as the class computes them.
        projection: the [E, H] weight.
        top_k, bias, num_groups, top_groups, scaling: see `Routing`; None where it has none.
        output_scale: [E] factor of each expert's weight.
        probabilities: whether softmax(logits) in float32 comes first in its results, not logits.
        cast: whether its weights have the dtype of the logits, not float32.
    """

    method: str
    logits: Logits
    projection: str
    top_k: str
    bias: str | None = None
    num_groups: str | None = None
    top_groups: str | None = None
    scaling: str | None = None
    output_scale: str | None = None
    probabilities: bool = False
    cast: bool = False


_SOFTMAX = RouterForm("softmax_topk", _linear_logits, "weight", "top_k")
_SOFTMAX_CAST = dataclasses.replace(_SOFTMAX, cast=True)
_SIGMOID = RouterForm(
    "sigmoid_topk",
    _float32_logits,
    "weight",
    "top_k",
    bias="e_score_correction_bias",
    num_groups="num_group",
    top_groups="topk_group",
    scaling="routed_scaling_factor",
)
_GEMMA4 = RouterForm(
    "softmax_topk",
    _normed_logits,
    "proj.weight",
    "config.top_k_experts",
    output_scale="per_expert_scale",
    probabilities=True,
)
# By class name, transformers 5.17 to 5.24.
ROUTERS: dict[str, RouterForm] = {
    "Gemma4TextRouter": _GEMMA4,
    **dict.fromkeys(
        (
            "DeepseekV3TopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4MoeTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        _SIGMOID,
    ),
    **dict.fromkeys(("MiniMaxTopKRouter", "MixtralTopKRouter"), _SOFTMAX),
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ),
        _SOFTMAX_CAST,
    ),
}


class FusedRouter(nn.Module):
    """A router of a model that calls fp4moe::choose_experts; all else is the model's own class.

    A module becomes one by `fuse_router`, which gives it a class derived from this and from its
    own, as FSDP2 does: names, tensors, hooks and isinstance stay.

    Attributes:
        kind, form: its own class, and how that routes.
        routing: how it chooses.
    """

    kind: ClassVar[type[nn.Module]]
    form: ClassVar[RouterForm]
    routing: Routing

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (logits or probabilities [T, E], routing weights [T, K], expert ids [T, K])."""
        form = self.form
        logits = form.logits(self, hidden_states)
        nothing = logits.new_empty(0)
        ids, weights = torch.ops.fp4moe.choose_experts.default(
            logits.reshape(-1, logits.shape[-1]),
            getattr(self, form.bias) if form.bias else nothing,
            getattr(self, form.output_scale) if form.output_scale else nothing,
            *self.routing,
        )
        if form.cast:
            weights = weights.to(logits.dtype)
        shape = (*logits.shape[:-1], self.routing.top_k)
        first = logits.softmax(-1, torch.float32) if form.probabilities else logits
        return first, weights.reshape(shape), ids.reshape(shape)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by its own class, which can be imported."""
        return _blank, (self.kind,), vars(self)


@functools.cache
def _derived(kind: Any) -> type[FusedRouter]:
    own = {"kind": kind, "form": ROUTERS[kind.__name__], "__module__": __name__}
    return type(f"Fused{kind.__name__}", (FusedRouter, kind), own)


def _blank(kind: Any) -> FusedRouter:
    derived = _derived(kind)
    return derived.__new__(derived)


def fuse_router(router: Any, routing: Routing) -> None:
    """Let a router of a class in ROUTERS choose by the operator, in place."""
    kind: Any = type(router)
    if not isinstance(router, FusedRouter):
        router.__class__ = _derived(kind)
    router.routing = routing


def fused_copy(router: nn.Module, routing: Routing) -> FusedRouter:
    """Return what a router would become; it shares the tensors."""
    fused = _blank(type(router))
    vars(fused).update(vars(router), routing=routing)
    return fused


def read_routing(router: Any) -> Routing:
    """Return how a router of a class in ROUTERS says that it chooses."""
    form = ROUTERS[type(router).__name__]

    def read(name: str | None) -> Any:
        return 1 if name is None else attrgetter(name)(router)

    groups, kept = int(read(form.num_groups)), int(read(form.top_groups))
    if groups == kept:
        # Nothing is dropped, and TRT-LLM-Gen limits the number of groups.
        groups = kept = 1
    return Routing(form.method, int(read(form.top_k)), groups, kept, float(read(form.scaling)))
