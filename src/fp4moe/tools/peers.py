"""Who else computes a layer, for `fp4moe bench --peers`: each from its own package, where it loads.

humming              the kernel of this package's name, NVFP4 weights, as shipped
grouped_mm           transformers' experts, bfloat16, eager and compiled; also batched_mm,
                     deepgemm and sonicmoe, which take packages and cards of their own
torch._grouped_mm    its two GEMMs alone: the bfloat16 limit of any layer made of them
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..experts import ExpertWeights
from ..kernels import Layer, choose_kernel, current_capability
from ..module import FusedExperts
from .huggingface_experts import huggingface_experts

__all__ = ["FAILURES", "PREFIX", "Contender", "peers"]

PREFIX = "peer:"
# A compilation each, and beyond 64 tokens batched_mm gathers more than the experts themselves.
COMPILED_TOKENS, MOST_BATCHED = (1, 16, 128, 1024, 4096), 64
# In which module of transformers, and what it asks before it loads the kernel.
OPTIONAL = {"deepgemm": "is_deepgemm_loadable", "sonicmoe": "is_sonicmoe_loadable"}
# What a peer may raise that lacks a card, a package or an activation; it is named and left out.
FAILURES = (ImportError, ValueError, NotImplementedError, RuntimeError)


class Contender(NamedTuple):
    """One row of the table.

    Attributes:
        name: as it is printed. make: what to call with x, ids and weights for so many tokens; None
            leaves the number of tokens out.
        ours: whether it must round as little and repeat its bits, as this package's kernels do.
        reason: why it cannot be timed here; empty where it can.
    """

    name: str
    make: Callable[[int], Callable | None]
    ours: bool
    reason: str = ""


def peers(name: str, shape: Layer, weights: ExpertWeights) -> Iterator[Contender]:
    """Yield the peers for a layer of `fp4moe bench`, those that cannot be timed with the reason.

    Args:
        name: of `huggingface_experts`. weights: with the values that all of them get.
    """
    chosen, reasons = choose_kernel("humming", shape, current_capability())
    if chosen:
        module = FusedExperts(weights, kernel="humming", top_k=shape.top_k)
        yield Contender(PREFIX + "humming", lambda tokens: module, True)
    else:
        yield _left_out("humming", "; ".join(reasons))
    assert shape.top_k is not None
    experts = huggingface_experts(name, shape.top_k, weights)

    def implementation(kind: str, *args: torch.Tensor) -> torch.Tensor:
        experts.config._experts_implementation = kind
        return experts(*args)

    def compiled(tokens: int) -> Callable | None:
        if tokens not in COMPILED_TOKENS:
            return None
        torch._dynamo.reset()
        experts.config._experts_implementation = "grouped_mm"
        return torch.compile(experts, dynamic=False)

    def eager(kind: str, most: int | None = None) -> Contender:
        call = functools.partial(implementation, kind)
        return Contender(
            PREFIX + kind, lambda tokens: call if most is None or tokens <= most else None, False
        )

    yield eager("grouped_mm")
    yield Contender(PREFIX + "grouped_mm compiled", compiled, False)
    yield eager("batched_mm", MOST_BATCHED)
    for kind in OPTIONAL:
        reason = _reason(kind)
        yield _left_out(kind, reason) if reason else eager(kind)


def _left_out(kind: str, reason: str) -> Contender:
    return Contender(PREFIX + kind, lambda tokens: None, False, " ".join(reason.split()))


def _reason(kind: str) -> str:
    """Return why transformers cannot load that kernel here; empty where it can."""
    try:
        module: Any = importlib.import_module(f"transformers.integrations.{kind}")
        loadable = getattr(module, OPTIONAL[kind], None)
        if loadable is None:
            return f"this transformers has no {OPTIONAL[kind]}"
        loadable(raise_error=True)
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    return ""
