"""Watch a float block run: does its router's choice reach its experts, unchanged and alone?

Hooks see what the router returns and what the experts get; a torch function mode sees every other
use. Not here: which routers there are, and what is made of the answer (routers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from ..random_floats import random_normal
from .module_list import untouched

__all__ = ["RoutingTrace", "watch", "ways_to_run"]


class RoutingTrace:
    """What a run shows of one block: whether its router's choice reaches the experts unchanged."""

    def __init__(self, parent: nn.Module, router: nn.Module, experts: nn.Module):
        self.parent, self.router, self.experts = parent, router, experts
        self.problem = self.error = ""
        self.start()

    def start(self) -> None:
        """Forget what a run has shown."""
        self.runs = 0
        self.inside = self.waiting = False
        self.chosen: tuple[torch.Tensor, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether a run has reached the experts, or shown a problem."""
        return bool(self.runs or self.problem)

    def refuse(self, problem: str) -> None:
        """Note the first problem."""
        self.problem = self.problem or f"its block {problem}"

    def after_router(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.waiting:
            self.refuse("runs the router twice before the experts")
        self.chosen, self.waiting = tuple(output), True

    def before_experts(self, module: nn.Module, args: tuple, keywords: dict) -> None:
        self.inside = True
        if not self.waiting:
            self.refuse("runs the experts without running the router before")
        elif len(args) != 3 or keywords:
            self.refuse("does not hand (hidden, ids, weights) to the experts by position")
        elif args[1] is not self.chosen[2] or args[2] is not self.chosen[1]:
            self.refuse("changes the router's choice on its way to the experts")
        self.waiting = False

    def after_experts(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside = False
        self.runs += 1

    def after_parent(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.uses(tree_leaves(output)):
            self.refuse("returns what the router returned")

    def uses(self, values: list) -> bool:
        """Whether one of these is the router's, outside the experts."""
        return not self.inside and any(v is c for c in self.chosen for v in values)


class _Uses(TorchFunctionMode):
    """Tells the traces of every torch function that is called with their router's results."""

    def __init__(self, traces: list[RoutingTrace]):
        super().__init__()
        self.traces = traces

    def __torch_function__(self, function, types, args=(), kwargs=None):
        values = tree_leaves((args, kwargs))
        for trace in self.traces:
            if trace.uses(values):
                name = resolve_name(function) or getattr(function, "__name__", str(function))
                trace.refuse(f"uses what the router returns elsewhere, too (in {name})")
        return function(*args, **(kwargs or {}))


def watch(run: Callable[[], Any], traces: list[RoutingTrace]) -> None:
    """Run once and let the traces take note; what the model's code raises becomes their error."""
    handles = []
    for trace in traces:
        trace.start()
        handles += [
            trace.router.register_forward_hook(trace.after_router),
            trace.experts.register_forward_pre_hook(trace.before_experts, with_kwargs=True),
            trace.experts.register_forward_hook(trace.after_experts),
            trace.parent.register_forward_hook(trace.after_parent),
        ]
    error = "no run of a model around it reached both its router and its experts"
    failed = False
    try:
        with _Uses(traces):
            run()
    except Exception as raised:  # the model's code may raise anything
        failed = True
        error = f"its block could not be watched on random tokens: {raised}"
    finally:
        for handle in handles:
            handle.remove()
    for trace in traces:
        if trace.waiting and not failed:
            trace.refuse("runs the router without the experts")
        if failed:
            # What came after the failure is unknown.
            trace.start()
        trace.error = "" if trace.runs else error
        trace.chosen = ()


def ways_to_run(
    model: nn.Module, path: str, projection: torch.Tensor
) -> Iterator[Callable[[], Any]]:
    """Yield ways to run the block around an experts module: by itself, then in ever larger models.

    projection is its router's [E, H] weight.
    """
    names = path.split(".")[:-1]
    around = [model.get_submodule(".".join(names[:n])) for n in range(len(names), -1, -1)]
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = random_normal(generator, (1, 5, projection.shape[1]))
    hidden = hidden.to(projection)
    yield lambda: _run(around[0], hidden)
    for module in around:
        embed = getattr(module, "get_input_embeddings", lambda: None)()
        if isinstance(embed, nn.Embedding):
            ids = (
                torch.arange(5, dtype=torch.int64, device=embed.weight.device)[None]
                % embed.num_embeddings
            )
            yield lambda module=module, ids=ids: _run(module, ids)  # type: ignore[misc]


def _run(module: nn.Module, value: torch.Tensor) -> None:
    with untouched(module, value.device):
        module(value)
