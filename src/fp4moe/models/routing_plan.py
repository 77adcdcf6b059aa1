"""Which routers of a model may be fused: class names propose (routers.ROUTERS), numbers decide.

A fused router must return on random tokens what the model's own returns. Not handled, with the
reason: other routers, weights that are not renormalised, ModuleLists.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..kernels import Routing
from ..module import FusedExperts
from ..precision import float32_as_written
from ..random_floats import random_normal
from ..routing import ROUNDINGS
from .block import tensor_reasons
from .experts_module import is_experts_module
from .module_list_block import FusedMoeBlock
from .routers import ROUTERS, FusedRouter, RouterForm, fused_copy, read_routing

__all__ = ["FusedRouting", "fused_router_beside", "plan_fused_routing"]

ROUTER_WORDS = ("gate", "rout")
PROBE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class FusedRouting:
    """How the router at a path of a model chooses."""

    path: str
    routing: Routing


def plan_fused_routing(
    model: nn.Module, experts: Mapping[str, int | None]
) -> tuple[dict[str, FusedRouting], dict[str, list[str]]]:
    """Return (plans, reasons against) by the paths of experts; changes nothing.

    Runs routers on random tokens. Experts whose router is fused already have neither.

    Args:
        experts: the number of experts by the path of a module that holds them, fused or not.
    """
    plans: dict[str, FusedRouting] = {}
    refused: dict[str, list[str]] = {}
    for path, num_experts in experts.items():
        if fused_router_beside(model, path) is not None:
            continue
        found, why = _find_router(model, path)
        if found is not None:
            router = model.get_submodule(found)
            routing, why = _describe(router, num_experts)
            if routing is not None:
                plans[path] = FusedRouting(found, routing)
        if why:
            refused[path] = [why]
    return plans, refused


def _beside(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """Return the other children of the parent of a path."""
    prefix, _, own = path.rpartition(".")
    parent = model.get_submodule(prefix)
    return {name: child for name, child in parent.named_children() if name != own}


def fused_router_beside(model: nn.Module, path: str) -> FusedRouter | None:
    """Return the fused router of the experts at a path, if they have one."""
    fused = (child for child in _beside(model, path).values() if isinstance(child, FusedRouter))
    return next(fused, None)


def _find_router(model: nn.Module, path: str) -> tuple[str | None, str]:
    """Return (the router's dotted name, "") or (None, why there is none)."""
    prefix = path.rpartition(".")[0]
    module, parent = model.get_submodule(path), model.get_submodule(prefix)
    stands_alone = is_experts_module(module) or isinstance(module, FusedExperts)
    if not stands_alone or isinstance(parent, FusedMoeBlock):
        return None, "its block loops over a ModuleList and routes by itself; use routing='given'"
    children = {name: type(child).__name__ for name, child in _beside(model, path).items()}
    known = [name for name, kind in children.items() if kind in ROUTERS]
    if len(known) == 1:
        return f"{prefix}.{known[0]}".lstrip("."), ""
    if known:
        return None, f"its parent has several routers: {', '.join(known)}"
    near = [f"{n} ({k})" for n, k in children.items() if any(w in n for w in ROUTER_WORDS)]
    if near:
        known_as = "a class in fp4moe.models.routers.ROUTERS"
        return None, f"{', '.join(near)} beside it is no router of {known_as}"
    return None, f"its parent {type(parent).__name__} holds no router beside it"


def _describe(router: Any, num_experts: int | None) -> tuple[Routing | None, str]:
    """Return (how it chooses, "") for a router whose numbers agree, or (None, why not)."""
    kind = type(router)
    name = kind.__name__
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    if reasons := tensor_reasons(tensors):
        return None, f"in its router {name}: {'; '.join(reasons)}"
    if any("forward" in vars(module) for module in router.modules()):
        return None, f"the forward of its router {name} was replaced on the instance"
    if any(m._forward_hooks or m._forward_pre_hooks for m in router.modules() if m is not router):
        return None, f"parts of its router {name} have forward hooks, which a check would run"
    if not getattr(router, "norm_topk_prob", True):
        return None, f"its router {name} has norm_topk_prob=False, and the operator renormalises"
    try:
        routing = read_routing(router)
        for probe, dtype in _probes(router, ROUTERS[name]):
            why = _difference(probe, routing, dtype, num_experts)
            if why:
                return None, f"its router {name} {why}"
    except Exception as raised:  # the model's code may raise anything
        return None, f"its router {name} is not of the known form: {raised}"
    return routing, ""


def _probes(router: Any, form: RouterForm) -> Iterator[tuple[Any, torch.dtype]]:
    yield router, attrgetter(form.projection)(router).dtype
    # A copied hook may bring a copy of all that it belongs to.
    hooks = [table for name, table in vars(router).items() if name.endswith("_hooks")]
    precise = copy.deepcopy(router, {id(table): type(table)() for table in hooks}).float()
    yield precise, torch.float32
    if form.bias is not None:
        # Negative scores tell -inf from 0 for the experts of dropped groups.
        bias = getattr(precise, form.bias)
        random = random_normal(torch.Generator("cpu").manual_seed(1), bias.shape) - 2
        bias.data.copy_(random)
        yield precise, torch.float32


def _difference(router: Any, routing: Routing, dtype: torch.dtype, num_experts: int | None) -> str:
    """Run a router and what it would become; return how they differ, "" if they agree."""
    fused = fused_copy(router, routing)
    form = fused.form
    weight = attrgetter(form.projection)(router)
    sizes = torch.logspace(-1, 1, PROBE_TOKENS, dtype=torch.float32, device="cpu")[:, None]
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = random_normal(generator, (PROBE_TOKENS, weight.shape[1])) * sizes
    hidden = hidden.to(weight.device, dtype)
    with torch.no_grad(), float32_as_written(weight.device):
        first, weights, ids = router.forward(hidden)
        expected_first, expected, expected_ids = fused.forward(hidden)
        logits = form.logits(router, hidden)
    if logits.shape[1] != num_experts:
        return f"has logits of {logits.shape[1]} experts, not {num_experts}"
    clear = _clear(logits, getattr(router, form.bias) if form.bias else None, routing)
    if int(clear.sum()) < PROBE_TOKENS // 4:
        return (
            f"scores experts alike for all but {int(clear.sum())} of {PROBE_TOKENS} random "
            f"tokens in {dtype}, too few to compare"
        )
    named = {"ids": (ids, expected_ids), "weights": (weights, expected)}
    named["logits"] = first, expected_first
    for what, (own, new) in named.items():
        if own.shape != new.shape or own.dtype != new.dtype:
            got, wanted = (f"{t.dtype} {list(t.shape)}" for t in (own, new))
            return f"returns {what} of {got}, not {wanted}"
    if not torch.allclose(first, expected_first, rtol=2 * torch.finfo(first.dtype).eps, atol=0):
        return "does not return its logits, or their softmax, as others of its class"
    (ids, order), (expected_ids, expected_order) = ids.sort(), expected_ids.sort()
    other = clear & (ids != expected_ids).any(1)
    if bool(other.any()):
        token = int(other.nonzero()[0])
        return (
            f"does not choose as {routing.method}: experts {ids[token].tolist()} instead of "
            f"{expected_ids[token].tolist()} for a random token in {dtype}"
        )
    info = torch.finfo(weights.dtype)
    actual, expected = weights.gather(1, order).float(), expected.gather(1, expected_order).float()
    # Beyond the roundings in float32, a cast of both, which may fall to either side.
    allowed = (ROUNDINGS + info.eps) * expected.abs() + info.tiny * info.eps
    excess = ((actual - expected).abs() / allowed)[clear].nan_to_num(nan=torch.inf)
    if bool((excess > 1).any()):
        worst = int(excess.argmax())
        pair = float(actual[clear].flatten()[worst]), float(expected[clear].flatten()[worst])
        return (
            f"does not weight as {routing.method}: {pair[0]:.6g} instead of {pair[1]:.6g} for a "
            f"random token in {dtype}"
        )
    return ""


def _clear(logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing) -> torch.Tensor:
    """Return which tokens choose the same experts whatever the last bits of their scores are."""
    scores = logits.float()
    scores = scores.softmax(-1) if routing.method == "softmax_topk" else scores.sigmoid()
    if bias is not None:
        scores = scores + bias.float()

    def gap(values: torch.Tensor, count: int) -> torch.Tensor:
        if count == values.shape[1]:
            return torch.full_like(values[:, 0], torch.inf)
        ordered = values.sort(descending=True).values
        return ordered[:, count - 1] - ordered[:, count]

    margin = ROUNDINGS * (1 + scores.abs().amax(-1))
    clear = torch.ones_like(margin, dtype=torch.bool)
    if routing.num_groups > 1:
        grouped = scores.unflatten(1, (routing.num_groups, -1))
        totals = grouped.topk(2).values.sum(-1)
        clear = gap(totals, routing.top_groups) > 2 * margin
        kept = torch.zeros_like(totals).scatter(1, totals.topk(routing.top_groups).indices, 1)
        scores = grouped.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1)
    return clear & (gap(scores, routing.top_k) > margin)
