"""Blocks whose kernel chooses the experts: their router returns logits and leaves the choice to it.

Class names propose (ROUTERS), numbers decide: a router must agree with the reference kernel on
random tokens, and a run of the float block must show that its choice reaches the experts only.
Not handled, with the reason: other routers, weights that are not renormalised, ModuleLists,
`output_router_logits`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..kernels import Routing
from ..precision import float32_as_written
from ..random_floats import random_normal
from ..routing import ROUNDINGS, route
from .block import Candidate, storage_reasons
from .experts_module import is_experts_module
from .routing_trace import RoutingTrace, watch, ways_to_run

__all__ = ["ROUTERS", "FusedRouting", "LogitsRouter", "RouterForm", "plan_fused_routing"]

Logits = Callable[[Any, torch.Tensor], torch.Tensor]
ROUTER_WORDS = ("gate", "rout")
PROBE_TOKENS = 64


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
        output_scale: [E] factor of each expert's weight, which moves into the experts.
        constants: plain values that `logits` reads.
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
    constants: tuple[str, ...] = ()


_SOFTMAX = RouterForm("softmax_topk", _linear_logits, "weight", "top_k")
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
    constants=("scalar_root_size",),
)
# By class name, transformers 5.23.
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
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "MiniMaxTopKRouter",
            "MixtralTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ),
        _SOFTMAX,
    ),
}


class LogitsRouter(nn.Module):
    """A router without its choice: hidden [..., H] -> (logits [T, E], routing bias, logits).

    It stands where the router did and holds the same tensors under the same names, all but
    `form.output_scale`. The block hands the second and third result to its experts as weights and
    ids; there RoutedExperts takes them as bias ([E], or [0] for none) and logits.
    """

    def __init__(self, router: nn.Module, form: RouterForm):
        super().__init__()
        self.form = form
        for name, parameter in router._parameters.items():
            if name != form.output_scale:
                self.register_parameter(name, parameter)
        for name, buffer in router._buffers.items():
            persistent = name not in router._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        for name, module in router.named_children():
            self.add_module(name, module)
        for name in form.constants:
            setattr(self, name, getattr(router, name))
        if form.bias is None:
            empty = torch.empty(
                0, dtype=torch.float32, device=attrgetter(form.projection)(router).device
            )
            self.register_buffer("no_bias", empty, persistent=False)
        self.training = router.training

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits twice, around the bias."""
        logits = self.form.logits(self, hidden_states)
        return logits, getattr(self, self.form.bias or "no_bias"), logits


@dataclasses.dataclass
class FusedRouting:
    """How the kernel routes for one block.

    Attributes:
        path: dotted name of the router.
        router: what takes its place.
        routing, output_scale: for RoutedExperts.
    """

    path: str
    router: LogitsRouter
    routing: Routing
    output_scale: torch.Tensor | None


def plan_fused_routing(
    model: nn.Module, candidates: Iterable[Candidate]
) -> tuple[dict[str, FusedRouting], dict[str, list[str]]]:
    """Return (plans, reasons against) by the candidates' paths; changes nothing.

    Runs routers and float blocks on random tokens. A block that needs more than hidden states is
    run as a part of the nearest model around it that takes token ids.
    """
    plans: dict[str, FusedRouting] = {}
    refused: dict[str, list[str]] = {}
    traces: dict[str, RoutingTrace] = {}
    for candidate in candidates:
        router, why = _find_router(model, candidate)
        if router is not None:
            plan, why = _describe(router, candidate, model.get_submodule(router))
            if plan is not None:
                plans[candidate.path] = plan
                parent = model.get_submodule(candidate.path.rpartition(".")[0])
                traces[candidate.path] = RoutingTrace(
                    parent, model.get_submodule(router), candidate.module
                )
        if why:
            refused[candidate.path] = [why]
    for path, trace in traces.items():
        weight = attrgetter(plans[path].router.form.projection)(trace.router)
        for run in ways_to_run(model, path, weight):
            if trace.finished:
                break
            with float32_as_written(weight.device):
                watch(run, [t for t in traces.values() if not t.finished])
        if why := trace.problem or trace.error:
            refused[path] = [why]
            del plans[path]
    return plans, refused


def _find_router(model: nn.Module, candidate: Candidate) -> tuple[str | None, str]:
    """Return (the router's dotted name, "") or (None, why there is none)."""
    if not is_experts_module(candidate.module):
        return None, "its block loops over a ModuleList and routes by itself; use routing='given'"
    if getattr(candidate.module.config, "output_router_logits", False):
        return None, (
            "its configuration sets output_router_logits, which records the model's own router; "
            "set it to False"
        )
    prefix, _, own = candidate.path.rpartition(".")
    parent = model.get_submodule(prefix)
    children = {name: type(c).__name__ for name, c in parent.named_children() if name != own}
    known = [name for name, kind in children.items() if kind in ROUTERS]
    if len(known) == 1:
        return f"{prefix}.{known[0]}".lstrip("."), ""
    if known:
        return None, f"its parent has several routers: {', '.join(known)}"
    near = [f"{n} ({k})" for n, k in children.items() if any(w in n for w in ROUTER_WORDS)]
    if near:
        return None, f"{', '.join(near)} beside it is no router of a class in fused_routing.ROUTERS"
    return None, f"its parent {type(parent).__name__} holds no router beside it"


def _describe(path: str, candidate: Candidate, router: Any) -> tuple[FusedRouting | None, str]:
    """Return (plan, "") for a router whose numbers agree, or (None, why it has none)."""
    name = type(router).__name__
    form = ROUTERS[name]
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    if reasons := storage_reasons(router, tensors):
        return None, f"in its router {name}: {'; '.join(reasons)}"
    if any("forward" in vars(module) for module in router.modules()):
        return None, f"the forward of its router {name} was replaced on the instance"
    if not getattr(router, "norm_topk_prob", True):
        return None, f"its router {name} has norm_topk_prob=False, and kernels renormalise"
    try:
        routing = _routing(router, form)
        replacement = LogitsRouter(router, form)
        scale = getattr(router, form.output_scale) if form.output_scale else None
        for probe, dtype in _probes(router, form):
            why = _difference(probe, form, routing, dtype, candidate.num_experts)
            if why:
                return None, f"its router {name} {why}"
    except Exception as raised:  # the model's code may raise anything
        return None, f"its router {name} is not of the known form: {raised}"
    return FusedRouting(path, replacement, routing, None if scale is None else scale.detach()), ""


def _routing(router: Any, form: RouterForm) -> Routing:
    def read(name: str | None) -> Any:
        return 1 if name is None else attrgetter(name)(router)

    groups, kept = int(read(form.num_groups)), int(read(form.top_groups))
    if groups == kept:
        # Nothing is dropped, and kernels limit the number of groups.
        groups = kept = 1
    return Routing(form.method, int(read(form.top_k)), groups, kept, float(read(form.scaling)))


def _probes(router: Any, form: RouterForm) -> Iterator[tuple[Any, torch.dtype]]:
    yield router, attrgetter(form.projection)(router).dtype
    precise = copy.deepcopy(router).float()
    yield precise, torch.float32
    if form.bias is not None:
        # Negative scores tell -inf from 0 for the experts of dropped groups.
        bias = getattr(precise, form.bias)
        random = random_normal(torch.Generator("cpu").manual_seed(1), bias.shape) - 2
        bias.data.copy_(random)
        yield precise, torch.float32


def _difference(
    router: Any, form: RouterForm, routing: Routing, dtype: torch.dtype, num_experts: int | None
) -> str:
    """Run a router and the reference kernel's routing; return how they differ, "" if they agree."""
    weight = attrgetter(form.projection)(router)
    sizes = torch.logspace(-1, 1, PROBE_TOKENS, dtype=torch.float32, device="cpu")[:, None]
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = random_normal(generator, (PROBE_TOKENS, weight.shape[1])) * sizes
    hidden = hidden.to(weight.device, dtype)
    with torch.no_grad(), float32_as_written(weight.device):
        _, weights, ids = router(hidden)
        logits, bias, _ = LogitsRouter(router, form)(hidden)
        if logits.shape[1] != num_experts:
            return f"has logits of {logits.shape[1]} experts, not {num_experts}"
        expected_ids, expected = route(logits, bias, routing)
        if form.output_scale is not None:
            expected = expected * getattr(router, form.output_scale).float()[expected_ids]
        clear = _clear(logits, bias, routing)
    if int(clear.sum()) < PROBE_TOKENS // 4:
        return (
            f"scores experts alike for all but {int(clear.sum())} of {PROBE_TOKENS} random "
            f"tokens in {dtype}, too few to compare"
        )
    if ids.shape != expected_ids.shape:
        return f"returns ids of shape {list(ids.shape)}, not {list(expected_ids.shape)}"
    (ids, order), (expected_ids, expected_order) = ids.sort(), expected_ids.sort()
    other = clear & (ids != expected_ids).any(1)
    if bool(other.any()):
        token = int(other.nonzero()[0])
        return (
            f"does not choose as {routing.method}: experts {ids[token].tolist()} instead of "
            f"{expected_ids[token].tolist()} for a random token in {dtype}"
        )
    actual, expected = weights.gather(1, order).float(), expected.gather(1, expected_order)
    # Beyond the roundings in float32, the router's own cast.
    info = torch.finfo(weights.dtype)
    allowed = (ROUNDINGS + info.eps / 2) * expected.abs() + info.tiny * info.eps
    excess = ((actual - expected).abs() / allowed)[clear].nan_to_num(nan=torch.inf)
    if bool((excess > 1).any()):
        worst = int(excess.argmax())
        pair = float(actual[clear].flatten()[worst]), float(expected[clear].flatten()[worst])
        return (
            f"does not weight as {routing.method}: {pair[0]:.6g} instead of {pair[1]:.6g} for a "
            f"random token in {dtype}"
        )
    return ""


def _clear(logits: torch.Tensor, bias: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return which tokens choose the same experts whatever the last bits of their scores are."""
    scores = logits.float()
    scores = scores.softmax(-1) if routing.method == "softmax_topk" else scores.sigmoid()
    if bias.numel():
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
